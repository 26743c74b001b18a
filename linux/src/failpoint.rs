//! Dying on purpose, for tests of what a kill leaves behind.
//!
//! Whatever changes the kernel's or a file's state passes [`step`] before and after. In debug
//! builds a process whose environment holds `FERRULE_DIE_AT=<n>` kills itself at the `n`th; in
//! release builds nothing of this exists.

/// One place where a kill may come.
#[inline]
pub fn step() {
    #[cfg(debug_assertions)]
    debug::step();
}

#[cfg(debug_assertions)]
mod debug {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU32, Ordering};

    static PASSED: AtomicU32 = AtomicU32::new(0);
    static DIE_AT: OnceLock<Option<u32>> = OnceLock::new();

    pub(super) fn step() {
        let die_at = DIE_AT.get_or_init(|| {
            let text = std::env::var("FERRULE_DIE_AT").ok()?;
            text.parse().ok()
        });
        let Some(die_at) = die_at else { return };
        if PASSED.fetch_add(1, Ordering::Relaxed) + 1 == *die_at {
            let own = rustix::process::getpid();
            // A failure leaves the process alive, which the test notices.
            let _ = rustix::process::kill_process(own, rustix::process::Signal::KILL);
        }
    }
}
