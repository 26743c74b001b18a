//! Resources in the status: what a pod was granted, and what is in force. Pure.

use super::derive::DeriveInput;
use crate::launch::resources::{Amounts, pod_totals};
use crate::pod::resize::actuate::{memory_limit, quota_milli};
use crate::quantity::{Format, Quantity};
use k8s_openapi::api::core::v1::{Container, PodStatus, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity as ApiQuantity;
use runtime::service::{ContainerStatus, Resources};
use std::collections::BTreeMap;

/// A CPU request up to this many thousandths has the same shares as none.
const LEAST_CPU_REQUEST: i64 = 2;
/// A CPU limit up to this many thousandths has the least quota there is.
const LEAST_CPU_LIMIT: i64 = 10;

type List = BTreeMap<String, ApiQuantity>;

/// Requests granted to a container.
pub(super) fn allocated(container: &Container) -> Option<List> {
    let requests = container.resources.as_ref()?.requests.clone()?;
    Some(requests).filter(|r| !r.is_empty())
}

/// Resources of an instance: those granted, with the limits in force in their place.
pub(super) fn in_force(container: &Container, instance: &ContainerStatus) -> ResourceRequirements {
    let mut resources = container.resources.clone().unwrap_or_default();
    if !crate::observe::is_running(instance) {
        return resources;
    }
    overlay(&mut resources, &instance.resources, false);
    if let (Some(requests), Some(bytes)) = (
        resources.requests.as_mut(),
        instance.resources.memory_request_bytes.filter(|b| *b > 0),
    ) {
        put(requests, "memory", bytes_of(bytes));
    }
    resources
}

/// Writes CPU and memory in force over granted ones. Lists that are not there stay absent
/// unless `always`.
fn overlay(resources: &mut ResourceRequirements, actual: &Resources, always: bool) {
    if always {
        resources.limits.get_or_insert_default();
        resources.requests.get_or_insert_default();
    }
    if let Some(limits) = resources.limits.as_mut() {
        if let Some(milli) = quota_milli(actual).filter(|m| *m > 0)
            && milli.max(granted_milli(limits)) > LEAST_CPU_LIMIT
        {
            put(limits, "cpu", Quantity::from_milli(milli));
        }
        if let Some(bytes) = memory_limit(actual) {
            put(limits, "memory", bytes_of(bytes));
        }
    }
    if let Some(requests) = resources.requests.as_mut()
        && let Some(milli) = actual.cpu_shares.map(milli_of_shares)
        && milli.max(granted_milli(requests)) > LEAST_CPU_REQUEST
    {
        put(requests, "cpu", Quantity::from_milli(milli));
    }
}

/// Thousandths of a CPU that shares stand for.
fn milli_of_shares(shares: u64) -> i64 {
    i64::try_from((shares * 1000).div_ceil(1024)).unwrap_or(i64::MAX)
}

fn granted_milli(list: &List) -> i64 {
    let amount = list.get("cpu").and_then(|q| Quantity::try_from(q).ok());
    amount.map_or(0, |q| q.milli_value())
}

fn bytes_of(bytes: i64) -> Quantity {
    Quantity::from_units(bytes, Format::BinarySi)
}

/// Sets an amount; one that is the same in other words is left as the user wrote it.
fn put(list: &mut List, name: &str, amount: Quantity) {
    let before = list.get(name).and_then(|q| Quantity::try_from(q).ok());
    if before != Some(amount) {
        list.insert(name.to_owned(), ApiQuantity(amount.to_string()));
    }
}

fn api(amounts: &Amounts) -> Option<List> {
    let list = amounts.iter();
    let list: List = list
        .map(|(name, amount)| (name.clone(), ApiQuantity(amount.to_string())))
        .collect();
    Some(list).filter(|l| !l.is_empty())
}

/// Resources of the pod as a whole (KEP-2837, KEP-5419).
pub(super) fn of_pod(input: &DeriveInput<'_>, status: &mut PodStatus) {
    let Ok(totals) = pod_totals(input.pod) else {
        return;
    };
    status.allocated_resources = api(&totals.requests);
    let own = input.pod.spec.as_ref().and_then(|s| s.resources.clone());
    let mut resources = own.unwrap_or_default();
    match input.resize.pod_applied {
        Some(applied) if status.phase.as_deref() == Some("Running") => {
            overlay(&mut resources, applied, true);
            let memory = totals.requests.get("memory");
            if let (Some(requests), Some(memory)) = (resources.requests.as_mut(), memory)
                && !requests.contains_key("memory")
            {
                put(requests, "memory", *memory);
            }
            resources.limits = resources.limits.filter(|l| !l.is_empty());
            resources.requests = resources.requests.filter(|l| !l.is_empty());
        }
        Some(_) | None => {
            resources.requests = api(&totals.requests);
            resources.limits = api(&totals.limits);
        }
    }
    status.resources = Some(resources);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::fixture::{container, exited, running};
    use serde_json::{Value, json};

    fn check(spec: Value, actual: Resources, expected: Value) {
        let spec: Container =
            serde_json::from_value(json!({"name": "a", "resources": spec})).unwrap();
        let mut instance = container("a", 0, 0, running());
        instance.resources = actual;
        let got = serde_json::to_value(in_force(&spec, &instance)).unwrap();
        assert_eq!(got, expected);
    }

    fn actual(shares: u64, quota: i64, memory: i64) -> Resources {
        Resources {
            cpu_shares: Some(shares),
            cpu_quota_us: Some(quota),
            cpu_period_us: Some(100_000),
            memory_limit_bytes: Some(memory),
            memory_request_bytes: Some(1 << 20),
            ..Resources::default()
        }
    }

    #[test]
    fn what_is_in_force_is_shown_where_something_was_asked_for() {
        check(
            json!({"requests": {"cpu": "200m", "memory": "2Mi"}, "limits": {"cpu": "400m", "memory": "4Mi"}}),
            actual(102, 20_000, 2 << 20),
            json!({"requests": {"cpu": "100m", "memory": "1Mi"}, "limits": {"cpu": "200m", "memory": "2Mi"}}),
        );
        check(json!({}), actual(2, -1, -1), json!({}));
        check(
            json!({"requests": {"cpu": "100m"}}),
            actual(102, 20_000, 2 << 20),
            json!({"requests": {"cpu": "100m", "memory": "1Mi"}}),
        );
    }

    #[test]
    fn the_smallest_amounts_and_equal_ones_keep_the_users_words() {
        check(
            json!({"requests": {"cpu": "1m"}, "limits": {"cpu": "5m", "memory": "1024Ki"}}),
            Resources {
                memory_request_bytes: None,
                ..actual(2, 1000, 1 << 20)
            },
            json!({"requests": {"cpu": "1m"}, "limits": {"cpu": "5m", "memory": "1024Ki"}}),
        );
    }

    #[test]
    fn a_container_that_does_not_run_shows_what_it_was_granted() {
        let spec: Container =
            serde_json::from_value(json!({"name": "a", "resources": {"limits": {"cpu": "1"}}}))
                .unwrap();
        let mut dead = container("a", 0, 0, exited(0, 1));
        dead.resources = actual(2, 1000, 1);
        assert_eq!(Some(in_force(&spec, &dead)), spec.resources);
        assert_eq!(allocated(&spec), None);
    }
}
