//! What the VM costs beyond the guest's memory, against plain QEMU with its own devices, same kernel and initramfs; and how
//! soon it gives back what it borrowed.

use crate::boot::mib;
use crate::figure;
use anyhow::{Context, Result};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tests_harness::{Engine, IMAGE, Stage, Wishes, wait_until};

/// Long enough for either to have booted.
const SETTLE: Duration = Duration::from_secs(20);

/// What a container allocates.
const BORROWED_MIB: u32 = 1024;
/// When the host should have [`PROMISED`] of it again.
const SOON: Duration = Duration::from_secs(10);
const PROMISED: f64 = 0.9;
/// How long is waited for it.
const GIVEN_UP: Duration = Duration::from_secs(60);
const SAMPLE: Duration = Duration::from_millis(100);
const ROUNDS: usize = 3;

/// A container allocates and frees memory: how much of it has left the VM process when, on a machine that has enough.
pub(crate) fn returned() -> Result<()> {
    let stage = crate::stage()?;
    // The computer around the machine on KVM has no more.
    let times = if stage == Stage::Kvm { 2 } else { 4 };
    let wishes = Wishes { memory_mib: Some(times * BORROWED_MIB), ..Wishes::default() };
    let engine = Engine::start_with(stage, wishes)?;
    let machine = engine.processes().find(stage.machine_process().context("there is no machine")?)?;
    let resident = || machine.resident_bytes().map(mib);
    // The buffer is filled, and held for as long as nobody reads.
    let hold = |mib: u32| {
        let script = format!("dd if=/dev/zero bs={mib}M count=1 | sleep 1000");
        engine.engine(["run", "-d", "--name", "hungry", IMAGE, "sh", "-c", &script])?.ok()
    };
    let free = || engine.engine(["rm", "-f", "hungry"])?.ok();
    // What the first container leaves in caches, in the guest and in QEMU, is not what this is about.
    hold(1)?;
    free()?;
    std::thread::sleep(SETTLE);
    for _ in 0..ROUNDS {
        let before = resident()?;
        hold(BORROWED_MIB)?;
        let top = wait_until("the memory is allocated", || {
            Ok(Some(resident()?).filter(|now| now - before >= f64::from(BORROWED_MIB)))
        })?;
        free()?;
        let freed = Instant::now();
        let (mut soon, mut reached) = (None, None);
        while soon.is_none() || (reached.is_none() && freed.elapsed() < GIVEN_UP) {
            std::thread::sleep(SAMPLE);
            let (now, after) = (resident()?, freed.elapsed());
            if after >= SOON {
                soon.get_or_insert(now);
            }
            if (top - now) / (top - before) >= PROMISED {
                reached.get_or_insert(after);
            }
        }
        let soon = soon.unwrap_or(top);
        let share = (top - soon) / (top - before);
        figure("resident before a container allocates", before, "MiB");
        figure("resident at the top", top, "MiB");
        figure("resident 10 s after it is gone", soon, "MiB");
        let kept = if share >= PROMISED { "kept" } else { "MISSED" };
        figure("share given back after 10 s", share, &format!("promised >= {PROMISED}: {kept}"));
        figure("nine tenths given back after", reached.map_or(f64::NAN, |after| after.as_secs_f64()), "s");
    }
    engine.finish()
}

pub(crate) fn overhead(engine: &Engine) -> Result<()> {
    // As fresh as its peer: what has run leaves translated code in QEMU.
    engine.engine(["machine", "restart"])?.ok()?;
    std::thread::sleep(SETTLE);
    let processes = engine.processes();
    let (vmm, qemu) = (processes.find("engine-vmm")?.pid, processes.find("qemu-system-x86_64")?.pid);
    let ours = private(vmm)? + private(qemu)?;
    figure("engine-vmm, private memory", mib(private(vmm)?), "MiB");
    figure("its QEMU, memory beyond the guest's", mib(private(qemu)?), "MiB");
    figure("engined, private memory", mib(private(processes.find("engined")?.pid)?), "MiB");
    let plain = Plain::start(engine)?;
    std::thread::sleep(SETTLE);
    let peer = private(plain.pid())?;
    figure("plain QEMU, memory beyond the guest's", mib(peer), "MiB");
    figure("ours to plain QEMU", mib(ours) / mib(peer), "x");
    Ok(())
}

/// Memory of the process in bytes, proportionally, without shared memory, which is the guest's RAM.
fn private(pid: i32) -> Result<u64> {
    rollup(pid, &["Pss_Anon:", "Pss_File:"])
}

/// All memory of the process in bytes, proportionally.
pub(crate) fn pss(pid: i32) -> Result<u64> {
    rollup(pid, &["Pss:"])
}

fn rollup(pid: i32, fields: &[&str]) -> Result<u64> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read `{path}`"))?;
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.trim().strip_suffix(" kB"));
        line.and_then(|kib| kib.trim().parse::<u64>().ok()).with_context(|| format!("`{path}` has no {name}"))
    };
    fields.iter().map(|name| Ok(field(name)? << 10)).sum()
}

/// QEMU with its own devices and the VM image's guest; ends when it goes.
pub(crate) struct Plain {
    process: Child,
    _disk: TempDir,
}

impl Plain {
    pub(crate) fn start(engine: &Engine) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let disk = folder.path().join("disk.raw");
        std::fs::File::create(&disk)?.set_len(16 << 30)?;
        let image = engine.program("vm-image");
        let manifest: serde_json::Value =
            serde_json::from_slice(&std::fs::read(image.join("manifest.json"))?)?;
        let cmdline = manifest["cmdline"].as_str().unwrap_or_default();
        let process = Command::new("qemu-system-x86_64")
            .args(["-accel", "tcg", "-cpu", "max", "-M", "q35,memory-backend=mem", "-m", "1536", "-smp", "2"])
            .args(["-object", "memory-backend-memfd,id=mem,size=1536M,share=on"])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-serial", "null", "-no-reboot"])
            .arg("-kernel")
            .arg(image.join("kernel"))
            .arg("-initrd")
            .arg(image.join("initramfs"))
            .args(["-append", &format!("console=ttyS0 panic=-1 reboot=t {cmdline}")])
            .arg("-drive")
            .arg(format!("if=none,id=disk,format=raw,file={}", disk.display()))
            .args(["-device", "virtio-blk-pci,drive=disk,serial=engine-data"])
            .args([
                "-netdev",
                "user,id=net",
                "-device",
                "virtio-net-pci,netdev=net",
                "-device",
                "virtio-rng-pci",
            ])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("cannot start plain QEMU")?;
        Ok(Self { process, _disk: folder })
    }

    pub(crate) fn pid(&self) -> i32 {
        self.process.id().cast_signed()
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        // Gone already, if it failed.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
