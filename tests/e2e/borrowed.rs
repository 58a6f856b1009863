//! What the machine borrows from the host, memory and disk, it gives back when the guest has no use for it.

use crate::bad_input::on_a_small_disk;
use anyhow::{Context, Result, bail, ensure};
use rustix::fs::FallocateFlags;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tests_harness::{Engine, IMAGE, Layer, Processes, Stage, TestImage, wait_until};

crate::scenarios![
    freed_memory_is_the_hosts_again,
    a_removed_image_is_no_longer_on_the_hosts_disk,
    an_idle_machine_gives_its_caches_back,
    a_disk_file_without_its_holes_gets_them_back,
    what_is_written_waits_for_space_on_the_hosts_disk,
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

/// As after a copy by a program that knows of no holes, or a machine that was killed just after it deleted something.
fn a_disk_file_without_its_holes_gets_them_back(engine: &Engine) -> Result<()> {
    if engine.stage == Stage::Native {
        return Ok(());
    }
    const FILLED: u64 = 512 * MIB;
    let disk = PathBuf::from(engine.engine(["machine", "info", "--format", "{{.disk}}"])?.ok()?);
    let allocated = || Ok(disk.metadata()?.blocks() * 512);
    engine.engine(["machine", "stop"])?.ok()?;
    let before = allocated()?;
    let file = File::options().write(true).open(&disk)?;
    rustix::fs::fallocate(&file, FallocateFlags::empty(), file.metadata()?.len() - FILLED, FILLED)?;
    let peak = allocated()?;
    ensure!(peak > before + FILLED * 9 / 10, "{} MiB became {} MiB", before / MIB, peak / MIB);
    engine.engine(["machine", "start"])?.ok()?;
    comes_back(95, before, peak, allocated)
}

/// A machine whose disk is on a file system that somebody else has filled, and then makes room on.
fn what_is_written_waits_for_space_on_the_hosts_disk(engine: &Engine) -> Result<()> {
    if engine.stage == Stage::Native {
        return Ok(());
    }
    let image = engine.path("full.tar");
    std::fs::write(&image, TestImage::busybox()?.archive(IMAGE)?)?;
    let script = format!(
        "export ENGINE_HOME=$home
         $engine load -q -i {image} > /dev/null || exit 91
         fallocate -l $(($(df --output=avail -k $home | tail -n 1) - 20480))k $home/ballast || exit 93
         write='yes 0123456789 | head -c 60000000 | tee /data/bulk | md5sum > /data/sum; sync'
         $engine run -d --name writer -v data:/data {IMAGE} sh -c \"$write\" > /dev/null || exit 92
         for i in $(seq 240); do
             $engine machine status 2>&1 | grep -q 'no space left' && break
             sleep 0.5
         done
         $engine machine info | grep ^Trouble:
         $engine ps -a 2>&1 > /dev/null | sed 's/^/beside: /'
         $engine ps --format '{{{{.Names}}}} {{{{.State}}}}' 2> /dev/null
         rm $home/ballast
         echo code $($engine wait writer 2> /dev/null)
         $engine machine status 2>&1
         $engine machine stop
         check='md5sum < /data/bulk | cmp - /data/sum && echo intact'
         $engine run --rm -v data:/data {IMAGE} sh -c \"$check\"
         $engine machine shutdown",
        image = image.display(),
    );
    let home = engine.path("full");
    let Some(finished) = on_a_small_disk(engine, &home, "400m", &script)? else { return Ok(()) };
    let said: Vec<&str> = finished.stdout.lines().collect();
    let [trouble, beside, rest @ ..] = &said[..] else { bail!("{finished:?}") };
    let sentence = "there is no space left on this computer for the machine's disk";
    ensure!(trouble.contains(sentence) && beside.starts_with(&format!("beside: {sentence}")), "{finished:?}");
    ensure!(rest == ["writer running", "code 0", "running", "intact"], "{finished:?}");
    Processes::of(&home).expect_none()
}
