//! The keys of containernetworking's `tuning`: parameters of the container's network and of its
//! interface.
//!
//! `sysctl` may name entries below `net.` only, with `IFNAME` for the interface; the
//! administrator's `/etc/cni/tuning/allowlist.conf` restricts them further, one pattern a line.
//! Nothing has to be put back on DEL: what is tuned here dies with the interface and namespace.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

use linux::netlink::{Change, Link};
use linux::sysctl::{Sysctl, SysctlError};
use serde_json::Value;

use crate::keys::{self, Object};
use crate::types::{CniError, ErrorCode};

/// Where the administrator says which parameters may be set; without it, all below `net.` may.
pub const ALLOWLIST: &str = "/etc/cni/tuning/allowlist.conf";

/// What is to be set.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tuning {
    /// Kernel parameters, `IFNAME` not yet filled in.
    pub sysctl: BTreeMap<String, String>,
    /// Promiscuous mode of the interface.
    pub promiscuous: bool,
    /// Its all-multicast mode, if it is to be set.
    pub all_multicast: Option<bool>,
    /// Its transmit queue, in packets.
    pub transmit_queue: Option<u32>,
}

impl Tuning {
    /// Reads a configuration; `args.cni` comes before its own keys. `mac` and `mtu` are read by
    /// who makes the interface.
    ///
    /// # Errors
    /// Code 7 naming the key.
    pub fn parse(conf: &Object) -> Result<Self, CniError> {
        let mut tuning = Self::default();
        tuning.read(conf)?;
        if let Some(Value::Object(args)) = keys::at(conf, &["args", "cni"]) {
            tuning.read(args).map_err(keys::within("args.cni"))?;
        }
        for name in tuning.sysctl.keys() {
            let path = name.replace('.', "/");
            if !path.starts_with("net/") || Sysctl::parse(name).is_err() {
                let problem = format!("holds {name:?}, which is not a parameter below net.");
                return Err(keys::invalid("sysctl", problem));
            }
        }
        Ok(tuning)
    }

    fn read(&mut self, object: &Object) -> Result<(), CniError> {
        for (name, value) in keys::object(object, "sysctl")?.into_iter().flatten() {
            let Value::String(value) = value else {
                let key = format!("sysctl.{name}");
                return Err(keys::invalid(&key, format!("is {value}, not a string")));
            };
            self.sysctl.insert(name.clone(), value.clone());
        }
        self.promiscuous = keys::flag(object, "promisc")?.unwrap_or(self.promiscuous);
        self.all_multicast = keys::flag(object, "allmulti")?.or(self.all_multicast);
        let most = u64::from(u32::MAX >> 1);
        let queue = keys::number(object, "txQLen", 0..=most)?;
        self.transmit_queue = queue.map(|packets| packets as u32).or(self.transmit_queue);
        Ok(())
    }

    /// Whether the administrator's list lets all parameters be set.
    ///
    /// # Errors
    /// Code 7 naming the parameter that may not, 5 when the list cannot be read.
    pub fn allowed_by(&self, list: &Path) -> Result<(), CniError> {
        if self.sysctl.is_empty() {
            return Ok(());
        }
        let text = match fs::read_to_string(list) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => {
                let msg = format!("read {}", list.display());
                return Err(CniError::caused(ErrorCode::Io, msg, &e));
            }
        };
        let patterns = text.lines().map(str::trim).filter(|line| !line.is_empty());
        let patterns: Vec<&str> = patterns.collect();
        for name in self.sysctl.keys() {
            if !patterns.iter().any(|pattern| matches(pattern, name)) {
                let problem = format!("holds {name:?}, which {} does not allow", list.display());
                return Err(keys::invalid("sysctl", problem));
            }
        }
        Ok(())
    }

    /// What is to be changed on the container's interface.
    #[must_use]
    pub fn changes(&self, index: u32) -> Vec<Change> {
        let mut changes = Vec::new();
        if self.promiscuous {
            changes.push(Change::SetPromiscuous { index, on: true });
        }
        if let Some(on) = self.all_multicast {
            changes.push(Change::SetAllMulticast { index, on });
        }
        if let Some(packets) = self.transmit_queue {
            changes.push(Change::SetTransmitQueue { index, packets });
        }
        changes
    }

    /// Kernel parameters with the interface's name filled in.
    ///
    /// # Errors
    /// When the name makes a bad one.
    pub fn parameters(&self, ifname: &str) -> Result<Vec<(Sysctl, String)>, SysctlError> {
        let all = self.sysctl.iter();
        all.map(|(name, value)| {
            // An interface name may hold dots: parts are split before it is filled in.
            let separator = if name.contains('/') { '/' } else { '.' };
            let parts: Vec<String> = name
                .split(separator)
                .map(|part| part.replacen("IFNAME", ifname, 1))
                .collect();
            let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
            Ok((Sysctl::of(&parts)?, value.clone()))
        })
        .collect()
    }

    /// The first difference from what is set, in words. To be called in the container's namespace.
    #[must_use]
    pub fn difference(&self, link: &Link) -> Option<String> {
        if self.promiscuous && !link.promiscuous {
            return Some(format!("interface {} is not promiscuous", link.name));
        }
        if self
            .all_multicast
            .is_some_and(|on| on != link.all_multicast)
        {
            let msg = "has another all-multicast mode than configured";
            return Some(format!("interface {} {msg}", link.name));
        }
        if let Some(wanted) = self.transmit_queue
            && wanted != link.transmit_queue
        {
            let (name, found) = (&link.name, link.transmit_queue);
            return Some(format!(
                "interface {name} queues {found} packets, not {wanted}"
            ));
        }
        let parameters = match self.parameters(&link.name) {
            Ok(parameters) => parameters,
            Err(error) => return Some(error.to_string()),
        };
        for (parameter, wanted) in parameters {
            match parameter.read() {
                Ok(found) if same_value(&found, &wanted) => {}
                Ok(found) => return Some(format!("{parameter} is {found:?}, not {wanted:?}")),
                Err(error) => return Some(error.to_string()),
            }
        }
        None
    }
}

/// The kernel prints lists with tabs, however they were written.
fn same_value(found: &str, wanted: &str) -> bool {
    found.split_whitespace().eq(wanted.split_whitespace())
}

/// Whether a pattern is found anywhere in a text. Patterns are regular expressions of the simple
/// kind that such lists hold: literals, `.`, `*`, `+`, `?`, `[a-z]`, `\x`, `^`, `$`. One that is
/// not understood matches nothing: it allows nothing.
fn matches(pattern: &str, text: &str) -> bool {
    let Some(atoms) = atoms(pattern) else {
        return false;
    };
    let text: Vec<char> = text.chars().collect();
    let anchored = pattern.starts_with('^');
    let starts = if anchored { 0..=0 } else { 0..=text.len() };
    starts.into_iter().any(|at| here(&atoms, &text[at..]))
}

#[derive(Debug)]
struct Atom {
    kind: AtomKind,
    least: usize,
    most: usize,
}

#[derive(Debug)]
enum AtomKind {
    Any,
    One(char),
    Class(bool, Vec<(char, char)>),
    End,
}

fn atoms(pattern: &str) -> Option<Vec<Atom>> {
    let mut chars = pattern
        .strip_prefix('^')
        .unwrap_or(pattern)
        .chars()
        .peekable();
    let mut atoms: Vec<Atom> = Vec::new();
    while let Some(c) = chars.next() {
        let kind = match c {
            '.' => AtomKind::Any,
            '$' if chars.peek().is_none() => AtomKind::End,
            '\\' => AtomKind::One(chars.next().filter(|c| !c.is_alphanumeric())?),
            '[' => class(&mut chars)?,
            '*' | '+' | '?' => {
                let last = atoms.last_mut()?;
                (last.least, last.most) = match c {
                    '*' => (0, usize::MAX),
                    '+' => (1, usize::MAX),
                    _ => (0, 1),
                };
                continue;
            }
            '(' | ')' | '|' | '{' | '}' | ']' | '$' | '^' => return None,
            c => AtomKind::One(c),
        };
        let (least, most) = (1, 1);
        atoms.push(Atom { kind, least, most });
    }
    Some(atoms)
}

fn class(chars: &mut std::iter::Peekable<std::str::Chars<'_>>) -> Option<AtomKind> {
    let inverted = chars.next_if_eq(&'^').is_some();
    let mut ranges = Vec::new();
    loop {
        let low = match chars.next()? {
            ']' => return Some(AtomKind::Class(inverted, ranges)),
            '\\' => chars.next()?,
            c => c,
        };
        let high = match chars.next_if_eq(&'-') {
            Some(_) if chars.peek() != Some(&']') => chars.next()?,
            Some(_) => {
                ranges.push(('-', '-'));
                low
            }
            None => low,
        };
        ranges.push((low, high));
    }
}

impl AtomKind {
    fn takes(&self, c: char) -> bool {
        match self {
            Self::Any => true,
            Self::One(one) => *one == c,
            Self::Class(inverted, ranges) => {
                ranges.iter().any(|(low, high)| (*low..=*high).contains(&c)) != *inverted
            }
            Self::End => false,
        }
    }
}

fn here(atoms: &[Atom], text: &[char]) -> bool {
    let Some((atom, rest)) = atoms.split_first() else {
        return true;
    };
    if matches!(atom.kind, AtomKind::End) {
        return text.is_empty();
    }
    let taken = text.iter().take_while(|c| atom.kind.takes(**c)).count();
    let most = taken.min(atom.most);
    (atom.least..=most).rev().any(|n| here(rest, &text[n..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(conf: &str) -> Result<Tuning, String> {
        let conf: Object = serde_json::from_str(conf).unwrap();
        Tuning::parse(&conf).map_err(|e| format!("{} {}", e.code.number(), e.msg))
    }

    #[test]
    fn args_come_before_the_configuration() {
        let tuning = parse(
            r#"{"sysctl":{"net.core.somaxconn":"500","net.ipv4.conf.IFNAME.log_martians":"1"},
                "txQLen":10,"args":{"cni":{"sysctl":{"net.core.somaxconn":"600"},"allmulti":true}}}"#,
        )
        .unwrap();
        assert_eq!(tuning.sysctl["net.core.somaxconn"], "600");
        assert_eq!(
            (tuning.all_multicast, tuning.transmit_queue),
            (Some(true), Some(10))
        );
        let names = tuning.parameters("eth0.5").unwrap();
        assert_eq!(names[1].0.to_string(), "net/ipv4/conf/eth0.5/log_martians");
    }

    #[test]
    fn parameters_outside_net_are_refused_by_name() {
        for name in ["kernel.hostname", "net/../kernel/x", "network.x", "net"] {
            let error = parse(&format!(r#"{{"sysctl":{{"{name}":"1"}}}}"#)).unwrap_err();
            assert!(error.starts_with("7 sysctl holds"), "{error}");
        }
        let error = parse(r#"{"sysctl":{"net.x":1}}"#).unwrap_err();
        assert_eq!(error, "7 sysctl.net.x is 1, not a string");
        let error = parse(r#"{"args":{"cni":{"txQLen":"x"}}}"#).unwrap_err();
        assert!(error.starts_with("7 args.cni.txQLen is"), "{error}");
    }

    #[test]
    fn the_administrators_list_decides() {
        let dir = std::env::temp_dir();
        let list = dir.join(format!("ferrule-allowlist-{}", std::process::id()));
        let tuning = parse(r#"{"sysctl":{"net.core.somaxconn":"500"}}"#).unwrap();
        tuning.allowed_by(&list).unwrap();
        fs::write(&list, "\n^net\\.ipv4\\..*$\n").unwrap();
        let error = tuning.allowed_by(&list).unwrap_err();
        assert!(error.msg.contains("does not allow"), "{error}");
        fs::write(&list, "^net\\.core\\.somax[a-z]+$\n").unwrap();
        tuning.allowed_by(&list).unwrap();
        fs::remove_file(&list).unwrap();
    }

    #[test]
    fn patterns_mean_what_they_mean_to_others() {
        for (pattern, text, expected) in [
            ("net", "a.net.b", true),
            ("^net", "a.net", false),
            ("b$", "a.net.b", true),
            ("n.t", "net", true),
            ("ne*t", "nt", true),
            ("ne+t", "nt", false),
            ("x?net", "net", true),
            ("[^a-c]$", "abc", false),
            ("a\\.b", "axb", false),
            ("(net)", "net", false),
            ("*", "*", false),
            ("", "anything", true),
        ] {
            assert_eq!(matches(pattern, text), expected, "{pattern} in {text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_pattern_makes_the_matcher_panic(pattern in ".{0,12}", text in "[a-z.]{0,12}") {
            let _ = matches(&pattern, &text);
        }
    }
}
