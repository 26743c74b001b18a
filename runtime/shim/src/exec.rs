//! Exec sessions: one more process in a running container.
//!
//! A session lives in a cgroup of its own below the container's (in the freezer's hierarchy on
//! v1), because killing it must reach what it started, double forks included, and nothing else.

use crate::cgroup;
use crate::child::{self, ChildStdio};
use crate::container::{ExecSession, ReplyTo, Starting};
use crate::launch::clone_child;
use crate::note::{self, Note, Received};
use crate::server::{Shim, Source, not_found};
use linux::event::Interest;
use linux::process::clone::{self, CloneFlags};
use linux::process::namespace::Namespaces;
use linux::process::pidfd::{self, WaitOutcome};
use pod_shim::protocol::{Event, ExecSpec, PidNamespace, Reply, ShimError, ShimErrorKind, Stdio};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

impl Shim {
    pub(crate) fn exec(
        &mut self,
        spec: ExecSpec,
        fds: Vec<OwnedFd>,
        to: ReplyTo,
    ) -> Option<Result<Reply, ShimError>> {
        self.start_exec(spec, fds, to).err().map(Err)
    }

    fn start_exec(
        &mut self,
        spec: ExecSpec,
        fds: Vec<OwnedFd>,
        to: ReplyTo,
    ) -> Result<(), ShimError> {
        if self.execs.contains_key(&spec.exec_id) {
            return Err(ShimError {
                kind: ShimErrorKind::BadRequest,
                message: format!("exec session {:?} exists", spec.exec_id),
                errno: None,
            });
        }
        let container = self
            .containers
            .get(&spec.container_id)
            .filter(|c| c.is_running())
            .ok_or_else(|| not_found("running container", &spec.container_id))?;
        let mut stdio =
            Some(session_stdio(&spec, fds).map_err(|e| child::system("open /dev/null", &e))?);
        let dirs = if spec.cgroups.is_empty() {
            &container.cgroups
        } else {
            &spec.cgroups
        };
        let (cgroup, dirs) = session_cgroups(dirs, self.next_exec_number);
        let target = container.pidfd.as_fd();
        let join = (container.pid_namespace != PidNamespace::Host).then_some(target);
        let which = Namespaces {
            user: container.user_namespace,
            mount: true,
            cgroup: container.cgroup_namespace,
            ..Namespaces::default()
        };
        let cloned = clone_child(CloneFlags::default(), join, |notes| match stdio.take() {
            Some(stdio) => child::run_exec(&spec, (target, which), &dirs, stdio, notes),
            None => clone::exit_child(1),
        });
        drop(stdio);
        self.next_exec_number += 1;
        let new = cloned.inspect_err(|_| {
            if let Some(dir) = &cgroup {
                cgroup::remove_session(dir);
            }
        })?;
        let source = Source::ExecNotes(spec.exec_id.clone());
        let token = self
            .watch(new.notes.as_fd(), source, Interest::READ)
            .unwrap_or_default();
        let starting = Starting {
            notes: new.notes,
            token,
            ready: false,
            failure: None,
            waiting: vec![to],
        };
        let session = ExecSession {
            container_id: spec.container_id,
            client: to.client,
            pid: new.pid,
            pidfd: new.pidfd,
            starting: Some(starting),
            terminal: None,
            cgroup,
        };
        self.execs.insert(spec.exec_id, session);
        Ok(())
    }

    /// Read what a session's child says; its end means it executed or died.
    pub(crate) fn exec_notes(&mut self, id: &str) {
        loop {
            let Some(session) = self.execs.get_mut(id) else {
                return;
            };
            let Some(starting) = &mut session.starting else {
                return;
            };
            match note::receive(starting.notes.as_fd()) {
                Received::Nothing => return,
                Received::Note(Note::Warning(text), _) => {
                    eprintln!("exec in {}: {text}", session.container_id);
                }
                Received::Note(Note::Ready, _) => starting.ready = true,
                Received::Note(Note::Failed(error), _) => starting.failure = Some(error),
                // Only first processes of containers are replaced.
                Received::Note(Note::Replaced { .. }, _) => {}
                Received::Note(Note::Terminal, fd) => session.terminal = fd,
                Received::End => {
                    let started = starting.ready && starting.failure.is_none();
                    let (token, waiting) = (starting.token, std::mem::take(&mut starting.waiting));
                    let _ = self.poller.remove(starting.notes.as_fd());
                    if started {
                        let (pid, terminal) = (session.pid, session.terminal.as_ref());
                        let fds: Vec<OwnedFd> = terminal
                            .and_then(|fd| fd.try_clone().ok())
                            .into_iter()
                            .collect();
                        session.starting = None;
                        self.forget_token(token);
                        self.answer(waiting, Ok(Reply::ExecStarted { pid }), fds);
                    } else {
                        starting.waiting = waiting;
                        self.forget_token(token);
                    }
                    return;
                }
            }
        }
    }

    fn answer(
        &mut self,
        waiting: Vec<ReplyTo>,
        result: Result<Reply, ShimError>,
        fds: Vec<OwnedFd>,
    ) {
        let mut fds = Some(fds);
        for to in waiting {
            self.reply(to, result.clone(), fds.take().unwrap_or_default());
        }
    }

    pub(crate) fn exec_ended(&mut self, id: &str, outcome: WaitOutcome) {
        self.exec_notes(id);
        let Some(session) = self.execs.remove(id) else {
            return;
        };
        if let Some(dir) = &session.cgroup {
            cgroup::remove_session(dir);
        }
        match session.starting {
            Some(starting) => {
                let error = starting.failure.unwrap_or_else(|| ShimError {
                    kind: ShimErrorKind::System,
                    message: format!(
                        "the process ended before it executed its program ({outcome:?})"
                    ),
                    errno: None,
                });
                self.answer(starting.waiting, Err(error), Vec::new());
            }
            None => self.publish(Event::ExecExited {
                exec_id: id.to_owned(),
                exit_code: outcome.code(),
            }),
        }
    }

    pub(crate) fn exec_kill(&mut self, id: &str) -> Result<Reply, ShimError> {
        let session = self
            .execs
            .get(id)
            .ok_or_else(|| not_found("exec session", id))?;
        if let Some(dir) = &session.cgroup {
            cgroup::kill_all(dir);
        }
        match pidfd::send_signal_fd(session.pidfd.as_fd(), 9) {
            Err(error) if error.raw_os_error() != Some(3 /* ESRCH */) => Err(child::system(
                format_args!("kill exec session {id:?}"),
                &error,
            )),
            Ok(()) | Err(_) => Ok(Reply::Done),
        }
    }

    /// A client went away: its sessions end, as their results and streams have no taker. Without
    /// this, a probe under way when the agent dies would run for ever.
    pub(crate) fn kill_sessions_of(&mut self, client: u64) {
        let theirs: Vec<String> = self
            .execs
            .iter()
            .filter(|(_, session)| session.client == client)
            .map(|(id, _)| id.clone())
            .collect();
        for id in theirs {
            if let Err(error) = self.exec_kill(&id) {
                eprintln!("{}", error.message);
            }
        }
    }

    pub(crate) fn resize(
        &mut self,
        target: &str,
        width: u16,
        height: u16,
    ) -> Result<Reply, ShimError> {
        let of_exec = self
            .execs
            .get(target)
            .and_then(|s| s.terminal.as_ref())
            .map(AsFd::as_fd);
        let of_container = || {
            self.containers
                .get(target)
                .filter(|c| c.tty)
                .and_then(|c| c.output.terminal())
        };
        let terminal = of_exec
            .or_else(of_container)
            .ok_or_else(|| not_found("terminal of", target))?;
        linux::tty::resize(terminal, width, height)
            .map(|()| Reply::Done)
            .map_err(|e| child::system(format_args!("resize the terminal of {target:?}"), &e))
    }
}

/// The three streams in order; what nobody connected is /dev/null.
fn session_stdio(spec: &ExecSpec, fds: Vec<OwnedFd>) -> io::Result<ChildStdio> {
    let mut fds = fds.into_iter();
    let stdio = if spec.tty {
        Stdio::default()
    } else {
        spec.stdio
    };
    let mut take = |connected: bool| match if connected { fds.next() } else { None } {
        Some(fd) => Ok(fd),
        None => child::dev_null(),
    };
    let (stdin, stdout, stderr) = (take(stdio.stdin)?, take(stdio.stdout)?, take(stdio.stderr)?);
    Ok(ChildStdio {
        streams: [stdin, stdout, stderr],
    })
}

/// Make a cgroup for a session below the container's tracking cgroup, and say which cgroups the
/// session joins. Without one (it cannot be made) the session joins the container's and only its
/// first process can be killed for certain.
fn session_cgroups(dirs: &[PathBuf], number: u64) -> (Option<PathBuf>, Vec<PathBuf>) {
    let Some(tracking) = cgroup::tracking_dir(dirs) else {
        return (None, dirs.to_vec());
    };
    let own = tracking.join(format!("exec-{number}"));
    match std::fs::create_dir(&own) {
        Ok(()) => {
            let joined = dirs.iter().map(|dir| {
                if dir == tracking {
                    own.clone()
                } else {
                    dir.clone()
                }
            });
            (Some(own.clone()), joined.collect())
        }
        Err(error) => {
            eprintln!("cannot make {}: {error}", own.display());
            (None, dirs.to_vec())
        }
    }
}
