//! The guest's root: this program, busybox, and the drivers it needs.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use tests_harness::run;

/// The name by which this program knows that it is the guest's first.
pub(crate) const GUEST: &str = "/init";

/// In the order of loading; what the kernel has built in is not among the files of its package.
pub(super) const MODULES: [&str; 8] = [
    "drivers/virtio/virtio_mmio",
    "drivers/block/virtio_blk",
    "net/core/failover",
    "drivers/net/net_failover",
    "drivers/net/virtio_net",
    "net/vmw_vsock/vsock",
    "net/vmw_vsock/vmw_vsock_virtio_transport_common",
    "net/vmw_vsock/vmw_vsock_virtio_transport",
];

/// Called with the folder to work in, this program, and [`MODULES`]. The kernel of the VM image is the newest package's.
const SCRIPT: &str = r#"
set -eu -o pipefail
cd "$1"
mkdir package root
cp "$2" root/init
cp "$(command -v busybox)" root/busybox
package=$(find "${XDG_CACHE_HOME:-$HOME/.cache}/engine/packages" -name 'linux-image-6.12.*-cloud-amd64_*.deb' | sort -V | tail -n 1)
dpkg-deb --fsys-tarfile "$package" | tar -x -C package --wildcards './lib/modules/*'
for module in "${@:3}"; do
    file=$(find package -path "*/kernel/$module.ko.xz")
    [ -z "$file" ] || xz -dc "$file" >"root/${module##*/}.ko"
done
cd root
find . | busybox cpio -o -H newc >../initramfs
"#;

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
    let mut command = Command::new("bash");
    command.args(["-c", SCRIPT, "bash"]).arg(folder).arg(std::env::current_exe()?).args(MODULES);
    run(command)?
        .ok()
        .context("cannot make the guest's root: installer/build downloads the kernel's modules, installer/setup --tests busybox")
        .map(drop)
}
