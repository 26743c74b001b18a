//! The OCI form of a seccomp profile.

use serde::Deserialize;

/// Largest accepted profile file.
pub const MAX_PROFILE_BYTES: usize = 1 << 20;

/// Why a profile is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SeccompError {
    /// Not JSON, or not of the profile's form.
    #[error("seccomp profile is malformed: {0}")]
    Malformed(String),
    /// An action nobody knows.
    #[error(
        "seccomp profile: {field} is \"{value}\", expected an action such as SCMP_ACT_ALLOW, SCMP_ACT_ERRNO, SCMP_ACT_KILL_PROCESS or SCMP_ACT_LOG"
    )]
    Action {
        /// Where it stands.
        field: String,
        /// What was written.
        value: String,
    },
    /// An operator nobody knows.
    #[error(
        "seccomp profile: syscalls[{rule}].args: op is \"{value}\", expected SCMP_CMP_NE, LT, LE, EQ, GE, GT or MASKED_EQ"
    )]
    Operator {
        /// Index of the rule.
        rule: usize,
        /// What was written.
        value: String,
    },
    /// An argument index beyond the six a system call has.
    #[error("seccomp profile: syscalls[{rule}].args: index is {index}, expected 0 to 5")]
    ArgumentIndex {
        /// Index of the rule.
        rule: usize,
        /// What was written.
        index: u32,
    },
    /// Larger than the kernel takes.
    #[error("seccomp profile compiles to {0} instructions, the kernel takes at most 4096")]
    TooLong(usize),
}

/// A profile.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Profile {
    /// What happens to calls no rule names.
    pub default_action: String,
    /// errno of the default action when it is `SCMP_ACT_ERRNO`; EPERM without it.
    #[serde(default)]
    pub default_errno_ret: Option<u32>,
    /// Architectures (`SCMP_ARCH_X86_64`, …); the native one is always included.
    #[serde(default)]
    pub architectures: Vec<String>,
    /// Docker's form of the same.
    #[serde(default)]
    pub arch_map: Vec<ArchMap>,
    /// Rules.
    #[serde(default)]
    pub syscalls: Vec<Rule>,
}

/// An architecture with the ones that may run on it.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ArchMap {
    /// `SCMP_ARCH_X86_64`.
    pub architecture: String,
    /// `SCMP_ARCH_X86`, `SCMP_ARCH_X32`.
    #[serde(default)]
    pub sub_architectures: Vec<String>,
}

/// One rule.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Rule {
    /// System calls.
    pub names: Vec<String>,
    /// What happens.
    pub action: String,
    /// errno for `SCMP_ACT_ERRNO`.
    pub errno_ret: Option<u32>,
    /// Conditions on arguments, all must hold.
    pub args: Vec<Arg>,
    /// The rule counts only if all of this holds.
    pub includes: Filter,
    /// The rule counts only if none of this holds.
    pub excludes: Filter,
}

/// When a rule counts.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Filter {
    /// Capability names (`CAP_SYS_ADMIN`).
    pub caps: Vec<String>,
    /// Architectures by Go's names (`amd64`).
    pub arches: Vec<String>,
}

/// A condition on one argument.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Arg {
    /// 0 to 5.
    pub index: u32,
    /// Compared with; the mask for `SCMP_CMP_MASKED_EQ`.
    pub value: u64,
    /// The masked argument must equal this.
    #[serde(default)]
    pub value_two: u64,
    /// `SCMP_CMP_EQ`, …
    pub op: String,
}

impl Profile {
    /// Parses a profile file.
    ///
    /// # Errors
    /// When it is no JSON of that form, or larger than [`MAX_PROFILE_BYTES`].
    pub fn from_json(json: &[u8]) -> Result<Self, SeccompError> {
        if json.len() > MAX_PROFILE_BYTES {
            return Err(SeccompError::Malformed(format!(
                "{} bytes, at most {MAX_PROFILE_BYTES} are read",
                json.len()
            )));
        }
        serde_json::from_slice(json).map_err(|e| SeccompError::Malformed(e.to_string()))
    }

    /// Whether 32-bit x86 calls are filtered by the rules too (else they get the default action).
    pub fn wants_x86(&self) -> bool {
        self.architectures.iter().any(|a| a == "SCMP_ARCH_X86")
            || self.arch_map.iter().any(|m| {
                m.architecture == "SCMP_ARCH_X86_64"
                    && m.sub_architectures.iter().any(|a| a == "SCMP_ARCH_X86")
            })
    }
}
