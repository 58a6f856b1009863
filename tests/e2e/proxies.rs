//! A computer whose way out is a proxy: Debian's tinyproxy on its loopback, with names that only the proxy knows.

use crate::networks::docker;
use crate::registries::Authority;
use anyhow::{Context, Result, bail, ensure};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use tests_harness::{Engine, Layer, TestImage, wait_until};

crate::scenarios![images_come_by_way_of_the_hosts_proxy];

/// A registry that the engine cannot find by itself.
const BEHIND: &str = "registry.example";

struct Tinyproxy {
    child: Child,
    port: u16,
    log: PathBuf,
}

impl Drop for Tinyproxy {
    fn drop(&mut self) {
        // One that has ended by itself cannot be killed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Tinyproxy {
    /// Starts one on the loopback interface, for which [`BEHIND`] is there too.
    fn start(folder: &Path) -> Result<Self> {
        std::fs::write(folder.join("hosts"), format!("127.0.0.1 localhost {BEHIND}\n"))?;
        let log = folder.join("proxy.log");
        for _ in 0..5 {
            let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
            let settings = format!(
                "Port {port}\nListen 127.0.0.1\nAllow 127.0.0.1\nTimeout 600\nMaxClients 100\nLogFile \"{}\"\n\
                 LogLevel Connect\n",
                log.display()
            );
            std::fs::write(folder.join("proxy.conf"), settings)?;
            let mut command = Command::new("unshare");
            if !rustix::process::geteuid().is_root() {
                command.arg("--map-root-user");
            }
            let script = "mount --bind hosts /etc/hosts && exec tinyproxy -d -c proxy.conf";
            command.args(["--mount", "sh", "-c", script]).current_dir(folder);
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            let child = command.spawn().context("cannot run `unshare`")?;
            let mut proxy = Self { child, port, log: log.clone() };
            let answers = wait_until("the proxy answers", || {
                if let Some(status) = proxy.child.try_wait()? {
                    bail!("the proxy ended at once ({status}): run installer/setup --tests");
                }
                Ok(TcpStream::connect((Ipv4Addr::LOCALHOST, port)).ok().map(drop))
            });
            if answers.is_ok() {
                return Ok(proxy);
            }
        }
        bail!("tinyproxy does not start, or found no free port in five tries")
    }

    /// Its log, once somebody has asked for `what`.
    fn log_with(&self, what: &str) -> Result<String> {
        wait_until("the proxy tells whom it was asked for", || {
            Ok(Some(std::fs::read_to_string(&self.log)?).filter(|log| log.contains(what)))
        })
        .with_context(|| what.to_owned())
    }
}

fn images_come_by_way_of_the_hosts_proxy(engine: &Engine) -> Result<()> {
    let folder = engine.path("proxied");
    std::fs::create_dir(&folder)?;
    let authority = Authority::new()?;
    let registry = authority.registry(engine, BEHIND)?;
    // The one that everybody uses is an exception, of which the proxy is not to hear.
    let plain = engine.registry_name();
    let exception = plain.rsplit_once(':').map_or(plain.as_str(), |(host, _)| host);
    let proxy = Tinyproxy::start(&folder)?;
    let secure = format!("{BEHIND}:{}", registry.port());
    let certificates = engine.certificates().join(&secure);
    std::fs::create_dir_all(&certificates)?;
    authority.show_client(&certificates)?;
    let image =
        TestImage::new(vec![Layer::busybox()?, Layer::files([("proxied", b"by tinyproxy".to_vec())])?]);
    engine.registry().push(&image, "proxied", "1")?;
    let direct = format!("{plain}/proxied:1");
    let behind = format!("{secure}/proxied:1");
    let address = format!("http://localhost:{}", proxy.port);

    let proxies = [("HTTP_PROXY", &*address), ("HTTPS_PROXY", &address), ("NO_PROXY", exception)];
    engine.boot_again_with_environment(&proxies)?;
    docker(engine, &["pull", "-q", &direct])?.ok()?;
    docker(engine, &["tag", &direct, &behind])?.ok()?;
    // Both ways through the tunnel that a proxy makes for TLS.
    docker(engine, &["push", "-q", &behind])?.ok()?;
    docker(engine, &["rmi", &direct, &behind])?.ok()?;
    docker(engine, &["pull", "-q", &behind])?.ok()?;
    let said = docker(engine, &["run", "--rm", &behind, "cat", "/proxied"])?.ok()?;
    ensure!(said == "by tinyproxy", "{said}");
    docker(engine, &["rmi", &behind])?.ok()?;
    let log = proxy.log_with(&format!("CONNECT {secure} "))?;
    ensure!(!log.contains(exception), "the exception went by way of the proxy: {log}");
    engine.boot_again_with_environment(&[])?;
    std::fs::remove_dir_all(certificates)?;
    Ok(std::fs::remove_dir_all(folder)?)
}
