//! The data disk: found, formatted on the first boot only, checked, mounted, grown, at the start or while it is used.
//!
//! The one rule: what might be somebody's data is never formatted. A disk is formatted when it was never written to,
//! or when our own formatting of it was cut off (see [`superblock::FORMATTING_MARK`]). Everything else that is not
//! our file system in good order is a [`Fault`], which the user reads and decides about.

pub mod superblock;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};
use tracing::{info, warn};

use crate::mounts;
use crate::process::{Exit, Processes};
use crate::status::Fault;
use superblock::{Content, FORMATTING_MARK, HEAD_LENGTH, LABEL, TAIL_LENGTH};

/// Where the data disk is mounted.
pub const DATA: &str = "/var/lib/engine";

/// The virtio serial number of the data disk.
const SERIAL: &str = "engine-data";

/// How long the disk may take to appear after its driver was loaded.
const APPEAR_TIMEOUT: Duration = Duration::from_secs(5);

/// How long the kernel may take to see that the disk is larger, and how often it is asked.
const SEE_TIMEOUT: Duration = Duration::from_secs(60);
const SEE_INTERVAL: Duration = Duration::from_millis(50);

/// How long mounts may stay busy at power-off, all together.
const BUSY_TIME_MAX: Duration = Duration::from_secs(1);

/// How `mke2fs` makes the file system; the device comes last. Inode tables and the journal are zeroed later by the
/// kernel, and nothing is discarded on a disk that was never written to: formatting takes the same fraction of a
/// second at any size. No blocks are kept for root, which is everyone here.
pub const FORMAT: &[&str] = &[
    "-q",
    "-F",
    "-t",
    "ext4",
    "-L",
    LABEL,
    "-m",
    "0",
    "-O",
    "metadata_csum,64bit",
    "-E",
    "lazy_itable_init=1,lazy_journal_init=1,nodiscard",
];

/// Space behind the file system that is worth growing into. Less may be a remainder that no block group fits in.
const GROW_MIN: u64 = 16 << 20;

/// What to do with a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Plan {
    Format,
    Mount {
        /// Check the file system first.
        check: bool,
        /// Grow the file system after mounting it.
        grow: bool,
    },
    Refuse(String),
}

/// Decides what to do with a disk of this size.
fn plan(content: &Content, disk_bytes: u64) -> Plan {
    match content {
        Content::Blank | Content::HalfFormatted => Plan::Format,
        Content::Ours { size_bytes, .. } if *size_bytes > disk_bytes => Plan::Refuse(format!(
            "the disk has {disk_bytes} bytes but its file system needs {size_bytes}: part of it is missing. {REMEDY}"
        )),
        Content::Ours { size_bytes, clean } => {
            Plan::Mount { check: !clean, grow: disk_bytes - size_bytes >= GROW_MIN }
        }
        Content::OtherName(name) => Plan::Refuse(format!(
            "the disk holds the file system `{name}` instead of `{LABEL}`. It was not touched. {REMEDY}"
        )),
        Content::Unknown => Plan::Refuse(format!(
            "the disk is neither empty nor holds a file system of this engine. It was not touched. {REMEDY}"
        )),
    }
}

const REMEDY: &str =
    "Put back a copy of the machine's disk.raw, or give up what is on it with `engine machine rm`";

/// What `e2fsck -p` found, from its exit status (see e2fsck(8)): bits 0 and 1 mean that everything is in order now.
fn check_passed(exit: Exit) -> bool {
    matches!(exit, Exit::Status(status) if status & !0b11 == 0)
}

/// Brings the data disk to [`DATA`], or says why the user has to look at it.
pub async fn bring_up(processes: &Processes) -> Result<(), Fault> {
    let fault = |reason: String| Fault { what: "data disk", reason };
    let disk = find().await.map_err(|error| fault(format!("{error:#}")))?;
    let (content, size) =
        inspect(&disk).map_err(|error| fault(format!("the disk cannot be read ({error:#}). {REMEDY}")))?;
    let grow = match plan(&content, size) {
        Plan::Refuse(reason) => return Err(fault(reason)),
        Plan::Format => {
            info!(disk = %disk.display(), size_bytes = size, ?content, "formatting the data disk");
            format(processes, &disk, size).await.map_err(|error| {
                fault(format!(
                    "the disk could not be formatted ({error:#}). Make sure that the host has free space and start \
                     the machine again"
                ))
            })?;
            mount(&disk).map_err(|error| fault(unmountable(&error)))?;
            false
        }
        Plan::Mount { check, grow } => {
            if check {
                self::check(processes, &disk).await?;
            }
            match mount(&disk) {
                Ok(()) => {}
                // Its super block claims too much: a check may find a good copy of it.
                Err(error) if !check => {
                    warn!("cannot mount the data disk as it is: {error:#}");
                    self::check(processes, &disk).await?;
                    mount(&disk).map_err(|error| fault(unmountable(&error)))?;
                }
                Err(error) => return Err(fault(unmountable(&error))),
            }
            grow
        }
    };
    if grow && let Err(error) = grow_mounted(processes, &disk).await {
        // A disk that stays smaller than it could be is no reason not to start.
        warn!("cannot grow the data disk: {error:#}");
    }
    Ok(())
}

/// Takes into use what the host has added to the disk of a running machine: waits until the kernel sees `size_bytes` of it
/// and grows the file system. Returns what that has then.
///
/// Not safe to drop, like [`Processes::run`].
pub async fn grow(processes: &Processes, size_bytes: u64) -> Result<u64> {
    anyhow::ensure!(usage().is_some(), "the data disk is not mounted");
    let disk = find().await?;
    see(&disk, size_bytes, SEE_TIMEOUT).await?;
    grow_mounted(processes, &disk).await?;
    let (total_bytes, _) = usage().context("the data disk is not mounted any more")?;
    Ok(total_bytes)
}

/// Waits until the kernel sees so much of the disk: the device tells it, and it looks when it gets round to it.
async fn see(disk: &Path, size_bytes: u64, limit: Duration) -> Result<()> {
    let deadline = Instant::now() + limit;
    loop {
        let seen = size_of(&File::open(disk)?)?;
        if seen >= size_bytes {
            return Ok(());
        }
        anyhow::ensure!(
            Instant::now() < deadline,
            "the kernel saw {seen} bytes of the disk and not {size_bytes} within {limit:?}"
        );
        tokio::time::sleep(SEE_INTERVAL).await;
    }
}

/// Grows the mounted file system to the end of its disk: the kernel does it in place, journalled, in well under a second.
async fn grow_mounted(processes: &Processes, disk: &Path) -> Result<()> {
    let outcome = processes.run("/usr/sbin/resize2fs", &[&disk.to_string_lossy()]).await?;
    anyhow::ensure!(outcome.exit == Exit::Status(0), "resize2fs {outcome}");
    info!(resize2fs = %outcome, "data disk grown");
    Ok(())
}

/// Size and use of the data disk's file system in bytes; `None` while it is not mounted.
pub fn usage() -> Option<(u64, u64)> {
    let mounts = guest_mountinfo::read().unwrap_or_default();
    if mounts::mounted_below(&mounts, DATA).is_empty() {
        return None;
    }
    let usage = rustix::fs::statvfs(DATA).ok()?;
    let bytes = |blocks: u64| blocks.saturating_mul(usage.f_frsize);
    Some((bytes(usage.f_blocks), bytes(usage.f_blocks.saturating_sub(usage.f_bfree))))
}

fn unmountable(error: &anyhow::Error) -> String {
    format!("the disk could not be mounted ({error:#}). {REMEDY}")
}

/// Unmounts everything at and below [`DATA`]. Returns what stayed busy and was detached instead.
pub fn take_down() -> io::Result<Vec<String>> {
    let mounts = guest_mountinfo::read()?;
    let mut busy = Vec::new();
    let deadline = Instant::now() + BUSY_TIME_MAX;
    for target in mounts::mounted_below(&mounts, DATA) {
        if unmount_patiently(&target, deadline).is_err() {
            // Nothing more is written, and what was is on the disk; then the mount may go when it likes. Failing
            // here too leaves the journal to the next boot.
            let read_only = rustix::mount::mount_remount(&target, MountFlags::RDONLY, c"");
            let detached = rustix::mount::unmount(&target, UnmountFlags::DETACH);
            busy.push(format!("{} (read-only: {read_only:?}, detached: {detached:?})", target.display()));
        }
    }
    Ok(busy)
}

/// A killed container's mount namespace is taken apart a moment after its last process has gone.
fn unmount_patiently(target: &Path, deadline: Instant) -> rustix::io::Result<()> {
    loop {
        match rustix::mount::unmount(target, UnmountFlags::NOFOLLOW) {
            Err(Errno::BUSY) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(10)),
            result => return result,
        }
    }
}

/// The device node of the data disk: the one with our serial number, else the first virtio disk.
async fn find() -> Result<PathBuf> {
    let deadline = Instant::now() + APPEAR_TIMEOUT;
    loop {
        if let Some(name) = choose(&disks()?) {
            let node = Path::new("/dev").join(name);
            // The node is made by the kernel, a moment after the entry in /sys.
            if fs::metadata(&node).is_ok_and(|node| node.file_type().is_block_device()) {
                return Ok(node);
            }
        }
        if Instant::now() > deadline {
            let seconds = APPEAR_TIMEOUT.as_secs();
            anyhow::bail!(
                "no disk appeared within {seconds} s: the machine was started without its data disk"
            );
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Names and serial numbers of the disks the kernel knows, by name.
fn disks() -> Result<Vec<(String, String)>> {
    let mut disks = Vec::new();
    for entry in fs::read_dir("/sys/block").context("cannot list disks")? {
        let entry = entry?;
        // Only virtio disks have the file; others are no candidates.
        let serial = fs::read_to_string(entry.path().join("serial")).unwrap_or_default();
        disks.push((entry.file_name().to_string_lossy().into_owned(), serial.trim().to_owned()));
    }
    disks.sort();
    Ok(disks)
}

fn choose(disks: &[(String, String)]) -> Option<&str> {
    let ours = disks.iter().find(|(_, serial)| serial == SERIAL);
    // A disk with another serial number says that it is something else.
    let first = || disks.iter().find(|(name, serial)| name == "vda" && serial.is_empty());
    ours.or_else(first).map(|(name, _)| name.as_str())
}

fn inspect(disk: &Path) -> Result<(Content, u64)> {
    let file = File::open(disk)?;
    let size = size_of(&file)?;
    let mut head = vec![0; HEAD_LENGTH.min(usize::try_from(size).unwrap_or(HEAD_LENGTH))];
    file.read_exact_at(&mut head, 0)?;
    let mut tail = [0; TAIL_LENGTH];
    let tail_at = size.checked_sub(TAIL_LENGTH as u64).context("it is smaller than a sector")?;
    file.read_exact_at(&mut tail, tail_at)?;
    Ok((superblock::identify(&head, &tail), size))
}

fn size_of(file: &File) -> io::Result<u64> {
    // A block device's length is where its end is; metadata has 0.
    io::Seek::seek(&mut &*file, io::SeekFrom::End(0))
}

async fn format(processes: &Processes, disk: &Path, size: u64) -> Result<()> {
    let mark_at = size - TAIL_LENGTH as u64;
    let file = File::options().read(true).write(true).open(disk)?;
    let mut mark = [0; TAIL_LENGTH];
    mark[..FORMATTING_MARK.len()].copy_from_slice(FORMATTING_MARK);
    file.write_all_at(&mark, mark_at)?;
    file.sync_all()?;
    let node = disk.to_string_lossy();
    let arguments: Vec<&str> = FORMAT.iter().copied().chain([&*node]).collect();
    let outcome = processes.run("/usr/sbin/mke2fs", &arguments).await?;
    if outcome.exit != Exit::Status(0) {
        anyhow::bail!("mke2fs {outcome}");
    }
    // First the file system, then the word that it is whole.
    file.sync_all()?;
    file.write_all_at(&[0; TAIL_LENGTH], mark_at)?;
    file.sync_all()?;
    Ok(())
}

async fn check(processes: &Processes, disk: &Path) -> Result<(), Fault> {
    let fault = |reason: String| Fault { what: "data disk", reason };
    let outcome = processes
        .run("/usr/sbin/e2fsck", &["-p", &disk.to_string_lossy()])
        .await
        .map_err(|error| fault(format!("the disk could not be checked ({error:#}). {REMEDY}")))?;
    if !check_passed(outcome.exit) {
        return Err(fault(format!(
            "the file system on the disk is damaged and was not repaired (e2fsck {outcome}). {REMEDY}"
        )));
    }
    info!(e2fsck = %outcome, "data disk checked");
    Ok(())
}

/// Mounts the data disk.
///
/// `discard` hands freed blocks back to the host as deletions are committed. The alternative, trimming now and then,
/// wakes an idle machine, walks the whole file system and leaves space on the host until its turn comes; here a
/// discard only punches a hole into a sparse file, and ext4 sends one per freed extent and commit. What that misses is
/// looked for once in each start (`idle::trim`).
fn mount(disk: &Path) -> Result<()> {
    fs::create_dir_all(DATA)?;
    rustix::mount::mount(disk, DATA, "ext4", MountFlags::empty(), c"discard,errors=remount-ro")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_decision_table() {
        let gib = 1 << 30;
        let ours = |size_bytes| Content::Ours { size_bytes, clean: true };
        let unclean = Content::Ours { size_bytes: gib, clean: false };
        assert_eq!(plan(&Content::Blank, gib), Plan::Format);
        assert_eq!(plan(&Content::HalfFormatted, gib), Plan::Format);
        assert_eq!(plan(&ours(gib), gib), Plan::Mount { check: false, grow: false });
        assert_eq!(plan(&ours(gib - 4096), gib), Plan::Mount { check: false, grow: false });
        assert_eq!(plan(&ours(gib), 2 * gib), Plan::Mount { check: false, grow: true });
        assert_eq!(plan(&unclean, 2 * gib), Plan::Mount { check: true, grow: true });
        for content in [ours(gib + 1), Content::OtherName("rootfs".into()), Content::Unknown] {
            let Plan::Refuse(reason) = plan(&content, gib) else { panic!("{content:?} was not refused") };
            assert!(reason.contains("engine machine rm"), "says what to do: {reason}");
        }
    }

    #[tokio::test]
    async fn a_disk_that_stays_small_is_told_with_both_sizes() {
        let disk = tempfile::NamedTempFile::new().unwrap();
        disk.as_file().set_len(4096).unwrap();
        see(disk.path(), 4096, Duration::ZERO).await.unwrap();
        let error = see(disk.path(), 8192, Duration::ZERO).await.unwrap_err().to_string();
        assert_eq!(error, "the kernel saw 4096 bytes of the disk and not 8192 within 0ns");
        let file = disk.reopen().unwrap();
        let growing = tokio::spawn(async move {
            tokio::task::yield_now().await;
            file.set_len(8192).unwrap();
        });
        see(disk.path(), 8192, Duration::from_secs(60)).await.unwrap();
        growing.await.unwrap();
        assert!(see(Path::new("/nonexistent/disk"), 0, Duration::ZERO).await.is_err());
    }

    #[test]
    fn fsck_statuses_are_bits() {
        for (exit, passed) in [
            (Exit::Status(0), true),
            (Exit::Status(1), true),
            (Exit::Status(2), true),
            (Exit::Status(3), true),
            (Exit::Status(4), false),
            (Exit::Status(5), false),
            (Exit::Status(8), false),
            (Exit::Status(128), false),
            (Exit::Signal(9), false),
        ] {
            assert_eq!(check_passed(exit), passed, "{exit}");
        }
    }

    #[test]
    fn the_disk_is_told_by_its_serial_number() {
        let disks = |list: &[(&str, &str)]| -> Vec<(String, String)> {
            list.iter().map(|(name, serial)| ((*name).into(), (*serial).into())).collect()
        };
        assert_eq!(choose(&disks(&[("vda", "scratch"), ("vdb", "engine-data")])), Some("vdb"));
        assert_eq!(choose(&disks(&[("loop0", ""), ("vda", "")])), Some("vda"));
        assert_eq!(choose(&disks(&[("vda", "scratch")])), None);
        assert_eq!(choose(&[]), None);
    }
}
