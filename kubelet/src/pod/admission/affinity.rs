//! Whether a pod's selectors and tolerations match a node. Pure; the rules of the scheduler.

use k8s_openapi::api::core::v1::{
    NodeSelector, NodeSelectorRequirement, NodeSelectorTerm, Pod, Taint, Toleration,
};
use std::collections::BTreeMap;

/// Labels of the node.
pub type Labels = BTreeMap<String, String>;

/// Whether node selector and required node affinity of the pod match the node.
pub fn matches(pod: &Pod, name: &str, labels: &Labels) -> bool {
    let Some(spec) = &pod.spec else { return true };
    let mut selector = spec.node_selector.iter().flatten();
    if !selector.all(|(key, value)| labels.get(key) == Some(value)) {
        return false;
    }
    let affinity = spec
        .affinity
        .as_ref()
        .and_then(|a| a.node_affinity.as_ref());
    let required = affinity.and_then(|a| {
        a.required_during_scheduling_ignored_during_execution
            .as_ref()
    });
    required.is_none_or(|required| selector_matches(required, name, labels))
}

/// Whether any term of a node selector matches the node.
pub fn selector_matches(selector: &NodeSelector, name: &str, labels: &Labels) -> bool {
    let mut terms = selector.node_selector_terms.iter();
    terms.any(|term| term_matches(term, name, labels))
}

/// A term without any requirement matches nothing.
fn term_matches(term: &NodeSelectorTerm, name: &str, labels: &Labels) -> bool {
    let expressions = term.match_expressions.as_deref().unwrap_or_default();
    let fields = term.match_fields.as_deref().unwrap_or_default();
    if expressions.is_empty() && fields.is_empty() {
        return false;
    }
    let by_label = |r: &NodeSelectorRequirement| holds(r, labels.get(&r.key).map(String::as_str));
    let by_field = |r: &NodeSelectorRequirement| r.key == "metadata.name" && holds(r, Some(name));
    expressions.iter().all(by_label) && fields.iter().all(by_field)
}

/// Whether one requirement holds for a value (none: the key is absent).
fn holds(requirement: &NodeSelectorRequirement, value: Option<&str>) -> bool {
    let values = requirement.values.as_deref().unwrap_or_default();
    let listed = value.is_some_and(|value| values.iter().any(|v| v == value));
    let compare = |less: bool| {
        let number = value.and_then(|v| v.parse::<i64>().ok());
        let bound = values.first().and_then(|v| v.parse::<i64>().ok());
        match (number, bound) {
            (Some(number), Some(bound)) if less => number < bound,
            (Some(number), Some(bound)) => number > bound,
            (_, None) | (None, _) => false,
        }
    };
    match requirement.operator.as_str() {
        "In" => listed,
        "NotIn" => !listed,
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" => compare(false),
        "Lt" => compare(true),
        _ => false,
    }
}

/// Whether a pod tolerates all taints that would end it.
pub fn tolerates(pod: &Pod, taints: &[Taint]) -> bool {
    let tolerations = pod.spec.as_ref().and_then(|s| s.tolerations.as_deref());
    let tolerations = tolerations.unwrap_or_default();
    let mut ending = taints.iter().filter(|t| t.effect == "NoExecute");
    ending.all(|taint| tolerations.iter().any(|t| tolerated(taint, t)))
}

/// Whether a pod tolerates a taint.
pub fn tolerates_taint(pod: &Pod, taint: &Taint) -> bool {
    let tolerations = pod.spec.iter().flat_map(|s| s.tolerations.iter().flatten());
    tolerations.into_iter().any(|t| tolerated(taint, t))
}

fn tolerated(taint: &Taint, toleration: &Toleration) -> bool {
    let empty_or =
        |wish: Option<&String>, real: &str| wish.is_none_or(|wish| wish.is_empty() || wish == real);
    if !empty_or(toleration.effect.as_ref(), &taint.effect)
        || !empty_or(toleration.key.as_ref(), &taint.key)
    {
        return false;
    }
    let value = |v: Option<&String>| v.cloned().unwrap_or_default();
    match toleration.operator.as_deref() {
        None | Some("" | "Equal") => {
            value(toleration.value.as_ref()) == value(taint.value.as_ref())
        }
        Some("Exists") => true,
        Some(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::fixture::pod;
    use serde_json::{Value, json};

    fn labels() -> Labels {
        [("disk", "ssd"), ("cores", "8")]
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .into()
    }

    fn check(spec: Value, expected: bool) {
        let shown = spec.to_string();
        assert_eq!(matches(&pod(spec), "n1", &labels()), expected, "{shown}");
    }

    #[test]
    fn selectors_and_affinity_must_both_match() {
        let affinity = |terms: Value| {
            json!({"containers": [], "affinity": {"nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}})
        };
        let label = |key: &str, operator: &str, values: Value| {
            affinity(
                json!([{"matchExpressions": [{"key": key, "operator": operator, "values": values}]}]),
            )
        };
        check(json!({"containers": []}), true);
        check(
            json!({"containers": [], "nodeSelector": {"disk": "ssd"}}),
            true,
        );
        check(
            json!({"containers": [], "nodeSelector": {"disk": "hdd"}}),
            false,
        );
        check(label("disk", "In", json!(["hdd", "ssd"])), true);
        check(label("disk", "NotIn", json!(["ssd"])), false);
        check(label("gpu", "NotIn", json!(["yes"])), true);
        check(label("disk", "Exists", json!([])), true);
        check(label("disk", "DoesNotExist", json!([])), false);
        check(label("cores", "Gt", json!(["7"])), true);
        check(label("cores", "Lt", json!(["7"])), false);
        check(label("disk", "Gt", json!(["7"])), false);
        check(affinity(json!([])), false);
        check(affinity(json!([{}])), false);
        let field = |name: &str| {
            affinity(
                json!([{"matchFields": [{"key": "metadata.name", "operator": "In", "values": [name]}]}]),
            )
        };
        check(field("n1"), true);
        check(field("n2"), false);
    }

    #[test]
    fn only_taints_that_end_pods_have_to_be_tolerated() {
        let taint = |effect: &str| Taint {
            key: "k".to_owned(),
            value: Some("v".to_owned()),
            effect: effect.to_owned(),
            time_added: None,
        };
        let with = |toleration: Value| pod(json!({"containers": [], "tolerations": [toleration]}));
        let bare = pod(json!({"containers": []}));
        assert!(tolerates(&bare, &[taint("NoSchedule")]));
        assert!(!tolerates(&bare, &[taint("NoExecute")]));
        for toleration in [
            json!({"operator": "Exists"}),
            json!({"key": "k", "operator": "Exists", "effect": "NoExecute"}),
            json!({"key": "k", "value": "v"}),
        ] {
            assert!(tolerates(&with(toleration), &[taint("NoExecute")]));
        }
        for toleration in [
            json!({"key": "k", "value": "w"}),
            json!({"key": "k", "operator": "Exists", "effect": "NoSchedule"}),
        ] {
            assert!(!tolerates(&with(toleration), &[taint("NoExecute")]));
        }
    }
}
