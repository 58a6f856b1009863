//! An Arm machine of nothing but: RAM, a GICv3, the architected timer, one PL011, a device tree, and virtio devices on
//! MMIO. Processors are turned on and the machine is turned off by PSCI, which the hypervisor answers.

pub mod board;
pub mod boot;
pub mod device_tree;
pub mod layout;
