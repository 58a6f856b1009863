//! Commands with a deadline, and waiting for conditions instead of for time.

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::io::{Read, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long an ordinary command may take, and whatever a test waits for. A software CPU on a busy machine is slow; a hang is much slower.
pub const PATIENCE: Duration = Duration::from_secs(240);
const PAUSE: Duration = Duration::from_millis(20);

/// What a command did.
#[derive(Debug, Clone)]
pub struct Finished {
    /// The command line, for messages.
    pub command: String,
    /// Exit code; 128 + signal when it was killed.
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Finished {
    /// Its standard output, trimmed, when it succeeded.
    pub fn ok(self) -> Result<String> {
        self.exits(0)
    }

    /// Its standard output, trimmed, when it ended with `code`.
    pub fn exits(self, code: i32) -> Result<String> {
        if self.code != code {
            bail!(
                "`{}` ended with {} instead of {code}\nstdout: {}\nstderr: {}",
                self.command,
                self.code,
                self.stdout,
                self.stderr
            );
        }
        Ok(self.stdout.trim_end().to_owned())
    }

    /// Fails with `code`, and says `part` on standard error.
    pub fn fails_with(self, code: i32, part: &str) -> Result<()> {
        if self.code != code || !self.stderr.contains(part) {
            bail!(
                "`{}` ended with {} (expected {code}) without saying `{part}`\nstdout: {}\nstderr: {}",
                self.command,
                self.code,
                self.stdout,
                self.stderr
            );
        }
        Ok(())
    }
}

/// A command that is to be run with a deadline.
pub struct Timed {
    command: Command,
    input: Option<Vec<u8>>,
    limit: Duration,
}

impl Timed {
    pub fn new(command: Command) -> Self {
        Self { command, input: None, limit: PATIENCE }
    }

    /// Feeds `input` to it and closes its standard input.
    pub fn input(mut self, input: impl Into<Vec<u8>>) -> Self {
        self.input = Some(input.into());
        self
    }

    pub fn within(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    pub fn run(self) -> Result<Finished> {
        let limit = self.limit;
        self.spawn()?.finish_within(limit)
    }

    /// Starts it; its output is collected from now on.
    pub fn spawn(mut self) -> Result<Running> {
        let line = describe(&self.command);
        self.command.stdin(if self.input.is_some() { Stdio::piped() } else { Stdio::null() });
        let mut child = self
            .command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start `{line}`"))?;
        let feeder = self.input.zip(child.stdin.take()).map(|(input, mut pipe)| {
            std::thread::spawn(move || {
                // The command may end before it has read everything; its exit code tells.
                let _ = pipe.write_all(&input);
            })
        });
        let stdout = child.stdout.take().map(collect);
        let stderr = child.stderr.take().map(collect);
        Ok(Running { line, child, feeder, stdout, stderr })
    }
}

/// Runs a command with the usual deadline.
pub fn run(command: Command) -> Result<Finished> {
    Timed::new(command).run()
}

/// A command that runs. Killed when dropped.
pub struct Running {
    line: String,
    child: Child,
    feeder: Option<JoinHandle<()>>,
    stdout: Option<JoinHandle<Vec<u8>>>,
    stderr: Option<JoinHandle<Vec<u8>>>,
}

impl Running {
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn finish(self) -> Result<Finished> {
        self.finish_within(PATIENCE)
    }

    pub fn finish_within(mut self, limit: Duration) -> Result<Finished> {
        if !ends_within(&self.child, limit)? {
            let _ = self.child.kill();
            let _ = self.child.wait();
            let (stdout, stderr) = self.outputs();
            bail!(
                "`{}` did not end within {} s\nstdout: {stdout}\nstderr: {stderr}",
                self.line,
                limit.as_secs()
            );
        }
        let status = self.child.wait()?;
        let (stdout, stderr) = self.outputs();
        Ok(Finished { command: self.line.clone(), code: code(status), stdout, stderr })
    }

    fn outputs(&mut self) -> (String, String) {
        if let Some(feeder) = self.feeder.take() {
            let _ = feeder.join();
        }
        let text = |thread: Option<JoinHandle<Vec<u8>>>| {
            thread
                .and_then(|thread| thread.join().ok())
                .map_or(String::new(), |bytes| String::from_utf8_lossy(&bytes).into_owned())
        };
        (text(self.stdout.take()), text(self.stderr.take()))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits for the end of a child without looking again and again: benchmarks measure to the millisecond.
fn ends_within(child: &Child, limit: Duration) -> Result<bool> {
    let handle = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    let until = Instant::now() + limit;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let left = Timespec { tv_sec: left.as_secs().try_into()?, tv_nsec: left.subsec_nanos().into() };
        match poll(&mut [PollFd::new(&handle, PollFlags::IN)], Some(&left)) {
            Ok(count) => return Ok(count > 0),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn collect(mut pipe: impl Read + Send + 'static) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = pipe.read_to_end(&mut bytes);
        bytes
    })
}

fn code(status: ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

fn describe(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}

/// Waits until `condition` gives a value, at most [`PATIENCE`]. The deadline's message names what was waited for.
pub fn wait_until<T>(what: &str, mut condition: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = condition()? {
            return Ok(value);
        }
        if Instant::now() >= until {
            bail!("{what}: not so within {} s", PATIENCE.as_secs());
        }
        std::thread::sleep(PAUSE);
    }
}
