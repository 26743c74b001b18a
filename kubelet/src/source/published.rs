//! What a source of manifests has told the manager: the difference to what it reads now is what
//! it tells next. Pure.

use super::{ANNOTATION_SEEN, PodChange, Source};
use crate::pod::spec;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// The pods of one source, by UID.
#[derive(Debug)]
pub(super) struct Published {
    source: Source,
    pods: BTreeMap<String, Arc<Pod>>,
    synced: bool,
}

/// What to tell.
#[derive(Debug, Default)]
pub(super) struct News {
    /// To the manager, in this order.
    pub(super) changes: Vec<PodChange>,
    /// Pods whose name another pod of the same source has already: ignored.
    pub(super) duplicates: Vec<Pod>,
}

impl Published {
    pub(super) fn new(source: Source) -> Self {
        Self {
            source,
            pods: BTreeMap::new(),
            synced: false,
        }
    }

    /// Takes all pods the source has now. `complete` says that nothing is still being read, so
    /// that what is missing does not exist.
    pub(super) fn replace(&mut self, pods: Vec<Pod>, complete: bool, now: Timestamp) -> News {
        let mut news = News::default();
        let mut names = BTreeSet::new();
        let mut kept = BTreeMap::new();
        let mut set = Vec::new();
        for mut pod in pods {
            let name = (
                spec::namespace(&pod).to_owned(),
                spec::name(&pod).to_owned(),
            );
            if !names.insert(name) {
                news.duplicates.push(pod);
                continue;
            }
            let uid = spec::uid(&pod).to_owned();
            let known = self.pods.remove(&uid);
            let seen = known.as_deref().and_then(first_seen);
            let seen = seen.unwrap_or_else(|| now.to_string());
            let annotations = pod.metadata.annotations.get_or_insert_default();
            annotations.insert(ANNOTATION_SEEN.to_owned(), seen);
            let pod = match known {
                Some(known) if *known == pod => known,
                Some(_) | None => {
                    let pod = Arc::new(pod);
                    set.push(PodChange::Set(pod.clone()));
                    pod
                }
            };
            kept.insert(uid, pod);
        }
        // First what goes: a successor of the same name waits for it.
        let gone = std::mem::replace(&mut self.pods, kept);
        news.changes.extend(gone.into_values().map(PodChange::Gone));
        news.changes.extend(set);
        if complete && !std::mem::replace(&mut self.synced, true) {
            news.changes.push(PodChange::Synced(self.source));
        }
        news
    }
}

fn first_seen(pod: &Pod) -> Option<String> {
    pod.metadata
        .annotations
        .as_ref()?
        .get(ANNOTATION_SEEN)
        .cloned()
}

/// `Error validating pod a_default(uid) from file due to duplicate pod name "a", ignoring`.
pub(super) fn duplicate_message(pod: &Pod, source: Source) -> String {
    format!(
        "Error validating pod {} from {} due to duplicate pod name {:?}, ignoring",
        spec::describe(pod),
        source.as_str(),
        spec::name(pod)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(uid: &str, name: &str) -> Pod {
        let mut pod = Pod::default();
        pod.metadata.uid = Some(uid.to_owned());
        pod.metadata.name = Some(name.to_owned());
        pod
    }

    fn words(news: &News) -> Vec<String> {
        let word = |change: &PodChange| match change {
            PodChange::Set(p) => format!("set {}", spec::uid(p)),
            PodChange::Gone(p) => format!("gone {}", spec::uid(p)),
            PodChange::Synced(source) => format!("synced {}", source.as_str()),
        };
        news.changes.iter().map(word).collect()
    }

    #[test]
    fn only_differences_are_told_and_what_goes_comes_first() {
        let mut published = Published::new(Source::File);
        let early = Timestamp::UNIX_EPOCH;
        let news = published.replace(vec![pod("1", "a")], false, early);
        assert_eq!(words(&news), ["set 1"]);
        let later = Timestamp::now();
        let news = published.replace(vec![pod("1", "a")], true, later);
        assert_eq!(words(&news), ["synced file"], "the first sight stays");
        let news = published.replace(vec![pod("2", "a"), pod("3", "b")], true, later);
        assert_eq!(words(&news), ["gone 1", "set 2", "set 3"]);
        let mut relabelled = pod("3", "b");
        relabelled.metadata.labels = Some([("a".to_owned(), "b".to_owned())].into());
        let news = published.replace(vec![relabelled], true, later);
        assert_eq!(words(&news), ["gone 2", "set 3"]);
        assert!(published.replace(Vec::new(), true, later).changes.len() == 1);
    }

    #[test]
    fn of_two_with_one_name_the_first_counts() {
        let mut published = Published::new(Source::File);
        let two = vec![pod("1", "a"), pod("2", "a")];
        let news = published.replace(two, true, Timestamp::now());
        assert_eq!(words(&news), ["set 1", "synced file"]);
        assert_eq!(news.duplicates.len(), 1);
        assert_eq!(
            duplicate_message(&news.duplicates[0], Source::File),
            "Error validating pod a_(2) from file due to duplicate pod name \"a\", ignoring"
        );
    }
}
