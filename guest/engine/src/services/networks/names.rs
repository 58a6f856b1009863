//! The names a container can resolve: those of the containers it shares a network with, and by whom others are known.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use guest_network::Sandbox;
use guest_network::dns::{Listener, Names, Resolution, Resolver, Server, Upstream};
use rand::seq::SliceRandom;

use super::record::{EndpointRecord, is_predefined};
use super::service::Networks;
use super::state::{Member, Place, State};
use crate::failure::Failure;

const DNS_PORT: u16 = 53;

/// What one container may know.
struct View {
    state: Arc<Mutex<State>>,
    container: String,
}

impl View {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The networks of a container in which names count.
fn named_networks(member: &Member) -> impl Iterator<Item = &EndpointRecord> {
    member.endpoints.iter().filter(|endpoint| !is_predefined(&endpoint.network))
}

/// The addresses of all containers known as `name` in a network; `None` when there is none.
fn addresses(state: &State, network: &str, name: &str) -> Option<Vec<IpAddr>> {
    let mut found = None;
    for (_, endpoint) in state.endpoints_of(network) {
        if endpoint.names.iter().any(|known| known.eq_ignore_ascii_case(name)) {
            let addresses: &mut Vec<IpAddr> = found.get_or_insert_default();
            addresses.extend(endpoint.ipv4().into_iter().chain(endpoint.ipv6()).map(|net| net.addr()));
        }
    }
    found
}

impl Names for View {
    fn resolve(&self, name: &str, six: bool) -> Resolution {
        let state = self.state();
        let Some(member) = state.members.get(&self.container) else { return Resolution::Unknown };
        for endpoint in named_networks(member) {
            // `web`, and `web.front` on the network `front`.
            let inner = name
                .len()
                .checked_sub(endpoint.network.len() + 1)
                .filter(|at| name.is_char_boundary(*at))
                .map(|at| name.split_at(at))
                .filter(|(_, tail)| {
                    tail.strip_prefix('.')
                        .is_some_and(|network| network.eq_ignore_ascii_case(&endpoint.network))
                })
                .map(|(inner, _)| inner);
            for candidate in [Some(name), inner].into_iter().flatten() {
                // What this container itself calls another one.
                let linked = endpoint.links.iter().find(|(_, alias)| alias.eq_ignore_ascii_case(candidate));
                let candidate = linked.map_or(candidate, |(target, _)| target.as_str());
                if let Some(found) = addresses(&state, &endpoint.network_id, candidate) {
                    let mut found: Vec<IpAddr> =
                        found.into_iter().filter(|address| address.is_ipv6() == six).collect();
                    found.shuffle(&mut rand::rng());
                    return Resolution::Ours(found);
                }
            }
        }
        Resolution::Unknown
    }

    fn reverse(&self, address: IpAddr) -> Option<String> {
        let state = self.state();
        let member = state.members.get(&self.container)?;
        named_networks(member).find_map(|own| {
            state.endpoints_of(&own.network_id).find_map(|(_, endpoint)| {
                let is_it = endpoint.addresses.iter().any(|net| net.addr() == address);
                is_it.then(|| format!("{}.{}", endpoint.names.first()?, own.network).into()).flatten()
            })
        })
    }
}

impl Resolver for View {
    fn upstreams(&self) -> Vec<Upstream> {
        let (given, has_way_out) = {
            let state = self.state();
            let Some(member) = state.members.get(&self.container) else { return Vec::new() };
            let has_way_out = state.gateways(&member.endpoints) != guest_network::Gateways::default();
            let own = member.record.host.dns.as_ref().filter(|servers| !servers.is_empty());
            let given = own.or(Some(&state.usual_names.servers)).filter(|servers| !servers.is_empty());
            (given.cloned(), has_way_out)
        };
        // The container's own are asked by its own routes, so that a sealed network stays sealed.
        let inside = given.is_some();
        let servers = match given {
            Some(servers) => servers,
            None if has_way_out => host_name_servers(),
            None => Vec::new(),
        };
        servers
            .iter()
            .filter_map(|server| server.parse::<IpAddr>().ok())
            .filter(|server| *server != IpAddr::V4(Listener::ADDRESS))
            .map(|server| Upstream { address: SocketAddr::new(server, DNS_PORT), inside })
            .collect()
    }

    fn forwards_bare_names(&self) -> bool {
        let state = self.state();
        let own =
            state.members.get(&self.container).and_then(|member| member.record.host.dns_options.as_ref());
        let options = own.filter(|options| !options.is_empty()).unwrap_or(&state.usual_names.options);
        // A client that was told to put dots into names does it before it asks again.
        !options.iter().any(|option| option.strip_prefix("ndots:").is_some_and(|dots| dots != "0"))
    }
}

/// The host's own, read each time: they change when the computer moves.
fn host_name_servers() -> Vec<String> {
    let text = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let lines = text.lines().filter_map(|line| line.trim().strip_prefix("nameserver"));
    lines.filter(|rest| rest.starts_with(char::is_whitespace)).map(|rest| rest.trim().to_owned()).collect()
}

impl Networks {
    /// Makes sure that a container on a network of the user's has a name server. Returns whether it has one.
    pub(super) async fn serve_names(&self, container: &str) -> Result<bool, Failure> {
        {
            let state = self.state();
            let Some(member) = state.members.get(container) else { return Ok(false) };
            if member.name_server.is_some() {
                return Ok(true);
            }
            if member.place != Place::Own || named_networks(member).next().is_none() {
                return Ok(false);
            }
        }
        let failed = |error: &(dyn std::error::Error + 'static)| {
            Failure::internal(format!("cannot serve names to container {}", &container[..12]), error)
        };
        let sandbox = Sandbox::open(&self.sandbox_path(container)).map_err(|error| failed(&error))?;
        let listener = Listener::open(&sandbox).await.map_err(|error| failed(&error))?;
        let view = View { state: self.state.clone(), container: container.to_owned() };
        let server = Server::start(listener, Arc::new(view)).map_err(|error| failed(&error))?;
        if let Some(member) = self.state().members.get_mut(container) {
            member.name_server = Some(server);
        }
        Ok(true)
    }

    /// Gives all containers that an earlier engine started their name servers back.
    pub async fn resume(&self) {
        let containers: Vec<String> = self.state().members.keys().cloned().collect();
        for container in containers {
            if let Err(error) = self.serve_names(&container).await {
                tracing::warn!(container = &container[..12], %error, "it cannot resolve names");
            }
        }
    }
}
