//! Containers: their records, and the folders named after them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::Context;
use guest_images::Findings;

use crate::services::containers::Record;
use crate::store::{CONTAINERS, Store};

/// Length of an id; other names in the folder are not ours.
const ID_LENGTH: usize = 64;

/// Answers the ids of all containers, also of those whose record cannot be read: what they own is not to be taken away.
pub fn check(
    store: &Store,
    folder: &Path,
    repair: bool,
    findings: &mut Findings,
) -> anyhow::Result<BTreeSet<String>> {
    let mut ids = BTreeSet::new();
    let mut names: BTreeMap<String, String> = BTreeMap::new();
    for (key, record) in store.rows::<Record>(CONTAINERS)? {
        ids.insert(key.clone());
        let record = match record {
            Ok(record) => record,
            Err(error) => {
                findings.damage.push(format!("container {key}: {error}"));
                continue;
            }
        };
        if record.id != key {
            findings.damage.push(format!("the record of container {key} is that of {}", record.id));
        }
        if let Some(other) = names.insert(record.name.clone(), key.clone()) {
            findings.damage.push(format!(
                "the containers {other} and {key} are both named `{}`: rename one of them by its id",
                record.name
            ));
        }
    }
    let listed = match std::fs::read_dir(folder) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(ids),
        listed => listed.with_context(|| format!("cannot list `{}`", folder.display()))?,
    };
    for entry in listed {
        let entry = entry.with_context(|| format!("cannot list `{}`", folder.display()))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.len() != ID_LENGTH || ids.contains(&name) {
            continue;
        }
        let what = format!("`{}` belongs to no container", entry.path().display());
        if repair {
            std::fs::remove_dir_all(entry.path())
                .with_context(|| format!("{what}, and cannot be removed"))?;
            findings.repaired.push(format!("{what}: removed"));
        } else {
            findings.leftovers.push(format!("{what}; the next start removes it"));
        }
    }
    Ok(ids)
}
