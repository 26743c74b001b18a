//! A CRI-shaped engine: sandboxes, containers, images.
//!
//! It has never heard of a Pod object or the apiserver, and must not: no Kubernetes API types
//! here. The kubelet calls [`service::RuntimeService`] and [`service::ImageService`]; the engine
//! drives one `pod-shim` per sandbox and the CNI plugins.

pub mod image;
pub mod fake;
pub mod service;
