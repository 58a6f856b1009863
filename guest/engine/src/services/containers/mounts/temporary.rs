//! What is mounted for a moment while a container starts: part of a volume or of an image, below `mounts` in its run
//! folder. The container's own mounts are copies of these; then these go.
//!
//! A run folder is removed with everything in it, so whatever is mounted here must be gone before: nothing here is ever
//! removed but empty folders and files that nothing is mounted on.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags, fstat};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags, move_mount, open_tree, unmount};

/// Name of the folder in a run folder.
pub const FOLDER: &str = "mounts";

/// Where the mount of this number goes.
pub fn place(run_folder: &Path, number: usize) -> PathBuf {
    run_folder.join(FOLDER).join(number.to_string())
}

/// Mounts exactly what `source` is open on, which no name can be changed for, at a place of this number.
pub fn attach(source: &OwnedFd, run_folder: &Path, number: usize) -> io::Result<PathBuf> {
    let target = place(run_folder, number);
    fs::create_dir_all(run_folder.join(FOLDER))?;
    if FileType::from_raw_mode(fstat(source)?.st_mode) == FileType::Directory {
        fs::create_dir(&target)?;
    } else {
        fs::File::create_new(&target)?;
    }
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    let tree = open_tree(source, "", flags)?;
    move_mount(&tree, "", CWD, &target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    Ok(target)
}

/// Opens a folder without looking into it.
pub fn open(folder: &Path) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(folder, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

/// Unmounts everything here and removes the places. Fine when there is nothing.
pub fn clear(run_folder: &Path) -> io::Result<()> {
    let folder = run_folder.join(FOLDER);
    let entries = match fs::read_dir(&folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    for entry in entries {
        let path = entry?.path();
        // One may lie over another.
        loop {
            match unmount(&path, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH) {
                Ok(()) => {}
                Err(Errno::INVAL) => break,
                Err(error) => return Err(error.into()),
            }
        }
        if fs::symlink_metadata(&path)?.is_dir() { fs::remove_dir(&path)? } else { fs::remove_file(&path)? }
    }
    fs::remove_dir(&folder)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::folder;

    #[test]
    fn clearing_never_removes_files() {
        let run = folder();
        clear(&run).unwrap();
        fs::create_dir_all(place(&run, 0)).unwrap();
        clear(&run).unwrap();
        assert!(!run.join(FOLDER).exists());
        fs::create_dir_all(place(&run, 1)).unwrap();
        fs::write(place(&run, 1).join("precious"), "x").unwrap();
        if rustix::process::geteuid().is_root() {
            clear(&run).unwrap_err();
            assert!(place(&run, 1).join("precious").exists());
        }
        fs::remove_dir_all(run).unwrap();
    }
}
