//! Networks of the user's own: topologies, isolation, names, published ports, and what bad requests leave behind.

use anyhow::{Context, Result, bail, ensure};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream, UdpSocket};
use std::time::Duration;
use tests_harness::{Engine, Finished, IMAGE, Layer, PATIENCE, Stage, TestImage, wait_until};

crate::scenarios![
    packets_cross_two_routers,
    networks_are_apart_and_internal_ones_sealed,
    containers_know_each_other_by_name,
    a_running_container_joins_and_leaves,
    what_is_asked_of_an_address_is_had,
    children_of_the_hosts_interface_are_on_its_network,
    links_of_the_default_network,
    without_icc_only_the_gateway_is_reached,
    a_parent_that_leads_nowhere_is_made_and_removed,
    a_vlan_parent_is_made_and_removed,
    one_container_uses_anothers_network,
    ports_are_published,
    published_ports_carry_streams_and_datagrams,
    a_port_of_another_program_is_refused,
    a_thousand_ports_at_once,
    networks_and_names_survive_the_engine,
    refused_requests_leave_nothing,
];

/// The argument that makes this program answer datagrams.
pub(crate) const ECHO: &str = "answer-datagrams";
pub(crate) const ECHO_IMAGE: &str = "echo:test";

pub(crate) fn docker(engine: &Engine, arguments: &[&str]) -> Result<Finished> {
    match engine.docker(arguments) {
        Some(command) => tests_harness::run(command),
        None => bail!("there is no docker CLI on this computer"),
    }
}

/// Runs `docker` with arguments separated by spaces; it has to succeed.
pub(crate) fn ok(engine: &Engine, line: &str) -> Result<String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    docker(engine, &words)?.ok()
}

pub(crate) fn sleeper(engine: &Engine, name: &str, options: &str) -> Result<()> {
    ok(engine, &format!("run -d --name {name} {options} {IMAGE} sleep 1000")).map(drop)
}

pub(crate) fn shell(engine: &Engine, container: &str, script: &str) -> Result<Finished> {
    docker(engine, &["exec", container, "sh", "-c", script])
}

pub(crate) fn reaches(engine: &Engine, from: &str, address: &str) -> Result<bool> {
    Ok(shell(engine, from, &format!("ping -c 1 -W 2 {address}"))?.code == 0)
}

pub(crate) fn clear(engine: &Engine, containers: &str, networks: &str) -> Result<()> {
    if !containers.is_empty() {
        ok(engine, &format!("rm -f {containers}"))?;
    }
    if !networks.is_empty() {
        ok(engine, &format!("network rm {networks}"))?;
    }
    Ok(())
}

/// Four networks, the last of them sealed, and two routers: `west` - net1 - `gate1` - net2 - `gate2` - net3 - `east`,
/// and `gate2` - net4 - `vault`.
fn packets_cross_two_routers(engine: &Engine) -> Result<()> {
    for number in 1..=4 {
        let internal = if number == 4 { "--internal" } else { "" };
        ok(
            engine,
            &format!(
                "network create --subnet 10.91.{number}.0/24 --ipv6 --subnet fd91:{number}::/64 {internal} net{number}"
            ),
        )?;
    }
    let end = |name: &str, net: u8| {
        let addresses = format!("--network net{net} --ip 10.91.{net}.10 --ip6 fd91:{net}::10");
        sleeper(engine, name, &format!("{addresses} --cap-add NET_ADMIN"))
    };
    end("west", 1)?;
    end("east", 3)?;
    end("vault", 4)?;
    let router = |name: &str, host: u8, nets: &[u8]| {
        let legs: Vec<String> = nets
            .iter()
            .map(|net| format!("--network name=net{net},ip=10.91.{net}.{host},ip6=fd91:{net}::{host}"))
            .collect();
        let forwarding = "--sysctl net.ipv4.ip_forward=1 --sysctl net.ipv6.conf.all.forwarding=1";
        sleeper(engine, name, &format!("--cap-add NET_ADMIN {forwarding} {}", legs.join(" ")))
    };
    router("gate1", 20, &[1, 2])?;
    router("gate2", 30, &[2, 3, 4])?;
    // Static routes: through which of its neighbours each reaches the networks it is not on.
    for (container, far, net, host) in [
        ("west", &[3, 4][..], 1, 20),
        ("gate1", &[3, 4], 2, 30),
        ("gate2", &[1], 2, 20),
        ("east", &[1, 4], 3, 30),
        ("vault", &[1, 3], 4, 30),
    ] {
        for far in far {
            let four = format!("ip route add 10.91.{far}.0/24 via 10.91.{net}.{host}");
            let six = format!("ip -6 route add fd91:{far}::/64 via fd91:{net}::{host}");
            shell(engine, container, &format!("{four} && {six}"))?.ok()?;
        }
    }
    for (from, to) in [("west", 3), ("east", 1), ("west", 4), ("vault", 1), ("east", 4)] {
        // A router that has just come up has its neighbours to find first.
        for address in [format!("10.91.{to}.10"), format!("fd91:{to}::10")] {
            wait_until("the packets find their way", || Ok(reaches(engine, from, &address)?.then_some(())))
                .with_context(|| format!("{from} does not reach {address}"))?;
        }
    }
    let way = shell(engine, "west", "traceroute -n -q 1 -m 4 -w 5 10.91.3.10")?.ok()?;
    for hop in ["10.91.1.20", "10.91.2.30", "10.91.3.10"] {
        ensure!(way.contains(hop), "{hop} is not on the way:\n{way}");
    }
    // Without routes the networks are apart, and the sealed one leads nowhere.
    shell(engine, "vault", "ip route del 10.91.1.0/24; ip -6 route del fd91:1::/64")?.ok()?;
    for address in ["10.91.1.10", "fd91:1::10", engine.outside_address()] {
        ensure!(!reaches(engine, "vault", address)?, "the sealed network leads to {address}");
    }
    clear(engine, "west east vault gate1 gate2", "net1 net2 net3 net4")
}

fn networks_are_apart_and_internal_ones_sealed(engine: &Engine) -> Result<()> {
    ok(engine, "network create --subnet 10.92.1.0/24 --ipv6 --subnet fd92:1::/64 left")?;
    ok(engine, "network create --subnet 10.92.2.0/24 --ipv6 --subnet fd92:2::/64 right")?;
    ok(engine, "network create --subnet 10.92.3.0/24 --ipv6 --subnet fd92:3::/64 --internal vault")?;
    sleeper(engine, "la", "--network left --ip 10.92.1.10 --ip6 fd92:1::10")?;
    sleeper(engine, "lb", "--network left --ip 10.92.1.11 --ip6 fd92:1::11")?;
    sleeper(engine, "ra", "--network right --ip 10.92.2.10 --ip6 fd92:2::10")?;
    sleeper(engine, "va", "--network vault --ip 10.92.3.10 --ip6 fd92:3::10")?;
    ensure!(reaches(engine, "la", "10.92.1.11")? && reaches(engine, "la", "fd92:1::11")?, "neighbours");
    for (from, to) in [
        ("la", "10.92.2.10"),
        ("ra", "10.92.1.10"),
        ("la", "fd92:2::10"),
        ("ra", "fd92:1::10"),
        ("la", "10.92.3.10"),
        ("va", "10.92.1.10"),
        ("la", "fd92:3::10"),
        ("va", "fd92:1::10"),
        // Nor by the other network's gateway, which is the host.
        ("va", "10.92.1.1"),
    ] {
        ensure!(!reaches(engine, from, to)?, "{from} reaches {to}");
    }
    let outside = engine.outside_address();
    ensure!(!reaches(engine, "va", outside)?, "an internal network leads outside");
    ensure!(!shell(engine, "va", "ip route")?.ok()?.contains("default"), "an internal network has a way out");
    clear(engine, "la lb ra va", "left right vault")
}

fn containers_know_each_other_by_name(engine: &Engine) -> Result<()> {
    ok(engine, "network create front")?;
    sleeper(engine, "web1", "--network front --network-alias web")?;
    sleeper(engine, "web2", "--network front --network-alias web")?;
    sleeper(engine, "asker", "--network front")?;
    let one = ok(engine, "inspect -f {{.NetworkSettings.Networks.front.IPAddress}} web1")?;
    let two = ok(engine, "inspect -f {{.NetworkSettings.Networks.front.IPAddress}} web2")?;
    let id = ok(engine, "inspect -f {{.Id}} web1")?;
    let resolv = shell(engine, "asker", "cat /etc/resolv.conf")?.ok()?;
    ensure!(resolv.contains("nameserver 127.0.0.11"), "{resolv}");
    for name in ["web1", "web1.front", &id[..12]] {
        let said = shell(engine, "asker", &format!("nslookup {name}"))?;
        ensure!(said.stdout.contains(&one), "{name}: {said:?}");
    }
    let both = shell(engine, "asker", "nslookup web")?.stdout;
    ensure!(both.contains(&one) && both.contains(&two), "{both}");
    let back = shell(engine, "asker", &format!("nslookup {one}"))?.stdout;
    ensure!(back.contains("web1.front"), "{back}");
    ensure!(reaches(engine, "asker", "web")?, "by alias");
    // Port 53 is still the container's own.
    shell(engine, "asker", "nc -l -p 53 & sleep 0.2; kill $!")?.ok()?;
    ok(engine, "rename web1 shop")?;
    let renamed = shell(engine, "asker", "nslookup shop")?.stdout;
    ensure!(renamed.contains(&one), "{renamed}");
    ok(engine, "rm -f web2")?;
    let one_left = shell(engine, "asker", "nslookup web")?.stdout;
    ensure!(!one_left.contains(&two), "{one_left}");
    clear(engine, "shop asker", "front")
}

fn a_running_container_joins_and_leaves(engine: &Engine) -> Result<()> {
    ok(engine, "network create back")?;
    sleeper(engine, "mover", "")?;
    sleeper(engine, "stayer", "--network back")?;
    ok(engine, "network connect --alias guest back mover")?;
    ensure!(reaches(engine, "stayer", "guest")? && reaches(engine, "mover", "stayer")?, "both ways");
    let hosts = shell(engine, "mover", "cat /etc/hosts")?.ok()?;
    let address = ok(engine, "inspect -f {{.NetworkSettings.Networks.back.IPAddress}} mover")?;
    ensure!(hosts.contains(&address), "{hosts}");
    docker(engine, &["network", "connect", "back", "mover"])?
        .fails_with(1, "endpoint with name mover already exists in network back")?;
    docker(engine, &["network", "rm", "back"])?.fails_with(1, "has active endpoints")?;
    ok(engine, "network disconnect bridge mover")?;
    let routes = shell(engine, "mover", "ip route")?.ok()?;
    ensure!(
        routes.contains("default") && routes.lines().count() == 2,
        "the other network leads out: {routes}"
    );
    ok(engine, "network disconnect back mover")?;
    let links = shell(engine, "mover", "ls /sys/class/net")?.ok()?;
    ensure!(links == "lo", "{links}");
    ensure!(!shell(engine, "mover", "cat /etc/hosts")?.ok()?.contains(&address), "its line stays behind");
    clear(engine, "mover stayer", "back")
}

fn what_is_asked_of_an_address_is_had(engine: &Engine) -> Result<()> {
    ok(
        engine,
        "network create --subnet 10.93.0.0/24 --ip-range 10.93.0.128/25 --gateway 10.93.0.1 --aux-address x=10.93.0.128 plan",
    )?;
    sleeper(engine, "fixed", "--network plan --ip 10.93.0.77 --mac-address 02:42:00:00:00:77")?;
    sleeper(engine, "free", "--network plan")?;
    let shown = ok(engine, "inspect -f {{json .NetworkSettings.Networks.plan}} fixed")
        .or_else(|_| ok(engine, "inspect fixed"))?;
    ensure!(shown.contains("10.93.0.77") && shown.contains("02:42:00:00:00:77"), "{shown}");
    let free = ok(engine, "inspect -f {{.NetworkSettings.Networks.plan.IPAddress}} free")?;
    ensure!(free == "10.93.0.129", "{free}: the range's first free address");
    docker(engine, &["run", "--rm", "--network", "plan", "--ip", "10.93.0.77", IMAGE, "true"])?
        .fails_with(125, "Address already in use")?;
    docker(engine, &["run", "--rm", "--network", "plan", "--ip", "10.94.0.1", IMAGE, "true"])?
        .fails_with(125, "no configured subnet or ip-range contain the IP address 10.94.0.1")?;
    clear(engine, "fixed free", "plan")
}

/// macvlan and ipvlan: the world sees the containers' own addresses. Natively only: the machine's NAT is no switch.
fn children_of_the_hosts_interface_are_on_its_network(engine: &Engine) -> Result<()> {
    if engine.stage != Stage::Native {
        crate::skip("the machine's interface leads to a NAT, not to a network of the host's");
        return Ok(());
    }
    let (subnet, outside) = ("--subnet 203.0.113.0/24 --ip-range 203.0.113.128/25", engine.outside_address());
    for driver in ["macvlan", "ipvlan"] {
        let make = format!("network create -d {driver} {subnet} --gateway {outside} -o parent=uplink lan");
        let made = docker(engine, &make.split(' ').collect::<Vec<_>>())?;
        if made.code != 0 {
            let why = format!("this kernel has no {driver} driver (module `{driver}`)");
            ensure!(made.stderr.contains(&why), "{made:?}");
            crate::skip(&why);
            continue;
        }
        sleeper(engine, "child", "--network lan")?;
        ensure!(reaches(engine, "child", outside)?, "a {driver} child does not reach its network");
        let address = ok(engine, "inspect -f {{.NetworkSettings.Networks.lan.IPAddress}} child")?;
        ensure!(address.starts_with("203.0.113."), "{address}");
        clear(engine, "child", "lan")?;
    }
    Ok(())
}

/// macvlan and ipvlan without a parent: the containers reach each other, and nothing else.
fn a_parent_that_leads_nowhere_is_made_and_removed(engine: &Engine) -> Result<()> {
    let before = leavings(engine)?;
    for driver in ["macvlan", "ipvlan"] {
        let make = ["network", "create", "-d", driver, "--subnet", "10.92.1.0/24", "alone"];
        let made = docker(engine, &make)?;
        let why = ["dummy", driver].map(|kind| format!("this kernel has no {kind} driver (module `{kind}`)"));
        if made.code == 0 {
            let internal = ok(engine, "network inspect -f {{.Internal}} alone")?;
            ensure!(internal == "true", "{internal}");
            sleeper(engine, "first", "--network alone --ip 10.92.1.10")?;
            let ping = ["run", "--rm", "--network", "alone", IMAGE, "ping", "-c", "1", "-w", "30"];
            docker(engine, &[&ping[..], &["10.92.1.10"]].concat())?.ok()?;
            clear(engine, "first", "alone")?;
        } else {
            ensure!(why.iter().any(|why| made.stderr.contains(why)), "{made:?}");
            crate::skip(&made.stderr);
        }
        let after = leavings(engine)?;
        ensure!(before == after, "{driver}: {before:?} and then {after:?}");
    }
    Ok(())
}

/// A VLAN of the host's interface is made with the first network on it, and goes with the last.
fn a_vlan_parent_is_made_and_removed(engine: &Engine) -> Result<()> {
    let host = |words: &[&str]| -> Result<Finished> {
        docker(engine, &[&["run", "--rm", "--network", "host", IMAGE][..], words].concat())
    };
    let routes = host(&["ip", "route", "show", "default"])?.ok()?;
    let uplink = routes.split_whitespace().skip_while(|word| *word != "dev").nth(1);
    let vlan = format!("{}.77", uplink.context("there is no way out")?);
    let parent = format!("parent={vlan}");
    let create = |driver: &str, subnet: &str, name: &str| {
        docker(engine, &["network", "create", "-d", driver, "--subnet", subnet, "-o", &parent, name])
    };
    let made = create("macvlan", "10.92.2.0/24", "tagged")?;
    if made.code != 0 {
        let why =
            ["8021q", "macvlan"].map(|kind| format!("this kernel has no {kind} driver (module `{kind}`)"));
        ensure!(why.iter().any(|why| made.stderr.contains(why)), "{made:?}");
        crate::skip(&made.stderr);
        return host(&["ip", "link", "show", &vlan])?.fails_with(2, "can't find device").map(drop);
    }
    host(&["ip", "link", "show", &vlan])?.ok()?;
    sleeper(engine, "tagged-one", "--network tagged --ip 10.92.2.10")?;
    ok(engine, &format!("run --rm --network tagged {IMAGE} ping -c 1 -w 30 10.92.2.10"))?;
    create("macvlan", "10.92.3.0/24", "tagged-too")?.ok()?;
    clear(engine, "tagged-one", "tagged")?;
    host(&["ip", "link", "show", &vlan])?.ok()?;
    clear(engine, "", "tagged-too")?;
    host(&["ip", "link", "show", &vlan])?.fails_with(2, "can't find device").map(drop)
}

fn links_of_the_default_network(engine: &Engine) -> Result<()> {
    sleeper(engine, "db", "-e FOO=1 --expose 5432")?;
    let address = ok(engine, "inspect -f {{.NetworkSettings.IPAddress}} db")?;
    let said = ok(engine, &format!("run --rm --link db:store {IMAGE} env"))?;
    for line in [
        "STORE_ENV_FOO=1".to_owned(),
        format!("STORE_PORT=tcp://{address}:5432"),
        format!("STORE_PORT_5432_TCP_ADDR={address}"),
    ] {
        ensure!(said.contains(&line), "{line} is not in\n{said}");
    }
    let hosts = ok(engine, &format!("run --rm --link db:store {IMAGE} cat /etc/hosts"))?;
    ensure!(hosts.lines().any(|line| line.starts_with(&address) && line.contains("store")), "{hosts}");
    docker(engine, &["create", "--link", "ghost:x", IMAGE])?
        .fails_with(1, "could not get container for ghost")?;
    clear(engine, "db", "")
}

fn one_container_uses_anothers_network(engine: &Engine) -> Result<()> {
    ok(engine, "network create shared")?;
    sleeper(engine, "owner", "--network shared --hostname boss")?;
    let own = shell(engine, "owner", "ip -o addr; hostname; cat /etc/hosts")?.ok()?;
    let other = docker(
        engine,
        &[
            "run",
            "--rm",
            "--network",
            "container:owner",
            IMAGE,
            "sh",
            "-c",
            "ip -o addr; hostname; cat /etc/hosts",
        ],
    )?
    .ok()?;
    ensure!(own == other, "{own}\n{other}");
    docker(engine, &["run", "--rm", "--network", "container:owner", "-p", "1:1", IMAGE, "true"])?
        .fails_with(125, "conflicting options")?;
    clear(engine, "owner", "shared")
}

/// What is sent comes back after the sender's half-close; datagrams come back as they were.
fn published_ports_carry_streams_and_datagrams(engine: &Engine) -> Result<()> {
    load_echo(engine)?;
    let serve = "while :; do nc -l -p 80 -e cat; done";
    docker(engine, &["run", "-d", "--name", "echo", "-p", "127.0.0.1::80", IMAGE, "sh", "-c", serve])?
        .ok()?;
    let answer = ["run", "-d", "--name", "udp", "-p", "127.0.0.1::81/udp", ECHO_IMAGE, "/echo", ECHO];
    docker(engine, &answer)?.ok()?;
    let (stream, datagrams) = (ok(engine, "port echo 80/tcp")?, ok(engine, "port udp 81/udp")?);
    let sent = vec![b'x'; 256 << 10];
    wait_until("the stream comes back", || {
        let Ok(mut client) = TcpStream::connect(&stream) else { return Ok(None) };
        client.set_read_timeout(Some(PATIENCE))?;
        let mut writer = client.try_clone()?;
        let heard = std::thread::scope(|scope| {
            // Before the container listens, the connection ends at once.
            scope.spawn(|| {
                let written = writer.write_all(&sent);
                written.and_then(|()| writer.shutdown(Shutdown::Write))
            });
            let mut heard = Vec::new();
            client.read_to_end(&mut heard).map(|_| heard)
        });
        Ok(heard.is_ok_and(|heard| heard == sent).then_some(()))
    })?;
    echoes(&datagrams)?;
    ok(engine, "rm -f echo udp")?;
    ok(engine, &format!("rmi {ECHO_IMAGE}"))?;
    std::net::TcpListener::bind(&stream).context("a removed container's port is free again")?;
    Ok(())
}

/// No tool in the test image answers datagrams, so this program does: `/echo` in [`ECHO_IMAGE`], called with [`ECHO`].
pub(crate) fn load_echo(engine: &Engine) -> Result<()> {
    let own = std::fs::read(std::env::current_exe()?)?;
    engine.load(&TestImage::new(vec![Layer::program("echo", &own)?]), ECHO_IMAGE)
}

/// Waits until a datagram sent to `address` comes back.
pub(crate) fn echoes(address: &str) -> Result<()> {
    let client = UdpSocket::bind("127.0.0.1:0")?;
    client.set_read_timeout(Some(Duration::from_secs(2)))?;
    client.connect(address)?;
    wait_until("a datagram comes back", || {
        let mut buffer = [0; 64];
        let heard = client.send(b"ping").and_then(|_| client.recv(&mut buffer));
        Ok(heard.is_ok_and(|count| &buffer[..count] == b"ping").then_some(()))
    })
}

/// Waits until a connection to `address` says exactly `expected`.
pub(crate) fn says(address: &str, expected: &str) -> Result<()> {
    wait_until("the published port answers", || {
        let Ok(mut stream) = TcpStream::connect(address) else { return Ok(None) };
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut heard = String::new();
        let heard = stream.read_to_string(&mut heard).map(|_| heard);
        Ok(heard.ok().filter(|heard| heard.trim() == expected).map(drop))
    })
}

/// Answers every datagram with itself, for ever: what this program does in a container, called with [`ECHO`].
pub(crate) fn echo() -> Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:81")?;
    let mut buffer = [0; 2048];
    loop {
        let (count, peer) = socket.recv_from(&mut buffer)?;
        socket.send_to(&buffer[..count], peer)?;
    }
}

/// Somebody else's port is refused, with the one who has it, and nothing is left of the container.
fn a_port_of_another_program_is_refused(engine: &Engine) -> Result<()> {
    let taken = std::net::TcpListener::bind("127.0.0.1:0")?;
    let publish = format!("{}:80", taken.local_addr()?);
    let refused = docker(engine, &["run", "--name", "late", "-p", &publish, IMAGE, "true"])?;
    let holder = format!("process {}", std::process::id());
    ensure!(
        refused.stderr.contains("address already in use") && refused.stderr.contains(&holder),
        "{refused:?}"
    );
    refused.fails_with(125, &taken.local_addr()?.to_string())?;
    ok(engine, "rm late").map(drop)
}

/// Published, answered and free again, all of them.
fn a_thousand_ports_at_once(engine: &Engine) -> Result<()> {
    let serve = "while :; do echo first | nc -l -p 2000; done & while :; do echo last | nc -l -p 2999; done";
    let run =
        ["run", "-d", "--init", "--name", "wide", "-p", "127.0.0.1::2000-2999", IMAGE, "sh", "-c", serve];
    docker(engine, &run)?.ok()?;
    let listed = ok(engine, "port wide")?;
    let mut addresses: Vec<&str> =
        listed.lines().filter_map(|line| Some(line.split_once(" -> ")?.1)).collect();
    addresses.sort_unstable();
    addresses.dedup();
    ensure!(addresses.len() == 1000, "{} different addresses:\n{listed}", addresses.len());
    says(&ok(engine, "port wide 2000")?, "first")?;
    says(&ok(engine, "port wide 2999")?, "last")?;
    if engine.stage == Stage::Native {
        engine.end_native(true)?;
        engine.boot()?;
        ensure!(ok(engine, "port wide")? == listed, "not the same after the engine was killed");
        says(&ok(engine, "port wide 2999")?, "last")?;
    }
    for address in &addresses {
        ensure!(std::net::TcpListener::bind(address).is_err(), "{address} is published and free");
    }
    ok(engine, "rm -f wide")?;
    for address in addresses {
        std::net::TcpListener::bind(address).with_context(|| format!("{address} is still held"))?;
    }
    Ok(())
}

fn ports_are_published(engine: &Engine) -> Result<()> {
    let serve = "while :; do echo served | nc -l -p 80; done";
    docker(
        engine,
        &["run", "-d", "--name", "pub", "-p", "127.0.0.1::80", "-p", "81:81/udp", IMAGE, "sh", "-c", serve],
    )?
    .ok()?;
    let at = ok(engine, "port pub 80/tcp")?;
    ensure!(at.starts_with("127.0.0.1:"), "{at}");
    let listed = ok(engine, "ps --filter name=pub --format {{.Ports}}")?;
    ensure!(listed.contains(&format!("{at}->80/tcp")) && listed.contains("->81/udp"), "{listed}");
    says(&at, "served")?;
    let port = at.rsplit(':').next().unwrap_or_default();
    docker(engine, &["run", "-d", "--name", "late", "-p", &format!("127.0.0.1:{port}:80"), IMAGE, "true"])?
        .fails_with(125, "port is already allocated")?;
    ok(engine, "rm -f late")?;
    ok(engine, "stop -t 0 pub")?;
    ensure!(ok(engine, "port pub")?.is_empty(), "a stopped container publishes nothing");
    ok(engine, "start pub")?;
    clear(engine, "pub", "")
}

fn networks_and_names_survive_the_engine(engine: &Engine) -> Result<()> {
    if engine.stage != Stage::Native {
        crate::skip("the engine in the machine ends with its containers");
        return Ok(());
    }
    ok(engine, "network create --label kept=yes lasting")?;
    sleeper(engine, "aa", "--network lasting")?;
    sleeper(engine, "bb", "--network lasting -p 127.0.0.1::80")?;
    let before = (ok(engine, "inspect -f {{json .NetworkSettings.Networks}} bb"), ok(engine, "port bb")?);
    engine.end_native(true)?;
    engine.boot()?;
    let after = (ok(engine, "inspect -f {{json .NetworkSettings.Networks}} bb"), ok(engine, "port bb")?);
    ensure!(before.1 == after.1 && before.0.ok() == after.0.ok(), "not the same after a restart");
    wait_until("names are answered again", || Ok(reaches(engine, "aa", "bb")?.then_some(())))?;
    let kept = ok(engine, "network ls -q --filter label=kept")?;
    ensure!(kept.lines().count() == 1, "{kept}");
    clear(engine, "aa bb", "lasting")
}

/// Without `icc` the containers of a network reach its gateway and not each other.
fn without_icc_only_the_gateway_is_reached(engine: &Engine) -> Result<()> {
    ok(engine, "network create --subnet 10.98.1.0/24 -o com.docker.network.bridge.enable_icc=false quiet")?;
    sleeper(engine, "qa", "--network quiet --ip 10.98.1.10")?;
    sleeper(engine, "qb", "--network quiet --ip 10.98.1.11")?;
    ensure!(!reaches(engine, "qa", "10.98.1.11")? && !reaches(engine, "qb", "10.98.1.10")?, "icc is off");
    ensure!(reaches(engine, "qa", "10.98.1.1")?, "the gateway is not reached");
    clear(engine, "qa qb", "quiet")?;
    // A routed network hides nobody's address, and other networks may come in where it says so.
    ok(
        engine,
        "network create --subnet 10.98.2.0/24 -o com.docker.network.bridge.gateway_mode_ipv4=routed plain",
    )?;
    sleeper(engine, "routed", "--network plain --ip 10.98.2.10")?;
    ensure!(reaches(engine, "routed", "10.98.2.1")?, "the gateway of a routed network");
    docker(
        engine,
        &["network", "create", "-o", "com.docker.network.bridge.gateway_mode_ipv4=sideways", "x"],
    )?
    .fails_with(1, "sideways")?;
    clear(engine, "routed", "plain")
}

/// Interfaces and namespaces, as the engine's own host sees them.
pub(crate) fn leavings(engine: &Engine) -> Result<Vec<String>> {
    let look = "ls /sys/class/net; ip -o addr | grep -c inet";
    let said = docker(engine, &["run", "--rm", "--network", "host", IMAGE, "sh", "-c", look])?.ok()?;
    let mut lines: Vec<String> = said.lines().map(str::to_owned).collect();
    lines.sort();
    Ok(lines)
}

fn refused_requests_leave_nothing(engine: &Engine) -> Result<()> {
    ok(engine, "network create --subnet 10.95.0.0/30 tight")?;
    ok(engine, "network create ample")?;
    sleeper(engine, "only", "--network tight")?;
    // The default bridge comes with the first container that needs it, and stays.
    ok(engine, &format!("run --rm {IMAGE} true"))?;
    let before = leavings(engine)?;
    let networks = ok(engine, "network ls -q")?;
    let refused =
        |arguments: &[&str], code: i32, text: &str| docker(engine, arguments)?.fails_with(code, text);
    refused(&["network", "create", "--subnet", "10.95.0.0/29", "x"], 1, "Pool overlaps with other one")?;
    refused(&["network", "create", "--subnet", "10.95.0.1/24", "x"], 1, "it should be 10.95.0.0/24")?;
    refused(&["network", "create", "--subnet", "ten", "x"], 1, "invalid CIDR")?;
    refused(&["network", "create", "-d", "weave", "x"], 1, "plugin \"weave\" not found")?;
    refused(
        &["network", "create", "-o", "com.docker.network.bridge.enable_icc=perhaps", "x"],
        1,
        "failed to parse",
    )?;
    refused(&["network", "create", "-o", "com.docker.network.bridge.name=lo", "x"], 1, "lo")?;
    refused(
        &["network", "create", "-d", "macvlan", "-o", "parent=none0", "x"],
        1,
        "there is no interface `none0`",
    )?;
    for (parent, why) in [
        ("none0.10", "-o parent interface was not found on the host: none0"),
        ("lo.4095", "vlan id must be between 1-4094, received: 4095"),
        ("lo.1.2", "required interface name format is: name.vlan_id"),
    ] {
        let parent = format!("parent={parent}");
        refused(&["network", "create", "-d", "macvlan", "-o", &parent, "x"], 1, why)?;
    }
    refused(&["network", "create", "tight"], 1, "network with name tight already exists")?;
    refused(&["network", "create", "bridge"], 1, "operation is not permitted on predefined bridge network")?;
    refused(&["network", "rm", "bridge"], 1, "bridge is a pre-defined network and cannot be removed")?;
    refused(&["run", "--rm", "--network", "tight", IMAGE, "true"], 125, "no available IPv4 addresses")?;
    refused(
        &["run", "--rm", "--network", "name=ample", "--network", "name=tight", IMAGE, "true"],
        125,
        "no available IPv4",
    )?;
    refused(&["run", "--rm", "-p", "70000:80", IMAGE, "true"], 125, "")?;
    refused(
        &["run", "--rm", "-p", "192.0.2.7:8080:80", IMAGE, "true"],
        125,
        "cannot assign requested address",
    )?;
    refused(&["run", "--rm", "--network", "bridge", IMAGE, "nowhere"], 127, "executable file not found")?;
    wait_until("what was begun is taken back", || Ok((leavings(engine)? == before).then_some(())))?;
    ensure!(ok(engine, "network ls -q")? == networks, "networks");
    clear(engine, "only", "tight ample")
}
