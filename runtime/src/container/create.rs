//! Making and starting a container.

use super::spec::{self, Inputs};
use super::state::{ContainerRecord, Exit, Phase, RECORD_VERSION};
use super::users::{ResolvedUser, resolve};
use super::{rootfs, store};
use crate::engine::{Container, Inner, Sandbox, blocking, limits, new_id, now_ns};
use crate::error::{chain, error, system};
use crate::image::ImageLease;
use crate::sandbox::state::SandboxRecord;
use crate::sandbox::teardown::ensure_ready;
use crate::service::{
    ContainerConfig, ContainerId, ImageId, ImageStatus, Mount, Resources, Result, RuntimeError,
    RuntimeErrorKind, RuntimeEventKind, SandboxId,
};
use crate::shim_client::ShimClientError;
use pod_shim::protocol::{DeviceSpec, LaunchSpec, MountSource, MountSpec, Reply, Request};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Devices of a privileged container; a node has some hundred.
const MAX_HOST_DEVICES: usize = 4096;

/// Records a container and prepares its layer and cgroup. A second call for the same name and
/// attempt gives the first one's id.
pub(crate) async fn create(
    inner: Arc<Inner>,
    sandbox_id: SandboxId,
    config: ContainerConfig,
) -> Result<ContainerId> {
    let sandbox = inner.sandbox(&sandbox_id)?;
    let with_sandbox = Arc::clone(&sandbox);
    let _turn = sandbox.turn.lock().await;
    ensure_ready(&sandbox)?;
    let same = inner
        .containers_of(&sandbox_id)
        .into_iter()
        .find(|c| c.with(|r| r.config.name == config.name && r.config.attempt == config.attempt));
    if let Some(same) = same {
        return Ok(same.id.clone());
    }
    let with_inner = Arc::clone(&inner);
    let container = blocking(move || make(&with_inner, &with_sandbox, config)).await?;
    let id = container.id.clone();
    inner.containers().insert(id.clone(), container);
    Ok(id)
}

/// The images a container uses: its own first, then those it mounts.
pub(crate) fn leases(
    inner: &Inner,
    image: &ImageId,
    config: &ContainerConfig,
) -> Result<Vec<ImageLease>> {
    let mounted = config.mounts.iter().filter_map(|m| m.image.as_ref());
    let all = std::iter::once(image).chain(mounted);
    let lease = |id: &ImageId| Ok(inner.images.lease(id.as_str())?);
    all.map(lease).collect()
}

fn make(inner: &Inner, sandbox: &Arc<Sandbox>, config: ContainerConfig) -> Result<Arc<Container>> {
    let id = ContainerId(new_id()?);
    let leases = leases(inner, &ImageId(config.image.clone()), &config)?;
    let mut record = plan(inner, &sandbox.record(), &id, config, &leases)?;
    if let Err(failure) = build(inner, sandbox, &mut record) {
        // A record of it may be on disk; it says `Creating`, so recovery undoes it if this fails.
        if let Err(e) = unmake(inner, &record) {
            tracing::warn!(container = %id, error = %e, "undo of a container is left to recovery");
        }
        return Err(failure);
    }
    Ok(Container::new(record, Arc::clone(sandbox), leases))
}

/// Everything decided, nothing done.
fn plan(
    inner: &Inner,
    sandbox: &SandboxRecord,
    id: &ContainerId,
    config: ContainerConfig,
    leases: &[ImageLease],
) -> Result<ContainerRecord> {
    let [own, mounted @ ..] = leases else {
        return Err(error(RuntimeErrorKind::Invalid, "container without image"));
    };
    let (image, layers) = (&own.status(), &own.layers());
    let user = find_user(&config, image, layers)?;
    let stop_signal = spec::stop_signal(&config, &image.config)?;
    let capabilities = spec::capabilities(&config, inner.capabilities)?;
    // Compiled now so that a bad profile is refused here; sent when started.
    inner.seccomp(&config.security.seccomp, &capabilities)?;
    let parent = sandbox.config.cgroup_parent.trim_end_matches('/');
    let cgroup = format!("{parent}/{id}");
    let state_dir = store::dir(&inner.config, id);
    let volumes = store::volumes(&inner.config, id);
    let log_path = sandbox.config.log_directory.join(&config.log_path);
    let launch = spec::launch_spec(Inputs {
        id: id.as_str(),
        config: &config,
        image: &image.config,
        sandbox: &sandbox.config,
        user: &user,
        capabilities,
        seccomp: None,
        layers: layers.to_vec(),
        extra_mounts: extra_mounts(&config, image, layers, mounted, &volumes)?,
        state_dir,
        shared_memory: crate::sandbox::store::shared_memory(&inner.config, &sandbox.id),
        files: sandbox_files(inner, sandbox),
        devices: devices(&config)?,
        cgroups: inner.cgroups.directories(&cgroup)?,
        log_path: (!config.log_path.is_empty()).then(|| log_path.clone()),
        open_files_most: open_files_most(),
    })?;
    Ok(ContainerRecord {
        version: RECORD_VERSION,
        id: id.clone(),
        sandbox_id: sandbox.id.clone(),
        phase: Phase::Creating,
        created_at_ns: now_ns(),
        image_id: image.id.clone(),
        image_ref: image.repo_digests.first().unwrap_or(&image.id.0).clone(),
        log_path,
        user: Some((user.uid, user.gid, user.groups)),
        resources: config.resources.clone(),
        cgroup,
        stop_signal,
        launch,
        config,
    })
}

/// The hard limit of this process; containers cannot have more where it may not be raised.
fn open_files_most() -> u64 {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    limit.maximum.unwrap_or(u64::MAX)
}

fn find_user(
    config: &ContainerConfig,
    image: &ImageStatus,
    layers: &[PathBuf],
) -> Result<ResolvedUser> {
    let passwd = rootfs::read(layers, "/etc/passwd")?;
    let group = rootfs::read(layers, "/etc/group")?;
    Ok(resolve(
        &config.security,
        &image.config.user,
        &passwd,
        &group,
    )?)
}

/// Files of the sandbox that containers see.
fn sandbox_files(inner: &Inner, sandbox: &SandboxRecord) -> Vec<(&'static str, PathBuf)> {
    let dir = crate::sandbox::store::dir(&inner.config, &sandbox.id);
    let mut files = Vec::new();
    if sandbox.config.dns.is_some() {
        files.push(("/etc/resolv.conf", dir.join("resolv.conf")));
    }
    if !sandbox.config.hostname.is_empty() {
        files.push(("/etc/hostname", dir.join("hostname")));
    }
    files
}

/// The image's volumes, and mounts whose content is an image.
fn extra_mounts(
    config: &ContainerConfig,
    image: &ImageStatus,
    layers: &[PathBuf],
    mounted: &[ImageLease],
    volumes: &Path,
) -> Result<Vec<MountSpec>> {
    let mut mounts = Vec::new();
    for (number, target) in image.config.volumes.iter().enumerate() {
        let dir = volumes.join(number.to_string());
        mounts.push(volume(target, &dir, layers)?);
    }
    let with_image = config.mounts.iter().filter(|m| m.image.is_some());
    for (mount, lease) in with_image.zip(mounted) {
        mounts.push(image_mount(mount, &lease.layers())?);
    }
    Ok(mounts)
}

/// A volume of the image: what the image has there, writable even when the root is not.
fn volume(target: &str, dir: &Path, layers: &[PathBuf]) -> Result<MountSpec> {
    let content = rootfs::directories(layers, target)?;
    if content.is_empty() {
        return Ok(spec::bind(target, dir.join("upper")));
    }
    let changes = Some((dir.join("upper"), dir.join("work")));
    Ok(spec::layers(target, content, changes, None))
}

fn image_mount(mount: &Mount, layers: &[PathBuf]) -> Result<MountSpec> {
    let path = mount.sub_path.as_deref().filter(|p| !p.is_empty());
    if let Some(path) = path
        && !rootfs::exists(layers, path)?
    {
        let message = format!(
            "image volume mount at {}: sub path {path:?}: not found",
            mount.container_path
        );
        return Err(error(RuntimeErrorKind::Invalid, message));
    }
    let sub_path = path.map(str::to_owned);
    Ok(MountSpec {
        readonly: true,
        noexec: true,
        ..spec::layers(&mount.container_path, layers.to_vec(), None, sub_path)
    })
}

/// Device nodes besides the standard ones.
fn devices(config: &ContainerConfig) -> Result<Vec<DeviceSpec>> {
    let mut devices = Vec::new();
    if config.security.privileged {
        host_devices(Path::new("/dev"), &mut devices);
    }
    for (host, inside, _) in &config.devices {
        let device = device(host, inside).ok_or_else(|| {
            let message = format!("devices: {} is no device", host.display());
            error(RuntimeErrorKind::Invalid, message)
        })?;
        devices.push(device);
    }
    Ok(devices)
}

fn device(host: &Path, inside: &str) -> Option<DeviceSpec> {
    let found = std::fs::metadata(host).ok()?;
    let kind = if found.file_type().is_char_device() {
        'c'
    } else if found.file_type().is_block_device() {
        'b'
    } else {
        return None;
    };
    Some(DeviceSpec {
        path: inside.to_owned(),
        host_path: Some(host.to_owned()),
        kind,
        major: rustix::fs::major(found.rdev()),
        minor: rustix::fs::minor(found.rdev()),
        mode: found.mode() & 0o777,
        uid: found.uid(),
        gid: found.gid(),
    })
}

/// All devices below a directory but for what containers have of their own.
fn host_devices(dir: &Path, found: &mut Vec<DeviceSpec>) {
    const OWN: [&str; 12] = [
        "pts", "shm", "mqueue", "fd", "console", "ptmx", "null", "zero", "full", "random",
        "urandom", "tty",
    ];
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        let name = entry.file_name();
        let own = dir == Path::new("/dev") && OWN.iter().any(|o| name == *o);
        let Ok(kind) = entry.file_type() else {
            continue;
        };
        if own || kind.is_symlink() || found.len() >= MAX_HOST_DEVICES {
            continue;
        }
        if kind.is_dir() {
            host_devices(&path, found);
        } else if let Some(device) = device(&path, &path.to_string_lossy()) {
            found.push(device);
        }
    }
}

/// Does what was planned: record, directories, cgroup, record.
fn build(inner: &Inner, sandbox: &Sandbox, record: &mut ContainerRecord) -> Result<()> {
    let ids = sandbox.with(|r| r.config.user_namespace);
    let first_id = ids.map_or(0, |ids| ids.first);
    store::create(&inner.config, record, first_id)?;
    let volumes = store::volumes(&inner.config, &record.id);
    for mount in &record.launch.mounts {
        make_volume_dirs(mount, &volumes, first_id)?;
    }
    if let Some(log) = &record.launch.log
        && let Some(dir) = log.path.parent()
    {
        linux::fs::create_dirs(dir, 0o755)?;
    }
    inner.cgroups.ensure(&record.cgroup)?;
    let limits = limits(&record.resources);
    inner.cgroups.apply(&record.cgroup, &limits)?;
    let asked = record.config.devices.len();
    let own = record.launch.devices.len().saturating_sub(asked);
    let rules = spec::device_rules(&record.config, &record.launch.devices[own..]);
    inner.cgroups.set_devices(&record.cgroup, &rules)?;
    record.phase = Phase::Created;
    store::save(&inner.config, record)
}

/// Makes the directories a volume of the image is backed by.
fn make_volume_dirs(mount: &MountSpec, volumes: &Path, first_id: u32) -> Result<()> {
    let ours = |path: &Path| path.starts_with(volumes);
    match &mount.source {
        MountSource::Bind { path, .. } if ours(path) => Ok(linux::fs::create_dirs(path, 0o755)?),
        MountSource::Layers {
            changes: Some((upper, work)),
            ..
        } => {
            linux::fs::create_dirs(work, 0o700)?;
            linux::fs::create_dirs(upper, 0o755)?;
            if first_id != 0 {
                let owner = Some(first_id);
                std::os::unix::fs::chown(upper, owner, owner).map_err(|e| system(&e))?;
            }
            Ok(())
        }
        MountSource::Bind { .. }
        | MountSource::Filesystem { .. }
        | MountSource::Layers { changes: None, .. }
        | MountSource::Cgroup => Ok(()),
    }
}

fn unmake(inner: &Inner, record: &ContainerRecord) -> Result<()> {
    inner.cgroups.remove(&record.cgroup)?;
    store::delete(&inner.config, &record.id)
}

/// Starts a created container.
pub(crate) async fn start(inner: Arc<Inner>, id: ContainerId) -> Result<()> {
    let container = inner.container(&id)?;
    let _turn = container.turn.lock().await;
    match container.with(|r| r.phase.clone()) {
        Phase::Created => {}
        Phase::Running { .. } => return Ok(()),
        Phase::Creating | Phase::Exited(_) | Phase::Removing(_) => {
            let message = format!("container {id} cannot be started again");
            return Err(error(RuntimeErrorKind::Conflict, message));
        }
    }
    let shim = container.sandbox.shim()?;
    let launch = launch_spec(&inner, &container)?;
    let outcome = shim.request(Request::Launch(Box::new(launch)), &[]).await;
    match outcome {
        Ok((Reply::Started(state), _)) => {
            set_running(&inner, &container, state.started_at_ns, state.pid);
            if let Some(exit) = &state.exit {
                super::teardown::on_exit(&inner, &id, exit);
            }
            Ok(())
        }
        Ok((reply, _)) => {
            let message = format!("the shim answered launch with {reply:?}");
            Err(error(RuntimeErrorKind::System, message))
        }
        Err(refusal @ ShimClientError::Refused(_)) => {
            Err(start_failed(&inner, &container, refusal).await)
        }
        Err(broken) => Err(broken.into()),
    }
}

fn launch_spec(inner: &Inner, container: &Container) -> Result<LaunchSpec> {
    let (mut launch, profile) =
        container.with(|r| (r.launch.clone(), r.config.security.seccomp.clone()));
    launch.process.seccomp = inner.seccomp(&profile, &launch.process.capabilities)?;
    Ok(launch)
}

/// Notes that it runs; its end may have been noted before.
pub(crate) fn set_running(inner: &Inner, container: &Container, started_at_ns: i64, pid: i32) {
    let running = Phase::Running { started_at_ns, pid };
    let changed = container.change(|r| {
        let may = r.phase.may_become(&running);
        if may {
            r.phase = running;
        }
        may
    });
    if changed {
        let uid = container.sandbox.pod_uid();
        let kind = RuntimeEventKind::Started;
        inner
            .events
            .announce(&uid, &container.sandbox.id, Some(&container.id), kind);
    }
}

/// The shim could not start it: it is over, and its record says why.
async fn start_failed(
    inner: &Arc<Inner>,
    container: &Arc<Container>,
    refusal: ShimClientError,
) -> RuntimeError {
    if !matches!(refusal, ShimClientError::Refused(_)) {
        return refusal.into();
    }
    let message = chain(&refusal);
    let exit = Exit::start_error(now_ns(), &message);
    let record = container.change(|r| {
        r.phase = Phase::Exited(exit);
        r.clone()
    });
    let config = inner.config.clone();
    if let Err(e) = blocking(move || store::save(&config, &record)).await {
        tracing::warn!(container = %container.id, error = %e, "failed start not recorded");
    }
    let uid = container.sandbox.pod_uid();
    let kind = RuntimeEventKind::Exited;
    inner
        .events
        .announce(&uid, &container.sandbox.id, Some(&container.id), kind);
    error(RuntimeErrorKind::StartFailed, message)
}

/// Changes limits of a container.
pub(crate) async fn update(inner: Arc<Inner>, id: ContainerId, resources: Resources) -> Result<()> {
    let container = inner.container(&id)?;
    let with_container = Arc::clone(&container);
    let _turn = with_container.turn.lock().await;
    blocking(move || {
        let cgroup = container.with(|r| r.cgroup.clone());
        inner.cgroups.apply(&cgroup, &limits(&resources))?;
        let record = container.change(|r| {
            r.resources = r.resources.updated_by(resources);
            let mut on_disk = r.clone();
            // Running is the shim's to know, see `state`.
            if let Phase::Running { .. } = on_disk.phase {
                on_disk.phase = Phase::Created;
            }
            on_disk
        });
        store::save(&inner.config, &record)
    })
    .await
}
