//! `cargo xtask conformance`: the unmodified upstream end-to-end binary against a lab of our
//! nodes, and, to tell a fault of ours from a limit of the machine, against one of stock nodes.

mod progress;
mod report;
mod suites;

pub use report::{Report, comparison, table};
pub use suites::{DEFAULT_SKIP, SUITES, Suite, find as suite};

use crate::cluster::state::LabState;
use crate::cluster::{self, Lab, NodeKind, UpOptions};
use crate::progress::Step;
use crate::{artefacts, command, images, paths};
use anyhow::{Context, Result, bail};
use progress::Progress;
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Some specs compare what two nodes do, or need a second one to schedule on.
const NODES: usize = 2;

/// What to run, where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConformanceOptions {
    /// The lab; brought up when it is not there.
    pub lab: String,
    /// Node kind of a new lab.
    pub kind: NodeKind,
    /// Regular expression of what to run.
    pub focus: String,
    /// Regular expression of what to leave out; empty leaves out nothing.
    pub skip: String,
    /// Specs at once. Those marked `[Serial]` run alone after the others in any case.
    pub procs: u32,
    /// Missing Debian packages may be installed.
    pub may_install: bool,
    /// Leave up a lab that this run brought up. One that was there, or in which something failed,
    /// is left up in any case.
    pub keep: bool,
    /// Where the reports go, in a directory of the lab's name.
    pub reports: PathBuf,
}

/// Where reports go unless told otherwise: they outlive the lab.
#[must_use]
pub fn default_reports() -> PathBuf {
    paths::target().join("conformance")
}

/// Prints which specs would run; needs no cluster.
///
/// # Errors
/// When the binary cannot be had or the expressions are none.
pub fn list(focus: &str, skip: &str) -> Result<()> {
    let programs = artefacts::go::e2e_suite()?;
    let dir = tempfile::tempdir().context("create a directory for the report")?;
    let file = dir.path().join("report.json");
    let mut suite = command::command(programs.join("e2e.test"), &["--ginkgo.dry-run"]);
    suite
        .arg(format!("--ginkgo.focus={focus}"))
        .args(skip_words(skip).map(|word| word.replacen("--", "--ginkgo.", 1)))
        .arg(format!("--ginkgo.json-report={}", file.display()))
        .args(["--provider=skeleton", "--kubeconfig=/nonexistent"])
        .current_dir(dir.path());
    command::stdout(&mut suite)?;
    let report = Report::read(&file)?;
    for spec in &report.specs {
        println!("{}", spec.name);
    }
    eprintln!("{} specs", report.specs.len());
    Ok(())
}

/// Runs the suite and returns what it showed. Specs that fail are in the report, not an error.
///
/// # Errors
/// When the lab or the binary cannot be had, or the suite ends without a report.
pub fn run(options: &ConformanceOptions) -> Result<Report> {
    let programs = artefacts::go::e2e_suite()?;
    let recorded = LabState::load(&paths::labs(), &options.lab)?;
    let nodes = recorded.as_ref().map_or(0, |state| state.nodes.len());
    let lab = cluster::up(&UpOptions {
        lab: options.lab.clone(),
        nodes: Some(nodes.max(NODES)),
        kind: options.kind,
        may_install: options.may_install,
        agents: true,
        addons: cluster::Addons::ALL,
        family: None,
        network: None,
        sample: false,
        profile: artefacts::ours::TEST_PROFILE.to_owned(),
    })?;
    images::ensure_suite(&lab.layout.registry(), &paths::cache()?)?;
    let reports = options.reports.join(&options.lab);
    fresh_directory(&reports)?;
    let mut runner = ginkgo(&programs, &lab, options, &reports);
    // The lab must not be locked for hours.
    drop(lab);
    let status = watch(&mut runner, options, &reports)?;
    let file = reports.join(JSON_REPORT);
    if !file.exists() {
        bail!(
            "the suite ended without a report ({status}); its output is in {}",
            reports.join(OUTPUT).display()
        );
    }
    let report = Report::read(&file)?;
    report.write_failures(&reports.join("failures"))?;
    fs::write(reports.join("table.txt"), table(&report)).context("write the table")?;
    if recorded.is_none() && !options.keep && report.is_green() {
        cluster::down(&options.lab)?;
    }
    Ok(report)
}

/// ginkgo's own report in the report directory; the JUnit file beside it is the suite's.
const JSON_REPORT: &str = "report.json";

/// Everything ginkgo printed.
const OUTPUT: &str = "output.log";

/// An earlier run's files must not be taken for this one's.
fn fresh_directory(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("empty {}", dir.display()));
        }
        _ => {}
    }
    fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))
}

fn ginkgo(programs: &Path, lab: &Lab, options: &ConformanceOptions, reports: &Path) -> Command {
    let kubeconfig = lab.layout.admin_kubeconfig();
    let mut runner = command::command(programs.join("ginkgo"), &[]);
    runner
        .arg(format!("--procs={}", options.procs))
        // Its own limit of an hour is less than the whole list takes.
        .args(["--no-color", "--flake-attempts=1", "--timeout=12h"])
        .arg(format!("--focus={}", options.focus))
        .args(skip_words(&options.skip))
        .arg(format!("--output-dir={}", reports.display()))
        .arg(format!("--json-report={JSON_REPORT}"))
        .arg(programs.join("e2e.test"))
        .arg("--")
        .arg(format!("--kubeconfig={}", kubeconfig.display()))
        .arg(format!(
            "--kubectl-path={}",
            lab.programs.join("kubectl").display()
        ))
        .arg(format!("--report-dir={}", reports.display()))
        .args(["--provider=skeleton", "--dump-logs-on-failure=false"])
        .args(["--prepull-images=false", "--node-os-distro=debian"])
        // The lab's system namespace is empty.
        .args(["--minStartupPods=0", "--allowed-not-ready-nodes=0"])
        .env("KUBECONFIG", kubeconfig);
    runner
}

/// An empty expression would match every spec.
fn skip_words(skip: &str) -> Option<String> {
    (!skip.is_empty()).then(|| format!("--skip={skip}"))
}

/// Runs ginkgo to its end; says how far it is and names failures as they come.
fn watch(
    runner: &mut Command,
    options: &ConformanceOptions,
    reports: &Path,
) -> Result<std::process::ExitStatus> {
    let mut step = Step::begin(format!(
        "upstream suite on lab {}, {} at once",
        options.lab, options.procs
    ));
    let path = reports.join(OUTPUT);
    let mut log = File::create(&path).with_context(|| format!("create {}", path.display()))?;
    let errors = log.try_clone().context("share the log of the suite")?;
    let mut child = runner
        .current_dir(reports)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(errors)
        .spawn()
        .context("run ginkgo")?;
    let mut output = child
        .stdout
        .take()
        .context("standard output was not piped")?;
    let mut progress = Progress::default();
    let mut buffer = [0; 8192];
    loop {
        let count = output.read(&mut buffer).context("read ginkgo's output")?;
        if count == 0 {
            break;
        }
        log.write_all(&buffer[..count])
            .with_context(|| format!("write {}", path.display()))?;
        let known = progress.failed.len();
        progress.feed(&buffer[..count]);
        for name in &progress.failed[known..] {
            step.say(&format!("✗ {name}"));
        }
        step.detail(&progress.summary());
    }
    let status = child.wait().context("wait for ginkgo")?;
    step.done(&progress.summary());
    Ok(status)
}
