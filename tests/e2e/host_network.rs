//! Containers on the host's own network: through the machine as if it were not there.

use crate::networks::{ECHO, ECHO_IMAGE, docker, echoes, load_echo, ok, says};
use anyhow::{Context, Result, ensure};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::time::Duration;
use tests_harness::{Engine, IMAGE, Stage, wait_until};

crate::scenarios![
    what_a_host_container_listens_at_is_on_localhost,
    connections_to_a_host_container_go_by_the_network,
    a_program_of_the_host_is_reached_from_containers,
    a_program_of_the_host_is_reached_in_ipv6,
    the_way_to_a_port_is_walked_to_its_first_broken_link,
    the_firewall_of_another_program_is_named,
];

fn what_a_host_container_listens_at_is_on_localhost(engine: &Engine) -> Result<()> {
    load_echo(engine)?;
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let serve = format!("while :; do echo served | nc -l -p {port}; done");
    let run = ["run", "-d", "--init", "--name", "hosted", "--network", "host", IMAGE, "sh", "-c", &serve];
    docker(engine, &run)?.ok()?;
    ok(engine, &format!("run -d --name hosted-udp --network host {ECHO_IMAGE} /echo {ECHO}"))?;
    let address = format!("127.0.0.1:{port}");
    says(&address, "served")?;
    // Port 81 is root's alone, unless the system was told otherwise.
    if engine.stage == Stage::Native || UdpSocket::bind("127.0.0.1:81").is_ok() {
        echoes("127.0.0.1:81")?;
    }
    ok(engine, "rm -f hosted hosted-udp")?;
    wait_until("the port is free again", || Ok(TcpListener::bind(&address).ok().map(drop)))?;
    ok(engine, &format!("rmi {ECHO_IMAGE}")).map(drop)
}

/// In the machine they do so past the engine, and look as on a computer without one. The listener hears both families, as
/// most do.
fn connections_to_a_host_container_go_by_the_network(engine: &Engine) -> Result<()> {
    if engine.stage == Stage::Native {
        crate::skip("what listens on the computer's own network is reached without us");
        return Ok(());
    }
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    // Tells each client its own line of the kernel's table: addresses are its second and third word.
    let line =
        "i=$(readlink /proc/self/fd/0); i=${i#*[}; cat /proc/net/tcp6 /proc/net/tcp | grep \" ${i%]} \"; cat";
    let serve = ["nc", "-ll", "-p", &port.to_string(), "-e", "sh", "-c", line];
    docker(
        engine,
        &[&["run", "-d", "--init", "--name", "hosted", "--network", "host", IMAGE][..], &serve].concat(),
    )?
    .ok()?;
    let streams = || engine.engine(["machine", "info", "--format", "{{.open_streams}}"])?.ok();
    let before = streams()?;
    // Until the engine has seen it listen and has told the computer where connections land, they go by way of the engine.
    let said = wait_until("connections go past the engine", || {
        let Ok(stream) = TcpStream::connect(("127.0.0.1", port)) else { return Ok(None) };
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        let (mut reader, mut line) = (BufReader::new(&stream), String::new());
        Ok((reader.read_line(&mut line).is_ok_and(|count| count > 0) && streams()? == before).then_some(line))
    })?;
    let words: Vec<&str> = said.split_whitespace().collect();
    ensure!(
        words.iter().skip(1).take(2).all(|word| word.contains("0100007F:")),
        "the two ends are in {said}"
    );
    let way = engine.engine(["net", "why", &format!("localhost:{port}")])?.ok()?;
    ensure!(way.contains("hosted") && way.contains("takes connections on this computer"), "{way}");
    ok(engine, "rm -f hosted")?;
    wait_until("the port is free again", || Ok(TcpListener::bind(("127.0.0.1", port)).ok().map(drop)))
}

fn a_program_of_the_host_is_reached_from_containers(engine: &Engine) -> Result<()> {
    // Through the machine what listens on the computer's loopback is reached; natively what hears the bridge is.
    let (bind, name) = match engine.stage {
        Stage::Native => ("0.0.0.0:0", "host-gateway"),
        Stage::Qemu | Stage::Kvm => ("127.0.0.1:0", "198.18.0.254"),
    };
    let listener = TcpListener::bind(bind)?;
    let port = listener.local_addr()?.port().to_string();
    std::thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            // Who does not wait for the words has its reasons.
            let _ = stream.write_all(b"from the host\n");
        }
    });
    let host = format!("host.docker.internal:{name}");
    // The bridge, whose address the name means natively, comes with its first container.
    for network in ["bridge", "host"] {
        let said = docker(
            engine,
            &[
                "run",
                "--rm",
                "--network",
                network,
                "--add-host",
                &host,
                IMAGE,
                "nc",
                "-w",
                "20",
                "host.docker.internal",
                &port,
            ],
        )?
        .ok()?;
        ensure!(said == "from the host", "on {network}: {said}");
    }
    Ok(())
}

fn a_program_of_the_host_is_reached_in_ipv6(engine: &Engine) -> Result<()> {
    // Natively the network's own gateway is the host, through the machine the NAT has an address for its loopback.
    let (bind, address) = match engine.stage {
        Stage::Native => ("[::]:0", "fd00:6::1"),
        Stage::Qemu | Stage::Kvm => ("[::1]:0", "fdc7:9a1e:5d28::fe"),
    };
    let Ok(listener) = TcpListener::bind(bind) else {
        crate::skip("containers in IPv6: this computer has none");
        return Ok(());
    };
    let port = listener.local_addr()?.port();
    std::thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            // Who does not wait for the words has its reasons.
            let _ = stream.write_all(b"from the host\n");
        }
    });
    ok(engine, "network create --ipv6 --subnet fd00:6::/64 --gateway fd00:6::1 six")?;
    wait_until("the host answers in IPv6", || {
        let to = port.to_string();
        let said =
            docker(engine, &["run", "--rm", "--network", "six", IMAGE, "nc", "-w", "20", address, &to])?;
        Ok((said.stdout.trim() == "from the host").then_some(()))
    })?;
    ok(engine, "network rm six").map(drop)
}

/// `engine net why` finds what is in the way, one fault after another.
fn the_way_to_a_port_is_walked_to_its_first_broken_link(engine: &Engine) -> Result<()> {
    let why = |target: &str| engine.engine(["net", "why", target]);
    let tells = |target: &str, parts: &[&str]| -> Result<()> {
        let said = why(target)?;
        let all = parts.iter().all(|part| said.stdout.contains(part));
        ensure!(said.code == 1 && all, "{target}: {parts:?} is not in {said:?}");
        Ok(())
    };
    tells("nobody", &["broken  name", "no container called nobody", "cure: `engine ps -a`"])?;
    ok(engine, &format!("create --name way -p 127.0.0.1::80 {IMAGE} sleep 1000"))?;
    tells("way", &["broken  name", "way does not run", "cure: `engine start way`"])?;
    ok(engine, "start way")?;
    tells("way:80", &["ok      address", "ok      rule", "broken  listener", "nothing in way listens"])?;
    tells("way:81/udp", &["broken  listener"])?;
    docker(engine, &["exec", "-d", "way", "sh", "-c", "while :; do nc -l -p 82 -e cat; done"])?.ok()?;
    wait_until("the unpublished port is told of", || {
        Ok(why("way:82")?.stdout.contains("82/tcp of way is not published").then_some(()))
    })?;
    ok(engine, "rm -f way")?;
    let serve = "while :; do nc -l -p 80 -e cat; done";
    docker(
        engine,
        &["run", "-d", "--init", "--name", "way", "-p", "127.0.0.1::80", IMAGE, "sh", "-c", serve],
    )?
    .ok()?;
    let address = ok(engine, "port way 80/tcp")?;
    for target in ["way:80", &address] {
        wait_until("all links hold", || {
            let said = why(target)?;
            Ok((said.code == 0 && said.stdout.contains("takes connections on this computer")).then_some(()))
        })?;
    }
    ok(engine, "rm -f way")?;
    tells(&address, &["broken  lease", "no running container publishes"])
}

/// Another program's table stays as it is, is named, and its cure helps; ours is whole again once somebody flushed it.
fn the_firewall_of_another_program_is_named(engine: &Engine) -> Result<()> {
    if engine.stage != Stage::Native {
        crate::skip("in the machine there is no other program's firewall");
        return Ok(());
    }
    let nft = |script: &str| -> Result<String> {
        let done = Command::new("nft").arg(script).output()?;
        ensure!(done.status.success(), "nft {script}: {}", String::from_utf8_lossy(&done.stderr));
        Ok(String::from_utf8(done.stdout)?)
    };
    let why = || engine.engine(["net", "why", "walled:80"]);
    let holds = || -> Result<()> {
        wait_until("all links hold", || {
            let said = why()?;
            Ok((said.code == 0).then_some(()))
        })
    };
    let serve = ["nc", "-ll", "-p", "80", "-e", "cat"];
    let run = ["run", "-d", "--init", "--name", "walled", "-p", "0.0.0.0::80", IMAGE];
    docker(engine, &[&run[..], &serve].concat())?.ok()?;
    holds()?;

    nft(
        "add table inet wall; add chain inet wall way { type filter hook forward priority 5; policy drop; }",
    )?;
    let wall = nft("list table inet wall")?;
    let said = why()?;
    ensure!(said.code == 1 && said.stdout.contains("chain way of table inet wall"), "{said:?}");
    // `nft insert rule inet wall way oifname BRIDGE accept`, and the same with iifname.
    let cure = said.stdout.split('`').find(|word| word.starts_with("nft insert")).context("no cure")?;
    let rule = cure.trim_start_matches("nft ");
    ensure!(nft("list table inet wall")? == wall, "the other program's table is not what it was");
    nft(rule)?;
    nft(&rule.replace("oifname", "iifname"))?;
    holds()?;

    nft("flush ruleset")?;
    let said = why()?;
    ensure!(said.code == 1 && said.stdout.contains("the engine's firewall table is gone"), "{said:?}");
    ok(engine, "restart -t 1 walled")?;
    holds()?;
    ok(engine, "rm -f walled").map(drop)
}
