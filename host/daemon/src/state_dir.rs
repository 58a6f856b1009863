//! `StateDir`: the daemon's claim on its home folder. Holds the lock for the daemon's life and binds its sockets.

use anyhow::{Context, Result, bail};
use host_api::Home;
use std::fs::{self, File, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

pub(crate) struct StateDir {
    home: Home,
    _lock: File,
    /// The sockets that are ours to remove at the end.
    bound: Mutex<Vec<PathBuf>>,
}

/// Someone else serves this home; the caller should talk to it instead.
#[derive(Debug)]
pub(crate) struct AlreadyRunning;

impl StateDir {
    /// Makes the folders and takes the lock that makes this process the one daemon of `home`.
    pub(crate) fn claim(home: Home) -> Result<Result<Self, AlreadyRunning>> {
        for dir in [home.root().to_path_buf(), home.run_dir()] {
            make_private_dir(&dir)?;
        }
        let path = home.daemon_lock();
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .with_context(|| format!("cannot open the lock file `{}`", path.display()))?;
        match rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Ok(Self { home, _lock: lock, bound: Mutex::default() })),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(Err(AlreadyRunning)),
            Err(errno) => Err(errno).with_context(|| format!("cannot lock `{}`", path.display())),
        }
    }

    pub(crate) fn home(&self) -> &Home {
        &self.home
    }

    /// The folder of the machine called `name`, made if it is not there.
    pub(crate) fn machine_dir(&self, name: &str) -> Result<PathBuf> {
        let dir = self.home.machine_dir(name);
        make_private_dir(&dir)?;
        Ok(dir)
    }

    /// Listens on the Docker API socket.
    pub(crate) fn bind_docker(&self) -> Result<UnixListener> {
        self.bind(self.home.docker_socket())
    }

    /// Listens on the control socket.
    pub(crate) fn bind_control(&self) -> Result<UnixListener> {
        self.bind(self.home.control_socket())
    }

    fn bind(&self, path: PathBuf) -> Result<UnixListener> {
        let listener = bind(&path, &self.home.run_dir())?;
        self.bound.lock().unwrap_or_else(PoisonError::into_inner).push(path);
        Ok(listener)
    }
}

impl Drop for StateDir {
    fn drop(&mut self) {
        for path in self.bound.get_mut().unwrap_or_else(PoisonError::into_inner) {
            // A socket left behind harms nobody: the next daemon replaces it.
            let _ = fs::remove_file(path);
        }
    }
}

fn make_private_dir(dir: &Path) -> Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .with_context(|| format!("cannot make the state folder `{}`", dir.display()))
}

/// Listens on `path` with mode 0600 from the first instant. A socket that nobody answers on is replaced; anything else
/// in the way is left alone and named.
fn bind(path: &Path, private_dir: &Path) -> Result<UnixListener> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(error).with_context(|| format!("cannot look at `{}`", path.display())),
        Ok(found) if !found.file_type().is_socket() => {
            bail!(
                "`{}` is in the way and is not a socket: move it, or set ENGINE_HOME to another folder",
                path.display()
            )
        }
        Ok(_) if UnixStream::connect(path).is_ok() => bail!(
            "another program already answers on `{}`: stop it, or set ENGINE_HOME to another folder",
            path.display()
        ),
        Ok(_) => {}
    }
    // Bound under another name in a folder that only we may enter, restricted, then renamed: there is no instant in
    // which the socket is open to others, and clients see the old socket or the new one.
    let temporary = private_dir.join(format!(".{}", std::process::id()));
    let _ = fs::remove_file(&temporary);
    let listener = UnixListener::bind(&temporary)
        .with_context(|| format!("cannot listen on `{}`", temporary.display()))?;
    fs::set_permissions(&temporary, Permissions::from_mode(0o600))
        .and_then(|()| fs::rename(&temporary, path))
        .with_context(|| format!("cannot put the socket at `{}`", path.display()))?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(dir: &Path) -> Result<StateDir, AlreadyRunning> {
        StateDir::claim(Home::at(dir.to_path_buf()).unwrap()).unwrap()
    }

    #[test]
    fn one_daemon_wins_and_the_other_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let first = claim(dir.path());
        assert!(claim(dir.path()).is_err());
        drop(first);
        assert!(claim(dir.path()).is_ok());
    }

    #[test]
    fn sockets_are_private_and_replace_dead_ones() {
        let dir = tempfile::tempdir().unwrap();
        let state = claim(dir.path()).unwrap();
        let path = state.home().docker_socket();
        drop(UnixListener::bind(&path).unwrap());
        let _listener = state.bind_docker().unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(UnixStream::connect(&path).is_ok());
    }

    #[test]
    fn what_is_not_a_dead_socket_stays_and_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let state = claim(dir.path()).unwrap();
        let path = state.home().docker_socket();
        fs::write(&path, "mine").unwrap();
        let error = state.bind_docker().unwrap_err().to_string();
        assert!(error.contains("is not a socket"), "{error}");
        fs::remove_file(&path).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        let error = state.bind_docker().unwrap_err().to_string();
        assert!(error.contains("already answers"), "{error}");
        drop(state);
        assert!(UnixStream::connect(&path).is_ok(), "the other program keeps its socket");
    }
}
