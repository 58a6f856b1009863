//! What is answered to a query: pure, and safe for whatever bytes a container sends.
//!
//! Of the wire format (RFC 1035, section 4) only what this needs is read: the header, one question, whose name cannot
//! be compressed because nothing comes before it, and how long an answer the client takes (RFC 6891). An answer repeats
//! the question as it was asked and refers to its name.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use guest_protocol::dns::{HEADER_BYTES, NAME_BYTES_MAX as NAME_MAX, Question};

/// How long an answer may be kept. Docker's own.
const TTL_SECONDS: u32 = 600;
/// Longest answer over UDP to who does not say how much it takes (RFC 1035, 4.2.1).
const UDP_MAX: usize = 512;

const TYPE_A: u16 = 1;
const TYPE_PTR: u16 = 12;
const TYPE_MX: u16 = 15;
const TYPE_AAAA: u16 = 28;
const TYPE_OPT: u16 = 41;
const CLASS_IN: u16 = 1;

const CODE_OK: u8 = 0;
const CODE_FORMAT: u8 = 1;
const CODE_FAILURE: u8 = 2;

/// Names that are ours.
pub trait Names {
    /// The addresses of a name (without the final dot, as the client wrote it) in a family.
    fn resolve(&self, name: &str, six: bool) -> Resolution;
    /// The name of an address.
    fn reverse(&self, address: IpAddr) -> Option<String>;
}

/// What is known of a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resolution {
    /// It has these addresses, perhaps none in the family asked for.
    Ours(Vec<IpAddr>),
    /// Nothing.
    Unknown,
}

/// What to do about a query.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// Send this.
    Reply(Vec<u8>),
    /// Ask somebody else. If nobody knows, send what [`Answer::failure`] makes.
    Forward {
        /// An address is asked for, of a name without a dot.
        is_bare: bool,
    },
    /// It is no query: say nothing.
    Drop,
}

impl Answer {
    /// The answer to a query that nobody could be asked about.
    pub fn failure(query: &[u8]) -> Option<Vec<u8>> {
        let query = Query::read(query)?;
        Some(query.reply(CODE_FAILURE, &[], UDP_MAX))
    }
}

/// Answers what `names` knows. Over TCP answers may be of any length, over UDP as long as the client says.
pub fn answer(bytes: &[u8], names: &dyn Names, over_tcp: bool) -> Answer {
    let Some(query) = Query::read(bytes) else { return Answer::Drop };
    let Some(question) = &query.question else {
        return Answer::Reply(query.reply(CODE_FORMAT, &[], UDP_MAX));
    };
    if query.operation != 0 || question.class != CLASS_IN {
        return Answer::Forward { is_bare: false };
    }
    let name = question.name.as_str();
    let records: Option<Vec<Data>> = match question.kind {
        kind @ (TYPE_A | TYPE_AAAA) => match names.resolve(name, kind == TYPE_AAAA) {
            Resolution::Ours(addresses) => Some(addresses.into_iter().map(Data::Address).collect()),
            Resolution::Unknown => None,
        },
        // A name that has an address takes its mail itself (RFC 5321, 5.1).
        TYPE_MX => {
            let is_ours = [false, true].iter().any(|six| names.resolve(name, *six) != Resolution::Unknown);
            is_ours.then(Vec::new)
        }
        TYPE_PTR => address_of(name).and_then(|address| Some(vec![Data::Name(names.reverse(address)?)])),
        _ => None,
    };
    match records {
        Some(records) => {
            let longest = if over_tcp { usize::from(u16::MAX) } else { query.longest };
            Answer::Reply(query.reply(CODE_OK, &records, longest))
        }
        None => {
            let is_bare = matches!(question.kind, TYPE_A | TYPE_AAAA) && !name.contains('.');
            Answer::Forward { is_bare }
        }
    }
}

/// Feeds foreign bytes to the reader of queries, as a hostile container would. Never panics; what it answers is an
/// answer to that query.
pub fn read_hostile(bytes: &[u8]) {
    struct Everything;
    impl Names for Everything {
        fn resolve(&self, name: &str, six: bool) -> Resolution {
            let address = if six { IpAddr::from([0_u16; 8]) } else { IpAddr::from([10, 0, 0, 1]) };
            if name.len().is_multiple_of(3) {
                Resolution::Unknown
            } else {
                Resolution::Ours(vec![address; name.len()])
            }
        }

        fn reverse(&self, address: IpAddr) -> Option<String> {
            Some(format!("host-{}", address.is_ipv6()))
        }
    }
    for over_tcp in [false, true] {
        if let Answer::Reply(reply) = answer(bytes, &Everything, over_tcp) {
            assert!(reply.len() >= HEADER_BYTES && reply[2] & 0x80 != 0 && reply[..2] == bytes[..2]);
        }
    }
    // Whether there is a failure to tell depends on the bytes.
    let _ = Answer::failure(bytes);
}

/// What an answer holds.
enum Data {
    Address(IpAddr),
    Name(String),
}

/// A query, taken apart.
struct Query<'a> {
    id: [u8; 2],
    operation: u8,
    recursion_desired: bool,
    /// `None` when there is not exactly one, or it makes no sense.
    question: Option<Question<'a>>,
    /// Bytes the client takes over UDP.
    longest: usize,
}

impl<'a> Query<'a> {
    /// `None`: these bytes are no query at all.
    fn read(bytes: &'a [u8]) -> Option<Self> {
        let header: &[u8; HEADER_BYTES] = bytes.first_chunk()?;
        let flags = header[2];
        if flags & 0x80 != 0 {
            return None;
        }
        let count = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
        let question = if count(4) == 1 { Question::read(&bytes[HEADER_BYTES..]) } else { None };
        let rest = question.as_ref().map_or(0, |question| question.wire.len());
        // Only a client that sends nothing else tells how much it takes: other records come before.
        let plain = count(6) == 0 && count(8) == 0 && count(10) >= 1;
        let longest = plain.then(|| bytes.get(HEADER_BYTES + rest..).and_then(udp_size)).flatten();
        Some(Self {
            id: [header[0], header[1]],
            operation: (flags >> 3) & 0x0f,
            recursion_desired: flags & 1 != 0,
            question,
            longest: longest.unwrap_or(UDP_MAX).max(UDP_MAX),
        })
    }

    /// An answer with as many of the records as fit into `longest` bytes.
    fn reply(&self, code: u8, records: &[Data], longest: usize) -> Vec<u8> {
        let mut answers = Vec::new();
        let mut told: u16 = 0;
        let question = self.question.as_ref().map(|question| question.wire).unwrap_or_default();
        for record in records {
            let bytes = record.write();
            if HEADER_BYTES + question.len() + answers.len() + bytes.len() > longest {
                break;
            }
            answers.extend(bytes);
            told += 1;
        }
        let is_cut = usize::from(told) < records.len();
        let mut reply = self.id.to_vec();
        reply.push(0x80 | self.operation << 3 | u8::from(is_cut) << 1 | u8::from(self.recursion_desired));
        // Recursion is available.
        reply.push(0x80 | code);
        for count in [u16::from(self.question.is_some()), told, 0, 0] {
            reply.extend(count.to_be_bytes());
        }
        reply.extend(question);
        reply.extend(answers);
        reply
    }
}

/// The size in an OPT record that comes first.
fn udp_size(records: &[u8]) -> Option<usize> {
    let [0, high, low, size_high, size_low, ..] = records else { return None };
    (u16::from_be_bytes([*high, *low]) == TYPE_OPT)
        .then(|| usize::from(u16::from_be_bytes([*size_high, *size_low])))
}

impl Data {
    fn write(&self) -> Vec<u8> {
        let (kind, data) = match self {
            Self::Address(IpAddr::V4(address)) => (TYPE_A, address.octets().to_vec()),
            Self::Address(IpAddr::V6(address)) => (TYPE_AAAA, address.octets().to_vec()),
            Self::Name(name) => (TYPE_PTR, write_name(name)),
        };
        // The name is the question's, right behind the header.
        let mut record = vec![0xc0, HEADER_BYTES as u8];
        record.extend(kind.to_be_bytes());
        record.extend(CLASS_IN.to_be_bytes());
        record.extend(TTL_SECONDS.to_be_bytes());
        record.extend((data.len() as u16).to_be_bytes());
        record.extend(data);
        record
    }
}

/// A name on the wire; labels that are too long are cut, as no container's name is.
fn write_name(name: &str) -> Vec<u8> {
    let mut wire = Vec::new();
    for label in name.split('.').filter(|label| !label.is_empty()) {
        let label = &label.as_bytes()[..label.len().min(63)];
        if wire.len() + label.len() + 2 > NAME_MAX {
            break;
        }
        wire.push(label.len() as u8);
        wire.extend(label);
    }
    wire.push(0);
    wire
}

/// The address in `4.3.2.1.in-addr.arpa` or its IPv6 twin.
fn address_of(name: &str) -> Option<IpAddr> {
    let name = name.to_ascii_lowercase();
    if let Some(reversed) = name.strip_suffix(".in-addr.arpa") {
        let octets: Vec<u8> =
            reversed.rsplit('.').map(|part| part.parse().ok()).collect::<Option<Vec<u8>>>()?;
        let octets: [u8; 4] = octets.try_into().ok()?;
        return Some(Ipv4Addr::from(octets).into());
    }
    let reversed = name.strip_suffix(".ip6.arpa")?;
    let digits: Vec<u8> = reversed
        .rsplit('.')
        .map(|part| match part.as_bytes() {
            [digit] => char::from(*digit).to_digit(16).map(|digit| digit as u8),
            _ => None,
        })
        .collect::<Option<_>>()?;
    let digits: [u8; 32] = digits.try_into().ok()?;
    let mut octets = [0; 16];
    for (octet, pair) in octets.iter_mut().zip(digits.chunks_exact(2)) {
        *octet = pair[0] << 4 | pair[1];
    }
    Some(Ipv6Addr::from(octets).into())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    struct Table;

    impl Names for Table {
        fn resolve(&self, name: &str, six: bool) -> Resolution {
            match (name.to_ascii_lowercase().as_str(), six) {
                ("web", false) => Resolution::Ours(vec!["172.18.0.2".parse().unwrap()]),
                ("web", true) => Resolution::Ours(Vec::new()),
                ("many", false) => Resolution::Ours((0..100).map(|n| IpAddr::from([10, 0, 0, n])).collect()),
                ("six", true) => Resolution::Ours(vec!["fd00::2".parse().unwrap()]),
                _ => Resolution::Unknown,
            }
        }

        fn reverse(&self, address: IpAddr) -> Option<String> {
            let ours: [IpAddr; 2] = ["172.18.0.2".parse().unwrap(), "fd00::2".parse().unwrap()];
            ours.contains(&address).then(|| "web.front".to_owned())
        }
    }

    fn query(name: &str, kind: u16) -> Vec<u8> {
        let mut bytes = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        bytes.extend(write_name(name));
        bytes.extend(kind.to_be_bytes());
        bytes.extend(CLASS_IN.to_be_bytes());
        bytes
    }

    fn reply_to(query: &[u8], over_tcp: bool) -> Vec<u8> {
        match answer(query, &Table, over_tcp) {
            Answer::Reply(bytes) => bytes,
            other => panic!("{other:?}"),
        }
    }

    fn answers(reply: &[u8]) -> u16 {
        u16::from_be_bytes([reply[6], reply[7]])
    }

    #[test]
    fn our_names_have_addresses_in_either_case() {
        let asked = query("WeB", TYPE_A);
        let reply = reply_to(&asked, false);
        assert_eq!(reply[..12], [0, 7, 0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0]);
        assert_eq!(reply[12..asked.len()], asked[12..], "the question, as it was asked");
        assert_eq!(reply[asked.len()..], [0xc0, 12, 0, 1, 0, 1, 0, 0, 2, 88, 0, 4, 172, 18, 0, 2]);
        assert_eq!(answers(&reply_to(&query("web", TYPE_AAAA), false)), 0, "it is ours, and has none");
        assert_eq!(answers(&reply_to(&query("six", TYPE_AAAA), false)), 1);
        assert_eq!(answers(&reply_to(&query("web", TYPE_MX), false)), 0);
    }

    #[test]
    fn our_addresses_have_names() {
        let reply = reply_to(&query("2.0.18.172.IN-ADDR.arpa", TYPE_PTR), false);
        assert!(reply.ends_with(b"\x00\x0b\x03web\x05front\x00"), "{reply:?}");
        let six = "2.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.d.f.ip6.arpa";
        assert_eq!(answers(&reply_to(&query(six, TYPE_PTR), false)), 1);
        for other in ["3.0.18.172.in-addr.arpa", "x.in-addr.arpa", "1.2.3.in-addr.arpa", "1.ip6.arpa"] {
            assert_eq!(answer(&query(other, TYPE_PTR), &Table, false), Answer::Forward { is_bare: false });
        }
    }

    #[test]
    fn what_is_not_ours_is_somebody_elses() {
        let ask = |name: &str, kind| answer(&query(name, kind), &Table, false);
        assert_eq!(ask("nobody", TYPE_A), Answer::Forward { is_bare: true });
        assert_eq!(ask("example.org", TYPE_A), Answer::Forward { is_bare: false });
        assert_eq!(ask("web", 16), Answer::Forward { is_bare: false });
        let failure = Answer::failure(&query("x", TYPE_A)).unwrap();
        assert_eq!((failure[2], failure[3] & 15), (0x81, CODE_FAILURE));
    }

    #[test]
    fn answers_too_long_for_udp_are_cut_and_say_so() {
        let mut asked = query("many", TYPE_A);
        let short = reply_to(&asked, false);
        assert!(short[2] & 2 != 0 && short.len() <= UDP_MAX && answers(&short) > 0);
        let long = reply_to(&asked, true);
        assert!(long[2] & 2 == 0 && answers(&long) == 100);
        // The client says that it takes 4096 bytes.
        asked[11] = 1;
        asked.extend([0, 0, 41, 0x10, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(answers(&reply_to(&asked, false)), 100);
    }

    #[test]
    fn nonsense_is_refused_or_dropped() {
        assert_eq!(answer(b"", &Table, false), Answer::Drop);
        assert_eq!(answer(&[0; 11], &Table, false), Answer::Drop);
        let mut response = query("web", TYPE_A);
        response[2] |= 0x80;
        assert_eq!(answer(&response, &Table, false), Answer::Drop, "never answer an answer");
        let refused = |bytes: &[u8]| reply_to(bytes, false)[3] & 15 == CODE_FORMAT;
        let mut cut = query("web", TYPE_A);
        cut.truncate(14);
        assert!(refused(&cut));
        let mut pointer = query("web", TYPE_A);
        pointer[12] = 0xc0;
        assert!(refused(&pointer), "there is nothing to refer to");
        let mut two = query("web", TYPE_A);
        two[5] = 2;
        assert!(refused(&two));
        let mut label = query("we-b", TYPE_A);
        label[15] = b'.';
        assert_eq!(answer(&label, &Table, false), Answer::Forward { is_bare: true }, "a dot inside a label");
    }

    proptest! {
        #[test]
        fn foreign_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            read_hostile(&bytes);
        }

        #[test]
        fn queries_with_noise_behind_never_panic(
            name in "[a-zA-Z.\\-]{0,300}", kind: u16, noise in prop::collection::vec(any::<u8>(), 0..60), additional: u8,
        ) {
            let mut bytes = query(&name, kind);
            bytes[11] = additional;
            bytes.extend(noise);
            read_hostile(&bytes);
        }
    }
}
