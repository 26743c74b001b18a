//! The lab's bridge, a veth per node and the routes between the nodes' pod networks. Every link
//! carries the lab's name as its alias, which is what proves that it is ours to remove.

use super::layout::{Family, Layout};
use crate::command::{command, stdout};
use anyhow::{Context, Result, bail};
use std::fs;
use std::net::IpAddr;
use std::path::Path;

/// Begins the alias of every link of a lab.
pub const ALIAS_PREFIX: &str = "ferrule-lab:";

fn ip(args: &[&str]) -> Result<String> {
    stdout(&mut command("ip", args))
}

fn ip_in(holder: i32, args: &[&str]) -> Result<String> {
    let target = holder.to_string();
    let mut nsenter = command("nsenter", &["--target", &target, "--net", "--", "ip"]);
    stdout(nsenter.args(args))
}

fn alias(layout: &Layout) -> String {
    format!("{ALIAS_PREFIX}{}", layout.name)
}

/// Whose lab a link of our own network namespace belongs to; `None` when it is nobody's.
#[must_use]
pub fn owner_of(link: &str) -> Option<String> {
    let alias = fs::read_to_string(format!("/sys/class/net/{link}/ifalias")).ok()?;
    alias.trim().strip_prefix(ALIAS_PREFIX).map(str::to_owned)
}

/// Links of our own network namespace that belong to some lab, with the lab's name.
#[must_use]
pub fn lab_links() -> Vec<(String, String)> {
    let Ok(entries) = fs::read_dir("/sys/class/net") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter_map(|link| owner_of(&link).map(|lab| (link, lab)))
        .collect()
}

fn exists(link: &str) -> bool {
    Path::new("/sys/class/net").join(link).exists()
}

/// Marks a link as the lab's. Refuses to touch one of the same name that another lab made; one
/// without a mark was made by an `up` that was killed right after.
fn claim(layout: &Layout, link: &str) -> Result<()> {
    match owner_of(link) {
        Some(lab) if lab == layout.name => Ok(()),
        Some(lab) => bail!(
            "link {link} belongs to lab {lab}, not to lab {}",
            layout.name
        ),
        None => ip(&["link", "set", "dev", link, "alias", &alias(layout)]).map(drop),
    }
}

/// Makes the bridge with the control plane's address.
///
/// # Errors
/// When a link of that name is somebody else's or the kernel refuses.
pub fn ensure_bridge(layout: &Layout, family: Family) -> Result<()> {
    let bridge = layout.bridge();
    if !exists(&bridge) {
        ip(&["link", "add", "name", &bridge, "type", "bridge"])?;
    }
    claim(layout, &bridge)?;
    let address = format!("{}/24", layout.control_address());
    ip(&["address", "replace", &address, "dev", &bridge])?;
    if family == Family::Dual {
        let address = format!("{}/64", layout.control_address6());
        // Nobody else has it: it works at once.
        ip(&["address", "replace", &address, "dev", &bridge, "nodad"])?;
    }
    ip(&["link", "set", "dev", &bridge, "up"])?;
    Ok(())
}

/// Joins a node's network namespace to the bridge.
///
/// # Errors
/// When a link of that name is somebody else's or the kernel refuses.
pub fn ensure_node(layout: &Layout, number: usize, holder: i32, family: Family) -> Result<()> {
    let veth = layout.veth(number);
    if !exists(&veth) {
        let pid = holder.to_string();
        let peer = ["type", "veth", "peer", "name", "eth0", "netns", &pid];
        let mut args = vec!["link", "add", "name", &veth];
        args.extend(peer);
        ip(&args)?;
    }
    claim(layout, &veth)?;
    ip(&[
        "link",
        "set",
        "dev",
        &veth,
        "master",
        &layout.bridge(),
        "up",
    ])?;
    let address = format!("{}/24", layout.node_address(number));
    ip_in(holder, &["address", "replace", &address, "dev", "eth0"])?;
    ip_in(holder, &["link", "set", "dev", "lo", "up"])?;
    ip_in(holder, &["link", "set", "dev", "eth0", "up"])?;
    let gateway = layout.control_address().to_string();
    ip_in(holder, &["route", "replace", "default", "via", &gateway])?;
    if family == Family::Dual {
        let address = format!("{}/64", layout.node_address6(number));
        ip_in(
            holder,
            &["address", "replace", &address, "dev", "eth0", "nodad"],
        )?;
        let gateway = layout.control_address6().to_string();
        ip_in(
            holder,
            &["-6", "route", "replace", "default", "via", &gateway],
        )?;
    }
    Ok(())
}

/// A node's place in the network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Site {
    /// The process that holds its namespaces.
    pub holder: i32,
    /// Its address on the bridge, of the family of `pod_network`.
    pub address: IpAddr,
    /// A network of its pods.
    pub pod_network: String,
}

/// Makes every node's pods reachable from the control plane and, if `between` says so, from every
/// other node.
///
/// # Errors
/// When the kernel refuses a route.
pub fn ensure_routes(layout: &Layout, sites: &[Site], between: bool) -> Result<()> {
    for site in sites {
        let via = site.address.to_string();
        let route = ["route", "replace", site.pod_network.as_str(), "via", &via];
        let mut ours = route.to_vec();
        let bridge = layout.bridge();
        ours.extend(["dev", bridge.as_str()]);
        ip(&ours)?;
        let others = sites.iter().filter(|other| {
            between
                && other.holder != site.holder
                && other.address.is_ipv4() == site.address.is_ipv4()
        });
        for other in others {
            ip_in(other.holder, &route)
                .with_context(|| format!("route from {} to {via}", other.address))?;
        }
    }
    Ok(())
}

/// Removes a node's link and the routes that lead to its pods, ours and those of the nodes held
/// by `others`; "already gone" is success.
///
/// # Errors
/// When the link is another lab's or the kernel refuses.
pub fn remove_node(layout: &Layout, number: usize, others: &[i32]) -> Result<()> {
    let address = layout.node_address(number).to_string();
    let address6 = layout.node_address6(number).to_string();
    let flush = ["route", "flush", "via", &address];
    let flush6 = ["-6", "route", "flush", "via", &address6];
    for flush in [&flush[..], &flush6] {
        ip(flush)?;
        for holder in others {
            ip_in(*holder, flush)?;
        }
    }
    let link = layout.veth(number);
    match owner_of(&link) {
        Some(lab) if lab == layout.name => {}
        Some(lab) => bail!("link {link} belongs to lab {lab}"),
        None => return Ok(()),
    }
    match ip(&["link", "delete", "dev", &link]) {
        Err(error) if exists(&link) => Err(error),
        _ => Ok(()),
    }
}

/// Removes every link of the lab; "already gone" is success.
///
/// # Errors
/// When the kernel refuses.
pub fn remove(layout: &Layout) -> Result<()> {
    let mut links: Vec<String> = lab_links()
        .into_iter()
        .filter(|(_, lab)| *lab == layout.name)
        .map(|(link, _)| link)
        .collect();
    // The bridge last, so that an interrupted removal is still recognised as a lab.
    links.sort_by_key(|link| *link == layout.bridge());
    for link in links {
        if let Err(error) = ip(&["link", "delete", "dev", &link])
            && exists(&link)
        {
            return Err(error);
        }
    }
    Ok(())
}
