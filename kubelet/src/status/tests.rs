use super::derive::{DeriveInput, derive};
use crate::observe::PodObservation;
use crate::pod::fixture::{container, exited, observed, pod, running, sandbox, simple};
use crate::pod::plan::Waiting;
use crate::pod::resize::tracker::ResizeView;
use crate::pod::state::{Cause, Health, Lifecycle, Terminating};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use runtime::service::{ContainerId, SandboxState};
use serde_json::{Value, json};
use std::collections::BTreeMap;

struct Case {
    pod: Pod,
    previous: PodStatus,
    lifecycle: Lifecycle,
    observed: PodObservation,
    health: Health,
    waiting: BTreeMap<String, Waiting>,
    messages: BTreeMap<ContainerId, String>,
    now_s: i64,
}

impl Case {
    fn new(pod: Pod, observed: PodObservation) -> Self {
        Self {
            pod,
            previous: PodStatus::default(),
            lifecycle: Lifecycle::Syncing,
            observed,
            health: Health::default(),
            waiting: BTreeMap::new(),
            messages: BTreeMap::new(),
            now_s: 100,
        }
    }

    fn derive(&self) -> PodStatus {
        derive(&DeriveInput {
            pod: &self.pod,
            previous: &self.previous,
            lifecycle: &self.lifecycle,
            observed: &self.observed,
            health: &self.health,
            waiting: &self.waiting,
            starts: &BTreeMap::new(),
            resize: ResizeView::default(),
            termination_messages: &self.messages,
            host_ips: &["192.0.2.1".to_owned()],
            start_time: Timestamp::from_second(90).unwrap(),
            now: Timestamp::from_second(self.now_s).unwrap(),
        })
    }

    fn json(&self) -> Value {
        serde_json::to_value(self.derive()).unwrap()
    }

    fn phase(&self) -> String {
        self.derive().phase.unwrap()
    }

    fn wait(mut self, name: &str, reason: &str) -> Self {
        let waiting = Waiting {
            reason: reason.to_owned(),
            message: String::new(),
        };
        self.waiting.insert(name.to_owned(), waiting);
        self
    }

    fn ending(mut self, cause: Cause) -> Self {
        self.lifecycle = Lifecycle::Terminating(Terminating {
            cause,
            grace_s: 30,
            deadline_ns: 0,
        });
        self
    }
}

fn condition<'a>(status: &'a Value, type_: &str) -> &'a Value {
    let all = status["conditions"].as_array().unwrap();
    all.iter().find(|c| c["type"] == type_).unwrap()
}

fn two(policy: &str) -> Pod {
    pod(json!({"restartPolicy": policy, "containers": [
        {"name": "b", "image": "b:1"}, {"name": "a", "image": "a:1"}]}))
}

#[test]
fn a_pod_without_anything_yet_is_pending_and_says_container_creating() {
    let status = Case::new(simple("Always"), PodObservation::default()).json();
    assert_eq!(status["phase"], "Pending");
    assert_eq!(
        status["containerStatuses"][0]["state"],
        json!({"waiting": {"reason": "ContainerCreating"}})
    );
    assert_eq!(status["hostIP"], "192.0.2.1");
    assert_eq!(status["startTime"], "1970-01-01T00:01:30Z");
    assert_eq!(status["observedGeneration"], 1);
    let ready = condition(&status, "Ready");
    assert_eq!(ready["status"], "False");
    assert_eq!(ready["reason"], "ContainersNotReady");
    assert_eq!(ready["message"], "containers with unready status: [a]");
    assert_eq!(
        condition(&status, "PodReadyToStartContainers")["status"],
        "False"
    );
    assert_eq!(condition(&status, "Initialized")["status"], "True");
    assert_eq!(condition(&status, "PodScheduled")["observedGeneration"], 1);
}

#[test]
fn a_running_pod_shows_address_ids_and_readiness() {
    let status = Case::new(
        simple("Always"),
        observed(vec![container("a", 0, 2, running())]),
    )
    .json();
    assert_eq!(status["phase"], "Running");
    assert_eq!(status["podIP"], "10.0.0.5");
    assert_eq!(status["podIPs"], json!([{"ip": "10.0.0.5"}]));
    let a = &status["containerStatuses"][0];
    assert_eq!(a["containerID"], "ferrule://a-2");
    assert_eq!(a["imageID"], "a@sha256:1");
    assert_eq!((&a["ready"], &a["started"]), (&json!(true), &json!(true)));
    assert_eq!(a["restartCount"], 2);
    assert_eq!(
        a["state"],
        json!({"running": {"startedAt": "1970-01-01T00:00:01Z"}})
    );
    let order: Vec<_> = status["conditions"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| c["type"].clone())
        .collect();
    assert_eq!(
        order,
        [
            "PodReadyToStartContainers",
            "Initialized",
            "Ready",
            "ContainersReady",
            "PodScheduled"
        ]
    );
}

#[test]
fn readiness_needs_the_probe_and_the_gates() {
    let mut spec = simple("Always");
    let inner = spec.spec.as_mut().unwrap();
    inner.containers[0].readiness_probe =
        serde_json::from_value(json!({"tcpSocket": {"port": 1}})).unwrap();
    inner.readiness_gates =
        serde_json::from_value(json!([{"conditionType": "example.com/g"}])).unwrap();
    let a = container("a", 0, 0, running());
    let mut case = Case::new(spec, observed(vec![a.clone()]));
    assert_eq!(
        condition(&case.json(), "ContainersReady")["status"],
        "False"
    );
    case.health.ready.insert(a.id, true);
    let status = case.json();
    assert_eq!(condition(&status, "ContainersReady")["status"], "True");
    assert_eq!(
        condition(&status, "Ready")["reason"],
        "ReadinessGatesNotReady"
    );
    assert_eq!(
        condition(&status, "Ready")["message"],
        "corresponding condition of pod readiness gate \"example.com/g\" does not exist."
    );
    // Told by the watch; what was derived before does not know it.
    case.pod.status = serde_json::from_value(json!({"conditions": [
        {"type": "example.com/g", "status": "True"}]}))
    .unwrap();
    let status = case.json();
    assert_eq!(condition(&status, "Ready")["status"], "True");
    assert_eq!(
        status["conditions"][0]["type"], "example.com/g",
        "foreign ones are kept first"
    );
}

#[test]
fn transition_times_move_only_with_the_status() {
    let mut case = Case::new(simple("Always"), PodObservation::default());
    case.previous = case.derive();
    case.now_s = 200;
    let status = case.json();
    assert_eq!(
        condition(&status, "Ready")["lastTransitionTime"],
        "1970-01-01T00:01:40Z"
    );
    case.observed = observed(vec![container("a", 0, 0, running())]);
    let status = case.json();
    assert_eq!(
        condition(&status, "Ready")["lastTransitionTime"],
        "1970-01-01T00:03:20Z"
    );
    assert_eq!(
        condition(&status, "Initialized")["lastTransitionTime"],
        "1970-01-01T00:01:40Z"
    );
}

#[test]
fn phases_follow_containers_and_policy() {
    let at = |state: &str| match state {
        "run" => Some(running()),
        "ok" => Some(exited(0, 50)),
        "bad" => Some(exited(1, 50)),
        _ => None,
    };
    for (policy, a, b, lifecycle, phase) in [
        ("Always", "run", "run", Lifecycle::Syncing, "Running"),
        ("Always", "run", "", Lifecycle::Syncing, "Pending"),
        ("Always", "run", "bad", Lifecycle::Syncing, "Running"),
        ("Always", "bad", "bad", Lifecycle::Syncing, "Running"),
        ("OnFailure", "ok", "bad", Lifecycle::Syncing, "Running"),
        ("Never", "ok", "run", Lifecycle::Syncing, "Running"),
        (
            "Never",
            "ok",
            "ok",
            Lifecycle::Terminated(Cause::Completed),
            "Succeeded",
        ),
        (
            "Never",
            "ok",
            "bad",
            Lifecycle::Terminated(Cause::Completed),
            "Failed",
        ),
        (
            "Always",
            "ok",
            "ok",
            Lifecycle::Terminated(Cause::Deleted),
            "Succeeded",
        ),
        (
            "Always",
            "",
            "",
            Lifecycle::Terminated(Cause::Deleted),
            "Failed",
        ),
    ] {
        let mut list = Vec::new();
        list.extend(at(a).map(|s| container("a", 0, 0, s)));
        list.extend(at(b).map(|s| container("b", 0, 0, s)));
        let mut case = Case::new(two(policy), observed(list));
        case.lifecycle = lifecycle;
        assert_eq!(case.phase(), phase, "{policy} {a} {b} {:?}", case.lifecycle);
    }
}

#[test]
fn a_terminal_phase_waits_for_the_last_process_and_is_never_taken_back() {
    let cause = Cause::Failed {
        reason: "DeadlineExceeded".to_owned(),
        message: "late".to_owned(),
    };
    let alive = observed(vec![container("a", 0, 0, running())]);
    let mut case = Case::new(simple("Always"), alive).ending(cause);
    assert_eq!(case.phase(), "Running");
    case.previous = case.derive();
    case.observed = observed(vec![container("a", 0, 0, exited(143, 99))]);
    let status = case.json();
    assert_eq!(status["phase"], "Failed");
    assert_eq!(status["reason"], "DeadlineExceeded");
    assert_eq!(condition(&status, "Ready")["reason"], "PodFailed");
    case.previous = case.derive();
    case.lifecycle = Lifecycle::Terminated(Cause::Deleted);
    case.observed = PodObservation::default();
    let status = case.json();
    assert_eq!(
        (&status["phase"], &status["reason"]),
        (&json!("Failed"), &json!("DeadlineExceeded"))
    );
    assert_eq!(
        status["containerStatuses"][0]["state"]["terminated"]["exitCode"],
        143
    );
    assert_eq!(status["podIP"], "10.0.0.5", "the last address stays");
}

#[test]
fn a_crash_loop_shows_the_wait_and_the_last_end() {
    let dead = container("a", 0, 1, exited(3, 50));
    let mut case =
        Case::new(simple("Always"), observed(vec![dead.clone()])).wait("a", "CrashLoopBackOff");
    case.messages.insert(dead.id, "out of luck".to_owned());
    let status = case.json();
    let a = &status["containerStatuses"][0];
    assert_eq!(
        a["state"],
        json!({"waiting": {"reason": "CrashLoopBackOff"}})
    );
    let last = &a["lastState"]["terminated"];
    assert_eq!(
        (&last["exitCode"], &last["reason"]),
        (&json!(3), &json!("Error"))
    );
    assert_eq!(last["message"], "out of luck");
    assert_eq!((&a["ready"], &a["started"]), (&json!(false), &json!(false)));
    assert_eq!(status["phase"], "Running");
}

#[test]
fn init_containers_hold_the_phase_and_the_initialized_condition() {
    let spec = |policy: &str| {
        pod(json!({"restartPolicy": policy,
            "initContainers": [{"name": "i", "image": "i:1"}],
            "containers": [{"name": "a", "image": "a:1"}]}))
    };
    let status = Case::new(
        spec("Always"),
        observed(vec![container("i", 0, 0, running())]),
    )
    .json();
    assert_eq!(status["phase"], "Pending");
    assert_eq!(
        condition(&status, "Initialized")["reason"],
        "ContainersNotInitialized"
    );
    assert_eq!(
        condition(&status, "Initialized")["message"],
        "containers with incomplete status: [i]"
    );
    let a = &status["containerStatuses"][0];
    assert_eq!(a["state"]["waiting"]["reason"], "PodInitializing");
    let done = observed(vec![container("i", 0, 0, exited(0, 50))]);
    let status = Case::new(spec("Always"), done).json();
    assert_eq!(condition(&status, "Initialized")["status"], "True");
    assert_eq!(status["initContainerStatuses"][0]["ready"], true);
    let failed = observed(vec![container("i", 0, 0, exited(1, 50))]);
    let case = Case::new(spec("Never"), failed).ending(Cause::Completed);
    assert_eq!(case.phase(), "Failed");
}

#[test]
fn a_rejected_pod_has_the_stock_words_and_no_containers() {
    let cause = Cause::Failed {
        reason: "OutOfcpu".to_owned(),
        message: "Pod was rejected: Node didn't have enough resource".to_owned(),
    };
    let status = Case::new(simple("Always"), PodObservation::default())
        .ending(cause)
        .json();
    assert_eq!(
        (&status["phase"], &status["reason"]),
        (&json!("Failed"), &json!("OutOfcpu"))
    );
    assert!(status.get("containerStatuses").is_none());
}

#[test]
fn a_container_lost_while_the_pod_ended_is_reported_as_unknown() {
    let mut case = Case::new(simple("Always"), PodObservation::default());
    case.previous = Case::new(
        simple("Always"),
        observed(vec![container("a", 0, 0, running())]),
    )
    .derive();
    case.lifecycle = Lifecycle::Terminated(Cause::Deleted);
    let ended = case.json()["containerStatuses"][0]["state"]["terminated"].clone();
    assert_eq!(
        (&ended["exitCode"], &ended["reason"]),
        (&json!(137), &json!("ContainerStatusUnknown"))
    );
    assert_eq!(case.phase(), "Failed");
}

#[test]
fn a_stopped_sandbox_is_not_ready_to_start_containers() {
    let dead = container("a", 0, 0, exited(0, 50));
    let gone = PodObservation::new(vec![sandbox(0, SandboxState::NotReady)], vec![dead]);
    let mut case = Case::new(simple("Never"), gone);
    case.lifecycle = Lifecycle::Terminated(Cause::Completed);
    let status = case.json();
    assert_eq!(
        condition(&status, "PodReadyToStartContainers")["status"],
        "False"
    );
    assert_eq!(condition(&status, "Initialized")["reason"], "PodCompleted");
    assert_eq!(condition(&status, "Ready")["reason"], "PodCompleted");
}

#[test]
fn an_ephemeral_container_is_shown_and_counts_for_nothing() {
    let spec = pod(json!({"containers": [{"name": "a", "image": "a:1"}],
        "ephemeralContainers": [{"name": "z", "image": "z:1"}, {"name": "e", "image": "e:1"}]}));
    let list = vec![
        container("a", 0, 0, running()),
        container("e", 0, 0, exited(1, 5)),
    ];
    let status = Case::new(spec, observed(list)).json();
    assert_eq!(status["phase"], "Running");
    assert_eq!(condition(&status, "Ready")["status"], "True");
    let shown = &status["ephemeralContainerStatuses"];
    assert_eq!(shown[0]["name"], "e");
    assert_eq!(shown[0]["state"]["terminated"]["exitCode"], 1);
    assert_eq!(shown[0]["ready"], false);
    assert!(shown[0].get("started").is_none());
    assert_eq!(shown[1]["state"]["waiting"]["reason"], "ContainerCreating");
}

#[test]
fn all_messages_of_a_pod_together_are_bounded() {
    let list = ["a", "b"].map(|n| container(n, 0, 0, exited(1, 5)));
    let mut case = Case::new(two("Never"), observed(list.to_vec()));
    for c in &list {
        case.messages.insert(c.id.clone(), "ü".repeat(4000));
    }
    let status = case.derive();
    for container in status.container_statuses.unwrap() {
        let ended = container.state.unwrap().terminated.unwrap();
        assert_eq!(ended.message.unwrap().len(), 6144);
    }
}

#[test]
fn a_pod_that_is_over_leaves_no_container_waiting() {
    let mut case = Case::new(simple("Always"), PodObservation::default()).wait("a", "ErrImagePull");
    case.lifecycle = Lifecycle::Terminated(Cause::Deleted);
    let status = case.json();
    assert_eq!(status["phase"], "Failed");
    let ended = &status["containerStatuses"][0]["state"]["terminated"];
    assert_eq!(ended["reason"], "ContainerStatusUnknown");
    assert_eq!(ended["exitCode"], 137);
    // Before it was initialised, main containers had no turn.
    let spec = pod(json!({"initContainers": [{"name": "i", "image": "i:1"}],
        "containers": [{"name": "a", "image": "a:1"}]}));
    let mut case = Case::new(spec, PodObservation::default());
    case.lifecycle = Lifecycle::Terminated(Cause::Deleted);
    let status = case.json();
    assert!(
        status["containerStatuses"][0]["state"]
            .get("waiting")
            .is_some()
    );
    let init = &status["initContainerStatuses"][0]["state"];
    assert_eq!(init["terminated"]["reason"], "ContainerStatusUnknown");
}

mod rounds;
