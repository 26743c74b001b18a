//! The frame around a plugin that notes what it was asked.

use std::cell::RefCell;

use serde_json::Value;

use super::*;

#[derive(Default)]
struct Notes {
    calls: RefCell<Vec<String>>,
    fail: Option<CniError>,
}

impl Notes {
    fn note(&self, text: String) -> Result<(), CniError> {
        self.calls.borrow_mut().push(text);
        self.fail.clone().map_or(Ok(()), Err)
    }
}

impl Plugin for Notes {
    fn add(&self, input: &Input<'_>) -> Result<AttachResult, CniError> {
        self.note(format!("add {} {:?}", input.owner(), input.args))?;
        Ok(AttachResult::default())
    }
    fn del(&self, input: &Input<'_>) -> Result<(), CniError> {
        self.note(format!("del {} {:?}", input.owner(), input.netns))
    }
    fn check(&self, _: &Input<'_>, previous: &AttachResult) -> Result<(), CniError> {
        self.note(format!("check {}", previous.ips.len()))
    }
    fn gc(&self, _: &Input<'_>, valid: &[AttachmentKey]) -> Result<(), CniError> {
        self.note(format!("gc {valid:?}"))
    }
    fn status(&self, _: &Input<'_>) -> Result<(), CniError> {
        self.note("status".into())
    }
}

fn environment(verb: &str) -> Environment {
    Environment::default()
        .with("CNI_COMMAND", verb)
        .with("CNI_CONTAINERID", "c1")
        .with("CNI_NETNS", "/run/netns/x")
        .with("CNI_IFNAME", "eth0")
        .with("CNI_PATH", "/opt/cni/bin")
}

/// What was printed, and what the plugin noted.
fn call(plugin: &Notes, environment: &Environment, stdin: &str) -> (Value, Vec<String>) {
    let mut stdout = Vec::new();
    let _ = run(plugin, environment, stdin.as_bytes(), &mut stdout);
    let printed = serde_json::from_slice(&stdout).unwrap_or(Value::Null);
    (printed, plugin.calls.borrow().clone())
}

const CONF: &str = r#"{"cniVersion":"1.1.0","name":"n","type":"x"}"#;

fn code(environment: &Environment, stdin: &str) -> (u64, String) {
    let (printed, calls) = call(&Notes::default(), environment, stdin);
    assert!(calls.is_empty(), "{calls:?}");
    (
        printed["code"].as_u64().unwrap(),
        printed["msg"].as_str().unwrap().to_owned(),
    )
}

#[test]
fn version_lists_what_is_spoken_and_answers_in_the_asked_one() {
    let (printed, _) = call(
        &Notes::default(),
        &environment("VERSION"),
        r#"{"cniVersion":"0.4.0"}"#,
    );
    assert_eq!(printed["cniVersion"], "0.4.0");
    assert_eq!(printed["supportedVersions"].as_array().unwrap().len(), 5);
    let bare = Environment::default().with("CNI_COMMAND", "VERSION");
    assert_eq!(call(&Notes::default(), &bare, "").0["cniVersion"], "1.1.0");
}

#[test]
fn add_prints_the_result_in_the_asked_version() {
    let environment = environment("ADD").with("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAME=web");
    for version in SpecVersion::ALL {
        let conf = CONF.replace("1.1.0", version.as_str());
        let (printed, calls) = call(&Notes::default(), &environment, &conf);
        assert_eq!(printed["cniVersion"], version.as_str());
        assert_eq!(
            calls,
            [r#"add c1/eth0 {"IgnoreUnknown": "1", "K8S_POD_NAME": "web"}"#]
        );
    }
}

#[test]
fn each_bad_thing_has_its_code() {
    let add = environment("ADD");
    assert_eq!(code(&add, "{").0, 6);
    assert_eq!(code(&add, "[]").0, 6);
    assert_eq!(code(&add, r#"{"name":"n"}"#).0, 1);
    assert_eq!(code(&add, r#"{"cniVersion":"0.2.0","name":"n"}"#).0, 1);
    assert_eq!(code(&add, r#"{"cniVersion":"1.0.0"}"#).0, 7);
    assert_eq!(code(&environment("JUMP"), CONF).0, 4);
    assert_eq!(
        code(&Environment::default(), CONF),
        (4, "CNI_COMMAND is missing".into())
    );
    assert_eq!(
        code(&add.clone().with("CNI_NETNS", ""), CONF),
        (4, "CNI_NETNS is missing".into())
    );
    assert_eq!(
        code(&add.clone().with("CNI_CONTAINERID", "../x"), CONF).0,
        4
    );
    assert_eq!(
        code(
            &add.clone().with("CNI_IFNAME", "a-name-too-long-for-it"),
            CONF
        )
        .0,
        4
    );
    assert_eq!(code(&add.with("CNI_ARGS", "loose"), CONF).0, 4);
    assert_eq!(
        code(&environment("CHECK"), CONF),
        (7, "CHECK needs prevResult".into())
    );
    let wrong = CONF.replace('}', r#","cni.dev/valid-attachments":{}}"#);
    assert_eq!(code(&environment("GC"), &wrong).0, 7);
}

#[test]
fn verbs_newer_than_the_asked_version_are_refused() {
    let conf = |version: &str| CONF.replace("1.1.0", version);
    assert_eq!(code(&environment("CHECK"), &conf("0.3.1")).0, 1);
    assert_eq!(code(&environment("GC"), &conf("1.0.0")).0, 1);
    assert_eq!(code(&environment("STATUS"), &conf("1.0.0")).0, 1);
}

#[test]
fn del_works_without_a_namespace_and_with_a_broken_previous_result() {
    let environment = environment("DEL").with("CNI_NETNS", "");
    let conf = r#"{"cniVersion":"1.1.0","name":"n","prevResult":{"cniVersion":"9"}}"#;
    let (printed, calls) = call(&Notes::default(), &environment, conf);
    assert_eq!(
        (printed, calls),
        (Value::Null, vec!["del c1/eth0 None".to_owned()])
    );
}

#[test]
fn gc_reads_both_keys_and_an_empty_list() {
    let bare = Environment::default().with("CNI_COMMAND", "GC");
    for (list, expected) in [
        (r#""cni.dev/valid-attachments":null"#, "gc []"),
        (
            r#""cni.dev/attachments":[{"containerID":"a","ifname":"eth0"}]"#,
            r#"gc [AttachmentKey { container_id: "a", ifname: "eth0" }]"#,
        ),
    ] {
        let conf = format!(r#"{{"cniVersion":"1.1.0","name":"n",{list}}}"#);
        assert_eq!(call(&Notes::default(), &bare, &conf).1, [expected]);
    }
}

#[test]
fn gc_without_a_list_takes_nothing_for_garbage() {
    let bare = Environment::default().with("CNI_COMMAND", "GC");
    let conf = r#"{"cniVersion":"1.1.0","name":"n"}"#;
    let (printed, calls) = call(&Notes::default(), &bare, conf);
    assert_eq!((printed, calls.len()), (Value::Null, 0));
}

#[test]
fn a_plugins_error_is_printed_with_its_code() {
    let plugin = Notes {
        fail: Some(CniError::new(ErrorCode::NotAvailable, "no address left")),
        ..Notes::default()
    };
    let (printed, _) = call(&plugin, &environment("STATUS"), CONF);
    assert_eq!(
        (printed["code"].as_u64(), printed["cniVersion"].as_str()),
        (Some(50), Some("1.1.0"))
    );
}

proptest::proptest! {
    #[test]
    fn no_input_makes_the_frame_panic(stdin: Vec<u8>, args: String) {
        let mut stdout = Vec::new();
        let environment = environment("ADD").with("CNI_ARGS", &args);
        let _ = run(&Notes::default(), &environment, stdin.as_slice(), &mut stdout);
        serde_json::from_slice::<Value>(&stdout).unwrap();
    }
}
