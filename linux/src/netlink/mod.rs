//! Typed, blocking rtnetlink: links, addresses, routes.
//!
//! * A [`Change`] is a value; [`Rtnl::apply`] carries a list of them out in **one** `sendmsg`,
//!   each idempotent: what is already so, or already gone, is success.
//! * Questions are asked by name or index (`RTM_GETLINK`), never by dumping tables; the dumps
//!   there are ([`Rtnl::ports_of`], [`Rtnl::addresses_of`], [`Rtnl::routes_of`]) are filtered by the kernel, repeated
//!   when the table changed meanwhile, and not for the one-shot path of a plugin.
//! * No task, no thread but the short one that enters a namespace, no async runtime.

mod addr;
mod attribute;
mod change;
mod events;
mod fib;
mod link;
mod neigh;
mod route;
mod shape;
pub(crate) mod socket;
mod vlan;
mod vxlan;

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;

use socket::{Request, Socket};

pub use addr::AddressSpec;
pub use change::{Change, Outcome};
pub use events::{EventSocket, NetEvent};
pub use fib::{NodeHop, NodeRoute, TABLE_LOCAL, TABLE_MAIN};
pub use link::{BadMac, BridgeSpec, Link, Mac, PortSpec, VethSpec};
pub use neigh::{FdbEntry, FdbSpec, Neighbour, NeighbourSpec};
pub use route::RouteSpec;
pub use shape::TokenBucket;
pub use vlan::PortVlan;
pub use vxlan::{VxlanConfig, VxlanSpec};

const NETLINK_ROUTE: isize = 0;

/// A dump is tried again this often when the table changes under it.
const MAX_DUMP_ATTEMPTS: u32 = 10;

/// Changes sent at once by [`Rtnl::apply_each`]: their answers must fit in the socket's default
/// receive buffer (about 200 KiB, under 1 KiB each as the kernel counts).
const MAX_PORTION_CHANGES: usize = 100;

/// The kernel refused an operation, or cannot be asked.
#[derive(Debug)]
pub struct NetlinkError {
    pub(crate) operation: &'static str,
    pub(crate) object: String,
    pub(crate) said: String,
    pub(crate) source: io::Error,
}

impl fmt::Display for NetlinkError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.operation, self.object)?;
        if self.said.is_empty() {
            Ok(())
        } else {
            write!(f, " (kernel: {})", self.said)
        }
    }
}

impl std::error::Error for NetlinkError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
}

impl NetlinkError {
    pub(crate) fn opening(family: isize, source: io::Error) -> Self {
        Self {
            operation: "open",
            object: format!("netlink socket of family {family}"),
            said: String::new(),
            source,
        }
    }

    pub(crate) fn talking(request: &Request, source: io::Error) -> Self {
        Self {
            operation: request.operation,
            object: request.object.clone(),
            said: String::new(),
            source,
        }
    }

    /// The errno, when the kernel gave one.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        self.source.raw_os_error()
    }
}

/// Runs `work` in another network namespace: in a thread made for it, so that no other thread of
/// this process ever changes namespace.
///
/// # Errors
/// When the thread cannot be made or may not enter the namespace.
pub fn in_netns<T: Send>(netns: BorrowedFd<'_>, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let entered = std::thread::Builder::new()
            .name("netns".into())
            .spawn_scoped(scope, || {
                nix::sched::setns(netns, nix::sched::CloneFlags::CLONE_NEWNET)?;
                Ok(work())
            })?;
        entered
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the namespace thread panicked")))
    })
}

/// Makes an empty network namespace, which lives as long as the file is open or it is pinned
/// elsewhere. The caller's threads stay where they are.
///
/// # Errors
/// When the thread that makes it cannot be started or may not unshare.
pub fn new_netns() -> io::Result<File> {
    std::thread::scope(|scope| {
        let made = std::thread::Builder::new()
            .name("netns".into())
            .spawn_scoped(scope, || {
                nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)?;
                File::open("/proc/thread-self/ns/net")
            })?;
        made.join()
            .unwrap_or_else(|_| Err(io::Error::other("the namespace thread panicked")))
    })
}

/// A connection to rtnetlink in one network namespace.
#[derive(Debug)]
pub struct Rtnl {
    socket: Socket,
}

impl Rtnl {
    /// Opens one in the caller's namespace.
    ///
    /// # Errors
    /// When the kernel gives no socket.
    pub fn open() -> Result<Self, NetlinkError> {
        Ok(Self {
            socket: Socket::open(NETLINK_ROUTE)?,
        })
    }

    /// Opens one in another namespace; the caller's threads stay where they are.
    ///
    /// # Errors
    /// When the namespace cannot be entered or the kernel gives no socket.
    pub fn open_in(netns: BorrowedFd<'_>) -> Result<Self, NetlinkError> {
        Ok(Self {
            socket: Socket::open_in(netns, NETLINK_ROUTE)?,
        })
    }

    /// Opens one in another namespace by a visit of the calling thread there, which comes back to
    /// `home`. For programs of one thread: it saves starting another. A thread that cannot come
    /// home aborts the process.
    ///
    /// # Errors
    /// When the namespace cannot be entered or the kernel gives no socket.
    pub fn open_visiting(
        netns: BorrowedFd<'_>,
        home: BorrowedFd<'_>,
    ) -> Result<Self, NetlinkError> {
        Ok(Self {
            socket: Socket::open_visiting(netns, home, NETLINK_ROUTE)?,
        })
    }

    /// Carries out `changes` in order with one system call. The kernel goes on after a refusal;
    /// the first one is returned.
    ///
    /// # Errors
    /// [`NetlinkError`] naming the change that was refused.
    pub fn apply(&mut self, changes: &[Change]) -> Result<Vec<Outcome>, NetlinkError> {
        if changes.is_empty() {
            return Ok(Vec::new());
        }
        let requests: Vec<Request> = changes.iter().map(Change::request).collect();
        let verdicts = self
            .socket
            .send_batch(&requests)
            .map_err(|source| NetlinkError::talking(&requests[0], source))?;
        let mut outcomes = Vec::with_capacity(changes.len());
        for ((change, request), verdict) in changes.iter().zip(&requests).zip(verdicts) {
            outcomes.push(match verdict {
                Ok(()) => Outcome::Done,
                Err(refusal) if change.satisfied_by().iter().any(|errno| refusal.is(*errno)) => {
                    Outcome::Unchanged
                }
                Err(refusal) => return Err(refusal.about(request)),
            });
        }
        Ok(outcomes)
    }

    /// Carries out any number of changes, goes on after a refusal and tells every one of them.
    /// Sent in portions: neither the kernel's room for requests nor ours for answers is without
    /// bound.
    ///
    /// # Errors
    /// [`NetlinkError`] when the kernel cannot be talked to at all.
    pub fn apply_each(
        &mut self,
        changes: &[Change],
    ) -> Result<Vec<Result<Outcome, NetlinkError>>, NetlinkError> {
        let mut outcomes = Vec::with_capacity(changes.len());
        for portion in changes.chunks(MAX_PORTION_CHANGES) {
            let requests: Vec<Request> = portion.iter().map(Change::request).collect();
            let verdicts = self
                .socket
                .send_batch(&requests)
                .map_err(|source| NetlinkError::talking(&requests[0], source))?;
            for ((change, request), verdict) in portion.iter().zip(&requests).zip(verdicts) {
                outcomes.push(match verdict {
                    Ok(()) => Ok(Outcome::Done),
                    Err(refusal) if change.satisfied_by().iter().any(|e| refusal.is(*e)) => {
                        Ok(Outcome::Unchanged)
                    }
                    Err(refusal) => Err(refusal.about(request)),
                });
            }
        }
        Ok(outcomes)
    }

    /// The link of this name, if there is one.
    ///
    /// # Errors
    /// [`NetlinkError`] when the kernel cannot be asked.
    pub fn link_by_name(&mut self, name: &str) -> Result<Option<Link>, NetlinkError> {
        self.link(&link::get_by_name(name))
    }

    /// The link of this index, if there is one.
    ///
    /// # Errors
    /// As [`Rtnl::link_by_name`].
    pub fn link_by_index(&mut self, index: u32) -> Result<Option<Link>, NetlinkError> {
        self.link(&link::get_by_index(index))
    }

    fn link(&mut self, request: &Request) -> Result<Option<Link>, NetlinkError> {
        let answer = self.socket.get(request);
        match answer.map_err(|source| NetlinkError::talking(request, source))? {
            Ok(answer) => Link::decode(&answer)
                .map(Some)
                .ok_or_else(|| NetlinkError::talking(request, io::ErrorKind::InvalidData.into())),
            Err(refusal) if refusal.is(libc::ENODEV) => Ok(None),
            Err(refusal) => Err(refusal.about(request)),
        }
    }

    /// The token bucket at the root of what a link sends; none when there is another queue.
    ///
    /// # Errors
    /// [`NetlinkError`] when the kernel cannot be asked.
    pub fn token_bucket_of(&mut self, index: u32) -> Result<Option<TokenBucket>, NetlinkError> {
        let request = TokenBucket::get(index);
        let answer = self.socket.get(&request);
        match answer.map_err(|source| NetlinkError::talking(&request, source))? {
            Ok(answer) => Ok(TokenBucket::decode(&answer)),
            // No queue at all, or no such link.
            Err(refusal) if refusal.is(libc::ENOENT) || refusal.is(libc::ENODEV) => Ok(None),
            Err(refusal) if refusal.source.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            Err(refusal) => Err(refusal.about(&request)),
        }
    }

    /// All `ifb` devices. A dump filtered by the kernel: for garbage collection and agents.
    ///
    /// # Errors
    /// [`NetlinkError`]; also when the table changed during each of ten attempts.
    pub fn ifbs(&mut self) -> Result<Vec<Link>, NetlinkError> {
        let answers = self.dump(&link::dump_kind("ifb"))?;
        let links = answers.iter().filter_map(Link::decode);
        Ok(links.filter(|link| link.kind == "ifb").collect())
    }

    /// The ports of a bridge. A dump filtered by the kernel: for garbage collection and agents.
    ///
    /// # Errors
    /// [`NetlinkError`]; also when the table changed during each of ten attempts.
    pub fn ports_of(&mut self, bridge_index: u32) -> Result<Vec<Link>, NetlinkError> {
        let answers = self.dump(&link::dump_ports(bridge_index))?;
        let links = answers.iter().filter_map(Link::decode);
        // A kernel that ignores the filter would otherwise give us strangers.
        Ok(links
            .filter(|link| link.master == Some(bridge_index))
            .collect())
    }

    /// The addresses of a link. A dump filtered by the kernel.
    ///
    /// # Errors
    /// As [`Rtnl::ports_of`].
    pub fn addresses_of(&mut self, index: u32) -> Result<Vec<AddressSpec>, NetlinkError> {
        let answers = self.dump(&addr::dump(index))?;
        let addresses = answers.iter().filter_map(AddressSpec::decode);
        Ok(addresses.filter(|address| address.index == index).collect())
    }

    /// The unicast routes over a link, of every table. A dump filtered by the kernel.
    ///
    /// # Errors
    /// As [`Rtnl::ports_of`].
    pub fn routes_of(&mut self, index: u32) -> Result<Vec<RouteSpec>, NetlinkError> {
        let mut routes = Vec::new();
        for request in route::dumps(index) {
            let answers = self.dump(&request)?;
            routes.extend(answers.iter().filter_map(RouteSpec::decode));
        }
        routes.retain(|route| route.index == index);
        Ok(routes)
    }

    /// The addresses of every link. A dump, for agents.
    ///
    /// # Errors
    /// As [`Rtnl::ports_of`].
    pub fn addresses(&mut self) -> Result<Vec<AddressSpec>, NetlinkError> {
        let answers = self.dump(&addr::dump(0))?;
        Ok(answers.iter().filter_map(AddressSpec::decode).collect())
    }

    /// The links of a kind (`vxlan`). A dump filtered by the kernel, for agents.
    ///
    /// # Errors
    /// As [`Rtnl::ports_of`].
    pub fn links_of_kind(&mut self, kind: &str) -> Result<Vec<Link>, NetlinkError> {
        let answers = self.dump(&link::dump_kind(kind))?;
        let links = answers.iter().filter_map(Link::decode);
        Ok(links.filter(|link| link.kind == kind).collect())
    }

    /// The routes that carry a protocol number, of every table. A dump filtered by the kernel.
    ///
    /// # Errors
    /// As [`Rtnl::ports_of`].
    pub fn routes_of_protocol(&mut self, protocol: u8) -> Result<Vec<NodeRoute>, NetlinkError> {
        let mut routes = self.node_routes(fib::Filter::Protocol(protocol))?;
        routes.retain(|route| route.protocol == protocol);
        Ok(routes)
    }

    /// The routes of a table. A dump filtered by the kernel, for agents.
    ///
    /// # Errors
    /// As [`Rtnl::ports_of`].
    pub fn routes_of_table(&mut self, table: u32) -> Result<Vec<NodeRoute>, NetlinkError> {
        let mut routes = self.node_routes(fib::Filter::Table(table))?;
        routes.retain(|route| route.table == table);
        Ok(routes)
    }

    fn node_routes(&mut self, filter: fib::Filter) -> Result<Vec<NodeRoute>, NetlinkError> {
        let mut routes = Vec::new();
        for request in fib::dumps(filter) {
            match self.dump(&request) {
                Ok(answers) => routes.extend(answers.iter().filter_map(NodeRoute::decode)),
                // A kernel without that family, or a table without routes, has none.
                Err(e) if matches!(e.errno(), Some(libc::EAFNOSUPPORT | libc::ENOENT)) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(routes)
    }

    /// The IP neighbours of a link. A dump filtered by the kernel.
    ///
    /// # Errors
    /// As [`Rtnl::ports_of`].
    pub fn neighbours_of(&mut self, index: u32) -> Result<Vec<Neighbour>, NetlinkError> {
        let mut neighbours = Vec::new();
        for request in neigh::dump_neighbours(index) {
            let answers = self.dump(&request)?;
            neighbours.extend(answers.iter().filter_map(Neighbour::decode));
        }
        neighbours.retain(|neighbour| neighbour.index == index);
        Ok(neighbours)
    }

    /// The forwarding entries of a VXLAN device. A dump filtered by the kernel.
    ///
    /// # Errors
    /// As [`Rtnl::ports_of`].
    pub fn fdb_of(&mut self, index: u32) -> Result<Vec<FdbEntry>, NetlinkError> {
        let answers = self.dump(&neigh::dump_fdb(index))?;
        let entries = answers.iter().filter_map(FdbEntry::decode);
        Ok(entries.filter(|entry| entry.index == index).collect())
    }

    fn dump(&mut self, request: &Request) -> Result<Vec<socket::Answer>, NetlinkError> {
        let talking = |source| NetlinkError::talking(request, source);
        self.socket.strict().map_err(talking)?;
        for _ in 0..MAX_DUMP_ATTEMPTS {
            match self.socket.dump(request).map_err(talking)? {
                Ok(Some(answers)) => return Ok(answers),
                Ok(None) => {}
                Err(refusal) if refusal.is(libc::ENODEV) => return Ok(Vec::new()),
                Err(refusal) => return Err(refusal.about(request)),
            }
        }
        Err(talking(io::Error::other(
            "the table changed during every attempt",
        )))
    }
}

#[cfg(test)]
mod tests;
