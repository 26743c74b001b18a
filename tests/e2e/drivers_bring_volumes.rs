//! Volumes of a CSI driver: our own, on a node's own disk. PersistentVolumes are made by hand.

use anyhow::{Context, Result, ensure};
use proto::csi::v1 as csi;
use proto::csi::v1::controller_client::ControllerClient;
use proto::csi::v1::volume_capability::access_mode::Mode;
use proto::csi::v1::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use testkit::cluster::{Lab, node};
use testkit::process::until;
use testkit::scenario::{BUSYBOX, LIMIT, Scenario, phase};
use testkit::{command, paths};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};

const NAME: &str = "e2e.csi.ferrule.dev";
/// The kubelet's directory on a node.
const ROOT: &str = "/var/lib/kubelet";

/// The driver on a node, registered. It ends with this value.
struct Driver {
    runtime: tokio::runtime::Runtime,
    program: Child,
    /// The kubelet's directory as the machine sees it.
    root: PathBuf,
}

impl Driver {
    fn start(scenario: &Scenario, node_name: &str) -> Result<Self> {
        let program = program()?;
        let agent = scenario.agent(node_name);
        let root = agent.directory("kubelet");
        let home = format!("{ROOT}/plugins/{NAME}");
        agent.run(&["mkdir", "-p", &format!("{home}/pool")])?;
        let socket = root.join("plugins").join(NAME).join("csi.sock");
        drop(std::fs::remove_file(&socket));
        let inside = root.join("plugins").join(NAME).join("csi-driver");
        std::fs::copy(&program, &inside).context("copy the driver")?;
        let holder = node::existing(&Lab::open(&scenario.layout.name)?, node_name)?.holder;
        let words = [
            &format!("{home}/csi-driver"),
            "run",
            "--endpoint",
            &format!("unix://{home}/csi.sock"),
            "--driver-name",
            NAME,
            "--node",
            node_name,
            "--pool",
            &format!("{home}/pool"),
            "--plugins-registry",
            &format!("{ROOT}/plugins_registry"),
            "--kubelet-endpoint",
            &format!("{home}/csi.sock"),
        ]
        .map(str::to_owned);
        let log = std::fs::File::create(scenario.layout.log(&format!("{node_name}-csi-driver")))?;
        let program = node::enter(holder, &words)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .context("start the driver")?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let driver = Self {
            runtime,
            program,
            root,
        };
        let listed = || {
            let drivers = [
                "get",
                "csinode",
                node_name,
                "-o",
                "jsonpath={.spec.drivers[*].name}",
            ];
            let names = scenario.admin.run(&drivers)?;
            ensure!(names.contains(NAME), "drivers: {names}");
            Ok(())
        };
        until("the driver to register", LIMIT, || Ok(()), listed)?;
        scenario.admin.apply(&format!(
            "apiVersion: storage.k8s.io/v1
kind: CSIDriver
metadata: {{name: {NAME}}}
spec: {{attachRequired: false, fsGroupPolicy: File}}
"
        ))?;
        Ok(driver)
    }

    fn controller(&self) -> ControllerClient<Channel> {
        let socket = self.root.join("plugins").join(NAME).join("csi.sock");
        let connect = tower::service_fn(move |_: Uri| {
            let socket = socket.clone();
            async move {
                let stream = UnixStream::connect(socket).await?;
                Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(stream))
            }
        });
        let _inside = self.runtime.enter();
        let endpoint = Endpoint::from_static("http://localhost");
        ControllerClient::new(endpoint.connect_with_connector_lazy(connect))
    }

    /// Makes a volume; its id.
    fn create(&self, name: &str, bytes: i64, block: bool) -> Result<String> {
        let access = if block {
            AccessType::Block(BlockVolume {})
        } else {
            AccessType::Mount(MountVolume {
                fs_type: "ext4".to_owned(),
                ..MountVolume::default()
            })
        };
        let request = csi::CreateVolumeRequest {
            name: name.to_owned(),
            capacity_range: Some(csi::CapacityRange {
                required_bytes: bytes,
                limit_bytes: 0,
            }),
            volume_capabilities: vec![csi::VolumeCapability {
                access_mode: Some(AccessMode {
                    mode: Mode::SingleNodeWriter as i32,
                }),
                access_type: Some(access),
            }],
            ..csi::CreateVolumeRequest::default()
        };
        let mut controller = self.controller();
        let answer = self.runtime.block_on(controller.create_volume(request));
        let volume = answer.context("CreateVolume")?.into_inner().volume;
        Ok(volume.context("no volume")?.volume_id)
    }

    fn delete(&self, id: &str) -> Result<()> {
        let request = csi::DeleteVolumeRequest {
            volume_id: id.to_owned(),
            ..csi::DeleteVolumeRequest::default()
        };
        let mut controller = self.controller();
        let answer = self.runtime.block_on(controller.delete_volume(request));
        answer.context("DeleteVolume").map(drop)
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        drop(self.program.kill());
        drop(self.program.wait());
    }
}

/// Builds the driver.
fn program() -> Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let words = ["build", "--workspace", "--bin", "csi-driver"];
    command::stdout(command::command(cargo, &words).current_dir(paths::workspace()))?;
    Ok(paths::target().join("debug/csi-driver"))
}

/// A volume of the driver, bound to a claim of this name.
fn volume(scenario: &Scenario, name: &str, claim: &str, handle: &str, mode: &str) -> String {
    let namespace = &scenario.namespace;
    format!(
        "apiVersion: v1
kind: PersistentVolume
metadata: {{name: {name}}}
spec:
  capacity: {{storage: 64Mi}}
  accessModes: [ReadWriteOnce]
  persistentVolumeReclaimPolicy: Retain
  storageClassName: by-hand
  volumeMode: {mode}
  claimRef: {{namespace: {namespace}, name: {claim}}}
  csi: {{driver: {NAME}, volumeHandle: {handle}, fsType: {fs}}}
",
        fs = if mode == "Block" { "\"\"" } else { "ext4" },
    )
}

/// Nothing of the driver's volumes is on the node.
fn nothing_mounted(scenario: &Scenario, node_name: &str) -> Result<()> {
    let agent = scenario.agent(node_name);
    let look = || {
        let mounts = agent.run(&["cat", "/proc/self/mountinfo"])?;
        let left: Vec<&str> = mounts
            .lines()
            .filter(|line| line.contains("kubernetes.io~csi") || line.contains("io/csi/"))
            .collect();
        ensure!(left.is_empty(), "left: {left:?}");
        Ok(())
    };
    until("no mount of the driver", LIMIT, || Ok(()), look)
}

const SET: &str = "apiVersion: apps/v1
kind: StatefulSet
metadata: {name: db}
spec:
  serviceName: db
  selector: {matchLabels: {app: db}}
  template:
    metadata: {labels: {app: db}}
    spec:
      nodeName: node-1
      terminationGracePeriodSeconds: 1
      securityContext: {fsGroup: 4711}
      containers:
      - name: main
        image: IMAGE
        command: [sh, -c, 'echo $HOSTNAME $(cat /data/count 2>/dev/null | wc -l) >> /data/count; sync; exec sleep 10000']
        volumeMounts: [{name: data, mountPath: /data}]
  volumeClaimTemplates:
  - metadata: {name: data}
    spec:
      accessModes: [ReadWriteOnce]
      storageClassName: by-hand
      resources: {requests: {storage: 64Mi}}
";

#[test]
fn a_stateful_set_keeps_its_data_over_deletion_and_a_killed_agent() -> Result<()> {
    let scenario = Scenario::alone("stateful")?;
    let driver = Driver::start(&scenario, "node-1")?;
    let name = scenario.namespace.clone();
    let handle = driver.create(&name, 64 << 20, false)?;
    scenario.apply(&volume(
        &scenario,
        &name,
        "data-db-0",
        &handle,
        "Filesystem",
    ))?;
    scenario.apply(&SET.replace("IMAGE", BUSYBOX))?;
    scenario.ready("db-0")?;
    let stat = ["exec", "db-0", "--", "stat", "-c", "%g %a", "/data"];
    ensure!(scenario.kubectl(&stat)?.trim() == "4711 2775");
    scenario.kubectl(&["delete", "pod", "db-0"])?;
    scenario.ready("db-0")?;
    let count = ["exec", "db-0", "--", "wc", "-l", "/data/count"];
    let lines = scenario.kubectl(&count)?;
    ensure!(lines.starts_with("2 "), "{lines}");
    // The agent dies, and the pod is deleted before it is back.
    let agent = scenario.agent("node-1");
    agent.kill()?;
    scenario.kubectl(&["delete", "pod", "db-0", "--wait=false"])?;
    agent.start()?;
    let grown = || {
        let lines = scenario.kubectl(&count)?;
        ensure!(lines.starts_with("3 "), "{lines}");
        Ok(())
    };
    until("the third life of the pod", LIMIT, || Ok(()), grown)?;
    scenario.kubectl(&["delete", "statefulset", "db"])?;
    scenario.gone("db-0")?;
    nothing_mounted(&scenario, "node-1")?;
    driver.delete(&handle)?;
    scenario.kubectl(&["delete", "pvc", "--all", "--wait=false"])?;
    scenario.kubectl(&["delete", "pv", &name, "--wait=false"])?;
    Ok(())
}

#[test]
fn a_block_volume_is_a_device_of_its_container() -> Result<()> {
    let scenario = Scenario::alone("block")?;
    let driver = Driver::start(&scenario, "node-1")?;
    let name = scenario.namespace.clone();
    let handle = driver.create(&name, 64 << 20, true)?;
    scenario.apply(&volume(&scenario, &name, "raw", &handle, "Block"))?;
    scenario.apply(
        "apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: raw}
spec:
  accessModes: [ReadWriteOnce]
  storageClassName: by-hand
  volumeMode: Block
  resources: {requests: {storage: 64Mi}}
",
    )?;
    let pod = |name: &str, script: &str| {
        format!(
            "apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  nodeName: node-1
  restartPolicy: Never
  containers:
  - name: main
    image: {BUSYBOX}
    command: [sh, -c, '{script}']
    volumeDevices: [{{name: raw, devicePath: /dev/raw-disk}}]
  volumes:
  - {{name: raw, persistentVolumeClaim: {{claimName: raw}}}}
"
        )
    };
    let script = "test -b /dev/raw-disk && echo written | dd of=/dev/raw-disk bs=512 count=1 conv=sync,fsync";
    scenario.apply(&pod("writer", script))?;
    let ended = scenario.finished("writer")?;
    let said = scenario.kubectl(&["logs", "writer"])?;
    ensure!(phase(&ended) == "Succeeded", "{said}\n{ended}");
    scenario.kubectl(&["delete", "pod", "writer"])?;
    scenario.apply(&pod(
        "reader",
        "dd if=/dev/raw-disk bs=7 count=1 2>/dev/null",
    ))?;
    let ended = scenario.finished("reader")?;
    let said = scenario.kubectl(&["logs", "reader"])?;
    ensure!(
        phase(&ended) == "Succeeded" && said == "written",
        "{said}\n{ended}"
    );
    scenario.kubectl(&["delete", "pod", "reader"])?;
    nothing_mounted(&scenario, "node-1")?;
    let devices = Path::new(ROOT).join("plugins/kubernetes.io/csi/volumeDevices");
    let left = format!("find {} -mindepth 2 2>/dev/null || true", devices.display());
    let gone = || {
        let left = scenario.agent("node-1").run(&["sh", "-c", &left])?;
        ensure!(left.is_empty(), "left: {left}");
        Ok(())
    };
    until("nothing of the device", LIMIT, || Ok(()), gone)?;
    driver.delete(&handle)?;
    scenario.kubectl(&["delete", "pvc", "--all", "--wait=false"])?;
    scenario.kubectl(&["delete", "pv", &name, "--wait=false"])?;
    Ok(())
}
