//! The engine's session with the daemon on the host: asks for what containers need there.
//!
//! One task keeps the session and connects again when it breaks. Its first request tells the host which leases there
//! are, so the host's table equals ours after either side has been away.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use guest_protocol::{
    BindPlace, BindSource, Failure, FailureKind, GrantedPort, Hello, Landing, Lease, PortRequest, Request,
    RequestId, Response, Role, Session, SessionEvent, port,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_vsock::{VsockAddr, VsockStream};

/// Between two attempts to reach the host.
const RETRY: Duration = Duration::from_millis(500);
/// How long a request may wait for a session: the daemon answers at once when it is there.
const SESSION_TIME_MAX: Duration = Duration::from_secs(15);
/// Requests that wait for the session.
const QUEUE_LENGTH_MAX: usize = 1024;

/// Why the host holds nothing for a container.
#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    /// The host says why.
    #[error("{0}")]
    Refused(String),
    /// There is no session.
    #[error("the host does not answer: see `engine machine logs --daemon` on it")]
    Unreachable,
}

struct Ask {
    request: Request,
    reply: oneshot::Sender<Result<Response, Failure>>,
}

/// Asks the host. Cheap to clone.
#[derive(Clone, Debug)]
pub struct HostLeases {
    asks: mpsc::Sender<Ask>,
}

/// What keeps the session. Nothing is asked before it is started.
pub struct Keeper {
    queue: mpsc::Receiver<Ask>,
}

impl Keeper {
    /// Keeps a session until `stop`. `held` gives all leases of running containers whenever a session begins: start it
    /// once they are known.
    pub fn start(self, held: impl Fn() -> Vec<Lease> + Send + Sync + 'static, stop: CancellationToken) {
        tokio::spawn(async move { stop.run_until_cancelled(keep(self.queue, Arc::new(held))).await });
    }
}

impl HostLeases {
    /// The end that asks, and the one that keeps the session.
    pub fn new() -> (Self, Keeper) {
        let (asks, queue) = mpsc::channel(QUEUE_LENGTH_MAX);
        (Self { asks }, Keeper { queue })
    }

    /// Has the host hold `ports` for a container, all or none.
    pub async fn acquire(
        &self,
        container: &str,
        ports: Vec<PortRequest>,
    ) -> Result<Vec<GrantedPort>, LeaseError> {
        match self.ask(Request::Acquire { container: container.to_owned(), ports }).await? {
            Response::Granted { ports } => Ok(ports),
            _ => Err(LeaseError::Refused("the host answered something else than a lease".into())),
        }
    }

    /// Has the host bring connections to a container's published ports there from now on.
    pub async fn land(&self, container: &str, landings: Vec<Landing>) -> Result<(), LeaseError> {
        match self.ask(Request::Land { container: container.to_owned(), landings }).await? {
            Response::Done => Ok(()),
            _ => Err(LeaseError::Refused("the host answered something else than that it is done".into())),
        }
    }

    /// Has the host tell where the source of a bind is.
    pub async fn locate(&self, source: BindSource) -> Result<BindPlace, LeaseError> {
        match self.ask(Request::Locate { sources: vec![source] }).await? {
            Response::Located { mut places } if places.len() == 1 => Ok(places.remove(0)),
            _ => Err(LeaseError::Refused("the host answered something else than a place".into())),
        }
    }

    /// Has the host let go of all that a container holds, before anything that is asked later. A host that cannot be
    /// reached learns it from the next session's first request.
    pub fn release(&self, container: &str) {
        let (reply, _nobody_waits) = oneshot::channel();
        let request = Request::Release { container: container.to_owned() };
        if self.asks.try_send(Ask { request, reply }).is_err() {
            tracing::debug!(container, "the host was not told of a release");
        }
    }

    async fn ask(&self, request: Request) -> Result<Response, LeaseError> {
        let (reply, answer) = oneshot::channel();
        self.asks.send(Ask { request, reply }).await.map_err(|_| LeaseError::Unreachable)?;
        match tokio::time::timeout(SESSION_TIME_MAX, answer).await {
            Ok(Ok(Ok(response))) => Ok(response),
            Ok(Ok(Err(failure))) if failure.kind == FailureKind::Failed => {
                Err(LeaseError::Refused(failure.message))
            }
            Ok(Ok(Err(_)) | Err(_)) | Err(_) => Err(LeaseError::Unreachable),
        }
    }
}

type Held = Arc<dyn Fn() -> Vec<Lease> + Send + Sync>;

async fn keep(mut queue: mpsc::Receiver<Ask>, held: Held) {
    let mut told = false;
    loop {
        match VsockStream::connect(VsockAddr::new(port::HOST_CID, port::LEASES)).await {
            Ok(stream) => {
                told = false;
                let why = drive(stream, &mut queue, &held).await;
                tracing::warn!(%why, "the session with the host ended");
            }
            Err(error) if !std::mem::replace(&mut told, true) => {
                tracing::info!(%error, "the host does not take the session yet");
            }
            Err(_) => {}
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Drives one session over one stream until it ends; returns why.
async fn drive<S>(stream: S, queue: &mut mpsc::Receiver<Ask>, held: &Held) -> String
where
    S: AsyncRead + AsyncWrite,
{
    let (mut reader, mut writer) = tokio::io::split(stream);
    let began = Instant::now();
    let hello = Hello::new(concat!("guest-engine ", env!("CARGO_PKG_VERSION")), "");
    let mut session = Session::new(Role::Guest, hello, Duration::ZERO);
    let mut open: HashMap<RequestId, oneshot::Sender<Result<Response, Failure>>> = HashMap::new();
    // Nothing is asked before the host knows what we hold: it would let go of it again.
    let (mut reconciling, mut ready) = (None, false);
    let mut input = vec![0; 16 * 1024];
    loop {
        while let Some(event) = session.next_event() {
            match event {
                SessionEvent::Established { hello } => {
                    tracing::info!(host = hello.program, "session with the host established");
                    match session.request(Request::Reconcile { leases: held() }, began.elapsed()) {
                        Ok(id) => reconciling = Some(id),
                        Err(error) => return error.to_string(),
                    }
                }
                SessionEvent::Response { id, result } if Some(id) == reconciling => match result {
                    Ok(Response::Reconciled { lost }) => {
                        ready = true;
                        for why in lost {
                            tracing::warn!("{why}");
                        }
                    }
                    other => return format!("the host does not reconcile: {other:?}"),
                },
                SessionEvent::Response { id, result } => {
                    // Who asked may have given up.
                    let _given_up = open.remove(&id).map(|reply| reply.send(result));
                }
                SessionEvent::Request { id, .. } => {
                    let refusal = Failure::new(FailureKind::Unsupported, "the engine answers no requests");
                    if let Err(error) = session.respond(id, Err(refusal)) {
                        return error.to_string();
                    }
                }
                SessionEvent::Notice(_) => {}
            }
        }
        let output = session.take_output();
        if let Err(error) = writer.write_all(&output).await {
            return format!("cannot write to the host: {error}");
        }
        let Some(deadline) = session.next_deadline() else { return "it is over".into() };
        let outcome = tokio::select! {
            read = reader.read(&mut input) => match read {
                Ok(0) => return "the host hung up".into(),
                Ok(count) => session.receive(&input[..count], began.elapsed()),
                Err(error) => return format!("cannot read from the host: {error}"),
            },
            ask = queue.recv(), if ready => match ask {
                None => return "the engine is ending".into(),
                // Nobody waits for it any more: it would be held for nobody.
                Some(ask) if ask.reply.is_closed() && matches!(ask.request, Request::Acquire { .. }) => Ok(()),
                Some(ask) => session.request(ask.request, began.elapsed()).map(|id| drop(open.insert(id, ask.reply))),
            },
            () = tokio::time::sleep_until(began + deadline) => session.tick(began.elapsed()),
        };
        if let Err(error) = outcome {
            return error.to_string();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use guest_protocol::Transport;
    use tokio::net::UnixStream;

    fn lease() -> Lease {
        let port = GrantedPort {
            transport: Transport::Tcp,
            address: std::net::Ipv4Addr::LOCALHOST.into(),
            port: 8080,
            container_port: 80,
        };
        Lease { container: "c1".into(), ports: vec![port], landings: Vec::new() }
    }

    /// The host's end.
    struct Host {
        session: Session,
        stream: UnixStream,
    }

    impl Host {
        async fn next_request(&mut self) -> (RequestId, Request) {
            loop {
                self.stream.write_all(&self.session.take_output()).await.unwrap();
                match self.session.next_event() {
                    Some(SessionEvent::Request { id, request }) => return (id, request),
                    Some(_) => {}
                    None => {
                        let mut input = [0; 1000];
                        let count = self.stream.read(&mut input).await.unwrap();
                        assert!(count > 0, "the engine hung up");
                        self.session.receive(&input[..count], Duration::ZERO).unwrap();
                    }
                }
            }
        }

        async fn answer(&mut self, id: RequestId, result: Result<Response, Failure>) {
            self.session.respond(id, result).unwrap();
            self.stream.write_all(&self.session.take_output()).await.unwrap();
        }
    }

    #[tokio::test]
    async fn the_host_is_told_what_is_held_before_anything_is_asked() {
        let (near, far) = UnixStream::pair().unwrap();
        let (asks, mut queue) = mpsc::channel(4);
        let leases = HostLeases { asks };
        let held: Held = Arc::new(|| vec![lease()]);
        let driven = tokio::spawn(async move { drive(near, &mut queue, &held).await });
        let asking = leases.clone();
        let acquired = tokio::spawn(async move { asking.acquire("c2", Vec::new()).await });
        let session = Session::new(Role::Host, Hello::new("engined test", ""), Duration::ZERO);
        let mut host = Host { session, stream: far };

        let (id, request) = host.next_request().await;
        assert_eq!(request, Request::Reconcile { leases: vec![lease()] });
        host.answer(id, Ok(Response::Reconciled { lost: Vec::new() })).await;
        let (id, request) = host.next_request().await;
        assert_eq!(request, Request::Acquire { container: "c2".into(), ports: Vec::new() });
        host.answer(id, Err(Failure::new(FailureKind::Failed, "port 1 is in use"))).await;
        let refused = acquired.await.unwrap().unwrap_err();
        assert!(matches!(&refused, LeaseError::Refused(why) if why == "port 1 is in use"), "{refused}");
        drop(host);
        assert_eq!(driven.await.unwrap(), "the host hung up");
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_host_the_answer_is_a_sentence() {
        let (asks, _queue) = mpsc::channel(4);
        let refused = HostLeases { asks }.acquire("c", Vec::new()).await.unwrap_err();
        assert!(matches!(refused, LeaseError::Unreachable), "{refused}");
    }
}
