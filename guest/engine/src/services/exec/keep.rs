//! What is known of an exec, on disk: `execs/ID.json` in its container's run folder, gone with the container's run.

use std::collections::BTreeMap;
use std::path::Path;

use guest_api::exec::ExecCreate;
use serde::{Deserialize, Serialize};

const FOLDER: &str = "execs";

/// An exec as an engine that is restarted must know it.
#[derive(Debug, Serialize, Deserialize)]
pub struct Kept {
    pub config: ExecCreate,
    pub state: KeptState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum KeptState {
    Created,
    Running,
    Ended { code: i32 },
}

/// Writes it, so that it appears whole or not at all. Without it only a restarted engine would miss something.
pub fn write(run_folder: &Path, id: &str, kept: &Kept) {
    let folder = run_folder.join(FOLDER);
    let written = serde_json::to_vec(kept).map_err(std::io::Error::from).and_then(|bytes| {
        if !run_folder.is_dir() {
            // The container has ended, and its execs with it.
            return Ok(());
        }
        std::fs::create_dir_all(&folder)?;
        let temporary = folder.join(format!("{id}.new"));
        std::fs::write(&temporary, bytes)?;
        std::fs::rename(&temporary, folder.join(format!("{id}.json")))
    });
    if let Err(error) = written {
        tracing::debug!(exec = id, %error, "cannot keep what is known of an exec");
    }
}

/// Forgets it.
pub fn remove(run_folder: &Path, id: &str) {
    // Gone with its container already, mostly.
    let _ = std::fs::remove_file(run_folder.join(FOLDER).join(format!("{id}.json")));
}

/// All that are kept of a container, by id.
pub fn all(run_folder: &Path) -> BTreeMap<String, Kept> {
    let Ok(entries) = std::fs::read_dir(run_folder.join(FOLDER)) else { return BTreeMap::new() };
    let found = entries.flatten().filter_map(|entry| {
        let name = entry.file_name();
        let id = name.to_str()?.strip_suffix(".json")?.to_owned();
        Some((id, serde_json::from_slice(&std::fs::read(entry.path()).ok()?).ok()?))
    });
    found.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::folder;

    #[test]
    fn what_is_kept_is_found_until_it_is_removed() {
        let folder = folder();
        let config = ExecCreate { cmd: Some(vec!["true".into()]), ..ExecCreate::default() };
        write(&folder, "a1", &Kept { config, state: KeptState::Ended { code: 7 } });
        std::fs::write(folder.join(FOLDER).join("b2.json"), "nonsense").unwrap();
        let kept = all(&folder);
        assert_eq!(kept.len(), 1);
        assert_eq!(kept["a1"].state, KeptState::Ended { code: 7 });
        remove(&folder, "a1");
        assert!(all(&folder).is_empty());
        std::fs::remove_dir_all(&folder).unwrap();
        write(&folder, "c3", &Kept { config: ExecCreate::default(), state: KeptState::Created });
        assert!(!folder.exists());
    }
}
