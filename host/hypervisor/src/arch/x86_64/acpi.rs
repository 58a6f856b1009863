//! The ACPI tables that tell a kernel about its processors, its interrupts and the virtio-mmio slots (ACPI 6.5).
//!
//! ```text
//! RSDP ─▶ XSDT ─▶ FADT ─▶ DSDT   serial line, virtio-mmio slots (`LNRO0005`), how to power off
//!           │       └───▶ FACS   empty, but a kernel looks for one
//!           └───▶ MADT           processors, I/O APIC
//! ```
//!
//! The machine has ACPI's fixed registers (PM1a) rather than being "hardware-reduced": a reduced machine makes Linux
//! do without the interval timer, and its time then depends on what it knows of the host's processor alone.

use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, Path, ResourceTemplate, Scope,
};
use acpi_tables::fadt::FADTBuilder;
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};
use vm_memory::GuestAddress;

use super::layout;
use crate::arch::slots::{SLOT_BYTES, Slot};

const OEM: [u8; 6] = *b"ENGINE";
const OEM_TABLE: [u8; 8] = *b"ENGINEVM";
const OEM_REVISION: u32 = 1;
/// The value for "power off" in the PM1a control register; `_S5` tells it to the kernel.
pub const SLEEP_TYPE_OFF: u16 = 5;
/// Tables begin at multiples of this; FACS demands it.
const ALIGNMENT: usize = 64;

/// All tables, as one piece of memory for [`layout::ACPI_START`], which is also the root pointer's address.
///
/// At most 255 processors, whose APIC ids are their indices.
pub fn tables(cpus: u8, slots: &[Slot]) -> Vec<u8> {
    let mut memory = Memory { bytes: vec![0; Rsdp::len()] };
    let facs = memory.place(&facs());
    let dsdt = memory.place(dsdt(slots).as_slice());
    let fadt = memory.place_table(&fadt(facs, dsdt));
    let madt = memory.place(madt(cpus).as_slice());
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = memory.place_table(&xsdt);
    let mut root = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut root);
    memory.bytes[..root.len()].copy_from_slice(&root);
    memory.bytes
}

/// Where the root pointer is once [`tables`] are in memory.
pub const ROOT: GuestAddress = GuestAddress(layout::ACPI_START);

/// The tables on their way to guest memory.
struct Memory {
    bytes: Vec<u8>,
}

impl Memory {
    /// Adds a table; returns the guest physical address it will have.
    fn place(&mut self, table: &[u8]) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGNMENT), 0);
        let address = layout::ACPI_START + self.bytes.len() as u64;
        self.bytes.extend(table);
        address
    }

    fn place_table(&mut self, table: &dyn Aml) -> u64 {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        self.place(&bytes)
    }
}

/// Firmware ACPI control structure (§5.2.10): 64 bytes, of which signature, length and version say anything.
fn facs() -> [u8; 64] {
    let mut facs = [0; 64];
    facs[..4].copy_from_slice(b"FACS");
    facs[4..8].copy_from_slice(&64_u32.to_le_bytes());
    facs[32] = 2;
    facs
}

/// Fixed ACPI description table (§5.2.9).
fn fadt(facs: u64, dsdt: u64) -> acpi_tables::fadt::FADT {
    /// No VGA, no keyboard controller to look for (bit 1 clear), no real-time clock to set.
    const BOOT_NO_VGA: u16 = 1 << 2;
    const BOOT_NO_CMOS_CLOCK: u16 = 1 << 5;
    const WBINVD: u32 = 1;
    const C1_EVERYWHERE: u32 = 1 << 2;
    const NO_POWER_BUTTON: u32 = 1 << 4;
    const NO_SLEEP_BUTTON: u32 = 1 << 5;
    const NO_CLOCK_WAKE: u32 = 1 << 6;
    const RESET_REGISTER: u32 = 1 << 10;
    let port = |number: u16, bits, access| GAS::new(AddressSpace::SystemIo, bits, 0, access, number.into());
    let mut table = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION);
    table.firmware_ctrl = (facs as u32).into();
    table.x_firmware_ctrl = facs.into();
    table.dsdt = (dsdt as u32).into();
    table.x_dsdt = dsdt.into();
    table.sci_int = (layout::ACPI_GSI as u16).into();
    table.pm1a_evt_blk = u32::from(layout::PM_EVENT_PORT).into();
    table.pm1_evt_len = 4;
    table.pm1a_cnt_blk = u32::from(layout::PM_CONTROL_PORT).into();
    table.pm1_cnt_len = 2;
    table.x_pm1a_evt_blk = port(layout::PM_EVENT_PORT, 32, AccessSize::WordAccess);
    table.x_pm1a_cnt_blk = port(layout::PM_CONTROL_PORT, 16, AccessSize::WordAccess);
    table.reset_reg = port(layout::RESET_PORT, 8, AccessSize::ByteAccess);
    table.reset_value = layout::RESET_COMMAND;
    table.iapc_boot_arch = (BOOT_NO_VGA | BOOT_NO_CMOS_CLOCK).into();
    // C2 and C3 do not exist (§5.2.9: latencies above 100 and 1000).
    table.p_lvl2_lat = 101.into();
    table.p_lvl3_lat = 1001.into();
    let flags = WBINVD | C1_EVERYWHERE | NO_POWER_BUTTON | NO_SLEEP_BUTTON | NO_CLOCK_WAKE | RESET_REGISTER;
    table.flags = flags.into();
    table.finalize()
}

/// Multiple APIC description table (§5.2.12): processors, the I/O APIC, and how ACPI's interrupt is triggered.
fn madt(cpus: u8) -> Sdt {
    /// There are 8259s besides: the interval timer is found through them.
    const OLD_CONTROLLERS: u32 = 1;
    const ENABLED: u32 = 1;
    let mut table = Sdt::new(*b"APIC", 36, 5, OEM, OEM_TABLE, OEM_REVISION);
    let mut add = |parts: &[&[u8]]| table.append_slice(&parts.concat());
    add(&[&layout::LOCAL_APIC.to_le_bytes(), &OLD_CONTROLLERS.to_le_bytes()]);
    for id in 0..cpus {
        // Processor local APIC (§5.2.12.2): type, length, processor, APIC id, flags.
        add(&[&[0, 8, id, id], &ENABLED.to_le_bytes()]);
    }
    // I/O APIC (§5.2.12.3): type, length, id, reserved, address, first interrupt.
    add(&[&[1, 12, 0, 0], &layout::IO_APIC.to_le_bytes(), &0_u32.to_le_bytes()]);
    // Interrupt source override (§5.2.12.5): type, length, bus, source, interrupt, level-triggered and active high.
    let source = layout::ACPI_GSI as u8;
    add(&[&[2, 10, 0, source], &layout::ACPI_GSI.to_le_bytes(), &0b1101_u16.to_le_bytes()]);
    table.update_checksum();
    table
}

/// Differentiated system description table: devices, as AML.
fn dsdt(slots: &[Slot]) -> Sdt {
    let mut table = Sdt::new(*b"DSDT", 36, 6, OEM, OEM_TABLE, OEM_REVISION);
    Name::new(
        Path::new("_S5_"),
        &Package::new(vec![&(SLEEP_TYPE_OFF as u8), &aml::ZERO, &aml::ZERO, &aml::ZERO]),
    )
    .to_aml_bytes(&mut table);
    let (serial_id, serial_uid) = (EISAName::new("PNP0501"), aml::ZERO);
    Scope::new(
        Path::new("_SB_"),
        vec![&Device::new(
            Path::new("COM1"),
            vec![
                &Name::new(Path::new("_HID"), &serial_id),
                &Name::new(Path::new("_UID"), &serial_uid),
                &Name::new(
                    Path::new("_CRS"),
                    &ResourceTemplate::new(vec![
                        &Interrupt::new(true, true, false, false, layout::SERIAL_GSI),
                        &IO::new(layout::SERIAL_PORT, layout::SERIAL_PORT, 1, 8),
                    ]),
                ),
            ],
        )],
    )
    .to_aml_bytes(&mut table);
    for (index, slot) in slots.iter().enumerate() {
        virtio(index, slot, &mut table);
    }
    table.update_checksum();
    table
}

/// A virtio-mmio slot. Linux's driver knows it by `LNRO0005`; `_CCA` says that its memory accesses are coherent.
fn virtio(index: usize, slot: &Slot, table: &mut Sdt) {
    let name = format!("VR{index:02X}");
    Scope::new(
        Path::new("_SB_"),
        vec![&Device::new(
            Path::new(&name),
            vec![
                &Name::new(Path::new("_HID"), &"LNRO0005"),
                &Name::new(Path::new("_UID"), &(index as u32)),
                &Name::new(Path::new("_CCA"), &aml::ONE),
                &Name::new(
                    Path::new("_CRS"),
                    &ResourceTemplate::new(vec![
                        &Memory32Fixed::new(true, slot.address as u32, SLOT_BYTES as u32),
                        &Interrupt::new(true, true, false, false, slot.gsi),
                    ]),
                ),
            ],
        )],
    )
    .to_aml_bytes(table);
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// The tables as a kernel finds them: from the root pointer on, each checked for its length and its sum.
    struct Parsed {
        memory: Vec<u8>,
        tables: BTreeMap<[u8; 4], (usize, usize)>,
    }

    impl Parsed {
        fn new(memory: Vec<u8>) -> Self {
            let mut parsed = Self { memory, tables: BTreeMap::new() };
            assert_eq!(&parsed.memory[..8], b"RSD PTR ");
            assert_eq!(sum(&parsed.memory[..20]), 0);
            assert_eq!(sum(&parsed.memory[..36]), 0);
            let xsdt = parsed.table(parsed.number(24, 8));
            for entry in (36..xsdt.1).step_by(8) {
                parsed.table(parsed.number(xsdt.0 + entry, 8));
            }
            let fadt = parsed.tables[b"FACP"].0;
            parsed.table(parsed.number(fadt + 140, 8));
            assert_eq!(parsed.number(fadt + 40, 4), parsed.number(fadt + 140, 8));
            parsed
        }

        fn number(&self, at: usize, bytes: usize) -> u64 {
            self.memory[at..at + bytes].iter().rev().fold(0, |sum, &byte| sum << 8 | u64::from(byte))
        }

        fn table(&mut self, address: u64) -> (usize, usize) {
            let at = (address - layout::ACPI_START) as usize;
            let length = self.number(at + 4, 4) as usize;
            let bytes = &self.memory[at..at + length];
            assert_eq!(sum(bytes), 0, "{:?}", String::from_utf8_lossy(&bytes[..4]));
            self.tables.insert(bytes[..4].try_into().unwrap(), (at, length));
            (at, length)
        }

        fn body(&self, name: &[u8; 4]) -> &[u8] {
            let (at, length) = self.tables[name];
            &self.memory[at..at + length]
        }
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn slots(count: usize) -> Vec<Slot> {
        (0..count).map(|index| layout::mmio_slot(index).unwrap()).collect()
    }

    #[test]
    fn a_kernel_finds_every_table() {
        let parsed = Parsed::new(tables(4, &slots(5)));
        let names: Vec<_> = parsed.tables.keys().map(|name| String::from_utf8_lossy(name)).collect();
        assert_eq!(names, ["APIC", "DSDT", "FACP", "XSDT"]);
        let fadt = parsed.tables[b"FACP"].0;
        let facs = (parsed.number(fadt + 132, 8) - layout::ACPI_START) as usize;
        assert_eq!(&parsed.memory[facs..facs + 4], b"FACS");
        assert!(facs.is_multiple_of(64));
        assert_eq!(parsed.number(fadt + 64, 4), u64::from(layout::PM_CONTROL_PORT));
        assert_eq!(parsed.number(fadt + 112, 4) >> 20 & 1, 0, "not hardware-reduced");
        // The reset register: system I/O, 8 bits wide.
        assert_eq!(parsed.memory[fadt + 116..fadt + 118], [1, 8]);
        assert_eq!(parsed.number(fadt + 120, 8), u64::from(layout::RESET_PORT));
        assert_eq!(parsed.memory[fadt + 128], layout::RESET_COMMAND);
    }

    #[test]
    fn every_processor_is_listed_once() {
        for cpus in [1, 2, 64, 255] {
            let parsed = Parsed::new(tables(cpus, &[]));
            let madt = parsed.body(b"APIC");
            let (mut at, mut ids, mut others) = (44, Vec::new(), Vec::new());
            while at < madt.len() {
                match madt[at] {
                    0 => ids.push((madt[at + 2], madt[at + 3], madt[at + 4])),
                    kind => others.push(kind),
                }
                at += usize::from(madt[at + 1]);
            }
            assert_eq!(ids, (0..cpus).map(|id| (id, id, 1)).collect::<Vec<_>>());
            assert_eq!(others, [1, 2]);
        }
    }

    #[test]
    fn every_slot_has_its_registers_and_its_interrupt() {
        let slots = slots(layout::MMIO_GSIS.len());
        let parsed = Parsed::new(tables(1, &slots));
        let dsdt = parsed.body(b"DSDT");
        let count = |part: &[u8]| dsdt.windows(part.len()).filter(|window| *window == part).count();
        assert_eq!(count(b"LNRO0005\0"), slots.len());
        for slot in slots {
            // Memory32Fixed, read-write (§6.4.3.4), and an extended interrupt: consumer, edge, active high (§6.4.3.6).
            let memory =
                [&[0x86, 9, 0, 1][..], &(slot.address as u32).to_le_bytes(), &[0, 0x10, 0, 0]].concat();
            let interrupt = [&[0x89, 6, 0, 0b0011, 1][..], &slot.gsi.to_le_bytes()].concat();
            assert_eq!(count(&[memory, interrupt].concat()), 1, "{slot:?}");
        }
        // Name (_S5_, Package (4) { 5, 0, 0, 0 })
        assert_eq!(count(&[b"\x08_S5_\x12".as_slice(), &[7, 4, 0x0a, 5, 0, 0, 0]].concat()), 1);
    }

    #[test]
    fn the_largest_tables_fit_their_place() {
        let slots = slots(layout::MMIO_GSIS.len());
        assert!(tables(255, &slots).len() as u64 <= layout::HIGH_MEMORY_START - layout::ACPI_START);
    }
}
