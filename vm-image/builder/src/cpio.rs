//! The archive format of an initramfs: cpio "newc" (Linux `Documentation/driver-api/early-userspace/buffer-format.rst`).
//!
//! Everything that could differ between two runs is fixed: inode numbers count up in archive order, owner is root, time is
//! the epoch, no hard links.

use std::io::{self, Write};

use crate::tree::{Entry, Node, Tree};

const TYPE_DIRECTORY: u32 = 0o040_000;
const TYPE_FILE: u32 = 0o100_000;
const TYPE_LINK: u32 = 0o120_000;
const TYPE_CHARACTER: u32 = 0o020_000;
/// The name that ends an archive.
const TRAILER: &str = "TRAILER!!!";

/// Writes the whole tree as one archive.
pub(crate) fn write(tree: &Tree, output: &mut impl Write) -> io::Result<()> {
    let mut inode = 0;
    for (path, entry) in tree.iter() {
        inode += 1;
        write_entry(output, inode, path, entry)?;
    }
    write_record(output, &Header { name: TRAILER, links: 1, ..Header::default() }, &[])
}

fn write_entry(output: &mut impl Write, inode: u32, path: &str, entry: &Entry) -> io::Result<()> {
    let mut header = Header { name: path, inode, links: 1, ..Header::default() };
    let (kind, content): (u32, &[u8]) = match &entry.node {
        Node::Directory => {
            header.links = 2;
            (TYPE_DIRECTORY, &[])
        }
        Node::File(bytes) => (TYPE_FILE, bytes),
        Node::Link(target) => (TYPE_LINK, target.as_bytes()),
        Node::Character { major, minor } => {
            header.device = (*major, *minor);
            (TYPE_CHARACTER, &[])
        }
    };
    header.mode = kind | entry.mode;
    write_record(output, &header, content)
}

#[derive(Default)]
struct Header<'a> {
    name: &'a str,
    inode: u32,
    mode: u32,
    links: u32,
    device: (u32, u32),
}

fn write_record(output: &mut impl Write, header: &Header<'_>, content: &[u8]) -> io::Result<()> {
    let too_large =
        |_| io::Error::new(io::ErrorKind::InvalidInput, format!("`{}` is larger than 4 GiB", header.name));
    let size = u32::try_from(content.len()).map_err(too_large)?;
    let name_size = u32::try_from(header.name.len() + 1).map_err(too_large)?;
    let fields = [
        header.inode,
        header.mode,
        0, // uid
        0, // gid
        header.links,
        0, // mtime
        size,
        0, // major of the device the file was on
        0, // minor of it
        header.device.0,
        header.device.1,
        name_size,
        0, // checksum, unused in this format
    ];
    output.write_all(b"070701")?;
    for field in fields {
        write!(output, "{field:08x}")?;
    }
    output.write_all(header.name.as_bytes())?;
    output.write_all(b"\0")?;
    // 110 bytes of header, then name and content each end on a multiple of four.
    pad(output, 110 + header.name.len() + 1)?;
    output.write_all(content)?;
    pad(output, content.len())
}

fn pad(output: &mut impl Write, length: usize) -> io::Result<()> {
    output.write_all(&[0; 3][..length.next_multiple_of(4) - length])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive(tree: &Tree) -> Vec<u8> {
        let mut bytes = Vec::new();
        write(tree, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn a_record_is_header_name_and_content_on_multiples_of_four() {
        let mut tree = Tree::default();
        tree.insert("/abc", 0o644, Node::File(b"hello".to_vec())).unwrap();
        let bytes = archive(&tree);
        assert_eq!(&bytes[..14], b"07070100000001");
        assert_eq!(&bytes[14..22], b"000081a4");
        assert_eq!(&bytes[54..62], b"00000005");
        assert_eq!(&bytes[110..114], b"abc\0");
        assert_eq!(&bytes[116..124], b"hello\0\0\0");
        assert_eq!(&bytes[124..130], b"070701");
        assert_eq!(bytes.len() % 4, 0);
        assert!(bytes.ends_with(b"TRAILER!!!\0\0\0\0"));
    }

    #[test]
    fn a_device_node_carries_its_numbers() {
        let mut tree = Tree::default();
        tree.insert("/console", 0o600, Node::Character { major: 5, minor: 1 }).unwrap();
        let bytes = archive(&tree);
        assert_eq!(&bytes[14..22], b"00002180");
        assert_eq!(&bytes[78..94], b"0000000500000001");
    }

    #[test]
    fn the_order_of_insertion_does_not_matter() {
        let build = |paths: &[&str]| {
            let mut tree = Tree::default();
            for path in paths {
                tree.insert(path, 0o644, Node::File(path.as_bytes().to_vec())).unwrap();
            }
            archive(&tree)
        };
        assert_eq!(build(&["/usr/a", "/usr/b", "/etc/c"]), build(&["/etc/c", "/usr/b", "/usr/a"]));
    }
}
