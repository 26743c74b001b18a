//! Facts about the machine that configuration needs when the user did not give them.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::Path;

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Facts {
    /// The machine's name, as the kernel has it.
    pub host_name: String,
    /// The address of the way out, when there is one.
    pub address: Option<IpAddr>,
    /// Logical CPUs.
    pub cpus: usize,
}

/// Looks at the machine. `kubeconfig` tells whom the default address should reach.
pub fn facts(kubeconfig: Option<&Path>) -> Facts {
    Facts {
        host_name: rustix::system::uname()
            .nodename()
            .to_string_lossy()
            .into_owned(),
        address: kubeconfig
            .and_then(apiserver_address)
            .and_then(towards)
            .or_else(|| towards(SocketAddr::from(([192, 0, 2, 1], 9)))),
        cpus: std::thread::available_parallelism().map_or(1, usize::from),
    }
}

/// Our address on the way to `peer`. Connecting a datagram socket sends nothing.
fn towards(peer: SocketAddr) -> Option<IpAddr> {
    let any: SocketAddr = if peer.is_ipv4() {
        ([0, 0, 0, 0], 0).into()
    } else {
        ([0u16; 8], 0).into()
    };
    let socket = UdpSocket::bind(any).ok()?;
    socket.connect(peer).ok()?;
    let ip = socket.local_addr().ok()?.ip();
    (!ip.is_loopback() && !ip.is_unspecified()).then_some(ip)
}

/// The apiserver's address, when the kubeconfig names it by address.
fn apiserver_address(path: &Path) -> Option<SocketAddr> {
    let uri = crate::api::endpoint::read(path).ok()?.server;
    let host = uri.host()?.trim_matches(['[', ']']);
    Some(SocketAddr::new(
        host.parse().ok()?,
        uri.port_u16().unwrap_or(443),
    ))
}
