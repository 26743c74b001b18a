//! The text format metrics are read in (Prometheus exposition format 0.0.4). Pure.

use super::instruments::Histogram;
use std::collections::HashMap;
use std::fmt::Write;

/// `Content-Type` of a rendered page.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8; escaping=underscores";

/// What the numbers of a family mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Only ever grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Observations by size.
    Histogram,
}

impl Kind {
    fn word(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

/// Name, meaning and explanation of a family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Family {
    /// Name.
    pub name: &'static str,
    /// Meaning.
    pub kind: Kind,
    /// One line for people.
    pub help: &'static str,
}

impl Family {
    /// A counter.
    pub const fn counter(name: &'static str, help: &'static str) -> Self {
        let kind = Kind::Counter;
        Self { name, kind, help }
    }

    /// A gauge.
    pub const fn gauge(name: &'static str, help: &'static str) -> Self {
        let kind = Kind::Gauge;
        Self { name, kind, help }
    }

    /// A histogram.
    pub const fn histogram(name: &'static str, help: &'static str) -> Self {
        let kind = Kind::Histogram;
        Self { name, kind, help }
    }
}

/// Labels of a sample.
pub type Labels<'a> = &'a [(&'a str, &'a str)];

/// A page being written. Samples may come in any order: each family's stay together, families
/// appear in the order of their first sample, and one without samples does not appear.
#[derive(Debug, Default)]
pub struct Page {
    families: Vec<(Family, String)>,
    places: HashMap<&'static str, usize>,
}

impl Page {
    /// An empty page.
    pub fn new() -> Self {
        Self::default()
    }

    fn samples(&mut self, family: Family) -> &mut String {
        let place = *self.places.entry(family.name).or_insert_with(|| {
            self.families.push((family, String::new()));
            self.families.len() - 1
        });
        &mut self.families[place].1
    }

    /// Adds a sample.
    pub fn put(&mut self, family: Family, labels: Labels<'_>, value: f64) {
        let out = self.samples(family);
        sample(out, family.name, "", labels, None, value, None);
    }

    /// Adds a sample that was taken at `at_ms` (milliseconds since the epoch).
    pub fn put_at(&mut self, family: Family, labels: Labels<'_>, value: f64, at_ms: i64) {
        let out = self.samples(family);
        sample(out, family.name, "", labels, None, value, Some(at_ms));
    }

    /// Adds the series of a histogram.
    pub fn put_histogram(&mut self, family: Family, labels: Labels<'_>, histogram: &Histogram) {
        let (counts, sum) = histogram.read();
        let out = self.samples(family);
        let mut below = 0;
        for (bound, count) in histogram.bounds().iter().zip(&counts) {
            below += count;
            let bound = number(*bound);
            let le = Some(bound.as_str());
            sample(out, family.name, "_bucket", labels, le, below as f64, None);
        }
        let all: u64 = counts.iter().sum();
        let (name, all) = (family.name, all as f64);
        sample(out, name, "_bucket", labels, Some("+Inf"), all, None);
        sample(out, name, "_sum", labels, None, sum, None);
        sample(out, name, "_count", labels, None, all, None);
    }

    /// The page as text.
    pub fn render(self) -> String {
        let mut out = String::new();
        for (family, samples) in self.families {
            // Writing to a string cannot fail.
            let _ = writeln!(out, "# HELP {} {}", family.name, escape(family.help, false));
            let _ = writeln!(out, "# TYPE {} {}", family.name, family.kind.word());
            out.push_str(&samples);
        }
        out
    }
}

fn sample(
    out: &mut String,
    name: &str,
    suffix: &str,
    labels: Labels<'_>,
    le: Option<&str>,
    value: f64,
    at_ms: Option<i64>,
) {
    out.push_str(name);
    out.push_str(suffix);
    let all = labels.iter().copied().chain(le.map(|le| ("le", le)));
    let mut separator = '{';
    for (label, value) in all {
        let _ = write!(out, "{separator}{label}=\"{}\"", escape(value, true));
        separator = ',';
    }
    if separator == ',' {
        out.push('}');
    }
    let _ = write!(out, " {}", number(value));
    if let Some(at) = at_ms {
        let _ = write!(out, " {at}");
    }
    out.push('\n');
}

/// A number as the format has it.
fn number(value: f64) -> String {
    if value.is_nan() {
        "NaN".to_owned()
    } else if value.is_infinite() {
        if value > 0.0 { "+Inf" } else { "-Inf" }.to_owned()
    } else if value != 0.0 && (value.abs() >= 1e17 || value.abs() < 1e-5) {
        format!("{value:e}")
    } else {
        value.to_string()
    }
}

fn escape(text: &str, quotes: bool) -> std::borrow::Cow<'_, str> {
    let special = |c: char| c == '\\' || c == '\n' || (quotes && c == '"');
    if !text.contains(special) {
        return text.into();
    }
    let mut out = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '"' if quotes => out.push_str("\\\""),
            other => out.push(other),
        }
    }
    out.into()
}

#[cfg(test)]
mod tests {
    use super::super::parse::parse;
    use super::*;

    const ONE: Family = Family::gauge("one", "The first\nfamily \\ of two.");
    const TWO: Family = Family::counter("two_total", "The second.");

    #[test]
    fn samples_of_a_family_stay_together() {
        let mut page = Page::new();
        page.put(ONE, &[("a", "x")], 1.0);
        page.put(TWO, &[], 2.5);
        page.put_at(ONE, &[("a", "y")], f64::INFINITY, 1234);
        assert_eq!(
            page.render(),
            "# HELP one The first\\nfamily \\\\ of two.\n# TYPE one gauge\n\
             one{a=\"x\"} 1\none{a=\"y\"} +Inf 1234\n\
             # HELP two_total The second.\n# TYPE two_total counter\ntwo_total 2.5\n"
        );
    }

    #[test]
    fn a_histogram_is_cumulative() {
        let histogram = Histogram::new(&[0.1, 1.0]);
        for value in [0.05, 0.5, 0.5, 7.0] {
            histogram.observe(value);
        }
        let mut page = Page::new();
        let family = Family::histogram("h_seconds", "H.");
        page.put_histogram(family, &[("k", "v")], &histogram);
        let found = parse(&page.render()).unwrap();
        let of = |name: &str, le: &str| {
            let wanted = |s: &&super::super::parse::Sample| {
                s.name == name && s.labels.get("le").map_or("", String::as_str) == le
            };
            found.samples.iter().find(wanted).unwrap().value
        };
        assert_eq!(of("h_seconds_bucket", "0.1"), 1.0);
        assert_eq!(of("h_seconds_bucket", "1"), 3.0);
        assert_eq!(of("h_seconds_bucket", "+Inf"), 4.0);
        assert_eq!(of("h_seconds_count", ""), 4.0);
        assert!((of("h_seconds_sum", "") - 8.05).abs() < 1e-9);
    }

    proptest::proptest! {
        #[test]
        fn what_is_written_reads_back(label in ".{0,30}", value: f64, at: Option<i64>) {
            let mut page = Page::new();
            match at {
                Some(at) => page.put_at(ONE, &[("l", &label)], value, at),
                None => page.put(ONE, &[("l", &label)], value),
            }
            let found = parse(&page.render()).unwrap();
            let sample = &found.samples[0];
            proptest::prop_assert_eq!(&sample.labels["l"], &label);
            proptest::prop_assert_eq!(sample.at_ms, at);
            proptest::prop_assert!(
                sample.value == value || sample.value.is_nan() && value.is_nan()
            );
        }
    }
}
