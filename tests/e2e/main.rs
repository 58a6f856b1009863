//! What users do, with real programs: every scenario runs in every stage (`ENGINE_TEST_STAGE`), on one private engine.
#![forbid(unsafe_code)]
#![expect(clippy::print_stderr, reason = "a test program talks to its reader")]

mod bad_input;
mod borrowed;
mod compose;
mod crash;
mod daemon_json;
mod docker;
mod exec;
mod faults;
mod files;
mod health;
mod host_network;
mod images;
mod inside;
mod life;
mod names;
mod nat;
mod network;
mod networks;
mod ports;
mod proxies;
mod registries;
mod run;
mod settings;
mod shares;
mod streams;
mod volumes;
mod watching;
mod work;

use anyhow::Result;
use libtest_mimic::{Arguments, Failed, Trial};
use std::process::ExitCode;
use std::sync::Arc;
use tests_harness::{Engine, Stage, Wishes, enter_private_namespaces};

/// One scenario: its name reads as a fact.
struct Scenario {
    name: &'static str,
    body: fn(&Engine) -> Result<()>,
}

/// Makes the stage `kvm` run the whole body too.
const WHOLE: &str = "ENGINE_TEST_WHOLE";

/// What the stage `kvm` runs when nothing is named: there a container takes ten seconds to start, and the machine's own
/// ways are what is new.
const ON_OUR_MACHINE: [&str; 15] = [
    "run::the_bundled_image_greets",
    "exec::commands_run_in_a_running_container",
    "images::an_image_is_pulled_and_run",
    "network::a_container_reaches_the_outside_through_the_nat",
    "network::names_resolve_through_the_host",
    "networks::published_ports_carry_streams_and_datagrams",
    "volumes::a_named_volume_outlives_its_containers",
    "streams::bulk_goes_in",
    "borrowed::freed_memory_is_the_hosts_again",
    "borrowed::an_idle_machine_gives_its_caches_back",
    "borrowed::a_removed_image_is_no_longer_on_the_hosts_disk",
    "life::every_thread_of_the_vm_process_is_confined",
    "life::data_survives_a_clean_restart",
    "life::a_machine_takes_on_other_memory",
    "crash::a_killed_vm_process_is_replaced",
];

/// Lists functions of the calling module as scenarios.
macro_rules! scenarios {
    ($($name:ident),* $(,)?) => {
        pub(crate) fn scenarios() -> Vec<crate::Scenario> {
            vec![$(crate::Scenario { name: concat!(module_path!(), "::", stringify!($name)), body: $name }),*]
        }
    };
}
use scenarios;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    // What this program does in containers, for want of a tool there.
    let played = match words.first().map(String::as_str) {
        Some(networks::ECHO) => Some(networks::echo()),
        Some(names::SERVE) => Some(names::serve()),
        Some(ports::SERVE) => Some(ports::serve()),
        Some(names::ASK) => Some(names::ask(&words[1..])),
        Some(inside::WATCH) => Some(inside::watch(&words[1..])),
        Some(inside::ATTACK) => Some(inside::attack(&words[1..])),
        Some(work::FILE) => Some(work::on_a_file(&words[1..])),
        Some(work::TREE) => Some(work::on_a_tree(&words[1..])),
        _ => None,
    };
    if let Some(result) = played {
        return match result {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("error: {error:?}");
                ExitCode::FAILURE
            }
        };
    }
    let mut arguments = Arguments::from_args();
    // One engine, and a machine of two processors: scenarios after one another, unless asked otherwise.
    arguments.test_threads.get_or_insert(1);
    match test(&arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:?}");
            ExitCode::FAILURE
        }
    }
}

fn test(arguments: &Arguments) -> Result<ExitCode> {
    let stage = Stage::from_environment()?;
    let mut scenarios = run::scenarios();
    scenarios.extend(streams::scenarios());
    scenarios.extend(exec::scenarios());
    scenarios.extend(images::scenarios());
    scenarios.extend(network::scenarios());
    scenarios.extend(networks::scenarios());
    scenarios.extend(ports::scenarios());
    scenarios.extend(names::scenarios());
    scenarios.extend(host_network::scenarios());
    scenarios.extend(compose::scenarios());
    scenarios.extend(docker::scenarios());
    scenarios.extend(registries::scenarios());
    scenarios.extend(proxies::scenarios());
    scenarios.extend(files::scenarios());
    scenarios.extend(volumes::scenarios());
    scenarios.extend(shares::scenarios());
    scenarios.extend(watching::scenarios());
    scenarios.extend(bad_input::scenarios());
    scenarios.extend(life::scenarios());
    scenarios.extend(settings::scenarios());
    scenarios.extend(health::scenarios());
    scenarios.extend(borrowed::scenarios());
    if stage == Stage::Native {
        scenarios.extend(nat::native_scenarios());
    }
    // Last: these kill what the others stand on.
    scenarios.extend(match stage {
        Stage::Native => {
            [daemon_json::native_scenarios(), crash::native_scenarios(), faults::native_scenarios()]
                .into_iter()
                .flatten()
                .collect::<Vec<_>>()
        }
        Stage::Qemu | Stage::Kvm => crash::machine_scenarios(),
    });
    let whole = stage != Stage::Kvm || arguments.filter.is_some() || std::env::var_os(WHOLE).is_some();
    if !whole {
        scenarios.retain(|scenario| ON_OUR_MACHINE.contains(&scenario.name.trim_start_matches("e2e::")));
    }
    if arguments.list {
        let trials = scenarios.into_iter().map(|scenario| Trial::test(scenario.name, || Ok(()))).collect();
        return Ok(libtest_mimic::run(arguments, trials).exit_code());
    }
    // In the machine around that stage nothing can be downloaded: another stage has to have been run.
    if stage != Stage::Kvm {
        images::debian_root()?;
    }
    if stage == Stage::Native {
        enter_private_namespaces()?;
    }
    let wishes = Wishes { cmdline: borrowed::SOON_IDLE, ..Wishes::default() };
    let engine = Arc::new(Engine::start_with(stage, wishes)?);
    let trials = scenarios.into_iter().map(|scenario| trial(scenario, &engine)).collect();
    let conclusion = libtest_mimic::run(arguments, trials);
    let finished = engine.finish();
    match finished {
        Ok(()) if !conclusion.has_failed() => Ok(ExitCode::SUCCESS),
        Ok(()) => Ok(ExitCode::from(101)),
        Err(error) => Err(error.context("the engine left something behind")),
    }
}

/// Says visibly that a check was not made.
fn skip(why: &str) {
    eprintln!("not checked: {why}");
}

fn trial(scenario: Scenario, engine: &Arc<Engine>) -> Trial {
    let engine = Arc::clone(engine);
    Trial::test(scenario.name, move || {
        (scenario.body)(&engine).map_err(|error| {
            let mut text = format!("{error:#}\n{}", engine.logs());
            // What it left would only fail the scenarios behind it.
            if let Err(error) = engine.remove_containers() {
                text += &format!("nor can its containers be removed: {error:#}\n");
            }
            Failed::from(text)
        })
    })
}
