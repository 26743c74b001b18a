//! The pods that live through the chaos, each of a kind that makes some promise checkable.

use super::random::Random;
use crate::scenario::BUSYBOX;
use serde_json::{Value, json};

/// What a pod does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Counts aloud for ever and is ready: no restart, no Ready flip, no lost line.
    Steady,
    /// Counts to a number and ends with a code, once: phase, code and log are known.
    Finisher {
        /// Lines it writes.
        lines: u64,
        /// How it ends.
        code: u64,
    },
    /// Ends in failure again and again and writes down each start.
    Crasher,
    /// Ignores SIGTERM and has an init container and a sidecar.
    Stubborn,
}

/// A pod and what the chaos did to it.
#[derive(Debug, Clone)]
pub(super) struct ChaosPod {
    /// Its name; never used twice.
    pub(super) name: String,
    /// Its node.
    pub(super) node: String,
    /// What it does.
    pub(super) kind: Kind,
    /// Its shim was killed: its containers died an unnatural death.
    pub(super) hurt: bool,
    /// It was deleted.
    pub(super) deleted: bool,
}

/// Environment variable by which a pod's first processes are found from outside.
pub(super) const MARK: &str = "FERRULE_CHAOS_POD";

impl ChaosPod {
    /// Chooses a pod.
    pub(super) fn choose(number: u32, node: &str, random: &mut Random) -> Self {
        let kind = match random.below(10) {
            0..4 => Kind::Steady,
            4..7 => Kind::Finisher {
                lines: random.below(60),
                code: random.below(3),
            },
            7..9 => Kind::Crasher,
            _ => Kind::Stubborn,
        };
        Self {
            name: format!("chaos-{number}"),
            node: node.to_owned(),
            kind,
            hurt: false,
            deleted: false,
        }
    }

    /// The object to create.
    pub(super) fn manifest(&self, mark: &str) -> Value {
        let (policy, script) = match self.kind {
            Kind::Steady => (
                "Always",
                "i=0; while :; do echo $i; i=$((i+1)); sleep 0.05; done".to_owned(),
            ),
            Kind::Finisher { lines, code } => (
                "Never",
                format!(
                    "i=0; while [ $i -lt {lines} ]; do echo $i; i=$((i+1)); sleep 0.02; done; exit {code}"
                ),
            ),
            Kind::Crasher => (
                "Always",
                "echo x >> /kept/starts; sleep 0.3; exit 7".to_owned(),
            ),
            Kind::Stubborn => (
                "Always",
                "trap : TERM; while :; do sleep 0.2; done".to_owned(),
            ),
        };
        let container = |name: &str, script: &str| {
            json!({
                "name": name,
                "image": BUSYBOX,
                "command": ["sh", "-c", script],
                "env": [{"name": MARK, "value": format!("{mark}/{}/{name}", self.name)}],
                "volumeMounts": [{"name": "kept", "mountPath": "/kept"}],
            })
        };
        let mut main = container("main", &script);
        let mut init = Vec::new();
        match self.kind {
            Kind::Steady => {
                main["readinessProbe"] = json!({"exec": {"command": ["true"]}, "periodSeconds": 1});
            }
            Kind::Stubborn => {
                init.push(container("before", "sleep 0.1"));
                let mut beside = container("beside", "exec sleep 100000");
                beside["restartPolicy"] = json!("Always");
                init.push(beside);
            }
            Kind::Finisher { .. } | Kind::Crasher => {}
        }
        json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": self.name},
            "spec": {
                "nodeName": self.node,
                "restartPolicy": policy,
                "terminationGracePeriodSeconds": 1,
                "initContainers": init,
                "containers": [main],
                "volumes": [{"name": "kept", "emptyDir": {}}],
            },
        })
    }
}
