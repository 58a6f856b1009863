//! `vm-image-builder`: makes the kernel and the root file system of the VM from lists in `vm-image/`, reproducibly.
//!
//! The same inputs give the same bytes, wherever and whenever they are built; the manifest names the inputs. Results are kept
//! in the user's cache by the hash of the inputs, so a second call finds the first one's work. Owns no knowledge of machines:
//! `host-vmm` decides how to boot what this makes.
#![forbid(unsafe_code)]

mod cache;
mod command;
mod cpio;
mod elf;
mod hello;
mod image;
mod kernel;
mod list;
mod package;
mod report;
mod root;
mod tree;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;

use crate::cache::Cache;
use crate::image::Recipe;

/// Makes the VM image (kernel, root file system, manifest) and prints its path, sizes and digests
#[derive(Debug, Parser)]
#[command(name = "vm-image-builder", version)]
struct Arguments {
    /// Which kernel to use
    #[arg(long, value_enum, default_value = "debian")]
    kernel: kernel::Choice,
    /// Folder with the static programs init, guest-engine, shim and hello [default: the builder's own]
    #[arg(long, value_name = "FOLDER")]
    programs: Option<PathBuf>,
    /// Folder with rootfs/ and kernel/
    #[arg(long, value_name = "FOLDER", default_value = "vm-image")]
    source: PathBuf,
    /// Cache folder [default: ${XDG_CACHE_HOME:-~/.cache}/engine]
    #[arg(long, value_name = "FOLDER")]
    cache: Option<PathBuf>,
    /// Make a symbolic link to the finished image
    #[arg(long, value_name = "PATH")]
    link: Option<PathBuf>,
    /// Build into this new folder even if the cache has the image
    #[arg(long, value_name = "FOLDER", conflicts_with = "link")]
    output: Option<PathBuf>,
    /// How hard to compress: 19 is what releases ship; 9 is ten times faster for a sixth more bytes
    #[arg(long, default_value_t = 19, value_parser = clap::value_parser!(i32).range(1..=19))]
    level: i32,
    /// Look for a newer kernel package than the one downloaded before
    #[arg(long)]
    refresh: bool,
}

fn main() -> ExitCode {
    match build(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report::step(format_args!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn build(arguments: &Arguments) -> Result<()> {
    let programs = match &arguments.programs {
        Some(folder) => folder.clone(),
        None => {
            let own = std::env::current_exe()
                .context("cannot find the folder of this program; name it with --programs")?;
            own.parent().context("this program is in no folder")?.to_owned()
        }
    };
    let cache = Cache::open(arguments.cache.clone())?;
    // A kernel that takes ten minutes to compile must not hold up an image that needs none.
    let _lock = cache.lock(arguments.kernel.name(), || {
        report::step(format_args!("waiting for another vm-image-builder to finish"))
    })?;
    let Arguments { kernel, source, level, refresh, .. } = arguments;
    let recipe = Recipe::gather(*kernel, &cache, source, &programs, *level, *refresh)?;
    let folder = match &arguments.output {
        Some(folder) => {
            std::fs::create_dir(folder)
                .with_context(|| format!("cannot make the new folder `{}`", folder.display()))?;
            recipe.build(&cache, folder)?;
            folder.clone()
        }
        None => recipe.find_or_build(&cache)?,
    };
    if let Some(link) = &arguments.link {
        cache::link(link, &folder)?;
    }
    image::Manifest::read(&folder)?.print(&folder);
    Ok(())
}
