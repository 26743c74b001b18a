//! What a run showed: read from ginkgo's JSON report, grouped, rendered.

use anyhow::{Context, Result};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::BufReader;
use std::path::Path;

/// How a spec ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It passed.
    Passed,
    /// It failed, panicked, ran out of time or was interrupted.
    Failed,
    /// It found that it cannot run here, and said so.
    Skipped,
}

/// One spec that was chosen.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Spec {
    /// Full name with tags.
    pub name: String,
    /// What it is about: `[sig-node] Pods`.
    pub group: String,
    /// How it ended.
    pub state: State,
    /// How long it took.
    pub seconds: f64,
    /// Why it failed or was skipped.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// Everything it printed.
    #[serde(skip)]
    pub output: String,
}

/// One run of the suite.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Report {
    /// Wall time.
    pub seconds: f64,
    /// How many were to run.
    pub chosen: usize,
    /// What failed outside of specs, such as the preparation of the whole suite.
    pub suite_failures: Vec<String>,
    /// Every spec, by name.
    pub specs: Vec<Spec>,
}

/// Numbers of a group of specs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Numbers {
    /// Passed.
    pub passed: u32,
    /// Failed.
    pub failed: u32,
    /// Skipped by themselves.
    pub skipped: u32,
    /// Sum of the specs' times; they overlap.
    pub seconds: f64,
}

impl Numbers {
    fn add(&mut self, spec: &Spec) {
        self.seconds += spec.seconds;
        match spec.state {
            State::Passed => self.passed += 1,
            State::Failed => self.failed += 1,
            State::Skipped => self.skipped += 1,
        }
    }
}

impl Report {
    /// Reads ginkgo's JSON report of one suite.
    ///
    /// # Errors
    /// When it cannot be read, or is not such a report.
    pub fn read(path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
        let suites: Vec<raw::Suite> = serde_json::from_reader(BufReader::new(file))
            .with_context(|| format!("parse {}", path.display()))?;
        let suite = suites.into_iter().next();
        Ok(suite.context("the report holds no suite")?.into())
    }

    /// All specs together.
    #[must_use]
    pub fn total(&self) -> Numbers {
        let mut numbers = Numbers::default();
        self.specs.iter().for_each(|spec| numbers.add(spec));
        numbers
    }

    /// By group.
    #[must_use]
    pub fn groups(&self) -> BTreeMap<&str, Numbers> {
        let mut groups: BTreeMap<&str, Numbers> = BTreeMap::new();
        for spec in &self.specs {
            groups.entry(&spec.group).or_default().add(spec);
        }
        groups
    }

    /// Those that failed.
    pub fn failures(&self) -> impl Iterator<Item = &Spec> {
        let specs = self.specs.iter();
        specs.filter(|spec| spec.state == State::Failed)
    }

    /// Whether everything that was chosen ran and none failed.
    #[must_use]
    pub fn is_green(&self) -> bool {
        self.suite_failures.is_empty()
            && self.failures().next().is_none()
            && self.specs.len() == self.chosen
            && self.chosen > 0
    }

    /// Writes what each failed spec printed into a file of its own below `dir`.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn write_failures(&self, dir: &Path) -> Result<()> {
        fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        for spec in self.failures() {
            let path = dir.join(file_name(&spec.name));
            let text = format!("{}\n\n{}\n\n{}", spec.name, spec.message, spec.output);
            fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        }
        Ok(())
    }
}

/// A file name from a spec's: letters and digits, words joined by dashes, of a bounded length and
/// still distinct.
fn file_name(spec: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { ' ' };
    let words: String = spec.chars().map(plain).collect();
    let mut name = words.split_whitespace().collect::<Vec<_>>().join("-");
    name.truncate(120);
    // FNV-1a: two long names may differ in their ends only.
    let hash = spec.bytes().fold(0x811c_9dc5_u32, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    });
    format!("{name}-{hash:08x}.txt")
}

/// ginkgo's report, as far as it is read here.
mod raw {
    use super::{Report, Spec, State};
    use serde::Deserialize;

    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    pub(super) struct Suite {
        pre_run_stats: PreRunStats,
        run_time: u64,
        #[serde(default)]
        special_suite_failure_reasons: Option<Vec<String>>,
        #[serde(default)]
        spec_reports: Option<Vec<SpecReport>>,
    }

    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct PreRunStats {
        specs_that_will_run: usize,
    }

    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct SpecReport {
        container_hierarchy_texts: Option<Vec<String>>,
        leaf_node_type: String,
        leaf_node_text: String,
        state: String,
        run_time: u64,
        num_attempts: u32,
        #[serde(default)]
        failure: Failure,
        #[serde(default)]
        captured_ginkgo_writer_output: String,
        #[serde(default)]
        captured_std_out_err: String,
    }

    #[derive(Deserialize, Default)]
    #[serde(rename_all = "PascalCase", default)]
    struct Failure {
        message: String,
        location: Location,
    }

    #[derive(Deserialize, Default)]
    #[serde(rename_all = "PascalCase", default)]
    struct Location {
        file_name: String,
        line_number: u32,
    }

    const NANOSECONDS: f64 = 1e9;

    impl From<Suite> for Report {
        fn from(suite: Suite) -> Self {
            let mut report = Self {
                seconds: suite.run_time as f64 / NANOSECONDS,
                chosen: suite.pre_run_stats.specs_that_will_run,
                suite_failures: suite.special_suite_failure_reasons.unwrap_or_default(),
                specs: Vec::new(),
            };
            for spec in suite.spec_reports.unwrap_or_default() {
                if spec.leaf_node_type == "It" {
                    report.specs.extend(spec.chosen());
                } else if !matches!(spec.state.as_str(), "passed" | "skipped") {
                    let text = format!("{}: {}", spec.leaf_node_type, spec.failure.message);
                    report.suite_failures.push(text);
                }
            }
            report.specs.sort_by(|a, b| a.name.cmp(&b.name));
            report
        }
    }

    impl SpecReport {
        /// `None` for one that the filters left out: it was never attempted.
        fn chosen(self) -> Option<Spec> {
            let state = match self.state.as_str() {
                "passed" => State::Passed,
                "skipped" | "pending" if self.num_attempts == 0 => return None,
                "skipped" | "pending" => State::Skipped,
                _ => State::Failed,
            };
            let containers = self.container_hierarchy_texts.unwrap_or_default();
            let group = super::untagged(containers.first().unwrap_or(&self.leaf_node_text));
            let mut words = containers;
            words.push(self.leaf_node_text);
            let place = &self.failure.location;
            let message = if self.failure.message.is_empty() {
                String::new()
            } else {
                format!(
                    "{}\n({}:{})",
                    self.failure.message, place.file_name, place.line_number
                )
            };
            Some(Spec {
                name: words.join(" "),
                group,
                state,
                seconds: self.run_time as f64 / NANOSECONDS,
                message,
                output: self.captured_ginkgo_writer_output + &self.captured_std_out_err,
            })
        }
    }
}

/// A group's name with no tag but the first, the interest group: the others do not tell groups
/// apart.
fn untagged(text: &str) -> String {
    let (mut name, mut depth, mut tags) = (String::new(), 0_u32, 0_u32);
    for letter in text.chars() {
        if letter == '[' {
            depth += 1;
            tags += u32::from(depth == 1);
        }
        if depth == 0 || tags == 1 {
            name.push(letter);
        }
        if letter == ']' {
            depth = depth.saturating_sub(1);
        }
    }
    name.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// One run as a table, with the failures named below it.
#[must_use]
pub fn table(report: &Report) -> String {
    let mut out = format!(
        "{:58} {:>6} {:>6} {:>7} {:>8}\n",
        "", "passed", "failed", "skipped", "time"
    );
    let mut row = |name: &str, numbers: Numbers, seconds: f64| {
        out.push_str(&format!(
            "{:58} {:>6} {:>6} {:>7} {:>8}\n",
            cut(name),
            numbers.passed,
            numbers.failed,
            numbers.skipped,
            duration(seconds)
        ));
    };
    for (name, numbers) in report.groups() {
        row(name, numbers, numbers.seconds);
    }
    row("all (time: as it passed)", report.total(), report.seconds);
    for spec in report.failures() {
        out.push_str(&format!("✗ {}\n  {}\n", spec.name, first_line(spec)));
    }
    for failure in &report.suite_failures {
        out.push_str(&format!("✗ {failure}\n"));
    }
    out
}

/// Two runs side by side, and what failed in which.
#[must_use]
pub fn comparison(ours: &Report, stock: &Report) -> String {
    let mut out = format!(
        "{:58} {:^23}   {:^23}\n{:58} {:>6} {:>6} {:>9}   {:>6} {:>6} {:>9}\n",
        "", "ferrule", "stock", "", "passed", "failed", "time", "passed", "failed", "time"
    );
    let mut row = |name: &str, ours: Numbers, stock: Numbers| {
        out.push_str(&format!(
            "{:58} {:>6} {:>6} {:>9}   {:>6} {:>6} {:>9}\n",
            cut(name),
            ours.passed,
            ours.failed,
            duration(ours.seconds),
            stock.passed,
            stock.failed,
            duration(stock.seconds)
        ));
    };
    let theirs = stock.groups();
    let mut groups = ours.groups();
    for name in theirs.keys() {
        groups.entry(name).or_default();
    }
    for (name, numbers) in groups {
        row(name, numbers, theirs.get(name).copied().unwrap_or_default());
    }
    let wall = |report: &Report| Numbers {
        seconds: report.seconds,
        ..report.total()
    };
    row("all (time: as it passed)", wall(ours), wall(stock));
    let failed = |report: &Report, spec: &Spec| report.failures().any(|s| s.name == spec.name);
    for spec in ours.failures() {
        let place = if failed(stock, spec) {
            "on both"
        } else {
            "here only"
        };
        out.push_str(&format!(
            "✗ {place}: {}\n  {}\n",
            spec.name,
            first_line(spec)
        ));
    }
    for spec in stock.failures().filter(|spec| !failed(ours, spec)) {
        out.push_str(&format!("  on the stock node only: {}\n", spec.name));
    }
    out
}

fn first_line(spec: &Spec) -> &str {
    let mut lines = spec.message.lines().map(str::trim);
    lines.find(|line| !line.is_empty()).unwrap_or_default()
}

fn cut(name: &str) -> String {
    name.chars().take(58).collect()
}

fn duration(seconds: f64) -> String {
    if seconds < 600.0 {
        format!("{seconds:.0} s")
    } else {
        format!("{:.1} min", seconds / 60.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPORT: &str = r#"[{"PreRunStats": {"TotalSpecs": 5, "SpecsThatWillRun": 3}, "RunTime": 90000000000,
      "SpecialSuiteFailureReasons": null, "SpecReports": [
      {"ContainerHierarchyTexts": null, "LeafNodeType": "ReportAfterSuite", "LeafNodeText": "",
       "State": "passed", "RunTime": 1, "NumAttempts": 0},
      {"ContainerHierarchyTexts": ["[sig-node] Pods [NodeConformance]", "when it rains"],
       "LeafNodeType": "It", "LeafNodeText": "gets wet", "State": "passed",
       "RunTime": 2000000000, "NumAttempts": 1},
      {"ContainerHierarchyTexts": ["[sig-node] Pods [NodeConformance]"],
       "LeafNodeType": "It", "LeafNodeText": "stays dry", "State": "timedout",
       "RunTime": 1000000000, "NumAttempts": 1,
       "Failure": {"Message": "\nno umbrella\nat all", "Location": {"FileName": "a.go", "LineNumber": 7}},
       "CapturedGinkgoWriterOutput": "drip"},
      {"ContainerHierarchyTexts": ["[sig-storage] Sky"],
       "LeafNodeType": "It", "LeafNodeText": "is blue", "State": "skipped",
       "RunTime": 5, "NumAttempts": 1},
      {"ContainerHierarchyTexts": ["[sig-storage] Sky"],
       "LeafNodeType": "It", "LeafNodeText": "was left out", "State": "skipped",
       "RunTime": 0, "NumAttempts": 0}]}]"#;

    fn report() -> Report {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("report.json");
        fs::write(&path, REPORT).unwrap();
        Report::read(&path).unwrap()
    }

    #[test]
    fn specs_are_counted_by_group_and_those_left_out_are_not() {
        let report = report();
        assert_eq!((report.chosen, report.specs.len()), (3, 3));
        let groups = report.groups();
        let pods = groups["[sig-node] Pods"];
        assert_eq!((pods.passed, pods.failed, pods.skipped), (1, 1, 0));
        assert_eq!(groups["[sig-storage] Sky"].skipped, 1);
        assert!(!report.is_green());
    }

    #[test]
    fn a_failure_keeps_its_message_place_and_output() {
        let report = report();
        let failure = report.failures().next().unwrap();
        assert!(failure.message.ends_with("(a.go:7)"), "{}", failure.message);
        let dir = tempfile::tempdir().unwrap();
        report.write_failures(dir.path()).unwrap();
        let file = fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap();
        let text = fs::read_to_string(file.path()).unwrap();
        assert!(
            text.contains("no umbrella") && text.contains("drip"),
            "{text}"
        );
    }

    #[test]
    fn the_table_names_groups_totals_and_failures() {
        let text = table(&report());
        assert!(text.contains("[sig-node] Pods"), "{text}");
        assert!(text.contains("no umbrella"), "{text}");
    }

    #[test]
    fn a_failure_on_both_sides_is_told_from_one_here() {
        let ours = report();
        let mut stock = report();
        let text = comparison(&ours, &stock);
        assert!(text.contains("on both"), "{text}");
        stock.specs.retain(|spec| spec.state != State::Failed);
        let text = comparison(&ours, &stock);
        assert!(text.contains("here only"), "{text}");
    }

    #[test]
    fn a_group_is_named_without_its_tags() {
        let text = "[sig-node] [NodeConformance] [FeatureGate:A] Probing things [Beta]";
        assert_eq!(untagged(text), "[sig-node] Probing things");
        assert_eq!(untagged("[sig-node] Pods"), "[sig-node] Pods");
    }

    #[test]
    fn a_run_that_chose_nothing_is_not_green() {
        assert!(!Report::default().is_green());
    }
}
