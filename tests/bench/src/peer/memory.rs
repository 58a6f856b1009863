//! Proportional memory of the engines' own processes.

use super::run;
use super::side::Side;
use crate::boot::mib;
use anyhow::Result;
use std::time::Duration;

/// For allocators to give back what they held for a burst.
const SETTLE: Duration = Duration::from_secs(5);

pub(super) fn idle(side: &Side) -> Result<f64> {
    std::thread::sleep(SETTLE);
    Ok(mib(side.pss()?))
}

pub(super) fn per_container(side: &Side) -> Result<f64> {
    let before = mib(side.pss()?);
    run::start_many(side)?;
    std::thread::sleep(SETTLE);
    #[expect(clippy::cast_precision_loss, reason = "fifty")]
    let many = run::MANY as f64;
    Ok((mib(side.pss()?) - before) / many)
}
