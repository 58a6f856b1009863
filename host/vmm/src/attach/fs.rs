//! The file system device: requests of the guest's kernel on one side, the server of shared folders on the other.

use std::error::Error;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::Receiver;

use guest_protocol::share;
use host_devices::virtio::VirtioDevice;
use host_devices::virtio::buffers::Buffers;
use host_devices::virtio::fs::{Backend, Fs};
use host_fs::{
    CachePolicy, ExportSpec, HEADER_BYTES, Owners, Payload, REQUEST_BYTES_MAX, Reply, Room, Saved, Server,
    WRITE_HEAD_BYTES,
};
use host_hypervisor::qemu::Device;
use rustix::process::{Resource, getrlimit};

use super::{Attached, Context};
use crate::confine::{Class, Confinement, Files};
use crate::spec::ShareSpec;

/// Length of the header of an answer (`fuse_out_header`).
const ANSWER_HEADER_BYTES: usize = 16;
/// So much of a request tells its kind.
const KIND_BYTES: usize = 8;
/// The most files that are open for the guest.
const DESCRIPTORS_MAX: usize = 1 << 18;

pub(super) struct Attachment {
    shares: Vec<ShareSpec>,
    descriptors_max: usize,
}

impl Attachment {
    /// Asks the process for its limit, which a confined thread may not.
    pub fn new(shares: Vec<ShareSpec>) -> Self {
        Self { shares, descriptors_max: descriptors_max() }
    }
}

impl super::Attachment for Attachment {
    fn name(&self) -> &'static str {
        "fs"
    }

    fn confinement(&self) -> Confinement {
        let none = Files::default();
        let files = self.shares.iter().fold(none, |files, share| files.sharing(&share.path, share.read_only));
        Confinement { class: Class::Files, files }
    }

    fn attach(
        self: Box<Self>,
        context: &mut Context<'_>,
    ) -> Result<Box<dyn Attached>, Box<dyn Error + Send + Sync>> {
        let server = Server::new(self.descriptors_max);
        for ShareSpec { name, path, read_only } in self.shares {
            let spec = ExportSpec {
                name,
                path,
                read_only,
                cache: CachePolicy::default(),
                owners: Owners::of_process(),
            };
            // The machine is of use without it, and a container that wants it is told.
            if let Err(error) = server.add(spec) {
                let source = error.source().map(tracing::field::display);
                tracing::warn!(%error, source, "a folder is not shared");
            }
        }
        let server = Arc::new(server);
        if let Some(streams) = context.followers.take() {
            let server = Arc::clone(&server);
            // It ends with the vsock device, which has the other end.
            std::thread::Builder::new().name("fs-changes".into()).spawn(move || follow(&server, &streams))?;
        }
        let device = Fs::new(share::TAG, Arc::new(Requests(server)))?;
        let queue_size = device.queue_sizes().iter().copied().min().unwrap_or(1);
        context.plug.serve("fs", device, |fd| Device::VhostUserFs { fd, tag: share::TAG, queue_size })
    }
}

/// Tells the guest what changes on the host, whenever it wants to hear of it.
fn follow(server: &Server, streams: &Receiver<OwnedFd>) {
    while let Ok(stream) = streams.recv() {
        if let Err(error) = server.follow(&stream) {
            let source = error.source().map(tracing::field::display);
            tracing::warn!(%error, source, "containers are not told what changes in shared folders");
        }
    }
}

/// Half of what the process may have open, so that connections always find some; more than the kernel likes to keep is no use.
fn descriptors_max() -> usize {
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    usize::try_from(limit / 2).map_or(DESCRIPTORS_MAX, |half| half.min(DESCRIPTORS_MAX))
}

/// Gives requests to the server and its answers to the guest.
struct Requests(Arc<Server>);

impl Backend for Requests {
    fn is_slow(&self, readable: &Buffers<'_>) -> bool {
        let mut kind = [0; KIND_BYTES];
        let count = readable.peek(&mut kind);
        host_fs::is_slow(&kind[..count])
    }

    fn serve(&self, mut readable: Buffers<'_>, mut writable: Buffers<'_>) -> u32 {
        let mut kind = [0; KIND_BYTES];
        let count = readable.peek(&mut kind);
        let length = match host_fs::is_write(&kind[..count]) {
            true => readable.len().min(WRITE_HEAD_BYTES),
            false => readable.len().min(REQUEST_BYTES_MAX),
        };
        let mut request = vec![0; length];
        let count = readable.copy_out(&mut request);
        request.truncate(count);
        let mut header = writable.split_front(ANSWER_HEADER_BYTES);
        let reply = match request.len() < HEADER_BYTES {
            true => Reply::None,
            false => self.0.handle(&request, &mut Data(readable), &mut Space(&mut writable)),
        };
        if header.len() < ANSWER_HEADER_BYTES {
            return 0;
        }
        let (error, length) = match reply {
            Reply::None => return 0,
            Reply::Error(error) => (-error.raw_os_error(), 0),
            Reply::Bytes(bytes) => (0, writable.copy_in(&bytes)),
            Reply::Data(length) => (0, length),
        };
        let total = (ANSWER_HEADER_BYTES + length) as u32;
        let mut answer = [0; ANSWER_HEADER_BYTES];
        answer[..4].copy_from_slice(&total.to_le_bytes());
        answer[4..8].copy_from_slice(&i32::to_le_bytes(error));
        // The number that the kernel finds its request by.
        answer[8..].copy_from_slice(&request[8..16]);
        header.copy_in(&answer);
        total
    }

    fn reset(&self) {
        self.0.reset();
    }

    fn save(&self) -> Result<Vec<u8>, String> {
        let saved =
            self.0.save().map_err(|error| format!("what the guest has open cannot be told ({error})"))?;
        serde_json::to_vec(&saved)
            .map_err(|error| format!("what the guest knows cannot be written ({error})"))
    }

    fn restore(&self, state: &[u8]) -> Result<(), String> {
        let saved = serde_json::from_slice::<Saved>(state)
            .map_err(|error| format!("what the guest knew cannot be read ({error})"))?;
        self.0.restore(&saved).map_err(|error| error.to_string())
    }
}

/// A write's data in guest memory.
struct Data<'a>(Buffers<'a>);

impl Payload for Data<'_> {
    fn remaining(&self) -> usize {
        self.0.len()
    }

    fn write_at(&mut self, file: BorrowedFd<'_>, offset: u64) -> io::Result<usize> {
        self.0.write_at(file, offset)
    }
}

/// Room for an answer in guest memory.
struct Space<'a, 'b>(&'a mut Buffers<'b>);

impl Room for Space<'_, '_> {
    fn remaining(&self) -> usize {
        self.0.len()
    }

    fn read_at(&mut self, file: BorrowedFd<'_>, offset: u64, count: usize) -> io::Result<usize> {
        self.0.truncate(count);
        self.0.read_at(file, offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_guest_knows_goes_with_a_saved_machine() {
        let requests = || Requests(Arc::new(Server::new(16)));
        let saved = requests().save().unwrap();
        requests().restore(&saved).unwrap();
        let error = requests().restore(b"{}").unwrap_err();
        assert!(error.starts_with("what the guest knew cannot be read (missing field"), "{error}");
        let made_up = br#"{"devices":[],"files":[],"last_file":1,"handles":[{"number":1,"file":1,"flags":null}],"last_handle":0}"#;
        let error = requests().restore(made_up).unwrap_err();
        assert!(error.ends_with("an open file has a number that was never given"), "{error}");
    }
}
