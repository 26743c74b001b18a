//! Pods: one worker per UID turns what is desired and what is observed into actions.
pub mod index;
pub mod plan;
pub mod spec;
pub mod state;
