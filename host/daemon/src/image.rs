//! `VmImage`: where the kernel and the initramfs are.

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use std::path::{Path, PathBuf};

/// A folder that `vm-image-builder` made.
#[derive(Debug, Clone)]
pub(crate) struct VmImage {
    pub(crate) dir: PathBuf,
    pub(crate) digest: String,
    pub(crate) cmdline: String,
}

#[derive(Deserialize)]
struct Manifest {
    digest: String,
    #[serde(default)]
    cmdline: String,
}

impl VmImage {
    /// Where the image is looked for: `ENGINE_IMAGE`, else `vm-image` beside this program.
    pub(crate) fn dir(engine_image: Option<PathBuf>, program: &Path) -> PathBuf {
        engine_image.unwrap_or_else(|| program.with_file_name("vm-image"))
    }

    pub(crate) fn open(dir: &Path) -> Result<Self> {
        let hint = "build it with `installer/quickstart`, or set ENGINE_IMAGE to the folder of a VM image";
        // The folder is usually a link that the next build moves on; a running machine stays on the image it began with.
        let Ok(dir) = dir.canonicalize() else {
            bail!("there is no VM image at `{}`: {hint}", dir.display())
        };
        let path = dir.join("manifest.json");
        let text = std::fs::read(&path).with_context(|| {
            format!("there is no VM image at `{}`: {hint}; cannot read `manifest.json`", dir.display())
        })?;
        let manifest: Manifest = serde_json::from_slice(&text)
            .with_context(|| format!("`{}` is damaged: build the VM image again", path.display()))?;
        let image = Self { dir, digest: manifest.digest, cmdline: manifest.cmdline };
        for file in [image.kernel(), image.initramfs()] {
            if !file.is_file() {
                bail!("the VM image has no `{}`: {hint}", file.display());
            }
        }
        Ok(image)
    }

    pub(crate) fn kernel(&self) -> PathBuf {
        self.dir.join("kernel")
    }

    /// The kernel as an ELF file, which an image with a kernel of its own has.
    pub(crate) fn vmlinux(&self) -> Option<PathBuf> {
        Some(self.dir.join("vmlinux")).filter(|path| path.is_file())
    }

    pub(crate) fn initramfs(&self) -> PathBuf {
        self.dir.join("initramfs")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_image_says_how_to_get_one() {
        let dir = tempfile::tempdir().unwrap();
        let error = VmImage::open(&dir.path().join("none")).unwrap_err().to_string();
        assert!(error.contains("installer/quickstart"), "{error}");
        std::fs::write(dir.path().join("manifest.json"), r#"{"digest":"sha256:1","other":1}"#).unwrap();
        let error = VmImage::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("has no `") && error.contains("kernel`"), "{error}");
    }
}
