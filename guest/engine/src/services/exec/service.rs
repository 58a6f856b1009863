//! The exec service: remembers what was asked for, starts it through the container's shim, and how it ended.
//!
//! An exec is `Created → Running → Ended`; one that could not be started ends with 126 or 127. What is known of each is
//! kept in its container's run folder as well ([`keep`]), so that an engine that was restarted knows them, and the end
//! of those that run.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use guest_api::exec::{ExecCreate, ExecInspect, ExecProcess};
use guest_runtime::shim::{ConsoleSize, Request as ShimRequest, Stdin};
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio_util::task::TaskTracker;

use super::keep::{self, Kept, KeptState};
use crate::failure::Failure;
use crate::services::containers::{
    Containers, Request, Shim, Streams, Verdict, View, admit, describe, end_process, exec_failure,
    shim_failure, user_of,
};

/// How long the end of an exec is remembered.
const REMEMBERED: Duration = Duration::from_secs(300);
/// Execs remembered; more than this and the oldest ended ones go early.
const REMEMBERED_MAX: usize = 4096;
/// Exit code of an exec whose end nobody noted.
const LOST_CODE: i32 = 137;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Created,
    Running { pid: i32 },
    Ended { code: i32, at: Instant },
}

struct Exec {
    container: String,
    config: ExecCreate,
    state: watch::Sender<State>,
}

/// The exec service.
pub struct Execs {
    containers: Arc<Containers>,
    tasks: TaskTracker,
    execs: Mutex<HashMap<String, Arc<Exec>>>,
}

/// An exec that was started with a client attached.
pub struct Running {
    /// Its output, and its input.
    pub stream: UnixStream,
    pub tty: bool,
    pub stdin: bool,
    pub end: End,
}

/// The end of a started exec.
pub struct End(watch::Receiver<State>);

impl End {
    /// Returns once the exit code is known; ask after the output has ended and before the client hears of that.
    pub async fn known(mut self) {
        // An error means that the service is gone, and the record with it.
        let _ = self.0.wait_for(|state| matches!(state, State::Ended { .. })).await;
    }
}

impl Execs {
    pub fn new(containers: Arc<Containers>, tasks: TaskTracker) -> Arc<Self> {
        Arc::new(Self { containers, tasks, execs: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<Exec>>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, id: &str) -> Result<Arc<Exec>, Failure> {
        self.lock().get(id).cloned().ok_or_else(|| Failure::not_found(guest_api::error::no_such_exec(id)))
    }

    /// The container's view, if a process may be run in it now.
    fn container(&self, wanted: &str) -> Result<Arc<View>, Failure> {
        let view = self.containers.view(wanted)?;
        match admit(view.phase, Request::Exec, &view.record.id, &view.record.name) {
            Verdict::Refuse(kind, text) => Err(Failure::new(kind, text)),
            _ => Ok(view),
        }
    }

    /// Ids of the execs of a container that have not ended.
    pub fn of_container(&self, container: &str) -> Vec<String> {
        let execs = self.lock();
        let open = execs.iter().filter(|(_, exec)| {
            exec.container == container && !matches!(*exec.state.borrow(), State::Ended { .. })
        });
        let mut ids: Vec<String> = open.map(|(id, _)| id.clone()).collect();
        ids.sort_unstable();
        ids
    }

    /// Remembers what is to be run.
    pub async fn create(&self, container: &str, config: ExecCreate) -> Result<String, Failure> {
        let view = self.container(container)?;
        if config.cmd.as_ref().is_none_or(Vec::is_empty) {
            return Err(Failure::invalid("No exec command specified"));
        }
        let folder = &config.working_dir;
        if !folder.is_empty() && !folder.starts_with('/') {
            return Err(Failure::invalid(format!(
                "working directory '{folder}' of an exec is not an absolute path"
            )));
        }
        if !config.user.is_empty() {
            let (context, record, user) =
                (self.containers.context().clone(), view.record.clone(), config.user.clone());
            let found = tokio::task::spawn_blocking(move || user_of(&context, &record, &user)).await;
            found.map_err(|error| Failure::internal("preparing the exec failed", &error))??;
        }
        let id = hex::encode(rand::random::<[u8; 32]>());
        let exec =
            Exec { container: view.record.id.clone(), config, state: watch::Sender::new(State::Created) };
        self.event(&view, "exec_create", &id, &exec.config, &[]);
        let folder = self.containers.context().run_folder(&exec.container);
        keep::write(&folder, &id, &Kept { config: exec.config.clone(), state: KeptState::Created });
        let mut execs = self.lock();
        for (old, exec) in forget_old(&mut execs, Instant::now()) {
            keep::remove(&self.containers.context().run_folder(&exec.container), &old);
        }
        execs.insert(id.clone(), Arc::new(exec));
        Ok(id)
    }

    /// Knows the execs of an earlier engine again. A process that nobody knows, such as a health check's, is ended.
    pub async fn restore(self: &Arc<Self>) {
        for view in self.containers.views() {
            let Some(_) = view.live else { continue };
            let context = self.containers.context();
            let folder = context.run_folder(&view.record.id);
            let shim = Shim::at(&folder);
            let kept = keep::all(&folder);
            // A shim that does not answer now has no processes to know.
            let there = shim.state().await.map(|state| state.execs).unwrap_or_default();
            for id in there.keys().filter(|id| !kept.contains_key(*id)) {
                let (shim, id) = (shim.clone(), id.clone());
                self.tasks.spawn(async move { end_process(&shim, &id).await });
            }
            for (id, Kept { config, state }) in kept {
                let now = match (state, there.get(&id)) {
                    (KeptState::Created, _) => State::Created,
                    (KeptState::Running, Some(pid)) => State::Running { pid: *pid },
                    // The engine was killed between its end and the note of it.
                    (KeptState::Running, None) => State::Ended { code: LOST_CODE, at: Instant::now() },
                    (KeptState::Ended { code }, _) => State::Ended { code, at: Instant::now() },
                };
                let container = view.record.id.clone();
                let exec = Arc::new(Exec { container, config, state: watch::Sender::new(now) });
                self.lock().insert(id.clone(), exec.clone());
                if let State::Running { .. } = now {
                    let (service, view, shim) = (self.clone(), view.clone(), shim.clone());
                    self.tasks.spawn(async move { service.follow(&id, &exec, &view, &shim).await });
                }
            }
        }
    }

    /// The client typed the keys that detach.
    pub fn detached(&self, id: &str) {
        if let Ok(exec) = self.find(id)
            && let Ok(view) = self.containers.view(&exec.container)
        {
            self.event(&view, "exec_detach", id, &exec.config, &[]);
        }
    }

    /// Starts an exec and leaves it alone.
    pub async fn start_detached(self: &Arc<Self>, id: &str) -> Result<(), Failure> {
        let exec = self.begin(id)?;
        self.run(id, &exec, None, false).await.map(drop)
    }

    /// Whether it has a terminal, which a start must know before it answers: failures it can answer properly end here.
    pub fn check_start(&self, id: &str) -> Result<bool, Failure> {
        let exec = self.find(id)?;
        self.container(&exec.container)?;
        match *exec.state.borrow() {
            State::Created => Ok(exec.config.tty),
            State::Running { .. } => {
                Err(Failure::conflict(format!("Error: Exec command {id} is already running")))
            }
            State::Ended { .. } => {
                Err(Failure::conflict(format!("Error: Exec command {id} has already run")))
            }
        }
    }

    /// The streams an exec was created with.
    pub fn streams(&self, id: &str) -> Result<(Streams, String), Failure> {
        let exec = self.find(id)?;
        let config = &exec.config;
        let streams = Streams {
            stdin: config.attach_stdin,
            stdout: config.attach_stdout,
            stderr: config.attach_stderr,
        };
        Ok((streams, config.detach_keys.clone()))
    }

    /// Starts an exec with its streams attached from its first byte on.
    pub async fn start_attached(
        self: &Arc<Self>,
        id: &str,
        console_size: Option<[u16; 2]>,
    ) -> Result<Running, Failure> {
        let exec = self.begin(id)?;
        let stream = self.run(id, &exec, console_size, true).await?;
        let stream = stream.ok_or_else(|| Failure::broken("an attached exec has no stream"))?;
        let (tty, stdin) = (exec.config.tty, exec.config.attach_stdin);
        Ok(Running { stream, tty, stdin, end: End(exec.state.subscribe()) })
    }

    /// Takes the exec for one start; of two at once one is refused.
    fn begin(&self, id: &str) -> Result<Arc<Exec>, Failure> {
        let exec = self.find(id)?;
        self.container(&exec.container)?;
        let taken = exec.state.send_if_modified(|state| {
            let free = *state == State::Created;
            if free {
                *state = State::Running { pid: 0 };
            }
            free
        });
        if taken {
            Ok(exec)
        } else {
            Err(Failure::conflict(format!("Error: Exec command {id} has already run")))
        }
    }

    async fn run(
        self: &Arc<Self>,
        id: &str,
        exec: &Arc<Exec>,
        console_size: Option<[u16; 2]>,
        attached: bool,
    ) -> Result<Option<UnixStream>, Failure> {
        let started = self.run_steps(id, exec, console_size, attached).await;
        if let Err((code, _)) = &started {
            exec.state.send_replace(State::Ended { code: *code, at: Instant::now() });
        }
        started.map_err(|(_, failure)| failure)
    }

    async fn run_steps(
        self: &Arc<Self>,
        id: &str,
        exec: &Arc<Exec>,
        console_size: Option<[u16; 2]>,
        attached: bool,
    ) -> Result<Option<UnixStream>, (i32, Failure)> {
        let ours = |failure: Failure| (126, failure);
        let view = self.container(&exec.container).map_err(ours)?;
        let context = self.containers.context();
        let shim = Shim::at(&context.run_folder(&exec.container));
        let mut config = exec.config.clone();
        config.console_size = console_size.or(config.console_size);
        let process = describe(context, &view.record, &config).await.map_err(ours)?;
        let stdin = match (attached && config.attach_stdin, config.tty) {
            (true, false) => Stdin::Once,
            (true, true) => Stdin::Open,
            (false, _) => Stdin::None,
        };
        let size = config.console_size.filter(|[height, width]| *height > 0 && *width > 0);
        let request = ShimRequest::Exec {
            id: id.to_owned(),
            process: Box::new(process),
            terminal: config.tty,
            stdin,
            console_size: size.map(|[height, width]| ConsoleSize { width, height }),
        };
        shim.ask("exec", request).await.map_err(exec_failure)?;
        let process_id = Some(id.to_owned());
        let stream = if attached {
            let streams = Streams {
                stdin: config.attach_stdin,
                // With a terminal there is one stream, and nobody runs an attached exec to see nothing.
                stdout: config.attach_stdout || config.tty,
                stderr: config.attach_stderr,
            };
            Some(shim.attach(process_id.clone(), streams).await.map_err(exec_failure)?)
        } else {
            None
        };
        self.event(&view, "exec_start", id, &exec.config, &[]);
        let pid = match shim.start(process_id.clone()).await {
            Ok(pid) => pid,
            Err(error) => {
                let (code, failure) = exec_failure(error);
                self.event(&view, "exec_die", id, &exec.config, &[("exitCode", code.to_string())]);
                if let Err(error) = shim.ask("forget", ShimRequest::Forget { id: id.to_owned() }).await {
                    tracing::debug!(exec = &id[..12], %error, "the shim keeps a failed exec");
                }
                return Err((code, failure));
            }
        };
        exec.state.send_replace(State::Running { pid });
        let kept = Kept { config: exec.config.clone(), state: KeptState::Running };
        keep::write(&context.run_folder(&exec.container), id, &kept);
        let (service, exec, id) = (self.clone(), exec.clone(), id.to_owned());
        self.tasks.spawn(async move { service.follow(&id, &exec, &view, &shim).await });
        Ok(stream)
    }

    /// Waits for the end of an exec and notes it.
    async fn follow(&self, id: &str, exec: &Exec, view: &View, shim: &Shim) {
        let waited = shim.wait(Some(id.to_owned())).await;
        let code = match &waited {
            Ok(exit) => exit.code,
            // The container ended, and the exec with it.
            Err(_) => 137,
        };
        exec.state.send_replace(State::Ended { code, at: Instant::now() });
        if waited.is_ok() {
            let kept = Kept { config: exec.config.clone(), state: KeptState::Ended { code } };
            keep::write(&self.containers.context().run_folder(&exec.container), id, &kept);
        }
        self.event(view, "exec_die", id, &exec.config, &[("exitCode", code.to_string())]);
        if waited.is_ok()
            && let Err(error) = shim.ask("forget", ShimRequest::Forget { id: id.to_owned() }).await
        {
            tracing::debug!(exec = &id[..12], %error, "the shim keeps an ended exec");
        }
    }

    pub async fn resize(&self, id: &str, width: u16, height: u16) -> Result<(), Failure> {
        let exec = self.find(id)?;
        if matches!(*exec.state.borrow(), State::Ended { .. } | State::Created) {
            return Err(Failure::conflict(format!("exec {id} is not running")));
        }
        let shim = Shim::at(&self.containers.context().run_folder(&exec.container));
        shim.resize(Some(id.to_owned()), width, height).await.map_err(shim_failure)
    }

    pub fn inspect(&self, id: &str) -> Result<ExecInspect, Failure> {
        let exec = self.find(id)?;
        let state = *exec.state.borrow();
        let config = &exec.config;
        let mut words = config.cmd.clone().unwrap_or_default().into_iter();
        Ok(ExecInspect {
            id: id.to_owned(),
            running: matches!(state, State::Running { .. }),
            exit_code: match state {
                State::Ended { code, .. } => Some(i64::from(code)),
                State::Created | State::Running { .. } => None,
            },
            process_config: ExecProcess {
                tty: config.tty,
                entrypoint: words.next().unwrap_or_default(),
                arguments: words.collect(),
                privileged: config.privileged,
                user: config.user.clone(),
            },
            open_stdin: config.attach_stdin,
            open_stderr: config.attach_stderr,
            open_stdout: config.attach_stdout,
            can_remove: matches!(state, State::Ended { .. }),
            container_id: exec.container.clone(),
            detach_keys: String::new(),
            pid: match state {
                State::Running { pid } => i64::from(pid),
                State::Created | State::Ended { .. } => 0,
            },
        })
    }

    fn event(&self, view: &View, action: &str, id: &str, config: &ExecCreate, more: &[(&str, String)]) {
        let action = match action {
            "exec_die" | "exec_detach" => action.to_owned(),
            _ => format!("{action}: {}", told(config.cmd.as_deref().unwrap_or_default())),
        };
        let mut attributes = view.record.event_attributes();
        attributes.insert("execID".to_owned(), id.to_owned());
        attributes.extend(more.iter().map(|(key, value)| ((*key).to_owned(), value.clone())));
        self.containers.context().events.publish("container", &action, &view.record.id, attributes);
    }
}

/// A command as events tell it: the program, a space, its arguments, even if there are none.
pub fn told(command: &[String]) -> String {
    let (program, arguments) =
        command.split_first().map_or(("", &[][..]), |(first, rest)| (first.as_str(), rest));
    format!("{program} {}", arguments.join(" "))
}

fn forget_old(execs: &mut HashMap<String, Arc<Exec>>, now: Instant) -> Vec<(String, Arc<Exec>)> {
    let age = |exec: &Exec| match *exec.state.borrow() {
        State::Ended { at, .. } => Some(now.saturating_duration_since(at)),
        State::Created | State::Running { .. } => None,
    };
    let old = |exec: &Exec| age(exec).is_some_and(|age| age >= REMEMBERED);
    let mut forgotten: Vec<_> = execs.extract_if(|_, exec| old(exec)).collect();
    if execs.len() >= REMEMBERED_MAX {
        let oldest = execs.iter().filter_map(|(id, exec)| Some((age(exec)?, id.clone()))).max();
        forgotten.extend(oldest.and_then(|(_, id)| execs.remove_entry(&id)));
    }
    forgotten
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exec(state: State) -> Arc<Exec> {
        Arc::new(Exec {
            container: "c".into(),
            config: ExecCreate::default(),
            state: watch::Sender::new(state),
        })
    }

    #[test]
    fn ended_execs_are_forgotten_after_a_while() {
        let now = Instant::now();
        let mut execs = HashMap::from([
            ("old".to_owned(), exec(State::Ended { code: 0, at: now })),
            ("open".to_owned(), exec(State::Running { pid: 1 })),
        ]);
        forget_old(&mut execs, now + REMEMBERED / 2);
        assert_eq!(execs.len(), 2);
        forget_old(&mut execs, now + REMEMBERED * 2);
        assert!(execs.contains_key("open") && execs.len() == 1);
    }
}
