//! Our own kernel: Debian's source package, our configuration, a build script. Compiled once for each set of inputs and kept
//! in the cache; a machine that never asks for it needs no compiler for it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use super::Kernel;
use super::debian::file_digest;
use crate::cache::Cache;
use crate::package::{self, Family};
use crate::{command, report, root};

const FAMILY: Family = Family { prefix: "linux-source-6.12", suffix: "" };
const CONFIG: &str = "x86_64.config";
const SCRIPT: &str = "build";

/// Everything that decides what the kernel will be.
pub(crate) struct Recipe {
    package: PathBuf,
    script: PathBuf,
    config: PathBuf,
    inputs: Vec<(String, String)>,
}

impl Recipe {
    pub(super) fn find(cache: &Cache, folder: &Path, refresh: bool) -> Result<Self> {
        let package = package::fetch(cache, FAMILY, refresh)?;
        let (script, config) = (folder.join(SCRIPT), folder.join(CONFIG));
        let compiler = command::output(Command::new("gcc").arg("-dumpfullversion"))?;
        let package_name = package.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let inputs = vec![
            (package_name, file_digest(&package)?),
            (SCRIPT.to_owned(), file_digest(&script)?),
            (CONFIG.to_owned(), file_digest(&config)?),
            ("gcc".to_owned(), compiler.trim().to_owned()),
        ];
        Ok(Self { package, script, config, inputs })
    }

    pub(super) fn inputs(&self) -> Vec<(String, String)> {
        self.inputs.clone()
    }

    pub(super) fn load(&self, cache: &Cache) -> Result<Kernel> {
        let hash = root::digest(serde_json::to_string(&self.inputs)?.as_bytes());
        let folder = match cache.find("kernel", &hash)? {
            Some(folder) => folder,
            None => cache.publish("kernel", &hash, |folder| self.compile(folder))?,
        };
        let read = |name: &str| {
            let path = folder.join(name);
            fs::read(&path).with_context(|| format!("cannot read `{}`", path.display()))
        };
        Ok(Kernel {
            release: String::from_utf8(read("release")?)?.trim().to_owned(),
            image: read("bzImage")?,
            vmlinux: Some(read("vmlinux")?),
            modules: Vec::new(),
        })
    }

    fn compile(&self, folder: &Path) -> Result<()> {
        report::step(format_args!("compiling the kernel; this takes about ten minutes on two cores"));
        let mut script = Command::new(&self.script);
        script.arg(&self.package).arg(&self.config).arg(folder).stdin(Stdio::null());
        // Its progress is a conversation, and our stdout is the result.
        script.stdout(std::io::stderr());
        let status = script.status().map_err(|error| command::cannot_run(&script, &error))?;
        ensure!(status.success(), "`{}` failed ({status})", self.script.display());
        Ok(())
    }
}
