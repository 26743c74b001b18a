//! The smallest patch that brings the apiserver's pod status to ours. Pure.

use super::conditions::{OWNED, is_ours};
use k8s_openapi::api::core::v1::{PodCondition, PodStatus};
use serde_json::{Map, Value, json};

/// Fields of the status this node writes. Others belong to the apiserver or other controllers.
const FIELDS: [&str; 15] = [
    "observedGeneration",
    "phase",
    "reason",
    "message",
    "hostIP",
    "hostIPs",
    "podIP",
    "podIPs",
    "startTime",
    "conditions",
    "initContainerStatuses",
    "containerStatuses",
    "ephemeralContainerStatuses",
    "allocatedResources",
    "resources",
];

/// Lists the apiserver merges by key, and therefore would never shrink without being told to.
const MERGED_LISTS: [&str; 2] = ["hostIPs", "podIPs"];

/// A strategic merge patch from `base` to `wanted` with the UID as precondition; none when they
/// agree in all fields we own.
pub(super) fn patch(uid: &str, base: &PodStatus, wanted: &PodStatus) -> Option<Value> {
    let base = owned_fields(base);
    let wanted = owned_fields(wanted);
    let mut changes = Map::new();
    for field in FIELDS {
        let (old, new) = (base.get(field), wanted.get(field));
        if old == new {
            continue;
        }
        if field == "conditions" {
            changes.insert(field.to_owned(), conditions(old, new));
            continue;
        }
        let mut new = new.cloned().unwrap_or(Value::Null);
        if old.is_some()
            && let Value::Object(fields) = &mut new
        {
            // Merged key by key otherwise.
            fields.insert("$patch".to_owned(), json!("replace"));
        }
        if MERGED_LISTS.contains(&field)
            && old.is_some()
            && let Value::Array(items) = &mut new
        {
            items.insert(0, json!({"$patch": "replace"}));
        }
        changes.insert(field.to_owned(), new);
    }
    if changes.is_empty() {
        return None;
    }
    Some(json!({"metadata": {"uid": uid}, "status": changes}))
}

/// The conditions that changed. The apiserver merges them by type and field by field: a reason
/// that is not there any more has to be taken away in so many words.
fn conditions(old: Option<&Value>, new: Option<&Value>) -> Value {
    let list = |v: Option<&Value>| v.and_then(Value::as_array).cloned().unwrap_or_default();
    let (old, new) = (list(old), list(new));
    let gone: Vec<Value> = old
        .iter()
        .filter(|o| !new.iter().any(|n| n["type"] == o["type"]))
        .map(|o| json!({"$patch": "delete", "type": o["type"]}))
        .collect();
    let changed = new.into_iter().filter_map(|mut condition| {
        let before = old.iter().find(|o| o["type"] == condition["type"]);
        if before == Some(&condition) {
            return None;
        }
        let vanished: Vec<String> = before
            .and_then(Value::as_object)
            .into_iter()
            .flat_map(Map::keys)
            .filter(|key| condition.get(key.as_str()).is_none())
            .cloned()
            .collect();
        for key in vanished {
            condition[key] = Value::Null;
        }
        Some(condition)
    });
    changed.chain(gone).collect()
}

/// The fields we own as JSON: times in whole seconds, as the apiserver keeps them. Conditions are
/// only ours, sorted, because the apiserver keeps an order of its own.
fn owned_fields(status: &PodStatus) -> Map<String, Value> {
    let mut conditions: Vec<PodCondition> = status
        .conditions
        .iter()
        .flatten()
        .filter(|c| is_ours(c))
        .cloned()
        .collect();
    conditions.sort_by_key(|c| OWNED.iter().position(|t| *t == c.type_));
    for condition in &mut conditions {
        condition.last_probe_time = None;
    }
    let status = PodStatus {
        conditions: Some(conditions).filter(|c| !c.is_empty()),
        ..status.clone()
    };
    match serde_json::to_value(&status) {
        Ok(Value::Object(fields)) => fields,
        // A status is always an object.
        Ok(_) | Err(_) => Map::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::PodIP;

    #[test]
    fn nothing_is_sent_when_only_foreign_conditions_differ() {
        let base = PodStatus {
            conditions: Some(vec![PodCondition {
                type_: "example.com/gate".to_owned(),
                status: "True".to_owned(),
                ..PodCondition::default()
            }]),
            phase: Some("Running".to_owned()),
            ..PodStatus::default()
        };
        let wanted = PodStatus {
            phase: Some("Running".to_owned()),
            ..PodStatus::default()
        };
        assert_eq!(patch("u", &base, &wanted), None);
    }

    #[test]
    fn only_changed_conditions_are_sent_and_a_vanished_reason_is_null() {
        let condition = |type_: &str, status: &str, reason: Option<&str>| PodCondition {
            type_: type_.to_owned(),
            status: status.to_owned(),
            reason: reason.map(str::to_owned),
            ..PodCondition::default()
        };
        let with = |ready| PodStatus {
            conditions: Some(vec![condition("PodScheduled", "True", None), ready]),
            ..PodStatus::default()
        };
        let base = with(condition("Ready", "False", Some("ContainersNotReady")));
        let wanted = with(condition("Ready", "True", None));
        let patch = patch("u", &base, &wanted).unwrap();
        let sent = &patch["status"]["conditions"];
        assert_eq!(
            *sent,
            json!([{"type": "Ready", "status": "True", "reason": null}])
        );
    }

    #[test]
    fn a_condition_of_ours_that_is_over_is_deleted() {
        let with = |types: &[&str]| PodStatus {
            conditions: Some(
                types
                    .iter()
                    .map(|t| PodCondition {
                        type_: (*t).to_owned(),
                        status: "True".to_owned(),
                        ..PodCondition::default()
                    })
                    .collect(),
            ),
            ..PodStatus::default()
        };
        let base = with(&["PodResizeInProgress", "PodScheduled"]);
        let patch = patch("u", &base, &with(&["PodScheduled"])).unwrap();
        assert_eq!(
            patch["status"]["conditions"],
            json!([{"$patch": "delete", "type": "PodResizeInProgress"}])
        );
    }

    #[test]
    fn a_changed_address_replaces_the_list_and_a_vanished_field_is_null() {
        let ip = |ip: &str| Some(vec![PodIP { ip: ip.to_owned() }]);
        let base = PodStatus {
            pod_ips: ip("10.0.0.1"),
            reason: Some("X".to_owned()),
            ..PodStatus::default()
        };
        let wanted = PodStatus {
            pod_ips: ip("10.0.0.2"),
            ..PodStatus::default()
        };
        let patch = patch("u", &base, &wanted).unwrap();
        assert_eq!(
            patch,
            json!({"metadata": {"uid": "u"}, "status": {
                "reason": null,
                "podIPs": [{"$patch": "replace"}, {"ip": "10.0.0.2"}],
            }})
        );
    }
}
