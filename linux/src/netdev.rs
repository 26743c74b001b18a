//! Traffic counters of network interfaces, as `/proc/<pid>/net/dev` shows them for the network
//! namespace of a process. No namespace is entered and no socket opened for it.

use std::io;

/// Counters of one interface, seen from inside its namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Interface {
    /// Its name there.
    pub name: String,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Packets received.
    pub rx_packets: u64,
    /// Receive errors.
    pub rx_errors: u64,
    /// Packets dropped on receipt.
    pub rx_dropped: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Packets sent.
    pub tx_packets: u64,
    /// Transmit errors.
    pub tx_errors: u64,
    /// Packets dropped when sending.
    pub tx_dropped: u64,
}

/// Interfaces in the network namespace of a process; of our own with none.
///
/// # Errors
/// When the process is gone or the file cannot be read.
pub fn interfaces(pid: Option<i32>) -> io::Result<Vec<Interface>> {
    let path = match pid {
        Some(pid) => format!("/proc/{pid}/net/dev"),
        // Of the thread, not of the process: threads may have namespaces of their own.
        None => "/proc/thread-self/net/dev".to_owned(),
    };
    Ok(parse(&std::fs::read_to_string(path)?))
}

/// Reads the table; lines that are not understood are left out.
#[must_use]
pub fn parse(text: &str) -> Vec<Interface> {
    // Two lines of headings.
    text.lines().skip(2).filter_map(line).collect()
}

fn line(line: &str) -> Option<Interface> {
    let (name, counters) = line.rsplit_once(':')?;
    let counters: Vec<u64> = counters
        .split_whitespace()
        .map(|n| n.parse().ok())
        .collect::<Option<_>>()?;
    let &[
        rx_bytes,
        rx_packets,
        rx_errors,
        rx_dropped,
        _,
        _,
        _,
        _,
        tx_bytes,
        tx_packets,
        tx_errors,
        tx_dropped,
        ..,
    ] = counters.as_slice()
    else {
        return None;
    };
    Some(Interface {
        name: name.trim().to_owned(),
        rx_bytes,
        rx_packets,
        rx_errors,
        rx_dropped,
        tx_bytes,
        tx_packets,
        tx_errors,
        tx_dropped,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_read() {
        let text = "Inter-|   Receive                                                |  Transmit\n\
             face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed\n\
                lo:       0       0    0    0    0     0          0         0        0       0    0    0    0     0       0          0\n\
              eth0:   10       2    3    4    0     0          0         0    50       6    7    8    0     0       0          0\n\
             short: 1 2\n";
        let found = parse(text);
        assert_eq!(found.len(), 2);
        let eth0 = &found[1];
        assert_eq!(
            (eth0.name.as_str(), eth0.rx_bytes, eth0.rx_packets),
            ("eth0", 10, 2)
        );
        assert_eq!((eth0.tx_bytes, eth0.tx_errors, eth0.tx_dropped), (50, 7, 8));
    }

    #[test]
    fn our_own_namespace_has_a_loopback() {
        let found = interfaces(None).unwrap();
        assert!(found.iter().any(|i| i.name == "lo"));
        assert!(interfaces(Some(0)).is_err());
    }

    proptest::proptest! {
        #[test]
        fn no_text_is_too_strange(text in "(.{0,40}\n){0,6}") {
            let _ = parse(&text);
        }
    }
}
