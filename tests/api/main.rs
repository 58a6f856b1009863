//! The same conversations with our engine and, where there is one, with dockerd.
//!
//! `conversations/` holds what is said, over HTTP or by the stock command line; `golden/` holds what dockerd 26.1 was
//! seen to answer, with everything taken out that differs from run to run; `differences.json` lists where we answer
//! otherwise, and why. A run compares our answers with the golden ones. With `ENGINE_API_SOCKET` it talks to the engine
//! on that socket instead of one of its own, and with `ENGINE_API_RECORD=1` as well it writes down the answers.
#![forbid(unsafe_code)]
#![expect(clippy::print_stderr, reason = "a test program talks to its reader")]

mod client;
mod compare;
mod conversation;
mod normal;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use libtest_mimic::{Arguments, Failed, Trial};
use serde_json::Value;
use tests_harness::{Engine, IMAGE, Stage, TestImage, enter_private_namespaces};

use client::Client;
use compare::Differences;

/// Whom the conversations are held with.
struct Partner {
    client: Client,
    record: bool,
    differences: Differences,
    /// Our own engine, when it is not somebody's on a socket.
    own: Option<Engine>,
}

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // Lists show everything there is: one conversation after another.
    arguments.test_threads.get_or_insert(1);
    match test(&arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:?}");
            ExitCode::FAILURE
        }
    }
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
}

fn test(arguments: &Arguments) -> Result<ExitCode> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder().join("conversations"))? {
        let name = entry?.file_name().into_string().ok().context("a name that is not text")?;
        names.push(name.strip_suffix(".txt").context("a conversation is a .txt file")?.to_owned());
    }
    names.sort();
    if arguments.list {
        let trials = names.into_iter().map(|name| Trial::test(name, || Ok(()))).collect();
        return Ok(libtest_mimic::run(arguments, trials).exit_code());
    }
    let differences = Differences::read(&folder().join("differences.json"))?;
    let record = std::env::var_os("ENGINE_API_RECORD").is_some();
    let (client, own) = match std::env::var_os("ENGINE_API_SOCKET") {
        Some(socket) => (Client::new(Path::new(&socket)), None),
        None if record => bail!("ENGINE_API_RECORD without ENGINE_API_SOCKET: name the socket of a dockerd"),
        None => {
            enter_private_namespaces()?;
            let engine = Engine::start(Stage::Native)?;
            (Client::new(&engine.docker_socket()), Some(engine))
        }
    };
    if own.is_none() {
        client.load(&TestImage::busybox()?.archive(IMAGE)?)?;
    }
    let partner = Arc::new(Partner { client, record, differences, own });
    let trials = names.into_iter().map(|name| trial(name, &partner)).collect();
    let conclusion = libtest_mimic::run(arguments, trials);
    if arguments.filter.is_none() && !record {
        for unseen in partner.differences.unseen() {
            eprintln!("no longer seen: {unseen}");
        }
    }
    let finished = match Arc::into_inner(partner).and_then(|partner| partner.own) {
        Some(engine) => engine.finish(),
        None => Ok(()),
    };
    match finished {
        Ok(()) => Ok(conclusion.exit_code()),
        Err(error) => Err(error.context("the engine left something behind")),
    }
}

fn trial(name: String, partner: &Arc<Partner>) -> Trial {
    let partner = Arc::clone(partner);
    Trial::test(name.clone(), move || {
        hold(&name, &partner).map_err(|error| {
            let logs = partner.own.as_ref().map(Engine::logs).unwrap_or_default();
            if let Some(engine) = &partner.own
                && let Err(error) = engine.remove_containers()
            {
                return Failed::from(format!("{error:#}\n{logs}"));
            }
            Failed::from(format!("{error:#}\n{logs}"))
        })
    })
}

/// Holds one conversation and compares, or records.
fn hold(name: &str, partner: &Partner) -> Result<()> {
    let text = std::fs::read_to_string(folder().join("conversations").join(format!("{name}.txt")))?;
    let steps = conversation::parse(&text).with_context(|| format!("{name}.txt"))?;
    let golden = folder().join("golden").join(format!("{name}.json"));
    partner.client.clear()?;
    let answers = conversation::hold(&steps, &partner.client);
    partner.client.clear()?;
    let answers = answers?;
    if partner.record {
        let text = serde_json::to_string_pretty(&Value::Array(answers))? + "\n";
        return std::fs::write(&golden, text).context("cannot write the golden answers");
    }
    let expected: Vec<Value> = serde_json::from_str(
        &std::fs::read_to_string(&golden)
            .with_context(|| format!("no golden answers: record them into {}", golden.display()))?,
    )?;
    if expected.len() != answers.len() {
        bail!("{} golden answers for {} steps: record them again", expected.len(), answers.len());
    }
    let mut wrong = Vec::new();
    for (expected, answer) in expected.iter().zip(&answers) {
        wrong.extend(partner.differences.of(name, expected, answer));
    }
    if wrong.is_empty() { Ok(()) } else { bail!("{} differences:\n{}", wrong.len(), wrong.join("\n")) }
}
