//! In what order the containers of a pod were started. Pure.

use crate::launch::ANNOTATION_ROUND;
use crate::pod::spec::{self, ContainerKind};
use k8s_openapi::api::core::v1::PodSpec;
use runtime::service::{ContainerState, ContainerStatus};

/// The round of its pod an instance belongs to.
pub(super) fn round(instance: &ContainerStatus) -> u32 {
    let recorded = instance.config.annotations.get(ANNOTATION_ROUND);
    recorded.map_or(0, |n| n.parse().unwrap())
}

/// Whether the init containers of a sandbox were through before a main container was made.
#[track_caller]
pub(super) fn initialized(spec: &PodSpec, main: &ContainerStatus, all: &[ContainerStatus]) {
    let inits = spec::containers(spec).filter(|c| c.kind != ContainerKind::Main);
    for init in inits {
        let name = &init.spec.name;
        let through = all.iter().any(|c| {
            let before = match (&c.state, init.kind) {
                (
                    ContainerState::Exited {
                        exit_code,
                        finished_at_ns,
                        ..
                    },
                    ContainerKind::Init,
                ) => *exit_code == 0 && *finished_at_ns <= main.created_at_ns,
                (ContainerState::Created | ContainerState::Running { .. }, ContainerKind::Init) => {
                    false
                }
                // A sidecar only has to have been started.
                _ => c.created_at_ns < main.created_at_ns,
            };
            let together = c.sandbox_id == main.sandbox_id && round(c) == round(main);
            c.config.name == *name && before && together
        });
        assert!(
            through,
            "{} was started before {name} was through",
            main.config.name
        );
    }
}
