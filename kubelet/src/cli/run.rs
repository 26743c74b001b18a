//! Runs the agent: logging, async runtime, signals.

use super::preflight;
use anyhow::Context;
use kubelet::config::Config;
use std::io::IsTerminal;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

/// Threads that run tasks. Two are enough for a thousand pods: tasks wait, they do not compute.
const WORKERS: usize = 2;
/// Threads for blocking work (unpacking layers, file trees); they end when idle.
const BLOCKING_THREADS: usize = 32;

/// Runs until SIGTERM or SIGINT.
pub(super) fn run(config: Config) -> anyhow::Result<()> {
    // First of all: two TLS providers in one program panic at the first handshake.
    let _ = rustls::crypto::ring::default_provider().install_default();
    log_to_stderr(&config);
    preflight::check(&config)?;
    for note in &config.notes {
        tracing::warn!("Configuration: {note}");
    }
    preflight::spare_us(&config);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_name("kubelet")
        .enable_all()
        .build()
        .context("start the async runtime")?;
    runtime.block_on(async {
        let stop = CancellationToken::new();
        stop_on_signal(&stop)?;
        tracing::info!(
            node = %config.node_name,
            version = kubelet::node::object::KUBELET_VERSION,
            "Starting"
        );
        kubelet::agent::run(config, stop).await?;
        Ok(())
    })
}

/// Cancels the token at the first SIGTERM or SIGINT; a second one ends the program at once.
fn stop_on_signal(stop: &CancellationToken) -> anyhow::Result<()> {
    let mut term = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let stop = stop.clone();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = term.recv() => {}
                _ = interrupt.recv() => {}
            }
            if stop.is_cancelled() {
                // Whoever asks twice does not want to wait; nothing can be lost by a kill.
                std::process::exit(1);
            }
            tracing::info!("Stopping; pods go on");
            stop.cancel();
        }
    });
    Ok(())
}

/// Our own levels by `-v`; libraries only when they warn. `RUST_LOG` wins.
fn filter(verbosity: u8) -> String {
    let ours = match verbosity {
        0..=3 => "info",
        4..=5 => "debug",
        6..=u8::MAX => "trace",
    };
    let crates = ["kubelet", "runtime", "cni", "linux"];
    // kube's watcher warns at each of its tries; who watches says it once.
    let mut text = "warn,kube_runtime=error".to_owned();
    for name in crates {
        text.push_str(&format!(",{name}={ours}"));
    }
    text
}

fn log_to_stderr(config: &Config) {
    let filter = EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| EnvFilter::new(filter(config.verbosity)));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    // A second initialisation can only happen in tests.
    let _ = if config.log_json {
        builder.json().try_init()
    } else {
        builder.try_init()
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verbosity_is_ours_alone() {
        assert_eq!(
            filter(4),
            "warn,kube_runtime=error,kubelet=debug,runtime=debug,cni=debug,linux=debug"
        );
        assert!(filter(0).contains("kubelet=info"));
        assert!(EnvFilter::try_new(filter(9)).is_ok());
    }
}
