//! A kill at every step of ADD and of DEL, one after the other. The plugin of debug builds dies
//! at the step that `FERRULE_DIE_AT` names. Needs root.

use serde_json::{Value, json};

use crate::lab::{Lab, Pod};

/// Everything that leaves something behind at once.
fn everything() -> Lab {
    Lab::new()
        .ranges(&["10.88.0.0/26", "fd00:88::/64"])
        .with("macspoofchk", json!(true))
        .with("ingressPolicy", json!("same-bridge"))
        .with("egressRate", json!(80_000_000))
        .with("egressBurst", json!(800_000))
        .with(
            "runtimeConfig",
            json!({"portMappings": [
                {"hostPort": 8080, "containerPort": 80, "protocol": "tcp"},
                {"hostPort": 5353, "containerPort": 53, "protocol": "udp"},
            ]}),
        )
}

/// Runs a verb that dies at the given step; whether it came to its end before that.
fn came_through(lab: &Lab, verb: &str, pod: &Pod, netns: &str, step: u32) -> bool {
    let environment = [("FERRULE_DIE_AT", step.to_string())];
    let child = lab.start_with(verb, &pod.id, netns, &lab.conf, &environment);
    let output = child.wait_with_output().unwrap();
    let killed = std::os::unix::process::ExitStatusExt::signal(&output.status) == Some(9);
    assert!(
        killed || output.status.success(),
        "{verb}, step {step}: {}",
        String::from_utf8_lossy(&output.stdout)
    );
    !killed
}

/// How many steps there can be at most: a loop without end is a failure.
const MOST_STEPS: u32 = 400;

fn warm(lab: &Lab) {
    let pod = Pod::new("warm");
    lab.add(&pod).unwrap();
    lab.del(&pod).unwrap();
    lab.assert_nothing_left("before the kills");
}

#[test]
fn an_add_killed_at_any_step_is_finished_by_repeating_it() {
    let lab = everything();
    for step in 1..MOST_STEPS {
        let pod = Pod::new(&format!("pod-{step}"));
        let through = came_through(&lab, "ADD", &pod, &pod.path(), step);
        let result = lab.add(&pod).unwrap();
        lab.check(&pod, &result).unwrap();
        lab.call("DEL", &pod.id, "", &lab.conf).unwrap();
        lab.assert_nothing_left(&format!(
            "after a kill at step {step} of ADD and another ADD"
        ));
        if through {
            assert!(step > 20, "only {step} steps were seen");
            return;
        }
    }
    panic!("ADD never came to its end");
}

#[test]
fn an_add_killed_at_any_step_is_undone_by_del_without_namespace_or_ports() {
    let lab = everything();
    warm(&lab);
    let mut plain = lab.conf.clone();
    plain["runtimeConfig"] = Value::Null;
    for step in 1..MOST_STEPS {
        let pod = Pod::new(&format!("pod-{step}"));
        let through = came_through(&lab, "ADD", &pod, &pod.path(), step);
        drop(pod);
        let id = format!("pod-{step}");
        lab.call("DEL", &id, "/dead/path", &plain).unwrap();
        lab.assert_nothing_left(&format!("after a kill at step {step} of ADD"));
        if through {
            return;
        }
    }
    panic!("ADD never came to its end");
}

#[test]
fn a_del_killed_at_any_step_is_finished_by_repeating_it() {
    let lab = everything();
    for step in 1..MOST_STEPS {
        let pod = Pod::new(&format!("pod-{step}"));
        lab.add(&pod).unwrap();
        let through = came_through(&lab, "DEL", &pod, "", step);
        lab.call("DEL", &pod.id, "", &lab.conf).unwrap();
        lab.assert_nothing_left(&format!("after a kill at step {step} of DEL"));
        if through {
            assert!(step > 8, "only {step} steps were seen");
            return;
        }
    }
    panic!("DEL never came to its end");
}

#[test]
fn what_a_kill_at_any_step_of_add_leaves_gc_takes_away() {
    let lab = everything();
    warm(&lab);
    for step in 1..MOST_STEPS {
        let pod = Pod::new(&format!("pod-{step}"));
        let through = came_through(&lab, "ADD", &pod, &pod.path(), step);
        // A pair killed before it was marked goes with its namespace, as everything in there.
        drop(pod);
        lab.gc(&[]).unwrap();
        let left = (lab.claims(), lab.leases(), lab.records(), lab.forwards());
        assert_eq!(
            left,
            Default::default(),
            "after a kill at step {step} of ADD"
        );
        if through {
            return;
        }
    }
    panic!("ADD never came to its end");
}
