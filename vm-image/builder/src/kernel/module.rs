//! Kernel modules, the order to load them in, and the names that the kernel asks for them by.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, bail};

use crate::elf::Elf;
use crate::list::{self, Load};

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
    pub(crate) load: Load,
    /// What it is asked for by: its name, and those it says it answers to. Dashes are underscores.
    pub(crate) aliases: Vec<String>,
    /// The modules that have to be loaded before it, by their places in the load order.
    pub(crate) needs: BTreeSet<usize>,
}

/// The files that tell the agent of the machine which modules to load.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Orders {
    /// At every start: one path a line, each after what it needs; a dash before one that may fail.
    pub(crate) start: String,
    /// When the kernel asks for a name: the name and the paths, each after what it needs, one name a line.
    pub(crate) asked: String,
}

/// What to load when, for modules that lie in `folder`.
pub(crate) fn orders(modules: &[Module], folder: &str) -> Orders {
    let path = |module: &Module| format!("{folder}/{}", module.path);
    let mut orders = Orders::default();
    let mut asked = BTreeMap::new();
    for (place, module) in modules.iter().enumerate() {
        match module.load {
            Load::Always => orders.start += &format!("{}\n", path(module)),
            Load::Tried => orders.start += &format!("-{}\n", path(module)),
            Load::Asked => {
                let chain = module.needs.iter().chain([&place]).map(|place| &modules[*place]);
                let chain: Vec<_> = chain.filter(|one| one.load == Load::Asked).map(path).collect();
                for alias in &module.aliases {
                    // The first one answers, as in modprobe's own files.
                    asked.entry(alias).or_insert_with(|| chain.join(" "));
                }
            }
        }
    }
    for (alias, chain) in asked {
        orders.asked += &format!("{alias} {chain}\n");
    }
    orders
}

impl<'a> Modules<'a> {
    /// `paths` of all modules (`kernel/net/tun.ko.xz`), and the text of `modules.builtin`.
    pub(crate) fn new(paths: impl Iterator<Item = &'a str>, builtin: &str) -> Self {
        Self {
            paths: paths.map(|path| (name_of(path), path)).collect(),
            builtin: builtin.lines().map(name_of).collect(),
        }
    }

    /// The wanted modules and what they depend on, dependencies first, and those that are only loaded when asked for at
    /// the end.
    ///
    /// `read` returns the decompressed module at a path. The order depends only on the wanted names and the modules.
    pub(crate) fn in_load_order(
        &self,
        wanted: &[list::Module],
        read: impl Fn(&str) -> Result<Vec<u8>>,
    ) -> Result<Vec<Module>> {
        let mut loaded = Vec::new();
        let mut state = BTreeMap::new();
        let (asked, started): (Vec<_>, Vec<_>) = wanted.iter().partition(|module| module.load == Load::Asked);
        for list::Module { name, load } in started.into_iter().chain(asked) {
            let before = loaded.len();
            self.visit(&normal(name), &read, &mut state, &mut loaded)?;
            // What only such a module needs is loaded as that is.
            loaded[before..].iter_mut().for_each(|module| module.load = *load);
        }
        Ok(loaded)
    }

    /// Adds a module and what it needs. Returns its place, and none if the kernel has it built in.
    fn visit(
        &self,
        name: &str,
        read: &impl Fn(&str) -> Result<Vec<u8>>,
        state: &mut BTreeMap<String, Option<usize>>,
        loaded: &mut Vec<Module>,
    ) -> Result<Option<usize>> {
        match state.get(name) {
            Some(Some(place)) => return Ok(Some(*place)),
            Some(None) => bail!("module `{name}` depends on itself"),
            None => {}
        }
        if self.builtin.contains(name) {
            return Ok(None);
        }
        let path = self.paths.get(name).with_context(|| format!("the kernel has no module `{name}`"))?;
        state.insert(name.to_owned(), None);
        let content = read(path).with_context(|| format!("cannot read the module `{path}`"))?;
        let elf = Elf::parse(&content).with_context(|| format!("the module `{path}`"))?;
        let lists = elf.module_info("depends")?;
        let hard = lists.iter().flat_map(|list| list.split(',')).filter(|name| !name.is_empty()).map(normal);
        // Soft: better to have, but the kernel may well not have it.
        let soft = soft_dependencies(&elf)?.into_iter().filter(|name| self.paths.contains_key(name));
        let mut needs = BTreeSet::new();
        for dependency in hard.chain(soft) {
            if let Some(place) = self.visit(&dependency, read, state, loaded)? {
                needs.insert(place);
                needs.extend(&loaded[place].needs.clone());
            }
        }
        // Those with wildcards are for devices, and asked for by programs that look for devices.
        let aliases = elf.module_info("alias")?.into_iter().filter(|alias| !alias.contains(['*', '?', '[']));
        let aliases = std::iter::once(name).chain(aliases).map(normal).collect();
        let path = path.strip_suffix(".xz").unwrap_or(path).to_owned();
        let content = without_signature(&content).to_vec();
        let place = loaded.len();
        state.insert(name.to_owned(), Some(place));
        loaded.push(Module { path, content, load: Load::Always, aliases, needs });
        Ok(Some(place))
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

    const PACKAGE: [(&str, &str); 8] = [
        ("kernel/net/bridge.ko.xz", "depends=stp,llc\0"),
        ("kernel/net/stp.ko.xz", "depends=llc\0"),
        ("kernel/net/llc.ko.xz", "depends=\0"),
        ("kernel/drivers/virtio-rng.ko", "depends=\0softdep=pre: llc absent post: stp\0"),
        ("kernel/loop/a.ko", "depends=b\0"),
        ("kernel/loop/b.ko", "depends=a\0"),
        ("kernel/fs/nfs.ko", "depends=sun-rpc,llc\0alias=fs-nfs\0alias=pci:v*\0alias=shared\0"),
        ("kernel/net/sun-rpc.ko", "depends=\0alias=shared\0"),
    ];

    fn order(wanted: &[&str]) -> Result<Orders> {
        let modules = Modules::new(PACKAGE.iter().map(|(path, _)| *path), "kernel/fs/ext4/ext4.ko\n");
        let wanted = wanted.join(" # reason\n") + " # reason";
        let wanted = list::modules(&wanted)?;
        let info = BTreeMap::from(PACKAGE);
        let loaded = modules.in_load_order(&wanted, |path| Ok(module(info[path])))?;
        Ok(orders(&loaded, "/m"))
    }

    fn check(wanted: &[&str]) -> Result<Vec<String>> {
        Ok(order(wanted)?.start.lines().map(|line| line.replace("/m/", "")).collect())
    }

    #[test]
    fn what_is_asked_for_brings_what_was_not_loaded_at_the_start() {
        let Orders { start, asked } = order(&["?nfs", "stp"]).unwrap();
        assert_eq!(start, "/m/kernel/net/llc.ko\n/m/kernel/net/stp.ko\n");
        let both = "/m/kernel/net/sun-rpc.ko /m/kernel/fs/nfs.ko";
        assert_eq!(
            asked.lines().collect::<Vec<_>>(),
            [
                &format!("fs_nfs {both}"),
                &format!("nfs {both}"),
                "shared /m/kernel/net/sun-rpc.ko",
                "sun_rpc /m/kernel/net/sun-rpc.ko",
            ]
        );
        assert_eq!(order(&["?stp", "bridge"]).unwrap().asked, "", "it is there from the start");
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
