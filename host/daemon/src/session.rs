//! Drives the host's end of the control session with the guest agent.
//!
//! One task per session. It keeps the guest's clock on the host's: once when the session begins, whenever the host's
//! wall clock has moved against its monotonic one (sleep, or someone set it), and every [`CLOCK_INTERVAL`].

use guest_protocol::{
    EngineSettings, Failure, FailureKind, Hello, HostProxies, Notice, Request, RequestId, Response, Role,
    Session, SessionEvent,
};
use std::collections::HashMap;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tracing::{debug, info, warn};

/// How often the guest's clock is compared although nothing seems to have happened.
const CLOCK_INTERVAL: Duration = Duration::from_secs(60);
/// A jump of the host's wall clock that the guest is told of at once.
const CLOCK_JUMP_MIN: Duration = Duration::from_millis(100);

/// Who waits for the guest's answer.
pub(crate) type Reply = oneshot::Sender<Result<Response, Failure>>;

/// What the daemon asks the guest.
pub(crate) enum Ask {
    PowerOff,
    Request(Request, Reply),
}

/// Speaks with the agent on `stream` until either side ends. Returns why it ended.
pub(crate) async fn drive(
    stream: UnixStream,
    (settings, proxies): (Option<EngineSettings>, HostProxies),
    mut asks: mpsc::Receiver<Ask>,
    notices: impl Fn(Notice),
) -> String {
    let start = Instant::now();
    let hello = Hello::new(concat!("engined ", env!("CARGO_PKG_VERSION")), "");
    let mut session = Session::new(Role::Host, hello, Duration::ZERO);
    let mut clock = HostClock::new(start);
    let mut open: HashMap<RequestId, Reply> = HashMap::new();
    let (mut reader, mut writer) = stream.into_split();
    let mut buffer = vec![0; 16 * 1024];
    let mut established = false;
    loop {
        while let Some(event) = session.next_event() {
            match event {
                SessionEvent::Established { hello } => {
                    info!(agent = %hello.program, boot = %hello.boot_id, "control session established");
                    established = true;
                    clock.due();
                    // The guest waits for it before it starts the engine.
                    let request = Request::Configure { settings: settings.clone(), proxies: proxies.clone() };
                    if let Err(error) = session.request(request, start.elapsed()) {
                        return format!("the engine cannot be told its settings: {error}");
                    }
                }
                SessionEvent::Notice(notice) => notices(notice),
                SessionEvent::Request { id, .. } => {
                    let refusal = Failure::new(FailureKind::Unsupported, "the daemon answers no requests");
                    if let Err(error) = session.respond(id, Err(refusal)) {
                        debug!(%error, "an answer to the guest was dropped");
                    }
                }
                SessionEvent::Response { id, result } => match (open.remove(&id), result) {
                    // Whoever asked may have given up.
                    (Some(reply), result) => drop(reply.send(result)),
                    (None, Err(failure)) => warn!(%failure, "the guest could not do what it was asked"),
                    (None, Ok(_)) => {}
                },
            }
        }
        if established
            && clock.take_due(Instant::now(), SystemTime::now())
            && let Err(error) =
                session.request(Request::SetClock { unix_nanos: unix_nanos() }, start.elapsed())
        {
            debug!(%error, "the guest's clock cannot be set now");
        }
        let output = session.take_output();
        if !output.is_empty()
            && let Err(error) = writer.write_all(&output).await
        {
            return format!("cannot write to the control session: {error}");
        }
        let wake = session.next_deadline().map_or(CLOCK_INTERVAL, |at| at.saturating_sub(start.elapsed()));
        tokio::select! {
            read = reader.read(&mut buffer) => match read {
                Ok(0) => {
                    session.disconnect();
                    return "the guest closed the control session".into();
                }
                Ok(count) => if let Err(error) = session.receive(&buffer[..count], start.elapsed()) {
                    return error.to_string();
                },
                Err(error) => return format!("cannot read from the control session: {error}"),
            },
            ask = asks.recv() => match ask {
                None => return "the machine is gone".into(),
                Some(Ask::PowerOff) => if let Err(error) = session.request(Request::PowerOff, start.elapsed()) {
                    warn!(%error, "the guest cannot be asked to power off");
                },
                Some(Ask::Request(request, reply)) => match session.request(request, start.elapsed()) {
                    Ok(id) => drop(open.insert(id, reply)),
                    Err(error) => drop(reply.send(Err(Failure::new(FailureKind::Closed, error.to_string())))),
                },
            },
            () = tokio::time::sleep(wake.min(CLOCK_INTERVAL)) => {
                if let Err(error) = session.tick(start.elapsed()) {
                    return error.to_string();
                }
            }
        }
    }
}

fn unix_nanos() -> i64 {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(elapsed.as_nanos()).unwrap_or(i64::MAX)
}

/// Decides when the guest must be told the time.
struct HostClock {
    told: Instant,
    /// Wall clock and monotonic clock at the last look, `None` when the guest has to be told whatever they say.
    last: Option<(Instant, SystemTime)>,
}

impl HostClock {
    fn new(now: Instant) -> Self {
        Self { told: now, last: None }
    }

    fn due(&mut self) {
        self.last = None;
    }

    fn take_due(&mut self, now: Instant, wall: SystemTime) -> bool {
        let jumped = match self.last {
            None => true,
            Some((then, wall_then)) => {
                let expected = wall_then + now.duration_since(then);
                let jump = wall.duration_since(expected).unwrap_or_else(|error| error.duration());
                jump >= CLOCK_JUMP_MIN
            }
        };
        self.last = Some((now, wall));
        let due = jumped || now.duration_since(self.told) >= CLOCK_INTERVAL;
        if due {
            self.told = now;
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use guest_protocol::{EngineState, GuestInfo};
    use std::sync::{Arc, Mutex};

    #[test]
    fn the_guest_is_told_at_first_after_a_jump_and_now_and_then() {
        let (start, wall) = (Instant::now(), SystemTime::now());
        let mut clock = HostClock::new(start);
        let mut due = |seconds: u64, wall_seconds: u64| {
            clock.take_due(start + Duration::from_secs(seconds), wall + Duration::from_secs(wall_seconds))
        };
        assert!(due(0, 0));
        assert!(!due(5, 5));
        assert!(due(10, 3610), "an hour of sleep");
        assert!(!due(15, 3615));
        assert!(due(20, 20), "set back");
        assert!(due(80, 80), "a minute later");
    }

    #[tokio::test]
    async fn the_session_sets_the_clock_passes_notices_and_answers_asks() {
        let (host, guest) = UnixStream::pair().unwrap();
        let (asks, queue) = mpsc::channel(4);
        let notices = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&notices);
        let driver = tokio::spawn(drive(host, (None, HostProxies::default()), queue, move |notice| {
            seen.lock().unwrap().push(notice)
        }));

        let agent = tokio::spawn(agent(guest));
        let (reply, answer) = oneshot::channel();
        tokio::time::sleep(Duration::from_millis(50)).await;
        asks.send(Ask::Request(Request::Info, reply)).await.unwrap();
        let info = answer.await.unwrap();
        assert!(matches!(&info, Ok(Response::Info(guest)) if guest.kernel == "6.12"), "{info:?}");
        asks.send(Ask::PowerOff).await.unwrap();
        let requests = agent.await.unwrap();
        let is_now = |request: &Request| matches!(request, Request::SetClock { unix_nanos } if *unix_nanos > 1_700_000_000_000_000_000);
        assert!(requests.iter().any(is_now), "{requests:?}");
        let first = Request::Configure { settings: None, proxies: HostProxies::default() };
        assert_eq!(requests[0], first, "before the engine is started");
        assert!(requests.contains(&Request::PowerOff));
        assert_eq!(driver.await.unwrap(), "the guest closed the control session");
        assert_eq!(*notices.lock().unwrap(), [Notice::Engine(EngineState::Ready)]);
    }

    /// Plays the agent until it is asked to power off; returns what it was asked.
    async fn agent(mut stream: UnixStream) -> Vec<Request> {
        let mut session = Session::new(Role::Guest, Hello::new("agent", "b"), Duration::ZERO);
        let mut requests = Vec::new();
        let mut buffer = [0; 4096];
        loop {
            while let Some(event) = session.next_event() {
                match event {
                    SessionEvent::Established { .. } => {
                        session.notify(Notice::Engine(EngineState::Ready)).unwrap()
                    }
                    SessionEvent::Request { id, request } => {
                        let response = match &request {
                            Request::Info => Response::Info(GuestInfo {
                                kernel: "6.12".into(),
                                uptime_ms: 1,
                                memory_total_bytes: 1,
                                memory_available_bytes: 1,
                                memory_cached_bytes: 0,
                                disk_total_bytes: 1,
                                disk_used_bytes: 1,
                                engine: EngineState::Ready,
                            }),
                            _ => Response::Done,
                        };
                        requests.push(request);
                        session.respond(id, Ok(response)).unwrap();
                    }
                    _ => {}
                }
            }
            stream.write_all(&session.take_output()).await.unwrap();
            if requests.contains(&Request::PowerOff) {
                return requests;
            }
            let count = stream.read(&mut buffer).await.unwrap();
            session.receive(&buffer[..count], Duration::from_secs(1)).unwrap();
        }
    }
}
