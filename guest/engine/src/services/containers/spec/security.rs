//! Capabilities, security options and the seccomp filter.

use guest_api::HostConfig;
use guest_runtime::{defaults, seccomp_profile};
use oci_spec::runtime::{Capabilities, Capability, LinuxSeccomp};

use super::Input;
use crate::config;
use crate::failure::Failure;

/// The container's capabilities: the default ones, plus those added, minus those dropped. What this engine cannot grant
/// is refused when it is named, and left out when it is not.
pub fn capabilities(host: &HostConfig, grantable: &Capabilities) -> Result<Capabilities, Failure> {
    let named = |list: Option<&[String]>, field: &str| {
        let names = list.unwrap_or_default().iter();
        let (all, named): (Vec<_>, Vec<_>) = names.partition(|name| name.eq_ignore_ascii_case("ALL"));
        let set = named.into_iter().map(|name| capability(name, field, grantable));
        let set: Result<Capabilities, Failure> = set.collect();
        set.map(|set| (!all.is_empty(), set))
    };
    let (add_all, add) = named(host.cap_add.as_deref(), "CapAdd")?;
    let (drop_all, drop) = named(host.cap_drop.as_deref(), "CapDrop")?;
    if host.privileged {
        return Ok(grantable.clone());
    }
    let mut set: Capabilities = match (add_all, drop_all) {
        (true, _) => grantable.difference(&drop).copied().collect(),
        (false, true) => add,
        (false, false) => defaults::capabilities().difference(&drop).chain(&add).copied().collect(),
    };
    set.retain(|capability| grantable.contains(capability));
    Ok(set)
}

fn capability(name: &str, field: &str, grantable: &Capabilities) -> Result<Capability, Failure> {
    let upper = name.to_ascii_uppercase();
    let bare = upper.strip_prefix("CAP_").unwrap_or(&upper);
    let found: Capability = bare
        .parse()
        .map_err(|_| Failure::invalid(format!("invalid {field}: unknown capability: \"CAP_{bare}\"")))?;
    if grantable.contains(&found) {
        return Ok(found);
    }
    Err(Failure::invalid(format!(
        "invalid {field}: capability not supported by your kernel or not available in the current environment: \
         \"CAP_{bare}\""
    )))
}

/// What `SecurityOpt` asks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Security {
    pub seccomp: Seccomp,
    /// `None`: as the settings say.
    pub no_new_privileges: Option<bool>,
    /// `None`: as privileged as the container.
    pub writable_cgroups: Option<bool>,
    /// There is no AppArmor to confine it: only shown.
    pub apparmor: String,
}

/// Which filter of system calls.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Seccomp {
    /// Docker's own; none for a privileged container.
    #[default]
    Default,
    /// Docker's own, even for a privileged container.
    Builtin,
    Unconfined,
    /// A profile, as JSON.
    Profile(String),
}

/// Reads `SecurityOpt`.
pub fn security(host: &HostConfig) -> Result<Security, Failure> {
    let mut security = Security::default();
    for option in host.security_opt.iter().flatten() {
        // A seccomp profile is the whole file: name the option, do not repeat it all.
        let shown: String = option.chars().take(80).collect();
        let invalid = |step: u8| Failure::invalid(format!("invalid --security-opt {step}: {shown:?}"));
        let (key, value) = match option.as_str() {
            "no-new-privileges" => ("no-new-privileges", "true"),
            "writable-cgroups" => ("writable-cgroups", "true"),
            "disable" => ("label", "disable"),
            text => text.split_once('=').or_else(|| text.split_once(':')).ok_or_else(|| invalid(1))?,
        };
        match key {
            // There is no SELinux to act on it.
            "label" => {}
            "apparmor" => value.clone_into(&mut security.apparmor),
            "seccomp" => {
                security.seccomp = match value {
                    "unconfined" => Seccomp::Unconfined,
                    "builtin" => Seccomp::Builtin,
                    "" => Seccomp::Default,
                    text => Seccomp::Profile(text.to_owned()),
                }
            }
            "no-new-privileges" => {
                security.no_new_privileges = Some(boolean(value).ok_or_else(|| invalid(2))?);
            }
            "writable-cgroups" => {
                security.writable_cgroups = Some(boolean(value).ok_or_else(|| invalid(2))?);
            }
            _ => return Err(invalid(2)),
        }
    }
    Ok(security)
}

/// Go's words for yes and no.
fn boolean(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

/// The filter of a container that has one.
pub fn seccomp(input: &Input<'_>) -> Result<Option<LinuxSeccomp>, Failure> {
    let host = &input.record.host;
    let granted = capabilities(host, input.grantable)?;
    Ok(match security(host)?.seccomp {
        Seccomp::Unconfined => None,
        Seccomp::Builtin => Some(defaults::seccomp_profile(&granted)),
        Seccomp::Profile(text) => profile(text.as_bytes(), &granted)?,
        Seccomp::Default if host.privileged => None,
        Seccomp::Default => match &input.defaults.seccomp {
            config::Seccomp::Builtin => Some(defaults::seccomp_profile(&granted)),
            config::Seccomp::Unconfined => None,
            config::Seccomp::Profile(path) => {
                let text = std::fs::read(path).map_err(|error| {
                    Failure::internal(format!("cannot read the seccomp profile `{}`", path.display()), &error)
                })?;
                profile(&text, &granted)?
            }
        },
    })
}

fn profile(text: &[u8], granted: &Capabilities) -> Result<Option<LinuxSeccomp>, Failure> {
    let loaded = seccomp_profile::load(text, granted, seccomp_profile::kernel_release());
    loaded.map_err(|error| Failure::invalid(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_added_and_dropped() {
        let list = |names: &[&str]| Some(names.iter().map(|name| (*name).to_owned()).collect());
        let set = |add: &[&str], drop: &[&str]| {
            let host = HostConfig { cap_add: list(add), cap_drop: list(drop), ..HostConfig::default() };
            capabilities(&host, &defaults::all_capabilities()).unwrap()
        };
        assert_eq!(set(&["ALL"], &[]).len(), 41);
        assert_eq!(set(&["all"], &["SYS_ADMIN"]).len(), 40);
        assert_eq!(set(&["NET_ADMIN"], &["ALL"]), [Capability::NetAdmin].into());
        assert!(set(&["cap_net_admin"], &[]).contains(&Capability::NetAdmin));
        assert!(!set(&[], &["CAP_CHOWN"]).contains(&Capability::Chown));
        assert!(set(&["CHOWN"], &["CHOWN"]).contains(&Capability::Chown), "added last");
        let refusal = |name: &str, grantable: &Capabilities| {
            let host = HostConfig { cap_add: list(&[name]), ..HostConfig::default() };
            capabilities(&host, grantable).unwrap_err().message
        };
        assert_eq!(
            refusal("fly", &defaults::all_capabilities()),
            "invalid CapAdd: unknown capability: \"CAP_FLY\""
        );
        let weak = defaults::capabilities();
        assert!(refusal("SYS_ADMIN", &weak).contains("not available in the current environment"));
        let all = HostConfig { cap_add: list(&["ALL"]), ..HostConfig::default() };
        assert_eq!(capabilities(&all, &weak).unwrap(), weak);
    }

    #[test]
    fn security_options_are_read() {
        let read = |options: &[&str]| {
            let list = Some(options.iter().map(|option| (*option).to_owned()).collect());
            security(&HostConfig { security_opt: list, ..HostConfig::default() })
        };
        assert_eq!(read(&[]), Ok(Security::default()));
        let given = read(&["seccomp=unconfined", "no-new-privileges", "apparmor:unconfined", "label=type:x"]);
        let expected = Security {
            seccomp: Seccomp::Unconfined,
            no_new_privileges: Some(true),
            apparmor: "unconfined".into(),
            ..Security::default()
        };
        assert_eq!(given, Ok(expected));
        assert_eq!(read(&["seccomp={\"a\":1}"]).unwrap().seccomp, Seccomp::Profile("{\"a\":1}".into()));
        assert_eq!(read(&["writable-cgroups=false"]).unwrap().writable_cgroups, Some(false));
        let refusal = |option: &str| read(&[option]).unwrap_err().message;
        assert_eq!(refusal("nonsense"), "invalid --security-opt 1: \"nonsense\"");
        assert_eq!(refusal("fly=high"), "invalid --security-opt 2: \"fly=high\"");
        assert_eq!(
            refusal("no-new-privileges=maybe"),
            "invalid --security-opt 2: \"no-new-privileges=maybe\""
        );
    }
}
