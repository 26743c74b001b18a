use super::*;
use std::os::unix::fs::PermissionsExt;

struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    /// A program that notes its calls and prints an answer.
    fn program(&self, name: &str, answer: &str) {
        let script = format!(
            "#!/bin/sh\ncat >> {0}/requests; echo \"$1 $EXTRA\" >> {0}/calls\ncat <<'END'\n{answer}\nEND\n",
            self.dir.path().display()
        );
        // Written elsewhere: a file that is open for writing cannot be executed.
        let staged = self.dir.path().join("staged");
        std::fs::write(&staged, script).unwrap();
        std::fs::set_permissions(&staged, std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::rename(staged, self.dir.path().join(name)).unwrap();
    }

    fn load(&self, providers: &str) -> Result<Providers, ProviderConfigError> {
        let config = self.dir.path().join("config.yaml");
        let head = "apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\n";
        std::fs::write(&config, format!("{head}{providers}")).unwrap();
        Providers::load(&config, self.dir.path())
    }

    fn calls(&self) -> usize {
        let text = std::fs::read_to_string(self.dir.path().join("calls")).unwrap_or_default();
        text.lines().count()
    }
}

fn entry(name: &str, images: &str) -> String {
    format!(
        "providers:\n- name: {name}\n  matchImages: {images}\n  defaultCacheDuration: 10m\n  \
         apiVersion: credentialprovider.kubelet.k8s.io/v1\n  args: [get]\n  \
         env: [{{name: EXTRA, value: more}}]\n"
    )
}

fn answer(key: &str, duration: &str) -> String {
    format!(
        r#"{{"kind": "CredentialProviderResponse",
            "apiVersion": "credentialprovider.kubelet.k8s.io/v1",
            "cacheKeyType": "{key}", {duration}
            "auth": {{"*.example.com/team": {{"username": "u", "password": "p"}}}}}}"#
    )
}

fn basic() -> Vec<RegistryAuth> {
    vec![RegistryAuth::Basic {
        username: "u".to_owned(),
        password: "p".to_owned(),
    }]
}

#[tokio::test]
async fn a_program_is_asked_for_its_images_only_and_as_configured() {
    let bench = Bench::new();
    bench.program("ask", &answer("Image", ""));
    let providers = bench.load(&entry("ask", "['*.example.com/team']")).unwrap();
    assert!(providers.lookup("other.io/team/app").await.is_empty());
    assert!(providers.lookup("a.example.com/else").await.is_empty());
    assert_eq!(bench.calls(), 0);
    assert_eq!(providers.lookup("a.example.com/team/app").await, basic());
    let calls = std::fs::read_to_string(bench.dir.path().join("calls")).unwrap();
    assert_eq!(calls, "get more\n");
    let request = std::fs::read_to_string(bench.dir.path().join("requests")).unwrap();
    let request: Value = serde_json::from_str(&request).unwrap();
    assert_eq!(request["kind"], "CredentialProviderRequest");
    assert_eq!(request["image"], "a.example.com/team/app");
    assert_eq!(
        request["apiVersion"],
        "credentialprovider.kubelet.k8s.io/v1"
    );
}

#[tokio::test]
async fn responses_are_kept_by_image_registry_or_for_all_and_as_long_as_they_say() {
    let images = [
        "a.example.com/team/x",
        "a.example.com/team/y",
        "b.example.com/team/x",
    ];
    for (key, duration, calls) in [
        ("Image", "", 3),
        ("Registry", "", 2),
        ("Global", "", 1),
        ("Global", r#""cacheDuration": "0s","#, 6),
        ("Image", r#""cacheDuration": "1h0m0s","#, 3),
    ] {
        let bench = Bench::new();
        bench.program("ask", &answer(key, duration));
        let providers = bench.load(&entry("ask", "['*.example.com']")).unwrap();
        for image in images.iter().chain(&images) {
            assert_eq!(providers.lookup(image).await, basic(), "{key} {duration}");
        }
        assert_eq!(bench.calls(), calls, "{key} {duration}");
    }
}

#[tokio::test]
async fn many_who_want_the_same_ask_once() {
    let bench = Bench::new();
    bench.program("ask", &answer("Image", ""));
    let providers = bench.load(&entry("ask", "['*.example.com']")).unwrap();
    let lookups = (0..20).map(|_| providers.lookup("a.example.com/team/x"));
    for found in futures::future::join_all(lookups).await {
        assert_eq!(found, basic());
    }
    assert_eq!(bench.calls(), 1);
}

#[tokio::test]
async fn an_answer_that_is_none_gives_no_credentials_and_shows_no_secret() {
    let repository = "a.example.com/team/x";
    let wrong_version = answer("Image", "").replace("/v1\"", "/v1beta1\"");
    for (text, part) in [
        ("{\"password\": \"secret-word\"", "error decoding"),
        (&*answer("Sometimes", ""), "valid cacheKeyType"),
        (&*wrong_version, "v1beta1"),
        (&*answer("Image", r#""cacheDuration": "soon","#), "soon"),
    ] {
        let bench = Bench::new();
        bench.program("ask", text);
        let providers = bench.load(&entry("ask", "['*.example.com']")).unwrap();
        assert!(providers.lookup(repository).await.is_empty());
        let error = providers.all[0].credentials(repository).await.unwrap_err();
        assert!(
            error.contains(part) && !error.contains("secret-word"),
            "{error}"
        );
    }
}

#[test]
fn a_wrong_configuration_is_named() {
    let bench = Bench::new();
    bench.program("ask", "");
    let good = entry("ask", "[a.io]");
    for (text, part) in [
        ("providers: []\n".to_owned(), "at least one"),
        (good.replace("ask", "'a/b'"), "name of a program"),
        (good.replace("ask", "absent"), "no program"),
        (good.replace("[a.io]", "[]"), "matchImages"),
        (good.replace("10m", "long"), "\"long\" is not a duration"),
        (
            good.replace("  defaultCacheDuration: 10m\n", ""),
            "is required",
        ),
        (good.replace("k8s.io/v1", "k8s.io/v9"), "v9"),
        (good.replace("args:", "arguments:"), "arguments"),
        (
            format!("{good}{}", good.replace("providers:\n", "")),
            "twice",
        ),
    ] {
        let error = bench.load(&text).unwrap_err().to_string();
        assert!(error.contains(part), "{error} does not name {part}");
    }
    assert!(Providers::load(Path::new("/nonexistent"), bench.dir.path()).is_err());
}

#[test]
fn a_directory_is_read_in_order_and_other_files_are_left_out() {
    let bench = Bench::new();
    let dir = bench.dir.path().join("config");
    std::fs::create_dir(&dir).unwrap();
    let head = "apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\n";
    for (file, name) in [
        ("20.yaml", "second"),
        ("10.yml", "first"),
        ("30.txt", "third"),
    ] {
        bench.program(name, "");
        std::fs::write(dir.join(file), format!("{head}{}", entry(name, "[a.io]"))).unwrap();
    }
    let providers = Providers::load(&dir, bench.dir.path()).unwrap();
    assert_eq!(format!("{providers:?}"), r#"["first", "second"]"#);
}
