//! What QEMU says about a network card's rings before it is time: `VHOST_USER_SET_VRING_ENABLE`, ahead of the features
//! without which the protocol knows no such request (`docs/interop/vhost-user.rst`, "Ring states"). QEMU means it, and
//! says it only once, so it is taken here; the protocol crate would refuse it.

use std::io;
use std::os::unix::net::UnixStream;

use rustix::net::{RecvFlags, SendFlags, recv, send};

/// `VHOST_USER_SET_VRING_ENABLE`, in a message's first word.
const SET_VRING_ENABLE: u32 = 18;
/// In a message's flags: the version of the protocol, this is an answer, an answer is wanted.
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;
/// Request, flags, size, ring, state.
const WORDS: usize = 5;
/// Bytes behind the message's header.
const BODY_BYTES: u32 = 8;

/// A ring that is to be enabled or disabled.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Enable {
    pub ring: u32,
    pub enable: bool,
    answer: bool,
}

/// Waits for the front end's next message, and takes it if it is about a ring's state. Anything else, the end included, is
/// left to whoever reads next.
pub(super) fn take(connection: &UnixStream) -> io::Result<Option<Enable>> {
    let mut bytes = [0; WORDS * 4];
    let (count, _) = recv(connection, &mut bytes, RecvFlags::PEEK)?;
    let words: [u32; WORDS] =
        std::array::from_fn(|at| bytes[at * 4..].first_chunk().map_or(0, |word| u32::from_ne_bytes(*word)));
    let [request, flags, size, ring, state] = words;
    if count < bytes.len() || request != SET_VRING_ENABLE || size != BODY_BYTES || state > 1 {
        return Ok(None);
    }
    let (taken, _) = recv(connection, &mut bytes, RecvFlags::empty())?;
    if taken < bytes.len() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(Some(Enable { ring, enable: state == 1, answer: flags & NEED_REPLY != 0 }))
}

impl Enable {
    /// Says that it has been done, if the front end waits for that.
    pub fn answer(&self, connection: &UnixStream) -> io::Result<()> {
        if !self.answer {
            return Ok(());
        }
        let words = [SET_VRING_ENABLE, VERSION | REPLY, BODY_BYTES, 0, 0].map(u32::to_ne_bytes);
        // An answer is smaller than any socket's buffer.
        send(connection, &words.concat(), SendFlags::NOSIGNAL).map(drop)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    fn message(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    #[test]
    fn a_rings_state_is_taken_and_nothing_else() {
        let (mut front, back) = UnixStream::pair().unwrap();
        front.write_all(&message(&[18, 1, 8, 1, 1])).unwrap();
        let quiet = take(&back).unwrap().unwrap();
        assert_eq!(quiet, Enable { ring: 1, enable: true, answer: false });
        quiet.answer(&back).unwrap();
        front.write_all(&message(&[18, 9, 8, 0, 0])).unwrap();
        let asked = take(&back).unwrap().unwrap();
        assert_eq!(asked, Enable { ring: 0, enable: false, answer: true });
        asked.answer(&back).unwrap();
        let mut heard = [0; 20];
        front.read_exact(&mut heard).unwrap();
        assert_eq!(heard, *message(&[18, 5, 8, 0, 0]));
        // Other requests, and nonsense, are still there for the next reader.
        for other in [message(&[1, 1, 0]), message(&[18, 1, 8, 0, 7]), message(&[18, 1, 4, 0]), vec![18, 0]] {
            front.write_all(&other).unwrap();
            assert_eq!(take(&back).unwrap(), None);
            let mut left = vec![0; other.len()];
            (&back).read_exact(&mut left).unwrap();
            assert_eq!(left, other);
        }
        drop(front);
        assert_eq!(take(&back).unwrap(), None);
    }
}
