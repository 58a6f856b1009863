//! Whether memory grows: many cycles of create, start, wait and delete on our engine alone, its memory before, between and
//! after, and the slope.

use super::side::Side;
use crate::boot::mib;
use anyhow::{Context, Result};
use std::time::{Duration, Instant};
use tests_harness::{Engine, Stage, enter_private_namespaces};

const CYCLES: usize = 10_000;
/// Before the first figure: caches and pools have their size then.
const WARM_UP: usize = 200;
const FIGURES: usize = 10;
const SETTLE: Duration = Duration::from_secs(12);

/// `count`: cycles, if not the ten thousand of the promise.
pub(crate) fn soak(count: Option<&str>) -> Result<()> {
    let cycles = match count {
        Some(text) => text.parse().with_context(|| format!("`{text}` is no number of cycles"))?,
        None => CYCLES,
    };
    enter_private_namespaces()?;
    let engine = Engine::start(Stage::Native)?;
    let side = Side::alone(&engine);
    let mut api = side.api()?;
    (0..WARM_UP).try_for_each(|_| api.cycle())?;
    let start = Instant::now();
    let mut points = Vec::new();
    println!("{:>8} {:>10} {:>12} {:>8}", "cycles", "MiB PSS", "descriptors", "threads");
    for figure in 0..=FIGURES {
        let done = cycles * figure / FIGURES;
        let before = points.last().map_or(0, |(cycles, _)| *cycles);
        (before..done).try_for_each(|_| api.cycle())?;
        // Idle threads end after ten seconds; their stacks are memory too.
        std::thread::sleep(SETTLE);
        let pss = mib(side.pss()?);
        let pid = engine.processes().find("guest-engine")?.pid;
        let count = |folder: &str| -> Result<usize> {
            Ok(std::fs::read_dir(format!("/proc/{pid}/{folder}"))?.count())
        };
        println!("{done:>8} {pss:>10.2} {:>12} {:>8}", count("fd")?, count("task")?);
        points.push((done, pss));
    }
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "slope: {:.1} bytes a cycle over {cycles} cycles in {seconds:.0} s",
        slope(&points) * f64::from(1 << 20)
    );
    engine.finish()
}

/// Least squares, of the second half: the first is still warming up.
#[expect(clippy::cast_precision_loss, reason = "a figure for people")]
fn slope(points: &[(usize, f64)]) -> f64 {
    let points = &points[points.len() / 2..];
    let count = points.len() as f64;
    let mean_x = points.iter().map(|(x, _)| *x as f64).sum::<f64>() / count;
    let mean_y = points.iter().map(|(_, y)| y).sum::<f64>() / count;
    let rise: f64 = points.iter().map(|(x, y)| (*x as f64 - mean_x) * (y - mean_y)).sum();
    let run: f64 = points.iter().map(|(x, _)| (*x as f64 - mean_x).powi(2)).sum();
    rise / run
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slope_is_that_of_the_second_half() {
        let points: Vec<(usize, f64)> =
            (0..10).map(|x| (x, if x < 5 { 100.0 } else { 3.0 * x as f64 })).collect();
        assert!((slope(&points) - 3.0).abs() < 1e-9);
    }
}
