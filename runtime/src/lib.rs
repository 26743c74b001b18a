//! A CRI-shaped engine: sandboxes, containers, images.
//!
//! It has never heard of a Pod object or the apiserver, and must not: no Kubernetes API types
//! here. The kubelet calls [`service::RuntimeService`] and [`service::ImageService`]; the engine
//! drives one `pod-shim` per sandbox and the CNI plugins.
//!
//! ```text
//! service (the contract) ◀── operations ──▶ sandbox ──▶ shim_client ──▶ pod-shim (a process)
//!                                 │            └──▶ network ──▶ CNI plugins (processes)
//!                                 ├──▶ container {spec is pure} ──▶ linux::cgroup, linux::fs
//!                                 ├──▶ exec     ├──▶ image     events ──▶ whoever listens
//! engine (what there is)  ◀── recover (after a restart)          fake (for tests of callers)
//! ```

pub mod config;
pub mod container;
pub mod engine;
pub mod events;
pub mod fake;
pub mod image;
pub mod network;
pub mod sandbox;
pub mod service;
pub mod shim_client;

mod error;
mod exec;
mod forward;
mod operations;
mod recover;

pub use config::{CgroupDriver, EngineConfig};
pub use engine::Engine;
