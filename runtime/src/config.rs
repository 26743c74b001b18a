//! How the engine is set up.

use crate::image::RegistryConfig;
use std::path::PathBuf;

/// How cgroups are made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum CgroupDriver {
    /// Plain directories below the root.
    #[default]
    Cgroupfs,
}

/// Everything the engine must be told. No defaults are hidden elsewhere.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// What survives a reboot: records, images, writable layers.
    pub root: PathBuf,
    /// What does not: sockets, namespace pins, shared memory, network records.
    pub run_dir: PathBuf,
    /// CNI network lists.
    pub cni_conf_dir: PathBuf,
    /// CNI executables.
    pub cni_bin_dirs: Vec<PathBuf>,
    /// The `pod-shim` program.
    pub shim_path: PathBuf,
    /// Root of our cgroups in every hierarchy; paths given to the engine are below it.
    pub cgroup_root: String,
    /// How cgroups are made.
    pub cgroup_driver: CgroupDriver,
    /// How registries are reached.
    pub registries: RegistryConfig,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            root: PathBuf::from("/var/lib/ferrule"),
            run_dir: PathBuf::from("/run/ferrule"),
            cni_conf_dir: PathBuf::from("/etc/cni/net.d"),
            cni_bin_dirs: vec![PathBuf::from("/opt/cni/bin")],
            shim_path: PathBuf::from("pod-shim"),
            cgroup_root: "/".to_owned(),
            cgroup_driver: CgroupDriver::default(),
            registries: RegistryConfig::default(),
        }
    }
}

impl EngineConfig {
    pub(crate) fn sandboxes(&self) -> PathBuf {
        self.root.join("sandboxes")
    }

    pub(crate) fn containers(&self) -> PathBuf {
        self.root.join("containers")
    }

    pub(crate) fn volumes(&self) -> PathBuf {
        self.root.join("volumes")
    }

    pub(crate) fn sockets(&self) -> PathBuf {
        self.run_dir.join("shim")
    }

    pub(crate) fn pins(&self) -> PathBuf {
        self.run_dir.join("netns")
    }

    pub(crate) fn shared_memory(&self) -> PathBuf {
        self.run_dir.join("shm")
    }

    pub(crate) fn network_records(&self) -> PathBuf {
        self.run_dir.join("cni")
    }
}
