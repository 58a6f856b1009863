//! What depends on the guest's processor architecture but not on the hypervisor: where things lie in guest memory, how
//! a kernel is loaded and told about its machine, and the few devices of the board.

pub mod x86_64;
