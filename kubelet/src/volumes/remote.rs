//! Volumes behind claims, and inline volumes of drivers: each mounted by a task of its own, kept
//! up to date as long as the pod is prepared.

use super::claims::{self, Bound, Where};
use super::csi::{Usage, Wanted};
use super::local::Local;
use super::plan::{Claim, HostPathKind, Kind, Planned, fs_group, host_path as parse_host_path};
use super::{HostVolume, Inner, PodState, Step, VolumeError, blocking, host_path, lock, ownership};
use crate::events::EventType;
use crate::pod::admission::affinity;
use futures::future::join_all;
use k8s_openapi::api::core::v1::Pod;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::Duration;

/// Between two looks at a pod's claims and volumes (as often as the stock kubelet looks at a pod
/// that does not change).
const UPKEEP: Duration = Duration::from_secs(60);
/// The first one comes sooner: statistics are waited for.
const FIRST_UPKEEP: Duration = Duration::from_secs(5);

/// What an upkeep needs to know of a volume that is mounted.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Remote {
    pub(super) host: HostVolume,
    /// The driver's name of it; none for local volumes.
    pub(super) driver: Option<Driven>,
    /// As the driver told last.
    pub(super) usage: Option<Usage>,
}

/// A volume of a driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Driven {
    driver: String,
    handle: String,
    /// Name of its directory.
    name: String,
}

fn is_remote(volume: &&Planned) -> bool {
    match volume.kind {
        Kind::Claim(_) | Kind::Csi(_) => true,
        Kind::EmptyDir { .. }
        | Kind::HostPath { .. }
        | Kind::Files(_)
        | Kind::Image
        | Kind::Unused => false,
    }
}

impl Inner {
    /// Mounts all of the pod's volumes of this kind that are not mounted yet, side by side.
    ///
    /// # Errors
    /// The first that failed; the others are told as events of their own.
    pub(super) async fn mount_remote(&self, state: &PodState) -> Result<(), VolumeError> {
        let pod = state.pod();
        let waiting = state.planned.iter().filter(is_remote).filter(|v| {
            let mounted = lock(&state.remote);
            !mounted.contains_key(&v.name)
        });
        let (again, pod) = (self.from_before.contains(&state.uid), &pod);
        let each = waiting.map(|volume| async move {
            let mounted = self.mount_one(state, pod, volume, again).await;
            mounted.map(|remote| lock(&state.remote).insert(volume.name.clone(), remote))
        });
        let failures: Vec<VolumeError> = join_all(each)
            .await
            .into_iter()
            .filter_map(Result::err)
            .collect();
        let Some(first) = merge(failures, |error| {
            let warning = EventType::Warning;
            self.events
                .pod_event(pod, None, warning, error.reason(), error.to_string());
        }) else {
            return Ok(());
        };
        Err(first)
    }

    async fn mount_one(
        &self,
        state: &PodState,
        pod: &Pod,
        volume: &Planned,
        again: bool,
    ) -> Result<Remote, VolumeError> {
        let wanted = Wanted {
            pod,
            outer: &volume.name,
            again,
            ended: &state.ended,
        };
        match &volume.kind {
            Kind::Csi(inline) => {
                let host = self.csi.mount_inline(wanted, inline).await?;
                let driver = Some(Driven {
                    driver: inline.driver.clone(),
                    handle: self.csi.inline_handle(&state.uid, &volume.name),
                    name: volume.name.clone(),
                });
                let usage = None;
                Ok(Remote {
                    host,
                    driver,
                    usage,
                })
            }
            Kind::Claim(claim) => self.mount_claim(wanted, claim).await,
            Kind::EmptyDir { .. }
            | Kind::HostPath { .. }
            | Kind::Files(_)
            | Kind::Image
            | Kind::Unused => Err(VolumeError::set_up(&volume.name, "it is mounted by others")),
        }
    }

    async fn mount_claim(&self, wanted: Wanted<'_>, claim: &Claim) -> Result<Remote, VolumeError> {
        let bound =
            claims::resolve(&self.client, wanted.pod, wanted.outer, claim, claim.used).await?;
        self.check_affinity(&bound)?;
        let place = bound
            .place()
            .map_err(|e| VolumeError::unprocessed(wanted.outer, e))?;
        match place {
            Where::Csi(source) => {
                let host = self.csi.mount(wanted, &bound, source).await?;
                self.csi.expand(wanted.pod, &bound, source).await?;
                let driver = Some(Driven {
                    driver: source.driver.clone(),
                    handle: source.volume_handle.clone(),
                    name: bound.name().to_owned(),
                });
                let usage = None;
                Ok(Remote {
                    host,
                    driver,
                    usage,
                })
            }
            Where::Local { path, fs_type } => {
                self.mount_local(wanted, &bound, path, fs_type.map(str::to_owned))
                    .await
            }
            Where::HostPath { path, kind } => {
                let fail = |e: String| VolumeError::set_up(bound.name(), e);
                let (path, kind) = host_path_of(path, kind).map_err(fail)?;
                let at = path.clone();
                let name = bound.name().to_owned();
                blocking(move || {
                    host_path::prepare(&at, kind).map_err(|e| VolumeError::set_up(&name, e))
                })
                .await?;
                Ok(Remote {
                    host: HostVolume {
                        path,
                        readonly: bound.readonly,
                        block: bound.is_block(),
                    },
                    driver: None,
                    usage: None,
                })
            }
        }
    }

    /// A volume may be bound to nodes; the scheduler looks at that, and we do.
    fn check_affinity(&self, bound: &Bound) -> Result<(), VolumeError> {
        let affinity = bound.volume.spec.as_ref();
        let affinity = affinity.and_then(|s| s.node_affinity.as_ref()?.required.as_ref());
        let Some(required) = affinity else {
            return Ok(());
        };
        let labels = self.node.labels();
        if affinity::selector_matches(required, &self.node_name, &labels) {
            return Ok(());
        }
        let step = if bound.is_block() {
            Step::MapNodeAffinity
        } else {
            Step::NodeAffinity
        };
        Err(VolumeError::Failed {
            what: step,
            volume: bound.name().to_owned(),
            message: "no matching NodeSelectorTerms".to_owned(),
        })
    }

    async fn mount_local(
        &self,
        wanted: Wanted<'_>,
        bound: &Bound,
        path: PathBuf,
        fs_type: Option<String>,
    ) -> Result<Remote, VolumeError> {
        let name = bound.name().to_owned();
        let local = Local {
            uid: crate::launch::pod_uid(wanted.pod).to_owned(),
            name: name.clone(),
            path,
            fs_type,
            options: bound.mount_options(),
            readonly: bound.readonly,
            block: bound.is_block(),
        };
        let (places, what) = (self.local.clone(), local.clone());
        let mounted = blocking(move || places.mount(&what)).await?;
        if let Some(group) = fs_group(wanted.pod)
            && !local.readonly
            && !mounted.shared
        {
            let applied = ownership::apply(&self.events, wanted.pod, &mounted.path, group).await;
            applied.map_err(|e| VolumeError::set_up(&name, e))?;
        }
        Ok(Remote {
            host: HostVolume {
                path: mounted.path,
                readonly: local.readonly,
                block: local.block,
            },
            driver: None,
            usage: None,
        })
    }

    /// One look at a volume that is mounted: publish it again when its driver wants that, let it
    /// grow, ask how full it is.
    async fn look_after(&self, state: &PodState, pod: &Pod, volume: &Planned) {
        let known = lock(&state.remote).get(&volume.name).cloned();
        let Some(Remote {
            driver: Some(driven),
            host,
            ..
        }) = known
        else {
            return;
        };
        let wanted = Wanted {
            pod,
            outer: &volume.name,
            again: true,
            ended: &state.ended,
        };
        let republish = self.csi.republishes(&driven.driver);
        let done = match &volume.kind {
            Kind::Csi(inline) if republish => self.csi.mount_inline(wanted, inline).await.map(drop),
            Kind::Claim(claim) => self.renew(wanted, claim, republish).await,
            Kind::Csi(_)
            | Kind::EmptyDir { .. }
            | Kind::HostPath { .. }
            | Kind::Files(_)
            | Kind::Image
            | Kind::Unused => Ok(()),
        };
        match done {
            Ok(()) => {}
            // The apiserver is away, or the claim is changing: the pod runs on.
            Err(VolumeError::Unready { .. }) => {}
            Err(error) => {
                let warning = EventType::Warning;
                self.events
                    .pod_event(pod, None, warning, error.reason(), error.to_string());
            }
        }
        let usage = self.csi.usage(
            &state.uid,
            &driven.name,
            &driven.driver,
            &driven.handle,
            host.block,
        );
        let usage = usage.await;
        if let Some(remote) = lock(&state.remote).get_mut(&volume.name) {
            remote.usage = usage;
        }
    }

    async fn renew(
        &self,
        wanted: Wanted<'_>,
        claim: &Claim,
        republish: bool,
    ) -> Result<(), VolumeError> {
        let bound =
            claims::resolve(&self.client, wanted.pod, wanted.outer, claim, claim.used).await?;
        let Ok(Where::Csi(source)) = bound.place() else {
            return Ok(());
        };
        if republish && !bound.is_block() {
            self.csi.mount(wanted, &bound, source).await?;
        }
        // Users were told by the attempt itself.
        if let Err(error) = self.csi.expand(wanted.pod, &bound, source).await {
            tracing::warn!(%error, "Volume not expanded");
        }
        Ok(())
    }
}

/// A hostPath of a PersistentVolume.
fn host_path_of(path: &str, kind: &str) -> Result<(PathBuf, HostPathKind), String> {
    match parse_host_path(path, kind)? {
        Kind::HostPath { path, kind } => Ok((path, kind)),
        Kind::EmptyDir { .. }
        | Kind::Files(_)
        | Kind::Image
        | Kind::Claim(_)
        | Kind::Csi(_)
        | Kind::Unused => Err("it is no path".to_owned()),
    }
}

/// All that wait for somebody else told as one, before any failure; the rest goes to `tell`.
fn merge(failures: Vec<VolumeError>, tell: impl Fn(&VolumeError)) -> Option<VolumeError> {
    let (mut unmounted, mut unattached) = (Vec::new(), Vec::new());
    let (mut unprocessed, mut messages) = (Vec::new(), Vec::new());
    let mut others = Vec::new();
    for failure in failures {
        match failure {
            VolumeError::Unready {
                unmounted: names,
                unattached: detached,
                unprocessed: unknown,
                message,
            } => {
                unmounted.extend(names);
                unattached.extend(detached);
                unprocessed.extend(unknown);
                messages.push(message);
            }
            other @ (VolumeError::SetUp { .. }
            | VolumeError::Failed { .. }
            | VolumeError::Teardown { .. }
            | VolumeError::Node { .. }) => others.push(other),
        }
    }
    let first = if messages.is_empty() {
        if others.is_empty() {
            return None;
        }
        others.remove(0)
    } else {
        for names in [&mut unmounted, &mut unattached, &mut unprocessed] {
            names.sort();
        }
        VolumeError::Unready {
            unmounted,
            unattached,
            unprocessed,
            message: messages.join("; "),
        }
    };
    others.iter().for_each(tell);
    Some(first)
}

/// Starts the pod's upkeep when it has volumes of drivers.
pub(super) fn schedule_upkeep(inner: &Arc<Inner>, state: &Arc<PodState>) {
    let any = lock(&state.remote).values().any(|r| r.driver.is_some());
    if !any {
        return;
    }
    let (inner, weak) = (Arc::downgrade(inner), Arc::downgrade(state));
    let task = tokio::spawn(upkeep(inner, weak)).abort_handle();
    if let Some(old) = lock(&state.upkeep).replace(task) {
        old.abort();
    }
}

async fn upkeep(inner: Weak<Inner>, state: Weak<PodState>) {
    let mut pause = FIRST_UPKEEP;
    loop {
        tokio::time::sleep(pause).await;
        pause = UPKEEP;
        let (Some(inner), Some(state)) = (inner.upgrade(), state.upgrade()) else {
            return;
        };
        let pod = state.pod();
        let volumes = state.planned.iter().filter(is_remote);
        join_all(volumes.map(|v| inner.look_after(&state, &pod, v))).await;
    }
}

/// How full a pod's volumes are, by name, as far as drivers told.
pub(super) fn usages(state: &PodState) -> BTreeMap<String, Option<Usage>> {
    let remote = lock(&state.remote);
    let driven = remote.iter().filter(|(_, r)| r.driver.is_some());
    driven.map(|(name, r)| (name.clone(), r.usage)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[test]
    fn volumes_that_wait_are_told_as_one_and_before_failures() {
        let told = Cell::new(0);
        let count = |_: &VolumeError| told.set(told.get() + 1);
        assert_eq!(merge(vec![], count), None);
        let failure = VolumeError::set_up("pv", "no");
        assert_eq!(merge(vec![failure.clone()], count), Some(failure.clone()));
        assert_eq!(told.get(), 0);
        let merged = merge(
            vec![
                failure,
                VolumeError::unprocessed("b", "PVC is not bound"),
                VolumeError::unattached("a", "context deadline exceeded"),
            ],
            count,
        );
        assert_eq!(told.get(), 1);
        assert_eq!(
            merged.unwrap().to_string(),
            "Unable to attach or mount volumes: unmounted volumes=[a b], unattached volumes=[a], failed to process volumes=[b]: PVC is not bound; context deadline exceeded"
        );
    }
}
