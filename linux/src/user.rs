//! Identity of the calling process. Names are resolved by the callers: only numbers here.

use std::io;

/// Become user `uid` with group `gid` and exactly these supplementary groups, in all of real,
/// effective and saved id. Only for a process with one thread.
///
/// # Errors
/// `EPERM` without CAP_SETUID or CAP_SETGID.
pub fn become_user(uid: u32, gid: u32, groups: &[u32]) -> io::Result<()> {
    use rustix::process::{Gid, Uid};
    let groups: Vec<Gid> = groups.iter().map(|g| Gid::from_raw(*g)).collect();
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    rustix::thread::set_thread_groups(&groups)?;
    rustix::thread::set_thread_res_gid(gid, gid, gid)?;
    Ok(rustix::thread::set_thread_res_uid(uid, uid, uid)?)
}
