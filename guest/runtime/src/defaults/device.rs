//! Device nodes and device rules.

use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType};

fn rule(
    allow: bool,
    kind: LinuxDeviceType,
    major: Option<i64>,
    minor: Option<i64>,
    access: &str,
) -> LinuxDeviceCgroup {
    let mut rule = LinuxDeviceCgroup::default();
    rule.set_allow(allow)
        .set_typ(Some(kind))
        .set_major(major)
        .set_minor(minor)
        .set_access(Some(access.to_owned()));
    rule
}

/// Docker's default rules: any node may be made, only harmless ones opened.
pub fn device_rules() -> Vec<LinuxDeviceCgroup> {
    use LinuxDeviceType::{A, B, C};
    let mut rules = vec![rule(false, A, None, None, "rwm")];
    rules.extend([rule(true, C, None, None, "m"), rule(true, B, None, None, "m")]);
    let opened = [
        (1, Some(3)), // null
        (1, Some(5)), // zero
        (1, Some(7)), // full
        (1, Some(8)), // random
        (1, Some(9)), // urandom
        (5, Some(0)), // tty
        (5, Some(1)), // console
        (5, Some(2)), // ptmx
        (136, None),  // pts/*
    ];
    rules.extend(opened.map(|(major, minor)| rule(true, C, Some(major), minor, "rwm")));
    rules
}

/// The rules of a privileged container.
pub fn privileged_device_rules() -> Vec<LinuxDeviceCgroup> {
    vec![rule(true, LinuxDeviceType::A, None, None, "rwm")]
}

/// Nodes beyond those every OCI runtime makes (null, zero, full, random, urandom, tty): none, as in Docker.
pub fn devices() -> Vec<LinuxDevice> {
    Vec::new()
}
