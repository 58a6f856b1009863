//! Files in a container: what `HEAD /containers/{id}/archive` and `GET /containers/{id}/changes` tell.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::{Deserialize, Serialize};

/// Where the facts about a path are: [`PathStat`] in base64 of JSON.
pub const PATH_STAT_HEADER: &str = "x-docker-container-path-stat";

/// A file or folder, in the header [`PATH_STAT_HEADER`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PathStat {
    /// Its name, without the folders it is in.
    pub name: String,
    /// Bytes.
    pub size: i64,
    /// Go's `os.FileMode`: see [`go_file_mode`].
    pub mode: u32,
    /// RFC 3339.
    pub mtime: String,
    /// Of a symbolic link: the path it leads to, from the container's root.
    pub link_target: String,
}

impl PathStat {
    /// The header's value.
    pub fn encode(&self) -> Result<String, serde_json::Error> {
        Ok(BASE64_STANDARD.encode(serde_json::to_vec(self)?))
    }

    /// What a header's value says, if it can be read.
    #[must_use]
    pub fn decode(value: &[u8]) -> Option<Self> {
        crate::decode(&BASE64_STANDARD.decode(value).ok()?).ok()
    }
}

/// One line of `GET /containers/{id}/changes`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct FilesystemChange {
    /// The path.
    pub path: String,
    /// 0 modified, 1 added, 2 deleted.
    pub kind: u8,
}

/// The mode bits of the kernel (`st_mode`) as Go counts them: permissions below, the kind and the special bits from the top.
pub fn go_file_mode(mode: u32) -> u32 {
    const KINDS: [(u32, u32); 6] = [
        (0o040_000, 1 << 31),               // folder
        (0o120_000, 1 << 27),               // symbolic link
        (0o060_000, 1 << 26),               // block device
        (0o010_000, 1 << 25),               // FIFO
        (0o140_000, 1 << 24),               // socket
        (0o020_000, (1 << 26) | (1 << 21)), // character device
    ];
    const SPECIAL: [(u32, u32); 3] = [(0o4000, 1 << 23), (0o2000, 1 << 22), (0o1000, 1 << 20)];
    let kind = KINDS.iter().find(|(kind, _)| mode & 0o170_000 == *kind).map_or(0, |(_, bits)| *bits);
    let special = SPECIAL.iter().filter(|(bit, _)| mode & bit != 0).fold(0, |all, (_, bits)| all | bits);
    (mode & 0o777) | kind | special
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_gos() {
        assert_eq!(go_file_mode(0o100_644), 0o644);
        assert_eq!(go_file_mode(0o041_777), (1 << 31) | (1 << 20) | 0o777);
        assert_eq!(go_file_mode(0o104_755), (1 << 23) | 0o755);
        assert_eq!(go_file_mode(0o120_777), (1 << 27) | 0o777);
        assert_eq!(go_file_mode(0o020_620), (1 << 26) | (1 << 21) | 0o620);
        assert_eq!(go_file_mode(0o060_660), (1 << 26) | 0o660);
    }

    #[test]
    fn a_stat_has_camel_case_names() {
        let json = serde_json::to_string(&PathStat { name: "x".into(), ..PathStat::default() }).unwrap();
        assert_eq!(json, r#"{"name":"x","size":0,"mode":0,"mtime":"","linkTarget":""}"#);
    }

    #[test]
    fn a_stat_survives_its_header() {
        let stat = PathStat { name: "x".into(), size: 7, mode: 1 << 31, ..PathStat::default() };
        assert_eq!(PathStat::decode(stat.encode().unwrap().as_bytes()), Some(stat));
        assert_eq!(PathStat::decode(b"no base64"), None);
    }
}
