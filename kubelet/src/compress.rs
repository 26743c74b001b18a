//! Compresses rotated container logs, as stock nodes: all but the newest, which people and log
//! collectors may still be reading.
//!
//! The shim rotates and removes; this task only replaces `<log>.<time>` by `<log>.<time>.gz`, under
//! another name first, so that a kill leaves either. It is woken by the rename of a rotation: one
//! watch per container, none of them told of writes. Some seconds later it looks: who writes so
//! much that a log does not live that long is not slowed down further, and who follows a log finds
//! its files as they were.

use inotify::{EventMask, Inotify, WatchDescriptor, WatchMask};
use runtime::service::{ContainerState, ContainerStatus, RuntimeEvent, RuntimeService};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::unix::AsyncFd;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::warn;

/// Ending of what is being written.
const UNFINISHED: &str = ".tmp";
/// Ending of what is compressed.
const COMPRESSED: &str = ".gz";

/// Watches the log directories of running containers.
struct Watches {
    fd: AsyncFd<Inotify>,
    directories: HashMap<WatchDescriptor, PathBuf>,
}

impl Watches {
    fn new() -> io::Result<Self> {
        let inotify = Inotify::init()?;
        #[expect(
            deprecated,
            reason = "its successor is unsafe; the descriptor lives as long as its owner"
        )]
        let fd = AsyncFd::new(inotify)?;
        Ok(Self {
            fd,
            directories: HashMap::new(),
        })
    }

    /// Watches the directory of a container's logs; says whether that is new. It ends with the
    /// directory: the next instance of the container logs into the same.
    fn add(&mut self, container: &ContainerStatus) -> Option<PathBuf> {
        let writes = match container.state {
            ContainerState::Running { .. } => true,
            ContainerState::Created | ContainerState::Exited { .. } => false,
        };
        let directory = container.log_path.parent().filter(|_| writes)?;
        let mask = WatchMask::MOVED_TO | WatchMask::ONLYDIR;
        match self.fd.get_ref().watches().add(directory, mask) {
            Ok(watch) => {
                let known = self.directories.insert(watch, directory.to_owned());
                known.is_none().then(|| directory.to_owned())
            }
            // A container without a log, or one that is just being removed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                warn!(directory = %directory.display(), %error, "Rotated logs stay as they are");
                None
            }
        }
    }

    /// The directories in which something was renamed.
    async fn renamed(&mut self) -> io::Result<BTreeSet<PathBuf>> {
        let mut buffer = [0; 4096];
        let mut guard = self.fd.readable_mut().await?;
        let read = guard.try_io(|fd| {
            let events = fd.get_mut().read_events(&mut buffer)?;
            let events = events.map(|event| (event.wd, event.mask));
            Ok(events.collect::<Vec<_>>())
        });
        // Woken for nothing: the caller comes back.
        let events = read.unwrap_or_else(|_would_block| Ok(Vec::new()))?;
        let mut found = BTreeSet::new();
        for (watch, mask) in events {
            if mask.contains(EventMask::IGNORED) {
                self.directories.remove(&watch);
            } else if let Some(directory) = self.directories.get(&watch) {
                found.insert(directory.clone());
            }
        }
        Ok(found)
    }
}

/// Compresses until stopped, each log some time (`interval`) after it was rotated.
pub async fn run<R: RuntimeService>(runtime: Arc<R>, interval: Duration, stop: CancellationToken) {
    tokio::select! {
        () = stop.cancelled() => {}
        failed = watch(&*runtime, interval) => {
            warn!(error = %failed, "Rotated logs are not compressed any more");
        }
    }
}

async fn watch<R: RuntimeService>(runtime: &R, interval: Duration) -> io::Error {
    let mut watches = match Watches::new() {
        Ok(watches) => watches,
        Err(error) => return error,
    };
    let mut news = runtime.events();
    let all = |watches: &mut Watches| -> BTreeSet<PathBuf> {
        let containers = runtime.list_containers(None);
        containers.iter().filter_map(|c| watches.add(c)).collect()
    };
    // What was rotated while nobody watched is found at the first sight of a directory.
    let mut due: BTreeMap<PathBuf, Instant> = BTreeMap::new();
    let add = |due: &mut BTreeMap<PathBuf, Instant>, directories: BTreeSet<PathBuf>| {
        for directory in directories {
            due.entry(directory)
                .or_insert_with(|| Instant::now() + interval);
        }
    };
    add(&mut due, all(&mut watches));
    loop {
        let next = due.values().min().copied();
        let wait = async {
            match next {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = wait => compress_due(&mut due).await,
            event = news.recv() => match event {
                Ok(RuntimeEvent::Changed { container, .. }) => {
                    let changed = container.and_then(|id| runtime.container_status(&id));
                    let new = changed.and_then(|c| watches.add(&c));
                    add(&mut due, new.into_iter().collect());
                }
                Err(RecvError::Lagged(_)) => add(&mut due, all(&mut watches)),
                // The engine lives as long as the agent.
                Err(RecvError::Closed) => std::future::pending().await,
            },
            renamed = watches.renamed() => match renamed {
                Ok(renamed) => add(&mut due, renamed),
                Err(error) => return error,
            },
        }
    }
}

/// Compresses in the directories whose time has come, one after the other.
async fn compress_due(due: &mut BTreeMap<PathBuf, Instant>) {
    let now = Instant::now();
    let ready: Vec<PathBuf> = due
        .iter()
        .filter(|(_, at)| **at <= now)
        .map(|(directory, _)| directory.clone())
        .collect();
    for directory in ready {
        due.remove(&directory);
        let done = tokio::task::spawn_blocking(move || {
            if let Err(error) = compress_all(&directory) {
                warn!(directory = %directory.display(), %error, "A rotated log stays as it is");
            }
        });
        // A panic is logged by its hook, and one directory is no reason to end.
        let _ = done.await;
    }
}

/// Compresses the rotated logs of a directory but the newest of each log. Removes what an earlier
/// agent left unfinished. Blocking.
fn compress_all(directory: &Path) -> io::Result<()> {
    let mut names = BTreeSet::new();
    for entry in std::fs::read_dir(directory)? {
        if let Ok(name) = entry?.file_name().into_string() {
            names.insert(name);
        }
    }
    let plan = plan(&names);
    for name in plan.unneeded {
        remove(&directory.join(name))?;
    }
    for name in plan.compress {
        match compress(&directory.join(name)) {
            // The shim was faster.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            outcome => outcome?,
        }
    }
    Ok(())
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Plan {
    unneeded: Vec<String>,
    compress: Vec<String>,
}

/// What to do with the files of a directory. Pure.
fn plan(names: &BTreeSet<String>) -> Plan {
    let mut plan = Plan::default();
    let mut plain: HashMap<&str, Vec<&str>> = HashMap::new();
    for name in names {
        let Some((log, _)) = rotated(name) else {
            continue;
        };
        let twin = format!("{name}{COMPRESSED}");
        if name.ends_with(UNFINISHED) || names.contains(&twin) {
            plan.unneeded.push(name.clone());
        } else if !name.ends_with(COMPRESSED) {
            plain.entry(log).or_default().push(name);
        }
    }
    for (_, mut files) in plain {
        // Names sort by age.
        files.pop();
        plan.compress.extend(files.into_iter().map(str::to_owned));
    }
    plan.compress.sort();
    plan
}

/// Log and time of `0.log.20260102-030405[.001][.gz]`; none for other names.
fn rotated(name: &str) -> Option<(&str, &str)> {
    let at = name.find(".log.")? + ".log".len();
    let (log, time) = (&name[..at], &name[at + 1..]);
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let (date, rest) = time.split_once('-')?;
    let ours = digits(log.strip_suffix(".log")?)
        && date.len() == 8
        && digits(date)
        && rest.len() >= 6
        && rest.is_char_boundary(6)
        && digits(&rest[..6])
        && (rest.len() == 6 || rest[6..].starts_with('.'));
    ours.then_some((log, time))
}

fn compress(path: &Path) -> io::Result<()> {
    let named = |ending: &str| {
        let mut name = OsString::from(path);
        name.push(ending);
        PathBuf::from(name)
    };
    let (unfinished, compressed) = (named(UNFINISHED), named(COMPRESSED));
    let mut from = File::open(path)?;
    let to = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o640)
        .open(&unfinished)?;
    let written = (|| {
        let mut to = flate2::write::GzEncoder::new(to, flate2::Compression::fast());
        io::copy(&mut from, &mut to)?;
        to.finish()?;
        // Removed by the shim meanwhile: then it was too old to keep.
        std::fs::symlink_metadata(path)?;
        std::fs::rename(&unfinished, &compressed)
    })();
    if written.is_err() {
        remove(&unfinished)?;
    }
    written?;
    remove(path)
}

fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use runtime::fake::FakeRuntime;
    use runtime::service::{ContainerConfig, ImageConfig, SandboxConfig};
    use std::io::Read;

    fn names(dir: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(dir).unwrap().flatten();
        let mut names: Vec<_> = entries
            .map(|e| e.file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn all_but_the_newest_rotated_log_of_each_container_run_are_compressed() {
        let names = [
            "0.log",
            "0.log.20260101-000001",
            "0.log.20260101-000002",
            "0.log.20260101-000002.001",
            "1.log",
            "1.log.20260101-000003",
            "1.log.20260101-000004.gz",
            "mine.log.20260101-000001",
            "0.log.backup",
        ];
        let names = names.map(str::to_owned).into();
        let plan = plan(&names);
        assert_eq!(
            plan.compress,
            ["0.log.20260101-000001", "0.log.20260101-000002"]
        );
        assert!(plan.unneeded.is_empty());
    }

    #[test]
    fn what_a_killed_agent_left_is_finished() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["000001", "000001.gz", "000002", "000002.tmp", "000003"] {
            std::fs::write(dir.path().join(format!("0.log.20260101-{name}")), name).unwrap();
        }
        compress_all(dir.path()).unwrap();
        let expected = ["000001.gz", "000002.gz", "000003"].map(|n| format!("0.log.20260101-{n}"));
        assert_eq!(names(dir.path()), expected);
        let packed = File::open(dir.path().join("0.log.20260101-000002.gz")).unwrap();
        let mut text = String::new();
        flate2::read::GzDecoder::new(packed)
            .read_to_string(&mut text)
            .unwrap();
        assert_eq!(text, "000002");
    }

    #[tokio::test]
    async fn a_rotation_is_noticed_by_its_rename() {
        let dir = tempfile::tempdir().unwrap();
        let runtime = FakeRuntime::new();
        runtime.preload("a:1", ImageConfig::default());
        let sandbox = SandboxConfig {
            log_directory: dir.path().to_owned(),
            ..SandboxConfig::default()
        };
        let sandbox = runtime.run_sandbox(sandbox).await.unwrap();
        let config = ContainerConfig {
            image: "a:1".to_owned(),
            log_path: "c/0.log".to_owned(),
            ..ContainerConfig::default()
        };
        let id = runtime.create_container(&sandbox.id, config).await.unwrap();
        let logs = dir.path().join("c");
        std::fs::create_dir(&logs).unwrap();
        let stop = CancellationToken::new();
        let interval = Duration::from_millis(1);
        let task = tokio::spawn(run(Arc::new(runtime.clone()), interval, stop.clone()));
        runtime.start_container(&id).await.unwrap();
        let log = logs.join("0.log");
        let done = logs.join("0.log.20260101-000001.gz");
        let mut number = 1;
        // Rotations go on until the first of them is compressed.
        while !done.exists() {
            std::fs::write(&log, "text").unwrap();
            std::fs::rename(&log, logs.join(format!("0.log.20260101-{number:06}"))).unwrap();
            number = (number + 1).min(900_000);
            tokio::task::yield_now().await;
        }
        stop.cancel();
        task.await.unwrap();
    }

    proptest::proptest! {
        #[test]
        fn names_of_all_kinds_are_survived(name in "\\PC{0,40}", tail in "\\PC{0,20}") {
            for text in [name.clone(), format!("0.log.{name}"), format!("0.log.20260101-{tail}")] {
                let _ = rotated(&text);
            }
        }
    }
}
