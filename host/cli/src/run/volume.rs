//! `-v [SOURCE:]TARGET[:OPTIONS]`: which of them are binds, and whose relative paths are meant.

use anyhow::{Result, bail};
use guest_api::{EmptyObject, KeySet};
use std::path::{Component, Path, PathBuf};

/// All `-v` of a command line.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Volumes {
    /// `SOURCE:TARGET[:OPTIONS]`, the source a name or an absolute path.
    pub(crate) binds: Vec<String>,
    /// Targets alone.
    pub(crate) anonymous: KeySet,
}

/// Reads them. Only the caller knows the current `folder`, which relative sources begin in.
pub(crate) fn volumes(typed: &[String], folder: &Path) -> Result<Volumes> {
    let mut volumes = Volumes::default();
    for text in typed {
        match text.split_once(':') {
            None if text.is_empty() => bail!("invalid volume: it is empty"),
            None => {
                volumes.anonymous.insert(text.clone(), EmptyObject::default());
            }
            Some(("", _)) => bail!("invalid volume `{text}`: it has no source before the colon"),
            Some((source, rest)) => {
                let source = match is_path(source) {
                    true => absolute(source, folder).display().to_string(),
                    false => source.to_owned(),
                };
                volumes.binds.push(format!("{source}:{rest}"));
            }
        }
    }
    Ok(volumes)
}

/// A source is a path when it looks like one; anything else names a volume.
fn is_path(source: &str) -> bool {
    source.starts_with(['/', '.', '~'])
}

/// Makes a path absolute and takes `.` and `..` out of it, without asking the file system.
fn absolute(source: &str, folder: &Path) -> PathBuf {
    let mut path = PathBuf::new();
    for part in folder.join(source).components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir => drop(path.pop()),
            part => path.push(part),
        }
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relative_sources_begin_in_the_current_folder() {
        let folder = Path::new("/home/ana/shop");
        let typed =
            ["./src:/app", "../x:/x:ro", ".:/all", "/abs/./b:/b", "data:/data", "/cache"].map(String::from);
        let volumes = volumes(&typed, folder).unwrap();
        assert_eq!(
            volumes.binds,
            [
                "/home/ana/shop/src:/app",
                "/home/ana/x:/x:ro",
                "/home/ana/shop:/all",
                "/abs/b:/b",
                "data:/data"
            ]
        );
        assert_eq!(volumes.anonymous.keys().collect::<Vec<_>>(), ["/cache"]);
        assert!(super::volumes(&[":/app".into()], folder).is_err());
        assert!(super::volumes(&[String::new()], folder).is_err());
    }
}
