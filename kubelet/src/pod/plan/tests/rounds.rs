//! Plans of pods in which one container may start all anew.

use super::*;
use crate::launch::ANNOTATION_ROUND;
use runtime::service::ContainerStatus;

/// Init container `i`, sidecar `s`, main containers `a` (exit code 42 starts all anew) and `b`.
fn restarting(policy: &str) -> Pod {
    let rule = json!({"action": "RestartAllContainers",
        "exitCodes": {"operator": "In", "values": [42]}});
    pod(json!({"restartPolicy": policy,
        "initContainers": [{"name": "i", "image": "i:1"},
            {"name": "s", "image": "s:1", "restartPolicy": "Always"}],
        "containers": [
            {"name": "a", "image": "a:1", "restartPolicy": "Never", "restartPolicyRules": [rule]},
            {"name": "b", "image": "b:1",
                "lifecycle": {"preStop": {"exec": {"command": ["x"]}}}}]}))
}

fn in_round(mut instance: ContainerStatus, round: u32) -> ContainerStatus {
    let annotations = &mut instance.config.annotations;
    annotations.insert(ANNOTATION_ROUND.to_owned(), round.to_string());
    instance
}

fn first_round(a: ContainerState, b: ContainerState, s: ContainerState) -> PodObservation {
    observed(vec![
        container("i", 0, 0, exited(0, 1)),
        container("s", 0, 0, s),
        container("a", 0, 0, a),
        container("b", 0, 0, b),
    ])
}

fn rounds_of_starts(plan: &PodPlan) -> Vec<u32> {
    let starts = plan.actions.iter().filter_map(|a| match a {
        Action::StartContainer(start) => Some(start.round),
        _ => None,
    });
    starts.collect()
}

#[test]
fn an_exit_by_the_rule_kills_the_others_without_hooks_or_grace_main_containers_first() {
    let seen = first_round(exited(42, 50), running(), running());
    Case::new(restarting("Never"), seen).expect(&["kill b-0 0s RestartAll"]);
    let seen = first_round(exited(42, 50), exited(137, 51), running());
    Case::new(restarting("Never"), seen).expect(&["kill s-0 0s RestartAll"]);
}

#[test]
fn all_start_anew_in_order_once_no_process_is_left() {
    let seen = first_round(exited(42, 50), exited(137, 51), exited(137, 51));
    let mut case = Case::new(restarting("Never"), seen);
    let plan = case.expect(&["start i 1 in s0"]);
    assert_eq!(rounds_of_starts(&plan), [1]);
    assert_eq!(plan.lifecycle, Lifecycle::Syncing);
    let mut add = |instance| {
        let mut all = case.observed.containers.clone();
        all.push(in_round(instance, 1));
        case.observed = PodObservation::new(case.observed.sandboxes.clone(), all);
    };
    add(container("i", 0, 1, exited(0, 60)));
    add(container("s", 0, 1, running()));
    let plan = case.expect(&["start a 1 in s0", "start b 1 in s0", "remove i-0"]);
    assert_eq!(rounds_of_starts(&plan), [1, 1]);
}

#[test]
fn other_exits_do_not_begin_a_round_and_an_old_end_begins_none_twice() {
    let seen = first_round(exited(1, 50), running(), running());
    Case::new(restarting("Never"), seen).expect(&[]);
    let mut all = first_round(exited(42, 50), exited(137, 51), exited(137, 51)).containers;
    all.push(in_round(container("i", 0, 1, running()), 1));
    Case::new(restarting("Never"), observed(all)).expect(&[]);
}

#[test]
fn a_start_in_flight_is_waited_for_before_a_round_begins() {
    let seen = first_round(exited(42, 50), exited(137, 51), exited(137, 51));
    let mut case = Case::new(restarting("Never"), seen);
    let running = Step::Running { before: None };
    case.steps.starts.insert("b".to_owned(), running);
    case.expect(&[]);
}

#[test]
fn a_container_that_asks_for_rounds_at_once_gets_one_a_second() {
    let mut seen = first_round(exited(42, 100), exited(137, 100), exited(137, 100));
    for instance in &mut seen.containers {
        instance.created_at_ns = 99 * SECOND_NS + SECOND_NS / 2;
    }
    let mut case = Case::new(restarting("Never"), seen);
    let plan = case.expect(&[]);
    assert_eq!(plan.wake_at_ns, Some(100 * SECOND_NS + SECOND_NS / 2));
    case.now_s = 101;
    case.expect(&["start i 1 in s0"]);
}

#[test]
fn a_failed_init_container_that_was_killed_for_a_round_does_not_fail_the_pod() {
    let rule = json!({"action": "RestartAllContainers",
        "exitCodes": {"operator": "In", "values": [42]}});
    let pod = pod(json!({"restartPolicy": "Never",
        "initContainers": [{"name": "s", "image": "s:1", "restartPolicy": "Always",
            "restartPolicyRules": [rule]}, {"name": "i", "image": "i:1"}],
        "containers": [{"name": "a", "image": "a:1"}]}));
    let killed = vec![
        container("s", 0, 0, exited(42, 50)),
        container("i", 0, 0, exited(137, 51)),
    ];
    let plan = Case::new(pod, observed(killed)).expect(&["start s 1 in s0"]);
    assert_eq!(plan.lifecycle, Lifecycle::Syncing);
}
