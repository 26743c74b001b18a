//! The last words of a container: its termination message file, or the end of its log.

use k8s_openapi::api::core::v1::Container;
use runtime::service::{ContainerState, ContainerStatus};
use rustix::fs::{Mode, OFlags};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use tracing::debug;

/// Bytes of a termination message file that are read.
const FILE_MAX: u64 = 4096;
/// Bytes and lines of the log that stand in for it.
const LOG_MAX: u64 = 2048;
const LOG_LINES: usize = 80;
/// Where messages go when the spec says nothing.
const DEFAULT_PATH: &str = "/dev/termination-log";

/// Reads the last words of a dead instance; empty when it left none.
pub(crate) fn read(spec: &Container, instance: &ContainerStatus) -> String {
    let ContainerState::Exited { exit_code, .. } = instance.state else {
        return String::new();
    };
    let path = spec
        .termination_message_path
        .as_deref()
        .unwrap_or(DEFAULT_PATH);
    let file = instance
        .config
        .mounts
        .iter()
        .find(|m| m.container_path == path)
        .map(|m| read_file(&m.host_path))
        .unwrap_or_default();
    let to_logs = spec.termination_message_policy.as_deref() == Some("FallbackToLogsOnError");
    if file.is_empty() && to_logs && exit_code != 0 {
        log_tail(&instance.log_path)
    } else {
        file
    }
}

/// The end of a message file. The container wrote to it: it is opened without following links
/// and without waiting, and must be a regular file.
fn read_file(path: &Path) -> String {
    let mut bytes = Vec::new();
    let Some(mut file) = open(path) else {
        return String::new();
    };
    let length = file.metadata().map(|m| m.len()).unwrap_or(0);
    let read = file
        .seek(SeekFrom::Start(length.saturating_sub(FILE_MAX)))
        .and_then(|_| file.take(FILE_MAX).read_to_end(&mut bytes));
    if let Err(error) = read {
        debug!(path = %path.display(), %error, "Termination message not read");
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn open(path: &Path) -> Option<File> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty()).ok()?);
    file.metadata()
        .ok()
        .filter(std::fs::Metadata::is_file)
        .map(|_| file)
}

/// The last lines of a CRI log, without their prefixes.
fn log_tail(path: &Path) -> String {
    let Some(mut file) = open(path) else {
        return String::new();
    };
    // Prefixes (time, stream, tag) take about 45 bytes a line; what is too much is cut below.
    let window = LOG_MAX + 64 * LOG_LINES as u64;
    let length = file.metadata().map(|m| m.len()).unwrap_or(0);
    let from = length.saturating_sub(window);
    let mut bytes = Vec::new();
    if file.seek(SeekFrom::Start(from)).is_err()
        || file.take(window).read_to_end(&mut bytes).is_err()
    {
        return String::new();
    }
    let text = String::from_utf8_lossy(&bytes);
    let mut lines: Vec<&str> = text.split_inclusive('\n').collect();
    if from > 0 && !lines.is_empty() {
        lines.remove(0);
    }
    let content = lines.iter().skip(lines.len().saturating_sub(LOG_LINES));
    let content: String = content.filter_map(|line| strip_prefix(line)).collect();
    let mut cut = content
        .len()
        .saturating_sub(usize::try_from(LOG_MAX).unwrap_or(usize::MAX));
    while !content.is_char_boundary(cut) {
        cut += 1;
    }
    content[cut..].to_owned()
}

/// `time stream tag content`: the content; a partial line (`P`) loses its line end.
fn strip_prefix(line: &str) -> Option<&str> {
    let mut parts = line.splitn(4, ' ');
    let (_, _, tag, content) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    Some(if tag.starts_with('P') {
        content.trim_end_matches('\n')
    } else {
        content
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use runtime::service::{ContainerConfig, ContainerId, ImageId, Mount, Resources, SandboxId};
    use std::path::PathBuf;

    fn dead(dir: &Path, exit_code: i32) -> ContainerStatus {
        ContainerStatus {
            id: ContainerId::from("c"),
            sandbox_id: SandboxId::from("s"),
            config: ContainerConfig {
                mounts: vec![Mount {
                    container_path: DEFAULT_PATH.to_owned(),
                    host_path: dir.join("message"),
                    sub_path: None,
                    readonly: false,
                    recursive_readonly: false,
                    propagation: pod_shim_propagation(),
                    image: None,
                }],
                ..ContainerConfig::default()
            },
            state: ContainerState::Exited {
                started_at_ns: 1,
                finished_at_ns: 2,
                exit_code,
                signal: None,
                reason: "Error".to_owned(),
                message: String::new(),
            },
            created_at_ns: 0,
            image_id: ImageId::from("i"),
            image_ref: String::new(),
            log_path: dir.join("0.log"),
            user: None,
            resources: Resources::default(),
        }
    }

    fn pod_shim_propagation() -> runtime::service::Propagation {
        runtime::service::Propagation::default()
    }

    fn check(policy: &str, file: &str, exit_code: i32, expected: &str) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("message"), file).unwrap();
        let log = "2026-01-01T00:00:00Z stdout F one\n2026-01-01T00:00:00Z stderr P tw\n\
                   2026-01-01T00:00:00Z stderr F o\n";
        std::fs::write(dir.path().join("0.log"), log).unwrap();
        let spec = Container {
            termination_message_policy: Some(policy.to_owned()),
            ..Container::default()
        };
        assert_eq!(read(&spec, &dead(dir.path(), exit_code)), expected);
    }

    #[test]
    fn the_file_wins_and_the_log_stands_in_only_after_an_error() {
        check("File", "DONE", 0, "DONE");
        check("File", "", 1, "");
        check("FallbackToLogsOnError", "", 1, "one\ntwo\n");
        check("FallbackToLogsOnError", "", 0, "");
        check("FallbackToLogsOnError", "OK", 1, "OK");
    }

    #[test]
    fn the_end_of_a_long_message_is_what_counts() {
        let long = format!("{}last words", "x".repeat(5000));
        let expected = format!("{}last words", "x".repeat(4086));
        check("File", &long, 1, &expected);
    }

    #[test]
    fn a_link_in_place_of_the_file_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("message")).unwrap();
        assert_eq!(read(&Container::default(), &dead(dir.path(), 1)), "");
        assert_eq!(read_file(&PathBuf::from("/nonexistent")), "");
    }
}
