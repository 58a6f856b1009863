//! 64 MiB of short lines, through attach and out of the log.

use super::side::Side;
use crate::boot::mib;
use anyhow::{Result, ensure};
use std::time::Instant;
use tests_harness::{Layer, TestImage};

const BYTES: u64 = 64 << 20;
const LINE: &str = "0123456789012345678901234567890123456789\n";
const IMAGE: &str = "lines:1";
/// Of each frame.
const FRAME_HEADER: u64 = 8;

/// A file of lines, printed four times.
pub(super) fn prepare(side: &Side) -> Result<()> {
    let mut text = LINE.repeat((BYTES as usize / 4).div_ceil(LINE.len())).into_bytes();
    text.truncate(BYTES as usize / 4 - 1);
    text.push(b'\n');
    side.load(&TestImage::new(vec![Layer::busybox()?, Layer::files([("lines", text)])?]), IMAGE)
}

fn rate(side: &Side, arguments: &[&str]) -> Result<f64> {
    let start = Instant::now();
    let count = side.count(arguments.iter().copied())?;
    ensure!(count == BYTES, "{count} bytes came out");
    Ok(mib(BYTES) / start.elapsed().as_secs_f64())
}

pub(super) fn attach(side: &Side) -> Result<f64> {
    rate(side, &["run", "--rm", IMAGE, "cat", "/lines", "/lines", "/lines", "/lines"])
}

pub(super) fn fill(side: &Side) -> Result<()> {
    prepare(side)?;
    side.run(["run", "-d", "--name", "lines", IMAGE, "cat", "/lines", "/lines", "/lines", "/lines"])?.ok()?;
    side.run(["wait", "lines"])?.ok().map(drop)
}

pub(super) fn lines(side: &Side) -> Result<f64> {
    let mut api = side.api()?;
    let start = Instant::now();
    let answer = api.call("GET", "/containers/lines/logs?stdout=1", "")?;
    let framed = BYTES + BYTES.div_ceil(LINE.len() as u64) * FRAME_HEADER;
    let wanted = framed..framed + 8 * FRAME_HEADER;
    ensure!(wanted.contains(&(answer.len() as u64)), "{} bytes came out", answer.len());
    Ok(mib(BYTES) / start.elapsed().as_secs_f64())
}

pub(super) fn logs(side: &Side) -> Result<f64> {
    rate(side, &["logs", "lines"])
}
