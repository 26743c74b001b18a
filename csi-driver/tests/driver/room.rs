//! Capacity that is true: what was promised is there, and is not promised again.

use crate::lab::{GIB, Lab, MIB, On, capability, wanted};
use std::io::Write;
use tonic::Code;

#[test]
fn many_at_once_never_get_more_than_there_is() {
    let lab = Lab::sized(On::Xfs, 4 * GIB);
    let driver = lab.start();
    let room = driver.capacity();
    let each = 256 * MIB;
    let fit = room / each;
    let made = driver.block_on(async {
        let mut tasks = tokio::task::JoinSet::new();
        for number in 0..2 * fit {
            let mut client = driver.controller();
            let request = wanted(&format!("v{number}"), "block", each);
            tasks.spawn(async move { client.create_volume(request).await });
        }
        tasks.join_all().await
    });
    let refused: Vec<_> = made.iter().filter_map(|made| made.as_ref().err()).collect();
    assert!(
        refused
            .iter()
            .all(|status| status.code() == Code::ResourceExhausted),
        "{refused:?}"
    );
    assert_eq!(made.len() as u64 - refused.len() as u64, fit);
    assert!(driver.capacity() < each);
    lab.assert_sound("full");
}

#[test]
fn a_full_pool_hurts_no_thick_volume_that_shares_blocks() {
    let lab = Lab::sized(On::Xfs, 4 * GIB);
    let driver = lab.start();
    let id = driver.create("one", "xfs", GIB).unwrap();
    let staging = lab.path("staging");
    driver.stage(&id, "xfs", &staging).unwrap();
    write(&staging.join("data"), 600 * MIB);
    let before = driver.capacity();
    driver.snapshot("snap", &id).unwrap();
    let after = driver.capacity();
    // The volume may be written again from end to end, and needs new blocks for that.
    assert!(before - after >= 600 * MIB, "{before} -> {after}");
    let rest = after / MIB * MIB;
    driver.create("rest", "block", rest).unwrap();
    write(&staging.join("data"), 600 * MIB);
    driver.unstage(&id, &staging).unwrap();
}

fn write(path: &std::path::Path, bytes: u64) {
    let mut file = std::fs::File::options()
        .create(true)
        .write(true)
        .truncate(false)
        .open(path)
        .unwrap();
    let piece = vec![7; 1 << 20];
    for _ in 0..bytes >> 20 {
        file.write_all(&piece).unwrap();
    }
    file.sync_all().unwrap();
}

#[test]
fn thin_volumes_together_stay_below_their_cap() {
    let lab = Lab::sized(On::Xfs, 4 * GIB);
    let driver = lab.start();
    let thin = |name: &str, bytes| {
        let mut request = wanted(name, "block", bytes);
        request.parameters.insert("provision".into(), "thin".into());
        driver.create_volume(request)
    };
    thin("a", 7 * GIB).unwrap();
    let refused = thin("b", 2 * GIB).unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    thin("c", 512 * MIB).unwrap();
}

#[test]
fn what_is_asked_for_wrongly_is_refused_by_name() {
    let lab = Lab::sized(On::Xfs, 4 * GIB);
    let driver = lab.start();
    let mut request = wanted("one", "xfs", 300 * MIB);
    request.parameters.insert("provison".into(), "thin".into());
    let refused = driver.create_volume(request).unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(refused.message().contains("provison"), "{refused}");
    let refused = driver.create("one", "xfs", 100 * GIB).unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    let id = driver.create("one", "xfs", 300 * MIB).unwrap();
    let refused = driver.create("one", "xfs", 400 * MIB).unwrap_err();
    assert_eq!(refused.code(), Code::AlreadyExists);
    let refused = driver
        .stage(&id, "block", &lab.path("staging"))
        .unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    let mut request = wanted("two", "xfs", 300 * MIB);
    request.volume_capabilities.push(capability("block"));
    assert_eq!(
        driver.create_volume(request).unwrap_err().code(),
        Code::InvalidArgument
    );
}
