//! `kubelet_volume_stats_…`: how full claimed volumes are.

use super::collect::{Filesystem, Stats};
use crate::metrics::text::{Family, Page};
use runtime::service::{ImageService, RuntimeService};
use std::collections::{BTreeMap, BTreeSet};

impl<R: RuntimeService + ImageService> Stats<R> {
    /// Writes the sizes of claimed volumes, each claim once. Blocks shortly.
    pub fn claims(&self, page: &mut Page) {
        let mut seen = BTreeSet::new();
        for view in self.views() {
            let Some(entry) = &view.entry else { continue };
            let spec = entry.pod.spec.as_ref();
            let volumes = spec.and_then(|s| s.volumes.as_ref());
            let config = &view.sandbox.config;
            let claims: BTreeMap<&str, String> = volumes
                .into_iter()
                .flatten()
                .filter_map(|v| {
                    let claim = v.persistent_volume_claim.as_ref();
                    let claim = claim.map(|c| c.claim_name.clone());
                    let own = || {
                        v.ephemeral
                            .as_ref()
                            .map(|_| format!("{}-{}", config.name, v.name))
                    };
                    Some((v.name.as_str(), claim.or_else(own)?))
                })
                .collect();
            if claims.is_empty() {
                continue;
            }
            for place in self.volume_places(&config.uid) {
                let Some(claim) = claims.get(place.name.as_str()) else {
                    continue;
                };
                let fs = Filesystem::in_place(&place);
                if let Some(fs) =
                    fs.filter(|_| seen.insert((config.namespace.clone(), claim.clone())))
                {
                    write(page, &config.namespace, claim, &fs);
                }
            }
        }
    }
}

fn write(page: &mut Page, namespace: &str, claim: &str, fs: &Filesystem) {
    let labels = [("namespace", namespace), ("persistentvolumeclaim", claim)];
    for (name, help, value) in [
        (
            "kubelet_volume_stats_capacity_bytes",
            "Size of the volume in bytes.",
            fs.capacity,
        ),
        (
            "kubelet_volume_stats_available_bytes",
            "Bytes left in the volume.",
            fs.available,
        ),
        (
            "kubelet_volume_stats_used_bytes",
            "Bytes taken of the volume.",
            fs.used(),
        ),
        (
            "kubelet_volume_stats_inodes",
            "Inodes of the volume.",
            fs.inodes,
        ),
        (
            "kubelet_volume_stats_inodes_free",
            "Free inodes of the volume.",
            fs.inodes_free,
        ),
        (
            "kubelet_volume_stats_inodes_used",
            "Inodes taken of the volume.",
            fs.inodes_used(),
        ),
    ] {
        page.put(Family::gauge(name, help), &labels, value as f64);
    }
}
