//! Pods: one worker per UID turns what is desired and what is observed into actions.
//!
//! Reading order: [`state`] (the values), [`plan`] (the decisions, pure), [`worker`] (the loop),
//! [`execute`] (the actions), [`manager`] (who has a worker).

pub mod admission;
pub mod clock;
pub mod environment;
mod execute;
#[cfg(test)]
pub(crate) mod fixture;
mod hooks;
pub mod index;
pub mod launcher;
#[cfg(test)]
mod life;
pub mod manager;
mod measure;
pub mod mirror;
mod old_logs;
pub mod plan;
pub mod resize;
pub mod rounds;
pub mod spec;
pub mod state;
mod termination;
#[cfg(test)]
mod tests;
mod track;
pub mod worker;
