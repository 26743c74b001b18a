//! A CSI driver for volumes on the node's own disks.
//!
//! ```text
//!  gRPC ─▶ service     requests become plain values, errors become codes; touches no file
//!            │
//!            ▼
//!          driver ──── controller/*  node/*      one file per verb; a lock per volume
//!            │  │
//!            │  └▶ plan, parameters   decisions over plain values      pure
//!            ▼
//!          store   records: what exists and what was promised          durable
//!          pool    one directory; the records are its ledger
//!          backend images, loop devices, filesystems, mounts
//! ```
//!
//! The record is written before the data it describes and leaves after it. What is staged or
//! published is never written down: the kernel is asked each time. A filesystem is made on a file
//! that was created for it a moment before, and nowhere else. Only what a record names is removed.
//!
//! `service` is the only part that knows gRPC and tokio; everything below it blocks.

pub mod cli;
pub mod service;

pub mod controller;
pub mod node;

pub mod driver;

pub mod locks;
pub mod parameters;
pub mod plan;
pub mod pool;
pub mod store;

pub mod backend;
pub mod error;
pub mod model;
