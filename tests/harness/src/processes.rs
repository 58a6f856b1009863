//! `Processes`: what runs on behalf of one temporary home, found by looking at all processes.

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use std::path::Path;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    pub pid: i32,
    pub name: String,
    pub arguments: String,
}

impl Process {
    /// What the process has of the host's memory, shared or not, by the kernel's word (`VmRSS`).
    pub fn resident_bytes(&self) -> Result<u64> {
        let path = format!("/proc/{}/status", self.pid);
        let status = std::fs::read_to_string(&path).with_context(|| format!("cannot read `{path}`"))?;
        let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"));
        Ok(kib.with_context(|| format!("`{path}` has no VmRSS"))?.trim().parse::<u64>()? * 1024)
    }
}

/// A view of the processes that name a folder in their environment or arguments.
pub struct Processes {
    mark: String,
}

impl Processes {
    /// Processes started with `ENGINE_HOME` set to `home`, or with a path below it among their arguments.
    pub fn of(home: &Path) -> Self {
        Self { mark: home.display().to_string() }
    }

    pub fn list(&self) -> Vec<Process> {
        let own = std::process::id().to_string();
        let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
        entries
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name().to_string_lossy().into_owned();
                let pid = name.parse().ok().filter(|_| name != own)?;
                // What ends while we look is not there.
                let arguments = std::fs::read(entry.path().join("cmdline")).ok()?;
                let environment = std::fs::read(entry.path().join("environ")).unwrap_or_default();
                let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).replace('\0', " ");
                let (arguments, environment) = (text(&arguments), text(&environment));
                let ours = arguments.contains(&self.mark)
                    || environment.split(' ').any(|word| word == format!("ENGINE_HOME={}", self.mark));
                let name = std::fs::read_to_string(entry.path().join("comm")).ok()?.trim().to_owned();
                // A zombie is only waiting to be reaped by whoever inherits it.
                let alive = !arguments.is_empty();
                (ours && alive).then_some(Process { pid, name, arguments })
            })
            .collect()
    }

    /// The one process called `name` (as the kernel truncates it, 15 bytes).
    pub fn find(&self, name: &str) -> Result<Process> {
        let name: String = name.chars().take(15).collect();
        let mut found: Vec<Process> =
            self.list().into_iter().filter(|process| process.name == name).collect();
        match (found.pop(), found.len()) {
            (Some(process), 0) => Ok(process),
            (None, _) => bail!("no process `{name}` runs for `{}`; there are {:?}", self.mark, self.list()),
            (Some(_), more) => bail!("{} processes `{name}` run for `{}`", more + 1, self.mark),
        }
    }

    /// SIGKILL for that process.
    pub fn kill(&self, name: &str) -> Result<()> {
        let process = self.find(name)?;
        signal(process.pid, Signal::KILL)
    }

    /// Waits until none is left, then says which are.
    pub fn expect_none(&self) -> Result<()> {
        let gone = crate::wait_until("every process of the engine has ended", || {
            Ok(self.list().is_empty().then_some(()))
        });
        gone.map_err(|error| error.context(format!("left: {:?}", self.list())))
    }

    /// Waits until each of `processes` has ended, whatever was begun since.
    pub fn expect_ended(&self, processes: &[Process]) -> Result<()> {
        let left =
            || self.list().into_iter().filter(|process| processes.contains(process)).collect::<Vec<_>>();
        crate::wait_until("the processes have ended", || Ok(left().is_empty().then_some(())))
            .map_err(|error| error.context(format!("left: {:?}", left())))
    }

    /// Ends whatever is left, for cleaning up after a failure.
    pub fn kill_all(&self) {
        for process in self.list() {
            let _ = signal(process.pid, Signal::KILL);
        }
    }
}

fn signal(pid: i32, signal: Signal) -> Result<()> {
    match Pid::from_raw(pid) {
        Some(pid) => Ok(kill_process(pid, signal)?),
        None => bail!("{pid} is no process"),
    }
}
