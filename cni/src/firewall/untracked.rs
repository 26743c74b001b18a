//! Outer packets of tunnels kept out of connection tracking.
//!
//! A packet's mark survives encapsulation: without this, a rule that masquerades by mark (service
//! translation has one) meets the outer packet too, and its new source port makes receivers drop
//! it until TCP has retried for a minute. What is not tracked cannot be translated, and the
//! tracking table stays small.

use linux::nft::{Chain, Expr, Hook, Rule, Sense};

const UDP: u8 = 17;

/// Begins the names of these chains.
pub const UNTRACKED_PREFIX: &str = "untracked-";

/// The chains for outer packets to a UDP port: one for those that arrive, one for our own.
#[must_use]
pub fn untracked(port: u16) -> [Chain; 2] {
    [("in", Hook::RawIn), ("out", Hook::RawOut)].map(|(way, hook)| Chain {
        name: format!("{UNTRACKED_PREFIX}{way}-{port}"),
        hook: Some(hook),
        rules: vec![Rule {
            exprs: vec![
                Expr::Transport(Sense::Is, UDP),
                Expr::DestinationPort(Sense::Is, port),
                Expr::Untracked,
            ],
            comment: "outer packets of the pod network".into(),
        }],
    })
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::process::Command;

    use linux::nft::Nft;

    use super::*;

    #[test]
    fn the_rules_are_what_nft_shows_and_are_put_once() {
        let netns = linux::netlink::new_netns().expect("root is needed");
        let mut nft = Nft::open_in(netns.as_fd()).unwrap();
        for chain in untracked(8472) {
            assert!(nft.ensure_chain(&chain).unwrap());
            assert!(!nft.ensure_chain(&chain).unwrap());
        }
        let shown = linux::netlink::in_netns(netns.as_fd(), || {
            Command::new("nft")
                .args(["list", "ruleset"])
                .output()
                .unwrap()
        });
        let shown = String::from_utf8(shown.unwrap().stdout).unwrap();
        for hook in ["prerouting", "output"] {
            let line = format!("type filter hook {hook} priority raw; policy accept;");
            assert!(shown.contains(&line), "{shown}");
        }
        assert_eq!(
            shown.matches("udp dport 8472 notrack").count(),
            2,
            "{shown}"
        );
    }
}
