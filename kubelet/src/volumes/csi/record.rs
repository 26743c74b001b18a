//! `vol_data.json`: what a mount is, for whoever has to undo it. The stock kubelet's keys, so
//! that either can take over from the other. Written before the driver is called; blocking.

use super::paths::VOL_DATA;
use crate::errors::chain;
use linux::fs::{Durability, create_dirs, read_file, remove_file, write_atomic};
use std::collections::BTreeMap;
use std::path::Path;

/// A record longer than this is not ours.
const LIMIT: usize = 1 << 20;

/// What a record holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct VolData {
    /// Driver.
    pub(crate) driver: String,
    /// The driver's id of the volume.
    pub(crate) handle: String,
    /// Name of the volume: that of the PersistentVolume, or of an inline volume.
    pub(crate) name: String,
    /// More, for readers of the file.
    pub(crate) rest: BTreeMap<String, String>,
}

impl VolData {
    /// Reads the record in a directory; none when there is no record.
    ///
    /// # Errors
    /// What is there cannot be read or understood.
    pub(crate) fn load(dir: &Path) -> Result<Option<Self>, String> {
        let path = dir.join(VOL_DATA);
        let text = match read_file(&path, LIMIT) {
            Ok(text) => text,
            Err(error) if error.is_not_found() => return Ok(None),
            Err(error) => return Err(chain(&error)),
        };
        let refused = |why: String| {
            format!(
                "kubernetes.io/csi: failed to parse volume data file [{}]: {why}",
                path.display()
            )
        };
        Self::parse(&text).map(Some).map_err(refused)
    }

    fn parse(text: &[u8]) -> Result<Self, String> {
        let mut rest: BTreeMap<String, String> =
            serde_json::from_slice(text).map_err(|e| e.to_string())?;
        let driver = rest.remove("driverName").unwrap_or_default();
        let handle = rest.remove("volumeHandle").unwrap_or_default();
        let name = rest.remove("specVolID").unwrap_or_default();
        if driver.is_empty() || handle.is_empty() {
            return Err("it names no driver or no volume".to_owned());
        }
        Ok(Self {
            driver,
            handle,
            name,
            rest,
        })
    }

    fn text(&self) -> Vec<u8> {
        let mut all = self.rest.clone();
        all.insert("driverName".to_owned(), self.driver.clone());
        all.insert("volumeHandle".to_owned(), self.handle.clone());
        if !self.name.is_empty() {
            all.insert("specVolID".to_owned(), self.name.clone());
        }
        // A map of strings can always be written.
        let mut text = serde_json::to_vec(&all).unwrap_or_default();
        text.push(b'\n');
        text
    }

    /// Writes the record into a directory, which is made.
    ///
    /// # Errors
    /// Names what the kernel refused.
    pub(crate) fn save(&self, dir: &Path) -> Result<(), String> {
        create_dirs(dir, 0o750).map_err(|e| chain(&e))?;
        let (path, text) = (dir.join(VOL_DATA), self.text());
        // What is there already needs no room on a full disk.
        if read_file(&path, LIMIT).is_ok_and(|old| old == text) {
            return Ok(());
        }
        write_atomic(&path, &text, 0o640, Durability::Process).map_err(|e| chain(&e))
    }

    /// Removes the record of a directory.
    ///
    /// # Errors
    /// Names what the kernel refused.
    pub(crate) fn remove(dir: &Path) -> Result<(), String> {
        remove_file(&dir.join(VOL_DATA)).map_err(|e| chain(&e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_record_is_what_the_stock_kubelet_reads_and_writes() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(VolData::load(dir.path()), Ok(None));
        let text = br#"{"attachmentID":"csi-1","driverName":"d","nodeName":"n","specVolID":"pv","volumeHandle":"h","volumeLifecycleMode":"Persistent"}"#;
        std::fs::write(dir.path().join(VOL_DATA), text).unwrap();
        let data = VolData::load(dir.path()).unwrap().unwrap();
        assert_eq!((data.driver.as_str(), data.name.as_str()), ("d", "pv"));
        assert_eq!(data.rest["volumeLifecycleMode"], "Persistent");
        data.save(dir.path()).unwrap();
        let again = std::fs::read(dir.path().join(VOL_DATA)).unwrap();
        assert_eq!(again, [&text[..], b"\n"].concat());
        VolData::remove(dir.path()).unwrap();
        VolData::remove(dir.path()).unwrap();
    }

    #[test]
    fn a_damaged_record_is_told_and_not_taken_for_none() {
        let dir = tempfile::tempdir().unwrap();
        for text in ["", "{", "[]", "{}", r#"{"driverName":"d"}"#, r#"{"a":1}"#] {
            std::fs::write(dir.path().join(VOL_DATA), text).unwrap();
            assert!(VolData::load(dir.path()).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_record_or_an_error(text: Vec<u8>) {
            if let Ok(data) = VolData::parse(&text) {
                prop_assert_eq!(VolData::parse(&data.text()), Ok(data));
            }
        }
    }
}
