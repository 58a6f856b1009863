//! Capabilities, security options and the seccomp filter.

use guest_api::HostConfig;
use guest_runtime::defaults;
use oci_spec::runtime::{Capabilities, Capability, LinuxSeccomp};

use super::Input;
use crate::failure::Failure;

/// The container's capabilities: the default ones, plus those added, minus those dropped.
pub fn capabilities(host: &HostConfig) -> Result<Capabilities, Failure> {
    let (add, drop) = (list(host.cap_add.as_deref()), list(host.cap_drop.as_deref()));
    let is_all = |name: &&String| name.eq_ignore_ascii_case("ALL");
    let mut set = match (add.iter().any(|name| is_all(&name)), drop.iter().any(|name| is_all(&name))) {
        (true, _) => defaults::all_capabilities(),
        (false, true) => Capabilities::new(),
        (false, false) => defaults::capabilities(),
    };
    for name in drop.iter().filter(|name| !is_all(name)) {
        set.remove(&capability(name)?);
    }
    for name in add.iter().filter(|name| !is_all(name)) {
        set.insert(capability(name)?);
    }
    Ok(set)
}

fn list(given: Option<&[String]>) -> &[String] {
    given.unwrap_or_default()
}

fn capability(name: &str) -> Result<Capability, Failure> {
    let upper = name.to_ascii_uppercase();
    upper
        .strip_prefix("CAP_")
        .unwrap_or(&upper)
        .parse()
        .map_err(|_| Failure::invalid(format!("invalid capability: unknown capability: \"{name}\"")))
}

/// What `SecurityOpt` asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Security {
    pub seccomp: bool,
    pub no_new_privileges: bool,
}

pub fn security(host: &HostConfig) -> Result<Security, Failure> {
    let mut security = Security { seccomp: !host.privileged, no_new_privileges: false };
    for option in list(host.security_opt.as_deref()) {
        match option.as_str() {
            "no-new-privileges" | "no-new-privileges=true" | "no-new-privileges:true" => {
                security.no_new_privileges = true;
            }
            "no-new-privileges=false" | "no-new-privileges:false" => security.no_new_privileges = false,
            "seccomp=unconfined" | "seccomp:unconfined" => security.seccomp = false,
            "seccomp=builtin" => {}
            // There is no AppArmor and no SELinux to confine it.
            "apparmor=unconfined" | "apparmor:unconfined" | "label=disable" | "label:disable" => {}
            _ => {
                // A seccomp profile is the whole file: name the option, do not repeat it all.
                let shown: String = option.chars().take(80).collect();
                return Err(Failure::invalid(format!(
                    "this SecurityOpt (`{shown}`): not supported by this version of the engine"
                )));
            }
        }
    }
    Ok(security)
}

/// The filter of a container that has one.
pub fn seccomp(input: &Input<'_>) -> Result<Option<LinuxSeccomp>, Failure> {
    let host = &input.record.host;
    if !security(host)?.seccomp {
        return Ok(None);
    }
    Ok(Some(defaults::seccomp_profile(&capabilities(host)?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_added_and_dropped() {
        let set = |add: &[&str], drop: &[&str]| {
            let list = |names: &[&str]| Some(names.iter().map(|name| (*name).to_owned()).collect());
            capabilities(&HostConfig { cap_add: list(add), cap_drop: list(drop), ..HostConfig::default() })
                .unwrap()
        };
        assert_eq!(set(&["ALL"], &[]).len(), 41);
        assert_eq!(set(&["all"], &["SYS_ADMIN"]).len(), 40);
        assert_eq!(set(&["NET_ADMIN"], &["ALL"]), [Capability::NetAdmin].into());
        assert!(set(&["cap_net_admin"], &[]).contains(&Capability::NetAdmin));
        assert!(!set(&[], &["CAP_CHOWN"]).contains(&Capability::Chown));
    }

    #[test]
    fn security_options_are_read() {
        let read = |options: &[&str], privileged| {
            let list = Some(options.iter().map(|option| (*option).to_owned()).collect());
            security(&HostConfig { security_opt: list, privileged, ..HostConfig::default() })
        };
        assert_eq!(read(&[], false), Ok(Security { seccomp: true, no_new_privileges: false }));
        assert_eq!(
            read(&["seccomp=unconfined", "no-new-privileges"], false),
            Ok(Security { seccomp: false, no_new_privileges: true })
        );
        assert!(!read(&[], true).unwrap().seccomp);
        assert!(read(&["seccomp={}"], false).unwrap_err().message.contains("seccomp={}"));
    }
}
