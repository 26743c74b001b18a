//! Output as log lines in the CRI format: `<time> <stream> <F|P> <text>\n`.
//!
//! Pure: bytes and a time in, bytes out. A line longer than [`MAX_LINE_BYTES`] is cut into parts
//! tagged `P`; its last part is `F`. Text without a newline at the end of the stream is `P`, so
//! that a reader does not invent a newline.

/// Longest text in one log line, as other runtimes cut.
pub(crate) const MAX_LINE_BYTES: usize = 16 * 1024;

/// Turns a byte stream into log lines, keeping the unfinished line.
#[derive(Debug, Default)]
pub(crate) struct Splitter {
    pending: Vec<u8>,
}

impl Splitter {
    /// Append the lines that `bytes` completes to `out`. `stamp` is the time, `stream` the name.
    pub(crate) fn feed(&mut self, mut bytes: &[u8], stamp: &str, stream: &str, out: &mut Vec<u8>) {
        while !bytes.is_empty() {
            let room = MAX_LINE_BYTES - self.pending.len();
            // One byte beyond the room may be the newline of a line that just fits.
            let window = &bytes[..bytes.len().min(room + 1)];
            match window.iter().position(|b| *b == b'\n') {
                Some(end) => {
                    self.emit(&bytes[..end], stamp, stream, b'F', out);
                    bytes = &bytes[end + 1..];
                }
                None if bytes.len() > room => {
                    self.emit(&bytes[..room], stamp, stream, b'P', out);
                    bytes = &bytes[room..];
                }
                None => {
                    self.pending.extend_from_slice(bytes);
                    bytes = &[];
                }
            }
        }
    }

    /// The stream ended: append what is left, if anything.
    pub(crate) fn finish(&mut self, stamp: &str, stream: &str, out: &mut Vec<u8>) {
        if !self.pending.is_empty() {
            self.emit(&[], stamp, stream, b'P', out);
        }
    }

    fn emit(&mut self, rest: &[u8], stamp: &str, stream: &str, tag: u8, out: &mut Vec<u8>) {
        out.reserve(stamp.len() + stream.len() + self.pending.len() + rest.len() + 5);
        out.extend_from_slice(stamp.as_bytes());
        out.push(b' ');
        out.extend_from_slice(stream.as_bytes());
        out.extend_from_slice(&[b' ', tag, b' ']);
        out.extend_from_slice(&self.pending);
        out.extend_from_slice(rest);
        out.push(b'\n');
        // Most lines end where a read ends: keep no memory for an idle stream.
        self.pending = Vec::new();
    }
}

/// A point in time as RFC 3339 with nine decimals, in UTC.
pub(crate) fn stamp(ns: i64) -> String {
    let (days, second, nano) = split(ns);
    let (year, month, day) = civil(days);
    let (h, m, s) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{h:02}:{m:02}:{s:02}.{nano:09}Z")
}

/// A point in time for the name of a rotated file: `yyyymmdd-hhmmss`.
pub(crate) fn compact(ns: i64) -> String {
    let (days, second, _) = split(ns);
    let (year, month, day) = civil(days);
    let (h, m, s) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}{month:02}{day:02}-{h:02}{m:02}{s:02}")
}

fn split(ns: i64) -> (i64, i64, i64) {
    let seconds = ns.div_euclid(1_000_000_000);
    (
        seconds.div_euclid(86_400),
        seconds.rem_euclid(86_400),
        ns.rem_euclid(1_000_000_000),
    )
}

/// Days since 1970-01-01 as year, month, day of the proleptic Gregorian calendar. Years are
/// counted from March, so that the leap day is the last of its year.
fn civil(days: i64) -> (i64, i64, i64) {
    let shifted = days + 719_468; // days from 0000-03-01 to the epoch
    let era = shifted.div_euclid(146_097); // days of 400 years
    let of_era = shifted.rem_euclid(146_097);
    let year = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month_from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 {
        month_from_march + 3
    } else {
        month_from_march - 9
    };
    (year + era * 400 + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn lines(chunks: &[&[u8]]) -> Vec<(char, Vec<u8>)> {
        let (mut splitter, mut out) = (Splitter::default(), Vec::new());
        for chunk in chunks {
            splitter.feed(chunk, "T", "stdout", &mut out);
        }
        splitter.finish("T", "stdout", &mut out);
        parse(&out)
    }

    fn parse(out: &[u8]) -> Vec<(char, Vec<u8>)> {
        out.split_inclusive(|b| *b == b'\n')
            .map(|line| {
                let line = line.strip_suffix(b"\n").unwrap();
                let rest = line.strip_prefix(b"T stdout ").unwrap();
                assert_eq!(rest[1], b' ');
                (rest[0] as char, rest[2..].to_vec())
            })
            .collect()
    }

    #[test]
    fn lines_are_full_and_a_tail_without_newline_is_partial() {
        assert_eq!(
            lines(&[b"a\n\nb", b"c\nd"]),
            [
                ('F', b"a".to_vec()),
                ('F', b"".to_vec()),
                ('F', b"bc".to_vec()),
                ('P', b"d".to_vec())
            ]
        );
    }

    #[test]
    fn a_line_that_just_fits_is_full_and_one_byte_more_is_cut() {
        let mut fits = vec![b'x'; MAX_LINE_BYTES];
        fits.push(b'\n');
        assert_eq!(lines(&[&fits]).len(), 1);
        fits.insert(0, b'y');
        let cut = lines(&[&fits]);
        assert_eq!(
            cut.iter().map(|l| (l.0, l.1.len())).collect::<Vec<_>>(),
            [('P', MAX_LINE_BYTES), ('F', 1)]
        );
    }

    #[test]
    fn times_are_written_as_rfc_3339() {
        assert_eq!(stamp(0), "1970-01-01T00:00:00.000000000Z");
        assert_eq!(
            stamp(951_827_696_000_000_001),
            "2000-02-29T12:34:56.000000001Z"
        );
        assert_eq!(
            stamp(1_709_251_199_999_999_999),
            "2024-02-29T23:59:59.999999999Z"
        );
        assert_eq!(compact(1_136_214_245_000_000_000), "20060102-150405");
    }

    proptest! {
        // Each case is tens of kilobytes.
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn no_byte_is_lost_and_cutting_the_input_changes_nothing(
            text in proptest::collection::vec(
                prop_oneof![8 => any::<u8>(), 1 => Just(b'\n')], 0..60_000),
            cuts in proptest::collection::vec(1usize..20_000, 1..20),
        ) {
            let mut chunks = Vec::new();
            let (mut at, mut cut) = (0, cuts.iter().cycle());
            while at < text.len() {
                let end = (at + cut.next().unwrap()).min(text.len());
                chunks.push(&text[at..end]);
                at = end;
            }
            let cut = lines(&chunks);
            prop_assert_eq!(&cut, &lines(&[&text]));
            let mut back = Vec::new();
            for (tag, line) in cut {
                prop_assert!(line.len() <= MAX_LINE_BYTES);
                back.extend(line);
                if tag == 'F' {
                    back.push(b'\n');
                }
            }
            prop_assert_eq!(back, text);
        }
    }
}
