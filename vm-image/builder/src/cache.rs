//! The folder outside the checkout that keeps what was made, by the hash of what it was made from:
//!
//! ```text
//! ${XDG_CACHE_HOME:-~/.cache}/engine/
//!   vm-image/<hash>/   finished VM images
//!   kernel/<hash>/     kernels of our own
//!   packages/          downloaded Debian packages
//! ```
//!
//! A folder appears whole or not at all: it is filled under a temporary name, synced and renamed. Locks, which die with
//! their process, keep concurrent builders from doing the same work twice; correctness does not depend on them.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::SystemTime;
use std::{env, io, process};

use anyhow::{Context, Result};
use rustix::fs::FlockOperation;

/// Finished images kept beside the newest; a checkout links to one, and few machines have more checkouts.
const IMAGES_KEPT: usize = 8;
const UNFINISHED: &str = ".unfinished-";

pub(crate) struct Cache {
    root: PathBuf,
}

/// While this lives, no other builder does the same kind of work in this cache.
pub(crate) struct Lock {
    _file: File,
}

impl Cache {
    /// Opens the cache at `root`, or at its place under the user's cache folder.
    pub(crate) fn open(root: Option<PathBuf>) -> Result<Self> {
        let root = match root {
            Some(root) => root,
            None => user_cache()?.join("engine"),
        };
        fs::create_dir_all(&root)
            .with_context(|| format!("cannot make the cache folder `{}`", root.display()))?;
        let root =
            fs::canonicalize(&root).with_context(|| format!("cannot open the cache `{}`", root.display()))?;
        Ok(Self { root })
    }

    /// Takes the lock for one kind of work, calling `waiting` first if someone else has it.
    pub(crate) fn lock(&self, work: &str, waiting: impl FnOnce()) -> Result<Lock> {
        let path = self.root.join(format!("{work}.lock"));
        let file =
            File::create(&path).with_context(|| format!("cannot open the lock `{}`", path.display()))?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                waiting();
                rustix::fs::flock(&file, FlockOperation::LockExclusive)
                    .with_context(|| format!("cannot lock `{}`", path.display()))?;
            }
            Err(error) => return Err(error).with_context(|| format!("cannot lock `{}`", path.display())),
        }
        Ok(Lock { _file: file })
    }

    /// The folder for one kind of thing, such as `packages`.
    pub(crate) fn folder(&self, kind: &str) -> Result<PathBuf> {
        let folder = self.root.join(kind);
        fs::create_dir_all(&folder).with_context(|| format!("cannot make `{}`", folder.display()))?;
        Ok(folder)
    }

    /// The finished folder of `kind` with this hash, if there is one. Marks it as used now.
    pub(crate) fn find(&self, kind: &str, hash: &str) -> Result<Option<PathBuf>> {
        let folder = self.root.join(kind).join(hash);
        if !folder.is_dir() {
            return Ok(None);
        }
        // A cache that another user filled is still good to read; only its order of use is then unknown.
        if let Ok(handle) = File::open(&folder) {
            match handle.set_modified(SystemTime::now()) {
                Err(error) if error.kind() != io::ErrorKind::PermissionDenied => {
                    return Err(error).with_context(|| format!("cannot mark `{}` as used", folder.display()));
                }
                _ => {}
            }
        }
        Ok(Some(folder))
    }

    /// Fills a new folder of `kind` with `fill` and publishes it under its hash.
    pub(crate) fn publish(
        &self,
        kind: &str,
        hash: &str,
        fill: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let parent = self.folder(kind)?;
        let unfinished = parent.join(format!("{UNFINISHED}{}-{hash}", process::id()));
        fs::create_dir(&unfinished).with_context(|| format!("cannot make `{}`", unfinished.display()))?;
        let finished = parent.join(hash);
        let published = fill(&unfinished).and_then(|()| {
            sync_folder(&unfinished)?;
            match fs::rename(&unfinished, &finished) {
                Ok(()) => sync(&parent),
                // Somebody without the lock was faster with the same bytes.
                Err(_) if finished.is_dir() => remove(&unfinished),
                Err(error) => Err(error).with_context(|| format!("cannot publish `{}`", finished.display())),
            }
        });
        if let Err(error) = published {
            let _: Result<()> = remove(&unfinished);
            return Err(error);
        }
        Ok(finished)
    }

    /// Removes what crashed builders left and all but the images used last.
    pub(crate) fn prune(&self, kind: &str) -> Result<()> {
        let mut finished = Vec::new();
        let folder = self.folder(kind)?;
        for entry in fs::read_dir(&folder).with_context(|| format!("cannot list `{}`", folder.display()))? {
            let entry = entry?;
            if let Some(rest) = entry.file_name().to_string_lossy().strip_prefix(UNFINISHED) {
                let builder = rest.split('-').next().unwrap_or(rest);
                if !Path::new("/proc").join(builder).exists() {
                    remove(&entry.path())?;
                }
            } else if entry.file_type()?.is_dir() {
                finished.push((entry.metadata()?.modified()?, entry.path()));
            }
        }
        finished.sort();
        for (_, path) in finished.iter().rev().skip(IMAGES_KEPT) {
            remove(path)?;
        }
        Ok(())
    }
}

/// Points `link` at `target`, replacing an older link in one step.
pub(crate) fn link(link: &Path, target: &Path) -> Result<()> {
    if fs::read_link(link).is_ok_and(|current| current == target) {
        return Ok(());
    }
    let name = link.file_name().with_context(|| format!("`{}` names no file", link.display()))?;
    let temporary = link.with_file_name(format!(".{}.{}", name.to_string_lossy(), process::id()));
    std::os::unix::fs::symlink(target, &temporary)
        .with_context(|| format!("cannot make the link `{}`", temporary.display()))?;
    fs::rename(&temporary, link).or_else(|error| {
        fs::remove_file(&temporary)?;
        Err(error).with_context(|| format!("cannot put the link `{}` in place", link.display()))
    })
}

fn user_cache() -> Result<PathBuf> {
    let folder = env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    folder
        .or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cache")))
        .context("neither XDG_CACHE_HOME nor HOME is set; name the cache folder with --cache")
}

fn remove(folder: &Path) -> Result<()> {
    fs::remove_dir_all(folder).with_context(|| format!("cannot remove `{}`", folder.display()))
}

fn sync_folder(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        sync(&entry?.path())?;
    }
    sync(folder)
}

fn sync(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|file| file.sync_all())
        .with_context(|| format!("cannot write `{}` to disk", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A cache in a folder of its own that goes with the test.
    struct Fixture {
        cache: Cache,
    }

    impl Fixture {
        fn new(name: &str) -> Self {
            let root = env::temp_dir().join(format!("vm-image-cache-{name}-{}", process::id()));
            Self { cache: Cache::open(Some(root)).unwrap() }
        }
    }

    impl Drop for Fixture {
        fn drop(&mut self) {
            remove(&self.cache.root).unwrap();
        }
    }

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn what_is_published_is_found() {
        let Fixture { cache } = &Fixture::new("publish");
        assert_eq!(cache.find("vm-image", "aa").unwrap(), None);
        let path =
            cache.publish("vm-image", "aa", |folder| Ok(fs::write(folder.join("kernel"), "k")?)).unwrap();
        assert_eq!(fs::read(path.join("kernel")).unwrap(), b"k");
        assert_eq!(cache.find("vm-image", "aa").unwrap(), Some(path));
    }

    #[test]
    fn a_failed_build_leaves_nothing() {
        let Fixture { cache } = &Fixture::new("failed");
        let error = cache.publish("vm-image", "aa", |folder| {
            fs::write(folder.join("kernel"), "half")?;
            anyhow::bail!("no space")
        });
        assert_eq!(error.unwrap_err().to_string(), "no space");
        assert!(names(&cache.root.join("vm-image")).is_empty());
    }

    #[test]
    fn publishing_the_same_hash_twice_keeps_the_first() {
        let Fixture { cache } = &Fixture::new("twice");
        for content in ["first", "second"] {
            cache.publish("vm-image", "aa", |folder| Ok(fs::write(folder.join("kernel"), content)?)).unwrap();
        }
        assert_eq!(names(&cache.root.join("vm-image")), ["aa"]);
        assert_eq!(fs::read(cache.root.join("vm-image/aa/kernel")).unwrap(), b"first");
    }

    #[test]
    fn pruning_keeps_the_images_used_last_and_removes_unfinished_ones() {
        let Fixture { cache } = &Fixture::new("prune");
        for number in 0..IMAGES_KEPT + 2 {
            let path = cache.publish("vm-image", &format!("{number:02}"), |_| Ok(())).unwrap();
            let age = std::time::Duration::from_secs(1000 - number as u64);
            File::open(path).unwrap().set_modified(SystemTime::now() - age).unwrap();
        }
        // No process has this number; one that lives may still be at work.
        fs::create_dir(cache.root.join("vm-image/.unfinished-4294967295-99")).unwrap();
        let working = format!(".unfinished-{}-98", process::id());
        fs::create_dir(cache.root.join("vm-image").join(&working)).unwrap();
        cache.find("vm-image", "00").unwrap().unwrap();
        cache.prune("vm-image").unwrap();
        assert_eq!(
            names(&cache.root.join("vm-image")),
            [working.as_str(), "00", "03", "04", "05", "06", "07", "08", "09"]
        );
    }

    #[test]
    fn a_link_is_replaced_in_place() {
        let Fixture { cache } = &Fixture::new("link");
        let path = cache.root.join("vm-image-link");
        for target in ["one", "two", "two"] {
            link(&path, Path::new(target)).unwrap();
        }
        assert_eq!(fs::read_link(&path).unwrap(), Path::new("two"));
        assert_eq!(names(&cache.root), ["vm-image-link"]);
    }

    #[test]
    fn a_second_builder_waits_for_the_first() {
        let fixture = Fixture::new("lock");
        let first = fixture.cache.lock("build", || panic!("nobody else has the lock")).unwrap();
        let (told, waiting) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            let second = scope.spawn(|| fixture.cache.lock("build", || told.send(()).unwrap()).map(drop));
            waiting.recv().unwrap();
            assert!(!second.is_finished());
            drop(first);
            second.join().unwrap().unwrap();
        });
    }
}
