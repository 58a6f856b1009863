//! The network card (virtio 1.3 §5.1): frames between the guest and a stream socket of the host.
//!
//! Owns: mergeable receive buffers, and what drivers leave to the device: checksums and the cutting of large segments.
//! Does not own: what becomes of a frame. The socket's other end is the NAT, or anything that speaks QEMU's
//! `-netdev stream` framing: a length, u32 big-endian, and that many bytes.
//!
//! With [`Backend::offloads`] those bytes begin with ten that say what is left to do (`offload`): the layout of
//! virtio's own header, little-endian. Large segments then cross the socket whole, in both directions, and nobody makes
//! checksums that nobody looks at. Without, every frame is whole and as small as the link wants it. What a driver has not
//! agreed to take is done here.
//!
//! Back-pressure: a guest that sends faster than the socket takes finds its ring full; a guest that takes slower than
//! the other end sends leaves it in the socket. Nothing is dropped but what makes no sense, or fits no buffer.
//!
//! Configuration space: the address, 6 bytes; status, u16, whose first bit falls when the socket closes; the number of
//! queue pairs, u16, which is not offered; the MTU, u16.

mod link;
pub mod offload;
mod queue;
#[cfg(test)]
mod tests;

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use mio::Registry;

use self::link::Link;
pub(crate) use self::queue::Queues;
use crate::counter::Counter;
use crate::virtio::config::ConfigSpace;
use crate::virtio::device::DeviceKind;
use crate::virtio::threaded::{Front, Threaded};

/// To the guest, and from it.
const QUEUE_SIZES: [u16; 2] = [256, 256];
/// Where the status is in configuration space.
const STATUS: usize = 6;

// Feature bits (§5.1.3).
const F_CSUM: u32 = 0;
const F_GUEST_CSUM: u32 = 1;
const F_MTU: u32 = 3;
const F_MAC: u32 = 5;
const F_GUEST_TSO4: u32 = 7;
const F_GUEST_TSO6: u32 = 8;
const F_HOST_TSO4: u32 = 11;
const F_HOST_TSO6: u32 = 12;
const F_MRG_RXBUF: u32 = 15;
const F_STATUS: u32 = 16;
const F_HOST_USO: u32 = 56;

/// What the device needs from outside.
#[derive(Debug)]
pub struct Backend {
    /// The frames' other end.
    pub stream: UnixStream,
    /// Every frame begins with what is left to do for it.
    pub offloads: bool,
    /// The guest's address.
    pub mac: [u8; 6],
    /// The largest packet on the link that is not to be cut; 68 at least.
    pub mtu: u16,
}

/// What the device has done since it was made.
#[derive(Debug, Default)]
pub struct Counters {
    /// Frames taken from the guest; one that is cut counts once.
    pub frames_from_guest: Counter,
    /// Their bytes.
    pub bytes_from_guest: Counter,
    /// Frames given to the guest.
    pub frames_to_guest: Counter,
    /// Their bytes.
    pub bytes_to_guest: Counter,
    /// Frames of the guest that make no sense, and those sent after the socket had closed.
    pub dropped_from_guest: Counter,
    /// Frames from the socket that make no sense, or that fit no buffer of the guest.
    pub dropped_to_guest: Counter,
    /// Chains too small for a header.
    pub malformed: Counter,
}

/// The network card.
pub struct Net {
    counters: Arc<Counters>,
    front: Front<()>,
}

impl Net {
    /// Makes the device and its thread.
    pub fn new(backend: Backend) -> io::Result<Self> {
        let counters = Arc::new(Counters::default());
        let config = config_space(&backend);
        let features = features(backend.offloads);
        let shared = Arc::clone(&counters);
        let space = config.clone();
        let front = Front::try_spawn(DeviceKind::Net, features, QUEUE_SIZES.to_vec(), config, |registry| {
            Ok(Queues::new(Link::new(backend.stream, &registry, backend.offloads)?, space, shared))
        })?;
        Ok(Self { counters, front })
    }

    /// What the device has done.
    pub fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }
}

fn features(offloads: bool) -> u64 {
    let all = [F_CSUM, F_MTU, F_MAC, F_HOST_TSO4, F_HOST_TSO6, F_MRG_RXBUF, F_STATUS, F_HOST_USO];
    // Without offloads nothing is left to the guest either.
    let guest = [F_GUEST_CSUM, F_GUEST_TSO4, F_GUEST_TSO6];
    let guest = if offloads { &guest[..] } else { &[] };
    all.iter().chain(guest).fold(0, |features, bit| features | 1 << bit)
}

fn config_space(backend: &Backend) -> ConfigSpace {
    let mut config = backend.mac.to_vec();
    config.extend(1u16.to_le_bytes());
    config.extend(1u16.to_le_bytes());
    config.extend(backend.mtu.to_le_bytes());
    ConfigSpace::new(config)
}

/// The model without a thread, for fuzz targets.
pub(crate) fn model(backend: Backend, registry: &Registry) -> io::Result<Queues> {
    let config = config_space(&backend);
    Ok(Queues::new(Link::new(backend.stream, registry, backend.offloads)?, config, Arc::default()))
}

impl Threaded for Net {
    type Message = ();

    fn front(&self) -> &Front<()> {
        &self.front
    }
}
