//! Calling another plugin (IPAM) on behalf of ours: same environment, same configuration.

use std::time::Duration;

use linux::command::ShortCommand;
use serde_json::Value;

use super::Input;
use crate::invoke::Verb;
use crate::types::{CniError, ErrorCode};

/// A DHCP plugin may ask the network for many seconds.
const TIME_LIMIT: Duration = Duration::from_secs(45);
const MAX_OUTPUT_BYTES: usize = 1 << 20;

/// Runs the plugin `kind` with `verb` and returns what it printed.
///
/// # Errors
/// Its own error when it printed one; else code 103 saying what went wrong.
pub fn delegate(input: &Input<'_>, kind: &str, verb: Verb) -> Result<Vec<u8>, CniError> {
    if kind.is_empty() || kind.contains('/') || kind.starts_with('.') {
        let msg = format!("ipam.type {kind:?} is not a plugin's name");
        return Err(CniError::new(ErrorCode::InvalidConfig, msg));
    }
    let found = input
        .path
        .iter()
        .map(|dir| dir.join(kind))
        .find(|path| path.is_file());
    let Some(program) = found else {
        let msg = format!(
            "plugin {kind:?}, named in ipam.type, is in none of {:?}",
            input.path
        );
        return Err(CniError::new(ErrorCode::Delegate, msg));
    };
    let command = ShortCommand {
        program,
        args: Vec::new(),
        env: input
            .environment
            .clone()
            .with("CNI_COMMAND", verb.as_str())
            .pairs(),
        stdin: Value::Object(input.conf.object.clone())
            .to_string()
            .into_bytes(),
        max_output_bytes: MAX_OUTPUT_BYTES,
        time_limit: TIME_LIMIT,
    };
    let output = command
        .run()
        .map_err(|e| CniError::caused(ErrorCode::Delegate, format!("{verb} by {kind}"), &e))?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    Err(
        CniError::from_json(&output.stdout).unwrap_or_else(|| CniError {
            code: ErrorCode::Delegate,
            msg: format!("{verb} by {kind} ended with {}", output.status),
            details: String::from_utf8_lossy(&output.stderr[..output.stderr.len().min(2048)])
                .into_owned(),
        }),
    )
}
