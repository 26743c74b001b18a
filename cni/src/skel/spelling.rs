//! Names of the runtime's keys. containerd's library gives `portMappings`, `bandwidth`, `ipRanges`
//! and `dns` from structures without names of their own for JSON: their keys begin with a capital
//! letter (`HostPort`, `IngressRate`, `RangeStart`, `Servers`), which plugins in Go read all the same.

use serde_json::{Map, Value};

/// Capabilities whose values come so.
const CAPABILITIES: [&str; 4] = ["portMappings", "bandwidth", "ipRanges", "dns"];

/// Lets the keys of these capabilities begin with a small letter. One that is there in both
/// spellings keeps the value of the right one.
pub(super) fn mend(conf: &mut Map<String, Value>) {
    let Some(Value::Object(runtime)) = conf.get_mut("runtimeConfig") else {
        return;
    };
    for capability in CAPABILITIES {
        if let Some(value) = runtime.get_mut(capability) {
            mend_keys(value);
        }
    }
}

fn mend_keys(value: &mut Value) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(mend_keys),
        Value::Object(object) => {
            let capital = |key: &&String| key.starts_with(|first: char| first.is_ascii_uppercase());
            let keys: Vec<String> = object.keys().filter(capital).cloned().collect();
            for key in keys {
                let mut right = key.clone();
                right
                    .get_mut(..1)
                    .unwrap_or_default()
                    .make_ascii_lowercase();
                if let Some(value) = object.remove(&key) {
                    object.entry(right).or_insert(value);
                }
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn mended(mut conf: Value) -> Value {
        mend(conf.as_object_mut().unwrap());
        conf
    }

    #[test]
    fn what_containerd_gives_is_read_as_the_conventions_name_it() {
        let given = json!({"runtimeConfig": {
            "portMappings": [{"HostPort": 80, "ContainerPort": 8, "Protocol": "tcp", "HostIP": ""}],
            "ipRanges": [[{"Subnet": "10.1.0.0/24", "RangeStart": "10.1.0.9"}]],
            "dns": {"Servers": ["10.0.0.1"], "Searches": null},
        }});
        let wanted = json!({"runtimeConfig": {
            "portMappings": [{"hostPort": 80, "containerPort": 8, "protocol": "tcp", "hostIP": ""}],
            "ipRanges": [[{"subnet": "10.1.0.0/24", "rangeStart": "10.1.0.9"}]],
            "dns": {"servers": ["10.0.0.1"], "searches": null},
        }});
        assert_eq!(mended(given), wanted);
    }

    #[test]
    fn the_right_spelling_wins_and_other_objects_are_left_alone() {
        let given = json!({
            "Bridge": "x",
            "runtimeConfig": {"bandwidth": {"ingressRate": 1, "IngressRate": 2}, "Other": {"A": 1}},
        });
        let wanted = json!({
            "Bridge": "x",
            "runtimeConfig": {"bandwidth": {"ingressRate": 1}, "Other": {"A": 1}},
        });
        assert_eq!(mended(given), wanted);
    }
}
