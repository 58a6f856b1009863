//! `engine machine …` and `engine env`: conversations with the daemon.

use crate::arguments::{EnvArgs, FormatArgs, MachineCommand};
use crate::control::Daemon;
use crate::output::{line, note, text};
use crate::run::create::memory_bytes;
use crate::session::{Session, answer, shut_down, watch};
use crate::template::Template;
use anyhow::{Context, Result, bail};
use host_api::{LaterSetting, LogSource, MachineInfo, MachineSettings, MachineState, Reply, Request};
use std::io::{BufRead, IsTerminal};

/// Carries out the command; the exit code for this process.
pub(crate) async fn machine(session: &Session, command: &MachineCommand) -> Result<u8> {
    match command {
        MachineCommand::Start => watch(&session.daemon().await?, &Request::Start).await?,
        // Without a daemon there is no machine: nothing has to be started to stop it.
        MachineCommand::Stop if !Daemon::of_user()?.is_running().await => {}
        MachineCommand::Stop => watch(&session.daemon().await?, &Request::Stop).await?,
        MachineCommand::Restart => watch(&session.daemon().await?, &Request::Restart).await?,
        MachineCommand::Status(args) => status(session, args).await?,
        MachineCommand::Info(args) => info(session, args).await?,
        MachineCommand::Set { settings } => set(session, settings).await?,
        MachineCommand::Logs { follow, engine, vmm, daemon } => {
            let source = match (engine, vmm, daemon) {
                (true, ..) => LogSource::Engine,
                (_, true, _) => LogSource::Vmm,
                (.., true) => LogSource::Daemon,
                _ => LogSource::Console,
            };
            logs(session, source, *follow).await?;
        }
        MachineCommand::Shell { image, command } => {
            let (args, create) = crate::run::machine_shell(image, command)?;
            return crate::run::run_created(session, &args, &create).await;
        }
        MachineCommand::Rm { force } => {
            if !*force && !confirmed("This deletes the machine with all its images, containers and volumes.")?
            {
                bail!("nothing was deleted");
            }
            watch(&session.daemon().await?, &Request::Remove).await?;
        }
        MachineCommand::Shutdown if !Daemon::of_user()?.is_running().await => {}
        MachineCommand::Shutdown => shut_down(&session.daemon().await?).await?,
    }
    Ok(0)
}

fn confirmed(question: &str) -> Result<bool> {
    if !std::io::stdin().is_terminal() {
        bail!("{question} Repeat the command with --force to do so");
    }
    note(&format!("{question} Type `yes` to go on:"));
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer)?;
    Ok(answer.trim() == "yes")
}

async fn status(session: &Session, args: &FormatArgs) -> Result<()> {
    let daemon = session.daemon().await?;
    let Reply::Status(status) = daemon.ask(&Request::Status).await?.next().await? else {
        bail!("the daemon answered something else than the status");
    };
    if let Some(format) = &args.format {
        return Ok(line(&Template::parse(format)?.render(&serde_json::to_value(&status)?)?)?);
    }
    line(status.state.name())?;
    match &status.state {
        MachineState::Stopped { reason: Some(why) } | MachineState::Running { trouble: Some(why), .. } => {
            note(why)
        }
        _ => {}
    }
    Ok(())
}

async fn set(session: &Session, words: &[String]) -> Result<()> {
    let settings = settings(words)?;
    let daemon = session.daemon().await?;
    let Reply::Set { now, later, restart, overridden } = answer(&daemon, &Request::Set(settings)).await?
    else {
        bail!("the daemon answered something else than what it has set");
    };
    for name in overridden {
        note(&format!("`{name}` is set where the daemon was started, and wins over what is set here"));
    }
    now.iter().for_each(|sentence| note(sentence));
    later_settings(&later, restart).iter().for_each(|sentence| note(sentence));
    Ok(())
}

/// What is said about settings that count from the machine's next start; `restart` when it runs.
fn later_settings(later: &[LaterSetting], restart: bool) -> Vec<String> {
    let how = if restart { ": it runs without until `engine machine restart`" } else { "" };
    let (with_reason, plain): (Vec<_>, Vec<_>) = later.iter().partition(|setting| setting.why.is_some());
    let mut sentences: Vec<String> = with_reason
        .into_iter()
        .filter_map(|LaterSetting { name, why }| {
            Some(format!("{}; so `{name}` counts from the machine's next start{how}", why.as_ref()?))
        })
        .collect();
    let names: Vec<String> = plain.iter().map(|setting| format!("`{}`", setting.name)).collect();
    let count = if names.len() == 1 { "counts" } else { "count" };
    if !names.is_empty() {
        sentences.push(format!("{} {count} from the machine's next start{how}", names.join(" and ")));
    }
    sentences
}

/// `cpus=4 memory=8g disk=128g backend=kvm`.
fn settings(words: &[String]) -> Result<MachineSettings> {
    let mut settings = MachineSettings::default();
    for word in words {
        let (name, value) = word
            .split_once('=')
            .with_context(|| format!("`{word}` is not NAME=VALUE, such as `memory=4g`"))?;
        // In the unit the setting has; what is no whole number of them would not be what was asked for.
        let whole = |shift: u32, unit: &str| {
            let bytes = memory_bytes(value)?;
            match bytes & ((1 << shift) - 1) {
                0 => Ok(bytes >> shift),
                _ => bail!("`{word}`: the {name} is a whole number of {unit}, such as `{name}=64g`"),
            }
        };
        match name {
            "cpus" => {
                settings.cpus =
                    Some(value.parse().with_context(|| format!("`{value}` is not a number of CPUs"))?);
            }
            "memory" => {
                let mib = u32::try_from(whole(20, "MiB")?);
                settings.memory_mib = Some(mib.with_context(|| format!("`{value}` is too much memory"))?);
            }
            "disk" => settings.disk_gib = Some(whole(30, "GiB")?.try_into()?),
            "backend" => settings.backend = Some(value.to_owned()),
            _ => bail!("the machine has no setting `{name}`: there are cpus, memory, disk and backend"),
        }
    }
    Ok(settings)
}

async fn info(session: &Session, args: &FormatArgs) -> Result<()> {
    let daemon = session.daemon().await?;
    let Reply::Info(info) = daemon.ask(&Request::Info).await?.next().await? else {
        bail!("the daemon answered something else than the machine's figures");
    };
    match &args.format {
        Some(format) => Ok(line(&Template::parse(format)?.render(&serde_json::to_value(&info)?)?)?),
        None => Ok(text(&describe(&info))?),
    }
}

fn describe(info: &MachineInfo) -> String {
    let mib = |bytes: u64| format!("{} MiB", bytes >> 20);
    let mut rows = vec![
        ("Machine", info.status.machine.clone()),
        ("State", info.status.state.name().to_owned()),
        ("Back end", format!("{} ({})", info.backend.backend, info.backend.accelerator)),
        ("Reason", info.backend.reason.clone()),
        ("CPUs", info.cpus.to_string()),
        ("Memory", format!("{} MiB", info.memory_mib)),
        (
            "Disk",
            format!(
                "{} ({} of {} used on the host)",
                info.disk.display(),
                mib(info.disk_allocated_bytes),
                mib(info.disk_size_bytes)
            ),
        ),
        (
            "Image",
            format!("{} ({})", info.image.display(), info.image_digest.as_deref().unwrap_or("not built yet")),
        ),
        ("Docker API", format!("unix://{}", info.docker_socket.display())),
    ];
    match &info.status.state {
        MachineState::Stopped { reason: Some(reason) } => rows.insert(2, ("Stopped because", reason.clone())),
        MachineState::Running { trouble: Some(trouble), .. } => rows.insert(2, ("Trouble", trouble.clone())),
        _ => {}
    }
    if let Some(guest) = &info.guest {
        let used = guest.memory_total_bytes.saturating_sub(guest.memory_available_bytes);
        rows.push(("Kernel", guest.kernel.clone()));
        rows.push(("Up for", format!("{} s", guest.uptime_s)));
        rows.push((
            "Memory used",
            format!(
                "{} of {}, and {} cached",
                mib(used),
                mib(guest.memory_total_bytes),
                mib(guest.memory_cached_bytes)
            ),
        ));
        rows.push((
            "Disk used",
            format!("{} of {}", mib(guest.disk_used_bytes), mib(guest.disk_total_bytes)),
        ));
    }
    if let Some(held) = info.memory_held_bytes {
        let mut text = format!("{} of {} MiB", mib(held), info.memory_mib);
        if let Some(given_back) = info.memory_given_back_bytes {
            text += &format!(" ({} given back so far)", mib(given_back));
        }
        rows.push(("Memory held", text));
    }
    if let Some(streams) = info.open_streams {
        rows.push(("Connections", format!("{streams} between host and guest")));
    }
    rows.iter().map(|(name, value)| format!("{:<16} {value}\n", format!("{name}:"))).collect()
}

async fn logs(session: &Session, source: LogSource, follow: bool) -> Result<()> {
    let daemon = session.daemon().await?;
    let mut replies = daemon.ask(&Request::Logs { source, follow }).await?;
    while let Reply::Text { text: part } = replies.next().await? {
        text(&part)?;
    }
    Ok(())
}

/// Prints what makes a shell, and the docker CLI in it, use this engine. The daemon is started, so that the socket is
/// there for whoever connects next.
pub(crate) async fn env(session: &Session, args: &EnvArgs) -> Result<()> {
    let daemon = session.daemon().await?;
    let socket = format!("unix://{}", daemon.home().docker_socket().display());
    if args.socket {
        return Ok(line(&socket)?);
    }
    let program = std::env::current_exe().context("cannot find the folder of this program")?;
    let folder = program.parent().context("this program is in no folder")?;
    line(&format!("export PATH={}:\"$PATH\"", quoted(&folder.display().to_string())))?;
    line(&format!("export DOCKER_HOST={}", quoted(&socket)))?;
    note("# To use it in this shell: eval \"$(engine env)\"");
    Ok(())
}

/// For a POSIX shell.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use host_api::{BackendChoice, GuestStatus, MachineStatus};

    #[test]
    fn settings_are_read_in_the_units_people_use() {
        let read =
            |words: &[&str]| settings(&words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>());
        let expected = MachineSettings {
            cpus: Some(4),
            memory_mib: Some(1536),
            disk_gib: Some(1024),
            backend: Some("kvm".into()),
        };
        assert_eq!(read(&["cpus=4", "memory=1.5g", "disk=1t", "backend=kvm"]).unwrap(), expected);
        for (word, part) in [
            ("cpus", "NAME=VALUE"),
            ("cpus=two", "`two`"),
            ("memory=4096", "whole number of MiB"),
            ("memory=9e9g", "invalid size"),
            ("memory=8e6g", "too much"),
            ("disk=100m", "whole number of GiB"),
            ("swap=1g", "no setting `swap`"),
        ] {
            let error = read(&[word]).unwrap_err().to_string();
            assert!(error.contains(part), "{word}: {error}");
        }
    }

    #[test]
    fn what_counts_later_is_said_with_how_to_have_it_now() {
        let setting = |name: &str, why: Option<&str>| LaterSetting {
            name: name.to_owned(),
            why: why.map(str::to_owned),
        };
        let later = [setting("memory", None), setting("disk", Some("it is full")), setting("backend", None)];
        assert_eq!(
            later_settings(&later, true),
            [
                "it is full; so `disk` counts from the machine's next start: it runs without until `engine machine restart`",
                "`memory` and `backend` count from the machine's next start: it runs without until `engine machine restart`",
            ]
        );
        assert_eq!(later_settings(&later[..1], false), ["`memory` counts from the machine's next start"]);
        assert!(later_settings(&[], true).is_empty());
    }

    #[test]
    fn info_tells_the_back_end_and_why() {
        let info = MachineInfo {
            status: MachineStatus {
                machine: "default".into(),
                state: MachineState::Stopped { reason: Some("it was killed".into()) },
            },
            backend: BackendChoice {
                backend: "qemu".into(),
                accelerator: "tcg".into(),
                reason: "KVM emulates".into(),
            },
            cpus: 2,
            memory_mib: 1024,
            disk: "/d".into(),
            disk_size_bytes: 64 << 30,
            disk_allocated_bytes: 5 << 20,
            image: "/i".into(),
            image_digest: None,
            docker_socket: "/s".into(),
            guest: Some(GuestStatus {
                kernel: "6.12".into(),
                uptime_s: 7,
                memory_total_bytes: 1000 << 20,
                memory_available_bytes: 900 << 20,
                memory_cached_bytes: 50 << 20,
                disk_total_bytes: 64 << 30,
                disk_used_bytes: 3 << 20,
            }),
            open_streams: None,
            memory_held_bytes: Some(300 << 20),
            memory_given_back_bytes: Some(900 << 20),
        };
        let text = describe(&info);
        let held = "300 MiB of 1024 MiB (900 MiB given back so far)";
        let used = "100 MiB of 1000 MiB, and 50 MiB cached";
        for part in
            ["qemu (tcg)", "KVM emulates", "it was killed", "5 MiB of 65536 MiB", "unix:///s", held, used]
        {
            assert!(text.contains(part), "{part} in {text}");
        }
    }

    #[test]
    fn paths_are_quoted_for_the_shell() {
        assert_eq!(quoted("/it's"), "'/it'\\''s'");
    }
}
