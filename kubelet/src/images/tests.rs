use super::*;
use k8s_openapi::api::core::v1::Container;
use runtime::service::{
    FsUsage, ImageConfig, ImageId, Pulled, RegistryAuth, RuntimeError, RuntimeErrorKind,
};
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::sync::Notify;

/// Images that are there, and pulls that fail or wait.
#[derive(Default)]
struct Images {
    stored: Mutex<Vec<String>>,
    failing: Mutex<Option<String>>,
    pulls: Mutex<Vec<(String, usize)>>,
    at_once: AtomicUsize,
    most_at_once: AtomicUsize,
    hold: Option<Notify>,
}

fn status(name: &str) -> ImageStatus {
    ImageStatus {
        id: ImageId(name.to_owned()),
        repo_tags: vec![name.to_owned()],
        repo_digests: Vec::new(),
        size_bytes: 42,
        pinned: false,
        user: String::new(),
        config: ImageConfig::default(),
    }
}

impl ImageService for Images {
    fn status(&self, image: &str) -> Option<ImageStatus> {
        self.stored
            .lock()
            .unwrap()
            .iter()
            .find(|i| *i == image)
            .map(|i| status(i))
    }
    fn list(&self) -> Vec<ImageStatus> {
        Vec::new()
    }
    async fn pull(&self, image: &str, auth: &[RegistryAuth]) -> runtime::service::Result<Pulled> {
        self.pulls
            .lock()
            .unwrap()
            .push((image.to_owned(), auth.len()));
        let now = self.at_once.fetch_add(1, Ordering::SeqCst) + 1;
        self.most_at_once.fetch_max(now, Ordering::SeqCst);
        if let Some(hold) = &self.hold {
            hold.notified().await;
        }
        self.at_once.fetch_sub(1, Ordering::SeqCst);
        if let Some(message) = self.failing.lock().unwrap().clone() {
            return Err(RuntimeError {
                kind: RuntimeErrorKind::ImagePull,
                message,
            });
        }
        self.stored.lock().unwrap().push(image.to_owned());
        Ok(Pulled {
            status: status(image),
            credential: (!auth.is_empty()).then_some(0),
        })
    }
    async fn remove(&self, _: &str) -> runtime::service::Result<()> {
        Ok(())
    }
    fn fs_usage(&self) -> FsUsage {
        FsUsage::default()
    }
}

fn settings(parallel: usize) -> ImageSettings {
    ImageSettings {
        registry_qps: 5,
        registry_burst: 10,
        max_parallel_pulls: parallel,
        minimum_gc_age: Duration::ZERO,
        maximum_gc_age: Duration::ZERO,
        gc_high_percent: 85,
        gc_low_percent: 80,
        status_max_images: 50,
        mirrors: BTreeMap::new(),
        insecure: Vec::new(),
        only_mirrors: false,
        credential_providers: None,
        verification: access::Verification::default(),
    }
}

fn puller(images: Images, parallel: usize) -> (Arc<ImagePuller<Images>>, Arc<Images>, EventSink) {
    let (images, events) = (Arc::new(images), EventSink::memory());
    let puller = ImagePuller::new(Arc::clone(&images), events.clone(), &settings(parallel));
    (Arc::new(puller), images, events)
}

fn container(image: &str, policy: &str) -> Container {
    Container {
        name: "c".to_owned(),
        image: Some(image.to_owned()),
        image_pull_policy: Some(policy.to_owned()),
        ..Container::default()
    }
}

async fn ensure(
    puller: &ImagePuller<Images>,
    container: &Container,
) -> Result<ImageStatus, PullError> {
    let mut pod = Pod::default();
    pod.metadata.uid = Some("uid".to_owned());
    puller
        .ensure(PullRequest {
            pod: &Arc::new(pod),
            image: container.image.as_deref().unwrap_or_default(),
            policy: container.image_pull_policy.as_deref(),
            container: Some(&container.name),
            secrets: &[],
        })
        .await
}

fn told(events: &EventSink) -> Vec<String> {
    events
        .recorded()
        .into_iter()
        .map(|e| format!("{}: {}", e.reason, e.message))
        .collect()
}

#[tokio::test(start_paused = true)]
async fn a_missing_image_is_pulled_once_and_then_present() {
    let (puller, images, events) = puller(Images::default(), 1);
    let c = container("a:1", "IfNotPresent");
    ensure(&puller, &c).await.unwrap();
    ensure(&puller, &c).await.unwrap();
    assert_eq!(images.pulls.lock().unwrap().len(), 1);
    assert_eq!(
        told(&events),
        [
            "Pulling: Pulling image \"a:1\"",
            "Pulled: Successfully pulled image \"a:1\" in 0s (0s including waiting). Image size: \
             42 bytes.",
            "Pulled: Container image \"a:1\" already present on machine and can be accessed by \
             the pod",
        ]
    );
    let path = events.recorded()[0].object.field_path.clone();
    assert_eq!(path.as_deref(), Some("spec.containers{c}"));
}

#[tokio::test(start_paused = true)]
async fn always_asks_the_registry_and_never_does_not() {
    let (puller, images, events) = puller(Images::default(), 1);
    let error = ensure(&puller, &container("a:1", "Never"))
        .await
        .unwrap_err();
    assert_eq!(error.reason(), "ErrImageNeverPull");
    assert_eq!(
        error.to_string(),
        "Container image \"a:1\" is not present with pull policy of Never"
    );
    assert_eq!(
        told(&events).last().unwrap(),
        "Failed: Error: ErrImageNeverPull"
    );
    for _ in 0..2 {
        ensure(&puller, &container("a:1", "Always")).await.unwrap();
    }
    assert_eq!(images.pulls.lock().unwrap().len(), 2);
    ensure(&puller, &container("a:1", "Never")).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_failed_pull_backs_off_and_tells_why_in_both_reasons() {
    let (puller, images, events) = puller(Images::default(), 1);
    *images.failing.lock().unwrap() = Some("no such thing".to_owned());
    let c = container("a:1", "IfNotPresent");
    let error = ensure(&puller, &c).await.unwrap_err();
    assert_eq!(
        (error.reason(), error.to_string().as_str()),
        ("ErrImagePull", "no such thing")
    );
    tokio::time::advance(error.retry_after().unwrap()).await;
    let error = ensure(&puller, &c).await.unwrap_err();
    assert_eq!(error.reason(), "ImagePullBackOff");
    assert_eq!(
        error.to_string(),
        "Back-off pulling image \"a:1\": ErrImagePull: no such thing"
    );
    assert_eq!(error.retry_after(), Some(Duration::from_secs(8)));
    assert_eq!(images.pulls.lock().unwrap().len(), 1);
    assert_eq!(
        told(&events),
        [
            "Pulling: Pulling image \"a:1\"",
            "Failed: Failed to pull image \"a:1\": no such thing",
            "Failed: Error: ErrImagePull",
            "BackOff: Back-off pulling image \"a:1\"",
            "Failed: Error: ImagePullBackOff",
        ]
    );
    tokio::time::advance(Duration::from_secs(8)).await;
    *images.failing.lock().unwrap() = None;
    ensure(&puller, &c).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_name_that_cannot_be_is_named() {
    let (puller, _, events) = puller(Images::default(), 1);
    let error = ensure(&puller, &container("BAD name", "Always"))
        .await
        .unwrap_err();
    assert_eq!(error.reason(), "InvalidImageName");
    assert!(
        error
            .to_string()
            .contains("couldn't parse image name \"BAD name\""),
        "{error}"
    );
    assert!(told(&events)[0].starts_with("InspectFailed: Failed to apply default image tag"));
}

#[tokio::test(start_paused = true)]
async fn pods_of_one_image_share_a_slot_and_other_images_wait_for_theirs() {
    let hold = Some(Notify::new());
    let (puller, images, _) = puller(
        Images {
            hold,
            ..Images::default()
        },
        1,
    );
    let mut pulls = tokio::task::JoinSet::new();
    for image in ["a:1", "a:1", "a:1", "b:1"] {
        let puller = Arc::clone(&puller);
        pulls.spawn(async move {
            ensure(&puller, &container(image, "Always"))
                .await
                .map(|s| s.id)
        });
    }
    let wait = async |count| {
        while images.pulls.lock().unwrap().len() < count {
            tokio::task::yield_now().await;
        }
    };
    wait(3).await;
    assert!(
        images
            .pulls
            .lock()
            .unwrap()
            .iter()
            .all(|(image, _)| image == "a:1")
    );
    for _ in 0..3 {
        images.hold.as_ref().unwrap().notify_one();
        tokio::task::yield_now().await;
    }
    wait(4).await;
    images.hold.as_ref().unwrap().notify_one();
    assert!(pulls.join_all().await.iter().all(Result::is_ok));
}

#[test]
fn durations_read_as_in_go() {
    let text = |ms| go_duration(Duration::from_millis(ms));
    assert_eq!(
        [
            text(0),
            text(340),
            text(1200),
            text(1000),
            text(63_007),
            text(3_600_000)
        ],
        ["0s", "340ms", "1.2s", "1s", "1m3.007s", "1h0m0s"]
    );
}
