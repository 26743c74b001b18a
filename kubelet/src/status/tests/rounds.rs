//! Statuses of pods in which one container starts all anew.

use super::*;
use crate::launch::ANNOTATION_ROUND;
use runtime::service::{ContainerState, ContainerStatus};

fn restarting() -> Pod {
    let rule = json!({"action": "RestartAllContainers",
        "exitCodes": {"operator": "In", "values": [42]}});
    pod(json!({"restartPolicy": "Never",
        "initContainers": [{"name": "i", "image": "i:1"}],
        "containers": [
            {"name": "a", "image": "a:1", "restartPolicy": "Never", "restartPolicyRules": [rule]},
            {"name": "b", "image": "b:1"}]}))
}

fn instances(a: ContainerState, b: ContainerState) -> Vec<ContainerStatus> {
    vec![
        container("i", 0, 0, exited(0, 1)),
        container("a", 0, 0, a),
        container("b", 0, 0, b),
    ]
}

#[test]
fn the_condition_is_there_for_such_pods_only_and_false_while_nothing_restarts() {
    let seen = observed(instances(running(), running()));
    let status = Case::new(restarting(), seen).json();
    let told = condition(&status, "AllContainersRestarting");
    assert_eq!(told["status"], "False");
    assert_eq!(told["observedGeneration"], Value::Null);
    let status = Case::new(simple("Always"), PodObservation::default()).derive();
    let mut all = status.conditions.into_iter().flatten();
    assert!(all.all(|c| c.type_ != "AllContainersRestarting"));
}

#[test]
fn while_the_others_are_killed_the_end_that_began_it_is_shown() {
    let seen = observed(instances(exited(42, 50), running()));
    let status = Case::new(restarting(), seen).json();
    let told = condition(&status, "AllContainersRestarting");
    assert_eq!(told["status"], "True");
    assert_eq!(told["reason"], "RestartAllContainersStarted");
    let text = "container exited with restart policy rule";
    assert_eq!(told["message"], text);
    assert_eq!(status["phase"], "Running");
    let a = &status["containerStatuses"][0];
    assert_eq!(a["state"]["terminated"]["exitCode"], 42);
}

#[test]
fn between_rounds_all_wait_and_count_one_restart_more() {
    let seen = observed(instances(exited(42, 50), exited(137, 51)));
    let status = Case::new(restarting(), seen).json();
    assert_eq!(status["phase"], "Running");
    assert_eq!(condition(&status, "Initialized")["status"], "True");
    let init = &status["initContainerStatuses"][0];
    let [a, b] = [0, 1].map(|n| &status["containerStatuses"][n]);
    for one in [init, a, b] {
        let reason = &one["state"]["waiting"]["reason"];
        assert_eq!(reason, "RestartingAllContainers");
        assert_eq!(one["restartCount"], 1);
        assert_eq!(one["ready"], false);
    }
    assert_eq!(a["lastState"]["terminated"]["exitCode"], 42);
    for one in [init, b] {
        let last = &one["lastState"]["terminated"];
        assert_eq!(last["reason"], "RestartingAllContainers");
        assert_eq!(last["exitCode"], 137);
    }
}

#[test]
fn in_the_next_round_the_last_one_is_behind_each_container() {
    let mut all = instances(exited(42, 50), exited(137, 51));
    let mut init = container("i", 0, 1, running());
    let annotations = &mut init.config.annotations;
    annotations.insert(ANNOTATION_ROUND.to_owned(), "1".to_owned());
    all.push(init);
    let status = Case::new(restarting(), observed(all)).json();
    let told = condition(&status, "AllContainersRestarting");
    assert_eq!(told["status"], "False");
    let init = &status["initContainerStatuses"][0];
    assert!(!init["state"]["running"].is_null());
    assert_eq!(init["restartCount"], 1);
    let last = &init["lastState"]["terminated"];
    assert_eq!(last["reason"], "RestartingAllContainers");
    let b = &status["containerStatuses"][1];
    assert_eq!(b["state"]["waiting"]["reason"], "PodInitializing");
    assert_eq!(b["restartCount"], 1);
}
