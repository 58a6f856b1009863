//! The kernel's count of changes to the rules of a network namespace, whoever made them and in whichever table.
//!
//! `NFT_MSG_GETGEN` of nf_tables (Linux `include/uapi/linux/netfilter/nf_tables.h`): each transaction that changes anything
//! counts one, 0 is left out.

use std::io;

use rtnetlink::sys::{Socket, SocketAddr, protocols};

/// `NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETGEN`.
const GET: u16 = 10 << 8 | 16;
/// `NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWGEN`: the answer.
const NEW: u16 = 10 << 8 | 15;
/// `NLMSG_ERROR`.
const ERROR: u16 = 2;
/// `NLM_F_REQUEST`.
const REQUEST: u16 = 1;
/// `NFTA_GEN_ID`, a number in network order.
const ID: u16 = 1;
/// `struct nlmsghdr`, and with `struct nfgenmsg` after it.
const HEADER_LEN: usize = 16;
const HEADERS_LEN: usize = HEADER_LEN + 4;

/// How often the rules had been changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Generation(u32);

/// Why the count could not be read.
#[derive(Debug, thiserror::Error)]
pub enum GenerationError {
    /// No socket, or it broke.
    #[error("cannot ask the kernel how often its rules were changed; it needs nf_tables")]
    Socket(#[from] io::Error),
    /// The answer makes no sense.
    #[error("the kernel's answer about its rules cannot be understood")]
    Answer,
}

impl Generation {
    /// As it is now, in the network namespace of the calling thread.
    ///
    /// # Errors
    /// When the kernel has no nf_tables.
    pub fn now() -> Result<Self, GenerationError> {
        let socket = Socket::new(protocols::NETLINK_NETFILTER)?;
        socket.connect(&SocketAddr::new(0, 0))?;
        let mut request = Vec::with_capacity(HEADERS_LEN);
        request.extend((HEADERS_LEN as u32).to_ne_bytes());
        request.extend(GET.to_ne_bytes());
        request.extend(REQUEST.to_ne_bytes());
        // Sequence and port, then family, version and resource: all unspecified.
        request.extend([0; 12]);
        socket.send(&request, 0)?;
        let (answer, _) = socket.recv_from_full()?;
        read(&answer)
    }

    /// After one more change.
    pub fn next(self) -> Self {
        Self(self.0.checked_add(1).unwrap_or(1))
    }
}

fn read(answer: &[u8]) -> Result<Generation, GenerationError> {
    let short = |from: usize| Some(u16::from_ne_bytes(answer.get(from..from + 2)?.try_into().ok()?));
    let bytes = |from: usize| answer.get(from..from + 4)?.try_into().ok();
    match short(4) {
        Some(NEW) => {}
        Some(ERROR) => {
            let code = bytes(HEADER_LEN).map(i32::from_ne_bytes).ok_or(GenerationError::Answer)?;
            return Err(io::Error::from_raw_os_error(code.saturating_neg()).into());
        }
        _ => return Err(GenerationError::Answer),
    }
    let mut at = HEADERS_LEN;
    while let (Some(length), Some(kind)) = (short(at), short(at + 2)) {
        if kind == ID {
            return bytes(at + 4).map(|id| Generation(u32::from_be_bytes(id))).ok_or(GenerationError::Answer);
        }
        at += usize::from(length.max(4)).next_multiple_of(4);
    }
    Err(GenerationError::Answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, rest: &[u8]) -> Vec<u8> {
        let mut bytes = 0u32.to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0; 10]);
        bytes.extend(rest);
        bytes
    }

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = (4 + value.len() as u16).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn the_count_is_found_wherever_it_stands() {
        let name = attribute(3, b"nft\0x");
        let answer = [vec![0; 4], name, attribute(ID, &[0, 0, 1, 2])].concat();
        assert_eq!(read(&message(NEW, &answer)).unwrap(), Generation(258));
        for length in 0..answer.len() {
            assert!(read(&message(NEW, &answer[..length])).is_err(), "{length}");
        }
    }

    #[test]
    fn a_refusal_is_the_kernels() {
        let error = read(&message(ERROR, &(-1i32).to_ne_bytes())).unwrap_err();
        assert!(matches!(error, GenerationError::Socket(error) if error.raw_os_error() == Some(1)));
        assert!(matches!(read(&message(7, &[])), Err(GenerationError::Answer)));
        assert!(matches!(read(&[]), Err(GenerationError::Answer)));
    }

    #[test]
    fn zero_is_left_out() {
        assert_eq!((Generation(1).next(), Generation(u32::MAX).next()), (Generation(2), Generation(1)));
    }
}
