//! Has the images of containers there: pull policies, credentials, back-off, and the events and
//! reasons users know from the stock kubelet.
//!
//! ```text
//! ensure(pod, container) ─ policy ─ present? ── yes ─▶ ImageStatus
//!                                      │ no
//!                          back-off gate ─▶ slot (distinct images at once, pace) ─▶ runtime.pull
//! ```
//! No task of its own: the caller's future does the work, and may be dropped at any time.
//! The runtime shares identical downloads; this layer must therefore never hold one pod's pull
//! back behind another pod's pull of the same image.

pub mod access;
mod backoff;
pub mod gc;
mod keyring;
mod pace;
pub mod provider;

pub use keyring::{Credential, Keyring};

use crate::config::ImageSettings;
use crate::events::{EventSink, EventType, field_path};
use crate::metrics;
use access::{Access, PulledWith};
use backoff::BackOff;
use k8s_openapi::api::core::v1::{Pod, Secret};
use pace::Pace;
use provider::Providers;
use runtime::image::reference;
use runtime::service::{ImageService, ImageStatus};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// What is wanted.
#[derive(Debug, Clone, Copy)]
pub struct PullRequest<'a> {
    /// For whom; back-off and events are per pod.
    pub pod: &'a Arc<Pod>,
    /// The image as the user wrote it.
    pub image: &'a str,
    /// Its pull policy.
    pub policy: Option<&'a str>,
    /// The container that runs it; none for the image of a volume, whose events are the pod's.
    pub container: Option<&'a str>,
    /// The pod's pull secrets that exist.
    pub secrets: &'a [Arc<Secret>],
}

/// Why a container has no image. Displays as the waiting message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct PullError {
    kind: PullErrorKind,
    message: String,
    retry_after: Option<Duration>,
}

/// Kinds of [`PullError`], each a waiting reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PullErrorKind {
    /// The name does not parse; only another name helps.
    InvalidName,
    /// Not there, and the policy forbids to pull.
    NeverPull,
    /// A pull was tried and failed.
    Pull,
    /// It failed before and it is too early to try again.
    BackOff,
}

impl PullError {
    /// The waiting reason users see.
    pub fn reason(&self) -> &'static str {
        match self.kind {
            PullErrorKind::InvalidName => "InvalidImageName",
            PullErrorKind::NeverPull => "ErrImageNeverPull",
            PullErrorKind::Pull => "ErrImagePull",
            PullErrorKind::BackOff => "ImagePullBackOff",
        }
    }

    /// Its kind.
    pub fn kind(&self) -> PullErrorKind {
        self.kind
    }

    /// When to ask again; none leaves it to the caller.
    pub fn retry_after(&self) -> Option<Duration> {
        self.retry_after
    }
}

/// How long `ErrImagePull` is shown before `ImagePullBackOff` takes its place.
const SHOW_ERROR: Duration = Duration::from_secs(2);
/// An image that may not be pulled can only be loaded by hand; look again so often.
const NEVER_PULL_RETRY: Duration = Duration::from_secs(10);

/// When to pull (Kubernetes: images, "Image pull policy").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Policy {
    Always,
    IfNotPresent,
    Never,
}

/// The apiserver fills the policy in; static pods may come without.
fn policy(wanted: Option<&str>, tag: Option<&str>) -> Policy {
    match wanted {
        Some("Always") => Policy::Always,
        Some("Never") => Policy::Never,
        Some("IfNotPresent") => Policy::IfNotPresent,
        Some(_) | None if tag == Some("latest") => Policy::Always,
        Some(_) | None => Policy::IfNotPresent,
    }
}

/// Pulls images for pods. One per agent.
#[derive(Debug)]
pub struct ImagePuller<R> {
    runtime: Arc<R>,
    events: EventSink,
    backoff: BackOff,
    pace: Pace,
    providers: Providers,
    access: Option<Arc<Access>>,
}

impl<R: ImageService> ImagePuller<R> {
    /// A puller for this runtime that knows no credentials but those of pull secrets.
    pub fn new(runtime: Arc<R>, events: EventSink, settings: &ImageSettings) -> Self {
        Self {
            runtime,
            events,
            backoff: BackOff::default(),
            pace: Pace::new(settings),
            providers: Providers::default(),
            access: None,
        }
    }

    /// Keeps images that were pulled with credentials from pods that do not have them.
    #[must_use]
    pub fn with_access(mut self, access: Arc<Access>) -> Self {
        self.access = Some(access);
        self
    }

    /// Also asks these programs for credentials, after pull secrets.
    #[must_use]
    pub fn with_providers(mut self, providers: Providers) -> Self {
        self.providers = providers;
        self
    }

    /// Has the container's image there as its pull policy wants.
    ///
    /// # Errors
    /// [`PullError`] with the stock kubelet's reason and message; events were emitted.
    pub async fn ensure(&self, request: PullRequest<'_>) -> Result<ImageStatus, PullError> {
        let result = self.ensure_quietly(&request).await;
        if let (Err(error), Some(_)) = (&result, request.container) {
            let message = format!("Error: {}", error.reason());
            self.tell(&request, EventType::Warning, "Failed", message);
        }
        result
    }

    async fn ensure_quietly(&self, request: &PullRequest<'_>) -> Result<ImageStatus, PullError> {
        let image = request.image;
        let name = reference::parse(image).map_err(|e| {
            let message = format!("Failed to apply default image tag {image:?}: {e}");
            self.tell(
                request,
                EventType::Warning,
                "InspectFailed",
                message.clone(),
            );
            PullError {
                kind: PullErrorKind::InvalidName,
                message,
                retry_after: None,
            }
        })?;
        let policy = policy(request.policy, name.tag());
        let present = match policy {
            Policy::Always => None,
            Policy::IfNotPresent | Policy::Never => self.runtime.status(image),
        };
        let repository = reference::repository(&name);
        let present = present.filter(|status| self.may_use(request, &repository, status));
        match (present, policy) {
            (Some(status), _) => {
                let message = format!(
                    "Container image {image:?} already present on machine and can be accessed \
                     by the pod"
                );
                self.tell(request, EventType::Normal, "Pulled", message);
                Ok(status)
            }
            (None, Policy::Never) => {
                let message =
                    format!("Container image {image:?} is not present with pull policy of Never");
                self.tell(
                    request,
                    EventType::Warning,
                    "ErrImageNeverPull",
                    message.clone(),
                );
                let retry_after = Some(NEVER_PULL_RETRY);
                Err(PullError {
                    kind: PullErrorKind::NeverPull,
                    message,
                    retry_after,
                })
            }
            (None, Policy::Always | Policy::IfNotPresent) => {
                self.pull(request, image, &repository).await
            }
        }
    }

    /// Whether the pod may use an image that is there without asking the registry.
    fn may_use(&self, request: &PullRequest<'_>, repository: &str, status: &ImageStatus) -> bool {
        let secrets = || {
            let keyring = Keyring::new(request.secrets.iter().map(AsRef::as_ref));
            let fitting = keyring.lookup(repository).into_iter();
            fitting.filter_map(|c| c.source).collect()
        };
        let access = self.access.as_ref();
        access.is_none_or(|a| a.may_use(request.image, &status.id.0, secrets))
    }

    async fn pull(
        &self,
        request: &PullRequest<'_>,
        image: &str,
        repository: &str,
    ) -> Result<ImageStatus, PullError> {
        let uid = request.pod.metadata.uid.as_deref().unwrap_or_default();
        if let Some((left, previous)) = self.backoff.waiting(uid, image) {
            let message = format!("Back-off pulling image {image:?}");
            self.tell(request, EventType::Normal, "BackOff", message.clone());
            return Err(PullError {
                kind: PullErrorKind::BackOff,
                message: format!("{message}: ErrImagePull: {previous}"),
                retry_after: Some(left),
            });
        }
        self.tell(
            request,
            EventType::Normal,
            "Pulling",
            format!("Pulling image {image:?}"),
        );
        let asked = Instant::now();
        let keyring = Keyring::new(request.secrets.iter().map(AsRef::as_ref));
        let mut credentials = keyring.lookup(repository);
        let of_node = self.providers.lookup(repository).await;
        credentials.extend(of_node.into_iter().map(Credential::of_node));
        let auths: Vec<_> = credentials.iter().map(|c| c.auth.clone()).collect();
        let _slot = self.pace.enter(image).await;
        let started = Instant::now();
        let pulling = self.access.as_ref().map(|a| a.begin(image));
        match self.runtime.pull(image, &auths).await {
            Ok(pulled) => {
                let status = pulled.status;
                let used = pulled.credential.and_then(|index| credentials.get(index));
                let secret = used.and_then(|c| c.source.clone());
                if let Some(pulling) = pulling {
                    let with = secret.map_or(PulledWith::Node, PulledWith::Secret);
                    pulling.done(&status.id.0, with);
                }
                self.backoff.forget(uid, image);
                let (own, all) = (started.elapsed(), asked.elapsed());
                let size = metrics::image_size(status.size_bytes);
                metrics::metrics().image_pull.with([size]).observe_time(own);
                let message = format!(
                    "Successfully pulled image {image:?} in {} ({} including waiting). Image \
                     size: {} bytes.",
                    go_duration(own),
                    go_duration(all),
                    status.size_bytes
                );
                self.tell(request, EventType::Normal, "Pulled", message);
                Ok(status)
            }
            Err(error) => {
                if let Some(pulling) = pulling {
                    pulling.failed();
                }
                let message = error.message;
                let event = format!("Failed to pull image {image:?}: {message}");
                self.tell(request, EventType::Warning, "Failed", event);
                self.backoff.failed(uid, image, &message);
                let retry_after = Some(SHOW_ERROR);
                Err(PullError {
                    kind: PullErrorKind::Pull,
                    message,
                    retry_after,
                })
            }
        }
    }

    fn tell(
        &self,
        request: &PullRequest<'_>,
        type_: EventType,
        reason: &str,
        message: impl Into<String>,
    ) {
        let path = request.container.map(|name| field_path(request.pod, name));
        self.events
            .pod_event(request.pod, path.as_deref(), type_, reason, message);
    }
}

/// As Go prints a duration cut to milliseconds: `340ms`, `1.2s`, `1m3.007s`.
fn go_duration(duration: Duration) -> String {
    let ms = duration.as_millis();
    if ms == 0 {
        return "0s".to_owned();
    }
    if ms < 1000 {
        return format!("{ms}ms");
    }
    let (minutes, ms) = (ms / 60_000, ms % 60_000);
    let seconds = format!("{}.{:03}", ms / 1000, ms % 1000);
    let seconds = seconds.trim_end_matches('0').trim_end_matches('.');
    match (minutes / 60, minutes % 60) {
        (0, 0) => format!("{seconds}s"),
        (0, minutes) => format!("{minutes}m{seconds}s"),
        (hours, minutes) => format!("{hours}h{minutes}m{seconds}s"),
    }
}

#[cfg(test)]
mod tests;
