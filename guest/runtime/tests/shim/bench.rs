//! What the tests stand on: a root file system of busybox, and shims for containers in it.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use guest_runtime::cgroup::Cgroup;
use guest_runtime::shim::record::{self};
use guest_runtime::shim::{
    Connection, ConnectionError, ConsoleSize, ErrorKind, Exit, Log, LogDriver, Request, SPEC_FILE, ShimSpec,
    Stdin, launch,
};
use guest_runtime::{defaults, reap};
use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Process, Root, Spec};

pub const SHIM: &str = env!("CARGO_BIN_EXE_shim");
pub const BUSYBOX: &str = "/bin/busybox";
pub const INSIDE: &str = "GUEST_RUNTIME_TEST_INSIDE";
pub const TIMEOUT: Duration = Duration::from_secs(60);

/// Writes past libtest's capture, so that it is seen.
pub fn say(line: &str) {
    std::io::stderr().write_all(format!("{line}\n").as_bytes()).unwrap();
}

/// Runs a test's body in namespaces of its own, by running the test again under `unshare`.
pub fn isolated(body: impl FnOnce()) {
    if std::env::var_os(INSIDE).is_some() {
        return body();
    }
    let missing = [BUSYBOX, "/usr/bin/unshare"].into_iter().find(|path| !Path::new(path).exists());
    let reason = match (rustix::process::geteuid().is_root(), missing) {
        (true, None) => None,
        (false, _) => Some("not root".to_owned()),
        (_, Some(path)) => Some(format!("there is no {path}")),
    };
    let current = std::thread::current();
    let name = current.name().expect("libtest names its threads");
    if let Some(reason) = reason {
        say(&format!("SKIPPED {name}: {reason}"));
        return;
    }
    let output = Command::new("/usr/bin/unshare")
        .args(["--mount", "--net", "--propagation", "private"])
        .arg(std::env::current_exe().unwrap())
        .args([name, "--exact", "--nocapture"])
        .env(INSIDE, "1")
        .output()
        .unwrap();
    let (said, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    for line in errors.lines().filter(|line| line.starts_with("measured: ") || line.starts_with("SKIPPED ")) {
        say(line);
    }
    assert!(output.status.success(), "{said}\n{errors}");
}

/// A temporary folder with a root file system.
pub struct Bench {
    pub folder: PathBuf,
}

impl Bench {
    pub fn new() -> Self {
        let folder = std::env::temp_dir().join(format!("guest-runtime-{}", std::process::id()));
        let root = folder.join("rootfs");
        for name in ["bin", "etc", "proc", "dev", "sys", "tmp"] {
            fs::create_dir_all(root.join(name)).unwrap();
        }
        fs::copy(BUSYBOX, root.join("bin/busybox")).unwrap();
        let applets = Command::new(BUSYBOX).arg("--list").output().unwrap().stdout;
        for applet in String::from_utf8(applets).unwrap().lines().filter(|name| *name != "busybox") {
            symlink("busybox", root.join("bin").join(applet)).unwrap();
        }
        fs::write(
            root.join("etc/passwd"),
            "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n",
        )
        .unwrap();
        fs::write(root.join("bin/garbage"), "\x01\x02 not a program").unwrap();
        fs::set_permissions(root.join("bin/garbage"), fs::Permissions::from_mode(0o755)).unwrap();
        fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
        Self { folder }
    }

    pub fn spec(&self, name: &str, arguments: &[&str]) -> Spec {
        let mut root = Root::default();
        root.set_path(self.folder.join("rootfs")).set_readonly(Some(false));
        let mut spec = Spec::default();
        let mut linux = spec.linux().clone().unwrap();
        let namespaces = [
            LinuxNamespaceType::Pid,
            LinuxNamespaceType::Mount,
            LinuxNamespaceType::Ipc,
            LinuxNamespaceType::Uts,
            LinuxNamespaceType::Network,
        ];
        let namespace = |kind| {
            let mut namespace = LinuxNamespace::default();
            namespace.set_typ(kind).set_path(None);
            namespace
        };
        let mut resources = linux.resources().clone().unwrap_or_default();
        resources.set_devices(Some(defaults::device_rules()));
        linux
            .set_namespaces(Some(namespaces.map(namespace).to_vec()))
            .set_cgroups_path(Some(cgroup_path(name)))
            .set_masked_paths(Some(defaults::masked_paths()))
            .set_readonly_paths(Some(defaults::readonly_paths()))
            .set_seccomp(Some(defaults::seccomp_profile(&defaults::capabilities())))
            .set_resources(Some(resources));
        spec.set_root(Some(root))
            .set_hostname(Some(name.to_owned()))
            .set_mounts(Some(defaults::mounts(defaults::SHM_SIZE_BYTES)))
            .set_process(Some(process(arguments)))
            .set_linux(Some(linux));
        spec
    }

    /// A shim for a container that runs a program, with changes to the defaults.
    pub fn shim_with(&self, arguments: &[&str], change: impl FnOnce(&mut ShimSpec, &mut Spec)) -> Shim {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("c{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        let dir = self.folder.join(&name);
        fs::create_dir_all(dir.join("engine")).unwrap();
        let mut spec = self.spec(&name, arguments);
        let log = Log {
            driver: LogDriver::JsonFile,
            path: dir.join("json.log"),
            max_size_bytes: None,
            max_files: None,
            ..Log::default()
        };
        let mut shim_spec = ShimSpec {
            container: name.clone(),
            bundle: dir.join("engine"),
            terminal: false,
            stdin: Stdin::None,
            log,
            console_size: None,
            filters: Some(self.folder.clone()),
            mounts: None,
            runtime: None,
        };
        change(&mut shim_spec, &mut spec);
        spec.save(dir.join("engine/config.json")).unwrap();
        record::write(&dir, SPEC_FILE, &shim_spec).unwrap();
        let child = launch(Path::new(SHIM), &dir).unwrap();
        Shim { dir, cgroup: cgroup_path(&name), child: Some(child) }
    }

    pub fn shim(&self, arguments: &[&str]) -> Shim {
        self.shim_with(arguments, |_, _| {})
    }

    pub fn shell(&self, script: &str) -> Shim {
        self.shim(&["sh", "-c", script])
    }

    /// A started container that does nothing.
    pub fn idle(&self) -> Shim {
        let shim = self.shim(&["sleep", "1000"]);
        shim.connect().create().unwrap();
        shim.connect().start(None).unwrap();
        shim
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.folder).unwrap();
    }
}

pub fn cgroup_path(name: &str) -> PathBuf {
    format!("/guest-runtime-test-{}-{name}", std::process::id()).into()
}

pub fn process(arguments: &[&str]) -> Process {
    let mut process = Process::default();
    process
        .set_args(Some(arguments.iter().map(|argument| (*argument).to_owned()).collect()))
        .set_env(Some(vec!["PATH=/sbin:/bin".into(), "B=2".into(), "A=1".into()]))
        .set_cwd("/".into())
        .set_capabilities(Some(defaults::sets(&defaults::capabilities())))
        .set_no_new_privileges(Some(false))
        .set_terminal(Some(false));
    process
}

pub struct Shim {
    pub dir: PathBuf,
    pub cgroup: PathBuf,
    pub child: Option<Child>,
}

impl Shim {
    pub fn connect(&self) -> Connection {
        let connection = Connection::open(&self.dir).unwrap();
        connection.set_timeout(Some(TIMEOUT)).unwrap();
        connection
    }

    /// Create, attach, start, wait: status, output, errors.
    pub fn run(&self) -> (Exit, String, String) {
        self.connect().create().unwrap();
        let mut attached = self.connect().attach(None, false, true, true).unwrap();
        self.connect().start(None).unwrap();
        let (stdout, stderr) = attached.read_split().unwrap();
        let exit = self.connect().wait(None).unwrap();
        (exit, String::from_utf8_lossy(&stdout).into_owned(), String::from_utf8_lossy(&stderr).into_owned())
    }

    pub fn exec(
        &self,
        id: &str,
        process: Process,
        terminal: bool,
        stdin: Stdin,
    ) -> Result<(), ConnectionError> {
        let size = terminal.then_some(ConsoleSize { width: 90, height: 30 });
        let process = Box::new(process);
        self.connect().ask(&Request::Exec { id: id.to_owned(), process, terminal, stdin, console_size: size })
    }

    /// Runs a program beside init: status and output.
    pub fn exec_output(&self, id: &str, arguments: &[&str]) -> (i32, String) {
        let id = Some(id.to_owned());
        self.exec(id.as_deref().unwrap(), process(arguments), false, Stdin::None).unwrap();
        let mut attached = self.connect().attach(id.clone(), false, true, true).unwrap();
        self.connect().start(id.clone()).unwrap();
        let (stdout, stderr) = attached.read_split().unwrap();
        let exit = self.connect().wait(id).unwrap();
        (exit.code, String::from_utf8_lossy(&[stdout, stderr].concat()).into_owned())
    }

    /// Delete, and then nothing is left.
    pub fn delete(mut self) {
        self.connect().ask(&Request::Delete).unwrap();
        let status = self.child.take().unwrap().wait().unwrap();
        assert!(status.success(), "{status}: {}", self.errors());
        self.assert_clean();
    }

    pub fn assert_clean(&self) {
        assert!(!Cgroup::open(&self.cgroup).unwrap().exists());
        for name in ["runtime", "bundle", "state.json", "shim.sock"] {
            assert!(!self.dir.join(name).exists(), "{name}");
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(self.dir.parent().unwrap().to_str().unwrap()), "{mounts}");
    }

    pub fn errors(&self) -> String {
        fs::read_to_string(self.dir.join("shim.log")).unwrap()
    }

    pub fn kill_shim(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

impl Drop for Shim {
    fn drop(&mut self) {
        if std::thread::panicking() {
            say(&format!("the shim of {} said: {}", self.dir.display(), self.errors()));
        }
        if self.child.is_some() {
            self.kill_shim();
            reap(&self.dir).unwrap();
        }
    }
}

pub fn refusal<T: std::fmt::Debug>(result: Result<T, ConnectionError>) -> (ErrorKind, String) {
    match result {
        Err(ConnectionError::Refused { kind, message }) => (kind, message),
        other => panic!("expected a refusal, got {other:?}"),
    }
}

pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + TIMEOUT;
    while !condition() {
        assert!(Instant::now() < deadline, "waited {TIMEOUT:?} for: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
