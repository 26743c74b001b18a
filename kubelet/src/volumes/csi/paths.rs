//! Where CSI volumes are on the node: the stock kubelet's layout, which drivers, tools and
//! backups know.
//!
//! ```text
//! <root>/pods/<uid>/volumes/kubernetes.io~csi/<name>/{vol_data.json,mount}
//! <root>/pods/<uid>/volumeDevices/kubernetes.io~csi/<name>          link to the published device
//! <root>/plugins/kubernetes.io/csi/<driver>/<sha256>/{vol_data.json,globalmount}
//! <root>/plugins/kubernetes.io/csi/volumeDevices/<name>/{data/vol_data.json,dev}
//! <root>/plugins/kubernetes.io/csi/volumeDevices/staging/<name>
//! <root>/plugins/kubernetes.io/csi/volumeDevices/publish/<name>/<uid>
//! ```

use sha2::{Digest as _, Sha256};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// Directory name of CSI volumes in a pod's directory.
pub(crate) const PLUGIN: &str = "kubernetes.io~csi";
/// Name of the record beside every mount.
pub(crate) const VOL_DATA: &str = "vol_data.json";

/// The layout below one root.
#[derive(Debug, Clone)]
pub(crate) struct Paths {
    root: PathBuf,
}

/// Hexadecimal SHA-256.
fn digest(text: &str) -> String {
    let mut hex = String::with_capacity(64);
    for byte in Sha256::digest(text.as_bytes()) {
        // Writing to a string cannot fail.
        let _ = write!(hex, "{byte:02x}");
    }
    hex
}

/// Name of the VolumeAttachment of a volume on a node.
pub(crate) fn attachment_name(handle: &str, driver: &str, node: &str) -> String {
    format!("csi-{}", digest(&format!("{handle}{driver}{node}")))
}

/// Volume handle of an inline volume.
pub(crate) fn inline_handle(uid: &str, volume: &str) -> String {
    format!("csi-{}", digest(&format!("{uid}{volume}")))
}

/// Whether a name can be a single directory.
pub(crate) fn is_file_name(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\0'])
}

impl Paths {
    pub(crate) fn new(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
        }
    }

    pub(crate) fn pods(&self) -> PathBuf {
        self.root.join("pods")
    }

    /// Directories of the pod's CSI volumes.
    pub(crate) fn pod_volumes(&self, uid: &str) -> PathBuf {
        self.pods().join(uid).join("volumes").join(PLUGIN)
    }

    /// What is mounted into containers.
    pub(crate) fn target(&self, uid: &str, name: &str) -> PathBuf {
        self.pod_volumes(uid).join(name).join("mount")
    }

    /// Links to the pod's devices.
    pub(crate) fn pod_devices(&self, uid: &str) -> PathBuf {
        self.pods().join(uid).join("volumeDevices").join(PLUGIN)
    }

    /// Directories of staged volumes, by driver.
    pub(crate) fn plugin(&self) -> PathBuf {
        self.root.join("plugins/kubernetes.io/csi")
    }

    /// Where a filesystem is staged.
    pub(crate) fn staging(&self, driver: &str, handle: &str) -> PathBuf {
        let volume = self.plugin().join(driver).join(digest(handle));
        volume.join("globalmount")
    }

    /// All of block volumes.
    pub(crate) fn devices(&self) -> PathBuf {
        self.plugin().join("volumeDevices")
    }

    /// Where a block volume is staged.
    pub(crate) fn block_staging(&self, name: &str) -> PathBuf {
        self.devices().join("staging").join(name)
    }

    /// Where a block volume is published to pods.
    pub(crate) fn block_publish(&self, name: &str) -> PathBuf {
        self.devices().join("publish").join(name)
    }

    /// A block volume's own directory.
    pub(crate) fn block_volume(&self, name: &str) -> PathBuf {
        self.devices().join(name)
    }

    /// Where the record of a block volume is.
    pub(crate) fn block_data(&self, name: &str) -> PathBuf {
        self.block_volume(name).join("data")
    }

    /// What events call the global map path of a block volume.
    pub(crate) fn block_map(&self, name: &str) -> PathBuf {
        self.block_volume(name).join("dev")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_and_names_are_those_of_the_stock_kubelet() {
        let paths = Paths::new(Path::new("/var/lib/kubelet"));
        assert_eq!(
            paths.target("u", "pv").to_str().unwrap(),
            "/var/lib/kubelet/pods/u/volumes/kubernetes.io~csi/pv/mount"
        );
        assert_eq!(
            paths.staging("d.io", "").to_str().unwrap(),
            "/var/lib/kubelet/plugins/kubernetes.io/csi/d.io/e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855/globalmount"
        );
        assert_eq!(
            paths.block_publish("pv").join("u").to_str().unwrap(),
            "/var/lib/kubelet/plugins/kubernetes.io/csi/volumeDevices/publish/pv/u"
        );
        assert_eq!(
            attachment_name("a", "b", "c"),
            inline_handle("ab", "c"),
            "both are one digest of everything in a row"
        );
        assert!(attachment_name("a", "b", "c").starts_with("csi-ba7816bf8f01cfea414140de5dae2223"));
    }

    #[test]
    fn only_single_names_are_directories() {
        for bad in ["", ".", "..", "a/b", "/"] {
            assert!(!is_file_name(bad), "{bad:?}");
        }
        assert!(is_file_name("pvc-1.x"));
    }
}
