//! Pods that end, and containers that are replaced.

use super::*;

/// A stop signal on its way, with SIGKILL due at this second.
fn killing(deadline_s: i64) -> Kill {
    Kill {
        deadline_ns: deadline_s * SECOND_NS,
        step: Step::Running { before: None },
        ..Kill::default()
    }
}

#[test]
fn a_new_image_or_a_failed_probe_kills_the_running_instance() {
    let a = container("a", 0, 0, running());
    let mut newer = simple("Always");
    newer.spec.as_mut().unwrap().containers[0].image = Some("a:2".to_owned());
    let mut case = Case::new(newer, observed(vec![a.clone()]));
    case.expect(&["kill a-0 30s SpecChanged"]);
    case.steps.kills.insert(a.id.clone(), killing(130));
    case.expect(&[]);

    let mut probed = simple("Always");
    let container = &mut probed.spec.as_mut().unwrap().containers[0];
    container.liveness_probe = serde_json::from_value(
        json!({"tcpSocket": {"port": 1}, "terminationGracePeriodSeconds": 5}),
    )
    .unwrap();
    let mut case = Case::new(probed, observed(vec![a.clone()]));
    case.expect(&[]);
    case.health.unhealthy.insert(a.id, UnhealthyKind::Liveness);
    case.expect(&["kill a-0 5s Liveness"]);
}

#[test]
fn a_pod_past_its_deadline_fails_with_the_stock_words() {
    let mut late = simple("Always");
    late.spec.as_mut().unwrap().active_deadline_seconds = Some(99);
    let a = container("a", 0, 0, running());
    let plan = Case::new(late.clone(), observed(vec![a.clone()])).expect(&["kill a-0 30s PodEnds"]);
    let Lifecycle::Terminating(Terminating {
        cause: Cause::Failed { reason, .. },
        ..
    }) = plan.lifecycle
    else {
        panic!("{plan:?}")
    };
    assert_eq!(reason, "DeadlineExceeded");
    let mut early = Case::new(late, observed(vec![a]));
    early.now_s = 98;
    assert_eq!(early.expect(&[]).wake_at_ns, Some(99 * SECOND_NS));
}

#[test]
fn deletion_kills_and_a_shorter_grace_kills_again_but_a_longer_one_never() {
    let a = container("a", 0, 0, running());
    let mut case = Case::new(deleting(simple("Always"), 30), observed(vec![a.clone()]));
    let plan = case.expect(&["kill a-0 30s PodEnds"]);
    case.lifecycle = plan.lifecycle;
    case.steps.kills.insert(a.id.clone(), killing(130));
    case.expect(&[]);
    case.pod = deleting(simple("Always"), 0);
    let plan = case.expect(&["kill a-0 0s PodEnds"]);
    case.lifecycle = plan.lifecycle;
    case.steps.kills.insert(a.id, killing(100));
    case.pod = deleting(simple("Always"), 60);
    let plan = case.expect(&[]);
    assert!(matches!(
        plan.lifecycle,
        Lifecycle::Terminating(Terminating { grace_s: 0, .. })
    ));
}

#[test]
fn main_containers_end_before_sidecars_and_sidecars_in_reverse_order() {
    let spec = pod(json!({"initContainers": [
            {"name": "s", "image": "s:1", "restartPolicy": "Always"},
            {"name": "i", "image": "i:1", "restartPolicy": "Always"}],
        "containers": [{"name": "a", "image": "a:1"}]}));
    let of = |names: &[&str]| {
        names
            .iter()
            .map(|n| container(n, 0, 0, running()))
            .collect()
    };
    for (alive, killed) in [
        (&["s", "i", "a"][..], "kill a-0 30s PodEnds"),
        (&["s", "i"], "kill i-0 30s PodEnds"),
        (&["s"], "kill s-0 30s PodEnds"),
    ] {
        Case::new(deleting(spec.clone(), 30), observed(of(alive))).expect(&[killed]);
    }
}

#[test]
fn an_ending_waits_for_starts_in_flight_then_gives_everything_back() {
    let deleted = || Case::new(deleting(simple("Always"), 30), observed(vec![]));
    let mut case = deleted();
    case.steps
        .starts
        .insert("a".to_owned(), Step::Running { before: None });
    case.expect(&[]);
    let mut case = deleted();
    let plan = case.expect(&["stop s0", "teardown"]);
    case.lifecycle = plan.lifecycle;
    case.steps
        .sandbox_stops
        .insert(SandboxId::from("s0"), Step::Done);
    case.steps.teardown = Step::Running { before: None };
    assert!(matches!(
        case.expect(&[]).lifecycle,
        Lifecycle::Terminating(_)
    ));
    case.steps.teardown = Step::Done;
    assert_eq!(
        case.expect(&[]).lifecycle,
        Lifecycle::Terminated(Cause::Deleted)
    );
}

#[test]
fn a_pod_deleted_before_it_had_anything_is_gone_at_once() {
    let mut case = Case::new(deleting(simple("Always"), 30), PodObservation::default());
    case.steps = Steps::default();
    let plan = case.expect(&["teardown"]);
    case.lifecycle = plan.lifecycle;
    case.steps.teardown = Step::Done;
    let plan = case.plan();
    case.lifecycle = plan.lifecycle;
    let plan = case.expect(&["farewell", "purge"]);
    case.lifecycle = plan.lifecycle;
    case.steps.farewell = Step::Done;
    case.steps.purge = Step::Done;
    assert_eq!(case.plan().lifecycle, Lifecycle::Finished);
}

#[test]
fn an_ended_pod_keeps_its_dead_containers_until_it_is_deleted() {
    let dead = container("a", 0, 0, exited(0, 50));
    let mut case = Case::new(simple("Never"), observed(vec![dead]));
    case.lifecycle = Lifecycle::Terminated(Cause::Completed);
    case.expect(&[]);
    case.pod = deleting(simple("Never"), 30);
    case.expect(&["remove s0", "farewell"]);
    case.pod = simple("Never");
    case.gone = true;
    case.expect(&["remove s0"]);
}

#[test]
fn an_orphan_without_a_spec_is_ended_and_removed() {
    let mut orphan = simple("Always");
    orphan.spec = None;
    let a = container("a", 0, 0, running());
    let mut case = Case::new(orphan, observed(vec![a]));
    case.gone = true;
    case.expect(&["kill a-0 30s PodEnds"]);
}

#[test]
fn a_terminating_pod_is_never_undeleted_nor_restarted() {
    let dead = container("a", 0, 0, exited(1, 50));
    let case = Case::new(simple("Always"), observed(vec![dead])).ending(Cause::Deleted, 30);
    let plan = case.plan();
    assert!(
        !plan
            .actions
            .iter()
            .any(|a| matches!(a, Action::StartContainer(_)))
    );
    assert!(matches!(plan.lifecycle, Lifecycle::Terminating(_)));
}

fn with_hooks() -> Pod {
    let hook = json!({"preStop": {"sleep": {"seconds": 5}}});
    pod(json!({"initContainers": [
            {"name": "s", "image": "s:1", "restartPolicy": "Always", "lifecycle": hook}],
        "containers": [{"name": "a", "image": "a:1", "lifecycle": hook}, {"name": "b", "image": "b:1"}]}))
}

#[test]
fn all_hooks_begin_with_the_ending_and_take_from_the_grace() {
    let all = ["s", "a", "b"].map(|n| container(n, 0, 0, running()));
    let mut case = Case::new(deleting(with_hooks(), 30), observed(all.to_vec()));
    let plan = case.expect(&["hook s-0 30s", "hook a-0 30s", "kill b-0 30s PodEnds"]);
    case.lifecycle = plan.lifecycle;
    let hook = |step| Kill {
        deadline_ns: 130 * SECOND_NS,
        hook: step,
        ..Kill::default()
    };
    let id = |n: &str| runtime::service::ContainerId(format!("{n}-0"));
    case.steps.kills = [
        (id("s"), hook(Step::Running { before: None })),
        (id("a"), hook(Step::Running { before: None })),
        (id("b"), killing(130)),
    ]
    .into();
    assert_eq!(case.expect(&[]).wake_at_ns, Some(130 * SECOND_NS));
    // Both hooks took 5 s; the sidecar still waits for the main containers.
    case.now_s = 105;
    case.steps.kills.insert(id("s"), hook(Step::Done));
    case.steps.kills.insert(id("a"), hook(Step::Done));
    case.expect(&["kill a-0 25s PodEnds"]);
    case.steps.kills.insert(id("a"), killing(130));
    case.expect(&[]);
    // Waits end with the grace.
    case.now_s = 130;
    case.expect(&["kill s-0 0s PodEnds"]);
    case.now_s = 110;
    let ended = ["a", "b"].map(|n| container(n, 0, 0, exited(0, 109)));
    let s = container("s", 0, 0, running());
    case.observed = observed([vec![s], ended.to_vec()].concat());
    case.expect(&["kill s-0 20s PodEnds"]);
}

#[test]
fn without_grace_no_hook_runs_and_nobody_waits() {
    let all = ["s", "a"].map(|n| container(n, 0, 0, running()));
    Case::new(deleting(with_hooks(), 0), observed(all.to_vec()))
        .expect(&["kill s-0 0s PodEnds", "kill a-0 0s PodEnds"]);
}

#[test]
fn a_failed_post_start_hook_kills_and_the_next_start_follows_the_policy() {
    let a = container("a", 0, 0, running());
    let mut case = Case::new(simple("Always"), observed(vec![a.clone()]));
    case.health.unhealthy.insert(a.id, UnhealthyKind::PostStart);
    case.expect(&["kill a-0 30s PostStart"]);
}

#[test]
fn kills_are_told_in_the_words_people_know() {
    let words = |pod: &Pod, name, reason| kill::words(pod, name, reason);
    let always = with_hooks();
    let never = simple("Never");
    for (pod, name, reason, text) in [
        (&always, "a", KillReason::PodEnds, "Stopping container a"),
        (
            &always,
            "a",
            KillReason::Liveness,
            "Container a failed liveness probe, will be restarted",
        ),
        (
            &always,
            "s",
            KillReason::Startup,
            "Init container s failed startup probe",
        ),
        (
            &never,
            "a",
            KillReason::Liveness,
            "Container a failed liveness probe",
        ),
        (
            &never,
            "a",
            KillReason::SpecChanged,
            "Container a definition changed, will be restarted",
        ),
    ] {
        assert_eq!(words(pod, name, reason), text);
    }
}
