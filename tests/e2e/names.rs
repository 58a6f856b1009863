//! Names as a resolver asks for them: by a client and a server that this program plays in containers, and by `dig`.

use crate::networks::{clear, docker, ok, sleeper};
use anyhow::{Context, Result, bail, ensure};
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use tests_harness::{Engine, IMAGE as BUSYBOX, Layer, PATIENCE, Stage, TestImage, wait_until};

crate::scenarios![
    names_are_answered_to_a_thousand_askers,
    a_containers_own_name_server_is_asked_from_inside,
    dig_agrees,
];

/// The argument that makes this program a name server.
pub(crate) const SERVE: &str = "serve-names";
/// The argument that makes this program ask: a name, a type's number, `udp` or `tcp`, and how often at once.
pub(crate) const ASK: &str = "ask-names";
const IMAGE: &str = "names:test";
const SERVER: &str = "127.0.0.11:53";
/// What the played server says about every name that has text.
const TEXT_BYTES: usize = 60 * 256;

const A: u16 = 1;
const PTR: u16 = 12;
const TXT: u16 = 16;
const AAAA: u16 = 28;
const SRV: u16 = 33;

fn query(id: u16, name: &str, kind: u16) -> Vec<u8> {
    let mut bytes = id.to_be_bytes().to_vec();
    bytes.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in name.split('.').filter(|label| !label.is_empty()) {
        bytes.push(label.len() as u8);
        bytes.extend(label.as_bytes());
    }
    bytes.push(0);
    bytes.extend(kind.to_be_bytes());
    bytes.extend(1_u16.to_be_bytes());
    bytes
}

/// Answers questions for ever: an address is the asker's own, text is long, services are one, and `unknown.…` is not.
pub(crate) fn serve() -> Result<()> {
    let streams = TcpListener::bind("0.0.0.0:53")?;
    std::thread::spawn(move || {
        while let Ok((mut stream, peer)) = streams.accept() {
            // An asker that goes away is no reason to end.
            let _ = answer_one(&mut stream, peer);
        }
    });
    let socket = UdpSocket::bind("0.0.0.0:53")?;
    let mut buffer = [0; 2048];
    loop {
        let (count, peer) = socket.recv_from(&mut buffer)?;
        if let Some(reply) = answer(&buffer[..count], peer.ip(), false) {
            socket.send_to(&reply, peer)?;
        }
    }
}

fn answer_one(stream: &mut TcpStream, peer: SocketAddr) -> Result<()> {
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut query = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut query)?;
    let reply = answer(&query, peer.ip(), true).context("no question")?;
    stream.write_all(&(reply.len() as u16).to_be_bytes())?;
    stream.write_all(&reply)?;
    Ok(())
}

fn answer(query: &[u8], peer: IpAddr, over_tcp: bool) -> Option<Vec<u8>> {
    let end = 12 + query.get(12..)?.iter().position(|byte| *byte == 0)? + 1;
    let kind = u16::from_be_bytes([*query.get(end)?, *query.get(end + 1)?]);
    let mut reply = query.get(..end + 4)?.to_vec();
    reply[2] |= 0x84;
    reply[3] = 0x80;
    reply[6..12].fill(0);
    let data = match (kind, peer) {
        _ if reply[13..].starts_with(b"unknown") => {
            reply[3] |= 3;
            return Some(reply);
        }
        (A, IpAddr::V4(peer)) => peer.octets().to_vec(),
        (SRV, _) => b"\x00\x01\x00\x02\x1f\x90\x03web\x07example\x00".to_vec(),
        (TXT, _) if over_tcp => [&[255_u8][..], &[b't'; 255]].concat().repeat(TEXT_BYTES / 256),
        (TXT, _) => {
            reply[2] |= 2;
            return Some(reply);
        }
        _ => return Some(reply),
    };
    reply[7] = 1;
    reply.extend([0xc0, 12]);
    reply.extend(kind.to_be_bytes());
    reply.extend([0, 1, 0, 0, 0, 9]);
    reply.extend((data.len() as u16).to_be_bytes());
    reply.extend(data);
    Some(reply)
}

/// Asks, and prints what came: how many answers, the last one's code, records, length, whether it was cut, and its end.
pub(crate) fn ask(arguments: &[String]) -> Result<()> {
    let [name, kind, transport, count] = arguments else {
        bail!("name, type, transport and count are wanted")
    };
    let (kind, count): (u16, u16) = (kind.parse()?, count.parse()?);
    let mut last = Vec::new();
    let mut answered = 0;
    if transport == "tcp" {
        let mut stream = TcpStream::connect(SERVER)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        for id in 0..count {
            let query = query(id, name, kind);
            stream.write_all(&(query.len() as u16).to_be_bytes())?;
            stream.write_all(&query)?;
            let mut length = [0; 2];
            stream.read_exact(&mut length)?;
            last = vec![0; usize::from(u16::from_be_bytes(length))];
            stream.read_exact(&mut last)?;
            answered += u16::from(last[..2] == id.to_be_bytes());
        }
    } else {
        // As many sockets as the questions of a busy program would have, all asked before one is read.
        let sockets: Vec<UdpSocket> =
            (0..count.min(100)).map(|_| UdpSocket::bind("127.0.0.1:0")).collect::<std::io::Result<_>>()?;
        for round in 0..count.div_ceil(100) {
            for (at, socket) in sockets.iter().enumerate() {
                socket.connect(SERVER)?;
                socket.set_read_timeout(Some(PATIENCE))?;
                socket.send(&query(round * 100 + at as u16, name, kind))?;
            }
        }
        let mut buffer = vec![0; 65_535];
        for _ in 0..count.div_ceil(100) {
            for socket in &sockets {
                let length = socket.recv(&mut buffer)?;
                last = buffer[..length].to_vec();
                answered += 1;
            }
        }
    }
    let tail: String =
        last[last.len().saturating_sub(4)..].iter().map(|byte| format!("{byte:02x}")).collect();
    let mut out = std::io::stdout();
    writeln!(
        out,
        "answered={answered} code={} records={} bytes={} cut={} tail={tail}",
        last[3] & 15,
        u16::from_be_bytes([last[6], last[7]]),
        last.len(),
        last[2] >> 1 & 1
    )?;
    Ok(())
}

fn load(engine: &Engine) -> Result<()> {
    let own = std::fs::read(std::env::current_exe()?)?;
    engine.load(&TestImage::new(vec![Layer::program("names", &own)?]), IMAGE)
}

fn asked(engine: &Engine, container: &str, name: &str, kind: u16, how: &str, count: u16) -> Result<String> {
    let (kind, count) = (kind.to_string(), count.to_string());
    docker(engine, &["exec", container, "/names", ASK, name, &kind, how, &count])?.ok()
}

fn hex(address: &str) -> Result<String> {
    let address: std::net::Ipv4Addr = address.parse()?;
    Ok(address.octets().iter().map(|byte| format!("{byte:02x}")).collect())
}

fn names_are_answered_to_a_thousand_askers(engine: &Engine) -> Result<()> {
    load(engine)?;
    ok(engine, "network create --subnet 10.97.1.0/24 --ipv6 --subnet fd97:1::/64 dns1")?;
    sleeper(engine, "named", "--network dns1 --ip 10.97.1.10 --ip6 fd97:1::10 --network-alias shop")?;
    ok(engine, &format!("run -d --name asker --network dns1 {IMAGE} /names {SERVE}"))?;
    let ask = |name: &str, kind, how, count| asked(engine, "asker", name, kind, how, count);
    for (name, kind, tail) in [
        ("named", A, "0a61010a"),
        ("SHOP.dns1", A, "0a61010a"),
        ("shop", AAAA, "00000010"),
        // `named.dns1`, and the root.
        ("10.1.97.10.in-addr.arpa", PTR, "6e733100"),
    ] {
        for how in ["udp", "tcp"] {
            let said = ask(name, kind, how, 1)?;
            ensure!(
                said.starts_with("answered=1 code=0 records=1") && said.ends_with(tail),
                "{name} {kind} over {how}: {said}"
            );
        }
    }
    let crowd = ask("named", A, "udp", 1000)?;
    ensure!(crowd.starts_with("answered=1000 code=0 records=1"), "{crowd}");
    let many = ask("named", A, "tcp", 200)?;
    ensure!(many.starts_with("answered=200 code=0"), "{many}");
    clear(engine, "named asker", "dns1")
}

/// The server is reached only by the container's own way: it sees the container's address.
fn a_containers_own_name_server_is_asked_from_inside(engine: &Engine) -> Result<()> {
    load(engine)?;
    ok(engine, "network create --subnet 10.97.2.0/24 dns2")?;
    ok(engine, "network create --subnet 10.97.3.0/24 --internal dns3")?;
    ok(
        engine,
        &format!(
            "run -d --name server --network name=dns2,ip=10.97.2.53 --network name=dns3,ip=10.97.3.53 {IMAGE} /names {SERVE}"
        ),
    )?;
    let asker = |name: &str, network: &str, address: &str, dns: &str| {
        let options = format!(
            "--network {network} --ip {address} --dns {dns} --dns-search example --dns-option ndots:2"
        );
        ok(engine, &format!("run -d --name {name} {options} {IMAGE} /names {SERVE}"))
    };
    asker("open", "dns2", "10.97.2.20", "10.97.2.53")?;
    asker("sealed", "dns3", "10.97.3.20", "10.97.3.53")?;
    for (container, address) in [("open", "10.97.2.20"), ("sealed", "10.97.3.20")] {
        let tail = hex(address)?;
        wait_until("the name server answers", || {
            let said = asked(engine, container, "who.example", A, "udp", 1)?;
            Ok((said.contains("code=0 records=1") && said.ends_with(&tail)).then_some(()))
        })
        .with_context(|| format!("from {container}"))?;
        let cut = asked(engine, container, "long.example", TXT, "udp", 1)?;
        ensure!(cut.contains("code=0 records=0") && cut.contains("cut=1"), "{cut}");
        let whole = asked(engine, container, "long.example", TXT, "tcp", 1)?;
        let length = TEXT_BYTES + 12 + 14 + 4 + 12;
        ensure!(whole.contains(&format!("bytes={length} cut=0")), "{whole}, not {length}");
        let service = asked(engine, container, "_web._tcp.example", SRV, "udp", 1)?;
        ensure!(service.contains("code=0 records=1"), "{service}");
        let unknown = asked(engine, container, "unknown.example", A, "udp", 1)?;
        ensure!(unknown.contains("code=3 records=0"), "{unknown}");
    }
    let crowd = asked(engine, "open", "who.example", A, "udp", 1000)?;
    ensure!(crowd.starts_with("answered=1000"), "{crowd}");
    let options = "--network dns2 --dns 10.97.2.53 --dns-search example --dns-option ndots:2";
    let text = ok(engine, &format!("run --rm {options} {BUSYBOX} cat /etc/resolv.conf"))?;
    ensure!(
        text.contains("nameserver 127.0.0.11") && text.contains("search example") && text.contains("ndots:2"),
        "{text}"
    );
    clear(engine, "server open sealed", "dns2 dns3")
}

/// The usual tool from inside a container's namespace, which only a native engine's host can enter.
fn dig_agrees(engine: &Engine) -> Result<()> {
    if engine.stage != Stage::Native {
        crate::skip("a container's namespace in the machine cannot be entered from here");
        return Ok(());
    }
    ok(engine, "network create --subnet 10.97.4.0/24 dns4")?;
    for number in 1..=40 {
        sleeper(engine, &format!("many{number}"), "--network dns4 --network-alias many --stop-signal KILL")?;
    }
    let key = ok(engine, "inspect -f {{.NetworkSettings.SandboxKey}} many1")?;
    let dig = |words: &str| -> Result<String> {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={key}")).args(["--", "dig", "@127.0.0.11"]).args(words.split_whitespace());
        tests_harness::run(command)?.ok()
    };
    let address = ok(engine, "inspect -f {{.NetworkSettings.Networks.dns4.IPAddress}} many7")?;
    ensure!(dig("+short many7")? == address, "{}", dig("many7")?);
    ensure!(dig(&format!("+short -x {address}"))? == "many7.dns4.", "{}", dig(&format!("-x {address}"))?);
    ensure!(dig("+short many7 AAAA")?.is_empty() && dig("many7 AAAA")?.contains("NOERROR"), "no IPv6");
    let unknown = dig("nobody.invalid")?;
    ensure!(unknown.contains("SERVFAIL") || unknown.contains("NXDOMAIN"), "{unknown}");
    // Too long for who does not say that it takes more; then asked again over TCP by itself.
    let cut = dig("+noedns +ignore many")?;
    ensure!(cut.contains(" tc ") && cut.contains("ANSWER: 30"), "{cut}");
    ensure!(dig("+noedns +short many")?.lines().count() == 40, "{}", dig("many")?);
    ensure!(dig("+bufsize=4096 +notcp +ignore +short many")?.lines().count() == 40, "{}", dig("many")?);
    let names: Vec<String> = (1..=40).map(|number| format!("many{number}")).collect();
    clear(engine, &names.join(" "), "dns4")
}
