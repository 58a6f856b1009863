//! Serves a device model to QEMU over vhost-user: one connection, one thread, one model.
//!
//! The front end (QEMU) owns the guest's memory and configuration; it sends the memory as file descriptors, the queues'
//! addresses, and one event descriptor per queue and direction. This file turns that into the verbs of
//! [`VirtioDevice`]. The protocol itself is the `vhost` crate's. Offered: `CONFIG`, `MQ`, `REPLY_ACK`, and for disks
//! `BACKEND_REQ`: a way back, on which the front end hears that configuration space has changed (`way_back`).
//!
//! ```text
//! ring    Stopped ── SET_VRING_KICK ──▶ Started ── enabled* ──▶ Running
//!            ▲                             │                       │
//!            └────── GET_VRING_BASE ───────┴───────────────────────┘
//!         * by SET_VRING_ENABLE; from the start if the front end did not take PROTOCOL_FEATURES
//! ```
//!
//! Memory may be replaced while rings run: the new map takes the old one's place at once, work in progress ends on the
//! old one, which stays mapped for as long. Ring addresses are translated when they are set, as libvhost-user does.
//! When a driver starts all over (a guest's reboot), the model is reset first; so it is when the socket closes.
//!
//! The front end is trusted not to shrink the memory files it hands over. Everything else it says is checked; what
//! makes no sense ends the connection.

#![expect(unsafe_code, reason = "received descriptors become event descriptors")]

mod early;
#[cfg(test)]
mod tests;
mod waiting;
mod way_back;

use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use tracing::{debug, info, warn};
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVirtioFeatures, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    BackendReqHandler, Error as VhostError, GpuBackend, Result as VhostResult, VhostUserBackendReqHandlerMut,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vm_memory::{
    FileOffset, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap, GuestRegionMmap,
};
use vmm_sys_util::eventfd::EventFd;

use self::waiting::Connection;
pub use self::waiting::Waiting;
use self::way_back::WayBack;
use crate::virtio::device::{DeviceKind, Interrupt, Memory, QueueResources, VirtioDevice};
use crate::virtio::ring::{self, Addresses};

/// A device that is being served. Dropping it closes the connection and waits for the thread.
pub struct Server {
    connection: Arc<Connection>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Waits until the front end has closed the connection.
    pub fn join(mut self) {
        self.wait();
    }

    /// Closes the connection and waits until the device is reset and gone.
    pub fn stop(self) {
        drop(self);
    }

    /// Whether the connection has ended.
    pub fn is_finished(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    fn wait(&mut self) {
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            warn!("the thread of a vhost-user connection panicked");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.connection.close();
        self.wait();
    }
}

/// Serves `device` on a connected socket, on a thread of its own, until the front end closes it.
pub fn serve(device: Box<dyn VirtioDevice>, stream: UnixStream) -> io::Result<Server> {
    let connection = Arc::new(Connection::new(stream.try_clone()?.into()));
    let thread = spawn(device, move |device| converse(device, stream))?;
    Ok(Server { connection, thread: Some(thread) })
}

/// The same for a front end that is still to come.
pub fn serve_waiting(device: Box<dyn VirtioDevice>, waiting: Waiting) -> io::Result<Server> {
    let connection = Arc::new(Connection::new(waiting.try_clone()?));
    let there = Arc::clone(&connection);
    let thread = spawn(device, move |device| {
        let stream = match waiting.accept() {
            Ok(stream) => stream,
            Err(_) if there.is_closed() => return Ok(()),
            Err(error) => return Err(error),
        };
        there.moves_to(stream.try_clone()?.into());
        converse(device, stream)
    })?;
    Ok(Server { connection, thread: Some(thread) })
}

fn spawn(
    device: Box<dyn VirtioDevice>,
    work: impl FnOnce(Box<dyn VirtioDevice>) -> io::Result<()> + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let kind = device.kind();
    thread::Builder::new().name(format!("vhost-{kind}")).spawn(move || {
        if let Err(error) = work(device) {
            warn!(device = %kind, %error, "the vhost-user connection did not come about");
        }
    })
}

/// Answers the front end until it leaves.
fn converse(device: Box<dyn VirtioDevice>, stream: UnixStream) -> io::Result<()> {
    let kind = device.kind();
    let requests = stream.try_clone()?;
    let session = Session::new(device);
    let way_back = Arc::clone(&session.way_back);
    let session = Arc::new(Mutex::new(session));
    let mut handler = BackendReqHandler::from_stream(stream, Arc::clone(&session));
    loop {
        if has_way_back(kind) {
            way_back.look_at_next(&requests);
        }
        let early = if kind == DeviceKind::Net { take_early(&requests, &session) } else { Ok(false) };
        let taken = match early {
            Ok(true) => continue,
            Ok(false) => handler.handle_request(),
            Err(error) => Err(VhostError::ReqHandlerError(error)),
        };
        match taken {
            Ok(()) => {}
            Err(VhostError::SocketRetry(_)) => {}
            Err(VhostError::Disconnected) => {
                info!(device = %kind, "the front end has disconnected");
                break;
            }
            Err(error) => {
                warn!(device = %kind, %error, "the vhost-user connection has failed");
                break;
            }
        }
    }
    // Closes the socket, so that the front end learns of a failure, before the reset that may take longer.
    drop((handler, requests));
    session.lock().unwrap_or_else(PoisonError::into_inner).device.reset();
    Ok(())
}

/// Takes the next message if it comes too early for the protocol; `true` when it did.
fn take_early(requests: &UnixStream, session: &Mutex<Session>) -> io::Result<bool> {
    let lock = || session.lock().unwrap_or_else(PoisonError::into_inner);
    if lock().knows_protocol_features() {
        return Ok(false);
    }
    let Some(early) = early::take(requests)? else { return Ok(false) };
    lock().set_vring_enable(early.ring, early.enable).map_err(io::Error::other)?;
    early.answer(requests)?;
    Ok(true)
}

/// Whether the front end wants to hear of changes in configuration space. QEMU does for disks, which may have become
/// larger.
fn has_way_back(kind: DeviceKind) -> bool {
    kind == DeviceKind::Block
}

/// The call of one queue. QEMU changes it while the queue runs, when the guest masks its interrupt.
#[derive(Default)]
struct Call {
    event: Mutex<Option<EventFd>>,
    way_back: Arc<WayBack>,
}

impl Interrupt for Call {
    fn signal_used(&self) -> io::Result<()> {
        match &*self.event.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(event) => event.write(1),
            // The driver polls.
            None => Ok(()),
        }
    }

    fn signal_config(&self) -> io::Result<()> {
        self.way_back.config_changed()
    }
}

/// What the front end has said about one queue.
#[derive(Default)]
struct Vring {
    size: u16,
    addresses: Option<Addresses>,
    next_available: u16,
    /// Present while the ring is started.
    kick: Option<EventFd>,
    enabled: bool,
    running: bool,
    call: Arc<Call>,
}

/// One region of guest memory as the front end maps it.
struct Mapping {
    guest: u64,
    user: u64,
    length: u64,
}

struct Session {
    device: Box<dyn VirtioDevice>,
    memory: Memory,
    mappings: Vec<Mapping>,
    vrings: Vec<Vring>,
    way_back: Arc<WayBack>,
    features: u64,
    /// A queue has run since the last reset.
    has_run: bool,
}

impl Session {
    fn new(device: Box<dyn VirtioDevice>) -> Self {
        let way_back = Arc::new(WayBack::default());
        let vring = |size: &u16| Vring {
            size: *size,
            call: Arc::new(Call { way_back: Arc::clone(&way_back), ..Call::default() }),
            ..Vring::default()
        };
        let vrings = device.queue_sizes().iter().map(vring).collect();
        Self {
            device,
            memory: GuestMemoryAtomic::new(GuestMemoryMmap::new()),
            mappings: Vec::new(),
            vrings,
            way_back,
            features: 0,
            has_run: false,
        }
    }

    fn vring(&mut self, index: usize) -> VhostResult<&mut Vring> {
        self.vrings.get_mut(index).ok_or(VhostError::InvalidParam)
    }

    /// Translates an address of the front end's process into one of the guest.
    fn guest_address(&self, user: u64) -> VhostResult<u64> {
        self.mappings
            .iter()
            .find_map(|mapping| {
                let offset = user.checked_sub(mapping.user)?;
                (offset < mapping.length).then(|| mapping.guest.checked_add(offset)).flatten()
            })
            .ok_or(VhostError::InvalidParam)
    }

    /// Whether the front end has said that it knows about states of rings.
    fn knows_protocol_features(&self) -> bool {
        self.features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0
    }

    /// Brings one queue of the model to the state the front end wants.
    fn update(&mut self, index: usize) -> VhostResult<()> {
        let protocol = self.knows_protocol_features();
        let vring = self.vring(index)?;
        let wanted = vring.kick.is_some() && (vring.enabled || !protocol);
        match (wanted, vring.running) {
            (true, false) => self.start(index),
            (false, true) => {
                self.stop(index);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn start(&mut self, index: usize) -> VhostResult<()> {
        // A driver that sets up its first queue from the beginning has started over.
        if self.has_run && self.vrings.iter().all(|vring| !vring.running && vring.next_available == 0) {
            debug!(device = %self.device.kind(), "the driver starts over");
            self.device.reset();
            self.device.ack_features(self.features);
        }
        let event_idx = self.features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let maximum = self.device.queue_sizes()[index];
        let memory = self.memory.clone();
        let vring = self.vring(index)?;
        let (Some(addresses), Some(kick)) = (vring.addresses, &vring.kick) else {
            return Err(VhostError::InvalidOperation("a ring was started before its addresses were set"));
        };
        let kick = kick.try_clone().map_err(VhostError::ReqHandlerError)?;
        let queue = queue(maximum, vring, addresses, event_idx, &memory).map_err(handler_error)?;
        let resources = QueueResources { memory, queue, kick, interrupt: Arc::clone(&vring.call) as _ };
        self.device.start_queue(index, resources).map_err(handler_error)?;
        self.vring(index)?.running = true;
        self.has_run = true;
        Ok(())
    }

    fn stop(&mut self, index: usize) {
        if let Some(state) = self.device.stop_queue(index)
            && let Some(vring) = self.vrings.get_mut(index)
        {
            vring.next_available = state.next_avail;
        }
        if let Some(vring) = self.vrings.get_mut(index) {
            vring.running = false;
        }
    }

    fn reset(&mut self) {
        self.device.reset();
        for vring in &mut self.vrings {
            vring.running = false;
            vring.kick = None;
            vring.enabled = false;
            vring.next_available = 0;
        }
        self.has_run = false;
    }
}

/// The queue that a ring's settings describe.
fn queue(
    maximum: u16,
    vring: &Vring,
    addresses: Addresses,
    event_idx: bool,
    memory: &Memory,
) -> Result<Queue, virtio_queue::Error> {
    let mut queue = ring::queue(maximum, vring.size, addresses, event_idx)?;
    queue.set_next_avail(vring.next_available);
    // The front end says where to read on; where we left off writing only the used ring itself knows.
    let next_used = queue.used_idx(&*memory.memory(), std::sync::atomic::Ordering::Acquire)?;
    queue.set_next_used(next_used.0);
    Ok(queue)
}

fn handler_error(error: impl std::error::Error + Send + Sync + 'static) -> VhostError {
    VhostError::ReqHandlerError(io::Error::other(error))
}

fn event_of(file: File) -> EventFd {
    // SAFETY: the descriptor is owned by `file` and given up by it, so the new owner is the only one.
    unsafe { EventFd::from_raw_fd(file.into_raw_fd()) }
}

impl VhostUserBackendReqHandlerMut for Session {
    fn set_owner(&mut self) -> VhostResult<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> VhostResult<()> {
        self.reset();
        Ok(())
    }

    fn reset_device(&mut self) -> VhostResult<()> {
        self.reset();
        Ok(())
    }

    fn get_features(&mut self) -> VhostResult<u64> {
        Ok(self.device.features() | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits())
    }

    fn set_features(&mut self, features: u64) -> VhostResult<()> {
        // QEMU passes on what its own transport agreed with the driver, such as queue reset, for it does that itself.
        let offered = self.device.features() | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        if features & !offered != 0 {
            debug!(device = %self.device.kind(), features = features & !offered, "features of the front end's own");
        }
        self.features = features & offered;
        self.device.ack_features(features & self.device.features());
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> VhostResult<Option<Vec<u64>>> {
        let mut mapped = Vec::with_capacity(regions.len());
        let mut mappings = Vec::with_capacity(regions.len());
        for (region, file) in regions.iter().zip(files) {
            let length = usize::try_from(region.memory_size).map_err(|_| VhostError::InvalidParam)?;
            let offset = FileOffset::new(file, region.mmap_offset);
            let guest = GuestAddress(region.guest_phys_addr);
            mapped.push(GuestRegionMmap::from_range(guest, length, Some(offset)).map_err(handler_error)?);
            mappings.push(Mapping {
                guest: region.guest_phys_addr,
                user: region.user_addr,
                length: region.memory_size,
            });
        }
        let map = GuestMemoryMmap::from_regions(mapped).map_err(handler_error)?;
        self.memory.lock().unwrap_or_else(PoisonError::into_inner).replace(map);
        self.mappings = mappings;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, size: u32) -> VhostResult<()> {
        let maximum = *self.device.queue_sizes().get(index as usize).ok_or(VhostError::InvalidParam)?;
        let size = u16::try_from(size).map_err(|_| VhostError::InvalidParam)?;
        if !size.is_power_of_two() || size > maximum {
            return Err(VhostError::InvalidParam);
        }
        self.vring(index as usize)?.size = size;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> VhostResult<()> {
        let addresses = Addresses {
            descriptors: self.guest_address(descriptor)?,
            available: self.guest_address(available)?,
            used: self.guest_address(used)?,
        };
        self.vring(index as usize)?.addresses = Some(addresses);
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> VhostResult<()> {
        let base = u16::try_from(base).map_err(|_| VhostError::InvalidParam)?;
        self.vring(index as usize)?.next_available = base;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> VhostResult<VhostUserVringState> {
        self.vring(index as usize)?;
        self.stop(index as usize);
        let vring = self.vring(index as usize)?;
        vring.kick = None;
        Ok(VhostUserVringState::new(index, u32::from(vring.next_available)))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> VhostResult<()> {
        let index = usize::from(index);
        self.vring(index)?;
        let Some(file) = file else {
            return Err(VhostError::InvalidOperation("polling a ring without a kick is not offered"));
        };
        // A new kick for a running ring: it starts again, with that one.
        self.stop(index);
        self.vring(index)?.kick = Some(event_of(file));
        self.update(index)
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> VhostResult<()> {
        let event = file.map(event_of);
        let call = &self.vring(usize::from(index))?.call;
        *call.event.lock().unwrap_or_else(PoisonError::into_inner) = event;
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, _file: Option<File>) -> VhostResult<()> {
        // Broken queues are counted and logged here; QEMU does nothing with the report.
        self.vring(usize::from(index)).map(|_| ())
    }

    fn get_protocol_features(&mut self) -> VhostResult<VhostUserProtocolFeatures> {
        let way_back = match has_way_back(self.device.kind()) {
            true => VhostUserProtocolFeatures::BACKEND_REQ,
            false => VhostUserProtocolFeatures::empty(),
        };
        Ok(way_back
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK)
    }

    fn set_protocol_features(&mut self, _features: u64) -> VhostResult<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> VhostResult<u64> {
        Ok(self.vrings.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> VhostResult<()> {
        self.vring(index as usize)?.enabled = enable;
        self.update(index as usize)
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> VhostResult<Vec<u8>> {
        // The size is bounded by that of a message, which the protocol layer has checked.
        let mut data = vec![0; size as usize];
        self.device.read_config(u64::from(offset), &mut data);
        Ok(data)
    }

    fn set_config(&mut self, offset: u32, data: &[u8], _flags: VhostUserConfigFlags) -> VhostResult<()> {
        self.device.write_config(u64::from(offset), data);
        Ok(())
    }

    // What follows belongs to protocol features that are not offered; the protocol layer lets none of it through.

    fn set_gpu_socket(&mut self, _backend: GpuBackend) -> VhostResult<()> {
        Err(NOT_OFFERED)
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> VhostResult<File> {
        Err(NOT_OFFERED)
    }

    fn get_inflight_fd(&mut self, _inflight: &VhostUserInflight) -> VhostResult<(VhostUserInflight, File)> {
        Err(NOT_OFFERED)
    }

    fn set_inflight_fd(&mut self, _inflight: &VhostUserInflight, _file: File) -> VhostResult<()> {
        Err(NOT_OFFERED)
    }

    fn get_max_mem_slots(&mut self) -> VhostResult<u64> {
        Err(NOT_OFFERED)
    }

    fn add_mem_region(
        &mut self,
        _region: &VhostUserSingleMemoryRegion,
        _file: File,
        _postcopy_listening: Option<bool>,
    ) -> VhostResult<Option<u64>> {
        Err(NOT_OFFERED)
    }

    fn remove_mem_region(&mut self, _region: &VhostUserSingleMemoryRegion) -> VhostResult<()> {
        Err(NOT_OFFERED)
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> VhostResult<Option<File>> {
        Err(NOT_OFFERED)
    }

    fn check_device_state(&mut self) -> VhostResult<()> {
        Err(NOT_OFFERED)
    }

    fn get_shmem_config(&mut self) -> VhostResult<VhostUserShMemConfig> {
        Err(NOT_OFFERED)
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> VhostResult<()> {
        Err(NOT_OFFERED)
    }
}

const NOT_OFFERED: VhostError = VhostError::InvalidOperation("a protocol feature that is not offered");
