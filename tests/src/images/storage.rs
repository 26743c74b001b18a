//! The image of the storage driver: a static program, and the programs that make and check
//! filesystems, from Debian with the libraries they need.

use super::layout::{Run, Store, image};
use super::{debian, own};
use crate::artefacts::cache::Inputs;
use anyhow::Result;
use std::fs;
use std::path::{Path, PathBuf};

/// mkfs, e2fsck, resize2fs, tune2fs, xfs_db, and their libraries (bookworm).
const FILESYSTEMS: &[&str] = &[
    "e2fsprogs",
    "xfsprogs",
    "libc6",
    "libext2fs2",
    "libss2",
    "libcom-err2",
    "libblkid1",
    "libuuid1",
    "libinih1",
    "liburcu8",
    "libedit2",
    "libbsd0",
    "libmd0",
    "libtinfo6",
];

/// Writes the image as an OCI archive into `dir`; returns the file and the manifest's digest.
///
/// # Errors
/// When it cannot be built or written.
pub fn write(dir: &Path, cache: &Path, program: &Path) -> Result<(PathBuf, String)> {
    let store = Store::open(&cache.join("images"))?;
    let mut inputs = Inputs::default();
    inputs.word("filesystems 1");
    for package in FILESYSTEMS {
        inputs.word(package);
    }
    let scratch = cache.join(format!("debs-filesystems.{}", std::process::id()));
    let tools = store.layer("filesystems", inputs, |layer| {
        debian::skeleton(layer);
        for package in debian::download(FILESYSTEMS, &scratch)? {
            debian::add(layer, &package)?;
        }
        Ok(())
    });
    drop(fs::remove_dir_all(&scratch));
    let mut inputs = Inputs::default();
    inputs.file(program)?;
    let own = store.layer("csi-driver", inputs, |layer| {
        layer.file("csi-driver", 0o755, fs::read(program)?);
        Ok(())
    })?;
    let run = Run {
        entrypoint: &["/csi-driver"],
        working_dir: "/",
        version: "csi-driver",
        ..Run::default()
    };
    own::write(dir, "csi-driver", &image(vec![tools?, own], &run))
}
