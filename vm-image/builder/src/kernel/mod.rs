//! The kernel of the VM, one of two: Debian's cloud kernel with modules, or our own configuration with everything built in.

mod debian;
mod module;
mod own;

use std::path::Path;

use anyhow::Result;
use clap::ValueEnum;

use self::module::Module;
pub(crate) use self::module::orders;
use crate::cache::Cache;

/// Which kernel an image gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Choice {
    /// Debian's 6.12 cloud kernel: nothing to compile
    Debian,
    /// our configuration of Debian's 6.12 source: compiled once, boots faster
    Own,
}

impl Choice {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Debian => "debian",
            Self::Own => "own",
        }
    }
}

/// A kernel that is known exactly, but need not have been unpacked or compiled yet.
pub(crate) enum Source {
    Debian(debian::Package),
    Own(own::Recipe),
}

/// A kernel ready for an image.
pub(crate) struct Kernel {
    /// What `uname -r` says.
    pub(crate) release: String,
    /// The compressed boot image, for boot loaders.
    pub(crate) image: Vec<u8>,
    /// The uncompressed ELF file, which PVH boot takes, where the kernel has one.
    pub(crate) vmlinux: Option<Vec<u8>>,
    /// Modules in load order.
    pub(crate) modules: Vec<Module>,
}

impl Source {
    /// Finds the kernel, downloading its package if this machine has never had it (or `refresh` asks).
    pub(crate) fn find(choice: Choice, cache: &Cache, folder: &Path, refresh: bool) -> Result<Self> {
        Ok(match choice {
            Choice::Debian => Self::Debian(debian::Package::find(cache, folder, refresh)?),
            Choice::Own => Self::Own(own::Recipe::find(cache, folder, refresh)?),
        })
    }

    /// Names everything the kernel is made from.
    pub(crate) fn inputs(&self) -> Vec<(String, String)> {
        match self {
            Self::Debian(package) => package.inputs(),
            Self::Own(recipe) => recipe.inputs(),
        }
    }

    /// Unpacks or compiles it.
    pub(crate) fn load(&self, cache: &Cache) -> Result<Kernel> {
        match self {
            Self::Debian(package) => package.load(),
            Self::Own(recipe) => recipe.load(cache),
        }
    }
}
