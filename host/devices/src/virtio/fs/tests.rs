//! The device against the driver's side of its queues.

use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::virtio::device::VirtioDevice;
use crate::virtio::driver::{self, DriverQueue, Piece};

const HIGH_PRIORITY: u64 = 0;
const REQUESTS: u64 = 0x8_0000;
const ASKED: u64 = 0x10_0000;
const ANSWER: u64 = 0x11_0000;

/// Answers each request with its bytes the other way round; those that begin with `s` are slow and wait for a word, which
/// may be to panic.
struct Mirror {
    go: Mutex<Receiver<Word>>,
    resets: Counter,
    /// The only state it goes on from.
    state: Vec<u8>,
}

#[derive(PartialEq)]
enum Word {
    Go,
    Panic,
}

impl Backend for Mirror {
    fn is_slow(&self, readable: &Buffers<'_>) -> bool {
        let mut first = [0];
        readable.peek(&mut first) == 1 && first == *b"s"
    }

    fn serve(&self, mut readable: Buffers<'_>, mut writable: Buffers<'_>) -> u32 {
        if self.is_slow(&readable) {
            let word = self.go.lock().unwrap_or_else(PoisonError::into_inner).recv();
            assert!(word == Ok(Word::Go), "no way to go on");
        }
        let mut bytes = vec![0; readable.len()];
        readable.copy_out(&mut bytes);
        bytes.reverse();
        writable.copy_in(&bytes) as u32
    }

    fn reset(&self) {
        self.resets.add(1);
    }

    fn save(&self) -> Result<Vec<u8>, String> {
        match self.state.is_empty() {
            true => Err("a mirror has no memory".into()),
            false => Ok(self.state.clone()),
        }
    }

    fn restore(&self, state: &[u8]) -> Result<(), String> {
        (state == self.state).then_some(()).ok_or_else(|| "it is another mirror's".into())
    }
}

struct Guest {
    device: Fs,
    backend: Arc<Mirror>,
    go: Sender<Word>,
    memory: Arc<GuestMemoryMmap>,
    high_priority: DriverQueue,
    requests: DriverQueue,
}

impl Guest {
    fn new(event_idx: bool) -> Self {
        let (go, waits) = mpsc::channel();
        let (resets, state) = (Counter::default(), b"mirror".to_vec());
        let backend = Arc::new(Mirror { go: Mutex::new(waits), resets, state });
        let mut device = Fs::new("home", Arc::clone(&backend) as _).unwrap();
        let memory = driver::memory(4 << 20);
        let high_priority = DriverQueue::new(&memory, HIGH_PRIORITY, 16, event_idx);
        let requests = DriverQueue::new(&memory, REQUESTS, 64, event_idx);
        device.ack_features(device.features());
        device.start_queue(0, high_priority.resources()).unwrap();
        device.start_queue(1, requests.resources()).unwrap();
        Self { device, backend, go, memory, high_priority, requests }
    }

    /// The pieces of a request with room for its answer, in a place of its own.
    fn request(&self, number: u64, text: &[u8]) -> [Piece; 2] {
        let (asked, answer) = (ASKED + number * 0x100, ANSWER + number * 0x100);
        self.memory.write_slice(text, GuestAddress(asked)).unwrap();
        let length = text.len() as u32;
        [Piece { address: asked, length, writable: false }, Piece { address: answer, length, writable: true }]
    }

    /// Waits until the device has ended; why.
    fn failure(&self) -> String {
        let life = self.device.life();
        let deadline = Instant::now() + Duration::from_secs(60);
        while life.failure().is_none() {
            assert!(Instant::now() < deadline, "nobody noticed");
            std::thread::yield_now();
        }
        life.failure().unwrap().to_owned()
    }

    fn answer(&self, number: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_slice(&mut bytes, GuestAddress(ANSWER + number * 0x100)).unwrap();
        bytes
    }
}

#[test]
fn the_configuration_names_the_file_system_and_its_queues() {
    let guest = Guest::new(false);
    let mut config = [0xff; 44];
    guest.device.read_config(0, &mut config);
    assert_eq!(&config[..5], b"home\0");
    assert_eq!(config[36..], [1, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn both_queues_are_served() {
    for event_idx in [false, true] {
        let mut guest = Guest::new(event_idx);
        let pieces = guest.request(0, b"abc");
        assert_eq!(guest.high_priority.run(&pieces), 3);
        assert_eq!(guest.answer(0, 3), b"cba");
        for round in 0..40u64 {
            let pieces = guest.request(round % 8, &round.to_le_bytes());
            assert_eq!(guest.requests.run(&pieces), 8);
            assert_eq!(guest.answer(round % 8, 8), round.to_be_bytes());
        }
        assert_eq!(guest.device.counters().requests.get(), 41);
    }
}

#[test]
fn a_slow_request_is_passed_by_others() {
    let mut guest = Guest::new(true);
    let slow = guest.request(0, b"slow");
    let slow = guest.requests.add(&slow);
    guest.requests.notify();
    let quick = guest.request(1, b"quick");
    assert_eq!(guest.requests.run(&quick), 5);
    assert_eq!(guest.requests.take_used(), None);
    guest.go.send(Word::Go).unwrap();
    assert_eq!(guest.requests.wait_used(), (slow, 4));
    assert_eq!(guest.answer(0, 4), b"wols");
    assert_eq!(guest.device.counters().slow.get(), 1);
}

#[test]
fn stopping_a_queue_waits_for_what_is_under_way() {
    let mut guest = Guest::new(false);
    for number in 0..6 {
        let pieces = guest.request(number, b"slow");
        guest.requests.add(&pieces);
    }
    guest.requests.notify();
    // The last is taken once the first ones are away; a quick one behind them tells that they are.
    let quick = guest.request(7, b"quick");
    assert_eq!(guest.requests.run(&quick), 5);
    let go = guest.go.clone();
    let freeing = std::thread::spawn(move || (0..6).for_each(|_| go.send(Word::Go).unwrap()));
    let state = guest.device.stop_queue(1).unwrap();
    freeing.join().unwrap();
    let mut used = 0;
    while guest.requests.take_used().is_some() {
        used += 1;
    }
    assert_eq!((used, state.next_used), (6, 7));
    // And it goes on where it left off.
    guest.device.start_queue(1, guest.requests.resume(state)).unwrap();
    let pieces = guest.request(0, b"more");
    assert_eq!(guest.requests.run(&pieces), 4);
}

#[test]
fn a_panic_in_a_slow_request_is_the_end_of_the_device_and_has_a_reason() {
    let mut guest = Guest::new(true);
    let slow = [0, 1].map(|number| guest.request(number, b"slow"));
    for pieces in &slow {
        guest.requests.add(pieces);
    }
    guest.requests.notify();
    guest.go.send(Word::Panic).unwrap();
    guest.go.send(Word::Go).unwrap();
    assert_eq!(guest.failure(), "its thread panicked: no way to go on");
    // Who takes the machine down does not wait for the lost request.
    assert!(guest.device.stop_queue(1).is_none());
    guest.device.reset();
}

#[test]
fn a_queue_that_is_stopped_does_not_wait_for_a_lost_request() {
    let mut guest = Guest::new(true);
    let pieces = guest.request(0, b"slow");
    guest.requests.add(&pieces);
    guest.requests.notify();
    let quick = guest.request(7, b"quick");
    assert_eq!(guest.requests.run(&quick), 5);
    let go = guest.go.clone();
    let panicking = std::thread::spawn(move || go.send(Word::Panic).unwrap());
    assert!(guest.device.stop_queue(1).is_none());
    panicking.join().unwrap();
    assert_eq!(guest.failure(), "its thread panicked: no way to go on");
}

#[test]
fn what_the_back_end_keeps_is_saved() {
    let device = |state: &[u8]| {
        let (_, waits) = mpsc::channel();
        let backend = Mirror { go: Mutex::new(waits), resets: Counter::default(), state: state.to_vec() };
        Fs::new("home", Arc::new(backend)).unwrap()
    };
    let saved = device(b"mirror").save().unwrap();
    assert_eq!(saved.model, b"mirror");
    device(b"mirror").restore(&saved).unwrap();
    let refused = device(b"other").restore(&saved).unwrap_err().to_string();
    assert_eq!(refused, "the fs device cannot go on from its saved state: it is another mirror's");
    let unsaved = device(b"").save().unwrap_err().to_string();
    assert_eq!(unsaved, "the state of the fs device cannot be saved: a mirror has no memory");
}

#[test]
fn nonsense_is_answered_with_nothing() {
    let mut guest = Guest::new(false);
    let outside = Piece { address: 1 << 40, length: 8, writable: false };
    assert_eq!(guest.requests.run(&[outside]), 0);
    let pieces = guest.request(0, b"fine");
    assert_eq!(guest.requests.run(&pieces), 4);
}

#[test]
fn a_reset_reaches_the_back_end() {
    let mut guest = Guest::new(false);
    guest.device.reset();
    assert_eq!(guest.backend.resets.get(), 1);
    assert!(guest.device.stop_queue(1).is_none());
}
