//! Pod status: derived by a pure function, written to the apiserver by one task.
//!
//! [`derive`] knows no clock and no channel. [`publish`] is the only writer of pod status and the
//! only one who confirms a deletion.

mod conditions;
mod containers;
pub mod derive;
mod last_words;
mod patch;
pub mod publish;
mod resources;
#[cfg(test)]
mod tests;
