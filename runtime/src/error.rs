//! From the errors of the engine's parts to the one its callers see.

use crate::container::spec::SpecError;
use crate::container::users::UserError;
use crate::service::{ContainerId, RuntimeError, RuntimeErrorKind, SandboxId};
use crate::shim_client::ShimClientError;
use linux::cgroup::CgroupError;
use linux::fs::FsError;
use pod_shim::protocol::ShimErrorKind;
use std::error::Error;

/// Makes an error of a class.
pub(crate) fn error(kind: RuntimeErrorKind, message: impl Into<String>) -> RuntimeError {
    RuntimeError {
        kind,
        message: message.into(),
    }
}

/// An error with all its causes, as one sentence. Foreign errors often print their cause
/// themselves: what is there already is not said twice.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(source) = cause {
        let words = source.to_string();
        if !text.ends_with(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        cause = source.source();
    }
    text
}

/// An error of the kernel or the disk.
pub(crate) fn system(error: &dyn Error) -> RuntimeError {
    self::error(RuntimeErrorKind::System, chain(error))
}

pub(crate) fn no_sandbox(id: &SandboxId) -> RuntimeError {
    error(RuntimeErrorKind::NotFound, format!("no sandbox {id}"))
}

pub(crate) fn no_container(id: &ContainerId) -> RuntimeError {
    error(RuntimeErrorKind::NotFound, format!("no container {id}"))
}

impl From<FsError> for RuntimeError {
    fn from(e: FsError) -> Self {
        system(&e)
    }
}

impl From<CgroupError> for RuntimeError {
    fn from(e: CgroupError) -> Self {
        let kind = match &e {
            CgroupError::BadPath(_) | CgroupError::NoController { .. } => RuntimeErrorKind::Invalid,
            // What the kernel calls an invalid argument was given by the caller.
            CgroupError::Io { source, .. } if source.raw_os_error() == Some(22) => {
                RuntimeErrorKind::Invalid
            }
            CgroupError::Io { .. } | CgroupError::Populated { .. } | CgroupError::NotMounted => {
                RuntimeErrorKind::System
            }
        };
        let mut message = chain(&e);
        if let CgroupError::Io { source, .. } = &e
            && source.kind() == std::io::ErrorKind::OutOfMemory
        {
            // A cgroup's own bookkeeping is charged to the one above it.
            message.push_str(" (memory limit too low?)");
        }
        error(kind, message)
    }
}

impl From<SpecError> for RuntimeError {
    fn from(e: SpecError) -> Self {
        error(RuntimeErrorKind::Invalid, chain(&e))
    }
}

impl From<UserError> for RuntimeError {
    fn from(e: UserError) -> Self {
        error(RuntimeErrorKind::Invalid, chain(&e))
    }
}

impl From<ShimClientError> for RuntimeError {
    fn from(e: ShimClientError) -> Self {
        let kind = match &e {
            ShimClientError::Refused(refusal) => match refusal.kind {
                ShimErrorKind::CommandNotFound | ShimErrorKind::CommandNotExecutable => {
                    RuntimeErrorKind::StartFailed
                }
                ShimErrorKind::BadRequest => RuntimeErrorKind::Invalid,
                ShimErrorKind::NotFound => RuntimeErrorKind::NotFound,
                ShimErrorKind::System => RuntimeErrorKind::System,
            },
            ShimClientError::Silent(_) => RuntimeErrorKind::Timeout,
            ShimClientError::Connect { .. }
            | ShimClientError::Gone(_)
            | ShimClientError::Protocol(_)
            | ShimClientError::TooOld { .. } => RuntimeErrorKind::System,
        };
        error(kind, chain(&e))
    }
}
