//! The resources a pod was granted, and their record on disk.
//!
//! The record is `<root-dir>/pods/<uid>/allocation.json`, written when a pod is admitted and
//! before each grant, replaced by rename. A restarted agent may assume: what the record says was
//! admitted; what the spec says beyond it was not. It goes with the pod's directory.

use crate::quantity::Quantity;
use k8s_openapi::api::core::v1::{Container, Pod, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity as ApiQuantity;
use linux::fs::{Durability, FsError};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Version of the record's form.
const VERSION: u32 = 1;
/// No pod has so many containers that its record is larger.
const MAX_BYTES: usize = 1 << 20;
const FILE: &str = "allocation.json";

/// Resources granted to a pod.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Allocation {
    /// Of the pod itself.
    pub pod: Option<ResourceRequirements>,
    /// By container name, init containers among them.
    pub containers: BTreeMap<String, ResourceRequirements>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    version: u32,
    allocation: Allocation,
}

/// A record could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum AllocationError {
    /// A UID that cannot be the name of a directory.
    #[error("record the allocation of pod {0:?}: the UID is no file name")]
    BadUid(String),
    /// The disk.
    #[error("allocation of pod {uid}")]
    Disk {
        /// Whose.
        uid: String,
        /// What failed.
        #[source]
        source: FsError,
    },
    /// The content.
    #[error("allocation of pod {uid}: {message}")]
    Content {
        /// Whose.
        uid: String,
        /// What is wrong with it.
        message: String,
    },
}

impl Allocation {
    /// All a pod's spec asks for.
    pub fn of(pod: &Pod) -> Self {
        let Some(spec) = &pod.spec else {
            return Self::default();
        };
        let own = |c: &Container| (c.name.clone(), c.resources.clone().unwrap_or_default());
        Self {
            pod: spec.resources.clone(),
            containers: all(spec.init_containers.as_deref(), &spec.containers)
                .map(own)
                .collect(),
        }
    }

    /// The pod with these resources in place of those of its spec; none when they are the same.
    pub fn granted(&self, pod: &Pod) -> Option<Arc<Pod>> {
        let spec = pod.spec.as_ref()?;
        let differs = |c: &Container| {
            let granted = self.containers.get(&c.name);
            granted.is_some_and(|g| !same(Some(g), c.resources.as_ref()))
        };
        let pod_differs = !same(self.pod.as_ref(), spec.resources.as_ref());
        if !pod_differs && !all(spec.init_containers.as_deref(), &spec.containers).any(differs) {
            return None;
        }
        let mut pod = pod.clone();
        let spec = pod.spec.get_or_insert_default();
        if pod_differs {
            spec.resources = self.pod.clone();
        }
        let inits = spec.init_containers.iter_mut().flatten();
        for container in inits.chain(&mut spec.containers) {
            if let Some(granted) = self.containers.get(&container.name) {
                container.resources = Some(granted.clone());
            }
        }
        Some(Arc::new(pod))
    }
}

fn all<'a>(
    init: Option<&'a [Container]>,
    main: &'a [Container],
) -> impl Iterator<Item = &'a Container> {
    init.unwrap_or_default().iter().chain(main)
}

type List = BTreeMap<String, ApiQuantity>;

/// Whether two requirements mean the same: `1` is `1000m`, and nothing is an empty list.
pub fn same(a: Option<&ResourceRequirements>, b: Option<&ResourceRequirements>) -> bool {
    let empty = ResourceRequirements::default();
    let (a, b) = (a.unwrap_or(&empty), b.unwrap_or(&empty));
    let claims = |r: &ResourceRequirements| r.claims.clone().unwrap_or_default();
    same_list(a.limits.as_ref(), b.limits.as_ref())
        && same_list(a.requests.as_ref(), b.requests.as_ref())
        && claims(a) == claims(b)
}

fn same_list(a: Option<&List>, b: Option<&List>) -> bool {
    let empty = List::new();
    let (a, b) = (a.unwrap_or(&empty), b.unwrap_or(&empty));
    let amount = |q: &ApiQuantity| Quantity::try_from(q).ok();
    a.len() == b.len()
        && a.iter().all(|(name, x)| {
            b.get(name)
                .is_some_and(|y| x == y || amount(x).is_some_and(|x| Some(x) == amount(y)))
        })
}

/// Where the record of a pod is.
fn path(root: &Path, uid: &str) -> Result<PathBuf, AllocationError> {
    if uid.is_empty() || uid.starts_with('.') || uid.contains(['/', '\0']) {
        return Err(AllocationError::BadUid(uid.to_owned()));
    }
    Ok(root.join("pods").join(uid).join(FILE))
}

/// Records an allocation below the kubelet's root directory. It must outlive the agent, not the
/// machine: after a boot every pod is admitted anew.
///
/// # Errors
/// [`AllocationError`]; the record before is intact then.
pub fn save(root: &Path, uid: &str, allocation: &Allocation) -> Result<(), AllocationError> {
    let file = path(root, uid)?;
    let disk = |source| AllocationError::Disk {
        uid: uid.to_owned(),
        source,
    };
    let record = Record {
        version: VERSION,
        allocation: allocation.clone(),
    };
    let content = serde_json::to_vec(&record).map_err(|e| AllocationError::Content {
        uid: uid.to_owned(),
        message: e.to_string(),
    })?;
    if let Some(dir) = file.parent() {
        linux::fs::create_dirs(dir, 0o750).map_err(disk)?;
    }
    linux::fs::write_atomic(&file, &content, 0o600, Durability::Process).map_err(disk)
}

/// Reads a record; none when there is none.
///
/// # Errors
/// [`AllocationError`] for one that cannot be read or is of a later version.
pub fn load(root: &Path, uid: &str) -> Result<Option<Allocation>, AllocationError> {
    let file = path(root, uid)?;
    let bytes = match linux::fs::read_file(&file, MAX_BYTES) {
        Ok(bytes) => bytes,
        Err(e) if e.is_not_found() => return Ok(None),
        Err(source) => {
            return Err(AllocationError::Disk {
                uid: uid.to_owned(),
                source,
            });
        }
    };
    parse(&bytes)
        .map(Some)
        .map_err(|message| AllocationError::Content {
            uid: uid.to_owned(),
            message,
        })
}

/// Reads the bytes of a record.
///
/// # Errors
/// What is wrong with them.
pub fn parse(bytes: &[u8]) -> Result<Allocation, String> {
    let record: Record = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
    if record.version != VERSION {
        return Err(format!("version {} is not known", record.version));
    }
    Ok(record.allocation)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::fixture::pod;
    use serde_json::{Value, json};

    fn with(cpu: &str, init_cpu: &str) -> Pod {
        let container =
            |name: &str, cpu: &str| json!({"name": name, "resources": {"requests": {"cpu": cpu}}});
        pod(json!({
            "containers": [container("a", cpu), {"name": "b"}],
            "initContainers": [container("i", init_cpu)],
        }))
    }

    #[test]
    fn a_pod_that_asks_for_more_is_seen_with_what_it_was_granted() {
        let allocation = Allocation::of(&with("100m", "1"));
        let granted = allocation.granted(&with("200m", "1")).unwrap();
        assert_eq!(Allocation::of(&granted), allocation);
        assert!(allocation.granted(&with("100m", "2")).is_some());
    }

    #[test]
    fn equal_amounts_in_other_words_are_no_request() {
        let allocation = Allocation::of(&with("0.1", "1000m"));
        assert!(allocation.granted(&with("100m", "1")).is_none());
        let mut other = with("0.1", "1");
        other.spec.as_mut().unwrap().containers[1].resources =
            Some(serde_json::from_value(json!({"limits": {}})).unwrap());
        assert!(allocation.granted(&other).is_none());
    }

    #[test]
    fn resources_of_the_pod_itself_are_granted_too() {
        let of = |cpu: &str| pod(json!({"containers": [], "resources": {"limits": {"cpu": cpu}}}));
        let granted = Allocation::of(&of("1")).granted(&of("2")).unwrap();
        let limits = granted
            .spec
            .as_ref()
            .and_then(|s| s.resources.as_ref()?.limits.clone());
        assert_eq!(limits.unwrap()["cpu"].0, "1");
    }

    #[test]
    fn a_record_is_read_as_it_was_written_and_later_versions_are_refused() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(load(root.path(), "u1").unwrap(), None);
        let allocation = Allocation::of(&with("100m", "1"));
        save(root.path(), "u1", &allocation).unwrap();
        save(root.path(), "u1", &allocation).unwrap();
        assert_eq!(load(root.path(), "u1").unwrap(), Some(allocation));
        let later = json!({"version": 2, "allocation": {"pod": null, "containers": {}}});
        assert!(
            parse(later.to_string().as_bytes())
                .unwrap_err()
                .contains("version 2")
        );
        for uid in ["", "..", "a/b"] {
            assert!(
                save(root.path(), uid, &Allocation::default()).is_err(),
                "{uid}"
            );
        }
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes: Vec<u8>) {
            let _ = parse(&bytes);
        }

        #[test]
        fn any_json_is_read_or_refused(text in "[\\[\\]{}:,\"a-z0-9]{0,64}") {
            let value: Value = serde_json::from_str(&text).unwrap_or_default();
            let wrapped = json!({"version": 1, "allocation": value});
            let _ = parse(wrapped.to_string().as_bytes());
        }
    }
}
