//! Kernel modules, loaded in the order that the image's builder worked out: one path a line, each after what it
//! depends on. A dash before a path marks hardware that may be missing: failing to load it is normal.
//!
//! Loading is most of the time between the kernel's start and the engine's, so it is done in two parts: what drives
//! the machine's own devices first, and the rest while disk and network are brought up. What only some machines ever
//! need is loaded when the kernel asks for it: it calls this program as `modprobe`
//! (Documentation/admin-guide/sysctl/kernel.rst, `modprobe`).

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use rustix::io::Errno;
use tracing::{debug, warn};

use crate::log;

/// Where the builder puts the list.
const LIST: &str = "/etc/engine/modules";
/// Where it puts the names that the kernel may ask for, each with the paths to load.
const ASKED: &str = "/etc/engine/modules.asked";
/// What the kernel calls this program then.
const MODPROBE: &str = "modprobe";

/// Modules in the order of loading.
#[derive(Debug, PartialEq, Eq)]
pub struct Modules(Vec<Module>);

#[derive(Debug, PartialEq, Eq)]
struct Module {
    path: PathBuf,
    optional: bool,
}

impl Modules {
    /// The modules of this image, in two parts to be loaded one after the other: up to the last driver of a device
    /// that the machine cannot start without, and the rest.
    pub fn of_this_image() -> (Self, Self) {
        match fs::read_to_string(LIST) {
            Ok(list) => split(parse(&list)),
            // A kernel that has everything built in comes without a list.
            Err(error) if error.kind() == io::ErrorKind::NotFound => (Self(Vec::new()), Self(Vec::new())),
            Err(error) => {
                warn!(list = LIST, %error, "cannot read the list of kernel modules");
                (Self(Vec::new()), Self(Vec::new()))
            }
        }
    }

    /// Loads all of them; blocks. What cannot be loaded is logged: whether the machine can do without shows when the
    /// thing it serves (disk, network, vsock) is missing.
    pub fn load(self) {
        let began = Instant::now();
        for Module { path, optional } in &self.0 {
            match load_one(path) {
                Ok(()) => {}
                Err(error) if *optional => debug!(module = %path.display(), %error, "no such hardware"),
                Err(error) => warn!(module = %path.display(), %error, "kernel module not loaded"),
            }
        }
        debug!(count = self.0.len(), took = ?began.elapsed(), "kernel modules loaded");
    }
}

fn parse(list: &str) -> Vec<Module> {
    let lines = list.lines().map(|line| line.split('#').next().unwrap_or_default().trim());
    lines
        .filter(|line| !line.is_empty())
        .map(|line| match line.strip_prefix('-') {
            Some(path) => Module { path: path.into(), optional: true },
            None => Module { path: line.into(), optional: false },
        })
        .collect()
}

fn split(mut modules: Vec<Module>) -> (Modules, Modules) {
    let drives_a_device = |module: &Module| {
        let name = module.path.file_stem().unwrap_or_default().to_string_lossy().replace('-', "_");
        ["virtio_blk", "virtio_net", "virtio_mmio", "virtio_pci", "vmw_vsock_virtio_transport"]
            .contains(&name.as_str())
    };
    let devices = modules.iter().rposition(drives_a_device).map_or(0, |last| last + 1);
    let rest = modules.split_off(devices);
    (Modules(modules), Modules(rest))
}

/// Answers a request of the kernel, if these are the words of one (`modprobe -q -- NAME`): whether the module is there
/// now. The kernel takes a failure as "there is none".
pub fn requested(mut words: impl DoubleEndedIterator<Item = OsString>) -> Option<bool> {
    let program = words.next()?;
    if Path::new(&program).file_name()? != MODPROBE {
        return None;
    }
    let name = words.next_back()?.into_string().ok()?;
    let list = fs::read_to_string(ASKED).unwrap_or_default();
    let Some(paths) = paths_of(&list, &name) else { return Some(false) };
    let failed = paths.iter().find_map(|path| Some((path, load_one(path).err()?)));
    match failed {
        Some((path, error)) => {
            log::on_console(&format!("modprobe {name}: `{}`: {error}", path.display()));
            Some(false)
        }
        None => Some(true),
    }
}

/// The modules to load for a name, in order.
fn paths_of<'a>(list: &'a str, name: &str) -> Option<Vec<&'a Path>> {
    let name = name.replace('-', "_");
    let paths = list.lines().find_map(|line| line.strip_prefix(&name)?.strip_prefix(' '))?;
    Some(paths.split(' ').map(Path::new).collect())
}

fn load_one(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    match rustix::system::finit_module(&file, c"", 0) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(list: &str, devices: &[&str], rest: &[&str]) {
        let paths = |modules: Modules| -> Vec<String> {
            modules.0.into_iter().map(|module| module.path.to_string_lossy().into_owned()).collect()
        };
        let (first, second) = split(parse(list));
        assert_eq!(paths(first), devices);
        assert_eq!(paths(second), rest);
    }

    #[test]
    fn devices_come_first_with_what_they_depend_on_and_the_order_stays() {
        check("", &[], &[]);
        check("# nothing\n\n", &[], &[]);
        check(
            "/m/failover.ko\n/m/virtio_net.ko # the network\r\n\n/m/overlay.ko\n/m/veth.ko\n",
            &["/m/failover.ko", "/m/virtio_net.ko"],
            &["/m/overlay.ko", "/m/veth.ko"],
        );
        check("/m/overlay.ko\n/m/virtio-blk.ko", &["/m/overlay.ko", "/m/virtio-blk.ko"], &[]);
        check("/m/overlay.ko", &[], &["/m/overlay.ko"]);
    }

    #[test]
    fn a_dash_marks_what_may_be_missing() {
        let module = |path: &str, optional| Module { path: path.into(), optional };
        assert_eq!(parse("-/m/a-b.ko\n /m/c.ko\n"), [module("/m/a-b.ko", true), module("/m/c.ko", false)]);
    }

    #[test]
    fn the_kernels_names_are_found_whole_and_with_any_dashes() {
        let list = "fs_nfs /m/sunrpc.ko /m/nfs.ko\nnfs /m/nfs.ko\n";
        let paths = |name| paths_of(list, name);
        assert_eq!(paths("fs-nfs"), Some(vec![Path::new("/m/sunrpc.ko"), Path::new("/m/nfs.ko")]));
        assert_eq!(paths("nfs"), Some(vec![Path::new("/m/nfs.ko")]));
        assert_eq!((paths("fs"), paths("/m/nfs.ko"), paths("")), (None, None, None));
    }

    #[test]
    fn only_a_call_by_the_kernel_is_a_request() {
        let words =
            |words: &[&str]| requested(words.iter().map(OsString::from).collect::<Vec<_>>().into_iter());
        assert_eq!(words(&["/sbin/modprobe", "-q", "--", "absent"]), Some(false));
        for other in [&["/init"][..], &["/init", "modprobe"], &[]] {
            assert_eq!(words(other), None);
        }
    }

    #[test]
    fn a_missing_module_is_an_error_of_that_module_only() {
        assert_eq!(load_one(Path::new("/nonexistent/x.ko")).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
