//! The device tree: what a kernel is told about its machine (Devicetree Specification 0.4; the nodes of each device are
//! those of Linux `Documentation/devicetree/bindings`).

use std::ops::Range;

use vm_fdt::{Error, FdtWriter};

use super::layout;
use crate::arch::boot::Parameters;
use crate::arch::slots::{SLOT_BYTES, Slot};

/// The interrupt controller, as other nodes name it.
const GIC: u32 = 1;
/// The serial line's clock.
const CLOCK: u32 = 2;
/// Any rate does: nothing here waits for bits.
const CLOCK_HZ: u32 = 24_000_000;
/// Kinds of interrupts (`interrupt-controller/arm-gic.h`).
const SHARED: u32 = 0;
const PRIVATE: u32 = 1;
/// How an interrupt is told (`interrupt-controller/irq.h`).
const EDGE_RISING: u32 = 1;
const LEVEL_HIGH: u32 = 4;
/// The architected timer's interrupts (`timer/arm,arch_timer.yaml`): secure, non-secure, virtual, hypervisor's. KVM has
/// the second and the third there unless it is told otherwise.
const TIMER_INTERRUPTS: [u32; 4] = [13, 14, 11, 10];

/// The tree for a machine with this RAM and the initramfs at this place, in its flattened form.
pub(super) fn build(
    parameters: &Parameters<'_>,
    ram: &[(u64, u64)],
    initramfs: Range<u64>,
) -> Result<Vec<u8>, Error> {
    let mut tree = FdtWriter::new()?;
    let root = tree.begin_node("")?;
    tree.property_string("compatible", "linux,dummy-virt")?;
    tree.property_u32("#address-cells", 2)?;
    tree.property_u32("#size-cells", 2)?;
    tree.property_u32("interrupt-parent", GIC)?;
    chosen(&mut tree, parameters.cmdline, initramfs)?;
    memory(&mut tree, ram)?;
    processors(&mut tree, parameters.cpus)?;
    interrupt_controller(&mut tree, parameters.cpus)?;
    timer(&mut tree)?;
    serial_line(&mut tree)?;
    for slot in parameters.slots {
        virtio(&mut tree, slot)?;
    }
    tree.end_node(root)?;
    tree.finish()
}

fn chosen(tree: &mut FdtWriter, cmdline: &str, initramfs: Range<u64>) -> Result<(), Error> {
    let node = tree.begin_node("chosen")?;
    tree.property_string("bootargs", cmdline)?;
    tree.property_string("stdout-path", &format!("/pl011@{:x}", layout::SERIAL))?;
    tree.property_u64("linux,initrd-start", initramfs.start)?;
    tree.property_u64("linux,initrd-end", initramfs.end)?;
    tree.end_node(node)
}

fn memory(tree: &mut FdtWriter, ram: &[(u64, u64)]) -> Result<(), Error> {
    for (start, size) in ram {
        let node = tree.begin_node(&format!("memory@{start:x}"))?;
        tree.property_string("device_type", "memory")?;
        tree.property_array_u64("reg", &[*start, *size])?;
        tree.end_node(node)?;
    }
    Ok(())
}

fn processors(tree: &mut FdtWriter, cpus: u32) -> Result<(), Error> {
    let node = tree.begin_node("cpus")?;
    tree.property_u32("#address-cells", 2)?;
    tree.property_u32("#size-cells", 0)?;
    for index in 0..cpus {
        let affinity = layout::affinity(index);
        let cpu = tree.begin_node(&format!("cpu@{affinity:x}"))?;
        tree.property_string("device_type", "cpu")?;
        tree.property_string("compatible", "arm,armv8")?;
        tree.property_string("enable-method", "psci")?;
        tree.property_u64("reg", affinity)?;
        tree.end_node(cpu)?;
    }
    tree.end_node(node)?;
    // From 0.2 on the functions' numbers are the standard's (Arm DEN 0022).
    let psci = tree.begin_node("psci")?;
    tree.property_string_list("compatible", vec!["arm,psci-1.0".into(), "arm,psci-0.2".into()])?;
    tree.property_string("method", "hvc")?;
    tree.end_node(psci)
}

fn interrupt_controller(tree: &mut FdtWriter, cpus: u32) -> Result<(), Error> {
    let redistributors = layout::REDISTRIBUTOR_BYTES * u64::from(cpus);
    let node = tree.begin_node(&format!("interrupt-controller@{:x}", layout::DISTRIBUTOR))?;
    tree.property_string("compatible", "arm,gic-v3")?;
    tree.property_null("interrupt-controller")?;
    tree.property_u32("#interrupt-cells", 3)?;
    tree.property_phandle(GIC)?;
    let registers = [layout::DISTRIBUTOR, layout::DISTRIBUTOR_BYTES, layout::REDISTRIBUTORS, redistributors];
    tree.property_array_u64("reg", &registers)?;
    tree.end_node(node)
}

fn timer(tree: &mut FdtWriter) -> Result<(), Error> {
    let node = tree.begin_node("timer")?;
    tree.property_string("compatible", "arm,armv8-timer")?;
    tree.property_null("always-on")?;
    let interrupts: Vec<_> =
        TIMER_INTERRUPTS.into_iter().flat_map(|number| [PRIVATE, number, LEVEL_HIGH]).collect();
    tree.property_array_u32("interrupts", &interrupts)?;
    tree.end_node(node)
}

fn serial_line(tree: &mut FdtWriter) -> Result<(), Error> {
    let clock = tree.begin_node("apb-pclk")?;
    tree.property_string("compatible", "fixed-clock")?;
    tree.property_u32("#clock-cells", 0)?;
    tree.property_u32("clock-frequency", CLOCK_HZ)?;
    tree.property_phandle(CLOCK)?;
    tree.end_node(clock)?;
    let node = tree.begin_node(&format!("pl011@{:x}", layout::SERIAL))?;
    tree.property_string_list("compatible", vec!["arm,pl011".into(), "arm,primecell".into()])?;
    tree.property_array_u64("reg", &[layout::SERIAL, layout::SERIAL_BYTES])?;
    tree.property_array_u32("interrupts", &[SHARED, layout::SERIAL_GSI, EDGE_RISING])?;
    tree.property_array_u32("clocks", &[CLOCK, CLOCK])?;
    tree.property_string_list("clock-names", vec!["uartclk".into(), "apb_pclk".into()])?;
    tree.end_node(node)
}

fn virtio(tree: &mut FdtWriter, slot: &Slot) -> Result<(), Error> {
    let node = tree.begin_node(&format!("virtio_mmio@{:x}", slot.address))?;
    tree.property_string("compatible", "virtio,mmio")?;
    tree.property_array_u64("reg", &[slot.address, SLOT_BYTES])?;
    tree.property_array_u32("interrupts", &[SHARED, slot.gsi, EDGE_RISING])?;
    tree.property_null("dma-coherent")?;
    tree.end_node(node)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    const MIB: u64 = 1 << 20;

    /// The properties of a flattened tree by the paths of their nodes, read as the specification has it (chapter 5).
    fn read(blob: &[u8]) -> BTreeMap<String, Vec<u8>> {
        let word = |at: usize| u32::from_be_bytes(blob[at..at + 4].try_into().unwrap()) as usize;
        let text = |at: usize| {
            let end = blob[at..].iter().position(|&byte| byte == 0).unwrap();
            std::str::from_utf8(&blob[at..at + end]).unwrap()
        };
        assert_eq!((word(0), word(4)), (0xd00d_feed, blob.len()));
        let (mut at, strings) = (word(8), word(12));
        let (mut path, mut properties) = (Vec::new(), BTreeMap::new());
        loop {
            let token = word(at);
            at += 4;
            match token {
                1 => {
                    let name = text(at);
                    at += (name.len() + 1).next_multiple_of(4);
                    path.push(name);
                }
                2 => assert!(path.pop().is_some()),
                3 => {
                    let (length, name) = (word(at), text(strings + word(at + 4)));
                    let value = blob[at + 8..at + 8 + length].to_vec();
                    properties.insert(format!("{}/{name}", path.join("/")), value);
                    at += 8 + length.next_multiple_of(4);
                }
                9 => break,
                other => panic!("token {other} at {at:#x}"),
            }
        }
        assert!(path.is_empty());
        properties
    }

    fn words(numbers: &[u64]) -> Vec<u8> {
        numbers.iter().flat_map(|number| number.to_be_bytes()).collect()
    }

    fn cells(numbers: &[u32]) -> Vec<u8> {
        numbers.iter().flat_map(|number| number.to_be_bytes()).collect()
    }

    #[test]
    fn a_kernel_is_told_everything() {
        let slots = [layout::mmio_slot(0).unwrap(), layout::mmio_slot(5).unwrap()];
        let parameters = Parameters { cmdline: "quiet panic=-1", cpus: 18, slots: &slots };
        let initramfs = 0x8fff_0000..0x8fff_f123;
        let ram = layout::ram_ranges(256 * MIB);
        let tree = read(&build(&parameters, &ram, initramfs).unwrap());
        let is = |path: &str, value: &[u8]| assert_eq!(tree[path], value, "{path}");
        is("/chosen/bootargs", b"quiet panic=-1\0");
        is("/chosen/stdout-path", b"/pl011@10000000\0");
        is("/chosen/linux,initrd-start", &words(&[0x8fff_0000]));
        is("/chosen/linux,initrd-end", &words(&[0x8fff_f123]));
        is("/memory@80000000/reg", &words(&[0x8000_0000, 256 * MIB]));
        is("/cpus/cpu@0/enable-method", b"psci\0");
        is("/cpus/cpu@101/reg", &words(&[0x101]));
        assert_eq!(
            tree.keys().filter(|path| path.starts_with("/cpus/cpu@") && path.ends_with("/reg")).count(),
            18
        );
        is("/psci/compatible", b"arm,psci-1.0\0arm,psci-0.2\0");
        is("/psci/method", b"hvc\0");
        is("/interrupt-controller@8000000/compatible", b"arm,gic-v3\0");
        is("/interrupt-controller@8000000/reg", &words(&[0x800_0000, 0x1_0000, 0x900_0000, 18 * 0x2_0000]));
        is("/interrupt-parent", &tree["/interrupt-controller@8000000/phandle"]);
        is("/timer/interrupts", &cells(&[1, 13, 4, 1, 14, 4, 1, 11, 4, 1, 10, 4]));
        is("/pl011@10000000/interrupts", &cells(&[0, 0, 1]));
        is("/pl011@10000000/clocks", &tree["/apb-pclk/phandle"].repeat(2));
        is("/virtio_mmio@11000000/interrupts", &cells(&[0, 1, 1]));
        is("/virtio_mmio@11005000/reg", &words(&[0x1100_5000, 0x1000]));
        is("/virtio_mmio@11005000/interrupts", &cells(&[0, 6, 1]));
    }

    #[test]
    fn the_largest_tree_fits_its_place() {
        let slots: Vec<_> = (0..layout::MMIO_SLOTS).filter_map(layout::mmio_slot).collect();
        let cmdline = "x".repeat(2047);
        let parameters = Parameters { cmdline: &cmdline, cpus: layout::CPUS_MAX, slots: &slots };
        let blob = build(&parameters, &layout::ram_ranges(64 << 30), 0..0).unwrap();
        assert!(blob.len() <= layout::DEVICE_TREE_BYTES_MAX / 8, "{} bytes", blob.len());
    }
}
