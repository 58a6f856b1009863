//! What becomes of requests as clients send them.

use guest_api::ErrorKind;
use serde_json::json;

use super::super::capacity::tests::capable;
use super::*;

const ID: &str = "3f2a9c1d77e04b5c3f2a9c1d77e04b5c3f2a9c1d77e04b5c3f2a9c1d77e04b5c";

fn image() -> ContainerConfig {
    serde_json::from_value(json!({
        "Env": ["PATH=/bin", "A=image"], "Entrypoint": ["/entry"], "Cmd": ["serve"], "WorkingDir": "/srv",
        "Labels": {"from": "image", "kept": "yes"}, "ExposedPorts": {"80/tcp": {}}, "StopSignal": "SIGQUIT",
    }))
    .unwrap()
}

fn try_resolve(body: serde_json::Value) -> Result<Resolved, Failure> {
    let mut create = guest_api::decode(body.to_string().as_bytes()).unwrap();
    let capacity = capable();
    check(&mut create, &capacity)?;
    resolve(create, &image(), ID, &capacity)
}

fn ok(body: serde_json::Value) -> Resolved {
    try_resolve(body).unwrap()
}

fn refusal(body: serde_json::Value) -> String {
    try_resolve(body).unwrap_err().message
}

#[test]
fn the_images_settings_lie_under_the_users() {
    let config = ok(json!({"Env": ["A=mine"], "Labels": {"from": "me"}})).config;
    assert_eq!(config.env.unwrap(), ["A=mine", "PATH=/bin"]);
    assert_eq!(config.labels["from"], "me");
    assert_eq!(config.labels["kept"], "yes");
    assert_eq!(config.working_dir, "/srv");
    assert_eq!(config.stop_signal, "SIGQUIT");
    assert!(config.exposed_ports.unwrap().contains_key("80/tcp"));
    assert_eq!(config.hostname, "3f2a9c1d77e0");
}

#[test]
fn entry_point_and_command_combine_as_dockers() {
    let command = |body| {
        let config = ok(body).config;
        (config.entrypoint.unwrap_or_default(), config.cmd.unwrap_or_default())
    };
    let words = |list: &[&str]| list.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    assert_eq!(command(json!({})), (words(&["/entry"]), words(&["serve"])));
    assert_eq!(command(json!({"Cmd": ["x"]})), (words(&["/entry"]), words(&["x"])));
    assert_eq!(command(json!({"Entrypoint": ["/other"]})), (words(&["/other"]), words(&[])));
    assert_eq!(command(json!({"Entrypoint": [""], "Cmd": ["sh"]})), (words(&[]), words(&["sh"])));
    assert_eq!(refusal(json!({"Entrypoint": [""]})), "no command specified");
}

#[test]
fn what_cannot_be_honoured_is_refused_by_name() {
    let cases = [
        (json!({"HostConfig": {"LogConfig": {"Type": "gelf"}}}), "no log driver named 'gelf'"),
        (json!({"Healthcheck": {"Test": ["CMD", "true"], "Interval": 1}}), "Healthcheck"),
    ];
    for (body, expected) in cases {
        let failure = try_resolve(body).unwrap_err();
        assert!(failure.message.contains(expected), "{} / {expected}", failure.message);
        assert_eq!(failure.kind, ErrorKind::Invalid);
    }
}

#[test]
fn harmless_settings_are_kept() {
    let host = ok(json!({"HostConfig": {
        "PortBindings": {}, "Init": false, "OomKillDisable": false, "MemorySwappiness": -1, "PidsLimit": 0,
        "Devices": [], "VolumeDriver": "local", "ConsoleSize": [24, 80], "Annotations": {"a": "b"}
    }}))
    .host;
    assert_eq!(host.console_size, [24, 80]);
    assert_eq!(host.annotations["a"], "b");
    assert_eq!((host.memory_swappiness, host.pids_limit), (None, None));
    assert_eq!((host.network_mode.as_str(), host.ipc_mode.as_str()), ("bridge", "private"));
    assert_eq!(host.shm_size, 64 << 20);
    assert!(!host.masked_paths.unwrap().is_empty());
}

#[test]
fn networks_are_kept_by_name_and_looked_at_when_it_starts() {
    let front = ok(json!({"HostConfig": {"NetworkMode": "front"}}));
    assert_eq!(front.networks.keys().collect::<Vec<_>>(), ["front"]);
    assert_eq!(ok(json!({})).networks.keys().collect::<Vec<_>>(), ["bridge"]);
    assert_eq!(ok(json!({"NetworkDisabled": true})).host.network_mode, "none");
    let mac = json!({"MacAddress": "02:42:ac:11:00:0a", "HostConfig": {"NetworkMode": "bridge"}});
    assert_eq!(ok(mac).networks["bridge"].mac_address, "02:42:ac:11:00:0a");
    assert_eq!(
        refusal(json!({"MacAddress": "02:42:ac:11:00:0a", "HostConfig": {"NetworkMode": "host"}})),
        "conflicting options: mac-address and the network mode"
    );
}

#[test]
fn one_that_uses_anothers_network_has_nothing_of_its_own() {
    let shared = |more: serde_json::Value| {
        let mut body = json!({"HostConfig": {"NetworkMode": "container:web"}});
        for (key, value) in more.as_object().unwrap() {
            if key == "Hostname" || key == "ExposedPorts" {
                body[key] = value.clone();
            } else {
                body["HostConfig"][key] = value.clone();
            }
        }
        body
    };
    assert_eq!(
        refusal(shared(json!({"Hostname": "me"}))),
        "conflicting options: hostname and the network mode"
    );
    assert_eq!(refusal(shared(json!({"Dns": ["1.1.1.1"]}))), "conflicting options: dns and the network mode");
    assert!(refusal(shared(json!({"PublishAllPorts": true}))).contains("port"));
    assert_eq!(
        refusal(json!({"HostConfig": {"NetworkMode": "container:"}})),
        "invalid network mode: invalid container format container:<name|id>"
    );
}

#[test]
fn senseless_values_have_dockers_sentences() {
    let host = |value: serde_json::Value| refusal(json!({ "HostConfig": value }));
    assert_eq!(host(json!({"Memory": 1024})), "Minimum memory limit allowed is 6MB");
    assert_eq!(host(json!({"IpcMode": "x"})), "invalid IPC mode: x");
    assert_eq!(host(json!({"PidMode": "container:"})), "invalid PID mode: container:");
    assert_eq!(host(json!({"UTSMode": "x"})), "invalid UTS mode: x");
    assert_eq!(host(json!({"CgroupnsMode": "x"})), "invalid cgroup namespace mode: x");
    assert_eq!(
        host(json!({"Isolation": "hyperv"})),
        "invalid isolation (hyperv): linux only supports 'default'"
    );
    assert_eq!(
        host(json!({"OomScoreAdj": 2000})),
        "Invalid value 2000, range for oom score adj is [-1000, 1000]"
    );
    assert_eq!(host(json!({"SecurityOpt": ["x"]})), "invalid --security-opt 1: \"x\"");
    assert_eq!(host(json!({"DeviceCgroupRules": ["x"]})), "invalid device cgroup rule format: 'x'");
    assert!(host(json!({"StorageOpt": {"size": "1g"}})).contains("'pquota'"));
    assert_eq!(
        refusal(json!({"Hostname": "x", "HostConfig": {"UTSMode": "host"}})),
        "conflicting options: hostname and the UTS mode"
    );
    assert!(refusal(json!({"Hostname": "x".repeat(65)})).contains("too long (maximum 64 bytes)"));
    assert!(host(json!({"NanoCpus": 5, "CpuQuota": 7})).starts_with("Conflicting options"));
    assert!(host(json!({"RestartPolicy": {"Name": "maybe"}})).contains("unknown policy 'maybe'"));
    assert!(
        host(json!({"RestartPolicy": {"Name": "always", "MaximumRetryCount": 3}})).contains("on-failure")
    );
    assert!(host(json!({"AutoRemove": true, "RestartPolicy": {"Name": "always"}})).contains("AutoRemove"));
    assert!(host(json!({"CapAdd": ["FLY"]})).contains("FLY"));
    assert!(host(json!({"Ulimits": [{"Name": "nothing"}]})).contains("nothing"));
    assert!(host(json!({"ExtraHosts": ["x"]})).contains("add-host"));
    assert!(host(json!({"LogConfig": {"Config": {"max-size": "ten"}}})).contains("'ten'"));
    assert!(refusal(json!({"WorkingDir": "srv"})).contains("absolute path"));
    assert!(refusal(json!({"Env": ["=x"]})).contains("invalid environment variable"));
    assert!(refusal(json!({"StopSignal": "SIGNOPE"})).contains("SIGNOPE"));
}

#[test]
fn what_nobody_asked_for_is_shown_as_dockerds() {
    let plain = ok(json!({})).host;
    assert_eq!((plain.runtime.as_str(), plain.cgroupns_mode.as_str()), ("runc", "private"));
    assert_eq!((plain.oom_kill_disable, plain.memory_swappiness), (Some(false), None));
    assert_eq!(plain.security_opt, None);
    let json = serde_json::to_value(&plain).unwrap();
    for absent in ["Sysctls", "Tmpfs", "StorageOpt", "Init", "Annotations"] {
        assert!(json.get(absent).is_none(), "{absent}");
    }
    let limited = ok(json!({"HostConfig": {"Memory": 64 << 20, "Sysctls": {}, "Tmpfs": {}}})).host;
    assert_eq!((limited.memory_swap, limited.sysctls, limited.tmpfs), (128 << 20, None, None));
    let privileged = ok(json!({"HostConfig": {"Privileged": true}})).host;
    assert_eq!(privileged.security_opt.unwrap(), ["label=disable"]);
    assert_eq!((privileged.masked_paths, privileged.cgroupns_mode.as_str()), (None, "host"));
    let bare = ok(json!({"HostConfig": {"MaskedPaths": [], "ReadonlyPaths": []}})).host;
    assert_eq!((bare.masked_paths, bare.readonly_paths), (Some(vec![]), Some(vec![])));
}
