//! Boots the machine with a job and hands on what the job prints.

use super::image::Image;
use super::job::{END_MARK, Job};
use anyhow::{Context, Result, bail};
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

/// How to boot.
#[derive(Debug, Clone)]
pub struct Options {
    /// Directory of this boot: the job's disk and the console's log. Removed by the caller.
    pub dir: PathBuf,
    /// Memory in mebibytes.
    pub memory_mib: u32,
    /// A tap device of this machine that becomes the virtual one's first network card.
    pub tap: Option<String>,
}

/// A running machine; dropping it ends it.
#[derive(Debug)]
pub struct Machine {
    qemu: Child,
    console: PathBuf,
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
        let qemu = qemu
            .env("TMPDIR", &options.dir)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .context("start qemu-system-x86_64")?;
        Ok(Self { qemu, console })
    }

    /// Hands every line of the job's output to `line` until the machine is off, and returns the
    /// job's exit code.
    ///
    /// # Errors
    /// When the machine ends before the job does; the message carries the end of its console.
    pub fn finish(mut self, mut line: impl FnMut(&str)) -> Result<i32> {
        let output = self
            .qemu
            .stdout
            .take()
            .context("the job's output was taken already")?;
        let mut code = None;
        for text in BufReader::new(output).lines() {
            let text = text.context("read the job's output")?;
            let text = text.trim_end_matches('\r');
            match text.strip_prefix(END_MARK) {
                Some(rest) => code = rest.trim().parse().ok(),
                None => line(text),
            }
        }
        let status = self.qemu.wait().context("wait for the machine")?;
        let Some(code) = code else {
            let console = fs::read_to_string(&self.console).unwrap_or_default();
            let lines: Vec<&str> = console.lines().collect();
            let end = lines[lines.len().saturating_sub(40)..].join("\n");
            bail!(
                "the machine ended ({status}) before its job did; its console ended with:\n{end}"
            );
        };
        Ok(code)
    }
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
