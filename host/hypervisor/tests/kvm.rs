//! Machines on the real KVM, each with a kernel of a few instructions.
//!
//! Where the probe finds KVM unusable these tests are shown as ignored and say why: `tests/run nested-kvm` runs them in
//! a machine with a KVM that works.
#![expect(clippy::print_stdout, reason = "says why tests are not run")]

mod kernel;

use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::{Arc, Mutex};

use host_hypervisor::arch::x86_64::board::Registers;
use host_hypervisor::kvm::probe::{Usability, probe};
use host_hypervisor::kvm::{Machine, Slot, Spec};
use host_hypervisor::memory;
use host_hypervisor::vcpu::End;
use libtest_mimic::{Arguments, Failed, Trial};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

type Test = fn() -> Result<(), Failed>;

const TESTS: [(&str, Test); 7] = [
    ("processors_pause_and_resume_a_thousand_times", pause_and_resume),
    ("a_machine_stops_at_any_moment", stop_at_any_moment),
    ("the_serial_line_prints_and_the_keyboard_controller_resets", print_and_reset),
    ("acpi_powers_off", power_off),
    ("a_triple_fault_is_a_reset", triple_fault),
    ("registers_of_a_slot_are_read_and_written", slot_registers),
    ("a_notification_reaches_its_queue_without_the_registers", notification),
];

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let unusable = match probe() {
        Usability::Usable => None,
        Usability::Unusable { reason } => Some(reason),
    };
    if let Some(reason) = &unusable {
        println!(
            "KVM is not usable here: {reason}. `tests/run nested-kvm` runs these {} tests.",
            TESTS.len()
        );
    }
    let trials = TESTS
        .into_iter()
        .map(|(name, test)| Trial::test(name, test).with_ignored_flag(unusable.is_some()))
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

struct Guest {
    machine: Machine,
    memory: GuestMemoryMmap,
    output: Output,
}

/// A machine whose first processor runs `code` in 32-bit mode.
fn guest(code: &[u8], cpus: u32, slots: Vec<Slot>) -> Guest {
    let folder = tempfile::tempdir().unwrap();
    let (kernel, initramfs) = (folder.path().join("vmlinux"), folder.path().join("initramfs"));
    let code = [&[0x90; 0x10], code].concat();
    std::fs::write(&kernel, kernel::vmlinux(&code, 4096, true)).unwrap();
    std::fs::write(&initramfs, b"initramfs").unwrap();
    let memory = memory::allocate(32).unwrap();
    let output = Output::default();
    let machine = Machine::build(Spec {
        cpus,
        memory: memory.clone(),
        kernel: &kernel,
        initramfs: &initramfs,
        cmdline: "",
        console: Box::new(output.clone()),
        slots,
    })
    .unwrap();
    Guest { machine, memory, output }
}

fn end_of(code: &[u8]) -> (End, Vec<u8>) {
    let guest = guest(code, 1, Vec::new());
    let end = guest.machine.start().unwrap().wait();
    let output = guest.output.0.lock().unwrap().clone();
    (end, output)
}

/// `inc dword [0x200000]; jmp` to it.
const COUNT: &[u8] = &[0xff, 0x05, 0, 0, 0x20, 0, 0xeb, 0xf8];
const COUNTER: GuestAddress = GuestAddress(0x20_0000);
/// `mov al, 0xfe; out 0x64, al`, and stay.
const RESET: &[u8] = &[0xb0, 0xfe, 0xe6, 0x64, 0xeb, 0xfe];

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

fn print_and_reset() -> Result<(), Failed> {
    // mov edx, 0x3f8; mov al, 'o'; out dx, al; mov al, 'k'; out dx, al
    let print = [0xba, 0xf8, 3, 0, 0, 0xb0, b'o', 0xee, 0xb0, b'k', 0xee];
    assert_eq!(end_of(&[&print, RESET].concat()), (End::Reset, b"ok".to_vec()));
    Ok(())
}

fn power_off() -> Result<(), Failed> {
    // mov edx, 0x604; mov ax, 5 << 10 | 1 << 13; out dx, ax
    assert_eq!(end_of(&[0xba, 4, 6, 0, 0, 0x66, 0xb8, 0, 0x34, 0x66, 0xef, 0xeb, 0xfe]).0, End::PoweredOff);
    Ok(())
}

fn triple_fault() -> Result<(), Failed> {
    // ud2, without an interrupt table.
    assert_eq!(end_of(&[0x0f, 0x0b]).0, End::Reset);
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
    // mov eax, [0xd0000010]; mov [0xd0000020], eax
    let code = [0xa1, 0x10, 0, 0, 0xd0, 0xa3, 0x20, 0, 0, 0xd0];
    let guest = guest(&[&code, RESET].concat(), 1, vec![slot(&registers, Vec::new())]);
    assert_eq!(guest.machine.start()?.wait(), End::Reset);
    assert_eq!(*registers.0.lock().unwrap(), [(0x20, vec![0x17, 0, 0, 0])]);
    Ok(())
}

fn notification() -> Result<(), Failed> {
    let registers = Arc::new(Seven::default());
    let kicks: Vec<_> = (0..2).map(|_| EventFd::new(EFD_NONBLOCK).unwrap()).collect();
    let copies = kicks.iter().map(|kick| kick.try_clone().unwrap()).collect();
    // mov dword [0xd0000050], 1
    let code = [0xc7, 0x05, 0x50, 0, 0, 0xd0, 1, 0, 0, 0];
    let guest = guest(&[&code, RESET].concat(), 1, vec![slot(&registers, copies)]);
    assert_eq!(guest.machine.start()?.wait(), End::Reset);
    assert_eq!(kicks[1].read()?, 1);
    assert!(kicks[0].read().is_err(), "the other queue was not notified");
    assert!(registers.0.lock().unwrap().is_empty());
    Ok(())
}
