//! A node whose disk is full: what runs runs on, what cannot begin says why, and when there is
//! space again everything goes on without a restart.

use anyhow::{Context, Result, ensure};
use std::fs::File;
use std::io::Write;
use std::path::Path;
use testkit::cluster::spare::Spare;
use testkit::process::until;
use testkit::scenario::{LIMIT, Scenario, SpareNode, container, is_ready, script_pod, text};

const AGNHOST: &str = "registry.k8s.io/e2e-test-images/agnhost:2.63.0";
/// Long lines: what is left of a file's last page is soon full.
const TICKS: &str =
    "i=0; while :; do printf 'tick %d %01000d\\n' $i 0; i=$((i+1)); sleep 0.1; done";
const NO_SPACE: &str = "no space left on device";

/// No threshold but memory's: the scenario fills the disk to the last byte.
fn small_disk() -> Spare {
    Spare {
        disk_bytes: Some(512 << 20),
        configuration: vec![(
            ", nodefs.available: 500Mi, imagefs.available: 500Mi",
            String::new(),
        )],
        ..Spare::default()
    }
}

#[test]
fn pods_run_on_new_ones_say_why_not_and_space_mends_everything() -> Result<()> {
    let scenario = Scenario::begin("full-disk")?;
    let node = scenario.spare_node(&small_disk())?;
    let pin = node.pin();
    scenario.apply(&script_pod("living", TICKS, &pin))?;
    scenario.apply(&script_pod("leaving", "exec sleep 1000", &pin))?;
    let before = scenario.ready("living")?;
    scenario.ready("leaving")?;

    let fill = node.agent.inside("/var/lib/kubelet/fill")?;
    fill_up(&fill)?;
    scenario.apply(&script_pod("cached", "exec sleep 1000", &pin))?;
    let pulled = script_pod("pulled", "exec sleep 1000", &pin);
    scenario.apply(&pulled.replace(testkit::scenario::BUSYBOX, AGNHOST))?;
    named(&scenario, "cached")?;
    named(&scenario, "pulled")?;
    scenario.kubectl(&["delete", "pod", "leaving", "--wait=false"])?;
    scenario.gone("leaving")?;
    ensure!(scenario.kubectl(&["exec", "living", "--", "echo", "here"])? == "here\n");
    // Its end made room.
    let more = fill.with_extension("more");
    fill_up(&more)?;

    // Nothing of what is on the disk may be spoilt by an agent that cannot write.
    node.agent.kill()?;
    node.agent.start()?;
    answers(&scenario, "living")?;
    let running = node.agent.clone();
    std::fs::remove_file(&fill)?;
    std::fs::remove_file(&more)?;
    scenario.ready("cached")?;
    let after = scenario.json(&["get", "pod", "living"])?;
    let id = |pod| text(container(pod, "main"), "/containerID");
    ensure!(
        is_ready(&after) && id(&before) == id(&after),
        "{}",
        after["status"]
    );
    ensure!(
        container(&after, "main")["restartCount"] == 0,
        "{}",
        after["status"]
    );
    ensure!(running.is_alive()?, "the agent crashed");
    whole_log(&scenario)?;
    scenario.kubectl(&[
        "delete",
        "pod",
        "cached",
        "living",
        "pulled",
        "--wait=false",
    ])?;
    for pod in ["cached", "living", "pulled"] {
        scenario.gone(pod)?;
    }
    scenario.nothing_left_on(&node.name)
}

/// The last ticks are there, in order, behind a note that tells how many are not.
fn whole_log(scenario: &Scenario) -> Result<()> {
    let logs = until(
        "the log to go on",
        LIMIT,
        || Ok(()),
        || {
            let logs = scenario.kubectl(&["logs", "living"])?;
            let (_, after) = logs
                .split_once("log lines were dropped")
                .context("no note")?;
            ensure!(after.lines().count() > 5, "nothing after the note");
            Ok(logs)
        },
    )?;
    let ticks = logs.lines().filter_map(|line| line.strip_prefix("tick "));
    let number = |text: &str| text.split(' ').next().and_then(|n| n.parse().ok());
    let ticks: Vec<u64> = ticks.map(|text| number(text).unwrap_or(0)).collect();
    ensure!(ticks.is_sorted(), "out of order: {logs}");
    let torn = logs
        .lines()
        .find(|line| !line.starts_with("tick ") && !line.contains("were dropped"));
    ensure!(torn.is_none(), "a torn line: {torn:?}");
    Ok(())
}

/// The reason is in the pod's status or in its events.
fn named(scenario: &Scenario, pod: &str) -> Result<()> {
    let field = format!("involvedObject.name={pod}");
    scenario.watch(
        &["events", "--field-selector", &field],
        &format!("an event about {pod} that names the full disk"),
        |event| {
            let message = text(&event.object, "/message").to_lowercase();
            event.object["type"] == "Warning" && message.contains(NO_SPACE)
        },
    )?;
    let object = scenario.json(&["get", "pod", pod])?;
    ensure!(!is_ready(&object), "{pod} runs: {}", object["status"]);
    Ok(())
}

fn answers(scenario: &Scenario, pod: &str) -> Result<()> {
    let exec = || scenario.kubectl(&["exec", pod, "--", "true"]).map(drop);
    until("the agent to answer", LIMIT, || Ok(()), exec)
}

/// Big pieces first, then small ones, until not a byte fits.
fn fill_up(path: &Path) -> Result<()> {
    let mut file = File::create(path).with_context(|| format!("create {}", path.display()))?;
    for size in [1 << 20, 4096, 1] {
        let piece = vec![b'x'; size];
        while file.write_all(&piece).is_ok() {}
    }
    let probe = path.with_extension("probe");
    let full = std::fs::write(&probe, vec![b'x'; 8192]).is_err();
    drop(std::fs::remove_file(&probe));
    ensure!(full, "{} is not full", path.display());
    Ok(())
}

#[test]
fn a_pull_that_filled_the_disk_leaves_nothing_and_works_when_there_is_space() -> Result<()> {
    let scenario = Scenario::begin("full-pull")?;
    let node = scenario.spare_node(&small_disk())?;
    scenario.apply(&script_pod("small", "exec sleep 1000", &node.pin()))?;
    scenario.ready("small")?;
    // Room for a pod, not for the image.
    let fill = node.agent.inside("/var/lib/kubelet/fill")?;
    fill_up(&fill)?;
    let length = std::fs::metadata(&fill)?.len();
    File::options()
        .write(true)
        .open(&fill)?
        .set_len(length - (8 << 20))?;
    let pod = script_pod("big", "exec sleep 1000", &node.pin());
    scenario.apply(&pod.replace(testkit::scenario::BUSYBOX, AGNHOST))?;
    named(&scenario, "big")?;
    let layers = node.agent.inside("/var/lib/ferrule/layers")?;
    no_partial_layers(&layers)?;
    std::fs::remove_file(&fill)?;
    scenario.ready("big")?;
    no_partial_layers(&layers)?;
    scenario.kubectl(&["delete", "pod", "small", "big"])?;
    left(&scenario, &node)
}

fn left(scenario: &Scenario, node: &SpareNode) -> Result<()> {
    scenario.nothing_left_on(&node.name)
}

fn no_partial_layers(layers: &Path) -> Result<()> {
    until(
        "half a layer to go",
        LIMIT,
        || Ok(()),
        || {
            for entry in std::fs::read_dir(layers)? {
                let name = entry?.file_name();
                let name = name.to_string_lossy();
                ensure!(!name.contains(".partial-"), "{name} is left");
            }
            Ok(())
        },
    )
}
