//! What is remembered of a volume, a snapshot, a group: small, versioned, with a checksum.
//!
//! A record names a thing and says what it was promised to be. Whether it is mounted, attached or
//! published is never written down: the kernel is asked.
//!
//! ```text
//!            data made              DeleteVolume
//!  Intent ────────────────▶ Ready ────────────────▶ Deleting ───▶ (no record)
//!     │ failed or killed                                ▲
//!     └─────────────────────────────────────────────────┘
//! ```

use crate::model::{GroupId, Kind, Provision, SnapshotId, Source, VolumeId};
use crate::parameters::{Map, Mutable};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// Version of the format written; older ones are read.
pub const VERSION: u32 = 1;

/// How far a thing is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Its data may be half made. Nobody was told that it exists: it may be taken away.
    Intent,
    /// It exists, whole.
    Ready,
    /// Its data may be half gone. It is not shown any more; the removal is finished by whoever
    /// comes next.
    Deleting,
}

/// A volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRecord {
    /// Its id.
    pub id: VolumeId,
    /// The name it was asked for by.
    pub name: String,
    /// How far it is.
    pub state: State,
    /// What it is on the pool.
    pub kind: Kind,
    /// Whether its blocks were there from the beginning.
    pub provision: Provision,
    /// Promised size; an image may still have to grow to it.
    pub capacity_bytes: u64,
    /// What it started as.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<Source>,
    /// The parameters that decided what it is.
    #[serde(default)]
    pub parameters: Map,
    /// What can be changed while it is in use.
    #[serde(default)]
    pub mutable: Mutable,
    /// UUID of the filesystem in the image, which it must still have when it is mounted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filesystem_uuid: Option<String>,
    /// Whether it ever shared blocks with a snapshot or clone: its extents have to be looked at
    /// to tell what it may still need.
    #[serde(default)]
    pub shares_blocks: bool,
    /// Room it needs while it is made, beside its own, in bytes.
    #[serde(default)]
    pub reserved_bytes: u64,
    /// Order of creation, and its time: nanoseconds since 1970.
    pub sequence: u64,
}

/// A snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotRecord {
    /// Its id.
    pub id: SnapshotId,
    /// The name it was asked for by.
    pub name: String,
    /// How far it is.
    pub state: State,
    /// The volume it was taken of, which may be gone.
    pub source: VolumeId,
    /// What that volume was.
    pub kind: Kind,
    /// Size of a volume made from it, at least.
    pub size_bytes: u64,
    /// UUID of the filesystem in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filesystem_uuid: Option<String>,
    /// Whether writers were held while it was taken, or there were none.
    #[serde(default)]
    pub consistent: bool,
    /// Room it needs while it is made, in bytes.
    #[serde(default)]
    pub reserved_bytes: u64,
    /// The group it was taken with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<GroupId>,
    /// Order of creation, and its time: nanoseconds since 1970.
    pub sequence: u64,
}

/// A group of snapshots.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupRecord {
    /// Its id.
    pub id: GroupId,
    /// The name it was asked for by.
    pub name: String,
    /// How far it is.
    pub state: State,
    /// The volumes, as asked for.
    pub sources: Vec<VolumeId>,
    /// Their snapshots, in the same order.
    pub snapshots: Vec<SnapshotId>,
    /// Order of creation, and its time: nanoseconds since 1970.
    pub sequence: u64,
}

/// What all records have.
pub trait Record: Clone + Serialize + DeserializeOwned {
    /// Folder of its files, and its name for people.
    const FOLDER: &'static str;
    /// Name of its file, without ending.
    fn key(&self) -> &str;
    /// Order of creation.
    fn sequence(&self) -> u64;
    /// How far it is.
    fn state(&self) -> State;
    /// Its name.
    fn name(&self) -> &str;
}

macro_rules! record {
    ($type:ident, $folder:literal) => {
        impl Record for $type {
            const FOLDER: &'static str = $folder;
            fn key(&self) -> &str {
                self.id.as_str()
            }
            fn sequence(&self) -> u64 {
                self.sequence
            }
            fn state(&self) -> State {
                self.state
            }
            fn name(&self) -> &str {
                &self.name
            }
        }
    };
}

record!(VolumeRecord, "volumes");
record!(SnapshotRecord, "snapshots");
record!(GroupRecord, "groups");

/// First line of a record's file.
#[derive(Serialize, Deserialize)]
struct Header {
    version: u32,
    sha256: String,
}

/// Why a file is no record.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// It does not begin with a line of ours.
    #[error("it does not begin with a header")]
    Header,
    /// A newer driver wrote it.
    #[error("it has version {version}; this driver reads up to {VERSION}")]
    Version {
        /// What it says.
        version: u32,
    },
    /// It was changed or cut.
    #[error("its checksum is wrong")]
    Checksum,
    /// It is whole, but not what it should be.
    #[error("its content is not understood")]
    Content(#[source] serde_json::Error),
}

/// The bytes of a record's file.
///
/// # Errors
/// When it cannot be expressed in JSON, which a record always can.
pub fn encode<R: Record>(record: &R) -> Result<Vec<u8>, serde_json::Error> {
    let body = serde_json::to_vec_pretty(record)?;
    let header = Header {
        version: VERSION,
        sha256: checksum(&body),
    };
    let mut bytes = serde_json::to_vec(&header)?;
    bytes.push(b'\n');
    bytes.extend(body);
    bytes.push(b'\n');
    Ok(bytes)
}

/// Reads the bytes of a record's file.
///
/// # Errors
/// [`DecodeError`].
pub fn decode<R: Record>(bytes: &[u8]) -> Result<R, DecodeError> {
    let end = bytes.iter().position(|byte| *byte == b'\n');
    let (header, body) = bytes.split_at(end.ok_or(DecodeError::Header)?);
    let header: Header = serde_json::from_slice(header).map_err(|_| DecodeError::Header)?;
    if header.version > VERSION {
        return Err(DecodeError::Version {
            version: header.version,
        });
    }
    let body = body.strip_prefix(b"\n").unwrap_or(body);
    let body = body.strip_suffix(b"\n").unwrap_or(body);
    if checksum(body) != header.sha256 {
        return Err(DecodeError::Checksum);
    }
    serde_json::from_slice(body).map_err(DecodeError::Content)
}

fn checksum(body: &[u8]) -> String {
    let digest = Sha256::digest(body);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::NodeTag;

    fn group() -> GroupRecord {
        GroupRecord {
            id: GroupId::of("a", &NodeTag::of("d", "n")),
            name: "a".into(),
            state: State::Ready,
            sources: Vec::new(),
            snapshots: Vec::new(),
            sequence: 7,
        }
    }

    #[test]
    fn what_was_written_is_read_again() {
        let bytes = encode(&group()).unwrap();
        assert_eq!(decode::<GroupRecord>(&bytes).unwrap(), group());
    }

    #[test]
    fn a_record_cut_or_changed_anywhere_is_not_believed() {
        let bytes = encode(&group()).unwrap();
        for length in 0..bytes.len() - 1 {
            assert!(decode::<GroupRecord>(&bytes[..length]).is_err(), "{length}");
        }
        for place in 0..bytes.len() - 1 {
            let mut changed = bytes.clone();
            changed[place] ^= 1;
            let read = decode::<GroupRecord>(&changed);
            assert!(read.is_err() || read.is_ok_and(|r| r == group()), "{place}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_decoded_without_a_crash(bytes: Vec<u8>) {
            let _ = decode::<VolumeRecord>(&bytes);
        }
    }
}
