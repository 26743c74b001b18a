//! Requests and limits as cgroup numbers.

use super::{LaunchContext, LaunchError};
use crate::quantity::Quantity;
use k8s_openapi::api::core::v1::{Container, Pod};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity as ApiQuantity;
use runtime::service::Resources;
use std::collections::BTreeMap;

/// Amounts by resource name.
pub type Amounts = BTreeMap<String, Quantity>;

/// cpu.shares for thousandths of a CPU: 2…262144.
pub fn cpu_shares(milli: i64) -> u64 {
    let shares = milli.saturating_mul(1024) / 1000;
    u64::try_from(shares).unwrap_or(0).clamp(2, 262_144)
}

/// CFS quota and period in microseconds; no quota without a limit, at least 1 ms with one.
pub fn cpu_quota(milli: i64, context: &LaunchContext) -> (Option<i64>, Option<u64>) {
    if !context.cpu_cfs_quota {
        return (Some(-1), Some(context.cpu_cfs_period_us));
    }
    if milli <= 0 {
        return (None, None);
    }
    let period = i64::try_from(context.cpu_cfs_period_us).unwrap_or(100_000);
    let quota = milli.saturating_mul(period) / 1000;
    (Some(quota.max(1000)), Some(context.cpu_cfs_period_us))
}

/// Reads a list of amounts.
///
/// # Errors
/// Names the resource whose amount is no quantity.
pub fn amounts(list: Option<&BTreeMap<String, ApiQuantity>>) -> Result<Amounts, LaunchError> {
    list.into_iter()
        .flatten()
        .map(|(name, amount)| match Quantity::try_from(amount) {
            Ok(amount) => Ok((name.clone(), amount)),
            Err(error) => Err(LaunchError::Config(format!("resource {name}: {error}"))),
        })
        .collect()
}

/// Huge page limits by the kernel's page size names: `sizes` get zero unless asked for.
pub fn hugepage_limits(asked: &Amounts, sizes: &[String]) -> BTreeMap<String, u64> {
    let mut limits: BTreeMap<String, u64> = sizes.iter().map(|s| (s.clone(), 0)).collect();
    for (name, amount) in asked {
        let Some(size) = name
            .strip_prefix("hugepages-")
            .and_then(|s| Quantity::parse(s).ok())
        else {
            continue;
        };
        let bytes = size.value();
        let text = match bytes {
            b if b >= 1 << 30 => format!("{}GB", b >> 30),
            b if b >= 1 << 20 => format!("{}MB", b >> 20),
            b => format!("{}KB", b >> 10),
        };
        limits.insert(text, u64::try_from(amount.value()).unwrap_or(0));
    }
    limits
}

/// Limits of one container; pod-level limits hold where it has none.
///
/// # Errors
/// Names the resource whose amount is no quantity.
pub fn container_resources(
    pod: &Pod,
    container: &Container,
    context: &LaunchContext,
) -> Result<Resources, LaunchError> {
    let own = container.resources.as_ref();
    let requests = amounts(own.and_then(|r| r.requests.as_ref()))?;
    let limits = amounts(own.and_then(|r| r.limits.as_ref()))?;
    let pod_level = pod.spec.as_ref().and_then(|s| s.resources.as_ref());
    let pod_limits = amounts(pod_level.and_then(|r| r.limits.as_ref()))?;
    let limit = |name: &str| {
        let own = limits.get(name).filter(|a| !a.is_zero());
        own.or_else(|| pod_limits.get(name)).copied()
    };
    let cpu_limit = limit("cpu").map_or(0, |q| q.milli_value());
    let weight = match requests.get("cpu") {
        Some(request) => request.milli_value(),
        None => cpu_limit,
    };
    let (cpu_quota_us, cpu_period_us) = cpu_quota(cpu_limit, context);
    let memory = limit("memory").map_or(0, |q| q.value());
    let mut hugepages = pod_limits.clone();
    hugepages.extend(limits.clone());
    let mut unified = BTreeMap::new();
    if context.cgroup_v2 && !context.single_process_oom_kill {
        unified.insert("memory.oom.group".to_owned(), "1".to_owned());
    }
    Ok(Resources {
        cpu_shares: Some(cpu_shares(weight)),
        cpu_quota_us,
        cpu_period_us,
        memory_limit_bytes: (memory > 0).then_some(memory),
        hugepage_limits: hugepage_limits(&hugepages, &context.hugepage_sizes),
        unified,
        memory_request_bytes: Some(requests.get("memory").map_or(0, Quantity::value)),
        ..Resources::default()
    })
}

/// What a pod asks for altogether.
#[derive(Debug, Clone, Default)]
pub struct ResourceTotals {
    /// Requests with overhead.
    pub requests: Amounts,
    /// Limits with overhead.
    pub limits: Amounts,
    /// Whether every container has a cpu limit (or the pod has).
    pub cpu_limited: bool,
    /// Whether every container has a memory limit (or the pod has).
    pub memory_limited: bool,
}

fn add(sum: &mut Amounts, more: &Amounts) {
    for (name, amount) in more {
        let total = sum.entry(name.clone()).or_insert(Quantity::ZERO);
        *total = total.plus(amount);
    }
}

fn raise(sum: &mut Amounts, least: &Amounts) {
    for (name, amount) in least {
        let total = sum.entry(name.clone()).or_insert(*amount);
        if *amount > *total {
            *total = *amount;
        }
    }
}

/// Sums main containers and sidecars, raises that to what any init container needs beside the
/// sidecars before it, lets pod-level amounts win, adds the overhead.
///
/// # Errors
/// Names the resource whose amount is no quantity.
pub fn pod_totals(pod: &Pod) -> Result<ResourceTotals, LaunchError> {
    let mut totals = sum(pod, of_spec)?;
    totals.pod_level(pod)?;
    Ok(totals)
}

/// Like [`pod_totals`], but what the status says is in force counts where it is more than what
/// the spec says: a container that shall shrink takes its old share until it has shrunk.
///
/// # Errors
/// Names the resource whose amount is no quantity.
pub fn totals_in_use(pod: &Pod) -> Result<ResourceTotals, LaunchError> {
    let status = pod.status.as_ref();
    let mut totals = sum(pod, |container| {
        let (mut requests, limits) = of_spec(container)?;
        let actual = status
            .into_iter()
            .flat_map(|s| [&s.container_statuses, &s.init_container_statuses])
            .flatten()
            .flatten()
            .find(|s| s.name == container.name);
        if let Some(actual) = actual {
            let in_force = actual.resources.as_ref().and_then(|r| r.requests.as_ref());
            raise(&mut requests, &amounts(in_force)?);
        }
        Ok((requests, limits))
    })?;
    totals.pod_level(pod)?;
    let own = pod.spec.as_ref().and_then(|s| s.resources.as_ref());
    if own.is_some_and(|r| r.requests.is_some()) {
        let actual = status.and_then(|s| s.resources.as_ref()?.requests.as_ref());
        raise(&mut totals.requests, &amounts(actual)?);
    }
    Ok(totals)
}

/// Requests and limits of a container as its spec says.
fn of_spec(container: &Container) -> Result<(Amounts, Amounts), LaunchError> {
    let own = container.resources.as_ref();
    Ok((
        amounts(own.and_then(|r| r.requests.as_ref()))?,
        amounts(own.and_then(|r| r.limits.as_ref()))?,
    ))
}

/// What the containers of a pod need together; `read` tells a container's requests and limits.
fn sum(
    pod: &Pod,
    read: impl Fn(&Container) -> Result<(Amounts, Amounts), LaunchError>,
) -> Result<ResourceTotals, LaunchError> {
    let mut totals = ResourceTotals {
        cpu_limited: true,
        memory_limited: true,
        ..ResourceTotals::default()
    };
    let Some(spec) = &pod.spec else {
        return Ok(totals);
    };
    for container in &spec.containers {
        let (requests, limits) = read(container)?;
        totals.note_limits(&limits);
        add(&mut totals.requests, &requests);
        add(&mut totals.limits, &limits);
    }
    let mut sidecars = (Amounts::new(), Amounts::new());
    let mut least = (Amounts::new(), Amounts::new());
    for container in spec.init_containers.iter().flatten() {
        let (mut requests, mut limits) = read(container)?;
        if container.restart_policy.as_deref() == Some("Always") {
            add(&mut totals.requests, &requests);
            add(&mut totals.limits, &limits);
            add(&mut sidecars.0, &requests);
            add(&mut sidecars.1, &limits);
            (requests, limits) = sidecars.clone();
        } else {
            add(&mut requests, &sidecars.0);
            add(&mut limits, &sidecars.1);
        }
        totals.note_limits(&limits);
        raise(&mut least.0, &requests);
        raise(&mut least.1, &limits);
    }
    raise(&mut totals.requests, &least.0);
    raise(&mut totals.limits, &least.1);
    Ok(totals)
}

impl ResourceTotals {
    fn note_limits(&mut self, limits: &Amounts) {
        let has = |name| limits.get(name).is_some_and(|a| !a.is_zero());
        self.cpu_limited &= has("cpu");
        self.memory_limited &= has("memory");
    }

    /// Pod-level amounts replace sums; overhead comes on top.
    fn pod_level(&mut self, pod: &Pod) -> Result<(), LaunchError> {
        let Some(spec) = &pod.spec else {
            return Ok(());
        };
        let own = spec.resources.as_ref();
        self.requests
            .extend(amounts(own.and_then(|r| r.requests.as_ref()))?);
        let limits = amounts(own.and_then(|r| r.limits.as_ref()))?;
        let has = |name| limits.get(name).is_some_and(|a| !a.is_zero());
        self.cpu_limited |= has("cpu");
        self.memory_limited |= has("memory");
        self.limits.extend(limits);
        let overhead = amounts(spec.overhead.as_ref())?;
        add(&mut self.requests, &overhead);
        for (name, amount) in &overhead {
            if let Some(limit) = self.limits.get_mut(name).filter(|l| !l.is_zero()) {
                *limit = limit.plus(amount);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{pod, pod_of};
    use super::*;
    use serde_json::json;

    #[test]
    fn shares_and_quota_have_their_floors_and_ceilings() {
        for (milli, want) in [
            (0, 2),
            (1, 2),
            (100, 102),
            (1000, 1024),
            (i64::MAX, 262_144),
        ] {
            assert_eq!(cpu_shares(milli), want, "{milli}");
        }
        let context = LaunchContext::default();
        assert_eq!(cpu_quota(500, &context), (Some(50_000), Some(100_000)));
        assert_eq!(cpu_quota(1, &context), (Some(1000), Some(100_000)));
        assert_eq!(cpu_quota(0, &context), (None, None));
    }

    #[test]
    fn a_container_gets_its_own_limits_or_those_of_the_pod() {
        let context = LaunchContext {
            cgroup_v2: true,
            hugepage_sizes: vec!["2MB".into(), "1GB".into()],
            ..LaunchContext::default()
        };
        let pod = pod(json!({
            "containers": [{"name": "c", "resources": {"limits": {"cpu": "200m", "hugepages-2Mi": "4Mi"}}}],
            "resources": {"limits": {"memory": "1Gi", "cpu": "1"}},
        }));
        let got =
            container_resources(&pod, &pod.spec.as_ref().unwrap().containers[0], &context).unwrap();
        assert_eq!(got.cpu_shares, Some(204));
        assert_eq!(got.cpu_quota_us, Some(20_000));
        assert_eq!(got.memory_limit_bytes, Some(1 << 30));
        assert_eq!(
            got.hugepage_limits,
            [("2MB".to_owned(), 4 << 20), ("1GB".to_owned(), 0)].into()
        );
        assert_eq!(got.unified["memory.oom.group"], "1");
    }

    #[test]
    fn an_impossible_amount_is_refused_by_name() {
        let pod = pod_of(json!({"name": "c", "resources": {"limits": {"memory": "lots"}}}));
        let container = &pod.spec.as_ref().unwrap().containers[0];
        let error = container_resources(&pod, container, &LaunchContext::default()).unwrap_err();
        assert!(error.to_string().contains("memory") && error.to_string().contains("lots"));
    }

    #[test]
    fn totals_take_init_containers_and_sidecars_as_the_scheduler_does() {
        let r = |name: &str, cpu: &str, policy: Option<&str>| {
            let mut c = json!({"name": name, "resources": {"requests": {"cpu": cpu}}});
            if let Some(policy) = policy {
                c["restartPolicy"] = json!(policy);
            }
            c
        };
        let pod = pod(json!({
            "containers": [r("a", "100m", None), r("b", "200m", None)],
            "initContainers": [r("i", "500m", None), r("s", "50m", Some("Always")), r("j", "400m", None)],
            "overhead": {"cpu": "10m"},
        }));
        // max(100+200+50, 500, 50+400) + 10
        assert_eq!(pod_totals(&pod).unwrap().requests["cpu"].milli_value(), 510);
    }
}
