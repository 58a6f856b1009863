//! Whose the files are: what is on the host's disk, and what the guest is shown.
//!
//! An ordinary user cannot give files away, so on the host all that is made in the guest belongs to the user. What the
//! guest believes (owner, group and permissions) is kept beside the file, in an extended attribute, and only where it
//! differs from what the disk says. Programs on the host are never shown anything but their own files; programs in the
//! guest see what they would see on a disk of their own. The set-user and set-group bits are in the attribute only.
//!
//! The attribute notes which permissions the disk had when it was written. When those have changed since, somebody on the
//! host has changed them, and the host's word counts.

use std::fmt::Write as _;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, Stat, Uid, XattrFlags};
use rustix::io::Errno;

/// The attribute. The guest neither sees nor sets it.
pub const ATTRIBUTE: &str = "user.engine.owner";
/// Longer values are not ours.
const VALUE_BYTES_MAX: usize = 64;
const PERMISSIONS: u32 = 0o7777;
/// Bits that must not be on the host: they would lend the host user's rights.
const PRIVILEGES: u32 = 0o6000;

/// How owners are translated in one export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owners {
    /// Numbers are the same on both sides. Only root can do this.
    Passthrough,
    /// Everything belongs to this user and group on the host.
    Mapped {
        /// The user this process runs as.
        uid: u32,
        /// Its group.
        gid: u32,
    },
}

impl Owners {
    /// What suits the user this process runs as: root can give files away.
    pub fn of_process() -> Self {
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        if uid == 0 { Self::Passthrough } else { Self::Mapped { uid, gid } }
    }
}

/// Owner and permissions of a file in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    pub uid: u32,
    pub gid: u32,
    /// Permissions alone.
    pub mode: u32,
}

/// The path by which an open file is named, links and all.
pub fn path_of(file: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

impl Owners {
    /// What the guest is shown of a file.
    pub fn shown(self, file: &OwnedFd, stat: &Stat) -> Owner {
        let disk = on_disk(stat);
        let Self::Mapped { uid, .. } = self else { return disk };
        if disk.uid != uid || !can_be_noted(stat) {
            return disk;
        }
        let mut value = [0; VALUE_BYTES_MAX];
        let noted = match rustix::fs::getxattr(path_of(file), ATTRIBUTE, &mut value) {
            Ok(count) => parse(&value[..count]),
            // None, or a file system without attributes.
            Err(_) => None,
        };
        match noted {
            Some((owner, at)) if at == disk.mode => owner,
            Some((owner, _)) => Owner { mode: disk.mode, ..owner },
            None => disk,
        }
    }

    /// The permissions that a new file or folder has on the disk.
    pub fn disk_mode(self, kind: FileType, mode: u32) -> u32 {
        let mode = mode & PERMISSIONS;
        match self {
            Self::Passthrough => mode,
            // Whatever the guest takes from itself, we still have to open these.
            Self::Mapped { .. } if kind == FileType::Directory => mode & !PRIVILEGES | 0o700,
            Self::Mapped { .. } if kind == FileType::RegularFile => mode & !PRIVILEGES | 0o600,
            // Pipes and sockets are never opened here, and nothing is noted beside them.
            Self::Mapped { .. } => mode & !PRIVILEGES,
        }
    }

    /// Makes the guest see this owner and these permissions.
    pub fn set(self, file: &OwnedFd, stat: &Stat, owner: Owner) -> Result<(), Errno> {
        let disk = on_disk(stat);
        let kind = FileType::from_raw_mode(stat.st_mode);
        let owner = Owner { mode: owner.mode & PERMISSIONS, ..owner };
        let Self::Mapped { uid, gid } = self else {
            if (owner.uid, owner.gid) != (disk.uid, disk.gid) {
                let (uid, gid) = (Uid::from_raw(owner.uid), Gid::from_raw(owner.gid));
                rustix::fs::chownat(file, c"", Some(uid), Some(gid), AtFlags::EMPTY_PATH)?;
            }
            // A change of owner takes bits away.
            return match kind {
                FileType::Symlink => Ok(()),
                _ => change_mode(file, owner.mode),
            };
        };
        if disk.uid != uid {
            // Somebody else's file: nothing of it is ours to change, and the kernel says so.
            return match (owner.uid, owner.gid) == (disk.uid, disk.gid) {
                true => change_mode(file, owner.mode),
                false => Err(Errno::PERM),
            };
        }
        if kind == FileType::Symlink {
            // Links carry no attributes: they stay the host user's, whoever they were given to.
            return Ok(());
        }
        let mode = self.disk_mode(kind, owner.mode);
        if mode != disk.mode {
            change_mode(file, mode)?;
        }
        if !can_be_noted(stat) {
            return Ok(());
        }
        let as_on_disk = owner == Owner { uid, gid: disk.gid, mode } || owner == Owner { uid, gid, mode };
        let path = path_of(file);
        match as_on_disk {
            true => match rustix::fs::removexattr(path, ATTRIBUTE) {
                Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(()),
                result => result,
            },
            false => {
                let mut value = String::new();
                let Owner { uid, gid, mode: shown } = owner;
                // Writing to a string does not fail.
                let _written = write!(value, "{uid}:{gid}:{shown:o}:{mode:o}");
                rustix::fs::setxattr(path, ATTRIBUTE, value.as_bytes(), XattrFlags::empty())
                    .map_err(|error| if error == Errno::OPNOTSUPP { Errno::PERM } else { error })
            }
        }
    }
}

fn on_disk(stat: &Stat) -> Owner {
    Owner { uid: stat.st_uid, gid: stat.st_gid, mode: stat.st_mode & PERMISSIONS }
}

/// User attributes exist for files and folders only.
fn can_be_noted(stat: &Stat) -> bool {
    matches!(FileType::from_raw_mode(stat.st_mode), FileType::RegularFile | FileType::Directory)
}

fn change_mode(file: &OwnedFd, mode: u32) -> Result<(), Errno> {
    rustix::fs::chmodat(CWD, path_of(file), Mode::from_raw_mode(mode), AtFlags::empty())
}

/// Reads `UID:GID:SHOWN:DISK`, modes in octal: what the guest is shown, and what the disk had when it was noted.
fn parse(value: &[u8]) -> Option<(Owner, u32)> {
    let text = std::str::from_utf8(value).ok()?;
    let mut words = text.split(':');
    let (uid, gid) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    let mode = u32::from_str_radix(words.next()?, 8).ok()?;
    let disk = u32::from_str_radix(words.next()?, 8).ok()?;
    (words.next().is_none() && mode <= PERMISSIONS).then_some((Owner { uid, gid, mode }, disk))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_notes_are_read() {
        let owner = Owner { uid: 999, gid: 100, mode: 0o4711 };
        assert_eq!(parse(b"999:100:4711:711"), Some((owner, 0o711)));
        for bad in [&b""[..], b"1:2:3", b"1:2:3:4:5", b"-1:2:3:4", b"1:2:77777:1", b"1:2:9:1", b"\xff:1:1:1"]
        {
            assert_eq!(parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn what_the_guest_takes_from_itself_we_keep() {
        let mapped = Owners::Mapped { uid: 1000, gid: 1000 };
        assert_eq!(mapped.disk_mode(FileType::RegularFile, 0o6044), 0o644);
        assert_eq!(mapped.disk_mode(FileType::Directory, 0o1000), 0o1700);
        assert_eq!(mapped.disk_mode(FileType::Fifo, 0o4022), 0o022);
        assert_eq!(Owners::Passthrough.disk_mode(FileType::RegularFile, 0o4000), 0o4000);
    }
}
