//! Writes granted resources into cgroups.

use super::actuate::{Change, Running, WantedResources, changes, refuse_shrinking, shrinking};
use runtime::service::{Resources, RuntimeService};

/// Brings the cgroup of a pod at `cgroup` and those of its running containers to what is wanted.
/// What is written before a failure stays and is found there by the next try.
///
/// # Errors
/// The sentence users read in the condition `PodResizeInProgress`.
pub async fn carry_out<R: RuntimeService>(
    runtime: &R,
    cgroup: &str,
    wanted: &WantedResources,
    running: &[Running],
) -> Result<(), String> {
    let current = runtime
        .cgroup_limits(cgroup)
        .ok_or_else(|| format!("unable to get cgroup config of {cgroup}"))?;
    let shrinking = shrinking(&current, wanted, running);
    let usage = |container: Option<&Running>| {
        let stats = match container {
            Some(container) => runtime.container_stats(&container.id),
            None => runtime.cgroup_stats(cgroup),
        };
        stats.map(|stats| stats.memory_usage_bytes)
    };
    if let Some(refusal) = refuse_shrinking(&shrinking, usage) {
        return Err(refusal);
    }
    for change in changes(&current, wanted, running) {
        let done = match change {
            Change::Pod(resources) => write_pod(runtime, cgroup, &current, &resources),
            Change::Container(id, resources) => runtime.update_resources(&id, resources).await,
        };
        done.map_err(|e| e.message)?;
    }
    Ok(())
}

/// Writes to the pod's cgroup unless it is so already.
fn write_pod<R: RuntimeService>(
    runtime: &R,
    cgroup: &str,
    current: &Resources,
    wanted: &Resources,
) -> runtime::service::Result<()> {
    // Shares cannot be read back on v2, where they are weights.
    if current.cpu_shares.is_some() && current.updated_by(wanted.clone()) == *current {
        return Ok(());
    }
    runtime.ensure_cgroup(cgroup, wanted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use runtime::fake::FakeRuntime;
    use runtime::service::CgroupStats;

    fn limit(mebibytes: i64) -> Resources {
        Resources {
            memory_limit_bytes: Some(mebibytes << 20),
            ..Resources::default()
        }
    }

    #[tokio::test]
    async fn a_limit_below_usage_is_refused_and_nothing_is_written() {
        let runtime = FakeRuntime::new();
        runtime.ensure_cgroup("/pod", &limit(10)).unwrap();
        let wanted = WantedResources {
            pod: limit(5),
            ..WantedResources::default()
        };
        let use_memory = |mebibytes: u64| {
            let stats = CgroupStats {
                memory_usage_bytes: mebibytes << 20,
                ..CgroupStats::default()
            };
            runtime.set_stats("/pod", stats);
        };
        use_memory(6);
        let error = carry_out(&runtime, "/pod", &wanted, &[]).await.unwrap_err();
        assert!(
            error.starts_with("cannot decrease memory limits: "),
            "{error}"
        );
        assert_eq!(runtime.cgroup("/pod"), Some(limit(10)));
        use_memory(4);
        carry_out(&runtime, "/pod", &wanted, &[]).await.unwrap();
        assert_eq!(runtime.cgroup("/pod"), Some(limit(5)));
        let gone = carry_out(&runtime, "/gone", &wanted, &[]).await;
        assert!(gone.unwrap_err().contains("/gone"));
    }
}
