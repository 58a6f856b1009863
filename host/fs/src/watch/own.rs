//! What the guest does itself, so that it is not told of it as of somebody else's doing.
//!
//! The host's kernel queues an event while a change is made. So a change is written down before it is made; and it is
//! crossed out when, after it was made, all events that were queued have been read. Meanwhile the same change by somebody
//! else goes unnoticed; the guest's own kernel has told of it.

use std::collections::HashMap;
use std::ffi::CString;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Changes that are written down at most. With more, some are told to the guest a second time, which does no harm.
const ENTRIES_MAX: usize = 1 << 16;

/// What changes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Own {
    /// A name is made in a folder, and something in what it leads to.
    Appears(u64, CString),
    /// A name goes from a folder.
    Vanishes(u64, CString),
    /// Data or attributes of a file.
    Data(u64),
}

#[derive(Default)]
struct Entry {
    /// How many are being made now.
    under_way: usize,
    /// The reading of events that had begun when the last one was made.
    made: u64,
}

#[derive(Default)]
struct Entries {
    entries: HashMap<Own, Entry>,
    /// Readings of events begun so far.
    readings: u64,
}

/// The list.
#[derive(Default)]
pub struct Ledger {
    entries: Mutex<Entries>,
    kept: AtomicBool,
}

/// These changes are being made until this is dropped.
pub struct Making<'a> {
    ledger: &'a Ledger,
    changes: Vec<Own>,
}

impl Drop for Making<'_> {
    fn drop(&mut self) {
        let mut entries = self.ledger.entries();
        let now = entries.readings;
        for change in &self.changes {
            if let Some(entry) = entries.entries.get_mut(change) {
                entry.under_way = entry.under_way.saturating_sub(1);
                entry.made = now;
            }
        }
    }
}

impl Ledger {
    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether anybody reads events.
    pub fn is_kept(&self) -> bool {
        self.kept.load(Ordering::Acquire)
    }

    /// Begins or ends an empty list.
    pub fn keep(&self, kept: bool) {
        self.entries().entries.clear();
        self.kept.store(kept, Ordering::Release);
    }

    pub fn make(&self, changes: Vec<Own>) -> Making<'_> {
        let mut entries = self.entries();
        if entries.entries.len() >= ENTRIES_MAX {
            entries.entries.retain(|_, entry| entry.under_way > 0);
        }
        for change in &changes {
            entries.entries.entry(change.clone()).or_default().under_way += 1;
        }
        Making { ledger: self, changes }
    }

    /// Events are about to be read; returns the number of this reading.
    pub fn begin_reading(&self) -> u64 {
        let mut entries = self.entries();
        entries.readings += 1;
        entries.readings
    }

    pub fn has(&self, change: &Own) -> bool {
        self.entries().entries.contains_key(change)
    }

    /// All events that were queued have been read, and looked at.
    pub fn end_reading(&self, reading: u64) {
        self.entries().entries.retain(|_, entry| entry.under_way > 0 || entry.made >= reading);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_known_until_events_were_read_after_it() {
        let ledger = Ledger::default();
        let data = Own::Data(7);
        let before = ledger.begin_reading();
        let making = ledger.make(vec![data.clone()]);
        ledger.end_reading(before);
        let during = ledger.begin_reading();
        drop(making);
        // Its event may have come after the last one that was read.
        ledger.end_reading(during);
        assert!(ledger.has(&data) && !ledger.has(&Own::Data(8)));
        let after = ledger.begin_reading();
        assert!(ledger.has(&data));
        ledger.end_reading(after);
        assert!(!ledger.has(&data));
    }

    #[test]
    fn the_list_is_bounded_by_what_is_under_way() {
        let ledger = Ledger::default();
        let held = ledger.make(vec![Own::Data(0)]);
        for number in 1..3 * ENTRIES_MAX as u64 {
            drop(ledger.make(vec![Own::Data(number)]));
        }
        assert!(ledger.entries().entries.len() <= ENTRIES_MAX);
        assert!(ledger.has(&Own::Data(0)));
        drop(held);
    }
}
