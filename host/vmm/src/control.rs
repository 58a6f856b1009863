//! The conversation between the daemon and one `engine-vmm` process.
//!
//! One connected unix stream socket, inherited by `engine-vmm`; nothing is in the file system. Each message is a
//! frame (`u32` little-endian length, then that many bytes of JSON) and may carry file descriptors (`SCM_RIGHTS`),
//! attached to the frame's first byte. Reads never go past the frame they belong to, so descriptors that arrive
//! while a frame is read are that frame's.
//!
//! The daemon sends [`Command`]s, `engine-vmm` sends [`Event`]s:
//!
//! ```text
//! daemon                         engine-vmm
//!   Start(spec)             ->
//!                           <-   Stage … Stage, Running
//!   Connect{port} + 1 fd    ->
//!                           <-   Accepted{port} + 1 fd
//!                           <-   ResolversChanged
//!   Resolvers{resolv_conf}  ->
//!   Measure                 ->
//!                           <-   Measured(usage)
//!   GrowDisk{size_bytes}    ->
//!                           <-   DiskGrown{size_bytes} | DiskRefused{message}
//!   SetMemory{memory_mib}   ->
//!                           <-   MemorySet{memory_mib, started_mib} | MemoryRefused{message}
//!                           <-   DiskWaits{waits}
//!   Stop | Kill | end of file ->
//!                           <-   Stopped{reason}, end of file
//! ```
//!
//! End of file instead of `Stop` means that the daemon has died: the machine is powered off all the same.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use guest_protocol::forward::Header;

use crate::backend::Accelerator;
use crate::spec::MachineSpec;

/// The longest JSON in one frame. The largest message is `Stopped` with a console tail of some 16 KiB.
pub const FRAME_BYTES_MAX: usize = 256 * 1024;
/// The most file descriptors in one frame.
pub const FDS_MAX: usize = 4;

/// What the daemon asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Command {
    /// Boot this machine. The first message, sent once.
    Start(MachineSpec),
    /// Connect the one attached stream socket to this vsock port of the guest. Dropped if nobody listens there.
    Connect {
        /// The guest's port.
        port: u32,
        /// What the guest reads first, on a connection to a published port; one with a landing goes there instead.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        header: Option<Header>,
    },
    /// The host's name servers, in answer to [`Event::ResolversChanged`].
    Resolvers {
        /// What `/etc/resolv.conf` holds.
        resolv_conf: String,
    },
    /// What does the machine use? Answered by [`Event::Measured`].
    Measure,
    /// Make the data disk of the running machine larger. Answered by [`Event::DiskGrown`] or [`Event::DiskRefused`], in the
    /// order of asking.
    GrowDisk {
        /// What it is to have.
        size_bytes: u64,
    },
    /// Have the running machine use this much memory, or as near to that as its guest comes. Answered by
    /// [`Event::MemorySet`] or [`Event::MemoryRefused`], in the order of asking.
    SetMemory {
        /// All that it is to have, in MiB.
        memory_mib: u32,
    },
    /// Power off: ask the guest through its power port, kill it when that takes too long.
    Stop,
    /// End the machine at once.
    Kill,
}

/// What the machine tells.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// The start has reached this stage.
    Stage {
        /// What is being done, as a phrase for a progress line.
        name: String,
    },
    /// The processors run (the guest is booting).
    Running {
        /// The program or interface that runs the machine, such as `qemu`.
        backend: String,
        /// Why this back end and accelerator, as a sentence.
        reason: String,
        /// What executes the guest's instructions.
        accelerator: Accelerator,
    },
    /// The guest opened a vsock connection to this host port; the attached socket is its other end.
    Accepted {
        /// The host's port.
        port: u32,
    },
    /// `/etc/resolv.conf` has changed, and this process cannot open it: [`Command::Resolvers`] is wanted.
    ResolversChanged,
    /// The answer to [`Command::Measure`].
    Measured(Usage),
    /// The disk is as large as [`Command::GrowDisk`] wanted, and the guest's kernel has been told.
    DiskGrown {
        /// What it has.
        size_bytes: u64,
    },
    /// The disk is as large as it was.
    DiskRefused {
        /// Why it could not grow.
        message: String,
    },
    /// What became of [`Command::SetMemory`]. A guest that could not follow further may still do so.
    MemorySet {
        /// What the machine has now, in MiB.
        memory_mib: u64,
        /// What it was started with, which is the least that it can have.
        started_mib: u32,
    },
    /// The machine's memory is as it was.
    MemoryRefused {
        /// Why, as a clause.
        message: String,
    },
    /// There is no space left for the data disk's file, so what the guest writes waits; or it waits no more.
    DiskWaits {
        /// Whether it waits.
        waits: bool,
    },
    /// The machine has ended. The last message.
    Stopped {
        /// How.
        reason: StopReason,
    },
}

/// What a running machine uses of its host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// vsock streams in the device's table, from either side.
    pub open_streams: u64,
    /// Bytes of memory held for the guest: what it has touched and not given back.
    pub memory_held_bytes: Option<u64>,
    /// Bytes the guest has given back since it started; the same page counts every time. Only QEMU knows its own.
    pub memory_given_back_bytes: Option<u64>,
}

/// How a machine ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StopReason {
    /// The guest powered itself off (by itself or because it was asked to).
    PoweredOff,
    /// It was killed: by `Kill`, or because it did not power off in time.
    Killed,
    /// It could not be started, or ended in a way nobody asked for.
    Failed {
        /// What failed, at which stage.
        message: String,
        /// The last lines of the guest's console; empty if there were none.
        console_tail: String,
    },
}

/// Why a message could not be sent or received.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The socket failed.
    #[error("control channel failed")]
    Io(#[from] io::Error),
    /// A frame is longer than allowed.
    #[error("control message of {length} bytes is longer than the limit of {FRAME_BYTES_MAX}")]
    TooLong {
        /// Length of the frame.
        length: usize,
    },
    /// A frame holds something else than a message.
    #[error("control message is not understood")]
    Malformed(#[source] serde_json::Error),
    /// More descriptors than [`FDS_MAX`].
    #[error("control message carries more than {FDS_MAX} file descriptors")]
    TooManyFds,
}

/// One end of the conversation.
///
/// Sending and receiving block. [`split`](Self::split) gives the two directions to two threads.
#[derive(Debug)]
pub struct Channel {
    sender: Sender,
    receiver: Receiver,
}

/// The sending direction of a [`Channel`].
#[derive(Debug)]
pub struct Sender {
    stream: UnixStream,
}

/// The receiving direction of a [`Channel`].
#[derive(Debug)]
pub struct Receiver {
    stream: UnixStream,
}

impl Channel {
    /// Speaks over a connected stream socket.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        let sender = Sender { stream: stream.try_clone()? };
        Ok(Self { sender, receiver: Receiver { stream } })
    }

    /// Two ends that speak with each other.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (one, other) = UnixStream::pair()?;
        Ok((Self::new(one)?, Self::new(other)?))
    }

    /// Sends one message with its descriptors, which are duplicated for the receiver.
    pub fn send<T: Serialize>(&mut self, message: &T, fds: &[BorrowedFd<'_>]) -> Result<(), ControlError> {
        self.sender.send(message, fds)
    }

    /// Waits for one message; `None` when the other side has closed between two messages.
    pub fn receive<T: DeserializeOwned>(&mut self) -> Result<Option<(T, Vec<OwnedFd>)>, ControlError> {
        self.receiver.receive()
    }

    /// The two directions, for two threads.
    pub fn split(self) -> (Sender, Receiver) {
        (self.sender, self.receiver)
    }
}

impl Sender {
    /// Sends one message with its descriptors, which are duplicated for the receiver.
    pub fn send<T: Serialize>(&mut self, message: &T, fds: &[BorrowedFd<'_>]) -> Result<(), ControlError> {
        if fds.len() > FDS_MAX {
            return Err(ControlError::TooManyFds);
        }
        let mut frame = vec![0; 4];
        serde_json::to_writer(&mut frame, message).map_err(ControlError::Malformed)?;
        let length = frame.len() - 4;
        if length > FRAME_BYTES_MAX {
            return Err(ControlError::TooLong { length });
        }
        frame[..4].copy_from_slice(&(length as u32).to_le_bytes());
        let mut sent = 0;
        while sent < frame.len() {
            let fds = if sent == 0 { fds } else { &[] };
            sent += send_some(&self.stream, &frame[sent..], fds)?;
        }
        Ok(())
    }

    /// Bounds how long one `send` may wait for a receiver that does not read.
    pub fn set_timeout(&self, timeout: std::time::Duration) -> io::Result<()> {
        self.stream.set_write_timeout(Some(timeout))
    }

    /// Ends the conversation in both directions; a blocked [`Receiver::receive`] of either side returns.
    pub fn shutdown(&self) {
        if let Err(error) = self.stream.shutdown(std::net::Shutdown::Both) {
            tracing::debug!(%error, "the control channel was already closed");
        }
    }
}

impl Receiver {
    /// Waits for one message; `None` when the other side has closed between two messages.
    pub fn receive<T: DeserializeOwned>(&mut self) -> Result<Option<(T, Vec<OwnedFd>)>, ControlError> {
        let mut fds = Vec::new();
        let mut header = [0; 4];
        if !self.fill(&mut header, &mut fds)? {
            return Ok(None);
        }
        let length = u32::from_le_bytes(header) as usize;
        if length > FRAME_BYTES_MAX {
            return Err(ControlError::TooLong { length });
        }
        let mut body = vec![0; length];
        if length > 0 && !self.fill(&mut body, &mut fds)? {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        let message = serde_json::from_slice(&body).map_err(ControlError::Malformed)?;
        Ok(Some((message, fds)))
    }

    /// Fills `bytes`, collecting descriptors; `false` if the stream ended before the first byte.
    fn fill(&mut self, bytes: &mut [u8], fds: &mut Vec<OwnedFd>) -> Result<bool, ControlError> {
        let mut filled = 0;
        while filled < bytes.len() {
            match receive_some(&self.stream, &mut bytes[filled..], fds)? {
                0 if filled == 0 => return Ok(false),
                0 => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                count => filled += count,
            }
        }
        Ok(true)
    }
}

fn send_some(stream: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<usize, ControlError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    loop {
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(ControlError::TooManyFds);
        }
        match rustix::net::sendmsg(
            stream.as_fd(),
            &[IoSlice::new(bytes)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        ) {
            Err(rustix::io::Errno::INTR) => {}
            Ok(0) => return Err(io::Error::from(io::ErrorKind::WriteZero).into()),
            result => return Ok(result.map_err(io::Error::from)?),
        }
    }
}

fn receive_some(
    stream: &UnixStream,
    bytes: &mut [u8],
    fds: &mut Vec<OwnedFd>,
) -> Result<usize, ControlError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let slices = &mut [IoSliceMut::new(bytes)];
        match rustix::net::recvmsg(stream.as_fd(), slices, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            // A peer that died with unread bytes in its socket shows as a reset: an end of file to us.
            Err(rustix::io::Errno::CONNRESET) => return Ok(0),
            result => break result.map_err(io::Error::from)?,
        }
    };
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            fds.extend(received);
        }
    }
    if received.flags.contains(ReturnFlags::CTRUNC) || fds.len() > FDS_MAX {
        return Err(ControlError::TooManyFds);
    }
    Ok(received.bytes)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    fn events() -> Vec<Event> {
        vec![
            Event::Stage { name: "booting".into() },
            Event::Running { backend: "qemu".into(), reason: "no kvm".into(), accelerator: Accelerator::Tcg },
            Event::Accepted { port: 1024 },
            Event::Measured(Usage { open_streams: 2, memory_held_bytes: Some(1 << 40), ..Usage::default() }),
            Event::DiskGrown { size_bytes: 1 << 40 },
            Event::DiskRefused { message: "no".into() },
            Event::MemorySet { memory_mib: 1 << 33, started_mib: 512 },
            Event::MemoryRefused { message: "no".into() },
            Event::DiskWaits { waits: true },
            Event::Stopped { reason: StopReason::PoweredOff },
            Event::Stopped {
                reason: StopReason::Failed { message: "x".repeat(10), console_tail: "y\n".repeat(8000) },
            },
        ]
    }

    #[test]
    fn messages_arrive_in_order() {
        let (mut vmm, mut daemon) = Channel::pair().unwrap();
        let sender = std::thread::spawn(move || {
            for event in events() {
                vmm.send(&event, &[]).unwrap();
            }
        });
        for event in events() {
            let (received, fds) = daemon.receive::<Event>().unwrap().unwrap();
            assert_eq!(received, event);
            assert!(fds.is_empty());
        }
        sender.join().unwrap();
        assert!(daemon.receive::<Event>().unwrap().is_none());
    }

    #[test]
    fn descriptors_belong_to_their_own_message() {
        let (mut daemon, mut vmm) = Channel::pair().unwrap();
        let mut ours = Vec::new();
        for port in 0..20 {
            let (near, far) = UnixStream::pair().unwrap();
            daemon.send(&Command::Connect { port, header: None }, &[far.as_fd()]).unwrap();
            daemon.send(&Command::Stop, &[]).unwrap();
            ours.push(near);
        }
        for (port, near) in ours.iter_mut().enumerate() {
            let (command, fds) = vmm.receive::<Command>().unwrap().unwrap();
            assert_eq!(command, Command::Connect { port: port as u32, header: None });
            let [fd] = <[OwnedFd; 1]>::try_from(fds).unwrap();
            UnixStream::from(fd).write_all(&[port as u8]).unwrap();
            let mut byte = [0];
            near.read_exact(&mut byte).unwrap();
            assert_eq!(byte[0], port as u8);
            let (command, fds) = vmm.receive::<Command>().unwrap().unwrap();
            assert_eq!((command, fds.len()), (Command::Stop, 0));
        }
    }

    #[test]
    fn a_message_larger_than_the_socket_buffer_keeps_its_descriptor() {
        let (mut daemon, mut vmm) = Channel::pair().unwrap();
        let text = "z".repeat(FRAME_BYTES_MAX - 2);
        let (near, far) = UnixStream::pair().unwrap();
        let sender = std::thread::spawn(move || daemon.send(&text, &[far.as_fd()]).map(|()| text));
        let (received, fds) = vmm.receive::<String>().unwrap().unwrap();
        assert_eq!(received, sender.join().unwrap().unwrap());
        assert_eq!(fds.len(), 1);
        drop(fds);
        assert_eq!((&near).read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn long_messages_are_refused_on_both_sides() {
        let (mut daemon, vmm) = Channel::pair().unwrap();
        let error = daemon.send(&"z".repeat(FRAME_BYTES_MAX), &[]).unwrap_err();
        assert!(matches!(error, ControlError::TooLong { .. }));
        let (_sender, mut receiver) = vmm.split();
        daemon.sender.stream.write_all(&u32::MAX.to_le_bytes()).unwrap();
        let error = receiver.receive::<Command>().unwrap_err();
        assert!(matches!(error, ControlError::TooLong { length } if length == u32::MAX as usize));
    }

    #[test]
    fn too_many_descriptors_are_refused() {
        let (mut daemon, _vmm) = Channel::pair().unwrap();
        let stdin = io::stdin();
        let error = daemon.send(&Command::Stop, &[stdin.as_fd(); FDS_MAX + 1]).unwrap_err();
        assert!(matches!(error, ControlError::TooManyFds));
    }

    #[test]
    fn a_cut_message_is_an_error_and_nonsense_too() {
        for bytes in
            [&[9, 0][..], &[9, 0, 0, 0, b'"'][..], &[3, 0, 0, 0, b'a', b'b', b'c'][..], &[0, 0, 0, 0][..]]
        {
            let (mut daemon, mut vmm) = Channel::pair().unwrap();
            daemon.sender.stream.write_all(bytes).unwrap();
            drop(daemon);
            assert!(vmm.receive::<Command>().is_err(), "{bytes:?}");
        }
    }

    #[test]
    fn shutting_down_wakes_both_receivers() {
        let (daemon, mut vmm) = Channel::pair().unwrap();
        let (sender, mut receiver) = daemon.split();
        let waiting = std::thread::spawn(move || receiver.receive::<Event>().unwrap().is_none());
        sender.shutdown();
        assert!(waiting.join().unwrap());
        assert!(vmm.receive::<Command>().unwrap().is_none());
    }
}
