//! QEMU's command line, as a pure function of what the machine is.

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::PathBuf;

use crate::Accelerator;

/// A machine as QEMU is told about it. Descriptors are numbers in QEMU's process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// What executes instructions.
    pub accelerator: Accelerator,
    /// Number of processors.
    pub cpus: u32,
    /// Memory in MiB; shared with the device models through a memfd.
    pub memory_mib: u32,
    /// The kernel image.
    pub kernel: PathBuf,
    /// The initial root file system.
    pub initramfs: PathBuf,
    /// The kernel's command line.
    pub cmdline: String,
    /// The devices, in the order of their PCI slots.
    pub devices: Vec<Device>,
    /// Stream socket on which QEMU speaks its monitor protocol.
    pub monitor: Option<RawFd>,
}

/// One device of a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Device {
    /// The serial console, on a stream socket.
    Serial {
        /// QEMU's end.
        fd: RawFd,
    },
    /// Random numbers for the guest.
    Rng,
    /// A balloon by which the guest gives free memory back.
    Balloon,
    /// A block device served over vhost-user.
    VhostUserBlock {
        /// QEMU's end of the vhost-user socket.
        fd: RawFd,
        /// Number of request queues.
        queues: u16,
        /// Entries per queue.
        queue_size: u16,
    },
    /// A vsock device served over vhost-user.
    VhostUserVsock {
        /// QEMU's end of the vhost-user socket.
        fd: RawFd,
    },
    /// A file system device served over vhost-user.
    VhostUserFs {
        /// QEMU's end of the vhost-user socket.
        fd: RawFd,
        /// What the guest mounts it by.
        tag: &'static str,
        /// Entries per queue.
        queue_size: u16,
    },
    /// A network card served over vhost-user. QEMU connects to it by itself.
    VhostUserNet {
        /// The abstract name of the vhost-user socket.
        name: String,
        /// The card's address.
        mac: [u8; 6],
        /// The largest packet on the link.
        mtu: u16,
    },
}

/// Translation buffer of the software processor: QEMU's own default grows to 1 GiB.
const TRANSLATION_MIB: u32 = 256;

/// What the software processor adds to the kernel's command line: boot on one processor (the agent turns the others on),
/// and do without `cmpxchg16b`.
///
/// The kernel patches its own code while it boots (jump labels: a breakpoint first, then the rest, then the first byte).
/// QEMU before 8.1 does not lock a page that it translates, so a thread that translates the breakpoint while another
/// processor's thread replaces it keeps a stale breakpoint for ever, and the kernel dies of it: `Oops: int3`. Most
/// patching is over when the boot is, and most code has been translated then.
///
/// `cmpxchg16b` leaves its flags in what an earlier instruction took apart differently (7.2: the helper reads the kind of
/// the last flags, which is not written before it is called). Where an interrupt comes right after, the address of a free
/// object is saved for the flags, and the kernel dies of returning to it: `Fatal exception in interrupt`, out of its
/// allocator. Programs in containers still see the instruction; distributions of today ask for it.
pub const TCG_CMDLINE: &str = " maxcpus=1 clearcpuid=cx16";

/// The software processor: all it knows but fast string instructions, which it executes byte by byte. A kernel that does not
/// see them copies and clears eight bytes at a time; a file in memory is read four times as fast (measured with 7.2).
const CPU_TCG: &str = "max,-erms";

/// What a network card of ours is told for the software processor: an interrupt line, and no vectors. QEMU (7.2 at least)
/// dies of it when a driver unmasks a vector of a card that is served over vhost-user and there is no KVM
/// (`kvm_virtio_pci_irqfd_use` of a null pointer).
const CARD_VECTORS_TCG: &str = ",vectors=0";

/// The arguments after the program's name.
pub fn arguments(machine: &Machine) -> Vec<OsString> {
    let mut line = CommandLine(Vec::new());
    line.flag("-no-user-config").flag("-nodefaults").flag("-no-reboot");
    line.option("-display", "none");
    line.option("-machine", "q35,memory-backend=memory,dump-guest-core=off,smbus=off,sata=off,vmport=off");
    line.option(
        "-accel",
        match machine.accelerator {
            Accelerator::Kvm => "kvm".into(),
            Accelerator::Tcg => format!("tcg,thread=multi,tb-size={TRANSLATION_MIB}"),
        },
    );
    line.option(
        "-cpu",
        match machine.accelerator {
            Accelerator::Kvm => "max",
            Accelerator::Tcg => CPU_TCG,
        },
    );
    line.option("-smp", machine.cpus.to_string());
    line.option("-m", format!("{}M", machine.memory_mib));
    line.option("-object", format!("memory-backend-memfd,id=memory,size={}M,share=on", machine.memory_mib));
    line.flag("-kernel").flag(machine.kernel.as_os_str());
    line.flag("-initrd").flag(machine.initramfs.as_os_str());
    line.option(
        "-append",
        match machine.accelerator {
            Accelerator::Kvm => machine.cmdline.clone(),
            Accelerator::Tcg => format!("{}{TCG_CMDLINE}", machine.cmdline),
        },
    );
    for (index, device) in machine.devices.iter().enumerate() {
        line.device(index, device, machine.accelerator);
    }
    if let Some(fd) = machine.monitor {
        line.option("-chardev", format!("socket,id=monitor,fd={fd}"));
        line.option("-mon", "chardev=monitor,mode=control");
    }
    line.0
}

struct CommandLine(Vec<OsString>);

impl CommandLine {
    fn flag(&mut self, flag: impl Into<OsString>) -> &mut Self {
        self.0.push(flag.into());
        self
    }

    fn option(&mut self, name: &str, value: impl Into<OsString>) -> &mut Self {
        self.flag(name).flag(value)
    }

    fn device(&mut self, index: usize, device: &Device, accelerator: Accelerator) {
        let id = format!("device{index}");
        match device {
            Device::Serial { fd } => {
                self.option("-chardev", format!("socket,id={id},fd={fd}"));
                self.option("-serial", format!("chardev:{id}"));
            }
            Device::Rng => {
                self.option("-device", "virtio-rng-pci");
            }
            Device::Balloon => {
                self.option("-device", "virtio-balloon-pci,free-page-reporting=on");
            }
            Device::VhostUserBlock { fd, queues, queue_size } => {
                self.option("-chardev", format!("socket,id={id},fd={fd}"));
                self.option(
                    "-device",
                    format!("vhost-user-blk-pci,chardev={id},num-queues={queues},queue-size={queue_size}"),
                );
            }
            Device::VhostUserVsock { fd } => {
                self.option("-chardev", format!("socket,id={id},fd={fd}"));
                self.option("-device", format!("vhost-user-vsock-pci,chardev={id}"));
            }
            Device::VhostUserFs { fd, tag, queue_size } => {
                self.option("-chardev", format!("socket,id={id},fd={fd}"));
                self.option(
                    "-device",
                    format!("vhost-user-fs-pci,chardev={id},tag={tag},queue-size={queue_size}"),
                );
            }
            Device::VhostUserNet { name, mac, mtu } => {
                let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
                self.option("-chardev", format!("socket,id=peer{index},path={name},abstract=on"));
                self.option("-netdev", format!("vhost-user,id={id},chardev=peer{index}"));
                let vectors = if accelerator == Accelerator::Tcg { CARD_VECTORS_TCG } else { "" };
                // No boot ROM: nothing boots from the network, and the ROMs are a package of their own.
                let card = format!("virtio-net-pci,netdev={id},mac={mac},host_mtu={mtu},romfile={vectors}");
                self.option("-device", card);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> Machine {
        Machine {
            accelerator: Accelerator::Tcg,
            cpus: 2,
            memory_mib: 1024,
            kernel: "/images/a kernel".into(),
            initramfs: "/images/root,fs".into(),
            cmdline: "console=ttyS0 quiet".into(),
            devices: vec![
                Device::Serial { fd: 10 },
                Device::Rng,
                Device::VhostUserBlock { fd: 11, queues: 1, queue_size: 256 },
                Device::VhostUserNet { name: "0001f".into(), mac: [2, 0, 0, 0, 0, 0x1f], mtu: 1500 },
                Device::VhostUserVsock { fd: 13 },
                Device::VhostUserFs { fd: 15, tag: "host", queue_size: 1024 },
                Device::Balloon,
            ],
            monitor: Some(14),
        }
    }

    #[test]
    fn the_whole_command_line() {
        let line: Vec<String> =
            arguments(&machine()).into_iter().map(|argument| argument.into_string().unwrap()).collect();
        let expected = [
            "-no-user-config",
            "-nodefaults",
            "-no-reboot",
            "-display none",
            "-machine q35,memory-backend=memory,dump-guest-core=off,smbus=off,sata=off,vmport=off",
            "-accel tcg,thread=multi,tb-size=256",
            "-cpu max,-erms",
            "-smp 2",
            "-m 1024M",
            "-object memory-backend-memfd,id=memory,size=1024M,share=on",
            "-kernel /images/a kernel",
            "-initrd /images/root,fs",
            "-append console=ttyS0 quiet maxcpus=1 clearcpuid=cx16",
            "-chardev socket,id=device0,fd=10",
            "-serial chardev:device0",
            "-device virtio-rng-pci",
            "-chardev socket,id=device2,fd=11",
            "-device vhost-user-blk-pci,chardev=device2,num-queues=1,queue-size=256",
            "-chardev socket,id=peer3,path=0001f,abstract=on",
            "-netdev vhost-user,id=device3,chardev=peer3",
            "-device virtio-net-pci,netdev=device3,mac=02:00:00:00:00:1f,host_mtu=1500,romfile=,vectors=0",
            "-chardev socket,id=device4,fd=13",
            "-device vhost-user-vsock-pci,chardev=device4",
            "-chardev socket,id=device5,fd=15",
            "-device vhost-user-fs-pci,chardev=device5,tag=host,queue-size=1024",
            "-device virtio-balloon-pci,free-page-reporting=on",
            "-chardev socket,id=monitor,fd=14",
            "-mon chardev=monitor,mode=control",
        ];
        assert_eq!(line.join(" "), expected.join(" "));
    }

    #[test]
    fn paths_and_the_cmdline_stay_one_argument() {
        let line = arguments(&machine());
        for whole in ["/images/a kernel", "/images/root,fs", "console=ttyS0 quiet maxcpus=1 clearcpuid=cx16"]
        {
            assert!(line.iter().any(|argument| argument == whole), "{whole}");
        }
    }

    #[test]
    fn kvm_replaces_the_software_processor() {
        let line = arguments(&Machine { accelerator: Accelerator::Kvm, monitor: None, ..machine() });
        let accel = line.iter().position(|argument| argument == "-accel").unwrap();
        assert_eq!(line[accel + 1], "kvm");
        assert!(line.iter().any(|argument| argument == "console=ttyS0 quiet"));
        assert!(!line.iter().any(|argument| argument.to_string_lossy().contains("vectors=0")));
        assert!(!line.iter().any(|argument| argument == "-mon"));
    }
}
