//! One line of a log in CRI format: `<RFC 3339 time> <stdout|stderr> <tags> <content>`. Pure.
//!
//! Tags are separated by colons; the first is `F` for a full line and `P` for a part of one that
//! goes on in the next record of the same stream.

/// A record of a log file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record<'a> {
    /// The time as written.
    pub time: &'a str,
    /// `stdout` or `stderr`.
    pub stream: &'a str,
    /// More of the same line follows.
    pub partial: bool,
    /// What the container wrote, without a line end.
    pub content: &'a [u8],
}

/// Parses one line (without its line end); none when it has not that form.
pub fn record(line: &[u8]) -> Option<Record<'_>> {
    let (time, rest) = word(line)?;
    let (stream, rest) = word(rest)?;
    // A record with empty content may lack the space after its tags.
    let (tags, content) =
        word(rest).or_else(|| Some((std::str::from_utf8(rest).ok()?, &[][..])))?;
    if !matches!(stream, "stdout" | "stderr") || time.len() < "2006-01-02T15:04:05Z".len() {
        return None;
    }
    let partial = match tags.split(':').next()? {
        "P" => true,
        "F" => false,
        _ => return None,
    };
    Some(Record {
        time,
        stream,
        partial,
        content,
    })
}

fn word(bytes: &[u8]) -> Option<(&str, &[u8])> {
    let end = bytes.iter().position(|b| *b == b' ')?;
    Some((std::str::from_utf8(&bytes[..end]).ok()?, &bytes[end + 1..]))
}

/// Turns records into what the user asked to see.
#[derive(Debug, Default)]
pub struct Formatter {
    /// Put the time before each line.
    pub timestamps: bool,
    /// Only this stream.
    pub stream: Option<String>,
    /// Leave out what is older.
    pub since: Option<jiff::Timestamp>,
    in_line: bool,
}

impl Formatter {
    /// A formatter.
    pub fn new(timestamps: bool, since: Option<jiff::Timestamp>, stream: Option<String>) -> Self {
        Self {
            timestamps,
            stream,
            since,
            in_line: false,
        }
    }

    /// Appends what `line` shows to `out`. Lines that are no records are left out.
    pub fn format(&mut self, line: &[u8], out: &mut Vec<u8>) {
        let Some(record) = record(line) else { return };
        if self.stream.as_deref().is_some_and(|s| s != record.stream) {
            return;
        }
        if let Some(since) = self.since {
            match record.time.parse::<jiff::Timestamp>() {
                Ok(time) if time < since => return,
                // Times only grow within a log: from here on everything is new enough.
                Ok(_) => self.since = None,
                Err(_) => {}
            }
        }
        if self.timestamps && !self.in_line {
            out.extend_from_slice(record.time.as_bytes());
            out.push(b' ');
        }
        out.extend_from_slice(record.content);
        self.in_line = record.partial;
        if !record.partial {
            out.push(b'\n');
        }
    }
}

/// Where the last `lines` lines begin in `log`, as an offset; 0 when it has fewer. Parts of one
/// line count once.
pub fn tail_start(log: &[u8], lines: u64) -> usize {
    if lines == 0 {
        return log.len();
    }
    let mut end = log.len();
    let mut seen = 0;
    while end > 0 {
        let body = &log[..end - usize::from(log[end - 1] == b'\n')];
        let start = body.iter().rposition(|b| *b == b'\n').map_or(0, |p| p + 1);
        let full = !record(&body[start..]).is_some_and(|r| r.partial);
        // A last line without its end is a line too: many programs end that way.
        if full || end == log.len() {
            if seen == lines {
                return end;
            }
            seen += 1;
        }
        end = start;
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &[u8] = b"2026-01-01T00:00:00.000000001Z stdout F one\n\
        2026-01-01T00:00:01.000000000Z stderr P tw\n\
        2026-01-01T00:00:02.000000000Z stderr F o\n\
        2026-01-01T00:00:03.000000000Z stdout F \n";

    fn show(mut formatter: Formatter, log: &[u8]) -> String {
        let mut out = Vec::new();
        for line in log.split(|b| *b == b'\n') {
            formatter.format(line, &mut out);
        }
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn parts_are_joined_and_empty_lines_kept() {
        assert_eq!(show(Formatter::default(), LOG), "one\ntwo\n\n");
    }

    #[test]
    fn times_stand_before_whole_lines_only() {
        let shown = show(Formatter::new(true, None, None), LOG);
        assert_eq!(
            shown.lines().nth(1),
            Some("2026-01-01T00:00:01.000000000Z two")
        );
    }

    #[test]
    fn older_lines_and_other_streams_are_left_out() {
        let since = "2026-01-01T00:00:01Z".parse().unwrap();
        assert_eq!(
            show(Formatter::new(false, Some(since), None), LOG),
            "two\n\n"
        );
        let only = Formatter::new(false, None, Some("stderr".to_owned()));
        assert_eq!(show(only, LOG), "two\n");
    }

    #[test]
    fn the_tail_counts_lines_not_parts() {
        let tail = |n| show(Formatter::default(), &LOG[tail_start(LOG, n)..]);
        assert_eq!(tail(0), "");
        assert_eq!(tail(1), "\n");
        assert_eq!(tail(2), "two\n\n");
        assert_eq!(tail(3), "one\ntwo\n\n");
        assert_eq!(tail(99), "one\ntwo\n\n");
    }

    #[test]
    fn a_last_line_without_its_end_counts() {
        let log = [LOG, b"2026-01-01T00:00:04.000000000Z stdout P three\n"].concat();
        let tail = |n| show(Formatter::default(), &log[tail_start(&log, n)..]);
        assert_eq!(tail(1), "three");
        assert_eq!(tail(3), "two\n\nthree");
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_survived(log: Vec<u8>, lines in 0u64..10) {
            proptest::prop_assert!(tail_start(&log, lines) <= log.len());
            let mut out = Vec::new();
            for line in log.split(|b| *b == b'\n') {
                Formatter::new(true, None, None).format(line, &mut out);
            }
        }

        #[test]
        fn content_comes_out_as_it_went_in(
            lines in proptest::collection::vec("[a-z ]{0,20}", 0..20), n in 0u64..25
        ) {
            let mut log = Vec::new();
            for line in &lines {
                log.extend_from_slice(format!("2026-01-01T00:00:00.000000001Z stdout F {line}\n").as_bytes());
            }
            let from = lines.len().saturating_sub(n as usize);
            let expected: String = lines[from..].iter().map(|l| format!("{l}\n")).collect();
            proptest::prop_assert_eq!(show(Formatter::default(), &log[tail_start(&log, n)..]), expected);
        }
    }
}
