//! The name server at the gateway: answers its own names and carries every other query to the host's resolvers.
//!
//! A query is a flow of its own with a host socket of its own, and with a fresh id, so that an answer is believed
//! only on the right port with the right id. If a resolver is silent, refuses or fails, the next one is asked; when
//! all have had their turn the guest gets SERVFAIL, which it understands faster than silence. Answers are not
//! looked into beyond id and code: whatever record types and options there are pass through.
//! Queries over TCP are plain connections to the first resolver (tcp.rs).

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use guest_protocol::dns::{HEADER_BYTES as HEADER, Question};

use crate::config::Config;

/// Where name servers listen.
pub(crate) const DNS_PORT: u16 = 53;
/// How long one resolver may think before the next is asked.
const PATIENCE: Duration = Duration::from_millis(2500);
/// How often each resolver is asked.
const ROUNDS: usize = 2;
/// More resolvers than this are not asked (as in the C library).
pub(crate) const RESOLVERS_MAX: usize = 3;
/// Seconds an answer of our own may be kept: short, so that a change of network shows.
const TTL_SECONDS: u32 = 60;

const TYPE_A: u16 = 1;
const CLASS_IN: u16 = 1;
const RCODE_SERVFAIL: u8 = 2;
const RCODE_REFUSED: u8 = 5;

/// What can be done with a message from the guest.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Ours: this is the answer.
    Answer(Vec<u8>),
    /// Somebody else's: ask the resolvers, with this id.
    Forward { id: u16 },
    /// Not a query.
    Nonsense,
}

/// Looks at a query.
pub(crate) fn consider(config: &Config, message: &[u8]) -> Verdict {
    let Some(header) = message.get(..HEADER) else { return Verdict::Nonsense };
    let id = u16::from_be_bytes([header[0], header[1]]);
    let is_query = header[2] & 0x80 == 0;
    if !is_query {
        return Verdict::Nonsense;
    }
    let opcode = (header[2] >> 3) & 0xf;
    let questions = u16::from_be_bytes([header[4], header[5]]);
    if opcode != 0 || questions != 1 {
        return Verdict::Forward { id };
    }
    let Some(question) = Question::read(&message[HEADER..]) else { return Verdict::Nonsense };
    match own_address(config, &question.name.to_ascii_lowercase()) {
        Some(address) if question.class == CLASS_IN => {
            let end = HEADER + question.wire.len();
            Verdict::Answer(own_answer(&message[..end], (question.kind == TYPE_A).then_some(address)))
        }
        _ => Verdict::Forward { id },
    }
}

/// The addresses of the names, in lower case, that every container may use.
fn own_address(config: &Config, name: &str) -> Option<Ipv4Addr> {
    match name {
        "host.docker.internal" | "host.engine.internal" => Some(config.host_alias),
        "gateway.docker.internal" => Some(config.gateway),
        _ => None,
    }
}

/// Header and question come back, with our address or with "no such record".
fn own_answer(question: &[u8], address: Option<Ipv4Addr>) -> Vec<u8> {
    let mut answer = question.to_vec();
    let recursion_desired = question[2] & 0x01;
    answer[2] = 0x84 | recursion_desired; // a response, authoritative
    answer[3] = 0x80; // recursion available, no error
    answer[6..HEADER].fill(0);
    if let Some(address) = address {
        answer[7] = 1;
        answer.extend([0xc0, HEADER as u8]); // the name: see the question
        answer.extend(TYPE_A.to_be_bytes());
        answer.extend(CLASS_IN.to_be_bytes());
        answer.extend(TTL_SECONDS.to_be_bytes());
        answer.extend(4u16.to_be_bytes());
        answer.extend(address.octets());
    }
    answer
}

/// A query under way to the resolvers.
#[derive(Debug)]
pub(crate) struct Query {
    guest: SocketAddr,
    id: u16,
    our_id: u16,
    message: Vec<u8>,
    attempt: usize,
    deadline: Duration,
}

/// What an answer from a resolver means.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Response {
    /// For the guest.
    Deliver(Vec<u8>),
    /// This resolver cannot help; perhaps the next can.
    Failed,
    /// Not an answer to this query.
    Foreign,
}

impl Query {
    pub(crate) fn new(guest: SocketAddr, message: &[u8], id: u16, our_id: u16, now: Duration) -> Self {
        Self { guest, id, our_id, message: message.to_vec(), attempt: 0, deadline: now + PATIENCE }
    }

    pub(crate) fn guest(&self) -> SocketAddr {
        self.guest
    }

    pub(crate) fn deadline(&self) -> Duration {
        self.deadline
    }

    /// Which of `resolvers` to ask now; `None` when all have had their turns.
    pub(crate) fn resolver(&self, resolvers: usize) -> Option<usize> {
        if self.attempt < resolvers * ROUNDS { Some(self.attempt % resolvers) } else { None }
    }

    pub(crate) fn next_resolver(&mut self, now: Duration) {
        self.attempt += 1;
        self.deadline = now + PATIENCE;
    }

    /// The query as the resolver gets it.
    pub(crate) fn request(&self) -> Vec<u8> {
        with_id(&self.message, self.our_id)
    }

    /// Reads an answer. `more` says that another resolver could still be asked.
    pub(crate) fn response(&self, message: &[u8], more: bool) -> Response {
        let Some(header) = message.get(..HEADER) else { return Response::Foreign };
        if header[..2] != self.our_id.to_be_bytes() || header[2] & 0x80 == 0 {
            return Response::Foreign;
        }
        let code = header[3] & 0xf;
        if more && (code == RCODE_SERVFAIL || code == RCODE_REFUSED) {
            return Response::Failed;
        }
        Response::Deliver(with_id(message, self.id))
    }

    /// True when asking the next resolver would be its first time.
    pub(crate) fn has_fresh_resolver(&self, resolvers: usize) -> bool {
        self.attempt + 1 < resolvers
    }

    /// What the guest gets when nobody could help.
    pub(crate) fn failure(&self) -> Vec<u8> {
        servfail(&self.message)
    }
}

/// The query turned into "the server failed".
pub(crate) fn servfail(query: &[u8]) -> Vec<u8> {
    let end =
        query.get(HEADER..).and_then(Question::read).map_or(HEADER, |question| HEADER + question.wire.len());
    let mut answer = query[..end.min(query.len())].to_vec();
    if let Some(header) = answer.get_mut(..HEADER) {
        header[2] = 0x80 | (header[2] & 0x79);
        header[3] = 0x80 | RCODE_SERVFAIL;
        header[5] = u8::from(end > HEADER);
        header[4] = 0;
        header[6..].fill(0);
    }
    answer
}

fn with_id(message: &[u8], id: u16) -> Vec<u8> {
    let mut message = message.to_vec();
    if let Some(place) = message.get_mut(..2) {
        place.copy_from_slice(&id.to_be_bytes());
    }
    message
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(crate) fn query(id: u16, name: &str, kind: u16) -> Vec<u8> {
        let mut message = id.to_be_bytes().to_vec();
        message.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
        for label in name.split('.') {
            message.push(label.len() as u8);
            message.extend(label.as_bytes());
        }
        message.push(0);
        message.extend(kind.to_be_bytes());
        message.extend(CLASS_IN.to_be_bytes());
        message
    }

    fn answered(name: &str, kind: u16) -> Vec<u8> {
        match consider(&Config::default(), &query(7, name, kind)) {
            Verdict::Answer(answer) => answer,
            other => panic!("{name}: {other:?}"),
        }
    }

    #[test]
    fn own_names_are_answered_whatever_their_case() {
        for name in ["host.docker.internal", "HOST.Engine.Internal"] {
            let answer = answered(name, TYPE_A);
            assert_eq!(answer[..8], [0, 7, 0x85, 0x80, 0, 1, 0, 1], "{name}");
            assert!(answer.ends_with(&[198, 18, 0, 254]), "{name}");
        }
        assert!(answered("gateway.docker.internal", TYPE_A).ends_with(&[198, 18, 0, 1]));
    }

    #[test]
    fn own_names_exist_but_have_no_ipv6_address() {
        let answer = answered("host.docker.internal", 28);
        assert_eq!(answer[2..8], [0x85, 0x80, 0, 1, 0, 0]);
        assert_eq!(answer.len(), query(7, "host.docker.internal", 28).len());
    }

    #[test]
    fn other_names_are_forwarded_and_answers_are_not_queries() {
        let config = Config::default();
        assert_eq!(consider(&config, &query(9, "example.com", TYPE_A)), Verdict::Forward { id: 9 });
        assert_eq!(consider(&config, &query(9, "host.docker.internal.evil", 1)), Verdict::Forward { id: 9 });
        let mut answer = query(9, "example.com", TYPE_A);
        answer[2] |= 0x80;
        assert_eq!(consider(&config, &answer), Verdict::Nonsense);
        assert_eq!(consider(&config, &[0; 11]), Verdict::Nonsense);
    }

    #[test]
    fn an_answer_counts_only_with_the_id_it_was_asked_with() {
        let guest = SocketAddr::from(([198, 18, 0, 2], 4000));
        let asked = query(7, "example.com", TYPE_A);
        let question = Query::new(guest, &asked, 7, 0xabcd, Duration::ZERO);
        assert_eq!(question.request()[..2], [0xab, 0xcd]);
        let mut answer = question.request();
        answer[2] |= 0x80;
        let Response::Deliver(delivered) = question.response(&answer, true) else { panic!() };
        assert_eq!(delivered[..2], [0, 7]);
        assert_eq!(question.response(&with_id(&answer, 7), true), Response::Foreign);
        assert_eq!(
            question.response(&question.request(), true),
            Response::Foreign,
            "an echo of the question"
        );
        answer[3] = RCODE_SERVFAIL;
        assert_eq!(question.response(&answer, true), Response::Failed);
        assert!(matches!(question.response(&answer, false), Response::Deliver(_)));
    }

    #[test]
    fn each_resolver_is_asked_twice_then_the_guest_is_told() {
        let guest = SocketAddr::from(([198, 18, 0, 2], 4000));
        let asked = query(7, "example.com", TYPE_A);
        let mut question = Query::new(guest, &asked, 7, 1, Duration::ZERO);
        let mut order = Vec::new();
        while let Some(resolver) = question.resolver(2) {
            order.push(resolver);
            question.next_resolver(Duration::ZERO);
        }
        assert_eq!(order, [0, 1, 0, 1]);
        let failure = question.failure();
        assert_eq!(failure[..8], [0, 7, 0x81, 0x82, 0, 1, 0, 0]);
        assert_eq!(question.resolver(0), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            if let Verdict::Answer(answer) = consider(&Config::default(), &bytes) {
                prop_assert!(answer.len() >= HEADER);
            }
            if bytes.len() >= HEADER {
                servfail(&bytes);
            }
        }
    }
}
