use super::*;
use crate::pod::fixture::{container, deleting, exited, observed, pod, running, sandbox, simple};
use crate::pod::resize::tracker::ResizeTracker;
use crate::pod::state::{Failure, Kill, SECOND_NS, Step, UnhealthyKind};
use runtime::service::{ContainerState, SandboxState};
use serde_json::json;

/// A question to the planner; the defaults are a pod that everything is ready for.
struct Case {
    pod: Pod,
    gone: bool,
    lifecycle: Lifecycle,
    observed: PodObservation,
    steps: Steps,
    health: Health,
    backoffs: BTreeMap<String, CrashBackoff>,
    ended: Option<Cause>,
    ended_grace_s: Option<u64>,
    resize: ResizeTracker,
    now_s: i64,
}

impl Case {
    fn new(pod: Pod, observed: PodObservation) -> Self {
        let images = ["a", "b", "i", "j", "s"].map(|n| (n.to_owned(), Step::Done));
        let steps = Steps {
            volumes: Step::Done,
            images: images.into(),
            ..Steps::default()
        };
        Self {
            pod,
            gone: false,
            lifecycle: Lifecycle::Syncing,
            observed,
            steps,
            health: Health::default(),
            backoffs: BTreeMap::new(),
            ended: None,
            ended_grace_s: None,
            resize: ResizeTracker::default(),
            now_s: 100,
        }
    }

    fn ending(mut self, cause: Cause, grace_s: u64) -> Self {
        self.lifecycle = Lifecycle::Terminating(Terminating {
            cause,
            grace_s,
            deadline_ns: kill::deadline_ns(self.now_s * SECOND_NS, grace_s),
        });
        self
    }

    fn plan(&self) -> PodPlan {
        plan(&PlanInput {
            pod: &self.pod,
            gone: self.gone,
            lifecycle: &self.lifecycle,
            observed: &self.observed,
            steps: &self.steps,
            health: &self.health,
            backoffs: &self.backoffs,
            ended: self.ended.as_ref(),
            ended_grace_s: self.ended_grace_s,
            resize: self.resize.view(),
            start_time_ns: 0,
            now_ns: self.now_s * SECOND_NS,
        })
    }

    /// Plans and compares the actions in words.
    #[track_caller]
    fn expect(&self, actions: &[&str]) -> PodPlan {
        let plan = self.plan();
        let words: Vec<_> = plan.actions.iter().map(word).collect();
        assert_eq!(words, actions);
        plan
    }
}

fn word(action: &Action) -> String {
    match action {
        Action::PrepareVolumes => "volumes".to_owned(),
        Action::RunSandbox { attempt } => format!("sandbox {attempt}"),
        Action::StopSandbox(id) => format!("stop {id}"),
        Action::RemoveSandbox(id) => format!("remove {id}"),
        Action::EnsureImage { container } => format!("image {container}"),
        Action::Resize => "resize".to_owned(),
        Action::StartContainer(StartContainer {
            container,
            sandbox,
            attempt,
            replaces,
            ..
        }) => {
            let replaces = replaces
                .as_ref()
                .map(|r| format!(" for {r}"))
                .unwrap_or_default();
            format!("start {container} {attempt} in {sandbox}{replaces}")
        }
        Action::PreStop(hook) => format!("hook {} {}s", hook.id, hook.limit.as_secs()),
        Action::KillContainer(kill) => {
            let KillContainer { id, reason, .. } = kill;
            format!("kill {id} {}s {reason:?}", kill.grace.as_secs())
        }
        Action::RemoveContainer(id) => format!("remove {id}"),
        Action::Teardown => "teardown".to_owned(),
        Action::Purge => "purge".to_owned(),
        Action::Farewell => "farewell".to_owned(),
    }
}

fn two() -> Pod {
    pod(json!({"restartPolicy": "Always", "containers": [
        {"name": "a", "image": "a:1"}, {"name": "b", "image": "b:1"}]}))
}

fn with_init(policy: &str) -> Pod {
    pod(json!({"restartPolicy": policy,
        "initContainers": [{"name": "i", "image": "i:1"}, {"name": "j", "image": "j:1"}],
        "containers": [{"name": "a", "image": "a:1"}]}))
}

#[test]
fn a_new_pod_gets_volumes_sandbox_and_images_at_once() {
    let mut case = Case::new(two(), PodObservation::default());
    case.steps = Steps::default();
    case.expect(&["volumes", "sandbox 0", "image a", "image b"]);
}

#[test]
fn containers_start_side_by_side_once_all_is_there_and_not_before() {
    let mut case = Case::new(two(), observed(vec![]));
    case.expect(&["start a 0 in s0", "start b 0 in s0"]);
    case.steps
        .images
        .insert("b".to_owned(), Step::Running { before: None });
    case.expect(&["start a 0 in s0"]);
    case.steps.volumes = Step::Running { before: None };
    case.expect(&[]);
    let mut case = Case::new(two(), PodObservation::default());
    case.steps.sandbox = Step::Running { before: None };
    case.expect(&[]);
}

#[test]
fn a_start_in_flight_is_not_asked_for_twice() {
    let mut case = Case::new(simple("Always"), observed(vec![]));
    case.steps
        .starts
        .insert("a".to_owned(), Step::Running { before: None });
    case.expect(&[]);
    // Its record shows up before the start has ended.
    case.observed = observed(vec![container("a", 0, 0, ContainerState::Created)]);
    case.expect(&[]);
}

#[test]
fn a_record_left_by_a_killed_agent_is_replaced_with_the_same_count() {
    let created = container("a", 0, 3, ContainerState::Created);
    Case::new(simple("Always"), observed(vec![created])).expect(&["start a 3 in s0 for a-3"]);
}

#[test]
fn init_containers_run_one_after_the_other_before_the_main_ones() {
    let start = |list| Case::new(with_init("Always"), observed(list));
    start(vec![]).expect(&["start i 0 in s0"]);
    start(vec![container("i", 0, 0, running())]).expect(&[]);
    let i = container("i", 0, 0, exited(0, 2));
    start(vec![i.clone()]).expect(&["start j 0 in s0"]);
    let j = container("j", 0, 0, exited(0, 2));
    start(vec![i.clone(), j.clone()]).expect(&["start a 0 in s0"]);
    start(vec![i, j, container("a", 0, 0, running())]).expect(&[]);
}

#[test]
fn a_failed_init_container_runs_again_or_ends_the_pod_by_policy() {
    let failed = || observed(vec![container("i", 0, 0, exited(1, 2))]);
    Case::new(with_init("Always"), failed()).expect(&["start i 1 in s0"]);
    let plan = Case::new(with_init("Never"), failed()).plan();
    assert!(matches!(
        plan.lifecycle,
        Lifecycle::Terminating(Terminating {
            cause: Cause::Completed,
            ..
        })
    ));
}

#[test]
fn sidecars_start_in_order_stay_and_are_awaited_only_until_started() {
    let spec = |probe: serde_json::Value| {
        let mut sidecar = json!({"name": "s", "image": "s:1", "restartPolicy": "Always"});
        if !probe.is_null() {
            sidecar["startupProbe"] = probe;
        }
        pod(
            json!({"restartPolicy": "Never", "initContainers": [sidecar],
            "containers": [{"name": "a", "image": "a:1"}]}),
        )
    };
    let probe = json!({"tcpSocket": {"port": 1}});
    Case::new(spec(json!(null)), observed(vec![])).expect(&["start s 0 in s0"]);
    let s = container("s", 0, 0, running());
    let mut case = Case::new(spec(probe), observed(vec![s.clone()]));
    case.expect(&[]);
    case.health.started.insert(s.id.clone(), true);
    case.expect(&["start a 0 in s0"]);
    // It runs again even with restartPolicy Never, and does not hold the main container.
    let dead = container("s", 0, 0, exited(0, 50));
    let a = container("a", 0, 0, running());
    Case::new(spec(json!(null)), observed(vec![dead, a])).expect(&["start s 1 in s0"]);
}

#[test]
fn a_dead_container_runs_again_or_not_by_policy_and_exit_code() {
    for (policy, code, actions) in [
        ("Always", 0, &["start a 1 in s0"][..]),
        ("Always", 1, &["start a 1 in s0"]),
        ("OnFailure", 1, &["start a 1 in s0"]),
    ] {
        let dead = container("a", 0, 0, exited(code, 50));
        Case::new(simple(policy), observed(vec![dead])).expect(actions);
    }
    for (policy, code) in [("OnFailure", 0), ("Never", 0), ("Never", 1)] {
        let dead = container("a", 0, 0, exited(code, 50));
        let plan = Case::new(simple(policy), observed(vec![dead])).plan();
        assert!(
            matches!(plan.lifecycle, Lifecycle::Terminating(_)),
            "{policy} {code}"
        );
    }
}

#[test]
fn a_crash_loop_waits_and_says_why() {
    let dead = container("a", 0, 1, exited(1, 95));
    let mut case = Case::new(simple("Always"), observed(vec![dead]));
    let backoff = CrashBackoff::recorded(10 * SECOND_NS, 90 * SECOND_NS);
    case.backoffs.insert("a".to_owned(), backoff);
    let plan = case.expect(&[]);
    assert_eq!(plan.wake_at_ns, Some(105 * SECOND_NS));
    assert_eq!(plan.waiting["a"].reason, "CrashLoopBackOff");
    assert_eq!(
        plan.waiting["a"].message,
        "back-off 10s restarting failed container=a pod=web_ns(u1)"
    );
    case.now_s = 105;
    case.expect(&["start a 2 in s0"]);
}

#[test]
fn a_lost_sandbox_is_stopped_and_replaced_and_its_containers_run_in_the_new_one() {
    let dead = container("a", 0, 0, exited(137, 50));
    let lost = sandbox(0, SandboxState::NotReady);
    let observed = PodObservation::new(vec![lost.clone()], vec![dead.clone()]);
    let mut case = Case::new(simple("Always"), observed);
    case.expect(&["stop s0"]);
    case.steps.sandbox_stops.insert(lost.id.clone(), Step::Done);
    case.expect(&["sandbox 1"]);
    case.observed = PodObservation::new(
        vec![sandbox(1, SandboxState::Ready), lost.clone()],
        vec![dead],
    );
    case.expect(&["start a 1 in s1"]);
    // The old sandbox goes when none of its containers is the last dead one.
    let newer = container("a", 1, 2, running());
    let last = container("a", 1, 1, exited(1, 60));
    let oldest = container("a", 0, 0, exited(137, 50));
    case.observed = PodObservation::new(
        vec![sandbox(1, SandboxState::Ready), lost],
        vec![newer, last, oldest],
    );
    case.expect(&["remove a-0", "remove s0"]);
}

#[test]
fn with_restart_policy_never_a_lost_sandbox_ends_the_pod() {
    let lost = sandbox(0, SandboxState::NotReady);
    let dead = container("a", 0, 0, exited(137, 50));
    let observed = PodObservation::new(vec![lost], vec![dead]);
    let plan = Case::new(simple("Never"), observed).expect(&["stop s0", "teardown"]);
    assert!(matches!(plan.lifecycle, Lifecycle::Terminating(_)));
}

#[test]
fn a_failed_step_is_tried_again_at_its_time_and_its_reason_shown() {
    let mut case = Case::new(simple("Always"), observed(vec![]));
    let failure = Failure {
        reason: "ErrImagePull".to_owned(),
        message: "no such image".to_owned(),
        retry_at_ns: 110 * SECOND_NS,
        failures: 1,
    };
    case.steps
        .images
        .insert("a".to_owned(), Step::Failed(failure.clone()));
    let plan = case.expect(&[]);
    assert_eq!(plan.waiting["a"].reason, "ErrImagePull");
    assert_eq!(plan.wake_at_ns, Some(110 * SECOND_NS));
    case.now_s = 110;
    case.expect(&["image a"]);
    // While the next try is in flight the reason stays: no flapping.
    case.steps.images.insert(
        "a".to_owned(),
        Step::Running {
            before: Some(failure),
        },
    );
    assert_eq!(case.expect(&[]).waiting["a"].reason, "ErrImagePull");
}

#[test]
fn the_restart_count_goes_on_from_the_api_when_the_runtime_lost_everything() {
    let mut known = simple("Always");
    known.status = serde_json::from_value(json!({"containerStatuses": [{"name": "a",
        "image": "a:1", "imageID": "", "ready": true, "restartCount": 4,
        "containerID": "ferrule://x"}]}))
    .unwrap();
    Case::new(known, observed(vec![])).expect(&["start a 5 in s0"]);
}

fn with_ephemeral() -> Pod {
    pod(json!({"restartPolicy": "Always",
        "initContainers": [{"name": "i", "image": "i:1"}],
        "containers": [{"name": "a", "image": "a:1"}],
        "ephemeralContainers": [{"name": "e", "image": "e:1", "targetContainerName": "a"}]}))
}

#[test]
fn an_ephemeral_container_waits_for_no_init_container() {
    let mut case = Case::new(
        with_ephemeral(),
        observed(vec![container("i", 0, 0, running())]),
    );
    case.steps.images.insert("e".to_owned(), Step::Done);
    case.expect(&["start e 0 in s0"]);
}

#[test]
fn an_ephemeral_container_runs_once() {
    let running_pod = |e| {
        vec![
            container("i", 0, 0, exited(0, 2)),
            container("a", 0, 0, running()),
            container("e", 0, 0, e),
        ]
    };
    Case::new(with_ephemeral(), observed(running_pod(running()))).expect(&[]);
    Case::new(with_ephemeral(), observed(running_pod(exited(1, 5)))).expect(&[]);
    let mut pod = with_ephemeral();
    pod.status = serde_json::from_value(json!({"ephemeralContainerStatuses": [
        {"name": "e", "image": "e:1", "imageID": "", "ready": false, "restartCount": 0,
         "containerID": "ferrule://e-0"}]}))
    .unwrap();
    let mut lost = running_pod(running());
    lost.pop();
    Case::new(pod, observed(lost)).expect(&[]);
}

#[test]
fn an_ephemeral_container_ends_with_its_pod_and_does_not_keep_it() {
    let pod = pod(json!({"restartPolicy": "Never",
        "containers": [{"name": "a", "image": "a:1"}],
        "ephemeralContainers": [{"name": "e", "image": "e:1"}]}));
    let containers = vec![
        container("a", 0, 0, exited(0, 3)),
        container("e", 0, 0, running()),
    ];
    Case::new(pod, observed(containers)).expect(&["kill e-0 30s PodEnds"]);
}

#[test]
fn a_main_container_waits_for_the_post_start_hooks_before_it() {
    let spec = pod(json!({"containers": [
        {"name": "a", "image": "a:1", "lifecycle": {"postStart": {"sleep": {"seconds": 5}}}},
        {"name": "b", "image": "b:1"}]}));
    let mut case = Case::new(spec, observed(vec![]));
    case.expect(&["start a 0 in s0"]);
    case.steps
        .starts
        .insert("a".to_owned(), Step::Running { before: None });
    case.observed = observed(vec![container("a", 0, 0, running())]);
    case.expect(&[]);
    case.steps.starts.insert("a".to_owned(), Step::Idle);
    case.expect(&["start b 0 in s0"]);
    // One that cannot be started holds nobody.
    case.observed = observed(vec![]);
    let failure = Failure {
        reason: "ErrImagePull".to_owned(),
        message: String::new(),
        retry_at_ns: i64::MAX,
        failures: 1,
    };
    case.steps
        .images
        .insert("a".to_owned(), Step::Failed(failure));
    case.expect(&["start b 0 in s0"]);
}

mod ending;
mod resize;
mod rounds;
