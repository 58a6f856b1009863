//! The guest's root: this program, busybox, and the drivers it needs.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use tests_harness::run;

/// The name by which this program knows that it is the guest's first.
pub(crate) const GUEST: &str = "/init";

/// In the order of loading; what the kernel has built in is not among the files of its package.
pub(super) const MODULES: [&str; 5] = [
    "drivers/virtio/virtio_mmio",
    "drivers/block/virtio_blk",
    "net/core/failover",
    "drivers/net/net_failover",
    "drivers/net/virtio_net",
];

/// Where [`make`] puts it.
pub(super) fn path(folder: &Path) -> PathBuf {
    folder.join("initramfs")
}

/// The VM image's kernel.
pub(super) fn kernel() -> Result<PathBuf> {
    super::of_image("kernel")
}

/// The name of a module's file in the guest.
pub(super) fn module(name: &str) -> String {
    format!("/{}.ko", name.rsplit('/').next().unwrap_or(name))
}

/// Makes the initial root file system of this program, for the VM image's kernel.
pub(super) fn make(folder: &Path) -> Result<()> {
    let mut archive = Archive::default();
    archive.add(GUEST, 0o755, &std::fs::read(std::env::current_exe()?)?)?;
    let busybox = run(shell("command -v busybox"))?.ok()?;
    archive.add("/busybox", 0o755, &std::fs::read(busybox.trim()).context("cannot read busybox")?)?;
    // The package that the image's kernel came from.
    let tree = folder.join("modules");
    std::fs::create_dir(&tree)?;
    let script = format!(
        "set -e; package=$(ls \"${{XDG_CACHE_HOME:-$HOME/.cache}}\"/engine/packages/linux-image-6.12.*-cloud-amd64_*.deb | sort -V | \
         tail -n 1); dpkg-deb --fsys-tarfile \"$package\" | tar -x -C {} --wildcards '*/drivers/*/virtio_*.ko.xz' '*failover.ko.xz'",
        tree.display()
    );
    run(shell(&script))?
        .ok()
        .context("cannot unpack the kernel's modules: installer/build downloads them")?;
    for name in MODULES {
        let file = name.rsplit('/').next().unwrap_or(name);
        let script =
            format!("find {} -name {file}.ko.xz -exec xz -d {{}} + -exec true {{}} +", tree.display());
        run(shell(&script))?.ok()?;
        let found = run(shell(&format!("find {} -name {file}.ko", tree.display())))?.ok()?;
        if !found.trim().is_empty() {
            archive.add(&module(name), 0o644, &std::fs::read(found.trim())?)?;
        }
    }
    std::fs::write(path(folder), archive.finish()?)?;
    Ok(())
}

fn shell(script: &str) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", script]);
    command
}

/// A cpio archive in the format `newc` (`Documentation/driver-api/early-userspace/buffer-format.rst`).
#[derive(Default)]
struct Archive(Vec<u8>);

impl Archive {
    fn add(&mut self, name: &str, permissions: u32, content: &[u8]) -> Result<()> {
        self.entry(name.trim_start_matches('/'), 0o100_000 | permissions, content)
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) -> Result<()> {
        ensure!(u32::try_from(content.len()).is_ok(), "`{name}` is too large for an archive");
        let mut header = "070701".to_owned();
        let fields = [self.0.len(), mode as usize, 0, 0, 1, 0, content.len(), 0, 0, 0, 0, name.len() + 1, 0];
        for field in fields {
            write!(header, "{field:08X}")?;
        }
        self.0.write_all(header.as_bytes())?;
        self.0.write_all(name.as_bytes())?;
        self.0.push(0);
        self.pad();
        self.0.write_all(content)?;
        self.pad();
        Ok(())
    }

    fn pad(&mut self) {
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Result<Vec<u8>> {
        self.entry("TRAILER!!!", 0, &[])?;
        Ok(self.0)
    }
}
