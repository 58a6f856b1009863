//! Two ends over real sockets, and one end over bytes cut anywhere.

use std::os::unix::net::UnixStream;

use proptest::prelude::*;

use super::*;

fn pair() -> (FrameSocket<UnixStream>, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    (FrameSocket::new(ours), theirs)
}

fn framed(frame: &[u8]) -> Vec<u8> {
    [&(frame.len() as u32).to_be_bytes(), frame].concat()
}

#[test]
fn frames_arrive_whole_however_they_are_cut() {
    let (mut socket, mut theirs) = pair();
    let bytes: Vec<u8> = [60usize, 0, 1514, LENGTH_MAX]
        .iter()
        .flat_map(|length| framed(&(0..*length).map(|i| i as u8).collect::<Vec<_>>()))
        .collect();
    let mut lengths = Vec::new();
    for piece in bytes.chunks(997) {
        theirs.write_all(piece).unwrap();
        socket.notice(true, false);
        assert!(socket.fill().unwrap());
        while let Some(frame) = socket.peek().unwrap() {
            assert!(frame.iter().enumerate().all(|(i, byte)| *byte == i as u8));
            lengths.push(frame.len());
            socket.skip();
        }
    }
    assert_eq!(lengths, [60, 0, 1514, LENGTH_MAX]);
    assert!(!socket.fill().unwrap() && !socket.has_input() && !socket.is_closed());
    drop(theirs);
    socket.notice(true, false);
    assert!(!socket.fill().unwrap() && socket.is_closed() && !socket.has_input());
}

#[test]
fn a_lost_framing_is_an_error() {
    let (mut socket, mut theirs) = pair();
    theirs.write_all(&[0xff; 8]).unwrap();
    socket.fill().unwrap();
    let error = socket.peek().unwrap_err();
    assert!(error.to_string().starts_with("a frame of 4294967295 bytes announced"), "{error}");
    socket.skip();
    assert!(socket.peek().is_err());
}

#[test]
fn output_waits_for_a_slow_reader_and_stays_bounded() {
    let (mut socket, mut theirs) = pair();
    let mut read = Vec::new();
    for _ in 0..200 {
        while socket.has_room() {
            let added = socket.put(|out| {
                out.extend([7; 1000]);
                Some(())
            });
            assert!(added && socket.output.len() <= OUTPUT + 1004 + OUTPUT / 2);
        }
        assert!(!socket.put(|out| {
            out.extend([8; 10]);
            None
        }));
        if !socket.flush().unwrap() {
            let mut buffer = [0; 50_000];
            let count = theirs.read(&mut buffer).unwrap();
            read.extend_from_slice(&buffer[..count]);
            socket.notice(false, true);
        }
    }
    assert!(read.len() > OUTPUT);
    for chunk in read.chunks_exact(1004) {
        assert_eq!((&chunk[..4], chunk[4]), (&1000u32.to_be_bytes()[..], 7));
    }
}

#[test]
fn nothing_goes_to_an_end_that_has_gone() {
    let (mut socket, theirs) = pair();
    drop(theirs);
    assert!(socket.put(|out| {
        out.push(1);
        Some(())
    }));
    assert!(socket.flush().unwrap() && socket.is_closed() && socket.has_room());
    assert!(socket.put(|out| {
        out.push(2);
        Some(())
    }));
    assert!(socket.output.is_empty() && socket.flush().unwrap());
}

/// Bytes that come in pieces of these sizes, then nothing for now.
struct Pieces {
    bytes: Vec<u8>,
    at: usize,
    sizes: Vec<usize>,
}

impl Read for Pieces {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let size = self.sizes.pop().unwrap_or(usize::MAX).min(into.len()).min(self.bytes.len() - self.at);
        if size == 0 {
            return Err(ErrorKind::WouldBlock.into());
        }
        into[..size].copy_from_slice(&self.bytes[self.at..self.at + size]);
        self.at += size;
        Ok(size)
    }
}

impl Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

proptest! {
    #[test]
    fn what_is_put_is_what_is_read(
        frames in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 0..40),
        sizes in prop::collection::vec(1usize..300, 0..100),
    ) {
        let bytes = frames.iter().flat_map(|frame| framed(frame)).collect();
        let mut socket = FrameSocket::new(Pieces { bytes, at: 0, sizes });
        let mut read = Vec::new();
        while socket.fill().unwrap() {
            while let Some(frame) = socket.peek().unwrap() {
                read.push(frame.to_vec());
                socket.skip();
            }
        }
        prop_assert_eq!(read, frames);
    }

    #[test]
    fn any_bytes_end_in_frames_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let mut socket = FrameSocket::new(Pieces { bytes, at: 0, sizes: Vec::new() });
        while socket.fill().unwrap() {
            while let Ok(Some(_)) = socket.peek() {
                socket.skip();
            }
        }
    }
}
