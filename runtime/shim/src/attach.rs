//! Clients attached to a running container: its output copied to them, their input to it.

use crate::child;
use crate::output::{Attachment, READ_BYTES, Sink};
use crate::server::{Shim, Source, Timer, not_found};
use linux::event::{self, Interest, Ready};
use pod_shim::protocol::{Reply, ShimError, ShimErrorKind, Stdio};
use std::io;
use std::os::fd::{AsFd, OwnedFd};

/// How long an attached client may take nothing at all while others wait for it.
const STALL_MS: u64 = 5000;
/// Clients that still take what ended containers wrote, over the whole pod.
const MAX_LINGERING: usize = 64;

impl Shim {
    pub(crate) fn attach(
        &mut self,
        id: &str,
        stdio: Stdio,
        fds: Vec<OwnedFd>,
    ) -> Result<Reply, ShimError> {
        let container = self
            .containers
            .get(id)
            .filter(|c| c.is_running())
            .ok_or_else(|| not_found("running container", id))?;
        if stdio.stdin && container.stdin.is_none() {
            return Err(ShimError {
                kind: ShimErrorKind::BadRequest,
                message: format!("container {id:?} has no stdin"),
                errno: None,
            });
        }
        for fd in &fds {
            event::set_nonblocking(fd.as_fd())
                .map_err(|e| child::system("prepare an attached stream", &e))?;
        }
        let mut fds = fds.into_iter();
        let mut take = |connected: bool| if connected { fds.next() } else { None };
        let (input, out, err) = (take(stdio.stdin), take(stdio.stdout), take(stdio.stderr));
        let input = input.and_then(|fd| {
            let source = Source::AttachInput(id.to_owned());
            let token = self.watch(fd.as_fd(), source, Interest::READ)?;
            Some((fd, token))
        });
        let mut sink = |fd: Option<OwnedFd>| {
            fd.map(|fd| {
                let source = Source::AttachOutput(id.to_owned());
                let token = self
                    .watch(fd.as_fd(), source, Interest::NONE)
                    .unwrap_or_default();
                Sink::new(fd, token)
            })
        };
        let outputs = [sink(out), sink(err)];
        if let Some(container) = self.containers.get_mut(id) {
            container
                .output
                .attachments
                .push(Attachment { input, outputs });
        }
        Ok(Reply::Done)
    }

    /// An attached client typed something, or closed its input.
    pub(crate) fn read_attach_input(&mut self, id: &str, token: u64) {
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        let Some(slot) = container
            .output
            .attachments
            .iter_mut()
            .map(|a| &mut a.input)
            .find(|input| input.as_ref().is_some_and(|(_, t)| *t == token))
        else {
            return;
        };
        let Some((fd, _)) = slot else { return };
        let Some(stdin) = container.stdin.as_mut() else {
            *slot = None;
            return self.forget_token(token);
        };
        if !stdin.has_room() {
            // Not read until the container has taken what is queued; `flush_stdin` resumes. Out
            // of the poller altogether, because a client that hung up would wake us for ever.
            let _ = self.poller.remove(fd.as_fd());
            return;
        }
        self.scratch.resize(READ_BYTES, 0);
        match event::read(fd.as_fd(), &mut self.scratch) {
            Ok(count @ 1..) => {
                stdin.queue.extend(&self.scratch[..count]);
                self.flush_stdin(id);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Ok(_) | Err(_) => {
                *slot = None;
                self.forget_token(token);
                self.end_stdin_if_once(id);
            }
        }
    }

    /// The first client's input ended: with `stdin_once` so does the container's, when all of it
    /// has been taken. A terminal's input cannot end apart from its output.
    fn end_stdin_if_once(&mut self, id: &str) {
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        if !container.stdin_once || container.tty {
            return;
        }
        container.stdin_closing = true;
        self.flush_stdin(id);
    }

    /// The container's stdin can take more, or the container has closed it.
    pub(crate) fn stdin_woke(&mut self, id: &str, ready: Ready) {
        if !ready.hangup {
            return self.flush_stdin(id);
        }
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        if let Some(sink) = container.stdin.take() {
            self.forget_token(sink.token);
        }
    }

    /// Give the container what is queued for it.
    pub(crate) fn flush_stdin(&mut self, id: &str) {
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        let Some(stdin) = &mut container.stdin else {
            return;
        };
        match stdin.flush() {
            Ok(false) => {
                let _ = self
                    .poller
                    .modify(stdin.fd.as_fd(), stdin.token, Interest::WRITE);
            }
            Ok(true) if !container.stdin_closing => {
                let _ = self
                    .poller
                    .modify(stdin.fd.as_fd(), stdin.token, Interest::NONE);
                for (fd, token) in container
                    .output
                    .attachments
                    .iter()
                    .filter_map(|a| a.input.as_ref())
                {
                    // Refused when it is still there, which is as good.
                    let _ = self.poller.add(fd.as_fd(), *token, Interest::READ);
                }
            }
            // All taken and no more to come, or nobody reads it any more.
            Ok(true) | Err(_) => {
                let token = stdin.token;
                container.stdin = None;
                self.forget_token(token);
            }
        }
    }

    /// After output was copied or taken: wait for clients that have not taken all, and hold the
    /// container as long as one of them is too far behind.
    pub(crate) fn tend_attached(&mut self, id: &str) {
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        let running = container.is_running();
        let output = &mut container.output;
        if output.attachments.is_empty() && !output.held {
            return;
        }
        for sink in output.sinks().flatten().filter(|s| !s.queue.is_empty()) {
            let _ = self
                .poller
                .modify(sink.fd.as_fd(), sink.token, Interest::WRITE);
        }
        // What an ended container left in its pipes is bounded by them.
        let hold = running && output.is_behind();
        if hold == output.held {
            return;
        }
        output.held = hold;
        let interest = if hold { Interest::NONE } else { Interest::READ };
        for stream in output.streams.iter().flatten() {
            let _ = self
                .poller
                .modify(stream.fd.as_fd(), stream.token, interest);
        }
        if hold {
            output.sinks().flatten().for_each(|sink| sink.moved = false);
            self.after(STALL_MS, Timer::Stalled(id.to_owned()));
        }
    }

    /// Time has passed while the container was held: cut off who took nothing.
    pub(crate) fn check_stalled(&mut self, id: &str) {
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        let output = &mut container.output;
        if !output.held {
            return;
        }
        let mut cut = Vec::new();
        for slot in output.sinks() {
            if slot.as_ref().is_some_and(|s| s.is_behind() && !s.moved) {
                cut.extend(slot.take());
            }
        }
        output.sinks().flatten().for_each(|sink| sink.moved = false);
        for sink in cut {
            eprintln!("an attached client of {id} takes no output: cut off");
            self.forget_token(sink.token);
        }
        self.tend_attached(id);
        if self.containers.get(id).is_some_and(|c| c.output.held) {
            self.after(STALL_MS, Timer::Stalled(id.to_owned()));
        }
    }

    /// The container has ended before this client had taken all: it still gets the rest.
    pub(crate) fn linger(&mut self, sink: Sink) {
        let token = sink.token;
        let waits = self
            .poller
            .modify(sink.fd.as_fd(), token, Interest::WRITE)
            .is_ok();
        if waits && self.lingering.len() < MAX_LINGERING {
            self.replace_source(token, Source::Lingering);
            self.lingering.insert(token, sink);
            self.after(STALL_MS, Timer::Linger(token));
        } else {
            self.forget_token(token);
        }
    }

    /// Such a client can take more, or is gone.
    pub(crate) fn flush_lingering(&mut self, ready: Ready) {
        let Some(sink) = self.lingering.get_mut(&ready.token) else {
            return;
        };
        if ready.hangup || !matches!(sink.flush(), Ok(false)) {
            self.lingering.remove(&ready.token);
            self.forget_token(ready.token);
        }
    }

    /// Time has passed: let go of such a client when it took nothing.
    pub(crate) fn check_lingering(&mut self, token: u64) {
        let Some(sink) = self.lingering.get_mut(&token) else {
            return;
        };
        if std::mem::take(&mut sink.moved) {
            self.after(STALL_MS, Timer::Linger(token));
        } else {
            self.lingering.remove(&token);
            self.forget_token(token);
        }
    }

    /// An attached client can take more, or is gone.
    pub(crate) fn flush_attached(&mut self, id: &str, ready: Ready) {
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        let mut gone = None;
        for attachment in &mut container.output.attachments {
            for slot in &mut attachment.outputs {
                let Some(sink) = slot.as_mut().filter(|s| s.token == ready.token) else {
                    continue;
                };
                if ready.hangup || sink.flush().is_err() {
                    gone = slot.take();
                } else if sink.queue.is_empty() {
                    let _ = self
                        .poller
                        .modify(sink.fd.as_fd(), sink.token, Interest::NONE);
                }
            }
        }
        let attachments = &mut container.output.attachments;
        attachments.retain(|a| a.input.is_some() || a.outputs.iter().any(Option::is_some));
        if let Some(sink) = gone {
            self.forget_token(sink.token);
        }
        self.tend_attached(id);
    }
}
