//! `Engine`: a private engine for one test program, in either stage.

use crate::command::{Finished, Running, Timed, run, wait_until};
use crate::image::{Layer, TestImage};
use crate::processes::Processes;
use crate::registry::Registry;
use crate::world::{ADDRESS, World};
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use tempfile::TempDir;

/// The image every scenario can count on.
pub const IMAGE: &str = "busybox:test";

/// The stock docker-compose, as `installer/setup` calls it.
const COMPOSE: &str = "docker-compose-2.40.3";

/// The VM image in an engine's home, if it is not the one that was built.
const IMAGE_DIR: &str = "vm-image";

/// Where the engine runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// `guest-engine --native` in namespaces of its own.
    Native,
    /// In the VM, on QEMU.
    Qemu,
    /// In the VM, on a machine of ours, where KVM works.
    Kvm,
}

impl Stage {
    /// The stage named by `ENGINE_TEST_STAGE`.
    pub fn from_environment() -> Result<Self> {
        match std::env::var("ENGINE_TEST_STAGE").as_deref() {
            Ok("native") => Ok(Self::Native),
            Ok("qemu") => Ok(Self::Qemu),
            Ok("kvm") => Ok(Self::Kvm),
            Ok(other) => bail!("ENGINE_TEST_STAGE is `{other}`: use native, qemu or kvm"),
            Err(_) => bail!(
                "ENGINE_TEST_STAGE is not set: run `tests/run native`, `tests/run qemu` or `tests/run nested-kvm`"
            ),
        }
    }

    /// The process whose death is the machine's, beside its parent `engined`; natively there is none.
    pub fn machine_process(self) -> Option<&'static str> {
        match self {
            Self::Native => None,
            Self::Qemu => Some("qemu-system-x86_64"),
            Self::Kvm => Some("engine-vmm"),
        }
    }

    /// What the machine of this stage is asked to be: megabytes of memory, and what runs it.
    fn machine(self) -> (u32, &'static str) {
        match self {
            Self::Native | Self::Qemu => (1536, "qemu"),
            // The computer around it has little more.
            Self::Kvm => (640, "kvm"),
        }
    }
}

/// What a test wants of the machine beyond what its stage has. Natively there is none.
#[derive(Debug, Clone, Copy, Default)]
pub struct Wishes {
    /// Another size than the stage's.
    pub memory_mib: Option<u32>,
    /// Words for the end of the kernel's command line.
    pub cmdline: &'static str,
}

/// A private engine with its home, its registry and its clients.
pub struct Engine {
    pub stage: Stage,
    wishes: Wishes,
    programs: PathBuf,
    home: TempDir,
    /// The natively run engine's process.
    native: Mutex<Option<Child>>,
    registry: Registry,
    /// The rest of the world, which lives as long as the engine.
    world: Option<World>,
}

impl Engine {
    /// Starts one with [`IMAGE`] loaded. In the native stage call [`crate::enter_private_namespaces`] first.
    pub fn start(stage: Stage) -> Result<Self> {
        Self::start_with(stage, Wishes::default())
    }

    /// The same, on a machine as wished.
    pub fn start_with(stage: Stage, wishes: Wishes) -> Result<Self> {
        let engine = Self::prepare(stage, wishes)?;
        engine.boot()?;
        engine.load(&TestImage::busybox()?, IMAGE)?;
        Ok(engine)
    }

    /// Everything but the engine itself.
    pub fn prepare(stage: Stage, wishes: Wishes) -> Result<Self> {
        let home = tempfile::Builder::new().prefix("engine-").tempdir()?;
        let world = (stage == Stage::Native).then(World::create).transpose()?;
        let registry = match &world {
            Some(world) => Registry::start_at(ADDRESS, |program| world.enter(program))?,
            None => Registry::start()?,
        };
        let engine =
            Self { stage, wishes, programs: programs()?, home, native: Mutex::new(None), registry, world };
        if stage != Stage::Native && !wishes.cmdline.is_empty() {
            image_with(wishes.cmdline, &engine.program("vm-image"), &engine.path(IMAGE_DIR))?;
        }
        if stage == Stage::Native {
            let bundled = engine.path("bundled");
            std::fs::create_dir(&bundled)?;
            let hello = std::fs::read(engine.program("hello")).context("`hello` is not built")?;
            let image = TestImage::new(vec![Layer::program("hello", &hello)?])
                .with_config(serde_json::json!({ "Cmd": ["/hello"] }));
            std::fs::write(bundled.join("hello.tar"), image.archive("hello:latest")?)?;
        }
        Ok(engine)
    }

    /// Starts the engine, or the machine with the engine in it, and waits until it answers.
    pub fn boot(&self) -> Result<()> {
        match self.stage {
            Stage::Native => self.boot_native(&[], &[]),
            Stage::Qemu | Stage::Kvm => {
                self.engine(["machine", "start"])?.ok().map(drop).with_context(|| self.logs())
            }
        }
    }

    /// The same after it has ended with all its programs, in an environment with these variables.
    pub fn boot_again_with_environment(&self, variables: &[(&str, &str)]) -> Result<()> {
        if self.stage == Stage::Native {
            self.end_native(false)?;
            return self.boot_native(&[], variables);
        }
        self.engine(["machine", "shutdown"])?.ok()?;
        self.processes().expect_none()?;
        let mut start = self.command(["machine", "start"]);
        start.envs(variables.iter().copied());
        run(start)?.ok().map(drop).with_context(|| self.logs())
    }

    /// Where certificates of registries are looked for.
    pub fn certificates(&self) -> PathBuf {
        match self.stage {
            Stage::Native => self.path("data/certs.d"),
            Stage::Qemu | Stage::Kvm => self.path("certs.d"),
        }
    }

    /// Starts the native engine so that it ends, as if killed, when it comes to this fault point.
    pub fn boot_with_fault(&self, point: &str) -> Result<()> {
        self.boot_native(&[], &[("ENGINE_FAULT", point)])
    }

    /// Starts the native engine with a dockerd's settings file of this content.
    pub fn boot_with_settings(&self, daemon_json: &serde_json::Value) -> Result<()> {
        let path = self.path("daemon.json");
        std::fs::write(&path, daemon_json.to_string())?;
        let path = path.to_str().context("a temporary path that is no text")?;
        self.boot_native(&["--config", path], &[])
    }

    /// Waits until the native engine has ended by itself.
    pub fn await_end(&self) -> Result<()> {
        let mut child = self.lock().take().context("the engine does not run")?;
        wait_until("the engine ends at its fault point", || Ok(child.try_wait()?)).map(drop)
    }

    fn boot_native(&self, more: &[&str], variables: &[(&str, &str)]) -> Result<()> {
        let log = std::fs::File::options().create(true).append(true).open(self.path("guest-engine.log"))?;
        let mut child = Command::new(self.program("guest-engine"))
            .arg("--native")
            .arg("--socket")
            .arg(self.docker_socket())
            .arg("--data-root")
            .arg(self.path("data"))
            .arg("--bundled-images")
            .arg(self.path("bundled"))
            .args(["--insecure-registry", &self.registry_name()])
            .args(more)
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot start `guest-engine`")?;
        wait_until("the engine answers", || {
            if let Some(status) = child.try_wait()? {
                bail!("the engine ended at once: {status}\n{}", self.logs());
            }
            Ok(self.engine(["version"])?.ok().ok())
        })?;
        *self.lock() = Some(child);
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Child>> {
        self.native.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Loads `image` under `tag`.
    pub fn load(&self, image: &TestImage, tag: &str) -> Result<()> {
        let archive = image.archive(tag)?;
        Timed::new(self.command(["load"])).input(archive).run()?.ok().map(drop)
    }

    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// In the native stage, the rest of the world.
    pub fn world(&self) -> Option<&World> {
        self.world.as_ref()
    }

    /// What the registry is called inside the engine.
    pub fn registry_name(&self) -> String {
        match self.stage {
            Stage::Native => self.registry.address().to_string(),
            Stage::Qemu | Stage::Kvm => format!("host.docker.internal:{}", self.registry.port()),
        }
    }

    /// The address at which a container reaches the registry's host.
    pub fn outside_address(&self) -> &'static str {
        match self.stage {
            Stage::Native => "203.0.113.1",
            Stage::Qemu | Stage::Kvm => "198.18.0.254",
        }
    }

    pub fn home(&self) -> &Path {
        self.home.path()
    }

    /// A path in the temporary home.
    pub fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    pub fn docker_socket(&self) -> PathBuf {
        self.path("engine.sock")
    }

    /// One of our programs.
    pub fn program(&self, name: &str) -> PathBuf {
        self.programs.join(name)
    }

    /// An `engine` command, ready to run.
    pub fn command<I: AsRef<std::ffi::OsStr>>(&self, arguments: impl IntoIterator<Item = I>) -> Command {
        let mut command = Command::new(self.program("engine"));
        self.environment(&mut command);
        command.args(arguments);
        command
    }

    /// Points `command` at this engine.
    pub fn environment(&self, command: &mut Command) {
        let (memory_mib, backend) = self.stage.machine();
        let memory_mib = self.wishes.memory_mib.unwrap_or(memory_mib);
        command
            .env("ENGINE_HOME", self.home.path())
            .env("ENGINE_MACHINE_MEMORY_MIB", memory_mib.to_string())
            .env("ENGINE_MACHINE_BACKEND", backend)
            .env("ENGINE_MACHINE_CPUS", "2")
            .env("ENGINE_MACHINE_DISK_GIB", "16")
            .env_remove("ENGINE_IMAGE")
            .env_remove("DOCKER_CONTEXT")
            .env("DOCKER_CONFIG", self.path("docker"))
            .env("DOCKER_HOST", format!("unix://{}", self.docker_socket().display()));
        if self.stage == Stage::Native {
            command.env("ENGINE_HOST", format!("unix://{}", self.docker_socket().display()));
        } else {
            command.env_remove("ENGINE_HOST");
        }
        let image = self.path(IMAGE_DIR);
        if image.exists() {
            command.env("ENGINE_IMAGE", image);
        }
    }

    /// Runs `engine` with these arguments.
    pub fn engine<I: AsRef<std::ffi::OsStr>>(
        &self,
        arguments: impl IntoIterator<Item = I>,
    ) -> Result<Finished> {
        run(self.command(arguments))
    }

    /// The same with something on standard input.
    pub fn engine_with_input<I: AsRef<std::ffi::OsStr>>(
        &self,
        arguments: impl IntoIterator<Item = I>,
        input: impl Into<Vec<u8>>,
    ) -> Result<Finished> {
        Timed::new(self.command(arguments)).input(input).run()
    }

    /// Starts `engine` with these arguments in the background.
    pub fn spawn<I: AsRef<std::ffi::OsStr>>(
        &self,
        arguments: impl IntoIterator<Item = I>,
    ) -> Result<Running> {
        Timed::new(self.command(arguments)).spawn()
    }

    /// The stock docker CLI on this engine's socket; `None` when this computer has none.
    pub fn docker<I: AsRef<std::ffi::OsStr>>(
        &self,
        arguments: impl IntoIterator<Item = I>,
    ) -> Option<Command> {
        let found = std::env::split_paths(&std::env::var_os("PATH")?)
            .map(|dir| dir.join("docker"))
            .find(|path| path.is_file())?;
        let mut command = Command::new(found);
        self.environment(&mut command);
        command.args(arguments);
        Some(command)
    }

    /// The stock docker-compose on this engine's socket. `None` when `installer/setup --tests` could not fetch it.
    pub fn compose<I: AsRef<std::ffi::OsStr>>(
        &self,
        arguments: impl IntoIterator<Item = I>,
    ) -> Option<Command> {
        let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache"));
        let program = cache.or_else(home)?.join("engine/clients").join(COMPOSE);
        let mut command = program.is_file().then(|| Command::new(program))?;
        self.environment(&mut command);
        command.args(arguments);
        Some(command)
    }

    /// The processes that run for this engine.
    pub fn processes(&self) -> Processes {
        Processes::of(self.home.path())
    }

    /// Ends the natively run engine, cleanly or by force. Containers go on.
    pub fn end_native(&self, force: bool) -> Result<()> {
        let mut native = self.lock();
        let mut child = native.take().context("the engine does not run")?;
        if force {
            child.kill()?;
            child.wait()?;
            return Ok(());
        }
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        let ended = wait_until("the engine ends after SIGTERM", || Ok(child.try_wait()?));
        if ended.is_err() {
            let _ = child.kill();
            let _ = child.wait();
        }
        let status = ended?;
        if !status.success() {
            bail!("the engine ended with {status} after SIGTERM");
        }
        Ok(())
    }

    /// Proves that the ended native engine left its data root consistent.
    pub fn expect_sound_data(&self) -> Result<()> {
        let mut command = Command::new(self.program("guest-engine"));
        command.arg("fsck").arg("--data-root").arg(self.path("data"));
        run(command)?.exits(0).map(drop)
    }

    /// Removes all containers, ends everything and reports what should not be left.
    pub fn finish(&self) -> Result<()> {
        let result = self.clean_up();
        if result.is_err() {
            self.processes().kill_all();
        }
        result
    }

    /// Removes every container by force.
    pub fn remove_containers(&self) -> Result<()> {
        let containers = self.engine(["ps", "-aq"])?.ok()?;
        if containers.is_empty() {
            return Ok(());
        }
        self.engine(["rm", "-f"].into_iter().chain(containers.lines()))?.ok().map(drop)
    }

    fn clean_up(&self) -> Result<()> {
        self.remove_containers()?;
        match self.stage {
            Stage::Native => {
                self.end_native(false)?;
                self.expect_sound_data()?;
                self.expect_no_mounts()?;
                remove_empty_cgroups();
            }
            Stage::Qemu | Stage::Kvm => {
                self.engine(["machine", "shutdown"])?.ok()?;
            }
        }
        self.processes().expect_none()
    }

    fn expect_no_mounts(&self) -> Result<()> {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
        let below = self.home.path().display().to_string();
        let left: Vec<&str> = mounts.lines().filter(|line| line.contains(&below)).collect();
        if !left.is_empty() {
            bail!("mounts are left: {left:#?}");
        }
        Ok(())
    }

    /// The last lines of every log, for failures.
    pub fn logs(&self) -> String {
        let logs = [
            "guest-engine.log",
            "run/engined.log",
            "machines/default/vmm.log",
            "machines/default/engine.log",
            "machines/default/console.log",
        ];
        let mut text = String::new();
        for name in logs {
            if let Ok(bytes) = std::fs::read(self.path(name)) {
                let log = String::from_utf8_lossy(&bytes).into_owned();
                let lines: Vec<&str> = log.lines().collect();
                text += &format!("--- {name} (last of {} lines)\n", lines.len());
                text += &lines[lines.len().saturating_sub(40)..].join("\n");
                text.push('\n');
            }
        }
        text
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if let Some(mut child) = self.lock().take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        self.processes().kill_all();
    }
}

/// Makes the folder `to` the VM image `from` with more words on its kernel's command line.
fn image_with(words: &str, from: &Path, to: &Path) -> Result<()> {
    std::fs::create_dir(to)?;
    for entry in std::fs::read_dir(from).with_context(|| format!("no VM image `{}`", from.display()))? {
        let entry = entry?;
        std::os::unix::fs::symlink(entry.path().canonicalize()?, to.join(entry.file_name()))?;
    }
    let path = to.join("manifest.json");
    let mut manifest: serde_json::Value = serde_json::from_slice(&std::fs::read(&path)?)?;
    let cmdline = format!("{} {words}", manifest["cmdline"].as_str().unwrap_or_default());
    manifest["cmdline"] = cmdline.into();
    std::fs::remove_file(&path)?;
    Ok(std::fs::write(&path, serde_json::to_vec(&manifest)?)?)
}

/// The engine leaves the parent of its containers' cgroups behind, as others do; a test does not. One that another engine
/// uses is not empty, and stays.
fn remove_empty_cgroups() {
    let root = Path::new("/sys/fs/cgroup");
    let hierarchies = std::fs::read_dir(root).into_iter().flatten().flatten().map(|entry| entry.path());
    for hierarchy in hierarchies.chain([root.to_path_buf()]) {
        let _ = std::fs::remove_dir(hierarchy.join("engine"));
    }
}

/// The folder of our programs: one above the test program's own (`release/deps/e2e-…`), or its own.
fn programs() -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let found = own.ancestors().skip(1).take(2).find(|dir| dir.join("engine").is_file());
    match found {
        Some(dir) => Ok(dir.to_path_buf()),
        None => bail!("the programs are not built beside `{}`: run installer/build", own.display()),
    }
}
