//! Holds a tree of values against [`super::schema`] and says what is wrong, by path. Pure.

use super::duration;
use super::schema::{Field, Kind, QUIET};
use crate::quantity::Quantity;
use serde_json::{Map, Value};
use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;

/// Characters of an offending value that are shown.
const SHOWN: usize = 80;

/// One wrong field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Where, e.g. `authentication.webhook.cacheTTL`.
    pub path: String,
    /// What is wrong and what would be right.
    pub what: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path, self.what)
    }
}

/// What a check found.
#[derive(Debug, Default)]
pub struct Findings {
    /// Errors.
    pub problems: Vec<Problem>,
    /// Fields that were set but change nothing here.
    pub inert: BTreeSet<String>,
}

/// Checks an object against its fields.
pub fn check(value: &Value, fields: &[Field]) -> Findings {
    let mut findings = Findings::default();
    object(value, fields, "", &mut findings);
    findings
}

fn object(value: &Value, fields: &[Field], path: &str, findings: &mut Findings) {
    let Some(map) = value.as_object() else {
        findings.wrong(path, value, "an object");
        return;
    };
    for (key, value) in map {
        let at = join(path, key);
        let Some(field) = fields.iter().find(|f| f.name == key) else {
            findings.unknown(&at, key, fields);
            continue;
        };
        if value.is_null() {
            continue;
        }
        if !field.works && !is_empty(value) && !QUIET.contains(&field.name) {
            findings.inert.insert(at.clone());
        }
        one(value, field.kind, &at, findings);
    }
}

fn one(value: &Value, kind: Kind, path: &str, findings: &mut Findings) {
    let fine = match kind {
        Kind::Any => true,
        Kind::Bool => value.is_boolean(),
        Kind::Int(low, high) => value.as_i64().is_some_and(|n| (low..=high).contains(&n)),
        Kind::Number(low, high) => value.as_f64().is_some_and(|n| (low..=high).contains(&n)),
        Kind::Text => value.is_string(),
        Kind::Duration => value.as_str().is_some_and(|t| duration::parse(t).is_some()),
        Kind::Quantity => is_quantity(value),
        Kind::Ip => value.as_str().is_some_and(|t| t.parse::<IpAddr>().is_ok()),
        Kind::OneOf(words) => value.as_str().is_some_and(|t| words.contains(&t)),
        Kind::List(inner) => return list(value, *inner, path, findings),
        Kind::Map(inner) => return map(value, *inner, path, findings),
        Kind::Object(fields) => return object(value, fields, path, findings),
    };
    if !fine {
        findings.wrong(path, value, &wanted(kind));
    }
}

fn list(value: &Value, inner: Kind, path: &str, findings: &mut Findings) {
    let Some(items) = value.as_array() else {
        findings.wrong(path, value, "a list");
        return;
    };
    for (number, item) in items.iter().enumerate() {
        one(item, inner, &format!("{path}[{number}]"), findings);
    }
}

fn map(value: &Value, inner: Kind, path: &str, findings: &mut Findings) {
    let Some(entries) = value.as_object() else {
        findings.wrong(path, value, "an object");
        return;
    };
    for (key, item) in entries {
        one(item, inner, &format!("{path}[{key:?}]"), findings);
    }
}

fn is_quantity(value: &Value) -> bool {
    value
        .as_str()
        .is_some_and(|t| Quantity::parse(t).is_ok_and(|q| !q.is_negative()))
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(b) => !b,
        Value::Number(n) => n.as_f64() == Some(0.0),
        Value::String(s) => s.is_empty() || duration::parse(s) == Some(std::time::Duration::ZERO),
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.values().all(is_empty),
    }
}

/// What would be right, in words.
fn wanted(kind: Kind) -> String {
    match kind {
        Kind::Any => "anything".to_owned(),
        Kind::Bool => "true or false".to_owned(),
        Kind::Int(low, high) => match (low, high) {
            (0, high) if high >= i64::from(i32::MAX) => "a whole number, 0 or more".to_owned(),
            (low, high) if low <= i64::from(i32::MIN) && high >= i64::from(i32::MAX) => {
                "a whole number".to_owned()
            }
            (low, high) => format!("a whole number from {low} to {high}"),
        },
        Kind::Number(low, high) => format!("a number from {low} to {high}"),
        Kind::Text => "text (in quotes if it looks like a number)".to_owned(),
        Kind::Duration => "a duration such as \"10s\" or \"1m30s\"".to_owned(),
        Kind::Quantity => "a quantity in quotes such as \"500m\" or \"100Mi\"".to_owned(),
        Kind::Ip => "an IP address".to_owned(),
        Kind::OneOf(words) => {
            let words: Vec<_> = words.iter().map(|w| format!("{w:?}")).collect();
            format!("one of {}", words.join(", "))
        }
        Kind::List(_) => "a list".to_owned(),
        Kind::Map(_) | Kind::Object(_) => "an object".to_owned(),
    }
}

impl Findings {
    fn wrong(&mut self, path: &str, value: &Value, wanted: &str) {
        let path = if path.is_empty() { "(document)" } else { path };
        self.problems.push(Problem {
            path: path.to_owned(),
            what: format!("{} is not {wanted}", shown(value)),
        });
    }

    fn unknown(&mut self, path: &str, key: &str, fields: &[Field]) {
        let near = fields
            .iter()
            .map(|f| {
                (
                    distance(&f.name.to_lowercase(), &key.to_lowercase()),
                    f.name,
                )
            })
            .filter(|(d, _)| *d <= key.len() / 3)
            .min();
        let hint = near.map_or_else(String::new, |(_, name)| format!("; did you mean {name:?}?"));
        self.problems.push(Problem {
            path: path.to_owned(),
            what: format!("there is no such field{hint}"),
        });
    }
}

fn join(path: &str, key: &str) -> String {
    if path.is_empty() {
        key.to_owned()
    } else {
        format!("{path}.{key}")
    }
}

fn shown(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() <= SHOWN {
        return text;
    }
    text.chars().take(SHOWN).collect::<String>() + "…"
}

/// Edit distance, for "did you mean".
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut corner = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let change = corner + usize::from(ca != *cb);
            corner = row[j + 1];
            row[j + 1] = change.min(row[j] + 1).min(corner + 1);
        }
    }
    row[b.len()]
}

/// Puts `over` on top of `base`: objects are merged, anything else is replaced; null changes
/// nothing. This is how drop-ins add to the main file.
pub fn merge(base: &mut Map<String, Value>, over: Map<String, Value>) {
    for (key, value) in over {
        match (base.get_mut(&key), value) {
            (_, Value::Null) => {}
            (Some(Value::Object(below)), Value::Object(above)) => merge(below, above),
            (_, value) => {
                base.insert(key, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::schema::KUBELET_CONFIGURATION;
    use super::*;
    use serde_json::json;

    fn problems(value: &Value) -> Vec<String> {
        let found = check(value, KUBELET_CONFIGURATION).problems;
        found.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_wrong_type_is_named_by_path_value_and_remedy() {
        let found = problems(&json!({"authentication": {"webhook": {"cacheTTL": 5}}}));
        assert_eq!(
            found,
            ["authentication.webhook.cacheTTL: 5 is not a duration such as \"10s\" or \"1m30s\""]
        );
        assert_eq!(
            problems(&json!({"clusterDNS": ["10.0.0.10", "dns"]})),
            ["clusterDNS[1]: \"dns\" is not an IP address"]
        );
    }

    #[test]
    fn an_unknown_field_is_named_with_its_likely_spelling() {
        let found = problems(&json!({"maxPod": 5, "authentication": {"x508": {}}, "zz": 1}));
        assert_eq!(
            found,
            [
                "authentication.x508: there is no such field; did you mean \"x509\"?",
                "maxPod: there is no such field; did you mean \"maxPods\"?",
                "zz: there is no such field"
            ]
        );
    }

    #[test]
    fn fields_without_effect_are_collected_unless_they_say_nothing() {
        let value = json!({
            "shutdownGracePeriod": "0s",
            "shutdownGracePeriodCriticalPods": "10s",
            "memorySwap": {},
            "rotateCertificates": true,
            "tracing": null
        });
        let found = check(&value, KUBELET_CONFIGURATION);
        assert!(found.problems.is_empty());
        let inert: Vec<_> = found.inert.into_iter().collect();
        assert_eq!(inert, ["shutdownGracePeriodCriticalPods"]);
    }

    #[test]
    fn drop_ins_merge_objects_and_replace_the_rest() {
        let Value::Object(mut base) = json!({"a": {"b": 1, "c": 2}, "l": [1, 2], "n": 1}) else {
            unreachable!()
        };
        let Value::Object(over) = json!({"a": {"c": 3}, "l": [4], "n": null}) else {
            unreachable!()
        };
        merge(&mut base, over);
        assert_eq!(
            Value::Object(base),
            json!({"a": {"b": 1, "c": 3}, "l": [4], "n": 1})
        );
    }
}
