//! How long things take. Not a judgement: the machine decides.

use crate::lab::{From, GIB, Lab, MIB, On, wanted};
use std::io::Write;
use std::time::{Duration, Instant};

const TIMES: usize = 20;

/// Runs something several times and prints the middle and the worst.
fn measure(what: &str, mut work: impl FnMut(usize)) {
    let mut took: Vec<Duration> = (0..TIMES)
        .map(|number| {
            let start = Instant::now();
            work(number);
            start.elapsed()
        })
        .collect();
    took.sort();
    let ms = |d: Duration| d.as_secs_f64() * 1000.0;
    println!(
        "{what:44} p50 {:7.1} ms, max {:7.1} ms",
        ms(took[TIMES / 2]),
        ms(took[TIMES - 1])
    );
}

#[test]
#[ignore = "a measurement"]
fn what_volumes_cost() {
    let lab = Lab::sized(On::Xfs, 1024 * GIB);
    let driver = lab.start();
    let mut ids = Vec::new();
    measure("CreateVolume, thick 10 GiB, block", |n| {
        driver.create(&format!("b{n}"), "block", 10 * GIB).unwrap();
    });
    measure("CreateVolume, thick 10 GiB, ext4", |n| {
        driver.create(&format!("e{n}"), "ext4", 10 * GIB).unwrap();
    });
    measure("CreateVolume, thick 10 GiB, xfs", |n| {
        ids.push(driver.create(&format!("x{n}"), "xfs", 10 * GIB).unwrap());
    });
    let paths = |n: usize| (lab.path(&format!("s{n}")), lab.path(&format!("t{n}")));
    measure("NodeStage + NodePublish, xfs", |n| {
        let (staging, target) = paths(n);
        driver.stage(&ids[n], "xfs", &staging).unwrap();
        driver.publish(&ids[n], "xfs", &staging, &target).unwrap();
    });
    let mut file = std::fs::File::create(paths(0).1.join("data")).unwrap();
    for _ in 0..256 {
        file.write_all(&vec![7; 1 << 20]).unwrap();
    }
    file.sync_all().unwrap();
    drop(file);
    let mut snapshots = Vec::new();
    measure("CreateSnapshot, mounted xfs, 256 MiB in it", |n| {
        snapshots.push(driver.snapshot(&format!("snap{n}"), &ids[0]).unwrap());
    });
    measure("CreateVolume from a snapshot, 10 GiB, xfs", |n| {
        let source = From::Snapshot(&snapshots[n]);
        driver
            .copy(&format!("r{n}"), "xfs", 10 * GIB, &source)
            .unwrap();
    });
    measure("NodeUnpublish + NodeUnstage, xfs", |n| {
        let (staging, target) = paths(n);
        driver.unpublish(&ids[n], &target).unwrap();
        driver.unstage(&ids[n], &staging).unwrap();
    });
    measure("DeleteVolume, 10 GiB, xfs", |n| {
        driver.delete(&ids[n]).unwrap()
    });
    let start = Instant::now();
    let made = driver.block_on(async {
        let mut tasks = tokio::task::JoinSet::new();
        for number in 0..200 {
            let mut client = driver.controller();
            let request = wanted(&format!("p{number}"), "xfs", 300 * MIB);
            tasks.spawn(async move { client.create_volume(request).await });
        }
        tasks.join_all().await
    });
    let failed = made.iter().filter(|made| made.is_err()).count();
    println!(
        "200 volumes at once: {:.1} s, {failed} failed",
        start.elapsed().as_secs_f64()
    );
    assert_eq!(failed, 0);
}
