//! Processes: how one is made, watched, signalled, dressed for a container and executed.
//!
//! Purpose: everything the shim and the agent do to processes, as safe functions over the raw
//! system calls. No policy: which namespaces, capabilities or limits a container has is decided
//! by the callers. Blocking, no tokio; nothing here starts a thread.
//!
//! * [`clone`]: one more process by `clone3`, for the single-threaded shim only
//! * [`pidfd`]: handles that cannot be confused by a re-used process id
//! * [`spawn`]: start a program from a sealed memory copy without forking a fat agent
//! * [`namespace`]: unshare, join, pin
//! * [`attrs`]: what a process sets on itself before it executes
//! * [`userns`]: user namespaces with one range of ids
//! * [`exec`]: look up a program in PATH and execute it

pub mod attrs;
pub mod clone;
pub mod exec;
pub mod namespace;
pub mod pidfd;
pub mod spawn;
pub mod userns;
