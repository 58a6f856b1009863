//! The network card: on one end of a frame socket, with the user-space NAT on the other.

use std::error::Error;
use std::os::unix::net::UnixStream;

use host_devices::virtio::net::{Backend, Net as Card};
use host_hypervisor::qemu::Device;
use host_net::{Asked, Config};

use super::{Attached, Context, Plug};
use crate::confine::{Class, Confinement};
use crate::machine::Signal;

/// Locally administered; alone on its link, so the same for every machine.
const MAC: [u8; 6] = [0x02, 0x65, 0x6e, 0x67, 0x00, 0x02];

pub(super) struct Attachment {
    /// What the host's `resolv.conf` holds. The NAT may not open it.
    resolv_conf: String,
}

impl Attachment {
    pub(super) fn new() -> Self {
        // Without one the resolver on this host is asked.
        Self { resolv_conf: std::fs::read_to_string(Config::default().resolv_conf).unwrap_or_default() }
    }
}

struct Net {
    nat: host_net::Handle,
    card: Box<dyn Attached>,
}

impl super::Attachment for Attachment {
    fn name(&self) -> &'static str {
        "net"
    }

    fn confinement(&self) -> Confinement {
        Confinement::without_files(Class::Network)
    }

    fn attach(
        self: Box<Self>,
        context: &mut Context<'_>,
    ) -> Result<Box<dyn Attached>, Box<dyn Error + Send + Sync>> {
        let (ours, theirs) = UnixStream::pair()?;
        let config = Config { offloads: true, ..Config::default() };
        let mtu = config.mtu;
        let card = Box::new(Card::new(Backend { stream: theirs, offloads: true, mac: MAC, mtu })?);
        let card = match &mut context.plug {
            Plug::Qemu(qemu) => {
                qemu.serve_card("net", card, |name| Device::VhostUserNet { name, mac: MAC, mtu })?
            }
            Plug::InProcess(machine) => machine.serve("net", card)?,
        };
        let signals = context.signals.clone();
        // Nobody is left to tell only when the machine ends.
        let ask = Box::new(move || drop(signals.send(Signal::ResolversChanged)));
        let nat = host_net::spawn_asking(ours, config, Some(Asked { text: self.resolv_conf, ask }))?;
        context.resolvers = Some(nat.teller());
        context.opener = Some(nat.opener());
        Ok(Box::new(Net { nat, card }))
    }
}

impl Attached for Net {
    fn name(&self) -> &'static str {
        "net"
    }

    fn fault(&self) -> Option<String> {
        let nat = || self.nat.is_finished().then(|| "the thread of its NAT has ended".into());
        self.card.fault().or_else(nat)
    }

    fn detach(self: Box<Self>) {
        self.nat.stop();
        self.card.detach();
    }
}
