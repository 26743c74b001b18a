//! `cni-bridge`: connects containers to a bridge on the node. A drop-in for containernetworking's
//! `bridge` with `host-local` addresses in the same process.
//!
//! Runtimes call it without arguments. `cni-bridge install [DIR]` puts it into a runtime's directory
//! by rename: what an init container of the image does.

use std::path::Path;
use std::process::ExitCode;

use cni::install::install;
use cni::skel::{Environment, run};
use cni_bridge::Bridge;

/// Where runtimes look for plugins.
const PLUGINS: &str = "/opt/cni/bin";

fn main() -> ExitCode {
    let words: Vec<_> = std::env::args_os().skip(1).take(3).collect();
    let words: Vec<_> = words.iter().map(|word| word.to_str()).collect();
    match words.as_slice() {
        [] => run(
            &Bridge,
            &Environment::of_process(),
            std::io::stdin(),
            std::io::stdout(),
        ),
        [Some("install")] => put_in_place(PLUGINS),
        [Some("install"), Some(dir)] if !dir.starts_with('-') => put_in_place(dir),
        _ => {
            eprintln!(
                "usage: cni-bridge install [DIR]; as a plugin it is called without arguments"
            );
            ExitCode::from(2)
        }
    }
}

fn put_in_place(dir: &str) -> ExitCode {
    let Err(error) = install(Path::new("/proc/self/exe"), Path::new(dir), "cni-bridge") else {
        return ExitCode::SUCCESS;
    };
    let source = std::error::Error::source(&error);
    let source = source
        .map(|source| format!(": {source}"))
        .unwrap_or_default();
    eprintln!("error: install cni-bridge into {dir}: {error}{source}");
    ExitCode::FAILURE
}
