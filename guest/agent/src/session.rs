//! The agent's end of the control session: the socket and the clock around [`guest_protocol::Session`].
//!
//! One task connects, again and again, for as long as the machine runs. It answers the host's requests, and passes on what
//! changes in the [`Status`]. Requests that change the machine take longer than the session may be silent: a task beside
//! it carries them out, one at a time, and goes on when the session ends.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use guest_protocol::{
    EngineSettings, Failure, FailureKind, Hello, HostProxies, Request, RequestId, Response, Role, Session,
    SessionEvent, port,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::watch;
use tokio::task::{JoinHandle, spawn_local};
use tokio::time::Instant;
use tokio_vsock::{VsockAddr, VsockStream};
use tracing::{debug, info, warn};

use crate::backoff::Backoff;
use crate::power::{Haste, PowerSwitch};
use crate::status::Status;
use crate::{clock, machine};

/// What the host tells the engine before it starts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Told {
    /// The user's settings, if there are any.
    pub settings: Option<EngineSettings>,
    /// The proxies of the host's environment.
    pub proxies: HostProxies,
}

/// The engine's settings: `None` until the host has told them, then what it told.
pub type Settings = watch::Sender<Option<Told>>;

/// Keeps a session with the host, for ever.
///
/// `settings` gets the engine's settings once the host has told them. `adapt` carries out what changes the machine.
pub async fn keep<A, F>(status: watch::Receiver<Status>, power: PowerSwitch, settings: Settings, adapt: A)
where
    A: Fn(Request) -> F,
    F: Future<Output = Result<Response, Failure>> + 'static,
{
    let mut backoff = Backoff::new(Duration::from_millis(20), Duration::from_secs(1));
    let mut told = false;
    loop {
        match VsockStream::connect(VsockAddr::new(port::HOST_CID, port::SESSION)).await {
            Ok(stream) => {
                backoff.succeeded();
                told = false;
                let ended = drive(stream, status.clone(), &power, &settings, &adapt).await;
                warn!("the session with the host ended: {:#}", ended.err().unwrap_or_else(unexpected));
            }
            // Once is enough: the machine may run for long without a daemon that wants to talk.
            Err(error) if !told => {
                told = true;
                info!(%error, "the host does not take the session yet");
            }
            Err(error) => debug!(%error, "the host does not take the session"),
        }
        tokio::time::sleep(backoff.failed()).await;
    }
}

fn unexpected() -> anyhow::Error {
    anyhow::anyhow!("for no reason")
}

/// Drives one session over one stream until it ends, which is always an error.
async fn drive<S, A, F>(
    stream: S,
    mut status: watch::Receiver<Status>,
    power: &PowerSwitch,
    settings: &Settings,
    adapt: &A,
) -> Result<()>
where
    S: AsyncRead + AsyncWrite,
    A: Fn(Request) -> F,
    F: Future<Output = Result<Response, Failure>> + 'static,
{
    let (mut reader, mut writer) = tokio::io::split(stream);
    let began = Instant::now();
    let hello = Hello::new(concat!("guest-agent ", env!("CARGO_PKG_VERSION")), machine::boot_id());
    let mut session = Session::new(Role::Guest, hello, Duration::ZERO);
    let mut told: Option<Status> = None;
    let mut established = false;
    let mut at_work: Option<(RequestId, JoinHandle<Result<Response, Failure>>)> = None;
    let mut output = Vec::new();
    let mut input = [0; 4096];
    loop {
        while let Some(event) = session.next_event() {
            match event {
                SessionEvent::Established { hello } => {
                    info!(host = hello.program, "session with the host established");
                    established = true;
                }
                SessionEvent::Request { id, request } => {
                    let engine = || status.borrow().engine.clone();
                    match answer(request, engine, power, settings) {
                        Answer::Now(result) => session.respond(id, result)?,
                        Answer::Later(_) if at_work.is_some() => {
                            let busy = "the machine is being changed already";
                            session.respond(id, Err(Failure::new(FailureKind::Busy, busy)))?;
                        }
                        Answer::Later(request) => at_work = Some((id, spawn_local(adapt(request)))),
                    }
                }
                // The host has nothing to tell unasked, and we ask nothing.
                SessionEvent::Notice(_) | SessionEvent::Response { .. } => {}
            }
        }
        if established {
            let news = status.borrow_and_update().clone();
            for notice in news.news(told.as_ref()) {
                session.notify(notice)?;
            }
            told = Some(news);
        }
        if output.is_empty() {
            // The rest stays in the session, which gives up a host that does not read.
            output = session.take_output();
        }
        let deadline = session.next_deadline().context("the session has ended")?;
        // All of these may be dropped when another comes first. Bytes are taken before time passes.
        tokio::select! {
            biased;
            length = writer.write(&output), if !output.is_empty() => drop(output.drain(..length?)),
            length = reader.read(&mut input) => match length? {
                0 => bail!("the host hung up"),
                length => {
                    if let Err(error) = session.receive(&input[..length], began.elapsed()) {
                        // It may never have seen our hello, which tells it what is wrong.
                        output.extend(session.take_output());
                        let _gone = writer.write_all(&output).await;
                        return Err(error.into());
                    }
                }
            },
            (id, result) = finished(&mut at_work) => session.respond(id, result)?,
            changed = status.changed(), if established => changed.context("the agent is ending")?,
            () = tokio::time::sleep_until(began + deadline) => session.tick(began.elapsed())?,
        }
    }
}

/// Waits for the task that is at work, if there is one. May be dropped.
async fn finished(
    at_work: &mut Option<(RequestId, JoinHandle<Result<Response, Failure>>)>,
) -> (RequestId, Result<Response, Failure>) {
    let Some((id, task)) = at_work else { return std::future::pending().await };
    let cut_off = |error| Failure::new(FailureKind::Failed, format!("the change was cut off: {error}"));
    let outcome = (*id, task.await.map_err(cut_off).flatten());
    *at_work = None;
    outcome
}

/// What becomes of a request.
enum Answer {
    Now(Result<Response, Failure>),
    /// Somebody works on it first.
    Later(Request),
}

fn answer(
    request: Request,
    engine: impl FnOnce() -> guest_protocol::EngineState,
    power: &PowerSwitch,
    engine_settings: &Settings,
) -> Answer {
    Answer::Now(match request {
        Request::GrowDisk { .. } | Request::UseProcessors { .. } => return Answer::Later(request),
        Request::Configure { settings, proxies } => {
            engine_settings.send_replace(Some(Told { settings, proxies }));
            Ok(Response::Done)
        }
        Request::SetClock { unix_nanos } => match clock::follow(unix_nanos) {
            Ok(step) => {
                if let Some(step) = step {
                    info!(off_by = ?step, "clock set from the host");
                }
                Ok(Response::Done)
            }
            Err(error) => Err(Failure::new(FailureKind::Failed, format!("cannot set the clock: {error}"))),
        },
        Request::PowerOff => {
            power.press("the host asks for it", Haste::Orderly);
            Ok(Response::Done)
        }
        Request::Info => Ok(Response::Info(machine::gather(engine()))),
        Request::Acquire { .. }
        | Request::Land { .. }
        | Request::Release { .. }
        | Request::Locate { .. }
        | Request::Reconcile { .. } => {
            Err(Failure::new(FailureKind::Unsupported, "the guest grants no leases: the host does"))
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{power, status};
    use guest_protocol::{EngineState, Notice};
    use tokio::io::DuplexStream;

    /// The host's end, driven just as far as a test wants.
    struct Host {
        session: Session,
        stream: DuplexStream,
    }

    impl Host {
        fn new(stream: DuplexStream, version: u32) -> Self {
            let hello = Hello { version, ..Hello::new("engined test", "") };
            Self { session: Session::new(Role::Host, hello, Duration::ZERO), stream }
        }

        async fn next_event(&mut self) -> Result<SessionEvent> {
            loop {
                self.stream.write_all(&self.session.take_output()).await?;
                if let Some(event) = self.session.next_event() {
                    return Ok(event);
                }
                let mut input = [0; 100];
                match self.stream.read(&mut input).await? {
                    0 => bail!("the agent hung up"),
                    length => self.session.receive(&input[..length], Duration::ZERO)?,
                }
            }
        }
    }

    #[tokio::test]
    async fn the_host_learns_the_state_asks_and_switches_off() {
        let (near, far) = tokio::io::duplex(64);
        let publisher = status::Publisher::new();
        let switch = PowerSwitch::new();
        let mut orders = switch.orders();
        let watch = publisher.watch();
        let settings = Settings::new(None);
        let agent = tokio::spawn({
            let settings = settings.clone();
            async move { drive(near, watch, &switch, &settings, &nothing).await }
        });
        let mut host = Host::new(far, guest_protocol::PROTOCOL_VERSION);

        assert!(matches!(host.next_event().await.unwrap(), SessionEvent::Established { .. }));
        let notice = host.next_event().await.unwrap();
        assert_eq!(notice, SessionEvent::Notice(Notice::Engine(EngineState::Starting)));
        publisher.engine(EngineState::Ready);
        let notice = host.next_event().await.unwrap();
        assert_eq!(notice, SessionEvent::Notice(Notice::Engine(EngineState::Ready)));

        let id = host.session.request(Request::Info, Duration::ZERO).unwrap();
        let SessionEvent::Response { id: answered, result: Ok(Response::Info(info)) } =
            host.next_event().await.unwrap()
        else {
            panic!("no info")
        };
        assert_eq!((answered, info.engine), (id, EngineState::Ready));

        let told = Told {
            settings: Some(EngineSettings { name: "daemon.json".into(), text: "{}".into() }),
            proxies: HostProxies { http: "http://p:3128".into(), ..HostProxies::default() },
        };
        let Told { settings: file, proxies } = told.clone();
        host.session.request(Request::Configure { settings: file, proxies }, Duration::ZERO).unwrap();
        let done = host.next_event().await.unwrap();
        assert!(matches!(done, SessionEvent::Response { result: Ok(Response::Done), .. }), "{done:?}");
        assert_eq!(*settings.borrow(), Some(told));

        host.session.request(Request::PowerOff, Duration::ZERO).unwrap();
        let done = host.next_event().await.unwrap();
        assert!(matches!(done, SessionEvent::Response { result: Ok(Response::Done), .. }), "{done:?}");
        assert_eq!(power::ordered(&mut orders, Haste::Orderly).await.haste, Haste::Orderly);

        drop(host);
        let ended = agent.await.unwrap().unwrap_err().to_string();
        assert!(ended.contains("hung up") || ended.contains("roken pipe"), "{ended}");
    }

    /// For a host that changes nothing.
    async fn nothing(request: Request) -> Result<Response, Failure> {
        panic!("{request:?} was not asked")
    }

    #[tokio::test]
    async fn a_change_of_the_machine_is_answered_when_it_is_done_and_others_meanwhile() {
        let (near, far) = tokio::io::duplex(64);
        let publisher = status::Publisher::new();
        let watch = publisher.watch();
        let (done, waits) = tokio::sync::oneshot::channel();
        let waits = std::cell::RefCell::new(Some(waits));
        let adapt = move |request| {
            assert_eq!(request, Request::GrowDisk { size_bytes: 9 });
            let waits = waits.borrow_mut().take().expect("one at a time");
            async { waits.await.map_err(|_| Failure::new(FailureKind::Failed, "nobody works")) }
        };
        let local = tokio::task::LocalSet::new();
        local.spawn_local(async move {
            drive(near, watch, &PowerSwitch::new(), &Settings::new(None), &adapt).await
        });
        local
            .run_until(async {
                let mut host = Host::new(far, guest_protocol::PROTOCOL_VERSION);
                assert!(matches!(host.next_event().await.unwrap(), SessionEvent::Established { .. }));
                assert!(matches!(host.next_event().await.unwrap(), SessionEvent::Notice(_)));
                let ask = |host: &mut Host, request| host.session.request(request, Duration::ZERO).unwrap();
                let grow = ask(&mut host, Request::GrowDisk { size_bytes: 9 });
                ask(&mut host, Request::UseProcessors { count: 1 });
                let refused = host.next_event().await.unwrap();
                let is_busy = |event: &SessionEvent| matches!(event, SessionEvent::Response { result: Err(failure), .. } if failure.kind == FailureKind::Busy);
                assert!(is_busy(&refused), "{refused:?}");
                ask(&mut host, Request::Info);
                let info = host.next_event().await.unwrap();
                assert!(matches!(info, SessionEvent::Response { result: Ok(Response::Info(_)), .. }), "{info:?}");
                done.send(Response::Disk { total_bytes: 8 }).unwrap();
                let grown = SessionEvent::Response { id: grow, result: Ok(Response::Disk { total_bytes: 8 }) };
                assert_eq!(host.next_event().await.unwrap(), grown);
            })
            .await;
    }

    #[tokio::test]
    async fn a_host_of_another_version_still_gets_our_hello() {
        let (near, far) = tokio::io::duplex(64);
        let publisher = status::Publisher::new();
        let watch = publisher.watch();
        let switch = PowerSwitch::new();
        let settings = Settings::new(None);
        let agent = tokio::spawn(async move { drive(near, watch, &switch, &settings, &nothing).await });
        let mut host = Host::new(far, 99);
        let error = host.next_event().await.unwrap_err().to_string();
        assert!(error.contains("speaks version 1"), "{error}");
        let error = agent.await.unwrap().unwrap_err().to_string();
        assert!(error.contains("speaks version 99"), "{error}");
    }
}
