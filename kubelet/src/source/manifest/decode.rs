//! Text to a tree of values to a Pod, with the leniencies of the apiserver's own decoder: unknown
//! fields are dropped, `null` is "not set", amounts may be numbers.

use super::ManifestError;
use k8s_openapi::api::core::v1::Pod;
use serde_json::Value;

/// Fields that hold amounts by name.
const AMOUNTS: [&str; 3] = ["limits", "requests", "overhead"];
/// Fields that hold one amount.
const AMOUNT: [&str; 2] = ["sizeLimit", "divisor"];

/// Longest text in which a wrong value is searched for.
const MAX_SEARCHED: usize = 64 << 10;

/// Reads the first document. JSON is YAML.
pub(super) fn tree(text: &[u8]) -> Result<Value, ManifestError> {
    let text = utf8(text)?;
    let options = options();
    let value = serde_saphyr::from_str_with_options::<Value>(first_document(text), options);
    let mut value = value.map_err(|e| ManifestError::Parse(first_line(&e.to_string())))?;
    if !value.is_object() {
        let what = "it is not an object with apiVersion, kind, metadata and spec";
        return Err(ManifestError::Parse(what.to_owned()));
    }
    normalize(&mut value);
    Ok(value)
}

fn utf8(text: &[u8]) -> Result<&str, ManifestError> {
    let text = std::str::from_utf8(text).map_err(|e| ManifestError::Parse(e.to_string()))?;
    Ok(text.trim_start_matches('\u{feff}'))
}

/// YAML 1.1 as Go's reader takes it.
fn options() -> serde_saphyr::Options {
    serde_saphyr::options! { legacy_octal_numbers: true }
}

/// Messages of the parser draw the place in several lines; a log has one.
fn first_line(message: &str) -> String {
    message.lines().next().unwrap_or_default().to_owned()
}

/// The text up to the second document. Go's reader looks no further either.
fn first_document(text: &str) -> &str {
    let mut begun = false;
    let mut at = 0;
    for line in text.split_inclusive('\n') {
        let marker = line
            .strip_prefix("---")
            .is_some_and(|rest| rest.is_empty() || rest.starts_with(char::is_whitespace));
        let content = line.trim();
        if marker && begun {
            return &text[..at];
        }
        let directive = content.starts_with('%') && !begun;
        begun |= !marker && !content.is_empty() && !content.starts_with('#') && !directive;
        at += line.len();
    }
    text
}

/// Drops nulls and writes amounts as texts.
fn normalize(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|_, v| !v.is_null());
            for (key, inner) in map.iter_mut() {
                if AMOUNTS.contains(&key.as_str()) {
                    let amounts = inner.as_object_mut().into_iter();
                    amounts.flat_map(|m| m.values_mut()).for_each(amount);
                } else if AMOUNT.contains(&key.as_str()) {
                    amount(inner);
                }
                normalize(inner);
            }
        }
        Value::Array(list) => list.iter_mut().for_each(normalize),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

fn amount(value: &mut Value) {
    if let Value::Number(number) = value {
        *value = Value::String(number.to_string());
    }
}

/// Refuses other documents than `v1` `kind`.
pub(super) fn expect_kind(tree: &Value, kind: &str) -> Result<(), ManifestError> {
    let word = |key| tree.get(key).and_then(Value::as_str).unwrap_or_default();
    match (word("apiVersion"), word("kind")) {
        ("v1", found) if found == kind => Ok(()),
        (_, "") => Err(ManifestError::Parse("Object 'Kind' is missing".to_owned())),
        ("", _) => Err(ManifestError::Parse(
            "Object 'apiVersion' is missing".to_owned(),
        )),
        (version, found) => Err(ManifestError::Kind(format!(
            "apiVersion {version:?}, kind {found:?} is not a v1 {kind}"
        ))),
    }
}

/// A Pod of its tree. A field of the wrong type is named by its path.
pub(super) fn typed(mut tree: Value, text: &[u8]) -> Result<Pod, ManifestError> {
    if let Some(map) = tree.as_object_mut() {
        // Items of a list may leave them out.
        map.entry("apiVersion").or_insert_with(|| "v1".into());
        map.entry("kind").or_insert_with(|| "Pod".into());
    }
    let error = match serde_json::from_value::<Pod>(tree.clone()) {
        Ok(pod) => return Ok(pod),
        Err(error) => error.to_string(),
    };
    // A search: not for texts that nobody wrote by hand.
    let place = (text.len() <= MAX_SEARCHED)
        .then(|| culprit(&tree))
        .flatten();
    let place = place.or_else(|| located(text));
    Err(ManifestError::Parse(match place {
        Some(place) => format!("{place}: {error}"),
        None => error,
    }))
}

/// The path of the deepest value without which its parents could be read.
fn culprit(tree: &Value) -> Option<String> {
    /// Values tried; a manifest has some hundred.
    const MAX_TRIES: usize = 4096;
    let mut tries = MAX_TRIES;
    let mut path: Vec<String> = Vec::new();
    loop {
        let here = tree.pointer(&pointer(&path))?;
        let keys: Vec<String> = match here {
            Value::Object(map) => map.keys().cloned().collect(),
            Value::Array(list) => (0..list.len()).map(|i| i.to_string()).collect(),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => Vec::new(),
        };
        let guilty = keys.into_iter().find(|key| {
            tries = tries.saturating_sub(1);
            tries > 0 && reads_without(tree, &path, key)
        });
        match guilty {
            Some(key) => path.push(key),
            None if path.is_empty() => return None,
            None => return Some(dotted(&path)),
        }
    }
}

/// Whether the tree is a Pod once the value is out of it.
fn reads_without(tree: &Value, parent: &[String], key: &str) -> bool {
    let mut copy = tree.clone();
    match copy.pointer_mut(&pointer(parent)) {
        Some(Value::Object(map)) => {
            map.remove(key);
        }
        Some(Value::Array(list)) => {
            let index = key.parse::<usize>().ok().filter(|i| *i < list.len());
            index.map(|i| list.remove(i));
        }
        Some(Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_)) | None => {}
    }
    serde_json::from_value::<Pod>(copy).is_ok()
}

fn pointer(path: &[String]) -> String {
    let escape = |key: &String| format!("/{}", key.replace('~', "~0").replace('/', "~1"));
    path.iter().map(escape).collect()
}

/// `spec.containers[0].image`.
fn dotted(path: &[String]) -> String {
    let mut text = String::new();
    for key in path {
        if key.bytes().all(|b| b.is_ascii_digit()) {
            text.push_str(&format!("[{key}]"));
        } else {
            if !text.is_empty() {
                text.push('.');
            }
            text.push_str(key);
        }
    }
    text
}

/// Line and column, when several values are wrong and no single one can be named.
fn located(text: &[u8]) -> Option<String> {
    let text = utf8(text).ok()?;
    let read = serde_saphyr::from_str_with_options::<Pod>(first_document(text), options());
    read.err().map(|e| first_line(&e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_document_counts() {
        let text = "# head\n---\n%a\na: 1\n--- # next\nb: 2\n";
        assert!(first_document(text).ends_with("a: 1\n"));
        assert_eq!(first_document("a: |\n  ---\nb: 1\n"), "a: |\n  ---\nb: 1\n");
        assert_eq!(first_document("---\na: 1"), "---\na: 1");
    }
}
