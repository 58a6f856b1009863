//! Layers, honest and hostile. Owners, devices and opaque marks need root; without it those tests say so and stop.

use std::{
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt},
};

use proptest::prelude::*;

use std::io::Write;

use super::*;
use crate::extract::{OPAQUE, clean};

/// Builds tars that a well-behaved library refuses to write.
#[derive(Default)]
struct Tar(Vec<u8>);

impl Tar {
    fn entry(mut self, kind: u8, path: &str, link: &str, data: &[u8]) -> Self {
        self.header(kind, path, link, data.len() as u64, |_| {});
        self.data(data);
        self
    }

    fn with(mut self, kind: u8, path: &str, data: &[u8], adapt: impl FnOnce(&mut tar::Header)) -> Self {
        self.header(kind, path, "", data.len() as u64, adapt);
        self.data(data);
        self
    }

    fn header(&mut self, kind: u8, path: &str, link: &str, size: u64, adapt: impl FnOnce(&mut tar::Header)) {
        let mut header = tar::Header::new_ustar();
        header.as_mut_bytes()[..path.len()].copy_from_slice(path.as_bytes());
        header.as_mut_bytes()[157..157 + link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(tar::EntryType::new(kind));
        header.set_mode(if kind == b'5' { 0o755 } else { 0o644 });
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_000_000_000);
        header.set_size(size);
        adapt(&mut header);
        header.set_cksum();
        self.0.extend_from_slice(header.as_bytes());
    }

    fn data(&mut self, data: &[u8]) {
        self.0.extend_from_slice(data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
    }

    fn file(self, path: &str, data: &[u8]) -> Self {
        self.entry(b'0', path, "", data)
    }

    fn folder(self, path: &str) -> Self {
        self.entry(b'5', path, "", b"")
    }

    fn symlink(self, path: &str, target: &str) -> Self {
        self.entry(b'2', path, target, b"")
    }

    fn hard_link(self, path: &str, target: &str) -> Self {
        self.entry(b'1', path, target, b"")
    }

    fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let mut data = Vec::new();
        for (key, value) in records {
            let body = key.len() + value.len() + 3;
            let mut length = body + 1;
            while length != body + length.to_string().len() {
                length = body + length.to_string().len();
            }
            data.extend_from_slice(format!("{length} {key}=").as_bytes());
            data.extend_from_slice(value);
            data.push(b'\n');
        }
        self.entry(b'x', "pax", "", &data)
    }

    fn end(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }
}

const LIMITS: Limits =
    Limits { layer_bytes_max: 8 << 20, layer_entries_max: 1000, archive_bytes_max: 8 << 20 };

/// A folder to unpack into, with a file beside it that nothing may touch.
struct Scratch {
    outside: tempfile::TempDir,
}

impl Scratch {
    fn new() -> Self {
        let outside = tempfile::tempdir().expect("a folder");
        fs::write(outside.path().join("secret"), "untouched").expect("write");
        fs::create_dir(outside.path().join("layer")).expect("a folder");
        Self { outside }
    }

    fn layer(&self) -> PathBuf {
        self.outside.path().join("layer")
    }

    fn unpack(&self, tar: Tar) -> Result<Unpacked> {
        let bytes = tar.end();
        let result = unpack("test", &bytes[..], &self.layer(), &LIMITS);
        if let Ok(unpacked) = &result {
            assert_eq!(unpacked.diff_id, Digest::of(&bytes));
        }
        assert_eq!(
            fs::read_to_string(self.outside.path().join("secret")).expect("the file beside"),
            "untouched"
        );
        let mut beside: Vec<_> = fs::read_dir(self.outside.path())
            .expect("list")
            .map(|entry| entry.expect("entry").file_name())
            .collect();
        beside.sort();
        assert_eq!(beside, ["layer", "secret"], "nothing may appear beside the layer");
        result
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.layer().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    fn is_whiteout(&self, path: &str) -> bool {
        let data = fs::symlink_metadata(self.layer().join(path)).expect(path);
        data.file_type().is_char_device() && data.rdev() == 0
    }

    fn is_opaque(&self, path: &str) -> bool {
        let mut value = [0; 8];
        rustix::fs::lgetxattr(self.layer().join(path), OPAQUE, &mut value)
            .is_ok_and(|length| value[..length] == *b"y")
    }
}

fn is_root(test: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        #[expect(clippy::print_stderr, reason = "a skipped test says so")]
        {
            eprintln!("SKIPPED {test}: needs root");
        }
    }
    root
}

#[test]
fn an_honest_layer_becomes_what_it_says() {
    if !is_root("an_honest_layer_becomes_what_it_says") {
        return;
    }
    let scratch = Scratch::new();
    let tar = Tar::default()
        .with(b'5', "./", b"", |header| header.set_mode(0o700))
        .folder("etc/")
        .with(b'0', "etc/passwd", b"root", |header| {
            header.set_mode(0o4751);
            header.set_uid(1000);
            header.set_gid(2000);
        })
        .hard_link("etc/passwd-", "./etc/passwd")
        .symlink("bin", "usr/bin")
        .entry(b'6', "pipe", "", b"")
        .with(b'3', "null", b"", |header| {
            header.set_device_major(1).expect("ustar");
            header.set_device_minor(3).expect("ustar");
            header.set_mode(0o666);
        })
        .pax(&[
            ("path", "ein langer Name/ä".as_bytes()),
            ("mtime", b"12.5"),
            ("SCHILY.xattr.user.word", b"value"),
        ])
        .file("short", b"long");
    let unpacked = scratch.unpack(tar).expect("unpacked");
    assert_eq!((unpacked.size, unpacked.entries), (8, 8));
    assert_eq!(unpacked.implied, [PathBuf::from("ein langer Name")]);
    let passwd = fs::metadata(scratch.layer().join("etc/passwd")).expect("passwd");
    assert_eq!(
        (passwd.mode() & 0o7777, passwd.uid(), passwd.gid(), passwd.mtime(), passwd.nlink()),
        (0o4751, 1000, 2000, 1_000_000_000, 2)
    );
    assert_eq!(fs::read_link(scratch.layer().join("bin")).expect("link"), Path::new("usr/bin"));
    assert_eq!(fs::metadata(scratch.layer()).expect("root").permissions().mode() & 0o7777, 0o700);
    assert_eq!(
        fs::metadata(scratch.layer().join("etc")).expect("etc").mtime(),
        1_000_000_000,
        "a folder's time is set after its files"
    );
    let null = fs::metadata(scratch.layer().join("null")).expect("null");
    assert_eq!((null.rdev(), null.mode() & 0o7777), (rustix::fs::makedev(1, 3), 0o666));
    assert!(fs::metadata(scratch.layer().join("pipe")).expect("pipe").file_type().is_fifo());
    let long = scratch.layer().join("ein langer Name/ä");
    assert_eq!(
        fs::metadata(&long).map(|data| (data.mtime(), data.mtime_nsec())).expect("long"),
        (12, 500_000_000)
    );
    let mut value = [0; 16];
    let length = rustix::fs::getxattr(&long, "user.word", &mut value).expect("attribute");
    assert_eq!(&value[..length], b"value");
}

#[test]
fn names_that_lead_out_are_refused() {
    for path in ["../secret", "a/../../secret", "./../x", "..", "a/b/../../../x"] {
        let error = Scratch::new().unpack(Tar::default().file(path, b"evil")).expect_err(path);
        assert_eq!(error.kind(), Kind::Invalid);
        assert_eq!(error.to_string(), format!("layer test is refused: entry `{path}` leads out of it"));
    }
}

#[test]
fn absolute_names_stay_within() {
    let scratch = Scratch::new();
    scratch.unpack(Tar::default().file("/etc/x", b"in").file("a/./../b", b"b")).expect("unpacked");
    assert_eq!((scratch.read("etc/x"), scratch.read("b")), ("in".to_owned(), "b".to_owned()));
}

#[test]
fn symbolic_links_do_not_lead_out() {
    for target in ["..", "../..", "/", "/..", "../../../.."] {
        let scratch = Scratch::new();
        scratch.unpack(Tar::default().symlink("door", target).file("door/secret", b"in")).expect(target);
        // The link is followed, but the layer is its whole world.
        assert_eq!(scratch.read("secret"), "in", "{target}");
    }
    let scratch = Scratch::new();
    let chain =
        Tar::default().folder("a").symlink("a/up", "..").symlink("a/b", "up/../../..").file("a/b/etc", b"in");
    scratch.unpack(chain).expect("a chain of links");
    assert_eq!(scratch.read("etc"), "in");
}

#[test]
fn a_file_does_not_write_through_a_link_of_its_own_name() {
    let scratch = Scratch::new();
    scratch.unpack(Tar::default().symlink("x", "../secret").file("x", b"evil")).expect("unpacked");
    assert_eq!(scratch.read("x"), "evil");
    assert!(!fs::symlink_metadata(scratch.layer().join("x")).expect("x").is_symlink());
}

#[test]
fn links_through_proc_do_not_lead_out() {
    let error = Scratch::new()
        .unpack(Tar::default().symlink("door", "/proc/self/cwd").file("door/x", b"evil"))
        .expect_err("a dangling link");
    assert_eq!(error.kind(), Kind::Invalid);
}

#[test]
fn hard_links_to_the_outside_are_refused() {
    let outside = Scratch::new().unpack(Tar::default().hard_link("x", "../secret")).expect_err("outside");
    assert_eq!(outside.to_string(), "layer test is refused: entry `x` links to `../secret`, outside of it");
    let missing = Scratch::new().unpack(Tar::default().hard_link("x", "/etc/passwd")).expect_err("missing");
    assert_eq!(
        missing.to_string(),
        "layer test is refused: entry `x` links to `/etc/passwd`, which is not there"
    );
    let through = Scratch::new()
        .unpack(Tar::default().symlink("door", "..").hard_link("x", "door/secret"))
        .expect_err("through a link");
    assert_eq!(
        through.to_string(),
        "layer test is refused: entry `x` links to `door/secret`, which is not there"
    );
    let folder =
        Scratch::new().unpack(Tar::default().folder("d").hard_link("x", "d")).expect_err("to a folder");
    assert_eq!(folder.to_string(), "layer test is refused: entry `x` is a hard link to a folder");
    let root = Scratch::new().unpack(Tar::default().hard_link("x", "/")).expect_err("to the root");
    assert_eq!(root.to_string(), "layer test is refused: entry `x` links to the root folder");
}

#[test]
fn a_hard_link_to_a_symbolic_link_is_one() {
    let scratch = Scratch::new();
    scratch
        .unpack(Tar::default().symlink("s", "../secret").hard_link("x", "s").file("x", b"evil"))
        .expect("unpacked");
    assert_eq!(scratch.read("x"), "evil");
}

#[test]
fn the_root_folder_cannot_be_replaced() {
    for tar in [
        Tar::default().file("", b"x"),
        Tar::default().symlink("./", "/etc"),
        Tar::default().file("a/..", b"x"),
    ] {
        let error = Scratch::new().unpack(tar).expect_err("the root");
        assert!(error.to_string().ends_with("would replace the root folder"), "{error}");
    }
}

#[test]
fn later_entries_replace_earlier_ones() {
    let scratch = Scratch::new();
    let tar = Tar::default()
        .file("a", b"1")
        .file("a", b"2")
        .folder("d")
        .file("d/x", b"x")
        .file("d", b"a file now")
        .file("e", b"file")
        .folder("e")
        .file("e/x", b"x")
        .folder("f")
        .file("f/keep", b"keep")
        .folder("f")
        .symlink("g", "f")
        .folder("g")
        .file("g/own", b"own");
    scratch.unpack(tar).expect("unpacked");
    assert_eq!(
        (scratch.read("a"), scratch.read("d"), scratch.read("e/x"), scratch.read("f/keep")),
        ("2".into(), "a file now".into(), "x".into(), "keep".into())
    );
    assert_eq!(scratch.read("g/own"), "own");
    assert!(!scratch.layer().join("f/own").exists(), "the link gave way to a folder, as in Docker");
}

#[test]
fn a_remembered_folder_is_forgotten_when_it_is_replaced() {
    let scratch = Scratch::new();
    scratch
        .unpack(
            Tar::default()
                .folder("d")
                .file("d/x", b"1")
                .symlink("d", "elsewhere")
                .folder("elsewhere")
                .file("d/y", b"2"),
        )
        .expect("unpacked");
    assert_eq!(scratch.read("elsewhere/y"), "2");
}

#[test]
fn whiteouts_hide_what_is_below() {
    if !is_root("whiteouts_hide_what_is_below") {
        return;
    }
    let scratch = Scratch::new();
    let unpacked = scratch
        .unpack(
            Tar::default()
                .file("etc/.wh.gone", b"")
                .folder("all")
                .file("all/.wh..wh..opq", b"")
                .file(".wh..wh.plnk", b"")
                .file("all/new", b"n"),
        )
        .expect("unpacked");
    assert!(scratch.is_whiteout("etc/gone"));
    assert!(scratch.is_opaque("all"));
    assert!(!scratch.is_opaque("etc"));
    assert!(!scratch.layer().join(".wh..wh.plnk").exists(), "AUFS's notes are not files");
    assert_eq!(unpacked.implied, [PathBuf::new(), PathBuf::from("etc")]);
}

#[test]
fn whiteouts_do_not_hide_what_the_same_layer_brings() {
    if !is_root("whiteouts_do_not_hide_what_the_same_layer_brings") {
        return;
    }
    let scratch = Scratch::new();
    let tar = Tar::default()
        .file(".wh.file", b"")
        .file("file", b"new")
        .file("other", b"new")
        .file(".wh.other", b"")
        .file(".wh.first", b"")
        .folder("first")
        .folder("second")
        .file(".wh.second", b"")
        .file(".wh.implied", b"")
        .file("implied/x", b"x");
    scratch.unpack(tar).expect("unpacked");
    assert_eq!(
        (scratch.read("file"), scratch.read("other"), scratch.read("implied/x")),
        ("new".into(), "new".into(), "x".into())
    );
    for folder in ["first", "second", "implied"] {
        assert!(scratch.is_opaque(folder), "{folder} hides the folder below");
    }
}

#[test]
fn whiteouts_of_nothing_are_refused() {
    for path in [".wh.", "a/.wh..", ".wh..."] {
        let error = Scratch::new().unpack(Tar::default().file(path, b"")).expect_err(path);
        assert!(error.to_string().ends_with("is a whiteout of nothing"), "{error}");
    }
}

#[test]
fn an_image_cannot_speak_to_overlayfs() {
    let scratch = Scratch::new();
    let records: [(&str, &[u8]); 3] = [
        ("SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
        ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
        ("SCHILY.xattr.user.overlay.metacopy", b""),
    ];
    scratch.unpack(Tar::default().pax(&records).folder("d").pax(&records).file("f", b"x")).expect("unpacked");
    for path in ["d", "f"] {
        let mut names = [0u8; 1024];
        let length = rustix::fs::llistxattr(scratch.layer().join(path), &mut names[..]).expect("attributes");
        assert!(!String::from_utf8_lossy(&names[..length]).contains("overlay"), "{path}");
    }
}

#[test]
fn bombs_are_bounded() {
    let scratch = Scratch::new();
    let bytes = io::repeat(0).take(1 << 40);
    let mut tar = Tar::default();
    tar.header(b'0', "zeroes", "", 1 << 39, |_| {});
    let error = unpack("test", io::Cursor::new(tar.0).chain(bytes), &scratch.layer(), &LIMITS)
        .expect_err("too many bytes");
    assert_eq!(error.to_string(), "layer test unpacks to more than the limit of 8388608 bytes");

    let mut many = Tar::default();
    for index in 0..1001 {
        many = many.folder(&format!("d{index}"));
    }
    let error = Scratch::new().unpack(many).expect_err("too many entries");
    assert_eq!(error.to_string(), "layer test has more than the limit of 1000 entries");

    let records: [(&str, &[u8]); 2] = [("GNU.sparse.size", b"999999999999"), ("GNU.sparse.map", b"0,1")];
    let error = Scratch::new()
        .unpack(Tar::default().pax(&records).file("sparse", b"x"))
        .expect_err("too large a hole");
    assert!(error.to_string().ends_with("is a sparse file larger than the limit"), "{error}");

    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    let zeroes = vec![0; 1 << 20];
    let mut tar = Tar::default();
    tar.header(b'0', "zeroes", "", 64 << 20, |_| {});
    packed.write_all(&tar.0).expect("write");
    for _ in 0..64 {
        packed.write_all(&zeroes).expect("write");
    }
    let packed = packed.finish().expect("gzip");
    assert!(packed.len() < 100_000);
    let (compression, decoder) = Compression::decoder(&packed[..]).expect("gzip");
    assert_eq!(compression, Compression::Gzip);
    let error = unpack("test", decoder, &Scratch::new().layer(), &LIMITS).expect_err("a bomb");
    assert_eq!(error.to_string(), "layer test unpacks to more than the limit of 8388608 bytes");
}

#[test]
fn deep_and_long_names_are_refused_or_made() {
    let deep = "d/".repeat(2040);
    let scratch = Scratch::new();
    scratch
        .unpack(Tar::default().pax(&[("path", format!("{deep}f").as_bytes())]).file("x", b"deep"))
        .expect("within the limit");
    let long = "d/".repeat(3000);
    let error = Scratch::new()
        .unpack(Tar::default().pax(&[("path", long.as_bytes())]).file("x", b""))
        .expect_err("beyond the limit");
    assert!(error.to_string().ends_with("has a name longer than a path may be"), "{error}");
    let name = "n".repeat(300);
    let error = Scratch::new()
        .unpack(Tar::default().pax(&[("path", name.as_bytes())]).file("x", b""))
        .expect_err("a long name");
    assert_eq!(error.kind(), Kind::Invalid);
}

#[test]
fn damaged_streams_say_so() {
    let whole = Tar::default().file("a", &[7; 3000]).end();
    let error = unpack("test", &whole[..1500], &Scratch::new().layer(), &LIMITS).expect_err("cut");
    assert_eq!(error.chain(), "layer test cannot be unpacked: the archive ends in the middle of an entry");

    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packed.write_all(&whole).expect("write");
    let packed = packed.finish().expect("gzip");
    for damaged in [packed[..packed.len() / 2].to_vec(), packed[..packed.len() - 4].to_vec(), {
        let mut flipped = packed.clone();
        let middle = flipped.len() / 2;
        flipped[middle] ^= 0xff;
        flipped
    }] {
        let (_, decoder) = Compression::decoder(&damaged[..]).expect("gzip");
        let error = unpack("test", decoder, &Scratch::new().layer(), &LIMITS).expect_err("damaged");
        assert_eq!(error.kind(), Kind::Invalid, "{}", error.chain());
    }
    let noise: Vec<u8> = (0..4096u32).map(|index| (index * 7 % 251) as u8).collect();
    assert_eq!(
        unpack("test", &noise[..], &Scratch::new().layer(), &LIMITS).expect_err("noise").kind(),
        Kind::Invalid
    );
}

#[test]
fn every_compression_gives_the_same_folder() {
    let plain = Tar::default().file("a", &[7; 300_000]).file("b", b"b").end();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&plain).expect("write");
    let zstd = zstd::encode_all(&plain[..], 3).expect("zstd");
    for packed in [plain.clone(), gzip.finish().expect("gzip"), zstd] {
        let scratch = Scratch::new();
        let blob = scratch.outside.path().join("secret");
        fs::write(&blob, &packed).expect("write");
        let file = File::open(&blob).expect("open");
        let meter = Meter::default();
        let unpacked = unpack_blob("test", &file, Digest::of(&packed), &scratch.layer(), &LIMITS, &meter)
            .expect("unpacked");
        assert_eq!(unpacked.diff_id, Digest::of(&plain));
        assert_eq!(meter.read.load(Ordering::Relaxed), packed.len() as u64);
        assert_eq!(fs::read(scratch.layer().join("a")).expect("a"), [7; 300_000]);
    }
}

#[test]
fn what_follows_the_archive_counts_for_the_diff_id() {
    let mut bytes = Tar::default().file("a", b"a").end();
    bytes.resize(bytes.len() + 10_240, 0);
    bytes.extend_from_slice(b"more");
    let unpacked = unpack("test", &bytes[..], &Scratch::new().layer(), &LIMITS).expect("unpacked");
    assert_eq!(unpacked.diff_id, Digest::of(&bytes));
}

#[test]
fn sparse_files_keep_their_holes() {
    let scratch = Scratch::new();
    let records: [(&str, &[u8]); 2] = [("GNU.sparse.size", b"5000000"), ("GNU.sparse.map", b"0,1,4000000,1")];
    scratch.unpack(Tar::default().pax(&records).file("sparse", b"ab")).expect("unpacked");
    let bytes = fs::read(scratch.layer().join("sparse")).expect("sparse");
    assert_eq!((bytes.len(), bytes[0], bytes[4_000_000], bytes[1]), (5_000_000, b'a', b'b', 0));
    assert!(fs::metadata(scratch.layer().join("sparse")).expect("sparse").blocks() * 512 < 1_000_000);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever paths and kinds come in whatever order, nothing appears or changes beside the layer.
    #[test]
    fn arbitrary_entries_stay_within(entries in proptest::collection::vec((0..7u8, "(\\.\\./|/|\\./|[ab]/|\\.wh\\.){0,4}[ab.]{1,2}", "(\\.\\./|/|[ab]/){0,4}[ab]?"), 0..24)) {
        let scratch = Scratch::new();
        let mut tar = Tar::default();
        for (kind, path, link) in &entries {
            let (kind, data): (u8, &[u8]) = match kind {
                0 | 1 => (b'0', b"data"),
                2 => (b'5', b""),
                3 | 4 => (b'2', b""),
                5 => (b'1', b""),
                _ => (b'6', b""),
            };
            tar = tar.entry(kind, path, link, data);
        }
        let _outcome = scratch.unpack(tar);
    }

    #[test]
    fn clean_paths_never_lead_out(path in proptest::collection::vec(any::<u8>(), 0..60)) {
        if let Ok(clean) = clean(&path) {
            prop_assert!(!clean.starts_with(b"/"));
            prop_assert!(clean.is_empty() || clean.split(|byte| *byte == b'/').all(|part| !matches!(part, b"" | b"." | b"..")));
        }
    }
}
