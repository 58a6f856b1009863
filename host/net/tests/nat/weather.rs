//! A whole TCP behind the pure stack, on a link that can be made bad.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::SocketAddr;
use std::time::Duration;

use host_net::{Config, FlowId, Operation, Stack};

use crate::offloads;
use crate::played::{PEER, PEER6};
use crate::support::{Guest, pattern, receive_pattern, send_pattern};

const MILLISECOND: Duration = Duration::from_millis(1);

/// What happens to frames on their way.
#[derive(Clone, Copy, Default)]
struct Weather {
    /// Frames lost, doubled, delayed (and so overtaken), in a thousand.
    lost: u64,
    doubled: u64,
    delayed: u64,
}

/// One direction of the link.
#[derive(Default)]
struct Way {
    frames: BTreeMap<(Duration, u64), Vec<u8>>,
    count: u64,
}

/// A host socket as the stack's operations describe it.
#[derive(Default)]
struct FakeSocket {
    to_guest: VecDeque<u8>,
    /// Bytes the guest sent, each checked as it came.
    from_guest: usize,
    /// After `to_guest`, the end.
    ends: bool,
    end_told: bool,
    shut: bool,
}

struct World {
    stack: Stack,
    guest: Guest,
    sockets: HashMap<FlowId, FakeSocket>,
    now: Duration,
    weather: Weather,
    there: Way,
    back: Way,
    random: u64,
    /// The link has offloads; the most packets that came as one.
    largest: Option<usize>,
}

impl World {
    fn new(weather: Weather, seed: u64) -> Self {
        Self {
            stack: Stack::new(Config::default(), seed),
            guest: Guest::new(1500),
            sockets: HashMap::new(),
            now: Duration::ZERO,
            weather,
            there: Way::default(),
            back: Way::default(),
            random: seed | 1,
            largest: None,
        }
    }

    /// The guest's card leaves checksums to the NAT, and cuts what the NAT sends.
    fn with_offloads(weather: Weather, seed: u64) -> Self {
        let config = Config { offloads: true, ..Config::default() };
        Self { stack: Stack::new(config, seed), largest: Some(0), ..Self::new(weather, seed) }
    }

    fn chance(&mut self, per_mille: u64) -> bool {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % 1000 < per_mille
    }

    fn put(&mut self, there: bool, frame: Vec<u8>) {
        let weather = self.weather;
        if self.chance(weather.lost) {
            return;
        }
        let copies = if self.chance(weather.doubled) { 2 } else { 1 };
        for _ in 0..copies {
            let delay = if self.chance(weather.delayed) { 20 * MILLISECOND } else { MILLISECOND };
            let at = self.now + delay;
            let way = if there { &mut self.there } else { &mut self.back };
            way.count += 1;
            way.frames.insert((at, way.count), frame.clone());
        }
    }

    /// Lets everything happen that happens now, then moves the clock to the next thing.
    fn step(&mut self) {
        while let Some(entry) = self.there.frames.first_entry()
            && entry.key().0 <= self.now
        {
            let frame = entry.remove();
            self.stack.receive_from_link(&frame, self.now);
        }
        while let Some(entry) = self.back.frames.first_entry()
            && entry.key().0 <= self.now
        {
            let frame = entry.remove();
            self.guest.port.to_guest.push_back(frame);
        }
        self.guest.poll(self.now);
        self.stack.tick(self.now);
        self.operate();
        self.move_bytes();
        for frame in std::mem::take(&mut self.guest.port.from_guest) {
            let frame = if self.largest.is_some() { offloads::leave(frame) } else { frame };
            self.put(true, frame);
        }
        loop {
            let mut frame = Vec::new();
            if self.stack.next_frame(&mut frame, self.now).is_none() {
                break;
            }
            if let Some(largest) = &mut self.largest {
                let packets;
                (frame, packets) = offloads::finish(&frame);
                *largest = packets.max(*largest);
            }
            self.put(false, frame);
        }
        self.operate();
        let next = [
            self.there.frames.keys().next().map(|key| key.0),
            self.back.frames.keys().next().map(|key| key.0),
            self.stack.next_deadline(),
            self.guest.poll_at(self.now),
        ];
        let soon = self.now + MILLISECOND;
        self.now =
            next.into_iter().flatten().min().unwrap_or(soon).clamp(soon, self.now + Duration::from_secs(1));
    }

    fn operate(&mut self) {
        while let Some(operation) = self.stack.next_operation() {
            match operation {
                Operation::Connect { flow, .. } => {
                    self.sockets.insert(flow, FakeSocket::default());
                    self.stack.connected(flow);
                }
                Operation::Close { flow } | Operation::Reset { flow } => drop(self.sockets.remove(&flow)),
                Operation::Send { .. } | Operation::Receive { .. } => {}
                other => panic!("{other:?}"),
            }
        }
    }

    fn move_bytes(&mut self) {
        for (flow, socket) in &mut self.sockets {
            let (first, second) = self.stack.outgoing(*flow);
            let count = first.len() + second.len();
            for byte in first.iter().chain(second) {
                assert_eq!(*byte, pattern(socket.from_guest), "byte {}", socket.from_guest);
                socket.from_guest += 1;
            }
            self.stack.host_took(*flow, count);
            if self.stack.wants_shutdown(*flow) {
                socket.shut = true;
                self.stack.host_shut(*flow);
            }
            let count = self.stack.room(*flow).min(socket.to_guest.len());
            let bytes: Vec<u8> = socket.to_guest.drain(..count).collect();
            if !bytes.is_empty() {
                self.stack.host_sent(*flow, &bytes);
            }
            if socket.ends && socket.to_guest.is_empty() && !socket.end_told {
                socket.end_told = true;
                self.stack.host_ended(*flow);
            }
        }
    }

    fn until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        for _ in 0..2_000_000 {
            if done(self) {
                return;
            }
            self.step();
        }
        panic!("{what}: not within {:?} of the fake clock; {}", self.now, self.stack.counters());
    }

    fn only_socket(&mut self) -> Option<&mut FakeSocket> {
        self.sockets.values_mut().next()
    }
}

/// A megabyte each way at once through whatever weather, every byte checked.
fn transfer(weather: Weather, seed: u64) -> World {
    // Both families in turn.
    let peer = if seed.is_multiple_of(2) { PEER } else { PEER6 };
    transfer_in(World::new(weather, seed), peer)
}

fn transfer_in(mut world: World, peer: SocketAddr) -> World {
    const TOTAL: usize = 1 << 20;
    let handle = world.guest.connect(peer, 65_536);
    world.until("connected", |world| world.guest.tcp(handle).may_send());
    let socket = world.only_socket().unwrap();
    socket.to_guest.extend((0..TOTAL).map(pattern));
    socket.ends = true;
    let (mut sent, mut received) = (0, 0);
    world.until("a megabyte each way", |world| {
        let socket = world.guest.tcp(handle);
        send_pattern(socket, &mut sent, TOTAL);
        receive_pattern(socket, &mut received);
        if sent == TOTAL {
            socket.close();
        }
        received == TOTAL
            && world.only_socket().is_none_or(|socket| socket.from_guest == TOTAL && socket.shut)
    });
    world.until("the flow ends", |world| world.stack.counters().flows_open == 0);
    assert!(world.sockets.is_empty());
    world
}

#[test]
fn a_good_link_needs_no_repair() {
    for seed in [1, 2] {
        let world = transfer(Weather::default(), seed);
        assert_eq!(world.stack.counters().retransmissions, 0);
        assert!(world.now < Duration::from_secs(2), "{:?}", world.now);
    }
}

#[test]
fn lost_frames_are_repaired() {
    for seed in 0..4 {
        let world = transfer(Weather { lost: 30, ..Weather::default() }, 100 + seed);
        assert!(world.stack.counters().retransmissions > 0);
    }
}

#[test]
fn doubled_and_overtaken_frames_do_no_harm() {
    for seed in 0..4 {
        transfer(Weather { doubled: 100, delayed: 50, ..Weather::default() }, 200 + seed);
    }
}

#[test]
fn a_link_with_every_fault_carries_every_byte() {
    for seed in 0..4 {
        transfer(Weather { lost: 50, doubled: 50, delayed: 100 }, 300 + seed);
    }
}

#[test]
fn a_card_with_offloads_gets_large_segments_and_leaves_checksums() {
    for weather in [Weather::default(), Weather { lost: 30, doubled: 50, delayed: 50 }] {
        for peer in [PEER, PEER6] {
            let world = transfer_in(World::with_offloads(weather, 400), peer);
            assert!(world.largest > Some(8), "{peer}: {:?}", world.largest);
        }
    }
}

#[test]
fn a_guest_that_stops_reading_is_probed_and_goes_on() {
    let mut world = World::new(Weather::default(), 5);
    let handle = world.guest.connect(PEER, 4096);
    world.until("connected", |world| world.guest.tcp(handle).may_send());
    let total = 1 << 20;
    world.only_socket().unwrap().to_guest.extend((0..total).map(pattern));
    world.until("a full window", |world| world.guest.tcp(handle).recv_queue() == 4096);
    // The guest sleeps a day; every word it says about its window in the meantime is lost.
    let slept = world.now + Duration::from_secs(86_400);
    world.until("a day", |world| world.now >= slept);
    assert_eq!(world.stack.counters().flows_open, 1, "probing never gives up");
    world.weather.lost = 1000;
    let mut received = 0;
    receive_pattern(world.guest.tcp(handle), &mut received);
    let deaf = world.now + Duration::from_secs(5);
    world.until("the update is lost", |world| world.now >= deaf);
    world.weather.lost = 0;
    world.until("the rest", |world| {
        receive_pattern(world.guest.tcp(handle), &mut received);
        received == total
    });
}
