//! Sending lines to a logging service: syslog (RFC 3164, RFC 5424, or the local dialect) and the journal.
//!
//! A line that cannot be sent is lost: the container goes on, and a stream is connected anew with a later line.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::net::{TcpStream, ToSocketAddrs, UdpSocket};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use guest_runtime::shim::{Forward, Syslog};
use jiff::Timestamp;
use jiff::tz::TimeZone;

use super::{End, Stream};

/// Where computers have their own syslog receiver.
const LOCAL: [&str; 3] = ["/dev/log", "/var/run/syslog", "/var/run/log"];
const JOURNAL: &str = "/run/systemd/journal/socket";
/// Longest wait for a receiver.
const PATIENCE: Duration = Duration::from_secs(1);
/// Pause before a broken stream is connected anew.
const RECONNECT_PAUSE: Duration = Duration::from_secs(2);
/// Severities.
const ERROR: u8 = 3;
const INFORMATIONAL: u8 = 6;

/// A connection to a logging service.
pub struct Forwarder {
    forward: Forward,
    wire: Option<Wire>,
    broken_at: Option<Instant>,
    hostname: String,
}

enum Wire {
    Datagrams(UnixDatagram),
    Udp(UdpSocket),
    Stream(UnixStream),
    Tcp(TcpStream),
}

impl Forwarder {
    /// Connects.
    pub fn connect(forward: &Forward) -> io::Result<Self> {
        let hostname = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let wire = Some(Wire::connect(forward)?);
        Ok(Self { forward: forward.clone(), wire, broken_at: None, hostname })
    }

    /// Sends a line, or loses it.
    pub fn send(&mut self, stream: Stream, line: &[u8], end: End, time: Timestamp) {
        if self.wire.is_none() && self.broken_at.is_none_or(|at| at.elapsed() >= RECONNECT_PAUSE) {
            self.wire = Wire::connect(&self.forward).ok();
            self.broken_at = Some(Instant::now());
        }
        let Some(wire) = &mut self.wire else { return };
        let message = match &self.forward {
            Forward::Syslog(syslog) => format_syslog(syslog, &self.hostname, stream, line, time),
            Forward::Journal { fields } => format_journal(fields, stream, line, end),
        };
        if wire.send(&message).is_err() {
            self.wire = None;
            self.broken_at = Some(Instant::now());
        }
    }
}

impl Wire {
    fn connect(forward: &Forward) -> io::Result<Self> {
        let syslog = match forward {
            Forward::Journal { .. } => {
                let socket = UnixDatagram::unbound()?;
                socket
                    .connect(JOURNAL)
                    .map_err(|_| io::Error::other("journald is not enabled on this host"))?;
                socket.set_write_timeout(Some(PATIENCE))?;
                return Ok(Self::Datagrams(socket));
            }
            Forward::Syslog(syslog) => syslog,
        };
        let (scheme, place) = syslog.address.split_once("://").unwrap_or(("", ""));
        match scheme {
            "" => {
                let own = LOCAL.iter().find_map(|path| Self::local(Path::new(path)).ok());
                own.ok_or_else(|| io::Error::other("Unix syslog delivery error"))
            }
            "unix" | "unixgram" => Self::local(Path::new(place)),
            "udp" => {
                let address = resolve(place)?;
                let socket = UdpSocket::bind(if address.is_ipv6() { "[::]:0" } else { "0.0.0.0:0" })?;
                socket.connect(address)?;
                socket.set_write_timeout(Some(PATIENCE))?;
                Ok(Self::Udp(socket))
            }
            _ => {
                let stream = TcpStream::connect_timeout(&resolve(place)?, PATIENCE)?;
                stream.set_write_timeout(Some(PATIENCE))?;
                Ok(Self::Tcp(stream))
            }
        }
    }

    fn local(path: &Path) -> io::Result<Self> {
        let socket = UnixDatagram::unbound()?;
        if socket.connect(path).is_ok() {
            socket.set_write_timeout(Some(PATIENCE))?;
            return Ok(Self::Datagrams(socket));
        }
        let stream = UnixStream::connect(path)?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Self::Stream(stream))
    }

    fn send(&mut self, message: &[u8]) -> io::Result<()> {
        // On a stream a newline ends a message.
        let with_end = |stream: &mut dyn Write| {
            stream.write_all(message)?;
            stream.write_all(b"\n")
        };
        match self {
            Self::Datagrams(socket) => socket.send(message).map(drop),
            Self::Udp(socket) => socket.send(message).map(drop),
            Self::Stream(stream) => with_end(stream),
            Self::Tcp(stream) => with_end(stream),
        }
    }
}

fn resolve(place: &str) -> io::Result<std::net::SocketAddr> {
    let mut found = place.to_socket_addrs()?;
    found.next().ok_or_else(|| io::Error::other(format!("no address belongs to `{place}`")))
}

fn format_syslog(syslog: &Syslog, hostname: &str, stream: Stream, line: &[u8], time: Timestamp) -> Vec<u8> {
    let severity = if stream == Stream::Stderr { ERROR } else { INFORMATIONAL };
    let priority = syslog.facility * 8 + severity;
    let local = time.to_zoned(TimeZone::system());
    let (tag, pid) = (&syslog.tag, std::process::id());
    let head = match syslog.format.as_str() {
        "rfc5424" => format!(
            "<{priority}>1 {} {hostname} {tag} {pid} {tag} - ",
            local.strftime("%Y-%m-%dT%H:%M:%S%:z")
        ),
        "rfc5424micro" => {
            format!(
                "<{priority}>1 {} {hostname} {tag} {pid} {tag} - ",
                local.strftime("%Y-%m-%dT%H:%M:%S%.6f%:z")
            )
        }
        "rfc3164" => format!("<{priority}>{} {hostname} {tag}[{pid}]: ", local.strftime("%b %e %H:%M:%S")),
        _ => format!("<{priority}>{} {tag}[{pid}]: ", local.strftime("%b %e %H:%M:%S")),
    };
    [head.as_bytes(), line].concat()
}

/// The journal's native protocol: `NAME=value`, or the name, a length and bytes when there are newlines in it.
fn format_journal(fields: &BTreeMap<String, String>, stream: Stream, line: &[u8], end: End) -> Vec<u8> {
    let mut message = Vec::new();
    let mut add = |name: &str, value: &[u8]| {
        message.extend_from_slice(name.as_bytes());
        if value.contains(&b'\n') {
            message.push(b'\n');
            message.extend_from_slice(&(value.len() as u64).to_le_bytes());
        } else {
            message.push(b'=');
        }
        message.extend_from_slice(value);
        message.push(b'\n');
    };
    add("MESSAGE", line);
    add("PRIORITY", if stream == Stream::Stderr { b"3" } else { b"6" });
    if end == End::Split {
        add("CONTAINER_PARTIAL_MESSAGE", b"true");
    }
    fields.iter().for_each(|(name, value)| add(name, value.as_bytes()));
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_reach_a_receiver_of_datagrams() {
        let receiver = UdpSocket::bind("127.0.0.1:0").unwrap();
        receiver.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let syslog = Syslog {
            address: format!("udp://{}", receiver.local_addr().unwrap()),
            facility: 3,
            tag: "web".to_owned(),
            format: "rfc3164".to_owned(),
        };
        let mut forwarder = Forwarder::connect(&Forward::Syslog(syslog)).unwrap();
        forwarder.send(Stream::Stderr, b"hello", End::Line, Timestamp::UNIX_EPOCH);
        let mut buffer = [0; 200];
        let count = receiver.recv(&mut buffer).unwrap();
        let text = String::from_utf8_lossy(&buffer[..count]).into_owned();
        assert!(text.starts_with("<27>Jan  1 ") || text.starts_with("<27>Dec 31 "), "{text}");
        assert!(text.contains(" web[") && text.ends_with("]: hello"), "{text}");
    }

    #[test]
    fn a_receiver_that_is_not_there_is_named() {
        let syslog = Syslog { address: "unix:///no/such/socket".to_owned(), ..Syslog::default() };
        assert!(Forwarder::connect(&Forward::Syslog(syslog)).is_err());
    }

    #[test]
    fn fields_of_the_journal_may_hold_newlines() {
        let fields = [("CONTAINER_TAG".to_owned(), "a\nb".to_owned())].into();
        let message = format_journal(&fields, Stream::Stdout, b"hi", End::Split);
        let expected = b"MESSAGE=hi\nPRIORITY=6\nCONTAINER_PARTIAL_MESSAGE=true\nCONTAINER_TAG\n\x03\0\0\0\0\0\0\0a\nb\n";
        assert_eq!(message, expected);
    }
}
