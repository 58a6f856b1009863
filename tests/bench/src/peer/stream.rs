//! 64 MiB of short lines, through attach and out of the log.

use super::side::Side;
use crate::boot::mib;
use anyhow::{Result, ensure};
use std::time::Instant;
use tests_harness::{Layer, TestImage};

pub(super) const BYTES: u64 = 64 << 20;
const LINE: &str = "0123456789012345678901234567890123456789\n";
const IMAGE: &str = "lines:1";
/// Of each frame.
const FRAME_HEADER: u64 = 8;

/// A file of lines, printed four times.
pub(super) fn prepare(side: &Side) -> Result<()> {
    side.load(
        &TestImage::new(vec![Layer::busybox()?, Layer::files([("lines", lines_of(BYTES / 4))])?]),
        IMAGE,
    )
}

/// So many bytes of lines.
pub(super) fn lines_of(bytes: u64) -> Vec<u8> {
    let mut text = LINE.repeat((bytes as usize).div_ceil(LINE.len())).into_bytes();
    text.truncate(bytes as usize - 1);
    text.push(b'\n');
    text
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
