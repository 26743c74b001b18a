//! CSI drivers as plugins: checked, noted, told to the cluster; asked again how many volumes
//! they take where their CSIDriver says so.

use super::Handler;
use super::handshake::Info;
use crate::node::csi_node::{CsiNodeWriter, DriverInfo};
use crate::volumes::Drivers;
use crate::volumes::csi::Driver;
use futures::future::BoxFuture;
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::task::AbortHandle;
use tracing::{debug, warn};

/// Until a CSIDriver is looked at again that names no period.
const LOOK: Duration = Duration::from_secs(60);
/// No driver is asked more often.
const LEAST_PERIOD_S: i64 = 10;

/// Takes CSI drivers in use.
#[derive(Debug)]
pub struct CsiPlugins {
    drivers: Drivers,
    node: CsiNodeWriter,
    /// By driver: the task that asks it again.
    updates: Mutex<HashMap<String, AbortHandle>>,
}

impl CsiPlugins {
    /// Into `drivers`, and by `node` into the cluster.
    pub fn new(drivers: Drivers, node: CsiNodeWriter) -> Self {
        Self {
            drivers,
            node,
            updates: Mutex::default(),
        }
    }

    fn updates(&self) -> MutexGuard<'_, HashMap<String, AbortHandle>> {
        self.updates.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn take(&self, info: &Info) -> Result<(), String> {
        let (name, drivers) = (&info.name, &self.drivers);
        let version = drivers.check("RegisterPlugin", name, &info.versions)?;
        let driver = ask(name, &info.endpoint).await?;
        // Pods may use it at once: what the cluster knows of it is for the scheduler.
        drivers.insert(name, &info.endpoint, version);
        if let Err(error) = self.node.install(&driver).await {
            self.drop_driver(name).await;
            return Err(error);
        }
        let update = update(drivers.clone(), self.node.clone(), info.clone());
        let task = tokio::spawn(update).abort_handle();
        if let Some(old) = self.updates().insert(name.clone(), task) {
            old.abort();
        }
        Ok(())
    }

    async fn drop_driver(&self, name: &str) {
        let update = self.updates().remove(name);
        if let Some(task) = update {
            task.abort();
        }
        self.drivers.remove(name);
        if let Err(error) = self.node.uninstall(name).await {
            warn!(driver = name, error, "Driver is still told to the cluster");
        }
    }
}

impl Drop for CsiPlugins {
    fn drop(&mut self) {
        for task in self.updates().values() {
            task.abort();
        }
    }
}

/// What a driver says of itself and the node.
async fn ask(name: &str, endpoint: &str) -> Result<DriverInfo, String> {
    let answer = Driver::new(endpoint).info().await;
    let answer = answer.map_err(|e| e.to_string())?;
    let topology = answer.accessible_topology.map(|t| t.segments);
    Ok(DriverInfo {
        name: name.to_owned(),
        node_id: answer.node_id,
        max_volumes: answer.max_volumes_per_node,
        topology: topology.unwrap_or_default(),
    })
}

/// Asks a driver again as often as its CSIDriver wants (KEP-4876).
async fn update(drivers: Drivers, node: CsiNodeWriter, info: Info) {
    loop {
        let object = drivers.known(&info.name);
        let period = object.and_then(|o| o.spec.node_allocatable_update_period_seconds);
        let period = period.filter(|s| *s >= LEAST_PERIOD_S);
        let Some(seconds) = period.and_then(|s| u64::try_from(s).ok()) else {
            tokio::time::sleep(LOOK).await;
            continue;
        };
        tokio::time::sleep(Duration::from_secs(seconds)).await;
        let told = match ask(&info.name, &info.endpoint).await {
            Ok(driver) => node.update(&driver).await,
            Err(error) => Err(error),
        };
        if let Err(error) = told {
            debug!(driver = info.name, error, "Driver's limits not updated");
        }
    }
}

impl Handler for CsiPlugins {
    fn kind(&self) -> &'static str {
        "CSIPlugin"
    }

    fn validate(&self, info: &Info) -> Result<(), String> {
        let checked = self
            .drivers
            .check("ValidatePlugin", &info.name, &info.versions);
        checked.map(drop).map_err(|e| {
            format!(
                "validation failed for CSI Driver {} at endpoint {}: {e}",
                info.name, info.endpoint
            )
        })
    }

    fn register<'a>(&'a self, info: &'a Info) -> BoxFuture<'a, Result<(), String>> {
        Box::pin(self.take(info))
    }

    fn deregister<'a>(&'a self, name: &'a str) -> BoxFuture<'a, ()> {
        Box::pin(self.drop_driver(name))
    }
}
