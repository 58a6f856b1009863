//! The flow table: every conversation the NAT carries, of whatever protocol, in one table of fixed capacity.
//!
//! A flow is found by its [`Key`] when a frame comes from the guest, and by its [`FlowId`] when something happens on
//! the host's side. An id is a place and a generation, so that an event of a socket whose flow has ended meanwhile
//! finds nothing instead of a stranger.
//!
//! ```text
//!   Tcp     Connecting ─► Accepting ─► Open ─► (both directions closed) ─► gone      see tcp.rs
//!                          Opening ─► Open
//!   Udp     Unreplied ─► Replied ─► (silence) ─► gone                                see udp.rs
//!   Dns     asked resolver 0 ─► 1 ─► … ─► answered, or SERVFAIL ─► gone              see dns.rs
//!   Echo    (silence) ─► gone                                                        see icmp.rs
//! ```

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use crate::dns::Query;
use crate::icmp::Echo;
use crate::tcp::Connection;
use crate::udp::Association;

/// Most flows at a time. Each may hold one host file descriptor, and a usual hard limit for those is 2¹⁴ or more; a
/// busy build farm has some hundred.
pub const FLOW_CAPACITY: usize = 8192;

/// Names one flow for the driver. Never given to another flow while any event of this one can be under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FlowId {
    index: u32,
    generation: u32,
}

impl FlowId {
    /// The flow's place, below [`FLOW_CAPACITY`]: an index for the driver's own table.
    pub fn index(self) -> usize {
        self.index as usize
    }

    /// As one number, for poll tokens. The highest 2³² values of a `u64` are never used.
    pub fn to_bits(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.index)
    }

    /// The id that [`FlowId::to_bits`] came from.
    pub fn from_bits(bits: u64) -> Self {
        Self { index: bits as u32, generation: (bits >> 32) as u32 }
    }
}

/// How a packet from the guest finds its flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Key {
    Tcp { guest: SocketAddr, remote: SocketAddr },
    Udp { guest: SocketAddr, remote: SocketAddr },
    Dns { guest: SocketAddr, id: u16 },
    Echo { guest: IpAddr, remote: IpAddr, ident: u16 },
}

#[derive(Debug)]
pub(crate) enum Flow {
    Tcp(Box<Connection>),
    Udp(Association),
    Dns(Query),
    Echo(Echo),
}

impl Flow {
    /// When the flow wants to be looked at although nothing happened.
    pub(crate) fn deadline(&self) -> Option<Duration> {
        match self {
            Self::Tcp(connection) => connection.deadline(),
            Self::Udp(association) => Some(association.expires()),
            Self::Dns(query) => Some(query.deadline()),
            Self::Echo(echo) => Some(echo.expires()),
        }
    }
}

#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) key: Key,
    pub(crate) flow: Flow,
    /// The earliest entry of the timer queue that will look at this flow.
    pub(crate) timer: Option<Duration>,
    /// Whether the flow stands in the queue of those with segments to send.
    pub(crate) ready: bool,
}

#[derive(Debug)]
struct Slot {
    generation: u32,
    entry: Option<Entry>,
}

/// The table.
#[derive(Debug, Default)]
pub(crate) struct Table {
    slots: Vec<Slot>,
    free: Vec<u32>,
    ids: HashMap<Key, FlowId>,
}

impl Table {
    pub(crate) fn len(&self) -> usize {
        self.ids.len()
    }

    pub(crate) fn is_full(&self) -> bool {
        self.len() >= FLOW_CAPACITY
    }

    pub(crate) fn find(&self, key: &Key) -> Option<FlowId> {
        self.ids.get(key).copied()
    }

    pub(crate) fn get(&self, id: FlowId) -> Option<&Entry> {
        let slot = self.slots.get(id.index())?;
        if slot.generation == id.generation { slot.entry.as_ref() } else { None }
    }

    pub(crate) fn get_mut(&mut self, id: FlowId) -> Option<&mut Entry> {
        let slot = self.slots.get_mut(id.index())?;
        if slot.generation == id.generation { slot.entry.as_mut() } else { None }
    }

    /// Adds a flow; `None` when the table is full. `key` must be new.
    pub(crate) fn insert(&mut self, key: Key, flow: Flow) -> Option<FlowId> {
        if self.is_full() {
            return None;
        }
        debug_assert!(!self.ids.contains_key(&key), "{key:?} is in the table");
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot { generation: 0, entry: None });
            (self.slots.len() - 1) as u32
        });
        let slot = &mut self.slots[index as usize];
        slot.generation = slot.generation.wrapping_add(1) & (u32::MAX >> 1);
        slot.entry = Some(Entry { key, flow, timer: None, ready: false });
        let id = FlowId { index, generation: slot.generation };
        self.ids.insert(key, id);
        Some(id)
    }

    pub(crate) fn remove(&mut self, id: FlowId) -> Option<Entry> {
        let slot = self.slots.get_mut(id.index()).filter(|slot| slot.generation == id.generation)?;
        let entry = slot.entry.take()?;
        self.ids.remove(&entry.key);
        self.free.push(id.index);
        Some(entry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn echo(ident: u16) -> (Key, Flow) {
        let (guest, remote) = ([198, 18, 0, 2].into(), [10, 0, 0, 1].into());
        (Key::Echo { guest, remote, ident }, Flow::Echo(Echo::new(guest, remote, ident, Duration::ZERO)))
    }

    #[test]
    fn an_ended_flows_id_finds_nothing() {
        let mut table = Table::default();
        let (key, flow) = echo(1);
        let first = table.insert(key, flow).unwrap();
        assert_eq!(table.find(&key), Some(first));
        assert!(table.remove(first).is_some() && table.remove(first).is_none());
        let (key, flow) = echo(2);
        let second = table.insert(key, flow).unwrap();
        assert_eq!(second.index(), first.index());
        assert!(table.get(first).is_none() && table.get(second).is_some());
        assert_eq!(FlowId::from_bits(second.to_bits()), second);
    }

    #[test]
    fn a_full_table_takes_no_more() {
        let mut table = Table::default();
        for ident in 0..FLOW_CAPACITY as u16 {
            let (key, flow) = echo(ident);
            assert!(table.insert(key, flow).is_some());
        }
        let (key, flow) = echo(u16::MAX);
        assert!(table.insert(key, flow).is_none());
        let (key, _) = echo(5);
        table.remove(table.find(&key).unwrap());
        assert_eq!(table.len(), FLOW_CAPACITY - 1);
    }
}
