//! The network card: QEMU's virtio-net on one end of a frame socket, the user-space NAT on the other.

use std::error::Error;
use std::os::unix::net::UnixStream;

use host_hypervisor::qemu::Device;

use super::{Attached, Context, Plug};

/// Locally administered; alone on its link, so the same for every machine.
const MAC: [u8; 6] = [0x02, 0x65, 0x6e, 0x67, 0x00, 0x02];

pub(super) struct Attachment;

struct Net(host_net::Handle);

impl super::Attachment for Attachment {
    fn name(&self) -> &'static str {
        "net"
    }

    fn attach(
        self: Box<Self>,
        context: &mut Context<'_>,
    ) -> Result<Box<dyn Attached>, Box<dyn Error + Send + Sync>> {
        let Plug::Qemu(qemu) = &mut context.plug else {
            return Err("a machine in this process has no network device; QEMU must run it".into());
        };
        let (ours, theirs) = UnixStream::pair()?;
        let fd = qemu.fds.pass(theirs);
        qemu.devices.push(Device::Network { fd, mac: MAC });
        Ok(Box::new(Net(host_net::spawn(ours, host_net::Config::default())?)))
    }
}

impl Attached for Net {
    fn name(&self) -> &'static str {
        "net"
    }

    fn has_ended(&self) -> bool {
        self.0.is_finished()
    }

    fn detach(self: Box<Self>) {
        self.0.stop();
    }
}
