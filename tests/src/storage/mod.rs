//! The storage driver beside no cluster: a pool on a filesystem of its own, the driver, and
//! whoever judges it.

mod bench;
mod driver;
mod pool;
mod sanity;

pub use bench::bench;
pub use driver::RunningDriver;
pub use pool::{PoolFilesystem, ScratchPool};
pub use sanity::{CSI_SANITY, FAULTY, SanityOptions, faulty, is_green, sanity};
