//! What `kubectl logs` and `kubectl exec` give, through apiserver and kubelet.

use anyhow::{Context, Result, ensure};
use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;
use testkit::scenario::{Scenario, script_pod};

#[test]
fn every_line_of_a_noisy_container_is_kept_in_order() -> Result<()> {
    let scenario = Scenario::begin("logs-whole")?;
    let script = "i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done";
    scenario.apply(&script_pod("noisy", script, "  restartPolicy: Never\n"))?;
    scenario.finished("noisy")?;
    let logs = scenario.kubectl(&["logs", "noisy"])?;
    let wanted: String = (0..20_000).map(|i| format!("line {i}\n")).collect();
    ensure!(
        logs == wanted,
        "{} lines came, the last {:?}",
        logs.lines().count(),
        logs.lines().last()
    );
    Ok(())
}

#[test]
fn logs_can_be_tailed_limited_and_stamped() -> Result<()> {
    let scenario = Scenario::begin("logs-options")?;
    let script = "echo one; echo two; printf three";
    scenario.apply(&script_pod("short", script, "  restartPolicy: Never\n"))?;
    scenario.finished("short")?;
    let logs = |args: &[&str]| {
        let mut all = vec!["logs", "short"];
        all.extend(args);
        scenario.kubectl(&all)
    };
    ensure!(logs(&[])? == "one\ntwo\nthree", "{:?}", logs(&[])?);
    ensure!(
        logs(&["--tail=2"])? == "two\nthree",
        "{:?}",
        logs(&["--tail=2"])?
    );
    ensure!(
        logs(&["--limit-bytes=5"])? == "one\nt",
        "{:?}",
        logs(&["--limit-bytes=5"])?
    );
    let stamped = logs(&["--timestamps", "--tail=1"])?;
    let (stamp, rest) = stamped.split_once(' ').context("no stamp")?;
    ensure!(stamp.contains('T') && rest == "three", "{stamped}");
    ensure!(
        logs(&["--since=1h"])?.starts_with("one"),
        "since left lines out"
    );
    Ok(())
}

#[test]
fn a_followed_log_arrives_while_it_is_written_and_ends_with_the_container() -> Result<()> {
    let scenario = Scenario::begin("logs-follow")?;
    let script = "for i in 1 2 3; do echo $i; sleep 1; done";
    scenario.apply(&script_pod("slow", script, "  restartPolicy: Never\n"))?;
    scenario.watch_pod("slow", "the container to run", |event| {
        testkit::scenario::phase(&event.object) == "Running"
    })?;
    let namespace = scenario.namespace.as_str();
    let mut child = scenario
        .admin
        .command(&["-n", namespace, "logs", "-f", "slow"])
        .stdout(Stdio::piped())
        .spawn()?;
    let stdout = child.stdout.take().context("no output")?;
    let lines: Vec<String> = BufReader::new(stdout).lines().collect::<Result<_, _>>()?;
    ensure!(lines == ["1", "2", "3"], "{lines:?}");
    ensure!(child.wait()?.success(), "kubectl logs -f failed");
    Ok(())
}

#[test]
fn the_log_of_the_previous_attempt_is_still_there() -> Result<()> {
    let scenario = Scenario::begin("logs-previous")?;
    let script = "if [ -e /shared/once ]; then echo second; exec sleep 1000; fi; \
                  touch /shared/once; echo first; exit 3";
    let extra = "    volumeMounts: [{name: shared, mountPath: /shared}]\n  \
                 volumes: [{name: shared, emptyDir: {}}]\n";
    scenario.apply(&script_pod("twice", script, extra))?;
    scenario.watch_pod("twice", "one restart", |event| {
        let status = testkit::scenario::container(&event.object, "main");
        status["restartCount"] == 1 && !status["state"]["running"].is_null()
    })?;
    ensure!(scenario.kubectl(&["logs", "twice"])?.trim() == "second");
    ensure!(scenario.kubectl(&["logs", "twice", "--previous"])?.trim() == "first");
    Ok(())
}

#[test]
fn exec_gives_output_and_exit_code() -> Result<()> {
    let scenario = Scenario::begin("exec")?;
    scenario.apply(&script_pod("target", "exec sleep 1000", ""))?;
    scenario.ready("target")?;
    let out = scenario.output(&[
        "exec",
        "target",
        "--",
        "sh",
        "-c",
        "echo out; echo err >&2; exit 7",
    ])?;
    ensure!(
        out.status.code() == Some(7),
        "exit code {:?}",
        out.status.code()
    );
    ensure!(
        out.stdout == b"out\n",
        "{}",
        String::from_utf8_lossy(&out.stdout)
    );
    ensure!(
        String::from_utf8_lossy(&out.stderr).starts_with("err\n"),
        "standard error is lost"
    );
    let missing = scenario.output(&["exec", "target", "--", "/no/such/program"])?;
    ensure!(!missing.status.success(), "a missing program succeeds");
    let message = String::from_utf8_lossy(&missing.stderr).into_owned();
    ensure!(message.contains("/no/such/program"), "{message}");
    Ok(())
}

#[test]
fn exec_carries_standard_input_to_its_end() -> Result<()> {
    let scenario = Scenario::begin("exec-stdin")?;
    scenario.apply(&script_pod("target", "exec sleep 1000", ""))?;
    scenario.ready("target")?;
    let namespace = scenario.namespace.as_str();
    let mut child = scenario
        .admin
        .command(&[
            "-n", namespace, "exec", "-i", "target", "--", "sh", "-c", "wc -c",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut stdin = child.stdin.take().context("no input")?;
    stdin.write_all(&vec![b'x'; 300_000])?;
    drop(stdin);
    let output = child.wait_with_output()?;
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    ensure!(text == "300000", "{text} bytes arrived");
    Ok(())
}

#[test]
fn exec_with_a_terminal_has_one() -> Result<()> {
    let scenario = Scenario::begin("exec-tty")?;
    scenario.apply(&script_pod("target", "exec sleep 1000", ""))?;
    scenario.ready("target")?;
    let namespace = scenario.namespace.as_str();
    // `script` gives kubectl the terminal it insists on.
    let kubectl = scenario.admin.command(&[]);
    let line = format!(
        "{} -n {namespace} exec -it target -- sh -c 'tty; exit 4'",
        kubectl.get_program().to_string_lossy()
    );
    let output = std::process::Command::new("script")
        .args(["--quiet", "--return", "--command", &line, "/dev/null"])
        .env("KUBECONFIG", scenario.layout.admin_kubeconfig())
        .stdin(Stdio::null())
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        text.contains("/dev/pts/") || text.contains("/dev/console"),
        "{text}"
    );
    ensure!(
        output.status.code() == Some(4),
        "exit code {:?}",
        output.status.code()
    );
    Ok(())
}
