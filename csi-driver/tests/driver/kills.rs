//! A kill at every step of every operation; then the operation again, or never again; then a look
//! at records, files, devices and mounts. The driver of debug builds dies at the step that
//! `FERRULE_DIE_AT` names.

use crate::lab::{From, Lab, MIB, On, Running};
use std::path::PathBuf;
use tonic::Status;

/// How many steps there can be at most: a loop without end is a failure.
const MOST_STEPS: u32 = 300;

/// What is there before the operation that is killed.
#[derive(Default)]
struct Stand {
    volume: String,
    copy: String,
    snapshot: String,
    group: String,
}

struct Paths {
    staging: PathBuf,
    target: PathBuf,
}

impl Paths {
    fn of(lab: &Lab) -> Self {
        Self {
            staging: lab.path("staging"),
            target: lab.path("target"),
        }
    }
}

type Work = fn(&Running, &Paths, &mut Stand) -> Result<(), Status>;

/// Everything that may be there goes away.
fn clean(driver: &Running, paths: &Paths, stand: &Stand) {
    for id in [&stand.volume, &stand.copy] {
        if id.is_empty() {
            continue;
        }
        driver.unpublish(id, &paths.target).unwrap();
        driver.unstage(id, &paths.staging).unwrap();
        driver.delete(id).unwrap();
    }
    if !stand.group.is_empty() {
        driver.delete_group(&stand.group).unwrap();
    }
    if !stand.snapshot.is_empty() {
        driver.delete_snapshot(&stand.snapshot).unwrap();
    }
}

/// Kills the driver at each step of `work`, one after the other.
fn at_every_step(on: On, at_least: u32, before: Work, work: Work) {
    let lab = Lab::new(on);
    let paths = Paths::of(&lab);
    for step in 1..MOST_STEPS {
        let mut stand = Stand::default();
        let driver = lab.start();
        before(&driver, &paths, &mut stand).unwrap();
        drop(driver);
        let mut dying = lab.start_with(Some(step));
        let outcome = work(&dying, &paths, &mut stand);
        let through = !dying.died(outcome.as_ref().err());
        assert!(
            !through || outcome.is_ok(),
            "step {step}: {outcome:?}\n{}",
            lab.log()
        );
        drop(dying);
        let driver = lab.start();
        lab.assert_sound(&format!("after a kill at step {step}"));
        if !stand.volume.is_empty() {
            assert_writable(&lab, &paths);
        }
        work(&driver, &paths, &mut stand)
            .unwrap_or_else(|e| panic!("again after step {step}: {e}\n{}", lab.log()));
        lab.assert_sound(&format!("after a kill at step {step} and the same again"));
        clean(&driver, &paths, &stand);
        lab.assert_empty(&format!(
            "after a kill at step {step}, the same again, and its end"
        ));
        if through {
            assert!(step > at_least, "only {step} steps were seen");
            return;
        }
    }
    panic!("it never came to its end");
}

/// What is mounted takes writes: nothing was left frozen.
fn assert_writable(lab: &Lab, paths: &Paths) {
    if lab.mounts().contains(&paths.staging) {
        let file = paths.staging.join("written");
        crate::lab::run(
            std::process::Command::new("timeout")
                .arg("20")
                .arg("touch")
                .arg(file),
        );
    }
}

fn nothing(_: &Running, _: &Paths, _: &mut Stand) -> Result<(), Status> {
    Ok(())
}

fn make(driver: &Running, _: &Paths, stand: &mut Stand) -> Result<(), Status> {
    stand.volume = driver.create("one", "xfs", 300 * MIB)?;
    Ok(())
}

fn make_block(driver: &Running, _: &Paths, stand: &mut Stand) -> Result<(), Status> {
    stand.volume = driver.create("one", "block", 8 * MIB)?;
    Ok(())
}

fn stage(driver: &Running, paths: &Paths, stand: &mut Stand) -> Result<(), Status> {
    driver.stage(&stand.volume, "xfs", &paths.staging)
}

fn make_and_stage(driver: &Running, paths: &Paths, stand: &mut Stand) -> Result<(), Status> {
    make(driver, paths, stand)?;
    stage(driver, paths, stand)
}

fn publish(driver: &Running, paths: &Paths, stand: &mut Stand) -> Result<(), Status> {
    driver.publish(&stand.volume, "xfs", &paths.staging, &paths.target)
}

fn make_and_publish(driver: &Running, paths: &Paths, stand: &mut Stand) -> Result<(), Status> {
    make_and_stage(driver, paths, stand)?;
    publish(driver, paths, stand)
}

fn leave(driver: &Running, paths: &Paths, stand: &mut Stand) -> Result<(), Status> {
    driver.unpublish(&stand.volume, &paths.target)?;
    driver.unstage(&stand.volume, &paths.staging)
}

#[test]
fn making_an_ext4_volume_is_finished_by_repeating_it() {
    at_every_step(On::Ext4, 8, nothing, |driver, _, stand| {
        stand.volume = driver.create("one", "ext4", 16 * MIB)?;
        Ok(())
    });
}

#[test]
fn making_a_directory_volume_is_finished_by_repeating_it() {
    at_every_step(On::Ext4, 6, nothing, |driver, _, stand| {
        stand.volume = driver.create("one", "dir", 16 * MIB)?;
        Ok(())
    });
}

#[test]
fn staging_is_finished_by_repeating_it() {
    at_every_step(On::Xfs, 2, make, stage);
}

#[test]
fn publishing_is_finished_by_repeating_it() {
    at_every_step(On::Xfs, 1, make_and_stage, publish);
}

#[test]
fn a_device_is_staged_published_and_taken_away_by_repeating_it() {
    fn work(driver: &Running, paths: &Paths, stand: &mut Stand) -> Result<(), Status> {
        driver.stage(&stand.volume, "block", &paths.staging)?;
        driver.publish(&stand.volume, "block", &paths.staging, &paths.target)?;
        leave(driver, paths, stand)
    }
    at_every_step(On::Xfs, 5, make_block, work);
}

#[test]
fn taking_a_volume_away_is_finished_by_repeating_it() {
    at_every_step(On::Xfs, 3, make_and_publish, leave);
}

#[test]
fn a_snapshot_of_a_mounted_volume_is_finished_by_repeating_it() {
    at_every_step(On::Xfs, 8, make_and_publish, |driver, _, stand| {
        stand.snapshot = driver.snapshot("snap", &stand.volume)?;
        Ok(())
    });
}

#[test]
fn a_group_of_snapshots_is_finished_by_repeating_it() {
    at_every_step(On::Xfs, 8, make_and_publish, |driver, _, stand| {
        stand.group = driver.group("group", &[&stand.volume])?.group_snapshot_id;
        Ok(())
    });
}

#[test]
fn a_clone_is_finished_by_repeating_it() {
    at_every_step(On::Xfs, 10, make, |driver, _, stand| {
        let source = From::Volume(&stand.volume);
        stand.copy = driver.copy("copy", "xfs", 300 * MIB, &source)?;
        Ok(())
    });
}

#[test]
fn growing_is_finished_by_repeating_it() {
    at_every_step(On::Xfs, 3, make_and_publish, |driver, paths, stand| {
        driver.expand(&stand.volume, &paths.target, 400 * MIB)
    });
}

#[test]
fn removing_is_finished_by_repeating_it() {
    at_every_step(On::Xfs, 4, make, |driver, _, stand| {
        driver.delete(&stand.volume)
    });
}

#[test]
fn what_nobody_was_told_of_is_gone_after_a_restart() {
    let lab = Lab::new(On::Xfs);
    for step in 1..MOST_STEPS {
        let mut dying = lab.start_with(Some(step));
        let made = dying.create("one", "xfs", 300 * MIB);
        let through = !dying.died(made.as_ref().err());
        drop(dying);
        let driver = lab.start();
        lab.assert_sound(&format!("after a kill at step {step}"));
        match made {
            Ok(id) => driver.delete(&id).unwrap(),
            // It may have been whole, and only the answer lost: the next request would find it.
            Err(_) => {
                let id = driver.create("one", "xfs", 300 * MIB).unwrap();
                driver.delete(&id).unwrap();
            }
        }
        lab.assert_empty(&format!("after a kill at step {step}"));
        if through {
            return;
        }
    }
    panic!("it never came to its end");
}
