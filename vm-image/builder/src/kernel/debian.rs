//! Debian's cloud kernel: the boot image and the listed modules out of the package, without installing it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};

use super::Kernel;
use super::module::Modules;
use crate::cache::Cache;
use crate::package::{self, Family};
use crate::{command, list, report, root};

const FAMILY: Family = Family { prefix: "linux-image-6.12.", suffix: "-cloud-amd64" };

/// A downloaded package and the list of modules to take from it.
pub(crate) struct Package {
    path: PathBuf,
    digest: String,
    modules: Vec<list::Module>,
    modules_digest: String,
}

impl Package {
    pub(super) fn find(cache: &Cache, folder: &Path, refresh: bool) -> Result<Self> {
        let list_path = folder.join("modules.list");
        let text = fs::read_to_string(&list_path)
            .with_context(|| format!("cannot read `{}`", list_path.display()))?;
        let modules = list::modules(&text).with_context(|| list_path.display().to_string())?;
        let path = package::fetch(cache, FAMILY, refresh)?;
        let digest = file_digest(&path)?;
        Ok(Self { path, digest, modules, modules_digest: root::digest(text.as_bytes()) })
    }

    pub(super) fn inputs(&self) -> Vec<(String, String)> {
        vec![
            (self.path.file_name().unwrap_or_default().to_string_lossy().into_owned(), self.digest.clone()),
            ("modules.list".to_owned(), self.modules_digest.clone()),
        ]
    }

    pub(super) fn load(&self) -> Result<Kernel> {
        report::step(format_args!("unpacking the kernel package"));
        let content =
            Content::read(&self.path).with_context(|| format!("cannot unpack `{}`", self.path.display()))?;
        let modules = Modules::new(content.modules.keys().map(String::as_str), &content.builtin);
        let modules =
            modules.in_load_order(&self.modules, |path| decompress(path, &content.modules[path]))?;
        Ok(Kernel { release: content.release, image: content.image, vmlinux: None, modules })
    }
}

/// What an image needs of the package.
struct Content {
    release: String,
    image: Vec<u8>,
    builtin: String,
    /// Compressed modules by their path below `lib/modules/<release>`.
    modules: BTreeMap<String, Vec<u8>>,
}

impl Content {
    fn read(package: &Path) -> Result<Self> {
        let mut unpack = Command::new("dpkg-deb");
        unpack.arg("--fsys-tarfile").arg(package).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = unpack.spawn().map_err(|error| command::cannot_run(&unpack, &error))?;
        let stream = child.stdout.take().context("dpkg-deb has no output")?;
        let content = Self::from_tar(stream);
        let status = child.wait()?;
        let content = content?;
        ensure!(status.success(), "dpkg-deb failed ({status})");
        Ok(content)
    }

    fn from_tar(mut stream: impl Read) -> Result<Self> {
        let (mut release, mut image, mut builtin, mut modules) = (None, None, None, BTreeMap::new());
        for entry in tar::Archive::new(&mut stream).entries()? {
            let mut entry = entry?;
            if !entry.header().entry_type().is_file() {
                continue;
            }
            let path = entry.path()?.to_string_lossy().into_owned();
            let path = path.trim_start_matches("./");
            let path = path.strip_prefix("usr/").unwrap_or(path);
            if let Some(name) = path.strip_prefix("boot/vmlinuz-") {
                release = Some(name.to_owned());
                image = Some(bytes(&mut entry)?);
            } else if let Some((_, path)) =
                path.strip_prefix("lib/modules/").and_then(|rest| rest.split_once('/'))
            {
                if path == "modules.builtin" {
                    builtin = Some(String::from_utf8(bytes(&mut entry)?)?);
                } else if path.ends_with(".ko") || path.ends_with(".ko.xz") {
                    modules.insert(path.to_owned(), bytes(&mut entry)?);
                }
            }
        }
        // dpkg-deb pads the archive; a reader that stops early would make it fail.
        std::io::copy(&mut stream, &mut std::io::sink())?;
        Ok(Self {
            release: release.context("the package holds no `boot/vmlinuz-…`")?,
            image: image.context("the package holds no kernel")?,
            builtin: builtin.context("the package holds no `modules.builtin`")?,
            modules,
        })
    }
}

fn bytes(entry: &mut impl Read) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    entry.read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn decompress(path: &str, content: &[u8]) -> Result<Vec<u8>> {
    if !path.ends_with(".xz") {
        return Ok(content.to_vec());
    }
    let mut input = temporary_file()?;
    input.write_all(content)?;
    input.rewind()?;
    let mut xz = Command::new("xz");
    xz.args(["--decompress", "--stdout"]).stdin(input);
    let output = command::run(&mut xz)?;
    ensure!(output.status.success(), "xz failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(output.stdout)
}

/// A file without a name, so that xz can read while we collect its output without a second thread.
fn temporary_file() -> Result<File> {
    let name = c"module";
    let fd = rustix::fs::memfd_create(name, rustix::fs::MemfdFlags::CLOEXEC)
        .context("cannot make a file in memory")?;
    Ok(File::from(fd))
}

/// Digest of a file, read in pieces.
pub(super) fn file_digest(path: &Path) -> Result<String> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut file = File::open(path).with_context(|| format!("cannot open `{}`", path.display()))?;
    loop {
        match file.read(&mut buffer).with_context(|| format!("cannot read `{}`", path.display()))? {
            0 => return Ok(hex::encode(hash.finalize())),
            length => hash.update(&buffer[..length]),
        }
    }
}
