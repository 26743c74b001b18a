//! Start a long-lived helper program from a sealed copy in memory.
//!
//! The copy (memfd) cannot be written by anyone, a container included (CVE-2019-5736); it is made
//! once and its pages are shared by every process started from it. `posix_spawn` shares the
//! caller's memory until the exec (CLONE_VM | CLONE_VFORK), so a large agent with many threads
//! pays nothing for its size.

#![expect(unsafe_code, reason = "system calls without a safe wrapper")]

use rustix::fs::{MemfdFlags, SealFlags};
use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// A program in sealed memory.
#[derive(Debug)]
pub struct SealedProgram {
    file: File,
}

impl SealedProgram {
    /// Copy a program file into sealed memory.
    ///
    /// # Errors
    /// When the file cannot be read or memory cannot be had.
    pub fn from_file(path: &Path) -> io::Result<Self> {
        let mut source = File::open(path)?;
        let fd =
            rustix::fs::memfd_create(c"pod-shim", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        let mut file = File::from(fd);
        io::copy(&mut source, &mut file)?;
        file.flush()?;
        rustix::fs::fcntl_add_seals(
            &file,
            SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE,
        )?;
        Ok(Self { file })
    }

    /// Re-use the sealed copy a live process was started from, when it equals the file at
    /// `path`: an agent that comes back then adds no second copy. None when it does not match.
    ///
    /// # Errors
    /// When `path` cannot be read; a process that is gone or unlike is `None`.
    pub fn from_live(pid: i32, path: &Path) -> io::Result<Option<Self>> {
        let Ok(live) = File::open(format!("/proc/{pid}/exe")) else {
            return Ok(None);
        };
        let sealed = rustix::fs::fcntl_get_seals(&live)
            .is_ok_and(|seals| seals.contains(SealFlags::WRITE | SealFlags::SEAL));
        if !sealed || !same_content(&live, &File::open(path)?)? {
            return Ok(None);
        }
        Ok(Some(Self { file: live }))
    }

    /// Start the program; see [`SpawnOptions`].
    ///
    /// # Errors
    /// The kernel's refusal to clone or to execute.
    pub fn spawn(&self, options: &SpawnOptions<'_>) -> io::Result<i32> {
        posix_spawn(self.file.as_fd(), options)
    }
}

impl AsFd for SealedProgram {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// How a program is started: always in a session of its own, with default signals, stdin and
/// stdout on /dev/null, and every other descriptor closed by close-on-exec.
#[derive(Debug)]
pub struct SpawnOptions<'a> {
    /// Name and arguments.
    pub argv: &'a [String],
    /// Environment, `NAME=value`; nothing is inherited.
    pub env: &'a [String],
    /// Becomes standard error.
    pub stderr: BorrowedFd<'a>,
    /// Becomes descriptor 3.
    pub fd3: Option<BorrowedFd<'a>>,
}

fn same_content(a: &File, b: &File) -> io::Result<bool> {
    if a.metadata()?.len() != b.metadata()?.len() {
        return Ok(false);
    }
    // Through a fresh description each, because /proc/<pid>/exe was opened for us alone.
    let (mut a, mut b) = (io::BufReader::new(a), io::BufReader::new(b));
    let (mut x, mut y) = (vec![0u8; 1 << 16], vec![0u8; 1 << 16]);
    loop {
        let n = a.read(&mut x)?;
        if n == 0 {
            return Ok(b.read(&mut y)? == 0);
        }
        b.read_exact(&mut y[..n])?;
        if x[..n] != y[..n] {
            return Ok(false);
        }
    }
}

fn posix_spawn(program: BorrowedFd<'_>, options: &SpawnOptions<'_>) -> io::Result<i32> {
    let strings = |list: &[String]| -> io::Result<Vec<CString>> {
        list.iter()
            .map(|s| CString::new(s.as_bytes()).map_err(io::Error::from))
            .collect()
    };
    let (argv, env) = (strings(options.argv)?, strings(options.env)?);
    let pointers = |list: &[CString]| -> Vec<*mut libc::c_char> {
        list.iter()
            .map(|s| s.as_ptr().cast_mut())
            .chain([std::ptr::null_mut()])
            .collect()
    };
    let (argv_p, env_p) = (pointers(&argv), pointers(&env));
    // Copies above the numbers that are about to be replaced, so that no dup2 hits its source.
    let stderr = dup_above(options.stderr)?;
    let fd3 = options.fd3.map(dup_above).transpose()?;
    let program = dup_above(program)?;
    let path = CString::new(format!("/proc/self/fd/{}", program.as_raw_fd()))?;
    let check = |rc: i32| {
        if rc == 0 {
            Ok(())
        } else {
            Err(io::Error::from_raw_os_error(rc))
        }
    };
    let mut pid: libc::pid_t = 0;
    // SAFETY: actions and attributes are initialised before use and destroyed after; every
    // pointer handed over lives until posix_spawn returns, which is after the child's exec.
    unsafe {
        let mut actions: libc::posix_spawn_file_actions_t = std::mem::zeroed();
        let mut attr: libc::posix_spawnattr_t = std::mem::zeroed();
        check(libc::posix_spawn_file_actions_init(&mut actions))?;
        check(libc::posix_spawnattr_init(&mut attr))?;
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut all);
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        let flags = i32::from(libc::POSIX_SPAWN_SETSID)
            | libc::POSIX_SPAWN_SETSIGDEF
            | libc::POSIX_SPAWN_SETSIGMASK;
        let null = c"/dev/null".as_ptr();
        let result = check(libc::posix_spawnattr_setflags(
            &mut attr,
            flags as libc::c_short,
        ))
        .and_then(|()| check(libc::posix_spawnattr_setsigdefault(&mut attr, &all)))
        .and_then(|()| check(libc::posix_spawnattr_setsigmask(&mut attr, &none)))
        .and_then(|()| {
            check(libc::posix_spawn_file_actions_addopen(
                &mut actions,
                0,
                null,
                libc::O_RDONLY,
                0,
            ))
        })
        .and_then(|()| {
            check(libc::posix_spawn_file_actions_addopen(
                &mut actions,
                1,
                null,
                libc::O_WRONLY,
                0,
            ))
        })
        .and_then(|()| {
            check(libc::posix_spawn_file_actions_adddup2(
                &mut actions,
                stderr.as_raw_fd(),
                2,
            ))
        })
        .and_then(|()| match &fd3 {
            Some(fd) => check(libc::posix_spawn_file_actions_adddup2(
                &mut actions,
                fd.as_raw_fd(),
                3,
            )),
            None => Ok(()),
        })
        .and_then(|()| {
            check(libc::posix_spawn(
                &mut pid,
                path.as_ptr(),
                &actions,
                &attr,
                argv_p.as_ptr(),
                env_p.as_ptr(),
            ))
        });
        libc::posix_spawn_file_actions_destroy(&mut actions);
        libc::posix_spawnattr_destroy(&mut attr);
        result?;
    }
    Ok(pid)
}

fn dup_above(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    Ok(rustix::io::fcntl_dupfd_cloexec(fd, 10)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::pidfd::PidFd;

    #[test]
    fn a_program_runs_from_sealed_memory_in_a_session_of_its_own() {
        let program = SealedProgram::from_file(Path::new("/bin/sh")).unwrap();
        let (mut read, write) = io::pipe().unwrap();
        let argv = [
            "sh",
            "-c",
            "readlink /proc/$$/exe >&2; cut -d' ' -f6 /proc/$$/stat >&2; echo $$ >&2",
        ]
        .map(String::from);
        let env = ["PATH=/bin:/usr/bin".to_owned()];
        let options = SpawnOptions {
            argv: &argv,
            env: &env,
            stderr: write.as_fd(),
            fd3: None,
        };
        let pid = program.spawn(&options).unwrap();
        drop(write);
        let mut out = String::new();
        read.read_to_string(&mut out).unwrap();
        let lines: Vec<&str> = out.lines().collect();
        assert!(lines[0].starts_with("/memfd:pod-shim"), "{out}");
        assert_eq!(lines[1], lines[2], "session id is the process id");
        assert_eq!(lines[2], pid.to_string());
        rustix::process::waitpid(
            rustix::process::Pid::from_raw(pid),
            rustix::process::WaitOptions::empty(),
        )
        .unwrap();
    }

    #[test]
    fn a_sealed_copy_cannot_be_written_and_is_found_again_through_a_live_process() {
        let program = SealedProgram::from_file(Path::new("/bin/cat")).unwrap();
        assert!((&program.file).write_all(b"x").is_err());
        let (hold, _write) = io::pipe().unwrap();
        // cat of descriptor 3 lives until the write end closes.
        let argv = ["cat", "/proc/self/fd/3"].map(String::from);
        let null = File::options().write(true).open("/dev/null").unwrap();
        let options = SpawnOptions {
            argv: &argv,
            env: &[],
            stderr: null.as_fd(),
            fd3: Some(hold.as_fd()),
        };
        let pid = program.spawn(&options).unwrap();
        // The parent goes on an instant before the new program is visible in /proc.
        let exe = format!("/proc/{pid}/exe");
        let visible = |exe: &str| {
            std::fs::read_link(exe)
                .unwrap()
                .to_string_lossy()
                .contains("memfd:")
        };
        while !visible(&exe) {
            std::thread::yield_now();
        }
        assert!(
            SealedProgram::from_live(pid, Path::new("/bin/cat"))
                .unwrap()
                .is_some()
        );
        assert!(
            SealedProgram::from_live(pid, Path::new("/bin/ls"))
                .unwrap()
                .is_none()
        );
        let fd = PidFd::open(pid).unwrap();
        fd.send_signal(9).unwrap();
        rustix::process::waitpid(
            rustix::process::Pid::from_raw(pid),
            rustix::process::WaitOptions::empty(),
        )
        .unwrap();
    }
}
