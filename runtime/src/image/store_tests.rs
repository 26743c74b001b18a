use super::*;
use crate::image::layer::{Expected, digest_of, stage};
use crate::image::unpack::Limits;
use crate::image::unpack::tests::Tar;

fn staged(store: &Store, tar: &[u8]) -> Arc<StagedLayer> {
    let expected = Expected {
        digest: None,
        diff_id: digest_of(tar),
    };
    Arc::new(stage(store.layers_dir(), &expected, tar, Limits::default()).unwrap())
}

fn image(id: char, tags: &[&str], layers: &[&Arc<StagedLayer>]) -> NewImage {
    let diff_ids = layers.iter().map(|l| l.info.diff_id.clone()).collect();
    NewImage {
        id: format!("sha256:{}", id.to_string().repeat(64)),
        tags: tags.iter().map(|t| (*t).to_owned()).collect(),
        digests: Vec::new(),
        config: r#"{"config":{"User":"me"},"rootfs":{"diff_ids":[]}}"#.to_owned(),
        diff_ids,
    }
}

fn tar(build: impl FnOnce(&mut Tar) -> &mut Tar) -> Vec<u8> {
    let mut tar = Tar::default();
    build(&mut tar);
    tar.finish()
}

/// Names in `layers`, however finished.
fn layer_dirs(root: &Path) -> usize {
    std::fs::read_dir(root.join("layers")).unwrap().count()
}

#[test]
fn layers_live_as_long_as_an_image_that_names_them() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let shared = staged(&store, &tar(|t| t.file("base", "x")));
    let own = staged(&store, &tar(|t| t.file("own", "y")));
    let one = image('a', &["docker.io/library/one:1"], &[&shared, &own]);
    store.commit(one, &[Arc::clone(&shared), own]).unwrap();
    let two = image('b', &["docker.io/library/two:1"], &[&shared]);
    store.commit(two, &[shared]).unwrap();
    assert_eq!(layer_dirs(root.path()), 2);
    store.remove("one:1").unwrap();
    assert_eq!(layer_dirs(root.path()), 1);
    assert!(store.find("one:1").is_err());
    let two = store.find("two:1").unwrap();
    assert_eq!(two.status().user, "me");
    assert!(store.lower_dirs(&two)[0].join("base").is_file());
    store.remove("two:1").unwrap();
    store.remove("two:1").unwrap();
    assert_eq!(layer_dirs(root.path()), 0);
}

#[test]
fn a_tag_moves_to_the_newest_image_and_untagging_keeps_other_names() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    store
        .commit(
            image(
                'a',
                &["docker.io/library/x:1", "docker.io/library/x:2"],
                &[],
            ),
            &[],
        )
        .unwrap();
    store
        .commit(image('b', &["docker.io/library/x:1"], &[]), &[])
        .unwrap();
    assert!(store.find("x:1").unwrap().id.starts_with("sha256:b"));
    assert_eq!(store.find("x:2").unwrap().tags, ["docker.io/library/x:2"]);
    store
        .commit(image('b', &["docker.io/library/x:3"], &[]), &[])
        .unwrap();
    store.remove("x:1").unwrap();
    assert_eq!(
        store.find("bbbbbb").unwrap().tags,
        ["docker.io/library/x:3"]
    );
    assert!(matches!(store.find("x:1"), Err(ImageError::NotStored(_))));
    store.remove(&format!("sha256:{}", "b".repeat(64))).unwrap();
    assert!(store.find("x:3").is_err());
}

#[test]
fn a_leased_image_cannot_be_removed_by_anybody() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    store
        .commit(image('a', &["docker.io/library/x:1"], &[]), &[])
        .unwrap();
    let id = store.acquire("x:1").unwrap().id.clone();
    store.acquire("x:1").unwrap();
    // Another process, as far as locks are concerned.
    let other = Store::open(root.path()).unwrap();
    for store in [&store, &other] {
        assert!(matches!(store.remove(&id), Err(ImageError::InUse(_))));
    }
    store.release(&id);
    assert!(other.remove(&id).is_err());
    store.release(&id);
    other.remove(&id).unwrap();
    // The first sees what the other did.
    assert!(store.find("x:1").is_err());
}

#[test]
fn what_a_killed_process_left_is_removed_at_open() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let layer = staged(&store, &tar(|t| t.file("f", "x")));
    store
        .commit(image('a', &["docker.io/library/x:1"], &[&layer]), &[layer])
        .unwrap();
    let layers = root.path().join("layers");
    // A partial directory without its maker, a layer without a record, a torn record.
    std::fs::create_dir_all(layers.join("abc.partial-1-2/fs")).unwrap();
    std::fs::create_dir_all(layers.join("d".repeat(64)).join("fs")).unwrap();
    std::fs::write(root.path().join("images").join("c.json"), "{").unwrap();
    // One whose maker lives.
    let living = staged(&store, &tar(|t| t.file("g", "y")));
    let store = Store::open(root.path()).unwrap();
    assert_eq!(layer_dirs(root.path()), 2);
    assert!(living.dir.is_dir());
    assert_eq!(store.images().len(), 1);
    drop(living);
    assert_eq!(layer_dirs(root.path()), 1);
}

#[test]
fn an_image_that_had_not_reached_the_disk_before_a_reboot_is_dropped() {
    let root = tempfile::tempdir().unwrap();
    let mut store = Store::open(root.path()).unwrap();
    store.boot_id = "an earlier boot".to_owned();
    store
        .commit(image('a', &["docker.io/library/a:1"], &[]), &[])
        .unwrap();
    store
        .commit(image('b', &["docker.io/library/b:1"], &[]), &[])
        .unwrap();
    store
        .make_durable(&format!("sha256:{}", "a".repeat(64)))
        .unwrap();
    let store = Store::open(root.path()).unwrap();
    assert!(store.find("a:1").unwrap().durable);
    assert!(store.find("b:1").is_err());
}

#[test]
fn implicit_parents_show_the_attributes_of_the_layer_below() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let base = staged(&store, &tar(|t| t.dir("tmp", 0o1777).dir("tmp/in", 0o700)));
    let top = staged(&store, &tar(|t| t.file("tmp/in/f", "x")));
    let new = image('a', &["docker.io/library/a:1"], &[&base, &top]);
    let record = store.commit(new, &[base, top]).unwrap();
    let dirs = store.lower_dirs(&record);
    assert_eq!(dirs.len(), 3);
    let mode = |path: &str| {
        let path = dirs[0].join(path);
        std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(path).unwrap()) & 0o7777
    };
    assert_eq!((mode("tmp"), mode("tmp/in")), (0o1777, 0o700));
    assert!(!dirs[0].join("tmp/in/f").exists());
    store.remove("a:1").unwrap();
    assert_eq!(layer_dirs(root.path()), 0);
}

#[test]
fn a_layer_that_vanished_makes_the_commit_say_so() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let mut new = image('a', &[], &[]);
    new.diff_ids = vec![format!("sha256:{}", "1".repeat(64))];
    assert!(matches!(
        store.commit(new, &[]),
        Err(CommitError::LayerGone(_))
    ));
}
