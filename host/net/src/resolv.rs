//! The host's resolver configuration, `resolv.conf(5)`, read again when it changes.
//!
//! A resolver on loopback (systemd-resolved, dnsmasq) is as good as any: our sockets are the host's.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use crate::dns::DNS_PORT;

/// How long a look at the file is good for.
const FRESH: Duration = Duration::from_secs(1);

/// For a NAT that may look at `resolv.conf` but not open it: somebody else reads it.
pub struct Asked {
    /// What is in it now.
    pub text: String,
    /// Called on the NAT's thread when it has changed. The new text is told by [`Teller::tell`](crate::Teller::tell).
    pub ask: Box<dyn Fn() + Send>,
}

impl std::fmt::Debug for Asked {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Asked").field("text", &self.text).finish_non_exhaustive()
    }
}

/// Watches one file, when asked.
#[derive(Debug)]
pub(crate) struct ResolvConf {
    path: PathBuf,
    /// Who reads it, if not this.
    asked: Option<Asked>,
    looked: Option<Duration>,
    stamp: Option<(SystemTime, u64)>,
}

impl ResolvConf {
    pub(crate) fn new(path: PathBuf, asked: Option<Asked>) -> Self {
        Self { path, asked, looked: None, stamp: None }
    }

    /// The resolvers, if they may have changed since the last call. Looks at the file once a second at most; without
    /// a file there is the resolver on this host, as the C library has it.
    pub(crate) fn changed(&mut self, now: Duration) -> Option<Vec<SocketAddr>> {
        if self.looked.is_some_and(|looked| now.saturating_sub(looked) < FRESH) {
            return None;
        }
        let first = self.looked.is_none();
        self.looked = Some(now);
        let stamp = std::fs::metadata(&self.path)
            .ok()
            .and_then(|metadata| Some((metadata.modified().ok()?, metadata.len())));
        if stamp == self.stamp && !first {
            return None;
        }
        self.stamp = stamp;
        match &self.asked {
            Some(asked) if first => Some(parse(&asked.text)),
            Some(asked) => {
                (asked.ask)();
                None
            }
            None => {
                let text = std::fs::read(&self.path).unwrap_or_default();
                Some(parse(&String::from_utf8_lossy(&text)))
            }
        }
    }
}

/// The `nameserver` lines. Link-local IPv6 addresses with a zone are left out: few, and the others serve.
pub(crate) fn parse(text: &str) -> Vec<SocketAddr> {
    let resolvers: Vec<SocketAddr> = text
        .lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            match words.next()? {
                "nameserver" => words.next()?.parse().ok().map(|address| SocketAddr::new(address, DNS_PORT)),
                _ => None,
            }
        })
        .collect();
    if resolvers.is_empty() {
        vec![SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), DNS_PORT)]
    } else {
        resolvers
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nameserver_lines_count_and_nothing_else() {
        let text = "# local\nsearch a.example\nnameserver 127.0.0.53\n  nameserver\t2001:db8::1 # six\noptions ndots:2\n\
                    nameserver fe80::1%eth0\nnameserver\n;nameserver 9.9.9.9\n";
        let resolvers = parse(text);
        assert_eq!(resolvers, ["127.0.0.53:53".parse().unwrap(), "[2001:db8::1]:53".parse().unwrap()]);
    }

    #[test]
    fn without_any_this_hosts_resolver_is_asked() {
        assert_eq!(parse("options edns0\n"), ["127.0.0.1:53".parse().unwrap()]);
    }

    #[test]
    fn who_may_not_read_asks_for_each_change() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("resolv.conf");
        std::fs::write(&path, "nameserver 10.0.0.1\n").unwrap();
        let (sender, asked) = std::sync::mpsc::channel();
        let ask = Box::new(move || sender.send(()).unwrap());
        let text = "nameserver 10.0.0.9\n".into();
        let mut file = ResolvConf::new(path.clone(), Some(Asked { text, ask }));
        let at = Duration::from_secs;
        assert_eq!(
            file.changed(at(0)),
            Some(vec!["10.0.0.9:53".parse().unwrap()]),
            "the text that was given"
        );
        assert_eq!((file.changed(at(2)), asked.try_iter().count()), (None, 0));
        std::fs::write(&path, "nameserver 10.0.0.22\n").unwrap();
        assert_eq!((file.changed(at(4)), asked.try_iter().count()), (None, 1));
        assert_eq!((file.changed(at(6)), asked.try_iter().count()), (None, 0));
    }

    #[test]
    fn a_changed_file_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("resolv.conf");
        std::fs::write(&path, "nameserver 10.0.0.1\n").unwrap();
        let mut file = ResolvConf::new(path.clone(), None);
        let at = Duration::from_secs;
        assert_eq!(file.changed(at(0)), Some(vec!["10.0.0.1:53".parse().unwrap()]));
        std::fs::write(&path, "nameserver 10.0.0.22\n").unwrap();
        assert_eq!(file.changed(at(0)), None, "looked just now");
        assert_eq!(file.changed(at(2)), Some(vec!["10.0.0.22:53".parse().unwrap()]));
        assert_eq!(file.changed(at(4)), None);
        std::fs::remove_file(&path).unwrap();
        assert_eq!(file.changed(at(6)), Some(vec!["127.0.0.1:53".parse().unwrap()]));
    }
}
