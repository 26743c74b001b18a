//! Bandwidth and tuning. Needs root.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::lab::{Lab, Pod, error};

/// Bytes per second from the pod to the node, or the other way.
fn throughput(lab: &Lab, pod: &Pod, from_pod: bool) -> f64 {
    const BYTES: usize = 400_000;
    let listener = lab.on_node(|| TcpListener::bind("10.88.0.1:0").unwrap());
    let to = listener.local_addr().unwrap();
    let mut client = pod.run(|| TcpStream::connect(to).unwrap());
    let (mut server, _) = listener.accept().unwrap();
    let begin = Instant::now();
    let (sender, receiver) = if from_pod {
        (&mut client, &mut server)
    } else {
        (&mut server, &mut client)
    };
    let limit = Some(Duration::from_secs(20));
    receiver.set_read_timeout(limit).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| sender.write_all(&vec![7; BYTES]).unwrap());
        receiver.read_exact(&mut vec![0; BYTES]).unwrap();
    });
    BYTES as f64 / begin.elapsed().as_secs_f64()
}

#[test]
fn each_direction_has_its_own_limit_and_nothing_of_it_stays() {
    // 8 Mbit/s are 1 MB/s.
    let limit = json!({"ingressRate": 8_000_000, "ingressBurst": 800_000});
    let lab = Lab::new().with("runtimeConfig", json!({"bandwidth": limit}));
    let pod = Pod::new("one");
    let result = lab.add(&pod).unwrap();
    lab.check(&pod, &result).unwrap();
    assert_eq!(result.interfaces.len(), 3);
    let (slow, fast) = (throughput(&lab, &pod, false), throughput(&lab, &pod, true));
    assert!(slow < 2_500_000.0, "to the pod: {slow} B/s");
    assert!(fast > 5_000_000.0, "from the pod: {fast} B/s");
    lab.del(&pod).unwrap();

    let lab = lab
        .with("runtimeConfig", json!({}))
        .with("egressRate", json!(8_000_000))
        .with("egressBurst", json!(800_000));
    let pod = Pod::new("two");
    let result = lab.add(&pod).unwrap();
    lab.check(&pod, &result).unwrap();
    assert_eq!(result.interfaces.len(), 4, "{:?}", result.interfaces);
    let (fast, slow) = (throughput(&lab, &pod, false), throughput(&lab, &pod, true));
    assert!(slow < 2_500_000.0, "from the pod: {slow} B/s");
    assert!(fast > 5_000_000.0, "to the pod: {fast} B/s");
    // Gone with or without the namespace, and with another configuration.
    let mut plain = lab.conf.clone();
    plain["egressRate"].take();
    plain["egressBurst"].take();
    drop(pod);
    lab.call("DEL", "two", "", &plain).unwrap();
    lab.assert_nothing_left("after limits");
}

#[test]
fn check_misses_a_limit_and_gc_takes_those_of_the_dead() {
    let lab = Lab::new()
        .with("egressRate", json!(8_000_000))
        .with("egressBurst", json!(800_000));
    let (kept, dead) = (Pod::new("kept"), Pod::new("dead"));
    let result = lab.add(&kept).unwrap();
    lab.add(&dead).unwrap();
    drop(dead);
    lab.gc(&[&kept]).unwrap();
    lab.check(&kept, &result).unwrap();
    let limiters = lab.rtnl().ifbs().unwrap();
    assert_eq!(limiters.len(), 1);
    let name = limiters[0].name.clone();
    lab.rtnl()
        .apply(&[linux::netlink::Change::RemoveLink { name }])
        .unwrap();
    let (code, text) = error(lab.check(&kept, &result));
    assert!(
        code == 101 && text.contains("bandwidth limit"),
        "{code} {text}"
    );
    lab.gc(&[]).unwrap();
    lab.assert_nothing_left("after gc");
}

#[test]
fn parameters_and_the_interface_are_tuned_and_checked() {
    let lab = Lab::new()
        .with(
            "sysctl",
            json!({"net.ipv4.ip_local_port_range": "20000 30000", "net.ipv4.conf.IFNAME.log_martians": "1"}),
        )
        .with("promisc", json!(true))
        .with("allmulti", json!(true))
        .with("txQLen", json!(77))
        .with("mtu", json!(1400))
        .with("mac", json!("02:11:22:33:44:55"));
    let pod = Pod::new("one");
    let result = lab.add(&pod).unwrap();
    lab.check(&pod, &result).unwrap();
    let link = pod.rtnl().link_by_name("eth0").unwrap().unwrap();
    assert!(link.promiscuous && link.all_multicast);
    assert_eq!((link.transmit_queue, link.mtu_bytes), (77, 1400));
    assert_eq!(result.interfaces[2].mac, "02:11:22:33:44:55");
    let martians = "/proc/sys/net/ipv4/conf/eth0/log_martians";
    let read = || std::fs::read_to_string(martians).unwrap();
    assert_eq!(pod.run(read), "1\n");
    pod.run(|| std::fs::write(martians, "0").unwrap());
    let (code, text) = error(lab.check(&pod, &result));
    assert!(
        code == 101 && text.contains("log_martians"),
        "{code} {text}"
    );
    lab.del(&pod).unwrap();
    lab.assert_nothing_left("after tuning");
}

#[test]
fn a_parameter_the_kernel_lacks_fails_the_add_and_leaves_nothing() {
    let lab = Lab::new().with("sysctl", json!({"net.no.such.thing": "1"}));
    let (code, text) = error(lab.add(&Pod::new("one")));
    assert!(
        code == 100 && text.contains("net/no/such/thing"),
        "{code} {text}"
    );
    lab.assert_nothing_left("after a failed parameter");
}
