//! The root file system as `rootfs/contents.list` describes it, gathered from three places: static programs of ours, files
//! in `rootfs/`, and installed Debian packages.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};

use crate::elf::Elf;
use crate::hello;
use crate::list::{self, Item};
use crate::package;
use crate::tree::{Node, Tree};

/// Where Debian keeps the libraries of this architecture, on the build machine and in the image alike.
const LIBRARIES: &str = "/usr/lib/x86_64-linux-gnu";
const CERTIFICATES: &str = "/usr/share/ca-certificates/mozilla";

/// Everything in the root but the kernel's modules, and where it came from.
pub(crate) struct Root {
    pub(crate) tree: Tree,
    /// Digests of our programs by name.
    pub(crate) programs: BTreeMap<String, String>,
    /// Versions of the Debian packages by name.
    pub(crate) packages: BTreeMap<String, String>,
    /// Container images by name: archives for those who run the engine without the VM.
    pub(crate) images: BTreeMap<String, Vec<u8>>,
}

/// Gathers the root from the list in `source` and the static programs in `programs`.
pub(crate) fn gather(source: &Path, programs: &Path) -> Result<Root> {
    let path = source.join("contents.list");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read `{}`", path.display()))?;
    let items = list::contents(&text).with_context(|| path.display().to_string())?;
    let mut gatherer = Gatherer::new(source, programs);
    for item in &items {
        gatherer.add(item).with_context(|| format!("`{item}` of `{}`", path.display()))?;
    }
    let files: Vec<_> = gatherer.debian_files.into_iter().collect();
    Ok(Root {
        tree: gatherer.tree,
        programs: gatherer.digests,
        packages: package::owners(&files)?,
        images: gatherer.images,
    })
}

struct Gatherer<'a> {
    source: &'a Path,
    programs: &'a Path,
    tree: Tree,
    digests: BTreeMap<String, String>,
    images: BTreeMap<String, Vec<u8>>,
    /// Files whose packages are asked for: one of each tree, every tool and library.
    debian_files: BTreeSet<PathBuf>,
}

impl<'a> Gatherer<'a> {
    fn new(source: &'a Path, programs: &'a Path) -> Self {
        Self {
            source,
            programs,
            tree: Tree::default(),
            digests: BTreeMap::new(),
            images: BTreeMap::new(),
            debian_files: BTreeSet::new(),
        }
    }

    fn add(&mut self, item: &Item) -> Result<()> {
        match item {
            Item::Directory { path, mode } => self.tree.insert(path, *mode, Node::Directory),
            Item::Link { path, target } => self.tree.insert(path, 0o777, Node::Link(target.clone())),
            Item::Character { path, major, minor, mode } => {
                self.tree.insert(path, *mode, Node::Character { major: *major, minor: *minor })
            }
            Item::File { path, mode } => {
                let content = read(&self.source.join(path.trim_start_matches('/')))?;
                self.tree.insert(path, *mode, Node::File(content))
            }
            Item::Program { path, name } => {
                let content = self.program(name)?;
                self.tree.insert(path, 0o755, Node::File(content))
            }
            Item::Tool { path } => self.tool(path),
            Item::Tree { path } => self.folder(path),
            Item::Certificates { path } => self.certificates(path),
            Item::Image { path, name } => {
                let image = hello::image(name, &self.program(name)?)?;
                self.images.insert(name.clone(), image.clone());
                self.tree.insert(path, 0o644, Node::File(image))
            }
        }
    }

    /// A program of ours. It must be static: the root holds only the libraries of Debian's tools.
    fn program(&mut self, name: &str) -> Result<Vec<u8>> {
        let path = self.programs.join(name);
        let content = read(&path)?;
        let elf = Elf::parse(&content).with_context(|| format!("`{}`", path.display()))?;
        if let Some(interpreter) = elf.interpreter()? {
            bail!("`{}` is not static: it wants the interpreter `{interpreter}`", path.display());
        }
        self.digests.insert(name.to_owned(), digest(&content));
        Ok(content)
    }

    /// A program of the build machine and, by breadth, the libraries that it and they name.
    fn tool(&mut self, path: &str) -> Result<()> {
        let mut wanted = VecDeque::from([path.to_owned()]);
        let mut seen = BTreeSet::new();
        while let Some(path) = wanted.pop_front() {
            if !seen.insert(path.clone()) {
                continue;
            }
            let content = read(Path::new(&path))?;
            let elf = Elf::parse(&content).with_context(|| format!("`{path}`"))?;
            wanted.extend(elf.interpreter()?.map(str::to_owned));
            // The interpreter is also a library that others name; it is at its own place already.
            let libraries = elf.needed()?.into_iter().filter(|name| !name.starts_with("ld-linux"));
            wanted.extend(libraries.map(|name| format!("{LIBRARIES}/{name}")));
            self.note_owner(Path::new(&path))?;
            self.tree.insert(&path, 0o755, Node::File(content))?;
        }
        Ok(())
    }

    /// A folder of data files. Links stay links when they are relative, and become what they point at when not.
    fn folder(&mut self, path: &str) -> Result<()> {
        let mut folders = vec![PathBuf::from(path)];
        let mut files = Vec::new();
        while let Some(folder) = folders.pop() {
            for entry in
                fs::read_dir(&folder).with_context(|| format!("cannot list `{}`", folder.display()))?
            {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    folders.push(entry.path());
                } else {
                    files.push(entry.path());
                }
            }
        }
        files.sort();
        for file in &files {
            let name = file.to_str().with_context(|| format!("`{}` is not text", file.display()))?;
            match fs::read_link(file) {
                Ok(target) if target.is_relative() => {
                    let target = target
                        .to_str()
                        .with_context(|| format!("`{name}` points at a name that is not text"))?;
                    self.tree.insert(name, 0o777, Node::Link(target.to_owned()))?;
                }
                _ => self.tree.insert(name, 0o644, Node::File(read(file)?))?,
            }
        }
        let first = files.first().with_context(|| format!("the folder `{path}` is empty"))?;
        self.note_owner(first)
    }

    /// Debian's authorities, not the machine's list, which may hold a company's own.
    fn certificates(&mut self, path: &str) -> Result<()> {
        let mut bundle = Vec::new();
        let folder = Path::new(CERTIFICATES);
        let mut files = fs::read_dir(folder)
            .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>())
            .with_context(|| {
                format!("cannot list `{CERTIFICATES}`; the Debian package ca-certificates holds it")
            })?;
        files.retain(|file| file.extension().is_some_and(|extension| extension == "crt"));
        files.sort();
        for file in &files {
            let certificate = read(file)?;
            ensure!(
                certificate.starts_with(b"-----BEGIN CERTIFICATE"),
                "`{}` is no certificate",
                file.display()
            );
            bundle.extend_from_slice(&certificate);
            if !certificate.ends_with(b"\n") {
                bundle.push(b'\n');
            }
        }
        self.note_owner(files.first().with_context(|| format!("no certificate in `{CERTIFICATES}`"))?)?;
        self.tree.insert(path, 0o644, Node::File(bundle))
    }

    fn note_owner(&mut self, path: &Path) -> Result<()> {
        // Packages own files by their real folder; links such as /lib64 are older names of it.
        let parent = path.parent().with_context(|| format!("`{}` has no folder", path.display()))?;
        let name = path.file_name().with_context(|| format!("`{}` has no name", path.display()))?;
        let parent =
            fs::canonicalize(parent).with_context(|| format!("cannot find `{}`", parent.display()))?;
        self.debian_files.insert(parent.join(name));
        Ok(())
    }
}

/// Digest of some bytes, in hexadecimal.
pub(crate) fn digest(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read `{}`", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tool_brings_its_interpreter_and_every_library() {
        let mut gatherer = Gatherer::new(Path::new("/nonexistent"), Path::new("/nonexistent"));
        for (path, target) in [("/lib64", "usr/lib64"), ("/lib", "usr/lib")] {
            gatherer.add(&Item::Link { path: path.into(), target: target.into() }).unwrap();
        }
        gatherer.add(&Item::Tool { path: "/usr/bin/dpkg-query".into() }).unwrap();
        let paths: Vec<&str> = gatherer.tree.iter().map(|(path, _)| path).collect();
        for path in
            ["usr/bin/dpkg-query", "usr/lib64/ld-linux-x86-64.so.2", "usr/lib/x86_64-linux-gnu/libc.so.6"]
        {
            assert!(paths.contains(&path), "{path} is missing from {paths:?}");
        }
    }

    #[test]
    fn a_dynamic_program_is_refused() {
        let mut gatherer = Gatherer::new(Path::new("/nonexistent"), Path::new("/usr/bin"));
        let error = gatherer.program("dpkg-query").unwrap_err().to_string();
        assert!(error.starts_with("`/usr/bin/dpkg-query` is not static"), "{error}");
    }

    #[test]
    fn what_is_missing_is_named() {
        let mut gatherer = Gatherer::new(Path::new("/nonexistent"), Path::new("/nonexistent"));
        let error = gatherer.add(&Item::Program { path: "/init".into(), name: "init".into() }).unwrap_err();
        assert_eq!(error.to_string(), "cannot read `/nonexistent/init`");
    }
}
