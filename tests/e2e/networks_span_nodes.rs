//! Pods of different nodes: their own addresses everywhere, and a network that mends itself where
//! its agents keep it (`cargo xtask up --network vxlan` or `hostgw`).

use anyhow::{Context, Result, ensure};
use std::time::Instant;
use testkit::cluster::{Lab, Network};
use testkit::process::until;
use testkit::scenario::{LIMIT, Scenario, script_pod, text};

/// A server on one node and a client on another, with the client's request.
struct Pair {
    scenario: Scenario,
    client_node: String,
    client_address: String,
    server_address: String,
}

impl Pair {
    /// `None` where there is one node only.
    fn set(scenario: Scenario) -> Result<Option<Self>> {
        let nodes = scenario.admin.json(&["get", "nodes"])?;
        let nodes = nodes["items"].as_array().cloned().unwrap_or_default();
        let [first, .., last] = nodes.as_slice() else {
            println!("skipped: the lab has one node");
            return Ok(None);
        };
        let pin = |node| format!("  nodeName: {}\n", text(node, "/metadata/name"));
        let server = r"mkdir -p /w/cgi-bin
            printf '#!/bin/sh\necho\necho $REMOTE_ADDR | tr -d []\n' > /w/cgi-bin/who
            chmod +x /w/cgi-bin/who && exec httpd -f -p 8080 -h /w";
        scenario.apply(&script_pod("server", server, &pin(last)))?;
        scenario.apply(&script_pod("client", "exec sleep 10000", &pin(first)))?;
        let server_address = text(&scenario.ready("server")?, "/status/podIP");
        let client = scenario.ready("client")?;
        Ok(Some(Self {
            client_node: text(first, "/metadata/name"),
            client_address: text(&client, "/status/podIP"),
            server_address,
            scenario,
        }))
    }

    /// The address the server sees.
    fn ask(&self) -> Result<String> {
        let ask = format!(
            r"printf 'GET /cgi-bin/who HTTP/1.0\r\n\r\n' | nc -w 1 {} 8080 | tail -n 1",
            self.server_address
        );
        let seen = self
            .scenario
            .kubectl(&["exec", "client", "--", "sh", "-c", &ask])?;
        let seen = seen.trim().trim_start_matches("::ffff:").to_owned();
        ensure!(!seen.is_empty(), "no answer");
        Ok(seen)
    }

    fn until_asked(&self) -> Result<String> {
        until("the server to answer", LIMIT, || Ok(()), || self.ask())
    }
}

#[test]
fn a_pod_sees_the_own_address_of_a_pod_on_another_node() -> Result<()> {
    let Some(pair) = Pair::set(Scenario::begin("own-address")?)? else {
        return Ok(());
    };
    let seen = pair.until_asked()?;
    ensure!(
        seen == pair.client_address,
        "the server saw {seen}, not {}",
        pair.client_address
    );
    Ok(())
}

#[test]
fn what_others_do_to_the_networks_devices_and_routes_is_mended() -> Result<()> {
    let scenario = Scenario::alone("mended")?;
    let network = Lab::open(&scenario.layout.name)?.state.network;
    let damage: &[&[&str]] = match network {
        Network::Bridge => {
            println!("skipped: no agent keeps the lab's network (up --network vxlan or hostgw)");
            return Ok(());
        }
        Network::Vxlan => &[
            &["ip", "link", "delete", "fvx.1"],
            &["ip", "neigh", "flush", "dev", "fvx.1", "nud", "permanent"],
            &["ip", "route", "flush", "proto", "140"],
        ],
        Network::Hostgw => &[&["ip", "route", "flush", "proto", "140"]],
    };
    let Some(pair) = Pair::set(scenario)? else {
        return Ok(());
    };
    pair.until_asked()?;
    let node = pair.scenario.agent(&pair.client_node);
    for harm in damage {
        node.run(harm).with_context(|| harm.join(" "))?;
        let start = Instant::now();
        pair.until_asked().with_context(|| harm.join(" "))?;
        println!(
            "{}: traffic again after {:?}",
            harm.join(" "),
            start.elapsed()
        );
    }
    Ok(())
}
