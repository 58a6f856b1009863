//! `guest-engine fsck`: proves that a data root that no engine uses is consistent, and repairs what is safe.
//!
//! Each owner checks what it owns: the store its pages, images their blobs, layers and writable layers, containers and
//! volumes their records and folders. Exit statuses are those of fsck(8).

mod containers;
mod volumes;

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Parser;
use guest_images::Findings;
use redb::Database;

use crate::store::Store;

/// Something was put right.
const REPAIRED: u8 = 1;
/// Something is still wrong.
const LEFT: u8 = 4;
/// The check itself failed.
const FAILED: u8 = 8;
/// It was called wrongly.
const USAGE: u8 = 16;

/// Check a data root that no engine uses
#[derive(Debug, Parser)]
#[command(
    name = "guest-engine fsck",
    after_help = "Exit status: 0 everything is in order; 1 something was repaired; 4 something is still wrong (5: both); \
                  8 the check could not be made, for example because an engine uses the data root; 16 wrong arguments."
)]
struct Flags {
    /// Where images and containers are kept
    #[arg(long, value_name = "FOLDER")]
    data_root: PathBuf,
    /// Repair what can be repaired without losing anything that still works
    #[arg(long)]
    repair: bool,
}

/// Runs with the arguments after `fsck`, and tells what was found.
#[expect(clippy::print_stdout, clippy::print_stderr, reason = "a check talks to the person who asked for it")]
pub fn main(arguments: impl Iterator<Item = std::ffi::OsString>) -> ExitCode {
    let flags = match Flags::try_parse_from(std::iter::once("guest-engine fsck".into()).chain(arguments)) {
        Ok(flags) => flags,
        Err(error) => {
            // To a closed pipe nothing can be said.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { USAGE } else { 0 });
        }
    };
    match check(&flags.data_root, flags.repair) {
        Ok(findings) => {
            for (sort, sentences) in [
                ("leftover", &findings.leftovers),
                ("repaired", &findings.repaired),
                ("damage", &findings.damage),
            ] {
                for sentence in sentences {
                    println!("{sort}: {sentence}");
                }
            }
            let (repaired, left) = (findings.repaired.len(), findings.damage.len());
            match (repaired, left) {
                (0, 0) => println!("{}: clean", flags.data_root.display()),
                _ => println!("{}: {repaired} repaired, {left} left", flags.data_root.display()),
            }
            ExitCode::from(if repaired > 0 { REPAIRED } else { 0 } | if left > 0 { LEFT } else { 0 })
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(FAILED)
        }
    }
}

fn check(data_root: &Path, repair: bool) -> anyhow::Result<Findings> {
    let path = data_root.join("engine.redb");
    if !path.is_file() {
        bail!("`{}` is not the data root of an engine: there is no `engine.redb` in it", data_root.display());
    }
    let mut findings = Findings::default();
    pages(&path, &mut findings)?;
    let store = Store::open(&path)?;
    let owners = containers::check(&store, &data_root.join("containers"), repair, &mut findings)?;
    volumes::check(&store, &data_root.join("volumes"), repair, &mut findings)?;
    let keys: HashSet<String> = owners.into_iter().collect();
    let images = guest_images::check(&data_root.join("images"), store.database(), &keys, repair)
        .map_err(anyhow::Error::new)
        .context("the image store cannot be checked")?;
    findings.add(images);
    Ok(findings)
}

/// The store's own pages and their checksums. Refuses a data root in use.
fn pages(path: &Path, findings: &mut Findings) -> anyhow::Result<()> {
    let mut database = match Database::open(path) {
        Err(redb::DatabaseError::DatabaseAlreadyOpen) => {
            bail!("an engine uses this data root: end it first, then check again")
        }
        opened => opened.with_context(|| format!("cannot open the metadata store `{}`", path.display()))?,
    };
    let sound = database
        .check_integrity()
        .with_context(|| format!("the metadata store `{}` is damaged beyond repair", path.display()))?;
    if !sound {
        findings
            .repaired
            .push(format!("the metadata store `{}` was put right by its own log", path.display()));
    }
    Ok(())
}
