//! Answers as the guest's kernel reads them.

use std::time::Duration;

use rustix::io::Errno;

/// What becomes of one request.
#[derive(Debug, PartialEq, Eq)]
pub enum Reply {
    /// Nothing is answered, not even a header.
    None,
    /// It could not be done.
    Error(Errno),
    /// It is done; these bytes follow the header.
    Bytes(Vec<u8>),
    /// It is done; so many bytes were put into the room behind the header already.
    Data(usize),
}

/// What a file is, as the guest is told (`fuse_attr`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    pub number: u64,
    pub size: u64,
    pub blocks: u64,
    pub accessed: (u64, u32),
    pub modified: (u64, u32),
    pub changed: (u64, u32),
    /// Kind and permissions.
    pub mode: u32,
    pub links: u32,
    pub uid: u32,
    pub gid: u32,
    pub device: u32,
    pub block_size: u32,
}

/// Collects an answer.
#[derive(Default)]
pub struct Writer(pub Vec<u8>);

impl Writer {
    pub fn u16(&mut self, value: u16) -> &mut Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub fn u32(&mut self, value: u32) -> &mut Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub fn u64(&mut self, value: u64) -> &mut Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub fn attributes(&mut self, attributes: &Attributes) -> &mut Self {
        let Attributes { accessed, modified, changed, .. } = attributes;
        self.u64(attributes.number).u64(attributes.size).u64(attributes.blocks);
        self.u64(accessed.0).u64(modified.0).u64(changed.0);
        self.u32(accessed.1).u32(modified.1).u32(changed.1);
        self.u32(attributes.mode).u32(attributes.links).u32(attributes.uid).u32(attributes.gid);
        self.u32(attributes.device).u32(attributes.block_size).u32(0)
    }

    /// `fuse_attr_out`: what a file is, and for how long that may be believed.
    pub fn attributes_for(&mut self, attributes: &Attributes, time: Duration) -> &mut Self {
        self.u64(time.as_secs()).u32(time.subsec_nanos()).u32(0).attributes(attributes)
    }

    /// `fuse_entry_out`: what a name leads to. Node 0 is nothing at all.
    pub fn entry(
        &mut self,
        node: u64,
        name_time: Duration,
        time: Duration,
        attributes: &Attributes,
    ) -> &mut Self {
        self.u64(node).u64(0).u64(name_time.as_secs()).u64(time.as_secs());
        self.u32(name_time.subsec_nanos()).u32(time.subsec_nanos()).attributes(attributes)
    }

    /// `fuse_open_out`.
    pub fn opened(&mut self, handle: u64, flags: u32) -> &mut Self {
        self.u64(handle).u32(flags).u32(0)
    }

    /// `fuse_dirent`: one name in a folder; `next` is where reading goes on behind it.
    pub fn name_in_folder(&mut self, number: u64, next: u64, kind: u32, name: &[u8]) -> &mut Self {
        self.u64(number).u64(next).u32(name.len() as u32).u32(kind);
        self.0.extend(name);
        self.0.resize(self.0.len().next_multiple_of(8), 0);
        self
    }

    pub fn done(self) -> Reply {
        Reply::Bytes(self.0)
    }
}

/// Length of [`Writer::entry`].
pub const ENTRY_BYTES: usize = 128;

/// Length of [`Writer::name_in_folder`].
pub fn name_bytes(name: &[u8]) -> usize {
    (24 + name.len()).next_multiple_of(8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_those_of_the_protocol() {
        let length = |write: &dyn Fn(&mut Writer)| {
            let mut writer = Writer::default();
            write(&mut writer);
            writer.0.len()
        };
        let attributes = Attributes::default();
        assert_eq!(length(&|writer| _ = writer.attributes(&attributes)), 88);
        assert_eq!(length(&|writer| _ = writer.attributes_for(&attributes, Duration::ZERO)), 104);
        let time = Duration::from_millis(1500);
        assert_eq!(length(&|writer| _ = writer.entry(1, time, time, &attributes)), ENTRY_BYTES);
        assert_eq!(length(&|writer| _ = writer.opened(1, 0)), 16);
        for name in [&b"a"[..], b"eightlng", b"ninebytes"] {
            assert_eq!(length(&|writer| _ = writer.name_in_folder(1, 2, 8, name)), name_bytes(name));
        }
    }
}
