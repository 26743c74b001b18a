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
    /// From the query of a request; `now` is what `sinceSeconds` counts from. Values are read as
    /// the API's own conversion reads them (any word but `false` and `0` is true).
    ///
    /// # Errors
    /// [`BadOptions`].
    pub fn from_query(
        query: &[(String, String)],
        now: jiff::Timestamp,
    ) -> Result<Self, BadOptions> {
        let mut options = Self::default();
        let (mut by_seconds, mut by_time) = (false, false);
        for (name, value) in query {
            match name.as_str() {
                "follow" => options.follow = flag(value),
                "previous" => options.previous = flag(value),
                "timestamps" => options.timestamps = flag(value),
                "tail" if value == "all" => options.tail_lines = None,
                "tailLines" | "tail" => options.tail_lines = Some(number(value, 0)?),
                "limitBytes" => options.limit_bytes = Some(number(value, 1)?),
                "sinceSeconds" => {
                    let seconds = number(value, 1)?;
                    let span = jiff::SignedDuration::from_secs(seconds.min(1 << 40) as i64);
                    options.since = now.checked_sub(span).ok();
                    by_seconds = true;
                }
                "sinceTime" if value.is_empty() => {}
                "sinceTime" => {
                    let time = value.parse().map_err(|_| BadOptions::Undecodable)?;
                    options.since = Some(time);
                    by_time = true;
                }
                "stream" => match value.as_str() {
                    "" | "All" => {}
                    "Stdout" => options.stream = Some("stdout".to_owned()),
                    "Stderr" => options.stream = Some("stderr".to_owned()),
                    _ => return Err(BadOptions::Invalid),
                },
                _ => {}
            }
        }
        let split_tail = options.stream.is_some() && options.tail_lines.is_some();
        if (by_seconds && by_time) || split_tail {
            return Err(BadOptions::Invalid);
        }
        Ok(options)
    }

    fn formatter(&self) -> Formatter {
        Formatter::new(self.timestamps, self.since, self.stream.clone())
    }
}

/// Options that cannot be followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadOptions {
    /// A value is not of its kind (400).
    #[error("{{\"message\": \"Unable to decode query.\"}}")]
    Undecodable,
    /// A value is out of bounds, or two exclude each other (422).
    #[error("{{\"message\": \"Invalid request.\"}}")]
    Invalid,
}

fn flag(value: &str) -> bool {
    !(value.eq_ignore_ascii_case("false") || value == "0")
}

fn number(value: &str, least: i64) -> Result<u64, BadOptions> {
    let number: i64 = value.parse().map_err(|_| BadOptions::Undecodable)?;
    if number < least {
        return Err(BadOptions::Invalid);
    }
    u64::try_from(number).map_err(|_| BadOptions::Invalid)
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

    fn options(query: &[(&str, &str)]) -> Result<LogOptions, BadOptions> {
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
    fn wrong_options_are_told_from_undecodable_ones() {
        use BadOptions::{Invalid, Undecodable};
        for (query, wanted) in [
            (&[("tailLines", "-1")][..], Invalid),
            (&[("tailLines", "many")], Undecodable),
            (&[("limitBytes", "0")], Invalid),
            (&[("sinceSeconds", "x")], Undecodable),
            (&[("sinceSeconds", "0")], Invalid),
            (&[("sinceTime", "yesterday")], Undecodable),
            (
                &[("sinceTime", "2026-01-01T00:00:00Z"), ("sinceSeconds", "1")],
                Invalid,
            ),
            (&[("stream", "both")], Invalid),
            (&[("stream", "Stderr"), ("tailLines", "1")], Invalid),
        ] {
            assert_eq!(options(query), Err(wanted), "{query:?}");
        }
        assert_eq!(options(&[("tail", "all")]), Ok(LogOptions::default()));
    }
}
