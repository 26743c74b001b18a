//! Reads the files and the flags into a checked [`Config`].

use super::check::{self, Problem};
use super::flags::{FlagError, Flags};
use super::resolve;
use super::schema::{Field, KUBELET_CONFIGURATION, RUNTIME_CONFIGURATION};
use super::{Config, host};
use serde_json::{Map, Value};
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// Longest configuration file read; the whole reference with every field is 60 kB.
const MAX_FILE: u64 = 4 << 20;

/// Why the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file cannot be read.
    #[error("read configuration {}: {cause}", path.display())]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
    /// Not YAML.
    #[error("read configuration {}: {message}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// What the parser said, with line and column.
        message: String,
    },
    /// Another document than expected.
    #[error("configuration {}: {what}", path.display())]
    Kind {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// Fields that are wrong.
    #[error("configuration {origin}:{}", listed(problems))]
    Fields {
        /// File or "flags".
        origin: String,
        /// All of them.
        problems: Vec<Problem>,
    },
    /// A flag that is wrong.
    #[error("flag {0}")]
    Flag(#[from] FlagError),
    /// A fact about the machine that is needed and cannot be had.
    #[error("{0}")]
    Host(String),
}

fn listed(problems: &[Problem]) -> String {
    if let [only] = problems {
        return format!(" {only}");
    }
    let mut text = String::new();
    for problem in problems {
        let _ = write!(text, "\n  {problem}");
    }
    text
}

/// Reads everything the flags point to and resolves it. Blocking; for the start of the program.
pub fn load(flags: &Flags) -> Result<Config, ConfigError> {
    let mut notes = flags.notes.clone();
    let mut tree = Map::new();
    if let Some(path) = &flags.config {
        tree = kubelet_document(path, &mut notes)?;
    }
    if let Some(dir) = &flags.config_dir {
        for path in drop_ins(dir)? {
            check::merge(&mut tree, kubelet_document(&path, &mut notes)?);
        }
    }
    if flags.config.is_some() {
        relative_to(&mut tree, flags.config.as_deref());
    }
    let findings = check::check(&Value::Object(flags.fields.clone()), KUBELET_CONFIGURATION);
    refuse("flags", findings.problems)?;
    check::merge(&mut tree, flags.fields.clone());
    let runtime = match &flags.runtime_config {
        Some(path) => document(path, RUNTIME_CONFIGURATION, &mut notes)?,
        None => Map::new(),
    };
    let facts = host::facts(flags.kubeconfig.as_deref());
    resolve::resolve(flags, tree, &runtime, facts, notes)
}

fn refuse(origin: &str, problems: Vec<Problem>) -> Result<(), ConfigError> {
    if problems.is_empty() {
        return Ok(());
    }
    Err(ConfigError::Fields {
        origin: origin.to_owned(),
        problems,
    })
}

fn kubelet_document(
    path: &Path,
    notes: &mut BTreeSet<String>,
) -> Result<Map<String, Value>, ConfigError> {
    let map = document(path, KUBELET_CONFIGURATION, notes)?;
    let expect = |key: &str, wanted: &str| match map.get(key).and_then(Value::as_str) {
        Some(found) if found == wanted => Ok(()),
        found => Err(ConfigError::Kind {
            path: path.to_owned(),
            what: format!(
                "{key} is {}, expected {wanted:?}",
                found.map_or_else(|| "missing".to_owned(), |f| format!("{f:?}"))
            ),
        }),
    };
    expect("kind", "KubeletConfiguration")?;
    expect("apiVersion", "kubelet.config.k8s.io/v1beta1")?;
    Ok(map)
}

fn document(
    path: &Path,
    fields: &[Field],
    notes: &mut BTreeSet<String>,
) -> Result<Map<String, Value>, ConfigError> {
    let text = read(path)?;
    let value = parse(&text).map_err(|message| ConfigError::Syntax {
        path: path.to_owned(),
        message,
    })?;
    let value = if value.is_null() {
        Value::Object(Map::new())
    } else {
        value
    };
    let findings = check::check(&value, fields);
    refuse(&path.display().to_string(), findings.problems)?;
    if !findings.inert.is_empty() {
        let names: Vec<_> = findings.inert.into_iter().collect();
        notes.insert(format!(
            "fields of {} that have no effect in this agent: {}",
            path.display(),
            names.join(", ")
        ));
    }
    match value {
        Value::Object(map) => Ok(map),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => {
            Ok(Map::new())
        }
    }
}

fn read(path: &Path) -> Result<String, ConfigError> {
    let failed = |cause| ConfigError::Read {
        path: path.to_owned(),
        cause,
    };
    let meta = std::fs::metadata(path).map_err(failed)?;
    if meta.len() > MAX_FILE {
        let cause = std::io::Error::other(format!("{} bytes is more than {MAX_FILE}", meta.len()));
        return Err(failed(cause));
    }
    std::fs::read_to_string(path).map_err(failed)
}

/// YAML 1.1 as Go's reader takes it: `0644` is octal, `yes` is a boolean.
fn parse(text: &str) -> Result<Value, String> {
    let options = serde_saphyr::options! { legacy_octal_numbers: true };
    serde_saphyr::from_str_with_options::<Value>(text, options).map_err(|e| e.to_string())
}

/// `*.conf` of a directory in name order; sub-directories are walked like the stock kubelet does.
fn drop_ins(dir: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let failed = |cause| ConfigError::Read {
        path: dir.to_owned(),
        cause,
    };
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.is_dir() {
            found.extend(drop_ins(&path)?);
        } else if path.extension().is_some_and(|e| e == "conf") {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// Relative paths in the file are relative to the file's directory, as with the stock kubelet.
fn relative_to(tree: &mut Map<String, Value>, file: Option<&Path>) {
    let Some(dir) = file.and_then(Path::parent) else {
        return;
    };
    let fix = |value: Option<&mut Value>| {
        if let Some(Value::String(text)) = value
            && !text.is_empty()
            && !Path::new(text.as_str()).is_absolute()
        {
            *text = dir.join(text.as_str()).display().to_string();
        }
    };
    for key in [
        "staticPodPath",
        "tlsCertFile",
        "tlsPrivateKeyFile",
        "resolvConf",
        "podLogsDir",
    ] {
        fix(tree.get_mut(key));
    }
    let ca = tree
        .get_mut("authentication")
        .and_then(|a| a.get_mut("x509"))
        .and_then(|x| x.get_mut("clientCAFile"));
    fix(ca);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::IpAddr;

    const HEAD: &str = "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n";

    fn flags_for(dir: &Path, yaml: &str) -> Flags {
        let path = dir.join("kubelet.yaml");
        std::fs::write(&path, format!("{HEAD}{yaml}")).unwrap();
        Flags {
            config: Some(path),
            hostname_override: Some("node-1".to_owned()),
            node_ips: vec![IpAddr::from([10, 0, 0, 5])],
            ..Flags::default()
        }
    }

    fn load_yaml(yaml: &str) -> Result<Config, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        load(&flags_for(dir.path(), yaml))
    }

    #[test]
    fn a_missing_file_is_named() {
        let flags = Flags {
            config: Some(PathBuf::from("/nonexistent/kubelet.yaml")),
            ..Flags::default()
        };
        let message = load(&flags).unwrap_err().to_string();
        assert!(message.starts_with("read configuration /nonexistent/kubelet.yaml: No such file"));
    }

    #[test]
    fn broken_yaml_names_file_and_line() {
        let message = load_yaml("maxPods: [1\n").unwrap_err().to_string();
        assert!(message.contains("kubelet.yaml"), "{message}");
        assert!(message.contains("line"), "{message}");
    }

    #[test]
    fn a_foreign_document_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.yaml");
        std::fs::write(
            &path,
            "apiVersion: kubelet.config.k8s.io/v1\nkind: KubeletConfiguration\n",
        )
        .unwrap();
        let flags = Flags {
            config: Some(path),
            ..Flags::default()
        };
        let message = load(&flags).unwrap_err().to_string();
        assert!(
            message.contains("apiVersion is \"kubelet.config.k8s.io/v1\", expected"),
            "{message}"
        );
    }

    #[test]
    fn every_wrong_field_is_listed() {
        let message = load_yaml("maxPods: \"5\"\nclusterDns: [a]\n")
            .unwrap_err()
            .to_string();
        assert!(
            message.contains("maxPods: \"5\" is not a whole number"),
            "{message}"
        );
        assert!(
            message.contains("clusterDns: there is no such field; did you mean \"clusterDNS\"?")
        );
    }

    #[test]
    fn flags_win_over_drop_ins_and_these_over_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let mut flags = flags_for(dir.path(), "maxPods: 10\nclusterDomain: a.b\nport: 1111\n");
        let drop_dir = dir.path().join("conf.d");
        std::fs::create_dir(&drop_dir).unwrap();
        std::fs::write(
            drop_dir.join("10-a.conf"),
            format!("{HEAD}maxPods: 20\nport: 2222\n"),
        )
        .unwrap();
        std::fs::write(drop_dir.join("20-b.conf"), format!("{HEAD}port: 3333\n")).unwrap();
        std::fs::write(drop_dir.join("30-c.yaml"), "not read").unwrap();
        flags.config_dir = Some(drop_dir);
        flags.fields.insert("maxPods".to_owned(), 30.into());
        let config = load(&flags).unwrap();
        assert_eq!(config.max_pods, 30);
        assert_eq!(config.server.address.port(), 3333);
        assert_eq!(config.cluster_domain, "a.b");
    }

    #[test]
    fn octal_numbers_are_go_s() {
        assert_eq!(load_yaml("maxPods: 0144\n").unwrap().max_pods, 100);
    }

    #[test]
    fn fields_without_effect_make_one_note() {
        let config = load_yaml("kubeAPIQPS: 50\nmaxOpenFiles: 100\n").unwrap();
        let notes: Vec<_> = config
            .notes
            .iter()
            .filter(|n| n.contains("no effect"))
            .collect();
        assert_eq!(notes.len(), 1);
        assert!(notes[0].contains("kubeAPIQPS, maxOpenFiles"), "{notes:?}");
    }

    #[test]
    fn relative_paths_are_beside_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let flags = flags_for(
            dir.path(),
            "authentication: {x509: {clientCAFile: ca.crt}}\n",
        );
        let config = load(&flags).unwrap();
        assert_eq!(config.server.client_ca_file, dir.path().join("ca.crt"));
    }
}
