//! Capability sets of the calling process, set once before it executes a program.

#![expect(unsafe_code, reason = "system calls without a safe wrapper")]

use rustix::thread::{CapabilitySet, CapabilitySets};
use std::io;

/// Number of the last capability this kernel knows.
///
/// # Errors
/// When /proc is not mounted.
pub fn last_capability() -> io::Result<u8> {
    std::fs::read_to_string("/proc/sys/kernel/cap_last_cap")?
        .trim()
        .parse()
        .map_err(|_| io::Error::from(io::ErrorKind::InvalidData))
}

/// Capability numbers as one set of bits; numbers above 63 are ignored.
pub fn bits(numbers: &[u8]) -> u64 {
    numbers
        .iter()
        .filter(|n| **n < 64)
        .fold(0, |bits, n| bits | 1 << n)
}

/// Drop every capability up to `last` that is not in `keep` from the bounding set.
///
/// # Errors
/// `EPERM` without CAP_SETPCAP.
pub fn limit_bounding(keep: u64, last: u8) -> io::Result<()> {
    for number in (0..=last).filter(|n| keep & (1 << n) == 0) {
        // A capability that is not in the bounding set already need not be dropped.
        // SAFETY: prctl with plain numbers.
        let present = unsafe { libc::prctl(libc::PR_CAPBSET_READ, u64::from(number), 0, 0, 0) };
        if present != 1 {
            continue;
        }
        // SAFETY: as above.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, u64::from(number), 0, 0, 0) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// What the process may have at most: capabilities this one holds now.
///
/// # Errors
/// Never in practice.
pub fn permitted() -> io::Result<u64> {
    Ok(rustix::thread::capabilities(None)?.permitted.bits())
}

/// Set effective, permitted and inheritable.
///
/// # Errors
/// `EPERM` when a capability is asked that is not permitted.
pub fn set(effective: u64, permitted: u64, inheritable: u64) -> io::Result<()> {
    let set = CapabilitySet::from_bits_retain;
    Ok(rustix::thread::set_capabilities(
        None,
        CapabilitySets {
            effective: set(effective),
            permitted: set(permitted),
            inheritable: set(inheritable),
        },
    )?)
}

/// Make exactly these capabilities ambient; each must be permitted and inheritable.
///
/// # Errors
/// `EPERM` otherwise.
pub fn set_ambient(numbers: &[u8]) -> io::Result<()> {
    rustix::thread::clear_ambient_capability_set()?;
    for number in numbers {
        // SAFETY: prctl with plain numbers.
        let rc = unsafe {
            libc::prctl(
                libc::PR_CAP_AMBIENT,
                libc::PR_CAP_AMBIENT_RAISE as u64,
                u64::from(*number),
                0,
                0,
            )
        };
        if rc != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_become_bits_and_absurd_ones_vanish() {
        assert_eq!(bits(&[0, 21, 63, 64, 255]), 1 | 1 << 21 | 1 << 63);
        assert!(last_capability().unwrap() >= 36);
    }
}
