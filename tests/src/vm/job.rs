//! A job: a script and the files it needs, packed into a disk of its own.

use crate::command;
use anyhow::{Context, Result};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// The last line a job prints; its exit code follows. Without it, the machine died.
pub const END_MARK: &str = "ferrule-job-exit";

/// Follows each command of a serving job, with its exit code.
pub const COMMAND_MARK: &str = "ferrule-command-exit";

/// Ends a serving job.
pub const FINISH: &str = "ferrule-finish";

/// Where the job talks to us.
const LINE: &str = "/dev/ttyS1";

/// What to run in the machine.
#[derive(Debug, Default)]
pub struct Job {
    script: String,
    files: Vec<(PathBuf, PathBuf)>,
}

impl Job {
    /// A job that runs these lines of shell, with `set -e` off: the code of the last is the
    /// job's.
    #[must_use]
    pub fn new(script: impl Into<String>) -> Self {
        Self {
            script: script.into(),
            files: Vec::new(),
        }
    }

    /// A job that runs these lines and then serves commands until it is told to finish.
    #[must_use]
    pub fn serving(script: &str) -> Self {
        // Raw: no echo, no limit on a line's length, nothing rewritten.
        Self::new(format!(
            "stty -F {LINE} raw -echo
{script}
printf '\\n{COMMAND_MARK} %s\\n' $?
while IFS= read -r line; do
    [ \"$line\" = {FINISH} ] && exit 0
    sh -c \"$line\" </dev/null 2>&1
    printf '\\n{COMMAND_MARK} %s\\n' $?
done <{LINE}"
        ))
    }

    /// Puts a file of this machine at an absolute path of the virtual one.
    #[must_use]
    pub fn file(mut self, from: impl Into<PathBuf>, to: impl Into<PathBuf>) -> Self {
        self.files.push((from.into(), to.into()));
        self
    }

    /// Puts a file at the same path as here: for test programs that were compiled to look for
    /// another program by an absolute path.
    #[must_use]
    pub fn same(self, path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        self.file(path.clone(), path)
    }

    /// Writes the job's disk into `dir` and returns its path.
    ///
    /// # Errors
    /// When a file cannot be copied or the disk cannot be made.
    pub fn pack(&self, dir: &Path) -> Result<PathBuf> {
        let tree = dir.join("job");
        let files = tree.join("files");
        fs::create_dir_all(&files).with_context(|| format!("create {}", files.display()))?;
        let mut bytes = 0;
        for (from, to) in &self.files {
            let relative = to
                .strip_prefix("/")
                .context("a job's file needs an absolute path")?;
            let target = files.join(relative);
            if let Some(parent) = target.parent() {
                fs::create_dir_all(parent)
                    .with_context(|| format!("create {}", parent.display()))?;
            }
            bytes += fs::copy(from, &target)
                .with_context(|| format!("copy {} into the job", from.display()))?;
        }
        let script = tree.join("job");
        fs::write(&script, self.wrapped()).context("write the job's script")?;
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755))
            .context("make the job's script executable")?;
        let disk = dir.join("job.ext4");
        let mebibytes = bytes / (1 << 20) * 5 / 4 + 32;
        command::stdout(
            command::command("mkfs.ext4", &["-q", "-O", "^has_journal", "-d"])
                .arg(&tree)
                .arg(&disk)
                .arg(format!("{mebibytes}M")),
        )?;
        fs::remove_dir_all(&tree).with_context(|| format!("remove {}", tree.display()))?;
        Ok(disk)
    }

    /// The script with its files in place before and the end mark after it.
    fn wrapped(&self) -> String {
        format!(
            "#!/bin/sh\nexport PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root\ncp -a /ferrule/files/. / 2>/dev/null\n(\n{}\n)\necho \"{END_MARK} $?\"\n",
            self.script
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exit_code_is_that_of_the_last_line() {
        let script = Job::new("false\nexit 7")
            .wrapped()
            .replace("cp -a", ": cp -a");
        let out = command::stdout(&mut command::command("sh", &["-c", &script])).unwrap();
        assert_eq!(out, format!("{END_MARK} 7\n"));
    }
}
