//! The portable settings, checked.

use std::path::Path;

use guest_api::ContainerConfig;

use super::merge::env_name;
use crate::failure::Failure;

/// Refuses what no container can be.
pub fn check(config: &mut ContainerConfig) -> Result<(), Failure> {
    if !config.working_dir.is_empty() && !Path::new(&config.working_dir).is_absolute() {
        return Err(Failure::invalid(format!(
            "the working directory '{}' is invalid, it needs to be an absolute path",
            config.working_dir
        )));
    }
    if !config.working_dir.is_empty() {
        config.working_dir = clean(&config.working_dir);
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

/// The path without `.`, `..` and doubled slashes.
fn clean(path: &str) -> String {
    let mut parts = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => _ = parts.pop(),
            part => parts.push(part),
        }
    }
    format!("/{}", parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_working_directory_is_cleaned() {
        assert_eq!(clean("/srv//a/./b/../c/"), "/srv/a/c");
        assert_eq!((clean("/"), clean("/../..")), ("/".to_owned(), "/".to_owned()));
    }
}
