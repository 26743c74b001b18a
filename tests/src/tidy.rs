//! Rules of the house that no compiler holds: dependency arrows, sizes, headers, links. Each rule
//! is a function from what it looks at to complaints.

use crate::{command, paths};
use anyhow::{Context, Result};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Longest source file, tests not counted; longer ones have two subjects.
const MAX_LINES: usize = 700;

/// Which of our packages a package may use. Arrows point one way only, and a package may skip a
/// step downwards.
const ARROWS: [(&str, &[&str]); 14] = [
    ("linux", &[]),
    ("proto", &[]),
    ("cni", &["linux"]),
    ("cni-bridge", &["cni", "linux"]),
    ("cni-routed", &["cni", "linux"]),
    ("cni-peers", &["cni-routed", "cni", "linux"]),
    ("cni-vxlan", &["cni-peers", "cni-routed", "cni"]),
    ("cni-hostgw", &["cni-peers", "cni-routed", "cni"]),
    ("pod-shim", &["linux"]),
    ("runtime", &["pod-shim", "cni", "linux"]),
    ("kubelet", &["runtime", "proto", "linux"]),
    ("csi-driver", &["proto", "linux"]),
    ("testkit", &["linux", "runtime", "pod-shim", "cni"]),
    ("xtask", &["testkit"]),
];

/// Packages that may use these crates: everything unsafe or raw goes through `linux`.
const RAW: [(&str, &[&str]); 3] = [
    ("syscalls", &["linux"]),
    ("netlink-sys", &["linux"]),
    ("netlink-packet-route", &["linux"]),
];

/// Packages that must stay without an async runtime.
const BLOCKING: [&str; 7] = [
    "linux",
    "cni",
    "cni-bridge",
    "cni-routed",
    "cni-vxlan",
    "cni-hostgw",
    "pod-shim",
];

/// Runs every rule.
///
/// # Errors
/// When something cannot be read.
pub fn tidy() -> Result<Vec<String>> {
    let root = paths::workspace();
    let files = tracked(&root)?;
    let mut complaints = dependencies(&root)?;
    for file in &files {
        let path = root.join(file);
        let Ok(text) = fs::read_to_string(&path) else {
            continue;
        };
        let extension = file.extension().and_then(|extension| extension.to_str());
        match extension {
            Some("rs") => complaints.extend(source(file, &text)),
            Some("md") => complaints.extend(links(&root, file, &text)),
            Some("yaml" | "yml") => complaints.extend(yaml(file, &text)),
            Some("json" | "conflist") => complaints.extend(json(file, &text)),
            _ => {}
        }
    }
    Ok(complaints)
}

/// Files that are, or are about to be, in the repository.
fn tracked(root: &Path) -> Result<Vec<PathBuf>> {
    let args = ["ls-files", "--cached", "--others", "--exclude-standard"];
    let list = command::stdout(command::command("git", &args).current_dir(root))?;
    Ok(list.lines().map(PathBuf::from).collect())
}

fn dependencies(root: &Path) -> Result<Vec<String>> {
    let args = ["metadata", "--no-deps", "--format-version=1", "--offline"];
    let text = command::stdout(command::cargo(&args).current_dir(root))?;
    let metadata: Value = serde_json::from_str(&text).context("parse cargo metadata")?;
    let mut uses: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let name = package["name"].as_str().unwrap_or_default().to_owned();
        let normal = package["dependencies"].as_array().into_iter().flatten();
        // Tests may use what they like.
        let normal = normal.filter(|dependency| dependency["kind"].is_null());
        let names = normal.filter_map(|dependency| dependency["name"].as_str().map(str::to_owned));
        uses.insert(name, names.collect());
    }
    Ok(check_arrows(&uses))
}

fn check_arrows(uses: &BTreeMap<String, Vec<String>>) -> Vec<String> {
    let mut complaints = Vec::new();
    for (package, dependencies) in uses {
        let Some((_, allowed)) = ARROWS.iter().find(|(name, _)| name == package) else {
            complaints.push(format!(
                "package {package} has no entry in tidy's list of arrows"
            ));
            continue;
        };
        for dependency in dependencies {
            let ours = ARROWS.iter().any(|(name, _)| name == dependency);
            if ours && !allowed.contains(&dependency.as_str()) {
                complaints.push(format!("{package} must not use {dependency}"));
            }
            let raw = RAW.iter().find(|(name, _)| name == dependency);
            if raw.is_some_and(|(_, packages)| !packages.contains(&package.as_str())) {
                complaints.push(format!(
                    "{package} must not use {dependency} but crate linux"
                ));
            }
            if dependency == "tokio" && BLOCKING.contains(&package.as_str()) {
                complaints.push(format!("{package} must stay without an async runtime"));
            }
        }
    }
    complaints
}

/// Rules about one source file.
fn source(file: &Path, text: &str) -> Vec<String> {
    let mut complaints = Vec::new();
    let name = file.display();
    let stem = file
        .file_stem()
        .map(|stem| stem.to_string_lossy().into_owned());
    let test_file = stem.is_some_and(|stem| stem == "tests" || stem.ends_with("_tests"))
        || file
            .iter()
            .any(|part| part == "e2e" || part == "tests" && file.iter().nth(1) == Some(part));
    let body = text.split("#[cfg(test)]").next().unwrap_or(text);
    let lines = body.lines().count();
    if lines > MAX_LINES && !test_file {
        complaints.push(format!(
            "{name} has {lines} lines without its tests, over {MAX_LINES}"
        ));
    }
    if !text.starts_with("//!") && !test_file {
        complaints.push(format!("{name} does not open with what it is for (`//!`)"));
    }
    let all: Vec<&str> = text.lines().collect();
    for (number, line) in all.iter().enumerate() {
        let line = line.trim_start();
        let at = format!("{name}:{}", number + 1);
        // Only what another test runs, or what measures, may be left out of a run.
        let ignored = line.strip_prefix(concat!("#[ign", "ore"));
        let fine = [" = \"run by", " = \"a measurement"];
        if ignored.is_some_and(|rest| !fine.iter().any(|start| rest.starts_with(start))) {
            complaints.push(format!("{at}: a test that never runs proves nothing"));
        }
        let silenced = [concat!("#[al", "low("), concat!("#![al", "low(")];
        let reason = all[number..]
            .iter()
            .take(5)
            .any(|line| line.contains("reason = "));
        if silenced.iter().any(|start| line.starts_with(start)) && !reason {
            complaints.push(format!("{at}: a silenced lint without its reason"));
        }
    }
    complaints
}

/// Relative links of a page must lead somewhere.
fn links(root: &Path, file: &Path, text: &str) -> Vec<String> {
    let dir = root.join(file);
    let dir = dir.parent().unwrap_or(root);
    targets(text)
        .into_iter()
        .filter(|target| !target.contains("://") && !target.starts_with(['#', '/']))
        .filter(|target| !target.starts_with("mailto:"))
        .map(|target| target.split('#').next().unwrap_or_default().to_owned())
        .filter(|target| !target.is_empty() && !dir.join(target).exists())
        .map(|target| format!("{}: link to {target} leads nowhere", file.display()))
        .collect()
}

/// What stands in the parentheses of `[…](…)`.
fn targets(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut fenced = false;
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        }
        if fenced {
            continue;
        }
        for part in line.split("](").skip(1) {
            if let Some((target, _)) = part.split_once(')') {
                found.push(target.to_owned());
            }
        }
    }
    found
}

fn yaml(file: &Path, text: &str) -> Option<String> {
    let parsed: Result<Vec<Value>, _> = serde_saphyr::from_multiple(text);
    parsed
        .err()
        .map(|error| format!("{} is no YAML: {error}", file.display()))
}

fn json(file: &Path, text: &str) -> Option<String> {
    let parsed: Result<Value, _> = serde_json::from_str(text);
    parsed
        .err()
        .map(|error| format!("{} is no JSON: {error}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uses(package: &str, dependency: &str) -> Vec<String> {
        check_arrows(&BTreeMap::from([(
            package.to_owned(),
            vec![dependency.to_owned()],
        )]))
    }

    #[test]
    fn arrows_point_down_only() {
        assert!(uses("kubelet", "runtime").is_empty());
        assert_eq!(uses("runtime", "kubelet"), ["runtime must not use kubelet"]);
        assert_eq!(uses("kubelet", "cni"), ["kubelet must not use cni"]);
        assert_eq!(
            uses("cni", "tokio"),
            ["cni must stay without an async runtime"]
        );
        assert_eq!(uses("new", "serde").len(), 1);
    }

    #[test]
    fn a_file_without_a_header_or_with_a_silenced_test_is_named() {
        let text = format!("fn a() {{}}\n{}]\nfn b() {{}}\n", concat!("#[ign", "ore"));
        let complaints = source(Path::new("a/b.rs"), &text);
        assert_eq!(complaints.len(), 2, "{complaints:?}");
        assert!(source(Path::new("a/b.rs"), "//! Fine.\n").is_empty());
    }

    #[test]
    fn links_in_code_blocks_are_not_followed() {
        let text = "see [a](b.md) and [c](d.md#e)\n```\n[x](y)\n```\n";
        assert_eq!(targets(text), ["b.md", "d.md#e"]);
    }
}
