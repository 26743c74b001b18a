//! Kills, storms and the runtime's side together. Needs root.

use std::collections::{BTreeMap, HashSet};
use std::time::{Duration, Instant};

use crate::lab::{Lab, Pod};
use cni::invoke::{Attachment, Networks};

#[test]
fn killed_at_any_moment_an_add_is_finished_by_repeating_and_undone_by_del() {
    let lab = Lab::new().ranges(&["10.88.0.0/26"]);
    let warm = Pod::new("warm");
    let begin = Instant::now();
    lab.add(&warm).unwrap();
    let whole = begin.elapsed();
    const ROUNDS: u32 = 60;
    for round in 0..ROUNDS {
        let pod = Pod::new(&format!("pod-{round}"));
        let mut child = lab.start("ADD", &pod.id, &pod.path(), &lab.conf);
        wait(whole * round / ROUNDS);
        let _ = child.kill();
        child.wait().unwrap();
        if round % 2 == 0 {
            let result = lab.add(&pod).unwrap();
            lab.check(&pod, &result).unwrap();
        }
        // DEL is killed too, then repeated.
        let mut child = lab.start("DEL", &pod.id, "", &lab.conf);
        wait(whole * (ROUNDS - round) / ROUNDS);
        let _ = child.kill();
        child.wait().unwrap();
        lab.call("DEL", &pod.id, "", &lab.conf).unwrap();
    }
    lab.del(&warm).unwrap();
    lab.assert_nothing_left("after all kills");
}

/// Lets a child run for an exact while: the moment of the kill is the point of the test.
fn wait(while_running: Duration) {
    let begin = Instant::now();
    while begin.elapsed() < while_running {
        std::hint::spin_loop();
    }
}

#[test]
fn what_kills_left_behind_gc_takes_away() {
    let lab = Lab::new();
    let kept = Pod::new("kept");
    let result = lab.add(&kept).unwrap();
    for round in 0..20 {
        let pod = Pod::new(&format!("pod-{round}"));
        let mut child = lab.start("ADD", &pod.id, &pod.path(), &lab.conf);
        wait(Duration::from_micros(300) * round);
        let _ = child.kill();
        child.wait().unwrap();
    }
    lab.gc(&[&kept]).unwrap();
    assert_eq!((lab.claims().len(), lab.leases().len()), (1, 1));
    lab.check(&kept, &result).unwrap();
    lab.gc(&[]).unwrap();
    // Veths killed before they were marked die with their namespaces; the marked are gone now.
    assert_eq!((lab.claims().len(), lab.leases().len()), (0, 0));
}

#[test]
fn sixteen_at_once_get_an_address_each() {
    let lab = Lab::new();
    let pods: Vec<Pod> = (0..48).map(|n| Pod::new(&format!("pod-{n}"))).collect();
    let addresses: Vec<String> = std::thread::scope(|scope| {
        let workers: Vec<_> = pods
            .chunks(3)
            .map(|share| {
                let lab = &lab;
                scope.spawn(move || {
                    let add = |pod| lab.add(pod).unwrap().ips[0].address.to_string();
                    share.iter().map(add).collect::<Vec<_>>()
                })
            })
            .collect();
        workers
            .into_iter()
            .flat_map(|worker| worker.join().unwrap())
            .collect()
    });
    let different: HashSet<_> = addresses.iter().collect();
    assert_eq!(different.len(), 48);
    assert_eq!(lab.nft().chains().unwrap().len(), 1);
    std::thread::scope(|scope| {
        for share in pods.chunks(3) {
            let lab = &lab;
            scope.spawn(move || share.iter().for_each(|pod| drop(lab.del(pod).unwrap())));
        }
    });
    lab.assert_nothing_left("after the storm");
}

#[test]
fn the_runtimes_side_drives_the_plugin_through_a_life() {
    let lab = Lab::new();
    let (conf, bin) = (lab.dir.join("conf"), lab.dir.join("bin"));
    std::fs::create_dir_all(&conf).unwrap();
    std::fs::create_dir_all(&bin).unwrap();
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_cni-bridge"), bin.join("cni-bridge")).unwrap();
    let mut list = lab.conf.clone();
    list["capabilities"] = serde_json::json!({"portMappings": true});
    std::fs::write(conf.join("10-net.conflist"), list.to_string()).unwrap();
    let networks = Networks::load(&conf, &[bin], &lab.dir.join("records")).unwrap();
    let pod = Pod::new("sandbox-1");
    let attachment = Attachment {
        container_id: pod.id.clone(),
        netns: pod.path().into(),
        ifname: "eth0".into(),
        pod_name: "web".into(),
        pod_namespace: "default".into(),
        pod_uid: "uid".into(),
        capability_args: BTreeMap::from([(
            "portMappings".into(),
            serde_json::json!([{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]),
        )]),
    };
    lab.on_node(|| {
        networks.status().unwrap();
        let attached = networks.add(&attachment).unwrap();
        assert_eq!(attached.ips[0].to_string(), "10.88.0.2/24");
        networks.check(&attachment).unwrap();
        networks.gc(|| vec![attachment.key()]).unwrap();
        networks.check(&attachment).unwrap();
        networks.del(&attachment).unwrap();
        networks.del(&attachment).unwrap();
        assert!(networks.recorded().unwrap().is_empty());
    });
    lab.assert_nothing_left("after its life");
}
