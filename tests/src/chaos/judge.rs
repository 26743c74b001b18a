//! What must be true of pods that lived through the chaos. Mostly pure: objects in, complaints out.

use super::workload::{ChaosPod, Kind};
use crate::paths;
use crate::scenario::{Event, Scenario, container, is_ready, phase, text};
use anyhow::Result;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;

fn items(list: &Value) -> impl Iterator<Item = &Value> {
    list["items"].as_array().into_iter().flatten()
}

fn name(pod: &Value) -> String {
    text(pod, "/metadata/name")
}

/// Pods that have not come to rest yet, and why.
pub(super) fn restless(list: &Value, pods: &[ChaosPod]) -> Vec<String> {
    let mut restless = Vec::new();
    let by_name: BTreeMap<String, &Value> = items(list).map(|pod| (name(pod), pod)).collect();
    for pod in pods {
        let object = by_name.get(&pod.name);
        let problem = match (pod.deleted, object) {
            (true, Some(_)) => Some("is deleted and still there".to_owned()),
            (true, None) => None,
            (false, None) => Some("is gone although nobody deleted it".to_owned()),
            (false, Some(object)) => unrest(pod, object),
        };
        restless.extend(problem.map(|problem| format!("{} {problem}", pod.name)));
    }
    restless
}

fn unrest(pod: &ChaosPod, object: &Value) -> Option<String> {
    match pod.kind {
        Kind::Steady | Kind::Stubborn => {
            (!is_ready(object)).then(|| format!("is not Ready: {}", object["status"]))
        }
        Kind::Finisher { .. } => (!matches!(phase(object), "Succeeded" | "Failed"))
            .then(|| format!("has not ended: {}", object["status"])),
        Kind::Crasher => {
            let status = container(object, "main");
            (status["restartCount"].as_i64().unwrap_or(0) < 1)
                .then(|| format!("was never restarted: {}", object["status"]))
        }
    }
}

/// What the pods at rest, their logs and their files must say.
pub(super) fn end_state(
    scenario: &Scenario,
    list: &Value,
    pods: &[ChaosPod],
) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for object in items(list) {
        let Some(pod) = pods.iter().find(|pod| pod.name == name(object)) else {
            found.push(format!("{}: nobody made it", name(object)));
            continue;
        };
        let status = container(object, "main");
        let restarts = status["restartCount"].as_i64().unwrap_or(-1);
        match pod.kind {
            Kind::Steady | Kind::Stubborn if !pod.hurt => {
                if restarts != 0 {
                    found.push(format!(
                        "{}: restarted {restarts} times: {status}",
                        pod.name
                    ));
                }
            }
            Kind::Finisher { code, .. } if !pod.hurt => {
                let expected = if code == 0 { "Succeeded" } else { "Failed" };
                let exit = status.pointer("/state/terminated/exitCode");
                if phase(object) != expected || exit.and_then(Value::as_u64) != Some(code) {
                    found.push(format!(
                        "{}: ended with {code}, says {}",
                        pod.name, object["status"]
                    ));
                }
            }
            Kind::Crasher => found.extend(starts(scenario, pod, object)),
            Kind::Steady | Kind::Stubborn | Kind::Finisher { .. } => {}
        }
        found.extend(log(scenario, pod)?);
    }
    Ok(found)
}

/// Each line of a log is the number of the line: none lost, none twice.
fn log(scenario: &Scenario, pod: &ChaosPod) -> Result<Option<String>> {
    let length = match pod.kind {
        Kind::Steady => None,
        Kind::Finisher { lines, .. } if !pod.hurt => Some(lines),
        Kind::Finisher { .. } | Kind::Crasher | Kind::Stubborn => return Ok(None),
    };
    let log = scenario.kubectl(&["logs", &pod.name])?;
    let complaint = broken_sequence(&log, length);
    Ok(complaint.map(|complaint| format!("{}: {complaint}", pod.name)))
}

fn broken_sequence(log: &str, length: Option<u64>) -> Option<String> {
    let mut next = 0;
    for line in log.lines() {
        if line != next.to_string() {
            return Some(format!("log line {next} is {line:?}"));
        }
        next += 1;
    }
    let wrong = length.is_some_and(|length| length != next);
    wrong.then(|| format!("its log has {next} lines, it wrote {length:?}"))
}

/// A crasher writes down each start; the restart count is one less while nothing is in flight.
fn starts(scenario: &Scenario, pod: &ChaosPod, object: &Value) -> Option<String> {
    let uid = text(object, "/metadata/uid");
    let volume = format!("kubelet/pods/{uid}/volumes/kubernetes.io~empty-dir/kept/starts");
    let file = paths::labs()
        .join(&scenario.layout.name)
        .join("nodes")
        .join(&pod.node)
        .join(volume);
    let starts =
        i64::try_from(fs::read_to_string(file).unwrap_or_default().lines().count()).ok()?;
    let restarts = container(object, "main")["restartCount"].as_i64()?;
    // The file is read later than the object: one more start may have come. A shim that is killed
    // before its container wrote makes one start less.
    let allowed = if pod.hurt { -2..=2 } else { 0..=1 };
    (!allowed.contains(&(starts - restarts - 1)))
        .then(|| format!("{}: {starts} starts and {restarts} restarts", pod.name))
}

/// What the whole history must not contain.
pub(super) fn history(events: &[Event], pods: &[ChaosPod]) -> Vec<String> {
    let mut by_uid: BTreeMap<String, Vec<&Value>> = BTreeMap::new();
    for event in events {
        let uid = text(&event.object, "/metadata/uid");
        by_uid.entry(uid).or_default().push(&event.object);
    }
    let mut found = Vec::new();
    for objects in by_uid.values() {
        let pod = objects
            .first()
            .and_then(|o| pods.iter().find(|p| p.name == name(o)));
        let Some(pod) = pod else { continue };
        found.extend(instances(objects).map(|what| format!("{}: {what}", pod.name)));
        for pair in objects.windows(2) {
            let complaint = step(pod, pair[0], pair[1]);
            let line = |what| {
                format!(
                    "{}: {what}: {} -> {}",
                    pod.name, pair[0]["status"], pair[1]["status"]
                )
            };
            found.extend(complaint.map(line));
        }
    }
    found
}

fn restarts(pod: &Value) -> i64 {
    container(pod, "main")["restartCount"].as_i64().unwrap_or(0)
}

/// Each instance of a container is one restart more than the one before. The count may rise a
/// status earlier than the new instance shows, as long as it rises.
fn instances(objects: &[&Value]) -> Option<String> {
    let mut current: Option<(String, i64)> = None;
    for object in objects {
        let id = text(container(object, "main"), "/containerID");
        if id.is_empty() {
            continue;
        }
        let count = restarts(object);
        match &current {
            Some((known, _)) if *known == id => {}
            Some((known, first)) if count <= *first => {
                return Some(format!("{known} became {id} with {count} restarts"));
            }
            Some(_) | None => current = Some((id, count)),
        }
    }
    None
}

fn step(pod: &ChaosPod, before: &Value, after: &Value) -> Option<&'static str> {
    if restarts(after) < restarts(before) {
        return Some("the restart count fell");
    }
    if matches!(phase(before), "Succeeded" | "Failed") && phase(before) != phase(after) {
        return Some("a terminal phase changed");
    }
    let ending = after.pointer("/metadata/deletionTimestamp").is_some();
    let flipped = is_ready(before) && !is_ready(after);
    if flipped && pod.kind == Kind::Steady && !pod.hurt && !ending {
        return Some("Ready flipped");
    }
    None
}

/// Files and cgroups of pods that are gone.
pub(super) fn traces(
    scenario: &Scenario,
    nodes: &[String],
    uids: &BTreeMap<String, String>,
) -> Vec<String> {
    let mut left = Vec::new();
    for node in nodes {
        let dir = paths::labs()
            .join(&scenario.layout.name)
            .join("nodes")
            .join(node);
        for (uid, name) in uids {
            let logs = format!("pod-logs/{}_{name}_{uid}", scenario.namespace);
            for path in [dir.join("kubelet/pods").join(uid), dir.join(logs)] {
                if path.exists() {
                    left.push(path.display().to_string());
                }
            }
        }
        let cgroup = std::path::Path::new("/sys/fs/cgroup/memory")
            .join(scenario.layout.cgroup_root(node).trim_start_matches('/'))
            .join("kubepods");
        for uid in uids.keys() {
            let pod = format!("pod{uid}");
            let places = [
                cgroup.join(&pod),
                cgroup.join("burstable").join(&pod),
                cgroup.join("besteffort").join(&pod),
            ];
            left.extend(
                places
                    .iter()
                    .filter(|p| p.exists())
                    .map(|p| p.display().to_string()),
            );
        }
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(kind: Kind) -> ChaosPod {
        ChaosPod {
            name: "p".into(),
            node: "n".into(),
            kind,
            hurt: false,
            deleted: false,
        }
    }

    fn object(ready: &str, phase: &str, restarts: i64, id: &str) -> Value {
        json!({"metadata": {"name": "p"}, "status": {
            "phase": phase,
            "conditions": [{"type": "Ready", "status": ready}],
            "containerStatuses": [{"name": "main", "restartCount": restarts, "containerID": id}],
        }})
    }

    #[test]
    fn a_flip_a_fall_and_a_double_are_complained_of_and_a_true_death_is_not() {
        let steady = pod(Kind::Steady);
        let fine = object("True", "Running", 1, "a");
        assert_eq!(step(&steady, &fine, &fine), None);
        let flipped = object("False", "Running", 1, "a");
        assert_eq!(step(&steady, &fine, &flipped), Some("Ready flipped"));
        let hurt = ChaosPod {
            hurt: true,
            ..steady.clone()
        };
        assert_eq!(step(&hurt, &fine, &flipped), None);
        let fell = object("True", "Running", 0, "a");
        assert_eq!(step(&steady, &fine, &fell), Some("the restart count fell"));
        let other = object("True", "Running", 1, "b");
        assert!(instances(&[&fine, &other]).is_some());
        let next = object("True", "Running", 2, "b");
        assert_eq!(
            instances(&[&fine, &object("False", "Running", 2, "a"), &next]),
            None
        );
        let ended = object("False", "Succeeded", 1, "a");
        assert_eq!(
            step(&pod(Kind::Crasher), &ended, &fine),
            Some("a terminal phase changed")
        );
    }

    #[test]
    fn a_log_with_a_hole_a_repetition_or_a_missing_end_is_noticed() {
        assert_eq!(broken_sequence("0\n1\n2\n", Some(3)), None);
        assert!(broken_sequence("0\n2\n", None).is_some());
        assert!(broken_sequence("0\n0\n", None).is_some());
        assert!(broken_sequence("0\n1\n", Some(3)).is_some());
    }
}
