//! Containers on the shim's side: launched, signalled, reaped, recorded.

use crate::cgroup::{self, OomWatch};
use crate::child::{self, ChildStdio};
use crate::container::{Container, Phase, ReplyTo, Starting};
use crate::logfile::LogFile;
use crate::note::{self, Note, Received};
use crate::output::{Output, Sink, StreamName};
use crate::server::{Shim, Source, not_found};
use linux::event::{self, Interest};
use linux::process::attrs;
use linux::process::clone::{self, CloneFlags, Cloned};
use linux::process::namespace::{self, Namespaces};
use linux::process::pidfd;
use pod_shim::protocol::{LaunchSpec, PidNamespace, Reply, ShimError, ShimErrorKind};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Both ends of a container's streams.
pub(crate) struct Pipes {
    pub(crate) child: ChildStdio,
    pub(crate) outputs: [Option<OwnedFd>; 2],
    pub(crate) stdin: Option<OwnedFd>,
}

fn make_pipes(spec: &LaunchSpec) -> io::Result<Pipes> {
    let null = child::dev_null;
    if spec.tty {
        let child = ChildStdio {
            streams: [null()?, null()?, null()?],
        };
        return Ok(Pipes {
            child,
            outputs: [None, None],
            stdin: None,
        });
    }
    let (in_read, in_write) = if spec.stdin {
        let (read, write) = event::pipe()?;
        event::set_nonblocking(write.as_fd())?;
        (read, Some(write))
    } else {
        (null()?, None)
    };
    let (out_read, out_write) = event::pipe()?;
    let (err_read, err_write) = event::pipe()?;
    event::set_nonblocking(out_read.as_fd())?;
    event::set_nonblocking(err_read.as_fd())?;
    Ok(Pipes {
        child: ChildStdio {
            streams: [in_read, out_write, err_write],
        },
        outputs: [Some(out_read), Some(err_read)],
        stdin: in_write,
    })
}

/// What [`clone_child`] gives back to the shim.
pub(crate) struct NewChild {
    pub(crate) pid: i32,
    pub(crate) pidfd: OwnedFd,
    pub(crate) notes: OwnedFd,
}

/// Clone a child, in the PID namespace of `join` when there is one. The child runs `run`, which
/// must not return.
pub(crate) fn clone_child(
    flags: CloneFlags,
    join: Option<BorrowedFd<'_>>,
    run: impl FnOnce(OwnedFd),
) -> Result<NewChild, ShimError> {
    let (ours, theirs) =
        linux::fdpass::message_pair().map_err(|e| child::system("make a socket pair", &e))?;
    event::set_nonblocking(ours.as_fd()).map_err(|e| child::system("prepare a socket", &e))?;
    let own = match join {
        Some(target) => {
            let own = namespace::own_pid_namespace()
                .map_err(|e| child::system("open the shim's PID namespace", &e))?;
            let which = Namespaces {
                pid: true,
                ..Namespaces::default()
            };
            namespace::join(target, which)
                .map_err(|e| child::system("join the PID namespace", &e))?;
            Some(own)
        }
        None => None,
    };
    let cloned = clone::clone3(flags);
    if let Ok(Cloned::Child) = cloned {
        run(theirs);
        clone::exit_child(1);
    }
    if let Some(own) = own {
        namespace::join_pid_file(own.as_fd())
            .map_err(|e| child::system("return to the shim's PID namespace", &e))?;
    }
    match cloned.map_err(|e| child::system("clone a process", &e))? {
        Cloned::Child => unreachable!("the child never returns"),
        Cloned::Parent { pid, pidfd } => Ok(NewChild {
            pid,
            pidfd,
            notes: ours,
        }),
    }
}

impl Shim {
    pub(crate) fn launch(
        &mut self,
        spec: LaunchSpec,
        to: ReplyTo,
    ) -> Option<Result<Reply, ShimError>> {
        if let Some(known) = self.containers.get_mut(&spec.container_id) {
            if let Phase::Starting(starting) = &mut known.phase {
                starting.waiting.push(to);
                return None;
            }
            return Some(Ok(Reply::Started(known.state())));
        }
        self.start_container(spec, to).err().map(Err)
    }

    fn start_container(&mut self, spec: LaunchSpec, to: ReplyTo) -> Result<(), ShimError> {
        let Some(sandbox) = &self.sandbox else {
            return Err(ShimError {
                kind: ShimErrorKind::BadRequest,
                message: "the sandbox is not set up".into(),
                errno: None,
            });
        };
        let join = match &spec.pid_namespace {
            PidNamespace::Container | PidNamespace::Host => None,
            PidNamespace::Pod => {
                let helper = sandbox.helper.as_ref();
                Some(
                    helper
                        .ok_or_else(|| not_found("shared PID namespace in", "the sandbox"))?
                        .pidfd
                        .as_fd(),
                )
            }
            PidNamespace::Target(id) => {
                let target = self.containers.get(id).filter(|c| c.is_running());
                Some(
                    target
                        .ok_or_else(|| not_found("running container", id))?
                        .pidfd
                        .as_fd(),
                )
            }
        };
        let log = match &spec.log {
            Some(log) => Some(
                LogFile::open(log.clone())
                    .map_err(|e| child::bad_request(format_args!("open log {:?}", log.path), &e))?,
            ),
            None => None,
        };
        let Pipes {
            child: stdio,
            outputs,
            stdin,
        } = make_pipes(&spec).map_err(|e| child::system("make pipes", &e))?;
        let userns = sandbox.userns.as_ref();
        let flags = CloneFlags {
            // In a user namespace the child makes it itself, so that it belongs there.
            new_pid: spec.pid_namespace == PidNamespace::Container && userns.is_none(),
            new_mount: true,
            ..CloneFlags::default()
        };
        // The child keeps its ends by value; what is left here is closed behind the clone.
        let mut stdio = Some(stdio);
        let new = clone_child(flags, join, |notes| match stdio.take() {
            Some(stdio) => child::run_container(&spec, userns, stdio, notes),
            None => clone::exit_child(1),
        })?;
        drop(stdio);
        self.adopt_container(spec, new, log, outputs, stdin, to);
        Ok(())
    }

    fn adopt_container(
        &mut self,
        spec: LaunchSpec,
        new: NewChild,
        log: Option<LogFile>,
        outputs: [Option<OwnedFd>; 2],
        stdin: Option<OwnedFd>,
        to: ReplyTo,
    ) {
        let id = spec.container_id;
        let token = self
            .watch(
                new.notes.as_fd(),
                Source::ContainerNotes(id.clone()),
                Interest::READ,
            )
            .unwrap_or_default();
        let starting = Starting {
            notes: new.notes,
            token,
            ready: false,
            failure: None,
            waiting: vec![to],
        };
        let mut output = Output {
            log,
            ..Output::default()
        };
        for (name, fd) in [StreamName::Stdout, StreamName::Stderr]
            .into_iter()
            .zip(outputs)
        {
            let Some(fd) = fd else { continue };
            let source = Source::Stream(id.clone(), name);
            if let Some(token) = self.watch(fd.as_fd(), source, Interest::READ) {
                output.add(name, fd, token);
            }
        }
        let stdin = stdin.map(|fd| self.stdin_sink(&id, fd));
        let oom = OomWatch::new(&spec.cgroups).map(|watch| {
            let token = watch
                .wake
                .as_ref()
                .and_then(|fd| self.watch(fd.as_fd(), Source::Oom(id.clone()), Interest::READ));
            (watch, token)
        });
        let container = Container {
            id: id.clone(),
            pid: new.pid,
            pidfd: new.pidfd,
            state_dir: spec.state_dir,
            pid_namespace: spec.pid_namespace,
            cgroups: spec.cgroups,
            cgroup_namespace: spec.cgroup_namespace,
            user_namespace: self.sandbox.as_ref().is_some_and(|s| s.userns.is_some()),
            started_at_ns: attrs::now_ns(),
            tty: spec.tty,
            want_stdin: spec.stdin,
            stdin_once: spec.stdin_once,
            stdin_closing: false,
            phase: Phase::Starting(starting),
            output,
            stdin,
            oom,
        };
        self.containers.insert(id, container);
    }

    fn stdin_sink(&mut self, id: &str, fd: OwnedFd) -> Sink {
        let source = Source::Stdin(id.to_owned());
        let token = self
            .watch(fd.as_fd(), source, Interest::NONE)
            .unwrap_or_default();
        Sink::new(fd, token)
    }

    /// Read what a container's child says; its end means it executed or died.
    pub(crate) fn container_notes(&mut self, id: &str) {
        loop {
            let Some(container) = self.containers.get_mut(id) else {
                return;
            };
            let Phase::Starting(starting) = &mut container.phase else {
                return;
            };
            match note::receive(starting.notes.as_fd()) {
                Received::Nothing => return,
                Received::Note(Note::Warning(text), _) => eprintln!("container {id}: {text}"),
                Received::Note(Note::Ready, _) => starting.ready = true,
                Received::Note(Note::Failed(error), _) => starting.failure = Some(error),
                Received::Note(Note::Replaced { pid }, fd) => {
                    container.pid = pid;
                    if let Some(fd) = fd {
                        container.pidfd = fd;
                    }
                }
                Received::Note(Note::Terminal, fd) => {
                    if let Some(fd) = fd {
                        self.adopt_terminal(id, fd);
                    }
                }
                Received::End => {
                    let token = starting.token;
                    if starting.ready && starting.failure.is_none() {
                        self.container_started(id);
                    } else {
                        // The answer waits until the child is reaped: then nothing is left.
                        self.forget_token(token);
                        self.unwatch_notes(id);
                    }
                    return;
                }
            }
        }
    }

    fn unwatch_notes(&mut self, id: &str) {
        if let Some(Phase::Starting(starting)) = self.containers.get(id).map(|c| &c.phase) {
            let _ = self.poller.remove(starting.notes.as_fd());
        }
    }

    fn adopt_terminal(&mut self, id: &str, fd: OwnedFd) {
        let _ = event::set_nonblocking(fd.as_fd());
        let input = fd.try_clone().ok();
        let source = Source::Stream(id.to_owned(), StreamName::Stdout);
        let token = self.watch(fd.as_fd(), source, Interest::READ);
        let want_stdin = self.containers.get(id).is_some_and(|c| c.want_stdin);
        let stdin = input
            .filter(|_| want_stdin)
            .map(|fd| self.stdin_sink(id, fd));
        if let (Some(container), Some(token)) = (self.containers.get_mut(id), token) {
            container.output.add(StreamName::Stdout, fd, token);
            container.stdin = stdin;
        }
    }

    fn container_started(&mut self, id: &str) {
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        container.started_at_ns = attrs::now_ns();
        let phase = std::mem::replace(&mut container.phase, Phase::Running);
        let state = container.state();
        if let Phase::Starting(starting) = phase {
            self.forget_token(starting.token);
            for to in starting.waiting {
                self.reply(to, Ok(Reply::Started(state.clone())), Vec::new());
            }
        }
        attrs::trim_heap();
    }

    pub(crate) fn signal(&mut self, id: &str, signal: i32, all: bool) -> Result<Reply, ShimError> {
        let container = self
            .containers
            .get(id)
            .ok_or_else(|| not_found("container", id))?;
        if !container.is_live() {
            return Err(not_found("running container", id));
        }
        let what = |e: io::Error| child::system(format_args!("signal container {id:?}"), &e);
        if !all {
            return pidfd::send_signal_fd(container.pidfd.as_fd(), signal)
                .map(|()| Reply::Done)
                .map_err(what);
        }
        match cgroup::tracking_dir(&container.cgroups) {
            Some(dir) if signal == 9 => cgroup::kill_all(dir),
            Some(dir) => {
                for pid in cgroup::processes(dir) {
                    let _ = pidfd::kill(pid, signal);
                }
            }
            None => pidfd::send_signal_fd(container.pidfd.as_fd(), signal).map_err(what)?,
        }
        Ok(Reply::Done)
    }

    pub(crate) fn kill_everything(&mut self) {
        for container in self.containers.values().filter(|c| c.is_live()) {
            let _ = pidfd::send_signal_fd(container.pidfd.as_fd(), 9);
            if let Some(dir) = cgroup::tracking_dir(&container.cgroups) {
                cgroup::kill_all(dir);
            }
        }
        for session in self.execs.values() {
            let _ = pidfd::send_signal_fd(session.pidfd.as_fd(), 9);
        }
    }

    pub(crate) fn forget(&mut self, id: &str) -> Result<Reply, ShimError> {
        match self.containers.get(id).map(|c| &c.phase) {
            Some(Phase::Exited(_)) => {
                self.containers.remove(id);
                Ok(Reply::Done)
            }
            None => Ok(Reply::Done),
            Some(Phase::Starting(_) | Phase::Running | Phase::Draining(_)) => Err(ShimError {
                kind: ShimErrorKind::BadRequest,
                message: format!("container {id:?} has not exited"),
                errno: None,
            }),
        }
    }

    pub(crate) fn reopen_log(&mut self, id: &str) -> Result<Reply, ShimError> {
        let container = self
            .containers
            .get_mut(id)
            .ok_or_else(|| not_found("container", id))?;
        if let Some(log) = &mut container.output.log {
            log.reopen()
                .map_err(|e| child::system("open the log again", &e))?;
        }
        Ok(Reply::Done)
    }
}
