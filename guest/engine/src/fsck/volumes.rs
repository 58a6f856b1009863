//! Volumes: their records, and the folders named after them.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::Context;
use guest_images::Findings;
use guest_volumes::LocalVolumes;

use crate::services::volumes::VolumeRecord;
use crate::store::{Store, VOLUMES};

pub fn check(store: &Store, folder: &Path, repair: bool, findings: &mut Findings) -> anyhow::Result<()> {
    let mut known = BTreeSet::new();
    for (name, record) in store.rows::<VolumeRecord>(VOLUMES)? {
        match record {
            Ok(record) if record.name != name => {
                findings.damage.push(format!("the record of the volume {name} is that of {}", record.name));
            }
            Ok(_) => {}
            Err(error) => findings.damage.push(format!("the volume {name}: {error}")),
        }
        // Also of those whose record cannot be read: what they hold is not to be taken away.
        known.insert(name);
    }
    if known.is_empty() && !folder.exists() {
        return Ok(());
    }
    let local = LocalVolumes::open(folder).context("the volumes cannot be checked")?;
    let found = local.problems(&known).context("the volumes cannot be checked")?;
    if !repair {
        findings.damage.extend(found.damage);
        findings
            .leftovers
            .extend(found.leftovers.into_iter().map(|what| format!("{what}; the next start removes it")));
        return Ok(());
    }
    local.recover(&known).context("the volumes cannot be repaired")?;
    let left = local.problems(&known).context("the volumes cannot be checked again")?;
    let left: Vec<String> = left.damage.into_iter().chain(left.leftovers).collect();
    let gone = |what: &String| !left.contains(what);
    findings
        .repaired
        .extend(found.leftovers.into_iter().filter(gone).map(|what| format!("{what}: put right")));
    findings
        .repaired
        .extend(found.damage.into_iter().filter(gone).map(|what| format!("{what}: made again, empty")));
    findings.damage.extend(left);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::folder;
    use serde_json::json;

    #[tokio::test]
    async fn folders_and_records_are_compared_and_mended() {
        let base = folder();
        let store = Store::open(&base.join("engine.redb")).unwrap();
        let root = base.join("volumes");
        let checked = |repair| {
            let mut findings = Findings::default();
            check(&store, &root, repair, &mut findings).unwrap();
            findings
        };
        assert_eq!(checked(false), Findings::default());
        assert!(!root.exists(), "a check makes nothing");

        for name in ["whole", "lost"] {
            let record = json!({"name": name, "created": "2026-01-02T03:04:05Z"});
            store.put(VOLUMES, name, &record).await.unwrap();
        }
        store.put(VOLUMES, "strange", &json!({"name": 1})).await.unwrap();
        for path in ["whole/_data", "strange/_data", "empty/_data", "kept/_data/file", ".new/half/_data"] {
            std::fs::create_dir_all(root.join(path)).unwrap();
        }
        let found = checked(false);
        assert_eq!(found.leftovers.len(), 2, "{found:?}");
        assert_eq!(found.damage.len(), 3, "{found:?}");
        assert_eq!(checked(false), found, "looking changes nothing");

        let mended = checked(true);
        assert_eq!(mended.repaired.len(), 3, "{mended:?}");
        assert_eq!(mended.damage.len(), 2, "{mended:?}");
        assert!(root.join("lost/_data").is_dir());
        assert!(root.join("kept/_data/file").is_dir(), "files are never deleted");
        assert!(root.join("strange/_data").is_dir());
        assert!(!root.join("empty").exists());
        let left = checked(false);
        assert_eq!((left.leftovers, left.damage), (Vec::new(), mended.damage));
        drop(store);
        std::fs::remove_dir_all(base).unwrap();
    }
}
