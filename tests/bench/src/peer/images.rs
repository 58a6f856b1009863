//! An image of 192 MiB in five layers that hardly compress: loaded, and pulled from a registry on loopback.

use super::side::Side;
use anyhow::Result;
use std::path::{Path, PathBuf};
use std::time::Instant;
use tests_harness::{Engine, Layer, TestImage};

const NAME: &str = "large";
const LAYERS: u64 = 4;
const LAYER_BYTES: usize = 48 << 20;

pub(super) struct Large {
    archive: PathBuf,
}

impl Large {
    /// Writes its archive and pushes it.
    pub(super) fn make(engine: &Engine) -> Result<()> {
        let mut layers = vec![Layer::busybox()?];
        for seed in 1..=LAYERS {
            layers.push(Layer::noise(&format!("noise{seed}"), LAYER_BYTES, seed)?);
        }
        let image = TestImage::new(layers);
        engine.registry().push(&image, NAME, "1")?;
        Ok(std::fs::write(Self::made(engine).archive, image.archive("large:1")?)?)
    }

    /// The one that was made.
    pub(super) fn made(engine: &Engine) -> Self {
        Self::at(&engine.path(""))
    }

    /// The one in a folder.
    pub(super) fn at(folder: &Path) -> Self {
        Self { archive: folder.join("large.tar") }
    }
}

fn timed(side: &Side, arguments: &[&str], image: &str) -> Result<f64> {
    let start = Instant::now();
    side.run(arguments.iter().copied())?.ok()?;
    let seconds = start.elapsed().as_secs_f64();
    side.run(["rmi", image])?.ok()?;
    Ok(seconds)
}

pub(super) fn load(side: &Side) -> Result<f64> {
    let archive = side.large.archive.display().to_string();
    timed(side, &["load", "-q", "-i", &archive], "large:1")
}

pub(super) fn pull(side: &Side) -> Result<f64> {
    let name = format!("{}/{NAME}:1", side.registry);
    timed(side, &["pull", "-q", &name], &name)
}

pub(super) fn list(side: &Side) -> Result<f64> {
    let start = Instant::now();
    side.run(["images"])?.ok()?;
    Ok(start.elapsed().as_secs_f64() * 1e3)
}
