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
    Failure, FailureKind, GrantedPort, Hello, Landing, Lease, PortRequest, Request, Response, Role, Session,
    SessionEvent,
};
use host_forward::{BindError, Forwarder, Sink};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{Mutex, MutexGuard};
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
    held: Mutex<Held>,
    /// Counts sessions, so that the end of an old one does not take away what a new one holds.
    sessions: AtomicU64,
}

/// The leases by container.
#[derive(Default)]
struct Held {
    forwarders: HashMap<String, Forwarder>,
    /// The machine has ended: what an engine asked for before and is answered only now is not held for anybody.
    closed: bool,
}

impl Leases {
    /// An empty table, whose connections go to `sink`; binds come from `shares`.
    pub(crate) fn new(sink: Sink, shares: Arc<Shares>) -> Self {
        Self { sink, shares, held: Mutex::default(), sessions: AtomicU64::new(0) }
    }

    /// Speaks with an engine on `stream` until it hangs up.
    pub(crate) async fn serve(self: Arc<Self>, stream: UnixStream) {
        let session = self.sessions.fetch_add(1, Ordering::Relaxed) + 1;
        let why = self.drive(session, stream).await;
        info!(%why, "the engine's session ended");
        tokio::time::sleep(ABSENCE_MAX).await;
        if self.sessions.load(Ordering::Relaxed) == session {
            self.release_all().await;
        }
    }

    async fn drive(&self, number: u64, stream: UnixStream) -> String {
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
                        let answer = self.answer(number, request).await;
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

    async fn answer(&self, session: u64, request: Request) -> Result<Response, Failure> {
        let refused = |why| Failure::new(FailureKind::Failed, why);
        match request {
            Request::Acquire { container, ports } => {
                let ports = self.acquire(session, container, &ports).await.map_err(refused)?;
                Ok(Response::Granted { ports })
            }
            Request::Land { container, landings } => {
                self.land(session, &container, landings).await.map_err(refused)?;
                Ok(Response::Done)
            }
            Request::Release { container } => {
                self.release(session, &container).await.map_err(refused)?;
                Ok(Response::Done)
            }
            Request::Locate { sources } => {
                let shares = Arc::clone(&self.shares);
                let located = tokio::task::spawn_blocking(move || {
                    sources.iter().map(|source| shares.locate(source)).collect()
                });
                let places = located.await.map_err(|error| refused(error.to_string()))?;
                Ok(Response::Located { places })
            }
            Request::Reconcile { leases } => {
                let lost = self.reconcile(session, leases).await.map_err(refused)?;
                Ok(Response::Reconciled { lost })
            }
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

    /// The table, for what is asked on a session. One that has ended, or that another follows, changes nothing any
    /// more: nobody would let go of it.
    async fn table(&self, session: u64) -> Result<MutexGuard<'_, Held>, String> {
        let held = self.held.lock().await;
        if held.closed {
            return Err("the machine has ended".into());
        }
        if self.sessions.load(Ordering::Relaxed) != session {
            return Err("the engine has been restarted".into());
        }
        Ok(held)
    }

    async fn acquire(
        &self,
        session: u64,
        container: String,
        ports: &[PortRequest],
    ) -> Result<Vec<GrantedPort>, String> {
        let mut held = self.table(session).await?;
        let held = &mut held.forwarders;
        if let Some(before) = held.remove(&container) {
            before.close().await;
        }
        let forwarder =
            Forwarder::bind(&container, ports, &self.sink).map_err(|error| refusal(&error, held))?;
        let granted = forwarder.ports().to_vec();
        debug!(container, ports = ?granted, "lease granted");
        held.insert(container, forwarder);
        Ok(granted)
    }

    async fn land(&self, session: u64, container: &str, landings: Vec<Landing>) -> Result<(), String> {
        if let Some(forwarder) = self.table(session).await?.forwarders.get(container) {
            debug!(container, ?landings, "connections land elsewhere");
            forwarder.land(landings);
        }
        Ok(())
    }

    async fn release(&self, session: u64, container: &str) -> Result<(), String> {
        if let Some(forwarder) = self.table(session).await?.forwarders.remove(container) {
            forwarder.close().await;
            debug!(container, "lease released");
        }
        Ok(())
    }

    /// Makes the table equal to `leases`; what cannot be held any more is returned as sentences.
    async fn reconcile(&self, session: u64, leases: Vec<Lease>) -> Result<Vec<String>, String> {
        let mut held = self.table(session).await?;
        let held = &mut held.forwarders;
        let mut before = std::mem::take(held);
        let mut wanted = Vec::new();
        for lease in leases {
            match before.remove(&lease.container) {
                Some(forwarder) if same_ports(forwarder.ports(), &lease.ports) => {
                    forwarder.land(lease.landings);
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
        for Lease { container, ports, landings } in wanted {
            let requests: Vec<PortRequest> = ports.iter().map(exactly).collect();
            match Forwarder::bind(&container, &requests, &self.sink) {
                Ok(forwarder) => {
                    forwarder.land(landings);
                    held.insert(container, forwarder);
                }
                Err(error) => {
                    warn!(container, %error, "a lease is lost");
                    lost.push(format!("container {container} is no longer published: {}", sentence(&error)));
                }
            }
        }
        Ok(lost)
    }

    /// Lets go of everything.
    async fn release_all(&self) {
        for (_, forwarder) in self.held.lock().await.forwarders.drain() {
            forwarder.close().await;
        }
    }

    /// Lets go of everything for ever: the machine has ended.
    pub(crate) async fn close(&self) {
        self.held.lock().await.closed = true;
        self.release_all().await;
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
    use guest_protocol::forward::Header;
    use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
    use tokio::sync::mpsc;

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
            match self.ask(acquire(container, port)).await? {
                Response::Granted { ports } => Ok(ports),
                other => panic!("{other:?}"),
            }
        }
    }

    fn acquire(container: &str, port: u16) -> Request {
        let request = PortRequest {
            transport: Transport::Tcp,
            addresses: vec![IpAddr::V4(Ipv4Addr::LOCALHOST)],
            first: port,
            last: port,
            container_port: 80,
        };
        Request::Acquire { container: container.into(), ports: vec![request] }
    }

    fn leases() -> Arc<Leases> {
        Arc::new(Leases::new(Arc::new(|_header, _stream| {}), Arc::default()))
    }

    /// The same, with what is told of each connection.
    fn told_leases() -> (Arc<Leases>, mpsc::UnboundedReceiver<Header>) {
        let (sender, headers) = mpsc::unbounded_channel();
        let sink = move |header, _stream| sender.send(header).unwrap();
        (Arc::new(Leases::new(Arc::new(sink), Arc::default())), headers)
    }

    async fn landing(port: u16, headers: &mut mpsc::UnboundedReceiver<Header>) -> Option<SocketAddr> {
        let _client = tokio::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.unwrap();
        headers.recv().await.unwrap().landing
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
    async fn connections_land_where_the_engine_says() {
        let (leases, mut headers) = told_leases();
        let mut engine = Engine::connect(&leases).await;
        let port = engine.acquire("a", 0).await.unwrap()[0].port;
        assert_eq!(landing(port, &mut headers).await, None);
        let at = SocketAddr::from(([198, 18, 0, 3], 1));
        let told = |container: &str, landings| Request::Land { container: container.into(), landings };
        let one = vec![Landing { container_port: 80, at }];
        assert_eq!(engine.ask(told("a", one.clone())).await, Ok(Response::Done));
        assert_eq!(landing(port, &mut headers).await, Some(at));
        assert_eq!(engine.ask(told("stranger", one)).await, Ok(Response::Done));
        assert_eq!(engine.ask(told("a", Vec::new())).await, Ok(Response::Done));
        assert_eq!(landing(port, &mut headers).await, None);
    }

    #[tokio::test]
    async fn a_new_engine_reconciles() {
        let (leases, mut headers) = told_leases();
        let mut engine = Engine::connect(&leases).await;
        let kept = engine.acquire("kept", 0).await.unwrap();
        let gone = engine.acquire("gone", 0).await.unwrap();
        drop(engine);
        let mut engine = Engine::connect(&leases).await;
        assert!(!is_free(kept[0].port), "a lease outlives the engine that asked for it");
        // `moved` holds in the engine's books what `gone` holds here, and `lost` what somebody else has.
        let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let elsewhere = GrantedPort { port: taken.local_addr().unwrap().port(), ..kept[0] };
        let at = SocketAddr::from(([198, 18, 0, 3], 1));
        let lands = Landing { container_port: 80, at };
        let told = vec![
            Lease { container: "kept".into(), ports: kept.clone(), landings: vec![lands] },
            Lease { container: "moved".into(), ports: gone.clone(), landings: vec![lands] },
            Lease { container: "lost".into(), ports: vec![elsewhere], landings: Vec::new() },
        ];
        let Ok(Response::Reconciled { lost }) = engine.ask(Request::Reconcile { leases: told }).await else {
            panic!("not reconciled")
        };
        assert!(matches!(lost.as_slice(), [why] if why.contains("container lost")), "{lost:?}");
        let guard = leases.held.lock().await;
        let held = &guard.forwarders;
        let mut names: Vec<&str> = held.keys().map(String::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["kept", "moved"]);
        assert_eq!(held["moved"].ports(), gone);
        drop(guard);
        for port in [kept[0].port, gone[0].port] {
            assert_eq!(landing(port, &mut headers).await, Some(at));
        }
        leases.release_all().await;
        assert!(is_free(kept[0].port) && is_free(gone[0].port));
    }

    /// A lease that was asked for by an engine that died before it heard the answer is nobody's.
    #[tokio::test]
    async fn an_engine_that_dies_while_it_asks_leaves_no_listener() {
        let leases = leases();
        let mut engine = Engine::connect(&leases).await;
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
        engine.session.request(acquire("asked", port), Duration::ZERO).unwrap();
        engine.stream.write_all(&engine.session.take_output()).await.unwrap();
        drop(engine);
        let mut engine = Engine::connect(&leases).await;
        // Whether the daemon comes to the question before or after this: the new engine decides.
        let told = Request::Reconcile { leases: Vec::new() };
        assert_eq!(engine.ask(told).await, Ok(Response::Reconciled { lost: Vec::new() }));
        assert_eq!(engine.acquire("again", port).await.unwrap()[0].port, port);
    }

    #[tokio::test]
    async fn what_an_engine_asked_before_another_came_is_refused() {
        let leases = leases();
        let mut before = Engine::connect(&leases).await;
        let held = before.acquire("held", 0).await.unwrap();
        let mut engine = Engine::connect(&leases).await;
        let refused = before.acquire("late", 0).await.unwrap_err();
        assert_eq!(refused.message, "the engine has been restarted");
        let refused = before.ask(Request::Release { container: "held".into() }).await.unwrap_err();
        assert_eq!(refused.message, "the engine has been restarted");
        assert!(!is_free(held[0].port));
        assert_eq!(engine.ask(Request::Release { container: "held".into() }).await, Ok(Response::Done));
        assert!(is_free(held[0].port));
    }

    #[tokio::test]
    async fn a_machine_that_ends_while_its_engine_asks_leaves_no_listener() {
        let leases = leases();
        let mut engine = Engine::connect(&leases).await;
        let held = engine.acquire("held", 0).await.unwrap();
        leases.close().await;
        assert!(is_free(held[0].port));
        // The session outlives the machine by what was on its way.
        let refused = engine.acquire("late", held[0].port).await.unwrap_err();
        assert_eq!(refused.message, "the machine has ended");
        let told = vec![Lease { container: "held".into(), ports: held.clone(), landings: Vec::new() }];
        let refused = engine.ask(Request::Reconcile { leases: told }).await.unwrap_err();
        assert_eq!(refused.message, "the machine has ended");
        assert!(is_free(held[0].port));
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
