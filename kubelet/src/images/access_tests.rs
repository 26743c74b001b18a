use super::*;
use runtime::service::{ImageConfig, ImageId};

fn secret(name: &str, hash: &str) -> SecretSource {
    SecretSource {
        namespace: "ns".to_owned(),
        name: name.to_owned(),
        uid: format!("uid-{name}"),
        credential_hash: hash.to_owned(),
    }
}

fn image(id: &str, tag: &str) -> ImageStatus {
    ImageStatus {
        id: ImageId(id.to_owned()),
        repo_tags: vec![tag.to_owned()],
        repo_digests: Vec::new(),
        size_bytes: 1,
        pinned: false,
        user: String::new(),
        config: ImageConfig::default(),
    }
}

fn open(root: &Path, stored: &[ImageStatus]) -> Access {
    Access::open(root, Verification::default(), stored)
}

#[test]
fn an_image_pulled_with_a_secret_is_for_pods_that_have_it_even_after_a_restart() {
    let root = tempfile::tempdir().unwrap();
    let access = open(root.path(), &[]);
    let with = PulledWith::Secret(secret("a", "1"));
    access.begin("r.io/x:1").done("id", with);
    for access in [access, open(root.path(), &[])] {
        let may = |secrets: Vec<SecretSource>| access.may_use("r.io/x:2", "id", || secrets);
        assert!(may(vec![secret("a", "1")]));
        assert!(!may(vec![]), "without credentials");
        assert!(!may(vec![secret("b", "2")]), "with others");
        let other_name = access.may_use("mirror.io/x:1", "id", || vec![secret("a", "1")]);
        assert!(!other_name, "another registry has to be asked");
    }
    let again = open(root.path(), &[]);
    assert!(
        again.may_use("r.io/x:1", "id", || vec![secret("b", "1")]),
        "equal credentials"
    );
    assert!(
        again.may_use("r.io/x:1", "id", || vec![secret("b", "9")]),
        "remembered, then renewed"
    );
}

#[test]
fn what_needs_no_credentials_or_was_there_before_is_for_all() {
    let root = tempfile::tempdir().unwrap();
    let access = open(root.path(), &[]);
    assert!(access.may_use("r.io/x", "id", Vec::new), "preloaded");
    access
        .begin("r.io/x")
        .done("id", PulledWith::Secret(secret("a", "1")));
    assert!(!access.may_use("r.io/x", "id", Vec::new));
    access.begin("r.io/x").done("id", PulledWith::Node);
    assert!(access.may_use("r.io/x", "id", Vec::new));
    access
        .begin("r.io/x")
        .done("id", PulledWith::Secret(secret("a", "1")));
    assert!(access.may_use("r.io/x", "id", Vec::new), "never narrower");
}

#[test]
fn a_pull_cut_short_leaves_an_image_that_has_to_be_asked_for() {
    let root = tempfile::tempdir().unwrap();
    let access = open(root.path(), &[]);
    std::mem::forget(access.begin("r.io/x:1"));
    assert!(
        !access.may_use("r.io/x:1", "id", Vec::new),
        "another pod's pull is under way"
    );
    let stored = [image("id", "r.io/x:1"), image("other", "r.io/y:1")];
    let access = open(root.path(), &stored);
    assert!(!access.may_use("r.io/x:1", "id", Vec::new));
    assert!(access.may_use("r.io/y:1", "other", Vec::new));
    access.begin("r.io/y:1").failed();
    let access = open(root.path(), &stored);
    assert!(
        access.may_use("r.io/y:1", "other", Vec::new),
        "a failed pull leaves nothing"
    );
}

#[test]
fn records_of_removed_images_go_and_broken_ones_harm_nobody() {
    let root = tempfile::tempdir().unwrap();
    let access = open(root.path(), &[]);
    let with = || PulledWith::Secret(secret("a", "1"));
    access.begin("r.io/x").done("x", with());
    access.begin("r.io/y").done("y", with());
    access.prune(|| vec![image("y", "r.io/y:latest")]);
    let pulled = root.path().join("image_manager/pulled");
    std::fs::write(pulled.join("sha256-0"), "{").unwrap();
    let access = open(root.path(), &[]);
    assert!(access.may_use("r.io/x", "x", Vec::new));
    assert!(!access.may_use("r.io/y", "y", Vec::new));
}

#[test]
fn policies_decide_who_is_asked() {
    let listed = Verification::UnlessListed(vec!["r.io/a".to_owned(), "r.io/team/*".to_owned()]);
    for (policy, image, by_kubelet, expected) in [
        (Verification::Never, "r.io/x", true, false),
        (Verification::UnlessPreloaded, "r.io/x", false, false),
        (Verification::UnlessPreloaded, "r.io/x", true, true),
        (Verification::Always, "r.io/x", false, true),
        (listed.clone(), "r.io/a:1@sha256:00", true, false),
        (listed.clone(), "r.io/ab", false, true),
        (listed.clone(), "r.io/team/x:1", true, false),
        (listed, "r.io/teams", true, true),
    ] {
        assert_eq!(
            required(&policy, image, by_kubelet),
            expected,
            "{policy:?} {image}"
        );
    }
    for wrong in [" r.io", "/*", "*", "r.io/*/x", "r.io/x:1"] {
        assert!(check_listed(wrong).is_some(), "{wrong:?}");
    }
    for right in ["r.io/*", "r.io:5000/x", "busybox"] {
        assert_eq!(check_listed(right), None, "{right:?}");
    }
}

#[test]
fn records_have_the_form_of_the_stock_kubelet() {
    let root = tempfile::tempdir().unwrap();
    let access = open(root.path(), &[]);
    access
        .begin("r.io/x:1")
        .done("sha256:1", PulledWith::Secret(secret("a", "h")));
    let file = root
        .path()
        .join("image_manager/pulled")
        .join(file_name("sha256:1"));
    let record: serde_json::Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    assert_eq!(record["kind"], "ImagePulledRecord");
    assert_eq!(record["apiVersion"], API_VERSION);
    assert_eq!(record["imageRef"], "sha256:1");
    assert_eq!(
        record["credentialMapping"]["r.io/x"]["kubernetesSecrets"][0],
        serde_json::json!({"namespace": "ns", "name": "a", "uid": "uid-a", "credentialHash": "h"})
    );
    assert_eq!(credential_hash("u", "p").len(), 64);
}
