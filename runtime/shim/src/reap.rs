//! The end of containers: children reaped, output drained, exit records written; and memory
//! kills, which may come before the end.

use crate::cgroup;
use crate::container::Phase;
use crate::output::{StreamName, Turn};
use crate::server::{Shim, Timer};
use linux::event;
use linux::process::attrs;
use linux::process::pidfd::{self, WaitOutcome};
use pod_shim::protocol::{Event, ExitRecord, PidNamespace, ShimError, ShimErrorKind};
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

/// How long output is waited for after the first process is gone, in case a process that
/// outlived it keeps the pipe.
const DRAIN_MS: u64 = 1000;
/// When to look at the count of memory kills again after v1's early notice, in milliseconds.
const OOM_AGAIN_MS: [u64; 4] = [20, 100, 500, 2000];

impl Shim {
    /// Collect every child that ended.
    pub(crate) fn reap(&mut self) {
        while let Ok(Some((pid, outcome))) = pidfd::reap_any() {
            self.read_all_notes();
            let container = self
                .containers
                .values()
                .find(|c| c.pid == pid && c.is_live())
                .map(|c| c.id.clone());
            if let Some(id) = container {
                self.container_ended(&id, outcome);
                continue;
            }
            let exec = self
                .execs
                .iter()
                .find(|(_, e)| e.pid == pid)
                .map(|(id, _)| id.clone());
            if let Some(id) = exec {
                self.exec_ended(&id, outcome);
                continue;
            }
            let helper = self.sandbox.as_ref().and_then(|s| s.helper.as_ref());
            if helper.is_some_and(|h| h.pid == pid) {
                eprintln!("the pod's first process ended: {outcome:?}");
            }
        }
    }

    /// Learn which processes are containers' by now: one may have put another in its place.
    fn read_all_notes(&mut self) {
        let starting = self.containers.values().filter(|c| c.is_starting());
        let starting: Vec<String> = starting.map(|c| c.id.clone()).collect();
        for id in starting {
            self.container_notes(&id);
        }
    }

    fn container_ended(&mut self, id: &str, outcome: WaitOutcome) {
        // It may have executed and ended before its notes were looked at.
        self.container_notes(id);
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        if let Phase::Starting(starting) = &mut container.phase {
            let error = starting
                .failure
                .take()
                .unwrap_or_else(|| died_in_setup(outcome));
            let waiting = std::mem::take(&mut starting.waiting);
            self.discard(id);
            for to in waiting {
                self.reply(to, Err(error.clone()), Vec::new());
            }
            return;
        }
        if container.pid_namespace != PidNamespace::Container
            && let Some(dir) = cgroup::tracking_dir(&container.cgroups)
        {
            // Its own PID namespace would have ended with it; here the cgroup is the boundary.
            cgroup::kill_all(dir);
        }
        container.phase = Phase::Draining(outcome);
        if let Some(sink) = container.stdin.take() {
            self.forget_token(sink.token);
        }
        for name in [StreamName::Stdout, StreamName::Stderr] {
            self.read_stream(id, name);
        }
        if self
            .containers
            .get(id)
            .is_some_and(|c| !matches!(c.phase, Phase::Exited(_)))
        {
            self.finish_if_drained(id);
            if self
                .containers
                .get(id)
                .is_some_and(|c| matches!(c.phase, Phase::Draining(_)))
            {
                self.after(DRAIN_MS, Timer::Drain(id.to_owned()));
            }
        }
    }

    /// Read a stream; at its end, see whether the container is done.
    pub(crate) fn read_stream(&mut self, id: &str, name: StreamName) {
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        let now = attrs::now_ns();
        if container.output.streams[name.index()].is_none() {
            return;
        }
        if container.output.read(name, &mut self.scratch, now) == Turn::End {
            if let Some(stream) = container.output.close(name, now) {
                self.forget_token(stream.token);
            }
            self.finish_if_drained(id);
        }
        self.tend_attached(id);
    }

    fn finish_if_drained(&mut self, id: &str) {
        let Some(container) = self.containers.get(id) else {
            return;
        };
        if let Phase::Draining(outcome) = container.phase
            && container.output.is_done()
        {
            self.finish_container(id, outcome);
        }
    }

    /// Somebody keeps the pipe: take what is there and go on without him.
    pub(crate) fn stop_draining(&mut self, id: &str) {
        let Some(Phase::Draining(outcome)) = self.containers.get(id).map(|c| &c.phase) else {
            return;
        };
        let outcome = *outcome;
        let now = attrs::now_ns();
        for name in [StreamName::Stdout, StreamName::Stderr] {
            let Some(container) = self.containers.get_mut(id) else {
                return;
            };
            container.output.read(name, &mut self.scratch, now);
            if let Some(stream) = container.output.close(name, now) {
                self.unwatch(stream.fd.as_fd(), stream.token);
            }
        }
        self.finish_container(id, outcome);
    }

    fn finish_container(&mut self, id: &str, outcome: WaitOutcome) {
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        let record = ExitRecord {
            exit_code: outcome.code(),
            signal: match outcome {
                WaitOutcome::Exited(_) => None,
                WaitOutcome::Signaled(signal) => Some(signal),
            },
            oom_killed: container
                .oom
                .as_ref()
                .is_some_and(|(watch, _)| watch.count() > 0),
            finished_at_ns: attrs::now_ns(),
            started_at_ns: container.started_at_ns,
        };
        // On disk before anybody is told: an agent that is away finds it there.
        if let Err(error) = write_record(&container.state_dir, &record) {
            eprintln!("cannot write the exit record of {id}: {error}");
        }
        container.phase = Phase::Exited(record.clone());
        self.release(id);
        self.publish(Event::Exited {
            container_id: id.to_owned(),
            exit: record,
        });
        attrs::trim_heap();
    }

    /// Close everything a container held open.
    fn release(&mut self, id: &str) {
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        let output = std::mem::take(&mut container.output);
        let (stdin, oom) = (container.stdin.take(), container.oom.take());
        let mut tokens: Vec<u64> = output.streams.iter().flatten().map(|s| s.token).collect();
        for attachment in output.attachments {
            tokens.extend(attachment.input.as_ref().map(|(_, token)| *token));
            for mut sink in attachment.outputs.into_iter().flatten() {
                match sink.flush() {
                    Ok(false) => self.linger(sink),
                    Ok(true) | Err(_) => tokens.push(sink.token),
                }
            }
        }
        tokens.extend(stdin.as_ref().map(|sink| sink.token));
        tokens.extend(oom.as_ref().and_then(|(_, token)| *token));
        for token in tokens {
            self.forget_token(token);
        }
    }

    /// Remove a container that never ran.
    fn discard(&mut self, id: &str) {
        self.release(id);
        self.containers.remove(id);
    }

    /// The memory cgroup woke us.
    pub(crate) fn oom_woke(&mut self, id: &str) {
        let Some(container) = self.containers.get(id) else {
            return;
        };
        let Some((watch, _)) = &container.oom else {
            return;
        };
        if let Some(wake) = &watch.wake {
            event::drain(wake.as_fd());
        }
        let again = if watch.early {
            OOM_AGAIN_MS.len() as u32
        } else {
            0
        };
        self.check_oom(id, again);
    }

    /// Tell of memory kills that were not told yet; look again when the kernel woke us early.
    pub(crate) fn check_oom(&mut self, id: &str, left: u32) {
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        let running = container.is_running();
        let Some((watch, _)) = &mut container.oom else {
            return;
        };
        let count = watch.count();
        if count > watch.seen {
            watch.seen = count;
            if running {
                self.publish(Event::Oom {
                    container_id: id.to_owned(),
                });
            }
        } else if left > 0 {
            let wait = OOM_AGAIN_MS[OOM_AGAIN_MS.len() - left as usize];
            self.after(wait, Timer::OomAgain(id.to_owned(), left - 1));
        }
    }
}

fn died_in_setup(outcome: WaitOutcome) -> ShimError {
    let how = match outcome {
        WaitOutcome::Exited(code) => format!("exited with code {code}"),
        WaitOutcome::Signaled(9) => "was killed, perhaps for memory".to_owned(),
        WaitOutcome::Signaled(signal) => format!("was ended by signal {signal}"),
    };
    ShimError {
        kind: ShimErrorKind::System,
        message: format!("the process {how} before it executed its program"),
        errno: None,
    }
}

/// Temp + rename, so that a reader sees all or nothing. No fsync: the record must survive the
/// agent and the shim, and after a power cut there is no container either.
fn write_record(dir: &Path, record: &ExitRecord) -> io::Result<()> {
    let temporary = dir.join("exit.json.tmp");
    std::fs::write(&temporary, serde_json::to_vec(record)?)?;
    std::fs::rename(&temporary, dir.join("exit.json"))
}
