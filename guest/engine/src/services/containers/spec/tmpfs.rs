//! Options of a tmpfs: the later of two that contradict each other wins, and unknown ones are refused.

use crate::failure::Failure;

/// Flags, and what they are about: one word of each subject is left.
const FLAGS: [(&str, &str); 24] = [
    ("ro", "ro"),
    ("rw", "ro"),
    ("suid", "suid"),
    ("nosuid", "suid"),
    ("dev", "dev"),
    ("nodev", "dev"),
    ("exec", "exec"),
    ("noexec", "exec"),
    ("sync", "sync"),
    ("async", "sync"),
    ("dirsync", "dirsync"),
    ("remount", "remount"),
    ("mand", "mand"),
    ("nomand", "mand"),
    ("atime", "atime"),
    ("noatime", "atime"),
    ("diratime", "diratime"),
    ("nodiratime", "diratime"),
    ("relatime", "relatime"),
    ("norelatime", "relatime"),
    ("strictatime", "strictatime"),
    ("nostrictatime", "strictatime"),
    ("bind", "propagation"),
    ("rbind", "propagation"),
];
const PROPAGATION: [&str; 8] =
    ["private", "rprivate", "shared", "rshared", "slave", "rslave", "unbindable", "runbindable"];
const VALUES: [&str; 7] = ["size", "mode", "uid", "gid", "nr_inodes", "nr_blocks", "mpol"];

/// Docker's options of a tmpfs with the user's over them.
pub fn options(given: &str) -> Result<Vec<String>, Failure> {
    let defaults = ["noexec", "nosuid", "nodev", "rprivate"];
    let given = given.split(',').filter(|option| !option.is_empty());
    let mut kept: Vec<(&str, &str)> = Vec::new();
    for option in defaults.into_iter().chain(given).filter(|option| *option != "defaults") {
        let subject = subject(option).ok_or_else(|| {
            let parts: Vec<String> = option.splitn(2, '=').map(|part| format!("{part:?}")).collect();
            Failure::invalid(format!("invalid tmpfs option [{}]", parts.join(" ")))
        })?;
        kept.retain(|(other, _)| *other != subject);
        kept.push((subject, option));
    }
    Ok(kept.into_iter().map(|(_, option)| option.to_owned()).collect())
}

fn subject(option: &str) -> Option<&str> {
    if let Some((_, subject)) = FLAGS.iter().find(|(name, _)| *name == option) {
        return Some(subject);
    }
    if PROPAGATION.contains(&option) {
        return Some("propagation");
    }
    let (name, _) = option.split_once('=')?;
    VALUES.contains(&name).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_later_option_wins() {
        assert_eq!(options("").unwrap(), ["noexec", "nosuid", "nodev", "rprivate"]);
        assert_eq!(
            options("exec,size=1m,defaults,size=2m,rw").unwrap(),
            ["nosuid", "nodev", "rprivate", "exec", "size=2m", "rw"]
        );
        assert_eq!(options("fly").unwrap_err().message, "invalid tmpfs option [\"fly\"]");
        assert_eq!(options("fly=high").unwrap_err().message, "invalid tmpfs option [\"fly\" \"high\"]");
    }
}
