//! Mounts and hidden paths.

use oci_spec::runtime::Mount;

/// The size of `/dev/shm` unless asked otherwise.
pub const SHM_SIZE_BYTES: u64 = 64 << 20;

fn mount(destination: &str, kind: &str, source: &str, options: &[&str]) -> Mount {
    let mut mount = Mount::default();
    mount
        .set_destination(destination.into())
        .set_typ(Some(kind.to_owned()))
        .set_source(Some(source.into()))
        .set_options(Some(options.iter().map(|option| (*option).to_owned()).collect()));
    mount
}

/// Docker's default mounts, in the order they are to be made.
pub fn mounts(shm_size_bytes: u64) -> Vec<Mount> {
    let shm_size = format!("size={shm_size_bytes}");
    vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
        mount("/sys/fs/cgroup", "cgroup", "cgroup", &["ro", "nosuid", "noexec", "nodev"]),
        mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        mount("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", &shm_size]),
    ]
}

/// The same for a privileged container: `/sys` and the cgroups may be written.
pub fn privileged_mounts(shm_size_bytes: u64) -> Vec<Mount> {
    let writable = |mut mount: Mount| {
        let options = mount.options().iter().flatten().filter(|option| *option != "ro").cloned().collect();
        mount.set_options(Some(options));
        mount
    };
    mounts(shm_size_bytes).into_iter().map(writable).collect()
}

fn owned(paths: &[&str]) -> Vec<String> {
    paths.iter().map(|path| (*path).to_owned()).collect()
}

/// Paths a container sees as empty.
pub fn masked_paths() -> Vec<String> {
    owned(&[
        "/proc/acpi",
        "/proc/asound",
        "/proc/interrupts",
        "/proc/kcore",
        "/proc/keys",
        "/proc/latency_stats",
        "/proc/sched_debug",
        "/proc/scsi",
        "/proc/timer_list",
        "/proc/timer_stats",
        "/sys/devices/virtual/powercap",
        "/sys/firmware",
    ])
}

/// Paths a container may only read.
pub fn readonly_paths() -> Vec<String> {
    owned(&["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_mounted_before_what_lies_in_it() {
        let order: Vec<_> = mounts(SHM_SIZE_BYTES).iter().map(|mount| mount.destination().clone()).collect();
        for (position, destination) in order.iter().enumerate() {
            assert!(
                !order[position + 1..].iter().any(|later| destination.starts_with(later)),
                "{destination:?}"
            );
        }
    }

    #[test]
    fn privileged_mounts_differ_only_in_being_writable() {
        let (plain, privileged) = (mounts(1), privileged_mounts(1));
        assert!(plain.iter().any(|mount| mount.options().iter().flatten().any(|option| option == "ro")));
        assert!(
            !privileged.iter().any(|mount| mount.options().iter().flatten().any(|option| option == "ro"))
        );
        assert_eq!(plain.len(), privileged.len());
    }
}
