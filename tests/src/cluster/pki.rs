//! Certificates of a lab: one authority each for the cluster, etcd and the aggregation layer's
//! front proxy, as kubeadm lays them out. A certificate that exists is kept, so that a second
//! `up` restarts nothing.

use super::layout::Layout;
use super::state::write_file;
use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, date_time_ymd,
};
use std::fs;
use std::path::Path;

/// A certificate and its key, in PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credentials {
    /// Certificate.
    pub certificate: String,
    /// Private key (PKCS#8).
    pub key: String,
}

/// What a certificate says.
#[derive(Debug, Clone, Copy)]
pub struct Subject<'a> {
    /// CN: the user's name.
    pub common_name: &'a str,
    /// O: the user's group.
    pub organization: Option<&'a str>,
    /// DNS names and addresses it serves under; empty for a client's certificate.
    pub names: &'a [String],
    /// May be shown by a server.
    pub server: bool,
    /// May be shown by a client.
    pub client: bool,
}

impl<'a> Subject<'a> {
    /// A client's certificate.
    #[must_use]
    pub fn client(common_name: &'a str, organization: Option<&'a str>) -> Self {
        Self {
            common_name,
            organization,
            names: &[],
            server: false,
            client: true,
        }
    }

    /// A server's certificate.
    #[must_use]
    pub fn server(common_name: &'a str, names: &'a [String]) -> Self {
        Self {
            common_name,
            organization: None,
            names,
            server: true,
            client: false,
        }
    }
}

/// A certificate authority.
#[derive(Debug)]
pub struct Authority {
    /// Its own certificate and key.
    pub credentials: Credentials,
}

impl Authority {
    /// A new authority.
    ///
    /// # Errors
    /// When no key can be made.
    pub fn generate(name: &str) -> Result<Self> {
        let key = KeyPair::generate().context("make a key")?;
        let mut params = CertificateParams::default();
        params.distinguished_name = distinguished_name(name, None);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![
            KeyUsagePurpose::DigitalSignature,
            KeyUsagePurpose::KeyCertSign,
            KeyUsagePurpose::CrlSign,
        ];
        (params.not_before, params.not_after) =
            (date_time_ymd(2024, 1, 1), date_time_ymd(2054, 1, 1));
        let certificate = params
            .self_signed(&key)
            .with_context(|| format!("sign authority {name}"))?;
        let credentials = Credentials {
            certificate: certificate.pem(),
            key: key.serialize_pem(),
        };
        Ok(Self { credentials })
    }

    /// The authority kept as `<name>.crt` and `<name>.key`, made when it is not there.
    ///
    /// # Errors
    /// When the files cannot be read or written.
    pub fn ensure(layout: &Layout, name: &str) -> Result<Self> {
        let credentials =
            ensure_credentials(layout, name, || Ok(Self::generate(name)?.credentials))?;
        Ok(Self { credentials })
    }

    /// Issues a certificate that is valid from `not_before` to `not_after` (year, month, day).
    ///
    /// # Errors
    /// When a name is no DNS name or address, or signing fails.
    pub fn issue_between(
        &self,
        subject: Subject<'_>,
        not_before: (i32, u8, u8),
        not_after: (i32, u8, u8),
    ) -> Result<Credentials> {
        let authority_key =
            KeyPair::from_pem(&self.credentials.key).context("parse the authority's key")?;
        let issuer = Issuer::from_ca_cert_pem(&self.credentials.certificate, authority_key)
            .context("parse the authority's certificate")?;
        let key = KeyPair::generate().context("make a key")?;
        let mut params = CertificateParams::new(subject.names)
            .with_context(|| format!("names of certificate {}", subject.common_name))?;
        params.distinguished_name = distinguished_name(subject.common_name, subject.organization);
        params.key_usages = vec![
            KeyUsagePurpose::DigitalSignature,
            KeyUsagePurpose::KeyEncipherment,
        ];
        if subject.server {
            params
                .extended_key_usages
                .push(ExtendedKeyUsagePurpose::ServerAuth);
        }
        if subject.client {
            params
                .extended_key_usages
                .push(ExtendedKeyUsagePurpose::ClientAuth);
        }
        params.use_authority_key_identifier_extension = true;
        params.not_before = date_time_ymd(not_before.0, not_before.1, not_before.2);
        params.not_after = date_time_ymd(not_after.0, not_after.1, not_after.2);
        let certificate = params
            .signed_by(&key, &issuer)
            .with_context(|| format!("sign certificate {}", subject.common_name))?;
        Ok(Credentials {
            certificate: certificate.pem(),
            key: key.serialize_pem(),
        })
    }

    /// Issues a certificate that is valid now.
    ///
    /// # Errors
    /// As [`Authority::issue_between`].
    pub fn issue(&self, subject: Subject<'_>) -> Result<Credentials> {
        self.issue_between(subject, (2024, 1, 1), (2053, 1, 1))
    }

    /// The certificate kept as `<file>.crt` and `<file>.key`, issued when it is not there.
    ///
    /// # Errors
    /// As [`Authority::issue_between`], and when the files cannot be read or written.
    pub fn ensure_issued(
        &self,
        layout: &Layout,
        file: &str,
        subject: Subject<'_>,
    ) -> Result<Credentials> {
        ensure_credentials(layout, file, || self.issue(subject))
    }
}

fn distinguished_name(common_name: &str, organization: Option<&str>) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    if let Some(organization) = organization {
        name.push(DnType::OrganizationName, organization);
    }
    name.push(DnType::CommonName, common_name);
    name
}

fn ensure_credentials(
    layout: &Layout,
    file: &str,
    make: impl FnOnce() -> Result<Credentials>,
) -> Result<Credentials> {
    let certificate_path = layout.pki(&format!("{file}.crt"));
    let key_path = layout.pki(&format!("{file}.key"));
    if certificate_path.exists() && key_path.exists() {
        return Ok(Credentials {
            certificate: read(&certificate_path)?,
            key: read(&key_path)?,
        });
    }
    let credentials = make()?;
    write_file(&key_path, credentials.key.as_bytes(), 0o600)?;
    write_file(&certificate_path, credentials.certificate.as_bytes(), 0o644)?;
    Ok(credentials)
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("read {}", path.display()))
}

/// The authorities of a lab.
#[derive(Debug)]
pub struct Authorities {
    /// Signs clients of the apiserver, the apiserver itself and the nodes' servers.
    pub cluster: Authority,
    etcd: Authority,
    front_proxy: Authority,
}

/// Makes everything the control plane needs, and the administrator's kubeconfig.
///
/// # Errors
/// When a file cannot be read or written.
pub fn ensure_control_plane(layout: &Layout) -> Result<Authorities> {
    let authorities = Authorities {
        cluster: Authority::ensure(layout, "ca")?,
        etcd: Authority::ensure(layout, "etcd-ca")?,
        front_proxy: Authority::ensure(layout, "front-proxy-ca")?,
    };
    let Authorities {
        cluster,
        etcd,
        front_proxy,
    } = &authorities;
    let address = layout.control_address().to_string();
    let etcd_names = [address.clone(), "127.0.0.1".into(), "localhost".into()];
    let server = Subject {
        client: true,
        ..Subject::server("etcd", &etcd_names)
    };
    etcd.ensure_issued(layout, "etcd", server)?;
    etcd.ensure_issued(
        layout,
        "apiserver-etcd-client",
        Subject::client("kube-apiserver", None),
    )?;
    let apiserver_names = [
        address,
        "127.0.0.1".into(),
        layout.service_address(1).to_string(),
        layout.service_address6(1).to_string(),
        "localhost".into(),
        "kubernetes".into(),
        "kubernetes.default".into(),
        "kubernetes.default.svc".into(),
        "kubernetes.default.svc.cluster.local".into(),
    ];
    let apiserver = Subject::server("kube-apiserver", &apiserver_names);
    cluster.ensure_issued(layout, "apiserver", apiserver)?;
    let kubelet_client = Subject::client("kube-apiserver-kubelet-client", None);
    cluster.ensure_issued(layout, "apiserver-kubelet-client", kubelet_client)?;
    let front = Subject::client("front-proxy-client", None);
    front_proxy.ensure_issued(layout, "front-proxy-client", front)?;
    ensure_credentials(layout, "service-account", || {
        let key = KeyPair::generate().context("make a key")?;
        Ok(Credentials {
            certificate: key.public_key_pem(),
            key: key.serialize_pem(),
        })
    })?;
    let clients = [
        ("admin", "kubernetes-admin", Some("system:masters")),
        ("controller-manager", "system:kube-controller-manager", None),
        ("scheduler", "system:kube-scheduler", None),
        ("proxy", "system:kube-proxy", None),
    ];
    for (file, user, group) in clients {
        let credentials = cluster.ensure_issued(layout, file, Subject::client(user, group))?;
        let text = kubeconfig(layout, &cluster.credentials.certificate, user, &credentials);
        write_file(
            &layout.dir.join(format!("{file}.kubeconfig")),
            text.as_bytes(),
            0o600,
        )?;
    }
    Ok(authorities)
}

/// A kubeconfig with everything embedded.
#[must_use]
pub fn kubeconfig(
    layout: &Layout,
    authority: &str,
    user: &str,
    credentials: &Credentials,
) -> String {
    use base64::Engine;
    let encode = |text: &str| base64::engine::general_purpose::STANDARD.encode(text);
    let server = layout.server();
    let cluster = &layout.name;
    format!(
        "apiVersion: v1
kind: Config
current-context: {cluster}
clusters:
- name: {cluster}
  cluster:
    server: {server}
    certificate-authority-data: {authority}
contexts:
- name: {cluster}
  context: {{cluster: {cluster}, user: \"{user}\"}}
users:
- name: \"{user}\"
  user:
    client-certificate-data: {certificate}
    client-key-data: {key}
",
        authority = encode(authority),
        certificate = encode(&credentials.certificate),
        key = encode(&credentials.key),
    )
}
