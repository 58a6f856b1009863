//! The kernel objects for real, each test in network and mount namespaces of its own that end with it.
#![forbid(unsafe_code)]

mod firewall;
mod foreign;
mod parent;

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
    Bridge, BridgeError, BridgeSpec, Endpoint, EndpointError, EndpointSpec, Firewall, FirewallLanding,
    FirewallLink, FirewallNetwork, FirewallPort, Gateway, Gateways, Mac, Macvlan, Protocol, Rules, Sandbox,
    SandboxError, Uplink, dns, ensure_driver, forwarding,
};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};

const CONTAINER: &str = "3f2a9c1d77e04b5c";
const OTHER: &str = "aaaa9c1d77e04b5c";

/// How long something that will happen is waited for, also where packets are lost while an interface comes up.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long nothing has to happen to be called nothing.
const SILENCE: Duration = Duration::from_secs(1);

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

fn bridge_spec(name: &str, address: &str) -> BridgeSpec {
    BridgeSpec { name: name.into(), addresses: vec![address.parse().unwrap()], mtu: 1400, owned: true }
}

fn endpoint_spec(bridge: &str, container: &str, address: &str) -> EndpointSpec {
    EndpointSpec {
        container: container.into(),
        slot: 0,
        interface: "eth0".into(),
        uplink: Uplink::Bridge { name: bridge.into(), isolated: false, hairpin: true },
        addresses: vec![address.parse().unwrap()],
        mac: None,
        mtu: 1400,
        sysctls: Vec::new(),
    }
}

/// Attaches one endpoint, with a default route through `gateway`.
async fn attach(sandbox: &Sandbox, spec: EndpointSpec, gateway: &str) -> Result<Endpoint, EndpointError> {
    let gateway = Gateway { address: Some(gateway.parse().unwrap()), interface: spec.interface.clone() };
    let gateways = match gateway.address {
        Some(IpAddr::V6(_)) => Gateways { v4: None, v6: Some(gateway) },
        _ => Gateways { v4: Some(gateway), v6: None },
    };
    let container = spec.container.clone();
    Ok(Endpoint::attach(sandbox, &container, vec![spec], gateways).await?.remove(0))
}

fn network(bridge: &str, subnet: &str) -> FirewallNetwork {
    FirewallNetwork {
        bridge: bridge.into(),
        subnets: vec![subnet.parse().unwrap()],
        direct: true,
        hidden: vec![subnet.parse().unwrap()],
        ..FirewallNetwork::default()
    }
}

fn rules(networks: &[FirewallNetwork]) -> Rules {
    Rules { networks: networks.to_vec(), ..Rules::default() }
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
    talk_within(PATIENCE, from, to, address)
}

fn cannot_talk(from: &Sandbox, to: &Sandbox, address: impl Into<Ipv4Addr>) -> bool {
    talk_within(SILENCE, Some(from), to, address.into()).is_err()
}

fn talk_within(
    time: Duration,
    from: Option<&Sandbox>,
    to: &Sandbox,
    address: Ipv4Addr,
) -> std::io::Result<(String, IpAddr)> {
    let listener = inside(to, || TcpListener::bind((address, 0)).unwrap());
    let target: SocketAddr = listener.local_addr().unwrap();
    let speak = move || {
        let mut stream = TcpStream::connect_timeout(&target, time)?;
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
        let mut spec = bridge_spec("engine0", "172.17.0.1/16");
        let first = Bridge::ensure(&spec).await.unwrap();
        assert!(first.was_made());
        assert_eq!(Bridge::ensure(&spec).await.unwrap().index(), first.index());
        let shown = ip(&["addr", "show", "engine0"]);
        assert!(shown.contains("inet 172.17.0.1/16") && shown.contains("mtu 1400"), "{shown}");
        assert!(shown.contains("02:42:ac:11:00:01") && shown.contains("UP"), "{shown}");

        spec.addresses = vec!["172.17.9.9/16".parse().unwrap(), "fd00:1::1/64".parse().unwrap()];
        spec.mtu = 1500;
        assert_eq!(Bridge::ensure(&spec).await.unwrap().index(), first.index());
        let shown = ip(&["addr", "show", "engine0"]);
        assert!(shown.contains("inet 172.17.9.9/16") && shown.contains("mtu 1500"), "{shown}");
        assert!(shown.contains("inet6 fd00:1::1/64") && !shown.contains("172.17.0.1/"), "{shown}");

        assert!(Bridge::remove("engine0").await.unwrap());
        assert!(!Bridge::remove("engine0").await.unwrap());
        let error = Bridge::ensure(&bridge_spec("lo", "10.0.0.1/24")).await.unwrap_err();
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
        Bridge::ensure(&bridge_spec("engine0", "172.17.0.1/16")).await.unwrap();
        let one = Sandbox::create(&folder.path("one")).await.unwrap();
        let two = Sandbox::create(&folder.path("two")).await.unwrap();
        let spec = endpoint_spec("engine0", CONTAINER, "172.17.0.2/16");
        let endpoint = attach(&one, spec, "172.17.0.1").await.unwrap();
        attach(&two, endpoint_spec("engine0", OTHER, "172.17.0.3/16"), "172.17.0.1").await.unwrap();

        assert_eq!(endpoint.mac, Mac([0x02, 0x42, 172, 17, 0, 2]));
        let shown = inside(&one, || ip(&["addr", "show", "eth0"]));
        assert!(shown.contains("02:42:ac:11:00:02") && shown.contains("172.17.0.2/16"), "{shown}");
        assert!(shown.contains("mtu 1400") && !shown.contains("inet6"), "{shown}");
        assert!(inside(&one, || ip(&["route"])).contains("default via 172.17.0.1 dev eth0"));

        let heard = talk(Some(&one), &two, Ipv4Addr::new(172, 17, 0, 3)).unwrap();
        assert_eq!(heard, ("hello".into(), Ipv4Addr::new(172, 17, 0, 2).into()));
        let heard = talk(None, &two, Ipv4Addr::new(172, 17, 0, 3)).unwrap();
        assert_eq!(heard, ("hello".into(), Ipv4Addr::new(172, 17, 0, 1).into()));
    });
}

#[test]
fn both_families_and_several_networks_have_their_default_route() {
    in_namespaces("both_families_and_several_networks_have_their_default_route", || async {
        let folder = Folder::new();
        let mut spec = bridge_spec("a0", "172.20.0.1/24");
        spec.addresses.push("fd00:a::1/64".parse().unwrap());
        Bridge::ensure(&spec).await.unwrap();
        Bridge::ensure(&bridge_spec("b0", "172.21.0.1/24")).await.unwrap();
        let sandbox = Sandbox::create(&folder.path("one")).await.unwrap();
        let mut first = endpoint_spec("a0", CONTAINER, "172.20.0.2/24");
        first.addresses.push("fd00:a::2/64".parse().unwrap());
        first.sysctls.push(("net.ipv4.conf.IFNAME.log_martians".into(), "1".into()));
        let second = EndpointSpec {
            slot: 11,
            interface: "back0".into(),
            ..endpoint_spec("b0", CONTAINER, "172.21.0.2/24")
        };
        let via = |address: &str, interface: &str| {
            Some(Gateway { address: Some(address.parse().unwrap()), interface: interface.into() })
        };
        let gateways = Gateways { v4: via("172.21.0.1", "back0"), v6: via("fd00:a::1", "eth0") };
        Endpoint::attach(&sandbox, CONTAINER, vec![first, second], gateways).await.unwrap();
        assert!(interfaces().contains(&"ve3f2a9c1d77e0b".to_owned()), "{:?}", interfaces());
        let routes = || inside(&sandbox, || ip(&["route"]) + &ip(&["-6", "route"]));
        let shown = routes();
        assert!(shown.contains("default via 172.21.0.1 dev back0"), "{shown}");
        assert!(shown.contains("default via fd00:a::1 dev eth0"), "{shown}");
        let set = inside(&sandbox, || std::fs::read_to_string("/proc/sys/net/ipv4/conf/eth0/log_martians"));
        assert_eq!(set.unwrap().trim(), "1");
        let six = TcpListener::bind("[fd00:a::1]:0").unwrap();
        let port = six.local_addr().unwrap().port();
        inside(&sandbox, || TcpStream::connect(("fd00:a::1", port)).unwrap());
        six.accept().unwrap();

        let gateways = Gateways { v4: via("172.20.0.1", "eth0"), v6: None };
        Endpoint::detach(&sandbox, CONTAINER, 11, "back0", gateways).await.unwrap();
        let shown = routes();
        assert!(shown.contains("default via 172.20.0.1 dev eth0") && !shown.contains("back0"), "{shown}");
        assert!(!shown.contains("default via fd00"), "{shown}");
        Endpoint::detach(&sandbox, CONTAINER, 11, "back0", Gateways::default()).await.unwrap();
        assert!(!routes().contains("default"), "{}", routes());
    });
}

/// One name, and whom to ask about others.
struct OneName(Vec<dns::Upstream>);

impl dns::Names for OneName {
    fn resolve(&self, name: &str, six: bool) -> dns::Resolution {
        match (name, six) {
            ("web", false) => dns::Resolution::Ours(vec![IpAddr::from([10, 0, 0, 7])]),
            ("web", true) => dns::Resolution::Ours(Vec::new()),
            _ => dns::Resolution::Unknown,
        }
    }

    fn reverse(&self, _: IpAddr) -> Option<String> {
        None
    }
}

impl dns::Resolver for OneName {
    fn upstreams(&self) -> Vec<dns::Upstream> {
        self.0.clone()
    }

    fn forwards_bare_names(&self) -> bool {
        true
    }
}

/// `web`, an address, the internet's; id 7, recursion wanted.
const QUERY: [u8; 21] = *b"\x00\x07\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x03web\x00\x00\x01\x00\x01";

#[test]
fn a_sandbox_has_a_name_server_at_its_usual_place() {
    in_namespaces("a_sandbox_has_a_name_server_at_its_usual_place", || async {
        let folder = Folder::new();
        let sandbox = Sandbox::create(&folder.path("one")).await.unwrap();
        // One server inside the sandbox, at an address that exists nowhere else.
        let other = inside(&sandbox, || {
            assert!(
                Command::new("ip")
                    .args(["address", "add", "192.0.2.53/32", "dev", "lo"])
                    .status()
                    .unwrap()
                    .success()
            );
            std::net::UdpSocket::bind("192.0.2.53:0").unwrap()
        });
        let address = other.local_addr().unwrap();
        thread::spawn(move || {
            let mut query = [0; 512];
            while let Ok((length, client)) = other.recv_from(&mut query) {
                query[2] |= 0x80;
                other.send_to(&query[..length], client).unwrap();
            }
        });
        let upstreams = vec![dns::Upstream { address, inside: true }];
        let start = || async {
            let listener = dns::Listener::open(&sandbox).await.unwrap();
            dns::Server::start(listener, std::sync::Arc::new(OneName(upstreams.clone()))).unwrap()
        };
        let server = start().await;
        // An engine that is started again takes over.
        drop(server);
        let _server = start().await;
        let ask = |query: Vec<u8>, over_tcp: bool| {
            let sandbox = sandbox.clone();
            tokio::task::spawn_blocking(move || {
                inside(&sandbox, || {
                    let mut reply = vec![0; 512];
                    let length = if over_tcp {
                        let mut stream = TcpStream::connect(("127.0.0.11", 53)).unwrap();
                        stream.write_all(&(query.len() as u16).to_be_bytes()).unwrap();
                        stream.write_all(&query).unwrap();
                        let mut length = [0; 2];
                        stream.read_exact(&mut length).unwrap();
                        let length = usize::from(u16::from_be_bytes(length));
                        stream.read_exact(&mut reply[..length]).unwrap();
                        length
                    } else {
                        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
                        socket.set_read_timeout(Some(PATIENCE)).unwrap();
                        socket.connect(("127.0.0.11", 53)).unwrap();
                        socket.send(&query).unwrap();
                        socket.recv(&mut reply).unwrap()
                    };
                    reply.truncate(length);
                    reply
                })
            })
        };
        for over_tcp in [false, true] {
            let reply = ask(QUERY.to_vec(), over_tcp).await.unwrap();
            assert_eq!((&reply[..2], reply[3] & 15), (&[0, 7][..], 0));
            assert!(reply.ends_with(&[10, 0, 0, 7]), "{reply:?}");
        }
        let unknown: Vec<u8> = QUERY.iter().map(|byte| if *byte == b'w' { b'x' } else { *byte }).collect();
        let mut theirs = unknown.clone();
        theirs[2] |= 0x80;
        assert_eq!(
            ask(unknown.clone(), false).await.unwrap(),
            theirs,
            "the other server's answer, as it came"
        );
        assert_eq!(ask(unknown, true).await.unwrap()[3] & 15, 2, "nobody to ask over TCP");
        // The port is still the container's.
        inside(&sandbox, || TcpListener::bind(("0.0.0.0", 53)).unwrap());
    });
}

#[test]
fn isolated_ports_reach_the_gateway_and_not_each_other() {
    in_namespaces("isolated_ports_reach_the_gateway_and_not_each_other", || async {
        let folder = Folder::new();
        Bridge::ensure(&bridge_spec("engine0", "172.17.0.1/16")).await.unwrap();
        let one = Sandbox::create(&folder.path("one")).await.unwrap();
        let two = Sandbox::create(&folder.path("two")).await.unwrap();
        let isolated = |container, address| EndpointSpec {
            uplink: Uplink::Bridge { name: "engine0".into(), isolated: true, hairpin: false },
            ..endpoint_spec("engine0", container, address)
        };
        attach(&one, isolated(CONTAINER, "172.17.0.2/16"), "172.17.0.1").await.unwrap();
        attach(&two, isolated(OTHER, "172.17.0.3/16"), "172.17.0.1").await.unwrap();
        assert!(cannot_talk(&one, &two, Ipv4Addr::new(172, 17, 0, 3)));
        assert!(talk(None, &two, Ipv4Addr::new(172, 17, 0, 3)).is_ok());
    });
}

#[test]
fn a_link_opens_one_port_to_one_container() {
    in_namespaces("a_link_opens_one_port_to_one_container", || async {
        let folder = Folder::new();
        Bridge::ensure(&bridge_spec("engine0", "172.17.0.1/16")).await.unwrap();
        forwarding::enable().unwrap();
        forwarding::answer_for_neighbours("engine0").unwrap();
        let mut sandboxes = Vec::new();
        for (name, container, address) in [
            ("one", CONTAINER, "172.17.0.2/16"),
            ("two", OTHER, "172.17.0.3/16"),
            ("three", "bbbb9c1d77e04b5c", "172.17.0.4/16"),
        ] {
            let spec = EndpointSpec {
                uplink: Uplink::Bridge { name: "engine0".into(), isolated: true, hairpin: false },
                ..endpoint_spec("engine0", container, address)
            };
            let sandbox = Sandbox::create(&folder.path(name)).await.unwrap();
            attach(&sandbox, spec, "172.17.0.1").await.unwrap();
            sandboxes.push(sandbox);
        }
        let [one, two, three] = &sandboxes[..] else { panic!() };
        let link = FirewallLink {
            bridge: "engine0".into(),
            from: [172, 17, 0, 2].into(),
            to: [172, 17, 0, 3].into(),
            protocol: Protocol::Tcp,
            port: 5432,
        };
        let apart = FirewallNetwork { direct: false, open: true, ..network("engine0", "172.17.0.0/16") };
        let firewall = Firewall::new("engine-test");
        let rules = Rules { networks: vec![apart], links: vec![link], ..Rules::default() };
        firewall.apply(&rules).await.unwrap();
        let ports: Vec<TcpListener> = inside(two, || {
            [5432, 5433].map(|port| TcpListener::bind(("172.17.0.3", port)).unwrap()).into_iter().collect()
        });
        let back = inside(one, || TcpListener::bind(("172.17.0.2", 5432)).unwrap());
        let reaches = |from: &Sandbox, to: &TcpListener, time| {
            let to = to.local_addr().unwrap();
            inside(from, || TcpStream::connect_timeout(&to, time).is_ok())
        };
        assert!(reaches(one, &ports[0], PATIENCE), "linked");
        assert!(!reaches(one, &ports[1], SILENCE), "another port");
        assert!(!reaches(three, &ports[0], SILENCE), "another container");
        assert!(!reaches(two, &back, SILENCE), "the other way");
        firewall.apply(&Rules { links: Vec::new(), ..rules }).await.unwrap();
        assert!(!reaches(one, &ports[0], SILENCE), "no longer linked");
    });
}

#[test]
fn a_new_sandbox_is_attached_at_once() {
    in_namespaces("a_new_sandbox_is_attached_at_once", || async {
        let folder = Folder::new();
        Bridge::ensure(&bridge_spec("engine0", "172.17.0.1/16")).await.unwrap();
        let gateway = Gateway { address: Some("172.17.0.1".parse().unwrap()), interface: "eth0".into() };
        let gateways = Gateways { v4: Some(gateway), v6: None };
        let spec = |address| vec![endpoint_spec("engine0", CONTAINER, address)];
        let (first, second) = (folder.path("one"), folder.path("two"));
        Endpoint::attach_new(&first, CONTAINER, spec("172.17.0.2/16"), gateways.clone()).await.unwrap();
        let before = interfaces();
        // The host's end of the first is still there, and gives way.
        Endpoint::attach_new(&second, CONTAINER, spec("172.17.0.3/16"), gateways.clone()).await.unwrap();
        assert_eq!(interfaces(), before);
        let (first, second) = (Sandbox::open(&first).unwrap(), Sandbox::open(&second).unwrap());
        assert_eq!(inside(&first, interfaces), ["lo"]);
        assert_eq!(inside(&second, interfaces), ["lo", "eth0"]);
        assert!(inside(&second, || ip(&["route"])).contains("default via 172.17.0.1 dev eth0"));
        talk(Some(&second), &second, Ipv4Addr::new(172, 17, 0, 3)).unwrap();
        // A failure leaves no interface.
        let third = folder.path("three");
        let bad = Gateway { address: Some("172.17.0.1".parse().unwrap()), interface: "eth7".into() };
        let specs =
            vec![endpoint_spec("engine0", OTHER, "172.17.0.4/16"), endpoint_spec("no0", OTHER, "10.0.0.2/8")];
        let gateways = Gateways { v4: Some(bad), v6: None };
        Endpoint::attach_new(&third, OTHER, specs, gateways).await.unwrap_err();
        assert_eq!(interfaces(), before);
        let path = folder.path("none");
        assert_eq!(Endpoint::attach_new(&path, OTHER, Vec::new(), Gateways::default()).await.unwrap(), []);
        assert_eq!(inside(&Sandbox::open(&path).unwrap(), interfaces), ["lo"]);
    });
}

/// Whether this kernel has the driver or not: nothing is made, and what is missing is named.
#[test]
fn a_missing_driver_is_named() {
    in_namespaces("a_missing_driver_is_named", || async {
        let before = interfaces();
        for driver in ["macvlan", "ipvlan"] {
            if let Err(error) = ensure_driver(driver).await {
                assert!(
                    error.to_string().contains(&format!("no {driver} driver (module `{driver}`)")),
                    "{error}"
                );
            }
        }
        assert_eq!(interfaces(), before);
    });
}

#[test]
fn a_macvlan_child_is_on_its_parents_network() {
    in_namespaces("a_macvlan_child_is_on_its_parents_network", || async {
        let folder = Folder::new();
        ip(&["link", "add", "up0", "type", "bridge"]);
        ip(&["link", "set", "up0", "up"]);
        // The name inside may be taken outside: machines have an `eth0`.
        ip(&["link", "add", "eth0", "type", "bridge"]);
        let one = Sandbox::create(&folder.path("one")).await.unwrap();
        let two = Sandbox::create(&folder.path("two")).await.unwrap();
        let child = |container, address| EndpointSpec {
            uplink: Uplink::Macvlan { parent: "up0".into(), mode: Macvlan::Bridge },
            ..endpoint_spec("", container, address)
        };
        attach(&one, child(CONTAINER, "192.0.2.2/24"), "192.0.2.1").await.unwrap();
        attach(&two, child(OTHER, "192.0.2.3/24"), "192.0.2.1").await.unwrap();
        let heard = talk(Some(&one), &two, Ipv4Addr::new(192, 0, 2, 3)).unwrap();
        assert_eq!(heard, ("hello".into(), Ipv4Addr::new(192, 0, 2, 2).into()));
        Endpoint::detach(&one, CONTAINER, 0, "eth0", Gateways::default()).await.unwrap();
        assert_eq!(inside(&one, interfaces), ["lo"]);

        inside(&one, || ip(&["link", "add", "eth0", "type", "bridge"]));
        let error = attach(&one, child(CONTAINER, "192.0.2.2/24"), "192.0.2.1").await.unwrap_err();
        assert!(error.to_string().contains("eth0"), "{error}");
        assert_eq!(inside(&one, interfaces), ["lo", "eth0"], "what was there stays, and nothing else");
        inside(&one, || ip(&["link", "del", "eth0"]));

        let spec = EndpointSpec {
            uplink: Uplink::Ipvlan { parent: "gone0".into(), mode: guest_network::Ipvlan::L2 },
            ..endpoint_spec("", CONTAINER, "192.0.2.2/24")
        };
        let error = attach(&one, spec, "192.0.2.1").await.unwrap_err();
        assert!(matches!(error, EndpointError::Kernel { .. }), "{error}");
    });
}

#[test]
fn endpoints_come_off_from_both_sides() {
    in_namespaces("endpoints_come_off_from_both_sides", || async {
        let folder = Folder::new();
        Bridge::ensure(&bridge_spec("engine0", "172.17.0.1/16")).await.unwrap();
        let sandbox = Sandbox::create(&folder.path("one")).await.unwrap();
        let spec = endpoint_spec("engine0", CONTAINER, "172.17.0.2/16");
        attach(&sandbox, spec.clone(), "172.17.0.1").await.unwrap();
        let ends = Endpoint::host_ends(CONTAINER, &[0, 1]).await.unwrap();
        ends.clone().remove().await.unwrap();
        ends.remove().await.unwrap();
        assert_eq!(inside(&sandbox, interfaces), ["lo"]);

        // An engine killed after attaching comes again: the leftover makes room, or is removed by id alone.
        attach(&sandbox, spec.clone(), "172.17.0.1").await.unwrap();
        attach(&sandbox, spec, "172.17.0.1").await.unwrap();
        let other = Sandbox::create(&folder.path("two")).await.unwrap();
        attach(&other, endpoint_spec("engine0", OTHER, "172.17.0.3/16"), "172.17.0.1").await.unwrap();
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
        Bridge::ensure(&bridge_spec("engine0", "172.17.0.1/16")).await.unwrap();
        let before = interfaces();
        let sandbox = Sandbox::create(&folder.path("one")).await.unwrap();
        let good = endpoint_spec("engine0", CONTAINER, "172.17.0.2/16");
        let second = EndpointSpec { slot: 1, ..endpoint_spec("none0", CONTAINER, "10.0.0.2/24") };
        let error = Endpoint::attach(&sandbox, CONTAINER, vec![good.clone(), second], Gateways::default())
            .await
            .unwrap_err();
        assert!(matches!(error, EndpointError::Kernel { .. }), "{error}");
        assert_eq!((interfaces(), inside(&sandbox, interfaces)), (before.clone(), vec!["lo".to_owned()]));

        // The name inside is taken: the kernel refuses the pair as a whole.
        inside(&sandbox, || ip(&["link", "add", "eth0", "type", "bridge"]));
        let error = attach(&sandbox, good.clone(), "172.17.0.1").await.unwrap_err();
        assert!(matches!(error, EndpointError::Kernel { .. }), "{error}");
        assert_eq!(interfaces(), before);
        assert_eq!(inside(&sandbox, interfaces), ["lo", "eth0"], "what was there stays");

        // A bad hardware address fails after nothing or everything; either way nothing stays. So does a bad setting.
        inside(&sandbox, || ip(&["link", "del", "eth0"]));
        let bad = EndpointSpec { mac: Some(Mac([1, 0, 0, 0, 0, 0])), ..good.clone() };
        assert!(attach(&sandbox, bad, "172.17.0.1").await.is_err(), "a multicast address");
        let sysctls = vec![("net.ipv4.conf.IFNAME.nonsense".to_owned(), "1".to_owned())];
        assert!(attach(&sandbox, EndpointSpec { sysctls, ..good.clone() }, "172.17.0.1").await.is_err());
        assert_eq!(interfaces(), before);
        assert_eq!(inside(&sandbox, interfaces), ["lo"]);

        sandbox.clone().delete().await.unwrap();
        let error = attach(&sandbox, good, "172.17.0.1").await.unwrap_err();
        assert!(matches!(error, EndpointError::Sandbox { .. }), "{error}");
    });
}

#[test]
fn the_world_sees_the_gateway_and_cannot_start_a_conversation() {
    in_namespaces("the_world_sees_the_gateway_and_cannot_start_a_conversation", || async {
        let folder = Folder::new();
        Bridge::ensure(&bridge_spec("engine0", "172.17.0.1/16")).await.unwrap();
        Bridge::ensure(&bridge_spec("out0", "203.0.113.1/24")).await.unwrap();
        forwarding::enable().unwrap();
        forwarding::enable().unwrap();
        let networks = rules(&[network("engine0", "172.17.0.0/16")]);
        let firewall = Firewall::new("engine");
        nft("add table inet neighbour");
        firewall.apply(&networks).await.unwrap();
        firewall.apply(&networks).await.unwrap();

        let container = Sandbox::create(&folder.path("container")).await.unwrap();
        let world = Sandbox::create(&folder.path("world")).await.unwrap();
        let spec = endpoint_spec("engine0", CONTAINER, "172.17.0.2/16");
        attach(&container, spec, "172.17.0.1").await.unwrap();
        attach(&world, endpoint_spec("out0", OTHER, "203.0.113.2/24"), "203.0.113.1").await.unwrap();

        let heard = talk(Some(&container), &world, Ipv4Addr::new(203, 0, 113, 2)).unwrap();
        assert_eq!(heard, ("hello".into(), Ipv4Addr::new(203, 0, 113, 1).into()), "masqueraded");
        let refused = talk_within(SILENCE, Some(&world), &container, Ipv4Addr::new(172, 17, 0, 2));
        assert_eq!(refused.unwrap_err().kind(), std::io::ErrorKind::TimedOut);

        // Somebody flushed everything; saying it again makes it whole.
        nft("flush ruleset");
        assert!(talk(Some(&world), &container, Ipv4Addr::new(172, 17, 0, 2)).is_ok());
        firewall.apply(&networks).await.unwrap();
        assert!(cannot_talk(&world, &container, Ipv4Addr::new(172, 17, 0, 2)));
        let mut trusting = networks;
        trusting.networks[0].trusted = vec!["out0".into()];
        firewall.apply(&trusting).await.unwrap();
        let heard = talk(Some(&world), &container, Ipv4Addr::new(172, 17, 0, 2)).unwrap();
        assert_eq!(heard.1, Ipv4Addr::new(203, 0, 113, 2), "a trusted interface");

        nft("add table inet neighbour");
        firewall.remove().await.unwrap();
        firewall.remove().await.unwrap();
        assert_eq!(nft("list tables").trim(), "table inet neighbour", "other tables stay");
    });
}

#[test]
fn published_ports_answer_the_world_the_host_and_the_container_itself() {
    in_namespaces("published_ports_answer_the_world_the_host_and_the_container_itself", || async {
        let folder = Folder::new();
        ip(&["link", "set", "lo", "up"]);
        let mut inner = bridge_spec("engine0", "172.17.0.1/16");
        inner.addresses.push("fd00:17::1/64".parse().unwrap());
        Bridge::ensure(&inner).await.unwrap();
        Bridge::ensure(&bridge_spec("out0", "203.0.113.1/24")).await.unwrap();
        forwarding::enable().unwrap();
        forwarding::enable_ipv6().unwrap();
        forwarding::enable_loopback("engine0").unwrap();
        let container = Sandbox::create(&folder.path("container")).await.unwrap();
        let world = Sandbox::create(&folder.path("world")).await.unwrap();
        let mut spec = endpoint_spec("engine0", CONTAINER, "172.17.0.2/16");
        spec.addresses.push("fd00:17::2/64".parse().unwrap());
        attach(&container, spec, "172.17.0.1").await.unwrap();
        attach(&world, endpoint_spec("out0", OTHER, "203.0.113.2/24"), "203.0.113.1").await.unwrap();

        let listener = inside(&container, || TcpListener::bind("[::]:0").unwrap());
        let container_port = listener.local_addr().unwrap().port();
        let port = |host: &str, host_port, container: &str| FirewallPort {
            protocol: Protocol::Tcp,
            host: host.parse().unwrap(),
            host_port,
            container: container.parse().unwrap(),
            container_port,
        };
        let mut subnets = network("engine0", "172.17.0.0/16");
        subnets.subnets.push("fd00:17::/64".parse().unwrap());
        let rules = Rules {
            networks: vec![subnets],
            ports: vec![
                port("0.0.0.0", 8080, "172.17.0.2"),
                port("127.0.0.1", 8081, "172.17.0.2"),
                port("::", 8080, "fd00:17::2"),
            ],
            ..Rules::default()
        };
        Firewall::new("engine").apply(&rules).await.unwrap();
        let reach_within = |time, address: &str| {
            let target: SocketAddr = address.parse().unwrap();
            let mut stream = TcpStream::connect_timeout(&target, time)?;
            stream.write_all(b"hello")?;
            let (mut stream, peer) = listener.accept()?;
            let mut heard = [0; 5];
            stream.read_exact(&mut heard)?;
            std::io::Result::Ok(peer.ip().to_canonical().to_string())
        };
        let reach = |address: &str| reach_within(PATIENCE, address);
        let cannot_reach = |address: &str| reach_within(SILENCE, address).is_err();
        assert_eq!(inside(&world, || reach("203.0.113.1:8080")).unwrap(), "203.0.113.2", "the true peer");
        assert_eq!(reach("127.0.0.1:8080").unwrap(), "172.17.0.1");
        assert_eq!(reach("127.0.0.1:8081").unwrap(), "172.17.0.1");
        assert_eq!(reach("203.0.113.1:8080").unwrap(), "203.0.113.1");
        assert_eq!(inside(&container, || reach("172.17.0.1:8080")).unwrap(), "172.17.0.1", "itself");
        assert_eq!(reach("[fd00:17::1]:8080").unwrap(), "fd00:17::1");
        assert!(inside(&world, || cannot_reach("203.0.113.1:8081")), "only on loopback");
        // A neighbour that sends packets for our loopback address does not reach what is published there.
        inside(&world, || {
            ip(&["link", "set", "lo", "down"]);
            std::fs::write("/proc/sys/net/ipv4/conf/all/route_localnet", "1").unwrap();
            ip(&["addr", "del", "127.0.0.1/8", "dev", "lo"]);
            ip(&["route", "add", "127.0.0.1/32", "via", "203.0.113.1"]);
        });
        assert!(inside(&world, || cannot_reach("127.0.0.1:8081")));
    });
}

#[test]
fn connections_land_from_outside_only_and_come_from_the_bridge() {
    in_namespaces("connections_land_from_outside_only_and_come_from_the_bridge", || async {
        let folder = Folder::new();
        let mut inner = bridge_spec("engine0", "172.17.0.1/16");
        inner.addresses.push("fd00:17::1/64".parse().unwrap());
        Bridge::ensure(&inner).await.unwrap();
        let mut outer = bridge_spec("out0", "198.18.0.2/24");
        outer.addresses.push("fd07::2/64".parse().unwrap());
        Bridge::ensure(&outer).await.unwrap();
        forwarding::enable().unwrap();
        forwarding::enable_ipv6().unwrap();
        let container = Sandbox::create(&folder.path("container")).await.unwrap();
        let world = Sandbox::create(&folder.path("world")).await.unwrap();
        let mut spec = endpoint_spec("engine0", CONTAINER, "172.17.0.2/16");
        spec.addresses.push("fd00:17::2/64".parse().unwrap());
        // Without a default route in IPv6: answers do not need one.
        attach(&container, spec, "172.17.0.1").await.unwrap();
        let mut spec = endpoint_spec("out0", OTHER, "198.18.0.254/24");
        spec.addresses.push("fd07::fe/64".parse().unwrap());
        attach(&world, spec, "198.18.0.2").await.unwrap();
        // As the machine's network does: it sends to the guest whatever the address.
        inside(&world, || {
            ip(&["route", "add", "198.18.0.3/32", "via", "198.18.0.2"]);
            ip(&["route", "add", "fd07::3/128", "via", "fd07::2"]);
        });
        let listener = inside(&container, || TcpListener::bind("[::]:80").unwrap());
        ip(&["link", "set", "lo", "up"]);
        forwarding::enable_loopback("out0").unwrap();
        let own = TcpListener::bind("127.0.0.1:0").unwrap();
        let landing = |at: &str, container: &str| FirewallLanding {
            at: at.parse().unwrap(),
            container: container.parse().unwrap(),
        };
        let mut subnets = network("engine0", "172.17.0.0/16");
        subnets.subnets.push("fd00:17::/64".parse().unwrap());
        let rules = Rules {
            networks: vec![subnets],
            landing: vec!["198.18.0.3".parse().unwrap(), "fd07::3".parse().unwrap()],
            landings: vec![
                landing("198.18.0.3:1024", "172.17.0.2:80"),
                landing("[fd07::3]:1025", "[fd00:17::2]:80"),
                landing("198.18.0.3:1026", &own.local_addr().unwrap().to_string()),
            ],
            ..Rules::default()
        };
        Firewall::new("engine").apply(&rules).await.unwrap();
        let reach = |address: &str, listener: &TcpListener| {
            let mut client = TcpStream::connect_timeout(&address.parse().unwrap(), PATIENCE)?;
            client.write_all(b"hello")?;
            let (mut stream, peer) = listener.accept()?;
            let mut heard = [0; 5];
            stream.read_exact(&mut heard)?;
            stream.write_all(&heard)?;
            client.read_exact(&mut heard)?;
            std::io::Result::Ok(peer.ip().to_canonical().to_string())
        };
        assert_eq!(inside(&world, || reach("198.18.0.3:1024", &listener)).unwrap(), "172.17.0.1");
        assert_eq!(inside(&world, || reach("[fd07::3]:1025", &listener)).unwrap(), "fd00:17::1");
        assert_eq!(inside(&world, || reach("198.18.0.3:1026", &own)).unwrap(), "127.0.0.1");
        let refused = |address: &str| {
            let error = TcpStream::connect_timeout(&address.parse().unwrap(), PATIENCE).unwrap_err();
            error.kind() == std::io::ErrorKind::ConnectionRefused
        };
        for nowhere in ["198.18.0.3:1025", "[fd07::3]:1024"] {
            assert!(inside(&world, || refused(nowhere)), "{nowhere} leads nowhere, and says so");
        }
        assert!(inside(&container, || refused("198.18.0.3:1024")), "nobody's, for a container");
    });
}

#[test]
fn internal_networks_are_sealed_and_others_apart() {
    in_namespaces("internal_networks_are_sealed_and_others_apart", || async {
        let folder = Folder::new();
        let mut sandboxes = Vec::new();
        for (number, name) in ["in0", "a0", "b0"].into_iter().enumerate() {
            Bridge::ensure(&bridge_spec(name, &format!("10.0.{number}.1/24"))).await.unwrap();
            let sandbox = Sandbox::create(&folder.path(name)).await.unwrap();
            let id = format!("{number:012x}");
            let spec = endpoint_spec(name, &id, &format!("10.0.{number}.2/24"));
            attach(&sandbox, spec, &format!("10.0.{number}.1")).await.unwrap();
            sandboxes.push(sandbox);
        }
        forwarding::enable().unwrap();
        let mut networks =
            [network("in0", "10.0.0.0/24"), network("a0", "10.0.1.0/24"), network("b0", "10.0.2.0/24")];
        networks[0].internal = true;
        Firewall::new("engine").apply(&rules(&networks)).await.unwrap();
        let [sealed, a, b] = &sandboxes[..] else { panic!() };
        for (from, to, address) in [
            (a, b, [10, 0, 2, 2]),
            (b, a, [10, 0, 1, 2]),
            (a, sealed, [10, 0, 0, 2]),
            (sealed, a, [10, 0, 1, 2]),
        ] {
            assert!(cannot_talk(from, to, address), "{address:?}");
        }
        assert!(talk(None, sealed, [10, 0, 0, 2].into()).is_ok(), "the host itself");
        networks[1].open = true;
        Firewall::new("engine").apply(&rules(&networks)).await.unwrap();
        assert!(talk(Some(b), a, [10, 0, 1, 2].into()).is_ok());
        assert!(cannot_talk(sealed, a, [10, 0, 1, 2]));
    });
}

#[test]
fn rules_that_nft_refuses_are_reported_with_its_reason() {
    in_namespaces("rules_that_nft_refuses_are_reported_with_its_reason", || async {
        let firewall = Firewall::new("engine");
        firewall.apply(&rules(&[network("good0", "10.0.0.0/8")])).await.unwrap();
        let before = nft("list ruleset");
        let overlapping = [network("a0", "10.0.0.0/8"), network("a0", "10.1.0.0/16")];
        let error = firewall.apply(&rules(&overlapping)).await.unwrap_err();
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
        Bridge::ensure(&bridge_spec("engine0", "172.17.0.1/16")).await.unwrap();
        let own = namespace_of(Path::new("/proc/thread-self/ns/net"));
        let attach = |number: u8| {
            let path = folder.path(&number.to_string());
            async move {
                let sandbox = Sandbox::create(&path).await.unwrap();
                let id = format!("{number:012x}");
                let spec = endpoint_spec("engine0", &id, &format!("172.17.0.{}/16", number + 2));
                attach(&sandbox, spec, "172.17.0.1").await.unwrap();
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
