//! A PC without its history: RAM, interrupt controllers, one serial port, ACPI tables, and virtio devices on MMIO.

pub mod acpi;
pub mod board;
pub mod boot;
pub mod layout;
