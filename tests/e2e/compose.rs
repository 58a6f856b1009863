//! An application of several containers and networks, run by the stock docker-compose.

use crate::networks::{ECHO, ECHO_IMAGE, echoes, leavings, load_echo, ok, says};
use anyhow::{Context, Result, ensure};
use std::time::Duration;
use tests_harness::{Engine, Finished, IMAGE, Timed};

crate::scenarios![an_application_of_three_networks_lives_and_leaves_nothing];

/// Under a software CPU three containers take their time.
const LIMIT: Duration = Duration::from_secs(300);

/// `web` asks `backend`, which asks `store`; only `api` stands on both sides.
fn application() -> String {
    format!(
        r#"
name: shop
services:
  db:
    image: {IMAGE}
    command: sh -c "sleep 1; touch /tmp/ready; while :; do echo stored | nc -l -p 5432; done"
    init: true
    healthcheck: {{ test: [CMD, test, -f, /tmp/ready], interval: 1s, timeout: 20s, retries: 60 }}
    networks:
      data: {{ ipv4_address: 10.96.3.10, aliases: [store] }}
  api:
    image: {IMAGE}
    command: sh -c "echo serving; while :; do nc -l -p 7000 -e nc store 5432; done"
    init: true
    depends_on: {{ db: {{ condition: service_healthy }} }}
    networks:
      middle: {{ aliases: [backend], mac_address: "02:42:0a:60:01:51" }}
      data: {{ ipv4_address: 10.96.3.11 }}
  web:
    image: {IMAGE}
    command: sh -c "while :; do nc -l -p 80 -e nc backend 7000; done"
    init: true
    depends_on: {{ api: {{ condition: service_started, restart: true }} }}
    ports: ["127.0.0.1::80"]
    networks: [front, middle]
  clock:
    image: {ECHO_IMAGE}
    command: [/echo, {ECHO}]
    ports: ["127.0.0.1::81/udp"]
    networks:
      front: {{ aliases: [time] }}
networks:
  front: {{ driver_opts: {{ com.docker.network.driver.mtu: "1400" }} }}
  middle: {{ labels: {{ tier: middle }} }}
  data:
    internal: true
    ipam: {{ config: [{{ subnet: 10.96.3.0/24, gateway: 10.96.3.1 }}] }}
"#
    )
}

struct Compose<'a> {
    engine: &'a Engine,
    file: String,
}

impl Compose<'_> {
    fn run(&self, line: &str) -> Result<Finished> {
        let words = ["--ansi", "never", "--file", &self.file].into_iter().chain(line.split_whitespace());
        let command = self.engine.compose(words).context("docker-compose has gone")?;
        Timed::new(command).within(LIMIT).run()
    }

    fn ok(&self, line: &str) -> Result<String> {
        self.run(line)?.ok()
    }
}

fn an_application_of_three_networks_lives_and_leaves_nothing(engine: &Engine) -> Result<()> {
    if engine.compose(["version"]).is_none() {
        crate::skip(
            "docker-compose, which installer/setup --tests fetches from the Python package index, is not here",
        );
        return Ok(());
    }
    load_echo(engine)?;
    // The default bridge comes with the first container that needs it, and stays.
    ok(engine, &format!("run --rm {IMAGE} true"))?;
    let (before, networks) = (leavings(engine)?, ok(engine, "network ls -q")?);
    let file = engine.path("shop.yaml");
    std::fs::write(&file, application())?;
    let shop = Compose { engine, file: file.display().to_string() };

    shop.ok("up --detach --wait")?;
    let running = shop.ok("ps --services --status running")?;
    let mut running: Vec<&str> = running.lines().collect();
    running.sort_unstable();
    ensure!(running == ["api", "clock", "db", "web"], "{running:?}");
    let state = ok(engine, "inspect -f {{.State.Health.Status}} shop-db-1")?;
    ensure!(state == "healthy", "{state}");

    // From the host through all three networks and back.
    let works = || -> Result<()> {
        says(&shop.ok("port web 80")?, "stored")?;
        echoes(&shop.ok("port --protocol udp clock 81")?)
    };
    works()?;
    let known = shop.ok("exec -T api nslookup db")?;
    ensure!(known.contains("10.96.3.10"), "{known}");
    let unknown = shop.run("exec -T web ping -c 1 -W 2 10.96.3.10")?;
    ensure!(unknown.code != 0, "the innermost network is open to the outermost: {unknown:?}");
    let mtu = shop.ok("exec -T web cat /sys/class/net/eth0/mtu /sys/class/net/eth1/mtu")?;
    ensure!(mtu.contains("1400"), "{mtu}");
    let said = shop.ok("logs --no-log-prefix api")?;
    ensure!(said.contains("serving"), "{said}");

    // What is as it should be is left alone; what is started again is found again.
    let id = ok(engine, "inspect -f {{.Id}} shop-api-1")?;
    shop.ok("up --detach --wait")?;
    ensure!(ok(engine, "inspect -f {{.Id}} shop-api-1")? == id, "made anew without a reason");
    shop.ok("restart api")?;
    works()?;
    shop.ok("up --detach --wait --scale clock=2 --no-recreate")?;
    ensure!(shop.ok("ps -q clock")?.lines().count() == 2, "not two of them");

    shop.ok("down --volumes --timeout 1")?;
    ensure!(ok(engine, "ps -aq")?.is_empty(), "containers are left");
    ensure!(ok(engine, "network ls -q")? == networks, "networks are left");
    let after = leavings(engine)?;
    ensure!(after == before, "left: {after:?}, before: {before:?}");
    ok(engine, &format!("rmi {ECHO_IMAGE}"))?;
    Ok(())
}
