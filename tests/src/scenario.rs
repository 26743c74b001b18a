//! What the end-to-end scenarios are written with: a namespace of one's own, watches through the
//! real kubectl, and the agent of a node that can be killed and started again.
//!
//! Scenarios share the lab named by `FERRULE_LAB` and run beside each other. One that disturbs a
//! node for everybody takes it alone ([`Scenario::alone`]).

use crate::cluster::kubectl::Kubectl;
use crate::cluster::layout::Layout;
use crate::cluster::spare::Spare;
use crate::cluster::{DEFAULT_LAB, Lab, NodeKind, controlplane, ferrule, node, stock};
use crate::process::{self, ProcessIdentity, ProcessSpec};
use crate::{command, paths};
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLock, RwLockReadGuard, RwLockWriteGuard, mpsc};
use std::time::{Duration, Instant};

/// How long anything may take that is expected to happen.
pub const LIMIT: Duration = Duration::from_secs(90);

/// The image scenarios run.
pub const BUSYBOX: &str = "registry.k8s.io/e2e-test-images/busybox:1.37.0-1";

static DISTURBANCE: RwLock<()> = RwLock::new(());

#[derive(Debug)]
enum Share {
    Beside(#[expect(dead_code, reason = "held")] RwLockReadGuard<'static, ()>),
    Alone(#[expect(dead_code, reason = "held")] RwLockWriteGuard<'static, ()>),
}

/// One scenario: a namespace that goes with it.
#[derive(Debug)]
pub struct Scenario {
    /// kubectl as administrator; [`Scenario::kubectl`] adds the namespace.
    pub admin: Kubectl,
    /// The lab's addresses and files.
    pub layout: Layout,
    /// The scenario's namespace.
    pub namespace: String,
    _share: Share,
}

impl Scenario {
    /// Begins a scenario that runs beside others.
    ///
    /// # Errors
    /// When there is no lab or the namespace cannot be made.
    pub fn begin(name: &str) -> Result<Self> {
        let guard = DISTURBANCE
            .read()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        Self::with(&lab_name(), name, Share::Beside(guard))
    }

    /// Begins a scenario that has the lab for itself.
    ///
    /// # Errors
    /// As [`Scenario::begin`].
    pub fn alone(name: &str) -> Result<Self> {
        let guard = DISTURBANCE
            .write()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        Self::with(&lab_name(), name, Share::Alone(guard))
    }

    /// As [`Scenario::alone`], in the lab named.
    ///
    /// # Errors
    /// As [`Scenario::begin`].
    pub fn alone_in(lab: &str, name: &str) -> Result<Self> {
        let guard = DISTURBANCE
            .write()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        Self::with(lab, name, Share::Alone(guard))
    }

    fn with(lab: &str, name: &str, share: Share) -> Result<Self> {
        let (layout, admin) = {
            let lab = Lab::open(lab)?;
            (lab.layout.clone(), lab.kubectl.clone())
        };
        // Unique, so that a scenario can be repeated while its last namespace still goes away.
        let namespace = format!("{name}-{:x}", std::process::id());
        admin.run(&["create", "namespace", &namespace])?;
        let scenario = Self {
            admin,
            layout,
            namespace,
            _share: share,
        };
        let account = [
            "wait",
            "--for=create",
            "serviceaccount/default",
            "--timeout=60s",
        ];
        scenario.kubectl(&account)?;
        Ok(scenario)
    }

    fn args<'a>(&'a self, args: &[&'a str]) -> Vec<&'a str> {
        let mut all = vec!["--namespace", self.namespace.as_str()];
        all.extend(args);
        all
    }

    /// Runs kubectl in the namespace.
    ///
    /// # Errors
    /// When kubectl fails.
    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        self.admin.run(&self.args(args))
    }

    /// Runs kubectl and gives exit code and output as they are.
    ///
    /// # Errors
    /// When kubectl cannot be started.
    pub fn output(&self, args: &[&str]) -> Result<std::process::Output> {
        self.admin.output(&self.args(args))
    }

    /// Reads an object, or a list.
    ///
    /// # Errors
    /// When kubectl fails.
    pub fn json(&self, args: &[&str]) -> Result<Value> {
        self.admin.json(&self.args(args))
    }

    /// Applies manifests in the namespace.
    ///
    /// # Errors
    /// When the apiserver refuses them.
    pub fn apply(&self, manifest: &str) -> Result<()> {
        let mut apply = self.admin.command(&self.args(&["apply", "-f", "-"]));
        command::stdout_with_input(&mut apply, manifest.as_bytes()).map(drop)
    }

    /// Watches pods until one event satisfies `wanted`; returns that pod and the time it took.
    ///
    /// # Errors
    /// When [`LIMIT`] passes first; the message carries the last state seen.
    pub fn watch_pod(
        &self,
        pod: &str,
        what: &str,
        wanted: impl FnMut(&Event) -> bool,
    ) -> Result<(Value, Duration)> {
        let field = format!("metadata.name={pod}");
        self.watch(&["pods", "--field-selector", &field], what, wanted)
    }

    /// Watches any objects, as `kubectl get` selects them.
    ///
    /// # Errors
    /// As [`Scenario::watch_pod`].
    pub fn watch(
        &self,
        selection: &[&str],
        what: &str,
        mut wanted: impl FnMut(&Event) -> bool,
    ) -> Result<(Value, Duration)> {
        let start = Instant::now();
        let watch = Watch::start(self, selection)?;
        let mut last = Value::Null;
        while let Some(event) = watch.next(LIMIT.saturating_sub(start.elapsed())) {
            if wanted(&event) {
                return Ok((event.object, start.elapsed()));
            }
            last = event.object;
        }
        // What the object is like, not who wrote which field of it.
        for noise in ["/metadata/managedFields", "/metadata/annotations"] {
            if let Some(value) = last.pointer_mut(noise) {
                value.take();
            }
        }
        bail!("waited {:?} for {what}; last seen: {last}", start.elapsed())
    }

    /// Waits until a pod is Ready.
    ///
    /// # Errors
    /// As [`Scenario::watch_pod`].
    pub fn ready(&self, pod: &str) -> Result<Value> {
        Ok(self
            .watch_pod(pod, "the pod to be Ready", |event| is_ready(&event.object))?
            .0)
    }

    /// Waits until a pod has ended, and returns it.
    ///
    /// # Errors
    /// As [`Scenario::watch_pod`].
    pub fn finished(&self, pod: &str) -> Result<Value> {
        let ended = |event: &Event| matches!(phase(&event.object), "Succeeded" | "Failed");
        Ok(self.watch_pod(pod, "the pod to end", ended)?.0)
    }

    /// Waits until a pod is gone from the apiserver.
    ///
    /// # Errors
    /// When [`LIMIT`] passes first.
    pub fn gone(&self, pod: &str) -> Result<()> {
        let wait = [
            "wait",
            "--for=delete",
            &format!("pod/{pod}"),
            "--timeout=90s",
        ];
        self.kubectl(&wait).map(drop)
    }

    /// Waits for an event object about `object` whose reason is `reason`; returns its message.
    ///
    /// # Errors
    /// As [`Scenario::watch_pod`].
    pub fn event_about(&self, object: &str, reason: &str) -> Result<String> {
        let field = format!("involvedObject.name={object},reason={reason}");
        let what = format!("an event {reason} about {object}");
        let (event, _) = self.watch(&["events", "--field-selector", &field], &what, |_| true)?;
        Ok(text(&event, "/message"))
    }

    /// A node of the scenario's own, Ready.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn spare_node(&self, spare: &Spare) -> Result<SpareNode> {
        let mut lab = Lab::open(&self.layout.name)?;
        let (name, started) = crate::cluster::spare::add(&mut lab, spare);
        let node = SpareNode {
            agent: self.agent(&name),
            name,
        };
        drop(lab);
        started.map(|()| node)
    }

    /// Stops apiserver and controller manager, as if their machine were gone.
    ///
    /// # Errors
    /// When one does not die.
    pub fn stop_control_plane(&self) -> Result<Outage> {
        let outage = Outage {
            lab: self.layout.name.clone(),
            ended: false,
        };
        let lab = Lab::open(&self.layout.name)?;
        for name in ["kube-controller-manager", "kube-apiserver"] {
            let record = lab.state.processes.get(name);
            let identity = record.and_then(|record| record.identity);
            let identity = identity.with_context(|| format!("{name} was never started"))?;
            process::kill(identity, Duration::from_secs(10))?;
        }
        Ok(outage)
    }

    /// Waits until a node holds nothing of pods that are gone.
    ///
    /// # Errors
    /// When [`LIMIT`] passes first; the message lists what is left.
    pub fn nothing_left_on(&self, node: &str) -> Result<()> {
        let look = || {
            let left = crate::leaks::of_node(&self.layout.name, node)?;
            anyhow::ensure!(left.is_empty(), "left on {node}:\n{}", left.join("\n"));
            Ok(())
        };
        process::until("nothing to be left", LIMIT, || Ok(()), look)
    }

    /// The agent of a node, to be killed and started.
    #[must_use]
    pub fn agent(&self, node: &str) -> Agent {
        Agent {
            lab: self.layout.name.clone(),
            node: node.to_owned(),
        }
    }
}

/// A control plane that is down; it comes back with this value's end.
#[derive(Debug)]
pub struct Outage {
    lab: String,
    ended: bool,
}

impl Outage {
    /// Starts the control plane and waits until it answers.
    ///
    /// # Errors
    /// When it does not come back.
    pub fn end(mut self) -> Result<()> {
        self.ended = true;
        Self::restore(&self.lab)
    }

    fn restore(lab: &str) -> Result<()> {
        controlplane::ensure(&mut Lab::open(lab)?)
    }
}

impl Drop for Outage {
    fn drop(&mut self) {
        if !self.ended
            && let Err(error) = Self::restore(&self.lab)
        {
            eprintln!("the control plane did not come back: {error:#}");
        }
    }
}

/// A node of a scenario's own; it goes with this value.
#[derive(Debug)]
pub struct SpareNode {
    /// Its agent.
    pub agent: Agent,
    /// Its name.
    pub name: String,
}

impl SpareNode {
    /// The words that put a pod on this node.
    #[must_use]
    pub fn pin(&self) -> String {
        format!("  nodeName: {}\n", self.name)
    }
}

impl Drop for SpareNode {
    fn drop(&mut self) {
        let removed = Lab::open(&self.agent.lab)
            .and_then(|mut lab| crate::cluster::spare::remove(&mut lab, &self.name));
        if let Err(error) = removed {
            eprintln!("{} was not removed: {error:#}", self.name);
        }
    }
}

impl Drop for Scenario {
    fn drop(&mut self) {
        // Not waited for: the next scenario has a namespace of its own.
        drop(
            self.admin
                .run(&["delete", "namespace", &self.namespace, "--wait=false"]),
        );
    }
}

fn lab_name() -> String {
    std::env::var("FERRULE_LAB").unwrap_or_else(|_| DEFAULT_LAB.to_owned())
}

/// One event of a watch.
#[derive(Debug, Clone)]
pub struct Event {
    /// `ADDED`, `MODIFIED`, `DELETED`.
    pub kind: String,
    /// The object after it.
    pub object: Value,
    /// When we saw it.
    pub at: Instant,
}

/// A running `kubectl get --watch`.
#[derive(Debug)]
pub struct Watch {
    child: Child,
    events: mpsc::Receiver<Event>,
    over: Arc<AtomicBool>,
}

impl Watch {
    /// Starts watching; the first events are the objects that exist.
    ///
    /// # Errors
    /// When kubectl cannot be started.
    pub fn start(scenario: &Scenario, selection: &[&str]) -> Result<Self> {
        Self::start_in(&scenario.admin, &scenario.namespace, selection)
    }

    /// Starts watching in a namespace.
    ///
    /// # Errors
    /// When kubectl cannot be started.
    pub fn start_in(admin: &Kubectl, namespace: &str, selection: &[&str]) -> Result<Self> {
        let mut args = vec!["--namespace", namespace, "get"];
        args.extend(selection);
        args.extend(["--watch", "--output-watch-events", "-o", "json"]);
        let mut child = admin
            .command(&args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("start kubectl get --watch")?;
        let stdout = child
            .stdout
            .take()
            .context("standard output was not piped")?;
        let (sender, events) = mpsc::channel();
        let over = Arc::new(AtomicBool::new(false));
        let end = over.clone();
        std::thread::spawn(move || {
            let stream = serde_json::Deserializer::from_reader(stdout).into_iter::<Value>();
            for mut value in stream.map_while(Result::ok) {
                let kind = text(&value, "/type");
                let event = Event {
                    kind,
                    object: value["object"].take(),
                    at: Instant::now(),
                };
                if sender.send(event).is_err() {
                    return;
                }
            }
            end.store(true, Ordering::Release);
        });
        Ok(Self {
            child,
            events,
            over,
        })
    }

    /// The next event; `None` when `limit` passes or the watch ends.
    #[must_use]
    pub fn next(&self, limit: Duration) -> Option<Event> {
        self.events.recv_timeout(limit).ok()
    }

    /// Whether the apiserver ended it; events may still wait to be read.
    #[must_use]
    pub fn ended(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    /// Everything that has arrived.
    #[must_use]
    pub fn seen(&self) -> Vec<Event> {
        self.events.try_iter().collect()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// A node's agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Agent {
    lab: String,
    node: String,
}

impl Agent {
    /// Kills it the hard way and waits until it is dead.
    ///
    /// # Errors
    /// When it does not run.
    pub fn kill(&self) -> Result<()> {
        let lab = Lab::open(&self.lab)?;
        process::kill(self.identity(&lab)?, Duration::from_secs(10))
    }

    /// Starts it again.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(&self) -> Result<()> {
        let mut lab = Lab::open(&self.lab)?;
        let context = node::existing(&lab, &self.node)?;
        match lab.state.nodes.get(&self.node).map(|node| node.kind) {
            Some(NodeKind::Stock) => stock::start_kubelet(&mut lab, &context),
            Some(NodeKind::Ferrule) | None => ferrule::start(&mut lab, &context),
        }
    }

    /// Its pid and start time.
    ///
    /// # Errors
    /// When it was never started.
    pub fn identity(&self, lab: &Lab) -> Result<ProcessIdentity> {
        let record = lab.state.processes.get(&format!("{}/kubelet", self.node));
        record
            .and_then(|record| record.identity)
            .with_context(|| format!("the agent of {} was never started", self.node))
    }

    /// Runs a command inside the node.
    ///
    /// # Errors
    /// When it fails.
    pub fn run(&self, args: &[&str]) -> Result<String> {
        let holder = {
            let lab = Lab::open(&self.lab)?;
            node::existing(&lab, &self.node)?.holder
        };
        let args: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
        command::stdout(&mut node::enter(holder, &args))
    }

    /// Starts another program of the node's own; it goes with the node.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_program(&self, name: &str, spec: ProcessSpec) -> Result<()> {
        let mut lab = Lab::open(&self.lab)?;
        let context = node::existing(&lab, &self.node)?;
        node::ensure_agent(&mut lab, &context, name, spec)
    }

    /// Kills a program started by [`Agent::start_program`].
    ///
    /// # Errors
    /// When it was never started or does not die.
    pub fn kill_program(&self, name: &str) -> Result<()> {
        let lab = Lab::open(&self.lab)?;
        let record = lab.state.processes.get(&format!("{}/{name}", self.node));
        let identity = record.and_then(|record| record.identity);
        let identity = identity.with_context(|| format!("{name} was never started"))?;
        process::kill(identity, Duration::from_secs(10))
    }

    /// A path inside the node as the machine sees it, mounts of the node included.
    ///
    /// # Errors
    /// When the node is not up.
    pub fn inside(&self, path: &str) -> Result<std::path::PathBuf> {
        let lab = Lab::open(&self.lab)?;
        let holder = node::existing(&lab, &self.node)?.holder;
        Ok(format!("/proc/{holder}/root{path}").into())
    }

    /// Its cgroup in every hierarchy.
    ///
    /// # Errors
    /// When the node is not up.
    pub fn cgroups(&self) -> Result<Vec<std::path::PathBuf>> {
        let lab = Lab::open(&self.lab)?;
        Ok(node::existing(&lab, &self.node)?.cgroups)
    }

    /// Whether it runs.
    ///
    /// # Errors
    /// When it was never started.
    pub fn is_alive(&self) -> Result<bool> {
        Ok(self.identity(&Lab::open(&self.lab)?)?.is_alive())
    }

    /// Processor time it has used since it was started.
    ///
    /// # Errors
    /// When it does not run.
    pub fn processor_time(&self) -> Result<Duration> {
        let pid = self.identity(&Lab::open(&self.lab)?)?.pid;
        process::processor_time(pid).with_context(|| format!("the agent of {} is gone", self.node))
    }

    /// How long its log is now, to read from there with [`Agent::log_since`].
    #[must_use]
    pub fn log_mark(&self) -> u64 {
        std::fs::metadata(self.log_file()).map_or(0, |meta| meta.len())
    }

    /// What it has logged since a mark.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn log_since(&self, mark: u64) -> Result<String> {
        let file = self.log_file();
        let text = std::fs::read(&file).with_context(|| format!("read {}", file.display()))?;
        let from = usize::try_from(mark).unwrap_or(usize::MAX).min(text.len());
        Ok(String::from_utf8_lossy(&text[from..]).into_owned())
    }

    fn log_file(&self) -> std::path::PathBuf {
        let logs = paths::labs().join(&self.lab).join("logs");
        logs.join(format!("{}-kubelet.log", self.node))
    }

    /// A directory of the node as the machine sees it, such as `kubelet` or `cni-conf`.
    #[must_use]
    pub fn directory(&self, name: &str) -> std::path::PathBuf {
        paths::labs()
            .join(&self.lab)
            .join("nodes")
            .join(&self.node)
            .join(name)
    }
}

/// A string field, or nothing.
#[must_use]
pub fn text(object: &Value, pointer: &str) -> String {
    object
        .pointer(pointer)
        .and_then(Value::as_str)
        .unwrap_or_default()
        .to_owned()
}

/// `status.phase`.
#[must_use]
pub fn phase(pod: &Value) -> &str {
    pod.pointer("/status/phase")
        .and_then(Value::as_str)
        .unwrap_or_default()
}

/// Whether the condition of a pod or node holds.
#[must_use]
pub fn condition(object: &Value, kind: &str) -> bool {
    let conditions = object
        .pointer("/status/conditions")
        .and_then(Value::as_array);
    conditions
        .into_iter()
        .flatten()
        .any(|condition| condition["type"] == kind && condition["status"] == "True")
}

/// Since when a condition of a pod or node is as it is.
#[must_use]
pub fn condition_since(object: &Value, kind: &str) -> String {
    let conditions = object
        .pointer("/status/conditions")
        .and_then(Value::as_array);
    let found = conditions
        .into_iter()
        .flatten()
        .find(|condition| condition["type"] == kind);
    found.map_or_else(String::new, |found| text(found, "/lastTransitionTime"))
}

/// Whether a pod is Ready.
#[must_use]
pub fn is_ready(pod: &Value) -> bool {
    condition(pod, "Ready")
}

/// The status of a main container.
#[must_use]
pub fn container<'a>(pod: &'a Value, name: &str) -> &'a Value {
    let all = pod
        .pointer("/status/containerStatuses")
        .and_then(Value::as_array);
    all.into_iter()
        .flatten()
        .find(|status| status["name"] == name)
        .unwrap_or(&Value::Null)
}

/// Why a main container waits, such as `CrashLoopBackOff`.
#[must_use]
pub fn waiting_reason(pod: &Value, name: &str) -> String {
    text(container(pod, name), "/state/waiting/reason")
}

/// A pod of one container that runs a shell script.
#[must_use]
pub fn script_pod(name: &str, script: &str, extra: &str) -> String {
    let script = serde_json::Value::from(script);
    format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  terminationGracePeriodSeconds: 3
  containers:
  - name: main
    image: {BUSYBOX}
    command: [sh, -c, {script}]
{extra}"
    )
}
