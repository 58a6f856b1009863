//! Any operations in any order have the results that the host's own file system gives for the same calls.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use rustix::io::Errno;

use super::guest::Guest;
use super::{ROOT, folder, spec};

#[derive(Clone, Debug)]
enum Step {
    Create(usize, Vec<u8>),
    MakeFolder(usize),
    Link(usize, usize),
    Symlink(usize),
    /// Also in exchange, or only if nothing is there.
    Rename(usize, usize, u32),
    Pipe(usize),
    Permissions(usize, u32),
    Unlink(usize),
    RemoveFolder(usize),
    Truncate(usize, u64),
    Append(usize, Vec<u8>),
    ForgetAll,
    /// The machine is saved and goes on elsewhere.
    Move,
}

/// The names there are: two at the top, three in each of two folders that may be there, and some deeper.
const PATHS: [&str; 12] =
    ["a", "b", "a/x", "a/y", "a/z", "b/x", "b/y", "b/z", "a/x/m", "a/x/n", "b/x/m", "b/x/m/deep"];
/// So few that the server has to find files again.
const DESCRIPTORS_MAX: usize = 32;

fn step() -> impl Strategy<Value = Step> {
    let path = 0..PATHS.len();
    let data = || prop::collection::vec(any::<u8>(), 0..64);
    prop_oneof![
        3 => (path.clone(), data()).prop_map(|(path, data)| Step::Create(path, data)),
        3 => path.clone().prop_map(Step::MakeFolder),
        2 => (path.clone(), path.clone()).prop_map(|(from, to)| Step::Link(from, to)),
        1 => path.clone().prop_map(Step::Symlink),
        4 => (path.clone(), path.clone(), 0..3u32)
            .prop_map(|(from, to, flags)| Step::Rename(from, to, flags)),
        1 => path.clone().prop_map(Step::Pipe),
        1 => (path.clone(), 0..0o1000u32).prop_map(|(path, mode)| Step::Permissions(path, mode)),
        2 => path.clone().prop_map(Step::Unlink),
        1 => path.clone().prop_map(Step::RemoveFolder),
        2 => (path.clone(), 0..200u64).prop_map(|(path, size)| Step::Truncate(path, size)),
        2 => (path.clone(), data()).prop_map(|(path, data)| Step::Append(path, data)),
        1 => Just(Step::ForgetAll),
        1 => Just(Step::Move),
    ]
}

/// The guest goes to a path as its kernel does: step by step.
struct Walker {
    guest: Guest,
}

impl Walker {
    fn node(&self, path: &str) -> Result<u64, Errno> {
        match path.rsplit_once('/') {
            None if path.is_empty() => Ok(self.guest.lookup(ROOT, "one")?.node),
            _ => {
                let (folder, name) = self.place(path)?;
                Ok(self.guest.lookup(folder, name)?.node)
            }
        }
    }

    fn place<'a>(&self, path: &'a str) -> Result<(u64, &'a str), Errno> {
        let (folder, name) = path.rsplit_once('/').unwrap_or(("", path));
        let node = self.node(folder)?;
        match self.guest.attributes(node)?.mode & 0o170000 {
            // All links lead nowhere; it is the guest's kernel that follows them.
            0o120000 => Err(Errno::NOENT),
            0o040000 => Ok((node, name)),
            _ => Err(Errno::NOTDIR),
        }
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
                // The guest's kernel looks first.
                match guest.lookup(folder, name) {
                    Ok(_) => Err(Errno::EXIST),
                    Err(_) => guest.link(node, folder, name).map(drop),
                }
            }
            Step::Symlink(path) => {
                let (folder, name) = self.place(PATHS[*path])?;
                guest.symbolic_link(folder, name, "nowhere").map(drop)
            }
            Step::Rename(from, to, flags) => {
                let (from, to) = (self.place(PATHS[*from])?, self.place(PATHS[*to])?);
                guest.rename(from, to, *flags)
            }
            Step::Pipe(path) => {
                let (folder, name) = self.place(PATHS[*path])?;
                guest.make_node(folder, name, 0o010644).map(drop)
            }
            Step::Permissions(path, mode) => {
                // The owner keeps the right to look into folders: as another user than root the host would not.
                guest.change(self.node(PATHS[*path])?, 1, (mode | 0o700, 0, 0, 0)).map(drop)
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
            Step::Move => unreachable!("the test does it"),
        }
    }
}

/// The same on the host.
fn run_on_host(root: &Path, step: &Step) -> Result<(), Errno> {
    use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, RenameFlags};
    let path = |index: &usize| root.join(PATHS[*index]);
    let open = |path: PathBuf, flags| {
        rustix::fs::open(path, flags | OFlags::NOFOLLOW | OFlags::NONBLOCK, Mode::from_raw_mode(0o644))
    };
    match step {
        Step::Create(at, data) => {
            let file = open(path(at), OFlags::RDWR | OFlags::CREATE | OFlags::EXCL)?;
            rustix::io::pwrite(file, data, 0).map(drop)
        }
        Step::MakeFolder(at) => rustix::fs::mkdir(path(at), Mode::from_raw_mode(0o755)),
        Step::Link(from, to) => rustix::fs::linkat(CWD, path(from), CWD, path(to), AtFlags::empty()),
        Step::Symlink(at) => rustix::fs::symlink("nowhere", path(at)),
        Step::Rename(from, to, flags) => {
            rustix::fs::renameat_with(CWD, path(from), CWD, path(to), RenameFlags::from_bits_retain(*flags))
        }
        Step::Pipe(at) => rustix::fs::mknodat(CWD, path(at), FileType::Fifo, Mode::from_raw_mode(0o644), 0),
        Step::Permissions(at, mode) => {
            let kind = FileType::from_raw_mode(rustix::fs::lstat(path(at))?.st_mode);
            match kind {
                // They have none of their own; the guest's kernel does not ask.
                FileType::Symlink => Ok(()),
                _ => rustix::fs::chmod(path(at), Mode::from_raw_mode(mode | 0o700)),
            }
        }
        Step::Unlink(at) => rustix::fs::unlink(path(at)),
        Step::RemoveFolder(at) => rustix::fs::rmdir(path(at)),
        Step::Truncate(at, size) => rustix::fs::ftruncate(open(path(at), OFlags::WRONLY)?, *size),
        Step::Append(at, data) => {
            let file = open(path(at), OFlags::WRONLY)?;
            let end = rustix::fs::fstat(&file)?.st_size as u64;
            rustix::io::pwrite(file, data, end).map(drop)
        }
        Step::ForgetAll | Step::Move => Ok(()),
    }
}

/// What is below a folder: kind and permissions, links and content by path.
type Tree = BTreeMap<PathBuf, (u32, u64, Vec<u8>)>;

fn tree(root: &Path) -> Tree {
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
            } else if metadata.is_symlink() {
                content = fs::read_link(&path).unwrap().into_os_string().into_encoded_bytes();
            }
            all.insert(path.strip_prefix(root).unwrap().to_owned(), (metadata.mode(), links, content));
        }
    }
    all
}

impl Walker {
    /// The same as the guest sees it.
    fn tree(&self) -> Tree {
        let mut all = BTreeMap::new();
        let mut folders = vec![String::new()];
        while let Some(folder) = folders.pop() {
            let node = self.node(&folder).unwrap();
            let listed = self.guest.names(node);
            let found = self.guest.names_plus(node);
            assert!(listed.iter().eq(found.iter().map(|(name, _)| name)), "{listed:?} {found:?}");
            for (name, entry) in found.iter().filter(|(name, _)| name != "." && name != "..") {
                let path = format!("{folder}/{name}");
                let shown = entry.attributes;
                let (mut links, mut content) = (shown.links.into(), Vec::new());
                match shown.mode & 0o170000 {
                    0o040000 => {
                        folders.push(path.clone());
                        links = 0;
                    }
                    0o100000 => {
                        let handle = self.guest.open(entry.node, 0).unwrap();
                        content = self.guest.read(handle, 0, 1 << 16).unwrap();
                        self.guest.release(handle);
                    }
                    0o120000 => content = self.guest.ask(5, entry.node, &[]).unwrap(),
                    _ => {}
                }
                all.insert(path.trim_start_matches('/').into(), (shown.mode, links, content));
            }
        }
        all
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn a_share_behaves_like_the_hosts_file_system(steps in prop::collection::vec(step(), 1..80)) {
        let (inside, beside) = (folder(), folder());
        let guest = Guest::with_descriptors(DESCRIPTORS_MAX);
        guest.server.add(spec("one", inside.path())).unwrap();
        let mut walker = Walker { guest };
        for step in &steps {
            if matches!(step, Step::Move) {
                walker.guest = walker.guest.moved([spec("one", inside.path())]);
                continue;
            }
            prop_assert_eq!(walker.run(step), run_on_host(beside.path(), step), "{:?}", step);
        }
        let made = tree(beside.path());
        prop_assert_eq!(&tree(inside.path()), &made);
        prop_assert_eq!(&walker.tree(), &made);
        walker.guest.server.reset();
        prop_assert_eq!(walker.guest.server.held(), (0, 0));
    }
}
