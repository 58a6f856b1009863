//! Linux's KVM. Every KVM ioctl of the product is in this folder.

pub mod probe;
