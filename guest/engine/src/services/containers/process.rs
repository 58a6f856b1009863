//! A further process of a running container, as the shim wants it described.

use std::sync::Arc;

use guest_api::exec::ExecCreate;
use guest_runtime::shim::ErrorKind as ShimErrorKind;
use oci_spec::runtime::Process;

use super::record::Record;
use super::rootfs::read_text;
use super::run::Context;
use super::run::{runtime_text, shim_failure};
use super::shim::ShimError;
use super::{spec, user};
use crate::failure::Failure;

/// Describes it: the container's own settings under those of the request, its user looked up in the container's files.
pub async fn describe(
    context: &Arc<Context>,
    record: &Arc<Record>,
    config: &ExecCreate,
) -> Result<Process, Failure> {
    let (context, record, config) = (context.clone(), record.clone(), config.clone());
    let work = move || {
        let user = user_of(&context, &record, &config.user)?;
        spec::exec_process(&record, &config, &user, &context.capacity.grantable, &context.defaults)
    };
    let built = tokio::task::spawn_blocking(work).await;
    built.map_err(|error| Failure::internal("preparing the exec failed", &error))?
}

/// The user a process of the container runs as; `wanted` empty is the container's own. Reads files.
pub fn user_of(context: &Context, record: &Record, wanted: &str) -> Result<user::User, Failure> {
    let rootfs = context.rootfs(&record.id);
    let read = |path: &str| {
        read_text(&rootfs, path)
            .map_err(|error| Failure::internal(format!("cannot read the container's {path}"), &error))
    };
    let wanted = if wanted.is_empty() { &record.config.user } else { wanted };
    let groups = record.host.group_add.as_deref().unwrap_or_default();
    user::resolve(wanted, groups, &read("/etc/passwd")?, &read("/etc/group")?)
}

/// The exit code and the sentence of an exec that could not be started.
pub fn exec_failure(error: ShimError) -> (i32, Failure) {
    match error {
        ShimError::Refused { kind, message } if kind != ShimErrorKind::Conflict => {
            let text = runtime_text(&message);
            // dockerd names the verb.
            let text = text
                .trim_start_matches("failed to create task for container: failed to create shim task: ")
                .replacen("OCI runtime create failed", "OCI runtime exec failed", 1);
            (kind.exit_code(), Failure::invalid(text))
        }
        other => (126, shim_failure(other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_program_is_127_in_dockers_words() {
        let message = "exec: \"nope\": executable file not found in $PATH".to_owned();
        let (code, failure) = exec_failure(ShimError::Refused { kind: ShimErrorKind::NotFound, message });
        assert_eq!(code, 127);
        assert_eq!(
            failure.message,
            "OCI runtime exec failed: exec: \"nope\": executable file not found in $PATH: unknown"
        );
    }
}
