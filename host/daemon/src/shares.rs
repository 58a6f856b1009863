//! Which folders of the host the machine is offered, and where in it a path of the host is.
//!
//! Offered are the user's home folder and the folder for temporary files, and what the settings add. A path is looked at
//! with its links followed, so what counts is where it really is. Folders that are missing are made as the user.

use std::ffi::OsString;
use std::io;
use std::path::{Component, Path, PathBuf};

use guest_protocol::share;
use guest_protocol::{BindPlace, BindSource};
use host_vmm::ShareSpec;

use crate::settings::ShareSettings;

/// What to do about a folder that is not offered.
const CURE: &str = "add it to `paths` below `[shares]` in `settings.toml` and run `engine machine restart`";

/// The folders that one machine is offered.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Shares {
    /// By name, each with its real path.
    offered: Vec<(String, PathBuf)>,
    /// The socket that Docker clients use.
    socket: PathBuf,
}

impl Shares {
    /// What the settings say, as far as it is there. `environment` tells where home and temporary files are, `socket` is
    /// the one that Docker clients use.
    pub(crate) fn new(
        settings: &ShareSettings,
        socket: &Path,
        environment: impl Fn(&str) -> Option<OsString>,
    ) -> Self {
        let folder = |name: &str| environment(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let mut wanted: Vec<(String, PathBuf)> = Vec::new();
        if settings.defaults {
            wanted.extend(folder("HOME").map(|home| ("home".to_owned(), home)));
            wanted.push(("tmp".into(), "/tmp".into()));
            wanted.extend(folder("TMPDIR").map(|folder| ("temporary".to_owned(), folder)));
        }
        let added = settings.paths.iter().enumerate();
        wanted.extend(added.map(|(number, path)| (format!("share{number}"), path.clone())));
        let socket = socket.canonicalize().unwrap_or_else(|_| socket.to_owned());
        let mut shares = Self { offered: Vec::new(), socket };
        for (name, path) in wanted {
            match path.canonicalize() {
                Ok(path) if shares.offered.iter().any(|(_, other)| *other == path) => {}
                Ok(path) if path.is_dir() => shares.offered.push((name, path)),
                Ok(_) => tracing::warn!(path = %path.display(), "is not shared: it is no folder"),
                Err(error) => tracing::warn!(path = %path.display(), %error, "is not shared"),
            }
        }
        shares
    }

    /// For the machine.
    pub(crate) fn specs(&self) -> Vec<ShareSpec> {
        let spec = |(name, path): &(String, PathBuf)| ShareSpec {
            name: name.clone(),
            path: path.clone(),
            read_only: false,
        };
        self.offered.iter().map(spec).collect()
    }

    /// Where in the machine a path of the host is. Blocks for as long as the file system takes.
    pub(crate) fn locate(&self, source: &BindSource) -> BindPlace {
        let path = Path::new(&source.path);
        let refused = |why: String| BindPlace::Refused { why };
        let steps = path.components().skip(1).all(|step| matches!(step, Component::Normal(_)));
        if !path.is_absolute() || !steps || source.path.contains('\0') {
            return refused(format!("`{}` is no absolute path", source.path));
        }
        let (real, is_there) = match resolve(path) {
            Ok(resolved) => resolved,
            Err(error) => {
                return refused(format!("cannot look at `{}` on the host: {error}", path.display()));
            }
        };
        if real == self.socket {
            return BindPlace::Engine;
        }
        // The innermost one: another may lie in it.
        let offered = self.offered.iter().filter(|(_, root)| real.starts_with(root));
        let Some((name, root)) = offered.max_by_key(|(_, root)| root.as_os_str().len()) else {
            let same = if real == path { String::new() } else { format!(" (it is `{}`)", real.display()) };
            let why = format!("the path `{}`{same} is not shared with the machine: {CURE}", path.display());
            return if is_there { refused(why) } else { BindPlace::Nowhere { why } };
        };
        let below = real.strip_prefix(root).unwrap_or(Path::new(""));
        // Without an ending slash, which a mount of a file would not take.
        let place: PathBuf =
            Path::new(share::MOUNT).join(name).components().chain(below.components()).collect();
        let Some(place) = place.to_str().map(str::to_owned) else {
            return refused(format!("the name of `{}` is not UTF-8", real.display()));
        };
        if !is_there && !source.create {
            return BindPlace::Missing { path: place };
        }
        if !is_there && let Err(error) = std::fs::create_dir_all(&real) {
            return refused(format!(
                "error while creating mount source path '{}': mkdir {0}: {error}",
                path.display()
            ));
        }
        BindPlace::At { path: place }
    }
}

/// The real path of something that is there, or where it would be made; and whether it is there.
fn resolve(path: &Path) -> io::Result<(PathBuf, bool)> {
    let mut missing: Vec<&std::ffi::OsStr> = Vec::new();
    let mut at = path;
    loop {
        match at.canonicalize() {
            Ok(mut real) => {
                let is_there = missing.is_empty();
                real.extend(missing.iter().rev());
                return Ok((real, is_there));
            }
            // A link to nowhere: what is made would not be where it leads.
            Err(error) if error.kind() == io::ErrorKind::NotFound && at.symlink_metadata().is_err() => {
                let (Some(parent), Some(name)) = (at.parent(), at.file_name()) else { return Err(error) };
                missing.push(name);
                at = parent;
            }
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shares(root: &Path) -> Shares {
        let settings = ShareSettings { defaults: false, paths: vec![root.join("home"), root.join("absent")] };
        Shares::new(&settings, &root.join("home/docker.sock"), |_| None)
    }

    fn folder() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().canonicalize().unwrap();
        std::fs::create_dir_all(root.join("home/src")).unwrap();
        std::fs::create_dir(root.join("secret")).unwrap();
        (folder, root)
    }

    fn locate(shares: &Shares, path: &Path, create: bool) -> BindPlace {
        shares.locate(&BindSource { path: path.to_str().unwrap().into(), create })
    }

    #[test]
    fn a_shared_path_is_found_and_a_missing_one_made_on_demand() {
        let (_folder, root) = folder();
        let shares = shares(&root);
        let at = |path: &str| BindPlace::At { path: path.into() };
        assert_eq!(locate(&shares, &root.join("home/src"), false), at("/run/host/share0/src"));
        assert_eq!(locate(&shares, &root.join("home"), false), at("/run/host/share0"));
        assert_eq!(locate(&shares, &root.join("home/docker.sock"), false), BindPlace::Engine);
        let new = root.join("home/a/b");
        let missing = BindPlace::Missing { path: "/run/host/share0/a/b".into() };
        assert_eq!(locate(&shares, &new, false), missing);
        assert!(!root.join("home/a").exists());
        assert_eq!(locate(&shares, &new, true), at("/run/host/share0/a/b"));
        assert!(new.is_dir());
    }

    #[test]
    fn what_counts_is_where_a_path_really_is() {
        let (_folder, root) = folder();
        let shares = shares(&root);
        std::os::unix::fs::symlink(root.join("secret"), root.join("home/out")).unwrap();
        std::os::unix::fs::symlink(root.join("home/src"), root.join("secret/in")).unwrap();
        std::os::unix::fs::symlink("nowhere", root.join("home/dangling")).unwrap();
        let refused = |path: &Path| match locate(&shares, path, true) {
            BindPlace::Refused { why } => why,
            other => panic!("{other:?}"),
        };
        assert!(refused(&root.join("home/out")).contains("is not shared with the machine: add it to"));
        let nowhere = locate(&shares, &root.join("home/out/new"), true);
        assert!(matches!(nowhere, BindPlace::Nowhere { why } if why.contains("is not shared")));
        assert!(!root.join("secret/new").exists());
        assert!(refused(&root.join("secret")).contains("engine machine restart"));
        assert!(refused(&root.join("home/dangling/x")).contains("cannot look at"));
        assert!(refused(Path::new("/home/../etc")).contains("no absolute path"));
        assert!(refused(Path::new("relative")).contains("no absolute path"));
        let inside = locate(&shares, &root.join("secret/in"), false);
        assert_eq!(inside, BindPlace::At { path: "/run/host/share0/src".into() });
    }

    #[test]
    fn home_and_temporary_files_are_offered_once() {
        let (_folder, root) = folder();
        let home = root.join("home").into_os_string();
        let environment = |name: &str| match name {
            "HOME" => Some(home.clone()),
            "TMPDIR" => Some("/tmp".into()),
            _ => None,
        };
        let shares = Shares::new(&ShareSettings::default(), Path::new("/none"), environment);
        let names: Vec<&str> = shares.offered.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["home", "tmp"]);
    }
}
