//! Any operations in any order have the results that the host's own file system gives for the same calls.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use rustix::io::Errno;

use super::files::shared;
use super::guest::Guest;
use super::{ROOT, folder};

#[derive(Clone, Debug)]
enum Step {
    Create(usize, Vec<u8>),
    MakeFolder(usize),
    Link(usize, usize),
    Symlink(usize),
    Rename(usize, usize),
    Unlink(usize),
    RemoveFolder(usize),
    Truncate(usize, u64),
    Append(usize, Vec<u8>),
    ForgetAll,
}

/// The names there are: two at the top, three in each of two folders that may be there.
const PATHS: [&str; 8] = ["a", "b", "a/x", "a/y", "a/z", "b/x", "b/y", "b/z"];

fn step() -> impl Strategy<Value = Step> {
    let path = 0..PATHS.len();
    let data = || prop::collection::vec(any::<u8>(), 0..64);
    prop_oneof![
        3 => (path.clone(), data()).prop_map(|(path, data)| Step::Create(path, data)),
        3 => path.clone().prop_map(Step::MakeFolder),
        2 => (path.clone(), path.clone()).prop_map(|(from, to)| Step::Link(from, to)),
        1 => path.clone().prop_map(Step::Symlink),
        3 => (path.clone(), path.clone()).prop_map(|(from, to)| Step::Rename(from, to)),
        2 => path.clone().prop_map(Step::Unlink),
        1 => path.clone().prop_map(Step::RemoveFolder),
        2 => (path.clone(), 0..200u64).prop_map(|(path, size)| Step::Truncate(path, size)),
        2 => (path.clone(), data()).prop_map(|(path, data)| Step::Append(path, data)),
        1 => Just(Step::ForgetAll),
    ]
}

/// The guest goes to a path as its kernel does: step by step.
struct Walker {
    guest: Guest,
}

impl Walker {
    fn node(&self, path: &str) -> Result<u64, Errno> {
        let mut node = self.guest.lookup(ROOT, "one")?.node;
        for name in path.split('/').filter(|name| !name.is_empty()) {
            node = self.guest.lookup(node, name)?.node;
        }
        Ok(node)
    }

    fn place<'a>(&self, path: &'a str) -> Result<(u64, &'a str), Errno> {
        let (folder, name) = path.rsplit_once('/').unwrap_or(("", path));
        Ok((self.node(folder)?, name))
    }

    fn run(&self, step: &Step) -> Result<(), Errno> {
        let guest = &self.guest;
        match step {
            Step::Create(path, data) => {
                let (folder, name) = self.place(PATHS[*path])?;
                let (_, handle) = guest.create(folder, name, 2 | 0o200, 0o644)?;
                guest.write(handle, 0, data)?;
                guest.release(handle);
                Ok(())
            }
            Step::MakeFolder(path) => {
                let (folder, name) = self.place(PATHS[*path])?;
                guest.make_folder(folder, name, 0o755).map(drop)
            }
            Step::Link(from, to) => {
                let (node, (folder, name)) = (self.node(PATHS[*from])?, self.place(PATHS[*to])?);
                guest.link(node, folder, name).map(drop)
            }
            Step::Symlink(path) => {
                let (folder, name) = self.place(PATHS[*path])?;
                guest.symbolic_link(folder, name, "nowhere").map(drop)
            }
            Step::Rename(from, to) => {
                let (from, to) = (self.place(PATHS[*from])?, self.place(PATHS[*to])?);
                guest.rename(from, to, 0)
            }
            Step::Unlink(path) => {
                let (folder, name) = self.place(PATHS[*path])?;
                guest.unlink(folder, name)
            }
            Step::RemoveFolder(path) => {
                let (folder, name) = self.place(PATHS[*path])?;
                guest.remove_folder(folder, name)
            }
            Step::Truncate(path, size) => {
                let node = self.node(PATHS[*path])?;
                guest.change(node, 1 << 3, (0, 0, 0, *size)).map(drop)
            }
            Step::Append(path, data) => {
                let node = self.node(PATHS[*path])?;
                let handle = guest.open(node, 1)?;
                let end = guest.attributes(node)?.size;
                guest.write(handle, end, data)?;
                guest.release(handle);
                Ok(())
            }
            Step::ForgetAll => {
                guest.server.reset();
                Ok(())
            }
        }
    }
}

/// The same on the host.
fn run_on_host(root: &Path, step: &Step) -> Result<(), Errno> {
    use rustix::fs::{AtFlags, CWD, Mode, OFlags};
    let path = |index: &usize| root.join(PATHS[*index]);
    let open =
        |path: PathBuf, flags| rustix::fs::open(path, flags | OFlags::NOFOLLOW, Mode::from_raw_mode(0o644));
    match step {
        Step::Create(at, data) => {
            let file = open(path(at), OFlags::RDWR | OFlags::CREATE | OFlags::EXCL)?;
            rustix::io::pwrite(file, data, 0).map(drop)
        }
        Step::MakeFolder(at) => rustix::fs::mkdir(path(at), Mode::from_raw_mode(0o755)),
        Step::Link(from, to) => rustix::fs::linkat(CWD, path(from), CWD, path(to), AtFlags::empty()),
        Step::Symlink(at) => rustix::fs::symlink("nowhere", path(at)),
        Step::Rename(from, to) => rustix::fs::rename(path(from), path(to)),
        Step::Unlink(at) => rustix::fs::unlink(path(at)),
        Step::RemoveFolder(at) => rustix::fs::rmdir(path(at)),
        Step::Truncate(at, size) => rustix::fs::ftruncate(open(path(at), OFlags::WRONLY)?, *size),
        Step::Append(at, data) => {
            let file = open(path(at), OFlags::WRONLY)?;
            let end = rustix::fs::fstat(&file)?.st_size as u64;
            rustix::io::pwrite(file, data, end).map(drop)
        }
        Step::ForgetAll => Ok(()),
    }
}

/// Everything below a folder: kind, links and content by path.
fn tree(root: &Path) -> BTreeMap<PathBuf, (u32, u64, Vec<u8>)> {
    use std::os::unix::fs::MetadataExt;
    let mut all = BTreeMap::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let metadata = fs::symlink_metadata(&path).unwrap();
            let mut content = Vec::new();
            let mut links = metadata.nlink();
            if metadata.is_dir() {
                folders.push(path.clone());
                // File systems count folders in a folder differently.
                links = 0;
            } else if metadata.is_file() {
                content = fs::read(&path).unwrap();
            }
            all.insert(path.strip_prefix(root).unwrap().to_owned(), (metadata.mode(), links, content));
        }
    }
    all
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn a_share_behaves_like_the_hosts_file_system(steps in prop::collection::vec(step(), 1..60)) {
        let (inside, guest, _) = shared();
        let beside = folder();
        let walker = Walker { guest };
        for step in &steps {
            let (ours, theirs) = (walker.run(step), run_on_host(beside.path(), step));
            prop_assert_eq!(ours.is_ok(), theirs.is_ok(), "{:?}: {:?} and {:?}", step, ours, theirs);
        }
        prop_assert_eq!(tree(inside.path()), tree(beside.path()));
        walker.guest.server.reset();
        prop_assert_eq!(walker.guest.server.held(), (0, 0));
    }
}
