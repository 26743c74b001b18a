//! A directory as users treat it.

use super::*;
use crate::pod::spec;
use std::fs;

struct Place {
    dir: tempfile::TempDir,
    changes: mpsc::Receiver<PodChange>,
    events: EventSink,
    cancel: CancellationToken,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

fn manifest(name: &str, image: &str) -> String {
    format!(
        "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}}}, \
         spec: {{containers: [{{name: c, image: {image}}}]}}}}"
    )
}

impl Place {
    /// A source of `path` below a new directory, prepared by `prepare`.
    fn new(path: &str, prepare: impl FnOnce(&Path)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("m")).unwrap();
        prepare(dir.path());
        let (tx, changes) = mpsc::channel(8);
        let (events, cancel) = (EventSink::memory(), CancellationToken::new());
        let settings = FileSettings {
            path: dir.path().join(path),
            node: "n".to_owned(),
            check: Duration::from_secs(600),
            looked: CancellationToken::new(),
        };
        tokio::spawn(run(settings, events.clone(), tx, cancel.clone()));
        Self {
            dir,
            changes,
            events,
            cancel,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The next change in words: `set a-n i:1`.
    async fn next(&mut self) -> String {
        let change = tokio::time::timeout(Duration::from_secs(20), self.changes.recv());
        match change.await.expect("a change").unwrap() {
            PodChange::Set(pod) => {
                let image = pod.spec.as_ref().unwrap().containers[0].image.clone();
                format!("set {} {}", spec::name(&pod), image.unwrap())
            }
            PodChange::Gone(pod) => format!("gone {}", spec::name(&pod)),
            PodChange::Synced(_) => "synced".to_owned(),
        }
    }
}

#[tokio::test]
async fn files_come_change_and_go() {
    let mut place = Place::new("m", |dir| {
        fs::write(dir.join("m/a.yaml"), manifest("a", "i:1")).unwrap();
        fs::write(dir.join("m/.hidden"), manifest("h", "i:1")).unwrap();
        fs::write(dir.join("m/a.yaml~"), manifest("a", "old")).unwrap();
        fs::create_dir(dir.join("m/sub")).unwrap();
    });
    assert_eq!(place.next().await, "set a-n i:1");
    assert_eq!(place.next().await, "synced");
    // Written in place, replaced by name, removed.
    fs::write(place.path("m/a.yaml"), manifest("a", "i:2")).unwrap();
    assert_eq!(place.next().await, "gone a-n");
    assert_eq!(place.next().await, "set a-n i:2");
    fs::write(place.path("new"), manifest("a", "i:3")).unwrap();
    fs::rename(place.path("new"), place.path("m/a.yaml")).unwrap();
    assert_eq!(place.next().await, "gone a-n");
    assert_eq!(place.next().await, "set a-n i:3");
    fs::remove_file(place.path("m/a.yaml")).unwrap();
    assert_eq!(place.next().await, "gone a-n");
}

#[tokio::test]
async fn a_bad_file_names_itself_and_keeps_its_last_good_pod() {
    let mut place = Place::new("m", |dir| {
        fs::write(dir.join("m/a.yaml"), manifest("a", "i:1")).unwrap();
    });
    assert_eq!(place.next().await, "set a-n i:1");
    assert_eq!(place.next().await, "synced");
    fs::write(place.path("m/a.yaml"), "kind: [").unwrap();
    fs::write(place.path("m/b.yaml"), manifest("b", "i:1")).unwrap();
    assert_eq!(place.next().await, "set b-n i:1");
    // Half-written or wrong: whoever removes the file means it.
    fs::remove_file(place.path("m/a.yaml")).unwrap();
    assert_eq!(place.next().await, "gone a-n");
    let events = place.events.recorded();
    let about = events
        .iter()
        .find(|e| e.message.contains("a.yaml"))
        .unwrap();
    assert_eq!(about.reason, "FailedValidation");
    assert_eq!(about.object.kind.as_deref(), Some("Node"));
}

#[tokio::test]
async fn a_file_written_in_pieces_is_read_when_it_is_whole() {
    use std::io::Write;
    let mut place = Place::new("m", |_| {});
    assert_eq!(place.next().await, "synced");
    let text = "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec:\n  containers:\n  \
                - {name: c, image: i}\n  - {name: d, image: j}\n";
    let mut file = fs::File::create(place.path("m/a.yaml")).unwrap();
    for line in text.split_inclusive('\n') {
        file.write_all(line.as_bytes()).unwrap();
        std::thread::sleep(Duration::from_millis(20));
    }
    let change = place.changes.recv().await.unwrap();
    let PodChange::Set(pod) = change else {
        panic!("{change:?}");
    };
    assert_eq!(pod.spec.as_ref().unwrap().containers.len(), 2);
    assert!(
        place.events.recorded().is_empty(),
        "{:?}",
        place.events.recorded()
    );
}

#[tokio::test]
async fn links_and_single_files_work() {
    let mut place = Place::new("link", |dir| {
        fs::write(dir.join("elsewhere"), manifest("a", "i:1")).unwrap();
        std::os::unix::fs::symlink(dir.join("m"), dir.join("link")).unwrap();
        std::os::unix::fs::symlink(dir.join("elsewhere"), dir.join("m/a.yaml")).unwrap();
    });
    assert_eq!(place.next().await, "set a-n i:1");
    assert_eq!(place.next().await, "synced");
    // The directory is exchanged as a whole.
    fs::create_dir(place.path("m2")).unwrap();
    fs::write(place.path("m2/b.yaml"), manifest("b", "i:1")).unwrap();
    std::os::unix::fs::symlink(place.path("m2"), place.path("link2")).unwrap();
    fs::rename(place.path("link2"), place.path("link")).unwrap();
    assert_eq!(place.next().await, "gone a-n");
    assert_eq!(place.next().await, "set b-n i:1");

    let mut single = Place::new("one.yaml", |dir| {
        fs::write(dir.join("one.yaml"), manifest("a", "i:1")).unwrap();
    });
    assert_eq!(single.next().await, "set a-n i:1");
    assert_eq!(single.next().await, "synced");
    fs::write(single.path("new"), manifest("a", "i:2")).unwrap();
    fs::rename(single.path("new"), single.path("one.yaml")).unwrap();
    assert_eq!(single.next().await, "gone a-n");
    assert_eq!(single.next().await, "set a-n i:2");
}

#[tokio::test]
async fn a_missing_directory_has_no_pods_until_it_appears() {
    let mut place = Place::new("later", |_| {});
    assert_eq!(place.next().await, "synced");
    fs::create_dir(place.path("later")).unwrap();
    fs::write(place.path("later/a.yaml"), manifest("a", "i:1")).unwrap();
    assert_eq!(place.next().await, "set a-n i:1");
}

#[tokio::test]
async fn two_hundred_rewrites_end_with_the_last_one() {
    let mut place = Place::new("m", |_| {});
    assert_eq!(place.next().await, "synced");
    for i in 0..200 {
        fs::write(place.path("m/a.yaml"), manifest("a", &format!("i:{i}"))).unwrap();
    }
    loop {
        let change = place.next().await;
        if change == "set a-n i:199" {
            break;
        }
    }
    assert!(
        place.events.recorded().is_empty(),
        "{:?}",
        place.events.recorded()
    );
}
