//! The test images, built as OCI images from Debian packages and Go programs, and pushed into the
//! lab's registry under the names the upstream suite pulls (`test/utils/image/manifest.go`).
//!
//! Everything is kept in the cache by the hash of what it is made from: a second run asks the
//! registry for a dozen manifests and is done.

mod cluster;
mod debian;
mod layer;
mod layout;
pub mod own;
mod programs;
mod push;

mod recipes;
pub mod storage;

pub use layout::digest;

use crate::packages::{self, Need};
use anyhow::{Context, Result};
use std::path::Path;

/// What building and serving the images needs.
const NEEDS: &[Need] = &[
    Need {
        file: "docker-registry",
        package: "docker-registry",
        why: "serves the test images",
    },
    Need {
        file: "cc",
        package: "gcc",
        why: "compiles the pause program",
    },
    Need {
        file: "dpkg-deb",
        package: "dpkg",
        why: "opens the packages the images are made of",
    },
];

/// Makes sure that the registry's program is there, installing it if need be.
///
/// # Errors
/// When it is missing and cannot be installed.
pub fn ensure_registry_installed() -> Result<()> {
    packages::ensure(NEEDS, true)
}

/// Makes sure that `registry` (`host:port`, plain HTTP) serves every test image; what has been
/// built once is kept in `cache`.
///
/// # Errors
/// When an image cannot be built or pushed.
pub fn ensure_pushed(registry: &str, cache: &Path) -> Result<()> {
    push(registry, cache, recipes::ALL)
}

/// Makes sure that `registry` serves the images of a control plane that runs in pods. Apart from
/// [`ensure_pushed`]: they are large, and few need them.
///
/// # Errors
/// When an image cannot be built or pushed.
pub fn ensure_control_plane(registry: &str, cache: &Path) -> Result<()> {
    push(registry, cache, cluster::CONTROL_PLANE)
}

/// Makes sure that `registry` serves kube-proxy's image; returns its name.
///
/// # Errors
/// When it cannot be built or pushed.
pub fn ensure_proxy(registry: &str, cache: &Path) -> Result<String> {
    push(registry, cache, &[cluster::PROXY])?;
    Ok(cluster::PROXY.name())
}

/// Makes sure that `registry` serves the name server's image; returns its name.
///
/// # Errors
/// When it cannot be built or pushed.
pub fn ensure_dns(registry: &str, cache: &Path) -> Result<String> {
    push(registry, cache, &[cluster::DNS])?;
    Ok(cluster::DNS.name())
}

/// Makes sure that `registry` serves what single specs of the upstream suite pull besides.
///
/// # Errors
/// When an image cannot be built or pushed.
pub fn ensure_suite(registry: &str, cache: &Path) -> Result<()> {
    push(registry, cache, recipes::SUITE)
}

fn push(registry: &str, cache: &Path, recipes: &[recipes::Recipe]) -> Result<()> {
    let store = layout::Store::open(&cache.join("images"))?;
    let client = push::Registry::new(registry);
    for recipe in recipes {
        let image = (recipe.build)(cache, &store)
            .with_context(|| format!("build image {}:{}", recipe.repository, recipe.tag))?;
        client
            .ensure(recipe.repository, recipe.tag, &image)
            .with_context(|| format!("push {}:{} to {registry}", recipe.repository, recipe.tag))?;
    }
    Ok(())
}

/// `name:tag` of an image of the control plane.
#[must_use]
pub fn control_plane_image(name: &str) -> String {
    let recipe = cluster::CONTROL_PLANE.iter().find(|r| r.repository == name);
    format!("{name}:{}", recipe.map_or("latest", |r| r.tag))
}

/// Names under `registry.k8s.io/` that are served, with tags.
#[must_use]
pub fn names() -> Vec<String> {
    recipes::ALL
        .iter()
        .map(|r| format!("{}:{}", r.repository, r.tag))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_image_has_one_name() {
        let mut names = names();
        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count);
        assert!(names.contains(&"pause:3.10.2".to_owned()));
        assert!(names.contains(&"e2e-test-images/agnhost:2.63.0".to_owned()));
    }
}
