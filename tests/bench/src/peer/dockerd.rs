//! A private dockerd: its own socket, data root and containerd, all in one temporary folder.

use anyhow::{Context, Result, bail};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use tempfile::TempDir;
use tests_harness::{Engine, Processes, wait_until};

const MISSING: &str = "the peer is a dockerd in PATH, with containerd, runc and iptables: install Debian's docker.io, or unpack \
                       its packages into a folder (`apt-get download`, `dpkg -x`) and put that folder's programs into PATH";

pub(super) struct Dockerd {
    child: Child,
    home: TempDir,
}

impl Dockerd {
    /// Starts one that may use the test registry of `engine`.
    pub(super) fn start(engine: &Engine) -> Result<Self> {
        let home = tempfile::Builder::new().prefix("dockerd-").tempdir()?;
        let path = |name: &str| home.path().join(name);
        let settings = serde_json::json!({ "insecure-registries": [engine.registry_name()] });
        std::fs::write(path("daemon.json"), settings.to_string())?;
        let log = std::fs::File::create(path("dockerd.log"))?;
        let child = Command::new("dockerd")
            .arg("--config-file")
            .arg(path("daemon.json"))
            .arg("--host")
            .arg(format!("unix://{}", path("docker.sock").display()))
            .arg("--data-root")
            .arg(path("data"))
            .arg("--exec-root")
            .arg(path("exec"))
            .arg("--pidfile")
            .arg(path("pid"))
            .args(["--storage-driver", "overlay2", "--log-level", "warn"])
            .env("TMPDIR", home.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context(MISSING)?;
        let mut peer = Self { child, home };
        wait_until("dockerd answers", || {
            if let Some(status) = peer.child.try_wait()? {
                let log = std::fs::read_to_string(peer.home.path().join("dockerd.log")).unwrap_or_default();
                bail!("dockerd ended at once ({status}): {log}\n{MISSING}");
            }
            let mut version = Command::new("docker");
            version.arg("version").env("DOCKER_HOST", format!("unix://{}", peer.socket().display()));
            Ok(tests_harness::run(version)?.ok().ok())
        })?;
        Ok(peer)
    }

    pub(super) fn socket(&self) -> PathBuf {
        self.home.path().join("docker.sock")
    }

    pub(super) fn processes(&self) -> Processes {
        Processes::of(self.home.path())
    }

    /// Ends it and what it started, and unmounts what it left.
    pub(super) fn end(mut self) -> Result<()> {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        let ended = wait_until("dockerd ends after SIGTERM", || Ok(self.child.try_wait()?));
        self.processes().kill_all();
        ended.map(drop)
    }
}

impl Drop for Dockerd {
    fn drop(&mut self) {
        // After `end` there is nothing left to end.
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.processes().kill_all();
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let below = self.home.path().display().to_string();
        let ours =
            mounts.lines().filter_map(|line| line.split(' ').nth(1)).filter(|at| at.starts_with(&below));
        for mount in ours.collect::<Vec<_>>().into_iter().rev() {
            // The namespace goes with this program anyway; the folder should go now.
            let _ = Command::new("umount").args(["-l", mount]).status();
        }
    }
}
