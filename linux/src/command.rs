//! Runs a short program to its end: bounded output, a time limit, no shell and no thread.
//!
//! For programs that the node must exec (CNI plugins). `std` starts them by `posix_spawn`; one
//! poll loop then feeds standard input, drains both outputs and waits on a pidfd, so a child that
//! fills one pipe while another is full cannot dead-lock us, and one that hangs is killed.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// Exec answers "text file busy" while a plugin is being copied in place; an installer that
/// renames never causes it. Retried this often, each time after yielding for a moment.
const BUSY_ATTEMPTS: u32 = 5;

/// What to run.
#[derive(Debug, Clone)]
pub struct ShortCommand {
    /// Absolute path of the program.
    pub program: PathBuf,
    /// Its arguments, without its name.
    pub args: Vec<OsString>,
    /// Its whole environment.
    pub env: Vec<(OsString, OsString)>,
    /// What it reads from standard input.
    pub stdin: Vec<u8>,
    /// Longest standard output accepted, in bytes; standard error is cut at the same length.
    pub max_output_bytes: usize,
    /// After this it is killed.
    pub time_limit: Duration,
}

/// What it said.
#[derive(Debug)]
pub struct ShortOutput {
    /// How it ended.
    pub status: ExitStatus,
    /// Standard output, complete.
    pub stdout: Vec<u8>,
    /// Standard error, perhaps cut.
    pub stderr: Vec<u8>,
}

/// Why a program did not run to its end.
#[derive(Debug, thiserror::Error)]
pub enum ShortCommandError {
    /// It could not be started.
    #[error("start {program}")]
    Start {
        /// The program.
        program: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A pipe to it or its pidfd failed.
    #[error("talk to {program}")]
    Talk {
        /// The program.
        program: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It ran too long and was killed.
    #[error("{program} did not finish within {} ms and was killed", limit.as_millis())]
    Timeout {
        /// The program.
        program: PathBuf,
        /// The limit.
        limit: Duration,
    },
    /// It printed too much and was killed.
    #[error("{program} printed more than {limit_bytes} bytes and was killed")]
    TooLong {
        /// The program.
        program: PathBuf,
        /// The limit.
        limit_bytes: usize,
    },
}

impl ShortCommand {
    /// Runs it and waits for its end.
    ///
    /// # Errors
    /// [`ShortCommandError`]; in every case no process of ours is left running.
    pub fn run(&self) -> Result<ShortOutput, ShortCommandError> {
        let mut child = self.start()?;
        let outcome = self.converse(&mut child);
        if outcome.is_err() {
            // It may have ended by itself in the meantime; both calls are then harmless.
            let _ = child.kill();
            let _ = child.wait();
        }
        outcome
    }

    fn start(&self) -> Result<Child, ShortCommandError> {
        let mut attempt = 1;
        loop {
            let started = Command::new(&self.program)
                .args(&self.args)
                .env_clear()
                .envs(self.env.iter().map(|(key, value)| (key, value)))
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn();
            match started {
                Ok(child) => return Ok(child),
                Err(e)
                    if e.kind() == io::ErrorKind::ExecutableFileBusy && attempt < BUSY_ATTEMPTS =>
                {
                    attempt += 1;
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(source) => {
                    return Err(ShortCommandError::Start {
                        program: self.program.clone(),
                        source,
                    });
                }
            }
        }
    }

    fn converse(&self, child: &mut Child) -> Result<ShortOutput, ShortCommandError> {
        let talk = |source| ShortCommandError::Talk {
            program: self.program.clone(),
            source,
        };
        let deadline = Instant::now() + self.time_limit;
        let pid = Pid::from_child(child);
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(|e| talk(e.into()))?;
        let mut pipes = Pipes::of(child, &self.stdin).map_err(talk)?;
        let mut ended = false;
        while !ended || pipes.outputs_open() {
            // A grandchild may keep our pipes open after the child ended: what is there now is
            // all that counts then.
            let left = if ended {
                Duration::ZERO
            } else {
                deadline.saturating_duration_since(Instant::now())
            };
            let ready = pipes.wait(&pidfd, !ended, left).map_err(talk)?;
            if !ready.any() {
                if ended {
                    break;
                }
                let program = self.program.clone();
                return Err(ShortCommandError::Timeout {
                    program,
                    limit: self.time_limit,
                });
            }
            pipes.serve(&ready, self.max_output_bytes).map_err(talk)?;
            if pipes.out.len() > self.max_output_bytes {
                return Err(ShortCommandError::TooLong {
                    program: self.program.clone(),
                    limit_bytes: self.max_output_bytes,
                });
            }
            ended |= ready.ended;
        }
        let status = child.wait().map_err(talk)?;
        Ok(ShortOutput {
            status,
            stdout: pipes.out,
            stderr: pipes.err,
        })
    }
}

/// Our ends of the three pipes, and what went through them.
struct Pipes<'a> {
    stdin: Option<ChildStdin>,
    unsent: &'a [u8],
    stdout: Option<ChildStdout>,
    out: Vec<u8>,
    stderr: Option<ChildStderr>,
    err: Vec<u8>,
}

#[derive(Default)]
struct Ready {
    ended: bool,
    stdin: bool,
    stdout: bool,
    stderr: bool,
}

impl Ready {
    fn any(&self) -> bool {
        self.ended || self.stdin || self.stdout || self.stderr
    }
}

impl<'a> Pipes<'a> {
    fn of(child: &mut Child, input: &'a [u8]) -> io::Result<Self> {
        let stdin = child.stdin.take();
        if let Some(pipe) = &stdin {
            rustix::fs::fcntl_setfl(pipe, rustix::fs::OFlags::NONBLOCK)?;
        }
        Ok(Self {
            stdin,
            unsent: input,
            stdout: child.stdout.take(),
            out: Vec::new(),
            stderr: child.stderr.take(),
            err: Vec::new(),
        })
    }

    fn outputs_open(&self) -> bool {
        self.stdout.is_some() || self.stderr.is_some()
    }

    fn wait(&self, pidfd: &OwnedFd, watch_end: bool, left: Duration) -> io::Result<Ready> {
        let mut fds: Vec<PollFd<'_>> = Vec::with_capacity(4);
        let mut roles: Vec<fn(&mut Ready) -> &mut bool> = Vec::with_capacity(4);
        if watch_end {
            fds.push(PollFd::new(pidfd, PollFlags::IN));
            roles.push(|r| &mut r.ended);
        }
        if let Some(pipe) = &self.stdin {
            fds.push(PollFd::new(pipe, PollFlags::OUT));
            roles.push(|r| &mut r.stdin);
        }
        if let Some(pipe) = &self.stdout {
            fds.push(PollFd::new(pipe, PollFlags::IN));
            roles.push(|r| &mut r.stdout);
        }
        if let Some(pipe) = &self.stderr {
            fds.push(PollFd::new(pipe, PollFlags::IN));
            roles.push(|r| &mut r.stderr);
        }
        let mut ready = Ready::default();
        let timeout = Timespec::try_from(left).map_err(|_| io::ErrorKind::InvalidInput)?;
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) => {}
            // A signal: report "something", so that the caller looks at the clock again.
            Err(rustix::io::Errno::INTR) => return self.wait(pidfd, watch_end, left),
            Err(e) => return Err(e.into()),
        }
        for (fd, role) in fds.iter().zip(roles) {
            *role(&mut ready) = !fd.revents().is_empty();
        }
        Ok(ready)
    }

    fn serve(&mut self, ready: &Ready, max_output_bytes: usize) -> io::Result<()> {
        if ready.stdin
            && let Some(pipe) = &mut self.stdin
        {
            match pipe.write(self.unsent) {
                Ok(count) => self.unsent = &self.unsent[count..],
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                // It does not want to read: not our concern, it will say so.
                Err(e) if e.kind() == io::ErrorKind::BrokenPipe => self.unsent = &[],
                Err(e) => return Err(e),
            }
            if self.unsent.is_empty() {
                self.stdin = None;
            }
        }
        if ready.stdout {
            read_some(&mut self.stdout, &mut self.out, usize::MAX)?;
        }
        if ready.stderr {
            read_some(&mut self.stderr, &mut self.err, max_output_bytes)?;
        }
        Ok(())
    }
}

/// Reads once; closes the pipe at its end; drops what exceeds `keep_bytes`.
fn read_some<R: Read + AsFd>(
    pipe: &mut Option<R>,
    into: &mut Vec<u8>,
    keep_bytes: usize,
) -> io::Result<()> {
    let Some(open) = pipe else { return Ok(()) };
    let mut chunk = [0_u8; 16 * 1024];
    match open.read(&mut chunk) {
        Ok(0) => *pipe = None,
        Ok(count) => {
            let room = keep_bytes.saturating_sub(into.len());
            into.extend_from_slice(&chunk[..count.min(room)]);
        }
        Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
        Err(e) => return Err(e),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(
        script: &str,
        stdin: &[u8],
        limit: Duration,
    ) -> Result<ShortOutput, ShortCommandError> {
        let dir = std::env::temp_dir().join(format!("ferrule-cmd-{}-{}", std::process::id(), {
            use std::sync::atomic::{AtomicU32, Ordering};
            static NEXT: AtomicU32 = AtomicU32::new(0);
            NEXT.fetch_add(1, Ordering::Relaxed)
        }));
        let staged = dir.with_extension("tmp");
        std::fs::write(&staged, format!("#!/bin/sh\n{script}\n")).unwrap();
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(&staged, std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::rename(&staged, &dir).unwrap();
        let outcome = ShortCommand {
            program: dir.clone(),
            args: Vec::new(),
            env: vec![("PATH".into(), "/usr/bin:/bin".into())],
            stdin: stdin.to_vec(),
            max_output_bytes: 1 << 20,
            time_limit: limit,
        }
        .run();
        std::fs::remove_file(dir).unwrap();
        outcome
    }

    #[test]
    fn input_larger_than_a_pipe_comes_back_whole() {
        let input = vec![b'x'; 700_000];
        let output = shell("cat", &input, Duration::from_secs(20)).unwrap();
        assert!(output.status.success());
        assert_eq!(output.stdout, input);
    }

    #[test]
    fn a_program_that_hangs_is_killed_at_its_limit() {
        let error = shell("exec sleep 1000", b"", Duration::from_millis(50)).unwrap_err();
        assert!(
            matches!(error, ShortCommandError::Timeout { .. }),
            "{error}"
        );
    }

    #[test]
    fn endless_output_is_refused() {
        let error = shell("exec cat /dev/zero", b"", Duration::from_secs(20)).unwrap_err();
        assert!(
            matches!(error, ShortCommandError::TooLong { .. }),
            "{error}"
        );
    }

    #[test]
    fn a_grandchild_that_keeps_the_pipes_open_does_not_hold_us() {
        let output = shell("sleep 3 & echo done", b"", Duration::from_secs(20)).unwrap();
        assert_eq!(output.stdout, b"done\n");
    }

    #[test]
    fn a_program_that_does_not_read_its_input_is_no_error() {
        let output = shell("exit 3", &vec![b'x'; 700_000], Duration::from_secs(20)).unwrap();
        assert_eq!(output.status.code(), Some(3));
    }
}
