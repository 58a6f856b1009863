//! What a machine is made of, as plain data.
//!
//! A [`MachineSpec`] is written by the daemon, sent over the control channel and never changed by building a
//! machine from it. Checking it ([`MachineSpec::validate`]) touches only the files it names, so a mistake is told in
//! one sentence before anything has been started.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use host_hypervisor::arch::boot;
use host_hypervisor::arch::native::boot::{CMDLINE, MARK, NOT_A_KERNEL};
use host_hypervisor::qemu::TCG_CMDLINE;
use serde::{Deserialize, Serialize};

/// Below this the kernel, the initramfs (unpacked into memory) and the engine do not fit.
pub const MEMORY_MIB_MIN: u32 = 256;
/// The guest kernels are built for at most this many processors.
pub const CPUS_MAX: u32 = 64;
/// An ext4 file system with a journal needs some room.
pub const DISK_BYTES_MIN: u64 = 64 * 1024 * 1024;
/// Disk sizes are whole sectors of this many bytes.
pub const SECTOR_BYTES: u64 = 512;
/// Of the command line that a kernel reads a back end may need some.
pub const CMDLINE_BYTES_MAX: usize = boot::CMDLINE_BYTES_MAX - 1 - TCG_CMDLINE.len();

/// A machine, as data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineSpec {
    /// Number of virtual processors.
    pub cpus: u32,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// The kernel: on x86-64 a bzImage, on arm64 an Image.
    pub kernel: PathBuf,
    /// The same kernel as an ELF file with a PVH entry, if there is one: it starts without unpacking itself.
    #[serde(default)]
    pub vmlinux: Option<PathBuf>,
    /// The initial root file system (compressed cpio).
    pub initramfs: PathBuf,
    /// Kernel parameters to add after our own (console, panic), such as those in the VM image's manifest.
    #[serde(default)]
    pub cmdline: String,
    /// The data disk.
    pub disk: DiskSpec,
    /// File that keeps the guest's console, bounded in size.
    pub console_log: PathBuf,
    /// What runs the processors.
    #[serde(default)]
    pub backend: BackendChoice,
    /// How the guest reaches the network.
    #[serde(default)]
    pub network: NetworkSpec,
    /// The folders of the host that the guest can use.
    #[serde(default)]
    pub shares: Vec<ShareSpec>,
    /// How long the guest's agent may take to open its control session, in seconds.
    #[serde(default = "boot_timeout_seconds")]
    pub boot_timeout_seconds: u32,
}

/// The data disk: a raw, sparse file that is made or grown to its size.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSpec {
    /// Where the file is.
    pub path: PathBuf,
    /// Size of the disk the guest sees. A file can grow to it; it never shrinks.
    pub size_bytes: u64,
}

/// A folder of the host that the guest can use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShareSpec {
    /// Its name in the guest: one path component.
    pub name: String,
    /// The folder.
    pub path: PathBuf,
    /// Whether the guest may only read it.
    #[serde(default)]
    pub read_only: bool,
}

/// What is asked to run the machine's processors.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackendChoice {
    /// KVM where a probe finds it usable, else QEMU's software processor.
    #[default]
    Auto,
    /// KVM, or an error that says why it cannot be used.
    Kvm,
    /// QEMU's software processor, even where KVM is usable.
    Qemu,
}

/// How the guest reaches the network.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NetworkSpec {
    /// Through the user-space NAT.
    #[default]
    Nat,
    /// No network device.
    None,
}

/// Why a spec cannot become a machine.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the sentences are the documentation")]
pub enum SpecError {
    #[error("a machine needs between 1 and {CPUS_MAX} processors, not {cpus}")]
    Cpus { cpus: u32 },
    #[error(
        "{memory_mib} MiB of memory are too little for a machine: it needs at least {MEMORY_MIB_MIN} MiB"
    )]
    MemoryTooSmall { memory_mib: u32 },
    #[error("{memory_mib} MiB of memory are more than this host has ({host_mib} MiB)")]
    MemoryTooLarge { memory_mib: u32, host_mib: u64 },
    #[error("cannot read the {what} `{}`", path.display())]
    Unreadable {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("the {what} `{}` is {problem}", path.display())]
    NotUsable { what: &'static str, path: PathBuf, problem: &'static str },
    #[error("a disk of {size_bytes} bytes is too small: it needs at least {DISK_BYTES_MIN} bytes")]
    DiskTooSmall { size_bytes: u64 },
    #[error("a disk of {size_bytes} bytes is not a whole number of {SECTOR_BYTES}-byte sectors")]
    DiskNotSectors { size_bytes: u64 },
    #[error("the kernel's command line is {length} bytes long, the limit is {CMDLINE_BYTES_MAX}")]
    CmdlineTooLong { length: usize },
    #[error("the kernel's command line holds a control character")]
    CmdlineControl,
    #[error("the path of the {what}, `{}`, is not absolute", path.display())]
    RelativePath { what: &'static str, path: PathBuf },
    #[error("a machine cannot boot in {seconds} s: the boot time limit must be at least 5 s")]
    BootTimeout { seconds: u32 },
}

impl MachineSpec {
    /// Checks everything that can be known before starting: sizes, and that the named files are there.
    ///
    /// Reads file metadata; does not create or change anything.
    pub fn validate(&self) -> Result<(), SpecError> {
        self.validate_numbers()?;
        check_readable("kernel", &self.kernel)?;
        check_kernel(&self.kernel)?;
        if let Some(vmlinux) = &self.vmlinux {
            check_readable("kernel", vmlinux)?;
        }
        check_readable("initramfs", &self.initramfs)?;
        check_parent("disk", &self.disk.path)?;
        check_parent("console log", &self.console_log)
    }

    /// The part of [`validate`](Self::validate) that needs nothing but the spec.
    fn validate_numbers(&self) -> Result<(), SpecError> {
        check_size(self.cpus, self.memory_mib, self.disk.size_bytes)?;
        if !self.disk.size_bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(SpecError::DiskNotSectors { size_bytes: self.disk.size_bytes });
        }
        if self.boot_timeout_seconds < 5 {
            return Err(SpecError::BootTimeout { seconds: self.boot_timeout_seconds });
        }
        let cmdline = self.kernel_cmdline();
        if cmdline.len() > CMDLINE_BYTES_MAX {
            return Err(SpecError::CmdlineTooLong { length: cmdline.len() });
        }
        if cmdline.chars().any(char::is_control) {
            return Err(SpecError::CmdlineControl);
        }
        Ok(())
    }

    /// The kernel's whole command line: first what the board needs, then what the spec adds.
    pub fn kernel_cmdline(&self) -> String {
        let mut line = String::from(CMDLINE);
        let extra = self.cmdline.trim();
        if !extra.is_empty() {
            line.push(' ');
            line.push_str(extra);
        }
        line
    }

    /// How long the guest's agent may take to open its control session.
    pub fn boot_timeout(&self) -> Duration {
        Duration::from_secs(u64::from(self.boot_timeout_seconds))
    }
}

/// Whether a machine of this size is possible on this host.
pub fn check_size(cpus: u32, memory_mib: u32, disk_bytes: u64) -> Result<(), SpecError> {
    if cpus == 0 || cpus > CPUS_MAX {
        return Err(SpecError::Cpus { cpus });
    }
    if memory_mib < MEMORY_MIB_MIN {
        return Err(SpecError::MemoryTooSmall { memory_mib });
    }
    let host_mib = host_mib();
    if u64::from(memory_mib) > host_mib {
        return Err(SpecError::MemoryTooLarge { memory_mib, host_mib });
    }
    if disk_bytes < DISK_BYTES_MIN {
        return Err(SpecError::DiskTooSmall { size_bytes: disk_bytes });
    }
    Ok(())
}

/// What a machine can have at most: all memory of this host, in MiB.
pub(crate) fn host_mib() -> u64 {
    let info = rustix::system::sysinfo();
    (info.totalram as u64).saturating_mul(u64::from(info.mem_unit)) / (1024 * 1024)
}

fn check_readable(what: &'static str, path: &Path) -> Result<(), SpecError> {
    check_absolute(what, path)?;
    let unreadable = |source| SpecError::Unreadable { what, path: path.to_owned(), source };
    let metadata = std::fs::File::open(path).and_then(|file| file.metadata()).map_err(unreadable)?;
    if !metadata.is_file() {
        return Err(SpecError::NotUsable { what, path: path.to_owned(), problem: "not a file" });
    }
    if metadata.len() == 0 {
        return Err(SpecError::NotUsable { what, path: path.to_owned(), problem: "empty" });
    }
    Ok(())
}

/// Looks for the mark of a Linux kernel of this architecture.
fn check_kernel(path: &Path) -> Result<(), SpecError> {
    let (place, expected) = MARK;
    let mut mark = [0; 4];
    match std::fs::File::open(path).and_then(|file| file.read_exact_at(&mut mark, place)) {
        Ok(()) if mark == expected => Ok(()),
        Err(source) if source.kind() != std::io::ErrorKind::UnexpectedEof => {
            Err(SpecError::Unreadable { what: "kernel", path: path.to_owned(), source })
        }
        _ => Err(SpecError::NotUsable { what: "kernel", path: path.to_owned(), problem: NOT_A_KERNEL }),
    }
}

/// The file itself may not exist yet; the folder it goes into must.
fn check_parent(what: &'static str, path: &Path) -> Result<(), SpecError> {
    check_absolute(what, path)?;
    let folder = path.parent().unwrap_or(Path::new("/"));
    let metadata = std::fs::metadata(folder).map_err(|source| SpecError::Unreadable {
        what: "folder",
        path: folder.to_owned(),
        source,
    })?;
    if !metadata.is_dir() {
        return Err(SpecError::NotUsable {
            what: "folder",
            path: folder.to_owned(),
            problem: "not a folder",
        });
    }
    Ok(())
}

fn check_absolute(what: &'static str, path: &Path) -> Result<(), SpecError> {
    if path.is_absolute() { Ok(()) } else { Err(SpecError::RelativePath { what, path: path.to_owned() }) }
}

/// A software processor on a busy host takes many times longer than hardware; this is far above both.
fn boot_timeout_seconds() -> u32 {
    180
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(folder: &Path) -> MachineSpec {
        let mut kernel = vec![0; MARK.0 as usize];
        kernel.extend(MARK.1);
        std::fs::write(folder.join("kernel"), kernel).unwrap();
        std::fs::write(folder.join("initramfs"), b"x").unwrap();
        MachineSpec {
            cpus: 1,
            memory_mib: 512,
            kernel: folder.join("kernel"),
            vmlinux: None,
            initramfs: folder.join("initramfs"),
            cmdline: "quiet".into(),
            disk: DiskSpec { path: folder.join("disk.raw"), size_bytes: DISK_BYTES_MIN },
            console_log: folder.join("console.log"),
            backend: BackendChoice::Auto,
            network: NetworkSpec::Nat,
            shares: vec![ShareSpec { name: "home".into(), path: "/home/ana".into(), read_only: false }],
            boot_timeout_seconds: 60,
        }
    }

    /// Changes a good spec and expects a sentence that holds `part`.
    fn check(change: impl FnOnce(&mut MachineSpec), part: &str) {
        let folder = tempfile::tempdir().unwrap();
        let mut spec = spec(folder.path());
        change(&mut spec);
        let sentence = spec.validate().expect_err("the spec is wrong").to_string();
        assert!(sentence.contains(part), "{sentence}");
    }

    #[test]
    fn a_good_spec_is_accepted_and_survives_the_wire() {
        let folder = tempfile::tempdir().unwrap();
        let spec = spec(folder.path());
        spec.validate().unwrap();
        let json = serde_json::to_string(&spec).unwrap();
        assert_eq!(serde_json::from_str::<MachineSpec>(&json).unwrap(), spec);
        assert!(json.contains(r#""backend":"auto""#) && json.contains(r#""network":"nat""#), "{json}");
    }

    #[test]
    fn optional_fields_have_defaults() {
        let spec: MachineSpec = serde_json::from_str(
            r#"{"cpus":2,"memory_mib":512,"kernel":"/k","initramfs":"/i",
                "disk":{"path":"/d","size_bytes":1},"console_log":"/c"}"#,
        )
        .unwrap();
        assert_eq!((spec.backend, spec.network), (BackendChoice::Auto, NetworkSpec::Nat));
        assert_eq!(spec.boot_timeout(), Duration::from_secs(180));
    }

    #[test]
    fn sizes_are_checked() {
        check(|spec| spec.cpus = 0, "between 1 and 64 processors, not 0");
        check(|spec| spec.cpus = 65, "not 65");
        check(|spec| spec.memory_mib = 100, "100 MiB of memory are too little");
        check(|spec| spec.memory_mib = u32::MAX, "more than this host has");
        check(|spec| spec.disk.size_bytes = 4096, "4096 bytes is too small");
        check(|spec| spec.disk.size_bytes += 1, "not a whole number of 512-byte sectors");
        check(|spec| spec.boot_timeout_seconds = 1, "cannot boot in 1 s");
    }

    #[test]
    fn a_missing_kernel_is_named() {
        check(|spec| std::fs::remove_file(&spec.kernel).unwrap(), "cannot read the kernel `/");
        check(|spec| std::fs::write(&spec.kernel, b"short").unwrap(), "is not a Linux kernel image");
        check(|spec| std::fs::write(&spec.kernel, [0; 0x300]).unwrap(), "is not a Linux kernel image");
        check(|spec| std::fs::write(&spec.initramfs, b"").unwrap(), "initramfs");
        check(|spec| spec.kernel = spec.kernel.parent().unwrap().into(), "is not a file");
        check(
            |spec| spec.vmlinux = Some("/nowhere/vmlinux".into()),
            "cannot read the kernel `/nowhere/vmlinux`",
        );
        check(|spec| spec.kernel = "kernel".into(), "`kernel`, is not absolute");
        check(|spec| spec.disk.path = "/nowhere/at/all/disk.raw".into(), "`/nowhere/at/all`");
    }

    #[test]
    fn the_command_line_is_checked() {
        check(|spec| spec.cmdline = "a".repeat(3000), &format!("the limit is {CMDLINE_BYTES_MAX}"));
        check(|spec| spec.cmdline = "quiet\nrdinit=/bin/sh".into(), "control character");
    }

    #[test]
    fn our_parameters_come_first() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(spec(folder.path()).kernel_cmdline(), format!("{CMDLINE} quiet"));
    }
}
