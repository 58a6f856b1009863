//! The guest's buffers of one descriptor chain, and moving bytes between them and files or sockets without a copy.
//!
//! Owns the only pointers into guest memory in this crate. A chain may have any number of descriptors and a header may
//! be split anywhere; [`Buffers`] makes that invisible. Nothing here trusts what it reads: guest memory can change
//! under us at any time, so bytes are copied out once and then checked.

#![expect(unsafe_code, reason = "system calls on guest memory take raw pointers")]

use std::io;
use std::ops::Deref;
use std::os::fd::{AsRawFd, BorrowedFd};

use virtio_queue::DescriptorChain;
use vm_memory::{GuestMemory, GuestMemoryMmap, Permissions, VolatileSlice};

/// The most descriptors looked at in one chain: what one vectored system call takes, and four times what drivers send.
pub const MAX_DESCRIPTORS: usize = 1024;

/// Why the buffers of a chain cannot be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// The chain is longer than any driver makes it.
    #[error("a descriptor chain has more than {MAX_DESCRIPTORS} descriptors")]
    TooLong,
    /// A descriptor points outside of guest memory.
    #[error("a descriptor points outside of guest memory: address {address:#x}, {length} bytes")]
    OutsideMemory {
        /// The guest's address.
        address: u64,
        /// The length of the buffer.
        length: u32,
    },
}

/// A run of guest memory in pieces, consumed from the front.
#[derive(Default)]
pub struct Buffers<'a> {
    /// Pieces not yet consumed, starting at `first`.
    pieces: Vec<VolatileSlice<'a>>,
    first: usize,
    length: usize,
}

impl<'a> Buffers<'a> {
    /// Collects the buffers of a chain: those the device reads, then those it writes.
    pub fn of_chain<M>(
        memory: &'a GuestMemoryMmap,
        chain: DescriptorChain<M>,
    ) -> Result<(Self, Self), ChainError>
    where
        M: Deref,
        M::Target: GuestMemory,
    {
        let mut readable = Self::default();
        let mut writable = Self::default();
        for (position, descriptor) in chain.enumerate() {
            if position == MAX_DESCRIPTORS {
                return Err(ChainError::TooLong);
            }
            let outside =
                || ChainError::OutsideMemory { address: descriptor.addr().0, length: descriptor.len() };
            let (buffers, access) = match descriptor.is_write_only() {
                true => (&mut writable, Permissions::Write),
                false => (&mut readable, Permissions::Read),
            };
            let pieces = memory
                .get_slices(descriptor.addr(), descriptor.len() as usize, access)
                .map_err(|_| outside())?;
            for piece in pieces {
                buffers.push(piece.map_err(|_| outside())?);
            }
        }
        Ok((readable, writable))
    }

    /// Adds a piece at the end.
    pub fn push(&mut self, piece: VolatileSlice<'a>) {
        if !piece.is_empty() {
            self.length += piece.len();
            self.pieces.push(piece);
        }
    }

    /// Adds all pieces of `other` at the end.
    pub fn append(&mut self, other: &Buffers<'a>) {
        for piece in other.remaining() {
            self.push(*piece);
        }
    }

    /// How many bytes are left.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether no byte is left.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Consumes the first `count` bytes, at most all of them.
    pub fn advance(&mut self, count: usize) {
        let mut left = count.min(self.length);
        self.length -= left;
        while left > 0 {
            let piece = self.pieces[self.first];
            if left < piece.len() {
                self.pieces[self.first] = part(&piece, left, piece.len() - left);
                return;
            }
            left -= piece.len();
            self.first += 1;
        }
    }

    /// Splits after the first `count` bytes: keeps the rest and returns the front, shorter if there is not enough.
    pub fn split_front(&mut self, count: usize) -> Buffers<'a> {
        let mut front = Buffers::default();
        let mut left = count.min(self.length);
        for piece in self.remaining() {
            if left == 0 {
                break;
            }
            let taken = left.min(piece.len());
            front.push(part(piece, 0, taken));
            left -= taken;
        }
        self.advance(front.len());
        front
    }

    /// Keeps only the first `count` bytes.
    pub fn truncate(&mut self, count: usize) {
        if count < self.length {
            *self = self.split_front(count);
        }
    }

    /// Copies bytes out of guest memory and consumes them; returns how many there were.
    pub fn copy_out(&mut self, target: &mut [u8]) -> usize {
        let done = self.peek(target);
        self.advance(done);
        done
    }

    /// Copies the first bytes out of guest memory and leaves them there; returns how many there were.
    pub fn peek(&self, target: &mut [u8]) -> usize {
        let mut done = 0;
        for piece in self.remaining() {
            if done == target.len() {
                break;
            }
            done += piece.copy_to(&mut target[done..]);
        }
        done
    }

    /// Copies bytes into guest memory and consumes the space; returns how many fitted.
    pub fn copy_in(&mut self, source: &[u8]) -> usize {
        let mut done = 0;
        for piece in self.remaining() {
            let count = piece.len().min(source.len() - done);
            if count == 0 {
                break;
            }
            part(piece, 0, count).copy_from(&source[done..done + count]);
            done += count;
        }
        self.advance(done);
        done
    }

    /// Receives from a stream socket into the buffers, without waiting, and consumes what came. Zero is the end.
    ///
    /// Does not depend on or change `O_NONBLOCK`, which a handed-over socket shares with whoever handed it over.
    pub fn receive(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        self.transfer(|vectors| {
            let mut message = message_of(vectors);
            // SAFETY: the vectors point into mapped guest memory that outlives `self`; the kernel writes at most their
            // lengths, and guest memory may be written by anyone at any time, so no Rust reference to it exists.
            unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_DONTWAIT) }
        })
    }

    /// Sends the buffers to a stream socket, without waiting or a signal, and consumes what was taken.
    ///
    /// Does not depend on or change `O_NONBLOCK`, which a handed-over socket shares with whoever handed it over.
    pub fn send(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        self.transfer(|vectors| {
            let message = message_of(vectors);
            // SAFETY: the vectors point into mapped guest memory that outlives `self`; the kernel only reads it.
            unsafe { libc::sendmsg(socket.as_raw_fd(), &message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) }
        })
    }

    /// Reads from a file at `offset` into the buffers and consumes what came. Zero is the end of the file.
    pub fn read_at(&mut self, file: BorrowedFd<'_>, offset: u64) -> io::Result<usize> {
        let offset = file_offset(offset)?;
        self.transfer(|vectors| {
            // SAFETY: the vectors point into mapped guest memory that outlives `self`; the kernel writes at most their
            // lengths, and no Rust reference to guest memory exists.
            unsafe { libc::preadv(file.as_raw_fd(), vectors.as_ptr(), vectors.len() as libc::c_int, offset) }
        })
    }

    /// Writes the buffers to a file at `offset` and consumes what was taken.
    pub fn write_at(&mut self, file: BorrowedFd<'_>, offset: u64) -> io::Result<usize> {
        let offset = file_offset(offset)?;
        self.transfer(|vectors| {
            // SAFETY: the vectors point into mapped guest memory that outlives `self`; the kernel only reads it.
            unsafe { libc::pwritev(file.as_raw_fd(), vectors.as_ptr(), vectors.len() as libc::c_int, offset) }
        })
    }

    fn remaining(&self) -> &[VolatileSlice<'a>] {
        &self.pieces[self.first..]
    }

    /// Runs one vectored system call over the buffers, again when a signal interrupts it, and consumes its result.
    fn transfer(&mut self, mut call: impl FnMut(&mut [libc::iovec]) -> isize) -> io::Result<usize> {
        if self.is_empty() {
            return Ok(0);
        }
        let pieces = &self.remaining()[..self.remaining().len().min(MAX_DESCRIPTORS)];
        // The guards do nothing for memory that is always mapped, which is the only kind built here.
        let mut vectors: Vec<libc::iovec> = pieces
            .iter()
            .map(|piece| libc::iovec {
                iov_base: piece.ptr_guard_mut().as_ptr().cast(),
                iov_len: piece.len(),
            })
            .collect();
        loop {
            match usize::try_from(call(&mut vectors)) {
                Ok(count) => {
                    self.advance(count);
                    return Ok(count);
                }
                Err(_) => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => continue,
                    error => return Err(error),
                },
            }
        }
    }
}

/// Part of a piece. The caller keeps to its bounds; beyond them the part is empty.
fn part<'a>(piece: &VolatileSlice<'a>, offset: usize, count: usize) -> VolatileSlice<'a> {
    piece.subslice(offset, count).unwrap_or_else(|_| VolatileSlice::from(&mut [][..]))
}

fn message_of(vectors: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: all-zero is a valid msghdr: no address, no vectors, no control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = vectors.as_mut_ptr();
    message.msg_iovlen = vectors.len() as _;
    message
}

fn file_offset(offset: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput.into())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    /// Buffers of the given piece sizes over `bytes`.
    fn buffers<'a>(mut bytes: &'a mut [u8], sizes: &[usize]) -> Buffers<'a> {
        let mut buffers = Buffers::default();
        for size in sizes {
            let (piece, rest) = bytes.split_at_mut(*size);
            buffers.push(VolatileSlice::from(piece));
            bytes = rest;
        }
        buffers
    }

    #[test]
    fn pieces_of_any_size_read_as_one_run() {
        let mut bytes: Vec<u8> = (0..=99).collect();
        let mut all = buffers(&mut bytes, &[1, 0, 43, 6, 50]);
        let mut header = [0; 44];
        assert_eq!(all.copy_out(&mut header), 44);
        assert_eq!(header[43], 43);
        assert_eq!(all.len(), 56);
        let mut front = all.split_front(7);
        assert_eq!((front.len(), all.len()), (7, 49));
        let mut seven = [0; 10];
        assert_eq!(front.copy_out(&mut seven), 7);
        assert_eq!(seven[..7], [44, 45, 46, 47, 48, 49, 50]);
        all.truncate(2);
        assert_eq!(all.copy_out(&mut seven), 2);
        assert!(all.is_empty());
        assert_eq!(all.copy_out(&mut seven), 0);
    }

    #[test]
    fn copy_in_stops_at_the_end_of_the_space() {
        let mut bytes = vec![0; 10];
        let mut space = buffers(&mut bytes, &[3, 3, 4]);
        assert_eq!(space.copy_in(&[7; 4]), 4);
        assert_eq!(space.copy_in(&[8; 20]), 6);
        assert_eq!(bytes, [7, 7, 7, 7, 8, 8, 8, 8, 8, 8]);
    }

    #[test]
    fn sockets_are_read_and_written_without_waiting() {
        let (mut near, far) = UnixStream::pair().unwrap();
        let mut bytes = vec![0; 8];
        let mut space = buffers(&mut bytes, &[2, 6]);
        assert_eq!(space.receive(far.as_fd()).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        near.write_all(b"abcde").unwrap();
        assert_eq!(space.receive(far.as_fd()).unwrap(), 5);
        assert_eq!(space.len(), 3);
        assert_eq!(&bytes[..5], b"abcde");
        assert_eq!(buffers(&mut bytes, &[1, 1, 1]).send(far.as_fd()).unwrap(), 3);
        drop(far);
        let mut answer = Vec::new();
        near.read_to_end(&mut answer).unwrap();
        assert_eq!(answer, b"abc");
    }

    #[test]
    fn a_closed_peer_is_an_error_and_not_a_signal() {
        let (near, far) = UnixStream::pair().unwrap();
        drop(near);
        let mut bytes = vec![0; 8];
        let error = buffers(&mut bytes, &[8]).send(far.as_fd()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }
}
