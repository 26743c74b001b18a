//! Wrong bytes from a registry: named by digest, never run, nothing half-unpacked kept, and good
//! bytes are taken as soon as they come.

use anyhow::{Result, ensure};
use testkit::cluster::spare::Spare;
use testkit::process::until;
use testkit::registry::{Manner, Registry, Served};
use testkit::scenario::{LIMIT, Scenario, SpareNode, container, script_pod, text, waiting_reason};

const BASE: (&str, &str) = ("e2e-test-images/busybox", "1.37.0-1");

/// A registry, and a node that takes images of `tampered.test` from it.
fn begin(name: &str) -> Result<(Scenario, Registry, SpareNode)> {
    let scenario = Scenario::begin(name)?;
    let layout = &scenario.layout;
    let registry = Registry::start(layout.control_address(), &layout.registry())?;
    let mirror = format!(
        "  mirrors:\n    tampered.test: [\"http://{}\"]\n",
        registry.address
    );
    let node = scenario.spare_node(&Spare {
        runtime: vec![("  mirrors:\n", mirror)],
        ..Spare::default()
    })?;
    Ok((scenario, registry, node))
}

fn pod(image: &str, node: &SpareNode) -> String {
    script_pod("pod", "cat /marker; echo; exec sleep 1000", &node.pin())
        .replace(testkit::scenario::BUSYBOX, image)
}

/// Waits for the refusal and checks that nothing of the image is on the node.
fn refused(scenario: &Scenario, node: &SpareNode, served: &Served, word: &str) -> Result<()> {
    let (pod, _) = scenario.watch_pod("pod", "ErrImagePull", |event| {
        waiting_reason(&event.object, "main") == "ErrImagePull"
    })?;
    let message = text(container(&pod, "main"), "/state/waiting/message");
    ensure!(message.contains(word), "{message} does not name {word}");
    let field = "involvedObject.name=pod,reason=Failed";
    scenario.watch(
        &["events", "--field-selector", field],
        "an event that names it",
        |event| text(&event.object, "/message").contains(word),
    )?;
    nothing_unpacked(node, served)
}

fn nothing_unpacked(node: &SpareNode, served: &Served) -> Result<()> {
    let layers = node.agent.inside("/var/lib/ferrule/layers")?;
    let own = served.diff_id.trim_start_matches("sha256:");
    until(
        "nothing half-unpacked to be left",
        LIMIT,
        || Ok(()),
        || {
            for entry in std::fs::read_dir(&layers)? {
                let name = entry?.file_name().to_string_lossy().into_owned();
                ensure!(!name.contains(".partial-") && name != own, "{name} is left");
            }
            Ok(())
        },
    )
}

fn runs_with(scenario: &Scenario, marker: &str) -> Result<()> {
    scenario.ready("pod")?;
    until(
        "the marker to be read",
        LIMIT,
        || Ok(()),
        || {
            let logs = scenario.kubectl(&["logs", "pod"])?;
            ensure!(logs.trim() == marker, "{logs:?} instead of {marker:?}");
            Ok(())
        },
    )
}

#[test]
fn a_layer_with_a_wrong_byte_is_refused_until_it_is_right() -> Result<()> {
    let (scenario, registry, node) = begin("wrong-byte")?;
    let served = registry.put("one", BASE, "the right bytes", 300_000)?;
    registry.behave(Manner::WrongByte);
    scenario.apply(&pod("tampered.test/any:one", &node))?;
    refused(&scenario, &node, &served, &served.layer)?;
    registry.behave(Manner::Honest);
    runs_with(&scenario, "the right bytes")
}

#[test]
fn a_layer_that_ends_early_is_refused_until_it_is_whole() -> Result<()> {
    let (scenario, registry, node) = begin("short-layer")?;
    let served = registry.put("one", BASE, "all of it", 300_000)?;
    registry.behave(Manner::Short);
    scenario.apply(&pod("tampered.test/any:one", &node))?;
    let host = registry.address.to_string();
    refused(&scenario, &node, &served, &host)?;
    registry.behave(Manner::Honest);
    runs_with(&scenario, "all of it")
}

#[test]
fn another_manifest_than_the_digest_asked_for_is_refused() -> Result<()> {
    let (scenario, registry, node) = begin("wrong-manifest")?;
    registry.put("other", BASE, "another image", 1000)?;
    let served = registry.put("one", BASE, "the image asked for", 1000)?;
    registry.behave(Manner::WrongManifest);
    scenario.apply(&pod(&format!("tampered.test/any@{}", served.digest), &node))?;
    refused(&scenario, &node, &served, &served.digest)?;
    registry.behave(Manner::Honest);
    runs_with(&scenario, "the image asked for")
}

#[test]
fn a_pull_cut_off_by_a_killed_agent_is_done_again_and_leaves_no_half() -> Result<()> {
    let (scenario, registry, node) = begin("killed-pull")?;
    let served = registry.put("one", BASE, "slow but whole", 3_000_000)?;
    registry.behave(Manner::Slow);
    scenario.apply(&pod("tampered.test/any:one", &node))?;
    let layers = node.agent.inside("/var/lib/ferrule/layers")?;
    let own = served.diff_id.trim_start_matches("sha256:").to_owned();
    let halves = || -> Result<Vec<String>> {
        let entries = std::fs::read_dir(&layers)?.flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        Ok(names.filter(|name| name.contains(".partial-")).collect())
    };
    until(
        "the pull to be half done",
        LIMIT,
        || Ok(()),
        || {
            let halves = halves()?;
            ensure!(
                halves.iter().any(|name| name.starts_with(&own)),
                "{halves:?}"
            );
            Ok(())
        },
    )?;
    node.agent.kill()?;
    registry.behave(Manner::Honest);
    node.agent.start()?;
    runs_with(&scenario, "slow but whole")?;
    ensure!(halves()?.is_empty(), "{:?} are left", halves()?);
    Ok(())
}
