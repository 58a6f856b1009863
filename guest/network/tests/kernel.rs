//! The kernel objects for real, each test in network and mount namespaces of its own that end with it.
#![forbid(unsafe_code)]

use std::fs::File;
use std::future::Future;
use std::io::Read;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use guest_network::{
    Bridge, BridgeError, BridgeSpec, Endpoint, EndpointError, EndpointSpec, Firewall, FirewallNetwork, Ipam,
    Mac, Sandbox, SandboxError, forwarding,
};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};

const CONTAINER: &str = "3f2a9c1d77e04b5c";
const OTHER: &str = "aaaa9c1d77e04b5c";

/// Runs `body` on a thread in fresh namespaces; where the tests do not run as root, in a user namespace as well,
/// which only a fresh process can enter.
fn in_namespaces<F: Future<Output = ()>>(name: &str, body: impl FnOnce() -> F + Send + 'static) {
    if !nix::unistd::geteuid().is_root() {
        let status = Command::new("unshare")
            .args(["--map-root-user", "--net", "--mount"])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", name, "--nocapture"])
            .status()
            .unwrap();
        assert!(status.success(), "{name} in a user namespace: {status}");
        return;
    }
    let thread = thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).unwrap();
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
        // Its blocking threads are made by this thread and so share its namespaces.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(body());
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Runs `work` inside a sandbox.
fn inside<T: Send>(sandbox: &Sandbox, work: impl FnOnce() -> T + Send) -> T {
    let namespace = File::open(sandbox.path()).unwrap();
    thread::scope(|scope| {
        scope
            .spawn(|| {
                setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
                work()
            })
            .join()
            .unwrap()
    })
}

fn bridge_spec(name: &str, subnet: &str) -> BridgeSpec {
    let ipam = Ipam::new(subnet.parse().unwrap(), None).unwrap();
    BridgeSpec { name: name.into(), subnet: ipam.subnet(), gateway: ipam.gateway(), mtu: 1400 }
}

fn endpoint_spec(container: &str, address: &str) -> EndpointSpec {
    EndpointSpec {
        container: container.into(),
        interface: "eth0".into(),
        address: address.parse().unwrap(),
        mac: None,
    }
}

fn ip(args: &[&str]) -> String {
    let output = Command::new("ip").args(args).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

fn interfaces() -> Vec<String> {
    // Not /sys/class/net, which shows the namespace sysfs was mounted in.
    let text = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    text.lines().skip(2).map(|line| line.split(':').next().unwrap().trim().to_owned()).collect()
}

/// Connects, says a word, and returns what the listener heard and whom it saw; the error if nobody answers.
fn talk(from: Option<&Sandbox>, to: &Sandbox, address: Ipv4Addr) -> std::io::Result<(String, IpAddr)> {
    let listener = inside(to, || TcpListener::bind((address, 0)).unwrap());
    let target: SocketAddr = listener.local_addr().unwrap();
    let speak = move || {
        let mut stream = TcpStream::connect_timeout(&target, Duration::from_secs(1))?;
        stream.write_all(b"hello")
    };
    match from {
        Some(sandbox) => inside(sandbox, speak)?,
        None => speak()?,
    }
    let (mut stream, peer) = listener.accept()?;
    let mut heard = String::new();
    stream.read_to_string(&mut heard)?;
    Ok((heard, peer.ip()))
}

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join("netns").join(name)
    }
}

#[test]
fn a_bridge_is_made_once_and_follows_its_spec() {
    in_namespaces("a_bridge_is_made_once_and_follows_its_spec", || async {
        let mut spec = bridge_spec("engine0", "172.17.0.0/16");
        let first = Bridge::ensure(&spec).await.unwrap();
        assert_eq!(Bridge::ensure(&spec).await.unwrap(), first);
        let shown = ip(&["addr", "show", "engine0"]);
        assert!(shown.contains("inet 172.17.0.1/16") && shown.contains("mtu 1400"), "{shown}");
        assert!(shown.contains("02:42:ac:11:00:01") && shown.contains("UP"), "{shown}");

        spec.gateway = Ipv4Addr::new(172, 17, 9, 9);
        spec.mtu = 1500;
        assert_eq!(Bridge::ensure(&spec).await.unwrap().index(), first.index());
        let shown = ip(&["addr", "show", "engine0"]);
        assert!(shown.contains("inet 172.17.9.9/16") && shown.contains("mtu 1500"), "{shown}");
        assert!(!shown.contains("172.17.0.1/"), "{shown}");

        assert!(Bridge::remove("engine0").await.unwrap());
        assert!(!Bridge::remove("engine0").await.unwrap());
        let error = Bridge::ensure(&bridge_spec("lo", "10.0.0.0/24")).await.unwrap_err();
        assert!(matches!(error, BridgeError::NotABridge { .. }), "{error}");
    });
}

#[test]
fn a_sandbox_lives_until_it_is_deleted() {
    in_namespaces("a_sandbox_lives_until_it_is_deleted", || async {
        let folder = Folder::new();
        let path = folder.path("a");
        let sandbox = Sandbox::create(&path).await.unwrap();
        let heard = talk(Some(&sandbox), &sandbox, Ipv4Addr::LOCALHOST).unwrap();
        assert_eq!(heard, ("hello".into(), Ipv4Addr::LOCALHOST.into()), "loopback is up");
        assert!(matches!(Sandbox::create(&path).await, Err(SandboxError::Step { .. })), "taken");
        assert_eq!(Sandbox::open(&path).unwrap(), sandbox);
        assert_eq!(Sandbox::list(path.parent().unwrap()).unwrap(), std::slice::from_ref(&sandbox));

        sandbox.clone().delete().await.unwrap();
        sandbox.delete().await.unwrap();
        assert!(!path.exists());
        let mounts = std::fs::read_to_string("/proc/thread-self/mounts").unwrap();
        assert!(!mounts.contains(path.to_str().unwrap()), "{mounts}");
    });
}

#[test]
fn containers_of_a_bridge_reach_each_other_and_the_gateway() {
    in_namespaces("containers_of_a_bridge_reach_each_other_and_the_gateway", || async {
        let folder = Folder::new();
        let bridge = Bridge::ensure(&bridge_spec("engine0", "172.17.0.0/16")).await.unwrap();
        let one = Sandbox::create(&folder.path("one")).await.unwrap();
        let two = Sandbox::create(&folder.path("two")).await.unwrap();
        let endpoint =
            Endpoint::attach(&bridge, &one, &endpoint_spec(CONTAINER, "172.17.0.2/16")).await.unwrap();
        Endpoint::attach(&bridge, &two, &endpoint_spec(OTHER, "172.17.0.3/16")).await.unwrap();

        assert_eq!(endpoint.mac, Mac([0x02, 0x42, 172, 17, 0, 2]));
        assert_eq!(endpoint.gateway, Ipv4Addr::new(172, 17, 0, 1));
        let shown = inside(&one, || ip(&["addr", "show", "eth0"]));
        assert!(shown.contains("02:42:ac:11:00:02") && shown.contains("172.17.0.2/16"), "{shown}");
        assert!(shown.contains("mtu 1400"), "{shown}");
        assert!(inside(&one, || ip(&["route"])).contains("default via 172.17.0.1 dev eth0"));

        let heard = talk(Some(&one), &two, Ipv4Addr::new(172, 17, 0, 3)).unwrap();
        assert_eq!(heard, ("hello".into(), Ipv4Addr::new(172, 17, 0, 2).into()));
        let heard = talk(None, &two, Ipv4Addr::new(172, 17, 0, 3)).unwrap();
        assert_eq!(heard, ("hello".into(), Ipv4Addr::new(172, 17, 0, 1).into()));
    });
}

#[test]
fn endpoints_come_off_from_both_sides() {
    in_namespaces("endpoints_come_off_from_both_sides", || async {
        let folder = Folder::new();
        let bridge = Bridge::ensure(&bridge_spec("engine0", "172.17.0.0/16")).await.unwrap();
        let sandbox = Sandbox::create(&folder.path("one")).await.unwrap();
        let spec = endpoint_spec(CONTAINER, "172.17.0.2/16");
        Endpoint::attach(&bridge, &sandbox, &spec).await.unwrap();
        assert!(Endpoint::detach(CONTAINER, "eth0").await.unwrap());
        assert!(!Endpoint::detach(CONTAINER, "eth0").await.unwrap());
        assert_eq!(inside(&sandbox, interfaces), ["lo"]);

        // An engine killed after attaching comes again: the leftover makes room, or is removed by id alone.
        Endpoint::attach(&bridge, &sandbox, &spec).await.unwrap();
        Endpoint::attach(&bridge, &sandbox, &spec).await.unwrap();
        let other = Sandbox::create(&folder.path("two")).await.unwrap();
        Endpoint::attach(&bridge, &other, &endpoint_spec(OTHER, "172.17.0.3/16")).await.unwrap();
        assert_eq!(Endpoint::cleanup(CONTAINER).await.unwrap(), 1);
        assert_eq!(Endpoint::cleanup(CONTAINER).await.unwrap(), 0);
        assert_eq!(inside(&sandbox, interfaces), ["lo"]);
        assert!(interfaces().contains(&"veaaaa9c1d77e00".to_owned()), "others stay");
    });
}

#[test]
fn a_failed_attach_leaves_nothing() {
    in_namespaces("a_failed_attach_leaves_nothing", || async {
        let folder = Folder::new();
        let bridge = Bridge::ensure(&bridge_spec("engine0", "172.17.0.0/16")).await.unwrap();
        let before = interfaces();
        let sandbox = Sandbox::create(&folder.path("one")).await.unwrap();
        let spec = endpoint_spec(CONTAINER, "10.0.0.2/24");
        let error = Endpoint::attach(&bridge, &sandbox, &spec).await.unwrap_err();
        assert!(matches!(error, EndpointError::Address { .. }), "{error}");

        // The name inside is taken: the kernel refuses the pair as a whole.
        inside(&sandbox, || ip(&["link", "add", "eth0", "type", "bridge"]));
        let spec = endpoint_spec(CONTAINER, "172.17.0.2/16");
        let error = Endpoint::attach(&bridge, &sandbox, &spec).await.unwrap_err();
        assert!(matches!(error, EndpointError::Kernel { .. }), "{error}");
        assert_eq!(interfaces(), before);

        // A bad hardware address fails after nothing or everything; either way nothing stays.
        inside(&sandbox, || ip(&["link", "del", "eth0"]));
        let spec = EndpointSpec { mac: Some(Mac([1, 0, 0, 0, 0, 0])), ..spec };
        assert!(Endpoint::attach(&bridge, &sandbox, &spec).await.is_err(), "a multicast address");
        assert_eq!(interfaces(), before);
        assert_eq!(inside(&sandbox, interfaces), ["lo"]);

        sandbox.clone().delete().await.unwrap();
        let error = Endpoint::attach(&bridge, &sandbox, &endpoint_spec(CONTAINER, "172.17.0.2/16"))
            .await
            .unwrap_err();
        assert!(matches!(error, EndpointError::Sandbox { .. }), "{error}");
    });
}

#[test]
fn the_world_sees_the_gateway_and_cannot_start_a_conversation() {
    in_namespaces("the_world_sees_the_gateway_and_cannot_start_a_conversation", || async {
        let folder = Folder::new();
        let inner = Bridge::ensure(&bridge_spec("engine0", "172.17.0.0/16")).await.unwrap();
        let outer = Bridge::ensure(&bridge_spec("out0", "203.0.113.0/24")).await.unwrap();
        forwarding::enable().unwrap();
        forwarding::enable().unwrap();
        let network = FirewallNetwork { bridge: "engine0".into(), subnet: inner.spec().subnet };
        let firewall = Firewall::new("engine");
        nft("add table inet neighbour");
        firewall.apply(std::slice::from_ref(&network)).await.unwrap();
        firewall.apply(std::slice::from_ref(&network)).await.unwrap();

        let container = Sandbox::create(&folder.path("container")).await.unwrap();
        let world = Sandbox::create(&folder.path("world")).await.unwrap();
        Endpoint::attach(&inner, &container, &endpoint_spec(CONTAINER, "172.17.0.2/16")).await.unwrap();
        Endpoint::attach(&outer, &world, &endpoint_spec(OTHER, "203.0.113.2/24")).await.unwrap();

        let heard = talk(Some(&container), &world, Ipv4Addr::new(203, 0, 113, 2)).unwrap();
        assert_eq!(heard, ("hello".into(), Ipv4Addr::new(203, 0, 113, 1).into()), "masqueraded");
        let refused = talk(Some(&world), &container, Ipv4Addr::new(172, 17, 0, 2));
        assert_eq!(refused.unwrap_err().kind(), std::io::ErrorKind::TimedOut);

        firewall.remove().await.unwrap();
        firewall.remove().await.unwrap();
        assert_eq!(nft("list tables").trim(), "table inet neighbour", "other tables stay");
        let heard = talk(Some(&world), &container, Ipv4Addr::new(172, 17, 0, 2)).unwrap();
        assert_eq!(heard.1, Ipv4Addr::new(203, 0, 113, 2), "no rule of ours is left");
    });
}

#[test]
fn rules_that_nft_refuses_are_reported_with_its_reason() {
    in_namespaces("rules_that_nft_refuses_are_reported_with_its_reason", || async {
        let firewall = Firewall::new("engine");
        let network =
            |bridge: &str| FirewallNetwork { bridge: bridge.into(), subnet: "10.0.0.0/8".parse().unwrap() };
        firewall.apply(&[network("good0")]).await.unwrap();
        let before = nft("list ruleset");
        let error = firewall.apply(&[network("a-name-that-is-far-too-long")]).await.unwrap_err();
        assert!(error.to_string().starts_with("cannot write firewall table `engine`: "), "{error}");
        assert_eq!(nft("list ruleset"), before, "all or nothing");
    });
}

fn nft(command: &str) -> String {
    let output = Command::new("nft").arg(command).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn twenty_containers_at_once_do_not_disturb_each_other() {
    in_namespaces("twenty_containers_at_once_do_not_disturb_each_other", || async {
        let folder = Folder::new();
        let bridge = Bridge::ensure(&bridge_spec("engine0", "172.17.0.0/16")).await.unwrap();
        let own = namespace_of(Path::new("/proc/thread-self/ns/net"));
        let attach = |number: u8| {
            let (bridge, path) = (&bridge, folder.path(&number.to_string()));
            async move {
                let sandbox = Sandbox::create(&path).await.unwrap();
                let id = format!("{number:012x}");
                let spec = endpoint_spec(&id, &format!("172.17.0.{}/16", number + 2));
                Endpoint::attach(bridge, &sandbox, &spec).await.unwrap();
                sandbox
            }
        };
        let sandboxes = futures_util::future::join_all((0..20).map(attach)).await;
        for (number, sandbox) in sandboxes.iter().enumerate() {
            assert_eq!(inside(sandbox, interfaces), ["lo", "eth0"], "sandbox {number}");
        }
        assert_eq!(namespace_of(Path::new("/proc/thread-self/ns/net")), own);
        futures_util::future::join_all(sandboxes.into_iter().map(Sandbox::delete))
            .await
            .into_iter()
            .collect::<Result<Vec<()>, _>>()
            .unwrap();
    });
}

fn namespace_of(path: &Path) -> PathBuf {
    std::fs::read_link(path).unwrap()
}
