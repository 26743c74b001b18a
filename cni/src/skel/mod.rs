//! The frame of a plugin executable: reads environment and standard input, calls the plugin,
//! prints one JSON object on standard output. Everything outside comes in as a value.
//!
//! ```text
//! main() ─▶ run(&plugin, &Environment::of_process(), stdin, stdout) ─▶ ExitCode
//! ```

mod delegate;
mod input;
mod spelling;

use std::io::{Read, Write};
use std::process::ExitCode;

use serde_json::{Value, json};

use crate::types::{AttachResult, CniError, ErrorCode, SpecVersion};

pub use crate::invoke::{AttachmentKey, Verb};
pub use delegate::delegate;
pub use input::{Conf, Environment, Input};

/// A configuration is a few kilobytes; more than this is not one.
const MAX_INPUT_BYTES: u64 = 1 << 20;

/// What a plugin does. Every method must be safe to repeat.
pub trait Plugin {
    /// Attaches a container.
    ///
    /// # Errors
    /// A [`CniError`]; what was made is undone as far as possible, and the runtime will DEL.
    fn add(&self, input: &Input<'_>) -> Result<AttachResult, CniError>;
    /// Detaches it: by container id and interface name, whether the namespace still exists or not.
    ///
    /// # Errors
    /// A [`CniError`] when something is left; nothing being there is success.
    fn del(&self, input: &Input<'_>) -> Result<(), CniError>;
    /// Sees whether it is attached as the previous result says.
    ///
    /// # Errors
    /// A [`CniError`] naming the first difference.
    fn check(&self, input: &Input<'_>, previous: &AttachResult) -> Result<(), CniError>;
    /// Frees everything of this network that belongs to no attachment in `valid`.
    ///
    /// # Errors
    /// A [`CniError`] when something is left.
    fn gc(&self, input: &Input<'_>, valid: &[AttachmentKey]) -> Result<(), CniError>;
    /// Whether ADD can be served.
    ///
    /// # Errors
    /// Codes 50 and 51.
    fn status(&self, input: &Input<'_>) -> Result<(), CniError>;
}

/// Serves one call.
pub fn run(
    plugin: &impl Plugin,
    environment: &Environment,
    stdin: impl Read,
    mut stdout: impl Write,
) -> ExitCode {
    let (printed, code) = match serve(plugin, environment, stdin) {
        Ok(None) => return ExitCode::SUCCESS,
        Ok(Some(value)) => (value.to_string(), ExitCode::SUCCESS),
        Err((version, error)) => (error.to_json(version), ExitCode::FAILURE),
    };
    match writeln!(stdout, "{printed}").and_then(|()| stdout.flush()) {
        Ok(()) => code,
        // Nobody can be told.
        Err(_) => ExitCode::FAILURE,
    }
}

fn serve(
    plugin: &impl Plugin,
    environment: &Environment,
    stdin: impl Read,
) -> Result<Option<Value>, (SpecVersion, CniError)> {
    let early = |error| (SpecVersion::NEWEST, error);
    let verb = environment.verb().map_err(early)?;
    let bytes = read_all(stdin).map_err(early)?;
    if verb == Verb::Version {
        return Ok(Some(versions(&bytes)));
    }
    let conf = Conf::parse(&bytes).map_err(early)?;
    let late = |error| (conf.version, error);
    speaks(conf.version, verb).map_err(late)?;
    let input = Input::new(verb, environment, &conf).map_err(late)?;
    let outcome = match verb {
        Verb::Add => plugin
            .add(&input)
            .map(|result| Some(result.to_value(conf.version))),
        Verb::Del => plugin.del(&input).map(|()| None),
        Verb::Check => match conf.previous() {
            Ok(Some(previous)) => plugin.check(&input, &previous).map(|()| None),
            Ok(None) => Err(CniError::new(
                ErrorCode::InvalidConfig,
                "CHECK needs prevResult",
            )),
            Err(error) => Err(error),
        },
        Verb::Gc => conf
            .valid()
            .and_then(|valid| match valid {
                Some(valid) => plugin.gc(&input, &valid),
                // `cnitool gc` gives no list. Then nothing may be taken for garbage.
                None => {
                    eprintln!("GC frees nothing: cni.dev/valid-attachments is missing");
                    Ok(())
                }
            })
            .map(|()| None),
        Verb::Status => plugin.status(&input).map(|()| None),
        Verb::Version => Ok(None),
    };
    outcome.map_err(late)
}

fn read_all(stdin: impl Read) -> Result<Vec<u8>, CniError> {
    let mut bytes = Vec::new();
    let read = stdin.take(MAX_INPUT_BYTES + 1).read_to_end(&mut bytes);
    read.map_err(|e| CniError::caused(ErrorCode::Io, "read the configuration", &e))?;
    if bytes.len() as u64 > MAX_INPUT_BYTES {
        let msg = format!("the configuration has more than {MAX_INPUT_BYTES} bytes");
        return Err(CniError::new(ErrorCode::Decode, msg));
    }
    Ok(bytes)
}

fn versions(bytes: &[u8]) -> Value {
    let asked: Option<Value> = serde_json::from_slice(bytes).ok();
    let asked = asked
        .as_ref()
        .and_then(|v| v["cniVersion"].as_str())
        .unwrap_or_default();
    let version = asked.parse().unwrap_or(SpecVersion::NEWEST);
    json!({
        "cniVersion": version.as_str(),
        "supportedVersions": SpecVersion::ALL.map(SpecVersion::as_str),
    })
}

fn speaks(version: SpecVersion, verb: Verb) -> Result<(), CniError> {
    let known = match verb {
        Verb::Add | Verb::Del | Verb::Version => true,
        Verb::Check => version.has_check(),
        Verb::Gc | Verb::Status => version.has_gc_and_status(),
    };
    if known {
        return Ok(());
    }
    let msg = format!("cniVersion {version} has no {verb}");
    Err(CniError::new(ErrorCode::IncompatibleVersion, msg))
}

#[cfg(test)]
mod tests;
