//! Interfaces that are made to be the parents of macvlan and ipvlan networks: one that leads nowhere, where the network has
//! none of the host's, and a VLAN of one of the host's (IEEE 802.1Q).

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use rtnetlink::{LinkDummy, LinkUnspec, LinkVlan};

use crate::blocking;
use crate::endpoint::without_driver;
use crate::netlink::{Netlink, NetlinkError, Request, index_of};

/// Makes an interface that leads nowhere, if it is not there, and switches it on.
///
/// # Errors
/// When the kernel refuses; one without such interfaces is told as such.
pub async fn ensure_dummy(name: &str) -> Result<(), NetlinkError> {
    let name = name.to_owned();
    let made = blocking(move || {
        let mut netlink = Netlink::open()?;
        let action = format!("create the interface `{name}`, which leads nowhere");
        make(&mut netlink, action, LinkDummy::new(&name).build(), "dummy")?;
        let index = index_of(&mut netlink, &name)?;
        netlink.ask(Request::up(index))
    });
    made.await.unwrap_or_else(|error| Err(NetlinkError::Open(error)))
}

/// Removes the interface. Returns whether it was there; another kind of interface is left alone.
///
/// # Errors
/// When the kernel refuses.
pub async fn remove_dummy(name: &str) -> Result<bool, NetlinkError> {
    remove(name, |link| is_of_kind(link, &InfoKind::Dummy)).await
}

/// Makes the interface `name` for the VLAN `id` of `parent`, and switches it on. It bears `owner` as its alias, so that it
/// is known again as made by this. One that is there already is left as it is.
///
/// # Errors
/// When there is no `parent`, or the kernel refuses; one without VLANs is told as such. Then nothing is left.
pub async fn ensure_vlan(parent: &str, id: u16, name: &str, owner: &str) -> Result<(), NetlinkError> {
    let [parent, name, owner] = [parent, name, owner].map(str::to_owned);
    let made = blocking(move || {
        let mut netlink = Netlink::open()?;
        let below = index_of(&mut netlink, &parent)?;
        let action = format!("create the interface `{name}` for VLAN {id} of `{parent}`");
        if !make(&mut netlink, action, LinkVlan::new(&name, below, id).build(), "8021q")? {
            return Ok(());
        }
        let index = index_of(&mut netlink, &name)?;
        let message = LinkUnspec::new_with_index(index).alias(owner).up().build();
        let action = format!("switch on `{name}`");
        let switched = netlink.ask(Request::change(action, RouteNetlinkMessage::SetLink(message)));
        if switched.is_err()
            && let Err(also) = netlink.remove_link(index)
        {
            tracing::warn!(interface = name, error = %also, "a failed VLAN stays behind");
        }
        switched
    });
    made.await.unwrap_or_else(|error| Err(NetlinkError::Open(error)))
}

/// Removes the interface of a VLAN that `owner` made. Returns whether it was there; others are left alone.
///
/// # Errors
/// When the kernel refuses.
pub async fn remove_vlan(name: &str, owner: &str) -> Result<bool, NetlinkError> {
    let owner = owner.to_owned();
    remove(name, move |link| {
        let alias = LinkAttribute::IfAlias(owner);
        is_of_kind(link, &InfoKind::Vlan) && link.attributes.contains(&alias)
    })
    .await
}

/// Whether it was not there before.
fn make(
    netlink: &mut Netlink,
    action: String,
    link: LinkMessage,
    driver: &str,
) -> Result<bool, NetlinkError> {
    match netlink.ask(Request::create(action, RouteNetlinkMessage::NewLink(link))) {
        Err(error) if error.errno() == Some(nix::libc::EEXIST) => Ok(false),
        other => other.map(|()| true).map_err(|error| without_driver(error, driver)),
    }
}

async fn remove(
    name: &str,
    is_wanted: impl FnOnce(&LinkMessage) -> bool + Send + 'static,
) -> Result<bool, NetlinkError> {
    let name = name.to_owned();
    let removed = blocking(move || {
        let mut netlink = Netlink::open()?;
        match netlink.link(&name)?.filter(is_wanted) {
            Some(link) => netlink.remove_link(link.header.index),
            None => Ok(false),
        }
    });
    removed.await.unwrap_or_else(|error| Err(NetlinkError::Open(error)))
}

fn is_of_kind(link: &LinkMessage, kind: &InfoKind) -> bool {
    link.attributes.iter().any(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => {
            infos.iter().any(|info| matches!(info, LinkInfo::Kind(found) if found == kind))
        }
        _ => false,
    })
}
