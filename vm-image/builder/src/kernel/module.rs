//! Kernel modules and the order to load them in.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, bail};

use crate::elf::Elf;

/// The modules a kernel package has, found by name; `load` reads one.
pub(crate) struct Modules<'a> {
    paths: BTreeMap<String, &'a str>,
    builtin: BTreeSet<String>,
}

/// A module and what must be loaded before it.
struct Module {
    path: String,
    content: Vec<u8>,
}

impl<'a> Modules<'a> {
    /// `paths` of all modules (`kernel/net/tun.ko.xz`), and the text of `modules.builtin`.
    pub(crate) fn new(paths: impl Iterator<Item = &'a str>, builtin: &str) -> Self {
        Self {
            paths: paths.map(|path| (name_of(path), path)).collect(),
            builtin: builtin.lines().map(name_of).collect(),
        }
    }

    /// The wanted modules and what they depend on, dependencies first, without their compression suffix.
    ///
    /// `read` returns the decompressed module at a path. The order depends only on the wanted names and the modules.
    pub(crate) fn in_load_order(
        &self,
        wanted: &[String],
        read: impl Fn(&str) -> Result<Vec<u8>>,
    ) -> Result<Vec<(String, Vec<u8>)>> {
        let mut loaded = Vec::new();
        let mut state = BTreeMap::new();
        for name in wanted {
            self.visit(&normal(name), &read, &mut state, &mut loaded)?;
        }
        Ok(loaded.into_iter().map(|module| (module.path, module.content)).collect())
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
        loaded.push(Module { path, content });
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

fn name_of(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    normal(file.split(".ko").next().unwrap_or(file))
}

/// The kernel treats dashes and underscores in module names alike.
fn normal(name: &str) -> String {
    name.replace('-', "_")
}
