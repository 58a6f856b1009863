//! The folders of local volumes: `<root>/<name>/_data` holds what a container sees.
//!
//! A volume exists when the caller's record says so. Making: folder in `.new`, rename, record. Removing: rename into
//! `.gone`, record, delete. So a crash at any instant leaves the old state or the new one, and leftovers that
//! [`LocalVolumes::recover`] puts right. A folder with files that no record knows is never deleted.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use thiserror::Error;

use crate::copy;
use crate::options::{DriverOptions, OptionError};

const DATA: &str = "_data";
/// Where a volume is filled before it is swapped with the empty data folder.
const FILLING: &str = "_fill";
/// Folders beside the volumes: no name of a volume begins with a dot.
const NEW: &str = ".new";
const GONE: &str = ".gone";
/// Others may pass through, as far as the folders above let them, but not look around.
const FOLDER_MODE: u32 = 0o701;
const DATA_MODE: u32 = 0o755;
const HIDDEN_MODE: u32 = 0o700;

/// Why a volume's folder could not be made, mounted or removed.
#[derive(Debug, Error)]
pub enum VolumeError {
    /// dockerd's sentence about names of one letter.
    #[error("volume name is too short, names should be at least two alphanumeric characters")]
    ShortName,
    /// dockerd's sentence about other names.
    #[error(
        "{0:?} includes invalid characters for a local volume name, only \"[a-zA-Z0-9][a-zA-Z0-9_.-]\" are allowed. If you \
         intended to pass a host directory, use absolute path"
    )]
    Name(String),
    /// A folder could not be made.
    #[error("error while creating volume root path '{path}'")]
    Make {
        /// The folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Something else could not be done with a folder.
    #[error("cannot {step} `{path}`")]
    Folder {
        /// What.
        step: &'static str,
        /// The folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Something is mounted in it that we did not mount.
    #[error("something is mounted at `{0}`: unmount it first")]
    Mounted(PathBuf),
    /// The options' server has no address.
    #[error(transparent)]
    Options(#[from] OptionError),
    /// What the options ask for could not be mounted.
    #[error("failed to mount local volume: mount {device}:{target}{data}")]
    Mount {
        /// The device.
        device: String,
        /// The data folder.
        target: String,
        /// The options behind it, without a password.
        data: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// An image's files could not be copied.
    #[error(transparent)]
    Copy(#[from] copy::CopyError),
}

/// What was found when the folders were compared with the records.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Recovered {
    /// Folders with files that have no record.
    pub unknown: Vec<String>,
    /// Volumes whose folder was missing and was made again, empty.
    pub remade: Vec<String>,
}

/// What a check found: sentences.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Problems {
    /// What a crash left by design; recovery takes it away.
    pub leftovers: Vec<String>,
    /// What a person has to know.
    pub damage: Vec<String>,
}

/// The folders of all local volumes. Cheap to clone.
#[derive(Clone, Debug)]
pub struct LocalVolumes {
    root: PathBuf,
}

impl LocalVolumes {
    /// Makes the folder of folders.
    pub fn open(root: &Path) -> Result<Self, VolumeError> {
        let volumes = Self { root: root.to_owned() };
        make(root, FOLDER_MODE)?;
        make(&root.join(NEW), HIDDEN_MODE)?;
        make(&root.join(GONE), HIDDEN_MODE)?;
        Ok(volumes)
    }

    /// Checks a name by dockerd's rules.
    pub fn check_name(name: &str) -> Result<(), VolumeError> {
        let mut letters = name.bytes();
        if name.len() == 1 {
            return Err(VolumeError::ShortName);
        }
        let first = letters.next().is_some_and(|byte| byte.is_ascii_alphanumeric());
        if !first || !letters.all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-')) {
            return Err(VolumeError::Name(name.to_owned()));
        }
        Ok(())
    }

    /// Where a volume's data is.
    #[must_use]
    pub fn data(&self, name: &str) -> PathBuf {
        self.folder(name).join(DATA)
    }

    fn folder(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// Makes a volume's folders. Fine when they are there.
    pub fn create(&self, name: &str) -> Result<(), VolumeError> {
        Self::check_name(name)?;
        let folder = self.folder(name);
        if folder.join(DATA).is_dir() {
            return Ok(());
        }
        let new = self.root.join(NEW).join(name);
        let at = |path: &Path| {
            let path = path.to_owned();
            move |source| VolumeError::Make { path, source }
        };
        if folder.exists() {
            return make(&folder.join(DATA), DATA_MODE);
        }
        // The error is about the folder it stands for.
        match DirBuilder::new().mode(FOLDER_MODE).create(&new) {
            // A leaving of an earlier try.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => remove_tree(&new.join(DATA))?,
            other => other.map_err(at(&folder))?,
        }
        DirBuilder::new().mode(DATA_MODE).create(new.join(DATA)).map_err(at(&folder))?;
        fs::rename(&new, &folder).map_err(at(&folder))
    }

    /// Takes a volume out of sight; its record goes next, then [`LocalVolumes::discard`] deletes it. Fine when it is not
    /// there.
    pub fn hide(&self, name: &str) -> Result<(), VolumeError> {
        let folder = self.folder(name);
        if let Some(place) = mounted_below(&folder)? {
            return Err(VolumeError::Mounted(place));
        }
        let gone = self.root.join(GONE).join(name);
        remove_tree(&gone)?;
        match fs::rename(&folder, &gone) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other.map_err(|source| VolumeError::Folder { step: "remove", path: folder, source }),
        }
    }

    /// Takes a removal back.
    pub fn show(&self, name: &str) -> Result<(), VolumeError> {
        let (folder, gone) = (self.folder(name), self.root.join(GONE).join(name));
        fs::rename(&gone, &folder).map_err(|source| VolumeError::Folder {
            step: "bring back",
            path: folder,
            source,
        })
    }

    /// Deletes a hidden volume.
    pub fn discard(&self, name: &str) -> Result<(), VolumeError> {
        remove_tree(&self.root.join(GONE).join(name))
    }

    /// Brings the folders in line with the records, after a crash.
    pub fn recover(&self, known: &BTreeSet<String>) -> Result<Recovered, VolumeError> {
        let mut recovered = Recovered::default();
        for name in names(&self.root.join(NEW))? {
            remove_tree(&self.root.join(NEW).join(name))?;
        }
        for name in names(&self.root.join(GONE))? {
            let gone = self.root.join(GONE).join(&name);
            // Its record is still there: the removal did not happen.
            if known.contains(&name) && !self.folder(&name).exists() {
                self.show(&name)?;
            } else if mounted_below(&gone)?.is_none() {
                remove_tree(&gone)?;
            }
        }
        for name in names(&self.root)?.into_iter().filter(|name| !known.contains(name)) {
            let folder = self.folder(&name);
            if Self::check_name(&name).is_err() || !folder.is_dir() {
                continue;
            }
            // Made, and killed before its record: nobody can have put anything there.
            let empty = fs::remove_dir(folder.join(DATA)).and_then(|()| fs::remove_dir(&folder));
            if empty.is_err() {
                recovered.unknown.push(name);
            }
        }
        for name in known {
            remove_tree(&self.folder(name).join(FILLING))?;
            if !self.data(name).is_dir() {
                self.create(name)?;
                recovered.remade.push(name.clone());
            }
        }
        Ok(recovered)
    }

    /// What is not as it should be, for a check that changes nothing: one sentence each.
    pub fn problems(&self, known: &BTreeSet<String>) -> Result<Problems, VolumeError> {
        let mut problems = Problems::default();
        for folder in [NEW, GONE] {
            for name in names(&self.root.join(folder))? {
                let path = self.root.join(folder).join(name);
                problems.leftovers.push(format!("`{}` was left by an interrupted operation", path.display()));
            }
        }
        for name in names(&self.root)?.into_iter().filter(|name| !known.contains(name)) {
            let path = self.folder(&name);
            if Self::check_name(&name).is_err() || !path.is_dir() {
                continue;
            }
            let kept =
                names(&path)?.iter().any(|entry| entry != DATA) || !names(&self.data(&name))?.is_empty();
            let what = format!("`{}` belongs to no volume", path.display());
            if kept {
                let advice = format!("create the volume {name} to use the files in it, or delete the folder");
                problems.damage.push(format!("{what}: {advice}"));
            } else {
                problems.leftovers.push(what);
            }
        }
        for name in known {
            let filling = self.folder(name).join(FILLING);
            if filling.exists() {
                problems
                    .leftovers
                    .push(format!("`{}` was left by an interrupted operation", filling.display()));
            }
            // A removal that did not happen is taken back.
            let data = self.data(name);
            if !data.is_dir() && !self.root.join(GONE).join(name).is_dir() {
                problems.damage.push(format!("the volume {name} has no folder `{}`", data.display()));
            }
        }
        Ok(problems)
    }

    /// Fills an empty volume from the folder `source` of an image. With `alone`, when nobody else can have the volume, it
    /// is filled aside and swapped in whole, so that a crash leaves it empty or full. Says whether it did.
    pub fn fill(&self, name: &str, source: &rustix::fd::OwnedFd, alone: bool) -> Result<bool, VolumeError> {
        let data = self.data(name);
        if !alone {
            return Ok(copy::fill(source, &data)?);
        }
        let step = |step: &'static str, path: &Path| {
            let path = path.to_owned();
            move |source| VolumeError::Folder { step, path, source }
        };
        if fs::read_dir(&data).map_err(step("read", &data))?.next().is_some() {
            return Ok(false);
        }
        let aside = self.folder(name).join(FILLING);
        remove_tree(&aside)?;
        make(&aside, DATA_MODE)?;
        let filled = copy::fill(source, &aside)
            .map_err(VolumeError::from)
            // Over an empty folder a rename replaces it.
            .and_then(|_| fs::rename(&aside, &data).map_err(step("fill", &data)));
        if filled.is_err() {
            remove_tree(&aside)?;
        }
        filled.map(|()| true)
    }

    /// Mounts what the options say at the data folder. Fine when something is mounted there already.
    pub fn mount(&self, name: &str, options: &DriverOptions) -> Result<(), VolumeError> {
        let target = self.data(name);
        if is_mounted(&target)? {
            return Ok(());
        }
        let (device, data) = options.resolved()?;
        let words = MountWords::parse(&data);
        let fail = |source: Errno| VolumeError::Mount {
            device: device.clone(),
            target: target.display().to_string(),
            data: if data.is_empty() {
                String::new()
            } else {
                format!(", data: {}", options.hide_password(&data))
            },
            source: source.into(),
        };
        let text = std::ffi::CString::new(words.data.join(",")).map_err(|_| fail(Errno::INVAL))?;
        let kind = if words.flags.contains(MountFlags::BIND) { "none" } else { options.kind.as_str() };
        rustix::mount::mount(device.as_str(), &target, kind, words.flags, text.as_c_str()).map_err(fail)?;
        let finish = || -> Result<(), Errno> {
            if let Some(propagation) = words.propagation {
                rustix::mount::mount_change(&target, propagation)?;
            }
            if words.flags.contains(MountFlags::BIND | MountFlags::RDONLY) {
                rustix::mount::mount_remount(&target, words.flags, "")?;
            }
            Ok(())
        };
        if let Err(error) = finish() {
            self.unmount(name)?;
            return Err(fail(error));
        }
        Ok(())
    }

    /// Unmounts what the options mounted; fine when nothing is.
    pub fn unmount(&self, name: &str) -> Result<(), VolumeError> {
        let target = self.data(name);
        match rustix::mount::unmount(&target, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH) {
            Ok(()) | Err(Errno::INVAL | Errno::NOENT) => Ok(()),
            Err(error) => Err(VolumeError::Folder { step: "unmount", path: target, source: error.into() }),
        }
    }
}

/// Words of `mount -o`: flags, propagation, and what the file system itself reads.
struct MountWords<'a> {
    flags: MountFlags,
    propagation: Option<MountPropagationFlags>,
    data: Vec<&'a str>,
}

impl<'a> MountWords<'a> {
    fn parse(options: &'a str) -> Self {
        use MountPropagationFlags as Propagation;
        let mut words = Self { flags: MountFlags::empty(), propagation: None, data: Vec::new() };
        for word in options.split(',').filter(|word| !word.is_empty()) {
            let (flag, on) = match word {
                "ro" => (MountFlags::RDONLY, true),
                "rw" => (MountFlags::RDONLY, false),
                "bind" => (MountFlags::BIND, true),
                "rbind" => (MountFlags::BIND | MountFlags::REC, true),
                "nosuid" => (MountFlags::NOSUID, true),
                "suid" => (MountFlags::NOSUID, false),
                "nodev" => (MountFlags::NODEV, true),
                "dev" => (MountFlags::NODEV, false),
                "noexec" => (MountFlags::NOEXEC, true),
                "exec" => (MountFlags::NOEXEC, false),
                "sync" => (MountFlags::SYNCHRONOUS, true),
                "async" => (MountFlags::SYNCHRONOUS, false),
                "dirsync" => (MountFlags::DIRSYNC, true),
                "mand" => (MountFlags::PERMIT_MANDATORY_FILE_LOCKING, true),
                "nomand" => (MountFlags::PERMIT_MANDATORY_FILE_LOCKING, false),
                "noatime" => (MountFlags::NOATIME, true),
                "atime" => (MountFlags::NOATIME, false),
                "nodiratime" => (MountFlags::NODIRATIME, true),
                "diratime" => (MountFlags::NODIRATIME, false),
                "relatime" => (MountFlags::RELATIME, true),
                "norelatime" => (MountFlags::RELATIME, false),
                "strictatime" => (MountFlags::STRICTATIME, true),
                "nostrictatime" => (MountFlags::STRICTATIME, false),
                "defaults" => continue,
                _ => {
                    let propagation = match word {
                        "private" => Propagation::PRIVATE,
                        "rprivate" => Propagation::PRIVATE | Propagation::REC,
                        "shared" => Propagation::SHARED,
                        "rshared" => Propagation::SHARED | Propagation::REC,
                        "slave" => Propagation::DOWNSTREAM,
                        "rslave" => Propagation::DOWNSTREAM | Propagation::REC,
                        "unbindable" => Propagation::UNBINDABLE,
                        "runbindable" => Propagation::UNBINDABLE | Propagation::REC,
                        _ => {
                            words.data.push(word);
                            continue;
                        }
                    };
                    words.propagation = Some(propagation);
                    continue;
                }
            };
            words.flags.set(flag, on);
        }
        words
    }
}

/// Names in a folder; none when it is not there.
fn names(folder: &Path) -> Result<Vec<String>, VolumeError> {
    let read = || -> io::Result<Vec<String>> {
        let entries = match fs::read_dir(folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other?,
        };
        entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
    };
    read().map_err(|source| VolumeError::Folder { step: "list", path: folder.to_owned(), source })
}

fn make(path: &Path, mode: u32) -> Result<(), VolumeError> {
    match DirBuilder::new().mode(mode).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other.map_err(|source| VolumeError::Make { path: path.to_owned(), source }),
    }
}

fn remove_tree(path: &Path) -> Result<(), VolumeError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => {
            other.map_err(|source| VolumeError::Folder { step: "remove", path: path.to_owned(), source })
        }
    }
}

fn mount_id(path: &Path) -> rustix::io::Result<u64> {
    let folder =
        rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    let flags = rustix::fs::AtFlags::EMPTY_PATH;
    Ok(rustix::fs::statx(&folder, "", flags, rustix::fs::StatxFlags::MNT_ID)?.stx_mnt_id)
}

/// Whether a mount begins at this folder.
fn is_mounted(path: &Path) -> Result<bool, VolumeError> {
    let parent = path.parent().unwrap_or(Path::new("/"));
    let compare = || Ok(mount_id(path)? != mount_id(parent)?);
    compare().map_err(|source: Errno| VolumeError::Folder {
        step: "look at",
        path: path.to_owned(),
        source: source.into(),
    })
}

/// A place at or below a folder where something is mounted.
fn mounted_below(folder: &Path) -> Result<Option<PathBuf>, VolumeError> {
    let fail =
        |source| VolumeError::Folder { step: "look for mounts below", path: folder.to_owned(), source };
    let real = match fs::canonicalize(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(fail)?,
    };
    let mounts = guest_mountinfo::read().map_err(fail)?;
    Ok(guest_mountinfo::below(&mounts, &real).next().map(|mount| mount.point.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn names_are_dockers() {
        for (name, valid) in [
            ("data", true),
            ("thing.d", true),
            ("9-_x", true),
            ("x", false),
            ("", false),
            (".x", false),
            ("..", false),
            ("a/b", false),
            ("a b", false),
            ("~", false),
            ("ä-", false),
        ] {
            assert_eq!(LocalVolumes::check_name(name).is_ok(), valid, "{name}");
        }
    }

    #[test]
    fn a_removal_can_be_taken_back_until_it_is_done() {
        let folder = tempfile::tempdir().unwrap();
        let volumes = LocalVolumes::open(&folder.path().join("volumes")).unwrap();
        volumes.create("data").unwrap();
        volumes.create("data").unwrap();
        fs::write(volumes.data("data").join("file"), "x").unwrap();
        volumes.hide("data").unwrap();
        assert!(!volumes.data("data").exists());
        volumes.show("data").unwrap();
        assert!(volumes.data("data").join("file").exists());
        volumes.hide("data").unwrap();
        volumes.discard("data").unwrap();
        volumes.hide("data").unwrap();
        assert_eq!(names(&folder.path().join("volumes")).unwrap().len(), 2);
        let long = "y".repeat(255);
        volumes.create(&long).unwrap();
        volumes.hide(&long).unwrap();
        volumes.discard(&long).unwrap();
        assert!(matches!(volumes.create(&"y".repeat(256)), Err(VolumeError::Make { .. })));
    }

    #[test]
    fn a_crash_leaves_the_old_state_or_the_new_one() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("volumes");
        let volumes = LocalVolumes::open(&root).unwrap();
        // Killed while it was made; before its record; while it was removed, before and after its record went.
        fs::create_dir_all(root.join(".new/half/_data")).unwrap();
        volumes.create("unrecorded").unwrap();
        for name in ["kept", "removed"] {
            volumes.create(name).unwrap();
            fs::write(volumes.data(name).join("file"), name).unwrap();
            volumes.hide(name).unwrap();
        }
        volumes.create("foreign").unwrap();
        fs::write(volumes.data("foreign").join("file"), "somebody's").unwrap();
        volumes.create("half-filled").unwrap();
        fs::create_dir(root.join("half-filled/_fill")).unwrap();

        let all = known(&["kept", "lost", "half-filled"]);
        let found = volumes.problems(&all).unwrap();
        assert_eq!((found.leftovers.len(), found.damage.len()), (5, 2), "{found:?}");
        let recovered = volumes.recover(&all).unwrap();
        assert_eq!(recovered, Recovered { unknown: vec!["foreign".into()], remade: vec!["lost".into()] });
        assert!(volumes.data("kept").join("file").exists());
        assert!(volumes.data("foreign").join("file").exists());
        assert!(!root.join("half-filled/_fill").exists());
        let mut left = names(&root).unwrap();
        left.sort();
        assert_eq!(left, [".gone", ".new", "foreign", "half-filled", "kept", "lost"]);
        assert_eq!(names(&root.join(GONE)).unwrap().len() + names(&root.join(NEW)).unwrap().len(), 0);
    }

    #[test]
    fn a_volume_is_filled_once_and_whole() {
        let folder = tempfile::tempdir().unwrap();
        let volumes = LocalVolumes::open(&folder.path().join("volumes")).unwrap();
        let image = folder.path().join("image");
        fs::create_dir(&image).unwrap();
        fs::write(image.join("file"), "x").unwrap();
        let source = rustix::fs::open(&image, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
        for (name, alone) in [("one", true), ("two", false)] {
            volumes.create(name).unwrap();
            assert!(volumes.fill(name, &source, alone).unwrap());
            assert!(!volumes.fill(name, &source, alone).unwrap());
            assert!(volumes.data(name).join("file").exists());
            assert!(!volumes.folder(name).join(FILLING).exists());
        }
    }

    #[test]
    fn words_of_mount_become_flags() {
        let words = MountWords::parse("ro,bind,noexec,exec,size=1m,rslave,vers=4,,defaults");
        assert_eq!(words.flags, MountFlags::RDONLY | MountFlags::BIND);
        assert_eq!(words.data, ["size=1m", "vers=4"]);
        assert_eq!(words.propagation, Some(MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC));
    }

    #[test]
    fn nothing_is_mounted_in_a_plain_folder() {
        let folder = tempfile::tempdir().unwrap();
        let volumes = LocalVolumes::open(folder.path()).unwrap();
        volumes.create("data").unwrap();
        assert!(!is_mounted(&volumes.data("data")).unwrap());
        assert_eq!(mounted_below(&folder.path().join("data")).unwrap(), None);
        assert!(mounted_below(Path::new("/")).unwrap().is_some());
        volumes.unmount("data").unwrap();
    }
}
