//! One processor of KVM.

use std::io;

use kvm_bindings::{KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::kick::{ImmediateExit, ThreadKick};
use super::sys;
use crate::vcpu::{Exit, Kick, Vcpu};

/// A processor, ready to run.
pub(super) struct KvmVcpu {
    fd: VcpuFd,
    flag: ImmediateExit,
}

impl KvmVcpu {
    pub(super) fn new(mut fd: VcpuFd) -> Self {
        let flag = &raw mut fd.get_kvm_run().immediate_exit;
        // SAFETY: the flag lies in the mapping that `fd` owns; `fd` is owned by this value, and kicks are dropped before
        // it (`ThreadKick`). `fd.set_kvm_immediate_exit`, the only other access, is never called.
        let flag = unsafe { ImmediateExit::new(flag) };
        Self { fd, flag }
    }
}

impl Vcpu for KvmVcpu {
    fn prepare(&mut self) -> io::Result<Box<dyn Kick>> {
        Ok(Box::new(ThreadKick::for_this_thread(self.flag)?))
    }

    fn run(&mut self) -> Exit<'_> {
        match self.fd.run() {
            Ok(exit) => translate(exit),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                self.flag.set(0);
                Exit::Kicked
            }
            Err(error) => Exit::Failed(format!("KVM cannot run a processor: {}", super::os_error(error))),
        }
    }

    fn resumed(&mut self) {
        sys::resumed(&self.fd);
    }

    fn describe(&mut self) -> String {
        let place = sys::place(&self.fd);
        let run = self.fd.get_kvm_run();
        if run.exit_reason != kvm_bindings::KVM_EXIT_INTERNAL_ERROR {
            return place;
        }
        // SAFETY: for this exit reason the kernel has filled in `internal` of the union (KVM API §5).
        let suberror = unsafe { run.__bindgen_anon_1.internal.suberror };
        format!("suberror {suberror}, {place}")
    }
}

fn translate(exit: VcpuExit<'_>) -> Exit<'_> {
    match exit {
        VcpuExit::IoIn(port, data) => Exit::PortRead(port, data),
        VcpuExit::IoOut(port, data) => Exit::PortWrite(port, data),
        VcpuExit::MmioRead(address, data) => Exit::MmioRead(address, data),
        VcpuExit::MmioWrite(address, data) => Exit::MmioWrite(address, data),
        VcpuExit::Intr => Exit::Kicked,
        // A triple fault: what a PC answers with a reset, and what kernels do on purpose to reset (`reboot=t`).
        VcpuExit::Shutdown => Exit::Reset,
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _) => Exit::PowerOff,
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _) => Exit::Reset,
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_CRASH, _) => Exit::Failed("the guest reports a crash".into()),
        VcpuExit::InternalError => Exit::Failed("KVM cannot go on with a processor".into()),
        VcpuExit::FailEntry(reason, _) => {
            Exit::Failed(format!("the processor refused to enter the guest (reason {reason:#x})"))
        }
        other => Exit::Failed(format!("KVM stopped a processor in an unknown way: {other:?}")),
    }
}
