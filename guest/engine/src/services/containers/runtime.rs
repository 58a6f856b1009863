//! Which program makes a container: our own shim by itself, or a runtime that the settings name.

use guest_runtime::shim::ExternalRuntime;

use crate::config::{ContainerDefaults, STOCK_RUNTIME};
use crate::failure::Failure;

/// What containerd calls the stock one; dockerd takes it too.
const STOCK_SHIM: &str = "io.containerd.runc.v2";

/// The runtime of a container by the name in its settings; `None` is our own. dockerd's words for a name that is none.
pub fn choose(name: &str, defaults: &ContainerDefaults) -> Result<Option<ExternalRuntime>, Failure> {
    let name = if name.is_empty() { &defaults.default_runtime } else { name };
    if name == STOCK_RUNTIME || name == STOCK_SHIM {
        return Ok(None);
    }
    let runtime = defaults
        .runtimes
        .get(name)
        .ok_or_else(|| Failure::invalid(format!("unknown or invalid runtime name: {name}")))?;
    Ok(Some(ExternalRuntime { program: runtime.path.clone().into(), arguments: runtime.arguments.clone() }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Runtime;

    #[test]
    fn a_name_stands_for_our_own_for_one_of_the_settings_or_for_nothing() {
        let mut defaults = ContainerDefaults::default();
        let given = Runtime { path: "/usr/bin/crun".into(), arguments: vec!["--debug".into()] };
        defaults.runtimes.insert("other".into(), given);
        assert_eq!(choose("", &defaults).unwrap(), None);
        assert_eq!(choose("runc", &defaults).unwrap(), None);
        assert_eq!(choose("io.containerd.runc.v2", &defaults).unwrap(), None);
        let other = choose("other", &defaults).unwrap().unwrap();
        assert_eq!((other.program.to_str(), other.arguments.len()), (Some("/usr/bin/crun"), 1));
        assert_eq!(choose("kata", &defaults).unwrap_err().message, "unknown or invalid runtime name: kata");
        defaults.default_runtime = "other".into();
        assert_eq!(choose("", &defaults).unwrap(), Some(other));
    }
}
