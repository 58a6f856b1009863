//! The root file system as it will be, in memory: paths to nodes, sorted.
//!
//! Owns which nodes exist and that every node has its parent folders. Knows neither where bytes come from (`root`) nor how
//! they are archived (`cpio`).

use std::collections::BTreeMap;

use anyhow::{Result, bail, ensure};
use sha2::{Digest, Sha256};

/// What stands at one path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Node {
    Directory,
    File(Vec<u8>),
    Link(String),
    Character { major: u32, minor: u32 },
}

/// A node and its permission bits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) mode: u32,
    pub(crate) node: Node,
}

/// Sorted paths without a leading slash; a folder always comes before what it holds.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tree {
    entries: BTreeMap<String, Entry>,
}

impl Tree {
    /// Puts a node at an absolute path and makes its missing parents with mode 0755.
    ///
    /// A path leads through links that the tree already holds (`/lib/modules` stands at `usr/lib/modules`).
    pub(crate) fn insert(&mut self, path: &str, mode: u32, node: Node) -> Result<()> {
        let key = self.resolve(path)?;
        if let Some(existing) = self.entries.get_mut(&key) {
            if existing.node == Node::Directory && node == Node::Directory {
                existing.mode = mode;
                return Ok(());
            }
            ensure!(*existing == Entry { mode, node }, "`{path}` is listed twice with different content");
            return Ok(());
        }
        let mut end = 0;
        while let Some(slash) = key[end..].find('/') {
            let parent = &key[..end + slash];
            match self.entries.get(parent) {
                None => {
                    self.entries.insert(parent.to_owned(), Entry { mode: 0o755, node: Node::Directory });
                }
                Some(Entry { node: Node::Directory, .. }) => {}
                Some(_) => bail!("`{path}` lies below `/{parent}`, which is not a folder"),
            }
            end += slash + 1;
        }
        self.entries.insert(key, Entry { mode, node });
        Ok(())
    }

    /// Paths (without a leading slash) and entries in archive order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &Entry)> {
        self.entries.iter().map(|(path, entry)| (path.as_str(), entry))
    }

    /// Digest over every path, mode and byte: two trees with one digest make the same archive.
    pub(crate) fn digest(&self) -> String {
        let mut hash = Sha256::new();
        for (path, entry) in &self.entries {
            let (kind, content): (&str, &[u8]) = match &entry.node {
                Node::Directory => ("directory", b""),
                Node::File(bytes) => ("file", bytes),
                Node::Link(target) => ("link", target.as_bytes()),
                Node::Character { major, minor } => {
                    hash.update(format!("{major}:{minor}\n"));
                    ("character", b"")
                }
            };
            hash.update(format!("{kind} {:o} {} {path}\n", entry.mode, content.len()));
            hash.update(content);
        }
        hex::encode(hash.finalize())
    }

    fn resolve(&self, path: &str) -> Result<String> {
        let Some(relative) = path.strip_prefix('/') else { bail!("`{path}` is not an absolute path") };
        ensure!(
            relative.split('/').all(|part| !part.is_empty() && part != "." && part != ".."),
            "`{path}` is not a plain path"
        );
        let mut resolved = String::new();
        let (parents, name) = relative.rsplit_once('/').unwrap_or(("", relative));
        for part in parents.split('/').filter(|part| !part.is_empty()) {
            push(&mut resolved, part);
            if let Some(Entry { node: Node::Link(target), .. }) = self.entries.get(&resolved) {
                ensure!(
                    !target.starts_with('/') && !target.contains(".."),
                    "`{path}` leads through the link `/{resolved}`, whose target `{target}` is not below the root"
                );
                let parent = resolved.rfind('/').map_or(0, |slash| slash + 1);
                resolved.truncate(parent);
                resolved.push_str(target);
            }
        }
        push(&mut resolved, name);
        Ok(resolved)
    }
}

fn push(path: &mut String, part: &str) {
    if !path.is_empty() {
        path.push('/');
    }
    path.push_str(part);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(bytes: &[u8]) -> Node {
        Node::File(bytes.to_vec())
    }

    fn paths(tree: &Tree) -> Vec<&str> {
        tree.iter().map(|(path, _)| path).collect()
    }

    #[test]
    fn parents_come_before_children() {
        let mut tree = Tree::default();
        tree.insert("/usr/bin/shim", 0o755, file(b"x")).unwrap();
        assert_eq!(paths(&tree), ["usr", "usr/bin", "usr/bin/shim"]);
    }

    #[test]
    fn a_path_leads_through_links() {
        let mut tree = Tree::default();
        tree.insert("/lib", 0o777, Node::Link("usr/lib".into())).unwrap();
        tree.insert("/lib/modules/a.ko", 0o644, file(b"x")).unwrap();
        assert_eq!(paths(&tree), ["lib", "usr", "usr/lib", "usr/lib/modules", "usr/lib/modules/a.ko"]);
    }

    #[test]
    fn the_same_entry_twice_is_one_and_a_different_one_is_refused() {
        let mut tree = Tree::default();
        tree.insert("/a", 0o644, file(b"x")).unwrap();
        tree.insert("/a", 0o644, file(b"x")).unwrap();
        let error = tree.insert("/a", 0o644, file(b"y")).unwrap_err();
        assert_eq!(error.to_string(), "`/a` is listed twice with different content");
        let error = tree.insert("/a/b", 0o644, file(b"y")).unwrap_err();
        assert_eq!(error.to_string(), "`/a/b` lies below `/a`, which is not a folder");
    }

    #[test]
    fn a_folder_made_as_a_parent_takes_the_mode_of_its_own_line() {
        let mut tree = Tree::default();
        tree.insert("/root/file", 0o644, file(b"x")).unwrap();
        tree.insert("/root", 0o700, Node::Directory).unwrap();
        assert_eq!(tree.iter().next().unwrap().1.mode, 0o700);
    }

    #[test]
    fn paths_that_are_not_plain_are_refused() {
        for path in ["relative", "/a/../b", "//a", "/a/", "/"] {
            assert!(Tree::default().insert(path, 0o755, Node::Directory).is_err(), "{path}");
        }
    }

    #[test]
    fn the_digest_sees_path_mode_and_content() {
        let one = |path: &str, mode, bytes: &[u8]| {
            let mut tree = Tree::default();
            tree.insert(path, mode, file(bytes)).unwrap();
            tree.digest()
        };
        let digest = one("/a", 0o644, b"x");
        assert_eq!(digest, one("/a", 0o644, b"x"));
        for other in [one("/b", 0o644, b"x"), one("/a", 0o600, b"x"), one("/a", 0o644, b"y")] {
            assert_ne!(digest, other);
        }
    }
}
