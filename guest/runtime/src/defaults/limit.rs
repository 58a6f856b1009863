//! Limits, clamped to what this process may set.

use std::fs;
use std::io;

use oci_spec::runtime::{Capabilities, Capability, PosixRlimit, PosixRlimitBuilder, PosixRlimitType};
use rustix::process::{Resource, Rlimit, getrlimit};

/// The kernel's name of a limit.
pub fn resource(kind: PosixRlimitType) -> Resource {
    match kind {
        PosixRlimitType::RlimitCpu => Resource::Cpu,
        PosixRlimitType::RlimitFsize => Resource::Fsize,
        PosixRlimitType::RlimitData => Resource::Data,
        PosixRlimitType::RlimitStack => Resource::Stack,
        PosixRlimitType::RlimitCore => Resource::Core,
        PosixRlimitType::RlimitRss => Resource::Rss,
        PosixRlimitType::RlimitNproc => Resource::Nproc,
        PosixRlimitType::RlimitNofile => Resource::Nofile,
        PosixRlimitType::RlimitMemlock => Resource::Memlock,
        PosixRlimitType::RlimitAs => Resource::As,
        PosixRlimitType::RlimitLocks => Resource::Locks,
        PosixRlimitType::RlimitSigpending => Resource::Sigpending,
        PosixRlimitType::RlimitMsgqueue => Resource::Msgqueue,
        PosixRlimitType::RlimitNice => Resource::Nice,
        PosixRlimitType::RlimitRtprio => Resource::Rtprio,
        PosixRlimitType::RlimitRttime => Resource::Rttime,
    }
}

/// Lowers limits to the hard limits of this process, unless it may raise those.
pub fn clamp_rlimits(limits: &mut [PosixRlimit], grantable: &Capabilities) {
    if grantable.contains(&Capability::SysResource) {
        return;
    }
    for limit in limits {
        let ours = getrlimit(resource(limit.typ()));
        if let Ok(clamped) = clamp(limit, ours) {
            *limit = clamped;
        }
    }
}

fn clamp(limit: &PosixRlimit, ours: Rlimit) -> Result<PosixRlimit, oci_spec::OciSpecError> {
    let hard = limit.hard().min(ours.maximum.unwrap_or(u64::MAX));
    PosixRlimitBuilder::default().typ(limit.typ()).hard(hard).soft(limit.soft().min(hard)).build()
}

/// The out-of-memory score to ask for, or `None` when there is nothing to change: without CAP_SYS_RESOURCE a score
/// below this process's own cannot be set.
pub fn clamp_oom_score_adjust(wanted: i32, grantable: &Capabilities) -> io::Result<Option<i32>> {
    let text = fs::read_to_string("/proc/self/oom_score_adj")?;
    let current = text.trim().parse().map_err(io::Error::other)?;
    let allowed = if grantable.contains(&Capability::SysResource) { wanted } else { wanted.max(current) };
    Ok(Some(allowed).filter(|allowed| *allowed != current))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(soft: u64, hard: u64) -> PosixRlimit {
        PosixRlimitBuilder::default()
            .typ(PosixRlimitType::RlimitNofile)
            .soft(soft)
            .hard(hard)
            .build()
            .unwrap()
    }

    #[test]
    fn limits_above_ours_are_lowered_and_others_kept() {
        let ours = Rlimit { current: Some(1024), maximum: Some(20000) };
        assert_eq!(clamp(&limit(1 << 20, 1 << 20), ours).unwrap(), limit(20000, 20000));
        assert_eq!(clamp(&limit(1024, u64::MAX), ours).unwrap(), limit(1024, 20000));
        assert_eq!(clamp(&limit(10, 100), ours).unwrap(), limit(10, 100));
        let unlimited = Rlimit { current: None, maximum: None };
        assert_eq!(clamp(&limit(1 << 40, u64::MAX), unlimited).unwrap(), limit(1 << 40, u64::MAX));
    }

    #[test]
    fn a_lower_score_is_not_asked_for_without_the_right_to() {
        assert_eq!(clamp_oom_score_adjust(-1000, &Capabilities::new()).unwrap(), None);
        assert_eq!(clamp_oom_score_adjust(1000, &Capabilities::new()).unwrap(), Some(1000));
    }
}
