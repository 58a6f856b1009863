//! Copies of a mount namespace without the mounts of other containers.
//!
//! Where all that an engine mounts for containers is below one private mount, a copy of the namespace gets rid of it at
//! once, however much it is, and takes back what it needs.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::CWD;
use rustix::mount::{
    MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount_change, move_mount, open_tree,
    unmount,
};

/// What a copy keeps of the mounts below one.
#[derive(Debug)]
pub struct Kept {
    mounts: PathBuf,
    bare: OwnedFd,
    trees: Vec<(OwnedFd, PathBuf)>,
}

impl Kept {
    /// Takes copies of what is at some paths below the mount `mounts`, with what is mounted below them. All are real paths,
    /// none within another. To be called before the namespace is copied.
    ///
    /// # Errors
    /// When there is nothing at a path, or the kernel refuses.
    pub fn take(mounts: &Path, needed: &[PathBuf]) -> io::Result<Self> {
        let deep = OpenTreeFlags::AT_RECURSIVE;
        let trees = needed.iter().map(|path| Ok((tree(path, deep)?, path.clone())));
        Ok(Self {
            mounts: mounts.to_owned(),
            bare: tree(mounts, OpenTreeFlags::empty())?,
            trees: trees.collect::<io::Result<_>>()?,
        })
    }

    /// In the copy of the namespace: takes away what is mounted below, and puts back what was taken. Nothing that is mounted
    /// here from then on shows elsewhere.
    ///
    /// # Errors
    /// When `mounts` is not a mount, or the kernel refuses.
    pub fn alone(&self) -> io::Result<()> {
        // It is private: nobody else's goes.
        unmount(&self.mounts, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
            .map_err(|error| at(&self.mounts, error))?;
        mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)
            .map_err(|error| at(Path::new("/"), error))?;
        put(&self.bare, &self.mounts)?;
        self.trees.iter().try_for_each(|(tree, path)| put(tree, path))
    }
}

/// A copy of what is seen at a path, that is nowhere yet.
fn tree(path: &Path, depth: OpenTreeFlags) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    open_tree(CWD, path, flags | depth).map_err(|error| at(path, error))
}

fn put(tree: &OwnedFd, path: &Path) -> io::Result<()> {
    move_mount(tree, "", CWD, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).map_err(|error| at(path, error))
}

fn at(path: &Path, error: rustix::io::Errno) -> io::Error {
    let error = io::Error::from(error);
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}
