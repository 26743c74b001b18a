//! A container's environment: envFrom, env with valueFrom and expansion, service variables.

use super::env_file;
use super::expand::expand;
use super::fields::{env_field, resource_field};
use super::service_env::service_env;
use super::{EnvObjects, LaunchContext, LaunchError, pod_namespace};
use k8s_openapi::api::core::v1::{
    ConfigMap, ConfigMapKeySelector, Container, EnvFromSource, EnvVarSource, FileKeySelector, Pod,
    Secret, SecretKeySelector,
};
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// Names of the objects a container's environment needs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EnvNeeds {
    /// ConfigMaps of the pod's namespace.
    pub config_maps: BTreeSet<String>,
    /// Secrets of the pod's namespace.
    pub secrets: BTreeSet<String>,
}

/// What has to be fetched before [`environment`] can answer.
pub fn needs(container: &Container) -> EnvNeeds {
    let mut needs = EnvNeeds::default();
    for from in container.env_from.iter().flatten() {
        needs
            .config_maps
            .extend(from.config_map_ref.iter().map(|r| r.name.clone()));
        needs
            .secrets
            .extend(from.secret_ref.iter().map(|r| r.name.clone()));
    }
    for source in container
        .env
        .iter()
        .flatten()
        .filter_map(|e| e.value_from.as_ref())
    {
        needs
            .config_maps
            .extend(source.config_map_key_ref.iter().map(|r| r.name.clone()));
        needs
            .secrets
            .extend(source.secret_key_ref.iter().map(|r| r.name.clone()));
    }
    needs
}

/// The variables in definition order (a later definition keeps the first one's place), then
/// service variables that nothing overrides.
struct Variables {
    order: Vec<String>,
    values: BTreeMap<String, String>,
}

impl Variables {
    fn set(&mut self, name: &str, value: String) {
        if self.values.insert(name.to_owned(), value).is_none() {
            self.order.push(name.to_owned());
        }
    }
}

/// Everything a value may come from.
struct Sources<'a> {
    pod: &'a Pod,
    container: &'a Container,
    context: &'a LaunchContext,
    objects: &'a EnvObjects,
    pod_ips: &'a [IpAddr],
}

/// The container's environment.
///
/// # Errors
/// [`LaunchError::Config`] for a missing object or key that is not optional, and for fields that
/// do not exist.
pub fn environment(
    pod: &Pod,
    container: &Container,
    context: &LaunchContext,
    objects: &EnvObjects,
    pod_ips: &[IpAddr],
) -> Result<Vec<(String, String)>, LaunchError> {
    let sources = Sources {
        pod,
        container,
        context,
        objects,
        pod_ips,
    };
    let links = pod.spec.as_ref().and_then(|s| s.enable_service_links);
    let services = service_env(&objects.services, pod_namespace(pod), links.unwrap_or(true));
    let mut variables = Variables {
        order: Vec::new(),
        values: BTreeMap::new(),
    };
    for from in container.env_from.iter().flatten() {
        sources.env_from(from, &mut variables)?;
    }
    for variable in container.env.iter().flatten() {
        let plain = variable.value.as_deref().unwrap_or_default();
        let value = if !plain.is_empty() {
            expand(plain, |name| {
                variables
                    .values
                    .get(name)
                    .or_else(|| services.get(name))
                    .map(|v| Cow::Borrowed(v.as_str()))
            })
        } else if let Some(source) = &variable.value_from {
            match sources.value_from(source)? {
                Some(value) => value,
                None => continue,
            }
        } else {
            String::new()
        };
        variables.set(&variable.name, value);
    }
    let Variables { order, mut values } = variables;
    let mut env: Vec<(String, String)> = order
        .into_iter()
        .filter_map(|name| values.remove_entry(&name))
        .collect();
    let own: BTreeSet<String> = env.iter().map(|(name, _)| name.clone()).collect();
    env.extend(services.into_iter().filter(|(name, _)| !own.contains(name)));
    Ok(env)
}

impl Sources<'_> {
    fn config_map(&self, name: &str) -> Result<Option<&ConfigMap>, LaunchError> {
        match self.objects.config_maps.get(name) {
            Some(found) => Ok(found.as_deref()),
            None => Err(LaunchError::Config(format!(
                "configmap {}/{name} has not been read",
                pod_namespace(self.pod)
            ))),
        }
    }

    fn secret(&self, name: &str) -> Result<Option<&Secret>, LaunchError> {
        match self.objects.secrets.get(name) {
            Some(found) => Ok(found.as_deref()),
            None => Err(LaunchError::Config(format!(
                "secret {}/{name} has not been read",
                pod_namespace(self.pod)
            ))),
        }
    }

    fn env_from(&self, from: &EnvFromSource, out: &mut Variables) -> Result<(), LaunchError> {
        let prefix = from.prefix.as_deref().unwrap_or_default();
        if let Some(reference) = &from.config_map_ref {
            match self.config_map(&reference.name)? {
                Some(map) => {
                    for (key, value) in map.data.iter().flatten() {
                        out.set(&format!("{prefix}{key}"), value.clone());
                    }
                }
                None if reference.optional == Some(true) => {}
                None => return Err(not_found("configmap", &reference.name)),
            }
        } else if let Some(reference) = &from.secret_ref {
            match self.secret(&reference.name)? {
                Some(secret) => {
                    for (key, value) in secret.data.iter().flatten() {
                        out.set(&format!("{prefix}{key}"), lossy(&value.0));
                    }
                }
                None if reference.optional == Some(true) => {}
                None => return Err(not_found("secret", &reference.name)),
            }
        }
        Ok(())
    }

    /// The value, or nothing when an optional source does not exist.
    fn value_from(&self, source: &EnvVarSource) -> Result<Option<String>, LaunchError> {
        if let Some(field) = &source.field_ref {
            return env_field(self.pod, &field.field_path, self.context, self.pod_ips)
                .map(Some)
                .map_err(LaunchError::Config);
        }
        if let Some(field) = &source.resource_field_ref {
            let named = field.container_name.as_deref().unwrap_or_default();
            return if named.is_empty() || named == self.container.name {
                resource_field(field, self.pod, self.container, self.context)
            } else {
                super::fields::resource_field_of_pod(field, self.pod, self.context)
            }
            .map(Some)
            .map_err(LaunchError::Config);
        }
        if let Some(key) = &source.config_map_key_ref {
            return self.config_map_key(key);
        }
        if let Some(key) = &source.secret_key_ref {
            return self.secret_key(key);
        }
        if let Some(key) = &source.file_key_ref {
            return self.file_key(key);
        }
        Ok(Some(String::new()))
    }

    fn config_map_key(&self, key: &ConfigMapKeySelector) -> Result<Option<String>, LaunchError> {
        let optional = key.optional == Some(true);
        let Some(map) = self.config_map(&key.name)? else {
            return optional_or(optional, not_found("configmap", &key.name));
        };
        match map.data.iter().flatten().find(|(k, _)| **k == key.key) {
            Some((_, value)) => Ok(Some(value.clone())),
            None => optional_or(optional, self.no_key(&key.key, "ConfigMap", &key.name)),
        }
    }

    fn secret_key(&self, key: &SecretKeySelector) -> Result<Option<String>, LaunchError> {
        let optional = key.optional == Some(true);
        let Some(secret) = self.secret(&key.name)? else {
            return optional_or(optional, not_found("secret", &key.name));
        };
        match secret.data.iter().flatten().find(|(k, _)| **k == key.key) {
            Some((_, value)) => Ok(Some(lossy(&value.0))),
            None => optional_or(optional, self.no_key(&key.key, "Secret", &key.name)),
        }
    }

    fn file_key(&self, key: &FileKeySelector) -> Result<Option<String>, LaunchError> {
        let place = (key.volume_name.clone(), key.path.clone());
        let unread = || Err(LaunchError::Config("couldn't parse env file".into()));
        let Some(Ok(file)) = self.objects.files.get(&place) else {
            return unread();
        };
        match env_file::value(file, &key.key) {
            Ok(value) if !value.is_empty() => Ok(Some(value)),
            Ok(_) => optional_or(
                key.optional == Some(true),
                LaunchError::Config(format!(
                    "environment variable key {:?} not found in file {:?}",
                    key.key, key.path
                )),
            ),
            Err(_) => unread(),
        }
    }

    fn no_key(&self, key: &str, kind: &str, name: &str) -> LaunchError {
        LaunchError::Config(format!(
            "couldn't find key {key} in {kind} {}/{name}",
            pod_namespace(self.pod)
        ))
    }
}

fn optional_or(optional: bool, error: LaunchError) -> Result<Option<String>, LaunchError> {
    if optional { Ok(None) } else { Err(error) }
}

fn not_found(kind: &str, name: &str) -> LaunchError {
    LaunchError::Config(format!("{kind} {name:?} not found"))
}

/// The environment carries text; bytes that are none become replacement characters.
fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::super::testing::pod_of;
    use super::*;
    use serde_json::{Value, json};
    use std::sync::Arc;

    fn objects() -> EnvObjects {
        let map: ConfigMap =
            serde_json::from_value(json!({"data": {"color": "red", "size": "9"}})).unwrap();
        let secret: Secret = serde_json::from_value(json!({"data": {"pw": "czNjcjN0"}})).unwrap();
        let service = serde_json::from_value(json!({
            "metadata": {"name": "db", "namespace": "ns"},
            "spec": {"clusterIP": "10.0.0.7", "ports": [{"port": 5432}]},
        }))
        .unwrap();
        EnvObjects {
            config_maps: [("cm".into(), Some(Arc::new(map))), ("gone".into(), None)].into(),
            secrets: [("s".into(), Some(Arc::new(secret))), ("gone".into(), None)].into(),
            services: vec![Arc::new(service)],
            files: [
                (("v".into(), "env".into()), Ok("A='from file'\n".into())),
                (("v".into(), "bad".into()), Ok("A".into())),
            ]
            .into(),
        }
    }

    #[test]
    fn a_value_comes_from_a_file_of_a_volume() {
        let from = |path: &str, key: &str, optional: bool| {
            let key = json!({"volumeName": "v", "path": path, "key": key, "optional": optional});
            run(json!({"env": [{"name": "X", "valueFrom": {"fileKeyRef": key}}]}))
        };
        let x = |value: &str| ("X".to_owned(), value.to_owned());
        assert!(from("env", "A", false).unwrap().contains(&x("from file")));
        assert!(
            !from("env", "B", true)
                .unwrap()
                .iter()
                .any(|(n, _)| n == "X")
        );
        for (path, key, optional, want) in [
            (
                "env",
                "B",
                false,
                "environment variable key \"B\" not found in file \"env\"",
            ),
            ("bad", "A", true, "couldn't parse env file"),
            ("none", "A", true, "couldn't parse env file"),
        ] {
            assert_eq!(from(path, key, optional).unwrap_err().to_string(), want);
        }
    }

    fn run(container: Value) -> Result<Vec<(String, String)>, LaunchError> {
        let mut container = container;
        container["name"] = json!("c");
        let pod = pod_of(container);
        let container = &pod.spec.as_ref().unwrap().containers[0];
        environment(&pod, container, &LaunchContext::default(), &objects(), &[])
    }

    fn own(env: Vec<(String, String)>) -> Vec<String> {
        env.into_iter()
            .filter(|(k, _)| !k.starts_with("DB_"))
            .map(|(k, v)| format!("{k}={v}"))
            .collect()
    }

    #[test]
    fn env_overrides_env_from_and_expands_what_came_before() {
        let env = run(json!({
            "envFrom": [
                {"prefix": "P_", "configMapRef": {"name": "cm"}},
                {"secretRef": {"name": "s"}},
                {"configMapRef": {"name": "gone", "optional": true}},
            ],
            "env": [
                {"name": "P_color", "value": "blue"},
                {"name": "A", "value": "$(P_color)/$(pw)/$(LATER)/$$(A)"},
                {"name": "LATER", "value": "x"},
                {"name": "DBURL", "value": "$(DB_SERVICE_HOST):$(DB_SERVICE_PORT)"},
                {"name": "EMPTY"},
            ],
        }))
        .unwrap();
        assert_eq!(
            own(env),
            [
                "P_color=blue",
                "P_size=9",
                "pw=s3cr3t",
                "A=blue/s3cr3t/$(LATER)/$(A)",
                "LATER=x",
                "DBURL=10.0.0.7:5432",
                "EMPTY="
            ]
        );
    }

    #[test]
    fn service_variables_follow_and_never_override() {
        let env = run(json!({"env": [{"name": "DB_SERVICE_HOST", "value": "mine"}]})).unwrap();
        let hosts: Vec<_> = env.iter().filter(|(k, _)| k == "DB_SERVICE_HOST").collect();
        assert_eq!(hosts.len(), 1);
        assert_eq!(hosts[0].1, "mine");
        assert!(
            env.iter()
                .any(|(k, v)| k == "DB_SERVICE_PORT" && v == "5432")
        );
    }

    #[test]
    fn values_come_from_keys_and_missing_optional_ones_are_left_out() {
        let env = run(json!({"env": [
            {"name": "C", "valueFrom": {"configMapKeyRef": {"name": "cm", "key": "color"}}},
            {"name": "S", "valueFrom": {"secretKeyRef": {"name": "s", "key": "pw"}}},
            {"name": "O", "valueFrom": {"configMapKeyRef": {"name": "gone", "key": "k", "optional": true}}},
            {"name": "K", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k", "optional": true}}},
            {"name": "N", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        ]}))
        .unwrap();
        assert_eq!(own(env), ["C=red", "S=s3cr3t", "N=p"]);
    }

    #[test]
    fn what_is_missing_is_named_as_stock_names_it() {
        for (source, want) in [
            (
                json!({"configMapKeyRef": {"name": "gone", "key": "k"}}),
                "configmap \"gone\" not found",
            ),
            (
                json!({"secretKeyRef": {"name": "gone", "key": "k"}}),
                "secret \"gone\" not found",
            ),
            (
                json!({"configMapKeyRef": {"name": "cm", "key": "k"}}),
                "couldn't find key k in ConfigMap ns/cm",
            ),
            (
                json!({"secretKeyRef": {"name": "s", "key": "k"}}),
                "couldn't find key k in Secret ns/s",
            ),
        ] {
            let error = run(json!({"env": [{"name": "X", "valueFrom": source}]})).unwrap_err();
            assert_eq!(error.to_string(), want);
            assert_eq!(error.reason(), "CreateContainerConfigError");
        }
        let error = run(json!({"envFrom": [{"configMapRef": {"name": "gone"}}]})).unwrap_err();
        assert_eq!(error.to_string(), "configmap \"gone\" not found");
    }

    #[test]
    fn needs_lists_every_object_once() {
        let pod = pod_of(json!({"name": "c",
            "envFrom": [{"configMapRef": {"name": "a"}}, {"secretRef": {"name": "s"}}],
            "env": [{"name": "X", "valueFrom": {"configMapKeyRef": {"name": "a", "key": "k"}}}],
        }));
        let needs = needs(&pod.spec.unwrap().containers[0]);
        assert_eq!(needs.config_maps, BTreeSet::from(["a".to_owned()]));
        assert_eq!(needs.secrets, BTreeSet::from(["s".to_owned()]));
    }
}
