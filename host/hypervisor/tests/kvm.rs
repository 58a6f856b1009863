//! Machines on the real KVM, each with a kernel of a few instructions.
//!
//! Where the probe finds KVM unusable these tests are shown as ignored and say why: `tests/run kvm` (arm64:
//! `tests/nested/run-arm64`) runs them in a machine with a KVM that works.
#![expect(clippy::print_stdout, reason = "says why tests are not run")]

mod guest;

use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::{Arc, Mutex};

use guest::{COPY_REGISTER, COUNT, COUNTER, NOTIFY, POWER_OFF, PRINT_OK, RESET};
use host_hypervisor::arch::slots::Registers;
use host_hypervisor::kvm::probe::{Usability, probe};
use host_hypervisor::kvm::{Machine, Slot, Spec};
use host_hypervisor::memory::{self, Ram};
use host_hypervisor::reserve::Reserve;
use host_hypervisor::vcpu::End;
use libtest_mimic::{Arguments, Failed, Trial};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

type Test = fn() -> Result<(), Failed>;

const TESTS: &[(&str, Test)] = &[
    ("processors_pause_and_resume_a_thousand_times", pause_and_resume),
    ("a_machine_stops_at_any_moment", stop_at_any_moment),
    ("a_running_machine_gets_more_memory", growth),
    ("the_serial_line_prints_and_the_machine_resets", print_and_reset),
    ("a_machine_powers_itself_off", power_off),
    ("registers_of_a_slot_are_read_and_written", slot_registers),
    ("a_notification_reaches_its_queue_without_the_registers", notification),
    #[cfg(target_arch = "x86_64")]
    ("a_triple_fault_is_a_reset", triple_fault),
    #[cfg(target_arch = "aarch64")]
    ("a_processor_turns_another_on", second_processor),
    #[cfg(target_arch = "aarch64")]
    ("an_interrupt_of_a_slot_reaches_the_controller", slot_interrupt),
];
/// What runs these tests where KVM works.
const RUN: &str = if cfg!(target_arch = "aarch64") { "tests/nested/run-arm64" } else { "tests/run kvm" };

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let unusable = match probe() {
        Usability::Usable => None,
        Usability::Unusable { reason } => Some(reason),
    };
    if let Some(reason) = &unusable {
        println!("KVM is not usable here: {reason}. `{RUN}` runs these {} tests.", TESTS.len());
    }
    let trials = TESTS
        .iter()
        .map(|(name, test)| Trial::test(*name, test).with_ignored_flag(unusable.is_some()))
        .collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// What a guest has printed.
#[derive(Clone, Default)]
struct Output(Arc<Mutex<Vec<u8>>>);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Built {
    machine: Machine,
    memory: GuestMemoryMmap,
    ram: Ram,
    output: Output,
}

/// A machine whose first processor runs `code`.
fn guest(code: &[u8], cpus: u32, slots: Vec<Slot>) -> Built {
    let folder = tempfile::tempdir().unwrap();
    let (kernel, initramfs) = (folder.path().join("kernel"), folder.path().join("initramfs"));
    std::fs::write(&kernel, guest::kernel(code)).unwrap();
    std::fs::write(&initramfs, b"initramfs").unwrap();
    let memory = memory::allocate(32).unwrap();
    let ram = Ram::new(memory.clone());
    let output = Output::default();
    let machine = Machine::build(Spec {
        cpus,
        memory: ram.clone(),
        kernel: &kernel,
        initramfs: &initramfs,
        cmdline: "",
        console: Box::new(output.clone()),
        slots,
    })
    .unwrap();
    Built { machine, memory, ram, output }
}

fn end_of(code: &[u8]) -> (End, Vec<u8>) {
    let guest = guest(code, 1, Vec::new());
    let end = guest.machine.start().unwrap().wait();
    let output = guest.output.0.lock().unwrap().clone();
    (end, output)
}

fn count(memory: &GuestMemoryMmap) -> u32 {
    memory.read_obj(COUNTER).unwrap()
}

fn pause_and_resume() -> Result<(), Failed> {
    let guest = guest(COUNT, 4, Vec::new());
    let running = guest.machine.start()?;
    let control = running.control();
    for cycle in 0..1000 {
        assert!(control.pause(), "cycle {cycle}");
        let before = count(&guest.memory);
        std::thread::yield_now();
        assert_eq!(count(&guest.memory), before, "a held processor went on in cycle {cycle}");
        control.resume();
        while count(&guest.memory) == before {
            std::thread::yield_now();
        }
    }
    control.stop();
    assert_eq!(running.wait(), End::Stopped);
    Ok(())
}

fn stop_at_any_moment() -> Result<(), Failed> {
    for round in 0..100 {
        let running = guest(COUNT, 2, Vec::new()).machine.start()?;
        let control = running.control();
        match round % 4 {
            0 => {}
            1 => assert!(control.pause()),
            2 => {
                assert!(control.pause());
                control.resume();
            }
            _ => std::thread::yield_now(),
        }
        if round % 8 < 4 {
            control.stop();
            assert_eq!(running.wait(), End::Stopped);
        } else {
            drop(running);
        }
    }
    Ok(())
}

fn growth() -> Result<(), Failed> {
    let guest = guest(COUNT, 2, Vec::new());
    let reserve = Reserve::new(32, 1024)?.ok_or("nothing can be added")?;
    let (start, block) = (reserve.start(), reserve.rounded(1));
    let mut growth = guest.machine.growth(reserve);
    let running = guest.machine.start()?;
    let reached = |bytes: u64| guest.ram.memory().address_in_range(GuestAddress(start.0 + bytes - 1));
    assert!(!reached(1));
    for (asked, granted) in [(1, block), (block, block), (3 * block + 1, 4 * block), (0, 4 * block)] {
        assert_eq!(growth.grant(asked)?, granted);
        assert!(reached(granted) && !reached(granted + 1));
    }
    assert_eq!(memory::held(&guest.ram.memory())?, memory::held(&guest.memory)?);
    guest.ram.memory().write_obj(7_u64, start)?;
    assert!(memory::held(&guest.ram.memory())? > memory::held(&guest.memory)?);
    // What runs goes on.
    let before = count(&guest.memory);
    while count(&guest.memory) == before {
        std::thread::yield_now();
    }
    running.control().stop();
    assert_eq!(running.wait(), End::Stopped);
    // Harmless once it has ended.
    growth.grant(5 * block)?;
    Ok(())
}

fn print_and_reset() -> Result<(), Failed> {
    assert_eq!(end_of(&[PRINT_OK, RESET].concat()), (End::Reset, b"ok".to_vec()));
    Ok(())
}

fn power_off() -> Result<(), Failed> {
    assert_eq!(end_of(POWER_OFF).0, End::PoweredOff);
    Ok(())
}

#[cfg(target_arch = "x86_64")]
fn triple_fault() -> Result<(), Failed> {
    assert_eq!(end_of(guest::TRIPLE_FAULT).0, End::Reset);
    Ok(())
}

#[cfg(target_arch = "aarch64")]
fn second_processor() -> Result<(), Failed> {
    let guest = guest(guest::COUNT_ON_ANOTHER, 18, Vec::new());
    let running = guest.machine.start()?;
    while count(&guest.memory) < 1000 {
        std::thread::yield_now();
    }
    let context: u32 = guest.memory.read_obj(GuestAddress(COUNTER.0 + 4))?;
    assert_eq!(context, 7);
    running.control().stop();
    assert_eq!(running.wait(), End::Stopped);
    Ok(())
}

/// Remembers what was written, answers reads with 7.
#[derive(Default)]
struct Seven(Mutex<Vec<(u64, Vec<u8>)>>);

impl Registers for Seven {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        data[0] = u8::try_from(offset).unwrap() + 7;
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.0.lock().unwrap().push((offset, data.to_vec()));
    }
}

fn slot(registers: &Arc<Seven>, kicks: Vec<EventFd>) -> Slot {
    Slot { registers: registers.clone(), kicks, interrupt: EventFd::new(EFD_NONBLOCK).unwrap() }
}

fn slot_registers() -> Result<(), Failed> {
    let registers = Arc::new(Seven::default());
    let guest = guest(&[COPY_REGISTER, RESET].concat(), 1, vec![slot(&registers, Vec::new())]);
    assert_eq!(guest.machine.start()?.wait(), End::Reset);
    assert_eq!(*registers.0.lock().unwrap(), [(0x20, vec![0x17, 0, 0, 0])]);
    Ok(())
}

fn notification() -> Result<(), Failed> {
    let registers = Arc::new(Seven::default());
    let kicks: Vec<_> = (0..2).map(|_| EventFd::new(EFD_NONBLOCK).unwrap()).collect();
    let copies = kicks.iter().map(|kick| kick.try_clone().unwrap()).collect();
    let guest = guest(&[NOTIFY, RESET].concat(), 1, vec![slot(&registers, copies)]);
    assert_eq!(guest.machine.start()?.wait(), End::Reset);
    assert_eq!(kicks[1].read()?, 1);
    assert!(kicks[0].read().is_err(), "the other queue was not notified");
    assert!(registers.0.lock().unwrap().is_empty());
    Ok(())
}

/// Interrupts the guest when it stores to a register.
#[cfg(target_arch = "aarch64")]
struct Bell(EventFd);

#[cfg(target_arch = "aarch64")]
impl Registers for Bell {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _: u64, _: &[u8]) {
        self.0.write(1).unwrap();
    }
}

#[cfg(target_arch = "aarch64")]
fn slot_interrupt() -> Result<(), Failed> {
    let interrupt = EventFd::new(EFD_NONBLOCK)?;
    let registers = Arc::new(Bell(interrupt.try_clone()?));
    let slots = vec![Slot { registers, kicks: Vec::new(), interrupt }];
    let guest = guest(&[guest::WAIT_FOR_INTERRUPT, RESET].concat(), 1, slots);
    assert_eq!(guest.machine.start()?.wait(), End::Reset);
    Ok(())
}
