//! How a container lives: health checks, restart policy, logging.

use guest_api::{ContainerConfig, HostConfig};

use crate::failure::Failure;
use crate::services::containers::{health, logging};

/// Refuses health checks, policies and log options that cannot be followed.
pub fn check(config: &ContainerConfig, host: &HostConfig) -> Result<(), Failure> {
    config.healthcheck.as_ref().map_or(Ok(()), health::verify)?;
    restart_policy(host)?;
    logging::verify(&host.log_config)?;
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
