//! A path of a container, as clients write it: a trailing slash or `/.` means the folder that a link leads to, and decides
//! under which name things come in an archive.

use std::ffi::OsStr;
use std::io;
use std::path::{Component, Path, PathBuf};

use crate::failure::Failure;

/// A path as it was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AskedPath {
    asked: String,
    /// Absolute, without `.` and `..`.
    path: PathBuf,
}

impl AskedPath {
    pub fn new(asked: &str) -> Self {
        let mut path = PathBuf::from("/");
        for component in Path::new(asked).components() {
            match component {
                Component::Normal(name) => path.push(name),
                Component::ParentDir => _ = path.pop(),
                Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
            }
        }
        Self { asked: asked.to_owned(), path }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it can only be a folder.
    pub fn is_folder(&self) -> bool {
        self.asked.ends_with('/') || self.is_content() || self.path == Path::new("/")
    }

    /// Whether it means what is in the folder.
    fn is_content(&self) -> bool {
        self.asked == "." || self.asked.ends_with("/.")
    }

    /// The last part, as Go's `filepath.Base` finds it.
    pub fn base(&self) -> String {
        match self.path.file_name() {
            _ if self.is_content() => ".".to_owned(),
            None => "/".to_owned(),
            Some(name) => name.to_string_lossy().into_owned(),
        }
    }

    /// The last part.
    pub fn name(&self) -> &OsStr {
        self.path.file_name().unwrap_or_default()
    }

    /// Why it could not be used, in dockerd's words.
    pub fn failure(&self, error: &io::Error, container: &str) -> Failure {
        if error.kind() == io::ErrorKind::NotFound {
            return Failure::not_found(format!(
                "Could not find the file {} in container {container}",
                self.asked
            ));
        }
        Failure::internal(format!("lstat {}", self.asked), error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_taken_as_docker_takes_them() {
        for (asked, path, is_folder, base) in [
            ("/etc/passwd", "/etc/passwd", false, "passwd"),
            ("etc/", "/etc", true, "etc"),
            ("/etc/.", "/etc", true, "."),
            ("/", "/", true, "/"),
            (".", "/", true, "."),
            ("/a/../../b", "/b", false, "b"),
            ("", "/", true, "/"),
        ] {
            let found = AskedPath::new(asked);
            assert_eq!(
                (found.path(), found.is_folder(), found.base().as_str()),
                (Path::new(path), is_folder, base),
                "{asked}"
            );
        }
    }

    #[test]
    fn what_is_not_there_is_told_by_its_name() {
        let failure = AskedPath::new("/x").failure(&io::ErrorKind::NotFound.into(), "web");
        assert_eq!(failure.kind, guest_api::ErrorKind::NotFound);
        assert_eq!(failure.message, "Could not find the file /x in container web");
    }
}
