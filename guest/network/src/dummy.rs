//! An interface that leads nowhere: the parent of a macvlan or ipvlan network that has none of the host's.

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use rtnetlink::{LinkDummy, LinkUnspec};

use crate::blocking;
use crate::endpoint::without_driver;
use crate::netlink::{Netlink, NetlinkError, Request};

/// Makes the interface, if it is not there, and switches it on.
///
/// # Errors
/// When the kernel refuses; one without such interfaces is told as such.
pub async fn ensure_dummy(name: &str) -> Result<(), NetlinkError> {
    let name = name.to_owned();
    blocking(move || {
        let mut netlink = Netlink::open()?;
        let action = || format!("create the interface `{name}`, which leads nowhere");
        let link = LinkDummy::new(&name).build();
        match netlink.ask(Request::create(action(), RouteNetlinkMessage::NewLink(link))) {
            Err(error) if error.errno() == Some(nix::libc::EEXIST) => {}
            other => other.map_err(|error| without_driver(error, "dummy"))?,
        }
        let index = match netlink.link(&name)? {
            Some(link) => link.header.index,
            None => return Err(NetlinkError::refused(action(), nix::libc::ENODEV)),
        };
        let up = LinkUnspec::new_with_index(index).up().build();
        netlink.ask(Request::change(format!("switch on `{name}`"), RouteNetlinkMessage::SetLink(up)))
    })
    .await
    .unwrap_or_else(|error| Err(NetlinkError::Open(error)))
}

/// Removes the interface. Returns whether it was there; another kind of interface is left alone.
///
/// # Errors
/// When the kernel refuses.
pub async fn remove_dummy(name: &str) -> Result<bool, NetlinkError> {
    let name = name.to_owned();
    blocking(move || {
        let mut netlink = Netlink::open()?;
        match netlink.link(&name)?.filter(is_dummy) {
            Some(link) => netlink.remove_link(link.header.index),
            None => Ok(false),
        }
    })
    .await
    .unwrap_or_else(|error| Err(NetlinkError::Open(error)))
}

fn is_dummy(link: &LinkMessage) -> bool {
    link.attributes.iter().any(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => {
            infos.iter().any(|info| matches!(info, LinkInfo::Kind(InfoKind::Dummy)))
        }
        _ => false,
    })
}
