//! Lifecycle hooks: postStart before a container counts as started, preStop within its grace.

use super::spec;
use crate::probes::check::{Checker, HttpReach, Target};
use k8s_openapi::api::core::v1::{Container, ExecAction, HTTPGetAction, LifecycleHandler, Pod};
use runtime::service::{ContainerId, RuntimeService};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

/// Longest a hook may last that nothing else bounds. The API has no limit; nothing here waits for
/// ever.
const LONGEST: Duration = Duration::from_secs(3600);

/// Where a hook runs.
#[derive(Debug, Clone, Copy)]
pub(super) struct HookTarget<'a> {
    /// The pod, for messages.
    pub(super) pod: &'a Pod,
    /// The instance.
    pub(super) id: &'a ContainerId,
    /// Its spec.
    pub(super) container: &'a Container,
    /// Where HTTP hooks go when they name no host.
    pub(super) pod_ip: Option<IpAddr>,
}

/// How a hook went that did not fail.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Hooked {
    /// As asked.
    Done,
    /// Asked by HTTPS, answered by HTTP: this host speaks no TLS.
    FellBack(String),
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
/// What it said, in the words of a container that waits with `PostStartHookError`.
pub(super) async fn run<R: RuntimeService>(
    runtime: &Arc<R>,
    hook: &LifecycleHandler,
    target: HookTarget<'_>,
    limit: Option<Duration>,
) -> Result<Hooked, String> {
    let timeout = limit.unwrap_or(LONGEST);
    let check = Target {
        container_id: target.id,
        container: target.container,
        pod_ip: target.pod_ip,
        timeout,
    };
    let checker = Checker::new(runtime.clone());
    let whose = || {
        format!(
            "for Container {:?} in Pod {:?} failed - error: ",
            target.container.name,
            spec::describe(target.pod)
        )
    };
    if let Some(exec) = &hook.exec {
        return run_exec(&checker, exec, &check, whose).await;
    }
    if let Some(http) = &hook.http_get {
        return run_http(&checker, http, &check).await.map_err(|e| {
            let path = http.path.as_deref().unwrap_or_default();
            format!("HTTP lifecycle hook ({path}) {}{e}", whose())
        });
    }
    if let Some(sleep) = &hook.sleep {
        let seconds = u64::try_from(sleep.seconds).unwrap_or(0);
        tokio::time::sleep(Duration::from_secs(seconds).min(timeout)).await;
        return Ok(Hooked::Done);
    }
    // The API allows tcpSocket here, and has always let it fail.
    Err("Cannot run handler: invalid handler".to_owned())
}

async fn run_exec<R: RuntimeService>(
    checker: &Checker<R>,
    exec: &ExecAction,
    target: &Target<'_>,
    whose: impl Fn() -> String,
) -> Result<Hooked, String> {
    let command = exec.command.clone().unwrap_or_default();
    let outcome = checker.run(command, target).await;
    if outcome.success {
        return Ok(Hooked::Done);
    }
    let command = exec.command.as_deref().unwrap_or_default().join(" ");
    Err(format!(
        "Exec lifecycle hook ([{command}]) {}command failed, message: {:?}",
        whose(),
        outcome.message
    ))
}

/// An HTTP hook has done its work when somebody answered, whatever the answer. One that is to go
/// by HTTPS and meets plain HTTP goes again without TLS.
async fn run_http<R: RuntimeService>(
    checker: &Checker<R>,
    action: &HTTPGetAction,
    target: &Target<'_>,
) -> Result<Hooked, String> {
    match checker.reach(action, target).await {
        HttpReach::Answered => Ok(Hooked::Done),
        HttpReach::NoTls(host) => {
            let mut plain = action.clone();
            plain.scheme = Some("HTTP".to_owned());
            if let Some(headers) = &mut plain.http_headers {
                headers.retain(|h| !h.name.eq_ignore_ascii_case("Authorization"));
            }
            match checker.reach(&plain, target).await {
                HttpReach::Answered => Ok(Hooked::FellBack(host)),
                HttpReach::NoTls(error) | HttpReach::Failed(error) => Err(error),
            }
        }
        HttpReach::Failed(error) => Err(error),
    }
}
