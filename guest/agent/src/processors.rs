//! The processors that the guest runs on.
//!
//! `maxcpus=1` makes the kernel boot on one; the host asks for that where it is safer (its QEMU back end says why). The rest
//! is turned on here, and later as many as the host wants, of those that the machine has.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

const FOLDER: &str = "/sys/devices/system/cpu";

/// Turns every processor on (Documentation/core-api/cpu_hotplug.rst). Returns how many were off.
pub fn turn_on() -> Result<usize> {
    turn_on_in(Path::new(FOLDER))
}

fn turn_on_in(folder: &Path) -> Result<usize> {
    let mut count = 0;
    for processor in processors(folder)? {
        count += usize::from(processor.switch(true)?);
    }
    Ok(count)
}

/// How many processors there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Count {
    /// On which the kernel runs.
    pub online: u32,
    /// Which the machine has.
    pub present: u32,
}

/// Turns the first `count` processors on and the others off, as far as there are so many and they can be turned off:
/// the first cannot. Whoever runs on one that is turned off runs on another one then.
pub fn use_first(count: u32) -> Result<Count> {
    use_first_in(Path::new(FOLDER), count)
}

fn use_first_in(folder: &Path, count: u32) -> Result<Count> {
    let wanted = usize::try_from(count)?;
    let processors = processors(folder)?;
    // Those that come before those that go: what runs has somewhere to go to.
    for processor in processors.iter().take(wanted) {
        processor.switch(true)?;
    }
    for processor in processors.iter().skip(wanted) {
        processor.switch(false)?;
    }
    let online = processors.iter().filter(|processor| processor.state() != Some(false)).count();
    Ok(Count { online: u32::try_from(online)?, present: u32::try_from(processors.len())? })
}

/// One processor's entry below [`FOLDER`].
struct Processor {
    number: u32,
    /// Only processors that can be turned off have the file.
    switch: PathBuf,
}

impl Processor {
    /// Whether it is on; `None` when it always is.
    fn state(&self) -> Option<bool> {
        std::fs::read_to_string(&self.switch).ok().map(|state| state.trim() == "1")
    }

    /// Turns it on or off; whether that was a change.
    fn switch(&self, on: bool) -> Result<bool> {
        if self.state().is_none_or(|state| state == on) {
            return Ok(false);
        }
        let digit = if on { "1" } else { "0" };
        std::fs::write(&self.switch, digit)
            .with_context(|| format!("cannot write `{digit}` to `{}`", self.switch.display()))?;
        Ok(true)
    }
}

/// All of them, by number.
fn processors(folder: &Path) -> Result<Vec<Processor>> {
    let mut processors = Vec::new();
    for entry in std::fs::read_dir(folder).with_context(|| format!("cannot read `{}`", folder.display()))? {
        let entry = entry?;
        let name = entry.file_name();
        // Beside `cpu0`, `cpu1`, … there are `cpufreq` and others.
        let number = name.to_str().and_then(|name| name.strip_prefix("cpu")).map(str::parse);
        if let Some(Ok(number)) = number {
            processors.push(Processor { number, switch: entry.path().join("online") });
        }
    }
    processors.sort_by_key(|processor| processor.number);
    Ok(processors)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Entries as the kernel has them: the first processor cannot be turned off.
    fn folder(states: &[&str]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for name in ["cpu0", "cpufreq", "cpuidle"] {
            std::fs::create_dir(folder.path().join(name)).unwrap();
        }
        for (index, state) in states.iter().enumerate() {
            let path = folder.path().join(format!("cpu{}", index + 1));
            std::fs::create_dir(&path).unwrap();
            std::fs::write(path.join("online"), format!("{state}\n")).unwrap();
        }
        std::fs::write(folder.path().join("online"), "0-1\n").unwrap();
        folder
    }

    fn states(folder: &Path, count: usize) -> String {
        let state = |index| std::fs::read_to_string(folder.join(format!("cpu{index}/online"))).unwrap();
        (1..=count).map(|index| state(index).trim().to_owned()).collect()
    }

    #[test]
    fn those_that_are_off_are_turned_on() {
        let folder = folder(&["1", "0"]);
        assert_eq!(turn_on_in(folder.path()).unwrap(), 1);
        assert_eq!(states(folder.path(), 2), "11");
        assert_eq!(turn_on_in(folder.path()).unwrap(), 0);
        assert!(turn_on_in(&folder.path().join("absent")).is_err());
    }

    #[test]
    fn as_many_as_wanted_are_used_of_those_there_are() {
        // More than nine, whose names sort otherwise.
        let folder = folder(&["1"; 11]);
        for (wanted, online, expected) in [
            (3, 3, "11000000000"),
            (11, 11, "11111111110"),
            (1, 1, "00000000000"),
            (2, 2, "10000000000"),
            (64, 12, "11111111111"),
            (0, 1, "00000000000"),
        ] {
            assert_eq!(use_first_in(folder.path(), wanted).unwrap(), Count { online, present: 12 });
            assert_eq!(states(folder.path(), 11), expected, "{wanted} of twelve");
        }
        assert!(use_first_in(&folder.path().join("absent"), 1).is_err());
    }
}
