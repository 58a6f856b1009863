//! Networks: what they add to a start, what goes through them, and whether many of them stay as fast as few.
//!
//! Bytes and connections are those of `iperf3` and of this program, entered into containers' network namespaces: what is
//! measured is the way, not a tool in a container.

use super::side::Side;
use crate::figure;
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tests_harness::{IMAGE, Timed, wait_until};

/// What makes this program a server in a container's network.
pub(crate) const SERVE: &str = "serve-connections";

const PORT: &str = "5201";
const CONNECTIONS: &str = "5202";
/// Seconds of each transfer, and of connecting.
const SECONDS: u64 = 3;
/// Connections under way at a time.
const CLIENTS: usize = 4;

/// Networks, and containers on each.
const NETWORKS: usize = 100;
const ON_EACH: usize = 10;

/// Milliseconds that the default bridge adds to a start.
pub(super) fn start(side: &Side) -> Result<f64> {
    let mut api = side.api()?;
    let mut started = |network: &str| -> Result<f64> {
        let id = api.create_with("sleep 1000", json!({ "NetworkMode": network }))?;
        let begin = Instant::now();
        api.call("POST", &format!("/containers/{id}/start"), "")?;
        let time = begin.elapsed().as_secs_f64() * 1e3;
        api.call("DELETE", &format!("/containers/{id}?force=1"), "")?;
        Ok(time)
    };
    let without = started("none")?;
    Ok(started("bridge")? - without)
}

/// Two containers: `one` serves, on published ports too, and `two` is its neighbour.
pub(super) fn two(side: &Side) -> Result<()> {
    for (name, publish) in [("one", &[PORT, CONNECTIONS][..]), ("two", &[])] {
        let publish: Vec<String> = publish.iter().map(|port| format!("127.0.0.1::{port}")).collect();
        let mut words = vec!["run", "-d", "--name", name];
        publish.iter().for_each(|port| words.extend(["-p", port]));
        words.extend([IMAGE, "sleep", "10000"]);
        side.run(words)?.ok()?;
    }
    Ok(())
}

fn inspect(side: &Side, name: &str) -> Result<Value> {
    let said = side.run(["inspect", name])?.ok()?;
    Ok(serde_json::from_str::<Value>(&said)?[0].take())
}

/// A command in a container's network.
fn inside(side: &Side, name: &str, program: &str) -> Result<Command> {
    let pid = inspect(side, name)?["State"]["Pid"].as_u64().context("no pid")?;
    let mut command = Command::new("nsenter");
    command.arg(format!("--net=/proc/{pid}/ns/net")).arg("--").arg(program);
    Ok(command)
}

fn published(side: &Side, port: &str) -> Result<SocketAddr> {
    let said = side.run(["port", "one", port])?.ok()?;
    said.lines().next().context("the port is not published")?.parse().context("no address")
}

/// A server that ends with this.
struct Server(Child);

impl Server {
    fn start(mut command: Command) -> Result<Self> {
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        Ok(Self(child))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // One that has ended by itself cannot be killed.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// MiB/s from where `client` runs to `address`, where a server for one test is started first.
fn transfer(side: &Side, mut client: Command, address: &str, port: u16) -> Result<f64> {
    let mut server = inside(side, "one", "iperf3")?;
    server.args(["-s", "-1", "-p", PORT]);
    let _server = Server::start(server)?;
    let (port, seconds) = (port.to_string(), SECONDS.to_string());
    client.args(["-c", address, "-p", &port, "-t", &seconds, "-J", "--connect-timeout", "5000"]);
    let bits = wait_until("the server answers", || {
        let mut again = Command::new(client.get_program());
        again.args(client.get_args());
        // It tells of its failures as of its figures, and a server that is not there yet is one.
        let said: Value = serde_json::from_str(&Timed::new(again).run()?.stdout)?;
        Ok(said["end"]["sum_received"]["bits_per_second"].as_f64())
    })?;
    Ok(bits / 8.0 / f64::from(1 << 20))
}

/// MiB/s from one container to its neighbour.
pub(super) fn between(side: &Side) -> Result<f64> {
    let address = inspect(side, "one")?["NetworkSettings"]["Networks"]["bridge"]["IPAddress"].take();
    let address = address.as_str().context("no address")?.to_owned();
    transfer(side, inside(side, "two", "iperf3")?, &address, PORT.parse()?)
}

/// MiB/s from the host's localhost to a published port.
pub(super) fn publish(side: &Side) -> Result<f64> {
    let to = published(side, PORT)?;
    transfer(side, Command::new("iperf3"), &to.ip().to_string(), to.port())
}

/// New connections a second to a published port, each until the server closes it.
pub(super) fn connect(side: &Side) -> Result<f64> {
    let mut server = inside(side, "one", &std::env::current_exe()?.display().to_string())?;
    server.args([SERVE, CONNECTIONS]);
    let _server = Server::start(server)?;
    let to = published(side, CONNECTIONS)?;
    wait_until("the server answers", || Ok(greeted(to).then_some(())))?;
    let (stop, count) = (AtomicBool::new(false), AtomicU64::new(0));
    let failed = AtomicU64::new(0);
    let begin = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let counter = if greeted(to) { &count } else { &failed };
                    counter.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        std::thread::sleep(Duration::from_secs(SECONDS));
        stop.store(true, Ordering::Relaxed);
    });
    let seconds = begin.elapsed().as_secs_f64();
    let (count, failed) = (count.into_inner(), failed.into_inner());
    ensure!(failed * 100 < count, "{failed} connections failed beside {count}");
    Ok(count as f64 / seconds)
}

/// A proxy accepts for a server that is not there, but has no word of it.
fn greeted(to: SocketAddr) -> bool {
    let mut word = [0; 1];
    TcpStream::connect(to).is_ok_and(|mut stream| stream.read(&mut word).is_ok_and(|count| count == 1))
}

/// The server's side: a byte for whoever comes, and the end.
pub(crate) fn serve(port: &str) -> Result<()> {
    use std::io::Write;

    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port.parse()?))?;
    for stream in listener.incoming() {
        // Who is gone already needs no word.
        let _ = stream?.write_all(b"x");
    }
    Ok(())
}

/// A hundred networks of ten running containers each: what the last tenth costs against the first.
pub(super) fn linear(side: &Side) -> Result<()> {
    let mut api = side.api()?;
    let mut figures = [const { Vec::<f64>::new() }; 4];
    let mut containers = Vec::new();
    let timed = |work: &mut dyn FnMut() -> Result<()>| -> Result<f64> {
        let begin = Instant::now();
        work()?;
        Ok(begin.elapsed().as_secs_f64() * 1e3)
    };
    for network in 0..NETWORKS {
        let name = format!("bench-{network}");
        let body =
            json!({ "Name": name, "IPAM": { "Config": [{ "Subnet": format!("10.77.{network}.0/24") }] } });
        figures[0].push(timed(&mut || api.call("POST", "/networks/create", &body.to_string()).map(drop))?);
        let mut starts = 0.0;
        for _ in 0..ON_EACH {
            let id = api.create_with("sleep 10000", json!({ "NetworkMode": name }))?;
            starts += timed(&mut || api.call("POST", &format!("/containers/{id}/start"), "").map(drop))?;
            containers.push(id);
        }
        figures[1].push(starts / ON_EACH as f64);
        let last = json!({ "Container": containers.last() }).to_string();
        let before = format!("/networks/bench-{}", network.saturating_sub(1));
        if network > 0 {
            figures[2].push(timed(&mut || api.call("POST", &format!("{before}/connect"), &last).map(drop))?);
        }
    }
    let list = timed(&mut || api.call("GET", "/networks", "").map(drop))?;
    for some in containers.chunks(ON_EACH) {
        let mut removals = 0.0;
        for id in some {
            removals +=
                timed(&mut || api.call("DELETE", &format!("/containers/{id}?force=1"), "").map(drop))?;
        }
        figures[3].push(removals / some.len() as f64);
    }
    for network in 0..NETWORKS {
        api.call("DELETE", &format!("/networks/bench-{network}"), "")?;
    }
    figure(&format!("list of {NETWORKS} networks"), list, "ms");
    for (what, times) in
        ["network create", "container start", "connect", "container remove"].iter().zip(&figures)
    {
        let tenth = times.len() / 10;
        let mean = |some: &[f64]| some.iter().sum::<f64>() / some.len() as f64;
        // Removal begins with everything there and ends with nothing.
        let (few, many) = match *what {
            "container remove" => (mean(&times[times.len() - tenth..]), mean(&times[..tenth])),
            _ => (mean(&times[..tenth]), mean(&times[times.len() - tenth..])),
        };
        figure(&format!("{what}, with few"), few, "ms");
        figure(&format!("{what}, with {} containers", NETWORKS * ON_EACH), many, "ms");
    }
    Ok(())
}
