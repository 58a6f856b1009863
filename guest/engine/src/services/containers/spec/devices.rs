//! Devices of the host in a container: nodes, and the rules that let them be used.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use guest_api::HostConfig;
use guest_api::container::{DeviceMapping, ThrottleDevice, WeightDevice};
use guest_runtime::defaults;
use oci_spec::OciSpecError;
use oci_spec::runtime::{
    LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, LinuxThrottleDevice, LinuxThrottleDeviceBuilder,
    LinuxWeightDevice, LinuxWeightDeviceBuilder,
};

use crate::failure::Failure;

/// Everything of the host's devices a spec needs, looked up when the container starts.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Devices {
    /// Nodes to make.
    pub nodes: Vec<LinuxDevice>,
    /// Nodes to make elsewhere than below /dev: their path on the host, and in the container.
    pub elsewhere: Vec<(PathBuf, PathBuf)>,
    /// Rules beyond the default ones.
    pub rules: Vec<LinuxDeviceCgroup>,
    /// Numbers of the block devices that limits name.
    pub numbers: BTreeMap<String, (i64, i64)>,
}

impl Devices {
    /// Looks at the devices a container asks for.
    pub fn look_up(host: &HostConfig) -> Result<Self, Failure> {
        let mut devices = Self::default();
        if host.privileged {
            devices.nodes = all();
        }
        for mapping in host.devices.iter().flatten() {
            // All of them are there already.
            if !(host.privileged && mapping.path_on_host == mapping.path_in_container) {
                devices.add(mapping)?;
            }
        }
        // None of the drivers that hand out devices (GPUs) is here.
        if let Some(request) = host.device_requests.iter().flatten().next() {
            let capabilities =
                request.capabilities.iter().flatten().map(|all| format!("[{}]", all.join(" ")));
            return Err(Failure::broken(format!(
                "could not select device driver {:?} with capabilities: [{}]",
                request.driver,
                capabilities.collect::<Vec<_>>().join(" ")
            )));
        }
        devices.rules.extend(rules(host)?);
        let weights = host.blkio_weight_device.iter().flatten().map(|device| &device.path);
        let limits = [
            &host.blkio_device_read_bps,
            &host.blkio_device_write_bps,
            &host.blkio_device_read_iops,
            &host.blkio_device_write_iops,
        ];
        let limits = limits.into_iter().flatten().flatten().map(|device| &device.path);
        for path in weights.chain(limits) {
            let metadata = std::fs::metadata(path)
                .map_err(|error| Failure::invalid(format!("stat {path}: {}", plain(&error))))?;
            devices.numbers.insert(path.clone(), numbers(&metadata));
        }
        Ok(devices)
    }

    fn add(&mut self, mapping: &DeviceMapping) -> Result<(), Failure> {
        let DeviceMapping { path_on_host, path_in_container, cgroup_permissions } = mapping;
        let failed = |reason: String| {
            Failure::broken(format!(
                "error gathering device information while adding custom device \"{path_on_host}\": {reason}"
            ))
        };
        let source = std::fs::canonicalize(path_on_host).map_err(|error| failed(plain(&error)))?;
        let metadata = std::fs::symlink_metadata(&source).map_err(|error| failed(plain(&error)))?;
        let target = if path_in_container.is_empty() { path_on_host } else { path_in_container };
        let mut found = Vec::new();
        if metadata.is_dir() {
            walk(&source, &mut |path, metadata| {
                if let (Ok(below), Some(node)) = (path.strip_prefix(&source), node(path, metadata)) {
                    found.push((path.to_owned(), Path::new(target).join(below), node));
                }
                true
            });
        } else if let Some(node) = node(&source, &metadata) {
            found.push((source.clone(), PathBuf::from(target), node));
        }
        if found.is_empty() {
            return Err(failed("not a device node".to_owned()));
        }
        for (source, target, mut node) in found {
            let mut rule = LinuxDeviceCgroup::default();
            rule.set_allow(true)
                .set_typ(Some(node.typ()))
                .set_major(Some(node.major()))
                .set_minor(Some(node.minor()))
                .set_access(Some(cgroup_permissions.clone()));
            self.rules.push(rule);
            if target.starts_with("/dev") {
                node.set_path(target);
                self.nodes.push(node);
            } else {
                self.elsewhere.push((source, target));
            }
        }
        Ok(())
    }

    /// Weights by device, as OCI writes them.
    pub fn weights(&self, list: Option<&[WeightDevice]>) -> Result<Option<Vec<LinuxWeightDevice>>, Failure> {
        let weight = |device: &WeightDevice| {
            let (major, minor) = self.numbers.get(&device.path).copied().unwrap_or_default();
            LinuxWeightDeviceBuilder::default().major(major).minor(minor).weight(device.weight).build()
        };
        all_of(list, weight)
    }

    /// Limits by device, as OCI writes them.
    pub fn limits(
        &self,
        list: Option<&[ThrottleDevice]>,
    ) -> Result<Option<Vec<LinuxThrottleDevice>>, Failure> {
        let limit = |device: &ThrottleDevice| {
            let (major, minor) = self.numbers.get(&device.path).copied().unwrap_or_default();
            LinuxThrottleDeviceBuilder::default().major(major).minor(minor).rate(device.rate).build()
        };
        all_of(list, limit)
    }

    /// All rules of the container, in their order.
    pub fn all_rules(&self, privileged: bool) -> Vec<LinuxDeviceCgroup> {
        if privileged {
            return defaults::privileged_device_rules();
        }
        let mut rules = defaults::device_rules();
        rules.extend(self.rules.iter().cloned());
        rules
    }
}

/// `None` for an empty list.
fn all_of<T, U>(
    list: Option<&[T]>,
    build: impl Fn(&T) -> Result<U, OciSpecError>,
) -> Result<Option<Vec<U>>, Failure> {
    let Some(list) = list.filter(|list| !list.is_empty()) else { return Ok(None) };
    let built: Result<Vec<U>, OciSpecError> = list.iter().map(build).collect();
    built.map(Some).map_err(|error| Failure::internal("cannot describe a device's limit", &error))
}

/// An error as C writes it, without the number.
fn plain(error: &io::Error) -> String {
    let text = error.to_string();
    let bare = text.split(" (os error").next().unwrap_or(&text);
    let mut letters = bare.chars();
    letters.next().map_or_else(String::new, |first| first.to_lowercase().chain(letters).collect())
}

/// `DeviceCgroupRules`: `c 1:* rwm`.
pub fn rules(host: &HostConfig) -> Result<Vec<LinuxDeviceCgroup>, Failure> {
    host.device_cgroup_rules.iter().flatten().map(|text| rule(text)).collect()
}

fn rule(text: &str) -> Result<LinuxDeviceCgroup, Failure> {
    let invalid = || Failure::invalid(format!("invalid device cgroup rule format: '{text}'"));
    let mut words = text.split(' ');
    let (Some(kind), Some(pair), Some(access), None) =
        (words.next(), words.next(), words.next(), words.next())
    else {
        return Err(invalid());
    };
    let kind = match kind {
        "a" => LinuxDeviceType::A,
        "b" => LinuxDeviceType::B,
        "c" => LinuxDeviceType::C,
        _ => return Err(invalid()),
    };
    let (major, minor) = pair.split_once(':').ok_or_else(invalid)?;
    let number = |text: &str, what: &str| match text {
        "*" => Ok(None),
        digits if !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()) => {
            digits.parse::<i64>().map(Some).map_err(|_| {
                Failure::invalid(format!("invalid {what} value in device cgroup rule format: '{text}'"))
            })
        }
        _ => Err(invalid()),
    };
    if !(1..=3).contains(&access.len()) || !access.bytes().all(|letter| b"rwm".contains(&letter)) {
        return Err(invalid());
    }
    let mut rule = LinuxDeviceCgroup::default();
    rule.set_allow(true)
        .set_typ(Some(kind))
        .set_major(number(major, "major")?)
        .set_minor(number(minor, "minor")?)
        .set_access(Some(access.to_owned()));
    Ok(rule)
}

/// Every device node of the host, but for terminals and shared memory.
fn all() -> Vec<LinuxDevice> {
    const PASSED_OVER: [&str; 7] = ["pts", "shm", "fd", "mqueue", ".lxc", ".lxd-mounts", ".udev"];
    let mut found = Vec::new();
    walk(Path::new("/dev"), &mut |path, metadata| {
        let name = path.file_name().unwrap_or_default();
        if metadata.is_dir() {
            return !PASSED_OVER.iter().any(|skip| name == *skip);
        }
        if name != "console" {
            found.extend(node(path, metadata));
        }
        true
    });
    found
}

/// Shows everything below a folder; into which folders it goes, the visitor says. What cannot be read is passed over.
fn walk(folder: &Path, visit: &mut dyn FnMut(&Path, &std::fs::Metadata) -> bool) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        let Ok(metadata) = std::fs::symlink_metadata(&path) else { continue };
        if visit(&path, &metadata) && metadata.is_dir() {
            walk(&path, visit);
        }
    }
}

fn numbers(metadata: &std::fs::Metadata) -> (i64, i64) {
    let number = metadata.rdev();
    (i64::from(rustix::fs::major(number)), i64::from(rustix::fs::minor(number)))
}

fn node(path: &Path, metadata: &std::fs::Metadata) -> Option<LinuxDevice> {
    let kind = match metadata.file_type() {
        kind if kind.is_char_device() => LinuxDeviceType::C,
        kind if kind.is_block_device() => LinuxDeviceType::B,
        _ => return None,
    };
    let (major, minor) = numbers(metadata);
    let mut device = LinuxDevice::default();
    device
        .set_path(path.to_owned())
        .set_typ(kind)
        .set_major(major)
        .set_minor(minor)
        .set_file_mode(Some(metadata.mode() & 0o7777))
        .set_uid(Some(metadata.uid()))
        .set_gid(Some(metadata.gid()));
    Some(device)
}

#[cfg(test)]
mod tests {
    use super::*;
    use guest_api::container::DeviceRequest;

    fn asking(source: &str, target: &str) -> HostConfig {
        let mapping = DeviceMapping {
            path_on_host: source.into(),
            path_in_container: target.into(),
            cgroup_permissions: "rw".into(),
        };
        HostConfig { devices: Some(vec![mapping]), ..HostConfig::default() }
    }

    #[test]
    fn a_node_is_made_and_allowed() {
        let devices = Devices::look_up(&asking("/dev/zero", "/dev/nought")).unwrap();
        assert_eq!(devices.nodes[0].path(), Path::new("/dev/nought"));
        assert_eq!((devices.nodes[0].major(), devices.nodes[0].minor()), (1, 5));
        let rules = devices.all_rules(false);
        let last = rules.last().unwrap();
        assert_eq!((last.major(), last.minor(), last.access().as_deref()), (Some(1), Some(5), Some("rw")));
        let devices = Devices::look_up(&asking("/dev/zero", "/srv/zero")).unwrap();
        assert!(devices.nodes.is_empty());
        assert_eq!(devices.elsewhere, [("/dev/zero".into(), "/srv/zero".into())]);
    }

    #[test]
    fn what_is_no_device_is_refused_in_dockers_words() {
        let refusal = |path: &str| Devices::look_up(&asking(path, path)).unwrap_err().message;
        let start = "error gathering device information while adding custom device";
        assert_eq!(refusal("/no/such"), format!("{start} \"/no/such\": no such file or directory"));
        assert_eq!(refusal("/etc/hostname"), format!("{start} \"/etc/hostname\": not a device node"));
        let limit = ThrottleDevice { path: "/no/such".into(), rate: 5 };
        let host = HostConfig { blkio_device_read_bps: Some(vec![limit]), ..HostConfig::default() };
        assert_eq!(Devices::look_up(&host).unwrap_err().message, "stat /no/such: no such file or directory");
        let gpus = DeviceRequest {
            count: -1,
            capabilities: Some(vec![vec!["gpu".into()]]),
            ..DeviceRequest::default()
        };
        let host = HostConfig { device_requests: Some(vec![gpus]), ..HostConfig::default() };
        assert_eq!(
            Devices::look_up(&host).unwrap_err().message,
            "could not select device driver \"\" with capabilities: [[gpu]]"
        );
    }

    #[test]
    fn rules_are_read() {
        let read = |text: &str| {
            let host = HostConfig { device_cgroup_rules: Some(vec![text.into()]), ..HostConfig::default() };
            rules(&host)
        };
        let rule = &read("c 10:* rwm").unwrap()[0];
        assert_eq!((rule.major(), rule.minor(), rule.allow()), (Some(10), None, true));
        for text in
            ["", "c 1:2", "x 1:2 r", "c 1 r", "c 1:2 rx", "c 1:2 rwmr", "c -1:2 r", "c 1:2 r w", "c :2 r"]
        {
            let expected = format!("invalid device cgroup rule format: '{text}'");
            assert_eq!(read(text).unwrap_err().message, expected);
        }
    }
}
