//! What the machine borrows from the host, memory and disk, it gives back when the guest has no use for it.

use anyhow::{Context, Result, ensure};
use std::time::{Duration, Instant};
use tests_harness::{Engine, IMAGE, Layer, Stage, TestImage, wait_until};

crate::scenarios![
    freed_memory_is_the_hosts_again,
    a_removed_image_is_no_longer_on_the_hosts_disk,
    an_idle_machine_gives_its_caches_back,
];

/// A word for the machine's kernel: it is idle after so many seconds.
pub(crate) const SOON_IDLE: &str = "engine.idle=3";

const MIB: u64 = 1 << 20;

fn figure(engine: &Engine, name: &str) -> Result<u64> {
    let figure = engine.engine(["machine", "info", "--format", &format!("{{{{.{name}}}}}")])?.ok()?;
    figure.parse().with_context(|| format!("{name}: `{figure}`"))
}

/// Waits until so many percent of what was borrowed between `before` and `peak` are back.
fn comes_back(percent: u64, before: u64, peak: u64, now: impl Fn() -> Result<u64>) -> Result<()> {
    let begun = Instant::now();
    let mut last = peak;
    wait_until(&format!("{percent} percent of it are the host's again"), || {
        last = now()?;
        Ok((last <= before + peak.saturating_sub(before) * (100 - percent) / 100).then_some(()))
    })
    .with_context(|| {
        format!("{} MiB before, {} MiB at the peak, {} MiB now", before / MIB, peak / MIB, last / MIB)
    })?;
    eprintln!(
        "{} MiB of {} MiB came back in {:?}",
        (peak - last) / MIB,
        (peak - before) / MIB,
        begun.elapsed()
    );
    Ok(())
}

fn freed_memory_is_the_hosts_again(engine: &Engine) -> Result<()> {
    let Some(machine) = engine.stage.machine_process() else { return Ok(()) };
    let held = || figure(engine, "memory_held_bytes");
    let process = engine.processes().find(machine)?;
    let resident = || process.resident_bytes();
    // The buffer is filled, and held for as long as nobody reads.
    let hold = |size: &str| {
        let script = format!("dd if=/dev/zero bs={size} count=1 | sleep 1000");
        engine.engine(["run", "-d", "--name", "hungry", IMAGE, "sh", "-c", &script])?.ok()
    };
    // What any container leaves in the guest's caches is not what this is about.
    hold("1M")?;
    engine.engine(["rm", "-f", "hungry"])?.ok()?;
    let (before, resident_before) = (held()?, resident()?);
    hold("192M")?;
    let peak =
        wait_until("the memory is held", || Ok(Some(held()?).filter(|held| *held >= before + 160 * MIB)))?;
    let resident_peak = resident()?;
    engine.engine(["rm", "-f", "hungry"])?.ok()?;
    comes_back(90, before, peak, held)?;
    // A software processor keeps translated code beside the guest's memory.
    if engine.stage == Stage::Kvm {
        ensure!(
            resident_peak > resident_before,
            "{resident_peak} bytes are resident, {resident_before} before"
        );
        comes_back(90, resident_before, resident_peak, resident)?;
        let given_back = figure(engine, "memory_given_back_bytes")?;
        ensure!(given_back >= 160 * MIB, "only {given_back} bytes were given back");
    }
    Ok(())
}

fn a_removed_image_is_no_longer_on_the_hosts_disk(engine: &Engine) -> Result<()> {
    if engine.stage == Stage::Native {
        return Ok(());
    }
    let allocated = || figure(engine, "disk_allocated_bytes");
    let before = allocated()?;
    engine.load(&TestImage::new(vec![Layer::noise("noise", 48 << 20, 77)?]), "bulky:1")?;
    let peak = wait_until("the image is on the disk", || {
        Ok(Some(allocated()?).filter(|allocated| *allocated >= before + 40 * MIB))
    })?;
    engine.engine(["rmi", "bulky:1"])?.ok()?;
    comes_back(95, before, peak, allocated)
}

fn an_idle_machine_gives_its_caches_back(engine: &Engine) -> Result<()> {
    if engine.stage == Stage::Native {
        return Ok(());
    }
    // A machine that is asked all the time is not idle.
    let slowly = |name: &'static str| {
        move || {
            std::thread::sleep(Duration::from_secs(1));
            figure(engine, name)
        }
    };
    let (held, cached) = (slowly("memory_held_bytes"), slowly("guest.memory_cached_bytes"));
    let write = |options: &[&str]| {
        let dd = ["dd", "if=/dev/zero", "of=/kept/file", "bs=1M", "count=48", "conv=fsync"];
        engine.engine([options, &dd].concat())?.ok()
    };
    engine.engine(["run", "-d", "--name", "living", "-v", "/kept", IMAGE, "sleep", "1000"])?.ok()?;
    let (held_before, cached_before) = (held()?, cached()?);
    let cached_peak = wait_until("written files are in the caches", || {
        // Of a container that lives on, and of one that is gone while its volume is not.
        write(&["exec", "living"])?;
        write(&["run", "--rm", "-v", "cached:/kept", IMAGE])?;
        // On a computer that is busy with other things, the machine may have been idle in between.
        Ok(Some(figure(engine, "guest.memory_cached_bytes")?).filter(|now| *now >= cached_before + 80 * MIB))
    })?;
    comes_back(90, cached_before, cached_peak, cached)?;
    comes_back(90, held_before, held_before + 96 * MIB, held)?;
    engine.engine(["rm", "-fv", "living"])?.ok()?;
    engine.engine(["volume", "rm", "cached"])?.ok().map(drop)
}
