//! The file behind a disk.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use rustix::fs::{FallocateFlags, fallocate};

use super::GrowError;
use super::request::SECTOR_BYTES;
use crate::virtio::buffers::Buffers;

/// Length of the serial number a driver reads (virtio 1.3 §5.2.6).
pub(super) const SERIAL_BYTES: usize = 20;

/// A raw sparse file as a disk.
#[derive(Debug)]
pub struct Backend {
    file: File,
    sectors: u64,
    serial: [u8; SERIAL_BYTES],
    read_only: bool,
}

impl Backend {
    /// Takes an open file, readable and (unless `read_only`) writable, whose length now is the disk's capacity.
    ///
    /// The serial number is what the guest finds in `/sys/block/*/serial`; beyond 20 bytes it is cut off. Fails when
    /// the file's length cannot be read, or is less than one sector.
    pub fn new(file: File, serial: &str, read_only: bool) -> io::Result<Self> {
        let length = file.metadata()?.len();
        let sectors = length / SECTOR_BYTES;
        if sectors == 0 {
            let message = format!("a disk of {length} bytes has not a single sector");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        let mut padded = [0; SERIAL_BYTES];
        let count = serial.len().min(SERIAL_BYTES);
        padded[..count].copy_from_slice(&serial.as_bytes()[..count]);
        Ok(Self { file, sectors, serial: padded, read_only })
    }

    /// The disk's capacity in sectors of 512 bytes.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Whether the disk cannot be written.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Makes the file, and the disk, this large: the new part is a hole. Returns the disk's size in bytes. A disk that is as
    /// large already stays as it is, and so does one that cannot grow.
    pub(super) fn grow(&mut self, size_bytes: u64) -> Result<u64, GrowError> {
        let (sectors, disk_bytes) = (size_bytes / SECTOR_BYTES, self.sectors * SECTOR_BYTES);
        if sectors < self.sectors {
            return Err(GrowError::Shrink { disk_bytes, size_bytes });
        }
        if sectors > self.sectors {
            self.file.set_len(size_bytes).map_err(|source| GrowError::File { size_bytes, source })?;
            self.sectors = sectors;
        }
        Ok(sectors * SECTOR_BYTES)
    }

    /// Puts another file behind the same capacity.
    #[cfg(test)]
    pub(super) fn replace_file(&mut self, file: File) {
        self.file = file;
    }

    pub(super) fn serial(&self) -> &[u8; SERIAL_BYTES] {
        &self.serial
    }

    /// Fills all of `target` from the file.
    pub(super) fn read(&self, mut offset: u64, target: &mut Buffers<'_>) -> io::Result<()> {
        while !target.is_empty() {
            match target.read_at(self.file.as_fd(), offset)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => offset += count as u64,
            }
        }
        Ok(())
    }

    /// Writes all of `source` to the file.
    pub(super) fn write(&self, mut offset: u64, source: &mut Buffers<'_>) -> io::Result<()> {
        while !source.is_empty() {
            match source.write_at(self.file.as_fd(), offset)? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                count => offset += count as u64,
            }
        }
        Ok(())
    }

    /// Makes everything written so far survive a crash of the host.
    pub(super) fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Makes a range a hole that reads as zeroes.
    pub(super) fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(retry(|| fallocate(&self.file, flags, offset, length))?)
    }

    /// Makes a range read as zeroes and keeps its space, where the file system can; otherwise makes it a hole.
    pub(super) fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        let flags = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        match retry(|| fallocate(&self.file, flags, offset, length)) {
            Err(rustix::io::Errno::OPNOTSUPP) => self.punch(offset, length),
            result => Ok(result?),
        }
    }
}

fn retry(mut call: impl FnMut() -> rustix::io::Result<()>) -> rustix::io::Result<()> {
    loop {
        match call() {
            Err(rustix::io::Errno::INTR) => {}
            result => return result,
        }
    }
}
