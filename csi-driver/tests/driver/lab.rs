//! A pool on a filesystem of its own, a driver on it, and the calls of a client.

use linux::process::namespace::{self, Namespaces};
use proto::csi::v1;
use proto::csi::v1::controller_client::ControllerClient;
use proto::csi::v1::group_controller_client::GroupControllerClient;
use proto::csi::v1::node_client::NodeClient;
use proto::csi::v1::volume_capability::access_mode::Mode;
use proto::csi::v1::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const GIB: u64 = 1 << 30;

const DRIVER: &str = env!("CARGO_BIN_EXE_csi-driver");

/// What is under the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum On {
    /// Files can share blocks.
    Xfs,
    /// They cannot.
    Ext4,
}

/// A pool and paths beside it. What is mounted below goes with it.
pub(crate) struct Lab {
    dir: tempfile::TempDir,
}

impl Lab {
    pub(crate) fn new(on: On) -> Self {
        Self::sized(on, 8 * GIB)
    }

    pub(crate) fn sized(on: On, bytes: u64) -> Self {
        keep_to_ourselves();
        let dir = tempfile::Builder::new()
            .prefix("csi-driver-")
            .tempdir_in("/var/tmp");
        let lab = Self { dir: dir.unwrap() };
        let image = lab.path("pool.img");
        std::fs::File::create(&image)
            .unwrap()
            .set_len(bytes)
            .unwrap();
        match on {
            On::Xfs => run(Command::new("mkfs.xfs").args(["-q", "-K"]).arg(&image)),
            On::Ext4 => run(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&image)),
        };
        let mount = lab.path("mnt");
        std::fs::create_dir(&mount).unwrap();
        run(Command::new("mount")
            .args(["-o", "loop"])
            .arg(&image)
            .arg(&mount));
        lab
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn pool(&self) -> PathBuf {
        self.path("mnt/pool")
    }

    pub(crate) fn image(&self, id: &str) -> PathBuf {
        self.pool().join("volumes").join(id).join("image")
    }

    /// Starts a driver and waits until it answers.
    pub(crate) fn start(&self) -> Running {
        self.start_with(None)
    }

    /// Starts a driver that kills itself at a step.
    pub(crate) fn start_with(&self, die_at: Option<u32>) -> Running {
        let socket = self.path("csi.sock");
        let _ = std::fs::remove_file(&socket);
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.path("log"));
        let mut command = Command::new(DRIVER);
        command
            .args([
                "run",
                "--node",
                "here",
                "--reserve",
                "1",
                "--default-fstype",
                "xfs",
            ])
            .arg("--pool")
            .arg(self.pool())
            .arg("--endpoint")
            .arg(&socket)
            .stderr(log.unwrap())
            .stdin(Stdio::null());
        if let Some(step) = die_at {
            command.env("FERRULE_DIE_AT", step.to_string());
        }
        let mut child = command.spawn().unwrap();
        let started = Instant::now();
        while UnixStream::connect(&socket).is_err() {
            let ended = child.try_wait().unwrap();
            assert!(
                ended.is_none(),
                "the driver ended: {ended:?}\n{}",
                self.log()
            );
            assert!(started.elapsed() < Duration::from_secs(60), "no driver");
            std::thread::sleep(Duration::from_millis(2));
        }
        let runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = { runtime }.enable_all().build().unwrap();
        let address = format!("unix://{}", socket.display());
        let endpoint = Endpoint::from_shared(address).unwrap();
        let channel = runtime.block_on(endpoint.connect()).unwrap();
        Running {
            child,
            runtime,
            channel,
        }
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    fn tool(&self, word: &str) -> std::process::Output {
        let mut command = Command::new(DRIVER);
        command
            .arg(word)
            .arg("--pool")
            .arg(self.pool())
            .output()
            .unwrap()
    }

    /// Records, files, devices and mounts agree.
    pub(crate) fn assert_sound(&self, when: &str) {
        let output = self.tool("fsck");
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{when}: {said}\n{}", self.log());
    }

    /// Nothing is left of any volume.
    pub(crate) fn assert_empty(&self, when: &str) {
        self.assert_sound(when);
        let output = self.tool("ls");
        let said = String::from_utf8_lossy(&output.stdout);
        assert_eq!(said.lines().count(), 1, "{when}: {said}");
        assert_eq!(self.mounts(), Vec::<PathBuf>::new(), "{when}");
        assert_eq!(self.devices(), Vec::<String>::new(), "{when}");
        for folder in ["volumes", "snapshots", "frozen"] {
            let left = linux::fs::list_dir(&self.pool().join(folder)).unwrap();
            assert!(left.is_empty(), "{when}: {folder} holds {left:?}");
        }
    }

    /// What is mounted below the lab, the pool's filesystem not counted.
    pub(crate) fn mounts(&self) -> Vec<PathBuf> {
        let mounts = linux::mountinfo::read().unwrap().into_iter();
        let own = self.path("mnt");
        mounts
            .map(|mount| mount.mount_point)
            .filter(|point| point.starts_with(self.dir.path()) && *point != own)
            .collect()
    }

    /// Names of loop devices whose file is in the pool.
    pub(crate) fn devices(&self) -> Vec<String> {
        let pool = self.path("mnt").metadata().unwrap().dev();
        let all = linux::loopdev::list().unwrap().into_iter();
        all.filter(|(_, status)| status.backing_device == pool)
            .map(|(_, status)| status.name)
            .collect()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for path in self.mounts().iter().rev() {
            let _ = linux::mount::device::unmount(path);
        }
        for (device, _) in linux::loopdev::list().unwrap_or_default() {
            let pool = self.path("mnt").metadata().map(|meta| meta.dev());
            if device
                .status()
                .is_ok_and(|s| pool.is_ok_and(|dev| dev == s.backing_device))
            {
                let _ = device.detach();
            }
        }
        // A device of a volume that is just going holds the filesystem a little longer.
        let started = Instant::now();
        while linux::mount::device::unmount(&self.path("mnt")).is_err() {
            if started.elapsed() > Duration::from_secs(10) {
                eprintln!("{} is still mounted", self.path("mnt").display());
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Gives this test's thread, and all that it starts, a mount namespace of its own. Whoever makes
/// one elsewhere on the machine would copy our mounts, and hold our devices with them.
fn keep_to_ourselves() {
    let mount = Namespaces {
        mount: true,
        ..Namespaces::default()
    };
    namespace::unshare(mount).unwrap();
    linux::mount::make_all_private().unwrap();
}

pub(crate) fn run(command: &mut Command) {
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {said}");
}

/// A driver and a connection to it; killed when dropped.
pub(crate) struct Running {
    child: Child,
    runtime: tokio::runtime::Runtime,
    pub(crate) channel: Channel,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// How a volume is used.
pub(crate) fn capability(fstype: &str) -> v1::VolumeCapability {
    moded(fstype, Mode::SingleNodeWriter)
}

pub(crate) fn moded(fstype: &str, mode: Mode) -> v1::VolumeCapability {
    let access = if fstype == "block" {
        AccessType::Block(BlockVolume {})
    } else {
        AccessType::Mount(MountVolume {
            fs_type: fstype.replace("dir", ""),
            ..MountVolume::default()
        })
    };
    v1::VolumeCapability {
        access_type: Some(access),
        access_mode: Some(AccessMode { mode: mode.into() }),
    }
}

/// A request for a volume: `fstype` is ext4, xfs, block or dir.
pub(crate) fn wanted(name: &str, fstype: &str, bytes: u64) -> v1::CreateVolumeRequest {
    let mut parameters = HashMap::new();
    if fstype == "dir" {
        parameters.insert("type".to_owned(), "dir".to_owned());
    }
    v1::CreateVolumeRequest {
        name: name.to_owned(),
        capacity_range: Some(v1::CapacityRange {
            required_bytes: bytes.cast_signed(),
            limit_bytes: 0,
        }),
        volume_capabilities: vec![capability(fstype)],
        parameters,
        ..v1::CreateVolumeRequest::default()
    }
}

/// The content source of a new volume.
pub(crate) enum From<'a> {
    Snapshot(&'a str),
    Volume(&'a str),
}

pub(crate) fn from(source: &From<'_>) -> Option<v1::VolumeContentSource> {
    use v1::volume_content_source::{SnapshotSource, Type, VolumeSource};
    let kind = match source {
        From::Snapshot(id) => Type::Snapshot(SnapshotSource {
            snapshot_id: (*id).to_owned(),
        }),
        From::Volume(id) => Type::Volume(VolumeSource {
            volume_id: (*id).to_owned(),
        }),
    };
    Some(v1::VolumeContentSource { r#type: Some(kind) })
}

type Answer<T> = Result<T, Status>;

impl Running {
    /// Whether the driver killed itself, given how its last call ended. A broken connection is
    /// seen before the kernel has buried the process: then its end is waited for.
    pub(crate) fn died(&mut self, error: Option<&Status>) -> bool {
        let broken = [Code::Unknown, Code::Unavailable];
        if error.is_some_and(|status| broken.contains(&status.code())) {
            self.child.wait().unwrap();
            return true;
        }
        self.child.try_wait().unwrap().is_some()
    }

    pub(crate) fn controller(&self) -> ControllerClient<Channel> {
        ControllerClient::new(self.channel.clone())
    }

    fn node(&self) -> NodeClient<Channel> {
        NodeClient::new(self.channel.clone())
    }

    pub(crate) fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(future)
    }

    pub(crate) fn create_volume(&self, request: v1::CreateVolumeRequest) -> Answer<v1::Volume> {
        let answer = self.block_on(self.controller().create_volume(request))?;
        Ok(answer.into_inner().volume.unwrap())
    }

    /// Makes a volume and returns its id.
    pub(crate) fn create(&self, name: &str, fstype: &str, bytes: u64) -> Answer<String> {
        let volume = self.create_volume(wanted(name, fstype, bytes))?;
        Ok(volume.volume_id)
    }

    pub(crate) fn copy(
        &self,
        name: &str,
        fstype: &str,
        bytes: u64,
        source: &From<'_>,
    ) -> Answer<String> {
        let mut request = wanted(name, fstype, bytes);
        request.volume_content_source = from(source);
        Ok(self.create_volume(request)?.volume_id)
    }

    pub(crate) fn delete(&self, id: &str) -> Answer<()> {
        let request = v1::DeleteVolumeRequest {
            volume_id: id.to_owned(),
            ..Default::default()
        };
        self.block_on(self.controller().delete_volume(request))?;
        Ok(())
    }

    pub(crate) fn snapshot(&self, name: &str, volume: &str) -> Answer<String> {
        let request = v1::CreateSnapshotRequest {
            name: name.to_owned(),
            source_volume_id: volume.to_owned(),
            ..Default::default()
        };
        let answer = self.block_on(self.controller().create_snapshot(request))?;
        Ok(answer.into_inner().snapshot.unwrap().snapshot_id)
    }

    pub(crate) fn delete_snapshot(&self, id: &str) -> Answer<()> {
        let request = v1::DeleteSnapshotRequest {
            snapshot_id: id.to_owned(),
            ..Default::default()
        };
        self.block_on(self.controller().delete_snapshot(request))?;
        Ok(())
    }

    pub(crate) fn group(&self, name: &str, volumes: &[&str]) -> Answer<v1::VolumeGroupSnapshot> {
        let request = v1::CreateVolumeGroupSnapshotRequest {
            name: name.to_owned(),
            source_volume_ids: volumes.iter().map(|id| (*id).to_owned()).collect(),
            ..Default::default()
        };
        let mut client = GroupControllerClient::new(self.channel.clone());
        let answer = self.block_on(client.create_volume_group_snapshot(request))?;
        Ok(answer.into_inner().group_snapshot.unwrap())
    }

    pub(crate) fn delete_group(&self, id: &str) -> Answer<()> {
        let request = v1::DeleteVolumeGroupSnapshotRequest {
            group_snapshot_id: id.to_owned(),
            ..Default::default()
        };
        let mut client = GroupControllerClient::new(self.channel.clone());
        self.block_on(client.delete_volume_group_snapshot(request))?;
        Ok(())
    }

    pub(crate) fn expand(&self, id: &str, path: &Path, bytes: u64) -> Answer<()> {
        let range = Some(v1::CapacityRange {
            required_bytes: bytes.cast_signed(),
            limit_bytes: 0,
        });
        let request = v1::ControllerExpandVolumeRequest {
            volume_id: id.to_owned(),
            capacity_range: range,
            ..Default::default()
        };
        self.block_on(self.controller().controller_expand_volume(request))?;
        let request = v1::NodeExpandVolumeRequest {
            volume_id: id.to_owned(),
            volume_path: path.display().to_string(),
            capacity_range: range,
            ..Default::default()
        };
        self.block_on(self.node().node_expand_volume(request))?;
        Ok(())
    }

    pub(crate) fn stage(&self, id: &str, fstype: &str, path: &Path) -> Answer<()> {
        let request = v1::NodeStageVolumeRequest {
            volume_id: id.to_owned(),
            staging_target_path: path.display().to_string(),
            volume_capability: Some(capability(fstype)),
            ..Default::default()
        };
        self.block_on(self.node().node_stage_volume(request))?;
        Ok(())
    }

    pub(crate) fn publish(
        &self,
        id: &str,
        fstype: &str,
        staging: &Path,
        target: &Path,
    ) -> Answer<()> {
        self.publish_as(id, capability(fstype), staging, target, false)
    }

    pub(crate) fn publish_as(
        &self,
        id: &str,
        capability: v1::VolumeCapability,
        staging: &Path,
        target: &Path,
        readonly: bool,
    ) -> Answer<()> {
        let request = v1::NodePublishVolumeRequest {
            volume_id: id.to_owned(),
            staging_target_path: staging.display().to_string(),
            target_path: target.display().to_string(),
            volume_capability: Some(capability),
            readonly,
            ..Default::default()
        };
        self.block_on(self.node().node_publish_volume(request))?;
        Ok(())
    }

    pub(crate) fn unpublish(&self, id: &str, target: &Path) -> Answer<()> {
        let request = v1::NodeUnpublishVolumeRequest {
            volume_id: id.to_owned(),
            target_path: target.display().to_string(),
        };
        self.block_on(self.node().node_unpublish_volume(request))?;
        Ok(())
    }

    pub(crate) fn unstage(&self, id: &str, path: &Path) -> Answer<()> {
        let request = v1::NodeUnstageVolumeRequest {
            volume_id: id.to_owned(),
            staging_target_path: path.display().to_string(),
        };
        self.block_on(self.node().node_unstage_volume(request))?;
        Ok(())
    }

    /// Bytes that a thick volume could still have.
    pub(crate) fn capacity(&self) -> u64 {
        let request = v1::GetCapacityRequest::default();
        let answer = self.block_on(self.controller().get_capacity(request));
        answer
            .unwrap()
            .into_inner()
            .available_capacity
            .cast_unsigned()
    }
}
