//! Specs of whole records.

use serde_json::{Value, json};

use super::super::mounts::{Ready, ReadyMount};
use super::super::record::tests::record;
use guest_runtime::defaults;

use super::process::DEFAULT_PATH;
use super::*;

/// The spec of the test record with these host settings, as JSON.
fn built(change: impl FnOnce(&mut Record)) -> Value {
    with_mounts(Ready::default(), change)
}

fn with_mounts(mounts: Ready, change: impl FnOnce(&mut Record)) -> Value {
    let mut record = record();
    record.host.masked_paths = Some(vec!["/proc/kcore".into()]);
    record.host.cgroupns_mode = "private".into();
    record.host.shm_size = 64 << 20;
    change(&mut record);
    let spec = build(&Input {
        record: &record,
        user: &User { uid: 0, gid: 0, additional: vec![10], home: "/root".into() },
        rootfs: Path::new("/run/c/rootfs"),
        files: Path::new("/data/c"),
        network: &NetworkNamespace::Path("/run/netns/c".into()),
        mounts: &mounts,
        grantable: &defaults::all_capabilities(),
        defaults: &ContainerDefaults::default(),
        devices: &Devices::default(),
        peers: Peers { pid: Some(77), ipc: Some(78) },
        shm: Some(Path::new("/run/c/shm")),
        init: Path::new("/usr/bin/shim"),
    })
    .unwrap();
    serde_json::to_value(spec).unwrap()
}

fn destinations(spec: &Value) -> Vec<&str> {
    spec["mounts"].as_array().unwrap().iter().map(|mount| mount["destination"].as_str().unwrap()).collect()
}

fn namespaces_of(spec: &Value) -> Vec<&str> {
    spec["linux"]["namespaces"]
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| entry["type"].as_str().unwrap())
        .collect()
}

#[test]
fn a_plain_container() {
    let spec = built(|record| {
        record.config.hostname = "web".into();
        record.config.env = Some(vec!["A=1".into()]);
    });
    assert_eq!(spec["root"], json!({"path": "/run/c/rootfs", "readonly": false}));
    assert_eq!(spec["hostname"], "web");
    assert_eq!(spec["process"]["args"], json!(["sleep", "1"]));
    assert_eq!(spec["process"]["cwd"], "/");
    assert_eq!(spec["process"]["env"], json!([DEFAULT_PATH, "HOSTNAME=web", "A=1", "HOME=/root"]));
    assert_eq!(spec["process"]["user"]["additionalGids"], json!([0, 10]));
    assert_eq!(spec["process"]["noNewPrivileges"], false);
    assert_eq!(spec["process"]["capabilities"]["bounding"].as_array().unwrap().len(), 14);
    assert_eq!(namespaces_of(&spec), ["mount", "network", "uts", "pid", "ipc", "cgroup"]);
    assert_eq!(spec["linux"]["namespaces"][1]["path"], "/run/netns/c");
    assert_eq!(spec["linux"]["cgroupsPath"], format!("/engine/{}", "3f2a9c1d77e04b5c".repeat(4)));
    assert_eq!(spec["linux"]["maskedPaths"], json!(["/proc/kcore"]));
    assert!(spec["linux"]["seccomp"].is_object());
    assert_eq!(
        destinations(&spec),
        [
            "/proc",
            "/dev",
            "/dev/pts",
            "/sys",
            "/sys/fs/cgroup",
            "/dev/mqueue",
            "/dev/shm",
            "/etc/resolv.conf",
            "/etc/hostname",
            "/etc/hosts"
        ]
    );
}

#[test]
fn a_privileged_container_is_confined_by_nothing() {
    let spec = built(|record| {
        record.host.privileged = true;
        record.host.masked_paths = None;
    });
    assert!(spec["linux"].get("seccomp").is_none_or(Value::is_null));
    assert_eq!(spec["process"]["capabilities"]["bounding"].as_array().unwrap().len(), 41);
    assert_eq!(spec["linux"]["maskedPaths"], json!([]));
    assert_eq!(spec["linux"]["resources"]["devices"][0]["allow"], true);
}

#[test]
fn namespaces_of_the_host_are_not_made() {
    let spec = built(|record| {
        record.host.pid_mode = "host".into();
        record.host.ipc_mode = "host".into();
        record.host.uts_mode = "host".into();
        record.host.cgroupns_mode = "host".into();
    });
    assert_eq!(namespaces_of(&spec), ["mount", "network"]);
    assert!(spec.get("hostname").is_none_or(Value::is_null));
}

#[test]
fn mounts_come_after_what_they_lie_in_and_replace_ours() {
    let ready = |source: Option<&str>, destination: &str, options: &[&str]| ReadyMount {
        source: source.map(Into::into),
        destination: destination.into(),
        options: options.iter().map(|option| (*option).to_owned()).collect(),
    };
    let mounts = Ready {
        mounts: vec![
            ready(Some("/a"), "/srv/deep/er", &["rbind", "rro", "rprivate"]),
            ready(Some("/b"), "/srv", &["rbind"]),
            ready(Some("/h"), "/etc/hosts", &["rbind"]),
            ready(None, "/dev/shm", &["nosuid", "nodev", "noexec", "size=1m"]),
        ],
        rootfs_propagation: Some("slave".to_owned()),
        ..Ready::default()
    };
    let spec = with_mounts(mounts, |_| {});
    assert_eq!(spec["linux"]["rootfsPropagation"], "slave");
    let order = destinations(&spec);
    let place = |wanted: &str| order.iter().position(|found| *found == wanted).unwrap();
    assert!(place("/srv") < place("/srv/deep/er"));
    assert_eq!(order.iter().filter(|found| **found == "/dev/shm").count(), 1);
    assert_eq!(order.iter().filter(|found| **found == "/etc/hosts").count(), 1);
    let mounts = spec["mounts"].as_array().unwrap();
    assert_eq!(mounts[place("/etc/hosts")]["source"], "/h");
    assert_eq!(mounts[place("/srv/deep/er")]["options"], json!(["rbind", "rro", "rprivate"]));
    assert_eq!(mounts[place("/dev/shm")]["options"], json!(["nosuid", "nodev", "noexec", "size=1m"]));
}

#[test]
fn limits_become_resources() {
    let spec = built(|record| {
        record.host.memory = 64 << 20;
        record.host.memory_swap = 128 << 20;
        record.host.nano_cpus = 1_500_000_000;
        record.host.pids_limit = Some(50);
    });
    let resources = &spec["linux"]["resources"];
    assert_eq!(resources["memory"]["limit"], 64 << 20);
    assert_eq!(resources["memory"]["swap"], 128 << 20);
    assert_eq!((&resources["cpu"]["quota"], &resources["cpu"]["period"]), (&json!(150_000), &json!(100_000)));
    assert_eq!(resources["pids"]["limit"], 50);
    let plain = built(|_| {});
    assert!(plain["linux"]["resources"].get("memory").is_none_or(Value::is_null));
    assert!(plain["linux"]["resources"].get("cpu").is_none_or(Value::is_null));
}

#[test]
fn namespaces_of_others_are_joined() {
    let spec = built(|record| {
        record.host.pid_mode = "container:x".into();
        record.host.ipc_mode = "container:x".into();
        record.host.init = Some(true);
    });
    let paths: Vec<_> = spec["linux"]["namespaces"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|entry| entry["path"].as_str())
        .collect();
    assert_eq!(paths, ["/run/netns/c", "/proc/77/ns/pid", "/proc/78/ns/ipc"]);
    let mounts = spec["mounts"].as_array().unwrap();
    let shm = mounts.iter().find(|mount| mount["destination"] == "/dev/shm").unwrap();
    assert_eq!((shm["source"].as_str(), shm["type"].as_str()), (Some("/run/c/shm"), Some("bind")));
    // In another's namespace there is a first process already.
    assert_eq!(spec["process"]["args"], json!(["sleep", "1"]));
}

#[test]
fn an_init_is_put_before_the_program() {
    let spec = built(|record| record.host.init = Some(true));
    assert_eq!(spec["process"]["args"], json!(["/sbin/docker-init", "--", "sleep", "1"]));
    let mounts = spec["mounts"].as_array().unwrap();
    let init = mounts.iter().find(|mount| mount["destination"] == "/sbin/docker-init").unwrap();
    assert_eq!((init["source"].as_str(), &init["options"]), (Some("/usr/bin/shim"), &json!(["bind", "ro"])));
}

#[test]
fn the_parent_cgroup_cannot_lead_out() {
    let path = |parent: &str| {
        let spec = built(|record| record.host.cgroup_parent = parent.into());
        spec["linux"]["cgroupsPath"]
            .as_str()
            .unwrap()
            .trim_end_matches(|letter: char| letter.is_ascii_hexdigit())
            .to_owned()
    };
    assert_eq!(path("/mine"), "/mine/");
    assert_eq!(path("mine/./deep"), "/mine/deep/");
    assert_eq!(path("../../etc/.."), "/");
}

#[test]
fn a_read_only_root_makes_the_systems_mounts_read_only() {
    let options = |privileged: bool, place: &str| {
        let spec = built(|record| {
            record.host.readonly_rootfs = true;
            record.host.privileged = privileged;
        });
        let mounts = spec["mounts"].as_array().unwrap();
        let found = mounts.iter().find(|mount| mount["destination"] == place).unwrap();
        found["options"].as_array().unwrap().contains(&json!("ro"))
    };
    assert!(options(false, "/sys") && options(false, "/sys/fs/cgroup") && !options(false, "/dev"));
    assert!(!options(true, "/sys") && !options(true, "/sys/fs/cgroup"));
    assert!(options(false, "/etc/hosts"));
}
