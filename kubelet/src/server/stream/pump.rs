//! Moves bytes between a client and the descriptors of an exec or attach session.
//!
//! One future per session. Input, both outputs and the exit move on their own, so that a program
//! that writes before it has read all (`cat`) never waits for us and we never for it.

use super::channel::{self, Input};
use super::wire::{Incoming, Outgoing};
use runtime::service::{RuntimeService, StreamSession};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// How much is read from a pipe at a time.
const CHUNK: usize = 32 * 1024;
/// Pieces of input that wait for the process; each is at most what the client sends at once.
const INPUT_QUEUE: usize = 16;
/// How long the outputs may be quiet after the process has ended: what it left in the pipes is
/// read at once, a child that keeps them open does not hold the client for ever.
const AFTER_EXIT: Duration = Duration::from_secs(1);
/// How long a client may take to answer our goodbye.
const CLOSE_ANSWER: Duration = Duration::from_secs(5);

/// Whose streams they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Those of a process of its own: it is killed when the client leaves, its exit code told.
    Exec,
    /// Those of the container: it goes on when the client leaves, and its end is a success here.
    Attach {
        /// The container's input stays open for others, so that the end of the client's is the
        /// end of the session (`kubectl run --leave-stdin-open` returns by it).
        until_input_ends: bool,
    },
}

/// Serves one session to its end: output to the client, input to the process, the result last.
pub async fn run<R, I, O>(
    mut input: I,
    output: O,
    kind: Kind,
    runtime: Arc<R>,
    session: Result<StreamSession, String>,
    idle_timeout: Duration,
) where
    R: RuntimeService,
    I: Incoming,
    O: Outgoing,
{
    let output = tokio::sync::Mutex::new(output);
    let result = match session {
        Ok(session) => {
            let id = session.id.clone();
            let result = serve(&mut input, &output, kind, &*runtime, session, idle_timeout).await;
            match (kind, &result) {
                (Kind::Exec, Ended::Left | Ended::Idle(_)) => {
                    let _ = runtime.kill_exec(&id).await;
                }
                (Kind::Exec, Ended::Result(_)) | (Kind::Attach { .. }, _) => {}
            }
            result.told(kind)
        }
        Err(message) => Some(Err(message)),
    };
    output.into_inner().end(result.as_ref()).await;
    // The connection is dropped only after the client's own goodbye, so that no reset overtakes
    // the last bytes. One that never answers has all there is.
    let rest = async { while input.next().await.is_some() {} };
    let _ = tokio::time::timeout(CLOSE_ANSWER, rest).await;
}

/// How a session came to its end.
#[derive(Debug)]
enum Ended {
    /// The process or container ended so; or it can no longer be told how.
    Result(Result<i32, String>),
    /// The client left.
    Left,
    /// Nothing moved for so long.
    Idle(Duration),
}

impl Ended {
    /// What the client is told.
    fn told(self, kind: Kind) -> Option<Result<i32, String>> {
        match (self, kind) {
            (Self::Result(result), Kind::Exec) => Some(result),
            // The container's exit code is in its status; kubectl takes a failure for ours.
            (Self::Result(result), Kind::Attach { .. }) => Some(result.map(|_| 0)),
            (Self::Left, _) => None,
            (Self::Idle(limit), _) => Some(Err(format!("no traffic for {} s", limit.as_secs()))),
        }
    }
}

async fn serve<R: RuntimeService, I: Incoming, O: Outgoing>(
    input: &mut I,
    output: &tokio::sync::Mutex<O>,
    kind: Kind,
    runtime: &R,
    session: StreamSession,
    idle_timeout: Duration,
) -> Ended {
    let StreamSession {
        id,
        stdin,
        stdout,
        stderr,
        mut exit,
    } = session;
    let opened = [stdin, stdout, stderr].map(|fd| fd.map(nonblocking).transpose());
    let (stdin, stdout, stderr) = match opened {
        [Ok(stdin), Ok(stdout), Ok(stderr)] => (stdin, stdout, stderr),
        [Err(e), ..] | [_, Err(e), _] | [.., Err(e)] => {
            return Ended::Result(Err(format!("open the streams of the session: {e}")));
        }
    };
    let lowest = match (&stdout, &stderr) {
        (Some(_), _) => channel::STDOUT,
        (None, Some(_)) => channel::STDERR,
        (None, None) => channel::ERROR,
    };
    // An empty message tells clients that the session is open.
    if output.lock().await.send(lowest, &[]).await.is_err() {
        return Ended::Left;
    }
    let activity = Activity::default();
    let exited = CancellationToken::new();
    let (feed, fed) = mpsc::channel(INPUT_QUEUE);
    let listening = listen(input, feed, runtime, &id, &activity);
    let feeding = feed_stdin(stdin, fed);
    // The two outputs take turns at the connection; the lock orders them within this future.
    let copying = async {
        tokio::try_join!(
            copy_out(stdout, channel::STDOUT, output, &exited, &activity),
            copy_out(stderr, channel::STDERR, output, &exited, &activity)
        )
    };
    tokio::pin!(listening, feeding, copying);
    let (mut copied, mut fed, mut code) = (false, false, None);
    loop {
        // Every arm is polled by reference and goes on where it was.
        tokio::select! {
            biased;
            () = &mut feeding, if !fed => {
                fed = true;
                let until_input_ends = Kind::Attach { until_input_ends: true };
                if kind == until_input_ends {
                    return Ended::Result(Ok(0));
                }
            }
            done = &mut copying, if !copied => match done {
                Ok(_) => copied = true,
                Err(_gone) => return Ended::Left,
            },
            ended = &mut exit, if code.is_none() => {
                code = Some(ended.map_err(|_| "the session was lost".to_owned()));
                exited.cancel();
            }
            () = &mut listening => return Ended::Left,
            () = activity.idle(idle_timeout) => return Ended::Idle(idle_timeout),
        }
        if copied && let Some(code) = code.take() {
            return Ended::Result(code);
        }
        if copied && matches!(kind, Kind::Attach { .. }) {
            // The shim lets go of the outputs only at the end, or of a client that is too slow.
            let ended = tokio::time::timeout(AFTER_EXIT, &mut exit).await;
            let slow = "the client fell too far behind the container's output";
            return Ended::Result(ended.map_or(Err(slow.to_owned()), |_| Ok(0)));
        }
    }
}

/// When something last moved. Shared by the parts of one future; held for an assignment only.
struct Activity(Mutex<Instant>);

impl Default for Activity {
    fn default() -> Self {
        Self(Mutex::new(Instant::now()))
    }
}

impl Activity {
    fn touch(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    async fn idle(&self, limit: Duration) {
        loop {
            let last = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
            if last + limit <= Instant::now() {
                return;
            }
            tokio::time::sleep_until(last + limit).await;
        }
    }
}

/// Reads what the client sends until it is gone.
async fn listen<R: RuntimeService, I: Incoming>(
    input: &mut I,
    feed: mpsc::Sender<Vec<u8>>,
    runtime: &R,
    id: &str,
    activity: &Activity,
) {
    let mut feed = Some(feed);
    while let Some(received) = input.next().await {
        activity.touch();
        match received {
            Input::Stdin(bytes) => {
                if let Some(open) = &feed
                    && open.send(bytes).await.is_err()
                {
                    feed = None;
                }
            }
            Input::StdinClosed => feed = None,
            Input::Resize(width, height) => {
                let _ = runtime.resize_tty(id, width, height).await;
            }
            Input::Ignored => {}
        }
    }
}

/// Gives the process its input, and closes it after the last.
async fn feed_stdin(mut stdin: Option<AsyncFd<OwnedFd>>, mut fed: mpsc::Receiver<Vec<u8>>) {
    while let Some(bytes) = fed.recv().await {
        if let Some(fd) = &stdin
            && write_all(fd, &bytes).await.is_err()
        {
            // The process closed its input; what else comes is for nobody.
            stdin = None;
        }
    }
}

/// Copies a pipe or terminal to the client until its end, or until it is quiet after the exit.
///
/// # Errors
/// When the client is gone.
async fn copy_out<O: Outgoing>(
    fd: Option<AsyncFd<OwnedFd>>,
    channel: u8,
    output: &tokio::sync::Mutex<O>,
    exited: &CancellationToken,
    activity: &Activity,
) -> io::Result<()> {
    let Some(fd) = fd else { return Ok(()) };
    let mut buffer = vec![0; CHUNK];
    loop {
        let readable = async {
            tokio::select! {
                biased;
                guard = fd.readable() => guard,
                () = exited.cancelled() => {
                    let rest = tokio::time::timeout(AFTER_EXIT, fd.readable()).await;
                    rest.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
                }
            }
        };
        let Ok(mut guard) = readable.await else {
            return Ok(());
        };
        let read = guard.try_io(|fd| Ok(rustix::io::read(fd.get_ref(), &mut buffer)?));
        match read {
            // A terminal whose last user has gone answers EIO: its end.
            Ok(Ok(0) | Err(_)) => return Ok(()),
            Ok(Ok(n)) => {
                output.lock().await.send(channel, &buffer[..n]).await?;
                activity.touch();
            }
            Err(_would_block) => {}
        }
    }
}

async fn write_all(fd: &AsyncFd<OwnedFd>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let mut guard = fd.writable().await?;
        match guard.try_io(|fd| Ok(rustix::io::write(fd.get_ref(), bytes)?)) {
            Ok(Ok(n)) => bytes = &bytes[n..],
            Ok(Err(e)) => return Err(e),
            Err(_would_block) => {}
        }
    }
    Ok(())
}

fn nonblocking(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    let flags = rustix::fs::fcntl_getfl(&fd)?;
    rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK)?;
    #[expect(
        deprecated,
        reason = "its successor is unsafe; the descriptor lives as long as its owner"
    )]
    AsyncFd::new(fd)
}
