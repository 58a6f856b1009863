//! Files of a live root as tar streams, both ways: what `docker cp` and `docker export` move.
//!
//! Both block, and both end as soon as their stream does: a reader or writer that fails ends them with an error.

use std::{
    collections::HashSet,
    ffi::OsStr,
    io::{BufReader, Read, Write},
    os::fd::{BorrowedFd, OwnedFd},
    path::Path,
};

use crate::{
    Error, Kind, Result,
    compression::Compression,
    extract::{Extraction, Rules},
    pack::Packer,
};

const READ_BYTES: usize = 256 << 10;

/// How to copy into a container.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CopyIn {
    /// Refuse (as `Conflict`) to replace a folder by something else, or the other way round.
    pub keep_kinds: bool,
    /// Owner and group of everything, instead of the archive's.
    pub owner: Option<(u32, u32)>,
}

/// Writes the files of an archive (plain or compressed) below the folder `into` of `root`. Links are followed, and end at the
/// root. `into` is an absolute path in which no component is a link.
///
/// What was written when an error comes stays, as with every tar program.
pub fn copy_in(root: OwnedFd, into: &Path, stream: impl Read + Send, options: CopyIn) -> Result<()> {
    let input = BufReader::with_capacity(READ_BYTES, stream);
    let (compression, decoder) = Compression::decoder(input)
        .map_err(|source| Error::because(Kind::Invalid, "the archive cannot be read", source))?;
    tracing::trace!(?compression, into = %into.display(), "extracting");
    let rules = Rules::Copy { keep_kinds: options.keep_kinds, owner: options.owner };
    let mut decoder = BufReader::with_capacity(READ_BYTES, decoder);
    Extraction::copy("the archive", root, into, rules)?.write(&mut decoder).map(drop)
}

/// What to pack.
#[derive(Debug)]
pub enum Source<'a> {
    /// A folder with everything in it. The folder itself is packed as `prefix` (left out when that is empty), what is in it with
    /// `prefix` before its name.
    Folder {
        /// The folder.
        folder: OwnedFd,
        /// Normally ends with a slash.
        prefix: &'a [u8],
    },
    /// One thing that is not a folder; a link is packed as a link.
    Single {
        /// The folder it is in.
        folder: BorrowedFd<'a>,
        /// Its name there.
        name: &'a OsStr,
        /// Its name in the archive.
        path: &'a [u8],
    },
}

/// Writes an archive.
pub fn copy_out(source: Source<'_>, output: impl Write) -> Result<()> {
    let without = HashSet::new();
    let mut packer = Packer::new(output, &without);
    match source {
        Source::Folder { folder, prefix } => packer.tree(folder, prefix)?,
        Source::Single { folder, name, path } => packer.single(folder, name, path)?,
    }
    packer.finish().map(drop)
}

/// Fuzz entry: extracts arbitrary bytes into the folder `into` of `scratch` as a hostile client would.
pub fn fuzz(bytes: &[u8], scratch: &Path) {
    let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC;
    let Ok(root) = rustix::fs::open(scratch, flags, rustix::fs::Mode::empty()) else { return };
    // What bytes of a few kilobytes can unpack to without end is only zeroes.
    let options = CopyIn { keep_kinds: bytes.len().is_multiple_of(2), owner: None };
    let _outcome = copy_in(root, Path::new("/into"), bytes.take(1 << 20), options);
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    struct Roots(tempfile::TempDir);

    impl Roots {
        fn new() -> Self {
            let roots = Self(tempfile::tempdir().expect("a folder"));
            for name in ["from/sub", "to/into"] {
                fs::create_dir_all(roots.path(name)).expect("made");
            }
            fs::write(roots.path("secret"), "outside").expect("made");
            roots
        }

        fn path(&self, name: &str) -> std::path::PathBuf {
            self.0.path().join(name)
        }

        fn open(&self, name: &str) -> OwnedFd {
            let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY;
            rustix::fs::open(self.path(name), flags, rustix::fs::Mode::empty()).expect("a folder")
        }

        fn packed(&self) -> Vec<u8> {
            let mut bytes = Vec::new();
            copy_out(Source::Folder { folder: self.open("from"), prefix: b"./" }, &mut bytes)
                .expect("packed");
            bytes
        }

        fn copy(&self, options: CopyIn) -> Result<()> {
            copy_in(self.open("to"), Path::new("/into"), &self.packed()[..], options)
        }
    }

    #[test]
    fn what_is_packed_is_copied_into_a_folder_of_the_root() {
        let roots = Roots::new();
        fs::write(roots.path("from/sub/file"), "text").expect("made");
        fs::hard_link(roots.path("from/sub/file"), roots.path("from/again")).expect("made");
        symlink("../../secret", roots.path("from/door")).expect("made");
        let file = fs::File::create(roots.path("from/sparse")).expect("made");
        file.set_len(1 << 20).expect("made");
        roots.copy(CopyIn::default()).expect("copied");
        assert_eq!(fs::read_to_string(roots.path("to/into/sub/file")).expect("there"), "text");
        assert_eq!(fs::read_to_string(roots.path("to/into/again")).expect("there"), "text");
        let sparse = fs::metadata(roots.path("to/into/sparse")).expect("there");
        assert_eq!(sparse.len(), 1 << 20);
        assert!(std::os::unix::fs::MetadataExt::blocks(&sparse) < 100, "zeroes become a hole");
        assert!(fs::symlink_metadata(roots.path("to/into/door")).expect("there").is_symlink());
    }

    #[test]
    fn links_in_the_root_do_not_lead_out_of_it() {
        let roots = Roots::new();
        fs::write(roots.path("from/sub/file"), "in").expect("made");
        symlink("../../..", roots.path("to/into/sub")).expect("made");
        roots.copy(CopyIn::default()).expect("copied");
        // The archive brings a folder of that name, which replaces the link.
        assert!(fs::symlink_metadata(roots.path("to/into/sub")).expect("there").is_dir());

        let mut writer = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_ustar();
        header.set_size(2);
        header.set_mode(0o644);
        writer.append_data(&mut header, "up/secret", &b"in"[..]).expect("made");
        let bytes = writer.into_inner().expect("made");
        symlink("../../../../../..", roots.path("to/into/up")).expect("made");
        copy_in(roots.open("to"), Path::new("/into"), &bytes[..], CopyIn::default()).expect("copied");
        assert_eq!(fs::read_to_string(roots.path("secret")).expect("there"), "outside");
        assert_eq!(fs::read_to_string(roots.path("to/secret")).expect("there"), "in");
    }

    #[test]
    fn kinds_are_kept_when_asked() {
        let roots = Roots::new();
        fs::write(roots.path("to/into/sub"), "a file").expect("made");
        let keep = CopyIn { keep_kinds: true, owner: None };
        let error = roots.copy(keep).expect_err("a file for a folder");
        assert_eq!(error.kind(), Kind::Conflict);
        assert_eq!(
            error.to_string(),
            "cannot overwrite non-directory \"/into/sub\" with directory \"/into\""
        );
        fs::remove_dir(roots.path("from/sub")).expect("removed");
        fs::remove_file(roots.path("to/into/sub")).expect("removed");
        fs::write(roots.path("from/sub"), "a file").expect("made");
        fs::create_dir(roots.path("to/into/sub")).expect("made");
        let error = roots.copy(keep).expect_err("a folder for a file");
        assert_eq!(
            error.to_string(),
            "cannot overwrite directory \"/into/sub\" with non-directory \"/into\""
        );
        roots.copy(CopyIn::default()).expect("copied");
        assert!(roots.path("to/into/sub").is_file());
    }

    #[test]
    fn one_file_gets_the_name_it_is_asked_under() {
        let roots = Roots::new();
        fs::write(roots.path("from/file"), "text").expect("made");
        let folder = roots.open("from");
        let mut bytes = Vec::new();
        let source = Source::Single {
            folder: std::os::fd::AsFd::as_fd(&folder),
            name: OsStr::new("file"),
            path: b"other",
        };
        copy_out(source, &mut bytes).expect("packed");
        copy_in(roots.open("to"), Path::new("/"), &bytes[..], CopyIn::default()).expect("copied");
        assert_eq!(fs::read_to_string(roots.path("to/other")).expect("there"), "text");
    }
}
