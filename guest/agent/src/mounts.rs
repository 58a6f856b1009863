//! The mount tree of the machine: the kernel's file systems, scratch space, and the cgroups of our own programs.
//!
//! It does not mount the data disk ([`crate::disk`]) and makes no cgroup for containers (the engine does).

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use guest_mountinfo::Mount;
use guest_protocol::share;
use rustix::mount::{MountFlags, MountPropagationFlags};
use tracing::warn;

/// The root of the cgroup v2 tree.
pub const CGROUPS: &str = "/sys/fs/cgroup";
/// The cgroup of PID 1.
const AGENT_CGROUP: &str = "/sys/fs/cgroup/system/agent";
/// The cgroup of the engine and the shims it starts. Containers are elsewhere, below `/engine`: a cgroup that holds
/// processes cannot pass controllers on to children.
const ENGINE_CGROUP: &str = "/sys/fs/cgroup/system/engine";

/// Four times the kernel's own. More would make single pages of mapped files dear, around which as much is read.
const READ_AHEAD_KIB: u32 = 512;

struct Planned {
    kind: &'static str,
    target: &'static str,
    flags: MountFlags,
    data: &'static str,
}

const NONE: MountFlags = MountFlags::empty();
const PLAIN: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);

/// In the order of mounting: a target may lie in an earlier one.
#[rustfmt::skip]
const MOUNTS: &[Planned] = &[
    Planned { kind: "proc", target: "/proc", flags: PLAIN, data: "" },
    Planned { kind: "sysfs", target: "/sys", flags: PLAIN, data: "" },
    Planned { kind: "devtmpfs", target: "/dev", flags: MountFlags::NOSUID, data: "mode=0755" },
    Planned { kind: "devpts", target: "/dev/pts", flags: MountFlags::NOSUID.union(MountFlags::NOEXEC), data: "mode=0620,gid=5,ptmxmode=0666" },
    Planned { kind: "tmpfs", target: "/dev/shm", flags: MountFlags::NOSUID.union(MountFlags::NODEV), data: "mode=1777" },
    Planned { kind: "mqueue", target: "/dev/mqueue", flags: PLAIN, data: "" },
    Planned { kind: "tmpfs", target: "/run", flags: MountFlags::NOSUID.union(MountFlags::NODEV), data: "mode=0755" },
    Planned { kind: "tmpfs", target: "/tmp", flags: MountFlags::NOSUID.union(MountFlags::NODEV), data: "mode=1777" },
    Planned { kind: "cgroup2", target: CGROUPS, flags: PLAIN, data: "nsdelegate,memory_recursiveprot" },
];

/// Makes the root a mount that containers can pivot away from.
///
/// The kernel's initial root file system (rootfs) has no parent mount, and `pivot_root` refuses to replace a root
/// without one: no container could start. So the same file system is bound to a folder of itself and that mount
/// moved on top of the root; changing root into it leaves us on a root that has a parent. Nothing is copied.
pub fn leave_initramfs() -> Result<()> {
    const ASIDE: &str = "/mnt";
    make_folder(ASIDE)?;
    rustix::mount::mount_bind("/", ASIDE).with_context(|| format!("cannot bind / to {ASIDE}"))?;
    rustix::process::chdir(ASIDE)?;
    rustix::mount::mount_move(".", "/").context("cannot move the new root onto /")?;
    rustix::process::chroot(".").context("cannot change root")?;
    rustix::process::chdir("/")?;
    Ok(())
}

/// Mounts everything that comes from the kernel or lives in memory.
pub fn mount_all() -> Result<()> {
    for mount in MOUNTS {
        make_folder(mount.target)?;
        let data = CString::new(mount.data)?;
        rustix::mount::mount(mount.kind, mount.target, mount.kind, mount.flags | NONE, data.as_c_str())
            .with_context(|| format!("cannot mount {} on {}", mount.kind, mount.target))?;
    }
    // As on a Debian host: mounts made later are seen in containers that ask for it (`rshared`, `rslave`).
    let shared = MountPropagationFlags::SHARED | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", shared).context("cannot make / shared")?;
    let links = [
        ("pts/ptmx", "/dev/ptmx"),
        ("/proc/self/fd", "/dev/fd"),
        ("fd/0", "/dev/stdin"),
        ("fd/1", "/dev/stdout"),
        ("fd/2", "/dev/stderr"),
    ];
    for (to, link) in links {
        // devtmpfs brings a ptmx node of its own, for a devpts that is not ours.
        match fs::remove_file(link) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot replace {link}"));
            }
            _ => symlink(to, link).with_context(|| format!("cannot make {link}"))?,
        }
    }
    Ok(())
}

/// Mounts what the host shares; containers get their binds from there.
///
/// Only root may look into it: who is given a folder of it has it bound elsewhere.
pub fn mount_shares() -> Result<()> {
    make_folder(share::MOUNT)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    rustix::mount::mount(share::TAG, share::MOUNT, "virtiofs", flags, None)
        .with_context(|| format!("cannot mount the folders that the host shares on {}", share::MOUNT))?;
    if let Err(error) = read_ahead() {
        warn!(error = format!("{error:#}"), "large files of the host are read more slowly");
    }
    Ok(())
}

/// Lets the kernel read ahead [`READ_AHEAD_KIB`] in what the host shares: each request is a way to the host and back
/// (Linux `Documentation/ABI/testing/sysfs-class-bdi`).
fn read_ahead() -> Result<()> {
    let device =
        rustix::fs::stat(share::MOUNT).with_context(|| format!("cannot look at {}", share::MOUNT))?.st_dev;
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let path = format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb");
    fs::write(&path, READ_AHEAD_KIB.to_string()).with_context(|| format!("cannot write to {path}"))
}

/// Puts standard input, output and error on the console, wherever the kernel has it.
pub fn open_console() -> Result<()> {
    let console = File::options().read(true).write(true).open("/dev/console").context("no /dev/console")?;
    rustix::stdio::dup2_stdin(&console)?;
    rustix::stdio::dup2_stdout(&console)?;
    rustix::stdio::dup2_stderr(&console)?;
    Ok(())
}

/// Moves PID 1 out of the root cgroup, makes the engine's, and turns every controller on for the level below the
/// root, so that limits of containers work. Returns the controllers that could not be turned on.
pub fn set_up_cgroups() -> Result<Vec<String>> {
    for cgroup in [AGENT_CGROUP, ENGINE_CGROUP] {
        make_folder(cgroup)?;
    }
    fs::write(Path::new(AGENT_CGROUP).join("cgroup.procs"), "1")
        .context("cannot enter the agent's cgroup")?;
    let controllers = fs::read_to_string(Path::new(CGROUPS).join("cgroup.controllers"))
        .context("cannot list cgroup controllers")?;
    let control = Path::new(CGROUPS).join("cgroup.subtree_control");
    let refused = |controller: &&str| fs::write(&control, format!("+{controller}")).is_err();
    Ok(controllers.split_ascii_whitespace().filter(refused).map(str::to_owned).collect())
}

/// The file through which a process enters the engine's cgroup.
pub fn open_engine_cgroup() -> Result<File> {
    let path = Path::new(ENGINE_CGROUP).join("cgroup.procs");
    File::options().write(true).open(&path).with_context(|| format!("cannot open {}", path.display()))
}

fn make_folder(path: &str) -> Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(path)
        .with_context(|| format!("cannot make the folder {path}"))
}

/// The mount points at or below `root`, those mounted last first: the order in which they can be unmounted.
pub fn mounted_below(mounts: &[Mount], root: &str) -> Vec<PathBuf> {
    guest_mountinfo::below(mounts, Path::new(root)).rev().map(|mount| mount.point.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_below_the_data_folder_come_last_mounted_first() {
        let mountinfo = "\
            1 0 0:2 / / rw - rootfs none rw\n\
            20 1 254:0 / /var/lib/engine rw,relatime shared:9 - ext4 /dev/vda rw\n\
            21 1 254:0 / /var/lib/engineering rw - ext4 /dev/vdb rw\n\
            22 20 0:40 / /var/lib/engine/a\\040b/merged rw - overlay overlay rw\n\
            bad line\n";
        let targets = mounted_below(&guest_mountinfo::parse(mountinfo.as_bytes()), "/var/lib/engine");
        assert_eq!(targets, [Path::new("/var/lib/engine/a b/merged"), Path::new("/var/lib/engine")]);
    }

    #[test]
    fn every_mount_point_comes_after_the_mount_it_lies_in() {
        for (index, mount) in MOUNTS.iter().enumerate() {
            let parent = |other: &&Planned| mount.target.starts_with(&format!("{}/", other.target));
            assert!(MOUNTS[index..].iter().find(parent).is_none(), "{} comes too early", mount.target);
        }
    }
}
