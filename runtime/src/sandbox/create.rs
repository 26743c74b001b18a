//! Making a sandbox: record, shim with its namespaces, network.

use super::state::{Phase, RECORD_VERSION, SandboxRecord};
use super::{shim, store, teardown};
use crate::engine::{Inner, Sandbox, blocking, new_id, now_ns};
use crate::error::error;
use crate::service::{
    NamespaceMode, Result, RuntimeErrorKind, RuntimeEventKind, SandboxConfig, SandboxId,
    SandboxStatus,
};
use pod_shim::protocol::{Reply, Request, SandboxSpec};
use std::path::PathBuf;
use std::sync::Arc;

/// Runs a sandbox; a second call for the same pod and attempt waits for the first and gives its
/// result.
pub(crate) async fn run(inner: Arc<Inner>, config: SandboxConfig) -> Result<SandboxStatus> {
    check(&config)?;
    if config.network == NamespaceMode::Pod {
        let with_inner = Arc::clone(&inner);
        blocking(move || with_inner.network.ensure_configured()).await?;
    }
    let record = SandboxRecord {
        version: RECORD_VERSION,
        id: SandboxId(new_id()?),
        phase: Phase::Creating,
        created_at_ns: now_ns(),
        boot_id: inner.boot_id.clone(),
        ips: Vec::new(),
        netns: None,
        network_owed: false,
        shim: None,
        config,
    };
    let sandbox = Sandbox::new(record);
    // Nobody else has it yet, so this succeeds; taken before others can see it.
    let turn = sandbox.turn.lock().await;
    if let Some(existing) = register(&inner, &sandbox) {
        drop(turn);
        return join(existing).await;
    }
    match make(&inner, &sandbox).await {
        Ok(status) => {
            let uid = &status.config.uid;
            inner
                .events
                .announce(uid, &sandbox.id, None, RuntimeEventKind::SandboxReady);
            Ok(status)
        }
        Err(failure) => {
            drop(turn);
            teardown::undo(&inner, &sandbox).await;
            Err(failure)
        }
    }
}

fn check(config: &SandboxConfig) -> Result<()> {
    let invalid = |message: String| Err(error(RuntimeErrorKind::Invalid, message));
    match config.runtime_handler.as_str() {
        "" | "ferrule" => {}
        other => return invalid(format!("no runtime for {other:?} is configured")),
    }
    for (field, mode) in [("network", &config.network), ("ipc", &config.ipc)] {
        match mode {
            NamespaceMode::Pod | NamespaceMode::Node => {}
            NamespaceMode::Container | NamespaceMode::Target(_) => {
                return invalid(format!("{field} cannot be {mode:?}"));
            }
        }
    }
    if let NamespaceMode::Target(_) = config.pid {
        return invalid("pid of a sandbox cannot be that of a container".to_owned());
    }
    if config.user_namespace.is_some() {
        for (field, mode) in [
            ("network", &config.network),
            ("pid", &config.pid),
            ("ipc", &config.ipc),
        ] {
            if *mode == NamespaceMode::Node {
                return invalid(format!(
                    "user_namespace: not possible with the node's {field} namespace"
                ));
            }
        }
    }
    if config.hostname.len() > 64 {
        return invalid(format!("hostname {:?} is too long", config.hostname));
    }
    Ok(())
}

/// Puts the sandbox among the others, unless the same pod and attempt has one that has not
/// begun to end.
fn register(inner: &Inner, sandbox: &Arc<Sandbox>) -> Option<Arc<Sandbox>> {
    let key = |s: &Sandbox| s.with(|r| (r.config.uid.clone(), r.config.attempt));
    let wanted = key(sandbox);
    let mut all = inner.sandboxes();
    let same = all.values().find(|s| {
        let usable = s.with(|r| r.phase <= Phase::Ready);
        usable && !wanted.0.is_empty() && key(s) == wanted
    });
    if let Some(same) = same {
        return Some(Arc::clone(same));
    }
    all.insert(sandbox.id.clone(), Arc::clone(sandbox));
    None
}

async fn join(existing: Arc<Sandbox>) -> Result<SandboxStatus> {
    let _turn = existing.turn.lock().await;
    let record = existing.record();
    if record.phase == Phase::Ready {
        return Ok(record.status(existing.shim_alive()));
    }
    let message = format!(
        "attempt {} of this pod is sandbox {}, which has ended",
        record.config.attempt, record.id
    );
    Err(error(RuntimeErrorKind::Conflict, message))
}

async fn make(inner: &Arc<Inner>, sandbox: &Arc<Sandbox>) -> Result<SandboxStatus> {
    let pin = store::pin(&inner.config, &sandbox.id);
    sandbox.change(|r| {
        // Owed from before the first plugin runs.
        r.network_owed = r.has_network();
        r.netns = r.has_network().then(|| pin.clone());
    });
    let (with_inner, with_sandbox) = (Arc::clone(inner), Arc::clone(sandbox));
    let process = blocking(move || {
        store::create(&with_inner.config, &with_sandbox.record())?;
        shim::start(&with_inner, &with_sandbox)
    })
    .await?;
    sandbox.change(|r| r.shim = Some(process));
    shim::connect(inner, sandbox).await?;
    let spec = spec(inner, &sandbox.record())?;
    let (reply, _) = sandbox.shim()?.request(Request::Setup(spec), &[]).await?;
    let Reply::Ready { .. } = reply else {
        let message = format!("the shim answered setup with {reply:?}");
        return Err(error(RuntimeErrorKind::System, message));
    };
    let (with_inner, with_sandbox) = (Arc::clone(inner), Arc::clone(sandbox));
    let record = blocking(move || {
        let record = with_sandbox.record();
        let ips = if record.has_network() {
            with_inner.network.attach(&record)?
        } else {
            Vec::new()
        };
        let record = with_sandbox.change(|r| {
            r.ips = ips;
            r.phase = Phase::Ready;
        });
        store::save(&with_inner.config, &record)?;
        Ok(record)
    })
    .await?;
    Ok(record.status(true))
}

/// What the shim shall make.
fn spec(inner: &Inner, record: &SandboxRecord) -> Result<SandboxSpec> {
    let config = &record.config;
    let is_node = |mode: &NamespaceMode| match mode {
        NamespaceMode::Node => true,
        NamespaceMode::Pod | NamespaceMode::Container | NamespaceMode::Target(_) => false,
    };
    let host_network = is_node(&config.network);
    let share_pid = match &config.pid {
        NamespaceMode::Pod => true,
        NamespaceMode::Container | NamespaceMode::Node | NamespaceMode::Target(_) => false,
    };
    let hostname = (!host_network && !config.hostname.is_empty()).then(|| config.hostname.clone());
    Ok(SandboxSpec {
        sandbox_id: record.id.0.clone(),
        host_network,
        host_ipc: is_node(&config.ipc),
        share_pid,
        netns_path: record.netns.clone(),
        hostname,
        domainname: None,
        sysctls: config.sysctls.clone(),
        // As killable as what stock nodes keep per pod; refused where the kernel forbids it.
        shim_oom_score_adj: Some(-998),
        user_namespace: config.user_namespace,
        helper_cgroups: if share_pid {
            helper_cgroups(inner, record)?
        } else {
            Vec::new()
        },
    })
}

/// The PID-1 helper's cgroup: a leaf beside the containers', as v2 wants processes in leaves.
fn helper_cgroups(inner: &Inner, record: &SandboxRecord) -> Result<Vec<PathBuf>> {
    let path = teardown::helper_cgroup(record);
    inner.cgroups.ensure(&path)?;
    Ok(inner.cgroups.directories(&path)?)
}
