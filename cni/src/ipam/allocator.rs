//! The rules of allocation, over any store. The caller holds whatever lock the store needs.

use std::collections::HashSet;
use std::io;
use std::net::IpAddr;
use std::path::Path;

use super::{Cursor, Lease, Owner, Pool, RangeSet, Store};

/// Why no address could be given.
#[derive(Debug, thiserror::Error)]
pub enum AllocateError {
    /// All addresses of a set are in use.
    #[error("no address is free in {0}")]
    Exhausted(String),
    /// The address asked for belongs to someone.
    #[error("address {address} is held by {holder}")]
    Taken {
        /// The address.
        address: IpAddr,
        /// Its holder.
        holder: Owner,
    },
    /// The address asked for is in no range of the network, or its gateway.
    #[error("address {0} is in no range of the network, or is its gateway")]
    Foreign(IpAddr),
    /// Two addresses of one set were asked for.
    #[error("more than one address of one range set was asked for ({0})")]
    TwoOfOneSet(IpAddr),
    /// The store failed.
    #[error("keep the lease")]
    Store(#[from] io::Error),
}

/// Gives `owner` one address of each set of the pool; those in `wanted`, where it names some.
/// An owner who already holds a matching lease keeps it. `is_gone` is asked about other leases
/// when a set has run dry, as a last resort: those it says yes to are freed.
///
/// # Errors
/// [`AllocateError`]; nothing stays claimed then.
pub fn allocate<S: Store>(
    store: &mut S,
    pool: &Pool,
    owner: &Owner,
    netns: &Path,
    wanted: &[IpAddr],
    is_gone: impl Fn(&Lease) -> bool,
) -> Result<Lease, AllocateError> {
    let wishes = assign(pool, wanted)?;
    if let Some(lease) = store.lease(owner)? {
        if still_good(store, pool, &lease, wanted)? {
            return Ok(lease);
        }
        free(store, pool, owner)?;
    }
    let mut queues = Queues::load(store, pool)?;
    let mut addresses = Vec::with_capacity(pool.sets.len());
    for (index, wish) in wishes.into_iter().enumerate() {
        let address = match wish {
            Some(address) => match store.holder(address)? {
                Some(holder) => return Err(AllocateError::Taken { address, holder }),
                None => address,
            },
            None => next_free(store, &mut queues, index, &is_gone)?,
        };
        addresses.push(address);
    }
    let lease = Lease {
        owner: owner.clone(),
        addresses,
        netns: netns.to_owned(),
    };
    store.put_lease(&lease)?;
    for address in &lease.addresses {
        store.claim(*address, owner)?;
    }
    queues.save(store)?;
    Ok(lease)
}

fn next_free<S: Store>(
    store: &mut S,
    queues: &mut Queues<'_>,
    index: usize,
    is_gone: &impl Fn(&Lease) -> bool,
) -> Result<IpAddr, AllocateError> {
    if queues.nearly_full(index) {
        queues.reap(store, index, is_gone)?;
    }
    if let Some(address) = queues.next(store, index)? {
        return Ok(address);
    }
    queues.refill(store, index, is_gone)?;
    let exhausted = || AllocateError::Exhausted(describe(&queues.pool.sets[index]));
    queues.next(store, index)?.ok_or_else(exhausted)
}

/// Takes back what `owner` holds; holding nothing is success. Returns what was freed.
///
/// # Errors
/// When the store fails; repeat then.
pub fn free<S: Store>(store: &mut S, pool: &Pool, owner: &Owner) -> io::Result<Vec<IpAddr>> {
    let Some(lease) = store.lease(owner)? else {
        return Ok(Vec::new());
    };
    let mut queues = Queues::load(store, pool)?;
    for address in &lease.addresses {
        match store.holder(*address)? {
            // The lease was never finished, and someone else got the address.
            Some(holder) if holder != *owner => continue,
            Some(_) => store.release(*address)?,
            // A kill came after the release: queue it (perhaps again, which does no harm).
            None => {}
        }
        queues.push(store, *address)?;
    }
    queues.save(store)?;
    store.remove_lease(owner)?;
    Ok(lease.addresses)
}

/// Frees every lease that `is_valid` does not know, and claims without a lease. Returns the
/// owners whose leases were freed.
///
/// # Errors
/// When the store fails; repeat then.
pub fn collect<S: Store>(
    store: &mut S,
    pool: &Pool,
    is_valid: impl Fn(&Owner) -> bool,
) -> io::Result<Vec<Owner>> {
    let mut freed = Vec::new();
    for lease in store.leases()? {
        if !is_valid(&lease.owner) {
            free(store, pool, &lease.owner)?;
            freed.push(lease.owner);
        }
    }
    let mut queues = Queues::load(store, pool)?;
    for address in store.claimed()? {
        let Some(holder) = store.holder(address)? else {
            continue;
        };
        let lease = store.lease(&holder)?;
        if !lease.is_some_and(|lease| lease.addresses.contains(&address)) {
            store.release(address)?;
            queues.push(store, address)?;
        }
    }
    queues.save(store)?;
    Ok(freed)
}

/// Whether every set has a free address; else the name of the first that has none.
///
/// # Errors
/// When the store fails.
pub fn available<S: Store>(store: &S, pool: &Pool) -> io::Result<Result<(), String>> {
    let queues = Queues::load(store, pool)?;
    for (index, set) in pool.sets.iter().enumerate() {
        let cursor = queues.cursors[index];
        // Gateways and doubled entries make this an upper bound: exact only when it matters.
        if u64::from(set.positions() - cursor.fresh.min(set.positions())) > 2 {
            continue;
        }
        let used = store
            .claimed()?
            .iter()
            .filter(|a| set.position(**a).is_some())
            .count();
        let gateways = set
            .ranges()
            .iter()
            .filter(|r| r.start <= r.gateway && r.gateway <= r.end)
            .count();
        if used + gateways >= set.positions() as usize {
            return Ok(Err(describe(set)));
        }
    }
    Ok(Ok(()))
}

fn describe(set: &RangeSet) -> String {
    let ranges = set
        .ranges()
        .iter()
        .map(|r| format!("{}-{} of {}", r.start, r.end, r.subnet));
    ranges.collect::<Vec<_>>().join(", ")
}

/// One wish or none per set.
fn assign(pool: &Pool, wanted: &[IpAddr]) -> Result<Vec<Option<IpAddr>>, AllocateError> {
    let mut wishes = vec![None; pool.sets.len()];
    for address in wanted {
        let set = pool
            .set_of(*address)
            .ok_or(AllocateError::Foreign(*address))?;
        if wishes[set].replace(*address).is_some() {
            return Err(AllocateError::TwoOfOneSet(*address));
        }
    }
    Ok(wishes)
}

/// One address in each set, all claimed by the owner, and all wishes among them.
fn still_good<S: Store>(
    store: &S,
    pool: &Pool,
    lease: &Lease,
    wanted: &[IpAddr],
) -> io::Result<bool> {
    let fits = lease.addresses.len() == pool.sets.len()
        && lease
            .addresses
            .iter()
            .zip(&pool.sets)
            .all(|(a, set)| set.position(*a).is_some())
        && wanted
            .iter()
            .all(|address| lease.addresses.contains(address));
    if !fits {
        return Ok(false);
    }
    for address in &lease.addresses {
        if store.holder(*address)?.as_ref() != Some(&lease.owner) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The queues of a pool while one operation works on them.
struct Queues<'a> {
    pool: &'a Pool,
    fingerprint: String,
    cursors: Vec<Cursor>,
    changed: bool,
}

impl<'a> Queues<'a> {
    fn load<S: Store>(store: &S, pool: &'a Pool) -> io::Result<Self> {
        let fingerprint = pool.fingerprint();
        let cursors = store.cursors(&fingerprint, pool.sets.len())?;
        Ok(Self {
            pool,
            fingerprint,
            cursors,
            changed: false,
        })
    }

    fn save<S: Store>(&self, store: &mut S) -> io::Result<()> {
        if self.changed {
            store.put_cursors(&self.fingerprint, &self.cursors)
        } else {
            Ok(())
        }
    }

    /// The next address that nobody holds; what is held or unreadable is passed over for good.
    fn next<S: Store>(&mut self, store: &S, index: usize) -> io::Result<Option<IpAddr>> {
        let set = &self.pool.sets[index];
        let cursor = &mut self.cursors[index];
        self.changed = true;
        loop {
            let position = if cursor.fresh < set.positions() {
                cursor.fresh += 1;
                Some(cursor.fresh - 1)
            } else if cursor.head < cursor.tail {
                let place = cursor.head % u64::from(set.positions());
                cursor.head += 1;
                store.queued(index, place)?
            } else {
                return Ok(None);
            };
            if let Some(address) = position.and_then(|position| set.address(position))
                && store.holder(address)?.is_none()
            {
                return Ok(Some(address));
            }
        }
    }

    /// Puts an address at the end of its queue. Not when it was never given away by this queue
    /// (it will be), nor when the queue is full of doubles: a refill finds it.
    fn push<S: Store>(&mut self, store: &mut S, address: IpAddr) -> io::Result<()> {
        let Some(index) = self.pool.set_of(address) else {
            return Ok(());
        };
        let set = &self.pool.sets[index];
        let cursor = &mut self.cursors[index];
        let places = u64::from(set.positions());
        let Some(position) = set
            .position(address)
            .filter(|position| *position < cursor.fresh)
        else {
            return Ok(());
        };
        if cursor.tail.saturating_sub(cursor.head) < places {
            store.enqueue(index, cursor.tail % places, position)?;
            cursor.tail += 1;
            self.changed = true;
        }
        Ok(())
    }

    /// Whether it is time to look for leases of the dead before the set runs dry: when 95 % are in
    /// use, and even then only now and then, for looking costs the more the more leases there are.
    fn nearly_full(&self, index: usize) -> bool {
        const OFTEN: u64 = 4;
        let positions = u64::from(self.pool.sets[index].positions());
        let cursor = &self.cursors[index];
        let fresh = u64::from(cursor.fresh);
        let waiting = cursor.tail.saturating_sub(cursor.head);
        let left = positions.saturating_sub(fresh) + waiting;
        left * 20 <= positions && (fresh + cursor.head).is_multiple_of((positions / 64).max(OFTEN))
    }

    /// Frees leases of the dead and queues their addresses.
    fn reap<S: Store>(
        &mut self,
        store: &mut S,
        index: usize,
        is_gone: &impl Fn(&Lease) -> bool,
    ) -> io::Result<()> {
        for lease in store.leases()? {
            let concerns = lease
                .addresses
                .iter()
                .any(|a| self.pool.set_of(*a) == Some(index));
            if !concerns || !is_gone(&lease) {
                continue;
            }
            for address in &lease.addresses {
                if store.holder(*address)?.as_ref() == Some(&lease.owner) {
                    store.release(*address)?;
                    self.push(store, *address)?;
                }
            }
            store.remove_lease(&lease.owner)?;
        }
        Ok(())
    }

    /// The queue ran dry: frees leases of the dead and queues every address nobody holds.
    fn refill<S: Store>(
        &mut self,
        store: &mut S,
        index: usize,
        is_gone: &impl Fn(&Lease) -> bool,
    ) -> io::Result<()> {
        self.reap(store, index, is_gone)?;
        // What was just queued, and what a kill lost on its way to the queue.
        let claimed: HashSet<IpAddr> = store.claimed()?.into_iter().collect();
        let set = &self.pool.sets[index];
        let free = (0..set.positions()).filter_map(|position| set.address(position));
        let waiting = self.cursors[index]
            .tail
            .saturating_sub(self.cursors[index].head);
        if waiting == 0 {
            for address in free.filter(|address| !claimed.contains(address)) {
                self.push(store, address)?;
            }
        }
        Ok(())
    }
}
