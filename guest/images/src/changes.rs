//! What a container changed: the upper folder of its overlay compared with what is below it.

use std::{
    collections::HashSet,
    fs::{self, Metadata},
    io,
    os::unix::{
        ffi::OsStrExt,
        fs::{FileTypeExt, MetadataExt},
    },
    path::{Path, PathBuf},
};

use crate::{Error, Mounts, Result, extract::OPAQUE};

/// What happened to a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ChangeKind {
    /// It is there before and after.
    Modified,
    /// It is new.
    Added,
    /// It is gone.
    Deleted,
}

/// One changed path.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Change {
    /// The path from the root, with a leading slash.
    pub path: PathBuf,
    /// What happened to it.
    pub kind: ChangeKind,
}

/// Something that a runtime puts into the root of every container to mount over, where the image has it not. It is nobody's
/// change while it is as the runtime made it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MountPoint {
    /// An empty file.
    File(&'static str),
    /// An empty folder.
    Folder(&'static str),
    /// A symbolic link, and where to.
    Link(&'static str, &'static str),
}

impl MountPoint {
    fn path(&self) -> &'static str {
        match self {
            Self::File(path) | Self::Folder(path) | Self::Link(path, _) => path,
        }
    }
}

/// Which paths of an upper folder are the runtime's doing. Paths are relative.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Scaffold {
    /// Not a change at all, nor anything below.
    pub(crate) without: HashSet<Vec<u8>>,
    /// Folders whose time says nothing, because the runtime made something in them.
    quiet: HashSet<PathBuf>,
}

impl Scaffold {
    pub(crate) fn find(mounts: &Mounts, points: &[MountPoint]) -> Result<Self> {
        let mut paths: Vec<(PathBuf, MountPoint)> = Vec::new();
        for point in points {
            paths.push((PathBuf::from(point.path()), *point));
        }
        // A folder on the way may be the runtime's too.
        for point in points {
            for above in Path::new(point.path()).ancestors().skip(1) {
                if above != Path::new("") && !paths.iter().any(|(path, _)| path == above) {
                    paths.push((above.to_path_buf(), MountPoint::Folder("")));
                }
            }
        }
        // What lies deeper decides about what lies above.
        paths.sort_by_key(|(path, _)| std::cmp::Reverse(path.components().count()));
        let mut scaffold = Self::default();
        for (path, point) in paths {
            scaffold.judge(mounts, &path, &point)?;
        }
        Ok(scaffold)
    }

    fn judge(&mut self, mounts: &Mounts, path: &Path, point: &MountPoint) -> Result<()> {
        let upper = mounts.upper.join(path);
        let Some(data) = look(&upper)? else { return Ok(()) };
        let below = below(mounts, path)?;
        let made_by_runtime = match point {
            MountPoint::File(_) => data.is_file() && data.len() == 0 && below.is_none(),
            MountPoint::Link(_, target) => {
                let leads = || fs::read_link(&upper).is_ok_and(|found| found == Path::new(target));
                data.is_symlink() && below.is_none() && leads()
            }
            MountPoint::Folder(_) => {
                let unchanged = below.as_ref().is_none_or(|below| below.is_dir() && same_owner(&data, below));
                if !data.is_dir() || is_opaque(&upper) || !unchanged {
                    return Ok(());
                }
                if below.is_some() {
                    self.quiet.insert(path.to_path_buf());
                }
                children(&upper)?
                    .iter()
                    .all(|name| self.without.contains(path.join(name).as_os_str().as_bytes()))
            }
        };
        if made_by_runtime {
            self.without.insert(path.as_os_str().as_bytes().to_vec());
        }
        Ok(())
    }
}

/// Every change, by path. Blocks for as long as it takes to walk the upper folder.
pub(crate) fn changes(mounts: &Mounts, scaffold: &Scaffold) -> Result<Vec<Change>> {
    let mut found = Vec::new();
    let lower: Vec<PathBuf> = mounts.lower.clone();
    // A snapshot on nothing has only additions, of which everything is one.
    let mut pending = vec![(PathBuf::new(), lower)];
    while let Some((folder, lower)) = pending.pop() {
        walk(mounts, scaffold, &folder, &lower, &mut found, &mut pending)?;
    }
    let mut paths: HashSet<PathBuf> = found.iter().map(|change| change.path.clone()).collect();
    // What is in a folder is part of it.
    for change in found.clone() {
        if change.kind == ChangeKind::Modified {
            continue;
        }
        for above in change.path.ancestors().skip(1).filter(|above| *above != Path::new("/")) {
            if !paths.insert(above.to_path_buf()) {
                break;
            }
            found.push(Change { path: above.to_path_buf(), kind: ChangeKind::Modified });
        }
    }
    found.sort();
    Ok(found)
}

/// One folder of the upper layer. `lower` are the folders of the same path in the layers below that show through.
fn walk(
    mounts: &Mounts,
    scaffold: &Scaffold,
    folder: &Path,
    lower: &[PathBuf],
    found: &mut Vec<Change>,
    pending: &mut Vec<(PathBuf, Vec<PathBuf>)>,
) -> Result<()> {
    let upper = mounts.upper.join(folder);
    for name in children(&upper)? {
        let path = folder.join(&name);
        if scaffold.without.contains(path.as_os_str().as_bytes()) {
            continue;
        }
        let Some(data) = look(&upper.join(&name))? else { continue };
        let (shown, through) = show_through(lower, &name)?;
        let mut change = |kind| found.push(Change { path: Path::new("/").join(&path), kind });
        if is_whiteout(&data) {
            // One for something that never was is left by a rename; it is no change.
            if shown.is_some() {
                change(ChangeKind::Deleted);
            }
            continue;
        }
        let Some(below) = shown else {
            change(ChangeKind::Added);
            if data.is_dir() {
                pending.push((path, Vec::new()));
            }
            continue;
        };
        if !(data.is_dir() && below.is_dir()) {
            change(ChangeKind::Modified);
            if data.is_dir() {
                pending.push((path, Vec::new()));
            }
            continue;
        }
        let opaque = is_opaque(&upper.join(&name));
        let quiet = scaffold.quiet.contains(&path);
        let same_time = (data.mtime(), data.mtime_nsec()) == (below.mtime(), below.mtime_nsec());
        if opaque || !same_owner(&data, &below) || !(same_time || quiet) {
            change(ChangeKind::Modified);
        }
        if opaque {
            // It was removed and made again: what it held is gone.
            let kept: HashSet<_> = children(&upper.join(&name))?.into_iter().collect();
            for gone in merged_children(&through)?.into_iter().filter(|gone| !kept.contains(gone)) {
                found.push(Change { path: Path::new("/").join(&path).join(gone), kind: ChangeKind::Deleted });
            }
        }
        pending.push((path, through));
    }
    Ok(())
}

/// What shows of a name through the layers `lower`, and the folders it is made of if it is one.
fn show_through(lower: &[PathBuf], name: &Path) -> Result<(Option<Metadata>, Vec<PathBuf>)> {
    let mut shown = None;
    let mut through = Vec::new();
    for folder in lower {
        let path = folder.join(name);
        let Some(data) = look(&path)? else { continue };
        if is_whiteout(&data) || (shown.is_some() && !data.is_dir()) {
            break;
        }
        let is_folder = data.is_dir();
        shown.get_or_insert(data);
        if !is_folder {
            break;
        }
        let last = is_opaque(&path);
        through.push(path);
        if last {
            break;
        }
    }
    Ok((shown, through))
}

/// What is at a path below the upper folder.
fn below(mounts: &Mounts, path: &Path) -> Result<Option<Metadata>> {
    let mut lower = mounts.lower.clone();
    let mut shown = None;
    for component in path.components() {
        (shown, lower) = show_through(&lower, Path::new(component.as_os_str()))?;
    }
    Ok(shown)
}

/// The names that layers show together.
fn merged_children(folders: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let (mut names, mut decided) = (Vec::new(), HashSet::new());
    for folder in folders {
        for name in children(folder)? {
            let Some(data) = look(&folder.join(&name))? else { continue };
            if decided.insert(name.clone()) && !is_whiteout(&data) {
                names.push(name);
            }
        }
    }
    Ok(names)
}

fn children(folder: &Path) -> Result<Vec<PathBuf>> {
    let failed = |source| Error::io("list", folder, source);
    let listed = match fs::read_dir(folder) {
        // A running container may remove what we are about to look at.
        Err(source) if matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(Vec::new());
        }
        result => result.map_err(failed)?,
    };
    listed.map(|entry| Ok(PathBuf::from(entry.map_err(failed)?.file_name()))).collect()
}

fn look(path: &Path) -> Result<Option<Metadata>> {
    match fs::symlink_metadata(path) {
        Err(source) if matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Ok(None)
        }
        result => result.map(Some).map_err(|source| Error::io("look at", path, source)),
    }
}

fn is_whiteout(data: &Metadata) -> bool {
    data.file_type().is_char_device() && data.rdev() == 0
}

fn is_opaque(folder: &Path) -> bool {
    let mut value = [0; 1];
    matches!(rustix::fs::lgetxattr(folder, OPAQUE, &mut value), Ok(1)) && value == *b"y"
}

fn same_owner(one: &Metadata, other: &Metadata) -> bool {
    (one.mode(), one.uid(), one.gid()) == (other.mode(), other.uid(), other.gid())
}

#[cfg(test)]
mod tests {
    use rustix::fs::{CWD, FileType, Mode, XattrFlags};

    use super::*;

    const POINTS: &[MountPoint] = &[
        MountPoint::Folder("dev/pts"),
        MountPoint::File("etc/hosts"),
        MountPoint::Link("etc/mtab", "/proc/mounts"),
    ];

    struct Layers(tempfile::TempDir, Mounts);

    impl Layers {
        fn new() -> Self {
            let folder = tempfile::tempdir().expect("a folder");
            let path = |name: &str| {
                let path = folder.path().join(name);
                fs::create_dir(&path).expect("made");
                path
            };
            let mounts =
                Mounts { lower: vec![path("top"), path("bottom")], upper: path("upper"), work: path("work") };
            Self(folder, mounts)
        }

        fn file(&self, layer: &str, path: &str, text: &str) {
            let path = self.0.path().join(layer).join(path);
            fs::create_dir_all(path.parent().expect("a folder")).expect("made");
            fs::write(path, text).expect("made");
        }

        fn whiteout(&self, layer: &str, path: &str) {
            let path = self.0.path().join(layer).join(path);
            fs::create_dir_all(path.parent().expect("a folder")).expect("made");
            rustix::fs::mknodat(CWD, path, FileType::CharacterDevice, Mode::empty(), 0).expect("made");
        }

        /// Gives a folder of the upper layer the time it has below, as copying it up does.
        fn untouched(&self, path: &str) {
            let below = fs::metadata(self.0.path().join("bottom").join(path)).expect("there");
            let time = below.modified().expect("a time");
            fs::File::open(self.0.path().join("upper").join(path))
                .expect("there")
                .set_modified(time)
                .expect("set");
        }

        fn changes(&self) -> Vec<String> {
            let scaffold = Scaffold::find(&self.1, POINTS).expect("found");
            let letter = |kind| match kind {
                ChangeKind::Modified => 'C',
                ChangeKind::Added => 'A',
                ChangeKind::Deleted => 'D',
            };
            let changes = changes(&self.1, &scaffold).expect("compared");
            changes
                .iter()
                .map(|change| format!("{} {}", letter(change.kind), change.path.display()))
                .collect()
        }
    }

    #[test]
    fn additions_changes_and_removals_are_told_apart() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let layers = Layers::new();
        layers.file("bottom", "etc/conf", "1");
        layers.file("bottom", "etc/old", "1");
        layers.file("bottom", "etc/gone", "1");
        layers.whiteout("top", "etc/gone");
        layers.file("upper", "etc/conf", "2");
        layers.whiteout("upper", "etc/old");
        layers.whiteout("upper", "etc/gone");
        layers.file("upper", "new/file", "3");
        layers.untouched("etc");
        assert_eq!(layers.changes(), ["C /etc", "C /etc/conf", "D /etc/old", "A /new", "A /new/file"]);
    }

    #[test]
    fn a_folder_that_was_made_again_lost_what_it_held() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let layers = Layers::new();
        for name in ["d/a", "d/b"] {
            layers.file("bottom", name, "1");
        }
        layers.whiteout("top", "d/b");
        layers.file("top", "d/c", "1");
        layers.file("upper", "d/c", "2");
        let folder = layers.0.path().join("upper/d");
        rustix::fs::lsetxattr(folder, OPAQUE, b"y", XattrFlags::empty()).expect("set");
        // Below the opaque folder nothing shows through, yet the name was there: it is told as changed.
        assert_eq!(layers.changes(), ["C /d", "D /d/a", "C /d/c"]);
    }

    #[test]
    fn what_the_runtime_made_is_nobodys_change() {
        let layers = Layers::new();
        layers.file("bottom", "etc/passwd", "root");
        layers.file("upper", "etc/hosts", "");
        fs::create_dir_all(layers.0.path().join("upper/dev/pts")).expect("made");
        std::os::unix::fs::symlink("/proc/mounts", layers.0.path().join("upper/etc/mtab")).expect("made");
        assert!(layers.changes().is_empty(), "{:?}", layers.changes());
        let scaffold = Scaffold::find(&layers.1, POINTS).expect("found");
        assert!(scaffold.without.contains(&b"etc"[..]) && scaffold.without.contains(&b"dev"[..]));

        layers.file("upper", "etc/hosts", "127.0.0.1 me");
        assert_eq!(layers.changes(), ["C /etc", "A /etc/hosts"]);
        layers.file("upper", "dev/thing", "");
        assert_eq!(layers.changes(), ["A /dev", "A /dev/thing", "C /etc", "A /etc/hosts"]);
    }
}
