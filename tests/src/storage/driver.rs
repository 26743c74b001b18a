//! The driver as a process.

use anyhow::{Context, Result, bail};
use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// It takes over its pool in milliseconds; a machine under load may take longer.
const START_LIMIT: Duration = Duration::from_secs(30);

/// A running driver; killed when it is dropped.
#[derive(Debug)]
pub struct RunningDriver {
    child: Child,
    socket: PathBuf,
}

impl RunningDriver {
    /// Starts `program` on a pool and waits until it answers.
    ///
    /// # Errors
    /// When it cannot be started or ends at once.
    pub fn start(
        program: &Path,
        pool: &Path,
        socket: &Path,
        log: &Path,
        args: &[&str],
        env: &[(&str, String)],
    ) -> Result<Self> {
        let file = File::options()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| format!("open {}", log.display()))?;
        // Nobody may take an earlier driver's socket for this one's.
        let _ = std::fs::remove_file(socket);
        let child = Command::new(program)
            .args(["run", "--node", "test-node", "--pool"])
            .arg(pool)
            .arg("--endpoint")
            .arg(socket)
            .args(args)
            .envs(env.iter().map(|(key, value)| (key, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(file)
            .spawn()
            .with_context(|| format!("start {}", program.display()))?;
        let mut driver = Self {
            child,
            socket: socket.to_owned(),
        };
        driver.wait_ready(log)?;
        Ok(driver)
    }

    fn wait_ready(&mut self, log: &Path) -> Result<()> {
        let started = Instant::now();
        while UnixStream::connect(&self.socket).is_err() {
            if let Some(status) = self.child.try_wait().context("wait for the driver")? {
                let said = std::fs::read_to_string(log).unwrap_or_default();
                bail!("the driver ended at once ({status}):\n{said}");
            }
            if started.elapsed() > START_LIMIT {
                bail!("the driver does not answer on {}", self.socket.display());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Where it listens.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Kills it, as a node's trouble would.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for RunningDriver {
    fn drop(&mut self) {
        self.kill();
    }
}
