//! Published ports under stress: ends and resets from either side, readers that do not read, many connections, many
//! senders. The host's side is played here, the container's by this program too, called with [`SERVE`].

use crate::networks::{docker, ok, says};
use anyhow::{Context, Result, bail, ensure};
use rustix::net::sockopt::set_socket_linger;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tests_harness::{Engine, Layer, PATIENCE, TestImage, Usage, wait_until};

crate::scenarios![
    ends_and_resets_pass_both_ways,
    a_slow_reader_slows_only_itself,
    crowds_come_and_go,
    a_port_follows_its_container_from_network_to_network,
    where_connections_land_is_nobodys_but_the_hosts,
];

/// The argument that makes this program serve port 80 and answer datagrams at port 81.
pub(crate) const SERVE: &str = "serve-under-stress";
const IMAGE: &str = "stress:test";
/// More than all buffers on the way hold.
const BULK: usize = 20 << 20;
/// Without a short period, so that lost or doubled bytes show.
const PERIOD: usize = 65_521;
/// What a server says before it breaks off.
const HALF: &[u8] = b"half an ans";
/// Short connections, natively and through a machine, unless the environment's `ENGINE_TEST_CONNECTIONS` says another
/// number; and how many at a time.
const CONNECTIONS: (usize, usize) = (200, 100);
const CLIENTS: usize = 4;
const SENDERS: (usize, usize) = (100, 50);

/// What the server tells of its other connections.
#[derive(Default)]
struct Told {
    poured: AtomicU64,
    ended: Mutex<String>,
}

/// What this program does in the container: each connection begins with a line that says what it is for.
pub(crate) fn serve() -> Result<()> {
    let told = Arc::new(Told::default());
    let socket = UdpSocket::bind("0.0.0.0:81")?;
    std::thread::spawn(move || -> std::io::Result<()> {
        let mut buffer = [0; 2048];
        loop {
            let (count, peer) = socket.recv_from(&mut buffer)?;
            socket.send_to(&buffer[..count], peer)?;
        }
    });
    for stream in TcpListener::bind("0.0.0.0:80")?.incoming() {
        let (stream, told) = (stream?, told.clone());
        // How a connection ends is the other side's play.
        std::thread::Builder::new().stack_size(256 << 10).spawn(move || drop(answer(stream, &told)))?;
    }
    Ok(())
}

fn answer(mut stream: TcpStream, told: &Told) -> Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let ended = |how: &str| how.clone_into(&mut told.ended.lock().unwrap_or_else(PoisonError::into_inner));
    let mut heard = Vec::new();
    match line.trim_end() {
        "echo" => {
            reader.read_to_end(&mut heard)?;
            stream.write_all(&heard)?;
        }
        "speak first" => {
            stream.write_all(b"spoken")?;
            stream.shutdown(Shutdown::Write)?;
            reader.read_to_end(&mut heard)?;
            ended(&String::from_utf8_lossy(&heard));
        }
        "reset" => {
            stream.write_all(HALF)?;
            reader.read_exact(&mut [0])?;
            set_socket_linger(&stream, Some(Duration::ZERO))?;
        }
        "hold" => {
            stream.write_all(b"held")?;
            let mut read = || reader.read(&mut [0; 16]).map_err(|error| error.kind());
            ended(&format!("{:?}", read()));
        }
        "ended" => {
            let said = std::mem::take(&mut *told.ended.lock().unwrap_or_else(PoisonError::into_inner));
            stream.write_all(said.as_bytes())?;
        }
        "pour" => {
            let text = text();
            for chunk in pieces() {
                stream.write_all(&text[..chunk])?;
                told.poured.fetch_add(chunk as u64, Ordering::Relaxed);
            }
        }
        "poured" => write!(stream, "{}", told.poured.load(Ordering::Relaxed))?,
        "swallow slowly" => {
            std::thread::sleep(Duration::from_secs(1));
            reader.read_to_end(&mut heard)?;
            write!(stream, "{} {}", heard.len(), is_text(&heard))?;
        }
        other => bail!("what is `{other}`?"),
    }
    Ok(())
}

fn text() -> Vec<u8> {
    (0..PERIOD).map(|at| ((at * 40_503) >> 7) as u8).collect()
}

/// [`BULK`] bytes in periods of [`text`].
fn pieces() -> impl Iterator<Item = usize> {
    (0..BULK).step_by(PERIOD).map(|start| PERIOD.min(BULK - start))
}

fn is_text(bytes: &[u8]) -> bool {
    let text = text();
    bytes.chunks(PERIOD).all(|chunk| text.starts_with(chunk))
}

/// The server in a container, and the host's addresses of its ports.
struct Stage {
    streams: String,
    datagrams: String,
}

impl Stage {
    fn set(engine: &Engine) -> Result<Self> {
        let own = std::fs::read(std::env::current_exe()?)?;
        engine.load(&TestImage::new(vec![Layer::program("stress", &own)?]), IMAGE)?;
        let ports = ["-p", "127.0.0.1::80", "-p", "127.0.0.1::81/udp"];
        docker(
            engine,
            &[&["run", "-d", "--name", "stress"], &ports[..], &[IMAGE, "/stress", SERVE]].concat(),
        )?
        .ok()?;
        let stage =
            Self { streams: ok(engine, "port stress 80/tcp")?, datagrams: ok(engine, "port stress 81/udp")? };
        wait_until("the container serves", || Ok(stage.ask("poured").is_ok().then_some(())))?;
        Ok(stage)
    }

    fn clear(engine: &Engine) -> Result<()> {
        ok(engine, "rm -f stress")?;
        ok(engine, &format!("rmi {IMAGE}")).map(drop)
    }

    fn open(&self, what: &str) -> Result<TcpStream> {
        let mut stream = TcpStream::connect(&self.streams)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(format!("{what}\n").as_bytes())?;
        Ok(stream)
    }

    /// What the server says until it closes.
    fn ask(&self, what: &str) -> Result<String> {
        let mut said = String::new();
        self.open(what)?.read_to_string(&mut said)?;
        ensure!(what == "ended" || !said.is_empty(), "no answer to `{what}`");
        Ok(said)
    }

    fn until_ended(&self, how: &str) -> Result<()> {
        let mut last = String::new();
        wait_until("the container has seen the end", || {
            last = self.ask("ended")?;
            Ok((!last.is_empty()).then_some(()))
        })?;
        ensure!(last == how, "the container saw `{last}` instead of `{how}`");
        Ok(())
    }

    fn echo(&self, sent: &[u8]) -> Result<()> {
        let mut stream = self.open("echo")?;
        stream.write_all(sent)?;
        stream.shutdown(Shutdown::Write)?;
        let mut heard = Vec::new();
        stream.read_to_end(&mut heard)?;
        ensure!(heard == sent, "{} bytes of {} came back", heard.len(), sent.len());
        Ok(())
    }
}

fn ends_and_resets_pass_both_ways(engine: &Engine) -> Result<()> {
    let stage = Stage::set(engine)?;
    // The host ends first, and the container.
    stage.echo(&[b'x'; 256 << 10])?;
    let mut stream = stage.open("speak first")?;
    let mut said = String::new();
    stream.read_to_string(&mut said)?;
    ensure!(said == "spoken", "{said}");
    stream.write_all(b"last words")?;
    drop(stream);
    stage.until_ended("last words")?;
    // A reset is no end: half an answer is not taken for a whole one.
    let mut stream = stage.open("reset")?;
    let mut half = [0; HALF.len()];
    stream.read_exact(&mut half)?;
    ensure!(half == *HALF, "{half:?}");
    stream.write_all(b"!")?;
    let end = stream.read(&mut half).map_err(|error| error.kind());
    ensure!(end == Err(ErrorKind::ConnectionReset), "the container's reset came as {end:?}");
    for (reset, how) in [(false, "Ok(0)"), (true, "Err(ConnectionReset)")] {
        let mut stream = stage.open("hold")?;
        stream.read_exact(&mut [0; 4])?;
        if reset {
            set_socket_linger(&stream, Some(Duration::ZERO))?;
        }
        drop(stream);
        stage.until_ended(how)?;
    }
    Stage::clear(engine)
}

fn a_slow_reader_slows_only_itself(engine: &Engine) -> Result<()> {
    let stage = Stage::set(engine)?;
    let mut stalled = stage.open("pour")?;
    let poured = || -> Result<u64> { Ok(stage.ask("poured")?.parse()?) };
    let mut last = 0;
    wait_until("the container's writer waits for its reader", || {
        std::thread::sleep(Duration::from_millis(500));
        let now = poured()?;
        Ok((now > 0 && std::mem::replace(&mut last, now) == now).then_some(()))
    })?;
    ensure!(last < BULK as u64, "all of {last} bytes are on the way to nobody");
    // Others are served meanwhile.
    stage.echo(&[b'y'; 256 << 10])?;
    let text = text();
    let mut buffer = vec![0; PERIOD];
    for (at, chunk) in pieces().enumerate() {
        stalled.read_exact(&mut buffer[..chunk]).with_context(|| format!("after {} bytes", at * PERIOD))?;
        ensure!(text.starts_with(&buffer[..chunk]), "other bytes after {}", at * PERIOD);
    }
    ensure!(stalled.read(&mut buffer)? == 0, "more than was sent");
    // The same the other way.
    let mut stream = stage.open("swallow slowly")?;
    let sent = 32 * PERIOD;
    (0..32).try_for_each(|_| stream.write_all(&text))?;
    stream.shutdown(Shutdown::Write)?;
    let mut said = String::new();
    stream.read_to_string(&mut said)?;
    ensure!(said == format!("{sent} true"), "the container heard `{said}` instead of {sent} bytes");
    Stage::clear(engine)
}

/// Many short connections, and datagrams of many senders: each gets its own answers, and nothing is left of them.
fn crowds_come_and_go(engine: &Engine) -> Result<()> {
    let stage = Stage::set(engine)?;
    let native = engine.stage == tests_harness::Stage::Native;
    let of_stage = |(natively, through_a_machine)| if native { natively } else { through_a_machine };
    let connections = match std::env::var("ENGINE_TEST_CONNECTIONS") {
        Ok(number) => number.parse().context("ENGINE_TEST_CONNECTIONS is no number")?,
        Err(_) => of_stage(CONNECTIONS),
    };
    let before = Usage::settled(engine)?;
    // Through a machine it takes long enough without waiting for threads, and those are the same programs'.
    let before = if native { before } else { before.without_threads() };
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|client| {
                let stage = &stage;
                scope.spawn(move || {
                    let mut mine = (client..connections).step_by(CLIENTS);
                    mine.try_for_each(|number| stage.echo(number.to_string().as_bytes()))
                })
            })
            .collect();
        clients.into_iter().try_for_each(|client| match client.join() {
            Ok(result) => result,
            Err(_) => bail!("a client panicked"),
        })
    })?;
    before.comes_back(engine)?;
    let count = of_stage(SENDERS);
    let senders = (0..count)
        .map(|_| {
            let socket = UdpSocket::bind("127.0.0.1:0")?;
            socket.connect(&stage.datagrams)?;
            socket.set_nonblocking(true)?;
            Ok(socket)
        })
        .collect::<Result<Vec<_>>>()?;
    for round in ["first", "second"] {
        let mut waiting: Vec<usize> = (0..count).collect();
        // Datagrams may be lost, and are sent again.
        wait_until("every sender has its own answer", || {
            for number in &waiting {
                senders[*number].send(format!("{round} {number}").as_bytes())?;
            }
            std::thread::sleep(Duration::from_millis(200));
            let mut buffer = [0; 64];
            let mut foreign = None;
            waiting.retain(|number| {
                let own = format!("{round} {number}");
                let mut answered = false;
                while let Ok(count) = senders[*number].recv(&mut buffer) {
                    let heard = String::from_utf8_lossy(&buffer[..count]).into_owned();
                    answered |= heard == own;
                    if !heard.ends_with(&format!(" {number}")) {
                        foreign = Some(format!("{heard} came to {number}"));
                    }
                }
                !answered
            });
            ensure!(foreign.is_none(), "{foreign:?}");
            Ok(waiting.is_empty().then_some(()))
        })?;
    }
    Stage::clear(engine)?;
    before.comes_back(engine)
}

/// A published port answers wherever its container is by now, in either family, and breaks off where it is nowhere.
fn a_port_follows_its_container_from_network_to_network(engine: &Engine) -> Result<()> {
    for network in ["one", "two", "--ipv4=false --ipv6 six"] {
        ok(engine, &format!("network create {network}"))?;
    }
    let serve = "while :; do echo served | nc -l -p 80; done";
    let run = ["run", "-d", "--init", "--name", "mover", "--network", "one", "-p", "127.0.0.1::80"];
    docker(engine, &[&run[..], &[tests_harness::IMAGE, "sh", "-c", serve]].concat())?.ok()?;
    let at = ok(engine, "port mover 80/tcp")?;
    says(&at, "served")?;
    for step in
        ["connect two", "disconnect one", "connect six", "disconnect two", "connect one", "disconnect six"]
    {
        ok(engine, &format!("network {step} mover"))?;
        says(&at, "served").with_context(|| format!("after {step}"))?;
    }
    ok(engine, "network disconnect one mover")?;
    let heard = TcpStream::connect(&at).and_then(|mut stream| {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.read(&mut [0; 16])
    });
    ensure!(
        !heard.as_ref().is_ok_and(|count| *count > 0),
        "somebody answers for a container without a network"
    );
    ensure!(
        !heard.is_err_and(|error| error.kind() == ErrorKind::WouldBlock),
        "nobody says that it is nowhere"
    );
    ok(engine, "network connect two mover")?;
    says(&at, "served")?;
    ok(engine, "rm -f mover")?;
    ok(engine, "network rm one two six").map(drop)
}

/// In the machine a connection goes by the network, past the engine, and there no other container can follow it.
fn where_connections_land_is_nobodys_but_the_hosts(engine: &Engine) -> Result<()> {
    if engine.stage == tests_harness::Stage::Native {
        crate::skip("ports are published on this computer itself");
        return Ok(());
    }
    let stage = Stage::set(engine)?;
    let streams = || engine.engine(["machine", "info", "--format", "{{.open_streams}}"])?.ok();
    let before = streams()?;
    let mut held = stage.open("hold")?;
    held.read_exact(&mut [0; 4])?;
    ensure!(streams()? == before, "the connection is one of the engine's");
    drop(held);
    // As the machine's own tool tells it: `198.18.0.3 . 1024 : 172.17.0.2 . 80`.
    let list = "chroot /proc/1/root /usr/sbin/nft list map inet engine landings4";
    let map = engine.engine(["machine", "shell", "-i", tests_harness::IMAGE, "sh", "-c", list])?.ok()?;
    let ports: Vec<&str> =
        map.split("198.18.0.3 . ").skip(1).filter_map(|rest| rest.split_whitespace().next()).collect();
    let [port] = ports[..] else { bail!("one port has been published, and these land:\n{map}") };
    let knock = format!("nc -w 10 198.18.0.3 {port} </dev/null && echo {port}; true");
    for network in ["bridge", "host"] {
        let reached =
            docker(engine, &["run", "--rm", "--network", network, tests_harness::IMAGE, "sh", "-c", &knock])?
                .ok()?;
        ensure!(reached.is_empty(), "from network {network} port {reached} is reached");
    }
    Stage::clear(engine)
}
