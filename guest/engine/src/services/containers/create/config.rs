//! The portable settings, checked.

use std::path::Path;

use guest_api::ContainerConfig;

use super::merge::env_name;
use crate::failure::Failure;

/// Refuses what no container can be.
pub fn check(config: &ContainerConfig) -> Result<(), Failure> {
    if !config.working_dir.is_empty() && !Path::new(&config.working_dir).is_absolute() {
        return Err(Failure::invalid(format!(
            "the working directory '{}' is invalid, it needs to be an absolute path",
            config.working_dir
        )));
    }
    for entry in config.env.iter().flatten() {
        if env_name(entry).is_empty() {
            return Err(Failure::invalid(format!("invalid environment variable: {entry}")));
        }
    }
    if !config.stop_signal.is_empty() {
        super::super::signal::parse(&config.stop_signal)?;
    }
    let words = config.entrypoint.iter().chain(&config.cmd).chain(&config.env).flatten();
    let texts = words.chain([&config.hostname, &config.domainname, &config.user, &config.working_dir]);
    if texts.into_iter().any(|text| text.contains('\0')) {
        return Err(Failure::invalid("a command, variable or name holds a zero byte"));
    }
    Ok(())
}
