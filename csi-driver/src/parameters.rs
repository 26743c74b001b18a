//! Parameters of StorageClasses, VolumeAttributesClasses and VolumeSnapshotClasses: a closed set
//! of keys. Pure.
//!
//! A key or value that is not understood is refused by its name: a misspelt promise is worse than
//! none.

use crate::model::Provision;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Keys as they come over the wire.
pub type Map = BTreeMap<String, String>;

/// The key of the filesystem, also without a provisioner that takes it off.
const FSTYPE: &str = "csi.storage.k8s.io/fstype";

/// What sidecars add with `--extra-create-metadata`: for people, without effect.
const METADATA: [&str; 9] = [
    "csi.storage.k8s.io/pvc/name",
    "csi.storage.k8s.io/pvc/namespace",
    "csi.storage.k8s.io/pv/name",
    "csi.storage.k8s.io/volumesnapshot/name",
    "csi.storage.k8s.io/volumesnapshot/namespace",
    "csi.storage.k8s.io/volumesnapshotcontent/name",
    "csi.storage.k8s.io/volumegroupsnapshot/name",
    "csi.storage.k8s.io/volumegroupsnapshot/namespace",
    "csi.storage.k8s.io/volumegroupsnapshotcontent/name",
];

/// A parameter that is not understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParameterError {
    /// Nothing goes by that name.
    #[error("parameter {key:?} is not known; known are {known}")]
    Unknown {
        /// The name.
        key: String,
        /// What there is.
        known: &'static str,
    },
    /// The name is known, the value is not.
    #[error("parameter {key:?} has value {value:?}; {expected} is expected")]
    Value {
        /// The name.
        key: &'static str,
        /// The value.
        value: String,
        /// What it may be.
        expected: &'static str,
    },
}

/// Whether volumes are image files or directories.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// An image file, with a filesystem or as a block device.
    Image,
    /// A directory.
    Directory,
}

/// What a StorageClass says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClassParameters {
    /// `type`: `image` (default) or `dir`.
    pub form: Form,
    /// `provision`: `thick` (default) or `thin`.
    pub provision: Provision,
    /// `csi.storage.k8s.io/fstype`.
    pub fstype: Option<String>,
}

/// Reads the parameters of a StorageClass.
///
/// # Errors
/// [`ParameterError`] for the first key that is not understood.
pub fn class(map: &Map) -> Result<ClassParameters, ParameterError> {
    let mut class = ClassParameters {
        form: Form::Image,
        provision: Provision::Thick,
        fstype: None,
    };
    for (key, value) in map {
        match key.as_str() {
            "type" => {
                class.form = match value.as_str() {
                    "image" => Form::Image,
                    "dir" => Form::Directory,
                    _ => return Err(bad("type", value, "image or dir")),
                }
            }
            "provision" => {
                class.provision = match value.as_str() {
                    "thick" => Provision::Thick,
                    "thin" => Provision::Thin,
                    _ => return Err(bad("provision", value, "thick or thin")),
                }
            }
            FSTYPE => class.fstype = Some(value.clone()),
            key if METADATA.contains(&key) => {}
            key => return Err(unknown(key, "type, provision, csi.storage.k8s.io/fstype")),
        }
    }
    Ok(class)
}

/// The part of the parameters that decides what a volume is: two requests with the same are the
/// same request, whatever metadata a sidecar adds.
#[must_use]
pub fn essential(map: &Map) -> Map {
    map.iter()
        .filter(|(key, _)| !METADATA.contains(&key.as_str()))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect()
}

/// What can be changed while a volume is in use (VolumeAttributesClass).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mutable {
    /// `directIO`: past the page cache of the image. Default: yes, where the pool can.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub direct_io: Option<bool>,
    /// `readAheadKiB`: how far the kernel reads ahead. Default: the kernel's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read_ahead_kib: Option<u32>,
}

/// Farthest read-ahead accepted: more only evicts what is used.
const MAX_READ_AHEAD_KIB: u32 = 65_536;

/// Reads mutable parameters.
///
/// # Errors
/// [`ParameterError`] for the first key that is not understood; nothing is changed then.
pub fn mutable(map: &Map) -> Result<Mutable, ParameterError> {
    let mut mutable = Mutable::default();
    for (key, value) in map {
        match key.as_str() {
            "directIO" => {
                mutable.direct_io = match value.as_str() {
                    "true" => Some(true),
                    "false" => Some(false),
                    _ => return Err(bad("directIO", value, "true or false")),
                }
            }
            "readAheadKiB" => {
                let number = value.parse().ok();
                let number = number.filter(|kib| *kib <= MAX_READ_AHEAD_KIB);
                mutable.read_ahead_kib =
                    Some(number.ok_or_else(|| bad("readAheadKiB", value, "0 to 65536"))?);
            }
            key => return Err(unknown(key, "directIO, readAheadKiB")),
        }
    }
    Ok(mutable)
}

impl Mutable {
    /// These settings, with those of `newer` that are given in their place.
    #[must_use]
    pub fn overlaid(self, newer: Self) -> Self {
        Self {
            direct_io: newer.direct_io.or(self.direct_io),
            read_ahead_kib: newer.read_ahead_kib.or(self.read_ahead_kib),
        }
    }
}

/// What the state of a snapshot must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Consistency {
    /// As after a clean unmount: writers wait for a moment.
    Freeze,
    /// As after a power cut.
    Crash,
}

/// Reads the parameters of a VolumeSnapshotClass or VolumeGroupSnapshotClass.
///
/// # Errors
/// [`ParameterError`] for the first key that is not understood.
pub fn snapshot(map: &Map) -> Result<Consistency, ParameterError> {
    let mut consistency = Consistency::Freeze;
    for (key, value) in map {
        match key.as_str() {
            "consistency" => {
                consistency = match value.as_str() {
                    "freeze" => Consistency::Freeze,
                    "crash" => Consistency::Crash,
                    _ => return Err(bad("consistency", value, "freeze or crash")),
                }
            }
            key if METADATA.contains(&key) => {}
            key => return Err(unknown(key, "consistency")),
        }
    }
    Ok(consistency)
}

fn unknown(key: &str, known: &'static str) -> ParameterError {
    ParameterError::Unknown {
        key: key.to_owned(),
        known,
    }
}

fn bad(key: &'static str, value: &str, expected: &'static str) -> ParameterError {
    ParameterError::Value {
        key,
        value: value.to_owned(),
        expected,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> Map {
        let owned = pairs.iter().map(|(k, v)| ((*k).into(), (*v).into()));
        owned.collect()
    }

    #[test]
    fn without_parameters_a_volume_is_a_thick_image() {
        let class = class(&Map::new()).unwrap();
        assert_eq!(class.form, Form::Image);
        assert_eq!(class.provision, Provision::Thick);
    }

    #[test]
    fn an_unknown_key_or_value_is_refused_by_its_name() {
        let refused = class(&map(&[("provison", "thin")])).unwrap_err();
        assert!(refused.to_string().contains("\"provison\""));
        let refused = class(&map(&[("provision", "slim")])).unwrap_err();
        assert!(refused.to_string().contains("\"slim\""));
        assert!(mutable(&map(&[("readAheadKiB", "99999999")])).is_err());
        assert!(mutable(&map(&[("iops", "7")])).is_err());
        assert!(snapshot(&map(&[("consistency", "maybe")])).is_err());
    }

    #[test]
    fn metadata_of_sidecars_changes_nothing() {
        let named = map(&[("csi.storage.k8s.io/pvc/name", "a"), ("type", "dir")]);
        assert_eq!(class(&named).unwrap().form, Form::Directory);
        assert_eq!(essential(&named), map(&[("type", "dir")]));
    }

    #[test]
    fn a_change_leaves_alone_what_it_does_not_name() {
        let old = mutable(&map(&[("directIO", "false"), ("readAheadKiB", "4")])).unwrap();
        let new = mutable(&map(&[("readAheadKiB", "8")])).unwrap();
        let both = old.overlaid(new);
        assert_eq!(both.direct_io, Some(false));
        assert_eq!(both.read_ahead_kib, Some(8));
    }
}
