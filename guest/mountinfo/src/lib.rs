//! The kernel's table of mounts, `/proc/…/mountinfo` (proc_pid_mountinfo(5)), read in one place.
//!
//! Paths are bytes: a mount point that is no UTF-8 must not hide the others.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// One line of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// The folder of the mounted file system that is seen, `/` for all of it.
    pub root: PathBuf,
    /// Where it is mounted, as the reading process sees it.
    pub point: PathBuf,
    /// The optional fields: `shared:X`, `master:X`, `propagate_from:X`, `unbindable`.
    pub optional: Vec<String>,
    /// The file system's type.
    pub kind: String,
    /// The options of the file system, not those of the mount.
    pub options: String,
}

/// The mounts that the calling thread sees, in the order in which they were made.
///
/// # Errors
/// When the table cannot be read: `/proc` is not mounted.
pub fn read() -> io::Result<Vec<Mount>> {
    Ok(parse(&std::fs::read("/proc/thread-self/mountinfo")?))
}

/// The mounts in a table's bytes. Lines that are none are left out.
pub fn parse(table: &[u8]) -> Vec<Mount> {
    table.split(|byte| *byte == b'\n').filter_map(line).collect()
}

/// `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue`
fn line(line: &[u8]) -> Option<Mount> {
    let text = |field: &[u8]| String::from_utf8_lossy(field).into_owned();
    let mut fields = line.split(|byte| *byte == b' ');
    let (root, point) = (path(fields.nth(3)?), path(fields.next()?));
    let _mount_options = fields.next()?;
    let optional = fields.by_ref().take_while(|field| *field != b"-").map(text).collect();
    let kind = text(fields.next()?);
    let options = text(fields.nth(1)?);
    Some(Mount { root, point, optional, kind, options })
}

/// A path of the table: space, tab, line feed, backslash and `#` are written as three octal digits.
fn path(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let code = match tail {
            [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..] if first == b'\\' => {
                Some((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'))
            }
            _ => None,
        };
        bytes.push(code.unwrap_or(first));
        rest = if code.is_some() { &tail[3..] } else { tail };
    }
    OsString::from_vec(bytes).into()
}

/// The mounts at or below a folder, given by its real path, in the order in which they were made.
pub fn below<'a>(mounts: &'a [Mount], folder: &'a Path) -> impl DoubleEndedIterator<Item = &'a Mount> {
    mounts.iter().filter(move |mount| mount.point.starts_with(folder))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_line_is_read_in_all_its_parts() {
        let table =
            b"36 35 98:0 /mnt1 /mnt\\0402 rw,noatime shared:2 master:1 - ext3 /dev/root rw,errors=continue\n\
            nonsense\n\n37 35 98:0 / /x rw - tmpfs t rw\n";
        let mounts = parse(table);
        assert_eq!(mounts.len(), 2);
        assert_eq!(mounts[0].root, Path::new("/mnt1"));
        assert_eq!(mounts[0].point, Path::new("/mnt 2"));
        assert_eq!(mounts[0].optional, ["shared:2", "master:1"]);
        assert_eq!((mounts[0].kind.as_str(), mounts[0].options.as_str()), ("ext3", "rw,errors=continue"));
        assert!(mounts[1].optional.is_empty());
    }

    #[test]
    fn an_escaped_backslash_before_digits_is_a_backslash() {
        assert_eq!(path(b"/a\\134040b"), Path::new("/a\\040b"));
        assert_eq!(path(b"/odd\\x\\0"), Path::new("/odd\\x\\0"));
    }

    #[test]
    fn only_whole_names_are_below() {
        let mounts =
            parse(b"1 0 0:1 / /a rw - t t rw\n1 0 0:1 / /ab rw - t t rw\n1 0 0:1 / /a/b rw - t t rw\n");
        let points: Vec<_> = below(&mounts, Path::new("/a")).map(|mount| mount.point.as_path()).collect();
        assert_eq!(points, [Path::new("/a"), Path::new("/a/b")]);
    }

    #[test]
    fn our_own_table_has_a_root() {
        assert!(read().expect("the table").iter().any(|mount| mount.point == Path::new("/")));
    }

    proptest! {
        #[test]
        fn whatever_the_kernel_escapes_comes_back(name in proptest::collection::vec(1u8..=255, 1..40)) {
            let escaped: Vec<u8> = name
                .iter()
                .flat_map(|byte| match byte {
                    b' ' | b'\t' | b'\n' | b'\\' | b'#' => format!("\\{byte:03o}").into_bytes(),
                    other => vec![*other],
                })
                .collect();
            prop_assert_eq!(path(&escaped).into_os_string().into_vec(), name);
        }

        #[test]
        fn foreign_bytes_do_no_harm(table: Vec<u8>) {
            parse(&table);
        }
    }
}
