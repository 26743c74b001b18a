//! News for whoever listens: a broadcast that never blocks the engine.

use crate::service::{ContainerId, RuntimeEvent, RuntimeEventKind, SandboxId};
use tokio::sync::broadcast;

/// News kept for a listener that lags; beyond it he is told to look at everything.
const BACKLOG: usize = 4096;

/// Where news are announced.
#[derive(Debug, Clone)]
pub struct Events(broadcast::Sender<RuntimeEvent>);

impl Default for Events {
    fn default() -> Self {
        Self(broadcast::channel(BACKLOG).0)
    }
}

impl Events {
    /// Announces a change.
    pub fn announce(
        &self,
        pod_uid: &str,
        sandbox: &SandboxId,
        container: Option<&ContainerId>,
        kind: RuntimeEventKind,
    ) {
        // Nobody listening is fine.
        let _ = self.0.send(RuntimeEvent::Changed {
            pod_uid: pod_uid.to_owned(),
            sandbox: sandbox.clone(),
            container: container.cloned(),
            kind,
        });
    }

    /// News from now on.
    #[must_use]
    pub fn subscribe(&self) -> broadcast::Receiver<RuntimeEvent> {
        self.0.subscribe()
    }
}
