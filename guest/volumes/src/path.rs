//! Paths: cleaned as text, and opened without being led astray.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{Mode, OFlags, ResolveFlags, mkdirat, openat2};
use rustix::io::Errno;

/// The path without `.`, `..`, doubled and trailing slashes, as Go's `path.Clean` gives it.
#[must_use]
pub fn clean(text: &str) -> String {
    let rooted = text.starts_with('/');
    let mut parts: Vec<&str> = Vec::new();
    for part in text.split('/') {
        match part {
            "" | "." => {}
            ".." if parts.last().is_some_and(|last| *last != "..") => _ = parts.pop(),
            ".." if rooted => {}
            part => parts.push(part),
        }
    }
    match (rooted, parts.is_empty()) {
        (true, _) => format!("/{}", parts.join("/")),
        (false, true) => ".".to_owned(),
        (false, false) => parts.join("/"),
    }
}

/// Opens what `path` names to a process whose root is `root`: absolute links and `..` stay inside.
pub fn open_within(root: impl AsFd, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
    Ok(openat2(root, path, flags | OFlags::CLOEXEC, Mode::empty(), ResolveFlags::IN_ROOT)?)
}

/// Opens a relative path below `folder`; a link or `..` that leads out of it is an error.
pub fn open_beneath(folder: impl AsFd, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    Ok(openat2(folder, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve)?)
}

/// Makes a folder in `root`, and those above it, mode 0755. What is there already is left alone, whatever it is.
pub fn make_folders(root: impl AsFd, path: &Path) -> io::Result<()> {
    let mut walked = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::Normal(name) => {
                let parent = open_within(&root, &walked, OFlags::PATH)?;
                walked.push(name);
                match open_within(&root, &walked, OFlags::PATH).map_err(|error| Errno::from_io_error(&error))
                {
                    Err(Some(Errno::NOENT)) => match mkdirat(&parent, name, Mode::from(0o755)) {
                        // A link that leads nowhere, or somebody was faster.
                        Err(Errno::EXIST) => return Ok(()),
                        other => other?,
                    },
                    Err(Some(Errno::NOTDIR)) => return Ok(()),
                    Err(Some(error)) => return Err(error.into()),
                    Err(None) => return Err(io::Error::other("a folder cannot be opened")),
                    Ok(_) => {}
                }
            }
            Component::ParentDir => _ = walked.pop(),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn texts_are_cleaned_as_go_does() {
        for (given, cleaned) in [
            ("/a//b/./c/../d/", "/a/b/d"),
            ("/", "/"),
            ("/..", "/"),
            ("/../../a", "/a"),
            ("", "."),
            ("a/..", "."),
            ("../a/../..", "../.."),
            ("a/./b", "a/b"),
        ] {
            assert_eq!(clean(given), cleaned, "{given}");
        }
    }

    #[test]
    fn links_out_of_a_root_stay_in_it_and_out_of_a_folder_are_refused() {
        let base = tempfile::tempdir().unwrap();
        let root = base.path().join("root");
        std::fs::create_dir_all(root.join("deep")).unwrap();
        std::fs::write(base.path().join("secret"), "outside").unwrap();
        symlink("../../secret", root.join("deep/link")).unwrap();
        symlink("/deep", root.join("absolute")).unwrap();
        symlink("deep", root.join("beside")).unwrap();
        let folder = File::open(&root).unwrap();
        let within = |path: &str| open_within(&folder, Path::new(path), OFlags::PATH);
        assert!(within("/deep/link").is_err(), "`..` stops at the root");
        assert!(within("/absolute").is_ok());
        std::fs::write(root.join("secret"), "inside").unwrap();
        assert!(within("/deep/link").is_ok());
        let beneath = |path: &str| open_beneath(&folder, Path::new(path), OFlags::PATH);
        assert!(beneath("deep/link").is_err());
        assert!(beneath("absolute").is_err());
        assert!(beneath("../secret").is_err());
        assert!(beneath("beside").is_ok());

        make_folders(&folder, Path::new("/absolute/x/../y/z")).unwrap();
        assert!(root.join("deep/y/z").is_dir());
        make_folders(&folder, Path::new("/secret/x")).unwrap();
        assert!(root.join("secret").is_file());
    }
}
