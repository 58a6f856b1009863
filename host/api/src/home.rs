//! `Home`: the one folder that holds all state of one engine, and the names of the things in it.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Longest path a unix socket address can carry on every system we run on, without its final NUL
/// (`sun_path` is 108 bytes on Linux and 104 on macOS).
pub const SOCKET_PATH_BYTES_MAX: usize = 103;

/// The state folder of one engine: `$ENGINE_HOME`, or `.engine` in the user's home folder.
///
/// Two engines with different homes share nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Home {
    root: PathBuf,
}

/// Why a state folder cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HomeError {
    /// Neither `ENGINE_HOME` nor `HOME` is set.
    Unset,
    /// `ENGINE_HOME` is not absolute.
    Relative(PathBuf),
    /// A socket below it would not fit into a unix socket address.
    TooLong {
        /// The socket's path.
        path: PathBuf,
        /// Its length in bytes.
        bytes: usize,
    },
}

impl std::fmt::Display for HomeError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unset => {
                f.write_str("no state folder is known: set `ENGINE_HOME` (or `HOME`) to a folder of yours")
            }
            Self::Relative(path) => {
                write!(
                    f,
                    "`ENGINE_HOME` is `{}`, which is relative: set it to an absolute path",
                    path.display()
                )
            }
            Self::TooLong { path, bytes } => write!(
                f,
                "the socket path `{}` has {bytes} bytes, and a unix socket address holds {SOCKET_PATH_BYTES_MAX}: \
                 set `ENGINE_HOME` to a shorter path",
                path.display()
            ),
        }
    }
}

impl std::error::Error for HomeError {}

impl Home {
    /// The state folder named by the values of `ENGINE_HOME` and `HOME`; an empty value counts as unset.
    pub fn resolve(engine_home: Option<OsString>, user_home: Option<OsString>) -> Result<Self, HomeError> {
        let set = |value: Option<OsString>| value.filter(|value| !value.is_empty()).map(PathBuf::from);
        let root = match (set(engine_home), set(user_home)) {
            (Some(root), _) if root.is_relative() => return Err(HomeError::Relative(root)),
            (Some(root), _) => root,
            (None, Some(user)) => user.join(".engine"),
            (None, None) => return Err(HomeError::Unset),
        };
        Self::at(root)
    }

    /// The state folder at `root`, or why its sockets cannot work there.
    pub fn at(root: PathBuf) -> Result<Self, HomeError> {
        let home = Self { root };
        let path = home.control_socket();
        let bytes = path.as_os_str().as_bytes().len();
        if bytes > SOCKET_PATH_BYTES_MAX {
            return Err(HomeError::TooLong { path, bytes });
        }
        Ok(home)
    }

    /// The folder itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The Docker API socket that clients are pointed at.
    pub fn docker_socket(&self) -> PathBuf {
        self.root.join("engine.sock")
    }

    /// The socket on which the daemon answers the requests of this crate.
    pub fn control_socket(&self) -> PathBuf {
        self.run_dir().join("engined.sock")
    }

    /// Sockets and locks of the running daemon.
    pub fn run_dir(&self) -> PathBuf {
        self.root.join("run")
    }

    /// Held locked by the one daemon of this home for as long as it lives.
    pub fn daemon_lock(&self) -> PathBuf {
        self.run_dir().join("engined.lock")
    }

    /// The daemon's own log.
    pub fn daemon_log(&self) -> PathBuf {
        self.run_dir().join("engined.log")
    }

    /// The settings file; absent means defaults.
    pub fn settings(&self) -> PathBuf {
        self.root.join("settings.toml")
    }

    /// The engine's own settings, in either of two forms; absent means defaults.
    pub fn engine_settings(&self) -> [PathBuf; 2] {
        ["engine.toml", "daemon.json"].map(|name| self.root.join(name))
    }

    /// A folder for each registry that has certificates of its own, as dockerd's `certs.d`.
    pub fn certificates(&self) -> PathBuf {
        self.root.join("certs.d")
    }

    /// Everything that belongs to the machine called `name`.
    pub fn machine_dir(&self, name: &str) -> PathBuf {
        self.root.join("machines").join(name)
    }

    /// The data disk of the machine called `name`.
    pub fn machine_disk(&self, name: &str) -> PathBuf {
        self.machine_dir(name).join("disk.raw")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(engine_home: Option<&str>, user_home: Option<&str>) -> Result<Home, HomeError> {
        Home::resolve(engine_home.map(OsString::from), user_home.map(OsString::from))
    }

    #[test]
    fn engine_home_wins_over_the_users_home() {
        assert_eq!(
            resolve(Some("/a"), Some("/home/ana")).unwrap().docker_socket(),
            Path::new("/a/engine.sock")
        );
        assert_eq!(resolve(Some(""), Some("/home/ana")).unwrap().root(), Path::new("/home/ana/.engine"));
    }

    #[test]
    fn a_relative_or_missing_home_is_refused() {
        assert_eq!(resolve(Some("a/b"), None), Err(HomeError::Relative("a/b".into())));
        assert_eq!(resolve(None, None), Err(HomeError::Unset));
    }

    #[test]
    fn a_home_too_long_for_a_socket_is_refused_with_the_length() {
        let error = resolve(Some(&format!("/{}", "x".repeat(100))), None).unwrap_err();
        assert!(error.to_string().contains("118 bytes"), "{error}");
    }
}
