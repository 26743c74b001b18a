//! Reads the checked tree of a configuration by path. Pure.

use super::duration;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

/// Typed look into the tree. The tree has been checked: what is there has the right type.
pub(super) struct Tree<'a>(pub(super) &'a Map<String, Value>);

impl Tree<'_> {
    pub(super) fn get(&self, path: &str) -> Option<&Value> {
        let mut parts = path.split('.');
        let mut value = self.0.get(parts.next()?)?;
        for part in parts {
            value = value.get(part)?;
        }
        (!value.is_null()).then_some(value)
    }

    pub(super) fn text(&self, path: &str, default: &str) -> String {
        let found = self.get(path).and_then(Value::as_str);
        found
            .filter(|t| !t.is_empty())
            .unwrap_or(default)
            .to_owned()
    }

    pub(super) fn path(&self, path: &str, default: &str) -> PathBuf {
        PathBuf::from(self.text(path, default))
    }

    pub(super) fn bool(&self, path: &str, default: bool) -> bool {
        self.get(path).and_then(Value::as_bool).unwrap_or(default)
    }

    pub(super) fn int<T: TryFrom<i64>>(&self, path: &str, default: T) -> T {
        let found = self.get(path).and_then(Value::as_i64);
        found.and_then(|n| T::try_from(n).ok()).unwrap_or(default)
    }

    /// Like [`Tree::int`], but 0 means the default (fields that are no pointers in Go).
    pub(super) fn positive<T: TryFrom<i64>>(&self, path: &str, default: T) -> T {
        match self.get(path).and_then(Value::as_i64) {
            Some(0) | None => default,
            Some(n) => T::try_from(n).unwrap_or(default),
        }
    }

    pub(super) fn duration(&self, path: &str, default: Duration) -> Duration {
        let found = self.get(path).and_then(Value::as_str);
        let found = found.and_then(duration::parse);
        found.filter(|d| !d.is_zero()).unwrap_or(default)
    }

    pub(super) fn texts(&self, path: &str) -> Vec<String> {
        let items = self.get(path).and_then(Value::as_array);
        let texts = items.into_iter().flatten().filter_map(Value::as_str);
        texts.map(str::to_owned).collect()
    }

    pub(super) fn map(&self, path: &str) -> BTreeMap<String, String> {
        let map = self.get(path).and_then(Value::as_object);
        let pairs = map.into_iter().flatten();
        pairs
            .filter_map(|(k, v)| Some((k.clone(), v.as_str()?.to_owned())))
            .collect()
    }
}
