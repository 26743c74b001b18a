//! Named parts of the upstream suite. A spec's name carries its tags, and the expressions match
//! names as `--ginkgo.focus` and `--ginkgo.skip` do.

use anyhow::{Context, Result};

/// A part of the suite under a short name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Suite {
    /// As given on the command line.
    pub name: &'static str,
    /// What it is, for `--help` and reports.
    pub about: &'static str,
    /// Regular expression of the specs to run.
    pub focus: &'static str,
    /// Regular expression of those to leave out; empty leaves out none.
    pub skip: &'static str,
}

/// Left out where nothing else is said: specs that take minutes by design, want a cluster for
/// themselves, or need features that are off by default.
pub const DEFAULT_SKIP: &str = r"\[Slow\]|\[Serial\]|\[Disruptive\]|\[Feature:";

/// Every suite.
pub const SUITES: &[Suite] = &[
    Suite {
        name: "node-conformance",
        about: "all 236 that can run side by side",
        focus: r"\[NodeConformance\]",
        skip: DEFAULT_SKIP,
    },
    Suite {
        name: "node-conformance-slow",
        about: "the other 14: slow ones, and those that want the node for themselves",
        focus: r"\[NodeConformance\].*\[(Slow|Serial)\]|\[(Slow|Serial)\].*\[NodeConformance\]",
        skip: "",
    },
    Suite {
        name: "node-core",
        about: "the 141 that certification asks of a node",
        focus: r"\[NodeConformance\].*\[Conformance\]|\[Conformance\].*\[NodeConformance\]",
        skip: DEFAULT_SKIP,
    },
    Suite {
        name: "first-node",
        about: "123 about single pods and their volumes",
        focus: r"\[sig-node\] (Pods|Variable Expansion|Containers|ConfigMap|Secrets|Downward API|Kubelet|InitContainer \[NodeConformance\]).*\[NodeConformance\]|\[sig-storage\] (ConfigMap|Secrets|Downward API volume|EmptyDir volumes|Projected).*\[NodeConformance\]",
        skip: DEFAULT_SKIP,
    },
    Suite {
        name: "sig-network",
        about: "the 47 of certification about services, DNS and pods' networks",
        focus: r"\[sig-network\].*\[Conformance\]",
        skip: "",
    },
    Suite {
        name: "conformance",
        about: "all 446 of certification, the serial ones after the others",
        focus: r"\[Conformance\]",
        skip: "",
    },
];

/// The suite of that name.
///
/// # Errors
/// When there is none; the message lists those there are.
pub fn find(name: &str) -> Result<&'static Suite> {
    let names: Vec<&str> = SUITES.iter().map(|suite| suite.name).collect();
    let found = SUITES.iter().find(|suite| suite.name == name);
    found.with_context(|| format!("no suite {name}; there are {}", names.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_suite_is_found_by_its_name_and_an_unknown_one_is_told_the_names() {
        assert_eq!(find("node-core").unwrap().name, "node-core");
        let error = find("nodes").unwrap_err().to_string();
        assert!(error.contains("node-conformance"), "{error}");
    }
}
