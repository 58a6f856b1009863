//! Each arrow of the state diagram by name, then two sessions joined by a link that cuts bytes as it likes.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::message::EngineState;

const START: Duration = Duration::from_secs(1000);

fn seconds(count: u64) -> Duration {
    START + Duration::from_secs(count)
}

fn host() -> Session {
    Session::new(Role::Host, Hello::new("engined 1", ""), START)
}

fn guest() -> Session {
    Session::new(Role::Guest, Hello::new("guest-agent 1", "boot-7"), START)
}

fn events(session: &mut Session) -> Vec<SessionEvent> {
    std::iter::from_fn(|| session.next_event()).collect()
}

/// Carries everything that is waiting, both ways, until nothing is.
fn settle(left: &mut Session, right: &mut Session, now: Duration) {
    loop {
        let (to_right, to_left) = (left.take_output(), right.take_output());
        if to_right.is_empty() && to_left.is_empty() {
            return;
        }
        right.receive(&to_right, now).unwrap();
        left.receive(&to_left, now).unwrap();
    }
}

fn established() -> (Session, Session) {
    let (mut host, mut guest) = (host(), guest());
    settle(&mut host, &mut guest, START);
    events(&mut host);
    events(&mut guest);
    (host, guest)
}

fn frame(json: &str) -> Vec<u8> {
    let mut wire = Vec::new();
    frame::encode(json.as_bytes(), &mut wire).unwrap();
    wire
}

fn outcome_kinds(events: &[SessionEvent]) -> Vec<FailureKind> {
    let kind = |event: &SessionEvent| match event {
        SessionEvent::Response { result: Err(failure), .. } => Some(failure.kind),
        _ => None,
    };
    events.iter().filter_map(kind).collect()
}

/// Feeds one message to an established host that has request 1 answered, request 2 expired and request 3 open.
#[track_caller]
fn check_fatal(json: &str, expected: &SessionError) {
    let (mut host, mut guest) = established();
    let first = host.request(Request::Info, START).unwrap();
    settle(&mut host, &mut guest, START);
    guest.respond(first, Ok(Response::Done)).unwrap();
    settle(&mut host, &mut guest, START);
    host.request_within(Request::Info, Duration::from_secs(1), START).unwrap();
    host.tick(seconds(2)).unwrap();
    host.request(Request::Info, seconds(2)).unwrap();
    events(&mut host);

    assert_eq!(host.receive(&frame(json), seconds(2)).as_ref(), Err(expected));
    assert_eq!(host.state(), State::Closed);
    assert_eq!(outcome_kinds(&events(&mut host)), [FailureKind::Closed], "the open request has its outcome");
    assert_eq!(host.receive(b"x", seconds(3)).as_ref(), Err(expected), "closed for good");
    assert_eq!(host.tick(seconds(3)).as_ref(), Err(expected));
    assert_eq!(host.request(Request::Info, seconds(3)).as_ref(), Err(expected));
    assert_eq!(host.next_deadline(), None);
}

#[test]
fn both_ends_learn_of_each_other() {
    let (mut host, mut guest) = (host(), guest());
    assert_eq!(host.request(Request::Info, START), Err(SessionError::NotEstablished));
    assert_eq!(guest.notify(Notice::PoweringOff), Err(SessionError::NotEstablished));
    settle(&mut host, &mut guest, START);
    let hello = Hello::new("guest-agent 1", "boot-7");
    assert_eq!(events(&mut host), [SessionEvent::Established { hello }]);
    assert_eq!(events(&mut guest), [SessionEvent::Established { hello: Hello::new("engined 1", "") }]);
    assert_eq!((host.state(), guest.state()), (State::Established, State::Established));
}

#[test]
fn requests_are_answered_in_any_order_and_notices_pass() {
    let (mut host, mut guest) = established();
    let clock = host.request(Request::SetClock { unix_nanos: 5 }, START).unwrap();
    let info = host.request(Request::Info, START).unwrap();
    settle(&mut host, &mut guest, START);
    let asked = events(&mut guest);
    assert_eq!(asked[0], SessionEvent::Request { id: clock, request: Request::SetClock { unix_nanos: 5 } });
    assert_eq!(asked[1], SessionEvent::Request { id: info, request: Request::Info });
    let failure = Failure::new(FailureKind::Failed, "no clock");
    guest.respond(info, Ok(Response::Done)).unwrap();
    guest.notify(Notice::Engine(EngineState::Ready)).unwrap();
    guest.respond(clock, Err(failure.clone())).unwrap();
    settle(&mut host, &mut guest, START);
    let told = [
        SessionEvent::Response { id: info, result: Ok(Response::Done) },
        SessionEvent::Notice(Notice::Engine(EngineState::Ready)),
        SessionEvent::Response { id: clock, result: Err(failure) },
    ];
    assert_eq!(events(&mut host), told);
    assert_eq!(guest.respond(info, Ok(Response::Done)), Err(SessionError::NothingToAnswer(info)));
}

#[test]
fn another_version_is_named_in_a_sentence_by_both_ends() {
    let mut host = host();
    let old = Hello { version: 9, ..Hello::new("guest-agent 9", "") };
    let mut guest = Session::new(Role::Guest, old, START);
    let error = host.receive(&guest.take_output(), START).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("the guest speaks version 9") && text.contains("this program version 1"), "{text}");
    let error = guest.receive(&host.take_output(), START).unwrap_err();
    assert!(matches!(error, SessionError::Version { peer: Role::Host, theirs: 1, ours: 9, .. }), "{error}");
}

#[test]
fn a_peer_of_our_own_role_is_refused() {
    let (mut left, mut right) = (host(), host());
    let error = left.receive(&right.take_output(), START);
    assert_eq!(error, Err(SessionError::SameRole(Role::Host)));
}

#[test]
fn anything_before_the_hello_ends_the_session() {
    for kind in ["ping", "request", "notice", "other"] {
        let error = host().receive(&frame(&format!(r#"{{"type":"{kind}","id":1}}"#)), START);
        assert_eq!(error, Err(SessionError::NoHello(kind.into())));
    }
}

#[test]
fn a_peer_that_never_greets_is_given_up() {
    let mut host = host();
    assert_eq!(host.next_deadline(), Some(START + GREETING_TIMEOUT));
    host.tick(START + GREETING_TIMEOUT - Duration::from_millis(1)).unwrap();
    let expected = SessionError::GreetingTimeout(GREETING_TIMEOUT);
    assert_eq!(host.tick(START + GREETING_TIMEOUT), Err(expected));
}

#[test]
fn what_a_sane_peer_never_sends_ends_the_session() {
    let hello = r#"{"type":"hello","body":{"role":"guest","version":1}}"#;
    check_fatal(hello, &SessionError::SecondHello);
    check_fatal(r#"{"type":"response","id":1}"#, &SessionError::DuplicateResponse(RequestId(1)));
    check_fatal(r#"{"type":"response","id":4}"#, &SessionError::UnknownResponse(RequestId(4)));
    check_fatal(r#"{"type":"response","id":0}"#, &SessionError::UnknownResponse(RequestId(0)));
    let malformed = SessionError::Malformed("a `response` without a number".into());
    check_fatal(r#"{"type":"response"}"#, &malformed);
}

#[test]
fn bytes_that_are_no_message_end_the_session() {
    for payload in ["", "[]", "{", "nonsense", r#"{"type":7}"#, r#"{"type":"ping","type":"ping"}"#] {
        let (mut host, _) = established();
        let error = host.receive(&frame(payload), START).unwrap_err();
        assert!(matches!(error, SessionError::Malformed(_)), "{payload}: {error}");
    }
    let (mut host, _) = established();
    let error = host.receive(&u32::MAX.to_le_bytes(), START);
    assert_eq!(error, Err(SessionError::TooLong(TooLong { length: u32::MAX as usize })));
}

#[test]
fn request_numbers_must_rise() {
    let (_, mut guest) = established();
    guest.receive(&frame(r#"{"type":"request","id":5,"body":{"kind":"info"}}"#), START).unwrap();
    let error = guest.receive(&frame(r#"{"type":"request","id":5,"body":{"kind":"info"}}"#), START);
    assert_eq!(error, Err(SessionError::ReusedRequest(RequestId(5))));
}

#[test]
fn a_newer_peer_is_understood_as_far_as_possible() {
    let (mut host, mut guest) = established();
    for json in [
        r#"{"type":"farewell","body":{"a":1}}"#,
        r#"{"type":"notice","body":{"kind":"party"}}"#,
        r#"{"type":"request","id":1,"body":{"kind":"make_tea","sugar":2},"trace":"abc"}"#,
        r#"{"type":"request","id":2}"#,
    ] {
        assert_eq!(guest.receive(&frame(json), START), Ok(()), "{json}");
    }
    assert_eq!(events(&mut guest), []);
    let answers = String::from_utf8_lossy(&guest.take_output()).into_owned();
    assert_eq!(answers.matches(r#""kind":"unsupported""#).count(), 2, "{answers}");

    let id = host.request(Request::Info, START).unwrap();
    let answer = format!(r#"{{"type":"response","id":{id},"body":{{"kind":"poem"}}}}"#);
    host.receive(&frame(&answer), START).unwrap();
    assert_eq!(outcome_kinds(&events(&mut host)), [FailureKind::Unsupported]);
}

#[test]
fn a_request_times_out_once_and_its_late_answer_is_dropped() {
    let (mut host, mut guest) = established();
    let id = host.request_within(Request::Info, Duration::from_secs(2), START).unwrap();
    assert_eq!(host.next_deadline(), Some(seconds(2)));
    settle(&mut host, &mut guest, START);
    host.tick(seconds(2)).unwrap();
    assert_eq!(outcome_kinds(&events(&mut host)), [FailureKind::Timeout]);
    guest.respond(id, Ok(Response::Done)).unwrap();
    settle(&mut host, &mut guest, seconds(3));
    assert_eq!(events(&mut host), []);
    assert_eq!(host.state(), State::Established);
}

#[test]
fn requests_are_bounded_on_both_sides() {
    let (mut host, mut guest) = established();
    for _ in 0..REQUESTS_MAX {
        host.request(Request::Info, START).unwrap();
    }
    assert_eq!(host.request(Request::Info, START), Err(SessionError::Busy));
    settle(&mut host, &mut guest, START);
    let id = REQUESTS_MAX + 1;
    let one_more = frame(&format!(r#"{{"type":"request","id":{id},"body":{{"kind":"info"}}}}"#));
    guest.receive(&one_more, START).unwrap();
    assert_eq!(events(&mut guest).len(), REQUESTS_MAX);
    assert!(String::from_utf8_lossy(&guest.take_output()).contains(r#""kind":"busy""#));
}

#[test]
fn a_quiet_line_is_kept_alive_by_few_pings() {
    let (mut host, mut guest) = established();
    let mut frames = 0;
    for second in 1..=60 {
        for session in [&mut host, &mut guest] {
            session.tick(seconds(second)).unwrap();
        }
        frames += usize::from(!host.output.is_empty()) + usize::from(!guest.output.is_empty());
        settle(&mut host, &mut guest, seconds(second));
    }
    assert!((10..=24).contains(&frames), "{frames} pings in a minute");
}

#[test]
fn a_silent_peer_is_given_up_after_its_pings() {
    let (mut host, _) = established();
    let id = host.request_within(Request::Info, Duration::from_secs(3600), START).unwrap();
    let (now, error) = loop {
        let now = host.next_deadline().unwrap();
        if let Err(error) = host.tick(now) {
            break (now, error);
        }
    };
    let silence = HEARTBEAT_INTERVAL * (MISSED_MAX + 1);
    assert_eq!(now, START + silence);
    assert_eq!(error, SessionError::PeerDead { peer: Role::Guest, silence });
    let closed = events(&mut host);
    assert!(matches!(&closed[..], [SessionEvent::Response { id: lost, .. }] if *lost == id), "{closed:?}");
}

#[test]
fn in_an_idle_session_only_the_host_asks() {
    let (mut host, mut guest) = established();
    for count in 1..=10 {
        let now = START + HEARTBEAT_INTERVAL * count;
        assert_eq!(host.next_deadline(), Some(now));
        assert!(guest.next_deadline() > Some(now));
        host.tick(now).unwrap();
        guest.tick(now).unwrap();
        let asked = [host.take_output(), guest.take_output()];
        assert_eq!(asked, [frame(r#"{"type":"ping"}"#), Vec::new()]);
        guest.receive(&asked[0], now).unwrap();
        host.receive(&guest.take_output(), now).unwrap();
    }
    // A host that is gone without a word is found out all the same.
    let silent = START + HEARTBEAT_INTERVAL * 12;
    assert_eq!(guest.next_deadline(), Some(silent));
    guest.tick(silent).unwrap();
    assert_eq!(guest.take_output(), frame(r#"{"type":"ping"}"#));
}

#[test]
fn an_end_that_slept_gives_the_peer_time_to_answer() {
    let (mut host, mut guest) = established();
    let after_a_day = seconds(24 * 3600);
    host.tick(after_a_day).unwrap();
    settle(&mut host, &mut guest, after_a_day);
    assert_eq!(host.state(), State::Established);
}

#[test]
fn a_peer_that_talks_and_does_not_read_is_given_up() {
    let (mut host, _) = established();
    let pings = frame(r#"{"type":"ping"}"#).repeat(10_000);
    let error = (0..100).find_map(|_| host.receive(&pings, START).err());
    assert_eq!(error, Some(SessionError::Overflow));
    assert!(host.take_output().len() <= OUTPUT_MAX + frame::LENGTH_MAX);
}

#[test]
fn what_is_too_long_to_send_is_not_sent() {
    let (mut host, mut guest) = established();
    let reason = "x".repeat(frame::LENGTH_MAX);
    let fault = Notice::Fault { what: "data disk".into(), reason: reason.clone() };
    assert!(matches!(guest.notify(fault), Err(SessionError::TooLong(_))));
    let id = host.request(Request::Info, START).unwrap();
    settle(&mut host, &mut guest, START);
    let refused = guest.respond(id, Err(Failure::new(FailureKind::Failed, reason)));
    assert!(matches!(refused, Err(SessionError::TooLong(_))));
    settle(&mut host, &mut guest, START);
    assert_eq!(outcome_kinds(&events(&mut host)), [FailureKind::Failed], "the host still has an outcome");
    assert_eq!(guest.state(), State::Established);
}

#[test]
fn a_disconnected_session_is_closed_and_says_so() {
    let (mut host, _) = established();
    host.request(Request::PowerOff, START).unwrap();
    host.disconnect();
    host.disconnect();
    assert_eq!(host.error(), Some(&SessionError::Disconnected));
    assert_eq!(outcome_kinds(&events(&mut host)), [FailureKind::Closed]);
    assert_eq!(events(&mut host), []);
}

/// One thing that happens to a pair of sessions.
#[derive(Clone, Debug)]
enum Step {
    Ask {
        timeout: u64,
    },
    Answer {
        which: usize,
        fail: bool,
    },
    Tell,
    /// Carries up to so many bytes.
    Carry {
        to_guest: bool,
        bytes: usize,
    },
    Wait {
        millis: u64,
    },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (1_u64..20_000).prop_map(|timeout| Step::Ask { timeout }),
        3 => (any::<usize>(), any::<bool>()).prop_map(|(which, fail)| Step::Answer { which, fail }),
        1 => Just(Step::Tell),
        8 => (any::<bool>(), 1_usize..200).prop_map(|(to_guest, bytes)| Step::Carry { to_guest, bytes }),
        2 => (0_u64..3000).prop_map(|millis| Step::Wait { millis }),
    ]
}

/// Two sessions, the bytes between them, and what each has seen.
struct Pair {
    host: Session,
    guest: Session,
    to_host: VecDeque<u8>,
    to_guest: VecDeque<u8>,
    now: Duration,
    asked: Vec<RequestId>,
    outcomes: BTreeMap<RequestId, Result<Response, FailureKind>>,
    waiting: Vec<RequestId>,
    answered: BTreeMap<RequestId, bool>,
    told: u64,
    heard: u64,
}

impl Pair {
    fn new() -> Self {
        Self {
            host: host(),
            guest: guest(),
            to_host: VecDeque::new(),
            to_guest: VecDeque::new(),
            now: START,
            asked: Vec::new(),
            outcomes: BTreeMap::new(),
            waiting: Vec::new(),
            answered: BTreeMap::new(),
            told: 0,
            heard: 0,
        }
    }

    fn apply(&mut self, step: Step) {
        match step {
            Step::Ask { timeout } => {
                let request = Request::SetClock { unix_nanos: 1 };
                if let Ok(id) = self.host.request_within(request, Duration::from_millis(timeout), self.now) {
                    self.asked.push(id);
                }
            }
            Step::Answer { which, fail } => {
                if self.waiting.is_empty() || self.guest.state() != State::Established {
                    return;
                }
                let id = self.waiting.swap_remove(which % self.waiting.len());
                let failure = Failure::new(FailureKind::Failed, format!("about {id}"));
                let result = if fail { Err(failure) } else { Ok(Response::Done) };
                self.guest.respond(id, result).unwrap();
                self.answered.insert(id, fail);
            }
            Step::Tell => self.told += u64::from(self.guest.notify(Notice::PoweringOff).is_ok()),
            Step::Carry { to_guest: true, bytes } => {
                self.to_guest.extend(self.host.take_output());
                let piece: Vec<u8> = self.to_guest.drain(..bytes.min(self.to_guest.len())).collect();
                self.guest.receive(&piece, self.now).unwrap();
            }
            Step::Carry { to_guest: false, bytes } => {
                self.to_host.extend(self.guest.take_output());
                let piece: Vec<u8> = self.to_host.drain(..bytes.min(self.to_host.len())).collect();
                self.host.receive(&piece, self.now).unwrap();
            }
            Step::Wait { millis } => {
                self.now += Duration::from_millis(millis);
                // An end may be given up here: the link can be slower than the peer's patience.
                let _host = self.host.tick(self.now);
                let _guest = self.guest.tick(self.now);
            }
        }
        self.collect();
    }

    fn collect(&mut self) {
        while let Some(event) = self.host.next_event() {
            match event {
                SessionEvent::Response { id, result } => {
                    let result = result.map_err(|failure| failure.kind);
                    assert_eq!(self.outcomes.insert(id, result), None, "a second outcome of {id}");
                }
                SessionEvent::Notice(_) => self.heard += 1,
                SessionEvent::Established { .. } => {}
                SessionEvent::Request { .. } => panic!("the guest asked nothing"),
            }
        }
        while let Some(event) = self.guest.next_event() {
            if let SessionEvent::Request { id, .. } = event {
                self.waiting.push(id);
            }
        }
    }

    fn alive(&self) -> bool {
        self.host.state() != State::Closed && self.guest.state() != State::Closed
    }

    /// Lets every byte arrive, answers nothing more, and hangs up.
    fn finish(&mut self) {
        while self.alive() {
            self.apply(Step::Carry { to_guest: true, bytes: usize::MAX });
            self.apply(Step::Carry { to_guest: false, bytes: usize::MAX });
            if self.host.output.is_empty() && self.guest.output.is_empty() {
                break;
            }
        }
    }
}

proptest! {
    /// Whatever the link does to the timing and the cutting of bytes, the two ends agree on what was said.
    #[test]
    fn two_sessions_agree_over_any_link(steps in prop::collection::vec(step(), 0..120)) {
        let mut pair = Pair::new();
        for step in steps {
            pair.apply(step);
            if !pair.alive() {
                break;
            }
        }
        pair.finish();
        if pair.alive() {
            prop_assert_eq!(pair.told, pair.heard, "notices arrive, once each");
        }
        pair.host.disconnect();
        pair.collect();
        prop_assert_eq!(pair.outcomes.keys().copied().collect::<Vec<_>>(), pair.asked, "one outcome each");
        for (id, outcome) in &pair.outcomes {
            match outcome {
                Ok(response) => {
                    prop_assert_eq!(response, &Response::Done);
                    prop_assert_eq!(pair.answered.get(id), Some(&false));
                }
                Err(FailureKind::Failed) => prop_assert_eq!(pair.answered.get(id), Some(&true)),
                Err(kind) => prop_assert!(matches!(kind, FailureKind::Timeout | FailureKind::Closed)),
            }
        }
    }

    #[test]
    fn foreign_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
        exercise(&bytes);
    }

    /// Messages with parts of the real grammar, so that the parsers behind the framing are reached.
    #[test]
    fn foreign_messages_never_panic(messages in prop::collection::vec(
        r#"\{"type":"(hello|request|response|failure|notice|ping|pong|x)"(,"id":[0-9]{1,3})?(,"body":(\{"kind":"(info|done|engine|power_off|grow_disk|use_processors|disk|processors|q)"(,"(value|size_bytes|count|online|total_bytes)":("ready"|-?[0-9]{1,30})){0,3}\}|null|3|\[\]))?\}"#,
        0..40,
    )) {
        let mut bytes = vec![3];
        bytes.extend(messages.join("\n").into_bytes());
        exercise(&bytes);
    }
}
