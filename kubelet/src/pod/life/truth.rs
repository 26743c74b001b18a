//! What may be told of a pod after what was told before. Pure.

use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

/// A strategic merge as far as a pod status needs it.
pub(super) fn merge(status: &mut Value, patch: &Value) {
    for (key, value) in patch.as_object().into_iter().flatten() {
        if key == "conditions" {
            let mut all: BTreeMap<String, Value> = BTreeMap::new();
            let known = status[key].as_array().cloned().unwrap_or_default();
            for condition in known.iter().chain(value.as_array().into_iter().flatten()) {
                let type_ = condition["type"].as_str().unwrap_or_default().to_owned();
                all.insert(type_, condition.clone());
            }
            status[key] = all.into_values().collect();
        } else if value.is_null() {
            status.as_object_mut().map(|s| s.remove(key));
        } else if let Some(items) = value.as_array() {
            let real = items.iter().filter(|i| i.get("$patch").is_none());
            status[key] = real.cloned().collect();
        } else {
            status[key] = value.clone();
        }
    }
}

pub(super) fn ended(status: &Value) -> bool {
    matches!(status["phase"].as_str(), Some("Succeeded" | "Failed"))
}

fn containers(status: &Value) -> Vec<Value> {
    let lists = ["initContainerStatuses", "containerStatuses"];
    let all = lists.iter().flat_map(|l| status[*l].as_array().cloned());
    all.flatten().collect()
}

/// What cannot be true of a status after the one before it.
pub(super) fn impossible(before: &Value, after: &Value, unready: &BTreeSet<String>) -> Vec<String> {
    let mut wrong = Vec::new();
    if ended(before) && before["phase"] != after["phase"] {
        wrong.push(format!(
            "phase {} became {}",
            before["phase"], after["phase"]
        ));
    }
    let newer = containers(after);
    for old in containers(before) {
        let Some(new) = newer.iter().find(|c| c["name"] == old["name"]) else {
            wrong.push(format!("the status of {} vanished", old["name"]));
            continue;
        };
        if new["restartCount"].as_i64() < old["restartCount"].as_i64() {
            wrong.push(format!("fewer restarts: {old} then {new}"));
        }
        let id = new["containerID"].as_str().unwrap_or_default();
        let same = old["containerID"] == new["containerID"];
        let runs = |c: &Value| !c["state"]["running"].is_null();
        let flips = old["ready"] == json!(true) && new["ready"] == json!(false);
        if same && runs(&old) && runs(new) && flips && !unready.contains(id) {
            wrong.push(format!(
                "{id} was told not ready, and nobody had found it so"
            ));
        }
    }
    wrong
}
