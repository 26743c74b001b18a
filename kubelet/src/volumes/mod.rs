//! (being written)
use std::collections::BTreeMap;
use std::path::PathBuf;

/// A volume on the node, ready to be mounted into containers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostVolume {
    /// What containers mount.
    pub path: PathBuf,
    /// Whether containers may only read it, whatever their mount says.
    pub readonly: bool,
}

/// The volumes of a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodVolumes {
    /// By volume name.
    pub by_name: BTreeMap<String, HostVolume>,
}
