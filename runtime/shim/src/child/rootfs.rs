//! The container's filesystem, built in its own mount namespace.
//!
//! Order matters: sources are taken as detached trees while they still have the host's peers
//! (propagation needs them), then the namespace is cut off and the overlay is mounted
//! ([`prepare`]); then everything is put together beneath it by descriptor, and the last step is
//! the pivot ([`assemble`]). Between the two a pod with a user namespace leaves the node's users:
//! what comes after needs no rights on the node.

use super::cgroupview;
use super::identity::not_a_directory;
use super::{bad_request, system};
use crate::setup::UserNs;
use linux::mount::resolve::{self, Node};
use linux::mount::{self, MountAttrs, Overlay, Peering};
use pod_shim::protocol::{
    DeviceSpec, LaunchSpec, MountSource, MountSpec, Propagation, ShimError, ShimErrorKind,
};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

/// Mode of directories a sub path is missing, as the stock kubelet makes them.
const SUB_PATH_MODE: u32 = 0o750;

/// A mount whose source is at hand.
enum Source<'a> {
    /// A detached tree.
    Tree(OwnedFd),
    /// Made at its turn, because it depends on what is mounted before (proc, sysfs).
    Filesystem {
        fstype: &'a str,
        options: &'a [String],
    },
    /// `/sys/fs/cgroup`.
    Cgroup,
}

/// What is known of a source at first.
enum Early<'a> {
    /// It is at hand.
    Ready(Source<'a>),
    /// It is mounted after the root filesystem.
    Layers(Content<'a>),
}

/// The content of an image, as in [`MountSource::Layers`].
struct Content<'a> {
    lower: &'a [PathBuf],
    changes: Option<&'a (PathBuf, PathBuf)>,
    sub_path: Option<&'a str>,
}

/// What only the node's root may do, done: all that is left are mounts of one's own namespaces.
pub(crate) struct Prepared<'a> {
    sources: Vec<Source<'a>>,
    /// The overlay, not mounted anywhere yet.
    root: Root,
}

enum Root {
    /// Mounted over the state directory.
    Attached(OwnedFd),
    /// To be mounted there in the namespace that will be the container's.
    Detached(OwnedFd),
}

/// Take the sources of all mounts and mount the root filesystem, in a mount namespace of the
/// node's users. Ids are mapped for the pod's, where it has some.
pub(crate) fn prepare<'a>(
    spec: &'a LaunchSpec,
    userns: Option<&UserNs>,
) -> Result<Prepared<'a>, ShimError> {
    let mut early = Vec::with_capacity(spec.mounts.len());
    for mount in &spec.mounts {
        early.push(take_source(mount, userns)?);
    }
    mount::make_all_private().map_err(|e| system("make mounts private", &e))?;
    let mut layers = Layers::new(userns);
    let root = mount_root(spec, &mut layers)?;
    let mut sources = Vec::with_capacity(early.len());
    for (mount, source) in spec.mounts.iter().zip(early) {
        sources.push(match source {
            Early::Ready(source) => source,
            Early::Layers(content) => {
                Source::Tree(take_layers(mount, &content, spec, &mut layers)?)
            }
        });
    }
    Ok(Prepared { sources, root })
}

/// Put all of it together and pivot into it. The working directory is `/` afterwards.
pub(crate) fn assemble(spec: &LaunchSpec, prepared: Prepared<'_>) -> Result<(), ShimError> {
    let null =
        mount::open_path(Path::new("/dev/null")).map_err(|e| system("open /dev/null", &e))?;
    let root = match prepared.root {
        Root::Attached(root) => root,
        Root::Detached(root) => {
            let at = mount::open_path(&spec.state_dir);
            at.and_then(|at| mount::attach(root.as_fd(), at.as_fd()))
                .map_err(|e| system("mount the root filesystem", &e))?;
            root
        }
    };
    for (mount, source) in spec.mounts.iter().zip(prepared.sources) {
        attach_mount(root.as_fd(), mount, source, spec)?;
    }
    // Somebody who mounts the host's /dev means the host's nodes.
    let own_dev = !spec.mounts.iter().any(|m| {
        m.target.trim_end_matches('/') == "/dev" && matches!(m.source, MountSource::Bind { .. })
    });
    if own_dev {
        for device in &spec.devices {
            make_device(root.as_fd(), device)?;
        }
        make_dev_links(root.as_fd())?;
    }
    ensure_working_directory(root.as_fd(), &spec.process.cwd)?;
    mask_paths(root.as_fd(), &spec.masked_paths, null.as_fd())?;
    protect_paths(root.as_fd(), &spec.readonly_paths)?;
    if spec.rootfs.readonly {
        let attrs = MountAttrs {
            readonly: true,
            ..MountAttrs::default()
        };
        mount::add_attrs(root.as_fd(), attrs, false)
            .map_err(|e| system("make the root filesystem read-only", &e))?;
    }
    mount::pivot_into(root.as_fd()).map_err(|e| system("pivot into the root filesystem", &e))
}

fn mount_root(spec: &LaunchSpec, layers: &mut Layers<'_>) -> Result<Root, ShimError> {
    let rootfs = &spec.rootfs;
    layers.map(&rootfs.lower)?;
    let overlay = Overlay {
        lower: &rootfs.lower,
        changes: Some((&rootfs.upper, &rootfs.work)),
        options: &rootfs.options,
    };
    let mounted = if layers.userns.is_some() {
        mount::overlay_detached(&overlay, &spec.state_dir).map(Root::Detached)
    } else {
        // Any directory would do as the place: nobody else sees this namespace.
        mount::overlay_at(&overlay, &spec.state_dir).map(Root::Attached)
    };
    mounted.map_err(|e| {
        system(
            format_args!(
                "mount the root filesystem of {} layers over {}",
                rootfs.lower.len(),
                rootfs.upper.display()
            ),
            &e,
        )
    })
}

/// Take a source that is the host's.
fn take_source<'a>(mount: &'a MountSpec, userns: Option<&UserNs>) -> Result<Early<'a>, ShimError> {
    match &mount.source {
        MountSource::Bind { path, sub_path } => {
            let tree = match sub_path {
                None => mount::clone_path(path, true)
                    .map_err(|e| bad_request(format_args!("mount source {path:?}"), &e))?,
                Some(sub) => take_sub_path(path, sub)?,
            };
            if let Some(userns) = userns.filter(|_| mount.map_ids) {
                mount::map_ids(tree.as_fd(), userns.fd.as_fd())
                    .map_err(|e| unmappable(path, &e))?;
            }
            dress(&tree, mount)
                .map_err(|e| bad_request(format_args!("mount at {:?}", mount.target), &e))?;
            Ok(Early::Ready(Source::Tree(tree)))
        }
        MountSource::Filesystem { fstype, options } => {
            Ok(Early::Ready(Source::Filesystem { fstype, options }))
        }
        MountSource::Layers {
            lower,
            changes,
            sub_path,
        } => Ok(Early::Layers(Content {
            lower,
            changes: changes.as_ref(),
            sub_path: sub_path.as_deref(),
        })),
        MountSource::Cgroup => Ok(Early::Ready(Source::Cgroup)),
    }
}

fn unmappable(path: &Path, error: &io::Error) -> ShimError {
    bad_request(
        format_args!(
            "map the ids of {path:?} for the pod's user namespace (maybe its filesystem does not \
             support idmapped mounts on this kernel)"
        ),
        error,
    )
}

/// Give a detached tree its propagation and attributes.
fn dress(tree: &OwnedFd, mount: &MountSpec) -> io::Result<()> {
    let peering = match mount.propagation {
        Propagation::Private => Peering::Private,
        Propagation::HostToContainer => Peering::Slave,
        Propagation::Bidirectional => Peering::Shared,
    };
    mount::set_peering(tree.as_fd(), peering)?;
    mount::add_attrs(tree.as_fd(), attributes(mount), false)?;
    if mount.recursive_readonly {
        let readonly = MountAttrs {
            readonly: true,
            ..MountAttrs::default()
        };
        mount::add_attrs(tree.as_fd(), readonly, true)?;
    }
    Ok(())
}

fn attributes(mount: &MountSpec) -> MountAttrs {
    MountAttrs {
        readonly: mount.readonly,
        nosuid: mount.nosuid,
        nodev: mount.nodev,
        noexec: mount.noexec,
    }
}

/// Image layers, seen through mapped mounts in a pod with a user namespace. These mounts lie on
/// the layers themselves, in this process's mount namespace, so all paths stay as they are.
struct Layers<'a> {
    userns: Option<&'a UserNs>,
    mapped: Vec<PathBuf>,
}

impl<'a> Layers<'a> {
    fn new(userns: Option<&'a UserNs>) -> Self {
        Self {
            userns,
            mapped: Vec::new(),
        }
    }

    /// Have these directories mapped.
    fn map(&mut self, dirs: &[PathBuf]) -> Result<(), ShimError> {
        let Some(userns) = self.userns else {
            return Ok(());
        };
        for dir in dirs {
            if self.mapped.iter().any(|above| dir.starts_with(above)) {
                continue;
            }
            let made = mount::clone_path(dir, false).and_then(|tree| {
                mount::map_ids(tree.as_fd(), userns.fd.as_fd())?;
                let at = mount::open_path(dir)?;
                mount::attach(tree.as_fd(), at.as_fd())
            });
            made.map_err(|e| unmappable(dir, &e))?;
            self.mapped.push(dir.clone());
        }
        Ok(())
    }
}

/// Mount the content of an image, or of its volume.
fn take_layers(
    mount: &MountSpec,
    content: &Content<'_>,
    spec: &LaunchSpec,
    layers: &mut Layers<'_>,
) -> Result<OwnedFd, ShimError> {
    let what = |e: io::Error| bad_request(format_args!("mount at {:?}", mount.target), &e);
    let lower = content.lower;
    layers.map(lower)?;
    let made = match (lower, content.changes) {
        ([only], None) => mount::clone_path(only, false),
        (_, changes) => {
            let volatile = ["volatile".to_owned()];
            let overlay = Overlay {
                lower,
                changes: changes.map(|(upper, work)| (upper.as_path(), work.as_path())),
                options: if changes.is_some() { &volatile } else { &[] },
            };
            mount::overlay_detached(&overlay, &spec.state_dir)
        }
    };
    let mut tree = made.map_err(what)?;
    if let Some(sub) = content.sub_path {
        // Only what is mounted can be copied in part (before Linux 6.15); any place will do.
        let at = mount::open_path(&spec.state_dir).map_err(what)?;
        mount::attach(tree.as_fd(), at.as_fd()).map_err(what)?;
        let inner = resolve::lookup(tree.as_fd(), sub).map_err(|e| {
            bad_request(
                format_args!(
                    "sub path {sub:?} of the image mounted at {:?}",
                    mount.target
                ),
                &e,
            )
        })?;
        tree = mount::clone_fd(inner.as_fd(), false).map_err(what)?;
    }
    dress(&tree, mount).map_err(what)?;
    Ok(tree)
}

/// Open the sub path without ever leaving the volume, and take exactly what was opened: a
/// symlink swapped in between changes nothing (CVE-2021-25741).
fn take_sub_path(volume: &Path, sub: &str) -> Result<OwnedFd, ShimError> {
    let base = mount::open_path(volume)
        .map_err(|e| bad_request(format_args!("mount source {volume:?}"), &e))?;
    let opened = resolve::beneath(base.as_fd(), sub, SUB_PATH_MODE).map_err(|error| {
        if error.kind() == io::ErrorKind::CrossesDevices {
            return ShimError {
                kind: ShimErrorKind::BadRequest,
                message: format!("sub path {sub:?} leads outside its volume"),
                errno: error.raw_os_error(),
            };
        }
        bad_request(format_args!("sub path {sub:?}"), &error)
    })?;
    mount::clone_fd(opened.as_fd(), true)
        .map_err(|e| system(format_args!("take sub path {sub:?}"), &e))
}

fn attach_mount(
    root: BorrowedFd<'_>,
    mount: &MountSpec,
    source: Source<'_>,
    spec: &LaunchSpec,
) -> Result<(), ShimError> {
    let what = |e: io::Error| bad_request(format_args!("mount at {:?}", mount.target), &e);
    let directory = |root| resolve::make_dirs(root, &mount.target, 0o755).map_err(what);
    match source {
        Source::Tree(tree) => {
            let target = if resolve::is_dir(tree.as_fd()).map_err(what)? {
                directory(root)?
            } else {
                resolve::make_file(root, &mount.target).map_err(what)?
            };
            mount::attach(tree.as_fd(), target.as_fd()).map_err(what)
        }
        Source::Filesystem { fstype, options } => {
            let target = directory(root)?;
            let made = mount::filesystem(fstype, fstype, options, attributes(mount))
                .or_else(|error| hosts_instead(fstype, mount, error));
            let made = made.map_err(|e| {
                bad_request(format_args!("mount {fstype} at {:?}", mount.target), &e)
            })?;
            mount::attach(made.as_fd(), target.as_fd()).map_err(what)
        }
        Source::Cgroup => {
            let view = cgroupview::prepare(&spec.cgroups, spec.cgroup_namespace)?;
            let target = directory(root)?;
            cgroupview::attach(view, target.as_fd(), attributes(mount)).map_err(what)
        }
    }
}

/// A user namespace may mount no sysfs where the node itself sees only a part of one; what the
/// node sees does then, read-only.
fn hosts_instead(fstype: &str, mount: &MountSpec, error: io::Error) -> io::Result<OwnedFd> {
    if fstype != "sysfs" || error.kind() != io::ErrorKind::PermissionDenied {
        return Err(error);
    }
    let tree = mount::clone_path(Path::new("/sys"), true)?;
    let attrs = MountAttrs {
        readonly: true,
        ..attributes(mount)
    };
    mount::add_attrs(tree.as_fd(), attrs, true)?;
    Ok(tree)
}

fn make_device(root: BorrowedFd<'_>, device: &DeviceSpec) -> Result<(), ShimError> {
    let what = |e: io::Error| bad_request(format_args!("make device {:?}", device.path), &e);
    let (dir, name) = device.path.rsplit_once('/').unwrap_or(("", &device.path));
    let parent = resolve::make_dirs(root, dir, 0o755).map_err(what)?;
    let node = Node {
        block: device.kind == 'b',
        major: device.major,
        minor: device.minor,
        mode: device.mode,
        uid: device.uid,
        gid: device.gid,
    };
    match resolve::make_node(parent.as_fd(), name, node) {
        Ok(()) => Ok(()),
        // Something with that name came with a mount: it is what the user wanted there.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        // Nodes may not be made here (a user namespace, a device rule): bind the host's.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            let host = device
                .host_path
                .as_deref()
                .unwrap_or(Path::new(&device.path));
            let tree = mount::clone_path(host, false).map_err(what)?;
            let target = resolve::make_file(root, &device.path).map_err(what)?;
            mount::attach(tree.as_fd(), target.as_fd()).map_err(what)
        }
        Err(error) => Err(what(error)),
    }
}

/// The links every program expects, where a `/dev` exists.
fn make_dev_links(root: BorrowedFd<'_>) -> Result<(), ShimError> {
    let links = [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
        ("ptmx", "pts/ptmx"),
    ];
    let what = |e: io::Error| system("make the links in /dev", &e);
    let dev = resolve::make_dirs(root, "/dev", 0o755).map_err(what)?;
    for (name, target) in links {
        resolve::ensure_symlink(dev.as_fd(), name, target).map_err(what)?;
    }
    Ok(())
}

/// Images name working directories they do not contain; they are made, as everyone does.
fn ensure_working_directory(root: BorrowedFd<'_>, cwd: &str) -> Result<(), ShimError> {
    if cwd.is_empty() || cwd == "/" {
        return Ok(());
    }
    match resolve::make_dirs(root, cwd, 0o755) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => Err(not_a_directory(cwd)),
        Err(error) => Err(bad_request(
            format_args!("make working directory {cwd:?}"),
            &error,
        )),
    }
}

fn mask_paths(
    root: BorrowedFd<'_>,
    paths: &[String],
    null: BorrowedFd<'_>,
) -> Result<(), ShimError> {
    // One empty filesystem serves all masked directories: attached to the first, copied for the
    // rest (before Linux 6.15 only an attached mount can be copied).
    let mut empty: Option<OwnedFd> = None;
    for path in paths {
        let what = |e: io::Error| system(format_args!("mask {path:?}"), &e);
        let Some(target) = lookup_if_present(root, path).map_err(what)? else {
            continue;
        };
        if !resolve::is_dir(target.as_fd()).map_err(what)? {
            let tree = mount::clone_fd(null, false).map_err(what)?;
            mount::attach(tree.as_fd(), target.as_fd()).map_err(what)?;
        } else if let Some(first) = &empty {
            let tree = mount::clone_fd(first.as_fd(), false).map_err(what)?;
            mount::attach(tree.as_fd(), target.as_fd()).map_err(what)?;
        } else {
            let attrs = MountAttrs {
                readonly: true,
                nosuid: true,
                nodev: true,
                noexec: true,
            };
            let options = [
                "size=4k".to_owned(),
                "nr_inodes=2".into(),
                "mode=555".into(),
            ];
            let tree = mount::filesystem("tmpfs", "tmpfs", &options, attrs).map_err(what)?;
            mount::attach(tree.as_fd(), target.as_fd()).map_err(what)?;
            empty = Some(tree);
        }
    }
    Ok(())
}

fn protect_paths(root: BorrowedFd<'_>, paths: &[String]) -> Result<(), ShimError> {
    for path in paths {
        let what = |e: io::Error| system(format_args!("make {path:?} read-only"), &e);
        let Some(target) = lookup_if_present(root, path).map_err(what)? else {
            continue;
        };
        let tree = mount::clone_fd(target.as_fd(), true).map_err(what)?;
        let attrs = MountAttrs {
            readonly: true,
            ..MountAttrs::default()
        };
        mount::add_attrs(tree.as_fd(), attrs, true).map_err(what)?;
        mount::attach(tree.as_fd(), target.as_fd()).map_err(what)?;
    }
    Ok(())
}

fn lookup_if_present(root: BorrowedFd<'_>, path: &str) -> io::Result<Option<OwnedFd>> {
    match resolve::lookup(root, path) {
        Ok(fd) => Ok(Some(fd)),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Bind the container's terminal onto `/dev/console`; called after the pivot.
pub(crate) fn mount_console(slave: BorrowedFd<'_>) -> Result<(), ShimError> {
    let what = |e: io::Error| system("mount /dev/console", &e);
    let root = mount::open_path(Path::new("/")).map_err(what)?;
    let target = resolve::make_file(root.as_fd(), "/dev/console").map_err(what)?;
    let tree = mount::clone_fd(slave, false).map_err(what)?;
    mount::attach(tree.as_fd(), target.as_fd()).map_err(what)
}
