//! Leases: what an operation under way needs is kept from the collector until the operation is in the index.
//!
//! Leases live in memory, because operations do. Whoever wants something first holds its digest, then looks whether it
//! is there; the collector looks at the index, the leases and the disk while no one else may begin to hold anything
//! (the gate). So nothing is removed between a look and its use.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::Digest;

/// All leases of one store.
#[derive(Debug, Clone, Default)]
pub(crate) struct Leases(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    gate: RwLock<()>,
    held: Mutex<HashMap<Digest, usize>>,
}

/// What one operation holds; dropping it lets go of all.
#[derive(Debug)]
pub(crate) struct Lease {
    leases: Leases,
    mine: Mutex<HashSet<Digest>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Counts stay right whatever panicked beside them.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Leases {
    /// A lease on nothing yet.
    pub(crate) fn lease(&self) -> Arc<Lease> {
        Arc::new(Lease { leases: self.clone(), mine: Mutex::default() })
    }

    /// Keeps the collector out, so that what is in the index and what is leased can change hands.
    pub(crate) async fn open_gate(&self) -> RwLockReadGuard<'_, ()> {
        self.0.gate.read().await
    }

    /// Keeps everyone else out. For the collector.
    pub(crate) async fn close_gate(&self) -> RwLockWriteGuard<'_, ()> {
        self.0.gate.write().await
    }

    pub(crate) fn holds(&self, digest: &Digest) -> bool {
        lock(&self.0.held).contains_key(digest)
    }
}

impl Lease {
    /// Holds digests, which may or may not exist yet.
    pub(crate) async fn hold(&self, digests: impl IntoIterator<Item = Digest>) {
        let _open = self.leases.open_gate().await;
        let mut mine = lock(&self.mine);
        let mut held = lock(&self.leases.0.held);
        for digest in digests {
            if mine.insert(digest) {
                *held.entry(digest).or_default() += 1;
            }
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut held = lock(&self.leases.0.held);
        for digest in lock(&self.mine).drain() {
            if let Some(count) = held.get_mut(&digest) {
                *count -= 1;
                if *count == 0 {
                    held.remove(&digest);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_two_leases_hold_is_held_until_both_are_gone() {
        let leases = Leases::default();
        let digest = Digest::of(b"x");
        let (first, second) = (leases.lease(), leases.lease());
        first.hold([digest, digest]).await;
        second.hold([digest]).await;
        drop(first);
        assert!(leases.holds(&digest));
        drop(second);
        assert!(!leases.holds(&digest));
    }
}
