//! Lifecycle hooks: postStart before a container counts as started, preStop within its grace.

use super::spec;
use crate::probes::check::{Checker, Target};
use k8s_openapi::api::core::v1::{Container, LifecycleHandler, Pod, Probe};
use runtime::service::{ContainerId, RuntimeService};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

/// Longest a postStart hook may last. The API has no limit; nothing here waits for ever.
const POST_START_MAX: Duration = Duration::from_secs(600);

/// Where a hook runs.
#[derive(Debug, Clone, Copy)]
pub(super) struct HookTarget<'a> {
    /// The instance.
    pub(super) id: &'a ContainerId,
    /// Its spec.
    pub(super) container: &'a Container,
    /// Where HTTP hooks go when they name no host.
    pub(super) pod_ip: Option<IpAddr>,
}

/// The postStart hook of a container, if it has one.
pub(super) fn post_start(container: &Container) -> Option<&LifecycleHandler> {
    container.lifecycle.as_ref()?.post_start.as_ref()
}

/// The preStop hook of a container of the pod, if it has one. Ephemeral ones cannot.
pub(super) fn pre_stop<'a>(
    pod: &'a Pod,
    container: &str,
) -> Option<(&'a Container, &'a LifecycleHandler)> {
    let mut all = spec::containers(pod.spec.as_ref()?);
    let container = all.find(|c| c.spec.name == container)?.spec;
    Some((container, container.lifecycle.as_ref()?.pre_stop.as_ref()?))
}

/// Runs a hook to its end, or for `limit`.
///
/// # Errors
/// What it said.
pub(super) async fn run<R: RuntimeService>(
    runtime: &Arc<R>,
    hook: &LifecycleHandler,
    target: HookTarget<'_>,
    limit: Option<Duration>,
) -> Result<(), String> {
    let timeout = limit.unwrap_or(POST_START_MAX);
    if let Some(sleep) = &hook.sleep {
        let seconds = u64::try_from(sleep.seconds).unwrap_or(0);
        tokio::time::sleep(Duration::from_secs(seconds).min(timeout)).await;
        return Ok(());
    }
    let probe = Probe {
        exec: hook.exec.clone(),
        http_get: hook.http_get.clone(),
        tcp_socket: hook.tcp_socket.clone(),
        ..Probe::default()
    };
    let target = Target {
        container_id: target.id,
        container: target.container,
        pod_ip: target.pod_ip,
        timeout,
    };
    let outcome = Checker::new(runtime.clone()).check(&probe, &target).await;
    // An HTTP hook has done its work when somebody answered, whatever the answer.
    let answered = hook.http_get.is_some() && outcome.message.contains("statuscode");
    if outcome.success || answered {
        Ok(())
    } else {
        Err(outcome.message)
    }
}
