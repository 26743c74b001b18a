//! The lab: a real control plane and nodes on one machine, and what the commands of `cargo xtask`
//! and the end-to-end scenarios share.
//!
//! No async runtime, no Kubernetes client: the scenarios see the cluster through the real kubectl,
//! as a user does. Nothing in here is linked into the product.

pub mod artefacts;
pub mod audit;
pub mod bench;
pub mod chaos;
pub mod check;
pub mod cluster;
pub mod command;
pub mod conformance;
pub mod images;
pub mod leaks;
pub mod packages;
pub mod paths;
pub mod process;
pub mod progress;
pub mod registry;
pub mod scenario;
pub mod storage;
pub mod suite;
pub mod terminal;
pub mod tidy;
pub mod vm;
