use super::*;

fn strings(list: &[&str]) -> Vec<String> {
    list.iter().map(|s| (*s).to_owned()).collect()
}

fn image() -> ImageConfig {
    ImageConfig {
        entrypoint: strings(&["/entry"]),
        cmd: strings(&["default"]),
        env: strings(&["A=image", "PATH=/image"]),
        working_dir: "/srv".to_owned(),
        ..ImageConfig::default()
    }
}

fn spec_of(config: &ContainerConfig, image: &ImageConfig) -> Result<LaunchSpec, SpecError> {
    let sandbox = SandboxConfig {
        hostname: "web-0".to_owned(),
        pid: NamespaceMode::Container,
        ..SandboxConfig::default()
    };
    let user = ResolvedUser {
        home: "/root".to_owned(),
        ..ResolvedUser::default()
    };
    launch_spec(Inputs {
        id: "c1",
        config,
        image,
        sandbox: &sandbox,
        user: &user,
        capabilities: capabilities(config, u64::MAX)?,
        seccomp: None,
        layers: vec![PathBuf::from("/l0")],
        state_dir: PathBuf::from("/s/c1"),
        shared_memory: PathBuf::from("/run/shm/s1"),
        files: vec![("/etc/resolv.conf", PathBuf::from("/s/resolv.conf"))],
        extra_mounts: Vec::new(),
        devices: Vec::new(),
        cgroups: Vec::new(),
        log_path: None,
        open_files_most: 20_000,
    })
}

fn config() -> ContainerConfig {
    ContainerConfig::default()
}

#[test]
fn command_and_arguments_replace_the_images_as_kubernetes_says() {
    let argv = |command: &[&str], args: &[&str]| {
        let config = ContainerConfig {
            command: strings(command),
            args: strings(args),
            ..config()
        };
        spec_of(&config, &image()).unwrap().process.argv
    };
    assert_eq!(argv(&[], &[]), ["/entry", "default"]);
    assert_eq!(argv(&[], &["x"]), ["/entry", "x"]);
    assert_eq!(argv(&["/c"], &[]), ["/c"]);
    assert_eq!(argv(&["/c"], &["x"]), ["/c", "x"]);
    let nothing = spec_of(&config(), &ImageConfig::default());
    assert!(matches!(nothing, Err(SpecError::NoCommand { .. })));
}

#[test]
fn the_pods_environment_wins_over_the_images_and_home_is_filled_in() {
    let config = ContainerConfig {
        env: vec![("A".to_owned(), "pod".to_owned())],
        ..config()
    };
    let env = spec_of(&config, &image()).unwrap().process.env;
    let expected = ["PATH=/image", "A=pod", "HOSTNAME=web-0", "HOME=/root"];
    assert_eq!(env, expected);
}

#[test]
fn capabilities_start_from_the_default_and_follow_add_and_drop() {
    let set = |add: &[&str], drop: &[&str], privileged: bool| {
        let mut config = config();
        config.security.add_capabilities = strings(add);
        config.security.drop_capabilities = strings(drop);
        config.security.privileged = privileged;
        capabilities(&config, (1 << 41) - 1)
    };
    assert_eq!(set(&[], &[], false).unwrap().len(), 14);
    assert_eq!(set(&["NET_ADMIN"], &["ALL"], false).unwrap(), [12]);
    assert_eq!(set(&["CAP_SYS_TIME"], &[], false).unwrap().len(), 15);
    assert_eq!(set(&["ALL"], &["KILL"], false).unwrap().len(), 40);
    assert_eq!(set(&[], &["ALL"], true).unwrap().len(), 41);
    assert!(set(&["FLY"], &[], false).is_err());
}

#[test]
fn a_container_never_gets_what_the_node_lacks() {
    let mut config = config();
    config.security.privileged = true;
    assert_eq!(capabilities(&config, 0b101).unwrap(), [0, 2]);
}

#[test]
fn a_mount_of_the_pod_replaces_ours_and_outer_mounts_come_first() {
    let mount = |path: &str| Mount {
        container_path: path.to_owned(),
        host_path: PathBuf::from("/h"),
        sub_path: None,
        readonly: false,
        recursive_readonly: false,
        propagation: Propagation::Private,
        image: None,
    };
    let config = ContainerConfig {
        mounts: vec![mount("/a/b"), mount("/dev/shm"), mount("/a")],
        ..config()
    };
    let mounts = spec_of(&config, &image()).unwrap().mounts;
    let targets: Vec<&str> = mounts.iter().map(|m| m.target.as_str()).collect();
    assert_eq!(targets.iter().filter(|t| **t == "/dev/shm").count(), 1);
    let place = |t: &str| targets.iter().position(|x| *x == t).unwrap();
    assert!(place("/a") < place("/a/b"));
    assert!(place("/dev") < place("/dev/shm"));
}

#[test]
fn privileged_means_writable_sys_and_nothing_masked() {
    let mut config = config();
    config.security.masked_paths = strings(&["/proc/kcore"]);
    let sys = |spec: &LaunchSpec| {
        let sys = spec.mounts.iter().find(|m| m.target == "/sys");
        sys.unwrap().readonly
    };
    let plain = spec_of(&config, &image()).unwrap();
    assert!(sys(&plain) && !plain.masked_paths.is_empty());
    config.security.privileged = true;
    let privileged = spec_of(&config, &image()).unwrap();
    assert!(!sys(&privileged) && privileged.masked_paths.is_empty());
    assert_eq!(device_rules(&config, &[]), [DeviceRule::EVERYTHING]);
}

#[test]
fn a_relative_working_directory_and_a_bad_variable_are_named() {
    let relative = ContainerConfig {
        working_dir: "srv".to_owned(),
        ..config()
    };
    let error = spec_of(&relative, &image()).unwrap_err().to_string();
    assert!(error.contains("working_dir"), "{error}");
    let variable = ContainerConfig {
        env: vec![("A=B".to_owned(), String::new())],
        ..config()
    };
    assert!(spec_of(&variable, &image()).is_err());
}

#[test]
fn the_stop_signal_is_the_pods_then_the_images_then_term() {
    let mut image = image();
    assert_eq!(stop_signal(&config(), &image).unwrap(), 15);
    image.stop_signal = Some("SIGQUIT".to_owned());
    assert_eq!(stop_signal(&config(), &image).unwrap(), 3);
    let own = ContainerConfig {
        stop_signal: Some("SIGUSR1".to_owned()),
        ..config()
    };
    assert_eq!(stop_signal(&own, &image).unwrap(), 10);
}

proptest::proptest! {
    #[test]
    fn whatever_the_environment_every_name_appears_once(
        image_env in proptest::collection::vec("[A-C]=[a-z]{0,3}", 0..6),
        pod_env in proptest::collection::vec(("[A-C]", "[a-z]{0,3}"), 0..6),
    ) {
        let mut image = image();
        image.env = image_env;
        let config = ContainerConfig { env: pod_env.clone(), ..config() };
        let env = spec_of(&config, &image).unwrap().process.env;
        let mut names: Vec<&str> = env.iter().map(|e| e.split('=').next().unwrap()).collect();
        names.sort_unstable();
        let count = names.len();
        names.dedup();
        proptest::prop_assert_eq!(names.len(), count);
        if let Some((name, value)) = pod_env.last() {
            let line = format!("{name}={value}");
            proptest::prop_assert!(env.contains(&line));
        }
    }
}
