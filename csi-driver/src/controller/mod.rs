//! What makes, changes, lists and removes volumes and snapshots. One file per verb.

mod create;
mod delete;
mod expand;
mod group;
mod list;
mod snapshot;
mod still;

pub use create::CreateVolume;
pub use group::CreateGroup;
pub use list::{Capacity, CapacityQuestion, SnapshotFilter};
pub use snapshot::CreateSnapshot;
