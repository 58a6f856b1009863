//! Kernel settings of a container: only those that its own namespaces keep away from the host.

use std::collections::{BTreeMap, HashMap};

use guest_api::HostConfig;

use crate::failure::Failure;

/// Settings of an IPC namespace.
const IPC: [&str; 8] = [
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
    "kernel.shm_rmid_forced",
];

/// The settings to make: the user's over those Docker makes in every network namespace of a container's own.
pub fn settings(
    host: &HostConfig,
    own_network: bool,
    exists: impl Fn(&str) -> bool,
) -> Result<Option<HashMap<String, String>>, Failure> {
    let mut settings = BTreeMap::new();
    if own_network {
        // Echo requests, and ports below 1024, for everyone: they harm nobody else.
        for (name, value) in
            [("net.ipv4.ping_group_range", "0 2147483647"), ("net.ipv4.ip_unprivileged_port_start", "0")]
        {
            if exists(name) {
                settings.insert(name.to_owned(), value.to_owned());
            }
        }
    }
    for (name, value) in host.sysctls.iter().flatten() {
        check(name, host)?;
        // An interface's settings are there when it is.
        let of_interface =
            ["conf", "neigh"].iter().any(|part| name.split(['.', '/']).any(|found| found == *part));
        if !of_interface && !exists(name) {
            let path = name.replace('.', "/");
            return Err(refused(&format!("open /proc/sys/{path}: no such file or directory")));
        }
        settings.insert(name.clone(), value.clone());
    }
    Ok(Some(settings.into_iter().collect()).filter(|settings: &HashMap<_, _>| !settings.is_empty()))
}

/// Refuses what would be set for the whole host, in the runtime's words.
fn check(name: &str, host: &HostConfig) -> Result<(), Failure> {
    let refuse = |reason: &str| Err(refused(&format!("sysctl {name:?} {reason}")));
    let dotted = name.replace('/', ".");
    if IPC.contains(&dotted.as_str()) || dotted.starts_with("fs.mqueue.") {
        return match host.ipc_mode.as_str() {
            "host" => refuse("is not allowed in the hosts ipc namespace"),
            _ => Ok(()),
        };
    }
    if dotted.starts_with("net.") && !dotted.contains("..") {
        return match host.network_mode.as_str() {
            "host" => refuse("not allowed in host network namespace"),
            _ => Ok(()),
        };
    }
    match dotted.as_str() {
        "kernel.domainname" if host.uts_mode != "host" => Ok(()),
        "kernel.domainname" => refuse("is not allowed in the hosts uts namespace"),
        "kernel.hostname" => refuse("is conflicting with the host name of the container"),
        _ => refuse("is not in a separate kernel namespace"),
    }
}

fn refused(reason: &str) -> Failure {
    Failure::broken(super::super::run::runtime_text(reason))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(names: &[&str], change: impl FnOnce(&mut HostConfig)) -> Result<HashMap<String, String>, String> {
        let given = names.iter().map(|name| ((*name).to_owned(), "1".to_owned())).collect();
        let mut host = HostConfig { sysctls: Some(given), ..HostConfig::default() };
        change(&mut host);
        let settings = settings(&host, host.network_mode != "host", |name| !name.ends_with("none"));
        settings.map(Option::unwrap_or_default).map_err(|failure| failure.message)
    }

    #[test]
    fn the_users_settings_lie_over_dockers() {
        let plain = of(&[], |_| {}).unwrap();
        assert_eq!(plain["net.ipv4.ip_unprivileged_port_start"], "0");
        assert_eq!(plain.len(), 2);
        let given =
            of(&["net.ipv4.ip_unprivileged_port_start", "kernel.msgmax", "fs.mqueue.msg_max"], |_| {});
        let given = given.unwrap();
        assert_eq!(given["net.ipv4.ip_unprivileged_port_start"], "1");
        assert_eq!(given.len(), 4);
        assert_eq!(of(&[], |host| host.network_mode = "host".into()), Ok(HashMap::new()));
        let missing = of(&["net.core.none"], |_| {}).unwrap_err();
        assert!(missing.contains("open /proc/sys/net/core/none: no such file or directory"), "{missing}");
        assert!(of(&["net.ipv4.conf.eth7.none"], |_| {}).is_ok());
    }

    #[test]
    fn what_would_change_the_host_is_refused() {
        for name in
            ["kernel.panic", "vm.swappiness", "kernel/panic", "kernel.hostname", "fs.file-max", "net..x", ""]
        {
            assert!(of(&[name], |_| {}).unwrap_err().contains("sysctl"), "{name}");
        }
        assert!(of(&["net.core.somaxconn"], |host| host.network_mode = "host".into()).is_err());
        assert!(of(&["kernel.msgmax"], |host| host.ipc_mode = "host".into()).is_err());
        assert!(of(&["kernel.domainname"], |host| host.uts_mode = "host".into()).is_err());
    }
}
