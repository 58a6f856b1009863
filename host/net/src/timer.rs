//! Which flow wants attention when.
//!
//! Deadlines move with every packet, mostly to later. So a flow has at most one live entry here: when it comes up
//! too early, the flow's real deadline is entered anew. Nothing is ever searched or removed.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use crate::flow::FlowId;

#[derive(Debug, Default)]
pub(crate) struct Timers {
    heap: BinaryHeap<Reverse<(Duration, u64)>>,
}

impl Timers {
    pub(crate) fn push(&mut self, at: Duration, id: FlowId) {
        self.heap.push(Reverse((at, id.to_bits())));
    }

    pub(crate) fn next(&self) -> Option<Duration> {
        self.heap.peek().map(|Reverse((at, _))| *at)
    }

    /// Takes the next entry that is due, with the time it was entered for.
    pub(crate) fn pop_due(&mut self, now: Duration) -> Option<(Duration, FlowId)> {
        if self.next()? > now {
            return None;
        }
        self.heap.pop().map(|Reverse((at, bits))| (at, FlowId::from_bits(bits)))
    }
}
