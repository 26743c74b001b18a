//! Random pods, random kills, then the books are checked. `cargo xtask chaos` does it for longer.

use anyhow::Result;
use std::time::Duration;
use testkit::chaos::{self, ChaosOptions};
use testkit::scenario::Scenario;

#[test]
fn killed_agents_shims_and_apiservers_lose_no_exit_code_no_line_and_no_readiness() -> Result<()> {
    let scenario = Scenario::alone("chaos")?;
    let report = chaos::run(
        &scenario,
        ChaosOptions {
            seed: 1,
            duration: Duration::from_secs(25),
            pods: 12,
        },
    )?;
    println!("{report}");
    Ok(())
}
