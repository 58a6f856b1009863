//! The processors that the kernel left off.
//!
//! `maxcpus=1` makes it boot on one; the host asks for that where it is safer (its QEMU back end says why).

use std::path::Path;

use anyhow::{Context, Result};

const FOLDER: &str = "/sys/devices/system/cpu";

/// Turns every processor on (Documentation/core-api/cpu_hotplug.rst). Returns how many were off.
pub fn turn_on() -> Result<usize> {
    turn_on_in(Path::new(FOLDER))
}

fn turn_on_in(folder: &Path) -> Result<usize> {
    let mut count = 0;
    for entry in std::fs::read_dir(folder).with_context(|| format!("cannot read `{}`", folder.display()))? {
        // Only processors that can be turned off have the file.
        let switch = entry?.path().join("online");
        if std::fs::read_to_string(&switch).is_ok_and(|state| state.trim() == "0") {
            std::fs::write(&switch, "1").with_context(|| format!("cannot write `{}`", switch.display()))?;
            count += 1;
        }
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_that_are_off_are_turned_on() {
        let folder = tempfile::tempdir().unwrap();
        for (name, state) in [("cpu0", None), ("cpu1", Some("1\n")), ("cpu2", Some("0\n")), ("cpufreq", None)]
        {
            let path = folder.path().join(name);
            std::fs::create_dir(&path).unwrap();
            if let Some(state) = state {
                std::fs::write(path.join("online"), state).unwrap();
            }
        }
        std::fs::write(folder.path().join("online"), "0-1\n").unwrap();
        assert_eq!(turn_on_in(folder.path()).unwrap(), 1);
        assert_eq!(std::fs::read_to_string(folder.path().join("cpu2/online")).unwrap(), "1");
        assert_eq!(turn_on_in(folder.path()).unwrap(), 0);
        assert!(turn_on_in(&folder.path().join("absent")).is_err());
    }
}
