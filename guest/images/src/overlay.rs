//! Mounting an overlay, by the new mount API where the kernel has it, else by mount(2).
//!
//! The new API takes each lower folder by a call of its own (`lowerdir+`, Linux 6.8), so their number is not bounded by one page
//! of options. The old call gets `/proc/self/fd/N` for each, which is short enough for two hundred layers.

use std::{
    fs, io,
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::{AtFlags, CWD, Mode, OFlags, StatxAttributes, StatxFlags, statx},
    io::Errno,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
        fsconfig_create, fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
    },
};

use crate::{Error, Kind, Mounts, Result};

/// Behaviours of overlayfs that depend on how the kernel was built, set to the one that layers need: what is written
/// is a plain changeset, without references between layers.
const OPTIONS: [(&str, &str); 3] = [("index", "off"), ("metacopy", "off"), ("redirect_dir", "off")];

/// Mounts at `target`, a folder. A snapshot on nothing is its upper folder itself.
pub(crate) fn mount(mounts: &Mounts, target: &Path) -> Result<()> {
    if mounts.lower.is_empty() {
        return bind(&mounts.upper, target);
    }
    match mount_by_parts(mounts, target) {
        Err(Failure { source: Errno::INVAL | Errno::NOSYS | Errno::NODEV | Errno::OPNOTSUPP, .. }) => {
            mount_by_string(mounts, target).map_err(|failure| failure.describe(mounts, target))
        }
        result => result.map_err(|failure| failure.describe(mounts, target)),
    }
}

/// Unmounts; fine when nothing is mounted. A busy one is taken out of sight and goes when its last user does.
pub(crate) fn unmount(target: &Path) -> Result<()> {
    match rustix::mount::unmount(target, UnmountFlags::NOFOLLOW) {
        Err(Errno::BUSY) => rustix::mount::unmount(target, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH),
        result => result,
    }
    .or_else(|source| match source {
        Errno::INVAL | Errno::NOENT => Ok(()),
        source => Err(Error::io("unmount", target, source)),
    })
}

struct Failure {
    source: Errno,
    /// What the kernel wrote about it.
    log: String,
}

impl From<Errno> for Failure {
    fn from(source: Errno) -> Self {
        Self { source, log: String::new() }
    }
}

impl Failure {
    fn describe(self, mounts: &Mounts, target: &Path) -> Error {
        if let Some(missing) = mounts.lower.iter().find(|lower| !lower.is_dir()) {
            return Error::corrupt(format!(
                "layer `{}` is gone: remove the image and pull it again",
                missing.display()
            ));
        }
        let log = if self.log.is_empty() { String::new() } else { format!(" ({})", self.log) };
        if crate::error::is_no_space(&io::Error::from(self.source)) {
            return Error::io("mount", target, self.source);
        }
        Error::because(
            Kind::Internal,
            format!(
                "could not mount an overlay of {} layers at `{}`{log}",
                mounts.lower.len(),
                target.display()
            ),
            io::Error::from(self.source),
        )
    }
}

/// Opens the root of an overlay that is mounted nowhere and goes with the descriptor. Where the kernel cannot do that it is
/// mounted at `scratch`, a folder that is made when absent, opened, and taken out of sight.
pub(crate) fn open(mounts: &Mounts, scratch: &Path) -> Result<OwnedFd> {
    let folder = |path: &Path| {
        rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|source| Error::io("open", path, source))
    };
    if mounts.lower.is_empty() {
        return folder(&mounts.upper);
    }
    match detached(mounts) {
        Err(Failure { source: Errno::INVAL | Errno::NOSYS | Errno::NODEV | Errno::OPNOTSUPP, .. }) => {
            fs::create_dir_all(scratch).map_err(|source| Error::io("make the folder", scratch, source))?;
            mount_by_string(mounts, scratch).map_err(|failure| failure.describe(mounts, scratch))?;
            let opened = folder(scratch);
            let hidden = rustix::mount::unmount(scratch, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH);
            hidden.map_err(|source| Error::io("unmount", scratch, source))?;
            fs::remove_dir(scratch).map_err(|source| Error::io("remove", scratch, source))?;
            opened
        }
        result => result.map_err(|failure| failure.describe(mounts, scratch)),
    }
}

fn mount_by_parts(mounts: &Mounts, target: &Path) -> Result<(), Failure> {
    let mount = detached(mounts)?;
    Ok(move_mount(&mount, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
}

fn detached(mounts: &Mounts) -> Result<OwnedFd, Failure> {
    let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    let configure = || -> rustix::io::Result<()> {
        fsconfig_set_string(&context, "source", "overlay")?;
        for lower in &mounts.lower {
            fsconfig_set_string(&context, "lowerdir+", lower)?;
        }
        fsconfig_set_string(&context, "upperdir", &mounts.upper)?;
        fsconfig_set_string(&context, "workdir", &mounts.work)?;
        for (name, value) in OPTIONS {
            fsconfig_set_string(&context, name, value)?;
        }
        fsconfig_create(&context)
    };
    configure().map_err(|source| Failure { source, log: kernel_log(&context) })?;
    Ok(fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?)
}

/// What the kernel says about the last call on a mount context: lines such as `e overlay: …`.
fn kernel_log(context: &OwnedFd) -> String {
    let mut log = Vec::new();
    let mut line = [0; 1024];
    while let Ok(length) = rustix::io::read(context, &mut line) {
        if length == 0 {
            break;
        }
        log.push(String::from_utf8_lossy(&line[..length]).trim().to_owned());
    }
    log.join("; ")
}

fn mount_by_string(mounts: &Mounts, target: &Path) -> Result<(), Failure> {
    let open = |path: &Path| {
        rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
    };
    let lower = mounts.lower.iter().map(|lower| open(lower)).collect::<rustix::io::Result<Vec<_>>>()?;
    let (upper, work) = (open(&mounts.upper)?, open(&mounts.work)?);
    let named = |folder: &OwnedFd| format!("/proc/self/fd/{}", folder.as_raw_fd());
    let lower: Vec<String> = lower.iter().map(named).collect();
    let mut options =
        format!("lowerdir={},upperdir={},workdir={}", lower.join(":"), named(&upper), named(&work));
    for (name, value) in OPTIONS {
        options.push_str(&format!(",{name}={value}"));
    }
    let options = std::ffi::CString::new(options).map_err(|_| Errno::INVAL)?;
    Ok(rustix::mount::mount("overlay", target, "overlay", MountFlags::empty(), Some(options.as_c_str()))?)
}

/// Shows a folder, or the mount on it, at a second place.
pub(crate) fn bind(folder: &Path, target: &Path) -> Result<()> {
    let by_tree = || -> rustix::io::Result<()> {
        let tree = open_tree(CWD, folder, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)?;
        move_mount(&tree, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
    };
    by_tree().map_err(|source| Error::io("mount a folder at", target, source))
}

/// Whether something is mounted at `target`. The table of mounts would tell as well, the longer it is the later.
pub(crate) fn is_mounted(target: &Path) -> Result<bool> {
    match statx(CWD, target, AtFlags::NO_AUTOMOUNT, StatxFlags::empty()) {
        Ok(found) => Ok(found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT)),
        Err(Errno::NOENT) => Ok(false),
        Err(error) => Err(Error::io("look at", target, error)),
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// Runs itself once more in a mount namespace of its own.
    #[test]
    fn the_old_call_mounts_a_hundred_and_fifty_layers_too() {
        let name = "overlay::tests::the_old_call_mounts_a_hundred_and_fifty_layers_too";
        if !rustix::process::geteuid().is_root() {
            #[expect(clippy::print_stderr, reason = "a skipped test says so")]
            {
                eprintln!("SKIPPED {name}: mounting needs root");
            }
            return;
        }
        if std::env::var_os("OVERLAY_TEST_INSIDE").is_none() {
            let program = std::env::current_exe().expect("this program");
            let mut command = Command::new("unshare");
            command.args(["--mount", "--propagation", "private", "--"]).arg(program).args([name, "--exact"]);
            let output = command.env("OVERLAY_TEST_INSIDE", "1").output().expect("unshare");
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
            return;
        }
        let folder = tempfile::tempdir().expect("a folder");
        let make = |name: String| {
            let path = folder.path().join(name);
            fs::create_dir(&path).expect("a folder");
            path
        };
        let lower: Vec<_> = (0..150).map(|index| make(format!("{index:064}"))).collect();
        fs::write(lower[149].join("bottom"), "b").expect("write");
        let mounts = Mounts { lower, upper: make("upper".to_owned()), work: make("work".to_owned()) };
        let target = make("target".to_owned());
        assert!(!is_mounted(&target).expect("the table of mounts"));
        mount_by_string(&mounts, &target)
            .map_err(|failure| failure.describe(&mounts, &target))
            .expect("mounted");
        assert!(is_mounted(&target).expect("the table of mounts"));
        assert!(target.join("bottom").exists());
        unmount(&target).expect("unmounted");
    }

    #[test]
    fn a_missing_layer_is_the_reason_that_is_given() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = |name: &str| folder.path().join(name);
        let mounts = Mounts { lower: vec![path("gone")], upper: path("upper"), work: path("work") };
        let error = Failure::from(Errno::NOENT).describe(&mounts, &path("target"));
        assert_eq!(error.kind(), Kind::Corrupt);
        assert!(error.to_string().contains("gone"), "{error}");
    }
}
