//! `pod-shim`: one small single-threaded process per pod. It makes the pod's namespaces, is the
//! parent of its containers, keeps their streams and logs, records how they ended, and outlives
//! the agent, which speaks to it over a Unix socket (see `pod_shim::protocol`).
//!
//! ```text
//!  agent ══ socket ══ server ─┬─ setup      namespaces, sysctls, PID-1 helper
//!                             ├─ launch     clone3 ─▶ child ─▶ execve
//!                             ├─ reap       exits, memory kills, exit.json
//!                             ├─ exec       the same into a running container
//!                             ├─ attach     streams to and from clients
//!                             └─ output ─▶ logline ─▶ logfile
//! ```
//!
//! Forbidden here: threads, timers while idle, `unsafe` (it lives in `linux`), and anything that
//! lets a client, a full disk or one container hold up the others.

mod attach;
mod base64;
mod cgroup;
mod child;
mod container;
mod exec;
mod launch;
mod logfile;
mod logline;
mod note;
mod output;
mod reap;
mod server;
mod setup;

use linux::process::attrs;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::ExitCode;

fn main() -> ExitCode {
    let Some(options) = Options::parse(std::env::args().skip(1)) else {
        eprintln!("usage: pod-shim --dir <sandbox state directory> --socket <path>");
        return ExitCode::from(2);
    };
    match run(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pod-shim: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The command line.
#[derive(Debug)]
struct Options {
    dir: PathBuf,
    socket: PathBuf,
}

impl Options {
    fn parse(mut args: impl Iterator<Item = String>) -> Option<Self> {
        let (mut dir, mut socket) = (None, None);
        while let Some(arg) = args.next() {
            match arg.as_str() {
                "--dir" => dir = args.next(),
                "--socket" => socket = args.next(),
                _ => return None,
            }
        }
        Some(Self {
            dir: dir?.into(),
            socket: socket?.into(),
        })
    }
}

fn run(options: Options) -> std::io::Result<()> {
    // Whoever stops the agent by its process group, or a log reader that goes away, must not
    // stop the pod.
    for signal in [
        1,  /* HUP */
        2,  /* INT */
        3,  /* QUIT */
        13, /* PIPE */
        15, /* TERM */
    ] {
        attrs::ignore_signal(signal);
    }
    attrs::become_subreaper()?;
    // No directory is kept busy, and core dumps or stray files have a known place.
    std::env::set_current_dir(&options.dir)?;
    let listener = match linux::event::inherited_socket(3) {
        Some(fd) => UnixListener::from(fd),
        None => UnixListener::bind(&options.socket)?,
    };
    server::Shim::new(listener, options.socket)?.run()
}
