//! Accepting connections: a unix socket for this user only, and a vsock port for the host only.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest};
use tokio::net::UnixListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener};

use super::Services;
use super::lenient::Lenient;
use super::takeover::Takeover;

/// Longest path of a unix socket: the kernel's 108 bytes less the terminating zero.
const SOCKET_PATH_MAX: usize = 107;
/// Pause after a failed accept: out of descriptors, most likely.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Everything we listen on.
pub struct Listeners {
    pub unix: Option<(UnixListener, PathBuf)>,
    pub vsock: Option<VsockListener>,
}

/// Listens on a path that only this user may connect to. A socket that nobody listens on is replaced.
pub fn bind_unix(path: &Path) -> anyhow::Result<UnixListener> {
    let length = path.as_os_str().len();
    if length > SOCKET_PATH_MAX {
        bail!(
            "the socket path `{}` has {length} bytes; a unix socket's path can have {SOCKET_PATH_MAX} at most: choose \
             a shorter one",
            path.display()
        );
    }
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        std::fs::create_dir_all(folder)
            .with_context(|| format!("cannot make the folder `{}`", folder.display()))?;
    }
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).with_context(|| format!("cannot look at `{}`", path.display())),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            bail!("`{}` exists and is not a socket", path.display());
        }
        Ok(_) => {
            if std::os::unix::net::UnixStream::connect(path).is_ok() {
                bail!("the socket `{}` is in use: another engine listens on it", path.display());
            }
            std::fs::remove_file(path)
                .with_context(|| format!("cannot remove the old socket `{}`", path.display()))?;
        }
    }
    // From its first moment on nobody else may connect.
    let before = rustix::process::umask(rustix::fs::Mode::from(0o177));
    let bound = UnixListener::bind(path);
    rustix::process::umask(before);
    let listener = bound.with_context(|| format!("cannot listen on `{}`", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
        .with_context(|| format!("cannot restrict `{}` to its owner", path.display()))?;
    Ok(listener)
}

impl Listeners {
    /// Listens on a vsock port, on all addresses: the guest's own is not known everywhere.
    pub fn bind_vsock(port: u32) -> anyhow::Result<VsockListener> {
        VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port))
            .with_context(|| format!("cannot listen on vsock port {port}"))
    }

    /// Serves until `stop`; then removes the socket. Connections that are open then belong to `tasks`.
    pub async fn serve(self, services: Arc<Services>, tasks: TaskTracker, stop: CancellationToken) {
        let unix = async {
            let Some((listener, _)) = &self.unix else { return std::future::pending().await };
            loop {
                match listener.accept().await {
                    Ok((stream, _)) => drop(tasks.spawn(connection(stream, services.clone(), stop.clone()))),
                    Err(error) => accept_failed(&error).await,
                }
            }
        };
        let vsock = async {
            let Some(listener) = &self.vsock else { return std::future::pending().await };
            loop {
                match listener.accept().await {
                    Ok((stream, peer)) if peer.cid() == VMADDR_CID_HOST => {
                        drop(tasks.spawn(connection(stream, services.clone(), stop.clone())));
                    }
                    Ok((_, peer)) => {
                        tracing::warn!(cid = peer.cid(), "refused a connection that is not the host's")
                    }
                    Err(error) => accept_failed(&error).await,
                }
            }
        };
        tokio::select! {
            () = unix => {}
            () = vsock => {}
            () = stop.cancelled() => {}
        }
        if let Some((_, path)) = &self.unix
            && let Err(error) = std::fs::remove_file(path)
        {
            tracing::warn!(path = %path.display(), %error, "cannot remove the socket");
        }
    }
}

/// Tells when a client has gone altogether. Ending its writing is not that: many clients do it at once and wait for the
/// answer. A unix socket shows the difference; with vsock the next write does.
pub struct Hangup(AsyncFd<OwnedFd>);

impl Hangup {
    /// Holds a duplicate of the socket: drop it when the connection ends.
    fn watch(stream: &impl AsFd) -> io::Result<Self> {
        let descriptor = stream.as_fd().try_clone_to_owned()?;
        // Nothing ever arrives with priority; the end of both directions is reported always.
        #[expect(
            deprecated,
            reason = "unsound only for types that may close their descriptor early; ours is an OwnedFd"
        )]
        let descriptor = AsyncFd::with_interest(descriptor, Interest::PRIORITY)?;
        Ok(Self(descriptor))
    }

    /// Returns when it happens; for ever pending if it cannot be told.
    pub async fn happened(&self) {
        match self.0.ready(Interest::PRIORITY).await {
            Ok(_) => {}
            Err(_) => std::future::pending().await,
        }
    }
}

async fn accept_failed(error: &io::Error) {
    tracing::warn!(%error, "cannot accept a connection");
    tokio::time::sleep(ACCEPT_PAUSE).await;
}

async fn connection<S>(stream: S, services: Arc<Services>, stop: CancellationToken)
where
    S: AsyncRead + AsyncWrite + AsFd + Unpin + Send + 'static,
{
    let hangup = match Hangup::watch(&stream) {
        Ok(hangup) => Arc::new(hangup),
        Err(error) => return accept_failed(&error).await,
    };
    let service = service_fn(move |request| super::serve(services.clone(), request, hangup.clone()));
    // A client that ends its writing has not gone: it may wait for the answer.
    let serving = http1::Builder::new()
        .half_close(true)
        .timer(TokioTimer::new())
        .header_read_timeout(None)
        .serve_connection(TokioIo::new(Takeover::new(Lenient::new(stream))), service)
        .with_upgrades();
    tokio::pin!(serving);
    let result = tokio::select! {
        result = &mut serving => result,
        () = stop.cancelled() => {
            // Finish what is being answered; take no more.
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    if let Err(error) = result {
        tracing::debug!(%error, "a connection broke");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::folder;

    #[tokio::test]
    async fn a_socket_is_private_and_a_dead_one_is_replaced() {
        let folder = folder();
        let path = folder.join("s");
        let listener = bind_unix(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(bind_unix(&path).unwrap_err().to_string().contains("is in use"));
        drop(listener);
        drop(bind_unix(&path).unwrap());
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[tokio::test]
    async fn a_client_that_only_ends_its_writing_has_not_gone() {
        use tokio::io::AsyncWriteExt;
        let (ours, mut theirs) = tokio::net::UnixStream::pair().unwrap();
        let hangup = Hangup::watch(&ours).unwrap();
        theirs.write_all(b"request").await.unwrap();
        theirs.shutdown().await.unwrap();
        let early = tokio::time::timeout(Duration::from_millis(50), hangup.happened()).await;
        assert!(early.is_err(), "a half-close is no hang-up");
        drop(theirs);
        tokio::time::timeout(Duration::from_secs(60), hangup.happened()).await.expect("a close is one");
    }

    #[tokio::test]
    async fn places_that_cannot_be_are_named() {
        let folder = folder();
        let file = folder.join("file");
        std::fs::write(&file, "").unwrap();
        assert!(bind_unix(&file).unwrap_err().to_string().contains("is not a socket"));
        let long = folder.join("x".repeat(150));
        assert!(bind_unix(&long).unwrap_err().to_string().contains("107 at most"));
        std::fs::remove_dir_all(folder).unwrap();
    }
}
