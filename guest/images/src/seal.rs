//! The seal of a layer: one digest over what every file of it looks like, taken when the layer is put in its place. A check
//! takes it again: a file that is gone, cut short, or was written to breaks it.
//!
//! Contents are not read; sizes and times are what tells.

use std::{
    fs, io,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Path, PathBuf},
};

use crate::{Digest, Error, Hasher, Result};

/// Seals the files below `folder`. Blocks for as long as it takes to look at every file.
pub(crate) fn of(folder: &Path) -> Result<Digest> {
    let mut hasher = Hasher::default();
    // Relative to the folder; the root itself comes first.
    let mut pending = vec![PathBuf::new()];
    while let Some(relative) = pending.pop() {
        let path = folder.join(&relative);
        let failed = |source: io::Error| Error::io("look at", &path, source);
        let data = fs::symlink_metadata(&path).map_err(failed)?;
        hasher.update(relative.as_os_str().as_bytes());
        hasher.update(&[0]);
        for number in [data.mode(), data.uid(), data.gid()] {
            hasher.update(&number.to_le_bytes());
        }
        hasher.update(&data.rdev().to_le_bytes());
        if data.is_dir() {
            let listed = fs::read_dir(&path).map_err(failed)?;
            let names = listed.map(|entry| Ok(entry?.file_name())).collect::<io::Result<Vec<_>>>();
            let mut names = names.map_err(failed)?;
            // Popped from the end: in order of names.
            names.sort_unstable_by(|a, b| b.cmp(a));
            pending.extend(names.into_iter().map(|name| relative.join(name)));
        } else {
            hasher.update(&data.len().to_le_bytes());
            hasher.update(&data.mtime().to_le_bytes());
            hasher.update(&data.mtime_nsec().to_le_bytes());
            if data.is_symlink() {
                let target = fs::read_link(&path).map_err(failed)?;
                hasher.update(target.as_os_str().as_bytes());
                hasher.update(&[0]);
            }
        }
    }
    Ok(hasher.finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seal_breaks_when_a_file_changes_and_only_then() {
        let folder = tempfile::tempdir().expect("a folder");
        let root = folder.path().join("layer");
        fs::create_dir_all(root.join("a/b")).expect("folders");
        fs::write(root.join("a/b/file"), "content").expect("a file");
        std::os::unix::fs::symlink("b", root.join("a/link")).expect("a link");
        let sealed = of(&root).expect("sealed");
        assert_eq!(of(&root).expect("sealed"), sealed);
        // Reading and moving it change nothing.
        fs::read(root.join("a/b/file")).expect("read");
        let moved = folder.path().join("moved");
        fs::rename(&root, &moved).expect("moved");
        assert_eq!(of(&moved).expect("sealed"), sealed);

        type Change = fn(&Path) -> io::Result<()>;
        let changes: [(&str, Change); 4] = [
            ("cut short", |root| fs::File::options().write(true).open(root.join("a/b/file"))?.set_len(3)),
            ("gone", |root| fs::remove_file(root.join("a/b/file"))),
            ("new", |root| fs::write(root.join("new"), "")),
            ("elsewhere", |root| {
                fs::remove_file(root.join("a/link"))?;
                std::os::unix::fs::symlink("c", root.join("a/link"))
            }),
        ];
        let mut seals = vec![sealed];
        for (what, change) in changes {
            change(&moved).expect(what);
            let seal = of(&moved).expect("sealed");
            assert!(!seals.contains(&seal), "{what} does not break the seal");
            seals.push(seal);
        }
    }
}
