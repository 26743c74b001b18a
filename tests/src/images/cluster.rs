//! Images of the cluster's own parts: the control plane, for a node that runs its own, and what
//! every cluster runs as pods. One static program each, as in the project's own images.

use super::debian;
use super::layer::Layer;
use super::layout::{Blob, Image, Run, Store, image};
use super::recipes::{Recipe, built, recipe};
use crate::artefacts::cache::Inputs;
use crate::artefacts::go;
use anyhow::Result;
use std::fs;
use std::path::Path;

/// What a node needs to run its own control plane.
pub(super) const CONTROL_PLANE: &[Recipe] = &[
    recipe("etcd", "lab", |_, s| {
        program(s, "etcd", &go::etcd()?.join("etcd"))
    }),
    recipe("kube-apiserver", "lab", |_, s| {
        program(
            s,
            "kube-apiserver",
            &go::kubernetes()?.join("kube-apiserver"),
        )
    }),
];

/// The proxy of services, on every node.
pub(super) const PROXY: Recipe = recipe("kube-proxy", go::KUBERNETES_VERSION, kube_proxy);

/// The cluster's name server.
pub(super) const DNS: Recipe = recipe("coredns/coredns", go::COREDNS_VERSION, coredns);

/// Debian packages of what kube-proxy executes, with their libraries.
const NETFILTER: &[&str] = &[
    "nftables",
    "iptables",
    "conntrack",
    "libc6",
    "libnftables1",
    "libnftnl11",
    "libmnl0",
    "libxtables12",
    "libip4tc2",
    "libip6tc2",
    "libnetfilter-conntrack3",
    "libnfnetlink0",
    "libgmp10",
    "libjansson4",
    "libedit2",
    "libbsd0",
    "libmd0",
    "libtinfo6",
];

/// One static program and nothing else.
fn program(store: &Store, name: &'static str, file: &Path) -> Result<Image> {
    let mut inputs = Inputs::default();
    built(&mut inputs, file).word(name);
    let layer = store.layer(name, inputs, |layer| add_program(layer, name, file))?;
    let run = Run {
        working_dir: "/",
        version: name,
        ..Run::default()
    };
    Ok(image(vec![layer], &run))
}

fn add_program(layer: &mut Layer, name: &str, file: &Path) -> Result<()> {
    for dir in ["usr", "usr/local", "usr/local/bin"] {
        layer.dir(dir, 0o755);
    }
    layer.file(&format!("usr/local/bin/{name}"), 0o755, fs::read(file)?);
    Ok(())
}

fn kube_proxy(cache: &Path, store: &Store) -> Result<Image> {
    let file = go::kube_proxy()?.join("kube-proxy");
    let mut inputs = Inputs::default();
    built(&mut inputs, &file).word("kube-proxy 1");
    let own = store.layer("kube-proxy", inputs, |layer| {
        add_program(layer, "kube-proxy", &file)
    })?;
    let run = Run {
        cmd: &["/usr/local/bin/kube-proxy"],
        working_dir: "/",
        version: "kube-proxy",
        ..Run::default()
    };
    Ok(image(vec![netfilter_layer(cache, store)?, own], &run))
}

/// `nft` and the `iptables` that speaks nftables, under the names Debian's alternatives give it.
fn netfilter_layer(cache: &Path, store: &Store) -> Result<Blob> {
    let mut inputs = Inputs::default();
    inputs.word("netfilter 1");
    for package in NETFILTER {
        inputs.word(package);
    }
    let scratch = cache.join(format!("debs-netfilter.{}", std::process::id()));
    let built = store.layer("netfilter", inputs, |layer| {
        debian::skeleton(layer);
        for package in debian::download(NETFILTER, &scratch)? {
            debian::add(layer, &package)?;
        }
        for name in ["iptables", "ip6tables"] {
            for part in ["", "-save", "-restore"] {
                layer.symlink(&format!("usr/sbin/{name}{part}"), "xtables-nft-multi");
            }
        }
        Ok(())
    });
    drop(fs::remove_dir_all(&scratch));
    built
}

/// CoreDNS at `/coredns`, where its own image and agnhost's have it.
pub(super) fn coredns_layer(store: &Store) -> Result<Blob> {
    let file = go::coredns()?.join("coredns");
    let mut inputs = Inputs::default();
    built(&mut inputs, &file).word("coredns 1");
    store.layer("coredns", inputs, |layer| {
        layer.file("coredns", 0o755, fs::read(&file)?);
        Ok(())
    })
}

fn coredns(_: &Path, store: &Store) -> Result<Image> {
    let run = Run {
        entrypoint: &["/coredns"],
        working_dir: "/",
        version: "coredns",
        ports: &["53/tcp", "53/udp"],
        ..Run::default()
    };
    Ok(image(vec![coredns_layer(store)?], &run))
}

/// etcd under the name the upstream suite pulls.
pub(super) fn suite_etcd(_: &Path, store: &Store) -> Result<Image> {
    program(store, "etcd", &go::etcd()?.join("etcd"))
}

/// A shell with the tools of kube-proxy.
pub(super) fn distroless_iptables(cache: &Path, store: &Store) -> Result<Image> {
    let run = Run {
        cmd: &["sh"],
        version: "distroless-iptables v0.9.6",
        ..Run::default()
    };
    let layers = vec![
        super::recipes::tools_layer(cache, store)?,
        netfilter_layer(cache, store)?,
    ];
    Ok(image(layers, &run))
}

/// The aggregated apiserver of the upstream suite.
pub(super) fn sample_apiserver(_: &Path, store: &Store) -> Result<Image> {
    let file = go::sample_apiserver()?.join("sample-apiserver");
    root_program(store, "sample-apiserver", "/sample-apiserver", &file)
}

/// A server and a client that once met a fault in the handling of invalid packets.
pub(super) fn regression_issue_74839(cache: &Path, store: &Store) -> Result<Image> {
    let name = "regression-issue-74839";
    let file = super::programs::upstream(cache, name)?;
    root_program(store, name, "/regression-issue-74839", &file)
}

/// One static program at the root.
fn root_program(
    store: &Store,
    name: &'static str,
    path: &'static str,
    file: &Path,
) -> Result<Image> {
    let mut inputs = Inputs::default();
    built(&mut inputs, file).word(name);
    let layer = store.layer(name, inputs, |layer| {
        layer.file(name, 0o755, fs::read(file)?);
        Ok(())
    })?;
    let run = Run {
        entrypoint: &[path],
        version: name,
        ..Run::default()
    };
    Ok(image(vec![layer], &run))
}
