//! A VM image: the folder with `kernel`, `initramfs`, `manifest.json`, and what it is made from.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::cache::Cache;
use crate::kernel::{Choice, Source, orders};
use crate::root::{self, Root};
use crate::tree::Node;
use crate::{cpio, report};

/// Kernel parameters that belong to this root, whatever machine boots it: messages to the console that the machine keeps, a
/// panic ends the machine instead of hanging it, and cgroup v2 only. Memory that comes while the machine runs is used at once,
/// and for what can be moved, as far as the rest suffices for the kernel itself, so that it can be taken back.
const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 cgroup_no_v1=all memhp_default_state=online \
                            memory_hotplug.online_policy=auto-movable";
/// Kind of folder in the cache.
const KIND: &str = "vm-image";

/// Everything an image is made from, known exactly.
pub(crate) struct Recipe {
    choice: Choice,
    source: Source,
    root: Root,
    level: i32,
    inputs: BTreeMap<String, BTreeMap<String, String>>,
    hash: String,
}

impl Recipe {
    /// Looks at every input. Needs no network once the kernel's package has been downloaded.
    pub(crate) fn gather(
        choice: Choice,
        cache: &Cache,
        folder: &Path,
        programs: &Path,
        level: i32,
        refresh: bool,
    ) -> Result<Self> {
        let root = root::gather(&folder.join("rootfs"), programs)?;
        let source = Source::find(choice, cache, &folder.join("kernel"), refresh)?;
        let inputs = BTreeMap::from([
            ("kernel".to_owned(), source.inputs().into_iter().collect()),
            ("packages".to_owned(), root.packages.clone()),
            ("programs".to_owned(), root.programs.clone()),
            (
                "root".to_owned(),
                BTreeMap::from([
                    ("tree".to_owned(), root.tree.digest()),
                    ("level".to_owned(), level.to_string()),
                ]),
            ),
        ]);
        // The builder is an input too: what it does with the others decides the result.
        let builder = fs::read("/proc/self/exe").context("cannot read this program")?;
        let hash = root::digest(
            serde_json::to_string(&(choice.name(), root::digest(&builder), &inputs))?.as_bytes(),
        );
        Ok(Self { choice, source, root, level, inputs, hash })
    }

    /// The image from the cache, made first if it is not there.
    pub(crate) fn find_or_build(&self, cache: &Cache) -> Result<PathBuf> {
        if let Some(folder) = cache.find(KIND, &self.hash)? {
            return Ok(folder);
        }
        let folder = cache.publish(KIND, &self.hash, |folder| self.build(cache, folder))?;
        cache.prune(KIND)?;
        Ok(folder)
    }

    /// Makes the image in an empty folder.
    pub(crate) fn build(&self, cache: &Cache, folder: &Path) -> Result<()> {
        let kernel = self.source.load(cache)?;
        let mut tree = self.root.tree.clone();
        let modules = format!("/lib/modules/{}", kernel.release);
        let orders = orders(&kernel.modules, &modules);
        for module in kernel.modules {
            tree.insert(&format!("{modules}/{}", module.path), 0o644, Node::File(module.content))?;
        }
        tree.insert("/etc/engine/modules", 0o644, Node::File(orders.start.into_bytes()))?;
        tree.insert("/etc/engine/modules.asked", 0o644, Node::File(orders.asked.into_bytes()))?;

        report::step(format_args!("packing the root file system"));
        let mut sizes = BTreeMap::new();
        let mut digests = BTreeMap::new();
        let mut keep = |name: &str, content: &[u8]| -> Result<()> {
            sizes.insert(name.to_owned(), content.len() as u64);
            digests.insert(name.to_owned(), root::digest(content));
            write(&folder.join(name), content)
        };
        let mut archive = Vec::new();
        cpio::write(&tree, &mut archive)?;
        keep("initramfs", &compress(&archive, self.level)?)?;
        keep("kernel", &kernel.image)?;
        if let Some(vmlinux) = &kernel.vmlinux {
            keep("vmlinux", vmlinux)?;
        }
        for (name, image) in &self.root.images {
            keep(&format!("{name}.tar"), image)?;
        }
        sizes.insert("root file system, unpacked".to_owned(), archive.len() as u64);
        let identity = serde_json::to_string(&(COMMAND_LINE, &digests))?;
        let manifest = Manifest {
            digest: format!("sha256:{}", root::digest(identity.as_bytes())),
            kernel: self.choice.name().to_owned(),
            kernel_release: kernel.release,
            cmdline: COMMAND_LINE.to_owned(),
            sizes,
            digests,
            inputs: self.inputs.clone(),
        };
        let mut text = serde_json::to_vec_pretty(&manifest)?;
        text.push(b'\n');
        write(&folder.join("manifest.json"), &text)
    }
}

/// What `manifest.json` says.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Manifest {
    /// Stands for the whole image: all files of it and the command line.
    digest: String,
    /// Which kernel: `debian` or `own`.
    kernel: String,
    /// What `uname -r` says in the VM.
    kernel_release: String,
    /// Kernel parameters that the root needs.
    cmdline: String,
    /// Sizes in bytes by file.
    sizes: BTreeMap<String, u64>,
    /// Digests by file.
    digests: BTreeMap<String, String>,
    /// What the image was made from: kind, name, version or digest.
    inputs: BTreeMap<String, BTreeMap<String, String>>,
}

impl Manifest {
    pub(crate) fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("manifest.json");
        let text = fs::read(&path).with_context(|| format!("cannot read `{}`", path.display()))?;
        serde_json::from_slice(&text)
            .with_context(|| format!("`{}` is no manifest of a VM image", path.display()))
    }

    /// Prints what a person wants to know of a finished image.
    pub(crate) fn print(&self, folder: &Path) {
        report::line(format_args!("image    {}", folder.display()));
        report::line(format_args!("kernel   {} ({})", self.kernel_release, self.kernel));
        for (name, size) in &self.sizes {
            let digest =
                self.digests.get(name).map_or_else(String::new, |digest| format!("  sha256:{digest}"));
            report::line(format_args!("size     {name}: {}{digest}", report::size(*size)));
        }
        report::line(format_args!("digest   {}", self.digest));
    }
}

fn compress(archive: &[u8], level: i32) -> Result<Vec<u8>> {
    let mut encoder = zstd::Encoder::new(Vec::new(), level)?;
    encoder.include_checksum(true)?;
    encoder.write_all(archive)?;
    Ok(encoder.finish()?)
}

fn write(path: &Path, content: &[u8]) -> Result<()> {
    let save = || -> std::io::Result<()> {
        let mut file = BufWriter::new(File::create(path)?);
        file.write_all(content)?;
        file.into_inner()?.sync_all()
    };
    save().with_context(|| format!("cannot write `{}`", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compression_is_deterministic_and_undone_by_zstd() {
        let archive: Vec<u8> = (0..200_000u32).flat_map(|number| (number % 977).to_le_bytes()).collect();
        let compressed = compress(&archive, 19).unwrap();
        assert_eq!(compressed, compress(&archive, 19).unwrap());
        assert_eq!(zstd::decode_all(&compressed[..]).unwrap(), archive);
    }
}
