//! What the containers of one machine hold on this host, and the engine's session on which it asks for it.
//!
//! A lease is granted whole or refused with the reason, before the container starts. The table lives as long as the VM
//! process. When the engine in the guest restarts, its leases stay for [`ABSENCE_MAX`]: its first request then says which
//! containers still run, and the rest is let go.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use guest_protocol::{
    Failure, FailureKind, GrantedPort, Hello, Lease, PortRequest, Request, Response, Role, Session,
    SessionEvent,
};
use host_forward::{BindError, Forwarder, Sink};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::Mutex;
use tracing::{debug, info, warn};

use crate::shares::Shares;

/// How long an engine may be away (it is being restarted) before what its containers held is let go.
const ABSENCE_MAX: Duration = Duration::from_secs(60);
/// Between two looks at a session in which nothing happens.
const WAIT_MAX: Duration = Duration::from_secs(60);

/// The table of leases of one machine.
pub(crate) struct Leases {
    sink: Sink,
    shares: Arc<Shares>,
    held: Mutex<HashMap<String, Forwarder>>,
    /// Counts sessions, so that the end of an old one does not take away what a new one holds.
    sessions: AtomicU64,
}

impl Leases {
    /// An empty table, whose connections go to `sink`; binds come from `shares`.
    pub(crate) fn new(sink: Sink, shares: Arc<Shares>) -> Self {
        Self { sink, shares, held: Mutex::default(), sessions: AtomicU64::new(0) }
    }

    /// Speaks with an engine on `stream` until it hangs up.
    pub(crate) async fn serve(self: Arc<Self>, stream: UnixStream) {
        let session = self.sessions.fetch_add(1, Ordering::Relaxed) + 1;
        let why = self.drive(stream).await;
        info!(%why, "the engine's session ended");
        tokio::time::sleep(ABSENCE_MAX).await;
        if self.sessions.load(Ordering::Relaxed) == session {
            self.release_all().await;
        }
    }

    async fn drive(&self, stream: UnixStream) -> String {
        let start = Instant::now();
        let hello = Hello::new(concat!("engined ", env!("CARGO_PKG_VERSION")), "");
        let mut session = Session::new(Role::Host, hello, Duration::ZERO);
        let (mut reader, mut writer) = stream.into_split();
        let mut buffer = vec![0; 16 * 1024];
        loop {
            while let Some(event) = session.next_event() {
                match event {
                    SessionEvent::Established { hello } => {
                        info!(engine = %hello.program, "session established")
                    }
                    SessionEvent::Request { id, request } => {
                        let answer = self.answer(request).await;
                        if let Err(error) = session.respond(id, answer) {
                            debug!(%error, "an answer to the engine was dropped");
                        }
                    }
                    // Nothing is asked, and the engine has nothing to tell unasked.
                    SessionEvent::Notice(_) | SessionEvent::Response { .. } => {}
                }
            }
            let output = session.take_output();
            if !output.is_empty()
                && let Err(error) = writer.write_all(&output).await
            {
                return format!("cannot write to it: {error}");
            }
            let wake = session.next_deadline().map_or(WAIT_MAX, |at| at.saturating_sub(start.elapsed()));
            tokio::select! {
                read = reader.read(&mut buffer) => match read {
                    Ok(0) => return "the engine closed it".into(),
                    Ok(count) => if let Err(error) = session.receive(&buffer[..count], start.elapsed()) {
                        return error.to_string();
                    },
                    Err(error) => return format!("cannot read from it: {error}"),
                },
                () = tokio::time::sleep(wake) => if let Err(error) = session.tick(start.elapsed()) {
                    return error.to_string();
                },
            }
        }
    }

    async fn answer(&self, request: Request) -> Result<Response, Failure> {
        match request {
            Request::Acquire { container, ports } => match self.acquire(container, &ports).await {
                Ok(ports) => Ok(Response::Granted { ports }),
                Err(why) => Err(Failure::new(FailureKind::Failed, why)),
            },
            Request::Release { container } => {
                self.release(&container).await;
                Ok(Response::Done)
            }
            Request::Locate { sources } => {
                let shares = Arc::clone(&self.shares);
                let located = tokio::task::spawn_blocking(move || {
                    sources.iter().map(|source| shares.locate(source)).collect()
                });
                let places =
                    located.await.map_err(|error| Failure::new(FailureKind::Failed, error.to_string()))?;
                Ok(Response::Located { places })
            }
            Request::Reconcile { leases } => Ok(Response::Reconciled { lost: self.reconcile(leases).await }),
            Request::SetClock { .. }
            | Request::Configure { .. }
            | Request::PowerOff
            | Request::Info
            | Request::GrowDisk { .. }
            | Request::UseProcessors { .. } => Err(Failure::new(
                FailureKind::Unsupported,
                "the daemon answers requests for leases and shares only",
            )),
        }
    }

    async fn acquire(&self, container: String, ports: &[PortRequest]) -> Result<Vec<GrantedPort>, String> {
        let mut held = self.held.lock().await;
        if let Some(before) = held.remove(&container) {
            before.close().await;
        }
        let forwarder =
            Forwarder::bind(&container, ports, &self.sink).map_err(|error| refusal(&error, &held))?;
        let granted = forwarder.ports().to_vec();
        debug!(container, ports = ?granted, "lease granted");
        held.insert(container, forwarder);
        Ok(granted)
    }

    async fn release(&self, container: &str) {
        if let Some(forwarder) = self.held.lock().await.remove(container) {
            forwarder.close().await;
            debug!(container, "lease released");
        }
    }

    /// Makes the table equal to `leases`; what cannot be held any more is returned as sentences.
    async fn reconcile(&self, leases: Vec<Lease>) -> Vec<String> {
        let mut held = self.held.lock().await;
        let mut before = std::mem::take(&mut *held);
        let mut wanted = Vec::new();
        for lease in leases {
            match before.remove(&lease.container) {
                Some(forwarder) if same_ports(forwarder.ports(), &lease.ports) => {
                    held.insert(lease.container, forwarder);
                }
                Some(forwarder) => {
                    forwarder.close().await;
                    wanted.push(lease);
                }
                None => wanted.push(lease),
            }
        }
        // First all that goes, then what comes: they may share a port.
        for forwarder in before.into_values() {
            forwarder.close().await;
        }
        let mut lost = Vec::new();
        for Lease { container, ports } in wanted {
            let requests: Vec<PortRequest> = ports.iter().map(exactly).collect();
            match Forwarder::bind(&container, &requests, &self.sink) {
                Ok(forwarder) => drop(held.insert(container, forwarder)),
                Err(error) => {
                    warn!(container, %error, "a lease is lost");
                    lost.push(format!("container {container} is no longer published: {}", sentence(&error)));
                }
            }
        }
        lost
    }

    /// Lets go of everything.
    pub(crate) async fn release_all(&self) {
        for (_, forwarder) in self.held.lock().await.drain() {
            forwarder.close().await;
        }
    }
}

/// Why a lease is not granted; a port that another container has is told by the container, not by this process.
fn refusal(error: &BindError, held: &HashMap<String, Forwarder>) -> String {
    if let BindError::InUse { address, transport, .. } = error {
        let clashes = |port: &GrantedPort| {
            let overlap = port.address == address.ip()
                || port.address.is_ipv4() == address.is_ipv4()
                    && (port.address.is_unspecified() || address.ip().is_unspecified());
            port.transport == *transport && port.port == address.port() && overlap
        };
        let holder = held.iter().find(|(_, forwarder)| forwarder.ports().iter().any(clashes));
        if let Some((container, _)) = holder {
            let container: String = container.chars().take(12).collect();
            return format!(
                "Bind for {address} failed: port is already allocated (published by container {container})"
            );
        }
    }
    sentence(error)
}

fn same_ports(held: &[GrantedPort], wanted: &[GrantedPort]) -> bool {
    held.len() == wanted.len() && held.iter().all(|port| wanted.contains(port))
}

/// Asks for what was granted before.
fn exactly(port: &GrantedPort) -> PortRequest {
    PortRequest {
        transport: port.transport,
        addresses: vec![port.address],
        first: port.port,
        last: port.port,
        container_port: port.container_port,
    }
}

/// The error with its causes.
fn sentence(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use guest_protocol::Transport;
    use std::net::{IpAddr, Ipv4Addr, TcpListener};

    /// The engine's end.
    struct Engine {
        session: Session,
        stream: UnixStream,
    }

    impl Engine {
        async fn connect(leases: &Arc<Leases>) -> Self {
            let (near, far) = UnixStream::pair().unwrap();
            tokio::spawn(Arc::clone(leases).serve(far));
            let session = Session::new(Role::Guest, Hello::new("guest-engine test", ""), Duration::ZERO);
            let mut engine = Self { session, stream: near };
            assert!(matches!(engine.next_event().await, SessionEvent::Established { .. }));
            engine
        }

        async fn next_event(&mut self) -> SessionEvent {
            loop {
                self.stream.write_all(&self.session.take_output()).await.unwrap();
                if let Some(event) = self.session.next_event() {
                    return event;
                }
                let mut input = [0; 1000];
                let count = self.stream.read(&mut input).await.unwrap();
                assert!(count > 0, "the daemon hung up");
                self.session.receive(&input[..count], Duration::ZERO).unwrap();
            }
        }

        async fn ask(&mut self, request: Request) -> Result<Response, Failure> {
            let asked = self.session.request(request, Duration::ZERO).unwrap();
            match self.next_event().await {
                SessionEvent::Response { id, result } if id == asked => result,
                other => panic!("{other:?}"),
            }
        }

        async fn acquire(&mut self, container: &str, port: u16) -> Result<Vec<GrantedPort>, Failure> {
            let request = PortRequest {
                transport: Transport::Tcp,
                addresses: vec![IpAddr::V4(Ipv4Addr::LOCALHOST)],
                first: port,
                last: port,
                container_port: 80,
            };
            match self.ask(Request::Acquire { container: container.into(), ports: vec![request] }).await? {
                Response::Granted { ports } => Ok(ports),
                other => panic!("{other:?}"),
            }
        }
    }

    fn leases() -> Arc<Leases> {
        Arc::new(Leases::new(Arc::new(|_header, _stream| {}), Arc::default()))
    }

    fn is_free(port: u16) -> bool {
        TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
    }

    #[tokio::test]
    async fn a_lease_is_granted_held_and_released() {
        let leases = leases();
        let mut engine = Engine::connect(&leases).await;
        let granted = engine.acquire("a", 0).await.unwrap();
        let port = granted[0].port;
        assert!(!is_free(port));
        let refused = engine.acquire("b", port).await.unwrap_err();
        assert!(
            refused.message.contains("port is already allocated (published by container a)"),
            "{refused}"
        );
        // The same container again is no conflict with itself.
        assert_eq!(engine.acquire("a", port).await.unwrap(), granted);
        assert_eq!(engine.ask(Request::Release { container: "a".into() }).await, Ok(Response::Done));
        assert!(is_free(port));
        assert_eq!(engine.ask(Request::Release { container: "a".into() }).await, Ok(Response::Done));
        assert_eq!(engine.ask(Request::Info).await.unwrap_err().kind, FailureKind::Unsupported);
    }

    #[tokio::test]
    async fn a_new_engine_reconciles() {
        let leases = leases();
        let mut engine = Engine::connect(&leases).await;
        let kept = engine.acquire("kept", 0).await.unwrap();
        let gone = engine.acquire("gone", 0).await.unwrap();
        drop(engine);
        let mut engine = Engine::connect(&leases).await;
        assert!(!is_free(kept[0].port), "a lease outlives the engine that asked for it");
        // `moved` holds in the engine's books what `gone` holds here, and `lost` what somebody else has.
        let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let elsewhere = GrantedPort { port: taken.local_addr().unwrap().port(), ..kept[0] };
        let told = vec![
            Lease { container: "kept".into(), ports: kept.clone() },
            Lease { container: "moved".into(), ports: gone.clone() },
            Lease { container: "lost".into(), ports: vec![elsewhere] },
        ];
        let Ok(Response::Reconciled { lost }) = engine.ask(Request::Reconcile { leases: told }).await else {
            panic!("not reconciled")
        };
        assert!(matches!(lost.as_slice(), [why] if why.contains("container lost")), "{lost:?}");
        let held = leases.held.lock().await;
        let mut names: Vec<&str> = held.keys().map(String::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["kept", "moved"]);
        assert_eq!(held["moved"].ports(), gone);
        drop(held);
        leases.release_all().await;
        assert!(is_free(kept[0].port) && is_free(gone[0].port));
    }

    #[tokio::test(start_paused = true)]
    async fn an_engine_that_stays_away_loses_its_leases() {
        let leases = leases();
        let mut engine = Engine::connect(&leases).await;
        let granted = engine.acquire("a", 0).await.unwrap();
        drop(engine);
        tokio::time::sleep(ABSENCE_MAX * 2).await;
        assert!(is_free(granted[0].port));
    }
}
