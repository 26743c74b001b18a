//! Look up a program and execute it, with the words people know when that fails.

#![expect(unsafe_code, reason = "system calls without a safe wrapper")]

use std::convert::Infallible;
use std::ffi::{CStr, CString};
use std::io;

/// PATH used when the container's environment has none, as the other runtimes use.
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Why a program could not be executed.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// No directory of PATH holds it.
    #[error("exec: {name:?}: executable file not found in $PATH")]
    NotInPath {
        /// As asked.
        name: String,
    },
    /// The path does not exist (or its interpreter does not).
    #[error("exec: {name:?}: no such file or directory")]
    Missing {
        /// As asked.
        name: String,
    },
    /// It exists but may not be executed, or is a directory.
    #[error("exec: {name:?}: permission denied")]
    Denied {
        /// As asked.
        name: String,
    },
    /// It is no program this kernel can run.
    #[error("exec: {name:?}: exec format error")]
    Format {
        /// As asked.
        name: String,
    },
    /// argv is empty or a string holds a NUL byte.
    #[error("exec: {name:?}: arguments or environment hold a NUL byte or no command is given")]
    BadArguments {
        /// As asked.
        name: String,
    },
    /// Any other refusal.
    #[error("exec: {name:?}: {}", errno_text(source))]
    Other {
        /// As asked.
        name: String,
        /// The kernel's refusal.
        source: io::Error,
    },
}

impl ExecError {
    /// The errno behind it, when there is one.
    pub fn errno(&self) -> Option<i32> {
        match self {
            ExecError::NotInPath { .. } | ExecError::Missing { .. } => Some(libc::ENOENT),
            ExecError::Denied { .. } => Some(libc::EACCES),
            ExecError::Format { .. } => Some(libc::ENOEXEC),
            ExecError::BadArguments { .. } => Some(libc::EINVAL),
            ExecError::Other { source, .. } => source.raw_os_error(),
        }
    }
}

/// The kernel's words for an errno, lower-case and without Rust's "(os error N)".
pub fn errno_text(error: &io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or(&text);
    let mut chars = text.chars();
    match chars.next() {
        Some(first) => first.to_lowercase().chain(chars).collect(),
        None => text.to_owned(),
    }
}

/// The paths to try for `name`, in order: itself when it holds a slash, else one per directory
/// of the PATH in `env` (the last one counts; an empty directory means the working directory).
pub fn candidates(name: &str, env: &[String]) -> Vec<String> {
    if name.contains('/') {
        return vec![name.to_owned()];
    }
    let path = env
        .iter()
        .rev()
        .find_map(|entry| entry.strip_prefix("PATH="))
        .unwrap_or(DEFAULT_PATH);
    path.split(':')
        .map(|dir| {
            if dir.is_empty() {
                format!("./{name}")
            } else {
                format!("{dir}/{name}")
            }
        })
        .collect()
}

/// A program, its arguments and environment, ready to execute without allocating.
#[derive(Debug)]
pub struct Prepared {
    name: String,
    slash: bool,
    paths: Vec<CString>,
    argv: Vec<CString>,
    env: Vec<CString>,
}

/// Turn strings into what execve wants; done before privileges are dropped.
///
/// # Errors
/// [`ExecError::BadArguments`].
pub fn prepare(argv: &[String], env: &[String]) -> Result<Prepared, ExecError> {
    let name = argv.first().cloned().unwrap_or_default();
    let bad = || ExecError::BadArguments { name: name.clone() };
    if name.is_empty() {
        return Err(bad());
    }
    let c = |list: &[String]| -> Result<Vec<CString>, ExecError> {
        list.iter()
            .map(|s| CString::new(s.as_bytes()).map_err(|_| bad()))
            .collect()
    };
    Ok(Prepared {
        slash: name.contains('/'),
        paths: c(&candidates(&name, env))?,
        argv: c(argv)?,
        env: c(env)?,
        name,
    })
}

impl Prepared {
    /// Execute: tries each candidate; returns only when none could be executed.
    ///
    /// # Errors
    /// Always an error: success does not return.
    pub fn execute(&self) -> Result<Infallible, ExecError> {
        let name = || self.name.clone();
        let mut denied = false;
        for path in &self.paths {
            let error = execve(path, &self.argv, &self.env);
            match error.raw_os_error() {
                Some(libc::ENOENT | libc::ENOTDIR) => {}
                Some(libc::EACCES) => denied = true,
                Some(libc::ENOEXEC) => return Err(ExecError::Format { name: name() }),
                Some(_) | None => {
                    return Err(ExecError::Other {
                        name: name(),
                        source: error,
                    });
                }
            }
        }
        Err(match (denied, self.slash) {
            (true, _) => ExecError::Denied { name: name() },
            (false, true) => ExecError::Missing { name: name() },
            (false, false) => ExecError::NotInPath { name: name() },
        })
    }
}

fn execve(path: &CStr, argv: &[CString], env: &[CString]) -> io::Error {
    let pointers = |list: &[CString]| -> Vec<*const libc::c_char> {
        list.iter()
            .map(|s| s.as_ptr())
            .chain([std::ptr::null()])
            .collect()
    };
    let (argv, env) = (pointers(argv), pointers(env));
    // SAFETY: both arrays end with a null pointer and point to NUL-terminated strings that live
    // over the call; on success nothing of this image remains.
    unsafe { libc::execve(path.as_ptr(), argv.as_ptr(), env.as_ptr()) };
    io::Error::last_os_error()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_name_is_searched_in_the_containers_path() {
        let env = vec!["A=b".into(), "PATH=/x::/y/".into()];
        assert_eq!(candidates("foo", &env), ["/x/foo", "./foo", "/y//foo"]);
        assert_eq!(candidates("/bin/foo", &env), ["/bin/foo"]);
        assert_eq!(candidates("foo", &[])[0], "/usr/local/sbin/foo");
    }

    #[test]
    fn a_missing_program_is_named_in_known_words() {
        let prepared = prepare(&["no-such-thing".into()], &["PATH=/bin:/usr/bin".into()]).unwrap();
        let error = prepared.execute().unwrap_err();
        assert_eq!(
            error.to_string(),
            r#"exec: "no-such-thing": executable file not found in $PATH"#
        );
        let prepared = prepare(&["/etc/passwd".into()], &[]).unwrap();
        assert_eq!(
            prepared.execute().unwrap_err().to_string(),
            r#"exec: "/etc/passwd": permission denied"#
        );
        assert!(matches!(
            prepare(&[], &[]),
            Err(ExecError::BadArguments { .. })
        ));
    }
}
