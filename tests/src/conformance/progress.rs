//! Reading ginkgo's output while it comes: how many specs are through, which failed.
//!
//! In parallel runs ginkgo prints one sign per spec (`•` passed, `S` skipped) on one endless line,
//! and a block of its own for a spec that failed:
//!
//! ```text
//! ------------------------------
//! • [FAILED] [301.386 seconds]
//! [sig-node] Pods [It] should be submitted and removed [NodeConformance]
//! ```

/// What has been seen so far.
#[derive(Debug, Default)]
pub(super) struct Progress {
    /// Specs that will run; 0 until ginkgo said so.
    pub(super) total: u32,
    /// Specs that ended.
    pub(super) done: u32,
    /// Names of those that failed, in the order they did.
    pub(super) failed: Vec<String>,
    line: Vec<u8>,
    /// Whether the line began with a sign: only then it is the headline of a block. Logs of
    /// specs quote the same words.
    signed: bool,
    place: Place,
}

/// Where in the output the next byte stands.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// At the start of a line, or behind nothing but signs.
    #[default]
    Signs,
    /// In a line of words.
    Words,
    /// In the line behind that of a failure, which is the spec's name.
    Name,
}

/// Longest line that is kept; headlines are far shorter.
const LINE_LIMIT: usize = 2048;

impl Progress {
    /// Takes what ginkgo printed next, cut anywhere.
    pub(super) fn feed(&mut self, bytes: &[u8]) {
        for byte in bytes {
            if *byte == b'\n' {
                self.end_line();
                continue;
            }
            if self.line.len() < LINE_LIMIT {
                self.line.push(*byte);
            }
            if self.place == Place::Signs {
                self.sign();
            }
        }
    }

    /// Counts the sign that the line now ends with, if it is one.
    fn sign(&mut self) {
        if self.line.ends_with("•".as_bytes()) {
            self.done += 1;
            self.line.clear();
            self.signed = true;
        } else if self.line == b"S" {
            self.line.clear();
            self.signed = true;
        } else if !"•".as_bytes().starts_with(&self.line) {
            self.place = Place::Words;
        }
    }

    fn end_line(&mut self) {
        let line = std::mem::take(&mut self.line);
        let line = String::from_utf8_lossy(&line);
        let line = line.trim();
        let place = std::mem::replace(&mut self.place, Place::Signs);
        let signed = std::mem::take(&mut self.signed);
        match place {
            Place::Name if !line.is_empty() => self.failed.push(name(line)),
            Place::Name => self.place = Place::Name,
            Place::Signs | Place::Words => {
                let bad = ["[FAILED]", "[PANICKED]", "[TIMEDOUT]", "[INTERRUPTED]"];
                if let Some(rest) = line.strip_prefix("Will run ") {
                    let count = rest.split(' ').next().and_then(|word| word.parse().ok());
                    self.total = count.unwrap_or(self.total);
                } else if signed && line.starts_with("[SKIPPED]") {
                    self.done += 1;
                } else if signed && bad.iter().any(|word| line.starts_with(word)) {
                    self.place = Place::Name;
                }
            }
        }
    }

    /// One line for a person who waits.
    pub(super) fn summary(&self) -> String {
        format!(
            "{} of {} specs, {} failed",
            self.done.min(self.total),
            self.total,
            self.failed.len()
        )
    }
}

/// A spec's name from its headline, which marks the leaf and repeats the labels at the end.
fn name(line: &str) -> String {
    let plain = line.rsplit_once(" [sig-").map_or(line, |(name, _)| name);
    plain.replace(" [It]", "")
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "Random Seed: 1 - will randomize all specs\n\n\
        Will run 4 of 7579 specs\nRunning in parallel across 8 processes\nSSS•SS••SS\n\
        ------------------------------\n• [FAILED] [301.386 seconds]\n\
        [sig-node] Pods [It] should be removed [NodeConformance] [sig-node, NodeConformance]\n\
        k8s.io/pods.go:12\n  [FAILED] a log says it again\n  some line\n\n  • a bullet in a log\n------------------------------\nSS\n\
        ------------------------------\nS [SKIPPED] [0.012 seconds]\n[sig-node] A [It] b\nSS";

    fn check(progress: &Progress) {
        assert_eq!((progress.total, progress.done), (4, 5));
        assert_eq!(
            progress.failed,
            ["[sig-node] Pods should be removed [NodeConformance]"]
        );
    }

    #[test]
    fn signs_are_counted_and_failures_named_wherever_the_output_is_cut() {
        for size in [1, 2, 3, 7, 1000] {
            let mut progress = Progress::default();
            for part in OUTPUT.as_bytes().chunks(size) {
                progress.feed(part);
            }
            check(&progress);
        }
    }
}
