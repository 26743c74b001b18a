//! Runs the plugins of a list: what each is given, in which order, and what its answer means.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use linux::command::{ShortCommand, ShortOutput};
use serde_json::{Map, Value, json};

use super::conflist::{NetworkList, PluginConf};
use super::{Attachment, AttachmentKey, InvokeError, Verb};
use crate::types::{CniError, ErrorCode, ResultError};

/// A result or error is a few hundred bytes; a mebibyte is a plugin gone mad.
const MAX_OUTPUT_BYTES: usize = 1 << 20;

/// A list with what is needed to run it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Chain<'a> {
    pub(super) list: &'a NetworkList,
    pub(super) bin_dirs: &'a [PathBuf],
    pub(super) time_limit: Duration,
}

impl Chain<'_> {
    pub(super) fn add(&self, attachment: &Attachment) -> Result<Value, InvokeError> {
        // A chain with a missing link would be half done: look before the first one runs
        // (containerd#12130 lost an address for ever that way).
        for plugin in &self.list.plugins {
            self.find(Verb::Add, plugin)?;
        }
        let mut previous = Value::Null;
        for plugin in &self.list.plugins {
            let input = self.input(plugin, Some(attachment), some(&previous));
            let stdout = self.run(Verb::Add, plugin, input, Some(attachment))?;
            previous = serde_json::from_slice(&stdout).map_err(|e| InvokeError::Answer {
                verb: Verb::Add,
                network: self.list.name.clone(),
                plugin: plugin.kind.clone(),
                source: ResultError::Decode(e),
            })?;
        }
        Ok(previous)
    }

    /// Backwards; goes on after a failure so that one broken plugin leaks only its own things.
    pub(super) fn del(
        &self,
        attachment: &Attachment,
        previous: Option<&Value>,
    ) -> Result<(), InvokeError> {
        // Before 0.4.0 DEL was given no result.
        let previous = previous.filter(|_| self.list.version.has_check());
        let mut failed = None;
        for plugin in self.list.plugins.iter().rev() {
            let input = self.input(plugin, Some(attachment), previous);
            match self.run(Verb::Del, plugin, input, Some(attachment)) {
                Ok(_) => {}
                // Code 3: the plugin knows nothing of it, so nothing is left.
                Err(InvokeError::Refused { source, .. })
                    if source.code == ErrorCode::UnknownContainer => {}
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        failed.map_or(Ok(()), Err)
    }

    pub(super) fn check(&self, a: &Attachment, previous: &Value) -> Result<(), InvokeError> {
        for plugin in &self.list.plugins {
            self.run(
                Verb::Check,
                plugin,
                self.input(plugin, Some(a), Some(previous)),
                Some(a),
            )?;
        }
        Ok(())
    }

    pub(super) fn gc(&self, valid: &[AttachmentKey]) -> Result<(), InvokeError> {
        let valid: Vec<Value> = valid
            .iter()
            .map(|key| json!({"containerID": key.container_id, "ifname": key.ifname}))
            .collect();
        let mut failed = None;
        for plugin in &self.list.plugins {
            let mut input = self.input(plugin, None, None);
            // The second key is what runtimes wrote before 1.1.0 was final; plugins exist that
            // read only that.
            input.insert("cni.dev/attachments".into(), Value::Array(valid.clone()));
            input.insert(
                "cni.dev/valid-attachments".into(),
                Value::Array(valid.clone()),
            );
            let outcome = self.run(Verb::Gc, plugin, input, None);
            failed = failed.or(outcome.err());
        }
        failed.map_or(Ok(()), Err)
    }

    pub(super) fn status(&self) -> Result<(), InvokeError> {
        for plugin in &self.list.plugins {
            if self.list.version.has_gc_and_status() {
                self.run(Verb::Status, plugin, self.input(plugin, None, None), None)?;
            } else {
                self.find(Verb::Status, plugin)?;
            }
        }
        Ok(())
    }

    /// A plugin's own object, with what the specification has the runtime put in.
    fn input(
        &self,
        plugin: &PluginConf,
        attachment: Option<&Attachment>,
        previous: Option<&Value>,
    ) -> Map<String, Value> {
        let mut input = plugin.object.clone();
        input.insert("cniVersion".into(), self.list.version.as_str().into());
        input.insert("name".into(), self.list.name.as_str().into());
        // Declared to us, not to the plugin: it gets runtimeConfig instead.
        input.remove("capabilities");
        input.remove("cniVersions");
        input.remove("prevResult");
        let asked: Map<String, Value> = attachment
            .into_iter()
            .flat_map(|a| &a.capability_args)
            .filter(|(name, _)| plugin.capabilities.contains(name))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect();
        if !asked.is_empty() {
            input.insert("runtimeConfig".into(), Value::Object(asked));
        }
        if let Some(previous) = previous {
            input.insert("prevResult".into(), previous.clone());
        }
        input
    }

    fn find(&self, verb: Verb, plugin: &PluginConf) -> Result<PathBuf, InvokeError> {
        let candidates = self.bin_dirs.iter().map(|dir| dir.join(&plugin.kind));
        candidates
            .into_iter()
            .find(|path| is_executable(path))
            .ok_or_else(|| InvokeError::PluginMissing {
                verb,
                network: self.list.name.clone(),
                plugin: plugin.kind.clone(),
                file: self.list.file.clone(),
                searched: self.bin_dirs.to_vec(),
            })
    }

    fn run(
        &self,
        verb: Verb,
        plugin: &PluginConf,
        input: Map<String, Value>,
        attachment: Option<&Attachment>,
    ) -> Result<Vec<u8>, InvokeError> {
        let command = ShortCommand {
            program: self.find(verb, plugin)?,
            args: Vec::new(),
            env: environment(verb, attachment, self.bin_dirs),
            stdin: Value::Object(input).to_string().into_bytes(),
            max_output_bytes: MAX_OUTPUT_BYTES,
            time_limit: self.time_limit,
        };
        let output = command.run().map_err(|source| InvokeError::Run {
            verb,
            network: self.list.name.clone(),
            plugin: plugin.kind.clone(),
            source,
        })?;
        if output.status.success() {
            return Ok(output.stdout);
        }
        Err(InvokeError::Refused {
            verb,
            network: self.list.name.clone(),
            plugin: plugin.kind.clone(),
            source: refusal(&output),
        })
    }
}

fn some(value: &Value) -> Option<&Value> {
    (!value.is_null()).then_some(value)
}

fn is_executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    path.metadata()
        .is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

/// The error object from standard output, else what the plugin said in its distress.
fn refusal(output: &ShortOutput) -> CniError {
    CniError::from_json(&output.stdout).unwrap_or_else(|| {
        let said = if output.stderr.is_empty() {
            &output.stdout
        } else {
            &output.stderr
        };
        CniError {
            code: ErrorCode::Other(999),
            msg: format!("ended with {} and no error object", output.status),
            details: String::from_utf8_lossy(&said[..said.len().min(2048)])
                .trim()
                .to_owned(),
        }
    })
}

/// The environment of the specification, and PATH, which iptables-calling plugins need.
fn environment(
    verb: Verb,
    attachment: Option<&Attachment>,
    bin_dirs: &[PathBuf],
) -> Vec<(OsString, OsString)> {
    let joined = std::env::join_paths(bin_dirs).unwrap_or_default();
    let path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/sbin:/usr/bin:/sbin:/bin".into());
    let mut env: Vec<(OsString, OsString)> = vec![
        ("CNI_COMMAND".into(), verb.as_str().into()),
        ("CNI_PATH".into(), joined),
        ("PATH".into(), path),
    ];
    // Trace context is the caller's: plugins may put it in their logs.
    for key in ["TRACEPARENT", "TRACESTATE", "BAGGAGE"] {
        env.extend(std::env::var_os(key).map(|value| (key.into(), value)));
    }
    if let Some(a) = attachment {
        let args = format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID={};K8S_POD_UID={}",
            a.pod_namespace, a.pod_name, a.container_id, a.pod_uid
        );
        env.extend([
            ("CNI_CONTAINERID".into(), a.container_id.clone().into()),
            ("CNI_NETNS".into(), a.netns.clone().into()),
            ("CNI_IFNAME".into(), a.ifname.clone().into()),
            ("CNI_ARGS".into(), args.into()),
        ]);
    }
    env
}
