//! The numbers we promise, printed, never gated: these computers are shared and noisy.
//!
//! `bench` measures the machine, `bench NAME …` only what is named. Where there is a peer it runs in the same run.
//! `bench returned` tells how soon the host has the memory back that a container let go of; it wants a larger machine.
//! These are on QEMU's software processor. With ENGINE_TEST_STAGE=kvm, in `tests/nested/run --plain`, `boot`, `idle` and `returned` are on KVM.
//! `bench engine [NAME …]` holds our engine, run natively, against a private dockerd, `bench net [NAME …]` its networks;
//! `bench net linear` tells whether many networks stay as fast as few, `bench net vm` holds ports and the NAT of the machine
//! against QEMU's user network and passt, `bench files [ROW …]` shared folders against virtiofsd, `bench microvm [PART …]` our machine on
//! KVM against QEMU's (from the checkout's root); `bench soak [CYCLES]` tells whether its memory grows; `bench client` tells what
//! of a figure is the stock client's own time.
#![forbid(unsafe_code)]
#![expect(clippy::print_stdout, reason = "a benchmark prints")]

mod boot;
mod files;
mod idle;
mod memory;
mod microvm;
mod peer;
mod through;
mod throughput;

use anyhow::{Result, bail};
use tests_harness::{Engine, Stage};

/// One measurement on a machine that runs.
type Measure = fn(&Engine) -> Result<()>;

const MEASURES: [(&str, Measure); 7] = [
    ("image", boot::image),
    ("boot", boot::boot),
    ("memory", memory::overhead),
    ("idle", idle::idle),
    ("vsock", throughput::vsock),
    ("nat", throughput::nat),
    ("pull", throughput::pull),
];

fn main() -> Result<()> {
    if std::process::id() == 1 && std::env::args().next().as_deref() == Some(microvm::GUEST) {
        microvm::guest();
    }
    let wanted: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--").collect();
    match wanted.split_first() {
        Some((group, names)) if group == "engine" => return peer::compare(names),
        Some((group, names)) if group == "net" && names == ["vm"] => return through::measure(),
        Some((group, names)) if group == "net" => return peer::networks(names),
        Some((group, words)) if group == through::GUEST => return through::guest(words),
        Some((group, names)) if group == "files" => return files::measure(names),
        Some((group, words)) if group == files::GUEST => return files::guest(words),
        Some((group, port)) if group == peer::SERVE => {
            return peer::serve(port.first().map_or("", String::as_str));
        }
        Some((group, names)) if group == "microvm" => return microvm::measure(names),
        Some((group, _)) if group == "client" => return peer::client(),
        Some((group, _)) if group == "returned" => return memory::returned(),
        Some((group, count)) if group == "soak" => return peer::soak(count.first().map(String::as_str)),
        _ => {}
    }
    if let Some(unknown) = wanted.iter().find(|name| !MEASURES.iter().any(|(known, _)| known == name)) {
        bail!("there is no measurement `{unknown}`; there are {:?}", MEASURES.map(|(name, _)| name));
    }
    let engine = Engine::start(stage()?)?;
    for (name, measure) in MEASURES {
        if wanted.is_empty() || wanted.iter().any(|wanted| wanted == name) {
            println!("== {name}");
            measure(&engine)?;
        }
    }
    engine.finish()
}

/// Where the machine that is measured runs.
fn stage() -> Result<Stage> {
    match std::env::var_os("ENGINE_TEST_STAGE") {
        Some(_) => Stage::from_environment(),
        None => Ok(Stage::Qemu),
    }
}

/// `name: value unit`, one a line.
fn figure(name: &str, value: f64, unit: &str) {
    println!("{name:<44} {value:>10.2} {unit}");
}
