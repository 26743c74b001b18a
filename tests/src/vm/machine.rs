//! Boots the machine with a job, hands on what the job prints, and asks a serving job to run
//! commands.

use super::image::Image;
use super::job::{COMMAND_MARK, END_MARK, FINISH, Job};
use crate::process::{self, OWNER_VARIABLE, ProcessIdentity};
use anyhow::{Context, Result, bail};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

/// How to boot.
#[derive(Debug, Clone)]
pub struct Options {
    /// Directory of this boot: the job's disk and the console's log. Removed by the caller.
    pub dir: PathBuf,
    /// Memory in mebibytes.
    pub memory_mib: u32,
    /// A tap device of this machine that becomes the virtual one's first network card.
    pub tap: Option<String>,
    /// The machine is ended after this time, whatever it does.
    pub limit: Duration,
}

/// A running machine; dropping it ends it.
#[derive(Debug)]
pub struct Machine {
    qemu: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    console: PathBuf,
    limit: Duration,
}

/// What a command in the machine came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Its exit code.
    pub code: i32,
    /// Standard output and standard error.
    pub text: String,
}

impl Machine {
    /// Boots. The job starts some fifteen seconds later.
    ///
    /// # Errors
    /// When the job cannot be packed or the emulator cannot be started.
    pub fn boot(image: &Image, job: &Job, options: &Options) -> Result<Self> {
        fs::create_dir_all(&options.dir)
            .with_context(|| format!("create {}", options.dir.display()))?;
        let disk = job.pack(&options.dir)?;
        let console = options.dir.join("console.log");
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args(["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2"])
            .args(["-display", "none", "-nodefaults", "-no-reboot"])
            .args(["-device", "virtio-rng-pci"])
            .args(["-m", &options.memory_mib.to_string()])
            .arg("-kernel")
            .arg(&image.kernel)
            .arg("-initrd")
            .arg(&image.initrd)
            .args([
                "-append",
                "root=/dev/vda rw console=ttyS0 net.ifnames=0 quiet",
            ])
            // Writes to the root disk go to an unlinked temporary file.
            .args(["-drive", &drive(&image.disk, ",snapshot=on")])
            .args(["-drive", &drive(&disk, ",readonly=on")])
            .args(["-serial", &format!("file:{}", console.display())])
            .args(["-serial", "stdio"]);
        if let Some(tap) = &options.tap {
            qemu.args([
                "-netdev",
                &format!("tap,id=n0,ifname={tap},script=no,downscript=no"),
            ])
            .args(["-device", "virtio-net-pci,netdev=n0"]);
        }
        let mut qemu = qemu
            .env("TMPDIR", &options.dir)
            // By this a lab that is taken down finds a machine whose starter was killed.
            .env(OWNER_VARIABLE, super::OWNER)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .context("start qemu-system-x86_64")?;
        let input = qemu.stdin.take().context("the machine's input")?;
        let output = qemu.stdout.take().context("the machine's output")?;
        end_after(&qemu, options.limit)?;
        Ok(Self {
            qemu,
            input,
            output: BufReader::new(output),
            console,
            limit: options.limit,
        })
    }

    /// Hands every line of the job's output to `line` until the machine is off, and returns the
    /// job's exit code.
    ///
    /// # Errors
    /// When the machine ends before the job does; the message carries the end of its console.
    pub fn finish(mut self, mut line: impl FnMut(&str)) -> Result<i32> {
        let mut code = None;
        while let Some(text) = self.next_line()? {
            match text.strip_prefix(END_MARK) {
                Some(rest) => code = rest.trim().parse().ok(),
                None => line(&text),
            }
        }
        let Some(code) = code else {
            return Err(self.ended_early());
        };
        self.qemu.wait().context("wait for the machine")?;
        Ok(code)
    }

    /// Waits until a serving job is ready for commands, and returns what it printed before.
    ///
    /// # Errors
    /// When the machine or its job ends first.
    pub fn ready(&mut self) -> Result<Answer> {
        let mut text = String::new();
        while let Some(line) = self.next_line()? {
            if let Some(code) = line.strip_prefix(COMMAND_MARK) {
                let code = code
                    .trim()
                    .parse()
                    .context("parse the command's exit code")?;
                let text = text.trim_end().to_owned();
                return Ok(Answer { code, text });
            }
            text.push_str(&line);
            text.push('\n');
        }
        Err(self.ended_early())
    }

    /// Runs one line of shell in the machine.
    ///
    /// # Errors
    /// When the machine or its job ends first.
    pub fn command(&mut self, line: &str) -> Result<Answer> {
        anyhow::ensure!(!line.contains('\n'), "a command is one line, not {line:?}");
        writeln!(self.input, "{line}").context("write to the machine")?;
        self.ready()
    }

    /// Runs one line of shell and returns what it printed.
    ///
    /// # Errors
    /// As [`Machine::command`], and when its exit code is not 0.
    pub fn stdout(&mut self, line: &str) -> Result<String> {
        let answer = self.command(line)?;
        if answer.code != 0 {
            bail!(
                "`{line}` failed in the machine ({}): {}",
                answer.code,
                answer.text
            );
        }
        Ok(answer.text)
    }

    /// Ends a serving job and waits until the machine is off.
    ///
    /// # Errors
    /// As [`Machine::finish`].
    pub fn power_off(mut self) -> Result<()> {
        writeln!(self.input, "{FINISH}").context("write to the machine")?;
        self.finish(|_| ()).map(drop)
    }

    /// The next line of the job; none when the machine is off.
    fn next_line(&mut self) -> Result<Option<String>> {
        let mut bytes = Vec::new();
        let read = self.output.read_until(b'\n', &mut bytes);
        if read.context("read the job's output")? == 0 {
            return Ok(None);
        }
        // Test programs print what they were given, which is not always UTF-8.
        let text = String::from_utf8_lossy(&bytes);
        Ok(Some(text.trim_end_matches(['\r', '\n']).to_owned()))
    }

    fn ended_early(&mut self) -> anyhow::Error {
        let status = match self.qemu.wait() {
            Ok(status) => status.to_string(),
            Err(error) => error.to_string(),
        };
        let console = fs::read_to_string(&self.console).unwrap_or_default();
        let lines: Vec<&str> = console.lines().collect();
        let end = lines[lines.len().saturating_sub(40)..].join("\n");
        anyhow::anyhow!(
            "the machine ended before its job did ({status}; its limit is {:?}); its console \
             ended with:\n{end}",
            self.limit
        )
    }
}

/// Ends the machine when `limit` has passed.
fn end_after(qemu: &Child, limit: Duration) -> Result<()> {
    let pid = i32::try_from(qemu.id()).context("process id out of range")?;
    let identity = ProcessIdentity::of(pid).context("the machine ended at once")?;
    std::thread::spawn(move || {
        if let Ok(false) = identity.wait_gone(limit) {
            // Only fails when it went by itself meanwhile.
            drop(process::kill(identity, Duration::from_secs(10)));
        }
    });
    Ok(())
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Already reaped after `finish`; then both calls fail and that is fine.
        drop(self.qemu.kill());
        drop(self.qemu.wait());
    }
}

fn drive(path: &std::path::Path, more: &str) -> String {
    format!("file={},if=virtio,format=raw{more}", path.display())
}
