//! Network lists on disk: which file counts, and what it says.
//!
//! Accepts a list (`plugins: […]`) and, as other runtimes do, a single plugin's object.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::LoadError;
use crate::types::SpecVersion;

/// No sane network list is longer; the file is read whole.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// A network list, checked once.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct NetworkList {
    /// Where it was read from, for messages.
    pub(crate) file: PathBuf,
    /// Name of the network.
    pub(crate) name: String,
    /// The version all its plugins are spoken to in.
    pub(crate) version: SpecVersion,
    /// CHECK is switched off.
    pub(crate) disable_check: bool,
    /// GC is switched off.
    pub(crate) disable_gc: bool,
    /// The chain, first to last; never empty.
    pub(crate) plugins: Vec<PluginConf>,
    /// The whole file, kept in attachment records so that DEL uses what ADD used.
    pub(crate) source: Value,
}

/// One plugin of a list.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct PluginConf {
    /// Name of the executable.
    pub(crate) kind: String,
    /// Capabilities it declared.
    pub(crate) capabilities: Vec<String>,
    /// Its own object, unchanged.
    pub(crate) object: Map<String, Value>,
}

/// The first valid file of `dir` in the order of names, and why earlier ones were passed over.
pub(crate) fn first_valid(dir: &Path) -> Result<(NetworkList, Vec<LoadError>), LoadError> {
    let mut rejected = Vec::new();
    for file in candidates(dir)? {
        match read(&file) {
            Ok(list) => return Ok((list, rejected)),
            Err(error) => rejected.push(error),
        }
    }
    // The first broken file is the one that was meant.
    let first = rejected.into_iter().next();
    Err(first.unwrap_or_else(|| LoadError::Empty {
        dir: dir.to_owned(),
    }))
}

fn candidates(dir: &Path) -> Result<Vec<PathBuf>, LoadError> {
    let list = |source| LoadError::List {
        dir: dir.to_owned(),
        source,
    };
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).map_err(list)? {
        let path = entry.map_err(list)?.path();
        let extension = path.extension().and_then(|e| e.to_str());
        if matches!(extension, Some("conflist" | "conf" | "json")) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn read(file: &Path) -> Result<NetworkList, LoadError> {
    let failed = |source| LoadError::Read {
        file: file.to_owned(),
        source,
    };
    let mut bytes = Vec::new();
    let open = fs::File::open(file).map_err(failed)?;
    open.take(MAX_FILE_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(LoadError::TooLarge {
            file: file.to_owned(),
            limit_bytes: MAX_FILE_BYTES,
        });
    }
    let value = serde_json::from_slice(&bytes).map_err(|source| LoadError::Syntax {
        file: file.to_owned(),
        source,
    })?;
    parse(file, value)
}

/// Checks the contents of `file`.
pub(crate) fn parse(file: &Path, source: Value) -> Result<NetworkList, LoadError> {
    let wrong = |field: &str, problem: String| LoadError::Field {
        file: file.to_owned(),
        field: field.to_owned(),
        problem,
    };
    let Value::Object(top) = &source else {
        return Err(wrong("the file", "is not a JSON object".into()));
    };
    let name = string(top, "name").map_err(|p| wrong("name", p))?;
    if !valid_name(&name) {
        return Err(wrong(
            "name",
            format!("{name:?} may hold only letters, digits, '.', '_', '-'"),
        ));
    }
    let version = version_of(top).map_err(|p| wrong("cniVersion", p))?;
    let plugins = match top.get("plugins") {
        Some(Value::Array(items)) if !items.is_empty() => items
            .iter()
            .enumerate()
            .map(|(index, item)| {
                plugin(item).map_err(|(field, p)| wrong(&format!("plugins[{index}]{field}"), p))
            })
            .collect::<Result<Vec<_>, _>>()?,
        Some(Value::Array(_)) => return Err(wrong("plugins", "is empty".into())),
        Some(_) => return Err(wrong("plugins", "is not a list".into())),
        None => vec![plugin(&source).map_err(|(field, p)| {
            wrong(
                if field.is_empty() {
                    "plugins"
                } else {
                    &field[1..]
                },
                p,
            )
        })?],
    };
    let flag = |key| boolean(top, key).map_err(|p| wrong(key, p));
    Ok(NetworkList {
        file: file.to_owned(),
        name,
        version,
        disable_check: flag("disableCheck")?,
        disable_gc: flag("disableGC")?,
        plugins,
        source,
    })
}

fn plugin(item: &Value) -> Result<PluginConf, (String, String)> {
    let Value::Object(object) = item else {
        return Err((String::new(), "is not a JSON object".into()));
    };
    let kind = string(object, "type").map_err(|p| (".type".to_owned(), p))?;
    // The name becomes a path under the plugin directories; it must stay there.
    if kind.contains('/') || kind == "." || kind == ".." {
        return Err((".type".into(), format!("{kind:?} is not a file name")));
    }
    let mut capabilities = Vec::new();
    match object.get("capabilities") {
        None | Some(Value::Null) => {}
        Some(Value::Object(map)) => {
            for (key, value) in map {
                match value {
                    Value::Bool(true) => capabilities.push(key.clone()),
                    Value::Bool(false) => {}
                    other => {
                        let problem = format!("is {other}, not true or false");
                        return Err((format!(".capabilities.{key}"), problem));
                    }
                }
            }
        }
        Some(other) => return Err((".capabilities".into(), format!("is {other}, not an object"))),
    }
    Ok(PluginConf {
        kind,
        capabilities,
        object: object.clone(),
    })
}

/// `cniVersions` lists what the network can be used with; the newest we speak wins.
fn version_of(top: &Map<String, Value>) -> Result<SpecVersion, String> {
    let mut offered = Vec::new();
    if let Some(list) = top.get("cniVersions") {
        let Value::Array(items) = list else {
            return Err("cniVersions is not a list".into());
        };
        offered.extend(items.iter().filter_map(Value::as_str));
    }
    match top.get("cniVersion") {
        Some(Value::String(text)) => offered.push(text),
        Some(other) => return Err(format!("is {other}, not a string")),
        None if offered.is_empty() => return Err("is missing".into()),
        None => {}
    }
    let spoken = offered.iter().filter_map(|text| text.parse().ok()).max();
    spoken.ok_or_else(|| {
        format!(
            "is {}, but 0.3.0, 0.3.1, 0.4.0, 1.0.0, 1.1.0 are spoken",
            offered.join(", ")
        )
    })
}

fn string(object: &Map<String, Value>, key: &str) -> Result<String, String> {
    match object.get(key) {
        Some(Value::String(text)) if !text.is_empty() => Ok(text.clone()),
        Some(Value::String(_)) => Err("is empty".into()),
        Some(other) => Err(format!("is {other}, not a string")),
        None => Err("is missing".into()),
    }
}

/// Some lists in the field carry booleans as strings; other runtimes accept them.
fn boolean(object: &Map<String, Value>, key: &str) -> Result<bool, String> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(flag)) => Ok(*flag),
        Some(Value::String(text)) if text == "true" => Ok(true),
        Some(Value::String(text)) if text == "false" => Ok(false),
        Some(other) => Err(format!("is {other}, not true or false")),
    }
}

/// The specification's rule for network names and container ids: it also keeps them file names.
pub(crate) fn valid_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: &str) {
        let outcome = parse(
            Path::new("/etc/cni/net.d/10-x.conflist"),
            serde_json::from_str(text).unwrap(),
        );
        let said = match outcome {
            Ok(list) => format!(
                "{} {} {:?}",
                list.name,
                list.version,
                list.plugins
                    .iter()
                    .map(|p| p.kind.as_str())
                    .collect::<Vec<_>>()
            ),
            Err(error) => error.to_string(),
        };
        assert_eq!(
            said.replace("network configuration /etc/cni/net.d/10-x.conflist: ", ""),
            expected
        );
    }

    #[test]
    fn a_list_keeps_its_order() {
        check(
            r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"bridge"},{"type":"portmap"}]}"#,
            r#"n 1.0.0 ["bridge", "portmap"]"#,
        );
    }

    #[test]
    fn a_single_plugin_is_a_list_of_one() {
        check(
            r#"{"cniVersion":"0.4.0","name":"n","type":"bridge"}"#,
            r#"n 0.4.0 ["bridge"]"#,
        );
    }

    #[test]
    fn the_newest_spoken_of_several_versions_wins() {
        check(
            r#"{"cniVersion":"0.4.0","cniVersions":["1.1.0","9.0.0"],"name":"n","type":"b"}"#,
            r#"n 1.1.0 ["b"]"#,
        );
    }

    #[test]
    fn a_bad_field_is_named() {
        check(
            r#"{"cniVersion":"1.0.0","plugins":[{"type":"b"}]}"#,
            "name is missing",
        );
        check(
            r#"{"cniVersion":"1.0.0","name":"n","plugins":[]}"#,
            "plugins is empty",
        );
        check(
            r#"{"cniVersion":"1.0.0","name":"n","plugins":[{}]}"#,
            "plugins[0].type is missing",
        );
        check(
            r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"../sh"}]}"#,
            r#"plugins[0].type "../sh" is not a file name"#,
        );
        check(r#"{"cniVersion":"1.0.0","name":"n"}"#, "type is missing");
        check(
            r#"{"cniVersion":"7","name":"n","type":"b"}"#,
            "cniVersion is 7, but 0.3.0, 0.3.1, 0.4.0, 1.0.0, 1.1.0 are spoken",
        );
        check(
            r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"b","capabilities":{"dns":"yes"}}]}"#,
            r#"plugins[0].capabilities.dns is "yes", not true or false"#,
        );
        check(
            r#"{"cniVersion":"1.0.0","name":"a/b","type":"b"}"#,
            r#"name "a/b" may hold only letters, digits, '.', '_', '-'"#,
        );
    }
}
