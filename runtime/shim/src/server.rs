//! The shim's loop and its clients.
//!
//! One thread, one epoll set. Every descriptor waited on has a token that is never used twice,
//! so an event for something that is already gone finds nothing and is dropped. Idle, the shim
//! sleeps without a timer.

use crate::container::{Container, ExecSession, ReplyTo};
use crate::output::{Sink, StreamName};
use crate::setup::{Helper, UserNs};
use linux::event::{self, Interest, Poller, Ready};
use linux::process::attrs;
use pod_shim::frame::{FrameReader, FrameWriter};
use pod_shim::protocol::{
    Event, FromShim, PROTOCOL_VERSION, Reply, Request, SandboxSpec, ShimError, ShimErrorKind,
    Snapshot, ToShim,
};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// What a client may leave unread before it is cut off.
const MAX_UNSENT_BYTES: usize = 8 << 20;
/// Clients at a time; the agent needs one or two.
const MAX_CLIENTS: usize = 32;

/// What a token stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Source {
    /// A client wants to connect.
    Listener,
    /// A child ended.
    Children,
    /// A client's socket.
    Client,
    /// Notes of a container being started.
    ContainerNotes(String),
    /// Notes of an exec session being started.
    ExecNotes(String),
    /// A container's output.
    Stream(String, StreamName),
    /// A container's stdin can take more.
    Stdin(String),
    /// An attached client's input.
    AttachInput(String),
    /// An attached client can take more.
    AttachOutput(String),
    /// A client still takes what an ended container wrote.
    Lingering,
    /// Memory ran out in a container.
    Oom(String),
}

/// What happens at a time instead of at an event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Timer {
    /// Stop waiting for a container's output to end.
    Drain(String),
    /// Look at the count of memory kills again, so many times more.
    OomAgain(String, u32),
    /// See whether attached clients that hold a container take anything.
    Stalled(String),
    /// See whether a client takes anything of what an ended container wrote.
    Linger(u64),
    /// Stop waiting for killed containers.
    Shutdown,
}

#[derive(Debug)]
struct Client {
    socket: UnixStream,
    reader: FrameReader,
    writer: FrameWriter,
    blocked: bool,
}

/// The pod's namespaces, once made.
#[derive(Debug)]
pub(crate) struct Sandbox {
    pub(crate) spec: SandboxSpec,
    pub(crate) helper: Option<Helper>,
    /// The pod\'s user namespace, when it has one.
    pub(crate) userns: Option<UserNs>,
}

/// The whole shim.
#[derive(Debug)]
pub(crate) struct Shim {
    pub(crate) poller: Poller,
    sources: BTreeMap<u64, Source>,
    next_token: u64,
    listener: UnixListener,
    socket_path: PathBuf,
    children: OwnedFd,
    clients: BTreeMap<u64, Client>,
    pub(crate) sandbox: Option<Sandbox>,
    pub(crate) containers: BTreeMap<String, Container>,
    pub(crate) execs: BTreeMap<String, ExecSession>,
    /// What attached clients of ended containers still have to take, by token.
    pub(crate) lingering: BTreeMap<u64, Sink>,
    timers: Vec<(u64, Timer)>,
    pub(crate) scratch: Vec<u8>,
    pub(crate) next_exec_number: u64,
    shutdown: Option<ReplyTo>,
    finished: bool,
}

/// An error about something that is not there.
pub(crate) fn not_found(what: &str, id: &str) -> ShimError {
    ShimError {
        kind: ShimErrorKind::NotFound,
        message: format!("no {what} {id:?}"),
        errno: None,
    }
}

impl Shim {
    /// Take over the listening socket.
    pub(crate) fn new(listener: UnixListener, socket_path: PathBuf) -> io::Result<Self> {
        let poller = Poller::new()?;
        let children = event::child_signal()?;
        listener.set_nonblocking(true)?;
        let mut shim = Self {
            poller,
            sources: BTreeMap::new(),
            next_token: 1,
            listener,
            socket_path,
            children,
            clients: BTreeMap::new(),
            sandbox: None,
            containers: BTreeMap::new(),
            execs: BTreeMap::new(),
            lingering: BTreeMap::new(),
            timers: Vec::new(),
            scratch: Vec::new(),
            next_exec_number: 0,
            shutdown: None,
            finished: false,
        };
        let token = shim.new_token(Source::Listener);
        shim.poller
            .add(shim.listener.as_fd(), token, Interest::READ)?;
        let token = shim.new_token(Source::Children);
        shim.poller
            .add(shim.children.as_fd(), token, Interest::READ)?;
        Ok(shim)
    }

    /// Serve until told to shut down.
    pub(crate) fn run(&mut self) -> io::Result<()> {
        let mut ready: Vec<Ready> = Vec::new();
        // Clients of ended containers still get what was written for them.
        while !self.finished || !self.lingering.is_empty() {
            ready.clear();
            self.poller.wait(&mut ready, self.next_timeout())?;
            // Children last: an exited child's notes and output come first.
            ready.sort_by_key(|r| self.sources.get(&r.token) == Some(&Source::Children));
            for event in &ready {
                self.dispatch(*event);
            }
            self.fire_timers();
            self.check_shutdown();
        }
        Ok(())
    }

    /// Reserve a token.
    pub(crate) fn new_token(&mut self, source: Source) -> u64 {
        let token = self.next_token;
        self.next_token += 1;
        self.sources.insert(token, source);
        token
    }

    /// Wait on a descriptor under a new token. A regular file cannot be waited on and needs not:
    /// that is told as `None`.
    pub(crate) fn watch(
        &mut self,
        fd: BorrowedFd<'_>,
        source: Source,
        interest: Interest,
    ) -> Option<u64> {
        let token = self.new_token(source);
        match self.poller.add(fd, token, interest) {
            Ok(()) => Some(token),
            Err(_) => {
                self.sources.remove(&token);
                None
            }
        }
    }

    /// Let a token mean something else.
    pub(crate) fn replace_source(&mut self, token: u64, source: Source) {
        self.sources.insert(token, source);
    }

    /// Forget a token; closing the descriptor takes it out of the poller.
    pub(crate) fn forget_token(&mut self, token: u64) {
        self.sources.remove(&token);
    }

    /// Stop waiting on a descriptor and forget its token.
    pub(crate) fn unwatch(&mut self, fd: BorrowedFd<'_>, token: u64) {
        let _ = self.poller.remove(fd);
        self.sources.remove(&token);
    }

    /// Do something after so many milliseconds.
    pub(crate) fn after(&mut self, ms: u64, timer: Timer) {
        self.timers.push((attrs::monotonic_ms() + ms, timer));
    }

    fn next_timeout(&self) -> Option<u64> {
        let now = attrs::monotonic_ms();
        self.timers
            .iter()
            .map(|(at, _)| at.saturating_sub(now))
            .min()
    }

    fn fire_timers(&mut self) {
        if self.timers.is_empty() {
            return;
        }
        let now = attrs::monotonic_ms();
        let (due, later) = std::mem::take(&mut self.timers)
            .into_iter()
            .partition(|(at, _)| *at <= now);
        self.timers = later;
        let due: Vec<(u64, Timer)> = due;
        for (_, timer) in due {
            match timer {
                Timer::Drain(id) => self.stop_draining(&id),
                Timer::OomAgain(id, left) => self.check_oom(&id, left),
                Timer::Stalled(id) => self.check_stalled(&id),
                Timer::Linger(token) => self.check_lingering(token),
                Timer::Shutdown => self.finish_shutdown(),
            }
        }
    }

    fn dispatch(&mut self, ready: Ready) {
        let Some(source) = self.sources.get(&ready.token).cloned() else {
            return;
        };
        match source {
            Source::Listener => self.accept(),
            Source::Children => {
                event::drain(self.children.as_fd());
                self.reap();
            }
            Source::Client => self.serve_client(ready),
            Source::ContainerNotes(id) => self.container_notes(&id),
            Source::ExecNotes(id) => self.exec_notes(&id),
            Source::Stream(id, name) => self.read_stream(&id, name),
            Source::Stdin(id) => self.stdin_woke(&id, ready),
            Source::AttachInput(id) => self.read_attach_input(&id, ready.token),
            Source::AttachOutput(id) => self.flush_attached(&id, ready),
            Source::Lingering => self.flush_lingering(ready),
            Source::Oom(id) => self.oom_woke(&id),
        }
    }

    fn accept(&mut self) {
        while let Ok((socket, _)) = self.listener.accept() {
            if self.clients.len() >= MAX_CLIENTS || socket.set_nonblocking(true).is_err() {
                continue;
            }
            let Some(token) = self.watch(socket.as_fd(), Source::Client, Interest::READ) else {
                continue;
            };
            let client = Client {
                socket,
                reader: FrameReader::default(),
                writer: FrameWriter::default(),
                blocked: false,
            };
            self.clients.insert(token, client);
            let snapshot = FromShim::Snapshot(self.snapshot());
            self.send(token, &snapshot, Vec::new());
        }
    }

    fn snapshot(&self) -> Snapshot {
        Snapshot {
            version: PROTOCOL_VERSION,
            sandbox_id: self.sandbox.as_ref().map(|s| s.spec.sandbox_id.clone()),
            shim_pid: std::process::id() as i32,
            netns: self.pinned_netns(),
            containers: self
                .containers
                .values()
                .filter(|c| !matches!(c.phase, crate::container::Phase::Starting(_)))
                .map(Container::state)
                .collect(),
        }
    }

    fn pinned_netns(&self) -> Option<PathBuf> {
        let spec = &self.sandbox.as_ref()?.spec;
        spec.netns_path.clone().filter(|_| !spec.host_network)
    }

    /// Send to one client; one that is gone or does not read is cut off.
    pub(crate) fn send(&mut self, token: u64, message: &FromShim, fds: Vec<OwnedFd>) {
        let Some(client) = self.clients.get_mut(&token) else {
            return;
        };
        let queued = client.writer.push(message, fds).is_ok();
        if !queued || client.writer.queued_bytes() > MAX_UNSENT_BYTES {
            self.drop_client(token);
            return;
        }
        self.flush_client(token);
    }

    /// Tell every client.
    pub(crate) fn publish(&mut self, event: Event) {
        let message = FromShim::Event(event);
        let tokens: Vec<u64> = self.clients.keys().copied().collect();
        for token in tokens {
            self.send(token, &message, Vec::new());
        }
    }

    /// Answer a request.
    pub(crate) fn reply(
        &mut self,
        to: ReplyTo,
        result: Result<Reply, ShimError>,
        fds: Vec<OwnedFd>,
    ) {
        self.send(
            to.client,
            &FromShim::Reply {
                id: to.request,
                result,
            },
            fds,
        );
    }

    fn flush_client(&mut self, token: u64) {
        let Some(client) = self.clients.get_mut(&token) else {
            return;
        };
        match client.writer.flush(client.socket.as_fd()) {
            Ok(empty) => {
                if client.blocked == empty {
                    client.blocked = !empty;
                    let interest = if empty {
                        Interest::READ
                    } else {
                        Interest::BOTH
                    };
                    let _ = self.poller.modify(client.socket.as_fd(), token, interest);
                }
            }
            Err(_) => self.drop_client(token),
        }
    }

    fn drop_client(&mut self, token: u64) {
        self.clients.remove(&token);
        self.sources.remove(&token);
        self.kill_sessions_of(token);
    }

    fn serve_client(&mut self, ready: Ready) {
        let token = ready.token;
        if ready.write {
            self.flush_client(token);
        }
        if !ready.read {
            return;
        }
        loop {
            let Some(client) = self.clients.get_mut(&token) else {
                return;
            };
            match client.reader.fill(client.socket.as_fd()) {
                Ok(1..) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Ok(_) | Err(_) => return self.drop_client(token),
            }
            loop {
                let Some(client) = self.clients.get_mut(&token) else {
                    return;
                };
                match client.reader.next_message::<ToShim>() {
                    Ok(Some(message)) => self.handle(token, message),
                    Ok(None) => break,
                    Err(error) => {
                        eprintln!("client cut off: {error}");
                        return self.drop_client(token);
                    }
                }
            }
        }
        attrs::trim_heap();
    }

    /// Claim a request's descriptors from its client.
    fn claim_fds(&mut self, token: u64, count: usize) -> Result<Vec<OwnedFd>, ShimError> {
        let fds = self
            .clients
            .get_mut(&token)
            .map(|client| client.reader.take_fds(count));
        match fds {
            Some(Ok(fds)) => Ok(fds),
            Some(Err(error)) => Err(ShimError {
                kind: ShimErrorKind::BadRequest,
                message: error.to_string(),
                errno: None,
            }),
            None => Ok(Vec::new()),
        }
    }

    fn handle(&mut self, client: u64, message: ToShim) {
        let to = ReplyTo {
            client,
            request: message.id,
        };
        // `None` is answered later.
        let result: Option<Result<Reply, ShimError>> = match message.request {
            Request::Setup(spec) => Some(self.setup(spec)),
            Request::Launch(spec) => self.launch(*spec, to),
            Request::Signal {
                container_id,
                signal,
                all,
            } => Some(self.signal(&container_id, signal, all)),
            Request::Exec(spec) => {
                let stdio = spec.stdio;
                let count = if spec.tty {
                    0
                } else {
                    usize::from(stdio.stdin) + usize::from(stdio.stdout) + usize::from(stdio.stderr)
                };
                match self.claim_fds(client, count) {
                    Ok(fds) => self.exec(*spec, fds, to),
                    Err(error) => Some(Err(error)),
                }
            }
            Request::ExecKill { exec_id } => Some(self.exec_kill(&exec_id)),
            Request::Resize {
                target,
                width,
                height,
            } => Some(self.resize(&target, width, height)),
            Request::ReopenLog { container_id } => Some(self.reopen_log(&container_id)),
            Request::Forget { container_id } => Some(self.forget(&container_id)),
            Request::Attach {
                container_id,
                stdio,
            } => {
                let count = usize::from(stdio.stdin)
                    + usize::from(stdio.stdout)
                    + usize::from(stdio.stderr);
                let fds = self.claim_fds(client, count);
                Some(fds.and_then(|fds| self.attach(&container_id, stdio, fds)))
            }
            Request::Shutdown => {
                self.begin_shutdown(to);
                None
            }
        };
        if let Some(result) = result {
            self.reply(to, result, Vec::new());
        }
    }

    fn setup(&mut self, spec: SandboxSpec) -> Result<Reply, ShimError> {
        match &self.sandbox {
            Some(known) if known.spec.sandbox_id != spec.sandbox_id => {
                return Err(ShimError {
                    kind: ShimErrorKind::BadRequest,
                    message: format!("this shim belongs to sandbox {:?}", known.spec.sandbox_id),
                    errno: None,
                });
            }
            Some(_) => {}
            None => {
                let (helper, userns) = crate::setup::make_sandbox(&spec)?;
                self.sandbox = Some(Sandbox {
                    spec,
                    helper,
                    userns,
                });
            }
        }
        Ok(Reply::Ready {
            shim_pid: std::process::id() as i32,
            netns: self.pinned_netns(),
        })
    }

    fn begin_shutdown(&mut self, to: ReplyTo) {
        self.shutdown = Some(to);
        self.kill_everything();
        self.after(10_000, Timer::Shutdown);
    }

    fn check_shutdown(&mut self) {
        let busy = self
            .containers
            .values()
            .any(|c| !matches!(c.phase, crate::container::Phase::Exited(_)))
            || !self.execs.is_empty();
        if self.shutdown.is_some() && !busy {
            self.finish_shutdown();
        }
    }

    fn finish_shutdown(&mut self) {
        let Some(to) = self.shutdown.take() else {
            return;
        };
        if let Some(sandbox) = self.sandbox.take() {
            if let Some(path) = sandbox
                .spec
                .netns_path
                .filter(|_| !sandbox.spec.host_network)
                && let Err(error) = linux::process::namespace::unpin_net(&path)
            {
                eprintln!("cannot unpin {}: {error}", path.display());
            }
            // The helper dies with the shim.
            drop(sandbox.helper);
        }
        remove_socket(&self.socket_path);
        self.reply(to, Ok(Reply::Done), Vec::new());
        self.finished = true;
    }
}

fn remove_socket(path: &Path) {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            eprintln!("cannot remove {}: {error}", path.display());
        }
        Ok(()) | Err(_) => {}
    }
}
