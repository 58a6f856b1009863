//! UDP: an association of a guest's port with one peer, ended by silence.
//!
//! Each association has a connected host socket of its own, so that the host's "port unreachable" reaches the right
//! guest port and strangers' datagrams reach nobody.

use std::net::SocketAddr;
use std::time::Duration;

/// Silence that ends an association nobody has answered (as Linux' connection tracking does).
const UNREPLIED: Duration = Duration::from_secs(30);
/// Silence that ends one with an answer.
const REPLIED: Duration = Duration::from_secs(180);

#[derive(Debug)]
pub(crate) struct Association {
    guest: SocketAddr,
    remote: SocketAddr,
    state: State,
    expires: Duration,
    /// Payload length of the last datagram, which ICMP errors quote.
    pub(crate) last_length: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Unreplied,
    Replied,
}

impl Association {
    pub(crate) fn new(guest: SocketAddr, remote: SocketAddr, now: Duration) -> Self {
        Self { guest, remote, state: State::Unreplied, expires: now + UNREPLIED, last_length: 0 }
    }

    /// The guest's end.
    pub(crate) fn guest(&self) -> SocketAddr {
        self.guest
    }

    /// The peer as the guest addresses it.
    pub(crate) fn remote(&self) -> SocketAddr {
        self.remote
    }

    pub(crate) fn expires(&self) -> Duration {
        self.expires
    }

    pub(crate) fn sent(&mut self, length: usize, now: Duration) {
        self.last_length = length;
        self.touch(now);
    }

    pub(crate) fn received(&mut self, now: Duration) {
        self.state = State::Replied;
        self.touch(now);
    }

    fn touch(&mut self, now: Duration) {
        self.expires = now
            + match self.state {
                State::Unreplied => UNREPLIED,
                State::Replied => REPLIED,
            };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_prolongs_the_association() {
        let end = |port| SocketAddr::from(([10, 0, 0, 1], port));
        let mut association = Association::new(end(1), end(2), Duration::ZERO);
        association.sent(5, Duration::from_secs(1));
        assert_eq!(association.expires(), Duration::from_secs(31));
        association.received(Duration::from_secs(2));
        assert_eq!(association.expires(), Duration::from_secs(182));
    }
}
