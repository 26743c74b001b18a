//! Storms of calls with random kills.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on shall stop")]

#[path = "../../cni-routed/tests/storm/mod.rs"]
mod storm;

#[test]
fn storms_of_adds_and_dels_with_random_kills_leak_nothing_and_double_nothing() {
    storm::storm(env!("CARGO_BIN_EXE_cni-vxlan"));
}
