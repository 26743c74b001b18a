//! `/sys/fs/cgroup` as a container should see it: its own cgroup as the root.
//!
//! On cgroup v2 a cgroup2 mount in the container's cgroup namespace, or a bind of its directory
//! without one. On v1 a small tmpfs with one bind per hierarchy, plus the usual links for
//! hierarchies that are mounted together (`cpu` → `cpu,cpuacct`).

use super::system;
use linux::mount::{self, MountAttrs, resolve};
use pod_shim::protocol::ShimError;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

/// Detached mounts, taken while the host's paths can still be seen.
#[derive(Debug)]
pub(crate) enum CgroupView {
    /// One mount is the whole view.
    Unified(OwnedFd),
    /// A tmpfs with these hierarchies in it.
    Hierarchies(Vec<(String, OwnedFd)>),
}

/// The name of the hierarchy a v1 cgroup directory is in: the first component below
/// `/sys/fs/cgroup`.
fn hierarchy_name(dir: &Path) -> Option<String> {
    let below = dir.strip_prefix("/sys/fs/cgroup").ok()?;
    Some(below.components().next()?.as_os_str().to_str()?.to_owned())
}

/// Take the mounts the view is made of.
pub(crate) fn prepare(cgroups: &[PathBuf], namespace: bool) -> Result<CgroupView, ShimError> {
    let what = |dir: &Path| format!("show cgroup {} in the container", dir.display());
    if let [dir] = cgroups
        && dir.join("cgroup.controllers").exists()
    {
        let made = if namespace {
            mount::filesystem("cgroup2", "cgroup", &[], MountAttrs::default())
        } else {
            mount::clone_path(dir, true)
        };
        return made
            .map(CgroupView::Unified)
            .map_err(|e| system(what(dir), &e));
    }
    let mut list = Vec::new();
    for dir in cgroups {
        if let Some(name) = hierarchy_name(dir) {
            list.push((
                name,
                mount::clone_path(dir, false).map_err(|e| system(what(dir), &e))?,
            ));
        }
    }
    Ok(CgroupView::Hierarchies(list))
}

/// Put the view on `target`.
pub(crate) fn attach(
    view: CgroupView,
    target: BorrowedFd<'_>,
    attrs: MountAttrs,
) -> io::Result<()> {
    let attrs = MountAttrs {
        nosuid: true,
        nodev: true,
        noexec: true,
        ..attrs
    };
    match view {
        CgroupView::Unified(tree) => {
            mount::add_attrs(tree.as_fd(), attrs, true)?;
            mount::attach(tree.as_fd(), target)
        }
        CgroupView::Hierarchies(list) => {
            let writable = MountAttrs {
                readonly: false,
                ..attrs
            };
            let options = ["mode=755".to_owned(), "size=64k".into()];
            let tmpfs = mount::filesystem("tmpfs", "cgroup", &options, writable)?;
            mount::attach(tmpfs.as_fd(), target)?;
            for (name, tree) in list {
                let dir = resolve::make_dirs(tmpfs.as_fd(), &name, 0o755)?;
                mount::add_attrs(tree.as_fd(), attrs, true)?;
                mount::attach(tree.as_fd(), dir.as_fd())?;
                for part in name.split(',').filter(|part| *part != name) {
                    resolve::ensure_symlink(tmpfs.as_fd(), part, &name)?;
                }
            }
            mount::add_attrs(tmpfs.as_fd(), attrs, false)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hierarchy_is_named_by_its_mount_point() {
        let name = |path: &str| hierarchy_name(Path::new(path));
        assert_eq!(
            name("/sys/fs/cgroup/cpu,cpuacct/a/b").as_deref(),
            Some("cpu,cpuacct")
        );
        assert_eq!(name("/sys/fs/cgroup").as_deref(), None);
        assert_eq!(name("/elsewhere/memory/a").as_deref(), None);
    }
}
