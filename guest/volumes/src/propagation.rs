//! Whether a folder of the host can pass mounts on: the kernel would not complain, and silently not do it.

use std::fs;
use std::path::{Path, PathBuf};

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
    let table = fs::read_to_string("/proc/self/mountinfo").map_err(PropagationError::Table)?;
    let (mount, optional) = mount_of(&table, &path).unwrap_or_default();
    if optional.iter().any(|field| tags.iter().any(|tag| field.starts_with(tag))) {
        return Ok(());
    }
    Err(PropagationError::Private { path: source.to_owned(), mount, wanted })
}

/// The mount a path is on, and its optional fields.
fn mount_of<'a>(table: &'a str, path: &Path) -> Option<(String, Vec<&'a str>)> {
    let mut best: Option<(PathBuf, Vec<&str>)> = None;
    for line in table.lines() {
        let mut fields = line.split(' ');
        let Some(place) = fields.nth(4).map(unescape) else { continue };
        let optional = fields.skip(1).take_while(|field| *field != "-").collect();
        // Of two at one place the later one is on top.
        if path.starts_with(&place)
            && best.as_ref().is_none_or(|(known, _)| place.as_os_str().len() >= known.as_os_str().len())
        {
            best = Some((place, optional));
        }
    }
    best.map(|(place, optional)| (place.display().to_string(), optional))
}

/// A path of the table: space, tab, line feed and backslash are written as octal numbers.
fn unescape(text: &str) -> PathBuf {
    let plain = [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")];
    PathBuf::from(plain.iter().fold(text.to_owned(), |text, (code, letter)| text.replace(code, letter)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "1 0 0:1 / / rw shared:1 - ext4 /dev/a rw\n2 1 0:2 / /mnt/with\\040space rw - tmpfs t rw\n3 1 \
                         0:3 / /mnt rw master:7 propagate_from:2 - tmpfs t rw\n";

    #[test]
    fn the_longest_mount_point_is_the_one() {
        let found = |path: &str| mount_of(TABLE, Path::new(path)).unwrap();
        assert_eq!(found("/etc"), ("/".to_owned(), vec!["shared:1"]));
        assert_eq!(found("/mnt/x"), ("/mnt".to_owned(), vec!["master:7", "propagate_from:2"]));
        assert_eq!(found("/mnt/with space/y"), ("/mnt/with space".to_owned(), vec![]));
        assert_eq!(found("/mntx").0, "/");
    }

    #[test]
    fn a_missing_source_is_named() {
        let error = check_shared(Path::new("/nowhere/at/all")).unwrap_err();
        assert!(error.to_string().contains("/nowhere/at/all"));
    }
}
