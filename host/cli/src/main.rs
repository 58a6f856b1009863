//! `engine`: the command line. Parses, asks the daemon for a machine, speaks the Docker API, prints.
//!
//! It holds no state and touches no file of the machine. Names, flags, output and exit codes are Docker's wherever
//! Docker has the command.
#![forbid(unsafe_code)]

mod archive;
mod arguments;
mod containers;
mod control;
mod copy;
mod credentials;
mod docker;
mod lists;
mod machine;
mod networks;
mod output;
mod progress;
mod pull;
mod run;
mod session;
mod signals;
mod stats;
mod streams;
mod system;
mod template;
mod terminal;
mod volumes;
mod why;

use anyhow::{Context, Result};
use arguments::{Cli, Command, NetCommand};
use clap::{CommandFactory, Parser};
use control::Refusal;
use session::{Failed, Session};
use std::process::ExitCode;

/// Docker's exit code for a command line that is not understood.
const USAGE: u8 = 125;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let failed = error.use_stderr();
            // A closed pipe ends quietly.
            let _ = error.print();
            return if failed { ExitCode::from(USAGE) } else { ExitCode::SUCCESS };
        }
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            output::note(&format!("error: cannot start the async runtime: {error}"));
            return ExitCode::from(USAGE);
        }
    };
    let result = runtime.block_on(execute(cli));
    // A read of standard input may still be waiting; nobody waits for it.
    runtime.shutdown_background();
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => explain(&error),
    }
}

/// Prints the chain of causes and the hint; the exit code that goes with it.
fn explain(error: &anyhow::Error) -> ExitCode {
    let (code, error) = match error.downcast_ref::<Failed>() {
        Some(failed) => (failed.code, failed.inner()),
        None => (1, error),
    };
    if output::is_unread(error) {
        return ExitCode::SUCCESS;
    }
    output::note(&format!("error: {error}"));
    for cause in error.chain().skip(1) {
        output::note(&format!("  caused by: {cause}"));
    }
    if let Some(Refusal { hint: Some(hint), .. }) = error.downcast_ref::<Refusal>() {
        output::note(&format!("\nhint: {hint}"));
    }
    ExitCode::from(code)
}

async fn execute(cli: Cli) -> Result<u8> {
    let session = Session::new(cli.host.as_deref())?;
    let all = match &cli.command {
        Command::Run(args) => return run::run(&session, args).await,
        Command::Create(args) => run::create(&session, args).await.map(|()| true),
        Command::Exec(args) => return containers::exec(&session.docker().await?, args).await,
        Command::Machine(command) => return machine::machine(&session, command).await,
        Command::Ps(args) => lists::ps(&session.docker().await?, args).await.map(|()| true),
        Command::Images(args) => lists::images(&session.docker().await?, args).await.map(|()| true),
        Command::Logs(args) => containers::logs(&session.docker().await?, args).await.map(|()| true),
        Command::Start(args) => containers::start(&session.docker().await?, args).await,
        Command::Stop(args) => containers::stop(&session.docker().await?, "stop", args).await,
        Command::Restart(args) => containers::stop(&session.docker().await?, "restart", args).await,
        Command::Kill(args) => containers::kill(&session.docker().await?, args).await,
        Command::Wait(args) => containers::wait(&session.docker().await?, args).await,
        Command::Rm(args) => containers::rm(&session.docker().await?, args).await,
        Command::Pause(args) => containers::signal_verb(&session.docker().await?, "pause", args).await,
        Command::Unpause(args) => containers::signal_verb(&session.docker().await?, "unpause", args).await,
        Command::Rename { container, name } => {
            containers::rename(&session.docker().await?, container, name).await.map(|()| true)
        }
        Command::Port { container, port } => {
            containers::port(&session.docker().await?, container, port.as_deref()).await.map(|()| true)
        }
        Command::Top { words } => containers::top(&session.docker().await?, words).await.map(|()| true),
        Command::Diff { container } => {
            containers::diff(&session.docker().await?, container).await.map(|()| true)
        }
        Command::Commit(args) => containers::commit(&session.docker().await?, args).await.map(|()| true),
        Command::Save { output, images } => {
            let names: Vec<String> =
                images.iter().map(|name| format!("names={}", docker::encode(name))).collect();
            let path = format!("/images/get?{}", names.join("&"));
            archive::download(&session.docker().await?, &path, output.as_deref()).await.map(|()| true)
        }
        Command::Export { output, container } => {
            let path = format!("/containers/{}/export", docker::encode(container));
            archive::download(&session.docker().await?, &path, output.as_deref()).await.map(|()| true)
        }
        Command::Volume(command) => volumes::volume(&session.docker().await?, command).await,
        Command::Net(NetCommand::Why { target }) => why::why(&session.docker().await?, target).await,
        Command::Network(command) => networks::network(&session.docker().await?, command).await,
        Command::Pull(args) => {
            let docker = session.docker().await?;
            pull::pull(&docker, &args.image, args.platform.as_deref(), args.quiet).await?;
            output::line(&args.image).map(|()| true).context("cannot write to standard output")
        }
        Command::Push(args) => {
            pull::push(&session.docker().await?, &args.image, args.all_tags, args.quiet).await?;
            output::line(&args.image).map(|()| true).context("cannot write to standard output")
        }
        Command::History(args) => lists::history(&session.docker().await?, args).await.map(|()| true),
        Command::Cp(args) => copy::copy(&session.docker().await?, args).await.map(|()| true),
        Command::Stats(args) => stats::stats(&session.docker().await?, args).await,
        Command::Attach(args) => return run::attach(&session.docker().await?, args).await,
        Command::Load(args) => {
            pull::load(&session.docker().await?, args.input.as_deref(), args.quiet).await.map(|()| true)
        }
        Command::Tag(args) => system::tag(&session.docker().await?, args).await.map(|()| true),
        Command::Rmi(args) => system::rmi(&session.docker().await?, args).await,
        Command::Inspect(args) => system::inspect(&session.docker().await?, args).await,
        Command::Events(args) => system::events(&session.docker().await?, args).await.map(|()| true),
        Command::Version(args) => system::version(&session.docker().await?, args).await.map(|()| true),
        Command::Info(args) => system::info(&session.docker().await?, args).await.map(|()| true),
        Command::Env(args) => machine::env(&session, args).await.map(|()| true),
        Command::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "engine", &mut script);
            output::text(&String::from_utf8(script)?)
                .map(|()| true)
                .context("cannot write to standard output")
        }
    }?;
    Ok(u8::from(!all))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn what_follows_the_image_belongs_to_the_command() {
        let cli =
            Cli::try_parse_from(["engine", "run", "-it", "--rm", "debian", "sh", "-c", "exit 7"]).unwrap();
        let Command::Run(args) = cli.command else { panic!("it is a run") };
        assert!(args.interactive && args.tty && args.rm);
        assert_eq!((args.image(), args.command().join(" ").as_str()), ("debian", "sh -c exit 7"));
        let cli = Cli::try_parse_from(["engine", "exec", "web", "ls", "-l"]).unwrap();
        let Command::Exec(args) = cli.command else { panic!("it is an exec") };
        assert_eq!(
            (args.container(), args.command()),
            ("web", ["ls".to_owned(), "-l".to_owned()].as_slice())
        );
        let cli = Cli::try_parse_from(["engine", "run", "debian", "--rm"]).unwrap();
        let Command::Run(args) = cli.command else { panic!("it is a run") };
        assert!(!args.rm && args.command() == ["--rm"]);
    }
}
