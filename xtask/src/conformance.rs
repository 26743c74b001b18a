//! `cargo xtask conformance`.

use crate::cli::{LabName, Output};
use crate::develop::Against;
use anyhow::Result;
use clap::Args;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use testkit::cluster::NodeKind;
use testkit::conformance::{self, ConformanceOptions, Report};
use testkit::storage;

/// Arguments of the command.
#[derive(Debug, Args)]
#[command(after_help = suites())]
pub(crate) struct Conformance {
    #[command(flatten)]
    lab: LabName,
    /// A named part of the suite, or csi-sanity
    #[arg(long, default_value = "node-conformance", conflicts_with = "focus")]
    suite: String,
    /// Regular expression of the specs to run
    #[arg(long, value_name = "REGEX")]
    focus: Option<String>,
    /// Regular expression of the specs to leave out [default: the suite's; with --focus slow,
    /// serial and disruptive ones]
    #[arg(long, value_name = "REGEX")]
    skip: Option<String>,
    /// Specs that run at once; those marked [Serial] run alone after the others
    #[arg(long, default_value_t = 6)]
    procs: u32,
    /// Run the same on stock nodes (lab NAME-stock) and print both side by side
    #[arg(long, value_enum)]
    against: Option<Against>,
    /// Form of the result; the table is written in any case
    #[arg(short, long, value_enum, default_value = "text")]
    output: Output,
    /// Directory of the reports: JUnit, JSON, what failed specs printed
    #[arg(long, value_name = "DIR", default_value_os_t = conformance::default_reports())]
    reports: PathBuf,
    /// Leave up the lab this run brought up; it is left up when something failed
    #[arg(long)]
    keep: bool,
    /// Print the specs that would run; needs no lab
    #[arg(long)]
    dry_run: bool,
    /// Fail instead of installing Debian packages that are missing
    #[arg(long)]
    no_install: bool,
}

fn suites() -> String {
    let lines = conformance::SUITES
        .iter()
        .map(|suite| format!("  {:22} {}\n", suite.name, suite.about));
    format!(
        "Suites:\n{}  {:22} the test program for CSI drivers on csi-driver, mounted and as block \
         devices; needs no lab\n",
        lines.collect::<String>(),
        storage::CSI_SANITY
    )
}

impl Conformance {
    /// Exit code 1 when a spec of ours failed.
    pub(crate) fn run(self) -> Result<ExitCode> {
        if self.suite == storage::CSI_SANITY {
            return self.run_sanity();
        }
        let suite = conformance::suite(&self.suite)?;
        let (focus, skip) = match &self.focus {
            Some(focus) => (focus.as_str(), conformance::DEFAULT_SKIP),
            None => (suite.focus, suite.skip),
        };
        let skip = self.skip.as_deref().unwrap_or(skip);
        if self.dry_run {
            conformance::list(focus, skip)?;
            return Ok(ExitCode::SUCCESS);
        }
        let mut options = ConformanceOptions {
            lab: self.lab.lab.clone(),
            kind: NodeKind::Ferrule,
            focus: focus.to_owned(),
            skip: skip.to_owned(),
            procs: self.procs,
            may_install: !self.no_install,
            keep: self.keep,
            reports: self.reports.clone(),
        };
        let ours = conformance::run(&options)?;
        let green = ours.is_green();
        let mut reports = BTreeMap::from([("ferrule", ours)]);
        if self.against == Some(Against::Stock) {
            options.lab.push_str("-stock");
            options.kind = NodeKind::Stock;
            reports.insert("stock", conformance::run(&options)?);
        }
        self.print(&reports)?;
        Ok(if green {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        })
    }

    /// The storage driver alone, without a cluster.
    fn run_sanity(self) -> Result<ExitCode> {
        let options = storage::SanityOptions {
            may_install: !self.no_install,
            reports: self.reports.clone(),
        };
        let reports = storage::sanity(&options)?;
        if self.output == Output::Json {
            println!("{}", serde_json::to_string_pretty(&reports)?);
        }
        let mut green = true;
        for (name, report) in &reports {
            let total = report.total();
            green &= storage::is_green(report);
            for spec in report.failures() {
                match storage::faulty(&spec.name) {
                    Some(why) => eprintln!("faulty ({name}): {}: {why}", spec.name),
                    None => eprintln!("failed ({name}): {}", spec.name),
                }
            }
            eprintln!(
                "{name}: {} passed, {} failed, {} skipped of {}",
                total.passed, total.failed, total.skipped, report.chosen
            );
        }
        eprintln!("reports: {}", self.reports.display());
        Ok(if green {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        })
    }

    fn print(&self, reports: &BTreeMap<&str, Report>) -> Result<()> {
        match (self.output, reports.get("ferrule"), reports.get("stock")) {
            (Output::Json, _, _) => println!("{}", serde_json::to_string_pretty(reports)?),
            (Output::Text, Some(ours), Some(stock)) => {
                print!("{}", conformance::comparison(ours, stock));
            }
            (Output::Text, Some(ours), None) => print!("{}", conformance::table(ours)),
            (Output::Text, None, _) => {}
        }
        for report in reports.values() {
            let total = report.total();
            eprintln!(
                "{} passed, {} failed, {} skipped of {}",
                total.passed, total.failed, total.skipped, report.chosen
            );
        }
        eprintln!("reports: {}", self.reports.display());
        Ok(())
    }
}
