//! A dockerd's settings file: every key that changes something is seen to change it. Natively only: it needs an engine
//! that is started again with other settings.

use crate::Scenario;
use crate::docker::docker;
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::process::Command;
use tests_harness::{Engine, IMAGE};

pub(crate) fn native_scenarios() -> Vec<Scenario> {
    vec![
        Scenario { name: "daemon_json::settings_count_for_containers", body: settings_count_for_containers },
        Scenario { name: "daemon_json::settings_count_for_networks", body: settings_count_for_networks },
        Scenario { name: "daemon_json::settings_are_shown", body: settings_are_shown },
        Scenario {
            name: "daemon_json::another_runtime_runs_containers",
            body: another_runtime_runs_containers,
        },
    ]
}

/// Runs a body with an engine of these settings; the engine without any is there again afterwards.
fn with(engine: &Engine, settings: &Value, body: impl FnOnce() -> Result<()>) -> Result<()> {
    engine.end_native(false)?;
    engine.boot_with_settings(settings)?;
    let result = body();
    if result.is_err() {
        engine.remove_containers()?;
    }
    engine.end_native(false)?;
    engine.boot()?;
    result
}

fn inside(engine: &Engine, options: &[&str], script: &str) -> Result<String> {
    docker(engine, &[&["run", "--rm"], options, &[IMAGE, "sh", "-c", script]].concat())?.ok()
}

fn inspect(engine: &Engine, words: &[&str]) -> Result<Value> {
    let list: Vec<Value> = serde_json::from_str(&docker(engine, words)?.ok()?)?;
    list.into_iter().next().context("inspect shows nothing")
}

fn settings_count_for_containers(engine: &Engine) -> Result<()> {
    let settings = json!({
        "log-driver": "local", "log-opts": {"max-size": "1m"},
        "default-ulimits": {"nofile": {"Name": "nofile", "Soft": 333, "Hard": 444}},
        "default-shm-size": "3M", "default-ipc-mode": "shareable", "default-cgroupns-mode": "host",
        "cgroup-parent": "/engine-test-parent", "init": true, "no-new-privileges": true,
        "seccomp-profile": "unconfined", "default-stop-timeout": 1,
        "dns": ["192.0.2.53"], "dns-opts": ["attempts:7"], "dns-search": ["set.example"],
        "host-gateway-ips": ["192.0.2.99"],
    });
    with(engine, &settings, || {
        let script = "ulimit -Sn; ulimit -Hn; df -k /dev/shm | tail -1 | awk '{print $2}'; cat /proc/1/comm; \
                      grep -E '^(NoNewPrivs|Seccomp):' /proc/self/status | tr -d '\\t'; cat /proc/self/cgroup";
        let said = inside(engine, &[], script)?;
        let lines: Vec<&str> = said.lines().collect();
        let first = ["333", "444", "3072", "docker-init", "NoNewPrivs:1", "Seccomp:0"];
        ensure!(lines.get(..6) == Some(&first), "{said}");
        ensure!(said.contains("/engine-test-parent/"), "{said}");
        let said = inside(engine, &["--add-host", "up:host-gateway"], "cat /etc/resolv.conf /etc/hosts")?;
        for part in ["nameserver 192.0.2.53", "attempts:7", "search set.example", "192.0.2.99\tup"] {
            ensure!(said.contains(part), "no `{part}`: {said}");
        }
        let deaf = "trap '' TERM; echo ready; while :; do sleep 0.1; done";
        docker(engine, &["run", "-d", "--init=false", "--name", "deaf", IMAGE, "sh", "-c", deaf])?.ok()?;
        let shown = inspect(engine, &["inspect", "deaf"])?;
        let host = &shown["HostConfig"];
        ensure!(host["LogConfig"] == json!({"Type": "local", "Config": {"max-size": "1m"}}), "{host}");
        ensure!(host["IpcMode"] == "shareable" && host["CgroupnsMode"] == "host", "{host}");
        // Nobody says how long: the settings do. With ten seconds more the event would tell.
        let before = std::time::Instant::now();
        docker(engine, &["stop", "deaf"])?.ok()?;
        let took = before.elapsed();
        let shown = inspect(engine, &["inspect", "deaf"])?;
        ensure!(shown["State"]["ExitCode"] == 137, "{shown}");
        ensure!(took.as_secs() >= 1, "killed after {took:?}");
        docker(engine, &["rm", "deaf"])?.ok().map(drop)
    })
}

fn settings_count_for_networks(engine: &Engine) -> Result<()> {
    let settings = json!({
        "bip": "10.77.0.1/24", "fixed-cidr": "10.77.0.128/25", "default-gateway": "10.77.0.9", "mtu": 1400,
        "icc": false, "ip-masq": false, "ip": "127.0.0.1",
        "default-address-pools": [{"base": "10.88.0.0/16", "size": 28}],
        "default-network-opts": {"bridge": {"com.docker.network.driver.mtu": "1300"}},
    });
    with(engine, &settings, || {
        let said = inside(engine, &[], "ip -4 addr show eth0; ip route; cat /sys/class/net/eth0/mtu")?;
        ensure!(said.contains("default via 10.77.0.9"), "{said}");
        ensure!(said.lines().last() == Some("1400"), "{said}");
        let address = said.split("inet 10.77.0.").nth(1).and_then(|rest| rest.split('/').next());
        let last: u8 = address.context("no address of the default network")?.parse()?;
        ensure!(last >= 128, "outside of fixed-cidr: {said}");
        let shown = inspect(engine, &["network", "inspect", "bridge"])?;
        let options = &shown["Options"];
        let prefix = "com.docker.network.bridge";
        ensure!(options[format!("{prefix}.enable_icc")] == "false", "{options}");
        ensure!(options[format!("{prefix}.enable_ip_masquerade")] == "false", "{options}");
        ensure!(options[format!("{prefix}.host_binding_ipv4")] == "127.0.0.1", "{options}");
        let pool = &shown["IPAM"]["Config"][0];
        ensure!(pool["AuxiliaryAddresses"]["DefaultGatewayIPv4"] == "10.77.0.9", "{pool}");
        docker(engine, &["run", "-d", "--name", "open", "-p", "80", IMAGE, "sleep", "1000"])?.ok()?;
        let ports = docker(engine, &["port", "open"])?.ok()?;
        ensure!(ports.contains("127.0.0.1:"), "{ports}");
        docker(engine, &["rm", "-f", "open"])?.ok()?;
        links_and_ports_open_what_they_must(engine)?;
        docker(engine, &["network", "create", "pooled"])?.ok()?;
        let shown = inspect(engine, &["network", "inspect", "pooled"])?;
        docker(engine, &["network", "rm", "pooled"])?.ok()?;
        let subnet = shown["IPAM"]["Config"][0]["Subnet"].as_str().unwrap_or_default();
        ensure!(subnet.starts_with("10.88.") && subnet.ends_with("/28"), "{shown}");
        ensure!(shown["Options"]["com.docker.network.driver.mtu"] == "1300", "{shown}");
        // The same for a network of one's own, by the name libnetwork has for it.
        let aux = "DefaultGatewayIPv4=10.93.0.7";
        docker(engine, &["network", "create", "--subnet", "10.93.0.0/24", "--aux-address", aux, "aside"])?
            .ok()?;
        let said = inside(engine, &["--network", "aside"], "ip route")?;
        docker(engine, &["network", "rm", "aside"])?.ok()?;
        ensure!(said.contains("default via 10.93.0.7"), "{said}");
        Ok(())
    })
}

/// On a default network whose containers are apart: a link opens the ports that are exposed, to the one that has it, and a
/// published port is everybody's.
fn links_and_ports_open_what_they_must(engine: &Engine) -> Result<()> {
    let serve = "for port in 80 81; do while :; do echo $port | nc -l -p $port; done & done; wait";
    let ports = ["--expose", "80", "-p", "0.0.0.0::81"];
    let run = [&["run", "-d", "--name", "db", "--init"], &ports[..], &[IMAGE, "sh", "-c", serve]].concat();
    docker(engine, &run)?.ok()?;
    let address = docker(engine, &["inspect", "-f", "{{.NetworkSettings.IPAddress}}", "db"])?.ok()?;
    let published = docker(engine, &["port", "db", "81"])?.ok()?;
    let port = published.rsplit(':').next().context("no port")?.to_owned();
    let patiently =
        |to: &str| format!("for i in $(seq 20); do nc -w 5 {to} </dev/null && exit; sleep 1; done; exit 1");
    let linked = ["--link", "db:store"];
    ensure!(inside(engine, &linked, &patiently(&format!("{address} 80")))? == "80", "the linked port");
    ensure!(inside(engine, &[], &patiently(&format!("10.77.0.1 {port}")))? == "81", "by way of the host");
    crate::networks::says(&format!("127.0.0.1:{port}"), "81")?;
    // Published ports are exposed too, as clients ask for it.
    for (options, port) in [(&linked[..], 82), (&[], 80), (&[], 81)] {
        let said = inside(engine, options, &format!("nc -w 3 {address} {port} </dev/null || echo shut"))?;
        ensure!(said == "shut", "{options:?}, port {port}: {said}");
    }
    docker(engine, &["rm", "-f", "db"])?.ok().map(drop)
}

fn settings_are_shown(engine: &Engine) -> Result<()> {
    let settings = json!({
        "labels": ["where=here"], "experimental": true, "debug": true, "live-restore": true,
        "proxies": {"http-proxy": "http://192.0.2.1:3128", "no-proxy": "example.org"},
        "registry-mirrors": ["http://127.0.0.1:9"], "userland-proxy": false, "shutdown-timeout": 5,
        "max-concurrent-downloads": 2, "max-concurrent-uploads": 2, "max-download-attempts": 2,
        "runtimes": {"other": {"path": "/usr/sbin/runc", "runtimeArgs": ["--debug"]}}, "default-runtime": "other",
    });
    with(engine, &settings, || {
        let info: Value = serde_json::from_str(&docker(engine, &["info", "-f", "{{json .}}"])?.ok()?)?;
        for (pointer, wanted) in [
            ("/Labels", json!(["where=here"])),
            ("/ExperimentalBuild", json!(true)),
            ("/Debug", json!(true)),
            ("/LiveRestoreEnabled", json!(true)),
            ("/HttpProxy", json!("http://192.0.2.1:3128")),
            ("/NoProxy", json!("example.org")),
            ("/RegistryConfig/Mirrors", json!(["http://127.0.0.1:9/"])),
            ("/Runtimes/other/path", json!("/usr/sbin/runc")),
            ("/Runtimes/other/runtimeArgs", json!(["--debug"])),
            ("/DefaultRuntime", json!("other")),
        ] {
            ensure!(info.pointer(pointer) == Some(&wanted), "{pointer}: {info}");
        }
        ensure!(info.pointer("/Runtimes/runc").is_some(), "{info}");
        Ok(())
    })
}

fn another_runtime_runs_containers(engine: &Engine) -> Result<()> {
    // Debian's runc: what drives dockerd's containers works under ours.
    if !Command::new("runc").arg("--version").output().is_ok_and(|output| output.status.success()) {
        crate::skip("containers of another runtime: there is no runc (installer/setup --tests installs it)");
        return Ok(());
    }
    let settings = json!({
        "runtimes": {"other": {"path": "runc"}, "broken": {"path": "/nowhere/runtime"}}, "default-runtime": "other",
    });
    with(engine, &settings, || {
        ensure!(inside(engine, &[], "echo by another")? == "by another");
        docker(engine, &["run", "--rm", IMAGE, "sh", "-c", "exit 7"])?.exits(7)?;
        docker(engine, &["run", "--rm", IMAGE, "nope"])?.fails_with(127, "executable file not found")?;
        docker(engine, &["run", "--rm", IMAGE, "/etc/passwd"])?.fails_with(126, "permission denied")?;
        docker(engine, &["run", "--rm", "--runtime", "broken", IMAGE, "true"])?
            .fails_with(127, "fork/exec /nowhere/runtime: no such file or directory")?;
        docker(engine, &["run", "--rm", "--runtime", "nothing", IMAGE, "true"])?
            .fails_with(125, "unknown or invalid runtime name: nothing")?;
        ensure!(inside(engine, &["-t"], "tty")?.starts_with("/dev/"));
        let limited = ["-m", "64m", "--init", "--read-only", "--tmpfs", "/t", "-u", "1000", "-v", "/data"];
        let said = inside(engine, &limited, "id -u; cat /proc/1/comm; touch /t/x && echo written")?;
        ensure!(said == "1000\ndocker-init\nwritten", "{said}");

        let script = "trap 'exit 9' TERM; i=0; while :; do i=$((i+1)); echo line $i; sleep 0.1; done";
        docker(engine, &["run", "-d", "--name", "long", IMAGE, "sh", "-c", script])?.ok()?;
        ensure!(docker(engine, &["exec", "long", "echo", "beside"])?.ok()? == "beside");
        let said = docker(engine, &["exec", "long", "nope"])?.exits(127)?;
        ensure!(
            said.contains("OCI runtime exec failed: exec failed: ") && said.contains("not found"),
            "{said}"
        );
        docker(engine, &["exec", "long", "sh", "-c", "exit 4"])?.exits(4)?;
        ensure!(docker(engine, &["top", "long"])?.ok()?.contains("sleep"));
        docker(engine, &["pause", "long"])?.ok()?;
        docker(engine, &["unpause", "long"])?.ok()?;
        docker(engine, &["update", "--pids-limit", "40", "long"])?.ok()?;
        engine.end_native(true)?;
        engine.boot_with_settings(&settings)?;
        ensure!(docker(engine, &["exec", "long", "echo", "still"])?.ok()? == "still");
        docker(engine, &["stop", "long"])?.ok()?;
        let shown = inspect(engine, &["inspect", "long"])?;
        ensure!(shown["State"]["ExitCode"] == 9 && shown["HostConfig"]["Runtime"] == "other", "{shown}");
        docker(engine, &["start", "long"])?.ok()?;
        engine.processes().kill("shim")?;
        docker(engine, &["wait", "long"])?.ok().map(drop)
    })?;
    // The settings name it no more.
    docker(engine, &["start", "long"])?.fails_with(1, "unknown or invalid runtime name: other")?;
    docker(engine, &["rm", "-f", "-v", "long"])?.ok().map(drop)
}
