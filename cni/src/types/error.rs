//! The error a plugin prints, and its codes.

use serde::{Deserialize, Serialize};

use super::SpecVersion;

/// Codes of the specification's error section; own codes start at 100.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorCode {
    /// 1: the plugin does not speak the asked version.
    IncompatibleVersion,
    /// 2: a field of the configuration is not supported; details name it.
    UnsupportedField,
    /// 3: the container is unknown; the runtime need not DEL.
    UnknownContainer,
    /// 4: a variable of the environment is missing or bad.
    InvalidEnvironment,
    /// 5: reading the configuration or writing the result failed.
    Io,
    /// 6: the configuration is not JSON.
    Decode,
    /// 7: the configuration has a bad value.
    InvalidConfig,
    /// 11: a passing condition, ask again.
    TryAgain,
    /// 50: the plugin cannot serve ADD now.
    NotAvailable,
    /// 51: as 50, and running containers may have lost connectivity.
    LimitedConnectivity,
    /// 100: the kernel refused an operation.
    Kernel,
    /// 101: the state found differs from the result given (CHECK).
    StateDiffers,
    /// 102: no address is free.
    NoAddress,
    /// 103: a delegated plugin failed.
    Delegate,
    /// Any other code, seen from foreign plugins.
    Other(u32),
}

impl ErrorCode {
    /// The number on the wire.
    #[must_use]
    pub fn number(self) -> u32 {
        match self {
            Self::IncompatibleVersion => 1,
            Self::UnsupportedField => 2,
            Self::UnknownContainer => 3,
            Self::InvalidEnvironment => 4,
            Self::Io => 5,
            Self::Decode => 6,
            Self::InvalidConfig => 7,
            Self::TryAgain => 11,
            Self::NotAvailable => 50,
            Self::LimitedConnectivity => 51,
            Self::Kernel => 100,
            Self::StateDiffers => 101,
            Self::NoAddress => 102,
            Self::Delegate => 103,
            Self::Other(number) => number,
        }
    }

    /// The code of a number printed by some plugin. Numbers from 100 are each plugin's own, so
    /// they stay [`ErrorCode::Other`].
    #[must_use]
    pub fn from_number(number: u32) -> Self {
        match number {
            1 => Self::IncompatibleVersion,
            2 => Self::UnsupportedField,
            3 => Self::UnknownContainer,
            4 => Self::InvalidEnvironment,
            5 => Self::Io,
            6 => Self::Decode,
            7 => Self::InvalidConfig,
            11 => Self::TryAgain,
            50 => Self::NotAvailable,
            51 => Self::LimitedConnectivity,
            other => Self::Other(other),
        }
    }
}

/// What a plugin answers instead of a result.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{msg}{} (code {})", if details.is_empty() { String::new() } else { format!(": {details}") }, code.number())]
pub struct CniError {
    /// Why, as a number.
    pub code: ErrorCode,
    /// Why, for people: operation and object.
    pub msg: String,
    /// The cause, or empty.
    pub details: String,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct WireError {
    #[serde(default)]
    cni_version: String,
    code: u32,
    #[serde(default)]
    msg: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    details: String,
}

impl CniError {
    /// An error without details.
    pub fn new(code: ErrorCode, msg: impl Into<String>) -> Self {
        Self {
            code,
            msg: msg.into(),
            details: String::new(),
        }
    }

    /// An error whose details are `cause` and all its sources, joined by colons.
    pub fn caused(
        code: ErrorCode,
        msg: impl Into<String>,
        cause: &(dyn std::error::Error + 'static),
    ) -> Self {
        let mut details = cause.to_string();
        let mut next = cause.source();
        while let Some(source) = next {
            details.push_str(": ");
            details.push_str(&source.to_string());
            next = source.source();
        }
        Self {
            code,
            msg: msg.into(),
            details,
        }
    }

    /// The JSON a plugin prints on standard output.
    #[must_use]
    pub fn to_json(&self, version: SpecVersion) -> String {
        let wire = WireError {
            cni_version: version.as_str().to_owned(),
            code: self.code.number(),
            msg: self.msg.clone(),
            details: self.details.clone(),
        };
        // Serialising plain strings and a number cannot fail.
        serde_json::to_string(&wire).unwrap_or_default()
    }

    /// Reads what a plugin printed; `None` when it is no error object.
    #[must_use]
    pub fn from_json(text: &[u8]) -> Option<Self> {
        let wire: WireError = serde_json::from_slice(text).ok()?;
        Some(Self {
            code: ErrorCode::from_number(wire.code),
            msg: wire.msg,
            details: wire.details,
        })
    }
}
