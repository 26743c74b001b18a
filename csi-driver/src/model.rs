//! The words of this driver: volumes, snapshots and what may be asked of them. Plain values.

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::fmt;

/// Longest text a caller may give for an id or a name, in bytes (CSI: 128 unless said otherwise;
/// some callers add a prefix to their names).
pub const MAX_NAME_BYTES: usize = 253;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(String);

        impl $name {
            /// The id that what is called `name` gets on the node with this tag: the same name
            /// leads to the same record, whoever asks and how often.
            #[must_use]
            pub fn of(name: &str, node: &NodeTag) -> Self {
                Self(format!("{}-{}-{}", $prefix, digest(&[$prefix, name], 16), node.0))
            }

            /// An id as somebody gave it; none when it cannot be one of ours, on any node.
            #[must_use]
            pub fn parse(text: &str) -> Option<Self> {
                let rest = text.strip_prefix(concat!($prefix, "-"))?;
                let (name, node) = rest.split_once('-')?;
                let hex = |part: &str, digits| {
                    part.len() == digits && part.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
                };
                (hex(name, 32) && hex(node, 8)).then(|| Self(text.to_owned()))
            }

            /// Whether it was made on the node with this tag.
            #[must_use]
            pub fn is_of(&self, node: &NodeTag) -> bool {
                self.0.ends_with(&node.0)
            }

            /// As callers see it.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

id!(
    /// A volume.
    VolumeId, "v"
);
id!(
    /// A snapshot of a volume.
    SnapshotId, "s"
);
id!(
    /// Snapshots of several volumes, taken at one moment.
    GroupId, "g"
);

/// Eight digits that stand for a driver on a node in ids: who is asked about a volume can tell
/// whether it is his without knowing it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeTag(String);

impl NodeTag {
    /// The tag of a driver on a node.
    #[must_use]
    pub fn of(driver: &str, node: &str) -> Self {
        Self(digest(&["node", driver, node], 4))
    }
}

/// The first `bytes` bytes of a hash over words, in hexadecimal.
fn digest(words: &[&str], bytes: usize) -> String {
    let mut hash = Sha256::new();
    for word in words {
        hash.update(word.as_bytes());
        hash.update([0]);
    }
    hash.finalize()[..bytes]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// What a filesystem volume is formatted with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Filesystem {
    /// ext4
    Ext4,
    /// xfs
    Xfs,
}

impl Filesystem {
    /// As the kernel calls it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
        }
    }

    /// The one with this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "ext4" => Some(Self::Ext4),
            "xfs" => Some(Self::Xfs),
            _ => None,
        }
    }
}

/// What a volume is on the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A directory; its size is not enforced.
    Directory,
    /// A file with a filesystem in it.
    Filesystem(Filesystem),
    /// A file given out as a block device.
    Block,
}

impl Kind {
    /// The smallest volume, in bytes: below, mkfs refuses or nothing is left to use.
    #[must_use]
    pub fn min_bytes(self) -> u64 {
        match self {
            Self::Directory | Self::Block => 1 << 20,
            Self::Filesystem(Filesystem::Ext4) => 16 << 20,
            Self::Filesystem(Filesystem::Xfs) => 300 << 20,
        }
    }

    /// Whether the bytes are in an image file.
    #[must_use]
    pub fn has_image(self) -> bool {
        match self {
            Self::Directory => false,
            Self::Filesystem(_) | Self::Block => true,
        }
    }

    /// For people.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Directory => "dir",
            Self::Filesystem(filesystem) => filesystem.name(),
            Self::Block => "block",
        }
    }
}

/// Whether all blocks are there from the beginning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Provision {
    /// Yes: a write never fails for want of room in the pool.
    Thick,
    /// No: blocks come when they are written.
    Thin,
}

/// How a volume is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Access {
    /// As a block device.
    Block,
    /// As a mounted filesystem.
    Mount {
        /// Wanted filesystem; empty for any.
        fstype: String,
        /// Mount options.
        options: Vec<String>,
        /// Group that the volume's root belongs to (VOLUME_MOUNT_GROUP).
        group: Option<u32>,
    },
}

/// How many may use a volume, and for what (CSI `VolumeCapability.AccessMode`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// One node writes.
    SingleNodeWriter,
    /// One node reads.
    SingleNodeReader,
    /// One node, at one path.
    SingleNodeSingleWriter,
    /// One node, at many paths.
    SingleNodeMultiWriter,
    /// Many nodes; what a local volume cannot do.
    MultiNode,
}

/// One way of using a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capability {
    /// As what.
    pub access: Access,
    /// By how many.
    pub mode: Mode,
}

/// Wanted size, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CapacityRange {
    /// At least; 0 for no wish.
    pub required: u64,
    /// At most.
    pub limit: Option<u64>,
}

/// What a new volume starts as.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// A snapshot.
    Snapshot(SnapshotId),
    /// Another volume, as it is now.
    Volume(VolumeId),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_name_makes_one_id_and_tells_its_node() {
        let (here, there) = (NodeTag::of("d", "node-1"), NodeTag::of("d", "node-2"));
        let id = VolumeId::of("pvc-1", &here);
        assert_eq!(id, VolumeId::of("pvc-1", &here));
        assert_ne!(id, VolumeId::of("pvc-2", &here));
        assert!(id.is_of(&here) && !id.is_of(&there));
        assert_eq!(VolumeId::parse(id.as_str()), Some(id));
    }

    #[test]
    fn what_is_no_id_of_ours_is_none() {
        let digits = "0".repeat(32);
        for text in [
            "",
            "v-",
            "reallyfakevolumeid",
            "../../etc/passwd",
            &format!("s-{digits}-00000000"),
            &format!("v-{digits}-0000000g"),
            &format!("v-{digits}-00000000/.."),
        ] {
            assert_eq!(VolumeId::parse(text), None, "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_parsed_without_a_crash_and_never_names_another_directory(text: String) {
            if let Some(id) = VolumeId::parse(&text) {
                assert!(!id.as_str().contains(['/', '.']));
            }
        }
    }
}
