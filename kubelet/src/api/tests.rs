use super::*;
use rcgen::{CertificateParams, DnType, IsCa, Issuer, KeyPair};

struct Authority(Issuer<'static, KeyPair>, String);

fn authority() -> Authority {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params
        .distinguished_name
        .push(DnType::CommonName, "test-ca");
    let key = KeyPair::generate().unwrap();
    let pem = params.self_signed(&key).unwrap().pem();
    Authority(Issuer::new(params, key), pem)
}

fn certificate(ca: &Authority, user: &str, group: &str, years: (i32, i32)) -> (String, String) {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.distinguished_name.push(DnType::CommonName, user);
    params
        .distinguished_name
        .push(DnType::OrganizationName, group);
    params.not_before = rcgen::date_time_ymd(years.0, 1, 1);
    params.not_after = rcgen::date_time_ymd(years.1, 1, 1);
    let key = KeyPair::generate().unwrap();
    let pem = params.signed_by(&key, &ca.0).unwrap().pem();
    (pem, key.serialize_pem())
}

fn objection_to(user: &str, group: &str, years: (i32, i32)) -> Option<String> {
    let (cert, key) = certificate(&authority(), user, group, years);
    let identity = tls::identity(cert.as_bytes(), key.as_bytes(), &provider()).unwrap();
    let now = 1_790_000_000; // in 2026
    tls::objection(&identity, "n1", now)
}

#[test]
fn a_node_certificate_is_accepted_and_others_are_explained() {
    assert_eq!(
        objection_to("system:node:n1", "system:nodes", (2020, 2090)),
        None
    );
    let check = |user: &str, group: &str, years, part: &str| {
        let text = objection_to(user, group, years).unwrap();
        assert!(text.contains(part), "{text}");
    };
    check(
        "system:node:n1",
        "system:nodes",
        (2020, 2021),
        "it expired at 2021-01-01T00:00:00Z",
    );
    check(
        "system:node:n1",
        "system:nodes",
        (2080, 2090),
        "it is not valid before 2080",
    );
    check(
        "system:node:n2",
        "system:nodes",
        (2020, 2090),
        "this node is CN=\"system:node:n1\"",
    );
    check(
        "admin",
        "system:masters",
        (2020, 2090),
        "it is for CN=\"admin\" O=[\"system:masters\"]",
    );
}

#[test]
fn a_key_of_another_certificate_is_refused() {
    let ca = authority();
    let (cert, _) = certificate(&ca, "a", "b", (2020, 2090));
    let (_, key) = certificate(&ca, "a", "b", (2020, 2090));
    let error = tls::identity(cert.as_bytes(), key.as_bytes(), &provider()).unwrap_err();
    assert!(error.contains("do not belong together"), "{error}");
    let error = tls::identity(b"", key.as_bytes(), &provider()).unwrap_err();
    assert!(error.contains("there is no certificate"), "{error}");
}

#[test]
fn a_missing_certificate_is_a_problem_and_not_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("kubeconfig");
    let ca = dir.path().join("ca.crt");
    std::fs::write(&ca, authority().1).unwrap();
    std::fs::write(
        &path,
        "current-context: c\ncontexts: [{name: c, context: {cluster: k, user: u}}]\n\
         clusters: [{name: k, cluster: {server: 'https://127.0.0.1:1', certificate-authority: ca.crt}}]\n\
         users: [{name: u, user: {client-certificate: c.crt, client-key: c.key}}]\n",
    )
    .unwrap();
    let endpoint = endpoint::read(&path).unwrap();
    let identity = Arc::new(tls::node_identity(&endpoint, provider()));
    let credentials = Credentials {
        node: "n1".to_owned(),
        known: Arc::new(OnceLock::from(Known {
            server: endpoint.server.to_string(),
            place: endpoint.certificate.to_string(),
            identity: Arc::clone(&identity),
        })),
        complained: Arc::default(),
    };
    let problem = credentials.problem().unwrap();
    assert!(problem.contains("c.crt: No such file"), "{problem}");
    let (cert, key) = certificate(&authority(), "system:node:n1", "system:nodes", (2020, 2090));
    std::fs::write(dir.path().join("c.key"), key).unwrap();
    std::fs::write(dir.path().join("c.crt"), cert).unwrap();
    identity.look_now();
    assert_eq!(credentials.problem(), None);
}

/// A TLS server that answers each request with the common name of the client's certificate.
async fn name_server(ca: &Authority) -> std::net::SocketAddr {
    use hyper::service::service_fn;
    let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
    params.distinguished_name.push(DnType::CommonName, "server");
    let key = KeyPair::generate().unwrap();
    let certificate = params.signed_by(&key, &ca.0).unwrap();
    let roots = Arc::new(tls::roots(ca.1.as_bytes()).unwrap());
    let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(roots, provider())
        .allow_unauthenticated()
        .build()
        .unwrap();
    let config = rustls::ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(verifier)
        .with_single_cert(
            vec![certificate.der().clone()],
            rustls::pki_types::PrivateKeyDer::Pkcs8(key.serialize_der().into()),
        )
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let Ok(stream) = acceptor.accept(stream).await else {
                    return;
                };
                let name = stream.get_ref().1.peer_certificates().map(|chain| {
                    use x509_parser::prelude::FromDer;
                    let parsed = x509_parser::prelude::X509Certificate::from_der(&chain[0]);
                    tls::subject(&parsed.unwrap().1).0
                });
                let name = name.unwrap_or_else(|| "nobody".to_owned());
                let service = service_fn(move |_| {
                    let body = http_body_util::Full::new(bytes::Bytes::from(name.clone()));
                    async { Ok::<_, std::convert::Infallible>(http::Response::new(body)) }
                });
                let io = hyper_util::rt::TokioIo::new(stream);
                let _ = hyper::server::conn::http1::Builder::new()
                    .serve_connection(io, service)
                    .await;
            });
        }
    });
    address
}

#[tokio::test]
async fn a_new_certificate_is_used_at_once_even_where_a_connection_is_open() {
    let dir = tempfile::tempdir().unwrap();
    let ca = authority();
    let address = name_server(&ca).await;
    let file = |name: &str| dir.path().join(name);
    std::fs::write(file("ca.crt"), &ca.1).unwrap();
    let endpoint = Endpoint {
        server: format!("https://{address}").parse().unwrap(),
        server_name: String::new(),
        ca: reload::PemSource::File(file("ca.crt")),
        certificate: reload::PemSource::File(file("tls.crt")),
        key: reload::PemSource::File(file("tls.key")),
    };
    let identity = Arc::new(tls::node_identity(&endpoint, provider()));
    let config = tls::client_config(&endpoint, Arc::clone(&identity), provider()).unwrap();
    let client = build(&endpoint, config, Arc::clone(&identity)).unwrap();
    let ask = || {
        let request = http::Request::get("/").body(Vec::new()).unwrap();
        client.request_text(request)
    };
    assert_eq!(ask().await.unwrap(), "nobody");
    for name in ["system:node:a", "system:node:b"] {
        let (cert, key) = certificate(&ca, name, "system:nodes", (2020, 2090));
        std::fs::write(file("tls.key"), key).unwrap();
        std::fs::write(file("tls.crt"), cert).unwrap();
        identity.look_now();
        assert_eq!(ask().await.unwrap(), name);
        assert_eq!(ask().await.unwrap(), name);
    }
}

#[tokio::test]
async fn a_server_of_another_ca_is_refused_and_a_silent_one_is_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let address = name_server(&authority()).await;
    let ca = dir.path().join("ca.crt");
    std::fs::write(&ca, authority().1).unwrap();
    let source = || reload::PemSource::File(ca.clone());
    let endpoint = Endpoint {
        server: format!("https://{address}").parse().unwrap(),
        server_name: String::new(),
        ca: source(),
        certificate: source(),
        key: source(),
    };
    let identity = Arc::new(tls::node_identity(&endpoint, provider()));
    let config = tls::client_config(&endpoint, Arc::clone(&identity), provider()).unwrap();
    let client = build(&endpoint, config, identity).unwrap();
    let request = http::Request::get("/").body(Vec::new()).unwrap();
    let error = client.request_text(request).await.unwrap_err();
    assert!(
        crate::errors::chain(&error).contains("invalid peer certificate"),
        "{error:?}"
    );
    let never = std::future::pending::<Result<(), kube::Error>>();
    let error = within(Duration::from_millis(1), never).await.unwrap_err();
    assert!(error.to_string().contains("no answer"), "{error}");
}
