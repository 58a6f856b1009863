//! The features and the topology a guest's processors show (Intel SDM vol. 2 `CPUID`, AMD APM vol. 3 appendix E).
//!
//! KVM tells what it supports; this takes away what a container's VM has no use for and puts in which processor is
//! asked: one package, one core per processor, one thread per core, APIC id = index.

use kvm_bindings::kvm_cpuid_entry2;

/// Which processor this is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Topology {
    pub index: u32,
    pub cpus: u32,
    /// Whether KVM's local APIC knows the TSC deadline mode, which its list of features does not tell.
    pub deadline_timer: bool,
}

impl Topology {
    /// How many bits of an APIC id tell the core.
    fn core_bits(self) -> u32 {
        self.cpus.next_power_of_two().trailing_zeros()
    }
}

/// Changes KVM's supported features into those of one processor.
pub(super) fn adapt(entries: &mut [kvm_cpuid_entry2], topology: Topology) {
    for entry in entries {
        match entry.function {
            0x1 => features(entry, topology),
            0x4 => intel_caches(entry, topology),
            // Performance counters: none.
            0xa | 0x8000_0022 => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            0xb | 0x1f => extended_topology(entry, topology),
            0x8000_0001 => {
                const NESTED: u32 = 1 << 2;
                const COUNTERS: u32 = 1 << 23 | 1 << 24 | 1 << 28;
                entry.ecx &= !(NESTED | COUNTERS);
            }
            0x8000_0008 => entry.ecx = topology.core_bits() << 12 | (topology.cpus - 1),
            // Nested virtualization.
            0x8000_000a => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            0x8000_001d => amd_caches(entry, topology),
            0x8000_001e => {
                entry.eax = topology.index;
                // Core id; one thread per core.
                entry.ebx = topology.index & 0xff;
                // Node 0 of one.
                entry.ecx = 0;
            }
            _ => {}
        }
    }
}

fn set(register: &mut u32, bits: u32, on: bool) {
    if on { *register |= bits } else { *register &= !bits }
}

fn features(entry: &mut kvm_cpuid_entry2, topology: Topology) {
    const NESTED: u32 = 1 << 5;
    const DEADLINE_TIMER: u32 = 1 << 24;
    const HYPERVISOR: u32 = 1 << 31;
    const COUNTERS: u32 = 1 << 15;
    const MANY_IDS: u32 = 1 << 28;
    set(&mut entry.ecx, NESTED | COUNTERS, false);
    set(&mut entry.ecx, DEADLINE_TIMER, topology.deadline_timer);
    set(&mut entry.ecx, HYPERVISOR, true);
    set(&mut entry.edx, MANY_IDS, topology.cpus > 1);
    // Initial APIC id, ids in this package, size of CLFLUSH, brand.
    let ids = 1 << topology.core_bits();
    entry.ebx = topology.index << 24 | (ids & 0xff) << 16 | entry.ebx & 0xffff;
}

/// Deterministic caches: one core shares all but the last level, which the whole package shares.
fn intel_caches(entry: &mut kvm_cpuid_entry2, topology: Topology) {
    if entry.eax & 0x1f == 0 {
        return;
    }
    let level = entry.eax >> 5 & 0b111;
    let sharing = if level >= 3 { topology.cpus - 1 } else { 0 };
    let cores = (1_u32 << topology.core_bits()) - 1;
    entry.eax = entry.eax & 0x3fff | sharing.min(0xfff) << 14 | cores.min(0x3f) << 26;
}

fn amd_caches(entry: &mut kvm_cpuid_entry2, topology: Topology) {
    if entry.eax & 0x1f == 0 {
        return;
    }
    let level = entry.eax >> 5 & 0b111;
    let sharing = if level >= 3 { topology.cpus - 1 } else { 0 };
    entry.eax = entry.eax & 0x3fff | sharing.min(0xfff) << 14;
}

/// Levels: threads of a core, then cores of the package; further ones do not exist.
fn extended_topology(entry: &mut kvm_cpuid_entry2, topology: Topology) {
    const THREADS: u32 = 1;
    const CORES: u32 = 2;
    let (bits, count, kind) = match entry.index {
        0 => (0, 1, THREADS),
        1 => (topology.core_bits(), topology.cpus, CORES),
        _ => (0, 0, 0),
    };
    entry.eax = bits;
    entry.ebx = count;
    entry.ecx = entry.index & 0xff | kind << 8;
    entry.edx = topology.index;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adapted(function: u32, index: u32, registers: [u32; 4], topology: Topology) -> [u32; 4] {
        let [eax, ebx, ecx, edx] = registers;
        let mut entry = [kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }];
        adapt(&mut entry, topology);
        [entry[0].eax, entry[0].ebx, entry[0].ecx, entry[0].edx]
    }

    fn third_of(cpus: u32) -> Topology {
        Topology { index: 2, cpus, deadline_timer: true }
    }

    #[test]
    fn a_processor_knows_its_id_and_that_it_is_a_guest() {
        let [_, ebx, ecx, edx] = adapted(1, 0, [0, 0xaabb_0801, 1 << 5 | 1 << 15, 0], third_of(6));
        assert_eq!(ebx, 2 << 24 | 8 << 16 | 0x0801);
        assert_eq!((ecx >> 31, ecx >> 24 & 1), (1, 1));
        assert_eq!(ecx & (1 << 5 | 1 << 15), 0, "neither nested virtualization nor its counters");
        assert_eq!(edx >> 28 & 1, 1);
        let alone = Topology { index: 0, cpus: 1, deadline_timer: false };
        let [_, ebx, ecx, edx] = adapted(1, 0, [0, 0, 1 << 24, 1 << 28], alone);
        assert_eq!((ebx, ecx >> 24 & 1, edx >> 28 & 1), (1 << 16, 0, 0));
    }

    #[test]
    fn the_levels_of_the_topology_agree() {
        for function in [0xb, 0x1f] {
            assert_eq!(adapted(function, 0, [9; 4], third_of(6)), [0, 1, 0x100, 2]);
            assert_eq!(adapted(function, 1, [9; 4], third_of(6)), [3, 6, 0x201, 2]);
            assert_eq!(adapted(function, 2, [9; 4], third_of(6)), [0, 0, 2, 2]);
        }
        assert_eq!(adapted(0x8000_0008, 0, [0x3030, 0, 0, 0], third_of(6))[2], 3 << 12 | 5);
        assert_eq!(adapted(0x8000_001e, 0, [7; 4], third_of(6)), [2, 2, 0, 7]);
    }

    #[test]
    fn only_the_last_cache_is_shared() {
        let sharing =
            |function, level: u32| adapted(function, level, [level << 5 | 1, 0, 0, 0], third_of(4))[0];
        for function in [4, 0x8000_001d] {
            assert_eq!(sharing(function, 1) >> 14 & 0xfff, 0);
            assert_eq!(sharing(function, 3) >> 14 & 0xfff, 3);
        }
        assert_eq!(sharing(4, 1) >> 26, 3);
        assert_eq!(adapted(4, 9, [0; 4], third_of(4)), [0; 4], "the end of the list stays the end");
    }

    #[test]
    fn counters_and_nested_virtualization_are_gone() {
        for function in [0xa, 0x8000_0022, 0x8000_000a] {
            assert_eq!(adapted(function, 0, [u32::MAX; 4], third_of(4)), [0; 4]);
        }
        assert_eq!(adapted(0x8000_0001, 0, [0, 0, 1 << 2 | 1 << 23 | 1, 0], third_of(4))[2], 1);
        assert_eq!(adapted(0x4000_0000, 0, [1, 2, 3, 4], third_of(4)), [1, 2, 3, 4], "KVM's own leaves stay");
    }
}
