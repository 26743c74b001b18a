//! Loads between the two ends of a subject.

use super::NetworkOptions;
use super::subject::Subject;
use crate::command::{command, stdout};
use anyhow::{Context, Result};
use linux::netlink::in_netns;
use rustix::thread::{CpuSet, sched_setaffinity};
use serde_json::Value;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

/// Payload of a datagram, in bytes: the same for all subjects, so that a network of smaller packets
/// does not have an easier or harder task. It fits into what VXLAN leaves of 1500.
const DATAGRAM_BYTES: u32 = 1400;

/// A request, and its answer.
const REQUEST_BYTES: usize = 64;

/// Longest wait for one answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// What is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Load {
    Tcp {
        streams: u32,
        seconds: u32,
    },
    /// As much as goes; what counts is what arrives.
    Udp {
        streams: u32,
        seconds: u32,
    },
    /// One small request after the other, on one connection.
    Requests {
        count: usize,
    },
}

/// What one turn gave.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Sample {
    /// Gbit/s that arrived; for requests half of them took at most so many µs.
    pub(super) value: f64,
    /// 99 of 100 requests took at most so many µs; of datagrams, percent lost.
    pub(super) worst: f64,
    /// Processor time of both ends, in ms per Gbit that arrived: what the kernel did for them on the
    /// way is in it, so that it differs less with what else the machine does. 0 for requests.
    pub(super) cost: f64,
}

impl Load {
    pub(super) fn all(options: &NetworkOptions) -> Vec<Self> {
        let (streams, seconds) = (options.streams, options.seconds);
        vec![
            Self::Tcp {
                streams: 1,
                seconds,
            },
            Self::Tcp { streams, seconds },
            Self::Udp {
                streams: 1,
                seconds,
            },
            Self::Udp { streams, seconds },
            Self::Requests {
                count: options.requests,
            },
        ]
    }

    pub(super) fn title(self) -> String {
        match self {
            Self::Tcp { streams, .. } => format!("TCP x{streams}"),
            Self::Udp { streams, .. } => format!("UDP x{streams}"),
            Self::Requests { .. } => "requests".to_owned(),
        }
    }

    pub(super) fn run(self, subject: &Subject) -> Result<Sample> {
        match self {
            Self::Tcp { streams, seconds } => iperf(subject, streams, seconds, &[]),
            Self::Udp { streams, seconds } => {
                let bytes = DATAGRAM_BYTES.to_string();
                iperf(subject, streams, seconds, &["-u", "-b", "0", "-l", &bytes])
            }
            Self::Requests { count } => requests(subject, count),
        }
    }
}

fn iperf(subject: &Subject, streams: u32, seconds: u32, more: &[&str]) -> Result<Sample> {
    let (streams, seconds) = (streams.to_string(), seconds.to_string());
    let mut iperf = command("ip", &["netns", "exec", &subject.client, "iperf3", "-J"]);
    iperf.args(["-c", &subject.address, "-P", &streams, "-t", &seconds]);
    // Left to the scheduler, both ends are on one processor in one turn and on two in the next.
    if processors() > 1 {
        iperf.args(["-A", "0,1"]);
    }
    let printed = stdout(iperf.args(more))?;
    let printed: Value = serde_json::from_str(&printed).context("iperf3 printed no JSON")?;
    let end = &printed["end"];
    let arrived = end["sum_received"]["bits_per_second"].as_f64();
    let arrived = arrived.with_context(|| format!("nothing is said of what arrived: {end}"))?;
    let busy = |side: &str| end["cpu_utilization_percent"][side].as_f64().unwrap_or(0.0);
    let busy = busy("host_total") + busy("remote_total");
    Ok(Sample {
        value: arrived / 1e9,
        // Percent are hundredths of a second per second.
        cost: busy * 10.0 / (arrived / 1e9),
        worst: end["sum"]["lost_percent"].as_f64().unwrap_or(0.0),
    })
}

fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn stay_on(processor: usize) {
    let mut set = CpuSet::new();
    set.set(processor);
    // Where there is one processor only, nobody has a choice.
    let _ = sched_setaffinity(None, &set);
}

fn requests(subject: &Subject, count: usize) -> Result<Sample> {
    let server = std::fs::File::open(format!("/run/netns/{}", subject.server))?;
    let client = std::fs::File::open(format!("/run/netns/{}", subject.client))?;
    let listener = in_netns(server.as_fd(), || TcpListener::bind("0.0.0.0:0"))?
        .context("listen for requests")?;
    let to = (subject.address.clone(), listener.local_addr()?.port());
    // Accepted by the kernel before anybody waits for it.
    let stream = in_netns(client.as_fd(), || TcpStream::connect(to))?.context("connect")?;
    let (answering, _) = listener.accept().context("accept")?;
    let mut times = std::thread::scope(|scope| {
        scope.spawn(|| answer(answering));
        let asking = scope.spawn(|| ask(stream, count));
        match asking.join() {
            Ok(times) => times,
            Err(_) => anyhow::bail!("the asking thread panicked"),
        }
    })?;
    let (p50, p99) = super::super::cni::percentiles(&mut times);
    Ok(Sample {
        value: p50 * 1e3,
        worst: p99 * 1e3,
        cost: 0.0,
    })
}

/// Until the other side closes.
fn answer(mut stream: TcpStream) -> std::io::Result<()> {
    stay_on(1);
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(ANSWER_LIMIT))?;
    let mut buffer = [0; REQUEST_BYTES];
    loop {
        stream.read_exact(&mut buffer)?;
        stream.write_all(&buffer)?;
    }
}

fn ask(mut stream: TcpStream, count: usize) -> Result<Vec<Duration>> {
    stay_on(0);
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(ANSWER_LIMIT))?;
    let mut buffer = [7; REQUEST_BYTES];
    let mut times = Vec::with_capacity(count);
    for _ in 0..count {
        let begin = Instant::now();
        stream.write_all(&buffer).context("ask")?;
        stream
            .read_exact(&mut buffer)
            .context("wait for an answer")?;
        times.push(begin.elapsed());
    }
    Ok(times)
}
