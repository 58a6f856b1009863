//! How much a volume holds.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Sums the lengths of the files below a folder, each hard-linked one once, as dockerd counts. Links are not followed and
/// what vanishes meanwhile counts nothing; that `folder` itself is missing is an error.
pub fn used_bytes(folder: &Path) -> io::Result<u64> {
    let mut seen = HashSet::new();
    let mut total = 0_u64;
    let mut open = vec![folder.to_owned()];
    while let Some(next) = open.pop() {
        let entries = match fs::read_dir(&next) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && next != folder => continue,
            other => other?,
        };
        for entry in entries {
            let entry = entry?;
            let metadata = match entry.metadata() {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                other => other?,
            };
            if metadata.is_dir() {
                open.push(entry.path());
            } else if metadata.nlink() < 2 || seen.insert((metadata.dev(), metadata.ino())) {
                total = total.saturating_add(metadata.len());
            }
        }
    }
    Ok(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hard_link_counts_once_and_a_link_is_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        fs::create_dir(path.join("deep")).unwrap();
        fs::write(path.join("a"), vec![0; 1000]).unwrap();
        fs::hard_link(path.join("a"), path.join("deep/b")).unwrap();
        std::os::unix::fs::symlink("/etc", path.join("link")).unwrap();
        assert_eq!(used_bytes(path).unwrap(), 1004);
        assert!(used_bytes(&path.join("missing")).is_err());
    }
}
