//! The TLS side of our client: our certificate and the apiserver's authorities, both as new as
//! their files.

use super::endpoint::Endpoint;
use super::reload::Reloading;
use jiff::Timestamp;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ResolvesClientCert, WebPkiServerVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::sign::CertifiedKey;
use rustls::{
    ClientConfig, DigitallySignedStruct, InconsistentKeys, RootCertStore, SignatureScheme,
};
use std::sync::Arc;
use x509_parser::prelude::{FromDer, X509Certificate};

/// The group every node's certificate carries.
pub const NODES_GROUP: &str = "system:nodes";

/// A certificate with its key, and what it says of its holder.
#[derive(Debug)]
pub struct Identity {
    /// For the handshake.
    pub key: Arc<CertifiedKey>,
    /// Common name: the user.
    pub user: String,
    /// Organisations: the groups.
    pub groups: Vec<String>,
    /// Issuer, for messages.
    pub issuer: String,
    /// Seconds since the epoch from which it holds.
    pub not_before: i64,
    /// Seconds since the epoch after which it does not.
    pub not_after: i64,
}

/// Subject of a certificate: common name, organisations.
pub fn subject(certificate: &X509Certificate<'_>) -> (String, Vec<String>) {
    let name = certificate.subject();
    let texts = |iter: Vec<&x509_parser::x509::AttributeTypeAndValue<'_>>| {
        let as_text =
            |a: &x509_parser::x509::AttributeTypeAndValue<'_>| a.as_str().map(str::to_owned).ok();
        iter.into_iter().filter_map(as_text).collect::<Vec<_>>()
    };
    let user = texts(name.iter_common_name().collect()).pop();
    let groups = texts(name.iter_organization().collect());
    (user.unwrap_or_default(), groups)
}

/// Makes an identity of a PEM chain and a PEM key.
pub fn identity(chain: &[u8], key: &[u8], provider: &CryptoProvider) -> Result<Identity, String> {
    let certificates: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(chain)
        .collect::<Result<_, _>>()
        .map_err(|e| format!("the certificate is not PEM: {e}"))?;
    let Some(leaf) = certificates.first().cloned() else {
        return Err("there is no certificate in it".to_owned());
    };
    let key = PrivateKeyDer::from_pem_slice(key).map_err(|e| format!("the key is not PEM: {e}"))?;
    let (_, parsed) = X509Certificate::from_der(&leaf)
        .map_err(|e| format!("the certificate is not X.509: {e}"))?;
    let (user, groups) = subject(&parsed);
    let key = provider
        .key_provider
        .load_private_key(key)
        .map_err(|e| format!("the key cannot be used: {e}"))?;
    let key = CertifiedKey::new(certificates, key);
    // Any other finding is the peer's to judge: it may take certificates that we would not.
    if let Err(rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch)) = key.keys_match() {
        return Err("certificate and key do not belong together".to_owned());
    }
    Ok(Identity {
        key: Arc::new(key),
        user,
        groups,
        issuer: parsed.issuer().to_string(),
        not_before: parsed.validity().not_before.timestamp(),
        not_after: parsed.validity().not_after.timestamp(),
    })
}

/// What is wrong with presenting this identity as node `node` at `now` (seconds).
pub fn objection(identity: &Identity, node: &str, now: i64) -> Option<String> {
    let at = |s: i64| Timestamp::from_second(s).map_or_else(|_| s.to_string(), |t| t.to_string());
    let wanted = format!("system:node:{node}");
    if now > identity.not_after {
        return Some(format!("it expired at {}", at(identity.not_after)));
    }
    if now < identity.not_before {
        return Some(format!(
            "it is not valid before {} (is the clock right?)",
            at(identity.not_before)
        ));
    }
    if identity.user != wanted || !identity.groups.iter().any(|g| g == NODES_GROUP) {
        return Some(format!(
            "it is for CN={:?} O={:?}, this node is CN={wanted:?} O=[{NODES_GROUP:?}]",
            identity.user, identity.groups
        ));
    }
    None
}

/// Our certificate during handshakes.
#[derive(Debug)]
pub struct NodeCertificate(pub Arc<Reloading<Identity>>);

impl ResolvesClientCert for NodeCertificate {
    fn resolve(
        &self,
        _root_hint_subjects: &[&[u8]],
        _sigschemes: &[SignatureScheme],
    ) -> Option<Arc<CertifiedKey>> {
        self.0.get().map(|identity| Arc::clone(&identity.key))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// Verifies the apiserver against a bundle that may be replaced.
#[derive(Debug)]
pub struct ReloadingVerifier {
    verifier: Reloading<WebPkiServerVerifier>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for ReloadingVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let Some(verifier) = self.verifier.get() else {
            let problem = self.verifier.problem().unwrap_or_default();
            return Err(rustls::Error::General(problem));
        };
        verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, cert, dss, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

/// A store of the authorities in a PEM bundle.
pub fn roots(pem: &[u8]) -> Result<RootCertStore, String> {
    let mut store = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(pem) {
        let certificate = certificate.map_err(|e| format!("the CA bundle is not PEM: {e}"))?;
        store
            .add(certificate)
            .map_err(|e| format!("the CA bundle has a bad certificate: {e}"))?;
    }
    if store.is_empty() {
        return Err("there is no certificate in the CA bundle".to_owned());
    }
    Ok(store)
}

/// The node's certificate of an endpoint, read when needed.
pub fn node_identity(endpoint: &Endpoint, provider: Arc<CryptoProvider>) -> Reloading<Identity> {
    let place = endpoint.certificate.to_string();
    Reloading::new(
        "the node certificate",
        vec![endpoint.certificate.clone(), endpoint.key.clone()],
        move |texts| match texts {
            [chain, key] => identity(chain, key, &provider).map_err(|e| format!("{place}: {e}")),
            _ => Err(format!("{place}: nothing read")),
        },
    )
}

/// The TLS configuration of our clients.
pub fn client_config(
    endpoint: &Endpoint,
    identity: Arc<Reloading<Identity>>,
    provider: Arc<CryptoProvider>,
) -> Result<ClientConfig, rustls::Error> {
    let place = endpoint.ca.to_string();
    let for_verifier = Arc::clone(&provider);
    let verifier = Reloading::new(
        "the apiserver's CA",
        vec![endpoint.ca.clone()],
        move |texts| {
            let store = roots(texts.first().map_or(&[], Vec::as_slice))
                .map_err(|e| format!("{place}: {e}"))?;
            let builder = WebPkiServerVerifier::builder_with_provider(
                store.into(),
                Arc::clone(&for_verifier),
            );
            let verifier = builder.build().map_err(|e| format!("{place}: {e}"))?;
            Arc::try_unwrap(verifier).map_err(|_| format!("{place}: in use"))
        },
    );
    let verifier = ReloadingVerifier {
        verifier,
        provider: Arc::clone(&provider),
    };
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_cert_resolver(Arc::new(NodeCertificate(identity)));
    Ok(config)
}
