//! One mount of a container, as its record has it.

use std::path::PathBuf;

use guest_api::container::MountPoint as ShownMount;
use serde::{Deserialize, Serialize};

/// What is mounted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MountKind {
    /// A path of the host (or of the machine).
    #[default]
    Bind,
    Volume,
    Tmpfs,
    /// The files of an image, not writable.
    Image,
}

impl MountKind {
    fn word(self) -> &'static str {
        match self {
            MountKind::Bind => "bind",
            MountKind::Volume => "volume",
            MountKind::Tmpfs => "tmpfs",
            MountKind::Image => "image",
        }
    }
}

/// One mount. Records of the first version held binds only, with the same names for what those have.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountPoint {
    #[serde(default)]
    pub kind: MountKind,
    pub destination: PathBuf,
    /// Name of the volume, or of the image as asked for.
    #[serde(default)]
    pub name: String,
    /// Empty for a tmpfs.
    #[serde(default)]
    pub source: PathBuf,
    /// Where the source of a bind is in the machine, if that is elsewhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub place: Option<PathBuf>,
    #[serde(default)]
    pub read_only: bool,
    /// The options as given.
    #[serde(default)]
    pub mode: String,
    /// `rprivate`, `rshared`, …; empty for volumes and tmpfs.
    #[serde(default)]
    pub propagation: String,
    /// The user named the propagation.
    #[serde(default)]
    pub propagation_asked: bool,
    /// A volume that was made for this container and goes with it if asked.
    #[serde(default)]
    pub anonymous: bool,
    /// An empty volume is filled from the image.
    #[serde(default)]
    pub copy: bool,
    /// A path in the volume or image that is mounted instead of its root.
    #[serde(default)]
    pub subpath: String,
    /// The snapshot of an image.
    #[serde(default)]
    pub snapshot: String,
    /// Words of a tmpfs.
    #[serde(default)]
    pub options: String,
    /// A bind whose source is not made when it is missing.
    #[serde(default)]
    pub must_exist: bool,
    #[serde(default)]
    pub non_recursive: bool,
    #[serde(default)]
    pub read_only_non_recursive: bool,
    #[serde(default)]
    pub read_only_force_recursive: bool,
}

impl MountPoint {
    /// As `inspect` and `ps` show it.
    pub fn shown(&self) -> ShownMount {
        ShownMount {
            kind: self.kind.word().to_owned(),
            name: self.name.clone(),
            source: self.source.display().to_string(),
            destination: self.destination.display().to_string(),
            driver: if self.kind == MountKind::Volume { "local".to_owned() } else { String::new() },
            mode: self.mode.clone(),
            rw: !self.read_only,
            propagation: self.propagation.clone(),
        }
    }

    /// Whether `ps --filter volume=` means it: by name, or by source where it has none, or by place.
    pub fn is_called(&self, wanted: &str) -> bool {
        self.destination.as_os_str() == wanted
            || if self.name.is_empty() { self.source.as_os_str() == wanted } else { self.name == wanted }
    }

    /// What is mounted, where that can be told also while the container does not run: a path of the host, or a volume's.
    pub fn lasting_source(&self) -> Option<PathBuf> {
        match self.kind {
            MountKind::Tmpfs | MountKind::Image => None,
            MountKind::Bind if self.place.is_some() => self.place.clone(),
            _ if self.subpath.is_empty() => Some(self.source.clone()),
            _ => {
                let base = std::fs::canonicalize(&self.source).ok()?;
                let part = std::fs::canonicalize(base.join(&self.subpath)).ok()?;
                part.starts_with(&base).then_some(part)
            }
        }
    }

    pub fn is_volume(&self) -> bool {
        self.kind == MountKind::Volume
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn binds_of_old_records_are_read() {
        let old = r#"{"source":"/a","destination":"/b","read_only":true,"mode":"ro","propagation":"rslave"}"#;
        let point: MountPoint = serde_json::from_str(old).unwrap();
        assert_eq!(point.kind, MountKind::Bind);
        let shown = point.shown();
        assert_eq!((shown.kind.as_str(), shown.source.as_str(), shown.rw), ("bind", "/a", false));
        assert_eq!((shown.mode.as_str(), shown.propagation.as_str()), ("ro", "rslave"));
        assert!(point.is_called("/a") && point.is_called("/b") && !point.is_called("a"));
    }

    #[test]
    fn a_volume_is_called_by_its_name() {
        let point = MountPoint {
            kind: MountKind::Volume,
            name: "data".into(),
            source: "/v/data/_data".into(),
            destination: "/d".into(),
            ..MountPoint::default()
        };
        assert!(point.is_called("data") && point.is_called("/d") && !point.is_called("/v/data/_data"));
        assert_eq!(point.shown().driver, "local");
    }
}
