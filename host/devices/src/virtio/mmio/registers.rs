//! The machine behind the window: status, features, queues.

use std::sync::Arc;
use std::time::Instant;

use tracing::warn;
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::line::{CONFIG_CHANGED, Line, USED};
use super::saved::{RestoreError, SaveError, SavedQueue, SavedTransport};
use crate::throttle::Throttle;
use crate::virtio::device::{DeviceError, Interrupt, Memory, QueueResources, VirtioDevice};
use crate::virtio::ring::{self, Addresses};

// Offsets of the registers (virtio 1.3 §4.2.2).
const MAGIC: u64 = 0x000;
const VERSION: u64 = 0x004;
const DEVICE_ID: u64 = 0x008;
const VENDOR_ID: u64 = 0x00c;
const DEVICE_FEATURES: u64 = 0x010;
const DEVICE_FEATURES_PAGE: u64 = 0x014;
const DRIVER_FEATURES: u64 = 0x020;
const DRIVER_FEATURES_PAGE: u64 = 0x024;
const QUEUE_SELECT: u64 = 0x030;
const QUEUE_SIZE_MAX: u64 = 0x034;
const QUEUE_SIZE: u64 = 0x038;
const QUEUE_READY: u64 = 0x044;
pub(super) const QUEUE_NOTIFY: u64 = 0x050;
pub(super) const INTERRUPT_STATUS: u64 = 0x060;
pub(super) const INTERRUPT_ACK: u64 = 0x064;
const STATUS: u64 = 0x070;
const QUEUE_DESCRIPTORS_LOW: u64 = 0x080;
const QUEUE_DESCRIPTORS_HIGH: u64 = 0x084;
const QUEUE_AVAILABLE_LOW: u64 = 0x090;
const QUEUE_AVAILABLE_HIGH: u64 = 0x094;
const QUEUE_USED_LOW: u64 = 0x0a0;
const QUEUE_USED_HIGH: u64 = 0x0a4;
const SHARED_MEMORY_LENGTH_LOW: u64 = 0x0b0;
const SHARED_MEMORY_BASE_HIGH: u64 = 0x0bc;
const CONFIG_GENERATION: u64 = 0x0fc;
pub(super) const CONFIG: u64 = 0x100;

/// "virt", little-endian.
const MAGIC_VALUE: u32 = 0x7472_6976;
/// "engn", little-endian.
const VENDOR: u32 = 0x6e67_6e65;

const FEATURES_OK: u32 = VIRTIO_CONFIG_S_FEATURES_OK;
const DRIVER_OK: u32 = VIRTIO_CONFIG_S_DRIVER_OK;
const FAILED: u32 = VIRTIO_CONFIG_S_FAILED;
/// What a driver may set at any time.
const ANY_TIME: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER | FAILED;

/// The registers of one queue.
#[derive(Clone, Copy, Default)]
struct QueueRegisters {
    size: u32,
    addresses: Addresses,
    ready: bool,
    running: bool,
    /// Where it starts.
    position: Position,
}

/// Where a queue goes on: the next entries of its rings.
#[derive(Clone, Copy, Default)]
struct Position {
    available: u16,
    used: u16,
}

pub(super) struct Registers {
    device: Box<dyn VirtioDevice>,
    memory: Memory,
    line: Arc<Line>,
    kicks: Arc<[EventFd]>,
    status: u32,
    device_features_page: u32,
    driver_features_page: u32,
    driver_features: [u32; 4],
    selected_queue: u32,
    queues: Vec<QueueRegisters>,
    /// No queue runs until the device goes on.
    paused: bool,
    /// Changes of configuration space before the device was restored.
    config_generations: u32,
    throttle: Throttle,
}

impl Registers {
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: Memory,
        line: Arc<Line>,
        kicks: Arc<[EventFd]>,
    ) -> Self {
        let queues = vec![QueueRegisters::default(); device.queue_sizes().len()];
        Self {
            device,
            memory,
            line,
            kicks,
            status: 0,
            device_features_page: 0,
            driver_features_page: 0,
            driver_features: [0; 4],
            selected_queue: 0,
            queues,
            paused: false,
            config_generations: 0,
            throttle: Throttle::default(),
        }
    }

    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.device.read_config(offset, data);
    }

    pub fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.device.write_config(offset, data);
    }

    pub fn read(&self, offset: u64) -> u32 {
        match offset {
            MAGIC => MAGIC_VALUE,
            VERSION => 2,
            DEVICE_ID => self.device.kind().id(),
            VENDOR_ID => VENDOR,
            DEVICE_FEATURES => match self.device_features_page {
                0 => self.device.features() as u32,
                1 => (self.device.features() >> 32) as u32,
                _ => 0,
            },
            QUEUE_SIZE_MAX => self.maximum().map_or(0, u32::from),
            QUEUE_READY => self.queue().is_some_and(|queue| queue.ready).into(),
            STATUS => self.status(),
            // There is no shared memory: its length and its base read as all ones (§4.2.2).
            SHARED_MEMORY_LENGTH_LOW..=SHARED_MEMORY_BASE_HIGH => u32::MAX,
            CONFIG_GENERATION => self.config_generation(),
            _ => 0,
        }
    }

    pub fn write(&mut self, offset: u64, value: u32) {
        match offset {
            DEVICE_FEATURES_PAGE => self.device_features_page = value,
            DRIVER_FEATURES_PAGE => self.driver_features_page = value,
            DRIVER_FEATURES if self.status & FEATURES_OK == 0 => {
                // There are no features beyond the last page to take or leave.
                if let Some(page) = self.driver_features.get_mut(self.driver_features_page as usize) {
                    *page = value;
                }
            }
            QUEUE_SELECT => self.selected_queue = value,
            QUEUE_READY => self.set_ready(value),
            STATUS if value == 0 => self.reset(),
            STATUS => self.set_status(value),
            _ => self.set_up_queue(offset, value),
        }
    }

    /// Settings of the selected queue, as long as it is not ready.
    fn set_up_queue(&mut self, offset: u64, value: u32) {
        let selected = self.selected_queue as usize;
        let Some(queue) = self.queues.get_mut(selected).filter(|queue| !queue.ready) else { return };
        let addresses = &mut queue.addresses;
        match offset {
            QUEUE_SIZE => queue.size = value,
            QUEUE_DESCRIPTORS_LOW => set_low(&mut addresses.descriptors, value),
            QUEUE_DESCRIPTORS_HIGH => set_high(&mut addresses.descriptors, value),
            QUEUE_AVAILABLE_LOW => set_low(&mut addresses.available, value),
            QUEUE_AVAILABLE_HIGH => set_high(&mut addresses.available, value),
            QUEUE_USED_LOW => set_low(&mut addresses.used, value),
            QUEUE_USED_HIGH => set_high(&mut addresses.used, value),
            _ => {}
        }
    }

    fn config_generation(&self) -> u32 {
        self.config_generations.wrapping_add(self.device.config_generation())
    }

    fn maximum(&self) -> Option<u16> {
        self.device.queue_sizes().get(self.selected_queue as usize).copied()
    }

    fn queue(&self) -> Option<&QueueRegisters> {
        self.queues.get(self.selected_queue as usize)
    }

    fn status(&self) -> u32 {
        match self.line.is_broken() {
            true => self.status | VIRTIO_CONFIG_S_NEEDS_RESET,
            false => self.status,
        }
    }

    fn set_status(&mut self, value: u32) {
        let mut added = value & ANY_TIME;
        if value & FEATURES_OK != 0 && self.status & FEATURES_OK == 0 && self.accept_features() {
            added |= FEATURES_OK;
        }
        if value & DRIVER_OK != 0 && (self.status | added) & FEATURES_OK != 0 {
            added |= DRIVER_OK;
        }
        self.status |= added;
        for index in 0..self.queues.len() {
            self.update(index);
        }
    }

    /// Whether the driver's features are some of those offered. If so they hold from now on.
    fn accept_features(&mut self) -> bool {
        let accepted = self.taken_features();
        let offered = self.device.features();
        let acceptable = accepted & !u128::from(offered) == 0 && accepted & (1 << VIRTIO_F_VERSION_1) != 0;
        if acceptable {
            self.device.ack_features(accepted as u64);
        }
        acceptable
    }

    fn taken_features(&self) -> u128 {
        self.driver_features.iter().rev().fold(0, |features, page| features << 32 | u128::from(*page))
    }

    fn set_ready(&mut self, value: u32) {
        let index = self.selected_queue as usize;
        let Some(queue) = self.queues.get_mut(index) else { return };
        queue.ready = value == 1;
        queue.position = Position::default();
        if queue.ready && self.start_state(index).is_err() {
            self.queues[index].ready = false;
            self.fail(index, &"its size or an address is none a queue can have");
        }
        self.update(index);
    }

    /// Brings one queue of the model to where the registers want it.
    fn update(&mut self, index: usize) {
        let queue = self.queues[index];
        let wanted = queue.ready && self.status & DRIVER_OK != 0 && self.status & FAILED == 0 && !self.paused;
        match (wanted, queue.running) {
            (true, false) => match self.start_state(index) {
                Ok(queue) => self.start(index, queue),
                Err(error) => self.fail(index, &error),
            },
            (false, true) => {
                self.device.stop_queue(index);
                self.queues[index].running = false;
                self.queues[index].position = Position::default();
            }
            _ => {}
        }
    }

    /// The queue as the driver has set it up, from where it is.
    fn start_state(&self, index: usize) -> Result<Queue, virtio_queue::Error> {
        let maximum = self.device.queue_sizes()[index];
        let registers = self.queues[index];
        let size = u16::try_from(registers.size).map_err(|_| virtio_queue::Error::InvalidSize)?;
        let event_idx = self.taken_features() & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let mut queue = ring::queue(maximum, size, registers.addresses, event_idx)?;
        queue.set_next_avail(registers.position.available);
        queue.set_next_used(registers.position.used);
        Ok(queue)
    }

    fn start(&mut self, index: usize, queue: Queue) {
        let kind = self.device.kind();
        let started = self.kicks[index]
            .try_clone()
            .map_err(|source| DeviceError::Watch { kind, index, source })
            .and_then(|kick| {
                let interrupt = Arc::clone(&self.line) as Arc<dyn Interrupt>;
                let resources = QueueResources { memory: self.memory.clone(), queue, kick, interrupt };
                self.device.start_queue(index, resources)
            });
        match started {
            Ok(()) => self.queues[index].running = true,
            Err(error) => self.fail(index, &error),
        }
    }

    /// Notes that a queue cannot work, which only a reset mends.
    fn fail(&mut self, index: usize, why: &dyn std::fmt::Display) {
        if let Some(suppressed) = self.throttle.admit(Instant::now()) {
            warn!(device = %self.device.kind(), queue = index, suppressed, %why, "a queue cannot be started");
        }
        match self.status & DRIVER_OK {
            // A driver that is not ready must not be interrupted (§2.1.2).
            0 => self.line.mark_broken(),
            _ => self.line.needs_reset(),
        }
    }

    fn reset(&mut self) {
        self.device.reset();
        self.status = 0;
        self.device_features_page = 0;
        self.driver_features_page = 0;
        self.driver_features = [0; 4];
        self.selected_queue = 0;
        self.queues.fill(QueueRegisters::default());
        self.line.reset();
    }

    pub fn save(&mut self) -> Result<SavedTransport, SaveError> {
        let kind = self.device.kind();
        let model = self.pause().and_then(|()| self.device.save()).map_err(|source| {
            self.resume();
            SaveError { kind, source }
        })?;
        let queue = |registers: &QueueRegisters| SavedQueue {
            size: registers.size,
            addresses: registers.addresses,
            ready: registers.ready,
            next_available: registers.position.available,
            next_used: registers.position.used,
        };
        Ok(SavedTransport {
            device: kind.id(),
            status: self.status(),
            interrupt_status: self.line.pending(),
            device_features_page: self.device_features_page,
            driver_features_page: self.driver_features_page,
            driver_features: self.driver_features,
            selected_queue: self.selected_queue,
            queues: self.queues.iter().map(queue).collect(),
            config_generation: self.config_generation(),
            model,
        })
    }

    /// Stops all queues where they are.
    fn pause(&mut self) -> Result<(), DeviceError> {
        self.paused = true;
        for (index, registers) in self.queues.iter_mut().enumerate().filter(|(_, queue)| queue.running) {
            let stopped = self.device.stop_queue(index);
            let state = stopped.ok_or(DeviceError::Gone { kind: self.device.kind() })?;
            registers.running = false;
            registers.position = Position { available: state.next_avail, used: state.next_used };
        }
        Ok(())
    }

    /// Starts them again.
    pub fn resume(&mut self) {
        self.paused = false;
        for index in 0..self.queues.len() {
            self.update(index);
        }
    }

    /// Takes on a saved state; `self` is as it was made.
    pub fn restore(&mut self, saved: &SavedTransport) -> Result<(), RestoreError> {
        let kind = self.device.kind();
        if saved.device != kind.id() {
            return Err(RestoreError::OtherDevice { kind, saved: saved.device });
        }
        let count = self.queues.len();
        if saved.queues.len() != count {
            return Err(RestoreError::OtherQueues { kind, saved: saved.queues.len(), count });
        }
        self.driver_features = saved.driver_features;
        let missing = self.taken_features() & !u128::from(self.device.features());
        let negotiated = saved.status & FEATURES_OK != 0;
        if negotiated && missing != 0 {
            return Err(RestoreError::Features { kind, features: missing });
        }
        let impossible = |what| Err(RestoreError::Impossible { kind, what });
        if saved.status & !(ANY_TIME | FEATURES_OK | DRIVER_OK | VIRTIO_CONFIG_S_NEEDS_RESET) != 0 {
            return impossible("its status has a bit that is none");
        }
        if negotiated && self.taken_features() & (1 << VIRTIO_F_VERSION_1) == 0 {
            return impossible("its driver is a legacy one");
        }
        if saved.status & DRIVER_OK != 0 && !negotiated {
            return impossible("its driver has agreed to no features");
        }
        if saved.interrupt_status & !(USED | CONFIG_CHANGED) != 0 {
            return impossible("its interrupt has a reason that is none");
        }
        for (registers, saved) in self.queues.iter_mut().zip(&saved.queues) {
            let position = Position { available: saved.next_available, used: saved.next_used };
            let SavedQueue { size, addresses, ready, .. } = *saved;
            *registers = QueueRegisters { size, addresses, ready, running: false, position };
        }
        if (0..count).any(|index| self.queues[index].ready && self.start_state(index).is_err()) {
            return impossible("a queue has a size or an address that none can have");
        }
        self.device.restore(&saved.model).map_err(|source| RestoreError::Model { kind, source })?;
        if negotiated {
            self.device.ack_features(self.taken_features() as u64);
        }
        self.status = saved.status & (ANY_TIME | FEATURES_OK | DRIVER_OK);
        self.device_features_page = saved.device_features_page;
        self.driver_features_page = saved.driver_features_page;
        self.selected_queue = saved.selected_queue;
        // Whatever the driver has read half of it reads again.
        self.config_generations = saved.config_generation.wrapping_add(1);
        if saved.status & VIRTIO_CONFIG_S_NEEDS_RESET != 0 {
            self.line.mark_broken();
        }
        self.resume();
        // An interrupt that the driver has not acknowledged comes again: its edge is lost with the old machine.
        let told = if self.status & DRIVER_OK == 0 { 0 } else { CONFIG_CHANGED };
        if saved.interrupt_status | told != 0 {
            let _untold = self.line.raise(saved.interrupt_status | told);
        }
        Ok(())
    }
}

fn set_low(address: &mut u64, value: u32) {
    *address = *address & !0xffff_ffff | u64::from(value);
}

fn set_high(address: &mut u64, value: u32) {
    *address = *address & 0xffff_ffff | u64::from(value) << 32;
}
