//! One connection against invented segments. Conversations with a whole TCP are in tests/nat.

use proptest::prelude::*;
use smoltcp::wire::TcpSeqNumber;

use super::*;

const GUEST_FIRST: u32 = u32::MAX - 700;
const OUR_FIRST: u32 = u32::MAX - 300;

fn segment(control: TcpControl, seq: u32, ack: Option<u32>, window: u16, payload: &[u8]) -> TcpRepr<'_> {
    TcpRepr {
        src_port: 1,
        dst_port: 2,
        control,
        seq_number: TcpSeqNumber(seq.cast_signed()),
        ack_number: ack.map(|ack| TcpSeqNumber(ack.cast_signed())),
        window_len: window,
        window_scale: None,
        max_seg_size: Some(1000),
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None,
        payload,
    }
}

fn connection() -> Connection {
    let syn = segment(TcpControl::Syn, GUEST_FIRST, None, 4000, b"");
    Connection::new(&TcpRepr { window_scale: Some(0), ..syn }, 1460, OUR_FIRST)
}

fn open() -> Connection {
    let mut connection = connection();
    connection.connected();
    let syn_ack = connection.next_segment(Duration::ZERO).unwrap();
    assert_eq!((syn_ack.control, syn_ack.seq), (TcpControl::Syn, Seq(OUR_FIRST)));
    let ack =
        segment(TcpControl::None, GUEST_FIRST.wrapping_add(1), Some(OUR_FIRST.wrapping_add(1)), 4000, b"");
    assert_eq!(connection.receive(&ack, Duration::ZERO), Verdict::Continue);
    connection
}

/// One into the guest, which it has accepted.
fn landed() -> Connection {
    let mut connection = Connection::opening(1460, OUR_FIRST);
    let consent = segment(TcpControl::Syn, GUEST_FIRST, Some(OUR_FIRST.wrapping_add(1)), 4000, b"");
    let consent = TcpRepr { window_scale: Some(0), ..consent };
    assert_eq!(connection.receive(&consent, Duration::ZERO), Verdict::Stale, "our SYN is not out yet");
    let syn = connection.next_segment(Duration::ZERO).unwrap();
    assert_eq!((syn.control, syn.seq, syn.ack), (TcpControl::Syn, Seq(OUR_FIRST), None));
    assert_eq!(connection.receive(&consent, Duration::ZERO), Verdict::Continue);
    connection
}

#[test]
fn an_ack_before_our_syn_is_out_opens_nothing() {
    let mut connection = connection();
    connection.connected();
    let early = segment(TcpControl::None, GUEST_FIRST.wrapping_add(1), Some(OUR_FIRST), 4000, b"");
    connection.receive(&early, Duration::ZERO);
    assert_eq!(connection.state, State::Accepting);
    assert_eq!(connection.next_segment(Duration::ZERO).unwrap().control, TcpControl::Syn);
}

#[test]
fn three_duplicate_acks_bring_the_first_segment_again() {
    let mut connection = open();
    let now = Duration::ZERO;
    connection.host_sent(&[7; 4000]);
    let sent: Vec<_> = std::iter::from_fn(|| connection.next_segment(now)).collect();
    assert_eq!(sent.iter().map(|segment| segment.length).collect::<Vec<_>>(), [1000; 4]);
    let again =
        segment(TcpControl::None, GUEST_FIRST.wrapping_add(1), Some(OUR_FIRST.wrapping_add(1)), 4000, b"");
    for _ in 0..3 {
        assert_eq!(connection.next_segment(now), None);
        connection.receive(&again, now);
    }
    let repair = connection.next_segment(now).unwrap();
    assert_eq!((repair.seq, repair.length, repair.again), (sent[0].seq, 1000, true));
    // Only part of it repaired: the next hole at once (RFC 6582).
    let partial =
        segment(TcpControl::None, GUEST_FIRST.wrapping_add(1), Some(OUR_FIRST.wrapping_add(2001)), 4000, b"");
    connection.receive(&partial, now);
    let repair = connection.next_segment(now).unwrap();
    assert_eq!((repair.seq, repair.again), (sent[2].seq, true));
}

#[test]
fn a_fin_is_sent_again_only_if_it_was_sent() {
    let mut connection = open();
    let now = Duration::ZERO;
    connection.host_sent(&[7; 5000]);
    connection.host_ended();
    while connection.next_segment(now).is_some() {}
    // The window held one segment and the end back.
    connection.resend_first = true;
    assert_eq!(connection.next_segment(now).unwrap().control, TcpControl::None);
}

#[derive(Debug, Clone)]
enum Step {
    Segment { control: u8, seq: i32, ack: i32, window: u16, length: usize },
    HostSent(usize),
    HostEnded,
    HostTook(usize),
    Time(u64),
    Send(u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..12u8, -2000..3000i32, -2000..9000i32, any::<u16>(), 0..1500usize).prop_map(
            |(control, seq, ack, window, length)| Step::Segment { control, seq, ack, window, length }
        ),
        3 => (0..5000usize).prop_map(Step::HostSent),
        1 => Just(Step::HostEnded),
        3 => (0..5000usize).prop_map(Step::HostTook),
        2 => (0..5000u64).prop_map(Step::Time),
        4 => any::<u8>().prop_map(Step::Send),
    ]
}

proptest! {
    #[test]
    fn no_segment_breaks_the_bounds(inwards: bool, steps in prop::collection::vec(step(), 0..120)) {
        let mut connection = if inwards { landed() } else { open() };
        let mut now = Duration::ZERO;
        let mut ended = false;
        let mut edge = connection.received + connection.window_room();
        let payload = [7; 1500];
        for step in steps {
            match step {
                Step::Segment { control, seq, ack, window, length } => {
                    let control = match control {
                        0 => TcpControl::Fin,
                        1 => TcpControl::Syn,
                        _ => TcpControl::None,
                    };
                    // Around what is expected, so that many are good.
                    let seq = connection.received.0.wrapping_add_signed(seq.min(0) + seq.max(0) / 1000);
                    let ack = connection.una.0.wrapping_add_signed(ack);
                    let before = connection.next;
                    let verdict = connection.receive(&segment(control, seq, Some(ack), window, &payload[..length]), now);
                    prop_assert_eq!(verdict, Verdict::Continue);
                    prop_assert!(!connection.una.is_after(before), "acknowledged what was never sent");
                }
                Step::HostSent(count) => {
                    if !ended {
                        let count = count.min(connection.room());
                        connection.host_sent(&vec![7; count]);
                    }
                }
                Step::HostEnded => {
                    ended = true;
                    connection.host_ended();
                }
                Step::HostTook(count) => {
                    connection.host_took(count);
                    if connection.wants_shutdown() {
                        connection.host_shut();
                    }
                }
                Step::Time(milliseconds) => {
                    now += Duration::from_millis(milliseconds);
                    if connection.timeout(now) == Timeout::GiveUp {
                        break;
                    }
                }
                Step::Send(count) => {
                    for _ in 0..count {
                        let Some(segment) = connection.next_segment(now) else { break };
                        prop_assert!(segment.offset + segment.length <= connection.to_guest.len());
                        prop_assert!(segment.length <= 1000);
                    }
                }
            }
            prop_assert!(connection.to_host.len() <= BUFFER && connection.to_guest.len() <= BUFFER);
            prop_assert!(connection.in_flight() <= connection.to_guest.len() + 1);
            prop_assert!(!connection.una.is_after(connection.next));
            if !connection.guest_ended {
                let new_edge = connection.received + connection.window_room();
                prop_assert!(!edge.is_after(new_edge), "the window shrank");
                edge = new_edge;
            }
        }
        // Whatever happened, the queue of segments ends.
        let mut sent = 0;
        while connection.next_segment(now).is_some() {
            sent += 1;
            prop_assert!(sent < 1000);
        }
    }
}
