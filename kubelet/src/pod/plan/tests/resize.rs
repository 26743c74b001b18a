//! Plans of pods that were granted other resources.

use super::*;
use crate::pod::resize::actuate::WantedResources;
use runtime::service::Resources;

/// Limits of memory that a container or pod may have.
fn memory(mebibytes: i64) -> Resources {
    Resources {
        memory_limit_bytes: Some(mebibytes << 20),
        ..Resources::default()
    }
}

/// A running pod of container `a` that has 10 MiB and was granted 20.
fn granted(policy: &str, resize_policy: &str) -> Case {
    let pod = pod(
        json!({"restartPolicy": policy, "containers": [{"name": "a", "image": "a:1",
        "resizePolicy": [{"resourceName": "memory", "restartPolicy": resize_policy}]}]}),
    );
    let mut a = container("a", 0, 0, running());
    a.resources = memory(10);
    let mut case = Case::new(pod, observed(vec![a]));
    case.resize.wanted = Some(WantedResources {
        pod: memory(20),
        containers: [("a".to_owned(), memory(20))].into(),
    });
    case.resize.pod_applied = Some(memory(10));
    case
}

#[test]
fn granted_resources_are_set_while_the_container_runs() {
    let mut case = granted("Always", "NotRequired");
    case.expect(&["resize"]);
    case.steps.resize = Step::Running { before: None };
    case.expect(&[]);
    case.steps.resize = Step::Idle;
    case.observed.containers[0].resources = memory(20);
    case.expect(&["resize"]);
    case.resize.pod_applied = Some(memory(20));
    case.expect(&[]);
    // A new agent looks once whether the pod's cgroup is as it should be.
    case.resize.pod_applied = None;
    case.expect(&["resize"]);
}

#[test]
fn a_container_that_must_start_anew_does_so_whatever_its_restart_policy() {
    let mut case = granted("Never", "RestartContainer");
    case.resize.pod_applied = Some(memory(20));
    case.expect(&["kill a-0 30s Resize"]);
    let kill = Kill {
        for_resize: true,
        ..Kill::default()
    };
    let id = case.observed.containers[0].id.clone();
    case.steps.kills.insert(id, kill);
    case.observed.containers[0].state = exited(0, 99);
    case.expect(&["start a 1 in s0"]);
    assert!(
        case.resize
            .look(&case.pod, &case.observed, &case.steps)
            .is_none()
    );
    assert!(case.resize.progress.is_some());
}

#[test]
fn a_pod_that_has_to_give_room_ends() {
    let mut case = granted("Always", "NotRequired");
    let cause = Cause::Failed {
        reason: "Preempting".to_owned(),
        message: "Preempted in order to admit critical pod".to_owned(),
    };
    case.ended = Some(cause.clone());
    let plan = case.plan();
    assert!(matches!(plan.lifecycle, Lifecycle::Terminating(e) if e.cause == cause));
}
