//! What brings volumes to paths on this node, and away again. One file per verb.
//!
//! Nothing here formats, repairs or guesses: an image is mounted when it holds the very filesystem
//! its record names, and else refused with its bytes unchanged. What is staged or published is
//! read from the kernel each time.

mod expand;
mod health;
mod publish;
mod stage;
mod stats;

pub use health::{Ailment, Severity};
pub use publish::Publish;
pub use stage::Stage;
pub use stats::Usage;
