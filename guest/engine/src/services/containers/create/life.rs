//! How a container lives: health checks, restart policy, logging.

use guest_api::{ContainerConfig, HostConfig};

use super::unsupported;
use crate::failure::Failure;
use crate::services::containers::health;

/// Refuses what is not offered yet.
pub fn refuse_unsupported(host: &HostConfig) -> Result<(), Failure> {
    if !matches!(host.log_config.kind.as_str(), "" | "json-file" | "none") {
        return Err(unsupported("this log driver (LogConfig)"));
    }
    Ok(())
}

/// Refuses health checks, policies and log options that cannot be followed.
pub fn check(config: &ContainerConfig, host: &HostConfig) -> Result<(), Failure> {
    config.healthcheck.as_ref().map_or(Ok(()), health::verify)?;
    restart_policy(host)?;
    log_options(host)?;
    Ok(())
}

/// Checks `RestartPolicy`, and that it does not contradict `AutoRemove`.
pub fn restart_policy(host: &HostConfig) -> Result<(), Failure> {
    let invalid = |text: String| Err(Failure::invalid(text));
    let policy = &host.restart_policy;
    match policy.name.as_str() {
        "" | "no" | "always" | "unless-stopped" if policy.maximum_retry_count != 0 => {
            return invalid(
                "invalid restart policy: maximum retry count can only be used with 'on-failure'".to_owned(),
            );
        }
        "" | "no" | "always" | "unless-stopped" | "on-failure" if policy.maximum_retry_count >= 0 => {}
        "on-failure" => {
            return invalid("invalid restart policy: maximum retry count cannot be negative".to_owned());
        }
        other => {
            return invalid(format!(
                "invalid restart policy: unknown policy '{other}'; use one of 'no', 'always', 'on-failure', or \
                 'unless-stopped'"
            ));
        }
    }
    if host.auto_remove && !matches!(policy.name.as_str(), "" | "no") {
        return invalid("can't create 'AutoRemove' container with restart policy".to_owned());
    }
    Ok(())
}

/// `max-size` and `max-file`.
pub fn log_options(host: &HostConfig) -> Result<(Option<u64>, Option<u32>), Failure> {
    let (mut size, mut files) = (None, None);
    for (name, value) in &host.log_config.config {
        let bad = || Failure::invalid(format!("invalid value '{value}' for log option '{name}'"));
        match name.as_str() {
            "max-size" if value == "-1" => {}
            "max-size" => size = Some(bytes(value).ok_or_else(bad)?),
            "max-file" => files = Some(value.parse().ok().filter(|count| *count > 0).ok_or_else(bad)?),
            "mode" if value == "blocking" => {}
            _ => return Err(Failure::invalid(format!("unknown log opt '{name}' for json-file log driver"))),
        }
    }
    if files.is_some_and(|files| files > 1) && size.is_none() {
        return Err(Failure::invalid("invalid log options: max-file cannot be set without max-size"));
    }
    Ok((size, files))
}

/// `10m`, `1g`, `500`: binary multiples, as Docker reads them.
fn bytes(text: &str) -> Option<u64> {
    let lower = text.to_ascii_lowercase();
    let bare = lower.trim_end_matches('b').trim_end_matches('i');
    let (number, unit) = match bare.char_indices().last()? {
        (at, 'k') => (&bare[..at], 1 << 10),
        (at, 'm') => (&bare[..at], 1 << 20),
        (at, 'g') => (&bare[..at], 1 << 30),
        _ => (bare, 1),
    };
    number.parse::<u64>().ok()?.checked_mul(unit).filter(|bytes| *bytes > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_sizes_are_binary() {
        assert_eq!(bytes("10m"), Some(10 << 20));
        assert_eq!(bytes("1GB"), Some(1 << 30));
        assert_eq!(bytes("500"), Some(500));
        assert_eq!(bytes("0"), None);
        assert_eq!(bytes(""), None);
        assert_eq!(bytes("99999999999999999999g"), None);
    }
}
