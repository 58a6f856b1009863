//! Finding the program a container names, with Docker's words when it is not there.
//!
//! This runs inside the container, after its root has been entered and its user taken on: volumes are mounted, links
//! resolve where they will at execution, and permissions are the user's. So it cannot be led out of the root file
//! system. The rules are those of Go's `exec.LookPath`, which runc uses.

use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD, accessat};
use thiserror::Error;

use crate::shim::ErrorKind;

/// What a process without PATH searches, as Docker's default.
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Why a program cannot be executed.
#[derive(Debug, Error)]
pub enum LookupError {
    /// No folder of PATH has it.
    #[error("exec: {program:?}: executable file not found in $PATH")]
    NotInPath {
        /// As named.
        program: String,
    },
    /// Named with a slash, and not there.
    #[error("exec: {program:?}: stat {program}: {}", words(*.errno))]
    Missing {
        /// As named.
        program: String,
        /// What `stat` said.
        errno: i32,
    },
    /// It is there and cannot be executed.
    #[error("exec: {program:?}: {}", words(*.errno))]
    NotExecutable {
        /// As named.
        program: String,
        /// EACCES or EISDIR.
        errno: i32,
    },
    /// The kernel refused it.
    #[error("exec {}: {}", .program.display(), words(*.errno))]
    Refused {
        /// As found.
        program: PathBuf,
        /// What `execve` said.
        errno: i32,
    },
}

impl LookupError {
    /// Whether the program is missing or unusable.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NotInPath { .. } => ErrorKind::NotFound,
            Self::Missing { errno, .. } | Self::NotExecutable { errno, .. } | Self::Refused { errno, .. } => {
                match *errno {
                    libc::ENOENT | libc::ENOTDIR => ErrorKind::NotFound,
                    libc::EACCES
                    | libc::EPERM
                    | libc::EISDIR
                    | libc::ENOEXEC
                    | libc::ELOOP
                    | libc::ETXTBSY => ErrorKind::NotExecutable,
                    _ => ErrorKind::Other,
                }
            }
        }
    }
}

/// An error number in the words Go and the C library use, without Rust's "(os error 2)".
/// An error of the kernel in Go's words.
pub fn words(errno: i32) -> String {
    let text = io::Error::from_raw_os_error(errno).to_string();
    let words = text.split(" (os error").next().unwrap_or_default();
    words.chars().take(1).flat_map(char::to_lowercase).chain(words.chars().skip(1)).collect()
}

/// The file to execute for `program`, given the process's environment. Relative names mean the current folder.
pub fn find(program: &str, environment: &[String]) -> Result<PathBuf, LookupError> {
    if program.contains('/') {
        return check(Path::new(program)).map(|()| PathBuf::from(program)).map_err(|errno| match errno {
            libc::EACCES | libc::EISDIR => LookupError::NotExecutable { program: program.to_owned(), errno },
            errno => LookupError::Missing { program: program.to_owned(), errno },
        });
    }
    // The last one wins, as in the C library's execvpe of a duplicated environment.
    let path = environment.iter().rev().find_map(|entry| entry.strip_prefix("PATH=")).unwrap_or(DEFAULT_PATH);
    path.split(':')
        .filter(|_| !program.is_empty())
        .map(|folder| Path::new(if folder.is_empty() { "." } else { folder }).join(program))
        .find(|candidate| check(candidate).is_ok())
        .ok_or_else(|| LookupError::NotInPath { program: program.to_owned() })
}

fn check(path: &Path) -> Result<(), i32> {
    let metadata = std::fs::metadata(path).map_err(|error| error.raw_os_error().unwrap_or(libc::EIO))?;
    if metadata.is_dir() {
        return Err(libc::EISDIR);
    }
    accessat(CWD, path, Access::EXEC_OK, AtFlags::empty()).map_err(|_| libc::EACCES)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("lookup-{name}-{}", std::process::id()));
            std::fs::create_dir_all(path.join("bin/folder")).unwrap();
            std::fs::create_dir_all(path.join("sbin")).unwrap();
            let folder = Self(path);
            folder.file("bin/tool", 0o755);
            folder.file("bin/data", 0o644);
            folder.file("sbin/data", 0o755);
            folder
        }

        fn file(&self, name: &str, mode: u32) {
            std::fs::write(self.0.join(name), "").unwrap();
            std::fs::set_permissions(self.0.join(name), std::fs::Permissions::from_mode(mode)).unwrap();
        }

        fn path(&self, name: &str) -> String {
            self.0.join(name).display().to_string()
        }

        fn environment(&self) -> Vec<String> {
            vec!["A=1".into(), format!("PATH={}:{}", self.path("bin"), self.path("sbin"))]
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            std::fs::remove_dir_all(&self.0).unwrap();
        }
    }

    fn refusal(program: &str, environment: &[String]) -> (String, ErrorKind) {
        let error = find(program, environment).unwrap_err();
        (error.to_string(), error.kind())
    }

    #[test]
    fn a_bare_name_is_searched_in_path_and_skips_what_cannot_run() {
        let folder = Folder::new("search");
        assert_eq!(find("tool", &folder.environment()).unwrap(), Path::new(&folder.path("bin/tool")));
        assert_eq!(find("data", &folder.environment()).unwrap(), Path::new(&folder.path("sbin/data")));
    }

    #[test]
    fn a_missing_name_says_so_in_dockers_words() {
        let folder = Folder::new("missing");
        let expected = "exec: \"foo\": executable file not found in $PATH".to_owned();
        assert_eq!(refusal("foo", &folder.environment()), (expected, ErrorKind::NotFound));
        assert_eq!(refusal("", &folder.environment()).1, ErrorKind::NotFound);
        assert_eq!(refusal("folder", &folder.environment()).1, ErrorKind::NotFound);
    }

    #[test]
    fn a_missing_path_names_stat() {
        let expected = "exec: \"/no/such\": stat /no/such: no such file or directory".to_owned();
        assert_eq!(refusal("/no/such", &[]), (expected, ErrorKind::NotFound));
    }

    #[test]
    fn a_folder_and_a_plain_file_are_not_executable() {
        let folder = Folder::new("kinds");
        let (message, kind) = refusal(&folder.path("bin"), &[]);
        assert!(message.ends_with("is a directory"), "{message}");
        assert_eq!(kind, ErrorKind::NotExecutable);
        let (message, kind) = refusal(&folder.path("bin/data"), &[]);
        assert!(message.ends_with("permission denied"), "{message}");
        assert_eq!(kind, ErrorKind::NotExecutable);
    }

    #[test]
    fn the_kernels_refusals_have_their_kinds() {
        let refused = |errno| LookupError::Refused { program: "/bin/x".into(), errno };
        assert_eq!(refused(libc::ENOEXEC).to_string(), "exec /bin/x: exec format error");
        assert_eq!(refused(libc::ENOEXEC).kind(), ErrorKind::NotExecutable);
        assert_eq!(refused(libc::ENOENT).kind(), ErrorKind::NotFound);
        assert_eq!(refused(libc::ENOMEM).kind(), ErrorKind::Other);
    }
}
