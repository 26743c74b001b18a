//! The last steps before execve: limits, working directory, user, capabilities, system call
//! filter, in the one order that works.
//!
//! * The filter without no_new_privs needs CAP_SYS_ADMIN while it is loaded, so capabilities are
//!   cut to the final set only after it; with no_new_privs it is the very last step.
//! * Capabilities survive the change of user by keepcaps; ambient ones need the final sets.
//! * The death signal is cleared by the change of user and set again behind it.

use super::{bad_request, system};
use crate::note::{Note, NoteSender};
use linux::process::attrs::{self, RlimitOutcome};
use linux::process::exec::{self, ExecError};
use pod_shim::protocol::{ProcessSpec, ShimError, ShimErrorKind};
use std::convert::Infallible;
use std::io;

const CAP_SYS_ADMIN: u64 = 1 << 21;
const DEFAULT_UMASK: u32 = 0o022;

/// Become what `process` says and execute it; returns only on failure.
pub(crate) fn become_and_execute(
    process: &ProcessSpec,
    last_capability: u8,
    note: &NoteSender,
) -> Result<Infallible, ShimError> {
    let filter = process
        .seccomp
        .as_deref()
        .map(|text| crate::base64::decode(text).ok_or_else(bad_filter))
        .transpose()?;
    let prepared = exec::prepare(&process.argv, &process.env).map_err(exec_error)?;
    set_limits(process, note)?;
    attrs::set_umask(process.umask.unwrap_or(DEFAULT_UMASK));
    let entered = enter_directory(&process.cwd);
    let step = |what: &'static str, result: io::Result<()>| result.map_err(|e| system(what, &e));

    let wanted = linux::caps::bits(&process.capabilities);
    let ambient = linux::caps::bits(&process.ambient_capabilities);
    let have = linux::caps::permitted().map_err(|e| system("read capabilities", &e))?;
    // A capability this shim does not hold cannot be given (a node without CAP_SYS_RESOURCE).
    let wanted = (wanted | ambient) & have;
    let given: Vec<u8> = process
        .ambient_capabilities
        .iter()
        .copied()
        .filter(|n| *n < 64 && have & (1 << n) != 0)
        .collect();
    let ambient = linux::caps::bits(&given);

    step(
        "limit the bounding set",
        linux::caps::limit_bounding(wanted, last_capability),
    )?;
    step("keep capabilities", attrs::keep_capabilities(true))?;
    linux::user::become_user(process.uid, process.gid, &process.groups).map_err(|e| {
        system(
            format_args!("become user {}:{}", process.uid, process.gid),
            &e,
        )
    })?;
    // A directory only the user may enter (root squashed over a network) is tried again as him.
    entered.or_else(|_| enter_directory(&process.cwd))?;
    if process.no_new_privileges {
        step("set no_new_privs", attrs::set_no_new_privs())?;
    }
    let until_filter = if filter.is_some() && !process.no_new_privileges {
        wanted | (have & CAP_SYS_ADMIN)
    } else {
        wanted
    };
    step(
        "set capabilities",
        linux::caps::set(until_filter, until_filter, ambient),
    )?;
    step("set ambient capabilities", linux::caps::set_ambient(&given))?;
    step("set the death signal", attrs::die_with_parent())?;
    step("mark descriptors", attrs::close_on_exec_from(3))?;
    // Told before the filter, which may forbid to speak.
    note.send(&Note::Ready, None);
    if let Some(filter) = filter {
        step("load the seccomp filter", attrs::load_seccomp(&filter))?;
        if until_filter != wanted {
            step(
                "set capabilities",
                linux::caps::set(wanted, wanted, ambient),
            )?;
        }
    }
    prepared.execute().map_err(exec_error)
}

fn set_limits(process: &ProcessSpec, note: &NoteSender) -> Result<(), ShimError> {
    for (resource, soft, hard) in &process.rlimits {
        match attrs::set_rlimit(*resource, *soft, *hard) {
            Ok(RlimitOutcome::Set) => {}
            Ok(RlimitOutcome::Clamped { hard }) => {
                let text = format!("resource limit {resource} was cut to {hard}");
                note.send(&Note::Warning(text), None);
            }
            Err(error) => {
                return Err(bad_request(
                    format_args!("set resource limit {resource}"),
                    &error,
                ));
            }
        }
    }
    Ok(())
}

/// Enter the working directory and make sure it lies within the container's root: a path through
/// a leaked descriptor would not (CVE-2024-21626).
fn enter_directory(cwd: &str) -> Result<(), ShimError> {
    let path = if cwd.is_empty() { "/" } else { cwd };
    std::env::set_current_dir(path)
        .and_then(|()| std::env::current_dir())
        .map_err(|error| {
            if error.kind() == io::ErrorKind::NotADirectory {
                not_a_directory(path)
            } else {
                bad_request(format_args!("enter working directory {path:?}"), &error)
            }
        })
        .map(drop)
}

/// The working directory is a file.
pub(crate) fn not_a_directory(path: &str) -> ShimError {
    ShimError {
        kind: ShimErrorKind::BadRequest,
        message: format!("working directory {path:?} is not a directory"),
        errno: None,
    }
}

fn bad_filter() -> ShimError {
    ShimError {
        kind: ShimErrorKind::BadRequest,
        message: "the seccomp filter is not valid base64".into(),
        errno: None,
    }
}

fn exec_error(error: ExecError) -> ShimError {
    let kind = match &error {
        ExecError::NotInPath { .. } | ExecError::Missing { .. } => ShimErrorKind::CommandNotFound,
        ExecError::Denied { .. } | ExecError::Format { .. } => ShimErrorKind::CommandNotExecutable,
        ExecError::BadArguments { .. } => ShimErrorKind::BadRequest,
        ExecError::Other { .. } => ShimErrorKind::System,
    };
    ShimError {
        kind,
        errno: error.errno(),
        message: error.to_string(),
    }
}
