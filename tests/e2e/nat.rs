//! The NAT between real peers: a network namespace plays the machine, with the kernel's own TCP behind a TAP device, and
//! everyday tools; another one is the world. Natively only, as it needs namespaces.

use crate::Scenario;
use crate::names::SERVE;
use anyhow::{Context, Result, ensure};
use std::io::{Read, Write};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tests_harness::{Engine, Timed, World, wait_until};

pub(crate) fn native_scenarios() -> Vec<Scenario> {
    vec![Scenario { name: "nat::real_peers_talk_through_it", body: real_peers_talk_through_it }]
}

/// The world's address, as [`World`] has it.
const WORLD: &str = "203.0.113.1";
/// The world in IPv6, and this host beside it.
const WORLD6: &str = "2001:db8::1";
const HERE6: &str = "2001:db8::2/64";
/// Somebody behind the world, by a way that takes no large packets.
const FAR: &str = "192.0.2.9";
const FAR6: &str = "2001:db8:f::9";
/// The NAT's own addresses.
const GATEWAY: &str = "198.18.0.1";
const GATEWAY6: &str = "fdc7:9a1e:5d28::1";
/// Bytes fetched with a checksum. An unoptimised build takes its time.
const FILE_BYTES: u64 = if cfg!(debug_assertions) { 64 << 20 } else { 1 << 30 };
/// A lossy way loses one frame of so many. Done here: not every kernel has netem.
const LOST: u32 = 97;
/// Milliseconds of a long way, each way.
const DELAY: u64 = 25;
const LIMIT: Duration = Duration::from_secs(600);

/// A process that ends with this.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        // One that has ended by itself cannot be killed.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn background(mut command: Command) -> Result<Ended> {
    let name = command.get_program().to_string_lossy().into_owned();
    let command = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    Ok(Ended(command.spawn().with_context(|| format!("cannot start `{name}`: run installer/setup --tests"))?))
}

/// When a frame that comes now is to arrive.
fn due(delay: &AtomicU64) -> Instant {
    Instant::now() + Duration::from_millis(delay.load(Ordering::Relaxed))
}

/// A frame, and when it is to arrive.
type Dated = (Instant, Vec<u8>);

/// Delivers frames at their time, in their order, until nobody sends or `deliver` says no.
fn after_a_while(
    mut deliver: impl FnMut(&[u8]) -> bool + Send + 'static,
) -> (SyncSender<Dated>, JoinHandle<()>) {
    let (sender, frames) = sync_channel::<Dated>(4096);
    let thread = std::thread::spawn(move || {
        for (due, frame) in frames {
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            if !deliver(&frame) {
                return;
            }
        }
    });
    (sender, thread)
}

/// The namespace that plays the machine, and the NAT it is behind.
struct Guest {
    _tap: Ended,
    nat: Option<host_net::Handle>,
    stop: Arc<AtomicBool>,
    /// Every [`LOST`]th frame is lost, both ways.
    lossy: Arc<AtomicBool>,
    /// Milliseconds that a frame is under way, both ways.
    delay: Arc<AtomicU64>,
    pumps: Vec<JoinHandle<()>>,
    holder: World,
}

impl Guest {
    fn create(folder: &Path) -> Result<Self> {
        let holder = World::empty()?;
        let (near, far) = (folder.join("nat"), folder.join("tap"));
        let frames = UnixDatagram::bind(&near)?;
        frames.set_read_timeout(Some(Duration::from_millis(200)))?;
        let mut tap = holder.enter("socat");
        tap.arg("TUN:198.18.0.2/24,tun-type=tap,iff-no-pi,iff-up,tun-name=tap0").arg(format!(
            "UNIX-SENDTO:{},bind={}",
            near.display(),
            far.display()
        ));
        let tap = background(tap)?;
        wait_until("the TAP device is there", || Ok(far.exists().then_some(())))?;
        for arguments in [&["link", "set", "lo", "up"][..], &["route", "add", "default", "via", "198.18.0.1"]]
        {
            wait_until("the machine's route is there", || {
                let mut command = holder.enter("ip");
                command.args(arguments);
                Ok((tests_harness::run(command)?.code == 0).then_some(()))
            })?;
        }
        let resolv_conf = folder.join("resolv.conf");
        std::fs::write(&resolv_conf, format!("nameserver {WORLD}\n"))?;
        let (ours, theirs) = UnixStream::pair()?;
        let nat = host_net::spawn(theirs, host_net::Config { resolv_conf, ..host_net::Config::default() })?;
        let stop = Arc::new(AtomicBool::new(false));
        let (mut up, mut down) = (ours.try_clone()?, ours);
        let lossy = Arc::new(AtomicBool::new(false));
        let (receiver, stopping) = (frames.try_clone()?, stop.clone());
        let loser = || {
            let (lossy, mut count) = (lossy.clone(), 0_u32);
            move || {
                count = count.wrapping_add(1);
                lossy.load(Ordering::Relaxed) && count.is_multiple_of(LOST)
            }
        };
        let (mut loses_up, mut loses_down) = (loser(), loser());
        let delay = Arc::new(AtomicU64::new(0));
        let (long, later) = (delay.clone(), delay.clone());
        let (climbing, upper) = after_a_while(move |frame| up.write_all(frame).is_ok());
        let upwards = std::thread::spawn(move || {
            let mut frame = vec![0; 4 + 65_535];
            while !stopping.load(Ordering::Relaxed) {
                // Nothing for a while is no failure.
                let Ok(length) = receiver.recv(&mut frame[4..]) else { continue };
                if loses_up() {
                    continue;
                }
                frame[..4].copy_from_slice(&(length as u32).to_be_bytes());
                if climbing.send((due(&long), frame[..4 + length].to_vec())).is_err() {
                    return;
                }
            }
        });
        // A device that is gone takes no frames, as a pulled cable would not.
        let (falling, lower) = after_a_while(move |frame| {
            let _ = frames.send_to(frame, &far);
            true
        });
        let downwards = std::thread::spawn(move || {
            let (mut prefix, mut frame) = ([0; 4], vec![0; 65_553]);
            while down.read_exact(&mut prefix).is_ok() {
                let length = u32::from_be_bytes(prefix) as usize;
                if down.read_exact(&mut frame[..length]).is_err() {
                    return;
                }
                if !loses_down() && falling.send((due(&later), frame[..length].to_vec())).is_err() {
                    return;
                }
            }
        });
        let pumps = vec![upwards, upper, downwards, lower];
        Ok(Self { _tap: tap, nat: Some(nat), stop, lossy, delay, pumps, holder })
    }

    /// Runs a shell command as the machine would; it has to succeed.
    fn sh(&self, line: &str) -> Result<String> {
        let mut command = self.holder.enter("sh");
        command.args(["-c", line]);
        Timed::new(command).within(LIMIT).run()?.ok()
    }

    fn end(mut self) -> Result<host_net::Counters> {
        let counters = self.nat.take().context("it runs")?.stop();
        self.stop.store(true, Ordering::Relaxed);
        for pump in self.pumps.drain(..) {
            ensure!(pump.join().is_ok(), "a pump panicked");
        }
        Ok(counters)
    }
}

/// Gives the world IPv6, and somebody behind it.
fn beyond(world: &World) -> Result<World> {
    let far = World::empty()?;
    let sh = |mut command: Command, line: &str| {
        command.args(["-c", line]);
        Timed::new(command).within(LIMIT).run()?.ok().with_context(|| line.to_owned())
    };
    sh(Command::new("sh"), &format!("ip address add {HERE6} dev uplink nodad"))?;
    sh(Command::new("sh"), &format!("ip -6 route add {FAR6} via {WORLD6}"))?;
    // Whether all of an ICMP router's words are said depends on the moment, unless it may say as much as it likes.
    sh(
        world.enter("sh"),
        &format!(
            "ip address add {WORLD6}/64 dev world nodad && echo 1 > /proc/sys/net/ipv4/ip_forward && \
             echo 1 > /proc/sys/net/ipv6/conf/all/forwarding && echo 0 > /proc/sys/net/ipv4/icmp_ratelimit && \
             echo 0 > /proc/sys/net/ipv6/icmp/ratelimit && \
             ip link add near type veth peer name far netns {} && \
             ip address add 192.0.2.1/24 dev near && ip address add 2001:db8:f::1/64 dev near nodad && \
             ip link set near mtu 1400 up",
            far.id()
        ),
    )?;
    sh(
        far.enter("sh"),
        &format!(
            "ip link set lo up && ip address add {FAR}/24 dev far && ip address add {FAR6}/64 dev far nodad && \
             ip link set far mtu 1400 up && ip route add default via 192.0.2.1 && \
             ip -6 route add default via 2001:db8:f::1"
        ),
    )?;
    Ok(far)
}

fn real_peers_talk_through_it(engine: &Engine) -> Result<()> {
    let world = engine.world().context("natively there is a world")?;
    let folder = engine.path("nat");
    std::fs::create_dir(&folder)?;
    let in_world = |program: &str, arguments: &[&str]| {
        let mut command = world.enter(program);
        command.args(arguments);
        background(command)
    };
    let noise = tests_harness::Layer::noise("noise", FILE_BYTES as usize, 7)?;
    std::fs::write(folder.join("file"), &noise.tar)?;
    std::fs::write(folder.join("small"), &noise.tar[..4 << 20])?;
    std::fs::write(folder.join("tiny"), &noise.tar[..256 << 10])?;
    let sum = |name: &str| {
        let mut command = Command::new("sha256sum");
        command.arg(folder.join(name));
        Ok::<_, anyhow::Error>(Timed::new(command).within(LIMIT).run()?.ok()?[..64].to_owned())
    };
    let _far = beyond(world)?;
    let own = std::env::current_exe()?;
    let served = folder.display().to_string();
    let _servers = [
        in_world("busybox", &["httpd", "-f", "-p", "8080", "-h", &served])?,
        in_world("busybox", &["httpd", "-f", "-p", &format!("[{WORLD6}]:8086"), "-h", &served])?,
        in_world("iperf3", &["-s", "-p", "5201"])?,
        in_world(&own.display().to_string(), &[SERVE])?,
    ];
    let guest = Guest::create(&folder)?;
    let fetch = |name: &str| {
        guest.sh(&format!(
            "curl -sS --retry 20 --retry-connrefused --retry-delay 1 http://{WORLD}:8080/{name} | sha256sum"
        ))
    };

    ensure!(fetch("file")?.starts_with(&sum("file")?), "the file is not the same behind the NAT");
    // The NAT pings by the kernel's sockets for ordinary users, which a new namespace lets nobody use.
    std::fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647")?;
    guest.sh(&format!("ping -c 2 -W 20 {WORLD}"))?;
    for options in ["", "-R", "-P 4", "-u -b 20M", "-u -R -b 20M"] {
        let said = guest.sh(&format!("iperf3 -c {WORLD} -p 5201 -t 2 {options}"));
        said.with_context(|| format!("iperf3 {options}"))?;
    }
    // The name server at the gateway, which asks the one of the host's that resolv.conf names.
    for how in ["+notcp", "+tcp"] {
        let said = guest.sh(&format!("dig @198.18.0.1 {how} +short who.example"))?;
        ensure!(said == "203.0.113.2", "{how}: {said}");
    }
    let text = guest.sh("dig @198.18.0.1 +short long.example TXT")?;
    ensure!(text.len() > 15_000, "a long answer over TCP: {} bytes", text.len());
    let own = guest.sh("dig @198.18.0.1 +short host.docker.internal")?;
    ensure!(own == "198.18.0.254", "{own}");
    ensure!(guest.sh("dig @198.18.0.1 unknown.example")?.contains("NXDOMAIN"), "an unknown name");
    for options in ["", "-I"] {
        let way = guest.sh(&format!("traceroute -n -w 5 -q 1 -m 5 {options} {WORLD}"))?;
        ensure!(way.lines().last().is_some_and(|line| line.contains(WORLD)), "{options}: {way}");
    }
    the_hosts_resolver_changes(&guest, &folder.join("resolv.conf"))?;
    in_ipv6(&guest, &sum("small")?)?;
    errors_on_the_way(&guest)?;
    // Over a long way, a lossy one, and one that is both: slower, and still whole.
    for (delay, lossy) in [(DELAY, false), (0, true), (DELAY, true)] {
        guest.delay.store(delay, Ordering::Relaxed);
        guest.lossy.store(lossy, Ordering::Relaxed);
        let name = if delay > 0 && lossy { "tiny" } else { "small" };
        ensure!(fetch(name)?.starts_with(&sum(name)?), "not the same with {delay} ms, lossy: {lossy}");
    }
    let counters = guest.end()?;
    ensure!(counters.frames_in > 0 && counters.frames_out > 0, "{counters}");
    std::fs::remove_dir_all(&folder)?;
    Ok(())
}

/// A laptop that goes from one network to another: the resolvers of the new one are asked, without a word to the guest.
fn the_hosts_resolver_changes(guest: &Guest, resolv_conf: &Path) -> Result<()> {
    for (resolver, answer) in [("203.0.113.2", "SERVFAIL"), (WORLD, "203.0.113.2")] {
        std::fs::write(resolv_conf, format!("# another network\nnameserver {resolver}\n"))?;
        wait_until("the change is noticed", || {
            let said = guest.sh(&format!("dig @{GATEWAY} +tries=1 +time=20 who.example A; true"))?;
            Ok(said.contains(answer).then_some(()))
        })?;
    }
    Ok(())
}

/// What the machine has learnt by the NAT's advertisement carries everything that IPv4 does.
fn in_ipv6(guest: &Guest, sum: &str) -> Result<()> {
    wait_until("the machine has an address and a router in IPv6", || {
        let route = guest.sh("ip -6 route show default")?;
        let address = guest.sh("ip -6 address show dev tap0 scope global -tentative")?;
        Ok((route.contains("fe80::65:6eff:fe67:1") && address.contains("fdc7:9a1e:5d28:")).then_some(()))
    })?;
    let fetch = format!(
        "curl -sS --retry 20 --retry-connrefused --retry-delay 1 http://[{WORLD6}]:8086/small | sha256sum"
    );
    ensure!(guest.sh(&fetch)?.starts_with(sum), "the file is not the same in IPv6");
    guest.sh(&format!("ping -6 -c 2 -W 20 {WORLD6}"))?;
    for options in ["", "-R", "-u -b 20M", "-u -b 5M -l 4000"] {
        let said = guest.sh(&format!("iperf3 -6 -c {WORLD6} -p 5201 -t 1 {options}"));
        said.with_context(|| format!("iperf3 -6 {options}"))?;
    }
    for how in ["+notcp", "+tcp"] {
        let said = guest.sh(&format!("dig @{GATEWAY6} {how} +short who.example"))?;
        ensure!(said == "203.0.113.2", "{how}: {said}");
    }
    // Where the host has no way, and where nobody listens, a client hears so and can try another address.
    for nobody in ["[3fff:1::1]:80", &format!("[{WORLD6}]:1")] {
        let said = guest.sh(&format!("curl -sS --max-time 300 http://{nobody}/; echo $?"))?;
        ensure!(said.ends_with('7'), "{nobody}: {said}");
    }
    Ok(())
}

/// What routers say of packets is heard in the machine as if they said it to it.
fn errors_on_the_way(guest: &Guest) -> Result<()> {
    for (family, hops) in [("-4", [GATEWAY, WORLD, FAR]), ("-6", [GATEWAY6, WORLD6, FAR6])] {
        for options in ["", "-I", "-T"] {
            let to = hops[2];
            let way = guest.sh(&format!("traceroute {family} -n -w 20 -q 1 -m 6 {options} {to}"))?;
            let seen: Vec<&str> =
                way.lines().skip(1).filter_map(|line| line.split_whitespace().nth(1)).collect();
            ensure!(seen == hops, "{family} {options}: {way}");
        }
    }
    for (family, to, told) in
        [("-4", FAR, ["From 203.0.113.1", "mtu = 1400"]), ("-6", FAR6, ["From 2001:db8::1", "mtu=1400"])]
    {
        let said = guest.sh(&format!("ping {family} -M do -s 1440 -c 1 -W 20 {to}; true"))?;
        ensure!(told.iter().all(|word| said.contains(word)), "{family}: {said}");
        // And then it fits, in pieces.
        guest.sh(&format!("ping {family} -s 3000 -c 1 -W 20 {to}"))?;
    }
    Ok(())
}
