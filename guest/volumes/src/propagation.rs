//! Whether a folder of the host can pass mounts on: the kernel would not complain, and silently not do it.

use std::fs;
use std::path::{Path, PathBuf};

use guest_mountinfo::Mount;
use thiserror::Error;

/// Why mounts cannot be passed on.
#[derive(Debug, Error)]
pub enum PropagationError {
    /// The source is gone.
    #[error("cannot find `{path}`")]
    Source {
        /// The source.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The table of mounts cannot be read.
    #[error("cannot read the table of mounts")]
    Table(#[source] std::io::Error),
    /// dockerd's sentence.
    #[error("path {path} is mounted on {mount} but it is not a {wanted} mount")]
    Private {
        /// The source as asked for.
        path: PathBuf,
        /// The mount it is on.
        mount: String,
        /// `shared`, or `shared or slave`.
        wanted: &'static str,
    },
}

/// Checks that `source` is on a shared mount.
pub fn check_shared(source: &Path) -> Result<(), PropagationError> {
    check(source, &["shared:"], "shared")
}

/// Checks that `source` is on a shared mount or a slave of one.
pub fn check_slave(source: &Path) -> Result<(), PropagationError> {
    check(source, &["shared:", "master:"], "shared or slave")
}

fn check(source: &Path, tags: &[&str], wanted: &'static str) -> Result<(), PropagationError> {
    let path = fs::canonicalize(source)
        .map_err(|error| PropagationError::Source { path: source.to_owned(), source: error })?;
    let mounts = guest_mountinfo::read().map_err(PropagationError::Table)?;
    let mount = mount_of(&mounts, &path);
    if mount
        .is_some_and(|mount| mount.optional.iter().any(|field| tags.iter().any(|tag| field.starts_with(tag))))
    {
        return Ok(());
    }
    let mount = mount.map(|mount| mount.point.display().to_string()).unwrap_or_default();
    Err(PropagationError::Private { path: source.to_owned(), mount, wanted })
}

/// The mount a path is on.
fn mount_of<'a>(mounts: &'a [Mount], path: &Path) -> Option<&'a Mount> {
    // Of two at one place the later one is on top, and `max_by_key` takes the last of equals.
    mounts
        .iter()
        .filter(|mount| path.starts_with(&mount.point))
        .max_by_key(|mount| mount.point.as_os_str().len())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "1 0 0:1 / / rw shared:1 - ext4 /dev/a rw\n2 1 0:2 / /mnt/with\\040space rw - tmpfs t rw\n3 1 \
                         0:3 / /mnt rw master:7 propagate_from:2 - tmpfs t rw\n";

    #[test]
    fn the_longest_mount_point_is_the_one() {
        let mounts = guest_mountinfo::parse(TABLE.as_bytes());
        let found = |path: &str| mount_of(&mounts, Path::new(path)).unwrap();
        assert_eq!(found("/etc").optional, ["shared:1"]);
        assert_eq!(found("/mnt/x").optional, ["master:7", "propagate_from:2"]);
        assert_eq!(found("/mnt/with space/y").point, Path::new("/mnt/with space"));
        assert_eq!(found("/mntx").point, Path::new("/"));
    }

    #[test]
    fn a_missing_source_is_named() {
        let error = check_shared(Path::new("/nowhere/at/all")).unwrap_err();
        assert!(error.to_string().contains("/nowhere/at/all"));
    }
}
