//! What requests mean in older versions of the API.

use guest_api::{ApiVersion, ContainerCreate};

/// Makes a request what it means in `version`; `unified`: version 2 is the only version of control groups here.
pub fn for_version(create: &mut ContainerCreate, version: ApiVersion, unified: bool) {
    let host = &mut create.host_config;
    let before = |minor| version < ApiVersion::new(1, minor);
    if before(25) {
        // The client removes it.
        host.auto_remove = false;
    }
    if before(40) {
        host.kernel_memory_tcp = 0;
        if host.ipc_mode.is_empty() {
            "shareable".clone_into(&mut host.ipc_mode);
        }
    }
    if before(41) && !unified && host.cgroupns_mode.is_empty() {
        "host".clone_into(&mut host.cgroupns_mode);
    }
    if before(42) {
        host.console_size = [0, 0];
    } else {
        host.kernel_memory = 0;
    }
    if before(43) {
        host.annotations.clear();
    }
    if before(44)
        && let Some(check) = &mut create.config.healthcheck
    {
        check.start_interval = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_client_gets_what_it_expects() {
        let make = |minor| {
            let mut create = ContainerCreate::default();
            create.host_config.auto_remove = true;
            create.host_config.console_size = [24, 80];
            create.host_config.kernel_memory = 5;
            for_version(&mut create, ApiVersion::new(1, minor), false);
            create.host_config
        };
        let old = make(24);
        assert!(!old.auto_remove && old.ipc_mode == "shareable" && old.cgroupns_mode == "host");
        assert_eq!((old.console_size, old.kernel_memory), ([0, 0], 5));
        let new = make(51);
        assert!(new.auto_remove && new.ipc_mode.is_empty() && new.cgroupns_mode.is_empty());
        assert_eq!((new.console_size, new.kernel_memory), ([24, 80], 0));
    }
}
