//! Lives that once broke a rule, shrunk to what mattered.

use super::{Chance, run};

#[test]
fn an_eviction_while_a_container_starts_ends_the_pod_only_when_it_is_dead() {
    run(
        vec![Chance::Pass(4), Chance::Evict, Chance::Pass(1)],
        0,
        "Always",
    );
}

#[test]
fn a_pod_that_ends_between_two_rounds_takes_no_restart_back() {
    let begin = [2, 2, 2].map(Chance::Pass);
    let end = [
        Chance::Condemn(0),
        Chance::Pass(8),
        Chance::Exit(166, 2),
        Chance::Pass(3),
    ];
    run(begin.into_iter().chain(end).collect(), 3, "Always");
}
