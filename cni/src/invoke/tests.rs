//! The runtime's side against plugins written as shell scripts that note what they were given.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::json;

use super::*;
use crate::types::ErrorCode;

struct Lab {
    dir: PathBuf,
}

impl Lab {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("ferrule-invoke-{}-{n}", std::process::id()));
        for sub in ["conf", "bin", "log"] {
            fs::create_dir_all(dir.join(sub)).unwrap();
        }
        Self { dir }
    }

    /// Notes `CNI_COMMAND name` in log/order and its input in log/<name>-<COMMAND>.
    fn plugin(&self, name: &str, body: &str) {
        let log = self.dir.join("log");
        let text = format!(
            "#!/bin/sh\nread -r input\necho \"$CNI_COMMAND {name}\" >> {log}/order\n\
             echo \"$input\" > {log}/{name}-$CNI_COMMAND\nenv > {log}/{name}-env\n{body}\n",
            log = log.display()
        );
        let staged = self.dir.join(name);
        fs::write(&staged, text).unwrap();
        fs::set_permissions(&staged, fs::Permissions::from_mode(0o755)).unwrap();
        fs::rename(staged, self.dir.join("bin").join(name)).unwrap();
    }

    fn conf(&self, name: &str, text: &str) {
        fs::write(self.dir.join("conf").join(name), text).unwrap();
    }

    fn load(&self) -> Result<Networks, LoadError> {
        Networks::load(
            &self.dir.join("conf"),
            &[self.dir.join("bin")],
            &self.dir.join("records"),
        )
    }

    fn order(&self) -> Vec<String> {
        let text = fs::read_to_string(self.dir.join("log/order")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    fn input(&self, name: &str) -> Value {
        let text = fs::read_to_string(self.dir.join("log").join(name)).unwrap();
        serde_json::from_str(&text).unwrap()
    }

    fn attachment(&self) -> Attachment {
        Attachment {
            container_id: "c1".into(),
            netns: self.dir.clone(),
            ifname: "eth0".into(),
            pod_name: "web".into(),
            pod_namespace: "default".into(),
            pod_uid: "u1".into(),
            capability_args: BTreeMap::from([
                ("portMappings".into(), json!([{"hostPort": 80}])),
                ("dns".into(), json!({"servers": []})),
            ]),
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

const RESULT: &str = r#"[ "$CNI_COMMAND" = ADD ] && echo '{"cniVersion":"1.1.0","interfaces":[{"name":"h"},{"name":"eth0","sandbox":"/x"}],"ips":[{"address":"10.1.0.2/24","interface":1}],"dns":{}}'
exit 0"#;
const CHAIN: &str = r#"{"cniVersion":"1.1.0","name":"net","plugins":[{"type":"one"},
  {"type":"two","capabilities":{"portMappings":true},"own":[1]}]}"#;

fn two_plugins() -> Lab {
    let lab = Lab::new();
    lab.plugin("one", RESULT);
    lab.plugin("two", RESULT);
    lab.conf("10-net.conflist", CHAIN);
    lab
}

#[test]
fn add_runs_the_chain_in_order_and_hands_the_result_on() {
    let lab = two_plugins();
    let attached = lab.load().unwrap().add(&lab.attachment()).unwrap();
    assert_eq!(attached.ips, vec!["10.1.0.2/24".parse::<IpNet>().unwrap()]);
    assert_eq!(lab.order(), ["ADD one", "ADD two"]);
    let second = lab.input("two-ADD");
    assert_eq!(second["prevResult"]["ips"][0]["address"], "10.1.0.2/24");
    assert_eq!(second["name"], "net");
    assert_eq!(second["own"], json!([1]));
    let first = lab.input("one-ADD");
    assert!(first.get("prevResult").is_none());
    // Only what a plugin declared is given to it.
    assert!(first.get("runtimeConfig").is_none());
    assert_eq!(
        second["runtimeConfig"],
        json!({"portMappings": [{"hostPort": 80}]})
    );
    assert!(second.get("capabilities").is_none());
    let env = fs::read_to_string(lab.dir.join("log/one-env")).unwrap();
    for wanted in [
        "CNI_CONTAINERID=c1",
        "CNI_IFNAME=eth0",
        "K8S_POD_NAME=web",
        "K8S_POD_UID=u1",
    ] {
        assert!(env.contains(wanted), "{wanted} in {env}");
    }
}

#[test]
fn a_repeated_add_is_answered_from_its_record() {
    let lab = two_plugins();
    let networks = lab.load().unwrap();
    let first = networks.add(&lab.attachment()).unwrap();
    assert_eq!(networks.add(&lab.attachment()).unwrap(), first);
    assert_eq!(lab.order().len(), 2);
}

#[test]
fn del_runs_backwards_with_the_configuration_that_add_used() {
    let lab = two_plugins();
    lab.load().unwrap().add(&lab.attachment()).unwrap();
    lab.conf(
        "10-net.conflist",
        r#"{"cniVersion":"1.1.0","name":"net","type":"other"}"#,
    );
    let mut gone = lab.attachment();
    gone.netns = "/nonexistent/netns".into();
    gone.capability_args.clear();
    let networks = lab.load().unwrap();
    networks.del(&gone).unwrap();
    assert_eq!(lab.order()[2..], ["DEL two", "DEL one"]);
    let input = lab.input("two-DEL");
    assert_eq!(input["prevResult"]["ips"][0]["address"], "10.1.0.2/24");
    assert_eq!(
        input["runtimeConfig"],
        json!({"portMappings": [{"hostPort": 80}]})
    );
    let env = fs::read_to_string(lab.dir.join("log/two-env")).unwrap();
    assert!(
        env.contains("CNI_NETNS=\n"),
        "a dead namespace is passed as empty: {env}"
    );
    assert!(networks.recorded().unwrap().is_empty());
}

#[test]
fn del_goes_on_after_a_failing_plugin_and_keeps_the_record() {
    let lab = two_plugins();
    let networks = lab.load().unwrap();
    networks.add(&lab.attachment()).unwrap();
    lab.plugin("two", r#"echo '{"code":11,"msg":"busy"}'; exit 1"#);
    let error = networks.del(&lab.attachment()).unwrap_err();
    assert!(error.retryable());
    assert_eq!(lab.order()[2..], ["DEL two", "DEL one"]);
    assert_eq!(networks.recorded().unwrap().len(), 1);
    lab.plugin("two", "exit 0");
    networks.del(&lab.attachment()).unwrap();
    assert!(networks.recorded().unwrap().is_empty());
}

#[test]
fn a_missing_plugin_later_in_the_chain_fails_before_the_first_one_runs() {
    let lab = two_plugins();
    fs::remove_file(lab.dir.join("bin/two")).unwrap();
    let error = lab.load().unwrap().add(&lab.attachment()).unwrap_err();
    assert!(lab.order().is_empty());
    let text = error.to_string();
    assert!(
        text.contains("\"two\"") && text.contains("10-net.conflist"),
        "{text}"
    );
}

#[test]
fn a_failed_add_leaves_a_record_that_gc_detaches() {
    let lab = two_plugins();
    lab.plugin(
        "two",
        r#"[ "$CNI_COMMAND" = ADD ] || exit 0; echo '{"code":7,"msg":"bad mtu"}'; exit 1"#,
    );
    let networks = lab.load().unwrap();
    let error = networks.add(&lab.attachment()).unwrap_err();
    let InvokeError::Refused { source, .. } = &error else {
        panic!("{error}")
    };
    assert_eq!(
        (source.code, source.msg.as_str()),
        (ErrorCode::InvalidConfig, "bad mtu")
    );
    assert!(networks.recorded().unwrap()[0].1.is_none());
    let report = networks.gc(Vec::new).unwrap();
    assert_eq!(report.detached, vec![lab.attachment().key()]);
    assert_eq!(lab.order()[2..], ["DEL two", "DEL one", "GC one", "GC two"]);
}

#[test]
fn gc_tells_the_plugins_what_is_valid_and_leaves_it_alone() {
    let lab = two_plugins();
    let networks = lab.load().unwrap();
    networks.add(&lab.attachment()).unwrap();
    let report = networks.gc(|| vec![lab.attachment().key()]).unwrap();
    assert!(report.detached.is_empty());
    let valid = json!([{"containerID": "c1", "ifname": "eth0"}]);
    assert_eq!(lab.input("one-GC")["cni.dev/valid-attachments"], valid);
}

#[test]
fn check_needs_a_recorded_result() {
    let lab = two_plugins();
    let networks = lab.load().unwrap();
    assert!(matches!(
        networks.check(&lab.attachment()),
        Err(InvokeError::NoResult { .. })
    ));
    networks.add(&lab.attachment()).unwrap();
    networks.check(&lab.attachment()).unwrap();
    assert_eq!(lab.order()[2..], ["CHECK one", "CHECK two"]);
}

#[test]
fn an_unreadable_record_does_not_block_a_del() {
    let lab = two_plugins();
    let networks = lab.load().unwrap();
    networks.add(&lab.attachment()).unwrap();
    let record = fs::read_dir(lab.dir.join("records"))
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    fs::write(record, b"{\"kind\":").unwrap();
    networks.del(&lab.attachment()).unwrap();
    assert!(
        fs::read_dir(lab.dir.join("records"))
            .unwrap()
            .next()
            .is_none()
    );
}

#[test]
fn the_first_valid_file_by_name_counts_and_the_broken_one_is_told() {
    let lab = two_plugins();
    lab.conf("05-broken.conflist", "{");
    lab.conf(
        "99-late.conflist",
        r#"{"cniVersion":"1.1.0","name":"late","type":"one"}"#,
    );
    lab.conf("00-readme.txt", "not a network");
    let networks = lab.load().unwrap();
    assert_eq!(networks.name(), "net");
    assert!(
        networks.rejected()[0]
            .to_string()
            .contains("05-broken.conflist is not JSON")
    );
    // What was read in the tick of a change is read again.
    let settled = std::iter::repeat_with(|| lab.load().unwrap()).find(Networks::is_current);
    let networks = settled.unwrap();
    lab.conf(
        "01-new.conflist",
        r#"{"cniVersion":"1.1.0","name":"new","type":"one"}"#,
    );
    assert!(!networks.is_current());
}

#[test]
fn an_empty_directory_is_named() {
    let lab = Lab::new();
    let text = lab.load().unwrap_err().to_string();
    assert!(
        text.starts_with("no network configuration in ") && text.ends_with("conf"),
        "{text}"
    );
}

#[test]
fn status_fails_with_the_plugins_reason() {
    let lab = two_plugins();
    let networks = lab.load().unwrap();
    networks.status().unwrap();
    lab.plugin(
        "two",
        r#"echo '{"cniVersion":"1.1.0","code":50,"msg":"no address left"}'; exit 1"#,
    );
    let error = networks.status().unwrap_err();
    let InvokeError::Refused { source, .. } = error else {
        panic!("{error}")
    };
    assert_eq!(source.code, ErrorCode::NotAvailable);
}

#[test]
fn names_that_would_leave_the_record_directory_are_refused() {
    let lab = two_plugins();
    let networks = lab.load().unwrap();
    let mut bad = lab.attachment();
    bad.container_id = "../../etc/passwd".into();
    assert!(matches!(
        networks.add(&bad),
        Err(InvokeError::BadAttachment { .. })
    ));
    bad = lab.attachment();
    bad.ifname = "a/b".into();
    assert!(matches!(
        networks.del(&bad),
        Err(InvokeError::BadAttachment { .. })
    ));
}
