//! Commands for people. They read the pool beside the driver that owns it and change nothing.

use crate::backend::mounts::Mounts;
use crate::model::{Kind, VolumeId};
use crate::store::{Record, SnapshotRecord, State, Store, VolumeRecord, encode};
use anyhow::{Context as _, Result};
use clap::{Args, ValueEnum};
use linux::loopdev::{self, LoopDevice, LoopStatus};
use serde::Serialize;
use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// Where to look, and how to say it.
#[derive(Debug, Args)]
struct Where {
    /// Directory of the volumes
    #[arg(long, value_name = "DIR", default_value = "/var/lib/ferrule-csi")]
    pool: PathBuf,
    /// Form of the answer
    #[arg(short, long, value_enum, default_value = "text")]
    output: Output,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people
    Text,
    /// For programs
    Json,
}

/// `csi-driver ls`
#[derive(Debug, Args)]
pub(super) struct Ls {
    #[command(flatten)]
    at: Where,
}

/// `csi-driver inspect`
#[derive(Debug, Args)]
pub(super) struct Inspect {
    /// Id or name of a volume or snapshot
    what: String,
    #[command(flatten)]
    at: Where,
}

/// `csi-driver fsck`
#[derive(Debug, Args)]
pub(super) struct Fsck {
    #[command(flatten)]
    at: Where,
}

/// One line of a list.
#[derive(Debug, Serialize)]
struct Line {
    id: String,
    name: String,
    what: &'static str,
    kind: &'static str,
    state: State,
    bytes: u64,
    allocated_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    mounts: Vec<PathBuf>,
}

/// The pool and what the kernel has of it.
struct World {
    root: PathBuf,
    store: Store,
    mounts: Mounts,
    devices: Vec<(LoopDevice, LoopStatus)>,
}

impl World {
    fn look(at: &Where) -> Result<Self> {
        let root = at
            .pool
            .canonicalize()
            .with_context(|| format!("look into {}", at.pool.display()))?;
        anyhow::ensure!(
            root.join("pool.json").is_file(),
            "{} is no pool of this driver",
            root.display()
        );
        Ok(Self {
            store: Store::read(&root)?,
            mounts: Mounts::read(&root)?,
            devices: devices(&root)?,
            root,
        })
    }

    fn image(&self, volume: &VolumeRecord) -> PathBuf {
        let file = if volume.kind.has_image() {
            "image"
        } else {
            "data"
        };
        self.root
            .join("volumes")
            .join(volume.id.as_str())
            .join(file)
    }

    fn snapshot_image(&self, snapshot: &SnapshotRecord) -> PathBuf {
        let dir = self.root.join("snapshots").join(snapshot.id.as_str());
        dir.join("image")
    }

    fn device(&self, image: &Path) -> Option<String> {
        let meta = image.metadata().ok()?;
        let found = self.devices.iter().find(|(_, status)| {
            (status.backing_device, status.backing_inode) == (meta.dev(), meta.ino())
        });
        found.map(|(device, _)| device.path().display().to_string())
    }

    fn volume(&self, volume: &VolumeRecord) -> Line {
        let image = self.image(volume);
        let mounts = self.mounts.of(&volume.id);
        Line {
            id: volume.id.to_string(),
            name: volume.name.clone(),
            what: "volume",
            kind: volume.kind.name(),
            state: volume.state,
            bytes: volume.capacity_bytes,
            allocated_bytes: allocated(&image),
            device: self.device(&image),
            mounts: mounts.iter().map(|m| m.mount_point.clone()).collect(),
        }
    }

    fn snapshot(&self, snapshot: &SnapshotRecord) -> Line {
        Line {
            id: snapshot.id.to_string(),
            name: snapshot.name.clone(),
            what: "snapshot",
            kind: snapshot.kind.name(),
            state: snapshot.state,
            bytes: snapshot.size_bytes,
            allocated_bytes: allocated(&self.snapshot_image(snapshot)),
            device: None,
            mounts: Vec::new(),
        }
    }

    fn lines(&self) -> Vec<Line> {
        let volumes = self.store.volumes.all();
        let snapshots = self.store.snapshots.all();
        let volumes = volumes.iter().map(|volume| self.volume(volume));
        let snapshots = snapshots.iter().map(|snapshot| self.snapshot(snapshot));
        volumes.chain(snapshots).collect()
    }
}

/// Devices whose file is where the pool is: others are nobody's business here.
fn devices(root: &Path) -> Result<Vec<(LoopDevice, LoopStatus)>> {
    let pool = root.metadata().context("inspect the pool")?.dev();
    let mut devices = loopdev::list().context("list loop devices")?;
    devices.retain(|(_, status)| status.backing_device == pool);
    Ok(devices)
}

fn allocated(image: &Path) -> u64 {
    image
        .metadata()
        .map_or(0, |meta| meta.blocks().saturating_mul(512))
}

impl Ls {
    pub(super) fn run(self) -> Result<()> {
        let lines = World::look(&self.at)?.lines();
        if self.at.output == Output::Json {
            println!("{}", serde_json::to_string_pretty(&lines)?);
            return Ok(());
        }
        println!(
            "{:44} {:8} {:5} {:8} {:>10} {:>10} {:12} NAME",
            "ID", "WHAT", "KIND", "STATE", "SIZE", "ON DISK", "DEVICE"
        );
        for line in lines {
            let state = format!("{:?}", line.state).to_lowercase();
            println!(
                "{:44} {:8} {:5} {:8} {:>10} {:>10} {:12} {}",
                line.id,
                line.what,
                line.kind,
                state,
                human(line.bytes),
                human(line.allocated_bytes),
                line.device.as_deref().unwrap_or("-"),
                line.name,
            );
        }
        Ok(())
    }
}

/// A size for people, in powers of 1024.
fn human(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if value.fract() == 0.0 {
        format!("{value} {}", UNITS[unit])
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

impl Inspect {
    pub(super) fn run(self) -> Result<()> {
        let world = World::look(&self.at)?;
        let named = |id: &str, name: &str| id == self.what || name == self.what;
        let mut found = false;
        for volume in world.store.volumes.all() {
            if named(volume.key(), volume.name()) {
                found = true;
                show(&world.volume(&volume), &volume, self.at.output)?;
            }
        }
        for snapshot in world.store.snapshots.all() {
            if named(snapshot.key(), snapshot.name()) {
                found = true;
                show(&world.snapshot(&snapshot), &snapshot, self.at.output)?;
            }
        }
        anyhow::ensure!(found, "no volume or snapshot is called {:?}", self.what);
        Ok(())
    }
}

fn show<R: Record>(line: &Line, record: &R, output: Output) -> Result<()> {
    if output == Output::Json {
        let both = serde_json::json!({"record": record, "kernel": line});
        println!("{}", serde_json::to_string_pretty(&both)?);
        return Ok(());
    }
    let record = encode(record)?;
    println!("{}", String::from_utf8_lossy(&record).trim());
    println!("on disk: {}", human(line.allocated_bytes));
    println!("device: {}", line.device.as_deref().unwrap_or("none"));
    for mount in &line.mounts {
        println!("mounted at {}", mount.display());
    }
    Ok(())
}

impl Fsck {
    /// Whether all is as it should be.
    pub(super) fn run(self) -> Result<bool> {
        let world = World::look(&self.at)?;
        let findings = findings(&world);
        if self.at.output == Output::Json {
            println!("{}", serde_json::to_string_pretty(&findings)?);
        } else {
            for finding in &findings {
                println!("{finding}");
            }
            let count = findings.len();
            println!("{} records, {count} findings", world.lines().len());
        }
        Ok(findings.is_empty())
    }
}

/// Where records, files, devices and mounts disagree.
fn findings(world: &World) -> Vec<String> {
    let mut found = Vec::new();
    let store = &world.store;
    let tables = [
        store.volumes.unreadable(),
        store.snapshots.unreadable(),
        store.groups.unreadable(),
    ];
    for lost in tables.concat() {
        found.push(format!("{}: no record, {}", lost.path.display(), lost.why));
    }
    let mut known = BTreeSet::new();
    for volume in store.volumes.all() {
        known.insert(volume.id.to_string());
        let image = world.image(&volume);
        if volume.state == State::Ready && !image.exists() {
            found.push(format!(
                "volume {}: {} is missing",
                volume.id,
                image.display()
            ));
        }
        if volume.state != State::Ready {
            let state = format!("{:?}", volume.state).to_lowercase();
            found.push(format!("volume {}: half done ({state})", volume.id));
        }
        found.extend(wrong_content(&volume, &image));
    }
    for snapshot in store.snapshots.all() {
        known.insert(snapshot.id.to_string());
        let image = world.snapshot_image(&snapshot);
        if snapshot.state == State::Ready && !image.exists() {
            let path = image.display();
            found.push(format!("snapshot {}: {path} is missing", snapshot.id));
        }
    }
    for folder in ["volumes", "snapshots"] {
        let dir = world.root.join(folder);
        for name in linux::fs::list_dir(&dir).unwrap_or_default() {
            if name.to_str().is_none_or(|name| !known.contains(name)) {
                let path = dir.join(name);
                found.push(format!("{}: no record names it", path.display()));
            }
        }
    }
    for (device, status) in &world.devices {
        let ours = VolumeId::parse(&status.name).is_some();
        if ours && !known.contains(&status.name) {
            let (path, name) = (device.path(), &status.name);
            found.push(format!(
                "{}: device of {name}, which is not there",
                path.display()
            ));
        }
    }
    found
}

fn wrong_content(volume: &VolumeRecord, image: &Path) -> Option<String> {
    let Kind::Filesystem(filesystem) = volume.kind else {
        return None;
    };
    if volume.state != State::Ready {
        return None;
    }
    let file = std::fs::File::open(image).ok()?;
    let uuid = volume.filesystem_uuid.as_deref();
    let id = volume.id.as_str();
    let outcome = crate::backend::grow::expect(&file, image, id, filesystem, uuid);
    outcome.err().map(|error| crate::error::chain(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_said_in_the_largest_unit() {
        assert_eq!(human(0), "0 B");
        assert_eq!(human(10 << 30), "10 GiB");
        assert_eq!(human(1536), "1.5 KiB");
    }
}
