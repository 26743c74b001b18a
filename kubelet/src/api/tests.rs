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
        server: endpoint.server.to_string(),
        place: endpoint.certificate.to_string(),
        identity: Arc::clone(&identity),
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
