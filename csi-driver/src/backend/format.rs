//! Programs that make, check and change filesystems in image files that nobody uses.
//!
//! [`make`] is called for a file that its caller has just created, and for no other.

use super::superblock;
use crate::error::DriverError;
use crate::model::Filesystem;
use linux::command::ShortCommand;
use linux::failpoint::step;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

/// Where the programs are, in this order.
const DIRECTORIES: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];

/// mkfs writes a few MiB whatever the size.
const MAKE_LIMIT: Duration = Duration::from_secs(60);

/// A check reads all metadata of a filesystem that may be large.
const CHECK_LIMIT: Duration = Duration::from_secs(600);

/// Such programs at one time: more only make each other wait for the disk.
const AT_ONCE: u32 = 4;

/// Places for running programs.
static PLACES: (Mutex<u32>, Condvar) = (Mutex::new(AT_ONCE), Condvar::new());

struct Place;

impl Place {
    fn take() -> Self {
        let mut free = PLACES.0.lock().unwrap_or_else(PoisonError::into_inner);
        while *free == 0 {
            free = PLACES.1.wait(free).unwrap_or_else(PoisonError::into_inner);
        }
        *free -= 1;
        Self
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        *PLACES.0.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        PLACES.1.notify_one();
    }
}

/// A UUID nobody has yet.
///
/// # Errors
/// When the kernel gives no random bytes.
pub fn new_uuid() -> Result<String, DriverError> {
    let path = Path::new("/proc/sys/kernel/random/uuid");
    let text = linux::fs::read_file(path, 64)?;
    Ok(String::from_utf8_lossy(&text).trim().to_owned())
}

/// Makes a filesystem in a new file.
///
/// # Errors
/// [`DriverError::Program`] with what mkfs said.
pub fn make(filesystem: Filesystem, image: &Path, uuid: &str) -> Result<(), DriverError> {
    match filesystem {
        Filesystem::Ext4 => {
            let args = [
                "-F",
                "-q",
                "-m",
                "0",
                "-b",
                "4096",
                "-U",
                uuid,
                // The UUID can then be changed without touching every checksum.
                "-O",
                "metadata_csum_seed",
                // The file reads as zeros: nothing has to be written over.
                "-E",
                "lazy_itable_init=1,lazy_journal_init=1,nodiscard",
            ];
            run("mkfs.ext4", &args, image, MAKE_LIMIT, &[0])
        }
        Filesystem::Xfs => {
            let uuid = format!("uuid={uuid}");
            // Without -f: where something is already, it refuses.
            run(
                "mkfs.xfs",
                &["-q", "-K", "-m", &uuid],
                image,
                MAKE_LIMIT,
                &[0],
            )
        }
    }
}

/// Replays the journal of an ext4 that nobody uses and puts right what can be put right without
/// loss.
///
/// # Errors
/// [`DriverError::Program`] when more is wrong.
pub fn check_ext4(image: &Path) -> Result<(), DriverError> {
    // 1: put right.
    run("e2fsck", &["-f", "-p"], image, CHECK_LIMIT, &[0, 1])
}

/// Grows a checked ext4 that nobody uses to the size of its file.
///
/// # Errors
/// [`DriverError::Program`].
pub fn grow_ext4(image: &Path) -> Result<(), DriverError> {
    run("resize2fs", &[], image, CHECK_LIMIT, &[0])
}

/// Gives a copy a name of its own: two filesystems with one UUID cannot be told apart by anybody.
///
/// # Errors
/// [`DriverError::Program`], or when the image still has another UUID afterwards.
pub fn set_uuid(filesystem: Filesystem, image: &Path, uuid: &str) -> Result<(), DriverError> {
    match filesystem {
        Filesystem::Ext4 => run("tune2fs", &["-U", uuid], image, MAKE_LIMIT, &[0])?,
        Filesystem::Xfs => {
            // What xfs_admin, a shell script, calls: no shell is needed then.
            let command = format!("uuid {uuid}");
            let args = ["-x", "-p", "xfs_admin", "-c", &command];
            run("xfs_db", &args, image, MAKE_LIMIT, &[0])?
        }
    }
    let file = super::image::open(image)?;
    let found = superblock::read(&file).map_err(DriverError::io("read", image.display()))?;
    if found.is_some_and(|found| found.uuid == uuid) {
        return Ok(());
    }
    Err(DriverError::precondition(format!(
        "the UUID of {} could not be changed",
        image.display()
    )))
}

fn run(
    program: &str,
    args: &[&str],
    image: &Path,
    time_limit: Duration,
    fine: &[i32],
) -> Result<(), DriverError> {
    let _place = Place::take();
    let found = DIRECTORIES
        .iter()
        .map(|dir| PathBuf::from(dir).join(program))
        .find(|path| path.exists());
    let mut words: Vec<_> = args.iter().map(Into::into).collect();
    words.push(image.as_os_str().to_owned());
    let command = ShortCommand {
        program: found.unwrap_or_else(|| PathBuf::from(program)),
        args: words,
        env: vec![
            ("PATH".into(), "/usr/sbin:/usr/bin:/sbin:/bin".into()),
            ("LC_ALL".into(), "C".into()),
        ],
        stdin: Vec::new(),
        max_output_bytes: 64 << 10,
        time_limit,
    };
    step();
    let output = command.run().map_err(|source| DriverError::Command {
        image: image.to_owned(),
        source,
    })?;
    step();
    if output
        .status
        .code()
        .is_some_and(|code| fine.contains(&code))
    {
        return Ok(());
    }
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).trim().replace('\n', "; ");
    Err(DriverError::Program {
        program: program.to_owned(),
        image: image.to_owned(),
        status: output.status.to_string(),
        output: said.chars().take(400).collect(),
    })
}
