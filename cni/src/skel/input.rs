//! What a plugin is given, checked.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;

use serde_json::{Map, Value};

use super::spelling;
use crate::invoke::{AttachmentKey, Verb, valid_ifname, valid_name};
use crate::ipam::Owner;
use crate::types::{AttachResult, CniError, ErrorCode, SpecVersion, UnknownVersion};

/// The variables of the environment that concern a plugin.
#[derive(Debug, Clone, Default)]
pub struct Environment(BTreeMap<String, OsString>);

impl Environment {
    /// Of this process.
    #[must_use]
    pub fn of_process() -> Self {
        let known = |name: &str| name.starts_with("CNI_") || name == "PATH";
        let all = std::env::vars_os().filter_map(|(k, v)| k.into_string().ok().map(|k| (k, v)));
        Self(all.filter(|(name, _)| known(name)).collect())
    }

    /// With one more variable.
    #[must_use]
    pub fn with(mut self, name: &str, value: &str) -> Self {
        self.0.insert(name.to_owned(), value.into());
        self
    }

    /// All of them, for a delegated plugin.
    pub(super) fn pairs(&self) -> Vec<(OsString, OsString)> {
        self.0
            .iter()
            .map(|(name, value)| (name.into(), value.clone()))
            .collect()
    }

    fn text(&self, name: &str) -> Result<Option<&str>, CniError> {
        match self.0.get(name).map(|value| value.to_str()) {
            None | Some(Some("")) => Ok(None),
            Some(Some(text)) => Ok(Some(text)),
            Some(None) => Err(invalid(format!("{name} is not UTF-8"))),
        }
    }

    fn needed(&self, name: &str) -> Result<&str, CniError> {
        self.text(name)?
            .ok_or_else(|| invalid(format!("{name} is missing")))
    }

    pub(super) fn verb(&self) -> Result<Verb, CniError> {
        let verbs = [
            Verb::Add,
            Verb::Del,
            Verb::Check,
            Verb::Gc,
            Verb::Status,
            Verb::Version,
        ];
        let asked = self.needed("CNI_COMMAND")?;
        let known = verbs.into_iter().find(|verb| verb.as_str() == asked);
        known.ok_or_else(|| {
            let verbs = "ADD, DEL, CHECK, GC, STATUS, VERSION";
            invalid(format!("CNI_COMMAND {asked:?} is none of {verbs}"))
        })
    }
}

fn invalid(msg: String) -> CniError {
    CniError::new(ErrorCode::InvalidEnvironment, msg)
}

/// A plugin's configuration: the part every plugin has.
#[derive(Debug, Clone)]
pub struct Conf {
    /// The version spoken in this call.
    pub version: SpecVersion,
    /// Name of the network.
    pub name: String,
    /// All of it, own keys included.
    pub object: Map<String, Value>,
}

impl Conf {
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, CniError> {
        let value: Value = serde_json::from_slice(bytes).map_err(|e| {
            CniError::caused(ErrorCode::Decode, "the configuration is not JSON", &e)
        })?;
        let Value::Object(mut object) = value else {
            return Err(CniError::new(
                ErrorCode::Decode,
                "the configuration is no JSON object",
            ));
        };
        spelling::mend(&mut object);
        // The specification: without a version it is 0.1.0, which we do not speak.
        let version = match object.get("cniVersion") {
            None => Err(UnknownVersion("0.1.0".into())),
            Some(Value::String(text)) => text.parse(),
            Some(other) => Err(UnknownVersion(other.to_string())),
        };
        let version =
            version.map_err(|e| CniError::new(ErrorCode::IncompatibleVersion, e.to_string()))?;
        let name = object
            .get("name")
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned();
        if !valid_name(&name) {
            let msg = format!("name {name:?} may hold only letters, digits, '.', '_', '-'");
            return Err(CniError::new(ErrorCode::InvalidConfig, msg));
        }
        Ok(Self {
            version,
            name,
            object,
        })
    }

    /// The result given along, if any.
    ///
    /// # Errors
    /// Code 7 when it cannot be read.
    pub fn previous(&self) -> Result<Option<AttachResult>, CniError> {
        match self.object.get("prevResult") {
            None | Some(Value::Null) => Ok(None),
            Some(value) => AttachResult::from_value(value).map(Some).map_err(|e| {
                CniError::caused(ErrorCode::InvalidConfig, "prevResult cannot be read", &e)
            }),
        }
    }

    /// The attachments GC has to leave alone; none when the runtime gave no list.
    pub(super) fn valid(&self) -> Result<Option<Vec<AttachmentKey>>, CniError> {
        // Runtimes older than the final 1.1.0 wrote the second key only.
        let keys = ["cni.dev/valid-attachments", "cni.dev/attachments"];
        let found = keys
            .iter()
            .find_map(|key| Some((key, self.object.get(*key)?)));
        let wrong = |key: &str, what: &str| {
            CniError::new(ErrorCode::InvalidConfig, format!("{key} {what}"))
        };
        let Some((key, value)) = found else {
            return Ok(None);
        };
        let items = match value {
            Value::Array(items) => items.as_slice(),
            // Go prints an empty list so.
            Value::Null => &[],
            _ => return Err(wrong(key, "is not a list")),
        };
        let text = |item: &Value, field: &str| item[field].as_str().map(str::to_owned);
        let attachment = |item: &Value| {
            let container_id = text(item, "containerID")?;
            Some(AttachmentKey {
                container_id,
                ifname: text(item, "ifname")?,
            })
        };
        let all: Option<Vec<_>> = items.iter().map(attachment).collect();
        all.map(Some)
            .ok_or_else(|| wrong(key, "holds something without containerID or ifname"))
    }
}

/// One call of a plugin.
#[derive(Debug, Clone)]
pub struct Input<'a> {
    /// What is asked.
    pub verb: Verb,
    /// The container; empty for GC and STATUS.
    pub container_id: String,
    /// The interface in it; empty for GC and STATUS.
    pub ifname: String,
    /// Its network namespace; may be missing for DEL.
    pub netns: Option<PathBuf>,
    /// `CNI_ARGS`.
    pub args: BTreeMap<String, String>,
    /// Where delegated plugins are found.
    pub path: Vec<PathBuf>,
    /// The configuration.
    pub conf: &'a Conf,
    pub(super) environment: &'a Environment,
}

impl<'a> Input<'a> {
    pub(super) fn new(
        verb: Verb,
        environment: &'a Environment,
        conf: &'a Conf,
    ) -> Result<Self, CniError> {
        let mut input = Self {
            verb,
            container_id: String::new(),
            ifname: String::new(),
            netns: environment.text("CNI_NETNS")?.map(PathBuf::from),
            args: arguments(environment.text("CNI_ARGS")?.unwrap_or_default())?,
            path: std::env::split_paths(environment.text("CNI_PATH")?.unwrap_or_default())
                .collect(),
            conf,
            environment,
        };
        match verb {
            Verb::Add | Verb::Check => input.netns = Some(environment.needed("CNI_NETNS")?.into()),
            Verb::Del => {}
            Verb::Gc | Verb::Status | Verb::Version => return Ok(input),
        }
        input.container_id = environment.needed("CNI_CONTAINERID")?.to_owned();
        if !valid_name(&input.container_id) {
            let msg = "may hold only letters, digits, '.', '_', '-'";
            return Err(invalid(format!(
                "CNI_CONTAINERID {:?} {msg}",
                input.container_id
            )));
        }
        input.ifname = environment.needed("CNI_IFNAME")?.to_owned();
        if !valid_ifname(&input.ifname) {
            return Err(invalid(format!(
                "CNI_IFNAME {:?} is not an interface name",
                input.ifname
            )));
        }
        Ok(input)
    }

    /// The convention of `CNI_ARGS`: a key that a plugin does not know is an error unless
    /// `IgnoreUnknown` is true. Those by which orchestrators say which pod it is are known to all.
    ///
    /// # Errors
    /// Code 4 naming the key.
    pub fn refuse_unknown_args(&self, known: &[&str]) -> Result<(), CniError> {
        let ignore = self.args.get("IgnoreUnknown").map(String::as_str);
        if let Some("1" | "t" | "T" | "true" | "TRUE" | "True") = ignore {
            return Ok(());
        }
        let is_known =
            |key: &str| key == "IgnoreUnknown" || key.starts_with("K8S_") || known.contains(&key);
        match self.args.keys().find(|key| !is_known(key)) {
            None => Ok(()),
            Some(key) => Err(invalid(format!(
                "CNI_ARGS holds {key}, which is unknown; IgnoreUnknown=true lets it pass"
            ))),
        }
    }

    /// Who holds what this call makes.
    #[must_use]
    pub fn owner(&self) -> Owner {
        Owner {
            container_id: self.container_id.clone(),
            ifname: self.ifname.clone(),
        }
    }
}

/// `KEY=value;KEY=value`. Unknown keys are everybody's right: whether to mind is the plugin's.
fn arguments(text: &str) -> Result<BTreeMap<String, String>, CniError> {
    let mut all = BTreeMap::new();
    for pair in text.split(';').filter(|pair| !pair.is_empty()) {
        let Some((key, value)) = pair.split_once('=') else {
            return Err(invalid(format!(
                "CNI_ARGS holds {pair:?}, which is no KEY=value"
            )));
        };
        all.insert(key.to_owned(), value.to_owned());
    }
    Ok(all)
}
