//! A kubeconfig, boiled down to what a node needs: where, whom to trust, and its certificate.

use super::reload::PemSource;
use base64::Engine;
use serde::Deserialize;
use std::path::{Path, PathBuf};

/// The parts of a kubeconfig we use. Unknown fields are allowed: other clients have theirs.
#[derive(Deserialize, Default)]
#[serde(rename_all = "kebab-case", default)]
struct Kubeconfig {
    current_context: Option<String>,
    contexts: Vec<NamedContext>,
    clusters: Vec<NamedCluster>,
    users: Vec<NamedUser>,
}

#[derive(Deserialize)]
struct NamedContext {
    name: String,
    context: Context,
}

#[derive(Deserialize)]
struct Context {
    cluster: String,
    #[serde(default)]
    user: String,
}

#[derive(Deserialize)]
struct NamedCluster {
    name: String,
    cluster: Cluster,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Cluster {
    server: Option<String>,
    insecure_skip_tls_verify: Option<bool>,
    certificate_authority: Option<String>,
    certificate_authority_data: Option<String>,
    tls_server_name: Option<String>,
}

#[derive(Deserialize)]
struct NamedUser {
    name: String,
    user: User,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct User {
    client_certificate: Option<String>,
    client_certificate_data: Option<String>,
    client_key: Option<String>,
    client_key_data: Option<String>,
}

/// Why a kubeconfig cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KubeconfigError {
    /// Not there, not readable, not a kubeconfig.
    #[error("read kubeconfig {}: {cause}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        cause: String,
    },
    /// Something in it is missing or wrong.
    #[error("kubeconfig {}: {what}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What, by path inside the file.
        what: String,
    },
}

/// The apiserver as this node sees it.
#[derive(Debug, Clone)]
pub struct Endpoint {
    /// Base address.
    pub server: http::Uri,
    /// Name expected in the server's certificate; empty: the host of `server`.
    pub server_name: String,
    /// Authorities of the server's certificate.
    pub ca: PemSource,
    /// The node's certificate (chain).
    pub certificate: PemSource,
    /// Its key.
    pub key: PemSource,
}

/// Reads the current context of a kubeconfig.
pub fn read(path: &Path) -> Result<Endpoint, KubeconfigError> {
    let config = parse(path)?;
    let found = current(&config).and_then(|(cluster, user)| endpoint(path, cluster, user));
    found.map_err(|what| KubeconfigError::Content {
        path: path.to_owned(),
        what,
    })
}

fn parse(path: &Path) -> Result<Kubeconfig, KubeconfigError> {
    let failed = |cause: String| KubeconfigError::Read {
        path: path.to_owned(),
        cause,
    };
    let text = std::fs::read_to_string(path).map_err(|e| failed(e.to_string()))?;
    serde_saphyr::from_str(&text).map_err(|e| failed(e.to_string()))
}

/// Cluster and user of the current context.
fn current(config: &Kubeconfig) -> Result<(&Cluster, &User), String> {
    let name = config.current_context.clone().filter(|c| !c.is_empty());
    let contexts = &config.contexts;
    let context = match (&name, contexts.as_slice()) {
        (Some(name), all) => all
            .iter()
            .find(|c| c.name == *name)
            .ok_or_else(|| format!("current-context {name:?} is not among contexts"))?,
        (None, [only]) => only,
        (None, _) => return Err("current-context is missing".to_owned()),
    };
    let context = &context.context;
    let cluster = config
        .clusters
        .iter()
        .find(|c| c.name == context.cluster)
        .ok_or_else(|| format!("cluster {:?} is not among clusters", context.cluster))?;
    let user = config
        .users
        .iter()
        .find(|u| u.name == context.user)
        .ok_or_else(|| format!("user {:?} is not among users", context.user))?;
    Ok((&cluster.cluster, &user.user))
}

fn endpoint(path: &Path, cluster: &Cluster, user: &User) -> Result<Endpoint, String> {
    if cluster.insecure_skip_tls_verify == Some(true) {
        return Err("insecure-skip-tls-verify is not supported: give certificate-authority".into());
    }
    let text = cluster.server.clone().unwrap_or_default();
    let server: http::Uri = text
        .parse()
        .map_err(|e| format!("server {text:?} is not a URL: {e}"))?;
    if server.scheme_str() != Some("https") || server.host().is_none() {
        return Err(format!("server {text:?} is not an https:// URL"));
    }
    let [ca, certificate, key] = sources(path, cluster, user)?;
    Ok(Endpoint {
        server,
        server_name: cluster.tls_server_name.clone().unwrap_or_default(),
        ca,
        certificate,
        key,
    })
}

/// CA, certificate and key. Text in the kubeconfig wins over a file, as with every other client.
fn sources(kubeconfig: &Path, cluster: &Cluster, user: &User) -> Result<[PemSource; 3], String> {
    let source = |file: &Option<String>, data: &Option<String>, part: &Part| {
        if data.as_ref().is_some_and(|d| !d.is_empty()) {
            return Ok(PemSource::Inside {
                file: kubeconfig.to_owned(),
                place: part.data_name,
                find: part.find,
            });
        }
        let Some(file) = file.as_ref().filter(|f| !f.is_empty()) else {
            return Err(format!(
                "{} is missing: a node needs its certificate, key and a CA",
                part.name
            ));
        };
        let dir = kubeconfig.parent().unwrap_or(Path::new("/"));
        Ok(PemSource::File(dir.join(file)))
    };
    Ok([
        source(
            &cluster.certificate_authority,
            &cluster.certificate_authority_data,
            &CA,
        )?,
        source(
            &user.client_certificate,
            &user.client_certificate_data,
            &CERTIFICATE,
        )?,
        source(&user.client_key, &user.client_key_data, &KEY)?,
    ])
}

/// A field with PEM text, in its two spellings, and how to find the text again.
struct Part {
    name: &'static str,
    data_name: &'static str,
    find: fn(&Path) -> Result<Vec<u8>, String>,
}

const CA: Part = Part {
    name: "certificate-authority",
    data_name: "certificate-authority-data",
    find: |path| {
        data(path, CA.data_name, |c, _| {
            c.certificate_authority_data.clone()
        })
    },
};
const CERTIFICATE: Part = Part {
    name: "client-certificate",
    data_name: "client-certificate-data",
    find: |path| {
        data(path, CERTIFICATE.data_name, |_, u| {
            u.client_certificate_data.clone()
        })
    },
};
const KEY: Part = Part {
    name: "client-key",
    data_name: "client-key-data",
    find: |path| data(path, KEY.data_name, |_, u| u.client_key_data.clone()),
};

/// Decodes one `…-data` field of the kubeconfig as it is now.
fn data(
    path: &Path,
    name: &str,
    pick: impl Fn(&Cluster, &User) -> Option<String>,
) -> Result<Vec<u8>, String> {
    let config = parse(path).map_err(|e| e.to_string())?;
    let (cluster, user) = current(&config)?;
    let text = pick(cluster, user).unwrap_or_default();
    base64::engine::general_purpose::STANDARD
        .decode(text.trim())
        .map_err(|e| format!("{name} of {} is not base64: {e}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(text: &str) -> Result<Endpoint, KubeconfigError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kubeconfig");
        std::fs::write(&path, text).unwrap();
        read(&path)
    }

    #[test]
    fn text_inside_the_kubeconfig_is_found_again_when_it_changes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kubeconfig");
        for (base64, text) in [("a2V5", "key"), ("bmV3", "new")] {
            let user = format!("{{client-certificate: c, client-key-data: {base64}}}");
            let cluster = "{server: 'https://h', certificate-authority: ca}";
            std::fs::write(&path, kubeconfig(cluster, &user)).unwrap();
            assert_eq!((KEY.find)(&path).unwrap(), text.as_bytes());
        }
        std::fs::write(&path, kubeconfig("{}", "{client-key-data: '***'}")).unwrap();
        let error = (KEY.find)(&path).unwrap_err();
        assert!(error.contains("client-key-data of"), "{error}");
    }

    fn kubeconfig(cluster: &str, user: &str) -> String {
        format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\n\
             contexts: [{{name: c, context: {{cluster: k, user: u}}}}]\n\
             clusters: [{{name: k, cluster: {cluster}}}]\nusers: [{{name: u, user: {user}}}]\n"
        )
    }

    #[test]
    fn files_are_relative_to_the_kubeconfig_and_data_wins() {
        let text = kubeconfig(
            "{server: 'https://10.0.0.1:6443', certificate-authority: pki/ca.crt}",
            "{client-certificate: /x/c.pem, client-key: k.pem, client-key-data: a2V5}",
        );
        let endpoint = read_text(&text).unwrap();
        let PemSource::File(ca) = &endpoint.ca else {
            panic!("{endpoint:?}")
        };
        assert!(ca.ends_with("pki/ca.crt"));
        assert_eq!(endpoint.certificate.to_string(), "/x/c.pem");
        assert!(endpoint.key.to_string().starts_with("client-key-data of "));
    }

    #[test]
    fn what_is_missing_is_named() {
        let check = |text: &str, part: &str| {
            let message = read_text(text).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        };
        check(
            &kubeconfig(
                "{server: 'https://h', certificate-authority: ca}",
                "{token: abc}",
            ),
            "client-certificate is missing",
        );
        check(
            &kubeconfig("{server: 'http://h', certificate-authority: ca}", "{}"),
            "is not an https:// URL",
        );
        check(
            &kubeconfig(
                "{server: 'https://h', insecure-skip-tls-verify: true}",
                "{}",
            ),
            "insecure-skip-tls-verify is not supported",
        );
        check(
            "current-context: nope\n",
            "current-context \"nope\" is not among contexts",
        );
        check("{{{", "read kubeconfig");
    }

    #[test]
    fn a_missing_kubeconfig_is_named() {
        let message = read(Path::new("/nonexistent/kc")).unwrap_err().to_string();
        assert!(
            message.starts_with("read kubeconfig /nonexistent/kc: "),
            "{message}"
        );
    }
}
