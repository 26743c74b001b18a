//! One operation at a time on one volume or snapshot. Who comes second is told so at once and
//! tries again: nobody queues behind a slow copy.

use crate::error::DriverError;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

/// What is being worked on.
#[derive(Debug, Clone, Default)]
pub struct Locks {
    held: Arc<Mutex<BTreeSet<String>>>,
}

/// While it lives, nobody else works on these things.
#[derive(Debug)]
pub struct Guard {
    locks: Locks,
    ids: BTreeSet<String>,
}

impl Locks {
    /// Takes all of these ids, or none.
    ///
    /// # Errors
    /// [`DriverError::Busy`] naming the first one that somebody works on.
    pub fn take<I: ToString>(
        &self,
        ids: impl IntoIterator<Item = I>,
    ) -> Result<Guard, DriverError> {
        let ids: BTreeSet<String> = ids.into_iter().map(|id| id.to_string()).collect();
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(id) = ids.iter().find(|id| held.contains(*id)) {
            return Err(DriverError::Busy { id: id.clone() });
        }
        held.extend(ids.iter().cloned());
        Ok(Guard {
            locks: self.clone(),
            ids,
        })
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let mut held = self
            .locks
            .held
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        for id in &self.ids {
            held.remove(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_comes_second_is_refused_and_takes_nothing() {
        let locks = Locks::default();
        let first = locks.take(["b"]).unwrap();
        assert!(matches!(locks.take(["a", "b"]), Err(DriverError::Busy { id }) if id == "b"));
        let other = locks.take(["a"]).unwrap();
        drop((first, other));
        locks.take(["a", "b"]).unwrap();
    }
}
