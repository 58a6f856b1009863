//! From a request to the mounts of a new container. Pure but for one question: whether the source of a bind exists.
//!
//! Later ones win over earlier ones at the same place: volumes of other containers, then `Binds` and `Mounts` (which
//! must not share a place), then the volumes of the image and of `Config.Volumes`, which only take what is free.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use guest_api::volume::VolumeCreate;
use guest_api::{ApiVersion, ContainerConfig, HostConfig};
use guest_volumes::{Specification, SpecificationError, VolumesFrom, check_tmpfs_destination, clean};

use super::point::{MountKind, MountPoint};
use crate::failure::Failure;

/// What dockerd does differently for older clients.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quirks {
    /// A read-only bind leaves writable what is mounted below it.
    pub read_only_non_recursive: bool,
}

/// A mount that is to be, and the volume to make for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    pub point: MountPoint,
    pub create: Option<VolumeWanted>,
}

/// What [`VolumeCreate`] is made of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VolumeWanted {
    pub driver: String,
    pub options: Option<BTreeMap<String, String>>,
    pub labels: Option<BTreeMap<String, String>>,
}

impl VolumeWanted {
    pub fn into_create(self, name: &str) -> VolumeCreate {
        VolumeCreate {
            name: name.to_owned(),
            driver: self.driver,
            driver_opts: self.options,
            labels: self.labels,
            cluster_volume_spec: None,
        }
    }
}

fn invalid(error: SpecificationError) -> Failure {
    Failure::invalid(error.to_string())
}

/// Takes out of a request what its version of the API did not know, and refuses what it did not allow. Warnings come back.
pub fn adapt(host: &mut HostConfig, version: ApiVersion) -> Result<(Quirks, Vec<String>), Failure> {
    let before = |minor| version < ApiVersion::new(1, minor);
    let mut warnings = Vec::new();
    for mount in host.mounts.iter_mut().flatten() {
        let kind = mount.kind.as_str();
        if before(42) {
            mount.volume_options = mount.volume_options.take().filter(|_| kind == "volume");
            mount.tmpfs_options = mount.tmpfs_options.take().filter(|_| kind == "tmpfs");
        }
        for (given, name, home) in [
            (mount.volume_options.is_some(), "VolumeOptions", "volume"),
            (mount.bind_options.is_some(), "BindOptions", "bind"),
            (mount.tmpfs_options.is_some(), "TmpfsOptions", "tmpfs"),
        ] {
            if given && kind != home && !before(42) {
                return Err(Failure::invalid(format!("{name} must not be specified on mount type {kind:?}")));
            }
        }
        if let Some(options) = &mut mount.bind_options {
            options.non_recursive &= !before(40);
            options.create_mountpoint &= !before(42);
            if options.read_only_force_recursive && before(44) {
                return Err(Failure::invalid("BindOptions.ReadOnlyForceRecursive needs API v1.44 or newer"));
            }
        }
        if before(45) && mount.volume_options.as_ref().is_some_and(|options| !options.subpath.is_empty()) {
            return Err(Failure::invalid("VolumeOptions.Subpath needs API v1.45 or newer"));
        }
        if before(48) && kind == "image" {
            return Err(Failure::invalid("Mount type \"Image\" needs API v1.48 or newer"));
        }
        let has_driver = mount
            .volume_options
            .as_ref()
            .and_then(|options| options.driver_config.as_ref())
            .is_some_and(|driver| !driver.name.is_empty());
        if !host.volume_driver.is_empty()
            && !before(48)
            && kind == "volume"
            && !has_driver
            && warnings.is_empty()
        {
            warnings.push(
                "WARNING: the container-wide volume-driver configuration is ignored for volumes specified via 'mount'. \
                 Use '--mount type=volume,volume-driver=...' instead"
                    .to_owned(),
            );
        }
        if kind == "image" {
            warnings.insert(0, "Image mount is an experimental feature".to_owned());
        }
    }
    Ok((Quirks { read_only_non_recursive: before(44) }, warnings))
}

/// The mounts of a new container, by place. `is_missing` tells whether there is no such source, `others` tells the mounts of another container, `data_root` is our own folder.
pub fn wanted(
    config: &ContainerConfig,
    host: &HostConfig,
    quirks: Quirks,
    data_root: &Path,
    is_missing: impl Fn(&Path) -> bool,
    others: impl Fn(&str) -> Result<Vec<MountPoint>, Failure>,
) -> Result<Vec<Wanted>, Failure> {
    let tmpfs = host.tmpfs.clone().unwrap_or_default();
    for destination in tmpfs.keys() {
        check_tmpfs_destination(destination).map_err(invalid)?;
    }
    let mut all: BTreeMap<PathBuf, Wanted> = BTreeMap::new();
    for text in host.volumes_from.iter().flatten() {
        let from = VolumesFrom::parse(text).map_err(invalid)?;
        let mounts = others(&from.container).map_err(|failure| Failure::invalid(failure.message))?;
        for mut point in mounts {
            // There is nothing of a tmpfs to share.
            if point.kind == MountKind::Tmpfs {
                continue;
            }
            point.read_only |= from.read_only;
            (point.copy, point.mode) = (false, String::new());
            all.insert(point.destination.clone(), Wanted { point, create: None });
        }
    }
    let mut own: Vec<PathBuf> = Vec::new();
    for text in host.binds.iter().flatten() {
        let read = Specification::parse_bind(text, &host.volume_driver).map_err(invalid)?;
        let wanted = from_specification(&read, quirks, data_root, false)?;
        let place = wanted.point.destination.clone();
        if own.contains(&place) || tmpfs.contains_key(&read.destination) {
            return Err(duplicate(&read.destination));
        }
        own.push(place.clone());
        all.insert(place, wanted);
    }
    for mount in host.mounts.iter().flatten() {
        let read = Specification::from_mount(mount.clone()).map_err(invalid)?;
        let wanted = from_specification(&read, quirks, data_root, true)?;
        check_source(&wanted.point, is_missing(&wanted.point.source))?;
        let place = wanted.point.destination.clone();
        if own.contains(&place) {
            return Err(duplicate(&mount.target));
        }
        own.push(place.clone());
        all.insert(place, wanted);
    }
    for text in config.volumes.iter().flat_map(|volumes| volumes.keys()) {
        let place = PathBuf::from(clean(&format!("/{text}")));
        if place == Path::new("/") || text.contains('\0') {
            return Err(Failure::invalid(format!("invalid volume '{text}': destination can't be '/'")));
        }
        // Not an error: it may come from the image.
        if all.contains_key(&place) || tmpfs.keys().any(|other| Path::new(other) == place) {
            continue;
        }
        let point = MountPoint {
            kind: MountKind::Volume,
            destination: place.clone(),
            anonymous: true,
            copy: true,
            ..MountPoint::default()
        };
        let create = VolumeWanted { driver: host.volume_driver.clone(), ..VolumeWanted::default() };
        all.insert(place, Wanted { point, create: Some(create) });
    }
    let mut all: Vec<Wanted> = all.into_values().collect();
    // What lies in another's place comes after it.
    all.sort_by_key(|wanted| wanted.point.destination.components().count());
    Ok(all)
}

fn duplicate(place: &str) -> Failure {
    Failure::invalid(format!("Duplicate mount point: {place}"))
}

/// A bind in the long form whose source has gone, or never was.
pub fn check_source(point: &MountPoint, is_missing: bool) -> Result<(), Failure> {
    if point.kind == MountKind::Bind && point.must_exist && is_missing {
        return Err(invalid(SpecificationError::no_source(&point.source.display().to_string())));
    }
    Ok(())
}

fn from_specification(
    read: &Specification,
    quirks: Quirks,
    data_root: &Path,
    long: bool,
) -> Result<Wanted, Failure> {
    let mount = &read.mount;
    let mut point = MountPoint {
        destination: PathBuf::from(&read.destination),
        read_only: mount.read_only,
        mode: read.mode.clone(),
        propagation: read.propagation().to_owned(),
        ..MountPoint::default()
    };
    let mut create = None;
    match mount.kind.as_str() {
        "volume" => {
            let options = mount.volume_options.clone().unwrap_or_default();
            let driver = options.driver_config.unwrap_or_default();
            point.kind = MountKind::Volume;
            point.name.clone_from(&mount.source);
            point.anonymous = mount.source.is_empty();
            point.copy = read.copies();
            point.subpath = options.subpath;
            if point.mode.is_empty() {
                // What dockerd shows for its own driver.
                point.mode = "z".to_owned();
            }
            create =
                Some(VolumeWanted { driver: driver.name, options: driver.options, labels: options.labels });
        }
        "tmpfs" => {
            point.kind = MountKind::Tmpfs;
            point.options = read.tmpfs_options().map_err(invalid)?;
        }
        "image" => {
            point.kind = MountKind::Image;
            point.name.clone_from(&mount.source);
            point.read_only = true;
            point.subpath = mount.image_options.clone().unwrap_or_default().subpath;
        }
        _ => {
            let options = mount.bind_options.clone();
            point.source = PathBuf::from(clean(&mount.source));
            point.propagation_asked = options.as_ref().is_some_and(|options| !options.propagation.is_empty());
            guard_data_root(&mut point, data_root, options.is_some())?;
            let options = options.unwrap_or_default();
            point.must_exist = long && !options.create_mountpoint;
            point.non_recursive = options.non_recursive;
            point.read_only_non_recursive =
                options.read_only_non_recursive || (point.read_only && quirks.read_only_non_recursive);
            point.read_only_force_recursive = options.read_only_force_recursive;
        }
    }
    Ok(Wanted { point, create })
}

/// A container that has our own folder, or one around it, must see our mounts go: else it would hold them.
fn guard_data_root(point: &mut MountPoint, data_root: &Path, has_options: bool) -> Result<(), Failure> {
    let (source, root) = (point.source.display().to_string(), data_root.display().to_string());
    if !source.starts_with(&root) && !root.starts_with(&source) {
        return Ok(());
    }
    if !point.propagation_asked {
        point.propagation = "rslave".to_owned();
        return Ok(());
    }
    if has_options && !matches!(point.propagation.as_str(), "rslave" | "rshared") {
        return Err(Failure::invalid(format!(
            "invalid mount config: must use either propagation mode \"rslave\" or \"rshared\" when mount source is within \
             the daemon root, daemon root: {root:?}, bind mount source: {source:?}, propagation: {:?}",
            point.propagation
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn try_wanted(body: Value) -> Result<Vec<Wanted>, String> {
        let create: guest_api::ContainerCreate = guest_api::decode(body.to_string().as_bytes()).unwrap();
        let others = |name: &str| match name {
            "web" => Ok(vec![
                MountPoint {
                    kind: MountKind::Volume,
                    name: "shared".into(),
                    destination: "/shared".into(),
                    copy: true,
                    mode: "z".into(),
                    ..MountPoint::default()
                },
                MountPoint { kind: MountKind::Tmpfs, destination: "/t".into(), ..MountPoint::default() },
            ]),
            other => Err(Failure::not_found(guest_api::error::no_such_container(other))),
        };
        let (quirks, data_root) = (Quirks::default(), Path::new("/var/lib/engine"));
        wanted(&create.config, &create.host_config, quirks, data_root, |path| !path.exists(), others)
            .map_err(|failure| failure.message)
    }

    fn points(body: Value) -> Vec<MountPoint> {
        try_wanted(body).unwrap().into_iter().map(|wanted| wanted.point).collect()
    }

    fn host(value: Value) -> Value {
        json!({ "HostConfig": value })
    }

    #[test]
    fn all_spellings_become_mount_points_in_order() {
        let all = points(json!({
            "Volumes": {"/v3": {}, "/deep/in/v1": {}},
            "HostConfig": {
                "Binds": ["vol1:/deep", "/home:/t1:ro"],
                "Mounts": [
                    {"Type": "volume", "Target": "/v2"},
                    {"Type": "tmpfs", "Target": "/t2", "TmpfsOptions": {"SizeBytes": 1_048_576, "Mode": 448}},
                    {"Type": "image", "Source": "busybox", "Target": "/i"}
                ]
            }
        }));
        let shown: Vec<(String, String, String)> = all
            .iter()
            .map(|point| point.shown())
            .map(|shown| (shown.kind, shown.destination, shown.mode))
            .collect();
        let line = |kind: &str, place: &str, mode: &str| (kind.to_owned(), place.to_owned(), mode.to_owned());
        assert_eq!(
            shown,
            [
                line("volume", "/deep", "z"),
                line("image", "/i", ""),
                line("bind", "/t1", "ro"),
                line("tmpfs", "/t2", ""),
                line("volume", "/v2", "z"),
                line("volume", "/v3", ""),
                line("volume", "/deep/in/v1", "")
            ]
        );
        assert!(all[4].anonymous && all[5].anonymous && !all[0].anonymous);
        assert_eq!(all[3].options, "mode=700,size=1m");
        assert!(all[1].read_only);
    }

    #[test]
    fn later_ones_win_and_free_places_are_taken() {
        let all = points(json!({
            "Volumes": {"/shared": {}, "/tmp": {}},
            "HostConfig": {"VolumesFrom": ["web:ro"], "Tmpfs": {"/tmp": ""}}
        }));
        assert_eq!(all.len(), 1);
        assert!(all[0].read_only && !all[0].copy && all[0].name == "shared" && all[0].mode.is_empty());
        let all = points(host(json!({"VolumesFrom": ["web"], "Binds": ["/home:/shared"]})));
        assert_eq!((all.len(), all[0].kind), (1, MountKind::Bind));
    }

    #[test]
    fn senseless_mounts_have_dockerds_sentences() {
        let refusal = |value: Value| try_wanted(host(value)).unwrap_err();
        assert_eq!(refusal(json!({"Binds": ["/tmp:/b", "/etc:/b/"]})), "Duplicate mount point: /b");
        assert_eq!(refusal(json!({"Binds": ["/tmp:/b"], "Tmpfs": {"/b": ""}})), "Duplicate mount point: /b");
        assert_eq!(
            refusal(json!({"Binds": ["/tmp:/b"], "Mounts": [{"Type": "tmpfs", "Target": "/b/"}]})),
            "Duplicate mount point: /b/"
        );
        assert_eq!(refusal(json!({"VolumesFrom": ["ghost"]})), "No such container: ghost");
        assert_eq!(
            refusal(json!({"Mounts": [{"Type": "bind", "Source": "/nowhere/x", "Target": "/x"}]})),
            "invalid mount config for type \"bind\": bind source path does not exist: /nowhere/x"
        );
        let made = json!({"Mounts": [{"Type": "bind", "Source": "/nowhere/x", "Target": "/x",
            "BindOptions": {"CreateMountpoint": true}}]});
        assert!(!points(host(made))[0].must_exist);
        assert_eq!(
            refusal(json!({"Tmpfs": {"b": ""}})),
            "invalid mount path: 'b' mount path must be absolute"
        );
        assert!(try_wanted(json!({"Volumes": {"/": {}}})).unwrap_err().contains("can't be '/'"));
        assert!(refusal(json!({"Binds": ["/a:/b:wrong"]})).contains("invalid mode: wrong"));
    }

    #[test]
    fn binds_around_our_own_folder_let_our_mounts_go() {
        let bind = |text: &str| try_wanted(host(json!({"Binds": [text]})));
        assert_eq!(bind("/:/host").unwrap()[0].point.propagation, "rslave");
        assert_eq!(bind("/var/lib/engine/x:/x").unwrap()[0].point.propagation, "rslave");
        assert_eq!(bind("/var/lib:/x:rshared").unwrap()[0].point.propagation, "rshared");
        assert!(bind("/var/lib:/x:private").unwrap_err().contains("daemon root"));
        assert_eq!(bind("/home:/x").unwrap()[0].point.propagation, "rprivate");
    }

    #[test]
    fn older_clients_get_what_their_version_had() {
        let adapted = |mounts: Value, minor| {
            let mut host: HostConfig =
                guest_api::decode(json!({"Mounts": mounts, "VolumeDriver": "local"}).to_string().as_bytes())
                    .unwrap();
            adapt(&mut host, ApiVersion::new(1, minor))
                .map(|(quirks, warnings)| (host.mounts.unwrap(), quirks, warnings))
                .map_err(|failure| failure.message)
        };
        let bind = json!([{"Type": "bind", "Source": "/a", "Target": "/b",
            "BindOptions": {"CreateMountpoint": true, "NonRecursive": true}}]);
        let (mounts, quirks, _) = adapted(bind.clone(), 39).unwrap();
        let options = mounts[0].bind_options.clone().unwrap();
        assert!(!options.create_mountpoint && !options.non_recursive && quirks.read_only_non_recursive);
        let (mounts, quirks, _) = adapted(bind, 44).unwrap();
        let options = mounts[0].bind_options.clone().unwrap();
        assert!(options.create_mountpoint && options.non_recursive && !quirks.read_only_non_recursive);

        let mixed = json!([{"Type": "bind", "Source": "/a", "Target": "/b", "VolumeOptions": {}}]);
        assert_eq!(adapted(mixed.clone(), 41).unwrap().0[0].volume_options, None);
        assert_eq!(
            adapted(mixed, 42).unwrap_err(),
            "VolumeOptions must not be specified on mount type \"bind\""
        );
        let subpath =
            json!([{"Type": "volume", "Source": "a", "Target": "/b", "VolumeOptions": {"Subpath": "x"}}]);
        assert!(adapted(subpath.clone(), 44).unwrap_err().contains("needs API v1.45"));
        assert_eq!(adapted(subpath.clone(), 47).unwrap().2, [""; 0]);
        assert_eq!(adapted(subpath, 48).unwrap().2.len(), 1);
        assert!(adapted(json!([{"Type": "image"}]), 47).unwrap_err().contains("needs API v1.48"));
    }
}
