//! The default bridge: an address, names, and the way out.

use anyhow::{Result, ensure};
use tests_harness::{Engine, IMAGE, Stage};

crate::scenarios![
    a_container_has_an_address_and_reaches_another,
    a_container_reaches_the_outside_through_the_nat,
    no_network_means_only_loopback,
    names_resolve_through_the_host,
];

fn address(engine: &Engine, container: &str) -> Result<String> {
    engine.engine(["inspect", "-f", "{{.NetworkSettings.IPAddress}}", container])?.ok()
}

fn a_container_has_an_address_and_reaches_another(engine: &Engine) -> Result<()> {
    // Not busybox's wget, which crashes where Debian links it statically.
    let serve = "while :; do echo served | nc -l -p 80; done";
    engine.engine(["run", "-d", "--name", "server", IMAGE, "sh", "-c", serve])?.ok()?;
    let address = address(engine, "server")?;
    ensure!(address.split('.').count() == 4, "`{address}` is no address");
    let shown = engine.engine(["exec", "server", "ip", "-4", "-o", "addr", "show", "eth0"])?.ok()?;
    ensure!(shown.contains(&address), "{shown}");
    let fetch =
        format!("for i in 1 2 3 4 5; do nc -w 5 {address} 80 < /dev/null && exit 0; sleep 0.5; done; exit 1");
    let said = engine.engine(["run", "--rm", IMAGE, "sh", "-c", &fetch])?.ok()?;
    ensure!(said == "served", "{said}");
    engine.engine(["rm", "-f", "server"])?.ok().map(drop)
}

fn a_container_reaches_the_outside_through_the_nat(engine: &Engine) -> Result<()> {
    let (address, port) = (engine.outside_address(), engine.registry().port());
    let ask = format!("printf 'GET /v2/ HTTP/1.0\\r\\n\\r\\n' | nc -w 20 {address} {port}");
    let said = engine.engine(["run", "--rm", IMAGE, "sh", "-c", &ask])?.ok()?;
    ensure!(said.starts_with("HTTP/1.0 200 OK") && said.ends_with("{}"), "{said}");
    // Nobody listens there: refused at once, not after a timeout.
    engine.engine(["run", "--rm", IMAGE, "nc", "-w", "20", address, "1"])?.fails_with(1, "refused")
}

fn no_network_means_only_loopback(engine: &Engine) -> Result<()> {
    let said = engine.engine(["run", "--rm", "--network", "none", IMAGE, "ls", "/sys/class/net"])?.ok()?;
    ensure!(said == "lo", "{said}");
    engine
        .engine(["run", "--rm", "--network", "nowhere", IMAGE, "true"])?
        .fails_with(125, "network nowhere not found")
}

/// In the VM the NAT answers names of its own; natively there is no resolver in the test's world.
fn names_resolve_through_the_host(engine: &Engine) -> Result<()> {
    let hosts = engine
        .engine([
            "run",
            "--rm",
            "--add-host",
            "other:1.2.3.4",
            "--hostname",
            "me",
            IMAGE,
            "cat",
            "/etc/hosts",
        ])?
        .ok()?;
    ensure!(hosts.contains("1.2.3.4\tother") && hosts.contains("\tme"), "{hosts}");
    if engine.stage != Stage::Native {
        let said = engine.engine(["run", "--rm", IMAGE, "nslookup", "host.docker.internal"])?.ok()?;
        ensure!(said.contains("198.18.0.254"), "{said}");
    }
    Ok(())
}
