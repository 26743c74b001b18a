//! Ids for pods with a user namespace (`hostUsers: false`): every such pod has a range of its own.
//!
//! ```text
//! <root>/pods/<uid>/userns     the pod's range, in the stock kubelet's words
//! ```
//! A range is on disk before anything uses it and is free again when the pod's teardown is over;
//! after a restart the files say what is taken. All functions block shortly. No task.

use linux::fs::{Durability, FsError, create_dirs, write_atomic};
use runtime::service::UserNamespace;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Ids of a pod unless the node is configured otherwise (KEP-127); others are multiples of it.
pub const IDS_PER_POD: u32 = 65536;
/// The file with a pod's range.
const FILE: &str = "userns";
/// A file longer than this is not ours.
const FILE_LIMIT: usize = 4096;
/// The user whose subordinate ids are pods'.
const USER: &str = "kubelet";

/// Why a pod gets no user namespace.
#[derive(Debug, thiserror::Error)]
pub enum UserNamespaceError {
    /// The node's configuration of subordinate ids does not do.
    #[error("kubelet mappings: {0}")]
    Mappings(String),
    /// All ranges are taken.
    #[error("create user namespace: could not find an empty slot to allocate a user namespace")]
    Full,
    /// The pod's range cannot be read or kept.
    #[error("user namespace: {0}")]
    Record(String),
}

/// The ids pods' ranges are cut from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pool {
    /// First id.
    pub first: u32,
    /// How many.
    pub length: u32,
}

impl Pool {
    /// All ids but the first pod's worth, which are the node's own users.
    pub fn all(ids_per_pod: u32) -> Self {
        let length = u32::MAX - ids_per_pod + 1;
        Self {
            first: ids_per_pod,
            length: length - length % ids_per_pod,
        }
    }
}

/// The stock kubelet's form of a range.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Record {
    uid_mappings: Vec<Mapping>,
    gid_mappings: Vec<Mapping>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Mapping {
    host_id: u32,
    container_id: u32,
    length: u32,
}

impl Record {
    fn of(first: u32, length: u32) -> Self {
        let mapping = Mapping {
            host_id: first,
            container_id: 0,
            length,
        };
        Self {
            uid_mappings: vec![mapping],
            gid_mappings: vec![mapping],
        }
    }

    /// The first id, when it is a range as we make them.
    fn first(&self, ids_per_pod: u32) -> Result<u32, String> {
        match (self.uid_mappings.as_slice(), self.gid_mappings.as_slice()) {
            ([uid], [gid]) if uid != gid => Err("uid and gid mappings differ".to_owned()),
            ([uid], [_]) if uid.container_id != 0 => Err("id 0 is not mapped".to_owned()),
            ([uid], [_]) if uid.length != ids_per_pod => {
                Err(format!("wrong user namespace length {}", uid.length))
            }
            ([uid], [_]) if uid.host_id % ids_per_pod != 0 => Err(format!(
                "wrong user namespace offset specified {}",
                uid.host_id
            )),
            ([uid], [_]) => Ok(uid.host_id),
            (_, _) => Err("not exactly one mapping".to_owned()),
        }
    }
}

#[derive(Debug, Default)]
struct Used {
    /// First ids by pod UID.
    by_pod: BTreeMap<String, u32>,
    /// The number of the range given last: ranges are taken in turn, so that what a pod left
    /// behind does not fall to the next one.
    last: u32,
}

/// Ranges of all pods.
#[derive(Debug)]
pub struct UserNamespaces {
    pods: PathBuf,
    pool: Pool,
    ids_per_pod: u32,
    used: Mutex<Used>,
}

impl UserNamespaces {
    /// Opens the ranges of `ids_per_pod` ids under the kubelet's root; reads which are taken.
    ///
    /// # Errors
    /// [`UserNamespaceError::Mappings`] when the pool is not made of whole ranges or too small
    /// for `max_pods`.
    pub fn open(
        root: &Path,
        pool: Pool,
        ids_per_pod: u32,
        max_pods: u32,
    ) -> Result<Self, UserNamespaceError> {
        let refuse = |message: String| Err(UserNamespaceError::Mappings(message));
        if !pool.first.is_multiple_of(ids_per_pod) {
            return refuse(format!(
                "kubelet user assigned ID {} is not a multiple of {ids_per_pod}",
                pool.first
            ));
        }
        if pool.first < ids_per_pod {
            return refuse(format!(
                "kubelet user assigned ID {} must be greater or equal to {ids_per_pod}",
                pool.first
            ));
        }
        if !pool.length.is_multiple_of(ids_per_pod) {
            return refuse(format!(
                "kubelet user assigned IDs length {} is not a multiple of {ids_per_pod}",
                pool.length
            ));
        }
        if pool
            .first
            .checked_add(pool.length.saturating_sub(1))
            .is_none()
        {
            return refuse("kubelet user assigned IDs end beyond all ids".to_owned());
        }
        if pool.length / ids_per_pod < max_pods {
            return refuse(format!(
                "kubelet user assigned IDs are not enough to support {max_pods} pods"
            ));
        }
        let opened = Self {
            pods: root.join("pods"),
            pool,
            ids_per_pod,
            used: Mutex::default(),
        };
        for uid in linux::fs::list_dir(&opened.pods).unwrap_or_default() {
            let Some(uid) = uid.to_str() else { continue };
            match opened.recorded(uid) {
                Ok(Some(first)) => {
                    opened.used().by_pod.insert(uid.to_owned(), first);
                }
                Ok(None) => {}
                // Its pod, if there is one, will be told when it is next made.
                Err(error) => tracing::warn!(uid, %error, "Range of a user namespace is damaged"),
            }
        }
        Ok(opened)
    }

    /// The pod's range; one of its own is found and recorded when it has none.
    ///
    /// # Errors
    /// [`UserNamespaceError::Full`] and [`UserNamespaceError::Record`].
    pub fn ensure(&self, uid: &str) -> Result<UserNamespace, UserNamespaceError> {
        let mut used = self.used();
        if let Some(first) = used.by_pod.get(uid) {
            return Ok(self.namespace(*first));
        }
        // One that is there and not in memory was not understood: better no pod than two with
        // the same ids.
        if let Some(first) = self.recorded(uid)? {
            used.by_pod.insert(uid.to_owned(), first);
            return Ok(self.namespace(first));
        }
        let slot = self.free_slot(&used).ok_or(UserNamespaceError::Full)?;
        let first = self.pool.first + slot * self.ids_per_pod;
        let dir = self.pods.join(uid);
        let text = serde_json::to_vec(&Record::of(first, self.ids_per_pod));
        let text = text.map_err(|e| UserNamespaceError::Record(e.to_string()))?;
        create_dirs(&dir, 0o750)
            .and_then(|()| write_atomic(&dir.join(FILE), &text, 0o600, Durability::Process))
            .map_err(|e| record_error(&e))?;
        used.last = slot;
        used.by_pod.insert(uid.to_owned(), first);
        Ok(self.namespace(first))
    }

    /// Frees the pod's range. Nothing of the pod may be left. Idempotent.
    ///
    /// # Errors
    /// [`UserNamespaceError::Record`]; the range stays taken.
    pub fn release(&self, uid: &str) -> Result<(), UserNamespaceError> {
        let mut used = self.used();
        if used.by_pod.contains_key(uid) {
            let file = self.pods.join(uid).join(FILE);
            linux::fs::remove_file(&file).map_err(|e| record_error(&e))?;
            used.by_pod.remove(uid);
        }
        Ok(())
    }

    fn namespace(&self, first: u32) -> UserNamespace {
        UserNamespace {
            first,
            length: self.ids_per_pod,
        }
    }

    fn used(&self) -> MutexGuard<'_, Used> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn free_slot(&self, used: &Used) -> Option<u32> {
        let count = self.pool.length / self.ids_per_pod;
        let slot_of = |first: &u32| {
            first
                .checked_sub(self.pool.first)
                .map(|n| n / self.ids_per_pod)
        };
        let taken: std::collections::BTreeSet<u32> =
            used.by_pod.values().filter_map(slot_of).collect();
        let after = (1..=count).map(|n| (used.last + n) % count);
        // At most one more than are taken is looked at.
        after
            .take(taken.len() + 1)
            .find(|slot| !taken.contains(slot))
    }

    /// What is on disk for a pod.
    fn recorded(&self, uid: &str) -> Result<Option<u32>, UserNamespaceError> {
        let path = self.pods.join(uid).join(FILE);
        let text = match linux::fs::read_file(&path, FILE_LIMIT) {
            Ok(text) => text,
            Err(error) if error.is_not_found() => return Ok(None),
            Err(error) => return Err(record_error(&error)),
        };
        parse(&text, self.ids_per_pod).map(Some).map_err(|e| {
            UserNamespaceError::Record(format!("invalid user namespace mappings file: {e}"))
        })
    }
}

fn record_error(error: &FsError) -> UserNamespaceError {
    let source = std::error::Error::source(error);
    UserNamespaceError::Record(
        source.map_or_else(|| error.to_string(), |s| format!("{error}: {s}")),
    )
}

fn parse(text: &[u8], ids_per_pod: u32) -> Result<u32, String> {
    let record: Record = serde_json::from_slice(text).map_err(|e| e.to_string())?;
    record.first(ids_per_pod)
}

/// The pool of a node: the subordinate ids of user `kubelet` when that user exists and has some
/// (subuid(5)), else all ids above the node's own. `etc` is the directory of the files.
///
/// # Errors
/// [`UserNamespaceError::Mappings`] when it has several ranges, or other group than user ids.
pub fn pool(etc: &Path, ids_per_pod: u32) -> Result<Pool, UserNamespaceError> {
    let read = |name: &str| std::fs::read_to_string(etc.join(name)).unwrap_or_default();
    let is_user = |line: &str| line.split(':').next() == Some(USER);
    if !read("passwd").lines().any(is_user) {
        return Ok(Pool::all(ids_per_pod));
    }
    let refuse = |message: String| Err(UserNamespaceError::Mappings(message));
    match (
        subids(&read("subuid")).as_slice(),
        subids(&read("subgid")).as_slice(),
    ) {
        ([], []) => Ok(Pool::all(ids_per_pod)),
        (users, groups) if users != groups => {
            refuse(format!("mismatched subuids and subgids for user {USER:?}"))
        }
        ([only], _) => Ok(*only),
        (_, _) => refuse(format!("user {USER:?} has more than one range of subids")),
    }
}

/// Ranges of the user in a file of lines `name:first:count`.
fn subids(text: &str) -> Vec<Pool> {
    let own = text.lines().filter_map(|line| {
        let (name, range) = line.split_once(':')?;
        let (first, length) = range.split_once(':')?;
        let pool = Pool {
            first: first.trim().parse().ok()?,
            length: length.trim().parse().ok()?,
        };
        (name == USER).then_some(pool)
    });
    own.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn opened(root: &Path) -> UserNamespaces {
        UserNamespaces::open(root, Pool::all(IDS_PER_POD), IDS_PER_POD, 110).unwrap()
    }

    #[test]
    fn a_pod_keeps_its_range_over_a_restart_and_nobody_else_gets_it() {
        let root = tempfile::tempdir().unwrap();
        let before = opened(root.path());
        let (a, b) = (before.ensure("a").unwrap(), before.ensure("b").unwrap());
        assert_ne!(a, b);
        assert_eq!(before.ensure("a").unwrap(), a);
        let after = opened(root.path());
        let c = after.ensure("c").unwrap();
        assert_eq!(after.ensure("b").unwrap(), b);
        assert!(c != a && c != b);
        assert!(a.first >= 65536 && a.first % 65536 == 0 && a.length == 65536);
    }

    #[test]
    fn a_range_is_free_when_it_is_released_and_the_file_is_in_stocks_words() {
        let root = tempfile::tempdir().unwrap();
        let pool = Pool {
            first: 131_072,
            length: 131_072,
        };
        let two = UserNamespaces::open(root.path(), pool, IDS_PER_POD, 2).unwrap();
        let (a, _b) = (two.ensure("a").unwrap(), two.ensure("b").unwrap());
        let full = two.ensure("c").unwrap_err().to_string();
        assert!(full.contains("could not find an empty slot"), "{full}");
        let text = std::fs::read_to_string(root.path().join("pods/a/userns")).unwrap();
        let mapping = format!(
            r#"[{{"hostId":{},"containerId":0,"length":65536}}]"#,
            a.first
        );
        assert_eq!(
            text,
            format!(r#"{{"uidMappings":{mapping},"gidMappings":{mapping}}}"#)
        );
        two.release("a").unwrap();
        two.release("a").unwrap();
        assert_eq!(two.ensure("c").unwrap(), a);
        assert!(!root.path().join("pods/a/userns").exists());
    }

    #[test]
    fn ranges_are_as_long_as_the_node_is_told() {
        let root = tempfile::tempdir().unwrap();
        let ids = 3 * IDS_PER_POD;
        let all = Pool::all(ids);
        assert_eq!((all.first % ids, all.length % ids), (0, 0));
        let opened = UserNamespaces::open(root.path(), all, ids, 110).unwrap();
        let (a, b) = (opened.ensure("a").unwrap(), opened.ensure("b").unwrap());
        assert_eq!((a.length, a.first.abs_diff(b.first)), (ids, ids));
        let other = UserNamespaces::open(root.path(), Pool::all(IDS_PER_POD), IDS_PER_POD, 110);
        let error = other.unwrap().ensure("a").unwrap_err().to_string();
        assert!(error.contains("wrong user namespace length"), "{error}");
    }

    #[test]
    fn a_damaged_record_gives_the_pod_no_second_range() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join("pods/a")).unwrap();
        std::fs::write(root.path().join("pods/a/userns"), "{}").unwrap();
        let opened = opened(root.path());
        let error = opened.ensure("a").unwrap_err().to_string();
        assert!(
            error.contains("invalid user namespace mappings file"),
            "{error}"
        );
        assert!(opened.ensure("b").is_ok());
    }

    #[test]
    fn pools_that_cannot_serve_all_pods_are_refused() {
        let root = tempfile::tempdir().unwrap();
        for (first, length, want) in [
            (65536, 65536 * 109, "not enough to support 110 pods"),
            (65537, 65536 * 200, "is not a multiple"),
            (0, 65536 * 200, "must be greater or equal"),
            (65536, 65537, "is not a multiple"),
        ] {
            let pool = Pool { first, length };
            let error = UserNamespaces::open(root.path(), pool, IDS_PER_POD, 110).unwrap_err();
            assert!(error.to_string().contains(want), "{error}");
        }
    }

    #[test]
    fn subordinate_ids_of_the_kubelets_user_are_the_pool() {
        let etc = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(etc.path().join(name), text).unwrap();
        write("subuid", "me:1:2\nkubelet:655360:7208960\n");
        assert_eq!(
            pool(etc.path(), IDS_PER_POD).unwrap(),
            Pool::all(IDS_PER_POD)
        );
        write(
            "passwd",
            "root:x:0:0::/:/bin/sh\nkubelet:x:9:9::/:/bin/false\n",
        );
        assert!(
            pool(etc.path(), IDS_PER_POD)
                .unwrap_err()
                .to_string()
                .contains("mismatched")
        );
        write("subgid", "kubelet:655360:7208960\n");
        let own = Pool {
            first: 655_360,
            length: 7_208_960,
        };
        assert_eq!(pool(etc.path(), IDS_PER_POD).unwrap(), own);
    }

    proptest! {
        #[test]
        fn any_record_is_read_without_a_crash(bytes: Vec<u8>, text: String) {
            let _ = parse(&bytes, IDS_PER_POD);
            let _ = subids(&text);
        }
    }
}
