//! What every device with a thread of its own answers its transport in the same way: features, configuration space,
//! and queues handed to the thread.
//!
//! A device brings its [`Front`] and is a [`VirtioDevice`] by that.

use std::io;

use mio::Registry;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::virtio::config::ConfigSpace;
use crate::virtio::device::{DeviceError, DeviceKind, DeviceState, QueueResources, QueueState, VirtioDevice};
use crate::virtio::life::Life;
use crate::virtio::worker::{Mailbox, Model, Worker};

/// What all devices offer: the current standard, and what `virtio-queue` does for every ring.
const COMMON_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;

/// The transport's side of a device whose thread takes messages `M`.
pub struct Front<M> {
    kind: DeviceKind,
    features: u64,
    queue_sizes: Vec<u16>,
    config: ConfigSpace,
    worker: Worker<M>,
}

impl<M: Send + 'static> Front<M> {
    /// Starts the device's thread, named after its kind, with the model that `build` makes. `features` are those of
    /// this kind of device.
    pub(crate) fn spawn<T: Model<Message = M>>(
        kind: DeviceKind,
        features: u64,
        queue_sizes: Vec<u16>,
        config: ConfigSpace,
        build: impl FnOnce(Registry) -> T,
    ) -> io::Result<Self> {
        Self::try_spawn(kind, features, queue_sizes, config, |registry| Ok(build(registry)))
    }

    /// The same as [`Self::spawn`], for a model that may not come about.
    pub(crate) fn try_spawn<T: Model<Message = M>>(
        kind: DeviceKind,
        features: u64,
        queue_sizes: Vec<u16>,
        config: ConfigSpace,
        build: impl FnOnce(Registry) -> io::Result<T>,
    ) -> io::Result<Self> {
        let worker = Worker::spawn(kind, &kind.to_string(), queue_sizes.len(), build)?;
        Ok(Self { kind, features: COMMON_FEATURES | features, queue_sizes, config, worker })
    }

    /// Sends messages to the thread.
    pub(crate) fn mailbox(&self) -> Mailbox<M> {
        self.worker.mailbox()
    }
}

/// A device that answers by its front.
pub trait Threaded: Send {
    /// What its thread takes beside the transport's verbs.
    type Message: Send + 'static;

    /// The transport's side of it.
    fn front(&self) -> &Front<Self::Message>;
}

impl<T: Threaded> VirtioDevice for T {
    fn kind(&self) -> DeviceKind {
        self.front().kind
    }

    fn features(&self) -> u64 {
        self.front().features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.front().queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.front().config.read(offset, data);
    }

    fn config_generation(&self) -> u32 {
        self.front().config.generation()
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.front().config.write(offset, data);
    }

    fn ack_features(&mut self, features: u64) {
        self.front().worker.ack_features(features);
    }

    fn start_queue(&mut self, index: usize, resources: QueueResources) -> Result<(), DeviceError> {
        self.front().worker.start_queue(index, resources)
    }

    fn stop_queue(&mut self, index: usize) -> Option<QueueState> {
        self.front().worker.stop_queue(index)
    }

    fn reset(&mut self) {
        self.front().worker.reset();
        self.front().config.reset();
    }

    fn life(&self) -> Life {
        self.front().worker.life()
    }

    fn save(&self) -> Result<DeviceState, DeviceError> {
        let model = self.front().worker.save()?;
        Ok(DeviceState { config: self.front().config.bytes(), model })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceError> {
        let Front { kind, config, worker, .. } = self.front();
        let (saved, length) = (state.config.len(), config.bytes().len());
        if saved != length {
            let reason = format!("its configuration space has {saved} bytes, not {length}");
            return Err(DeviceError::InvalidState { kind: *kind, reason });
        }
        worker.restore(state.clone())?;
        config.restore(&state.config);
        Ok(())
    }
}
