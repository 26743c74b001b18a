//! The serving side of TLS: our certificate, and whose client certificates we believe.
//!
//! Certificate, key and client CA are read again when their files change ([`Reloading`]); a
//! connection uses what was newest when it came in. Without a configured certificate one is made
//! and kept in the certificate directory, signed by itself.

use crate::api::reload::{PemSource, Reloading};
use crate::api::tls::{identity, roots};
use crate::config::Config;
use rcgen::{CertificateParams, DnType, ExtendedKeyUsagePurpose, KeyPair};
use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::sign::SingleCertAndKey;
use rustls::{DigitallySignedStruct, DistinguishedName, ServerConfig, SignatureScheme};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The newest server configuration.
pub type ReloadingServer = Reloading<Arc<Serving>>;

/// How connections are served, and whose certificates are believed.
#[derive(Debug)]
pub struct Serving {
    /// For the handshake.
    pub config: Arc<ServerConfig>,
    clients: Option<Arc<dyn ClientCertVerifier>>,
}

impl Serving {
    /// The client's certificate, if one of the client CAs vouches for it now. Whoever shows
    /// another one is a stranger, who may still have a token.
    pub fn believed<'a>(
        &self,
        chain: Option<&'a [CertificateDer<'static>]>,
    ) -> Option<&'a CertificateDer<'static>> {
        let (first, rest) = chain?.split_first()?;
        let now = UnixTime::now();
        match self.clients.as_ref()?.verify_client_cert(first, rest, now) {
            Ok(_) => Some(first),
            Err(error) => {
                tracing::debug!(%error, "A client certificate is not believed");
                None
            }
        }
    }
}

/// Lets every client certificate through the handshake whose key the client holds, as the stock
/// kubelet does: a certificate of a stranger is no reason to hang up on somebody with a token.
#[derive(Debug)]
struct AnyHolder(Arc<dyn ClientCertVerifier>);

impl ClientCertVerifier for AnyHolder {
    fn offer_client_auth(&self) -> bool {
        true
    }

    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.0.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls12_signature(message, cert, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls13_signature(message, cert, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}

/// Sets up serving; makes a self-signed certificate when none is configured.
///
/// # Errors
/// When that certificate cannot be made or kept. Bad configured files are no error here: they
/// are reported, and looked at again at each connection.
pub fn serving(config: &Config, provider: Arc<CryptoProvider>) -> io::Result<ReloadingServer> {
    let (cert, key) = if config.server.tls_cert_file.as_os_str().is_empty() {
        self_signed(config)?
    } else {
        (
            config.server.tls_cert_file.clone(),
            config.server.tls_key_file.clone(),
        )
    };
    let mut sources = vec![PemSource::File(cert), PemSource::File(key)];
    if !config.server.client_ca_file.as_os_str().is_empty() {
        sources.push(PemSource::File(config.server.client_ca_file.clone()));
    }
    let only_13 = config.server.tls13_only;
    Ok(Reloading::new(
        "the serving certificate",
        sources,
        move |texts| {
            let (Some(chain), Some(key)) = (texts.first(), texts.get(1)) else {
                return Err("certificate or key was not read".to_owned());
            };
            let client_ca = texts.get(2).map(Vec::as_slice);
            server_config(chain, key, client_ca, only_13, &provider).map(Arc::new)
        },
    ))
}

fn server_config(
    chain: &[u8],
    key: &[u8],
    client_ca: Option<&[u8]>,
    only_13: bool,
    provider: &Arc<CryptoProvider>,
) -> Result<Serving, String> {
    let identity = identity(chain, key, provider)?;
    let versions: &[&rustls::SupportedProtocolVersion] = if only_13 {
        &[&rustls::version::TLS13]
    } else {
        &[&rustls::version::TLS13, &rustls::version::TLS12]
    };
    let builder = ServerConfig::builder_with_provider(Arc::clone(provider))
        .with_protocol_versions(versions)
        .map_err(|e| e.to_string())?;
    let clients = match client_ca {
        Some(bundle) => {
            let roots = Arc::new(roots(bundle)?);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(provider))
                .build()
                .map_err(|e| format!("clientCAFile: {e}"))?;
            Some(verifier)
        }
        None => None,
    };
    let builder = match &clients {
        Some(verifier) => {
            builder.with_client_cert_verifier(Arc::new(AnyHolder(Arc::clone(verifier))))
        }
        None => builder.with_no_client_auth(),
    };
    let key = Arc::clone(&identity.key);
    let resolver = Arc::new(SingleCertAndKey::from(key));
    let mut config = builder.with_cert_resolver(resolver);
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Serving {
        config: Arc::new(config),
        clients,
    })
}

/// `kubelet.crt` and `kubelet.key` in the certificate directory, made when missing.
fn self_signed(config: &Config) -> io::Result<(PathBuf, PathBuf)> {
    let (cert, key) = (
        config.cert_dir.join("kubelet.crt"),
        config.cert_dir.join("kubelet.key"),
    );
    if cert.exists() && key.exists() {
        return Ok((cert, key));
    }
    let mut names = vec![config.node_name.clone()];
    if config.host_name != config.node_name {
        names.push(config.host_name.clone());
    }
    names.extend(config.node_ips.iter().map(ToString::to_string));
    let made = make_certificate(names, &config.node_name).map_err(io::Error::other)?;
    std::fs::create_dir_all(&config.cert_dir)?;
    write_secret(&key, made.1.as_bytes())?;
    write_secret(&cert, made.0.as_bytes())?;
    Ok((cert, key))
}

fn make_certificate(names: Vec<String>, node: &str) -> Result<(String, String), rcgen::Error> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::new(names)?;
    params
        .distinguished_name
        .push(DnType::CommonName, format!("{node}-serving"));
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let certificate = params.self_signed(&key)?;
    Ok((certificate.pem(), key.serialize_pem()))
}

fn write_secret(path: &Path, content: &[u8]) -> io::Result<()> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let temporary = path.with_extension("new");
    let mut file = std::fs::File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_self_signed_certificate_serves_and_a_wrong_ca_is_named() {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let (cert, key) =
            make_certificate(vec!["node".to_owned(), "10.0.0.1".to_owned()], "node").unwrap();
        let config = server_config(
            cert.as_bytes(),
            key.as_bytes(),
            Some(cert.as_bytes()),
            false,
            &provider,
        );
        assert_eq!(config.unwrap().config.alpn_protocols.len(), 2);
        let wrong = server_config(cert.as_bytes(), key.as_bytes(), Some(b"x"), true, &provider);
        assert!(wrong.unwrap_err().contains("CA bundle"));
    }
}
