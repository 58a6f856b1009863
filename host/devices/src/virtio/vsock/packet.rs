//! The packet header of the socket device (virtio 1.3 §5.10.6), as bytes.

use std::fmt;

/// Length of a header on the wire.
pub const HEADER_BYTES: usize = 44;

/// Flag of [`Operation::Shutdown`]: the sender will receive no more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// Flag of [`Operation::Shutdown`]: the sender will send no more.
pub const SHUTDOWN_SEND: u32 = 2;

/// The only socket type we speak.
pub const TYPE_STREAM: u16 = 1;

/// A context id: the address of one side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Cid(pub u64);

impl Cid {
    /// The host, as every guest sees it.
    pub const HOST: Self = Self(2);
}

impl fmt::Display for Cid {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

/// What a packet asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Operation {
    /// Opens a connection.
    Request = 1,
    /// Accepts one.
    Response = 2,
    /// Ends one at once, or refuses it.
    Reset = 3,
    /// Ends one or both directions.
    Shutdown = 4,
    /// Carries data.
    Data = 5,
    /// Tells how much was consumed.
    CreditUpdate = 6,
    /// Asks to be told.
    CreditRequest = 7,
}

impl Operation {
    /// The operation with this number, if there is one.
    pub fn from_number(number: u16) -> Option<Self> {
        Some(match number {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// A header, as read: nothing in it has been checked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Where the packet comes from.
    pub source_cid: u64,
    /// Where it goes.
    pub destination_cid: u64,
    /// The port it comes from.
    pub source_port: u32,
    /// The port it goes to.
    pub destination_port: u32,
    /// Length of the data behind the header, in bytes.
    pub length: u32,
    /// The socket type.
    pub kind: u16,
    /// The operation's number.
    pub operation: u16,
    /// What the flags mean depends on the operation.
    pub flags: u32,
    /// Size of the sender's receive buffer, in bytes.
    pub buffer_bytes: u32,
    /// How many bytes the sender has consumed, modulo 2³².
    pub forwarded: u32,
}

impl Header {
    /// The header of a packet without data from a port of the host to one of the guest.
    pub fn to_guest(guest: Cid, host_port: u32, guest_port: u32, operation: Operation) -> Self {
        Self {
            source_cid: Cid::HOST.0,
            destination_cid: guest.0,
            source_port: host_port,
            destination_port: guest_port,
            kind: TYPE_STREAM,
            operation: operation as u16,
            ..Self::default()
        }
    }

    /// Reads a header.
    pub fn from_bytes(bytes: &[u8; HEADER_BYTES]) -> Self {
        let mut rest = bytes.as_slice();
        Self {
            source_cid: u64::from_le_bytes(take(&mut rest)),
            destination_cid: u64::from_le_bytes(take(&mut rest)),
            source_port: u32::from_le_bytes(take(&mut rest)),
            destination_port: u32::from_le_bytes(take(&mut rest)),
            length: u32::from_le_bytes(take(&mut rest)),
            kind: u16::from_le_bytes(take(&mut rest)),
            operation: u16::from_le_bytes(take(&mut rest)),
            flags: u32::from_le_bytes(take(&mut rest)),
            buffer_bytes: u32::from_le_bytes(take(&mut rest)),
            forwarded: u32::from_le_bytes(take(&mut rest)),
        }
    }

    /// Writes the header.
    pub fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut rest = bytes.as_mut_slice();
        put(&mut rest, self.source_cid.to_le_bytes());
        put(&mut rest, self.destination_cid.to_le_bytes());
        put(&mut rest, self.source_port.to_le_bytes());
        put(&mut rest, self.destination_port.to_le_bytes());
        put(&mut rest, self.length.to_le_bytes());
        put(&mut rest, self.kind.to_le_bytes());
        put(&mut rest, self.operation.to_le_bytes());
        put(&mut rest, self.flags.to_le_bytes());
        put(&mut rest, self.buffer_bytes.to_le_bytes());
        put(&mut rest, self.forwarded.to_le_bytes());
        bytes
    }
}

/// Takes the next field. The fields together are exactly a header long, which the round trip test holds to.
fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    let (field, tail) = rest.split_first_chunk().expect("the fields fit into a header");
    *rest = tail;
    *field
}

fn put<const N: usize>(rest: &mut &mut [u8], value: [u8; N]) {
    let (field, tail) = std::mem::take(rest).split_first_chunk_mut().expect("the fields fit into a header");
    *field = value;
    *rest = tail;
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn fields_lie_where_the_standard_puts_them() {
        let header = Header {
            source_cid: 3,
            destination_cid: 2,
            source_port: 0x0102_0304,
            destination_port: 2375,
            length: 65536,
            kind: TYPE_STREAM,
            operation: Operation::Data as u16,
            flags: 0,
            buffer_bytes: 262_144,
            forwarded: 9,
        };
        let bytes = header.to_bytes();
        assert_eq!(bytes[0], 3);
        assert_eq!(bytes[8], 2);
        assert_eq!(bytes[16..20], [4, 3, 2, 1]);
        assert_eq!(bytes[24..28], [0, 0, 1, 0]);
        assert_eq!(bytes[28..32], [1, 0, 5, 0]);
        assert_eq!(bytes[40], 9);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_header_and_come_back(bytes in prop::array::uniform32(any::<u8>()), tail in prop::array::uniform12(any::<u8>())) {
            let mut all = [0; HEADER_BYTES];
            all[..32].copy_from_slice(&bytes);
            all[32..].copy_from_slice(&tail);
            prop_assert_eq!(Header::from_bytes(&all).to_bytes(), all);
        }
    }
}
