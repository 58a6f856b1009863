//! Through the VM on QEMU: published ports and the way out, ours beside QEMU's own user-mode network and passt, in one
//! guest and by one program.
//!
//! The machine gets two more network cards, behind QEMU's user network and behind passt, each with a port of the host
//! forwarded; a container on the machine's own network has all three. Bytes are counted by who receives them.

use crate::boot::{median, mib};
use anyhow::{Context, Result, bail, ensure};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tests_harness::{Engine, IMAGE, Layer, Stage, TestImage, wait_until};

/// What makes this program the guest's end.
pub(crate) const GUEST: &str = "guest-end";

/// Seconds of each transfer, and of connecting.
const SECONDS: u64 = 3;
const ROUNDS: usize = 3;
/// Connections under way at a time.
const CLIENTS: usize = 4;
const CHUNK_BYTES: usize = 256 << 10;
pub(crate) const QEMU: &str = "qemu-system-x86_64";
const GUEST_IMAGE: &str = "through:1";
/// The port of the container that is published as users do, so that it clashes with no other.
const PUBLISHED: u16 = 5201;
/// Ports of the host, in the environment of the second run of this program: of the program in the guest, and as the two
/// others forward them.
const PORTS: &str = "ENGINE_BENCH_PORTS";

/// Their networks: the guest's address, and the one that leads to the host's localhost. Of QEMU's network both are fixed.
const USER: (&str, &str) = ("10.0.2.15", "10.0.2.2");
const PASST: (&str, &str) = ("10.0.5.15", "10.0.5.2");

/// What the host asks of the guest's program with the first byte of a connection.
const RECEIVE: u8 = b'r';
const SEND: u8 = b's';
const GREET: u8 = b'g';

/// Measures; the first call runs this program again with a QEMU in `PATH` that adds the cards.
pub(crate) fn measure() -> Result<()> {
    let Ok(ports) = std::env::var(PORTS) else { return run_again() };
    let ports: Vec<u16> = ports.split(' ').map(str::parse).collect::<Result<_, _>>()?;
    let [own, user, passt] = ports[..] else { bail!("{PORTS} names {} ports", ports.len()) };
    let engine = Engine::start(Stage::Qemu)?;
    let program = std::fs::read(std::env::current_exe()?)?;
    engine.load(&TestImage::new(vec![Layer::busybox()?, Layer::program("bench", &program)?]), GUEST_IMAGE)?;
    let publish = format!("127.0.0.1::{PUBLISHED}");
    let serve = |options: &[&str], port: u16| {
        let port = port.to_string();
        let words = [&["run", "-d"], options, &[GUEST_IMAGE, "/bench", GUEST, &port]].concat();
        engine.engine(words)?.ok().map(drop)
    };
    serve(&["--name", "own", "--network", "host"], own)?;
    serve(&["--name", "published", "-p", &publish], PUBLISHED)?;
    // A packet of the guest tells passt where it is.
    let cards = format!(
        "ip addr add {}/24 dev eth1 && ip link set eth1 up && ip addr add {}/24 dev eth2 && ip link set eth2 mtu 65520 \
         up; ping -c 1 -W 2 {}; ping -c 1 -W 2 {}; true",
        USER.0, PASST.0, USER.1, PASST.1
    );
    engine.engine(["run", "--rm", "--privileged", "--network", "host", IMAGE, "sh", "-c", &cards])?.ok()?;
    let published = engine.engine(["port", "published", &PUBLISHED.to_string()])?.ok()?;
    let at = |port: u16| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let ways = [
        Way { name: "ours", forwarded: at(own), host: "198.18.0.254" },
        Way { name: "QEMU user", forwarded: at(user), host: USER.1 },
        Way { name: "passt", forwarded: at(passt), host: PASST.1 },
        // The same as users have it, with a bridge behind: for information.
        Way { name: "ours, bridged", forwarded: published.parse()?, host: "198.18.0.254" },
    ];
    for way in &ways {
        let waited = wait_until("the guest answers", || Ok(greeted(way.forwarded).then_some(())));
        waited.with_context(|| format!("by way of {}", way.name))?;
    }
    print!("{:<28} {:<6}", "through the VM", "");
    ways.iter().for_each(|way| print!(" {:>13}", way.name));
    println!("   ratio");
    type Step = fn(&Engine, &Way) -> Result<f64>;
    let steps: [(&str, &str, Step); 5] = [
        ("published port, inwards", "MiB/s", |_, way| ask(way, RECEIVE)),
        ("published port, outwards", "MiB/s", |_, way| ask(way, SEND)),
        ("published port, connections", "1/s", |_, way| connections(way)),
        ("from the guest, outwards", "MiB/s", |engine, way| call(engine, way, SEND)),
        ("from the guest, inwards", "MiB/s", |engine, way| call(engine, way, RECEIVE)),
    ];
    for (name, unit, step) in steps {
        let mut figures = [const { Vec::<f64>::new() }; 4];
        for _ in 0..ROUNDS {
            for (way, figures) in ways.iter().zip(&mut figures) {
                figures.push(step(&engine, way).with_context(|| format!("{name}, by way of {}", way.name))?);
            }
        }
        let medians = figures.map(|figures| median(figures.into_iter()));
        let ratio = medians[0] / medians[1].max(medians[2]);
        print!("{name:<28} {unit:<6}");
        medians.iter().for_each(|figure| print!(" {figure:>13.1}"));
        println!("   {ratio:.2}  promised >= 1: {}", if ratio >= 1.0 { "kept" } else { "MISSED" });
    }
    engine.finish()
}

/// One way between host and guest.
struct Way {
    name: &'static str,
    /// A port of the host that leads to the guest's program.
    forwarded: SocketAddr,
    /// What the guest calls the host's localhost.
    host: &'static str,
}

/// Ended with this program.
struct Passt(Child);

impl Drop for Passt {
    fn drop(&mut self) {
        // It ends by itself with its client, and cannot be killed then.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn run_again() -> Result<()> {
    let folder = tempfile::Builder::new().prefix("through-").tempdir()?;
    // passt gives its rights away before it makes its socket here.
    std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o777))?;
    let [own, user, passt] = free_ports()?;
    let socket = folder.path().join("passt");
    let child = Command::new("passt")
        .args(["--foreground", "--quiet", "--one-off", "--ipv4-only", "--netmask", "24"])
        .args(["--address", PASST.0, "--gateway", PASST.1, "--socket"])
        .arg(&socket)
        .args(["--tcp-ports", &format!("127.0.0.1/{passt}:{own}")])
        .args(["--log-file", "/dev/null"])
        .stdin(Stdio::null())
        .spawn()
        .context("cannot start `passt`: install Debian's package passt")?;
    let mut child = Passt(child);
    wait_until("passt listens", || {
        if let Some(status) = child.0.try_wait()? {
            bail!("passt ended at once: {status}");
        }
        Ok(socket.exists().then_some(()))
    })?;
    let script = format!(
        "#!/bin/sh\nexec {} \"$@\" -netdev user,id=user,hostfwd=tcp:127.0.0.1:{user}-{}:{own} \
         -device virtio-net-pci,netdev=user,romfile= \
         -netdev stream,id=passt,server=off,addr.type=unix,addr.path={} \
         -device virtio-net-pci,netdev=passt,romfile=\n",
        real_qemu()?,
        USER.0,
        socket.display()
    );
    let wrapper = folder.path().join(QEMU);
    std::fs::write(&wrapper, script)?;
    std::fs::set_permissions(&wrapper, PermissionsExt::from_mode(0o755))?;
    let path = std::env::var("PATH").unwrap_or_default();
    let status = Command::new(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .env("PATH", format!("{}:{path}", folder.path().display()))
        .env(PORTS, format!("{own} {user} {passt}"))
        .status()?;
    ensure!(status.success(), "the measurement failed: {status}");
    Ok(())
}

/// Ports that nobody has. Somebody may take one before it is used; the run then fails and says so.
fn free_ports() -> Result<[u16; 3]> {
    let bound = [(); 3].map(|()| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)));
    let mut ports = [0; 3];
    for (port, bound) in ports.iter_mut().zip(bound) {
        *port = bound?.local_addr()?.port();
    }
    Ok(ports)
}

pub(crate) fn real_qemu() -> Result<String> {
    let path = std::env::var("PATH").unwrap_or_default();
    let found = path.split(':').map(|folder| Path::new(folder).join(QEMU)).find(|program| program.exists());
    Ok(found.with_context(|| format!("`{QEMU}` is not in PATH"))?.display().to_string())
}

/// MiB/s to (`RECEIVE`) or from (`SEND`) the guest by a published port.
fn ask(way: &Way, what: u8) -> Result<f64> {
    let mut stream = TcpStream::connect(way.forwarded)?;
    stream.write_all(&[what])?;
    if what == RECEIVE { timed(|| send(stream)) } else { timed(|| receive(stream)) }
}

/// MiB/s from (`SEND`) or to (`RECEIVE`) a program of the guest that connects to the host.
fn call(engine: &Engine, way: &Way, what: u8) -> Result<f64> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let port = listener.local_addr()?.port();
    let word = char::from(what).to_string();
    // The bridged one calls from behind the bridge.
    let container = if way.name == "ours, bridged" { "published" } else { "own" };
    let calling = engine.spawn(["exec", container, "/bench", GUEST, &port.to_string(), way.host, &word])?;
    let (stream, _) = listener.accept()?;
    let rate = if what == SEND { timed(|| receive(stream)) } else { timed(|| send(stream)) }?;
    calling.finish()?.ok()?;
    Ok(rate)
}

fn timed(work: impl FnOnce() -> Result<u64>) -> Result<f64> {
    let start = Instant::now();
    let bytes = work()?;
    Ok(mib(bytes) / start.elapsed().as_secs_f64())
}

/// Sends for [`SECONDS`]; answers how much the other side says has come.
fn send(mut stream: TcpStream) -> Result<u64> {
    let (chunk, start) = (vec![0; CHUNK_BYTES], Instant::now());
    while start.elapsed().as_secs() < SECONDS {
        stream.write_all(&chunk)?;
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut told = [0; 8];
    stream.read_exact(&mut told)?;
    Ok(u64::from_be_bytes(told))
}

/// Takes everything, and tells the other side how much that was.
fn receive(mut stream: TcpStream) -> Result<u64> {
    let (mut buffer, mut count) = (vec![0; CHUNK_BYTES], 0);
    loop {
        match stream.read(&mut buffer)? {
            0 => break,
            some => count += some as u64,
        }
    }
    stream.write_all(&count.to_be_bytes())?;
    Ok(count)
}

/// Somebody may accept for a guest that does not listen, but has no word of it.
fn greeted(to: SocketAddr) -> bool {
    let mut word = [0; 1];
    TcpStream::connect(to).is_ok_and(|mut stream| {
        stream.set_read_timeout(Some(Duration::from_secs(20))).is_ok()
            && stream.write_all(&[GREET]).is_ok()
            && stream.read(&mut word).is_ok_and(|count| count == 1)
    })
}

/// New connections a second, each until the guest has said a word.
fn connections(way: &Way) -> Result<f64> {
    let (stop, count, failed) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let begin = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let counter = if greeted(way.forwarded) { &count } else { &failed };
                    counter.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        std::thread::sleep(Duration::from_secs(SECONDS));
        stop.store(true, Ordering::Relaxed);
    });
    let (count, failed) = (count.into_inner(), failed.into_inner());
    ensure!(failed * 20 < count, "{failed} connections failed beside {count}");
    Ok(count as f64 / begin.elapsed().as_secs_f64())
}

/// The guest's end: `PORT` serves there, `PORT ADDRESS r|s` connects to the host, to receive or to send.
pub(crate) fn guest(words: &[String]) -> Result<()> {
    let port: u16 = words.first().context("no port")?.parse()?;
    if let [_, address, what] = words {
        let stream = TcpStream::connect((address.as_str(), port))?;
        return play(stream, what.as_bytes().first().copied().unwrap_or_default());
    }
    for stream in TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))?.incoming() {
        let mut stream = stream?;
        std::thread::spawn(move || {
            let mut what = [0];
            // Whoever goes early is not served.
            stream.read_exact(&mut what).map_err(anyhow::Error::from).and_then(|()| play(stream, what[0]))
        });
    }
    Ok(())
}

fn play(mut stream: TcpStream, what: u8) -> Result<()> {
    match what {
        RECEIVE => receive(stream).map(drop),
        SEND => send(stream).map(drop),
        GREET => Ok(stream.write_all(b"x")?),
        other => bail!("what is {other}?"),
    }
}
