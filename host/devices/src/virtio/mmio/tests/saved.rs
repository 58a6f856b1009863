//! Devices that are saved and go on elsewhere.

use std::collections::HashMap;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::*;
use crate::virtio::balloon::{self, Balloon};
use crate::virtio::console::Console;
use crate::virtio::mem::{self, Mem};
use crate::virtio::net::{self, Net};
use crate::virtio::rng::Rng;

impl Machine {
    /// Saves the machine's device and lets another go on from that.
    fn moved_to(self, device: Box<dyn VirtioDevice>) -> Self {
        let saved = self.device.save().unwrap();
        let text = serde_json::to_string(&saved).unwrap();
        let read: SavedTransport = serde_json::from_str(&text).unwrap();
        assert_eq!(read, saved);
        let Self { device: before, irq, memory } = self;
        drop(before);
        let _spent = irq.read();
        let device =
            MmioDevice::restore(device, driver::atomic(&memory), irq.try_clone().unwrap(), &read).unwrap();
        Self { device, irq, memory }
    }
}

/// Waits for what another thread does soon.
fn wait_until(mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !is_so() {
        assert!(Instant::now() < deadline, "it does not come");
        std::thread::yield_now();
    }
}

#[test]
fn a_saved_device_goes_on_elsewhere() {
    let machine = Machine::new(disk(1));
    machine.negotiate(machine.features());
    let mut queue = queue_on(&machine, true);
    machine.set_up_queue(0, &queue);
    machine.go();
    assert_eq!(read_sector(&machine, &mut queue), 1);
    let saved = machine.device.save().unwrap();
    assert_eq!((saved.queues[0].next_available, saved.queues[0].next_used), (1, 1));
    assert_eq!(machine.device.save().unwrap(), saved, "nothing happens in a pause");
    machine.device.resume();
    // Saving does not end it, and neither does going on twice.
    machine.device.resume();
    assert_eq!(read_sector(&machine, &mut queue), 1);

    let machine = machine.moved_to(disk(2));
    // What had been raised is raised again, and the configuration is to be read.
    assert_eq!(machine.irq.read().unwrap(), 1);
    assert_eq!([STATUS, 0x60, 0xfc].map(|offset| machine.get(offset)), [15, 3, 1]);
    assert_eq!(read_sector(&machine, &mut queue), 2);
    assert_eq!(machine.device.save().unwrap().queues[0].next_available, 3);
    machine.device.resume();
    machine.set(STATUS, 0);
    assert_eq!(machine.negotiate(machine.features()), 11);
    let mut queue = queue_on(&machine, true);
    machine.set_up_queue(0, &queue);
    machine.go();
    assert_eq!(read_sector(&machine, &mut queue), 2, "a reset begins at the rings' beginning");
}

#[test]
fn a_paused_device_leaves_memory_alone() {
    let machine = Machine::new(disk(3));
    machine.negotiate(machine.features());
    let mut queue = queue_on(&machine, true);
    machine.set_up_queue(0, &queue);
    machine.go();
    assert_eq!(read_sector(&machine, &mut queue), 3);
    machine.device.save().unwrap();
    let all = |machine: &Machine| {
        let mut bytes = vec![0; 4 << 20];
        machine.memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        bytes
    };
    queue.add(&[
        Piece { address: HEADER, length: 16, writable: false },
        Piece { address: DATA, length: 512, writable: true },
        Piece { address: STATUS_BYTE, length: 1, writable: true },
    ]);
    machine.memory.write_obj(0u8, GuestAddress(DATA)).unwrap();
    let before = all(&machine);
    machine.set(0x50, 0);
    // What the device's thread had to do is done when it answers.
    assert_eq!(machine.device.save().unwrap().queues[0].next_available, 1);
    assert!(all(&machine) == before, "memory has changed in the pause");
    machine.device.resume();
    queue.wait_used();
    assert_eq!(machine.memory.read_obj::<u8>(GuestAddress(DATA)).unwrap(), 3);
}

#[test]
fn a_disk_may_have_grown_and_not_shrunk() {
    let sized = |bytes| {
        let file = tempfile::tempfile().unwrap();
        file.set_len(bytes).unwrap();
        Box::new(Block::from_file(file, "disk", false, 2).unwrap())
    };
    let machine = Machine::new(sized(8192));
    machine.negotiate(machine.features());
    let saved = machine.device.save().unwrap();
    let restore = |bytes| {
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        MmioDevice::restore(sized(bytes), driver::atomic(&machine.memory), irq, &saved)
    };
    let error = restore(8191).err().expect("a smaller disk was accepted");
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert_eq!(
        source,
        "the block device cannot go on from its saved state: the driver uses 16 sectors, and the disk has 15"
    );
    let mut capacity = [0; 8];
    restore(1 << 20).unwrap().read(0x100, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), 2048);
}

#[test]
fn a_network_card_goes_on_with_another_link() {
    let card = || {
        let (host, stream) = UnixStream::pair().unwrap();
        let backend = net::Backend { stream, offloads: false, mac: [2, 0, 0, 0, 0, 2], mtu: 1500 };
        (host, Box::new(Net::new(backend).unwrap()))
    };
    let (first, device) = card();
    let machine = Machine::new(device);
    machine.negotiate(1 << 32 | 1 << 5 | 1 << 16);
    let mut queue = queue_on(&machine, false);
    machine.set_up_queue(0, &DriverQueue::new(&machine.memory, 0x8000, 16, false));
    machine.set_up_queue(1, &queue);
    machine.go();
    let send = |machine: &Machine, queue: &mut DriverQueue, mut host: &UnixStream| {
        let frame = [[0; 12].as_slice(), &[0x5a; 60]].concat();
        machine.memory.write_slice(&frame, GuestAddress(DATA)).unwrap();
        queue.add(&[Piece { address: DATA, length: 72, writable: false }]);
        machine.set(0x50, 1);
        queue.wait_used();
        let mut sent = [0; 64];
        host.read_exact(&mut sent).unwrap();
        assert_eq!((&sent[..4], &sent[4..]), (&60u32.to_be_bytes()[..], &[0x5a; 60][..]));
    };
    send(&machine, &mut queue, &first);
    // The link goes down, which is not what the next machine shall find.
    drop(first);
    let status = |machine: &Machine| machine.get(0x104) >> 16;
    wait_until(|| status(&machine) == 0);
    let (second, device) = card();
    let machine = machine.moved_to(device);
    assert_eq!((status(&machine), machine.get(0x60) & 2), (1, 2));
    send(&machine, &mut queue, &second);
}

#[test]
fn what_no_driver_has_brought_about_is_refused() {
    let (_, machine) = running();
    let saved = machine.device.save().unwrap();
    let check = |saved: SavedTransport, expected: &str| {
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let restored =
            MmioDevice::restore(Box::new(Recorder::default()), driver::atomic(&machine.memory), irq, &saved);
        assert_eq!(restored.err().expect("it was accepted").to_string(), expected);
    };
    check(
        SavedTransport { device: 4, ..saved.clone() },
        "the saved state is of a virtio device 4, not of the block device",
    );
    check(
        SavedTransport { queues: vec![SavedQueue::default()], ..saved.clone() },
        "the saved block device had 1 queues, this one has 2",
    );
    check(
        SavedTransport { driver_features: [2, 1, 0, 0], ..saved.clone() },
        "the driver of the saved block device uses features that are not offered: 0x2",
    );
    check(
        SavedTransport { driver_features: [0, 1, 0, 1], ..saved.clone() },
        "the driver of the saved block device uses features that are not offered: 0x1000000000000000000000000",
    );
    check(
        SavedTransport { model: DeviceState { model: vec![1, 2], ..saved.model.clone() }, ..saved.clone() },
        "cannot restore the model of the block device",
    );
    let impossible = |saved, what: &str| {
        check(saved, &format!("the saved state of the block device is none that it can be in: {what}"));
    };
    impossible(SavedTransport { status: 31, ..saved.clone() }, "its status has a bit that is none");
    impossible(SavedTransport { driver_features: [0; 4], ..saved.clone() }, "its driver is a legacy one");
    impossible(SavedTransport { status: 7, ..saved.clone() }, "its driver has agreed to no features");
    impossible(
        SavedTransport { interrupt_status: 4, ..saved.clone() },
        "its interrupt has a reason that is none",
    );
    let queue = SavedQueue { size: 128, ..saved.queues[0] };
    impossible(
        SavedTransport { queues: vec![queue, saved.queues[1]], ..saved.clone() },
        "a queue has a size or an address that none can have",
    );
}

#[test]
fn states_of_other_models_are_refused() {
    let check = |mut device: Box<dyn VirtioDevice>, state: DeviceState, expected: &str| {
        let error = device.restore(&state).expect_err("it was accepted");
        assert_eq!(
            error.to_string(),
            format!("the {} device cannot go on from its saved state: {expected}", device.kind())
        );
    };
    let rng = || Box::new(Rng::new().unwrap());
    check(
        rng(),
        DeviceState { config: vec![1], model: Vec::new() },
        "its configuration space has 1 bytes, not 0",
    );
    check(
        rng(),
        DeviceState { config: Vec::new(), model: vec![1] },
        "it keeps nothing of its own, and not 1 bytes",
    );
    let saved = disk(0).save().unwrap();
    check(
        disk(0),
        DeviceState { model: vec![0; 3], ..saved },
        "it keeps nothing of its own, and not 3 bytes",
    );
}

#[test]
fn rings_that_make_no_sense_ask_for_a_reset() {
    let machine = Machine::new(disk(1));
    machine.negotiate(machine.features());
    let queue = queue_on(&machine, true);
    machine.set_up_queue(0, &queue);
    machine.go();
    let mut saved = machine.device.save().unwrap();
    // The driver has made nothing available, and the device would be a thousand entries behind.
    saved.queues[0].next_available = 0u16.wrapping_sub(1000);
    let (irq, memory) = (EventFd::new(EFD_NONBLOCK).unwrap(), Arc::clone(&machine.memory));
    let device = MmioDevice::restore(disk(1), driver::atomic(&memory), irq.try_clone().unwrap(), &saved);
    let restored = Machine { device: device.unwrap(), irq, memory };
    wait_until(|| restored.get(STATUS) & NEEDS_RESET != 0);
}

#[test]
fn a_device_that_has_died_is_not_saved() {
    let discard = Box::new(|_, _| panic!("no memory to give back"));
    let machine = Machine::new(Box::new(Balloon::new(balloon::Backend { discard }).unwrap()));
    machine.negotiate(machine.features());
    let mut queue = queue_on(&machine, false);
    machine.set_up_queue(0, &queue);
    machine.go();
    machine.memory.write_obj(5u32, GuestAddress(DATA)).unwrap();
    queue.add(&[Piece { address: DATA, length: 4, writable: false }]);
    machine.set(0x50, 0);
    // Either the thread has ended or it ends at this page when it goes on.
    let mut refused = None;
    wait_until(|| {
        refused = machine.device.save().inspect(|_| machine.device.resume()).err();
        refused.is_some()
    });
    let error = refused.unwrap();
    assert_eq!(error.to_string(), "the balloon device cannot be saved");
    assert_eq!(error.source.to_string(), "the thread of the balloon device has ended");
}

/// A device with what it works on, which outlives it.
struct Subject {
    make: Box<dyn Fn() -> Box<dyn VirtioDevice>>,
    /// What came of it on the host.
    outcome: Box<dyn Fn() -> Vec<u8>>,
    /// Queues that hand back all that is offered.
    queues: &'static [usize],
    /// What is written into the guest is the same each time.
    repeatable: bool,
}

fn block_subject() -> Subject {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&[9; 4096], 0).unwrap();
    let twin = file.try_clone().unwrap();
    let content = |file: &File| {
        let mut bytes = vec![0; 4096];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    };
    Subject {
        make: Box::new(move || {
            Box::new(Block::from_file(file.try_clone().unwrap(), "disk", false, 1).unwrap())
        }),
        outcome: Box::new(move || content(&twin)),
        queues: &[0],
        repeatable: true,
    }
}

fn balloon_subject() -> Subject {
    let discarded = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&discarded);
    let make = move || {
        let discarded = Arc::clone(&discarded);
        let discard = Box::new(move |start: GuestAddress, length: u64| {
            let mut discarded = discarded.lock().unwrap();
            discarded.extend([start.0.to_le_bytes(), length.to_le_bytes()].concat());
        });
        Box::new(Balloon::new(balloon::Backend { discard }).unwrap()) as Box<dyn VirtioDevice>
    };
    Subject {
        make: Box::new(make),
        outcome: Box::new(move || seen.lock().unwrap().clone()),
        queues: &[0],
        repeatable: true,
    }
}

fn mem_subject() -> Subject {
    let make = || {
        let backend =
            mem::Backend { start: GuestAddress(4 << 30), bytes: 64 << 20, discard: Box::new(|_, _| {}) };
        Box::new(Mem::new(backend).unwrap()) as Box<dyn VirtioDevice>
    };
    Subject { make: Box::new(make), outcome: Box::new(Vec::new), queues: &[0], repeatable: true }
}

fn console_subject() -> Subject {
    let (host, guest) = UnixStream::pair().unwrap();
    host.set_nonblocking(true).unwrap();
    let written = move || {
        let mut bytes = Vec::new();
        match (&host).read_to_end(&mut bytes) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => bytes,
            other => panic!("the console has closed: {other:?}"),
        }
    };
    Subject {
        make: Box::new(move || Box::new(Console::new(guest.try_clone().unwrap()).unwrap())),
        outcome: Box::new(written),
        queues: &[1],
        repeatable: true,
    }
}

fn rng_subject() -> Subject {
    let make = || Box::new(Rng::new().unwrap()) as Box<dyn VirtioDevice>;
    Subject { make: Box::new(make), outcome: Box::new(Vec::new), queues: &[0], repeatable: false }
}

const SUBJECTS: [fn() -> Subject; 5] =
    [block_subject, balloon_subject, mem_subject, console_subject, rng_subject];

#[derive(Clone, Debug)]
enum Step {
    /// A chain that these bytes make, with a kick or without.
    Offer([u8; 4], bool),
    Save,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (any::<[u8; 4]>(), any::<bool>()).prop_map(|(seed, kick)| Step::Offer(seed, kick)),
        1 => Just(Step::Save),
    ]
}

/// What a driver writes and the room it leaves: a request for a disk, which is something for the others too.
fn request([kind, sector, length, byte]: [u8; 4]) -> (Vec<u8>, u32) {
    let kinds = [0u32, 1, 4, 8, 11, 13, 99];
    let kind = kinds[usize::from(kind) % kinds.len()];
    let data = 512 * usize::from(length % 3);
    let mut bytes = [kind.to_le_bytes(), [0; 4]].concat();
    bytes.extend(u64::from(sector % 10).to_le_bytes());
    match kind {
        1 => bytes.extend(vec![byte; data]),
        11 | 13 => {
            bytes.extend(u64::from(byte % 9).to_le_bytes());
            bytes.extend([length % 4, 0, 0, 0, byte & 1, 0, 0, 0]);
        }
        _ => {}
    }
    bytes.truncate(if length == 7 { 9 } else { bytes.len() });
    (bytes, if kind == 0 { data as u32 + 1 } else { u32::from(length % 32) })
}

/// What the guest and the host have of the steps; those that save only count if the device is to be saved.
fn run(subject: &Subject, steps: &[Step], event_idx: bool, saves: bool) -> (Vec<(u32, Vec<u8>)>, Vec<u8>) {
    const STEP_BYTES: u64 = 0x2000;
    let mut machine = Machine::new((subject.make)());
    let features = if event_idx { machine.features() } else { machine.features() & !(1 << 29) };
    machine.negotiate(features);
    let mut queues = Vec::new();
    for index in subject.queues {
        let mut queue = DriverQueue::new(&machine.memory, 0x4000 * *index as u64, 16, event_idx);
        queue.call = machine.irq.try_clone().unwrap();
        machine.set_up_queue(*index as u32, &queue);
        queues.push((*index, queue, HashMap::new()));
    }
    machine.go();
    let mut results = vec![(0, Vec::new()); steps.len()];
    let mut collect = |queue: &mut DriverQueue, away: &mut HashMap<u16, (usize, u64, u32)>| {
        let (head, length) = queue.wait_used();
        let (step, address, room) = away.remove(&head).expect("a chain came twice");
        let mut written = vec![0; room as usize];
        queue.memory.read_slice(&mut written, GuestAddress(address)).unwrap();
        results[step] = (length, if subject.repeatable { written } else { Vec::new() });
    };
    for (number, step) in steps.iter().enumerate() {
        let Step::Offer(seed, kick) = step else {
            if saves {
                machine = machine.moved_to((subject.make)());
            }
            continue;
        };
        let (index, queue, away) = &mut queues[0];
        let (bytes, room) = request(*seed);
        while queue.free() < 2 {
            machine.set(0x50, *index as u32);
            collect(queue, away);
        }
        let address = 0x10_0000 + number as u64 * STEP_BYTES;
        machine.memory.write_slice(&bytes, GuestAddress(address)).unwrap();
        let answer = address + STEP_BYTES / 2;
        let readable = Piece { address, length: bytes.len() as u32, writable: false };
        let writable = Piece { address: answer, length: room, writable: true };
        let pieces = if room == 0 { vec![readable] } else { vec![readable, writable] };
        let head = queue.add(&pieces);
        away.insert(head, (number, answer, room));
        if *kick {
            machine.set(0x50, *index as u32);
        }
    }
    for (index, queue, away) in &mut queues {
        while !away.is_empty() {
            machine.set(0x50, *index as u32);
            collect(queue, away);
        }
    }
    (results, (subject.outcome)())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn a_device_that_was_saved_goes_on_as_if_it_never_was(
        which in 0..SUBJECTS.len(),
        steps in prop::collection::vec(step(), 1..60),
        event_idx in any::<bool>(),
    ) {
        let never = run(&SUBJECTS[which](), &steps, event_idx, false);
        let saved = run(&SUBJECTS[which](), &steps, event_idx, true);
        prop_assert_eq!(never, saved);
    }
}
