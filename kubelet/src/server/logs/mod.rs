//! Container logs: options, reading from a file, following over rotation.
//!
//! The shim writes and rotates; this module only reads. A follower keeps its open file until the
//! end of that file, then opens the successor at the same path, so that no line is lost at a
//! rotation; inotify wakes it, nothing polls.

pub mod follow;
pub mod parse;
pub(super) mod serve;

use parse::Formatter;
use std::path::PathBuf;

/// What to show of a log (`PodLogOptions`).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogOptions {
    /// Go on as long as the container runs.
    pub follow: bool,
    /// The instance before the current one.
    pub previous: bool,
    /// Put times before lines.
    pub timestamps: bool,
    /// Only the last lines.
    pub tail_lines: Option<u64>,
    /// Stop after this many bytes.
    pub limit_bytes: Option<u64>,
    /// Leave out what is older.
    pub since: Option<jiff::Timestamp>,
    /// Only `stdout` or `stderr`.
    pub stream: Option<String>,
}

impl LogOptions {
    /// From the query of a request; `now` is what `sinceSeconds` counts from.
    ///
    /// # Errors
    /// A sentence that names the parameter and what would be right.
    pub fn from_query(query: &[(String, String)], now: jiff::Timestamp) -> Result<Self, String> {
        let mut options = Self::default();
        for (name, value) in query {
            match name.as_str() {
                "follow" => options.follow = flag(name, value)?,
                "previous" => options.previous = flag(name, value)?,
                "timestamps" => options.timestamps = flag(name, value)?,
                "tailLines" => options.tail_lines = Some(number(name, value, 0)?),
                "limitBytes" => options.limit_bytes = Some(number(name, value, 1)?),
                "sinceSeconds" => {
                    let seconds = number(name, value, 1)?;
                    let span = jiff::SignedDuration::from_secs(seconds.min(1 << 40) as i64);
                    options.since = now.checked_sub(span).ok();
                }
                "sinceTime" => {
                    let time = value
                        .parse()
                        .map_err(|e| format!("{name}: {value:?}: {e}"))?;
                    options.since = Some(time);
                }
                "stream" => match value.as_str() {
                    "" | "All" => {}
                    "Stdout" => options.stream = Some("stdout".to_owned()),
                    "Stderr" => options.stream = Some("stderr".to_owned()),
                    other => return Err(format!("stream: {other:?} is not All, Stdout or Stderr")),
                },
                _ => {}
            }
        }
        Ok(options)
    }

    fn formatter(&self) -> Formatter {
        Formatter::new(self.timestamps, self.since, self.stream.clone())
    }
}

fn flag(name: &str, value: &str) -> Result<bool, String> {
    match value {
        "" | "true" | "True" | "TRUE" | "t" | "T" | "1" => Ok(true),
        "false" | "False" | "FALSE" | "f" | "F" | "0" => Ok(false),
        other => Err(format!("{name}: {other:?} is neither true nor false")),
    }
}

fn number(name: &str, value: &str, least: i64) -> Result<u64, String> {
    let wrong = || format!("{name}: {value:?} must be a whole number of at least {least}");
    let number: i64 = value.parse().map_err(|_| wrong())?;
    if number < least {
        return Err(wrong());
    }
    u64::try_from(number).map_err(|_| wrong())
}

/// A log to read.
#[derive(Debug, Clone)]
pub struct LogFile {
    /// The live file.
    pub path: PathBuf,
    /// What to show.
    pub options: LogOptions,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(query: &[(&str, &str)]) -> Result<LogOptions, String> {
        let query: Vec<_> = query
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect();
        LogOptions::from_query(&query, "2026-01-01T00:01:00Z".parse().unwrap())
    }

    #[test]
    fn every_option_is_understood() {
        let o = options(&[
            ("follow", "true"),
            ("previous", "1"),
            ("timestamps", "true"),
            ("tailLines", "5"),
            ("limitBytes", "10"),
            ("sinceSeconds", "60"),
            ("pretty", "true"),
        ])
        .unwrap();
        assert!(o.follow && o.previous && o.timestamps);
        assert_eq!((o.tail_lines, o.limit_bytes), (Some(5), Some(10)));
        assert_eq!(o.since, Some("2026-01-01T00:00:00Z".parse().unwrap()));
    }

    #[test]
    fn a_wrong_option_is_named() {
        for (name, value) in [
            ("tailLines", "-1"),
            ("limitBytes", "0"),
            ("sinceSeconds", "x"),
            ("sinceTime", "yesterday"),
            ("follow", "perhaps"),
            ("stream", "both"),
        ] {
            let error = options(&[(name, value)]).unwrap_err();
            assert!(error.contains(name), "{error}");
        }
    }
}
