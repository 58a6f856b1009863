//! Our engine, run natively, beside a private dockerd: the same steps on both in turn (A B A B), medians, and their ratio
//! beside the promise.
//!
//! dockerd, containerd, runc and crun are taken from `PATH`; nothing is installed. Both engines live in network and mount
//! namespaces of this program's own and in temporary folders.

mod api;
mod client;
mod dockerd;
mod images;
mod memory;
mod net;
mod run;
mod side;
mod soak;
mod stream;

use crate::boot::median;
use anyhow::{Result, bail};
use dockerd::Dockerd;
use side::Side;
use tests_harness::{Engine, Stage, enter_private_namespaces};

pub(crate) use client::client;
pub(crate) use net::{SERVE, serve};
pub(crate) use soak::soak;

/// What is promised about the ratio of ours to theirs.
#[derive(Clone, Copy)]
enum Promise {
    AtMost(f64),
    AtLeast(f64),
    /// Of our figure alone.
    Below(f64),
}

/// One step on one engine; answers its figure.
type Step = fn(&Side) -> Result<f64>;

struct Measure {
    name: &'static str,
    unit: &'static str,
    rounds: usize,
    promise: Promise,
    /// Once per engine, before and after the rounds.
    before: fn(&Side) -> Result<()>,
    step: Step,
    after: fn(&Side) -> Result<()>,
}

fn nothing(_: &Side) -> Result<()> {
    Ok(())
}

/// In the order in which they run: memory first, while nothing has run yet.
const MEASURES: [Measure; 16] = [
    Measure {
        name: "idle",
        unit: "MiB PSS",
        rounds: 1,
        promise: Promise::AtMost(0.25),
        before: nothing,
        step: memory::idle,
        after: nothing,
    },
    Measure {
        name: "container",
        unit: "MiB PSS",
        rounds: 1,
        promise: Promise::AtMost(0.4),
        before: nothing,
        step: memory::per_container,
        after: run::clear,
    },
    Measure {
        name: "run",
        unit: "ms",
        rounds: 15,
        promise: Promise::AtMost(0.33),
        before: nothing,
        step: run::run,
        after: nothing,
    },
    Measure {
        name: "api",
        unit: "ms",
        rounds: 15,
        promise: Promise::AtMost(0.33),
        before: nothing,
        step: run::api,
        after: nothing,
    },
    Measure {
        name: "exec",
        unit: "ms",
        rounds: 15,
        promise: Promise::AtMost(0.33),
        before: run::sleeper,
        step: run::exec,
        after: run::clear,
    },
    // What the engine does for it: the rest is the client's own start.
    Measure {
        name: "exec-api",
        unit: "ms",
        rounds: 15,
        promise: Promise::AtMost(0.33),
        before: run::sleeper,
        step: run::exec_only,
        after: run::clear,
    },
    Measure {
        name: "parallel",
        unit: "s for 50",
        rounds: 3,
        promise: Promise::AtMost(0.25),
        before: nothing,
        step: run::parallel,
        after: nothing,
    },
    Measure {
        name: "remove",
        unit: "s for 50",
        rounds: 3,
        promise: Promise::AtMost(0.25),
        before: nothing,
        step: run::remove,
        after: nothing,
    },
    Measure {
        name: "ps",
        unit: "ms",
        rounds: 15,
        promise: Promise::AtMost(0.5),
        before: run::thousand,
        step: run::list,
        after: run::clear,
    },
    // What the engine does for `ps`: the rest of that is the client's own start, and its reading of a thousand entries.
    Measure {
        name: "list",
        unit: "ms",
        rounds: 15,
        promise: Promise::AtMost(0.5),
        before: run::thousand,
        step: run::list_only,
        after: run::clear,
    },
    Measure {
        name: "load",
        unit: "s",
        rounds: 3,
        promise: Promise::AtMost(0.5),
        before: nothing,
        step: images::load,
        after: nothing,
    },
    Measure {
        name: "pull",
        unit: "s",
        rounds: 3,
        promise: Promise::AtMost(0.5),
        before: nothing,
        step: images::pull,
        after: nothing,
    },
    Measure {
        name: "attach",
        unit: "MiB/s",
        rounds: 3,
        promise: Promise::AtLeast(10.0),
        before: stream::prepare,
        step: stream::attach,
        after: nothing,
    },
    Measure {
        name: "logs",
        unit: "MiB/s",
        rounds: 3,
        promise: Promise::AtLeast(10.0),
        before: stream::fill,
        step: stream::logs,
        after: run::clear,
    },
    // The same without the client: a frame for each line, as clients other than Docker's own get them.
    Measure {
        name: "lines",
        unit: "MiB/s",
        rounds: 3,
        promise: Promise::AtLeast(10.0),
        before: stream::fill,
        step: stream::lines,
        after: run::clear,
    },
    Measure {
        name: "images",
        unit: "ms",
        rounds: 15,
        promise: Promise::AtMost(0.5),
        before: nothing,
        step: images::list,
        after: nothing,
    },
];

/// The same for networks.
const NETWORKS: [Measure; 4] = [
    Measure {
        name: "start",
        unit: "ms more",
        rounds: 15,
        promise: Promise::Below(15.0),
        before: nothing,
        step: net::start,
        after: nothing,
    },
    Measure {
        name: "between",
        unit: "MiB/s",
        rounds: 3,
        promise: Promise::AtLeast(1.0),
        before: net::two,
        step: net::between,
        after: nothing,
    },
    Measure {
        name: "publish",
        unit: "MiB/s",
        rounds: 3,
        promise: Promise::AtLeast(1.0),
        before: nothing,
        step: net::publish,
        after: nothing,
    },
    Measure {
        name: "connect",
        unit: "1/s",
        rounds: 3,
        promise: Promise::AtLeast(2.0),
        before: nothing,
        step: net::connect,
        after: run::clear,
    },
];

/// Measures those named, or all.
pub(crate) fn compare(wanted: &[String]) -> Result<()> {
    measure("engine", &MEASURES, wanted)
}

/// The same for networks, and how ours do when there are many.
pub(crate) fn networks(wanted: &[String]) -> Result<()> {
    if wanted.iter().any(|name| name == "linear") {
        enter_private_namespaces()?;
        let engine = Engine::start(Stage::Native)?;
        net::linear(&Side::alone(&engine))?;
        return engine.finish();
    }
    measure("net", &NETWORKS, wanted)
}

fn measure(group: &str, measures: &[Measure], wanted: &[String]) -> Result<()> {
    if let Some(unknown) = wanted.iter().find(|name| !measures.iter().any(|measure| measure.name == **name)) {
        let known: Vec<&str> = measures.iter().map(|measure| measure.name).collect();
        bail!("there is no measurement `{group} {unknown}`; there are {}", known.join(", "));
    }
    enter_private_namespaces()?;
    let engine = Engine::start(Stage::Native)?;
    // A dockerd that switches forwarding on itself drops everybody else's packets from then on.
    std::fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
    let peer = Dockerd::start(&engine)?;
    if group == "engine" {
        images::Large::make(&engine)?;
    }
    let sides = [Side::alone(&engine), Side::theirs(&engine, &peer)];
    for side in &sides[1..] {
        side.load(&tests_harness::TestImage::busybox()?, tests_harness::IMAGE)?;
    }
    println!("{:<12} {:>10} {:>10}  {:<10} {:>7}", "step", "ours", "dockerd", "", "ratio");
    for measure in measures {
        if wanted.is_empty() || wanted.iter().any(|name| name == measure.name) {
            let medians = rounds(measure, &sides)?;
            report(measure, medians);
            if measure.name == "api" {
                run::report_floor(medians[0])?;
            }
        }
    }
    peer.end()?;
    engine.finish()
}

fn rounds(measure: &Measure, sides: &[Side; 2]) -> Result<[f64; 2]> {
    for side in sides {
        (measure.before)(side)?;
    }
    let mut figures = [Vec::new(), Vec::new()];
    for _ in 0..measure.rounds {
        for (side, figures) in sides.iter().zip(&mut figures) {
            figures.push((measure.step)(side)?);
        }
    }
    for side in sides {
        (measure.after)(side)?;
    }
    Ok(figures.map(|figures| median(figures.into_iter())))
}

fn report(measure: &Measure, [ours, theirs]: [f64; 2]) {
    let ratio = ours / theirs;
    let (kept, promise) = match measure.promise {
        Promise::AtMost(limit) => (ratio <= limit, format!("<= {limit}")),
        Promise::AtLeast(limit) => (ratio >= limit, format!(">= {limit}")),
        Promise::Below(limit) => (ours <= limit, format!("<= {limit} {}", measure.unit)),
    };
    println!(
        "{:<12} {ours:>10.2} {theirs:>10.2}  {:<10} {ratio:>7.3}  promised {promise}: {}",
        measure.name,
        measure.unit,
        if kept { "kept" } else { "MISSED" }
    );
}
