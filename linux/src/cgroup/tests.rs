use super::fake::{FakeFiles, Flavour};
use super::*;

fn hierarchies() -> Vec<Hierarchy> {
    let make = |name: &str, controllers: &[&str]| Hierarchy {
        mount_point: PathBuf::from("/cg").join(name),
        controllers: controllers.iter().map(|c| (*c).to_owned()).collect(),
    };
    vec![
        make("cpu,cpuacct", &["cpu", "cpuacct"]),
        make("cpuset", &["cpuset"]),
        make("memory", &["memory"]),
        make("pids", &["pids"]),
        make("devices", &["devices"]),
        make("freezer", &["freezer"]),
    ]
}

fn v1() -> (FakeFiles, V1<FakeFiles>) {
    let hierarchies = hierarchies();
    let mounts: Vec<&Path> = hierarchies
        .iter()
        .map(|h| h.mount_point.as_path())
        .collect();
    let files = FakeFiles::new(Flavour::V1, &mounts);
    let cgroups = V1::new(files.clone(), hierarchies, PathBuf::from("lab/node"));
    (files, cgroups)
}

fn v2() -> (FakeFiles, V2<FakeFiles>) {
    let mount = Path::new("/cg");
    let files = FakeFiles::new(Flavour::V2, &[mount]);
    let cgroups = V2::new(files.clone(), mount.to_owned(), PathBuf::from("lab"));
    (files, cgroups)
}

fn limits() -> Limits {
    Limits {
        cpu_shares: Some(512),
        cpu_quota_us: Some(50_000),
        cpu_period_us: Some(100_000),
        memory_bytes: Some(64 << 20),
        pids: Some(100),
        ..Limits::default()
    }
}

#[test]
fn a_v1_cgroup_is_made_in_every_hierarchy_with_a_usable_cpuset() {
    let (files, cgroups) = v1();
    cgroups.ensure("/kubepods/pod1").unwrap();
    cgroups.ensure("/kubepods/pod1").unwrap();
    for dir in cgroups.directories("/kubepods/pod1").unwrap() {
        assert!(files.has_dir(&dir), "{}", dir.display());
    }
    let cpus = Path::new("/cg/cpuset/lab/node/kubepods/pod1/cpuset.cpus");
    assert_eq!(files.read(cpus).unwrap(), "0-1");
}

#[test]
fn v1_limits_reach_their_files() {
    let (files, cgroups) = v1();
    cgroups.ensure("/a").unwrap();
    cgroups.apply("/a", &limits()).unwrap();
    let read = |file: &str| files.read(&Path::new("/cg").join(file)).unwrap();
    assert_eq!(read("cpu,cpuacct/lab/node/a/cpu.shares"), "512");
    assert_eq!(read("cpu,cpuacct/lab/node/a/cpu.cfs_quota_us"), "50000");
    assert_eq!(read("memory/lab/node/a/memory.limit_in_bytes"), "67108864");
    assert_eq!(read("pids/lab/node/a/pids.max"), "100");
}

#[test]
fn a_refused_limit_names_value_and_file() {
    let (files, cgroups) = v1();
    cgroups.ensure("/a").unwrap();
    let file = Path::new("/cg/memory/lab/node/a/memory.limit_in_bytes");
    files.refuse(file, libc::EBUSY);
    let error = cgroups.apply("/a", &limits()).unwrap_err().to_string();
    assert!(error.contains("67108864"), "{error}");
    assert!(error.contains("memory.limit_in_bytes"), "{error}");
}

#[test]
fn a_v1_device_list_denies_all_before_it_allows() {
    let (files, cgroups) = v1();
    cgroups.ensure("/a").unwrap();
    cgroups.set_devices("/a", &default_devices()).unwrap();
    let writes = files.writes();
    let devices: Vec<&str> = writes
        .iter()
        .filter(|(f, _)| f.starts_with("/cg/devices"))
        .map(|(_, v)| v.as_str())
        .collect();
    assert_eq!(devices[..3], ["a", "c *:* m", "b *:* m"]);
}

#[test]
fn a_killed_v1_cgroup_is_thawed_again_and_can_be_removed() {
    let (files, cgroups) = v1();
    cgroups.ensure("/a/b").unwrap();
    for dir in cgroups.directories("/a/b").unwrap() {
        files.put(&dir.join("cgroup.procs"), "41\n42\n");
    }
    assert!(cgroups.remove("/a").is_err());
    assert_eq!(cgroups.processes("/a"), [41, 42]);
    cgroups.kill("/a").unwrap();
    let freezer = Path::new("/cg/freezer/lab/node/a/freezer.state");
    assert_eq!(files.read(freezer).unwrap(), "THAWED");
    cgroups.remove("/a").unwrap();
    cgroups.remove("/a").unwrap();
    assert!(!cgroups.exists("/a"));
}

#[test]
fn v2_controllers_are_handed_down_to_every_level() {
    let (files, cgroups) = v2();
    cgroups.ensure("/kubepods/pod1").unwrap();
    cgroups.apply("/kubepods/pod1", &limits()).unwrap();
    let read = |file: &str| {
        let dir = Path::new("/cg/lab/kubepods/pod1");
        files.read(&dir.join(file)).unwrap()
    };
    assert_eq!(read("cpu.max"), "50000 100000");
    assert_eq!(read("memory.max"), "67108864");
    assert_eq!(read("memory.swap.max"), "0");
    assert_eq!(read("cpu.weight"), weight_of_shares(512).to_string());
}

#[test]
fn v2_kill_uses_the_kernels_own_and_removal_goes_bottom_up() {
    let (files, cgroups) = v2();
    cgroups.ensure("/a/b").unwrap();
    let dir = Path::new("/cg/lab/a");
    files.put(&dir.join("b/cgroup.procs"), "41\n");
    files.put(&dir.join("cgroup.events"), "populated 1\n");
    cgroups.kill("/a").unwrap();
    assert!(
        files
            .writes()
            .contains(&(dir.join("cgroup.kill"), "1".into()))
    );
    cgroups.remove("/a").unwrap();
    assert!(!files.has_dir(dir));
}

#[test]
fn v2_files_outside_the_cgroup_cannot_be_named() {
    let (_, cgroups) = v2();
    cgroups.ensure("/a").unwrap();
    let mut limits = Limits::default();
    limits.unified.insert("../memory.max".into(), "1".into());
    assert!(cgroups.apply("/a", &limits).is_err());
}

#[test]
fn the_root_of_the_machine_is_never_removed() {
    let (_, cgroups) = v1();
    assert!(matches!(
        V1::new(FakeFiles::default(), hierarchies(), PathBuf::new()).remove("/"),
        Err(CgroupError::BadPath(_))
    ));
    assert!(cgroups.remove("/../x").is_err());
}

/// Our own place in the machine's hierarchies, removed with the value.
struct Real(Box<dyn Cgroups>);

impl Drop for Real {
    fn drop(&mut self) {
        let _ = self.0.kill("/");
        let _ = self.0.remove("/");
    }
}

#[test]
fn on_this_kernel_a_process_and_its_children_are_killed_and_nothing_is_left() {
    let root = format!("/ferrule-test-cgroup-{}", std::process::id());
    let real = Real(detect(&root).unwrap());
    real.0.ensure("/pod/container").unwrap();
    real.0.apply("/pod", &limits()).unwrap();
    real.0
        .set_devices("/pod/container", &default_devices())
        .unwrap();
    let mut child = std::process::Command::new("sh")
        .args(["-c", "read go; sleep 1000 & sleep 1000"])
        .stdin(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    for dir in real.0.directories("/pod/container").unwrap() {
        let procs = dir.join("cgroup.procs");
        std::fs::write(procs, child.id().to_string()).unwrap();
    }
    drop(child.stdin.take());
    let pid = i32::try_from(child.id()).unwrap();
    assert!(real.0.processes("/pod").contains(&pid));
    let stats = real.0.stats("/pod").unwrap();
    assert_eq!(stats.memory_limit, Some(64 << 20));
    assert!(stats.pids >= 1);
    real.0.kill("/pod").unwrap();
    child.wait().unwrap();
    assert!(real.0.processes("/pod").is_empty());
    real.0.remove("/").unwrap();
    assert!(!real.0.exists("/"));
}

#[test]
fn limits_in_force_are_read_back_on_both_kernels() {
    let check = |cgroups: &dyn Cgroups, shares: Option<u64>| {
        assert_eq!(cgroups.limits("/gone"), None);
        cgroups.ensure("/a").unwrap();
        cgroups.apply("/a", &limits()).unwrap();
        let got = cgroups.limits("/a").unwrap();
        assert_eq!(got.cpu_shares, shares);
        assert_eq!(got.cpu_quota_us, Some(50_000));
        assert_eq!(got.cpu_period_us, Some(100_000));
        assert_eq!(got.memory_bytes, Some(64 << 20));
        let open = Limits {
            cpu_quota_us: Some(-1),
            memory_bytes: Some(-1),
            ..Limits::default()
        };
        cgroups.apply("/a", &open).unwrap();
        let got = cgroups.limits("/a").unwrap();
        assert_eq!((got.cpu_quota_us, got.memory_bytes), (Some(-1), Some(-1)));
    };
    check(&v1().1, Some(512));
    check(&v2().1, None);
}
