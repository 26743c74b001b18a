//! Port-forward, attach, exec and cp through the real kubectl, by WebSocket and by SPDY.

use anyhow::{Context, Result, ensure};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use testkit::scenario::{BUSYBOX, LIMIT, Scenario, script_pod};
use testkit::terminal::Terminal;

/// How kubectl is told to speak SPDY, as before 1.30, instead of WebSocket.
const SPDY: [(&str, &str); 2] = [
    ("KUBECTL_REMOTE_COMMAND_WEBSOCKETS", "false"),
    ("KUBECTL_PORT_FORWARD_WEBSOCKETS", "false"),
];
const WEBSOCKET: [(&str, &str); 2] = [
    ("KUBECTL_REMOTE_COMMAND_WEBSOCKETS", "true"),
    ("KUBECTL_PORT_FORWARD_WEBSOCKETS", "true"),
];
const BIG: usize = 512 * 1024;

fn kubectl(scenario: &Scenario, way: [(&str, &str); 2], args: &[&str]) -> Command {
    let mut all = vec!["-n", scenario.namespace.as_str()];
    all.extend(args);
    let mut command = scenario.admin.command(&all);
    command.envs(way);
    command
}

/// The port kubectl has chosen, from its first line.
fn local_port(line: &str) -> Result<u16> {
    let rest = line.strip_prefix("Forwarding from 127.0.0.1:");
    let port = rest.and_then(|rest| rest.split_whitespace().next()?.parse().ok());
    port.with_context(|| format!("kubectl says {line:?}"))
}

/// A running `kubectl port-forward` and the local port it listens on.
struct Forward {
    child: Child,
    port: u16,
    // kubectl writes a line per connection; nobody may hang up on it.
    _lines: std::thread::JoinHandle<()>,
}

impl Forward {
    fn start(scenario: &Scenario, way: [(&str, &str); 2], pod: &str, port: u16) -> Result<Self> {
        let target = format!(":{port}");
        let mut child = kubectl(scenario, way, &["port-forward", pod, &target])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let stdout = child.stdout.take().context("no output")?;
        let mut lines = BufReader::new(stdout);
        let mut first = String::new();
        lines.read_line(&mut first)?;
        let port = local_port(&first)?;
        let lines = std::thread::spawn(move || {
            let _ = std::io::copy(&mut lines, &mut std::io::sink());
        });
        Ok(Self {
            child,
            port,
            _lines: lines,
        })
    }

    fn connect(&self) -> Result<TcpStream> {
        let stream = TcpStream::connect(("127.0.0.1", self.port))?;
        stream.set_read_timeout(Some(LIMIT))?;
        Ok(stream)
    }

    fn get(&self, path: &str) -> Result<Vec<u8>> {
        let mut stream = self.connect()?;
        write!(stream, "GET {path} HTTP/1.0\r\nHost: pod\r\n\r\n")?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        let body = answer
            .windows(4)
            .position(|w| w == b"\r\n\r\n")
            .with_context(|| format!("no HTTP in {:?}", String::from_utf8_lossy(&answer)))?;
        Ok(answer.split_off(body + 4))
    }
}

impl Drop for Forward {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// A pod that serves `/small` and `/big` over HTTP on port 8080.
fn web(scenario: &Scenario, extra: &str) -> Result<()> {
    let script = format!(
        "mkdir /www; echo hello > /www/small; yes 0123456789 | head -c {BIG} > /www/big; \
         exec httpd -f -p 8080 -h /www"
    );
    scenario.apply(&script_pod(
        "web",
        &script,
        &format!("    readinessProbe: {{tcpSocket: {{port: 8080}}}}\n{extra}"),
    ))?;
    scenario.ready("web").map(drop)
}

fn whole(body: &[u8]) -> bool {
    body.len() == BIG
        && body
            .iter()
            .zip(b"0123456789\n".iter().cycle())
            .all(|(a, b)| a == b)
}

#[test]
fn a_hundred_connections_share_one_port_forward() -> Result<()> {
    let scenario = Scenario::begin("forward-many")?;
    web(&scenario, "")?;
    for way in [WEBSOCKET, SPDY] {
        let forward = Forward::start(&scenario, way, "web", 8080)?;
        ensure!(
            forward.get("/small")? == b"hello\n",
            "the small page differs"
        );
        std::thread::scope(|scope| {
            let gets: Vec<_> = (0..100)
                .map(|_| scope.spawn(|| forward.get("/big")))
                .collect();
            for get in gets {
                let body = get
                    .join()
                    .map_err(|_| anyhow::anyhow!("a reader panicked"))??;
                ensure!(whole(&body), "{} bytes of {BIG} came", body.len());
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// kubernetes/kubernetes#74551.
#[test]
fn clients_that_hang_up_in_the_middle_leave_the_port_forward_to_others() -> Result<()> {
    let scenario = Scenario::begin("forward-hangup")?;
    web(&scenario, "")?;
    let forward = Forward::start(&scenario, WEBSOCKET, "web", 8080)?;
    for _ in 0..30 {
        let mut stream = forward.connect()?;
        write!(stream, "GET /big HTTP/1.0\r\n\r\n")?;
        let mut some = [0; 100];
        stream.read_exact(&mut some)?;
        // Unread bytes make this a reset, not an end.
        drop(stream);
    }
    ensure!(whole(&forward.get("/big")?), "the port-forward is broken");
    Ok(())
}

#[test]
fn a_pod_on_the_nodes_network_is_forwarded_too() -> Result<()> {
    let scenario = Scenario::begin("forward-host")?;
    let script = "mkdir /www; echo host > /www/small; exec httpd -f -p 127.0.0.1:18473 -h /www";
    let extra = "    readinessProbe: {exec: {command: [wget, -qO-, 'http://127.0.0.1:18473/small']}}\n  \
                 hostNetwork: true\n";
    scenario.apply(&script_pod("web", script, extra))?;
    scenario.ready("web")?;
    let forward = Forward::start(&scenario, WEBSOCKET, "web", 18473)?;
    ensure!(forward.get("/small")? == b"host\n", "the page differs");
    Ok(())
}

#[test]
fn a_port_nobody_listens_on_is_named() -> Result<()> {
    let scenario = Scenario::begin("forward-refused")?;
    scenario.apply(&script_pod("idle", "exec sleep 1000", ""))?;
    scenario.ready("idle")?;
    for way in [WEBSOCKET, SPDY] {
        let mut child = kubectl(&scenario, way, &["port-forward", "idle", ":9"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let mut lines = BufReader::new(child.stdout.take().context("no output")?);
        let mut line = String::new();
        lines.read_line(&mut line)?;
        let port = local_port(&line)?;
        std::thread::spawn(move || std::io::copy(&mut lines, &mut std::io::sink()));
        let mut stream = TcpStream::connect(("127.0.0.1", port))?;
        let mut nothing = Vec::new();
        let _ = stream.read_to_end(&mut nothing);
        // kubectl ends with the first connection that fails.
        let output = child.wait_with_output()?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(
            text.contains("error forwarding port 9 to pod") && text.contains("connection refused"),
            "{text}"
        );
    }
    Ok(())
}

#[test]
fn several_clients_attach_and_leave_without_harm() -> Result<()> {
    let scenario = Scenario::begin("attach")?;
    let script = "echo up; while read line; do echo got $line; done; echo end";
    scenario.apply(&script_pod("talker", script, "    stdin: true\n"))?;
    scenario.ready("talker")?;
    for (i, way) in [WEBSOCKET, SPDY].into_iter().enumerate() {
        let mut watcher = kubectl(&scenario, way, &["attach", "talker"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let mut shown = BufReader::new(watcher.stdout.take().context("no output")?);
        let mut feeder = kubectl(&scenario, way, &["attach", "-i", "talker"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let mut stdin = feeder.stdin.take().context("no input")?;
        let mut heard = BufReader::new(feeder.stdout.take().context("no output")?);
        // The watcher may attach later than the feeder: said until both have it.
        let mut line = String::new();
        writeln!(stdin, "hello {i}")?;
        heard.read_line(&mut line)?;
        ensure!(line == format!("got hello {i}\n"), "{line:?}");
        let seen = std::thread::spawn(move || {
            let mut line = String::new();
            shown.read_line(&mut line).map(|_| line)
        });
        while !seen.is_finished() {
            writeln!(stdin, "again {i}")?;
            line.clear();
            heard.read_line(&mut line)?;
            ensure!(line == format!("got again {i}\n"), "{line:?}");
        }
        let seen = seen
            .join()
            .map_err(|_| anyhow::anyhow!("a reader panicked"))??;
        ensure!(
            seen == format!("got again {i}\n") || seen == format!("got hello {i}\n"),
            "{seen:?}"
        );
        for mut child in [watcher, feeder] {
            child.kill()?;
            child.wait()?;
        }
    }
    let pod = scenario.json(&["get", "pod", "talker"])?;
    let status = testkit::scenario::container(&pod, "main");
    ensure!(
        !status["state"]["running"].is_null() && status["restartCount"] == 0,
        "{status}"
    );
    let log = scenario.kubectl(&["logs", "talker"])?;
    ensure!(
        log.starts_with("up\ngot hello 0\n") && log.contains("got hello 1\n"),
        "{log}"
    );
    Ok(())
}

#[test]
fn the_first_clients_end_of_input_ends_a_once_only_stdin() -> Result<()> {
    let scenario = Scenario::begin("attach-once")?;
    for (name, way) in [("ws", WEBSOCKET), ("spdy", SPDY)] {
        let mut child = kubectl(
            &scenario,
            way,
            &[
                "run",
                name,
                "-i",
                "--rm",
                "--restart=Never",
                "--image",
                BUSYBOX,
                "--quiet",
                "--",
                "sh",
                "-c",
                "read first; echo $first; cat; exit 5",
            ],
        )
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
        let mut stdin = child.stdin.take().context("no input")?;
        let text: String = (0..100_000).map(|i| format!("line {i}\n")).collect();
        let sent = text.clone();
        let writer = std::thread::spawn(move || stdin.write_all(sent.as_bytes()));
        let output = child.wait_with_output()?;
        writer
            .join()
            .map_err(|_| anyhow::anyhow!("the writer panicked"))??;
        let got = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(
            got == text,
            "{} of {} bytes came; {errors}",
            got.len(),
            text.len()
        );
        ensure!(
            output.status.code() == Some(5),
            "{:?}: {errors}",
            output.status
        );
    }
    Ok(())
}

#[test]
fn an_attached_client_that_is_slow_still_gets_all_and_the_log_too() -> Result<()> {
    let scenario = Scenario::begin("attach-flow")?;
    let script = "read go; i=0; while [ $i -lt 200 ]; do seq $((i*1000)) $((i*1000+999)); \
                  i=$((i+1)); done";
    let extra = "    stdin: true\n    stdinOnce: true\n  restartPolicy: Never\n";
    scenario.apply(&script_pod("flow", script, extra))?;
    scenario.ready("flow")?;
    let mut child = kubectl(&scenario, WEBSOCKET, &["attach", "-i", "flow"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let mut stdin = child.stdin.take().context("no input")?;
    stdin.write_all(b"go\n")?;
    drop(stdin);
    let mut stdout = child.stdout.take().context("no output")?;
    let (mut got, mut buffer) = (Vec::new(), vec![0; 4096]);
    while let count @ 1.. = stdout.read(&mut buffer)? {
        got.extend_from_slice(&buffer[..count]);
        // Slower than the container by far; nothing is waited for.
        std::thread::sleep(Duration::from_micros(500));
    }
    let wanted: String = (0..200_000).map(|i| format!("{i}\n")).collect();
    ensure!(child.wait()?.success(), "kubectl attach failed");
    ensure!(
        got == wanted.as_bytes(),
        "{} of {} bytes came",
        got.len(),
        wanted.len()
    );
    scenario.finished("flow")?;
    let log = scenario.kubectl(&["logs", "flow"])?;
    ensure!(
        log == wanted,
        "{} of {} bytes are logged",
        log.len(),
        wanted.len()
    );
    Ok(())
}

#[test]
fn run_with_a_terminal_is_a_session_at_a_shell() -> Result<()> {
    let scenario = Scenario::begin("run-it")?;
    for (name, way) in [("ws", WEBSOCKET), ("spdy", SPDY)] {
        let command = kubectl(
            &scenario,
            way,
            &[
                "run",
                name,
                "-it",
                "--rm",
                "--restart=Never",
                "--image",
                BUSYBOX,
                "--",
                "sh",
            ],
        );
        let mut terminal = Terminal::start(&command)?;
        terminal.resize(97, 31)?;
        terminal.expect("#").or_else(|_| {
            terminal.send("\n")?;
            terminal.expect("#")
        })?;
        terminal.send("tty; echo m''ark\n")?;
        let shown = terminal.expect("mark\r\n")?;
        ensure!(shown.contains("/dev/"), "{shown}");
        terminal.resize(101, 33)?;
        // The new size takes its way through the cluster.
        terminal.send("until stty size | grep '33 101'; do sleep 0.1; done; echo si''zed\n")?;
        terminal.expect("sized\r\n")?;
        terminal.send("exit 3\n")?;
        let (status, shown) = terminal.finish()?;
        ensure!(status.code() == Some(3), "{status:?}: {shown}");
        scenario.gone(name)?;
    }
    Ok(())
}

#[test]
fn exec_on_a_terminal_has_its_size_and_its_signals() -> Result<()> {
    let scenario = Scenario::begin("exec-it")?;
    scenario.apply(&script_pod("target", "exec sleep 1000", ""))?;
    scenario.ready("target")?;
    for way in [WEBSOCKET, SPDY] {
        let command = kubectl(&scenario, way, &["exec", "-it", "target", "--", "sh"]);
        let mut terminal = Terminal::start(&command)?;
        terminal.resize(77, 22)?;
        terminal.send("until stty size | grep '22 77'; do sleep 0.1; done; echo si''zed\n")?;
        terminal.expect("sized\r\n")?;
        terminal.send("echo re''ady; cat\n")?;
        terminal.expect("ready\r\n")?;
        terminal.send("echoed\n")?;
        terminal.expect("echoed\r\nechoed\r\n")?;
        terminal.send("\u{3}")?;
        // Only the shell may read what follows, not the `cat` that is about to die.
        terminal.expect("# ")?;
        terminal.send("exit 4\n")?;
        let (status, shown) = terminal.finish()?;
        ensure!(status.code() == Some(4), "{status:?}: {shown}");
    }
    Ok(())
}

#[test]
fn exec_by_spdy_gives_output_exit_code_and_the_end_of_input() -> Result<()> {
    let scenario = Scenario::begin("exec-spdy")?;
    scenario.apply(&script_pod("target", "exec sleep 1000", ""))?;
    scenario.ready("target")?;
    let script = "cat; echo err >&2; exit 7";
    let args = ["exec", "-i", "target", "--", "sh", "-c", script];
    for way in [SPDY, WEBSOCKET] {
        let mut child = kubectl(&scenario, way, &args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let mut stdin = child.stdin.take().context("no input")?;
        // Far more than all buffers on the way: input and output must move beside each other.
        let sent: Vec<u8> = (0..8_000_000u32).map(|i| (i % 251) as u8).collect();
        let copy = sent.clone();
        let writer = std::thread::spawn(move || stdin.write_all(&copy));
        let output = child.wait_with_output()?;
        writer
            .join()
            .map_err(|_| anyhow::anyhow!("the writer panicked"))??;
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(
            output.stdout == sent,
            "{} bytes came: {errors}",
            output.stdout.len()
        );
        ensure!(errors.starts_with("err\n"), "{errors}");
        ensure!(output.status.code() == Some(7), "{:?}", output.status);
    }
    Ok(())
}

#[test]
fn the_process_of_a_client_that_vanished_ends() -> Result<()> {
    let scenario = Scenario::begin("exec-vanish")?;
    scenario.apply(&script_pod("target", "exec sleep 1000", ""))?;
    scenario.ready("target")?;
    for way in [WEBSOCKET, SPDY] {
        let args = [
            "exec",
            "target",
            "--",
            "sh",
            "-c",
            "echo up; exec sleep 4242",
        ];
        let mut child = kubectl(&scenario, way, &args)
            .stdout(Stdio::piped())
            .spawn()?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("no output")?).read_line(&mut line)?;
        ensure!(line == "up\n", "{line:?}");
        child.kill()?;
        child.wait()?;
        let gone = "while pgrep -f 'sleep 4242' >/dev/null; do sleep 0.1; done";
        let args = ["exec", "target", "--", "timeout", "60", "sh", "-c", gone];
        scenario.kubectl(&args).context("the process goes on")?;
    }
    Ok(())
}

#[test]
fn big_files_are_copied_both_ways_without_a_changed_byte() -> Result<()> {
    const SIZE: usize = 200 << 20;
    let scenario = Scenario::begin("cp")?;
    scenario.apply(&script_pod("target", "exec sleep 1000", ""))?;
    scenario.ready("target")?;
    let dir = tempfile::tempdir()?;
    let (there, back) = (dir.path().join("there"), dir.path().join("back"));
    // A cheap generator; compressible or repeated content would hide shifted blocks.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut content = Vec::with_capacity(SIZE);
    while content.len() < SIZE {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        content.extend_from_slice(&state.to_le_bytes());
    }
    std::fs::write(&there, &content)?;
    for way in [WEBSOCKET, SPDY] {
        let run = |from: &str, to: &str| {
            testkit::command::stdout(&mut kubectl(&scenario, way, &["cp", from, to]))
        };
        let (there, back) = (there.display().to_string(), back.display().to_string());
        run(&there, "target:/tmp/file")?;
        run("target:/tmp/file", &back)?;
        ensure!(std::fs::read(&back)? == content, "the copy differs");
        std::fs::remove_file(&back)?;
    }
    Ok(())
}
