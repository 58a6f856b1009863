//! The control socket: one request per connection, answered by reply lines (`host-api`).

use crate::bounded_log::BoundedLog;
use crate::image::VmImage;
use crate::live::{self, Taken};
use crate::settings::{HostSize, Settings, VARIABLES};
use crate::state_dir::StateDir;
use crate::supervisor::{Handle, MACHINE};
use host_api::{
    BackendChoice, GuestStatus, LaterSetting, LogSource, MachineInfo, MachineSettings, MachineState, Reply,
    Request, VERSION,
};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncSeekExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Mutex, watch};
use tracing::{debug, warn};

/// The longest request line.
const REQUEST_BYTES_MAX: u64 = 64 * 1024;
/// How long a client may take to say what it wants.
const REQUEST_TIME_MAX: Duration = Duration::from_secs(10);
/// How often a followed log is looked at.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(200);
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What the control socket serves from. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Control {
    pub(crate) state_dir: Arc<StateDir>,
    pub(crate) supervisor: Handle,
    pub(crate) image_dir: PathBuf,
    /// Held while settings are changed: one change is several steps.
    pub(crate) changing: Arc<Mutex<()>>,
    /// Set to true to end the daemon.
    pub(crate) end: watch::Sender<bool>,
}

/// A request that cannot be met: the sentence, and what to do.
struct Refusal {
    message: String,
    hint: Option<String>,
}

impl From<String> for Refusal {
    fn from(message: String) -> Self {
        Self { message, hint: None }
    }
}

impl From<anyhow::Error> for Refusal {
    fn from(error: anyhow::Error) -> Self {
        Self { message: format!("{error:#}"), hint: None }
    }
}

impl Control {
    /// Accepts until the task is dropped.
    pub(crate) async fn serve(self, listener: UnixListener) {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let control = self.clone();
                    tokio::spawn(async move {
                        if let Err(error) = control.answer(stream).await {
                            debug!(%error, "a control connection ended early");
                        }
                    });
                }
                Err(error) => {
                    warn!(%error, "a control connection cannot be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    async fn answer(&self, stream: UnixStream) -> std::io::Result<()> {
        let (reader, writer) = stream.into_split();
        let mut client = Client { writer };
        let mut line = String::new();
        let mut reader = BufReader::new(reader.take(REQUEST_BYTES_MAX));
        let read = tokio::time::timeout(REQUEST_TIME_MAX, reader.read_line(&mut line)).await;
        let request = match read {
            Ok(Ok(0)) | Err(_) => return Ok(()),
            Ok(Err(error)) => return Err(error),
            Ok(Ok(_)) => serde_json::from_str::<Request>(&line),
        };
        let ends = matches!(request, Ok(Request::Shutdown));
        let answer = match request {
            Ok(request) => self.carry_out(request, &mut client).await,
            Err(error) => Err(Refusal {
                message: format!("the daemon (control version {VERSION}) does not understand the request: {error}"),
                hint: Some("`engine` and `engined` are of different releases: run `engine machine stop`, end `engined`, try again".into()),
            }),
        };
        let ends = ends && answer.is_ok();
        let reply =
            answer.unwrap_or_else(|refusal| Reply::Error { message: refusal.message, hint: refusal.hint });
        let sent = client.send(&reply).await;
        if ends {
            self.end.send_replace(true);
            // The connection ends with this process, for whoever waits for that.
            std::future::pending::<()>().await;
        }
        sent
    }

    async fn carry_out(&self, request: Request, client: &mut Client) -> Result<Reply, Refusal> {
        match request {
            Request::Hello => Ok(Reply::Hello { version: VERSION, pid: std::process::id() }),
            Request::Start => self.start(client).await,
            Request::Stop => {
                self.stop(client).await?;
                Ok(Reply::Done)
            }
            Request::Restart => {
                self.stop(client).await?;
                self.start(client).await
            }
            Request::Remove => {
                self.stop(client).await?;
                self.supervisor.remove().await?;
                Ok(Reply::Done)
            }
            Request::Status => Ok(Reply::Status(self.supervisor.status().borrow().clone())),
            Request::Info => Ok(Reply::Info(Box::new(self.info().await?))),
            Request::Set(changes) => self.set(&changes, client).await,
            Request::Logs { source, follow } => {
                self.logs(source, follow, client)
                    .await
                    .map_err(|error| format!("cannot read the log: {error}"))?;
                Ok(Reply::Done)
            }
            Request::Shutdown => {
                self.stop(client).await?;
                Ok(Reply::Done)
            }
        }
    }

    async fn start(&self, client: &mut Client) -> Result<Reply, Refusal> {
        let mut status = self.supervisor.status();
        let ready = self.supervisor.ensure();
        tokio::pin!(ready);
        loop {
            let progress = match &status.borrow_and_update().state {
                MachineState::Starting { stage } => Some(stage.clone()),
                MachineState::Stopping => Some("waiting for the machine to stop first".to_owned()),
                MachineState::Stopped { .. } | MachineState::Running { .. } => None,
            };
            if let Some(text) = progress {
                client.send(&Reply::Progress { text }).await.map_err(|error| error.to_string())?;
            }
            tokio::select! {
                answer = &mut ready => {
                    answer.map_err(|message| Refusal { message, hint: Some("`engine machine logs` shows the console".into()) })?;
                    let state = status.borrow().state.clone();
                    if let MachineState::Running { trouble: Some(text), .. } = state {
                        client.send(&Reply::Notice { text }).await.map_err(|error| error.to_string())?;
                    }
                    return Ok(Reply::Done);
                }
                changed = status.changed() => changed.map_err(|_| "the daemon is ending".to_owned())?,
            }
        }
    }

    async fn stop(&self, client: &mut Client) -> Result<(), Refusal> {
        if !matches!(self.supervisor.status().borrow().state, MachineState::Stopped { .. }) {
            let text = "stopping the machine".to_owned();
            client.send(&Reply::Progress { text }).await.map_err(|error| error.to_string())?;
        }
        Ok(self.supervisor.stop().await?)
    }

    /// Changes the settings, and has the running machine take on what it can. Nothing is kept of what it refuses.
    async fn set(&self, changes: &MachineSettings, client: &mut Client) -> Result<Reply, Refusal> {
        let _turn = self.changing.lock().await;
        let home = self.state_dir.home();
        let disk = home.machine_disk(MACHINE);
        let disk_bytes = std::fs::metadata(&disk).map_or(0, |disk| disk.len());
        let change = Settings::prepare(&home.settings(), changes, HostSize::read(), disk_bytes)?;
        let [cpus_variable, memory_variable, disk_variable, backend_variable] = VARIABLES;
        let wins = |variable: &str| std::env::var_os(variable).is_some();
        let running = matches!(self.supervisor.status().borrow().state, MachineState::Running { .. });
        let at_once = |variable| running && !wins(variable);

        let disk_gib = changes.disk_gib.filter(|_| at_once(disk_variable));
        if disk_gib.is_some() {
            // Whoever asked may have gone; what was asked is done all the same.
            let _gone = client.send(&Reply::Progress { text: "making the disk larger".to_owned() }).await;
        }
        let grown = match disk_gib {
            Some(gib) => live::grow_disk(&self.supervisor, gib).await.map_err(|message| Refusal {
                message,
                hint: Some(format!(
                    "nothing was changed: neither the file system of `{}` nor the limits of this user (`ulimit -f`) \
                     may stand against a file of that size",
                    disk.display()
                )),
            })?,
            None => Ok(()),
        };
        change.keep()?;
        let disk = match (disk_gib, grown) {
            (Some(gib), Ok(())) => Some(live::use_disk(&self.supervisor, gib).await),
            (Some(_), Err(unknown)) => Some(Taken::Later(unknown)),
            (None, _) => None,
        };
        let cpus = match changes.cpus.filter(|_| at_once(cpus_variable)) {
            Some(count) => Some(live::use_processors(&self.supervisor, count).await),
            None => None,
        };
        let memory = match changes.memory_mib.filter(|_| at_once(memory_variable)) {
            Some(mib) => {
                let _gone = client.send(&Reply::Progress { text: "setting the memory".to_owned() }).await;
                Some(live::use_memory(&self.supervisor, mib).await)
            }
            None => None,
        };

        let (mut now, mut later, mut overridden) = (Vec::new(), Vec::new(), Vec::new());
        for (name, set, variable, taken) in [
            ("cpus", changes.cpus.is_some(), cpus_variable, cpus),
            ("memory", changes.memory_mib.is_some(), memory_variable, memory),
            ("disk", changes.disk_gib.is_some(), disk_variable, disk),
            ("backend", changes.backend.is_some(), backend_variable, None),
        ] {
            let name = name.to_owned();
            match taken {
                _ if !set => {}
                _ if wins(variable) => overridden.push(variable.to_owned()),
                Some(Taken::Now(sentence)) => now.push(sentence),
                Some(Taken::Later(why)) => later.push(LaterSetting { name, why: Some(why) }),
                None => later.push(LaterSetting { name, why: None }),
            }
        }
        let restart = !matches!(self.supervisor.status().borrow().state, MachineState::Stopped { .. });
        Ok(Reply::Set { now, later, restart, overridden })
    }

    async fn info(&self) -> Result<MachineInfo, Refusal> {
        let settings = Settings::load(
            &self.state_dir.home().settings(),
            |name| std::env::var(name).ok(),
            HostSize::read(),
        )?;
        let backend = match self.supervisor.backend().await {
            Some(backend) => backend,
            None => would_choose(settings.backend).await?,
        };
        let disk = self.state_dir.home().machine_disk(MACHINE);
        let file = std::fs::metadata(&disk).ok();
        let guest = self.supervisor.guest_info().await.map(|guest| GuestStatus {
            kernel: guest.kernel,
            uptime_s: guest.uptime_ms / 1000,
            memory_total_bytes: guest.memory_total_bytes,
            memory_available_bytes: guest.memory_available_bytes,
            memory_cached_bytes: guest.memory_cached_bytes,
            disk_total_bytes: guest.disk_total_bytes,
            disk_used_bytes: guest.disk_used_bytes,
        });
        let status = self.supervisor.status().borrow().clone();
        let usage = self.supervisor.usage().await;
        Ok(MachineInfo {
            status,
            backend,
            cpus: settings.cpus,
            memory_mib: settings.memory_mib.into(),
            disk_size_bytes: file.as_ref().map_or(settings.disk_gib << 30, MetadataExt::size),
            disk_allocated_bytes: file.as_ref().map_or(0, |file| file.blocks() * 512),
            disk,
            image_digest: VmImage::open(&self.image_dir).ok().map(|image| image.digest),
            image: self.image_dir.clone(),
            docker_socket: self.state_dir.home().docker_socket(),
            guest,
            open_streams: usage.map(|usage| usage.open_streams),
            memory_held_bytes: usage.and_then(|usage| usage.memory_held_bytes),
            memory_given_back_bytes: usage.and_then(|usage| usage.memory_given_back_bytes),
        })
    }

    async fn logs(&self, source: LogSource, follow: bool, client: &mut Client) -> std::io::Result<()> {
        let home = self.state_dir.home();
        let path = match source {
            LogSource::Console => home.machine_dir(MACHINE).join("console.log"),
            LogSource::Engine => home.machine_dir(MACHINE).join("engine.log"),
            LogSource::Vmm => home.machine_dir(MACHINE).join("vmm.log"),
            LogSource::Daemon => home.daemon_log(),
        };
        let mut offset = 0;
        match tokio::fs::read(BoundedLog::rotated(&path)).await {
            Ok(older) => {
                client.send(&Reply::Text { text: String::from_utf8_lossy(&older).into_owned() }).await?
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        loop {
            offset = client.send_file(&path, offset).await?;
            if !follow {
                return Ok(());
            }
            tokio::time::sleep(FOLLOW_INTERVAL).await;
        }
    }
}

/// The back end that a start would choose now. The probe executes guest instructions, off the async threads.
async fn would_choose(wanted: host_vmm::BackendChoice) -> Result<BackendChoice, Refusal> {
    let chosen = tokio::task::spawn_blocking(move || host_vmm::choose_backend(wanted))
        .await
        .map_err(|error| format!("the hypervisor probe failed: {error}"))?;
    match chosen {
        Ok(chosen) => Ok(BackendChoice {
            backend: chosen.name().to_owned(),
            accelerator: chosen.accelerator.name().to_owned(),
            reason: chosen.reason,
        }),
        Err(error) => Err(format!("no back end can run the machine: {error}").into()),
    }
}

struct Client {
    writer: tokio::net::unix::OwnedWriteHalf,
}

impl Client {
    async fn send(&mut self, reply: &Reply) -> std::io::Result<()> {
        let mut line = serde_json::to_vec(reply)?;
        line.push(b'\n');
        self.writer.write_all(&line).await
    }

    /// Sends what the file holds from `offset` on; returns where the next call goes on. A file that became shorter
    /// was rotated and is sent from its beginning; one that is not there has nothing yet.
    async fn send_file(&mut self, path: &std::path::Path, mut offset: u64) -> std::io::Result<u64> {
        let mut file = match tokio::fs::File::open(path).await {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(0),
            Err(error) => return Err(error),
        };
        if file.metadata().await?.len() < offset {
            offset = 0;
        }
        file.seek(std::io::SeekFrom::Start(offset)).await?;
        let mut chunk = vec![0; 64 * 1024];
        loop {
            let count = file.read(&mut chunk).await?;
            if count == 0 {
                return Ok(offset);
            }
            self.send(&Reply::Text { text: String::from_utf8_lossy(&chunk[..count]).into_owned() }).await?;
            offset += count as u64;
        }
    }
}
