//! One mount as a client asks for it, in either spelling, checked by Docker's rules. Pure text.
//!
//! `-v`: `[source:]destination[:mode]`. A source with a leading slash is a path of the host, any other the name of a volume,
//! none an anonymous volume. The mode is a list of words, at most one of each sort. The long form says its type itself.

use std::fmt;

use guest_api::mount::{BindOptions, DriverConfig, Mount, VolumeOptions};
use thiserror::Error;

use crate::path::clean;
use crate::tmpfs;

/// How a bind passes mounts on unless asked otherwise: not at all.
pub const PROPAGATION_DEFAULT: &str = "rprivate";
/// Each inner list is one sort of word in a mode.
const MODES: [&[&str]; 5] = [
    &["ro", "rw"],
    &["z", "Z"],
    &["private", "rprivate", "shared", "rshared", "slave", "rslave"],
    &["nocopy"],
    &["consistent", "cached", "delegated"],
];
const PROPAGATIONS: &[&str] = MODES[2];

/// Why a mount cannot be made, in dockerd's words.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{0}")]
pub struct SpecificationError(String);

fn refuse<T>(text: impl fmt::Display) -> Result<T, SpecificationError> {
    Err(SpecificationError(text.to_string()))
}

/// A checked mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Specification {
    /// The long form of it.
    pub mount: Mount,
    /// Where it goes, without `.`, `..` and needless slashes.
    pub destination: String,
    /// The words after the last colon of the short form, as given.
    pub mode: String,
}

impl Specification {
    /// Reads `-v`. `volume_driver` is the container's own default for volumes; empty means none.
    pub fn parse_bind(text: &str, volume_driver: &str) -> Result<Self, SpecificationError> {
        let invalid = || SpecificationError(format!("invalid volume specification: '{text}'"));
        let parts: Vec<&str> = text.split(':').collect();
        let (source, target, mode) = match parts.as_slice() {
            ["", ..] => return Err(invalid()),
            [target] => ("", *target, ""),
            // A place and a mode, without a source, are not a mount.
            [_, mode] if is_mode(mode) => return Err(invalid()),
            [source, target] => (*source, *target, ""),
            [source, target, mode] => (*source, *target, *mode),
            _ => return Err(invalid()),
        };
        if !is_mode(mode) {
            return refuse(format!("invalid mode: {mode}"));
        }
        let words = || mode.split(',');
        let is_bind = source.starts_with('/');
        let mut mount = Mount {
            kind: if is_bind { "bind" } else { "volume" }.to_owned(),
            source: source.to_owned(),
            target: target.to_owned(),
            read_only: words().any(|word| word == "ro"),
            ..Mount::default()
        };
        let no_copy = words().any(|word| word == "nocopy");
        if no_copy || (!is_bind && !volume_driver.is_empty()) {
            let name = volume_driver.to_owned();
            let driver = (!is_bind && !name.is_empty()).then_some(DriverConfig { name, options: None });
            mount.volume_options =
                Some(VolumeOptions { no_copy, driver_config: driver, ..VolumeOptions::default() });
        }
        if let Some(propagation) = words().find(|word| PROPAGATIONS.contains(word)) {
            mount.bind_options =
                Some(BindOptions { propagation: propagation.to_owned(), ..BindOptions::default() });
        }
        check(&mount).map_err(|error| SpecificationError(format!("{}: {error}", invalid())))?;
        Ok(Self { destination: clean(target), mount, mode: mode.to_owned() })
    }

    /// Checks the long form. Whether the source of a bind exists is for the caller to find out.
    pub fn from_mount(mount: Mount) -> Result<Self, SpecificationError> {
        check(&mount)?;
        Ok(Self { destination: clean(&mount.target), mount, mode: String::new() })
    }

    /// How mounts are passed on; empty where that is not a question.
    #[must_use]
    pub fn propagation(&self) -> &str {
        match (self.mount.kind.as_str(), &self.mount.bind_options) {
            ("bind", Some(options)) if !options.propagation.is_empty() => &options.propagation,
            ("bind" | "image", _) => PROPAGATION_DEFAULT,
            _ => "",
        }
    }

    /// Whether an empty volume is to be filled from the image.
    #[must_use]
    pub fn copies(&self) -> bool {
        self.mount.kind == "volume"
            && self.mount.volume_options.as_ref().is_none_or(|options| !options.no_copy)
    }

    /// The words of a tmpfs.
    pub fn tmpfs_options(&self) -> Result<String, SpecificationError> {
        tmpfs::words(self.mount.tmpfs_options.as_ref(), self.mount.read_only)
            .map_err(|error| SpecificationError(error.to_string()))
    }
}

fn in_mount(kind: &str, text: impl fmt::Display) -> SpecificationError {
    SpecificationError(format!("invalid mount config for type {kind:?}: {text}"))
}

impl SpecificationError {
    /// The source of a bind does not exist.
    #[must_use]
    pub fn no_source(path: &str) -> Self {
        in_mount("bind", format!("bind source path does not exist: {path}"))
    }
}

fn check(mount: &Mount) -> Result<(), SpecificationError> {
    let kind = mount.kind.as_str();
    let bad = |text: &dyn fmt::Display| Err(in_mount(kind, text));
    let empty = |field: &str| Err(in_mount(kind, format!("field {field} must not be empty")));
    let extra = |field: &str| Err(in_mount(kind, format!("field {field} must not be specified")));
    if !matches!(kind, "bind" | "volume" | "tmpfs" | "image") {
        return bad(&"mount type unknown");
    }
    for (field, given, home) in [
        ("BindOptions", mount.bind_options.is_some(), "bind"),
        ("VolumeOptions", mount.volume_options.is_some(), "volume"),
        ("ImageOptions", mount.image_options.is_some(), "image"),
        ("TmpfsOptions", mount.tmpfs_options.is_some(), "tmpfs"),
        ("ClusterOptions", mount.cluster_options.is_some(), "cluster"),
    ] {
        if given && kind != home {
            return extra(field);
        }
    }
    if [&mount.source, &mount.target].iter().any(|text| text.contains('\0')) {
        return bad(&"a path holds a zero byte");
    }
    if mount.target.is_empty() {
        return empty("Target");
    }
    not_root(&mount.target).or_else(|text| bad(&text))?;
    absolute(&mount.target).or_else(|text| bad(&text))?;
    match kind {
        "bind" => {
            if mount.source.is_empty() {
                return empty("Source");
            }
            let propagation = mount.bind_options.as_ref().map_or("", |options| &options.propagation);
            if !propagation.is_empty() && !PROPAGATIONS.contains(&propagation) {
                return bad(&format!("invalid propagation mode: {propagation}"));
            }
            absolute(&mount.source).or_else(|text| bad(&text))
        }
        "volume" => {
            let anonymous = mount.source.is_empty();
            if let Some(options) = mount.volume_options.as_ref().filter(|options| !options.subpath.is_empty())
            {
                if anonymous {
                    return bad(&"must not set Subpath when using anonymous volumes");
                }
                local(&options.subpath).or_else(|text| bad(&text))?;
            }
            if mount.read_only && anonymous {
                return bad(&"must not set ReadOnly mode when using anonymous volumes");
            }
            Ok(())
        }
        "tmpfs" => {
            if !mount.source.is_empty() {
                return extra("Source");
            }
            tmpfs::words(mount.tmpfs_options.as_ref(), mount.read_only).map(drop).or_else(|error| bad(&error))
        }
        _ => {
            if mount.source.is_empty() {
                return empty("Source");
            }
            match mount.image_options.as_ref().filter(|options| !options.subpath.is_empty()) {
                Some(options) => local(&options.subpath).or_else(|text| bad(&text)),
                None => Ok(()),
            }
        }
    }
}

/// dockerd reads backslashes as slashes here and nowhere else. What is the root only as it stands, `/a\b/..`, is refused too:
/// it would be mounted over the whole container.
fn not_root(path: &str) -> Result<(), String> {
    if clean(path) == "/" || clean(&path.replace('\\', "/")) == "/" {
        return Err("invalid specification: destination can't be '/'".to_owned());
    }
    Ok(())
}

fn absolute(path: &str) -> Result<(), String> {
    if path.starts_with('/') {
        return Ok(());
    }
    Err(format!("invalid mount path: '{path}' mount path must be absolute"))
}

/// A path that stays where it begins, as text.
fn local(path: &str) -> Result<(), String> {
    let cleaned = clean(path);
    if path.starts_with('/') || cleaned == ".." || cleaned.starts_with("../") || path.contains('\0') {
        return Err("subpath must be a relative path within the volume".to_owned());
    }
    Ok(())
}

/// Whether these are words of a mode, at most one of each sort. No word at all is one.
fn is_mode(mode: &str) -> bool {
    if mode.is_empty() {
        return true;
    }
    let mut counts = [0; MODES.len()];
    mode.split(',').all(|word| {
        MODES.iter().position(|sort| sort.contains(&word)).is_some_and(|sort| {
            counts[sort] += 1;
            counts[sort] == 1
        })
    })
}

/// Checks a key of `HostConfig.Tmpfs`.
pub fn check_tmpfs_destination(path: &str) -> Result<(), SpecificationError> {
    not_root(path).and_then(|()| absolute(path)).map_err(SpecificationError)
}

/// One entry of `--volumes-from`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumesFrom {
    /// The other container's name or id.
    pub container: String,
    /// Not writable, whatever the other container may do.
    pub read_only: bool,
}

impl VolumesFrom {
    /// Reads `container[:mode]`.
    pub fn parse(text: &str) -> Result<Self, SpecificationError> {
        if text.is_empty() {
            return refuse("volumes-from specification cannot be an empty string");
        }
        let (container, mode) = text.split_once(':').unwrap_or((text, ""));
        let fixed = |word: &str| PROPAGATIONS.contains(&word) || word == "nocopy";
        if !is_mode(mode) || mode.split(',').any(fixed) {
            return refuse(format!("invalid mode: {mode}"));
        }
        let read_only = mode.split(',').any(|word| word == "ro");
        Ok(Self { container: container.to_owned(), read_only })
    }
}

/// Feeds foreign bytes to every reader here, as a hostile client would. Never panics; what is accepted keeps its promises.
pub fn read_hostile(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    for driver in ["", "local"] {
        if let Ok(read) = Specification::parse_bind(text, driver) {
            read.assert_sound();
            assert!(matches!(read.mount.kind.as_str(), "bind" | "volume"));
        }
    }
    if let Ok(from) = VolumesFrom::parse(text) {
        assert!(text.starts_with(&from.container));
    }
    if check_tmpfs_destination(text).is_ok() {
        assert_ne!(clean(text), "/");
    }
    if let Ok(mount) = guest_api::decode::<Mount>(bytes)
        && let Ok(read) = Specification::from_mount(mount)
    {
        read.assert_sound();
    }
    if let Ok(merged) = tmpfs::merge(text.split(',')) {
        let again = tmpfs::merge(merged.iter().map(String::as_str));
        assert_eq!(again.as_deref(), Ok(merged.as_slice()), "merging is done once");
    }
    if let Ok(options) = guest_api::decode(bytes) {
        // Whether they can be read does not matter.
        let _ = crate::DriverOptions::parse(&options);
    }
}

impl Specification {
    fn assert_sound(&self) {
        assert!(self.destination.starts_with('/') && self.destination.len() > 1, "{}", self.destination);
        assert_eq!(self.destination, clean(&self.destination));
        assert!(!self.destination.split('/').any(|part| part == ".."));
        assert!(is_mode(&self.mode));
        assert!(self.mount.kind != "bind" || self.mount.source.starts_with('/'));
    }
}

#[cfg(test)]
mod tests {
    use guest_api::mount::{ImageOptions, TmpfsOptions};
    use proptest::prelude::*;

    use super::*;

    fn bind(text: &str) -> Specification {
        Specification::parse_bind(text, "").unwrap()
    }

    fn refusal(text: &str) -> String {
        Specification::parse_bind(text, "").unwrap_err().to_string()
    }

    #[test]
    fn the_short_form_is_read() {
        let plain = bind("/a:/b");
        assert_eq!((plain.mount.kind.as_str(), plain.mount.source.as_str()), ("bind", "/a"));
        assert_eq!((plain.destination.as_str(), plain.propagation()), ("/b", "rprivate"));
        assert!(!plain.mount.read_only && !plain.copies());

        let worded = bind("/tmp:/b//c/../d/:ro,rslave,Z,cached");
        assert_eq!((worded.destination.as_str(), worded.propagation()), ("/b/d", "rslave"));
        assert_eq!(worded.mode, "ro,rslave,Z,cached");
        assert!(worded.mount.read_only);

        let volume = bind("data:/data:nocopy");
        assert_eq!((volume.mount.kind.as_str(), volume.mount.source.as_str()), ("volume", "data"));
        assert!(!volume.copies() && bind("data:/data").copies());
        assert_eq!(volume.propagation(), "");

        let anonymous = bind("/data");
        assert_eq!((anonymous.mount.kind.as_str(), anonymous.mount.source.as_str()), ("volume", ""));
        let driven = Specification::parse_bind("data:/data", "local").unwrap().mount.volume_options.unwrap();
        assert_eq!(driven.driver_config.unwrap().name, "local");
        assert_eq!(Specification::parse_bind("/a:/b", "local").unwrap().mount.volume_options, None);
    }

    #[test]
    fn the_short_form_is_refused_with_dockerds_sentences() {
        for text in ["", "/a:rw", ":/x", "/a:/b:ro:rw", "vol1:", "vol1:rw"] {
            assert_eq!(refusal(text), format!("invalid volume specification: '{text}'"));
        }
        for (text, mode) in [
            ("/a:/b:c", "c"),
            ("/a:/b:ro,rw", "ro,rw"),
            ("/a:/b:,ro", ",ro"),
            ("/a:/b:consistent,cached", "consistent,cached"),
        ] {
            assert_eq!(refusal(text), format!("invalid mode: {mode}"));
        }
        for (text, kind, why) in [
            ("/", "volume", "invalid specification: destination can't be '/'"),
            ("vol1:\\", "volume", "invalid specification: destination can't be '/'"),
            ("/a:/", "bind", "invalid specification: destination can't be '/'"),
            ("/a:/b\\c/..", "bind", "invalid specification: destination can't be '/'"),
            ("/a:b", "bind", "invalid mount path: 'b' mount path must be absolute"),
            ("a:b", "volume", "invalid mount path: 'b' mount path must be absolute"),
            ("vol1:/b:shared", "volume", "field BindOptions must not be specified"),
            ("/tmp:/b:nocopy", "bind", "field VolumeOptions must not be specified"),
            ("/a::ro", "bind", "field Target must not be empty"),
        ] {
            let expected = format!(
                "invalid volume specification: '{text}': invalid mount config for type \"{kind}\": {why}"
            );
            assert_eq!(refusal(text), expected);
        }
    }

    #[test]
    fn the_long_form_is_refused_with_dockerds_sentences() {
        let plain = |kind: &str, source: &str, target: &str| Mount {
            kind: kind.into(),
            source: source.into(),
            target: target.into(),
            ..Mount::default()
        };
        let with = |mut mount: Mount, change: &dyn Fn(&mut Mount)| {
            change(&mut mount);
            mount
        };
        let cases = [
            (plain("bind", "", "/x"), "field Source must not be empty"),
            (plain("bind", "tmp", "/x"), "invalid mount path: 'tmp' mount path must be absolute"),
            (plain("bind", "/tmp", "x"), "invalid mount path: 'x' mount path must be absolute"),
            (plain("bind", "/tmp", "/"), "invalid specification: destination can't be '/'"),
            (plain("bind", "/tmp", ""), "field Target must not be empty"),
            (plain("npipe", "a", "/x"), "mount type unknown"),
            (plain("", "a", "/x"), "mount type unknown"),
            (plain("tmpfs", "a", "/x"), "field Source must not be specified"),
            (
                with(plain("tmpfs", "", "/x"), &|mount| {
                    let options = vec![vec!["size".to_owned()]];
                    mount.tmpfs_options = Some(TmpfsOptions { options, ..TmpfsOptions::default() });
                }),
                "invalid option: size",
            ),
            (
                with(plain("volume", "", "/x"), &|mount| mount.read_only = true),
                "must not set ReadOnly mode when using anonymous volumes",
            ),
            (
                with(plain("volume", "", "/x"), &|mount| {
                    mount.volume_options =
                        Some(VolumeOptions { subpath: "a".into(), ..VolumeOptions::default() });
                }),
                "must not set Subpath when using anonymous volumes",
            ),
            (
                with(plain("volume", "v2", "/x"), &|mount| {
                    mount.volume_options =
                        Some(VolumeOptions { subpath: "b/../../a".into(), ..VolumeOptions::default() });
                }),
                "subpath must be a relative path within the volume",
            ),
            (
                with(plain("image", "busybox", "/x"), &|mount| {
                    mount.image_options = Some(ImageOptions { subpath: "/bin".into() });
                }),
                "subpath must be a relative path within the volume",
            ),
            (
                with(plain("bind", "/tmp", "/x"), &|mount| {
                    mount.bind_options =
                        Some(BindOptions { propagation: "foo".into(), ..BindOptions::default() });
                }),
                "invalid propagation mode: foo",
            ),
        ];
        for (mount, why) in cases {
            let expected = format!("invalid mount config for type \"{}\": {why}", mount.kind);
            assert_eq!(Specification::from_mount(mount).unwrap_err().to_string(), expected);
        }
        assert_eq!(
            SpecificationError::no_source("/nope").to_string(),
            "invalid mount config for type \"bind\": bind source path does not exist: /nope"
        );
    }

    #[test]
    fn volumes_of_others_are_read() {
        let parse = |text: &str| VolumesFrom::parse(text).map_err(|error| error.to_string());
        assert_eq!(parse("web"), Ok(VolumesFrom { container: "web".into(), read_only: false }));
        assert_eq!(parse("web:ro,z"), Ok(VolumesFrom { container: "web".into(), read_only: true }));
        assert_eq!(parse("x:foo").unwrap_err(), "invalid mode: foo");
        assert_eq!(parse("x:shared").unwrap_err(), "invalid mode: shared");
        assert_eq!(parse("x:nocopy").unwrap_err(), "invalid mode: nocopy");
        assert!(parse("").unwrap_err().contains("empty string"));
    }

    #[test]
    fn a_tmpfs_is_not_the_root() {
        let check = |path: &str| check_tmpfs_destination(path).map_err(|error| error.to_string());
        assert_eq!(check("/b"), Ok(()));
        assert_eq!(check("b").unwrap_err(), "invalid mount path: 'b' mount path must be absolute");
        for root in ["/", "\\", "/x/..", "/x\\y/.."] {
            assert_eq!(check(root).unwrap_err(), "invalid specification: destination can't be '/'");
        }
    }

    fn word() -> impl Strategy<Value = String> {
        let known = prop::sample::select(MODES.concat()).prop_map(str::to_owned);
        prop_oneof![3 => known, 1 => "[a-z]{0,4}"]
    }

    fn specification() -> impl Strategy<Value = String> {
        let path = prop_oneof![4 => "(/[a-z.]{1,3}){0,4}/?", 1 => "[a-z.]{0,4}", 1 => r"\\{1,2}"];
        let mode = proptest::collection::vec(word(), 0..4).prop_map(|words| words.join(","));
        (proptest::collection::vec(path, 1..4), proptest::option::of(mode)).prop_map(|(mut parts, mode)| {
            parts.extend(mode);
            parts.join(":")
        })
    }

    proptest! {
        #[test]
        fn what_is_read_is_sound(text in specification()) {
            read_hostile(text.as_bytes());
        }

        #[test]
        fn foreign_text_never_panics(text in ".{0,60}") {
            read_hostile(text.as_bytes());
        }

        #[test]
        fn both_spellings_agree(text in specification()) {
            if let Ok(read) = Specification::parse_bind(&text, "") {
                let anonymous = read.mount.kind == "volume" && read.mount.source.is_empty();
                prop_assert!(!(anonymous && read.mount.read_only));
                let long = Specification::from_mount(read.mount.clone()).unwrap();
                prop_assert_eq!(long.destination, read.destination);
            }
        }
    }
}
