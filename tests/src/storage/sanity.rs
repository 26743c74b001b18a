//! csi-sanity, unmodified, against our driver: mounted volumes and block devices.

use super::{PoolFilesystem, RunningDriver, ScratchPool};
use crate::conformance::Report;
use crate::progress::Step;
use crate::{artefacts, command, packages};
use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Name of the suite on the command line.
pub const CSI_SANITY: &str = "csi-sanity";

/// What to run.
#[derive(Debug, Clone)]
pub struct SanityOptions {
    /// Missing Debian packages may be installed.
    pub may_install: bool,
    /// Where the reports go.
    pub reports: PathBuf,
}

/// One run: how volumes are used, and what the pool and they are made of.
struct Round {
    name: &'static str,
    access: &'static str,
    fstype: &'static str,
    pool: PoolFilesystem,
}

/// Growing a mounted ext4 takes a capability that not every machine gives, so the mounted volumes
/// are xfs; on the second pool nothing can share blocks, and every copy is one.
const ROUNDS: [Round; 3] = [
    Round {
        name: "mount",
        access: "mount",
        fstype: "xfs",
        pool: PoolFilesystem::Xfs,
    },
    Round {
        name: "block",
        access: "block",
        fstype: "xfs",
        pool: PoolFilesystem::Xfs,
    },
    Round {
        name: "mount-on-ext4",
        access: "mount",
        fstype: "xfs",
        pool: PoolFilesystem::Ext4,
    },
];

/// Specs that fail whatever a driver does, and why.
pub const FAULTY: [(&str, &str); 1] = [(
    "should succeed when creating a snapshot with accessibility requirements",
    "it compares messages with their decoder's bookkeeping, so that a snapshot which says where it \
     is (accessible_topology) never equals the node's own answer",
)];

/// Why a spec fails whatever a driver does; none for all others.
#[must_use]
pub fn faulty(spec: &str) -> Option<&'static str> {
    let found = FAULTY.iter().find(|(name, _)| spec.contains(name));
    found.map(|(_, why)| *why)
}

/// Whether all that was chosen ran, and only faulty specs failed.
#[must_use]
pub fn is_green(report: &Report) -> bool {
    let faults = report.failures().all(|spec| faulty(&spec.name).is_some());
    faults && report.suite_failures.is_empty() && report.total().passed > 0
}

/// Runs every round; what failed is in the reports and no error.
///
/// # Errors
/// When something cannot be built or started, or anything of a volume is left afterwards.
pub fn sanity(options: &SanityOptions) -> Result<BTreeMap<&'static str, Report>> {
    packages::ensure(packages::STORAGE, options.may_install)?;
    let sanity = artefacts::go::csi_sanity()?.join("csi-sanity");
    let driver = artefacts::ours::csi_driver(artefacts::ours::TEST_PROFILE)?;
    let mut reports = BTreeMap::new();
    for round in &ROUNDS {
        let dir = options.reports.join(CSI_SANITY).join(round.name);
        let report = run(&sanity, &driver, round, &dir)?;
        reports.insert(round.name, report);
    }
    Ok(reports)
}

fn run(sanity: &Path, program: &Path, round: &Round, dir: &Path) -> Result<Report> {
    let step = Step::begin(format!("csi-sanity ({})", round.name));
    fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    let file = dir.join("report.json");
    let log = dir.join("driver.log");
    for old in [&file, &log] {
        let _ = fs::remove_file(old);
    }
    let scratch = ScratchPool::new(round.pool)?;
    let parameters = scratch.path("mutable.yaml");
    fs::write(&parameters, "readAheadKiB: \"256\"\n").context("write the parameters")?;
    let socket = scratch.path("csi.sock");
    let args = ["--default-fstype", round.fstype];
    let driver = RunningDriver::start(program, &scratch.pool(), &socket, &log, &args, &[])?;
    let mut suite = command::command(sanity, &["--ginkgo.no-color"]);
    suite
        .arg(format!("--csi.endpoint=unix://{}", socket.display()))
        .arg(format!(
            "--csi.mountdir={}",
            scratch.path("target").display()
        ))
        .arg(format!(
            "--csi.stagingdir={}",
            scratch.path("staging").display()
        ))
        .arg(format!("--csi.testvolumeaccesstype={}", round.access))
        .arg(format!(
            "--csi.testvolumemutableparameters={}",
            parameters.display()
        ))
        .arg(format!("--csi.testvolumeexpandsize={}", 11_u64 << 30))
        .arg(format!("--ginkgo.json-report={}", file.display()));
    let output = command::capture(&mut suite)?;
    fs::write(
        dir.join("output.log"),
        [output.stdout, output.stderr].concat(),
    )
    .context("write the output")?;
    if !file.exists() {
        bail!("csi-sanity ended without a report; see {}", dir.display());
    }
    let report = Report::read(&file)?;
    report.write_failures(&dir.join("failures"))?;
    let total = report.total();
    step.done(&format!("{} passed, {} failed", total.passed, total.failed));
    drop(driver);
    if is_green(&report) {
        nothing_left(program, &scratch)?;
    }
    Ok(report)
}

/// Whatever was made was also removed: no mount, no device, no file, no record.
fn nothing_left(program: &Path, scratch: &ScratchPool) -> Result<()> {
    let (mounts, devices) = (scratch.mounts()?, scratch.devices()?);
    if !mounts.is_empty() || !devices.is_empty() {
        bail!("csi-sanity left mounts {mounts:?} and devices {devices:?}");
    }
    let pool = scratch.pool().display().to_string();
    let listed = command::stdout(&mut command::command(program, &["ls", "--pool", &pool]))?;
    if listed.lines().count() != 1 {
        bail!("csi-sanity left volumes:\n{listed}");
    }
    command::stdout(&mut command::command(program, &["fsck", "--pool", &pool]))?;
    Ok(())
}
