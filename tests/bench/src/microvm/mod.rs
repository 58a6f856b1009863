//! Our machine beside QEMU's `microvm`, both on the real KVM, with one kernel and one initramfs.
//!
//! Where KVM does not work the whole comparison goes into the machine of `tests/nested/run`, where it does. The guest is this
//! program ([`guest`]) as the only one there is; what it measures it says on its console.

mod guest;
mod initramfs;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use command_fds::{CommandFdExt, FdMapping};
use host_vmm::control::{self, Channel, Event, Sender};
use host_vmm::{BackendChoice, CMDLINE, DiskSpec, MachineSpec, NetworkSpec};
use vsock::{VMADDR_CID_ANY, VsockListener};

use crate::boot::{median, mib};

pub(crate) use guest::run as guest;
pub(crate) use initramfs::GUEST;

const ROUNDS: usize = 3;
const MEMORY_MIB: u32 = 256;
const DISK_BYTES: u64 = 256 << 20;
/// Between two looks at the console: until the first instruction, and while the guest measures, which looking would slow down.
const LOOK: Duration = Duration::from_millis(2);
const LATER_LOOK: Duration = Duration::from_millis(200);
/// A machine that hangs is not waited for longer: the processor may be an emulated one.
const LIMIT: Duration = Duration::from_secs(1200);
/// QEMU's machine on vsock.
const VSOCK_CID: u32 = 3;
const QEMU: &str = "qemu-system-x86_64";
/// Set in the machine of `tests/nested/run`.
const INSIDE: &str = "ENGINE_TEST_MICROVM";

/// What the guest says on its console.
mod word {
    /// Of the first instructions of the first program.
    pub const FIRST: &str = "@first";
    /// Everything is measured; the guest waits for its end.
    pub const DONE: &str = "@done";
    /// What follows is why.
    pub const FAILED: &str = "@failed ";
    /// `@figure NAME VALUE`.
    pub const FIGURE: &str = "@figure ";
}

/// What is promised of ours, divided by QEMU's.
enum Promise {
    AtMost(f64),
    AtLeast(f64),
}

const START: &str = "start to first instruction, s";
const BEYOND: &str = "beyond the guest's memory, MiB";

/// Measures what is named, or all, here or in a machine in which KVM works.
pub(crate) fn measure(names: &[String]) -> Result<()> {
    if let Some(unknown) = names.iter().find(|name| !guest::PARTS.contains(&name.as_str())) {
        bail!("there is no part `{unknown}`; there are {:?}", guest::PARTS);
    }
    if let Some(folder) = std::env::var_os(INSIDE) {
        return compare(Path::new(&folder), names);
    }
    let folder = tempfile::Builder::new().prefix("microvm-").tempdir()?;
    initramfs::make(folder.path())?;
    let program = std::env::current_exe()?;
    let programs = program.parent().context("this program is nowhere")?;
    let status = Command::new("tests/nested/run")
        .arg("--plain")
        .arg(programs)
        .arg(programs.join("vm-image"))
        .arg(&program)
        .args(["--", "microvm"])
        .args(names)
        .env(INSIDE, folder.path())
        // Each machine has a limit of its own.
        .env("ENGINE_TEST_LIMIT", (LIMIT.as_secs() * 2 * (ROUNDS as u64 + 1)).to_string())
        .status()
        .context("cannot start `tests/nested/run`: call this from the root of the checkout")?;
    ensure!(status.success(), "the measurement failed: {status}");
    Ok(())
}

/// By name, what each round of one machine gave.
type Figures = BTreeMap<String, Vec<f64>>;

fn compare(folder: &Path, names: &[String]) -> Result<()> {
    let (mut ours, mut theirs) = (Figures::new(), Figures::new());
    for round in 0..=ROUNDS {
        let ours_first = round % 2 == 1;
        for is_ours in [ours_first, !ours_first] {
            println!("== round {round} of {ROUNDS}: {}", if is_ours { "ours" } else { "microvm" });
            match is_ours {
                true => run::<Ours>(folder, names, &mut ours).context("our machine")?,
                false => run::<Microvm>(folder, names, &mut theirs).context("QEMU's machine")?,
            }
        }
        if round == 0 {
            // It got memory and code that a machine around this one had yet to get from its host.
            println!("== these do not count");
            (ours, theirs) = Default::default();
        }
    }
    println!("{:<44} {:>10} {:>10}   ratio", "on KVM", "ours", "microvm");
    for (name, values) in &ours {
        let other = theirs.get(name).with_context(|| format!("QEMU's machine has no figure for {name}"))?;
        let (one, other) = (median(values.iter().copied()), median(other.iter().copied()));
        let ratio = one / other;
        let (kept, promise) = match promise(name) {
            Promise::AtMost(most) => (ratio <= most, format!("<= {most}")),
            Promise::AtLeast(least) => (ratio >= least, format!(">= {least}")),
        };
        let kept = if kept { "kept" } else { "MISSED" };
        println!("{name:<44} {one:>10.2} {other:>10.2}   {ratio:.2}  promised {promise}: {kept}");
    }
    Ok(())
}

fn promise(name: &str) -> Promise {
    match name {
        START => Promise::AtMost(1.0),
        BEYOND => Promise::AtMost(0.25),
        _ => Promise::AtLeast(1.0),
    }
}

/// Ends when the guest has measured, or with why it could not.
type Peer = JoinHandle<Result<()>>;

/// A way to run the guest.
trait Monitor: Sized {
    /// The guest's address, and what it calls the host's localhost.
    const NETWORK: (&'static str, &'static str);

    /// Starts the machine, and the guest's peer on [`guest::VSOCK_PORT`].
    fn start(folder: &Path, scratch: &Path, cmdline: &str) -> Result<(Self, Peer)>;
    fn process(&self) -> u32;
}

fn run<M: Monitor>(folder: &Path, names: &[String], figures: &mut Figures) -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let port = listener.local_addr()?.port();
    let network = std::thread::spawn(move || play_all(|| Ok(listener.accept()?.0)));
    let (address, host) = M::NETWORK;
    // What the kernel does not know becomes the first program's environment.
    let parts = if names.is_empty() { guest::PARTS.join(",") } else { names.join(",") };
    let cmdline = format!("{CMDLINE} quiet ADDRESS={address} PEER={host} PORT={port} PARTS={parts}");
    let console = scratch.path().join("console");
    let begin = Instant::now();
    let (machine, vsock) = M::start(folder, scratch.path(), &cmdline)?;
    let seen = |wanted: &str, look: Duration| -> Result<Duration> {
        loop {
            let text = std::fs::read(&console).unwrap_or_default();
            let text = String::from_utf8_lossy(&text);
            // The line that is being written is none yet.
            let text = text.rsplit_once('\n').map_or("", |(lines, _)| lines);
            if text.lines().any(|line| line.starts_with(wanted)) {
                return Ok(begin.elapsed());
            }
            ensure!(!text.contains(word::FAILED), "{text}");
            ensure!(begin.elapsed() < LIMIT, "the guest has not said `{wanted}` within {LIMIT:?}:\n{text}");
            std::thread::sleep(look);
        }
    };
    let mut tell = |name: &str, value: f64| {
        println!("{name:<44} {value:>10.2}");
        figures.entry(name.to_owned()).or_default().push(value);
    };
    tell(START, seen(word::FIRST, LOOK)?.as_secs_f64());
    seen(word::DONE, LATER_LOOK)?;
    tell(BEYOND, mib(beyond(machine.process())?));
    let text = std::fs::read_to_string(&console)?;
    for line in text.lines().filter_map(|line| line.strip_prefix(word::FIGURE)) {
        let (name, value) = line.trim().rsplit_once(' ').with_context(|| format!("`{line}` is no figure"))?;
        tell(name, value.parse().with_context(|| format!("`{line}` is no figure"))?);
    }
    for peer in [network, vsock] {
        peer.join().map_err(|_| anyhow::anyhow!("the guest's peer panicked"))??;
    }
    Ok(())
}

/// The guest's peer: takes one connection's bytes, sends some on a second one, and so on.
fn play_all<S: Read + Write>(mut accept: impl FnMut() -> Result<S>) -> Result<()> {
    for _ in 0..2 * guest::TIMES {
        play(accept()?)?;
    }
    Ok(())
}

fn play(mut stream: impl Read + Write) -> Result<()> {
    let mut wish = [0; guest::WISH_BYTES];
    stream.read_exact(&mut wish)?;
    let (sends, chunks) = guest::wished(wish);
    let mut buffer = vec![0; guest::CHUNK_BYTES];
    for _ in 0..chunks {
        if sends {
            stream.read_exact(&mut buffer)?;
        } else {
            stream.write_all(&buffer)?;
        }
    }
    if sends {
        stream.write_all(b"x")?;
    }
    Ok(())
}

/// Bytes of memory that a process has beyond the guest's, which is a file in memory without a name.
fn beyond(process: u32) -> Result<u64> {
    let (mut kib, mut is_guests) = (0, false);
    for line in std::fs::read_to_string(format!("/proc/{process}/smaps"))?.lines() {
        if let Some(share) = line.strip_prefix("Pss:").filter(|_| !is_guests) {
            kib += share.trim().trim_end_matches(" kB").parse::<u64>()?;
        } else if line.split(' ').next().is_some_and(|word| word.contains('-')) {
            is_guests = line.contains("/memfd:");
        }
    }
    Ok(kib << 10)
}

/// `engine-vmm`, as the daemon starts it. It ends when its control channel does.
struct Ours {
    process: Child,
    _control: Sender,
}

impl Monitor for Ours {
    const NETWORK: (&'static str, &'static str) = ("198.18.0.2", "198.18.0.254");

    fn start(folder: &Path, scratch: &Path, cmdline: &str) -> Result<(Self, Peer)> {
        let spec = MachineSpec {
            cpus: 1,
            memory_mib: MEMORY_MIB,
            kernel: initramfs::kernel()?,
            vmlinux: None,
            initramfs: initramfs::path(folder),
            cmdline: cmdline.into(),
            disk: DiskSpec { path: scratch.join("disk"), size_bytes: DISK_BYTES },
            console_log: scratch.join("console"),
            backend: BackendChoice::Kvm,
            network: NetworkSpec::Nat,
            shares: Vec::new(),
            // There is no agent in this guest.
            boot_timeout_seconds: 3600,
        };
        let (near, far) = UnixStream::pair()?;
        let program = std::env::var_os("ENGINE_VMM").context("ENGINE_VMM does not name `engine-vmm`")?;
        let mut command = Command::new(program);
        command.args(["--control-fd", "9"]).env("ENGINE_LOG", "warn").stdin(Stdio::null());
        let process = command.fd_mappings(vec![FdMapping { parent_fd: far.into(), child_fd: 9 }])?.spawn()?;
        drop(command);
        let (mut control, mut events) = Channel::new(near)?.split();
        control.send(&control::Command::Start(spec), &[])?;
        let mut accepted = move || loop {
            match events.receive()?.context("engine-vmm has ended")? {
                (Event::Accepted { port }, mut fds) if port == guest::VSOCK_PORT => {
                    return Ok(UnixStream::from(fds.pop().context("a connection without its socket")?));
                }
                (Event::Stopped { reason }, _) => bail!("the machine has ended: {reason:?}"),
                _ => {}
            }
        };
        let peer = std::thread::spawn(move || play_all(&mut accepted));
        Ok((Self { process, _control: control }, peer))
    }

    fn process(&self) -> u32 {
        self.process.id()
    }
}

/// QEMU with what it has for a machine like ours.
struct Microvm(Child);

impl Monitor for Microvm {
    const NETWORK: (&'static str, &'static str) = ("10.0.2.15", "10.0.2.2");

    fn start(folder: &Path, scratch: &Path, cmdline: &str) -> Result<(Self, Peer)> {
        // By the kernel, which has the other end of QEMU's device.
        let listener =
            VsockListener::bind_with_cid_port(VMADDR_CID_ANY, guest::VSOCK_PORT).context("no vsock")?;
        let peer = std::thread::spawn(move || play_all(|| Ok(listener.accept()?.0)));
        let disk = scratch.join("disk");
        std::fs::File::create(&disk)?.set_len(DISK_BYTES)?;
        let process = Command::new(QEMU)
            // Without its timers of old the kernel, in a machine inside a machine, waits for ever for a first tick.
            .args(["-machine", "microvm,accel=kvm,memory-backend=memory,pit=on,pic=on"])
            .args(["-cpu", "host", "-smp", "1", "-m", &format!("{MEMORY_MIB}M")])
            .args(["-object", &format!("memory-backend-memfd,id=memory,size={MEMORY_MIB}M,share=on")])
            .args(["-global", "virtio-mmio.force-legacy=false"])
            .args(["-no-user-config", "-nodefaults", "-no-reboot", "-display", "none", "-serial"])
            .arg(format!("file:{}", scratch.join("console").display()))
            .arg("-kernel")
            .arg(initramfs::kernel()?)
            .arg("-initrd")
            .arg(initramfs::path(folder))
            .args(["-append", cmdline])
            .args(["-object", "iothread,id=io", "-device", "virtio-blk-device,drive=disk,iothread=io"])
            .arg("-drive")
            .arg(format!(
                "id=disk,if=none,format=raw,cache=writeback,aio=threads,discard=unmap,file={}",
                disk.display()
            ))
            .args(["-netdev", "user,id=net", "-device", "virtio-net-device,netdev=net"])
            .args(["-device", "virtio-rng-device"])
            .args(["-device", &format!("vhost-vsock-device,guest-cid={VSOCK_CID}")])
            .stdin(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot start `{QEMU}`"))?;
        Ok((Self(process), peer))
    }

    fn process(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Ours {
    fn drop(&mut self) {
        // Gone already, if it failed.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Drop for Microvm {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A file of the VM image.
fn of_image(name: &str) -> Result<PathBuf> {
    let folder =
        std::env::var_os("ENGINE_IMAGE").context("ENGINE_IMAGE does not name the folder of a VM image")?;
    Ok(Path::new(&folder).join(name))
}
