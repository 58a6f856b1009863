//! Kernel modules and the order to load them in.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, bail};

use crate::elf::Elf;
use crate::list;

const SIGNATURE_MARKER: &[u8] = b"~Module signature appended~\n";
/// Size of `struct module_signature`, whose last field is the signature's length, big-endian.
const SIGNATURE_FOOTER: usize = 12;

/// The modules a kernel package has, found by name; `load` reads one.
pub(crate) struct Modules<'a> {
    paths: BTreeMap<String, &'a str>,
    builtin: BTreeSet<String>,
}

/// A module, ready to load once those before it are.
#[derive(Debug)]
pub(crate) struct Module {
    /// Path below `/lib/modules/<release>`, without a compression suffix.
    pub(crate) path: String,
    pub(crate) content: Vec<u8>,
    /// Whether loading it may fail.
    pub(crate) optional: bool,
}

impl<'a> Modules<'a> {
    /// `paths` of all modules (`kernel/net/tun.ko.xz`), and the text of `modules.builtin`.
    pub(crate) fn new(paths: impl Iterator<Item = &'a str>, builtin: &str) -> Self {
        Self {
            paths: paths.map(|path| (name_of(path), path)).collect(),
            builtin: builtin.lines().map(name_of).collect(),
        }
    }

    /// The wanted modules and what they depend on, dependencies first.
    ///
    /// `read` returns the decompressed module at a path. The order depends only on the wanted names and the modules.
    pub(crate) fn in_load_order(
        &self,
        wanted: &[list::Module],
        read: impl Fn(&str) -> Result<Vec<u8>>,
    ) -> Result<Vec<Module>> {
        let mut loaded = Vec::new();
        let mut state = BTreeMap::new();
        for list::Module { name, optional } in wanted {
            let before = loaded.len();
            self.visit(&normal(name), &read, &mut state, &mut loaded)?;
            // What only an optional module needs is as optional as that.
            loaded[before..].iter_mut().for_each(|module| module.optional = *optional);
        }
        Ok(loaded)
    }

    fn visit(
        &self,
        name: &str,
        read: &impl Fn(&str) -> Result<Vec<u8>>,
        state: &mut BTreeMap<String, bool>,
        loaded: &mut Vec<Module>,
    ) -> Result<()> {
        match state.get(name) {
            Some(true) => return Ok(()),
            Some(false) => bail!("module `{name}` depends on itself"),
            None => {}
        }
        if self.builtin.contains(name) {
            return Ok(());
        }
        let path = self.paths.get(name).with_context(|| format!("the kernel has no module `{name}`"))?;
        state.insert(name.to_owned(), false);
        let content = read(path).with_context(|| format!("cannot read the module `{path}`"))?;
        let elf = Elf::parse(&content).with_context(|| format!("the module `{path}`"))?;
        for list in elf.module_info("depends")? {
            for dependency in list.split(',').filter(|name| !name.is_empty()) {
                self.visit(&normal(dependency), read, state, loaded)?;
            }
        }
        for dependency in soft_dependencies(&elf)? {
            // Soft: better to have, but the kernel may well not have it.
            if self.paths.contains_key(&dependency) {
                self.visit(&dependency, read, state, loaded)?;
            }
        }
        state.insert(name.to_owned(), true);
        let path = path.strip_suffix(".xz").unwrap_or(path).to_owned();
        let content = without_signature(&content).to_vec();
        loaded.push(Module { path, content, optional: false });
        Ok(())
    }
}

/// The names after `pre:` in `softdep` lines.
fn soft_dependencies(elf: &Elf<'_>) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for line in elf.module_info("softdep")? {
        let mut before = false;
        for word in line.split_whitespace() {
            match word {
                "pre:" => before = true,
                "post:" => before = false,
                name if before => names.push(normal(name)),
                _ => {}
            }
        }
    }
    Ok(names)
}

/// The module without the signature appended to it (`include/linux/module_signature.h`).
///
/// apt has verified the package, and the root is ours from end to end; checking 70 RSA signatures again on every boot takes a
/// software CPU a second.
fn without_signature(module: &[u8]) -> &[u8] {
    let strip = || {
        let signed = module.strip_suffix(SIGNATURE_MARKER)?;
        let (signed, footer) = signed.split_at_checked(signed.len().checked_sub(SIGNATURE_FOOTER)?)?;
        let length = u32::from_be_bytes(footer.last_chunk().copied()?);
        signed.get(..signed.len().checked_sub(usize::try_from(length).ok()?)?)
    };
    strip().unwrap_or(module)
}

fn name_of(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    normal(file.split(".ko").next().unwrap_or(file))
}

/// The kernel treats dashes and underscores in module names alike.
fn normal(name: &str) -> String {
    name.replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Makes the smallest file that `Elf` takes for a module with these dependencies.
    fn module(info: &str) -> Vec<u8> {
        let names = b"\0.modinfo\0.shstrtab\0";
        let (info_at, names_at) = (64, 64 + info.len());
        let table = names_at + names.len();
        let mut bytes = vec![0; 64];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        bytes[0x28..0x30].copy_from_slice(&(table as u64).to_le_bytes());
        bytes[0x3a..0x40].copy_from_slice(&[64, 0, 2, 0, 1, 0]);
        bytes.extend_from_slice(info.as_bytes());
        bytes.extend_from_slice(names);
        for (name, offset, size) in [(1u32, info_at, info.len()), (10, names_at, names.len())] {
            let mut header = [0; 64];
            header[..4].copy_from_slice(&name.to_le_bytes());
            header[0x18..0x20].copy_from_slice(&(offset as u64).to_le_bytes());
            header[0x20..0x28].copy_from_slice(&(size as u64).to_le_bytes());
            bytes.extend_from_slice(&header);
        }
        bytes
    }

    const PACKAGE: [(&str, &str); 6] = [
        ("kernel/net/bridge.ko.xz", "depends=stp,llc\0"),
        ("kernel/net/stp.ko.xz", "depends=llc\0"),
        ("kernel/net/llc.ko.xz", "depends=\0"),
        ("kernel/drivers/virtio-rng.ko", "depends=\0softdep=pre: llc absent post: stp\0"),
        ("kernel/loop/a.ko", "depends=b\0"),
        ("kernel/loop/b.ko", "depends=a\0"),
    ];

    fn check(wanted: &[&str]) -> Result<Vec<String>> {
        let modules = Modules::new(PACKAGE.iter().map(|(path, _)| *path), "kernel/fs/ext4/ext4.ko\n");
        let wanted = wanted.join(" # reason\n") + " # reason";
        let wanted = list::modules(&wanted)?;
        let info = BTreeMap::from(PACKAGE);
        let loaded = modules.in_load_order(&wanted, |path| Ok(module(info[path])))?;
        Ok(loaded
            .into_iter()
            .map(|module| if module.optional { "-".to_owned() + &module.path } else { module.path })
            .collect())
    }

    #[test]
    fn dependencies_come_first_and_once() {
        let order = check(&["bridge", "stp"]).unwrap();
        assert_eq!(order, ["kernel/net/llc.ko", "kernel/net/stp.ko", "kernel/net/bridge.ko"]);
    }

    #[test]
    fn dashes_are_underscores_and_soft_dependencies_may_be_absent() {
        let order = check(&["virtio_rng"]).unwrap();
        assert_eq!(order, ["kernel/net/llc.ko", "kernel/drivers/virtio-rng.ko"]);
    }

    #[test]
    fn a_builtin_module_needs_no_file_and_an_unknown_one_is_an_error() {
        assert!(check(&["ext4"]).unwrap().is_empty());
        assert_eq!(check(&["ext5"]).unwrap_err().to_string(), "the kernel has no module `ext5`");
    }

    #[test]
    fn what_only_an_optional_module_needs_is_optional() {
        let order = check(&["stp", "-bridge"]).unwrap();
        assert_eq!(order, ["kernel/net/llc.ko", "kernel/net/stp.ko", "-kernel/net/bridge.ko"]);
        let order = check(&["-stp"]).unwrap();
        assert_eq!(order, ["-kernel/net/llc.ko", "-kernel/net/stp.ko"]);
    }

    #[test]
    fn a_circle_is_an_error() {
        assert_eq!(check(&["a"]).unwrap_err().to_string(), "module `a` depends on itself");
    }

    #[test]
    fn a_signature_is_taken_off_and_nothing_else() {
        let signed =
            [b"module".as_slice(), b"signature", &[0, 0, 2, 0, 0, 0, 0, 0], &[0, 0, 0, 9], SIGNATURE_MARKER];
        assert_eq!(without_signature(&signed.concat()), b"module");
        assert_eq!(without_signature(b"module"), b"module");
        let lying = [b"module".as_slice(), &[0; 8], &[0xff; 4], SIGNATURE_MARKER].concat();
        assert_eq!(without_signature(&lying), lying);
        assert_eq!(without_signature(SIGNATURE_MARKER), SIGNATURE_MARKER);
    }
}
