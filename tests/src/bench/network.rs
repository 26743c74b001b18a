//! `cargo xtask bench network`: what pods of two nodes get of the network between these nodes.
//!
//! Each subject has two nodes of its own, network namespaces joined by a lab's bridge, with one pod
//! each, made by the real plugins and kept by the real agents against the lab's apiserver. "Native"
//! is such a pair without pods: from node to node. Subjects take turns within each load of each
//! round, in another order each time, and a ratio is the median over rounds of what a subject had
//! beside what native had in the same round: noise that lasts longer than a turn cancels out.

mod load;
mod subject;

use crate::cluster::{self, Lab, NodeKind, UpOptions};
use crate::packages;
use crate::progress::Step;
use anyhow::{Context, Result};
use load::{Load, Sample};
use serde_json::{Value, json};
use subject::{Kind, Subject};

/// What to measure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkOptions {
    /// Measure flannel's back ends too.
    pub against_flannel: bool,
    /// Turns of each subject under each load.
    pub rounds: usize,
    /// Length of a turn of iperf3.
    pub seconds: u32,
    /// Streams of the loads with many.
    pub streams: u32,
    /// Requests of a turn, one after the other.
    pub requests: usize,
    /// Missing Debian packages may be installed.
    pub may_install: bool,
}

/// Medians over the rounds.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Figure {
    sample: Sample,
    /// Beside native: 1 is as good, more is better.
    ratio: f64,
}

/// One network's figures.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    subject: &'static str,
    mtu_bytes: u32,
    figures: Vec<(Load, Figure)>,
}

const LAB: &str = "bench-network";

/// Against which nobody else's work counts for much.
const PRECEDENCE: i32 = -15;

/// Measures and returns the rows.
///
/// # Errors
/// When something cannot be built, brought up or measured.
pub fn measure(options: &NetworkOptions) -> Result<Vec<Row>> {
    packages::ensure(packages::NODES, options.may_install)?;
    packages::ensure(packages::THROUGHPUT, options.may_install)?;
    let lab = cluster::up(&UpOptions {
        lab: LAB.to_owned(),
        nodes: Some(0),
        kind: NodeKind::Ferrule,
        may_install: options.may_install,
        agents: false,
        addons: cluster::Addons::NONE,
        family: None,
        network: None,
        sample: false,
        profile: crate::artefacts::ours::TEST_PROFILE.to_owned(),
    })?;
    let measured = measure_in(&lab, options);
    // `down` takes the lock that this value holds.
    drop(lab);
    cluster::down(LAB)?;
    measured
}

fn measure_in(lab: &Lab, options: &NetworkOptions) -> Result<Vec<Row>> {
    // Whatever else the machine does shall wait for a turn to end. Inherited by what is started here;
    // without the right to it the figures are only noisier.
    let _ = rustix::process::nice(PRECEDENCE);
    let dir = tempfile::Builder::new()
        .prefix("ferrule-bench-")
        .tempdir_in("/dev/shm")
        .context("make a directory on tmpfs")?;
    let mut subjects = Vec::new();
    for kind in Kind::ALL {
        if kind.is_flannel() && !options.against_flannel {
            continue;
        }
        let step = Step::begin(format!("two nodes: {}", kind.title()));
        let subject = Subject::new(lab, dir.path(), kind, subjects.len())?;
        step.done(&format!("MTU {}", subject.mtu_bytes));
        subjects.push(subject);
    }
    let mut samples: Vec<(Load, Vec<Vec<Sample>>)> = Load::all(options)
        .into_iter()
        .map(|load| (load, vec![Vec::new(); subjects.len()]))
        .collect();
    for round in 0..options.rounds {
        let step = Step::begin(format!("round {} of {}", round + 1, options.rounds));
        for (load, of) in &mut samples {
            for turn in 0..subjects.len() {
                let at = (turn + round) % subjects.len();
                let (subject, of) = (&subjects[at], &mut of[at]);
                let sample = load.run(subject);
                of.push(sample.with_context(|| format!("{}: {load:?}", subject.kind.title()))?);
            }
        }
        step.done("");
    }
    Ok(rows(&subjects, &samples))
}

fn rows(subjects: &[Subject], samples: &[(Load, Vec<Vec<Sample>>)]) -> Vec<Row> {
    let row = |(at, subject): (usize, &Subject)| Row {
        subject: subject.kind.title(),
        mtu_bytes: subject.mtu_bytes,
        figures: samples
            .iter()
            .map(|(load, of)| (*load, figure(*load, &of[at], &of[0])))
            .collect(),
    };
    subjects.iter().enumerate().map(row).collect()
}

/// Medians, and the median of the ratios to native's sample of the same round.
fn figure(load: Load, own: &[Sample], native: &[Sample]) -> Figure {
    let ratios = own.iter().zip(native).map(|(own, native)| match load {
        Load::Requests { .. } => native.value / own.value,
        Load::Tcp { .. } | Load::Udp { .. } => own.value / native.value,
    });
    Figure {
        sample: Sample {
            value: median(own.iter().map(|sample| sample.value)),
            worst: median(own.iter().map(|sample| sample.worst)),
            cost: median(own.iter().map(|sample| sample.cost)),
        },
        ratio: median(ratios),
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.as_slice() {
        [] => 0.0,
        values if values.len() % 2 == 1 => values[middle],
        values => f64::midpoint(values[middle - 1], values[middle]),
    }
}

/// A table for people.
#[must_use]
pub fn render(rows: &[Row]) -> String {
    let mut out = format!("{:20} {:>5}", "", "MTU");
    for (load, _) in rows.first().map_or(&[][..], |row| &row.figures) {
        out.push_str(&match load {
            Load::Requests { .. } => format!(" {:>9} {:>8} {:>7}", "rtt p50", "p99 µs", "ratio"),
            Load::Tcp { .. } | Load::Udp { .. } => format!(" {:>12} {:>6}", load.title(), "ratio"),
        });
    }
    out.push('\n');
    for row in rows {
        out.push_str(&format!("{:20} {:>5}", row.subject, row.mtu_bytes));
        for (load, figure) in &row.figures {
            let Sample { value, worst, .. } = figure.sample;
            let ratio = figure.ratio * 100.0;
            out.push_str(&match load {
                Load::Requests { .. } => format!(" {value:>9.1} {worst:>8.1} {ratio:>5.0} %"),
                Load::Tcp { .. } | Load::Udp { .. } => format!(" {value:>12.2} {ratio:>4.0} %"),
            });
        }
        out.push('\n');
    }
    out.push_str("Gbit/s that arrived; datagrams of one size for all; ratio: beside native\n\n");
    out.push_str(&costs(rows));
    out
}

/// The second half of the table.
fn costs(rows: &[Row]) -> String {
    let mut out = String::new();
    for row in rows {
        out.push_str(&format!("{:20} {:>5}", row.subject, ""));
        let of = |(load, figure): &(Load, Figure)| match load {
            Load::Requests { .. } => None,
            Load::Tcp { .. } | Load::Udp { .. } => Some(figure.sample.cost),
        };
        for cost in row.figures.iter().filter_map(of) {
            out.push_str(&format!(" {cost:>12.0} {:>6}", ""));
        }
        out.push('\n');
    }
    out.push_str("processor time of both ends and of what lies between, ms per Gbit\n");
    out
}

/// The same for programs.
#[must_use]
pub fn to_json(rows: &[Row]) -> Value {
    let row = |row: &Row| {
        let figures = row.figures.iter().map(|(load, figure)| {
            let Figure { sample, ratio } = figure;
            match load {
                Load::Requests { .. } => json!({
                    "load": load.title(),
                    "p50_us": sample.value,
                    "p99_us": sample.worst,
                    "ratio_to_native": ratio,
                }),
                Load::Udp { .. } => json!({
                    "load": load.title(),
                    "gbit_per_second": sample.value,
                    "lost_percent": sample.worst,
                    "processor_ms_per_gbit": sample.cost,
                    "ratio_to_native": ratio,
                }),
                Load::Tcp { .. } => json!({
                    "load": load.title(),
                    "gbit_per_second": sample.value,
                    "processor_ms_per_gbit": sample.cost,
                    "ratio_to_native": ratio,
                }),
            }
        });
        json!({
            "subject": row.subject,
            "mtu_bytes": row.mtu_bytes,
            "figures": figures.collect::<Vec<_>>(),
        })
    };
    rows.iter().map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(values: &[f64]) -> Vec<Sample> {
        let sample = |value: &f64| Sample {
            value: *value,
            worst: 0.0,
            cost: 0.0,
        };
        values.iter().map(sample).collect()
    }

    #[test]
    fn a_ratio_is_of_the_same_round_and_a_round_of_noise_does_not_count() {
        let own = samples(&[9.0, 4.5, 0.1]);
        let native = samples(&[10.0, 5.0, 10.0]);
        let tcp = Load::Tcp {
            streams: 1,
            seconds: 1,
        };
        let throughput = figure(tcp, &own, &native);
        assert!((throughput.ratio - 0.9).abs() < 1e-9);
        // Of times, less is better.
        let latency = figure(Load::Requests { count: 1 }, &native, &own);
        assert!((latency.ratio - 0.9).abs() < 1e-9);
    }

    #[test]
    fn the_median_of_an_even_number_lies_between() {
        assert!((median([4.0, 1.0, 3.0, 2.0].into_iter()) - 2.5).abs() < 1e-9);
        assert!(median(std::iter::empty()).abs() < 1e-9);
    }
}
