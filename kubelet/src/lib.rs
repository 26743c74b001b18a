//! The node agent: turns the pods the apiserver binds to this node into running containers.
//!
//! ```text
//!  apiserver watch --> source --DesiredPod--> pod::manager --> pod::worker  (one task per UID)
//!                                                 | pod::plan(desired, observed, now), pure
//!                                                 v pod::execute
//!          images, volumes, launch ----> RuntimeService (runtime::Engine) <---- probes
//!                                                 | runtime events
//!  observe ------- wakes the worker of the pod <--+
//!  worker --> status::derive (pure) --> status::publish --> apiserver
//!  HTTPS server: reads pod::index and calls RuntimeService
//! ```
//!
//! Forbidden: any writer of pod status but [`status`], any writer of the Node but `node`,
//! IO or clocks in `pod::plan` and `status::derive`, top-level tasks started outside `agent`.

pub mod agent;
pub mod api;
pub mod compress;
pub mod config;
pub mod errors;
pub mod events;
pub mod eviction;
pub mod images;
pub mod launch;
pub mod metrics;
pub mod node;
pub mod objects;
pub mod observe;
pub mod plugins;
pub mod pod;
pub mod probes;
pub mod quantity;
pub mod server;
pub mod source;
pub mod stats;
pub mod status;
pub mod userns;
pub mod volumes;
