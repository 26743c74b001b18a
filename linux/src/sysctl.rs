//! Kernel parameters under /proc/sys, by checked names.
//!
//! `net.*` entries belong to the network namespace of the thread that opens them: use
//! [`crate::netlink::in_netns`] for another one.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

const ROOT: &str = "/proc/sys";

/// Why a parameter could not be read or set.
#[derive(Debug, thiserror::Error)]
pub enum SysctlError {
    /// A part of the name is empty, `.`, `..`, or holds a slash or a zero byte.
    #[error("kernel parameter name {0:?} has a bad part")]
    BadName(String),
    /// The kernel refused, or does not have it.
    #[error("{operation} kernel parameter {name}")]
    Kernel {
        /// "read" or "set".
        operation: &'static str,
        /// Its parts joined by slashes.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A checked name: its parts, so that an interface called `eth0.100` stays one part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sysctl {
    name: String,
}

impl std::fmt::Display for Sysctl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name)
    }
}

impl Sysctl {
    /// From parts, as `["net", "ipv4", "ip_forward"]`.
    ///
    /// # Errors
    /// [`SysctlError::BadName`].
    pub fn of(parts: &[&str]) -> Result<Self, SysctlError> {
        let bad = |part: &&str| {
            part.is_empty() || *part == "." || *part == ".." || part.contains(['/', '\0'])
        };
        let name = parts.join("/");
        if parts.is_empty() || parts.iter().any(bad) {
            return Err(SysctlError::BadName(name));
        }
        Ok(Self { name })
    }

    /// From the usual spelling, as `net.ipv4.ip_forward`; with slashes instead, dots are literal.
    ///
    /// # Errors
    /// [`SysctlError::BadName`].
    pub fn parse(name: &str) -> Result<Self, SysctlError> {
        let separator = if name.contains('/') { '/' } else { '.' };
        Self::of(&name.split(separator).collect::<Vec<_>>())
    }

    fn path(&self) -> PathBuf {
        Path::new(ROOT).join(&self.name)
    }

    fn failed(&self, operation: &'static str, source: io::Error) -> SysctlError {
        SysctlError::Kernel {
            operation,
            name: self.name.clone(),
            source,
        }
    }

    /// Its value without the closing newline.
    ///
    /// # Errors
    /// [`SysctlError::Kernel`].
    pub fn read(&self) -> Result<String, SysctlError> {
        let text = fs::read_to_string(self.path()).map_err(|e| self.failed("read", e))?;
        Ok(text.trim_end_matches('\n').to_owned())
    }

    /// Sets it.
    ///
    /// # Errors
    /// [`SysctlError::Kernel`].
    pub fn write(&self, value: &str) -> Result<(), SysctlError> {
        // One write without create or truncate: the file is the kernel's.
        let file = fs::OpenOptions::new().write(true).open(self.path());
        file.and_then(|mut file| io::Write::write_all(&mut file, value.as_bytes()))
            .map_err(|e| self.failed("set", e))
    }

    /// Sets it unless it is so already: some parameters have side effects on every write, and
    /// a read-only /proc with the right value is fine.
    ///
    /// # Errors
    /// [`SysctlError::Kernel`].
    pub fn ensure(&self, value: &str) -> Result<(), SysctlError> {
        if self.read()? == value {
            Ok(())
        } else {
            self.write(value)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dots_and_slashes_spell_the_same_parameter() {
        let dots = Sysctl::parse("net.ipv4.ip_forward").unwrap();
        assert_eq!(dots, Sysctl::parse("net/ipv4/ip_forward").unwrap());
        assert_eq!(dots, Sysctl::of(&["net", "ipv4", "ip_forward"]).unwrap());
        let dotted = Sysctl::of(&["net", "ipv4", "conf", "eth0.100", "rp_filter"]).unwrap();
        assert_eq!(dotted.name, "net/ipv4/conf/eth0.100/rp_filter");
    }

    #[test]
    fn a_name_cannot_leave_proc_sys() {
        for bad in [
            "",
            "net..x",
            "../../etc/passwd",
            "net/../../etc",
            "/etc/passwd",
            "a/./b",
        ] {
            assert!(Sysctl::parse(bad).is_err(), "{bad}");
        }
        assert!(Sysctl::of(&["net", "a/b"]).is_err());
    }

    #[test]
    fn a_parameter_the_kernel_lacks_is_named() {
        let error = Sysctl::parse("net.ipv4.no_such_thing")
            .unwrap()
            .read()
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "read kernel parameter net/ipv4/no_such_thing"
        );
    }
}
