//! What each test image is made of.

use super::layer::Layer;
use super::layout::{Blob, Image, Run, Store, digest, image};
use super::{cluster, debian, programs};
use crate::artefacts::cache::Inputs;
use crate::command;
use anyhow::{Context, Result};
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

/// An image and how it is built.
pub(super) struct Recipe {
    pub(super) repository: &'static str,
    pub(super) tag: &'static str,
    pub(super) build: fn(&Path, &Store) -> Result<Image>,
}

impl Recipe {
    /// The name pods pull it by.
    pub(super) fn name(&self) -> String {
        format!("registry.k8s.io/{}:{}", self.repository, self.tag)
    }
}

pub(super) const fn recipe(
    repository: &'static str,
    tag: &'static str,
    build: fn(&Path, &Store) -> Result<Image>,
) -> Recipe {
    Recipe {
        repository,
        tag,
        build,
    }
}

/// Every image, as named below `registry.k8s.io/`.
pub(super) const ALL: &[Recipe] = &[
    recipe("pause", "3.10.2", pause),
    recipe("e2e-test-images/busybox", "1.37.0-1", busybox),
    recipe("e2e-test-images/agnhost", "2.63.0", |c, s| {
        agnhost(c, s, "2.63.0")
    }),
    recipe("e2e-test-images/agnhost", "2.55", |c, s| {
        agnhost(c, s, "2.55")
    }),
    recipe("e2e-test-images/nginx", "1.15-4", |c, s| {
        nginx(c, s, "1.15-4")
    }),
    recipe("e2e-test-images/nginx", "1.27-0", |c, s| {
        nginx(c, s, "1.27-0")
    }),
    recipe("e2e-test-images/kitten", "1.8", |c, s| {
        update_demo(c, s, "kitten")
    }),
    recipe("e2e-test-images/nautilus", "1.8", |c, s| {
        update_demo(c, s, "nautilus")
    }),
    recipe("e2e-test-images/nonewprivs", "1.4", nonewprivs),
    recipe("e2e-test-images/nonroot", "1.5", nonroot),
    recipe("e2e-test-images/glibc-dns-testing", "2.0.0", dns_testing),
    recipe("e2e-test-images/ipc-utils", "1.4", ipc_utils),
];

/// What single specs of the upstream suite pull besides.
pub(super) const SUITE: &[Recipe] = &[
    recipe("etcd", "3.6.8-0", cluster::suite_etcd),
    recipe(
        "e2e-test-images/regression-issue-74839",
        "1.4",
        cluster::regression_issue_74839,
    ),
    recipe(
        "build-image/distroless-iptables",
        "v0.9.6",
        cluster::distroless_iptables,
    ),
    recipe(
        "e2e-test-images/sample-apiserver",
        "1.29.2",
        cluster::sample_apiserver,
    ),
];

const BUSYBOX_PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n\
    daemon:x:1:1:daemon:/usr/sbin:/bin/false\n\
    bin:x:2:2:bin:/bin:/bin/false\n\
    www-data:x:33:33:www-data:/var/www:/bin/false\n\
    nobody:x:65534:65534:nobody:/home:/bin/false\n";
const BUSYBOX_GROUP: &str =
    "root:x:0:\ndaemon:x:1:\nbin:x:2:\nwww-data:x:33:\nnogroup:x:65534:\nnobody:x:65534:\n";

/// A program of the cache as an input: its directory is named by what it was built from, which
/// saves hashing it.
pub(super) fn built<'a>(inputs: &'a mut Inputs, program: &Path) -> &'a mut Inputs {
    let dir = program
        .parent()
        .and_then(Path::file_name)
        .unwrap_or_default();
    inputs.word(&dir.to_string_lossy())
}

fn pause(cache: &Path, store: &Store) -> Result<Image> {
    let program = programs::pause(cache)?;
    let mut inputs = Inputs::default();
    built(&mut inputs, &program);
    let layer = store.layer("pause", inputs, |layer| {
        layer.file("pause", 0o755, fs::read(&program)?);
        Ok(())
    })?;
    let run = Run {
        entrypoint: &["/pause"],
        user: "65535:65535",
        working_dir: "/",
        version: "pause 3.10.2",
        ..Run::default()
    };
    Ok(image(vec![layer], &run))
}

/// Debian's static busybox with all its names as hard links, and a static bash: busybox's own
/// shell drops environment names such as `data-1`, which tests print, so `sh` chooses.
fn busybox_layer(cache: &Path, store: &Store) -> Result<Blob> {
    let shell = programs::shell(cache)?;
    let mut inputs = Inputs::default();
    inputs
        .word("busybox-static bash-static 4")
        .word(&shell.display().to_string())
        .word(BUSYBOX_PASSWD)
        .word(BUSYBOX_GROUP);
    let scratch = cache.join(format!("debs-busybox.{}", std::process::id()));
    let built = store.layer("busybox", inputs, |layer| {
        let debs = debian::download(&["busybox-static", "bash-static"], &scratch)?;
        let program = debian::file(&debs[0], "bin/busybox")?;
        for dir in [
            "bin", "dev", "etc", "home", "lib", "usr", "usr/bin", "usr/sbin", "var",
        ] {
            layer.dir(dir, 0o755);
        }
        layer
            .dir("root", 0o700)
            .dir("tmp", 0o1777)
            .dir("var/spool", 0o755);
        layer
            .dir("var/www", 0o755)
            .dir("sbin", 0o755)
            .dir("usr/lib", 0o755);
        for applet in applets(&scratch, &program)? {
            if applet == "sh" {
                continue;
            }
            layer.hardlink(&format!("bin/{applet}"), "bin/busybox");
        }
        layer.file("bin/busybox", 0o755, program);
        layer.file(
            "bin/bash",
            0o755,
            debian::file(&debs[1], "bin/bash-static")?,
        );
        layer.file("bin/sh", 0o755, fs::read(&shell)?);
        layer.symlink("usr/bin/env", "../../bin/env");
        layer
            .file("etc/passwd", 0o644, BUSYBOX_PASSWD)
            .file("etc/group", 0o644, BUSYBOX_GROUP);
        layer.file("etc/shadow", 0o600, "root:*:19000:0:99999:7:::\n");
        Ok(())
    });
    drop(fs::remove_dir_all(&scratch));
    built
}

fn applets(scratch: &Path, program: &[u8]) -> Result<Vec<String>> {
    let path = scratch.join("busybox");
    fs::write(&path, program)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    let list = command::stdout(Command::new(&path).arg("--list"))?;
    Ok(list
        .lines()
        .filter(|a| *a != "busybox")
        .map(str::to_owned)
        .collect())
}

fn busybox(cache: &Path, store: &Store) -> Result<Image> {
    let run = Run {
        cmd: &["sh"],
        version: "busybox 1.37.0-1",
        ..Run::default()
    };
    Ok(image(vec![busybox_layer(cache, store)?], &run))
}

fn nonroot(cache: &Path, store: &Store) -> Result<Image> {
    let run = Run {
        cmd: &["sh"],
        user: "1234",
        version: "nonroot 1.5",
        ..Run::default()
    };
    Ok(image(vec![busybox_layer(cache, store)?], &run))
}

/// Debian's tools, shared by most images.
pub(super) fn tools_layer(cache: &Path, store: &Store) -> Result<Blob> {
    let mut inputs = Inputs::default();
    inputs.word("tools 2");
    for package in debian::TOOLS {
        inputs.word(package);
    }
    let scratch = cache.join(format!("debs-tools.{}", std::process::id()));
    let built = store.layer("tools", inputs, |layer| {
        debian::skeleton(layer);
        for package in debian::download(debian::TOOLS, &scratch)? {
            debian::add(layer, &package)?;
        }
        layer
            .symlink("usr/bin/sh", "bash")
            .symlink("usr/bin/awk", "mawk");
        layer.symlink("usr/bin/nc", "nc.openbsd");
        users(layer);
        Ok(())
    });
    drop(fs::remove_dir_all(&scratch));
    built
}

/// agnhost's users: one test asks for the groups the image defines.
fn users(layer: &mut Layer) {
    let passwd = "root:x:0:0:root:/root:/bin/bash\n\
        nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n\
        user-defined-in-image:x:1000:1000::/home/user-defined-in-image:/bin/sh\n";
    let group = "root:x:0:\nnogroup:x:65534:\nuser-defined-in-image:x:1000:\n\
        group-defined-in-image:x:50000:user-defined-in-image\n";
    layer
        .file("etc/passwd", 0o644, passwd)
        .file("etc/group", 0o644, group);
    layer
        .dir("home/user-defined-in-image", 0o755)
        .owner("home/user-defined-in-image", 1000, 1000);
}

fn agnhost_layer(store: &Store) -> Result<Blob> {
    let program = programs::agnhost()?;
    let porter = programs::upstream_images()?.join("agnhost/porter");
    let mut inputs = Inputs::default();
    built(&mut inputs, &program).word("agnhost 2");
    store.layer("agnhost", inputs, |layer| {
        layer
            .file("agnhost", 0o755, fs::read(&program)?)
            .symlink("agnhost-2", "agnhost");
        layer
            .dir("uploads", 0o755)
            .dir("var", 0o755)
            .dir("var/registry", 0o755);
        for name in ["localhost.crt", "localhost.key"] {
            let path = porter.join(name);
            let content = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
            layer.file(name, 0o644, content);
        }
        Ok(())
    })
}

/// What agnhost's own registry serves, as its `fake-registry-server` looks for it: the pause image
/// under the tag `testing`. Tests pull it with and without a secret.
fn served_layer(cache: &Path, store: &Store) -> Result<Blob> {
    let pause = pause(cache, store)?;
    let manifest = digest(&pause.manifest);
    let mut inputs = Inputs::default();
    inputs.word("served 1").word(&manifest);
    store.layer("served", inputs, |layer| {
        let mut put = |kind: &str, digest: &str, content: Vec<u8>| {
            let (algorithm, hash) = digest.split_once(':').unwrap_or_default();
            let (start, _) = hash.split_at_checked(2).unwrap_or_default();
            let mut dir = format!("var/registry/pause/{kind}");
            for part in ["", algorithm, start, hash] {
                if !part.is_empty() {
                    dir = format!("{dir}/{part}");
                }
                layer.dir(&dir, 0o755);
            }
            layer.file(&format!("{dir}/data"), 0o644, content);
        };
        put("blobs", &digest(&pause.config), pause.config.clone());
        for blob in &pause.layers {
            put("blobs", &blob.digest, fs::read(&blob.path)?);
        }
        put("manifests", &manifest, pause.manifest.clone());
        layer.dir("var", 0o755).dir("var/registry", 0o755);
        layer.dir("var/registry/pause", 0o755);
        layer.file(
            "var/registry/pause/manifests/testing",
            0o644,
            manifest.clone(),
        );
        Ok(())
    })
}

const AGNHOST_PORTS: &[&str] = &["80/tcp", "8080/tcp", "8081/tcp", "9376/tcp", "5000/tcp"];

fn agnhost(cache: &Path, store: &Store, version: &str) -> Result<Image> {
    let label = format!("agnhost {version}");
    let run = Run {
        entrypoint: &["/agnhost"],
        cmd: &["pause"],
        ports: AGNHOST_PORTS,
        version: &label,
        ..Run::default()
    };
    let layers = vec![
        tools_layer(cache, store)?,
        agnhost_layer(store)?,
        served_layer(cache, store)?,
        cluster::coredns_layer(store)?,
    ];
    Ok(image(layers, &run))
}

/// Tests want nginx to run and, some, to answer on port 80; agnhost does both.
fn nginx(cache: &Path, store: &Store, version: &str) -> Result<Image> {
    let label = format!("nginx {version}");
    let run = Run {
        entrypoint: &["/agnhost"],
        cmd: &["netexec", "--http-port=80", "--udp-port=-1"],
        ports: &["80/tcp"],
        version: &label,
        ..Run::default()
    };
    Ok(image(
        vec![tools_layer(cache, store)?, agnhost_layer(store)?],
        &run,
    ))
}

/// kitten and nautilus: agnhost that serves the picture the update demo asks for.
fn update_demo(cache: &Path, store: &Store, name: &'static str) -> Result<Image> {
    let html = programs::upstream_images()?.join(name).join("html");
    let files = ["data.json".to_owned(), format!("{name}.jpg")];
    let mut inputs = Inputs::default();
    for file in &files {
        inputs.file(&html.join(file))?;
    }
    let layer = store.layer(name, inputs, |layer| {
        for file in &files {
            layer.file(file, 0o644, fs::read(html.join(file))?);
        }
        // The suite's test of image volumes looks for upstream's base here.
        layer.file(
            "etc/os-release",
            0o644,
            "NAME=\"Alpine Linux\"\nID=alpine\n",
        );
        Ok(())
    })?;
    let run = Run {
        entrypoint: &["/agnhost"],
        cmd: &["test-webserver"],
        ports: &["80/tcp"],
        version: name,
        ..Run::default()
    };
    Ok(image(
        vec![tools_layer(cache, store)?, agnhost_layer(store)?, layer],
        &run,
    ))
}

/// A program that tells its effective user and is setuid root.
fn nonewprivs(cache: &Path, store: &Store) -> Result<Image> {
    let program = programs::nnp(cache)?;
    let mut inputs = Inputs::default();
    built(&mut inputs, &program);
    let layer = store.layer("nnp", inputs, |layer| {
        layer
            .dir("usr", 0o755)
            .dir("usr/local", 0o755)
            .dir("usr/local/bin", 0o755);
        layer.file("usr/local/bin/nnp", 0o6755, fs::read(&program)?);
        Ok(())
    })?;
    let run = Run {
        cmd: &["nnp"],
        version: "nonewprivs 1.4",
        ..Run::default()
    };
    Ok(image(vec![busybox_layer(cache, store)?, layer], &run))
}

fn dns_testing(cache: &Path, store: &Store) -> Result<Image> {
    let run = Run {
        cmd: &["bash"],
        version: "glibc-dns-testing 2.0.0",
        ..Run::default()
    };
    Ok(image(vec![tools_layer(cache, store)?], &run))
}

fn ipc_utils(cache: &Path, store: &Store) -> Result<Image> {
    let run = Run {
        cmd: &["bash"],
        version: "ipc-utils 1.4",
        ..Run::default()
    };
    Ok(image(vec![tools_layer(cache, store)?], &run))
}
