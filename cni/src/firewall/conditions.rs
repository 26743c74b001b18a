//! `conditionsV4` and `conditionsV6` of host ports: `nft` matches, as people write them. We talk
//! to the kernel ourselves, so the words that make sense here are read here; others are refused
//! by name.
//!
//! ```text
//! [meta] iifname [!=] <name>      ip|ip6 saddr|daddr [!=] <address>[/<bits>]
//! meta mark [!=] <number>         tcp|udp|sctp dport [!=] <port>
//! ```

use std::net::IpAddr;

use ipnet::IpNet;
use linux::nft::{Expr, Family, Sense};

use super::prefix;
use crate::keys;
use crate::types::CniError;

/// Reads conditions: each item may be one word or many.
///
/// # Errors
/// Code 2 for a match that is not known here, 7 for a bad value; both name the key.
pub fn conditions(key: &str, items: &[String], family: Family) -> Result<Vec<Expr>, CniError> {
    let words: Vec<&str> = items.iter().flat_map(|i| i.split_whitespace()).collect();
    let mut words = words.into_iter().peekable();
    let mut exprs = Vec::new();
    while let Some(mut word) = words.next() {
        let mut next = || words.next().unwrap_or_default();
        if word == "meta" {
            word = next();
        }
        let field = match word {
            "iifname" => Field::InInterface,
            "mark" => Field::Mark,
            "ip" | "ip6" => {
                let of = if word == "ip" { Family::V4 } else { Family::V6 };
                if of != family {
                    let msg = format!("speaks of {word}, which never matches there");
                    return Err(keys::invalid(key, msg));
                }
                match next() {
                    "saddr" => Field::Source,
                    "daddr" => Field::Destination,
                    other => return Err(unknown(key, word, other)),
                }
            }
            "tcp" | "udp" | "sctp" => match next() {
                "dport" => Field::Port(match word {
                    "tcp" => 6,
                    "udp" => 17,
                    _ => 132,
                }),
                other => return Err(unknown(key, word, other)),
            },
            other => return Err(unknown(key, other, "")),
        };
        let mut value = words.next().unwrap_or_default();
        let mut sense = Sense::Is;
        if let "!=" | "==" = value {
            if value == "!=" {
                sense = Sense::Not;
            }
            value = words.next().unwrap_or_default();
        }
        exprs.extend(field.matching(key, sense, value)?);
    }
    Ok(exprs)
}

fn unknown(key: &str, first: &str, second: &str) -> CniError {
    let what = format!("{first} {second}");
    keys::unsupported(
        key,
        format!("holds the match {:?}, which is not known", what.trim()),
    )
}

#[derive(Clone, Copy)]
enum Field {
    InInterface,
    Mark,
    Source,
    Destination,
    Port(u8),
}

impl Field {
    fn matching(self, key: &str, sense: Sense, value: &str) -> Result<Vec<Expr>, CniError> {
        let bad = |what: &str| keys::invalid(key, format!("holds {value:?}, which is {what}"));
        match self {
            Self::InInterface => {
                let name = value.trim_matches('"');
                if name.is_empty() || name.len() > 15 || !name.is_ascii() {
                    return Err(bad("no interface name"));
                }
                Ok(vec![Expr::InInterface(sense, name.to_owned())])
            }
            Self::Mark => {
                let mark = match value.strip_prefix("0x") {
                    Some(hex) => u32::from_str_radix(hex, 16),
                    None => value.parse(),
                };
                let mark = mark.map_err(|_| bad("no mark"))?;
                Ok(vec![Expr::Mark(sense, u32::MAX, mark)])
            }
            Self::Source | Self::Destination => {
                let address = value.parse::<IpAddr>().map(IpNet::from);
                let net = value.parse::<IpNet>().or(address);
                let net = prefix(net.map_err(|_| bad("no network"))?);
                Ok(vec![match self {
                    Self::Source => Expr::Source(sense, net),
                    Self::Destination | Self::InInterface | Self::Mark | Self::Port(_) => {
                        Expr::Destination(sense, net)
                    }
                }])
            }
            Self::Port(protocol) => {
                let port = value.parse().map_err(|_| bad("no port"))?;
                Ok(vec![
                    Expr::Transport(Sense::Is, protocol),
                    Expr::DestinationPort(sense, port),
                ])
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(words: &[&str], expected: &str) {
        let items: Vec<String> = words.iter().map(|w| (*w).to_owned()).collect();
        let said = match conditions("conditionsV4", &items, Family::V4) {
            Ok(exprs) => format!("{exprs:?}"),
            Err(error) => format!("{} {}", error.code.number(), error.msg),
        };
        assert!(said.contains(expected), "{said}\n  lacks {expected}");
    }

    #[test]
    fn words_may_come_together_or_apart() {
        for words in [
            &["ip saddr != 10.0.0.0/8"][..],
            &["ip", "saddr", "!=", "10.0.0.0/8"],
        ] {
            check(words, "[Source(Not, Prefix { address: 10.0.0.0, len: 8 })]");
        }
        check(
            &["iifname", "\"eth0\"", "meta mark 0x10"],
            "[InInterface(Is, \"eth0\"), Mark(Is, 4294967295, 16)]",
        );
        check(&["ip daddr 192.0.2.1"], "len: 32");
        check(
            &["tcp dport 80"],
            "[Transport(Is, 6), DestinationPort(Is, 80)]",
        );
        check(&[], "[]");
    }

    #[test]
    fn what_is_not_known_is_refused_by_name() {
        check(&["ct state new"], "2 conditionsV4 holds the match \"ct\"");
        check(&["ip ttl 3"], "2 conditionsV4 holds the match \"ip ttl\"");
        check(&["ip saddr here"], "7 conditionsV4 holds \"here\"");
        check(&["ip6 saddr ::1"], "7 conditionsV4 speaks of ip6");
        check(&["ip saddr"], "7 conditionsV4");
    }

    proptest::proptest! {
        #[test]
        fn no_words_make_the_reader_panic(words: Vec<String>) {
            let _ = conditions("conditionsV4", &words, Family::V6);
        }
    }
}
