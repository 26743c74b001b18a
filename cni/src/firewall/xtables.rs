//! Masquerade, host ports and admission by the `iptables` programs, where a key asks for them.
//!
//! Each change is one run of `iptables-restore --noflush`, which waits for the xtables lock for
//! as long as [`LOCK_SECONDS`]. Chains are ours by name; a jump from a chain of others is added
//! when `iptables -C` does not find it. Nothing is listed or parsed.
//!
//! ```text
//! nat     POSTROUTING ─▶ FERRULE-M-<network>             static: masquerade
//!         POSTROUTING ─▶ FERRULE-MARKED                  static: masquerade what is marked
//!         PREROUTING, OUTPUT ─▶ FERRULE-P-<network>      static: jumps, one per pod
//!                                 └▶ FERRULE-<attachment>  a pod's ports
//! filter  FORWARD ─▶ FERRULE-FORWARD ─▶ <admin chain>    then two rules per admitted address
//! ```

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use linux::command::ShortCommand;

use super::{Forward, HostPorts, short_hash};
use crate::ipam::Owner;
use crate::types::{CniError, ErrorCode};

/// Others hold the lock for a while on nodes with many rules.
const LOCK_SECONDS: u32 = 30;
const TIME_LIMIT: Duration = Duration::from_secs(LOCK_SECONDS as u64 + 15);
const MAX_OUTPUT_BYTES: usize = 64 << 10;

/// Rules for one family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    V4,
    V6,
}

impl Family {
    const BOTH: [Self; 2] = [Self::V4, Self::V6];

    fn has(self, address: IpAddr) -> bool {
        address.is_ipv4() == (self == Self::V4)
    }

    fn program(self, suffix: &str) -> Result<PathBuf, CniError> {
        let name = match self {
            Self::V4 => format!("iptables{suffix}"),
            Self::V6 => format!("ip6tables{suffix}"),
        };
        // The path of a plugin's environment is the runtime's and may be anything.
        let dirs = ["/usr/sbin", "/sbin", "/usr/bin", "/bin", "/usr/local/sbin"];
        let found = dirs.iter().map(|dir| PathBuf::from(dir).join(&name));
        found
            .into_iter()
            .find(|path| path.is_file())
            .ok_or_else(|| {
                let msg =
                    format!("the iptables backend needs {name}, which is in none of {dirs:?}");
                CniError::new(ErrorCode::Kernel, msg)
            })
    }
}

fn run(program: PathBuf, args: &[&str], stdin: String) -> Result<Result<(), String>, CniError> {
    let shown = program.display().to_string();
    let command = ShortCommand {
        program,
        args: args.iter().map(Into::into).collect(),
        env: vec![("PATH".into(), "/usr/sbin:/sbin:/usr/bin:/bin".into())],
        stdin: stdin.into_bytes(),
        max_output_bytes: MAX_OUTPUT_BYTES,
        time_limit: TIME_LIMIT,
    };
    let output = command
        .run()
        .map_err(|e| CniError::caused(ErrorCode::Kernel, format!("run {shown}"), &e))?;
    if output.status.success() {
        return Ok(Ok(()));
    }
    let said = String::from_utf8_lossy(&output.stderr[..output.stderr.len().min(2048)]);
    Ok(Err(format!("{shown}: {}", said.trim())))
}

fn restore(family: Family, rules: String) -> Result<(), CniError> {
    let wait = LOCK_SECONDS.to_string();
    let args = ["--noflush", "--wait", &wait];
    let outcome = run(family.program("-restore")?, &args, rules)?;
    outcome.map_err(|said| CniError {
        code: ErrorCode::Kernel,
        msg: "change the rules of iptables".into(),
        details: said,
    })
}

/// Whether a rule is in a chain.
fn has(family: Family, table: &str, chain: &str, rule: &[&str]) -> Result<bool, CniError> {
    let wait = LOCK_SECONDS.to_string();
    let mut args = vec!["--wait", &wait, "-t", table, "-C", chain];
    args.extend(rule);
    Ok(run(family.program("")?, &args, String::new())?.is_ok())
}

fn chain_is_there(family: Family, table: &str, chain: &str) -> Result<bool, CniError> {
    let wait = LOCK_SECONDS.to_string();
    let args = ["--wait", &wait, "-t", table, "-n", "-L", chain, "1"];
    Ok(run(family.program("")?, &args, String::new())?.is_ok())
}

/// iptables takes names of 28 bytes at most.
fn network_chain(kind: &str, network: &str) -> String {
    format!("FERRULE-{kind}-{:08x}", short_hash(network.as_bytes()))
}

fn pod_chain(network: &str, owner: &Owner) -> String {
    let name = crate::attach::names::host_name(network, owner);
    format!("FERRULE-{}", &name[2..])
}

const MARKED: &str = "FERRULE-MARKED";
const FORWARD: &str = "FERRULE-FORWARD";

/// Lets a network out under the node's address.
///
/// # Errors
/// Code 100 with what iptables said.
pub fn ensure_masquerade(
    network: &str,
    subnets: &[IpNet],
    except: &[IpNet],
) -> Result<(), CniError> {
    let chain = network_chain("M", network);
    for family in Family::BOTH {
        let ours = |nets: &[IpNet]| -> Vec<IpNet> {
            let nets = nets.iter().filter(|net| family.has(net.addr()));
            nets.copied().collect()
        };
        let (subnets, except) = (ours(subnets), ours(except));
        if subnets.is_empty() {
            continue;
        }
        let jump = ["-j", chain.as_str()];
        let mut rules = format!("*nat\n:{chain} - [0:0]\n");
        for net in subnets.iter().chain(&except) {
            rules.push_str(&format!("-A {chain} -d {net} -j RETURN\n"));
        }
        let multicast = if family == Family::V4 {
            "224.0.0.0/4"
        } else {
            "ff00::/8"
        };
        rules.push_str(&format!("-A {chain} -d {multicast} -j RETURN\n"));
        for net in &subnets {
            let rule = masquerade_rule(net, &except).join(" ");
            rules.push_str(&format!("-A {chain} {rule}\n"));
        }
        if !has(family, "nat", "POSTROUTING", &jump)? {
            rules.push_str(&format!("-A POSTROUTING -j {chain}\n"));
        } else if masquerade_is_whole(family, &chain, subnets.last(), &except)? {
            continue;
        }
        restore(family, rules + "COMMIT\n")?;
    }
    Ok(())
}

/// The rule of one subnet. Its comment tells which destinations the rules before it except.
fn masquerade_rule(subnet: &IpNet, except: &[IpNet]) -> [String; 8] {
    let except = short_hash(format!("{except:?}").as_bytes());
    let (subnet, except) = (subnet.to_string(), format!("except-{except:08x}"));
    [
        "-s",
        &subnet,
        "-m",
        "comment",
        "--comment",
        &except,
        "-j",
        "MASQUERADE",
    ]
    .map(str::to_owned)
}

/// Rules are written together: when the last one is there, all are.
fn masquerade_is_whole(
    family: Family,
    chain: &str,
    last: Option<&IpNet>,
    except: &[IpNet],
) -> Result<bool, CniError> {
    let Some(last) = last else { return Ok(true) };
    let rule = masquerade_rule(last, except);
    has(family, "nat", chain, &rule.each_ref().map(String::as_str))
}

/// Whether [`ensure_masquerade`] would have nothing to do.
///
/// # Errors
/// Code 100 when iptables cannot be run.
pub fn masquerade_is_there(
    network: &str,
    subnets: &[IpNet],
    except: &[IpNet],
) -> Result<bool, CniError> {
    let chain = network_chain("M", network);
    for family in Family::BOTH {
        let ours = |net: &&IpNet| family.has(net.addr());
        let last = subnets.iter().rev().find(ours);
        let except: Vec<IpNet> = except.iter().filter(ours).copied().collect();
        if last.is_some()
            && !(has(family, "nat", "POSTROUTING", &["-j", &chain])?
                && masquerade_is_whole(family, &chain, last, &except)?)
        {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Takes away a network's static chains; none there is success.
///
/// # Errors
/// Code 100 with what iptables said; repeat then.
pub fn remove_network(network: &str) -> Result<(), CniError> {
    for family in Family::BOTH {
        if family.program("").is_err() {
            continue;
        }
        for (kind, from) in [
            ("M", &["POSTROUTING"][..]),
            ("P", &["PREROUTING", "OUTPUT"][..]),
        ] {
            let chain = network_chain(kind, network);
            if !chain_is_there(family, "nat", &chain)? {
                continue;
            }
            let mut rules = String::from("*nat\n");
            let local = ["-m", "addrtype", "--dst-type", "LOCAL"];
            for from in from {
                let mut jump: Vec<&str> = if kind == "P" { local.to_vec() } else { vec![] };
                jump.extend(["-j", &chain]);
                if has(family, "nat", from, &jump)? {
                    rules.push_str(&format!("-D {from} {}\n", jump.join(" ")));
                }
            }
            rules.push_str(&format!("-F {chain}\n-X {chain}\nCOMMIT\n"));
            restore(family, rules)?;
        }
    }
    Ok(())
}

/// Leads an owner's host ports to its addresses.
///
/// # Errors
/// Code 100 with what iptables said; [`remove_forwards`] undoes what was done.
pub fn add_forwards(
    network: &str,
    owner: &Owner,
    ports: &HostPorts,
    forwards: &[Forward],
    subnets: &[IpNet],
) -> Result<(), CniError> {
    let (entry, pod) = (network_chain("P", network), pod_chain(network, owner));
    for family in Family::BOTH {
        let forwards: Vec<&Forward> = forwards.iter().filter(|f| family.has(f.to)).collect();
        if forwards.is_empty() {
            continue;
        }
        let mut rules = format!("*nat\n:{pod} - [0:0]\n");
        if !chain_is_there(family, "nat", &entry)? {
            rules.push_str(&format!(":{entry} - [0:0]\n"));
        }
        let set_mark = mark_target(family, ports, &mut rules)?;
        for from in ["PREROUTING", "OUTPUT"] {
            let jump = ["-m", "addrtype", "--dst-type", "LOCAL", "-j", &entry];
            if !has(family, "nat", from, &jump)? {
                rules.push_str(&format!("-A {from} {}\n", jump.join(" ")));
            }
        }
        let conditions = match family {
            Family::V4 => ports.conditions_v4.join(" "),
            Family::V6 => ports.conditions_v6.join(" "),
        };
        if !has_jump(family, &entry, &conditions, &pod)? {
            rules.push_str(&format!("-A {entry} {conditions} -j {pod}\n"));
        }
        for forward in forwards {
            let lines = pod_rules(family, &pod, ports, forward, subnets, set_mark.as_deref());
            rules.push_str(&lines);
        }
        restore(family, rules + "COMMIT\n")?;
    }
    Ok(())
}

fn has_jump(family: Family, entry: &str, conditions: &str, pod: &str) -> Result<bool, CniError> {
    let mut jump: Vec<&str> = conditions.split_whitespace().collect();
    jump.extend(["-j", pod]);
    has(family, "nat", entry, &jump)
}

/// What sets the mark, if anything; adds the rules that act on it when they are not there.
fn mark_target(
    family: Family,
    ports: &HostPorts,
    rules: &mut String,
) -> Result<Option<String>, CniError> {
    if !ports.snat {
        return Ok(None);
    }
    if let Some(chain) = &ports.external_mark_chain {
        return Ok(Some(chain.clone()));
    }
    let mark = format!("{0:#x}/{0:#x}", ports.mark);
    let marked = ["-m", "mark", "--mark", &mark, "-j", MARKED];
    if !has(family, "nat", "POSTROUTING", &marked)? {
        rules.push_str(&format!(":{MARKED} - [0:0]\n"));
        rules.push_str(&format!("-A {MARKED} -j MASQUERADE\n"));
        // Before the masquerade chains of networks, which let local destinations alone.
        rules.push_str(&format!("-I POSTROUTING 1 {}\n", marked.join(" ")));
    }
    Ok(Some(format!("MARK --set-xmark {mark}")))
}

fn pod_rules(
    family: Family,
    pod: &str,
    ports: &HostPorts,
    forward: &Forward,
    subnets: &[IpNet],
    set_mark: Option<&str>,
) -> String {
    let protocol = match forward.protocol {
        6 => "tcp",
        17 => "udp",
        _ => "sctp",
    };
    let to_ip = forward.host_ip.map(|ip| format!(" -d {ip}"));
    let matching = format!(
        "-A {pod} -p {protocol}{} --dport {}",
        to_ip.unwrap_or_default(),
        forward.host_port
    );
    let mut lines = String::new();
    if let Some(target) = set_mark {
        let mut sources: Vec<String> = Vec::new();
        if ports.masquerade_all {
            sources.push(String::new());
        } else {
            let own = subnets.iter().filter(|net| family.has(net.addr()));
            sources.extend(own.map(|net| format!(" -s {net}")));
            if family == Family::V4 {
                sources.push(" -s 127.0.0.0/8".into());
            }
        }
        for source in sources {
            lines.push_str(&format!("{matching}{source} -j {target}\n"));
        }
    }
    let to = match forward.to {
        IpAddr::V4(v4) => format!("{v4}:{}", forward.to_port),
        IpAddr::V6(v6) => format!("[{v6}]:{}", forward.to_port),
    };
    lines + &format!("{matching} -j DNAT --to-destination {to}\n")
}

/// Takes away an owner's host ports; none there is success.
///
/// # Errors
/// Code 100 with what iptables said; repeat then.
pub fn remove_forwards(network: &str, owner: &Owner, ports: &HostPorts) -> Result<(), CniError> {
    let (entry, pod) = (network_chain("P", network), pod_chain(network, owner));
    for family in Family::BOTH {
        if family.program("").is_err() || !chain_is_there(family, "nat", &pod)? {
            continue;
        }
        let conditions = match family {
            Family::V4 => ports.conditions_v4.join(" "),
            Family::V6 => ports.conditions_v6.join(" "),
        };
        let mut rules = String::from("*nat\n");
        for conditions in [conditions.as_str(), ""] {
            if has_jump(family, &entry, conditions, &pod)? {
                rules.push_str(&format!("-D {entry} {conditions} -j {pod}\n"));
            }
            if conditions.is_empty() {
                break;
            }
        }
        restore(family, rules + &format!("-F {pod}\n-X {pod}\nCOMMIT\n"))?;
    }
    Ok(())
}

/// Whether an owner's host ports are there.
///
/// # Errors
/// Code 100 when iptables cannot be run.
pub fn forwards_are_there(
    network: &str,
    owner: &Owner,
    forwards: &[Forward],
) -> Result<bool, CniError> {
    let pod = pod_chain(network, owner);
    for family in Family::BOTH {
        let wanted = forwards.iter().any(|f| family.has(f.to));
        if wanted && !chain_is_there(family, "nat", &pod)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Lets packets from an address and answers to it through, whatever the policy of FORWARD is, as
/// containernetworking's `firewall` does. The administrator's chain is asked before.
///
/// # Errors
/// Code 100 with what iptables said.
pub fn admit(addresses: &[IpAddr], admin_chain: &str) -> Result<(), CniError> {
    for family in Family::BOTH {
        let own: Vec<&IpAddr> = addresses.iter().filter(|a| family.has(**a)).collect();
        if own.is_empty() {
            continue;
        }
        let mut rules = String::from("*filter\n");
        for chain in [FORWARD, admin_chain] {
            if !chain_is_there(family, "filter", chain)? {
                rules.push_str(&format!(":{chain} - [0:0]\n"));
            }
        }
        for (from, to) in [("FORWARD", FORWARD), (FORWARD, admin_chain)] {
            if !has(family, "filter", from, &["-j", to])? {
                rules.push_str(&format!("-I {from} 1 -j {to}\n"));
            }
        }
        for address in own {
            for rule in admission(address) {
                let words: Vec<&str> = rule.split(' ').collect();
                if !has(family, "filter", FORWARD, &words)? {
                    rules.push_str(&format!("-A {FORWARD} {rule}\n"));
                }
            }
        }
        if rules != "*filter\n" {
            restore(family, rules + "COMMIT\n")?;
        }
    }
    Ok(())
}

fn admission(address: &IpAddr) -> [String; 2] {
    let bits = if address.is_ipv4() { 32 } else { 128 };
    [
        format!("-d {address}/{bits} -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"),
        format!("-s {address}/{bits} -j ACCEPT"),
    ]
}

/// Undoes [`admit`] for these addresses; not admitted is success.
///
/// # Errors
/// Code 100 with what iptables said; repeat then.
pub fn expel(addresses: &[IpAddr]) -> Result<(), CniError> {
    for family in Family::BOTH {
        let own: Vec<&IpAddr> = addresses.iter().filter(|a| family.has(**a)).collect();
        if own.is_empty() || family.program("").is_err() {
            continue;
        }
        let mut rules = String::from("*filter\n");
        for address in own {
            for rule in admission(address) {
                let words: Vec<&str> = rule.split(' ').collect();
                if has(family, "filter", FORWARD, &words)? {
                    rules.push_str(&format!("-D {FORWARD} {rule}\n"));
                }
            }
        }
        if rules != "*filter\n" {
            restore(family, rules + "COMMIT\n")?;
        }
    }
    Ok(())
}

/// Whether these addresses are admitted.
///
/// # Errors
/// Code 100 when iptables cannot be run.
pub fn are_admitted(addresses: &[IpAddr]) -> Result<bool, CniError> {
    for family in Family::BOTH {
        for address in addresses.iter().filter(|a| family.has(**a)) {
            for rule in admission(address) {
                let words: Vec<&str> = rule.split(' ').collect();
                if !has(family, "filter", FORWARD, &words)? {
                    return Ok(false);
                }
            }
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_iptables() {
        let owner = Owner {
            container_id: "c".repeat(64),
            ifname: "eth0".into(),
        };
        for name in [
            network_chain("M", "a-network"),
            pod_chain("a-network", &owner),
        ] {
            assert!(name.len() <= 28, "{name}");
        }
    }

    #[test]
    fn a_ports_rules_mark_before_they_translate() {
        let conf = serde_json::from_str(r#"{"backend":"iptables"}"#).unwrap();
        let ports = HostPorts::parse(&conf).unwrap();
        let forward = Forward {
            host_ip: Some("192.0.2.1".parse().unwrap()),
            protocol: 17,
            host_port: 53,
            to: "10.1.0.2".parse().unwrap(),
            to_port: 5353,
        };
        let subnets = ["10.1.0.0/24".parse().unwrap(), "fd00::/64".parse().unwrap()];
        let rules = pod_rules(Family::V4, "P", &ports, &forward, &subnets, Some("MARK"));
        assert_eq!(
            rules,
            "-A P -p udp -d 192.0.2.1 --dport 53 -s 10.1.0.0/24 -j MARK\n\
             -A P -p udp -d 192.0.2.1 --dport 53 -s 127.0.0.0/8 -j MARK\n\
             -A P -p udp -d 192.0.2.1 --dport 53 -j DNAT --to-destination 10.1.0.2:5353\n"
        );
    }
}
