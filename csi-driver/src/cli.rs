//! The command line.

mod look;

use crate::backend::freeze;
use crate::driver::{Driver, DriverConfig};
use crate::model::Filesystem;
use crate::pool::PoolConfig;
use crate::service::{RegistrationSocket, Service, Sockets, serve};
use anyhow::{Context as _, Result};
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

/// Operations at one time: each has a thread, and a hung volume keeps the threads of those who
/// ask for it.
const MOST_OPERATIONS: usize = 256;

/// Local volumes with true capacity, snapshots and clones, for any Kubernetes node.
#[derive(Debug, Parser)]
#[command(name = "csi-driver", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve CSI on a socket
    Run(Run),
    /// List volumes and snapshots with what the kernel has of them
    Ls(look::Ls),
    /// Show all that is known of one volume or snapshot
    Inspect(look::Inspect),
    /// Compare records, files, devices and mounts; change nothing. Exit code 1 when they disagree
    Fsck(look::Fsck),
    /// Thaw the filesystem on standard output when standard input closes
    #[command(name = freeze::WATCHDOG, hide = true)]
    ThawWatchdog {
        /// Or after this many milliseconds
        limit_ms: u64,
    },
}

/// Filesystems for volumes.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum FilesystemName {
    /// ext4
    Ext4,
    /// xfs
    Xfs,
}

#[derive(Debug, Args)]
struct Run {
    /// Socket of the CSI services, as path or unix:// address
    #[arg(long, env = "CSI_ENDPOINT", default_value = "unix:///csi/csi.sock")]
    endpoint: String,
    /// Name of the driver, as StorageClasses give it
    #[arg(long, default_value = "csi.ferrule.dev")]
    driver_name: String,
    /// Name of this node
    #[arg(long, env = "NODE_NAME")]
    node: String,
    /// Directory of the volumes: empty, or one that this driver made
    #[arg(long, value_name = "DIR", default_value = "/var/lib/ferrule-csi")]
    pool: PathBuf,
    /// Per cent of the pool's filesystem that are never given away
    #[arg(long, value_name = "PERCENT", default_value_t = 5, value_parser = clap::value_parser!(u64).range(0..=90))]
    reserve: u64,
    /// Per cent of the pool's filesystem that thin volumes may be promised together
    #[arg(long, value_name = "PERCENT", default_value_t = 200, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    overcommit: u64,
    /// Filesystem of volumes for which nobody asks for one
    #[arg(long, value_enum, default_value = "ext4")]
    default_fstype: FilesystemName,
    /// Volumes this node takes at most; 0 for as many as there is room for
    #[arg(long, value_name = "N", default_value_t = 0)]
    max_volumes: u32,
    /// The kubelet's directory of plugins, as this program sees it; without it somebody else
    /// registers the driver
    #[arg(long, value_name = "DIR", requires = "kubelet_endpoint")]
    plugins_registry: Option<PathBuf>,
    /// The CSI socket, as the kubelet sees it
    #[arg(long, value_name = "PATH")]
    kubelet_endpoint: Option<PathBuf>,
    /// Address on which /healthz answers liveness probes
    #[arg(long, value_name = "ADDRESS")]
    health: Option<SocketAddr>,
}

/// Runs the program.
#[must_use]
pub fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Run(run) => run.run(),
        Command::Ls(ls) => ls.run(),
        Command::Inspect(inspect) => inspect.run(),
        Command::Fsck(fsck) => match fsck.run() {
            Ok(true) => Ok(()),
            Ok(false) => return ExitCode::FAILURE,
            Err(error) => Err(error),
        },
        Command::ThawWatchdog { limit_ms } => {
            freeze::run_watchdog(Duration::from_millis(limit_ms)).context("thaw")
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("csi-driver: {error:#}");
            ExitCode::FAILURE
        }
    }
}

impl Run {
    fn run(self) -> Result<()> {
        let filter = tracing_subscriber::EnvFilter::try_from_default_env()
            .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
        tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(std::io::stderr)
            .init();
        let sockets = Sockets {
            endpoint: socket_path(&self.endpoint)?,
            registration: match (self.plugins_registry, self.kubelet_endpoint) {
                (Some(directory), Some(endpoint)) => Some(RegistrationSocket {
                    directory,
                    endpoint,
                }),
                (None, _) | (_, None) => None,
            },
            health: self.health,
        };
        let driver = Driver::open(DriverConfig {
            name: self.driver_name,
            node: self.node,
            pool: self.pool,
            default_filesystem: match self.default_fstype {
                FilesystemName::Ext4 => Filesystem::Ext4,
                FilesystemName::Xfs => Filesystem::Xfs,
            },
            limits: PoolConfig {
                reserve_percent: self.reserve,
                overcommit_percent: self.overcommit,
            },
            max_volumes: self.max_volumes,
            program: std::env::current_exe().context("find this program")?,
        })?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .max_blocking_threads(MOST_OPERATIONS)
            .enable_all()
            .build()
            .context("start the runtime")?;
        let service = Service::new(Arc::new(driver));
        let outcome = runtime.block_on(async {
            let stop = stop_signal()?;
            serve(service, sockets, stop).await
        });
        // A hung volume must not keep the program from ending.
        runtime.shutdown_timeout(Duration::from_secs(2));
        outcome
    }
}

/// Done when this program is told to end.
fn stop_signal() -> Result<impl Future<Output = ()> + Send> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate()).context("wait for signals")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("wait for signals")?;
    Ok(async move {
        tokio::select! {
            // Both are cancel-safe: a signal that came is kept.
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

fn socket_path(endpoint: &str) -> Result<PathBuf> {
    let path = endpoint.strip_prefix("unix://").unwrap_or(endpoint);
    let path = path.strip_prefix("unix:").unwrap_or(path);
    anyhow::ensure!(
        path.starts_with('/'),
        "endpoint {endpoint:?} is no absolute path or unix:// address"
    );
    Ok(PathBuf::from(path))
}
