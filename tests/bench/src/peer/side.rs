//! One of the two engines, as the steps see it.

use super::api::Api;
use super::dockerd::Dockerd;
use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use tests_harness::{Engine, Finished, Processes, TestImage, Timed};

pub(super) struct Side {
    socket: PathBuf,
    config: PathBuf,
    processes: Processes,
    /// The engine's own processes, by the names that the kernel knows.
    programs: &'static [&'static str],
    pub(super) registry: String,
    /// The large image.
    pub(super) large: super::images::Large,
}

impl Side {
    /// Ours.
    pub(super) fn alone(engine: &Engine) -> Self {
        Self {
            socket: engine.docker_socket(),
            config: engine.path("docker"),
            processes: engine.processes(),
            programs: &["guest-engine", "shim"],
            registry: engine.registry_name(),
            large: super::images::Large::made(engine),
        }
    }

    pub(super) fn theirs(engine: &Engine, peer: &Dockerd) -> Self {
        Self {
            socket: peer.socket(),
            config: engine.path("docker"),
            processes: peer.processes(),
            programs: &["dockerd", "containerd", "containerd-shim", "docker-proxy"],
            registry: engine.registry_name(),
            large: super::images::Large::made(engine),
        }
    }

    /// What listens at a socket and is no engine.
    pub(super) fn of_socket(socket: PathBuf, folder: &Path) -> Self {
        Self {
            socket,
            config: folder.join("docker"),
            processes: Processes::of(folder),
            programs: &[],
            registry: String::new(),
            large: super::images::Large::at(folder),
        }
    }

    /// The stock CLI.
    pub(super) fn docker<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Command {
        let mut command = Command::new("docker");
        command
            .args(arguments)
            .env("DOCKER_HOST", format!("unix://{}", self.socket.display()))
            .env("DOCKER_CONFIG", &self.config)
            .env("DOCKER_CLI_HINTS", "false")
            .env_remove("DOCKER_CONTEXT");
        command
    }

    pub(super) fn run<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Result<Finished> {
        Timed::new(self.docker(arguments)).within(std::time::Duration::from_secs(600)).run()
    }

    pub(super) fn load(&self, image: &TestImage, name: &str) -> Result<()> {
        Timed::new(self.docker(["load", "-q"])).input(image.archive(name)?).run()?.ok().map(drop)
    }

    /// Counts the bytes that a command prints.
    pub(super) fn count<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Result<u64> {
        let mut child = self
            .docker(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .stdin(Stdio::null())
            .spawn()?;
        let count = std::io::copy(&mut child.stdout.take().context("no pipe")?, &mut std::io::sink())?;
        ensure!(child.wait()?.success(), "the command failed after {count} bytes");
        Ok(count)
    }

    pub(super) fn api(&self) -> Result<Api> {
        Api::connect(&self.socket)
    }

    /// Proportional memory of the engine's own processes, in bytes; not of what runs in containers.
    pub(super) fn pss(&self) -> Result<u64> {
        let mut total = 0;
        for process in self.processes.list() {
            if self.programs.iter().any(|name| process.name.starts_with(name)) {
                total += crate::memory::pss(process.pid)?;
            }
        }
        Ok(total)
    }
}
