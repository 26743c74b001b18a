use super::*;
use rustix::fs::OFlags;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

/// Builds an archive entry by entry; paths are written raw, so that bad ones can be.
#[derive(Default)]
pub(crate) struct Tar {
    bytes: Vec<u8>,
    xattrs: Vec<(String, Vec<u8>)>,
}

impl Tar {
    pub(crate) fn entry(
        &mut self,
        kind: tar::EntryType,
        path: &str,
        link: &str,
        mode: u32,
        content: &[u8],
    ) -> &mut Self {
        if !self.xattrs.is_empty() {
            let mut builder = tar::Builder::new(Vec::new());
            let records = self.xattrs.iter().map(|(k, v)| (k.as_str(), v.as_slice()));
            builder.append_pax_extensions(records).unwrap();
            let bytes = builder.into_inner().unwrap();
            // Without the end mark.
            self.bytes.extend_from_slice(&bytes[..bytes.len() - 1024]);
            self.xattrs.clear();
        }
        let mut header = tar::Header::new_gnu();
        header.as_gnu_mut().unwrap().name[..path.len()].copy_from_slice(path.as_bytes());
        header.as_gnu_mut().unwrap().linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(7);
        header.set_gid(8);
        header.set_mtime(1234);
        header.set_size(content.len() as u64);
        if kind == tar::EntryType::Char || kind == tar::EntryType::Block {
            header.set_device_major(1).unwrap();
            header.set_device_minor(3).unwrap();
        }
        header.set_cksum();
        self.bytes.extend_from_slice(header.as_bytes());
        self.bytes.extend_from_slice(content);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self
    }

    pub(crate) fn file(&mut self, path: &str, content: &str) -> &mut Self {
        self.entry(tar::EntryType::Regular, path, "", 0o644, content.as_bytes())
    }

    pub(crate) fn dir(&mut self, path: &str, mode: u32) -> &mut Self {
        self.entry(tar::EntryType::Directory, path, "", mode, b"")
    }

    pub(crate) fn symlink(&mut self, path: &str, target: &str) -> &mut Self {
        self.entry(tar::EntryType::Symlink, path, target, 0o777, b"")
    }

    pub(crate) fn hardlink(&mut self, path: &str, target: &str) -> &mut Self {
        self.entry(tar::EntryType::Link, path, target, 0o644, b"")
    }

    fn xattr(&mut self, name: &str, value: &[u8]) -> &mut Self {
        self.xattrs
            .push((format!("SCHILY.xattr.{name}"), value.to_vec()));
        self
    }

    pub(crate) fn finish(&mut self) -> Vec<u8> {
        let mut bytes = std::mem::take(&mut self.bytes);
        bytes.resize(bytes.len() + 1024, 0);
        bytes
    }
}

fn apply_in(dir: &Path, tar: &[u8], limits: Limits) -> Result<Applied, UnpackError> {
    let root = rustix::fs::open(dir, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
    apply(tar, root, limits)
}

/// Unpacks into a fresh directory beside which a file lies that must stay as it is.
fn unpack(
    build: impl FnOnce(&mut Tar) -> &mut Tar,
) -> (tempfile::TempDir, Result<Applied, UnpackError>) {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("fs")).unwrap();
    std::fs::write(dir.path().join("outside"), "untouched").unwrap();
    let mut tar = Tar::default();
    build(&mut tar);
    let done = apply_in(&dir.path().join("fs"), &tar.finish(), Limits::default());
    assert_eq!(
        std::fs::read_to_string(dir.path().join("outside")).unwrap(),
        "untouched"
    );
    let beside = std::fs::read_dir(dir.path()).unwrap().count();
    assert_eq!(beside, 2, "something was made outside of the layer");
    (dir, done)
}

fn good(build: impl FnOnce(&mut Tar) -> &mut Tar) -> tempfile::TempDir {
    let (dir, done) = unpack(build);
    done.unwrap();
    dir
}

fn meta(dir: &tempfile::TempDir, path: &str) -> std::fs::Metadata {
    std::fs::symlink_metadata(dir.path().join("fs").join(path)).unwrap()
}

fn is_opaque(dir: &tempfile::TempDir, path: &str) -> bool {
    let path = dir.path().join("fs").join(path);
    xattr::get(path, "trusted.overlay.opaque")
        .unwrap()
        .as_deref()
        == Some(b"y")
}

#[test]
fn owners_modes_and_times_are_kept_and_setuid_survives_the_chown() {
    let dir = good(|t| {
        t.dir("d", 0o1777)
            .entry(tar::EntryType::Regular, "d/su", "", 0o6755, b"x");
        t.symlink("d/link", "/etc/passwd")
    });
    let su = meta(&dir, "d/su");
    assert_eq!(
        (su.uid(), su.gid(), su.mode() & 0o7777, su.mtime()),
        (7, 8, 0o6755, 1234)
    );
    let d = meta(&dir, "d");
    assert_eq!((d.uid(), d.mode() & 0o7777, d.mtime()), (7, 0o1777, 1234));
    let link = meta(&dir, "d/link");
    assert_eq!((link.uid(), link.mtime()), (7, 1234));
    assert_eq!(std::fs::metadata("/etc/passwd").unwrap().uid(), 0);
}

#[test]
fn a_directory_without_write_permission_still_gets_its_files() {
    let dir = good(|t| t.dir("ro", 0o555).file("ro/f", "x"));
    assert_eq!(meta(&dir, "ro").mode() & 0o7777, 0o555);
    assert_eq!(meta(&dir, "ro").mtime(), 1234);
}

#[test]
fn whiteouts_become_devices_and_opaque_marks_become_attributes() {
    let dir = good(|t| {
        t.dir("d", 0o755)
            .file("d/.wh..wh..opq", "")
            .file("d/.wh.gone", "");
        t.hardlink("d/.wh.linked", "d/.wh.gone")
            .file("new/deep/.wh.x", "");
        t.file(".wh..wh.plnk", "")
            .file("d/.wh.", "")
            .file("d/.wh...", "")
    });
    assert!(is_opaque(&dir, "d"));
    for gone in ["d/gone", "d/linked", "new/deep/x"] {
        let gone = meta(&dir, gone);
        assert!(gone.file_type().is_char_device() && gone.rdev() == 0);
    }
    assert_eq!(
        std::fs::read_dir(dir.path().join("fs/d")).unwrap().count(),
        2
    );
    assert_eq!(std::fs::read_dir(dir.path().join("fs")).unwrap().count(), 2);
}

#[test]
fn a_directory_that_replaces_a_removed_one_is_opaque_in_either_order() {
    let dir = good(|t| {
        t.file(".wh.a", "").dir("a", 0o755).file("a/f", "");
        t.dir("b", 0o755).file("b/f", "").file(".wh.b", "");
        t.file("c", "stays").file(".wh.c", "")
    });
    assert!(is_opaque(&dir, "a") && is_opaque(&dir, "b"));
    assert!(meta(&dir, "b/f").is_file());
    assert_eq!(
        std::fs::read_to_string(dir.path().join("fs/c")).unwrap(),
        "stays"
    );
}

#[test]
fn hard_links_devices_and_fifos_are_made() {
    let dir = good(|t| {
        t.file("a", "one")
            .hardlink("b", "/a")
            .hardlink("sub/c", "./a");
        t.entry(tar::EntryType::Char, "null", "", 0o666, b"");
        t.entry(tar::EntryType::Block, "disk", "", 0o660, b"");
        t.entry(tar::EntryType::Fifo, "fifo", "", 0o622, b"")
    });
    assert_eq!(meta(&dir, "a").nlink(), 3);
    assert_eq!(meta(&dir, "sub/c").ino(), meta(&dir, "a").ino());
    let null = meta(&dir, "null");
    assert!(null.file_type().is_char_device());
    assert_eq!(
        (null.rdev(), null.mode() & 0o7777, null.uid()),
        (rustix::fs::makedev(1, 3), 0o666, 7)
    );
    assert!(meta(&dir, "disk").file_type().is_block_device());
    assert!(meta(&dir, "fifo").file_type().is_fifo());
    assert_eq!(meta(&dir, "fifo").mode() & 0o7777, 0o622);
}

#[test]
fn capabilities_and_user_attributes_are_kept_and_overlay_ones_refused() {
    // VFS_CAP_REVISION_2, effective, cap_net_raw.
    let capability = [
        1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ];
    let dir = good(|t| {
        t.xattr("security.capability", &capability)
            .xattr("user.note", b"hi");
        t.xattr("trusted.overlay.redirect", b"/etc")
            .file("ping", "x")
    });
    let path = dir.path().join("fs/ping");
    assert_eq!(
        xattr::get(&path, "security.capability").unwrap().unwrap(),
        capability
    );
    assert_eq!(xattr::get(&path, "user.note").unwrap().unwrap(), b"hi");
    assert_eq!(xattr::get(&path, "trusted.overlay.redirect").unwrap(), None);
}

#[test]
fn missing_parents_are_made_and_reported_until_their_entry_comes() {
    let (dir, done) = unpack(|t| t.file("a/b/f", "").file("x/f", "").dir("x", 0o700));
    assert_eq!(done.unwrap().implicit_dirs, ["a", "a/b"]);
    assert_eq!(meta(&dir, "a").mode() & 0o7777, 0o755);
    assert_eq!(meta(&dir, "x").mode() & 0o7777, 0o700);
}

#[test]
fn later_entries_replace_earlier_ones_of_any_kind() {
    let dir = good(|t| {
        t.dir("a", 0o755).file("a/in", "x").file("a", "now a file");
        t.file("b", "x").dir("b", 0o700).file("b/in", "y");
        t.file("c", "old").symlink("c", "a").file("c", "new")
    });
    assert!(meta(&dir, "a").is_file() && meta(&dir, "b/in").is_file());
    assert_eq!(
        std::fs::read_to_string(dir.path().join("fs/c")).unwrap(),
        "new"
    );
    assert_eq!(
        std::fs::read_to_string(dir.path().join("fs/a")).unwrap(),
        "now a file"
    );
}

#[test]
fn links_on_the_way_lead_to_places_in_the_layer_only() {
    let dir = good(|t| {
        t.dir("usr/lib", 0o755)
            .symlink("lib", "usr/lib")
            .file("lib/in", "x");
        t.symlink("abs", "/usr").file("abs/two", "x");
        t.symlink("up", "../../../../..").file("up/outside", "mine");
        t.symlink("later", "/made/here").file("later/f", "x")
    });
    assert!(meta(&dir, "usr/lib/in").is_file() && meta(&dir, "usr/two").is_file());
    assert_eq!(
        std::fs::read_to_string(dir.path().join("fs/outside")).unwrap(),
        "mine"
    );
    assert!(meta(&dir, "made/here/f").is_file());
}

#[test]
fn escapes_are_refused_or_end_inside() {
    let refused = |build: fn(&mut Tar) -> &mut Tar| unpack(build).1.unwrap_err();
    assert!(matches!(
        refused(|t| t.file("../outside", "bad")),
        UnpackError::Escape(_)
    ));
    assert!(matches!(
        refused(|t| t.file("a/../../outside", "bad")),
        UnpackError::Escape(_)
    ));
    assert!(matches!(
        refused(|t| t.hardlink("l", "../outside")),
        UnpackError::Escape(_)
    ));
    // A link to the file beside the layer, then writing "through" it: replaced, not followed.
    let dir = good(|t| t.symlink("f", "../outside").file("f", "bad"));
    assert!(meta(&dir, "f").is_file());
    // A hard link to a symlink links the symlink itself.
    let dir = good(|t| t.symlink("f", "../outside").hardlink("g", "f"));
    assert!(meta(&dir, "g").is_symlink());
    // Loops end.
    refused(|t| t.symlink("a", "b").symlink("b", "a").file("a/f", ""));
    refused(|t| t.file("file", "").file("file/below", ""));
    refused(|t| t.hardlink("l", "nowhere"));
    good(|t| t.file("/abs/path", "").file("./x/../y", ""));
}

#[test]
fn bounds_hold_for_content_entries_and_headers() {
    let limits = Limits {
        bytes: 10,
        entries: 3,
        header_bytes: 8 << 10,
    };
    let check = |build: fn(&mut Tar) -> &mut Tar, fits: bool| {
        let dir = tempfile::tempdir().unwrap();
        let mut tar = Tar::default();
        build(&mut tar);
        let done = apply_in(dir.path(), &tar.finish(), limits);
        assert_eq!(done.is_ok(), fits, "{done:?}");
    };
    check(|t| t.file("a", "12345").file("b", "12345"), true);
    check(|t| t.file("a", "12345").file("b", "123456"), false);
    check(|t| t.file("a", "").file("b", "").file("c", ""), true);
    check(
        |t| t.file("a", "").file("b", "").file("c", "").file("d", ""),
        false,
    );
    check(|t| t.xattr("user.x", &[0; 1000]).file("a", ""), true);
    check(|t| t.xattr("user.x", &[b'a'; 9000]).file("a", ""), false);
}

#[test]
fn a_full_disk_is_an_io_error_that_names_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path();
    rustix::mount::mount(
        "tmpfs",
        target,
        "tmpfs",
        rustix::mount::MountFlags::empty(),
        c"size=64k",
    )
    .unwrap();
    let mut tar = Tar::default();
    tar.entry(tar::EntryType::Regular, "big", "", 0o644, &vec![1; 1 << 20]);
    let done = apply_in(target, &tar.finish(), Limits::default());
    rustix::mount::unmount(target, rustix::mount::UnmountFlags::DETACH).unwrap();
    match done.unwrap_err() {
        UnpackError::Io { path, source, .. } => {
            assert_eq!(path, "big");
            assert_eq!(source.kind(), io::ErrorKind::StorageFull);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn pax_times_have_fractions_and_signs() {
    let t = |s| pax_time(s).map(|t| (t.tv_sec, t.tv_nsec));
    assert_eq!(t("12.5"), Some((12, 500_000_000)));
    assert_eq!(t("-1.25"), Some((-2, 750_000_000)));
    assert_eq!(t("7"), Some((7, 0)));
    assert_eq!(t("x"), None);
}

mod arbitrary {
    use super::*;
    use proptest::prelude::*;

    fn part() -> impl Strategy<Value = String> {
        prop_oneof![
            Just("..".to_owned()),
            Just(".".to_owned()),
            Just(String::new()),
            Just("outside".to_owned()),
            Just(".wh..wh..opq".to_owned()),
            "(\\.wh\\.)?[abc]",
        ]
    }

    fn path() -> impl Strategy<Value = String> {
        proptest::collection::vec(part(), 1..5).prop_map(|parts| parts.join("/"))
    }

    fn kind() -> impl Strategy<Value = tar::EntryType> {
        prop_oneof![
            3 => Just(tar::EntryType::Regular),
            2 => Just(tar::EntryType::Directory),
            4 => Just(tar::EntryType::Symlink),
            2 => Just(tar::EntryType::Link),
            1 => Just(tar::EntryType::Fifo),
            1 => any::<u8>().prop_map(tar::EntryType::new),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]
        #[test]
        fn no_sequence_of_entries_gets_out(
            entries in proptest::collection::vec((kind(), path(), path()), 1..12)
        ) {
            // The assertions are in `unpack`.
            drop(unpack(|t| {
                for (kind, path, link) in &entries {
                    t.entry(*kind, path, link, 0o755, b"evil");
                }
                t
            }));
        }

        #[test]
        fn no_bytes_make_it_panic(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..4096),
            flips in proptest::collection::vec((0usize..2048, any::<u8>()), 0..8),
            valid in any::<bool>(),
        ) {
            if valid {
                let mut tar = Tar::default();
                tar.xattr("user.a", b"b").file("a/b", "c").symlink("l", "a").hardlink("h", "a/b");
                bytes = tar.finish();
                for (at, byte) in flips {
                    let at = at % bytes.len();
                    bytes[at] = byte;
                }
            }
            let dir = tempfile::tempdir().unwrap();
            drop(apply_in(dir.path(), &bytes, Limits::default()));
        }
    }
}
