//! Small files that are whole or do not count: written by temp and rename, begun by a checksum.
//!
//! No fsync: they lie on a tmpfs, and carry the boot id, so that after a power cut all is void.

use std::fs;
use std::io;
use std::path::Path;

use linux::failpoint;
use serde::Serialize;
use serde::de::DeserializeOwned;

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Of this boot.
pub(crate) fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string(BOOT_ID)?.trim().to_owned())
}

/// Removes a file; none there is success.
pub(crate) fn remove_if_there(path: &Path) -> io::Result<()> {
    failpoint::step();
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// What a killed writer leaves behind; the next one overwrites it.
pub(crate) const STAGED: &str = ".staged";

/// Puts a value in place whole or not at all.
pub(crate) fn write_checked<T: Serialize>(path: &Path, value: &T) -> io::Result<()> {
    let body = serde_json::to_string(value)?;
    let staged = path.with_file_name(STAGED);
    fs::write(
        &staged,
        format!("{:016x}\n{body}", checksum(body.as_bytes())),
    )?;
    failpoint::step();
    fs::rename(staged, path)?;
    failpoint::step();
    Ok(())
}

/// None for whatever is not there whole.
pub(crate) fn read_checked<T: DeserializeOwned>(path: &Path) -> Option<T> {
    let text = fs::read_to_string(path).ok()?;
    let (sum, body) = text.split_once('\n')?;
    let whole = u64::from_str_radix(sum, 16).ok()? == checksum(body.as_bytes());
    if whole {
        serde_json::from_str(body).ok()
    } else {
        None
    }
}

/// FNV-1a, 64 bits: finds torn and truncated files; not a defence against an attacker.
fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, byte| {
        (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}
