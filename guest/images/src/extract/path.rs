//! Paths and descriptions of files, as extractions use them.

use std::{
    ffi::OsStr,
    os::{
        fd::{AsFd, AsRawFd},
        unix::{ffi::OsStrExt, fs::MetadataExt},
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, CWD, Gid, Mode, Timespec, Timestamps, Uid},
    io::Errno,
};

use crate::{Error, Result};

/// Bytes of a path at most (the kernel's PATH_MAX).
pub(super) const PATH_BYTES_MAX: usize = 4095;

/// A path to `name` below an open folder, for calls that take no folder.
pub(super) fn magic(parent: &impl AsFd, name: &OsStr) -> PathBuf {
    Path::new("/proc/self/fd").join(parent.as_fd().as_raw_fd().to_string()).join(name)
}

pub(super) fn base_name(name: &[u8]) -> &OsStr {
    OsStr::from_bytes(name)
}

/// The folder and the name.
pub(super) fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (b"", path),
    }
}

/// Why a path is refused.
pub(super) const TOO_LONG: &str = "has a name longer than a path may be";

/// The path without `.`, `..`, doubled and leading slashes; an error when it leads out.
pub(crate) fn clean(path: &[u8]) -> Result<Vec<u8>, &'static str> {
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in path.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                parts.pop().ok_or("leads out of it")?;
            }
            part if part.contains(&0) => return Err("has a name with a zero byte"),
            part => parts.push(part),
        }
    }
    let path = parts.join(&b'/');
    if path.len() > PATH_BYTES_MAX { Err(TOO_LONG) } else { Ok(path) }
}

/// Times out of the kernel's reach become the nearest it can hold.
pub(super) fn timestamps((seconds, nanoseconds): (i64, u32)) -> Timestamps {
    let time = Timespec { tv_sec: seconds.clamp(-(1 << 40), 1 << 40), tv_nsec: i64::from(nanoseconds) };
    Timestamps { last_access: time, last_modification: time }
}

/// Copies owner, mode and time of `from` to `to`; both are folders.
pub(crate) fn copy_description(from: &Path, to: &Path) -> Result<()> {
    let data = std::fs::symlink_metadata(from).map_err(|source| Error::io("look at", from, source))?;
    let failed = |source: Errno| Error::io("describe", to, source);
    if rustix::process::geteuid().is_root() {
        let (owner, group) = (Uid::from_raw(data.uid()), Gid::from_raw(data.gid()));
        rustix::fs::chownat(CWD, to, Some(owner), Some(group), AtFlags::SYMLINK_NOFOLLOW).map_err(failed)?;
    }
    let mode = Mode::from_raw_mode(data.mode() & 0o7777);
    rustix::fs::chmodat(CWD, to, mode, AtFlags::empty()).map_err(failed)?;
    let time = Timespec { tv_sec: data.mtime(), tv_nsec: data.mtime_nsec() };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(CWD, to, &times, AtFlags::SYMLINK_NOFOLLOW).map_err(failed)
}
