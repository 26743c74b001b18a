//! From objects to files: pure.

use super::plan::{FilesVolume, KeysOf, Source};
use crate::launch::LaunchContext;
use crate::launch::fields::{metadata_field, resource_field_of_pod};
use k8s_openapi::api::core::v1::{ConfigMap, DownwardAPIVolumeFile, Pod, Secret};
use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

/// A file of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct File {
    pub(crate) data: Vec<u8>,
    pub(crate) mode: u32,
    /// Owner, root without one.
    pub(crate) user: Option<u32>,
}

/// Files by path relative to the volume.
pub(crate) type Payload = BTreeMap<PathBuf, File>;

/// What a source gave.
#[derive(Debug, Clone)]
pub(crate) enum Fetched {
    ConfigMap(Option<Arc<ConfigMap>>),
    Secret(Option<Arc<Secret>>),
    /// Nothing to fetch.
    Downward,
    Token(String),
    /// It could not be fetched.
    Failed(String),
}

/// Whose files they are.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Owner {
    /// The user all containers run as.
    pub(crate) user: Option<u32>,
    /// fsGroup.
    pub(crate) group: Option<u32>,
}

/// The files of a volume, sources in order; a later source replaces files of an earlier one.
///
/// # Errors
/// Stock's words; of a projected volume all errors as one list.
pub(crate) fn payload(
    volume: &FilesVolume,
    fetched: &[Fetched],
    pod: &Pod,
    context: &LaunchContext,
    owner: Owner,
) -> Result<Payload, String> {
    let mut files = Payload::new();
    let mut errors = Vec::new();
    for (source, got) in volume.sources.iter().zip(fetched) {
        match from_source(volume, source, got, pod, context, owner) {
            Ok(more) => files.extend(more),
            Err(error) => errors.push(error),
        }
    }
    match errors.len() {
        0 => checked(files),
        1 => Err(errors.remove(0)),
        _ => {
            errors.dedup();
            Err(format!("[{}]", errors.join(", ")))
        }
    }
}

fn from_source(
    volume: &FilesVolume,
    source: &Source,
    got: &Fetched,
    pod: &Pod,
    context: &LaunchContext,
    owner: Owner,
) -> Result<Payload, String> {
    match (source, got) {
        (_, Fetched::Failed(message)) => Err(message.clone()),
        (Source::ConfigMap(keys), Fetched::ConfigMap(map)) => {
            let map = object(map.as_ref(), "configmap", keys)?;
            let lookup = |map: &ConfigMap| {
                let text = map.data.iter().flatten();
                let text = text.map(|(k, v)| (k.clone(), v.clone().into_bytes()));
                let binary = map.binary_data.iter().flatten();
                text.chain(binary.map(|(k, v)| (k.clone(), v.0.clone())))
                    .collect()
            };
            let data = map.map(|m| lookup(m)).unwrap_or_default();
            let missing = "configmap references non-existent config key";
            pick(data, keys, volume.mode, missing)
        }
        (Source::Secret(keys), Fetched::Secret(secret)) => {
            let secret = object(secret.as_ref(), "secret", keys)?;
            let data = secret.iter().flat_map(|s| s.data.iter().flatten());
            let data = data.map(|(k, v)| (k.clone(), v.0.clone())).collect();
            pick(
                data,
                keys,
                volume.mode,
                "references non-existent secret key",
            )
        }
        (Source::Downward(items), _) => downward(items, volume.mode, pod, context),
        (Source::Token(spec), Fetched::Token(token)) => {
            // With a user or group the token is for them alone; the group's bits come with it.
            let private = owner.user.is_some() || owner.group.is_some();
            let file = File {
                data: token.clone().into_bytes(),
                mode: if private { 0o600 } else { volume.mode },
                user: owner.user,
            };
            Ok([(PathBuf::from(&spec.path), file)].into())
        }
        (Source::ConfigMap(_) | Source::Secret(_) | Source::Token(_), _) => {
            Err("its sources changed while they were read".to_owned())
        }
    }
}

fn object<'o, T>(
    found: Option<&'o Arc<T>>,
    kind: &str,
    keys: &KeysOf,
) -> Result<Option<&'o Arc<T>>, String> {
    if found.is_none() && !keys.optional {
        return Err(format!("{kind} {:?} not found", keys.name));
    }
    Ok(found)
}

fn file_mode(mode: Option<i32>, default: u32) -> u32 {
    mode.and_then(|m| u32::try_from(m).ok())
        .map_or(default, |m| m & 0o7777)
}

fn pick(
    mut data: BTreeMap<String, Vec<u8>>,
    keys: &KeysOf,
    mode: u32,
    missing: &str,
) -> Result<Payload, String> {
    let file = |data, mode| File {
        data,
        mode,
        user: None,
    };
    if keys.items.is_empty() {
        let all = data.into_iter();
        return Ok(all.map(|(k, v)| (k.into(), file(v, mode))).collect());
    }
    let last = keys.items.len() - 1;
    let mut files = Payload::new();
    for (index, item) in keys.items.iter().enumerate() {
        let again = keys.items[index + 1..last + 1]
            .iter()
            .any(|i| i.key == item.key);
        let content = if again {
            data.get(&item.key).cloned()
        } else {
            data.remove(&item.key)
        };
        match content {
            Some(content) => {
                let content = file(content, file_mode(item.mode, mode));
                files.insert(PathBuf::from(&item.path), content);
            }
            None if keys.optional => {}
            None => return Err(format!("{missing}: {}", item.key)),
        }
    }
    Ok(files)
}

fn downward(
    items: &[DownwardAPIVolumeFile],
    mode: u32,
    pod: &Pod,
    context: &LaunchContext,
) -> Result<Payload, String> {
    let mut files = Payload::new();
    for item in items {
        let text = if let Some(field) = &item.field_ref {
            metadata_field(pod, &field.field_path)?
        } else if let Some(field) = &item.resource_field_ref {
            resource_field_of_pod(field, pod, context)?
        } else {
            String::new()
        };
        let file = File {
            data: text.into_bytes(),
            mode: file_mode(item.mode, mode),
            user: None,
        };
        files.insert(PathBuf::from(&item.path), file);
    }
    Ok(files)
}

/// No path may leave the volume or look like the writer's own names.
fn checked(files: Payload) -> Result<Payload, String> {
    let mut clean = Payload::new();
    for (path, file) in files {
        let parts: Vec<Component<'_>> = path
            .components()
            .filter(|c| *c != Component::CurDir)
            .collect();
        let inside = parts.iter().all(|c| matches!(c, Component::Normal(_)));
        // Names with two dots in front are the atomic writer's own; `./` before does not help.
        let own = parts
            .first()
            .is_some_and(|first| first.as_os_str().to_string_lossy().starts_with(".."));
        if parts.is_empty() || !inside || own {
            return Err(format!("invalid path {:?} in the volume", path.display()));
        }
        clean.insert(parts.iter().collect(), file);
    }
    let mut previous: Option<&Path> = None;
    for path in clean.keys() {
        if previous.is_some_and(|p| path.starts_with(p)) {
            return Err(format!(
                "path {:?} is both file and directory",
                previous.unwrap_or(path).display()
            ));
        }
        previous = Some(path);
    }
    Ok(clean)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(paths: &[&str]) -> Result<Payload, String> {
        let file = File {
            data: vec![],
            mode: 0o644,
            user: None,
        };
        checked(
            paths
                .iter()
                .map(|p| (PathBuf::from(p), file.clone()))
                .collect(),
        )
    }

    #[test]
    fn paths_that_leave_the_volume_or_clash_are_refused() {
        for bad in [
            &["/etc/x"][..],
            &["../x"],
            &["a/../x"],
            &[""],
            &["."],
            &["..data"],
            &["..2026/x"],
            &["./..data"],
            &["a", "a/b"],
        ] {
            assert!(of(bad).is_err(), "{bad:?}");
        }
        let good = of(&["a", "./b/c", "b/d", "e..", ".hidden"]).unwrap();
        assert!(good.contains_key(Path::new("b/c")) && good.len() == 5);
    }

    proptest! {
        #[test]
        fn no_path_that_passes_leads_out(path in "[a./]{0,12}") {
            if let Ok(files) = of(&[&path]) {
                for path in files.keys() {
                    prop_assert!(path.components().all(|c| matches!(c, Component::Normal(_))));
                    prop_assert!(!path.to_string_lossy().starts_with(".."));
                }
            }
        }
    }
}
