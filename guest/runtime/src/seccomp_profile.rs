//! Seccomp profiles as users write them: OCI's, with rules that apply only to some architectures, capabilities or
//! kernels (moby's `profiles/seccomp`).

use oci_spec::runtime::{
    Arch, Capabilities, Capability, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg,
    LinuxSeccompFilterFlag, LinuxSyscall,
};
use serde::{Deserialize, Deserializer};
use thiserror::Error;

use crate::defaults;

/// Why a profile is none.
#[derive(Debug, Error)]
pub enum ProfileError {
    /// Not JSON, or not of a profile's shape.
    #[error("Decoding seccomp profile failed: {0}")]
    Content(#[from] serde_json::Error),
    /// Far more than a profile.
    #[error("Decoding seccomp profile failed: {len} bytes are more than {PROFILE_LEN_MAX}")]
    TooLong {
        /// Its length in bytes.
        len: usize,
    },
    /// A member that every profile, or every rule, has.
    #[error("Decoding seccomp profile failed: {what} has no `{member}`")]
    Missing {
        /// Where.
        what: String,
        /// The member.
        member: &'static str,
    },
    /// Two members of which there may be one.
    #[error("both '{0}' and '{1}' are specified in the seccomp profile, use either '{0}' or '{1}'")]
    Both(&'static str, &'static str),
    /// Not `4.8` or the like.
    #[error("invalid kernel version: {version:?}, expected \"<kernel>.<major>\"")]
    Kernel {
        /// As written.
        version: String,
    },
}

/// Longest profile: Docker's own has 20 KiB.
const PROFILE_LEN_MAX: usize = 1 << 20;

/// The profile as written. Members that matter to nobody here (`comment`) are passed over.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Profile {
    default_action: Option<LinuxSeccompAction>,
    default_errno_ret: Option<u32>,
    #[serde(deserialize_with = "nullable")]
    architectures: Vec<Arch>,
    #[serde(deserialize_with = "nullable")]
    flags: Vec<LinuxSeccompFilterFlag>,
    listener_path: Option<String>,
    listener_metadata: Option<String>,
    #[serde(deserialize_with = "nullable")]
    arch_map: Vec<ArchMap>,
    #[serde(deserialize_with = "nullable")]
    syscalls: Vec<Rule>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ArchMap {
    architecture: Arch,
    #[serde(default, deserialize_with = "nullable")]
    sub_architectures: Vec<Arch>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Rule {
    #[serde(deserialize_with = "nullable")]
    names: Vec<String>,
    #[serde(deserialize_with = "nullable")]
    name: String,
    action: Option<LinuxSeccompAction>,
    errno_ret: Option<u32>,
    #[serde(deserialize_with = "nullable")]
    args: Vec<LinuxSeccompArg>,
    #[serde(deserialize_with = "nullable")]
    includes: Condition,
    #[serde(deserialize_with = "nullable")]
    excludes: Condition,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Condition {
    #[serde(deserialize_with = "nullable")]
    caps: Vec<String>,
    #[serde(deserialize_with = "nullable")]
    arches: Vec<String>,
    min_kernel: Option<String>,
}

/// `null` counts as absent, as to Go's decoder.
fn nullable<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(source: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(source)?.unwrap_or_default())
}

/// What a profile's conditions are about.
struct Circumstances<'a> {
    capabilities: &'a Capabilities,
    kernel: (u32, u32),
}

/// Version and major revision of the running kernel.
pub fn kernel_release() -> (u32, u32) {
    let name = rustix::system::uname().release().to_string_lossy().into_owned();
    let mut numbers =
        name.split(|letter: char| !letter.is_ascii_digit()).map(|part| part.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// The filter that a profile means for a container with these capabilities; `None` when it means none.
pub fn load(
    text: &[u8],
    capabilities: &Capabilities,
    kernel: (u32, u32),
) -> Result<Option<LinuxSeccomp>, ProfileError> {
    if text.len() > PROFILE_LEN_MAX {
        return Err(ProfileError::TooLong { len: text.len() });
    }
    let profile: Profile = serde_json::from_slice(text)?;
    let Some(default_action) = profile.default_action else {
        if profile.syscalls.is_empty() {
            return Ok(None);
        }
        return Err(ProfileError::Missing { what: "it".to_owned(), member: "defaultAction" });
    };
    if !profile.architectures.is_empty() && !profile.arch_map.is_empty() {
        return Err(ProfileError::Both("architectures", "archMap"));
    }
    let mut architectures = profile.architectures;
    if let Some(entry) = profile.arch_map.into_iter().find(|entry| Some(entry.architecture) == native()) {
        architectures.push(entry.architecture);
        architectures.extend(entry.sub_architectures);
    }
    let circumstances = Circumstances { capabilities, kernel };
    let mut rules = Vec::new();
    for rule in profile.syscalls {
        if let Some(rule) = rule.resolve(&circumstances)? {
            rules.push(rule);
        }
    }
    let mut filter = LinuxSeccomp::default();
    filter
        .set_default_action(default_action)
        .set_default_errno_ret(profile.default_errno_ret)
        .set_architectures(Some(architectures).filter(|list| !list.is_empty()))
        .set_flags(Some(profile.flags).filter(|list| !list.is_empty()))
        .set_listener_path(profile.listener_path.map(Into::into))
        .set_listener_metadata(profile.listener_metadata)
        .set_syscalls(Some(rules));
    Ok(Some(filter))
}

impl Rule {
    fn resolve(self, circumstances: &Circumstances<'_>) -> Result<Option<LinuxSyscall>, ProfileError> {
        let mut names = self.names;
        if !self.name.is_empty() {
            if !names.is_empty() {
                return Err(ProfileError::Both("name", "names"));
            }
            names.push(self.name);
        }
        let excluded = {
            let condition = &self.excludes;
            condition.names_architecture()
                || condition.caps.iter().any(|name| circumstances.has(name))
                || circumstances.is_at_least(condition.min_kernel.as_deref())? == Some(true)
        };
        let included = {
            let condition = &self.includes;
            (condition.arches.is_empty() || condition.names_architecture())
                && condition.caps.iter().all(|name| circumstances.has(name))
                && circumstances.is_at_least(condition.min_kernel.as_deref())? != Some(false)
        };
        let Some(action) = self.action else {
            let what = format!("the rule of `{}`", names.join(", "));
            return Err(ProfileError::Missing { what, member: "action" });
        };
        if excluded || !included || names.is_empty() {
            return Ok(None);
        }
        let mut rule = LinuxSyscall::default();
        rule.set_names(names)
            .set_action(action)
            .set_errno_ret(self.errno_ret)
            .set_args(Some(self.args).filter(|list| !list.is_empty()));
        Ok(Some(rule))
    }
}

impl Condition {
    fn names_architecture(&self) -> bool {
        self.arches.iter().any(|name| name == native_name())
    }
}

impl Circumstances<'_> {
    fn has(&self, name: &str) -> bool {
        let known: Result<Capability, _> = name.strip_prefix("CAP_").unwrap_or(name).parse();
        known.is_ok_and(|capability| self.capabilities.contains(&capability))
    }

    /// `None` when no version is asked for.
    fn is_at_least(&self, version: Option<&str>) -> Result<Option<bool>, ProfileError> {
        let Some(version) = version.filter(|text| !text.is_empty()) else { return Ok(None) };
        let numbers = version.split_once('.').and_then(|(kernel, major)| {
            Some((u32::from(kernel.parse::<u8>().ok()?), u32::from(major.parse::<u8>().ok()?)))
        });
        match numbers {
            Some(numbers) if numbers != (0, 0) => Ok(Some(self.kernel >= numbers)),
            _ => Err(ProfileError::Kernel { version: version.to_owned() }),
        }
    }
}

/// Seccomp's name of this architecture.
fn native() -> Option<Arch> {
    match std::env::consts::ARCH {
        "x86_64" => Some(Arch::ScmpArchX86_64),
        "aarch64" => Some(Arch::ScmpArchAarch64),
        _ => None,
    }
}

/// The name conditions use.
fn native_name() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// Feeds foreign bytes to the reader of profiles.
pub fn read_hostile(text: &[u8]) {
    // Whether it can be read does not matter.
    let _ = load(text, &defaults::capabilities(), (6, 12));
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn try_read(profile: Value) -> Result<Option<LinuxSeccomp>, String> {
        let loaded = load(profile.to_string().as_bytes(), &defaults::capabilities(), (6, 1));
        loaded.map_err(|error| error.to_string())
    }

    fn names(profile: Value) -> Vec<String> {
        let filter = try_read(profile).unwrap().unwrap();
        filter.syscalls().iter().flatten().flat_map(|rule| rule.names().clone()).collect()
    }

    #[test]
    fn rules_apply_where_their_conditions_hold() {
        let allow = "SCMP_ACT_ALLOW";
        let rules = json!([
            {"names": ["read", "write"], "action": allow},
            {"name": "old", "action": allow, "comment": "x"},
            {"names": ["chowned"], "action": allow, "includes": {"caps": ["CAP_CHOWN"]}},
            {"names": ["admin"], "action": allow, "includes": {"caps": ["CAP_SYS_ADMIN"]}},
            {"names": ["weak"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38, "excludes": {"caps": ["CAP_SYS_ADMIN"]}},
            {"names": ["here"], "action": allow, "includes": {"arches": [native_name()]}},
            {"names": ["elsewhere"], "action": allow, "includes": {"arches": ["s390"]}},
            {"names": ["nothere"], "action": allow, "excludes": {"arches": [native_name()]}},
            {"names": ["recent"], "action": allow, "includes": {"minKernel": "4.8"}},
            {"names": ["future"], "action": allow, "includes": {"minKernel": "9.0"}},
        ]);
        let profile = json!({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1, "syscalls": rules,
            "archMap": [{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]},
                        {"architecture": "SCMP_ARCH_AARCH64", "subArchitectures": null}]});
        assert_eq!(names(profile.clone()), ["read", "write", "old", "chowned", "weak", "here", "recent"]);
        let filter = try_read(profile).unwrap().unwrap();
        assert_eq!(filter.default_errno_ret(), Some(1));
        assert_eq!(filter.architectures().as_ref().unwrap()[0], native().unwrap());
    }

    #[test]
    fn an_empty_profile_is_no_filter_and_a_broken_one_is_refused() {
        assert_eq!(try_read(json!({})), Ok(None));
        assert!(try_read(json!({"defaultAction": "NOPE"})).unwrap_err().starts_with("Decoding seccomp"));
        let refusal = |rule: Value| {
            try_read(json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]})).unwrap_err()
        };
        assert!(
            refusal(json!({"name": "a", "names": ["b"], "action": "SCMP_ACT_LOG"})).contains("both 'name'")
        );
        assert!(refusal(json!({"names": ["b"]})).contains("no `action`"));
        let kernel = json!({"names": ["b"], "action": "SCMP_ACT_LOG", "includes": {"minKernel": "x"}});
        assert!(refusal(kernel).contains("invalid kernel version"));
        let both = json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86"],
            "archMap": [{"architecture": "SCMP_ARCH_X86_64"}]});
        assert!(try_read(both).unwrap_err().contains("'archMap'"));
    }

    proptest! {
        #[test]
        fn foreign_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            read_hostile(&bytes);
        }
    }
}
