//! Where the source of a bind is.
//!
//! Natively that is where the user says. In the machine the user means a path of the computer around it, which tells
//! where it is shared; but a few paths mean the machine itself, as they do with other engines in a machine: its devices
//! and kernel, its own state, and the socket of the engine, which programs in containers use to speak to it.

use std::path::{Path, PathBuf};

use guest_protocol::{BindPlace, BindSource};

use super::{Changes, HostLeases};
use crate::failure::Failure;

/// These, and what is below them, are the machine's own.
const OWN: [&str; 7] = ["/proc", "/sys", "/dev", "/run", "/var/run", "/lib/modules", "/var/lib/docker"];
/// What clients of every engine take for the socket of its API.
const SOCKETS: [&str; 2] = ["/var/run/docker.sock", "/run/docker.sock"];

/// A bind's source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// It is here.
    At(PathBuf),
    /// There is nothing yet; it would be here.
    Missing(PathBuf),
    /// There is nothing, and nothing can be made, for the reason told.
    Nowhere(String),
}

impl Place {
    /// Whether there is nothing.
    pub fn is_missing(&self) -> bool {
        !matches!(self, Self::At(_))
    }

    /// Where it is, or would be.
    pub fn path(self) -> Result<PathBuf, Failure> {
        match self {
            Self::At(path) | Self::Missing(path) => Ok(path),
            Self::Nowhere(why) => Err(Failure::broken(why)),
        }
    }
}

/// Finds the sources of binds.
#[derive(Clone, Debug)]
pub struct Shares {
    /// The computer around the machine; nothing natively.
    pub outside: Option<HostLeases>,
    /// Who has our kernel tell what changes there.
    pub changes: Changes,
    /// Where the engine's API is served.
    pub socket: Option<PathBuf>,
    /// Where the engine keeps its state.
    pub data_root: PathBuf,
}

impl Shares {
    /// Finds the source of a bind; the host makes a folder there if it is missing and `create` says so. Here a missing
    /// one stays missing.
    pub async fn find(&self, source: &Path, create: bool) -> Result<Place, Failure> {
        match &self.outside {
            Some(outside) if !self.is_own(source) => self.ask(outside, source, create).await,
            _ => {
                let place = self.own(source);
                let found = tokio::task::spawn_blocking({
                    let place = place.clone();
                    move || place.symlink_metadata().is_ok()
                });
                let found = found
                    .await
                    .map_err(|error| Failure::internal("looking for a mount's source failed", &error))?;
                Ok(if found { Place::At(place) } else { Place::Missing(place) })
            }
        }
    }

    async fn ask(&self, outside: &HostLeases, source: &Path, create: bool) -> Result<Place, Failure> {
        let Some(path) = source.to_str().map(str::to_owned) else {
            return Err(Failure::invalid(format!("the mount's source `{}` is not UTF-8", source.display())));
        };
        let answer = outside.locate(BindSource { path, create }).await;
        match answer.map_err(|error| Failure::broken(error.to_string()))? {
            BindPlace::At { path } => Ok(Place::At(path.into())),
            BindPlace::Missing { path } => Ok(Place::Missing(path.into())),
            BindPlace::Nowhere { why } => Ok(Place::Nowhere(why)),
            BindPlace::Engine => Ok(Place::At(self.own(Path::new(SOCKETS[0])))),
            BindPlace::Refused { why } => Err(Failure::broken(why)),
        }
    }

    fn is_own(&self, source: &Path) -> bool {
        source == Path::new("/")
            || source.starts_with(&self.data_root)
            || OWN.iter().any(|own| source.starts_with(own))
    }

    /// A path of the machine itself.
    fn own(&self, source: &Path) -> PathBuf {
        match &self.socket {
            Some(socket)
                if self.outside.is_some() && SOCKETS.iter().any(|name| source == Path::new(name)) =>
            {
                socket.clone()
            }
            _ => source.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shares(machine: bool) -> Shares {
        Shares {
            outside: machine.then(|| HostLeases::new().0),
            changes: Changes::default(),
            socket: Some("/run/engine.sock".into()),
            data_root: "/var/lib/engine".into(),
        }
    }

    #[tokio::test]
    async fn natively_a_source_is_where_it_says() {
        let shares = shares(false);
        assert_eq!(shares.find(Path::new("/proc"), false).await.unwrap(), Place::At("/proc".into()));
        let nothing = Path::new("/nowhere/at/all");
        assert_eq!(shares.find(nothing, true).await.unwrap(), Place::Missing(nothing.into()));
        let socket = shares.find(Path::new("/var/run/docker.sock"), false).await.unwrap().path().unwrap();
        assert_eq!(socket, Path::new("/var/run/docker.sock"));
    }

    #[tokio::test]
    async fn some_paths_are_the_machines_own() {
        let shares = shares(true);
        for own in ["/", "/dev/kvm", "/sys", "/var/lib/engine/volumes/x", "/run/secrets"] {
            assert!(shares.is_own(Path::new(own)), "{own}");
        }
        for host in ["/home/ana", "/devices", "/tmp", "/runs"] {
            assert!(!shares.is_own(Path::new(host)), "{host}");
        }
        let socket = shares.find(Path::new("/var/run/docker.sock"), false).await.unwrap().path().unwrap();
        assert_eq!(socket, Path::new("/run/engine.sock"));
    }
}
