//! A program on a terminal of its own, to be typed at.

use anyhow::{Context, Result, bail};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, ExitStatus};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// How long what is waited for may take to be shown.
const LIMIT: Duration = Duration::from_secs(60);

/// A running program and the terminal it believes to be on.
#[derive(Debug)]
pub struct Terminal {
    master: File,
    child: Child,
    shown: mpsc::Receiver<Vec<u8>>,
    seen: String,
}

impl Terminal {
    /// Starts a command with the terminal as its controlling one.
    ///
    /// # Errors
    /// When no terminal can be had or the program does not start (`setsid` of util-linux gives
    /// it the terminal).
    pub fn start(command: &Command) -> Result<Self> {
        use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags).context("open a terminal")?;
        grantpt(&master).context("grant the terminal")?;
        unlockpt(&master).context("unlock the terminal")?;
        let slave = ioctl_tiocgptpeer(&master, flags).context("open the program's side")?;
        let side = |fd: &OwnedFd| fd.try_clone().context("copy the program's side");
        let mut wrapped = Command::new("setsid");
        wrapped
            .args(["--ctty", "--wait"])
            .arg(command.get_program())
            .args(command.get_args())
            .stdin(side(&slave)?)
            .stdout(side(&slave)?)
            .stderr(slave);
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => wrapped.env(name, value),
                None => wrapped.env_remove(name),
            };
        }
        let child = wrapped.spawn().context("start setsid")?;
        drop(wrapped);
        let master = File::from(master);
        let mut reader = master.try_clone()?;
        let (sender, shown) = mpsc::channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            // A terminal that its last user has left answers with an error.
            while let Ok(count @ 1..) = reader.read(&mut buffer) {
                if sender.send(buffer[..count].to_vec()).is_err() {
                    return;
                }
            }
        });
        Ok(Self {
            master,
            child,
            shown,
            seen: String::new(),
        })
    }

    /// Types.
    ///
    /// # Errors
    /// When the terminal is gone.
    pub fn send(&mut self, text: &str) -> Result<()> {
        self.master
            .write_all(text.as_bytes())
            .with_context(|| format!("type {text:?}"))
    }

    /// Changes the size.
    ///
    /// # Errors
    /// When the terminal is gone.
    pub fn resize(&self, columns: u16, rows: u16) -> Result<()> {
        let size = rustix::termios::Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        rustix::termios::tcsetwinsize(&self.master, size).context("resize the terminal")
    }

    /// Waits until a text is shown; what came up to its end is not looked at again.
    ///
    /// # Errors
    /// When the program ends or time passes first.
    pub fn expect(&mut self, text: &str) -> Result<String> {
        let until = Instant::now() + LIMIT;
        loop {
            if let Some(at) = self.seen.find(text) {
                let rest = self.seen.split_off(at + text.len());
                return Ok(std::mem::replace(&mut self.seen, rest));
            }
            let left = until.saturating_duration_since(Instant::now());
            match self.shown.recv_timeout(left) {
                Ok(bytes) => self.seen.push_str(&String::from_utf8_lossy(&bytes)),
                Err(_) => bail!("waited for {text:?}; shown: {:?}", self.seen),
            }
        }
    }

    /// Waits for the program's end; gives its status and what was shown last.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn finish(mut self) -> Result<(ExitStatus, String)> {
        let until = Instant::now() + LIMIT;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            match self.shown.recv_timeout(left) {
                Ok(bytes) => self.seen.push_str(&String::from_utf8_lossy(&bytes)),
                // The last user of the terminal is gone.
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    bail!("the program does not end; shown: {:?}", self.seen)
                }
            }
        }
        let status = self.child.wait().context("wait for the program")?;
        Ok((status, std::mem::take(&mut self.seen)))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
