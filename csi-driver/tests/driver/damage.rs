//! Images that are not what their record says: refused, and not one byte of them changed.

use crate::lab::{Lab, MIB, On};
use std::os::unix::fs::FileExt;
use tonic::Code;

/// A cheap fingerprint of the first and last MiB.
fn ends(path: &std::path::Path) -> (Vec<u8>, Vec<u8>) {
    let file = std::fs::File::open(path).unwrap();
    let length = file.metadata().unwrap().len();
    let mut head = vec![0; 1 << 20];
    let mut tail = vec![0; 1 << 20];
    file.read_exact_at(&mut head, 0).unwrap();
    file.read_exact_at(&mut tail, length - (1 << 20)).unwrap();
    (head, tail)
}

#[test]
fn a_zeroed_image_is_refused_and_not_formatted() {
    for fstype in ["xfs", "ext4"] {
        let lab = Lab::new(On::Xfs);
        let driver = lab.start();
        let id = driver.create("one", fstype, 300 * MIB).unwrap();
        let image = lab.image(&id);
        let file = std::fs::File::options().write(true).open(&image).unwrap();
        file.write_all_at(&[0; 8192], 0).unwrap();
        let before = ends(&image);
        for _ in 0..2 {
            let refused = driver.stage(&id, fstype, &lab.path("staging")).unwrap_err();
            assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
        }
        assert_eq!(ends(&image), before);
        assert!(lab.mounts().is_empty() && lab.devices().is_empty());
    }
}

#[test]
fn swapped_images_are_refused() {
    let lab = Lab::new(On::Xfs);
    let driver = lab.start();
    let one = driver.create("one", "xfs", 300 * MIB).unwrap();
    let two = driver.create("two", "xfs", 300 * MIB).unwrap();
    let aside = lab.path("mnt/aside");
    std::fs::rename(lab.image(&one), &aside).unwrap();
    std::fs::rename(lab.image(&two), lab.image(&one)).unwrap();
    std::fs::rename(&aside, lab.image(&two)).unwrap();
    for id in [&one, &two] {
        let refused = driver.stage(id, "xfs", &lab.path("staging")).unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
        assert!(refused.message().contains("damaged"));
    }
    assert!(lab.mounts().is_empty() && lab.devices().is_empty());
}

#[test]
fn a_lost_image_is_loss_and_no_reason_for_a_new_one() {
    let lab = Lab::new(On::Xfs);
    let driver = lab.start();
    let id = driver.create("one", "xfs", 300 * MIB).unwrap();
    std::fs::remove_file(lab.image(&id)).unwrap();
    let refused = driver.stage(&id, "xfs", &lab.path("staging")).unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    assert!(!lab.image(&id).exists());
    driver.delete(&id).unwrap();
    lab.assert_empty("after a lost image");
}

#[test]
fn a_record_that_cannot_be_read_is_left_alone_with_its_data() {
    let lab = Lab::new(On::Xfs);
    let driver = lab.start();
    let id = driver.create("one", "xfs", 300 * MIB).unwrap();
    drop(driver);
    let record = lab.pool().join(format!("records/volumes/{id}.json"));
    std::fs::write(&record, "").unwrap();
    let driver = lab.start();
    let refused = driver.stage(&id, "xfs", &lab.path("staging")).unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    let refused = driver.delete(&id).unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    let refused = driver.create("one", "xfs", 300 * MIB).unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    assert!(lab.image(&id).exists() && record.exists());
}
