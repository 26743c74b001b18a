//! Seccomp: profiles in the OCI form, compiled by us to classic BPF.
//!
//! [`profile`] holds the JSON form that users write for `Localhost` profiles (OCI runtime
//! specification, "Seccomp", with the Docker additions `includes`/`excludes`). [`compile`] turns
//! a profile into a program for `seccomp(2)`; [`default_profile`] is what `RuntimeDefault` means.
//! Pure: no system call is made here; the shim loads the program right before `execve`.

pub mod compile;
pub mod default_profile;
pub mod profile;

pub use compile::{Program, compile};
pub use profile::{Profile, SeccompError};

/// The program of the runtime's default profile for a process with these capabilities
/// (numbers as in `capability.h`): some calls are allowed only to those who hold the capability
/// that guards them anyway.
///
/// # Errors
/// Never in practice: the default profile is our own and a test compiles it.
pub fn default_profile_program(capabilities: &[u8]) -> Result<Program, SeccompError> {
    compile(&default_profile::profile(capabilities), capabilities)
}

/// Compiles a profile file's content.
///
/// # Errors
/// Malformed JSON, an unknown action, operator or architecture, each by name. Unknown system
/// call names are skipped, as every runtime does, because profiles are shared between kernels.
pub fn compile_json(json: &[u8], capabilities: &[u8]) -> Result<Program, SeccompError> {
    compile(&Profile::from_json(json)?, capabilities)
}
