//! The CSINode object, and what a CSI driver adds to the Node: its id of the node in an
//! annotation, its topology in labels. Planning is pure; the calls repeat on conflict.

use super::NodeHandle;
use crate::objects::api_message;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::storage::v1::{CSINode, CSINodeDriver, CSINodeSpec, VolumeNodeResources};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};
use kube::{Client, Error};
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// Annotation of the Node: driver names and their ids of it, as JSON.
const NODE_IDS: &str = "csi.volume.kubernetes.io/nodeid";
/// Annotation of the CSINode: volumes of these built-in kinds are their drivers' business.
const MIGRATED: &str = "storage.alpha.kubernetes.io/migrated-plugins";
const MIGRATED_PLUGINS: &str = "kubernetes.io/aws-ebs,kubernetes.io/azure-disk,kubernetes.io/azure-file,kubernetes.io/cinder,kubernetes.io/gce-pd,kubernetes.io/portworx-volume,kubernetes.io/vsphere-volume";
/// Pauses between tries of one change.
const PAUSES_MS: [u64; 4] = [10, 50, 250, 1250];
/// Between tries to make the CSINode.
const INIT_RETRY: Duration = Duration::from_secs(2);

/// What a driver says of itself and the node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DriverInfo {
    /// Its name.
    pub name: String,
    /// Its id of the node.
    pub node_id: String,
    /// Most volumes it attaches here; 0 for as many as one likes.
    pub max_volumes: i64,
    /// Where the node is.
    pub topology: HashMap<String, String>,
}

/// Writer of the CSINode. Changes come one after another.
#[derive(Clone)]
pub struct CsiNodeWriter {
    client: Client,
    node: NodeHandle,
    name: String,
    turn: std::sync::Arc<tokio::sync::Mutex<()>>,
}

impl std::fmt::Debug for CsiNodeWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CsiNodeWriter")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

/// Why a try did not work.
enum Miss {
    /// Somebody was faster: look and try again.
    Conflict(String),
    /// It makes no sense to try again soon.
    Refused(String),
}

impl From<Error> for Miss {
    fn from(error: Error) -> Self {
        Self::Conflict(api_message(&error))
    }
}

impl CsiNodeWriter {
    /// For the Node of this name.
    pub fn new(client: Client, node: NodeHandle, name: &str) -> Self {
        Self {
            client,
            node,
            name: name.to_owned(),
            turn: std::sync::Arc::default(),
        }
    }

    /// Makes the CSINode once the Node is registered; the node is in trouble while that fails.
    pub async fn init(self, stop: CancellationToken) {
        const PART: &str = "csi";
        loop {
            let done = tokio::select! {
                () = stop.cancelled() => return,
                done = self.ensure_present() => done,
            };
            match done {
                Ok(()) => {
                    self.node.set_trouble(PART, None);
                    return;
                }
                Err(error) => {
                    warn!(error, "CSINode not made, trying again");
                    let trouble = format!("failed to initialize CSINode: {error}");
                    self.node.set_trouble(PART, Some(trouble));
                }
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(INIT_RETRY) => {}
            }
        }
    }

    async fn ensure_present(&self) -> Result<(), String> {
        let _turn = self.turn.lock().await;
        let owner = self.owner().await;
        let api: Api<CSINode> = Api::all(self.client.clone());
        let (api, owner) = (&api, &owner);
        self.repeated(|| async move {
            let object = self.own(api, owner).await?;
            let annotations = object.metadata.annotations.as_ref();
            if annotations
                .and_then(|a| a.get(MIGRATED))
                .map(String::as_str)
                != Some(MIGRATED_PLUGINS)
            {
                let patch = json!({"metadata": {"annotations": {MIGRATED: MIGRATED_PLUGINS}}});
                let params = PatchParams::default();
                api.patch(&self.name, &params, &Patch::Merge(&patch))
                    .await?;
            }
            Ok(())
        })
        .await
    }

    /// A reference to the Node, once there is one.
    async fn owner(&self) -> OwnerReference {
        let mut nodes = self.node.subscribe();
        loop {
            if let Some(owner) = self.node.owner_reference() {
                return owner;
            }
            if nodes.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Our CSINode: made when missing, made anew when it belongs to another Node of our name.
    async fn own(&self, api: &Api<CSINode>, owner: &OwnerReference) -> Result<CSINode, Miss> {
        if let Some(object) = api.get_opt(&self.name).await? {
            let owners = object.metadata.owner_references.iter().flatten();
            if owners.into_iter().any(|o| o.uid == owner.uid) {
                return Ok(object);
            }
            info!(node = self.name, "CSINode of another Node is deleted");
            api.delete(&self.name, &DeleteParams::default()).await?;
        }
        let object = CSINode {
            metadata: ObjectMeta {
                name: Some(self.name.clone()),
                owner_references: Some(vec![owner.clone()]),
                annotations: Some([(MIGRATED.to_owned(), MIGRATED_PLUGINS.to_owned())].into()),
                ..ObjectMeta::default()
            },
            spec: CSINodeSpec { drivers: vec![] },
        };
        Ok(api.create(&PostParams::default(), &object).await?)
    }

    async fn repeated<T, R>(&self, attempt: impl Fn() -> R) -> Result<T, String>
    where
        R: Future<Output = Result<T, Miss>>,
    {
        for pause in PAUSES_MS {
            match attempt().await {
                Ok(done) => return Ok(done),
                Err(Miss::Refused(why)) => return Err(why),
                Err(Miss::Conflict(_)) => tokio::time::sleep(Duration::from_millis(pause)).await,
            }
        }
        match attempt().await {
            Ok(done) => Ok(done),
            Err(Miss::Refused(why) | Miss::Conflict(why)) => Err(why),
        }
    }

    /// Notes a driver in Node and CSINode.
    ///
    /// # Errors
    /// Stock's words.
    pub async fn install(&self, driver: &DriverInfo) -> Result<(), String> {
        if driver.node_id.is_empty() {
            return Err(
                "error adding CSI driver node info: driverNodeID must not be empty".to_owned(),
            );
        }
        let _turn = self.turn.lock().await;
        self.patch_node(|node| {
            let mut patch = node_ids_patch(node, &driver.name, Some(&driver.node_id))?;
            topology_patch(node, &driver.topology, &mut patch)?;
            Ok(patch)
        })
        .await
        .map_err(|e| format!("error updating Node object with CSI driver node info: {e}"))?;
        self.update_csi_node(driver)
            .await
            .map_err(|e| format!("error updating CSINode object with CSI driver node info: {e}"))
    }

    /// Brings the CSINode in line with what the driver says now.
    ///
    /// # Errors
    /// Stock's words.
    pub async fn update(&self, driver: &DriverInfo) -> Result<(), String> {
        let _turn = self.turn.lock().await;
        self.update_csi_node(driver)
            .await
            .map_err(|e| format!("error updating CSINode object with CSI driver node info: {e}"))
    }

    async fn update_csi_node(&self, driver: &DriverInfo) -> Result<(), String> {
        let owner = self.owner().await;
        let api: Api<CSINode> = Api::all(self.client.clone());
        let (api, owner) = (&api, &owner);
        self.repeated(|| async move {
            let mut object = self.own(api, owner).await?;
            if with_driver(&mut object.spec.drivers, driver) {
                api.replace(&self.name, &PostParams::default(), &object)
                    .await?;
            }
            Ok(())
        })
        .await
    }

    /// Forgets a driver in CSINode and Node; its topology labels stay.
    ///
    /// # Errors
    /// Stock's words.
    pub async fn uninstall(&self, driver: &str) -> Result<(), String> {
        let _turn = self.turn.lock().await;
        let api: Api<CSINode> = Api::all(self.client.clone());
        let api = &api;
        self.repeated(|| async move {
            let Some(mut object) = api.get_opt(&self.name).await? else {
                return Ok(());
            };
            let before = object.spec.drivers.len();
            object.spec.drivers.retain(|d| d.name != driver);
            if object.spec.drivers.len() < before {
                api.replace(&self.name, &PostParams::default(), &object)
                    .await?;
            }
            Ok(())
        })
        .await
        .map_err(|e| format!("error uninstalling CSI driver from CSINode object {e}"))?;
        self.patch_node(|node| node_ids_patch(node, driver, None))
            .await
            .map_err(|e| format!("error removing CSI driver node info from Node object {e}"))
    }

    async fn patch_node(
        &self,
        plan: impl Fn(&Node) -> Result<serde_json::Map<String, Value>, String>,
    ) -> Result<(), String> {
        let api: Api<Node> = Api::all(self.client.clone());
        let (api, plan) = (&api, &plan);
        self.repeated(|| async move {
            let node = api.get(&self.name).await?;
            let mut metadata = plan(&node).map_err(Miss::Refused)?;
            if metadata.is_empty() {
                return Ok(());
            }
            let version = json!(node.metadata.resource_version);
            metadata.insert("resourceVersion".to_owned(), version);
            let patch = json!({"metadata": metadata});
            let params = PatchParams::default();
            let node = api
                .patch(&self.name, &params, &Patch::Merge(&patch))
                .await?;
            self.node.learn(node);
            Ok(())
        })
        .await
    }
}

/// The change of the annotation with the node's ids; empty when there is nothing to change.
fn node_ids_patch(
    node: &Node,
    driver: &str,
    id: Option<&str>,
) -> Result<serde_json::Map<String, Value>, String> {
    let annotations = node.metadata.annotations.as_ref();
    let text = annotations.and_then(|a| a.get(NODE_IDS));
    let mut ids: BTreeMap<String, String> = match text.filter(|t| !t.is_empty()) {
        Some(text) => serde_json::from_str(text).map_err(|e| {
            format!("failed to parse node's {NODE_IDS:?} annotation value ({text:?}) err={e}")
        })?,
        None => BTreeMap::new(),
    };
    let before = ids.clone();
    match id {
        Some(id) => ids.insert(driver.to_owned(), id.to_owned()),
        None => ids.remove(driver),
    };
    let mut patch = serde_json::Map::new();
    if ids != before {
        let value = if ids.is_empty() {
            Value::Null
        } else {
            json!(json!(ids).to_string())
        };
        patch.insert("annotations".to_owned(), json!({NODE_IDS: value}));
    }
    Ok(patch)
}

/// Adds the labels of a driver's topology.
fn topology_patch(
    node: &Node,
    topology: &HashMap<String, String>,
    patch: &mut serde_json::Map<String, Value>,
) -> Result<(), String> {
    let labels = node.metadata.labels.clone().unwrap_or_default();
    let mut new = serde_json::Map::new();
    for (key, value) in topology {
        match labels.get(key) {
            Some(known) if known == value => {}
            Some(known) => {
                return Err(format!(
                    "detected topology value collision: driver reported {key:?}:{value:?} but existing label is {key:?}:{known:?}"
                ));
            }
            None => {
                new.insert(key.clone(), json!(value));
            }
        }
    }
    if !new.is_empty() {
        patch.insert("labels".to_owned(), Value::Object(new));
    }
    Ok(())
}

/// Puts a driver in the list; tells whether that changed it.
fn with_driver(drivers: &mut Vec<CSINodeDriver>, driver: &DriverInfo) -> bool {
    let mut keys: Vec<String> = driver.topology.keys().cloned().collect();
    keys.sort();
    let count = i32::try_from(driver.max_volumes).unwrap_or(i32::MAX);
    let allocatable =
        (driver.max_volumes > 0).then_some(VolumeNodeResources { count: Some(count) });
    let wanted = CSINodeDriver {
        name: driver.name.clone(),
        node_id: driver.node_id.clone(),
        topology_keys: Some(keys),
        allocatable,
    };
    let same = |known: &CSINodeDriver| {
        let mut known = known.clone();
        let mut keys = known.topology_keys.take().unwrap_or_default();
        keys.sort();
        known.topology_keys = Some(keys);
        known.allocatable = known.allocatable.filter(|a| a.count.is_some());
        known == wanted
    };
    if drivers.iter().any(same) {
        return false;
    }
    drivers.retain(|d| d.name != driver.name);
    drivers.push(wanted);
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(metadata: Value) -> Node {
        serde_json::from_value(json!({"metadata": metadata})).unwrap()
    }

    fn driver(topology: &[(&str, &str)], max_volumes: i64) -> DriverInfo {
        let own = |(k, v): &(&str, &str)| ((*k).to_owned(), (*v).to_owned());
        DriverInfo {
            name: "d".to_owned(),
            node_id: "n-1".to_owned(),
            max_volumes,
            topology: topology.iter().map(own).collect(),
        }
    }

    #[test]
    fn ids_of_other_drivers_are_kept() {
        let one = node(json!({"annotations": {NODE_IDS: "{\"x\":\"1\"}"}}));
        let patch = node_ids_patch(&one, "d", Some("2")).unwrap();
        assert_eq!(
            Value::Object(patch),
            json!({"annotations": {NODE_IDS: "{\"d\":\"2\",\"x\":\"1\"}"}})
        );
        assert!(node_ids_patch(&one, "x", Some("1")).unwrap().is_empty());
        let patch = node_ids_patch(&one, "x", None).unwrap();
        assert_eq!(
            Value::Object(patch),
            json!({"annotations": {NODE_IDS: null}})
        );
        assert!(
            node_ids_patch(&node(json!({})), "x", None)
                .unwrap()
                .is_empty()
        );
        let broken = node(json!({"annotations": {NODE_IDS: "{"}}));
        assert!(node_ids_patch(&broken, "x", None).is_err());
    }

    #[test]
    fn labels_of_a_topology_are_added_and_never_changed() {
        let known = node(json!({"labels": {"zone": "a"}}));
        let mut patch = serde_json::Map::new();
        let topology = driver(&[("zone", "a"), ("rack", "7")], 0).topology;
        topology_patch(&known, &topology, &mut patch).unwrap();
        assert_eq!(Value::Object(patch), json!({"labels": {"rack": "7"}}));
        let topology = driver(&[("zone", "b")], 0).topology;
        let error = topology_patch(&known, &topology, &mut serde_json::Map::new());
        assert_eq!(
            error.unwrap_err(),
            "detected topology value collision: driver reported \"zone\":\"b\" but existing label is \"zone\":\"a\""
        );
    }

    #[test]
    fn a_driver_is_listed_once_and_only_rewritten_when_it_changed() {
        let mut drivers = Vec::new();
        assert!(with_driver(
            &mut drivers,
            &driver(&[("zone", "a"), ("b", "c")], 0)
        ));
        assert_eq!(drivers[0].allocatable, None);
        assert!(!with_driver(
            &mut drivers,
            &driver(&[("b", "c"), ("zone", "x")], 0)
        ));
        assert!(with_driver(&mut drivers, &driver(&[], 8)));
        let count = drivers[0].allocatable.as_ref().unwrap().count;
        assert_eq!((drivers.len(), count), (1, Some(8)));
    }
}
