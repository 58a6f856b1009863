//! The folder of what ends with a reboot, as a mount of its own.
//!
//! All that is mounted for containers is below it. As a mount it can be taken out of a copy of the table of mounts at once
//! (shims do that: `guest_runtime::shim::ShimSpec`), and being private it keeps what is mounted for one container out of
//! every other namespace of the computer, where it would be held after the container has gone.

use std::io;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx};
use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_bind, mount_change, unmount};

/// The folder, once it is there.
#[derive(Debug)]
pub struct RunRoot {
    folder: PathBuf,
    is_mount: bool,
}

impl RunRoot {
    /// Makes the folder, and a mount of it unless it is one already.
    ///
    /// # Errors
    /// When the folder cannot be made, or the kernel refuses.
    pub fn open(folder: &Path) -> anyhow::Result<Self> {
        std::fs::create_dir_all(folder)
            .with_context(|| format!("cannot make the folder `{}`", folder.display()))?;
        let is_mount =
            make_mount(folder).with_context(|| format!("cannot make a mount of `{}`", folder.display()))?;
        Ok(Self { folder: folder.to_owned(), is_mount })
    }

    /// The mount with those of all containers below it. `None` while containers run that an engine started which had
    /// no such mount: a new one would hide theirs.
    pub fn mount(&self) -> Option<PathBuf> {
        self.is_mount.then(|| self.folder.clone())
    }

    /// The engine ends. While containers run the mount stays, for the next engine.
    pub fn close(self) {
        // What somebody else has mounted is of another file system than the folder it lies in.
        let ours = device(&self.folder).is_ok_and(|own| {
            self.folder.parent().is_some_and(|parent| device(parent).is_ok_and(|other| own == other))
        });
        if !self.is_mount || !ours {
            return;
        }
        match unmount(&self.folder, UnmountFlags::NOFOLLOW) {
            Ok(()) | Err(rustix::io::Errno::BUSY) => {}
            Err(error) => {
                tracing::warn!(folder = %self.folder.display(), %error, "the folder stays mounted");
            }
        }
    }
}

/// Whether the folder is a mount now.
fn make_mount(folder: &Path) -> io::Result<bool> {
    let root = StatxAttributes::MOUNT_ROOT;
    let found = statx(CWD, folder, AtFlags::empty(), StatxFlags::empty())?;
    if !found.stx_attributes.contains(root) {
        let real = folder.canonicalize()?;
        if guest_mountinfo::below(&guest_mountinfo::read()?, &real).next().is_some() {
            return Ok(false);
        }
        mount_bind(folder, folder)?;
    }
    // Not what is mounted below it: binds of containers may be shared.
    mount_change(folder, MountPropagationFlags::PRIVATE)?;
    Ok(true)
}

fn device(path: &Path) -> io::Result<(u32, u32)> {
    let found = statx(CWD, path, AtFlags::empty(), StatxFlags::empty())?;
    Ok((found.stx_dev_major, found.stx_dev_minor))
}
