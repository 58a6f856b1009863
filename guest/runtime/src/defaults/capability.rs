//! Capabilities: Docker's default list, the kernel's numbers, and what this process can grant at all.

use std::fs;
use std::io;

use oci_spec::runtime::{Capabilities, Capability, LinuxCapabilities};

/// All capabilities in the order of their numbers (`linux/capability.h`).
const ALL: [Capability; 41] = [
    Capability::Chown,
    Capability::DacOverride,
    Capability::DacReadSearch,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Kill,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setpcap,
    Capability::LinuxImmutable,
    Capability::NetBindService,
    Capability::NetBroadcast,
    Capability::NetAdmin,
    Capability::NetRaw,
    Capability::IpcLock,
    Capability::IpcOwner,
    Capability::SysModule,
    Capability::SysRawio,
    Capability::SysChroot,
    Capability::SysPtrace,
    Capability::SysPacct,
    Capability::SysAdmin,
    Capability::SysBoot,
    Capability::SysNice,
    Capability::SysResource,
    Capability::SysTime,
    Capability::SysTtyConfig,
    Capability::Mknod,
    Capability::Lease,
    Capability::AuditWrite,
    Capability::AuditControl,
    Capability::Setfcap,
    Capability::MacOverride,
    Capability::MacAdmin,
    Capability::Syslog,
    Capability::WakeAlarm,
    Capability::BlockSuspend,
    Capability::AuditRead,
    Capability::Perfmon,
    Capability::Bpf,
    Capability::CheckpointRestore,
];

/// The kernel's number of a capability.
pub fn number(capability: Capability) -> u32 {
    ALL.iter().position(|known| *known == capability).map_or(u32::MAX, |position| position as u32)
}

/// Every capability there is: what a privileged container asks for.
pub fn all() -> Capabilities {
    ALL.into_iter().collect()
}

/// Docker's default capabilities.
pub fn capabilities() -> Capabilities {
    [
        Capability::Chown,
        Capability::DacOverride,
        Capability::Fsetid,
        Capability::Fowner,
        Capability::Mknod,
        Capability::NetRaw,
        Capability::Setgid,
        Capability::Setuid,
        Capability::Setfcap,
        Capability::Setpcap,
        Capability::NetBindService,
        Capability::SysChroot,
        Capability::Kill,
        Capability::AuditWrite,
    ]
    .into_iter()
    .collect()
}

/// What this process can grant: its bounding set. The rest would make the container's start fail.
pub fn grantable() -> io::Result<Capabilities> {
    let status = fs::read_to_string("/proc/self/status")?;
    let mask = status
        .lines()
        .find_map(|line| u64::from_str_radix(line.strip_prefix("CapBnd:")?.trim(), 16).ok())
        .ok_or_else(|| io::Error::other("/proc/self/status has no CapBnd line"))?;
    Ok(ALL
        .into_iter()
        .enumerate()
        .filter(|(number, _)| mask >> number & 1 == 1)
        .map(|(_, known)| known)
        .collect())
}

/// A process's capability sets as dockerd makes them: bounding, permitted and effective alike, none inheritable or
/// ambient (CVE-2022-24769).
pub fn sets(granted: &Capabilities) -> LinuxCapabilities {
    let mut sets = LinuxCapabilities::default();
    sets.set_bounding(Some(granted.clone()))
        .set_permitted(Some(granted.clone()))
        .set_effective(Some(granted.clone()))
        .set_inheritable(None)
        .set_ambient(None);
    sets
}

/// Removes from all sets what cannot be granted.
pub fn clamp(sets: &mut LinuxCapabilities, grantable: &Capabilities) {
    let keep = |set: &Option<Capabilities>| {
        set.as_ref().map(|set| set.intersection(grantable).copied().collect::<Capabilities>())
    };
    let bounding = keep(sets.bounding());
    let permitted = keep(sets.permitted());
    let effective = keep(sets.effective());
    let inheritable = keep(sets.inheritable());
    let ambient = keep(sets.ambient());
    sets.set_bounding(bounding)
        .set_permitted(permitted)
        .set_effective(effective)
        .set_inheritable(inheritable)
        .set_ambient(ambient);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_the_kernels() {
        assert_eq!(number(Capability::Chown), libc_number("CHOWN", 0));
        assert_eq!(number(Capability::SysAdmin), libc_number("SYS_ADMIN", 21));
        assert_eq!(number(Capability::SysResource), 24);
        assert_eq!(number(Capability::Setfcap), 31);
        assert_eq!(number(Capability::CheckpointRestore), 40);
        assert_eq!(all().len(), ALL.len());
    }

    fn libc_number(name: &str, expected: u32) -> u32 {
        let set = rustix::thread::CapabilitySet::from_name(name).unwrap();
        assert_eq!(set.bits(), 1 << expected);
        expected
    }

    #[test]
    fn dockers_fourteen_are_the_default() {
        let default = capabilities();
        assert_eq!(default.len(), 14);
        assert!(!default.contains(&Capability::SysAdmin) && !default.contains(&Capability::NetAdmin));
    }

    #[test]
    fn sets_lose_what_cannot_be_granted_and_stay_empty_where_empty() {
        let mut wanted = sets(&all());
        clamp(&mut wanted, &capabilities());
        assert_eq!(wanted, sets(&capabilities()));
        assert_eq!(wanted.ambient(), &None);
    }
}
