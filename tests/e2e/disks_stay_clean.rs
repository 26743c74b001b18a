//! What nodes write goes away again: images nobody uses, logs that were rotated or whose container
//! was replaced, everything of pods that went while nobody looked.

use anyhow::{Context, Result, ensure};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use testkit::cluster::spare::Spare;
use testkit::process::until;
use testkit::scenario::{BUSYBOX, LIMIT, Scenario, SpareNode, container, script_pod, text};

const AGNHOST: &str = "registry.k8s.io/e2e-test-images/agnhost:2.63.0";

#[test]
fn unused_images_go_when_the_disk_is_too_full_and_used_ones_stay() -> Result<()> {
    let scenario = Scenario::begin("image-gc")?;
    let node = scenario.spare_node(&Spare {
        disk_bytes: Some(400 << 20),
        configuration: vec![
            (
                ", nodefs.available: 500Mi, imagefs.available: 500Mi",
                String::new(),
            ),
            ("ThresholdPercent: 100", "ThresholdPercent: 80".into()),
            ("ThresholdPercent: 99", "ThresholdPercent: 60".into()),
        ],
        extra: "imageMinimumGCAge: 1s\n".into(),
        ..Spare::default()
    })?;
    scenario.apply(&script_pod("stays", "exec sleep 1000", &node.pin()))?;
    let other = script_pod("goes", "exec sleep 1000", &node.pin()).replace(BUSYBOX, AGNHOST);
    scenario.apply(&other)?;
    scenario.ready("stays")?;
    scenario.ready("goes")?;
    ensure!(stored(&node, AGNHOST)?, "the image is not recorded");
    scenario.kubectl(&["delete", "pod", "goes"])?;
    ensure!(stored(&node, AGNHOST)?, "a roomy disk lost an image");

    let fill = File::create(node.agent.inside("/var/lib/kubelet/fill")?)?;
    fill_to(&fill, &node.agent.inside("/var/lib/kubelet")?, 90)?;
    // The next look is at once after a start.
    node.agent.kill()?;
    node.agent.start()?;
    until(
        "the unused image to go",
        LIMIT,
        || Ok(()),
        || {
            ensure!(!stored(&node, AGNHOST)?, "{AGNHOST} is still there");
            Ok(())
        },
    )?;
    ensure!(stored(&node, BUSYBOX)?, "an image in use is gone");
    let event = ["events", "--field-selector", "reason=FreeDiskSpaceFailed"];
    let cluster_events = scenario
        .admin
        .json(&[&["get", "--all-namespaces"], &event[..]].concat())?;
    let about = cluster_events["items"].as_array().into_iter().flatten();
    let about = about.filter(|event| text(event, "/involvedObject/name") == node.name);
    // The file that fills the disk cannot be collected: more was wanted than could be freed.
    ensure!(about.count() > 0, "{cluster_events}");
    scenario.apply(&other)?;
    scenario.ready("goes")?;
    Ok(())
}

/// Whether a node has a record of an image by that name.
fn stored(node: &SpareNode, image: &str) -> Result<bool> {
    let records = node.agent.inside("/var/lib/ferrule/images")?;
    for entry in std::fs::read_dir(records)? {
        let text = std::fs::read_to_string(entry?.path()).unwrap_or_default();
        if text.contains(image) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Grows a file until the filesystem is used to so many percent.
fn fill_to(file: &File, place: &Path, percent: u64) -> Result<()> {
    use std::os::unix::fs::FileExt;
    let stat = rustix::fs::statvfs(place)?;
    let (all, free) = (stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize);
    let bytes = free.saturating_sub(all * (100 - percent) / 100);
    let piece = vec![b'x'; 1 << 20];
    for number in 0..bytes >> 20 {
        file.write_all_at(&piece, number << 20)?;
    }
    Ok(())
}

#[test]
fn a_pod_deleted_while_the_agent_was_away_leaves_nothing() -> Result<()> {
    let scenario = Scenario::begin("orphan-left")?;
    let node = scenario.spare_node(&Spare::default())?;
    let extra =
        "    volumeMounts: [{name: memory, mountPath: /memory}, {name: disk, mountPath: /disk}]\n";
    let volumes =
        "  volumes: [{name: memory, emptyDir: {medium: Memory}}, {name: disk, emptyDir: {}}]\n";
    scenario.apply(&script_pod(
        "orphan",
        "echo up; exec sleep 1000",
        &format!("{extra}{volumes}{}", node.pin()),
    ))?;
    scenario.ready("orphan")?;
    node.agent.kill()?;
    scenario.kubectl(&["delete", "pod", "orphan", "--force", "--grace-period=0"])?;
    node.agent.start()?;
    scenario.nothing_left_on(&node.name)
}

#[test]
fn a_container_that_crashes_again_and_again_keeps_its_last_two_logs() -> Result<()> {
    let scenario = Scenario::begin("crash-logs")?;
    let node = scenario.spare_node(&Spare::default())?;
    scenario.apply(&script_pod("crasher", "echo crash; exit 1", &node.pin()))?;
    let (pod, _) = scenario.watch_pod("crasher", "three restarts", |event| {
        container(&event.object, "main")["restartCount"].as_u64() >= Some(3)
    })?;
    let logs = node.agent.inside(&log_directory(&pod))?;
    // The newest attempt's, and the newest dead one's; in a back-off that is the same.
    until(
        "the older logs to go",
        LIMIT,
        || Ok(()),
        || {
            let names = names(&logs)?;
            let old = ["0.log", "1.log"]
                .iter()
                .any(|old| names.iter().any(|name| name == old));
            ensure!(!old && (1..=2).contains(&names.len()), "{names:?}");
            Ok(())
        },
    )?;
    // Between its end and the back-off that says so there is no previous one.
    until(
        "the previous log",
        LIMIT,
        || Ok(()),
        || {
            let logs = scenario.kubectl(&["logs", "crasher", "--previous"])?;
            ensure!(logs == "crash\n", "{logs:?}");
            Ok(())
        },
    )
}

fn log_directory(pod: &serde_json::Value) -> String {
    let field = |name: &str| text(pod, &format!("/metadata/{name}"));
    let (namespace, name, uid) = (field("namespace"), field("name"), field("uid"));
    format!("/var/log/pods/{namespace}_{name}_{uid}/main")
}

fn names(directory: &Path) -> Result<Vec<String>> {
    let mut names: Vec<String> = std::fs::read_dir(directory)?
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    Ok(names)
}

#[test]
fn a_followed_log_is_whole_over_many_rotations_and_old_files_are_compressed_and_few() -> Result<()>
{
    const LINES: u64 = 1_000_000;
    let scenario = Scenario::begin("rotation")?;
    let node = scenario.spare_node(&Spare::default())?;
    // Some 150 MB of log in 15 files of 10 MiB, as fast as one process can write.
    let script = format!(
        "echo begin; while [ ! -e /shared/go ]; do sleep 0.1; done; \
         awk 'BEGIN {{ for (i = 0; i < {LINES}; i++) printf \"%07d %0100d\\n\", i, 0 }}'; \
         touch /shared/written; while [ ! -e /shared/end ]; do sleep 0.1; done"
    );
    let place = format!("/tmp/{}", scenario.namespace);
    let extra = format!(
        "    volumeMounts: [{{name: shared, mountPath: /shared}}]\n  restartPolicy: Never\n{}  \
         volumes: [{{name: shared, hostPath: {{path: {place}, type: DirectoryOrCreate}}}}]\n",
        node.pin()
    );
    scenario.apply(&script_pod("writer", &script, &extra))?;
    let pod = scenario.ready("writer")?;
    let mut kubectl = scenario
        .admin
        .command(&["-n", &scenario.namespace, "logs", "-f", "writer"])
        .stdout(Stdio::piped())
        .spawn()?;
    let stdout = kubectl.stdout.take().context("no output")?;
    let shared: PathBuf = node.agent.inside(&place)?;
    let mut lines = BufReader::new(stdout).lines();
    let first = lines.next().context("no first line")??;
    ensure!(first == "begin", "{first:?}");
    File::create(shared.join("go"))?;
    let started = std::time::Instant::now();
    let reader = std::thread::spawn(move || -> Result<u64> {
        let mut expected = 0;
        for line in lines {
            let line = line?;
            let number = line.split(' ').next().unwrap_or_default().parse();
            ensure!(number == Ok(expected), "line {expected} is {line:?}");
            expected += 1;
        }
        Ok(expected)
    });
    until(
        "the writer to be done",
        LIMIT * 2,
        || Ok(()),
        || {
            ensure!(shared.join("written").exists(), "it still writes");
            Ok(())
        },
    )?;
    println!("written in {:?}", started.elapsed());
    let logs = node.agent.inside(&log_directory(&pod))?;
    until(
        "old files to be compressed",
        LIMIT,
        || Ok(()),
        || {
            let names = names(&logs)?;
            let packed = names.iter().filter(|name| name.ends_with(".gz")).count();
            ensure!(names.len() == 5 && packed == 3, "{names:?}");
            Ok(())
        },
    )?;
    File::create(shared.join("end"))?;
    scenario.finished("writer")?;
    let seen = reader
        .join()
        .map_err(|_| anyhow::anyhow!("the reader panicked"))??;
    println!("followed in {:?}", started.elapsed());
    ensure!(seen == LINES, "{seen} lines of {LINES} came");
    ensure!(kubectl.wait()?.success(), "kubectl logs -f failed");
    Ok(())
}
