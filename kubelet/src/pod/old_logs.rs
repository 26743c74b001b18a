//! Logs of instances that are forgotten: they go with them, as on stock nodes. What may go is
//! told by what is kept, so that a kill between the two only leaves it to the next removal.

use crate::observe::PodObservation;
use runtime::service::ContainerId;
use std::path::PathBuf;
use tracing::warn;

/// Logs that may go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Old {
    /// Directory of one container's logs.
    directory: PathBuf,
    /// The first attempt whose log stays.
    first_kept: u32,
}

/// What may go when the instance `doomed` is forgotten; none while no younger one is there.
pub(super) fn behind(observed: &PodObservation, doomed: &ContainerId) -> Option<Old> {
    let instance = observed.container(doomed)?;
    let name = &instance.config.name;
    let same = observed.containers.iter();
    let kept = same.filter(|c| c.config.name == *name && c.id != *doomed);
    let first_kept = kept.map(|c| c.config.attempt).min()?;
    let directory = instance.log_path.parent()?.to_owned();
    Some(Old {
        directory,
        first_kept,
    })
}

/// Removes them. Blocking.
pub(super) fn remove(old: &Old) {
    for name in linux::fs::list_dir(&old.directory).unwrap_or_default() {
        let attempt = name.to_str().and_then(attempt);
        if attempt.is_none_or(|attempt| attempt >= old.first_kept) {
            continue;
        }
        let path = old.directory.join(name);
        if let Err(error) = std::fs::remove_file(&path) {
            warn!(path = %path.display(), %error, "An old log stays");
        }
    }
}

/// The attempt a log file belongs to: `3.log`, or rotated `3.log.20260102-030405[.gz]`.
fn attempt(name: &str) -> Option<u32> {
    let (number, rest) = name.split_once(".log")?;
    let ours = rest.is_empty() || rest.starts_with('.');
    let plain = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
    (plain && ours).then(|| number.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logs_before_the_first_kept_attempt_go_with_their_rotated_files() {
        let dir = tempfile::tempdir().unwrap();
        let all = [
            "0.log",
            "0.log.20260102-030405",
            "1.log",
            "1.log.20260102-030405.gz",
            "2.log",
            "10.log",
            "notes.log",
            "1.logs",
            "1",
        ];
        for name in all {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        remove(&Old {
            directory: dir.path().to_owned(),
            first_kept: 2,
        });
        let mut left: Vec<_> = std::fs::read_dir(dir.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        assert_eq!(left, ["1", "1.logs", "10.log", "2.log", "notes.log"]);
    }

    #[test]
    fn a_directory_that_is_gone_is_nothing_to_do() {
        remove(&Old {
            directory: "/nonexistent/logs".into(),
            first_kept: 7,
        });
    }
}
