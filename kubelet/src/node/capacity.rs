//! What the node offers: capacity, and allocatable = capacity − reserved − hard eviction
//! thresholds. Pure. See
//! <https://kubernetes.io/docs/tasks/administer-cluster/reserve-compute-resources/>.

use super::machine::{Filesystem, Machine};
use crate::config::{Config, Threshold};
use crate::quantity::{Format, Quantity};
use std::collections::BTreeMap;

/// Amounts by resource name.
pub type Amounts = BTreeMap<String, Quantity>;

fn units(n: u64, format: Format) -> Quantity {
    Quantity::from_units(i64::try_from(n).unwrap_or(i64::MAX), format)
}

/// The resource name of a huge page size, `hugepages-2Mi`.
fn hugepages_name(size: u64) -> String {
    format!("hugepages-{}", units(size, Format::BinarySi))
}

/// What the machine has.
pub fn capacity(machine: &Machine, nodefs: &Filesystem, max_pods: u32) -> Amounts {
    let mut amounts = Amounts::new();
    let mut put = |name: &str, quantity| amounts.insert(name.to_owned(), quantity);
    put("cpu", units(machine.cpus, Format::DecimalSi));
    put("memory", units(machine.memory_bytes, Format::BinarySi));
    put(
        "ephemeral-storage",
        units(nodefs.capacity_bytes, Format::BinarySi),
    );
    put("pods", units(u64::from(max_pods), Format::DecimalSi));
    for (size, count) in &machine.hugepages {
        let bytes = size.saturating_mul(*count);
        put(&hugepages_name(*size), units(bytes, Format::BinarySi));
    }
    amounts
}

/// What the cgroup of all pods is limited to: capacity less what is reserved. Eviction
/// thresholds do not count: pods above them are to be evicted, not killed by the kernel.
pub fn enforced(capacity: &Amounts, config: &Config) -> Amounts {
    let mut left = capacity.clone();
    for reserved in [&config.kube_reserved, &config.system_reserved] {
        for (name, text) in reserved {
            if let (Some(have), Ok(less)) = (left.get_mut(name), Quantity::parse(text)) {
                *have = floor(have.minus(&less));
            }
        }
    }
    left
}

/// What pods may use of it.
pub fn allocatable(capacity: &Amounts, config: &Config) -> Amounts {
    let mut left = enforced(capacity, config);
    for (signal, name) in [
        ("memory.available", "memory"),
        ("nodefs.available", "ephemeral-storage"),
    ] {
        let (Some(threshold), Some(total)) = (config.eviction_hard.get(signal), capacity.get(name))
        else {
            continue;
        };
        let less = units(amount_of(threshold, total), total.format());
        if let Some(have) = left.get_mut(name) {
            *have = floor(have.minus(&less));
        }
    }
    let huge: Vec<Quantity> = capacity
        .iter()
        .filter(|(name, _)| name.starts_with("hugepages-"))
        .map(|(_, q)| *q)
        .collect();
    if let Some(memory) = left.get_mut("memory") {
        for bytes in &huge {
            *memory = floor(memory.minus(bytes));
        }
    }
    left
}

/// A threshold in units of what it limits.
fn amount_of(threshold: &Threshold, total: &Quantity) -> u64 {
    match threshold {
        Threshold::Amount(n) => *n,
        Threshold::Share(share) => share_of(u64::try_from(total.value()).unwrap_or(0), *share),
    }
}

/// `share` (0…1) of `total`, in parts per million so that no bit of a big number is lost twice.
pub fn share_of(total: u64, share: f64) -> u64 {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a share is checked to lie in 0…1"
    )]
    let millionths = (share.clamp(0.0, 1.0) * 1e6).round() as u64;
    u64::try_from(u128::from(total) * u128::from(millionths) / 1_000_000).unwrap_or(u64::MAX)
}

fn floor(quantity: Quantity) -> Quantity {
    if quantity.is_negative() {
        Quantity::ZERO
    } else {
        quantity
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Flags, load};

    fn config(change: impl FnOnce(&mut Config)) -> Config {
        let flags = Flags {
            hostname_override: Some("n".to_owned()),
            node_ips: vec![[10, 0, 0, 1].into()],
            ..Flags::default()
        };
        let mut config = load(&flags).unwrap();
        change(&mut config);
        config
    }

    fn machine() -> (Machine, Filesystem) {
        let machine = Machine {
            cpus: 4,
            memory_bytes: 8 << 30,
            hugepages: BTreeMap::from([(2 << 20, 16), (1 << 30, 0)]),
            ..Machine::default()
        };
        let nodefs = Filesystem {
            capacity_bytes: 100 << 30,
            ..Filesystem::default()
        };
        (machine, nodefs)
    }

    #[test]
    fn capacity_is_what_the_machine_has() {
        let (machine, nodefs) = machine();
        let shown: BTreeMap<_, _> = capacity(&machine, &nodefs, 110)
            .into_iter()
            .map(|(k, v)| (k, v.to_string()))
            .collect();
        let expected = [
            ("cpu", "4"),
            ("ephemeral-storage", "100Gi"),
            ("hugepages-1Gi", "0"),
            ("hugepages-2Mi", "32Mi"),
            ("memory", "8Gi"),
            ("pods", "110"),
        ];
        assert_eq!(
            shown,
            expected
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                .collect()
        );
    }

    #[test]
    fn allocatable_is_less_reserved_thresholds_and_huge_pages() {
        let (machine, nodefs) = machine();
        let total = capacity(&machine, &nodefs, 110);
        let config = config(|c| {
            c.kube_reserved.insert("cpu".into(), "200m".into());
            c.system_reserved.insert("memory".into(), "1Gi".into());
        });
        let left = allocatable(&total, &config);
        assert_eq!(left["cpu"].to_string(), "3800m");
        let expected = (8 << 30) - (1 << 30) - (100 << 20) - (32 << 20);
        assert_eq!(left["memory"].value(), expected);
        assert_eq!(left["ephemeral-storage"].value(), 90 * (1 << 30));
        assert_eq!(left["pods"].to_string(), "110");
        let enforced = enforced(&total, &config);
        assert_eq!(enforced["memory"].value(), (8 << 30) - (1 << 30));
    }

    #[test]
    fn more_reserved_than_there_is_leaves_nothing() {
        let (machine, nodefs) = machine();
        let total = capacity(&machine, &nodefs, 110);
        let config = config(|c| {
            c.system_reserved.insert("cpu".into(), "40".into());
        });
        assert!(allocatable(&total, &config)["cpu"].is_zero());
    }

    #[test]
    fn shares_are_exact_for_big_disks() {
        assert_eq!(share_of(100 << 30, 0.1), 10 << 30);
        assert_eq!(share_of(u64::MAX, 1.0), u64::MAX);
        assert_eq!(share_of(7, f64::NAN), 0);
    }
}
