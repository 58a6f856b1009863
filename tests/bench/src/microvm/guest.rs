//! The guest's only program: measures its disk, its network and its vsock, and says so on the console.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::fs::OFlags;
use rustix::mount::{MountFlags, mount};
use rustix::system::finit_module;
use vsock::{VMADDR_CID_HOST, VsockStream};

use super::initramfs::{MODULES, module};
use super::word;
use crate::boot::mib;

/// What is measured beside the start, by name.
pub(super) const PARTS: [&str; 3] = ["disk", "network", "vsock"];

/// What the guest sends on a connection, and what it is sent: so much that it takes some seconds.
const NETWORK_BYTES: usize = 8 << 20;
const VSOCK_BYTES: usize = 32 << 20;
/// How often it does either.
pub(super) const TIMES: usize = 3;
pub(super) const CHUNK_BYTES: usize = 256 << 10;
/// What the guest says first on a connection: whether it sends or is sent something, and how many chunks.
pub(super) const WISH_BYTES: usize = 3;
const SEND: u8 = b's';
const RECEIVE: u8 = b'r';

/// A port of the host's that `engine-vmm` lets a guest connect to.
pub(super) const VSOCK_PORT: u32 = guest_protocol::port::LOG;

const DISK: &str = "/dev/vda";
const DISK_BYTES: u64 = 64 << 20;
const LARGE_BYTES: usize = 1 << 20;
const SMALL_BYTES: usize = 4 << 10;
/// How long small requests are made.
const SMALL_TIME: Duration = Duration::from_secs(3);
const DEEP: usize = 32;
/// Memory for direct I/O begins at a multiple of this.
const ALIGNMENT: usize = 4096;

/// The life of the guest.
pub(crate) fn run() -> ! {
    println!("{}", word::FIRST);
    if let Err(error) = measure() {
        println!("{}{error:#}", word::FAILED);
    } else {
        println!("{}", word::DONE);
    }
    // The kernel would panic without it, and the host looks at the monitor's memory.
    loop {
        std::thread::park();
    }
}

fn figure(name: &str, value: f64) {
    println!("{}{name} {value:.2}", word::FIGURE);
}

fn measure() -> Result<()> {
    for (kind, place) in [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys")] {
        fs::create_dir_all(place)?;
        mount(kind, place, kind, MountFlags::empty(), None)
            .with_context(|| format!("cannot mount {place}"))?;
    }
    for name in MODULES {
        match File::open(module(name)) {
            Ok(file) => finit_module(&file, c"", 0).with_context(|| format!("cannot load {name}"))?,
            // The kernel has it built in.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error.into()),
        }
    }
    let parts = variable("PARTS")?;
    let is_wanted = |name| parts.split(',').any(|part| part == name);
    if is_wanted("disk") {
        disk().context("its disk")?;
    }
    // The host waits for all connections.
    network(if is_wanted("network") { NETWORK_BYTES } else { 0 }).context("its network")?;
    vsock(if is_wanted("vsock") { VSOCK_BYTES } else { 0 }).context("its vsock")
}

fn disk() -> Result<()> {
    let open = || {
        File::options().read(true).write(true).custom_flags(OFlags::DIRECT.bits().cast_signed()).open(DISK)
    };
    let disk = open().with_context(|| format!("cannot open {DISK}"))?;
    let mut large = aligned(LARGE_BYTES);
    let offsets = || (0..DISK_BYTES).step_by(LARGE_BYTES);
    let begin = Instant::now();
    for offset in offsets() {
        disk.write_all_at(large.bytes(), offset)?;
    }
    disk.sync_all()?;
    figure("disk, written in a row, MiB/s", mib(DISK_BYTES) / begin.elapsed().as_secs_f64());
    let begin = Instant::now();
    for offset in offsets() {
        disk.read_exact_at(large.bytes_mut(), offset)?;
    }
    figure("disk, read in a row, MiB/s", mib(DISK_BYTES) / begin.elapsed().as_secs_f64());
    for depth in [1, DEEP] {
        figure(&format!("disk, 4k reads at depth {depth}, 1/s"), small(&disk, depth, false)?);
        figure(&format!("disk, 4k writes at depth {depth}, 1/s"), small(&disk, depth, true)?);
    }
    Ok(())
}

/// Requests a second, `depth` of them under way at a time, all over what has been written.
fn small(disk: &File, depth: usize, write: bool) -> Result<f64> {
    let (count, begin) = (AtomicU64::new(0), Instant::now());
    let one = |seed: usize| -> Result<()> {
        let (mut block, mut state) = (aligned(SMALL_BYTES), seed as u64 * 2 + 1);
        while begin.elapsed() < SMALL_TIME {
            // Any odd number makes a sequence of all numbers; its upper bits jump about (Knuth, TAOCP 3.3.4).
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let offset = (state >> 33) % (DISK_BYTES / SMALL_BYTES as u64) * SMALL_BYTES as u64;
            if write {
                disk.write_all_at(block.bytes(), offset)?;
            } else {
                disk.read_exact_at(block.bytes_mut(), offset)?;
            }
            count.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    };
    std::thread::scope(|scope| -> Result<()> {
        let threads: Vec<_> = (0..depth).map(|seed| scope.spawn(move || one(seed))).collect();
        for thread in threads {
            thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
        }
        Ok(())
    })?;
    Ok(count.into_inner() as f64 / begin.elapsed().as_secs_f64())
}

/// A buffer for direct I/O.
struct Aligned {
    memory: Vec<u8>,
    start: usize,
    length: usize,
}

fn aligned(length: usize) -> Aligned {
    let memory = vec![0x5a; length + ALIGNMENT];
    let start = memory.as_ptr().align_offset(ALIGNMENT);
    Aligned { memory, start, length }
}

impl Aligned {
    fn bytes(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.length]
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.length]
    }
}

/// What the kernel did not know on its command line.
fn variable(name: &str) -> Result<String> {
    std::env::var(name).with_context(|| format!("the command line names no {name}"))
}

fn network(bytes: usize) -> Result<()> {
    let (address, peer, port) = (variable("ADDRESS")?, variable("PEER")?, variable("PORT")?);
    for words in [format!("addr add {address}/24 dev eth0"), "link set eth0 up".to_owned()] {
        let status = Command::new("/busybox").arg("ip").args(words.split(' ')).status()?;
        ensure!(status.success(), "ip {words}: {status}");
    }
    let port = port.parse()?;
    stream("network", bytes, || TcpStream::connect((peer.as_str(), port)))
}

fn vsock(bytes: usize) -> Result<()> {
    stream("vsock", bytes, || VsockStream::connect_with_cid_port(VMADDR_CID_HOST, VSOCK_PORT))
}

/// Whether the guest sends, and how many chunks.
pub(super) fn wished([what, chunks @ ..]: [u8; WISH_BYTES]) -> (bool, u16) {
    (what == SEND, u16::from_le_bytes(chunks))
}

/// Bytes to the host on one connection, and from it on a second one, and so on. Of none nothing is said.
fn stream<S: Read + Write>(name: &str, bytes: usize, connect: impl Fn() -> io::Result<S>) -> Result<()> {
    let chunks = u16::try_from(bytes / CHUNK_BYTES)?;
    let [low, high] = chunks.to_le_bytes();
    let begin = |what| -> Result<(S, Instant)> {
        let mut stream = connect().context("cannot reach the host")?;
        stream.write_all(&[what, low, high])?;
        Ok((stream, Instant::now()))
    };
    let tell = |direction: &str, begun: Instant| {
        if bytes > 0 {
            figure(&format!("{name}, {direction}, MiB/s"), mib(bytes as u64) / begun.elapsed().as_secs_f64());
        }
    };
    let mut buffer = vec![0x5a; CHUNK_BYTES];
    for _ in 0..TIMES {
        let (mut stream, begun) = begin(SEND)?;
        for _ in 0..chunks {
            stream.write_all(&buffer)?;
        }
        stream.read_exact(&mut [0]).context("the host did not take all")?;
        tell("outwards", begun);
        let (mut stream, begun) = begin(RECEIVE)?;
        for _ in 0..chunks {
            stream.read_exact(&mut buffer).context("the host did not send all")?;
        }
        tell("inwards", begun);
    }
    Ok(())
}
