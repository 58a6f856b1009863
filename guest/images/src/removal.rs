//! Removing images by dockerd's rules (`ImageDelete`), with its sentences: which names go, whether the image goes with
//! them, and which of its parents follow.
//!
//! Nothing here reads a configuration, so an image whose configuration is damaged can be removed like any other.

use std::collections::{HashMap, HashSet};

use crate::{
    ChainId, Deleted, Error, ImageId, Images, InUse, Reference, RemoveOptions, Result,
    database::{self, ImageRecord, NAMES, RECORDS},
    download::blocking,
    images::names_by_id,
};

impl Images {
    /// Untags and deletes by Docker's rules. `in_use` lists the containers made from an image.
    ///
    /// An image that a stopped container uses can be deleted with `force`: the container keeps its layers.
    pub async fn remove(
        &self,
        name: &str,
        options: RemoveOptions,
        in_use: impl Fn(&ImageId) -> Vec<InUse> + Send + Sync,
    ) -> Result<Vec<Deleted>> {
        let (inner, text) = (self.0.clone(), name.to_owned());
        let family = blocking(move || {
            let found = inner.find(&text)?;
            let records = inner.store.read()?.open_table(RECORDS)?;
            let mut family = vec![found.id];
            let mut next = found.record.parent;
            while let Some(parent) = next.filter(|parent| !family.contains(parent)) {
                family.push(parent);
                next =
                    database::get::<ImageRecord>(&records, &parent.hex())?.and_then(|record| record.parent);
            }
            Ok(family)
        })
        .await?;
        let uses: HashMap<ImageId, Vec<InUse>> = family.iter().map(|id| (*id, in_use(id))).collect();
        let (inner, text) = (self.0.clone(), name.to_owned());
        let (removal, records) = blocking(move || {
            let transaction = inner.store.write()?;
            let (removal, removed) = {
                let mut names = transaction.open_table(NAMES)?;
                let mut records = transaction.open_table(RECORDS)?;
                // Once more: what was found before the transaction may have changed.
                let found = inner.find(&text)?;
                let kin = Kin::of(&database::all::<ImageRecord>(&records)?, names_by_id(&names)?, uses)?;
                let by_name = found.by_name.filter(|_| !begins(&found.id, &text));
                let removal = kin.plan(&text, found.id, by_name.as_ref(), options)?;
                for reference in &removal.untag {
                    names.remove(reference.to_string().as_str())?;
                }
                let mut removed = Vec::new();
                for id in &removal.delete {
                    let key = id.hex();
                    removed.extend(database::get::<ImageRecord>(&records, &key)?.map(|record| (*id, record)));
                    records.remove(key.as_str())?;
                }
                (removal, removed)
            };
            guest_fault::point("rmi.before-index");
            transaction.commit()?;
            guest_fault::point("rmi.after-index");
            Ok((removal, removed))
        })
        .await?;
        let mut deleted: Vec<Deleted> = removal.untag.into_iter().map(Deleted::Untagged).collect();
        if records.is_empty() {
            return Ok(deleted);
        }
        let mut gone: HashSet<ChainId> = self.collect().await?.layers;
        for (id, record) in records {
            deleted.push(Deleted::Image(id));
            let chains = record.layers.iter().rev().map(|layer| layer.chain_id);
            deleted.extend(chains.filter(|chain| gone.remove(chain)).map(Deleted::Layer));
        }
        Ok(deleted)
    }
}

/// Whether what was typed is the beginning of the id; then it is not taken for a name.
fn begins(id: &ImageId, text: &str) -> bool {
    id.to_string().starts_with(text) || id.hex().starts_with(text)
}

/// What a removal will do.
#[derive(Debug, PartialEq, Eq)]
struct Removal {
    untag: Vec<Reference>,
    /// The image, then its parents.
    delete: Vec<ImageId>,
}

/// Everything that speaks for or against the removal of an image.
#[derive(Default)]
struct Kin {
    references: HashMap<ImageId, Vec<Reference>>,
    parents: HashMap<ImageId, ImageId>,
    children: HashMap<ImageId, usize>,
    uses: HashMap<ImageId, Vec<InUse>>,
}

/// Which objections count.
#[derive(Clone, Copy)]
struct Objections {
    references: bool,
    stopped: bool,
}

impl Kin {
    fn of(
        records: &[(String, ImageRecord)],
        references: HashMap<ImageId, Vec<Reference>>,
        uses: HashMap<ImageId, Vec<InUse>>,
    ) -> Result<Self> {
        let mut kin = Self { references, uses, ..Self::default() };
        for (key, record) in records {
            if let Some(parent) = record.parent {
                kin.parents.insert(database::digest_of_key(key)?, parent);
                *kin.children.entry(parent).or_default() += 1;
            }
        }
        Ok(kin)
    }

    fn references(&self, id: &ImageId) -> &[Reference] {
        self.references.get(id).map_or(&[], Vec::as_slice)
    }

    /// dockerd's `checkImageDeleteConflict`, in its order.
    fn objection(&self, id: &ImageId, count: Objections) -> Option<Error> {
        let unable = |how: &str, why: String| {
            Some(Error::conflict(format!("conflict: unable to delete {} ({how}) - {why}", id.short())))
        };
        let uses = self.uses.get(id).map_or(&[][..], Vec::as_slice);
        if self.children.get(id).is_some_and(|count| *count > 0) {
            return unable("cannot be forced", "image has dependent child images".to_owned());
        }
        if let Some(user) = uses.iter().find(|user| user.running) {
            let short = short(user);
            return unable("cannot be forced", format!("image is being used by running container {short}"));
        }
        if count.references && !self.references(id).is_empty() {
            return unable("must be forced", "image is referenced in multiple repositories".to_owned());
        }
        if let Some(user) = uses.first().filter(|_| count.stopped) {
            let short = short(user);
            return unable("must be forced", format!("image is being used by stopped container {short}"));
        }
        None
    }

    fn plan(
        mut self,
        text: &str,
        id: ImageId,
        by_name: Option<&Reference>,
        options: RemoveOptions,
    ) -> Result<Removal> {
        let mut removal = Removal { untag: Vec::new(), delete: Vec::new() };
        let references = self.references.remove(&id).unwrap_or_default();
        if let Some(name) = by_name {
            if !options.force
                && is_single(&references)
                && let Some(user) = self.uses.get(&id).and_then(|uses| uses.first())
            {
                return Err(Error::conflict(format!(
                    "conflict: unable to remove repository reference \"{text}\" (must force) - container {} is using its referenced image {}",
                    short(user),
                    id.short()
                )));
            }
            let rest;
            (removal.untag, rest) = untagged_with(name, references);
            // Without a name, but in use: the image stays.
            let count = Objections { references: false, stopped: !options.force };
            if !rest.is_empty() || self.objection(&id, count).is_some() {
                return Ok(removal);
            }
        } else {
            // By id: the names of one repository go with it, those of several need force.
            let count =
                Objections { references: !options.force && !is_single(&references), stopped: !options.force };
            self.references.insert(id, references);
            if let Some(objection) = self.objection(&id, count) {
                return Err(objection);
            }
            removal.untag = self.references.remove(&id).unwrap_or_default();
        }
        let mut next = Some(id);
        while let Some(id) = next {
            removal.delete.push(id);
            next = self.parents.remove(&id).filter(|_| options.parents).filter(|parent| {
                if let Some(children) = self.children.get_mut(parent) {
                    *children -= 1;
                }
                self.objection(parent, Objections { references: true, stopped: true }).is_none()
            });
        }
        Ok(removal)
    }
}

fn short(user: &InUse) -> String {
    user.container.chars().take(12).collect()
}

/// The names that go with `name`, and those that stay: with the last tag of a repository go its digests.
fn untagged_with(name: &Reference, references: Vec<Reference>) -> (Vec<Reference>, Vec<Reference>) {
    let mut going = vec![name.clone()];
    let mut rest: Vec<Reference> = references.into_iter().filter(|reference| reference != name).collect();
    let tagged = rest.iter().any(|reference| reference.digest().is_none() && reference.name() == name.name());
    if name.digest().is_none() && !tagged {
        let (digests, staying) = rest
            .into_iter()
            .partition(|reference| reference.digest().is_some() && reference.name() == name.name());
        going.extend::<Vec<Reference>>(digests);
        rest = staying;
    }
    (going, rest)
}

/// At most one tag, and digests only of its repository.
fn is_single(references: &[Reference]) -> bool {
    let tags = references.iter().filter(|reference| reference.digest().is_none()).count();
    tags <= 1
        && references.first().is_some_and(|first| references.iter().all(|other| other.name() == first.name()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Digest;

    const DIGEST: &str = "@sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn references(names: &[&str]) -> Vec<Reference> {
        names.iter().map(|name| name.parse().expect("a name")).collect()
    }

    fn used(running: bool) -> Vec<InUse> {
        vec![InUse { container: "0123456789abcdef".to_owned(), running }]
    }

    fn kin(names: &[&str], uses: &[InUse]) -> Kin {
        let id = Digest::of(b"");
        Kin {
            references: [(id, references(names))].into(),
            uses: [(id, uses.to_vec())].into(),
            ..Kin::default()
        }
    }

    fn plan(
        by_name: Option<&str>,
        names: &[&str],
        force: bool,
        uses: &[InUse],
    ) -> Result<(Vec<String>, bool), String> {
        let name = by_name.map(|name| name.parse::<Reference>().expect("a name"));
        let options = RemoveOptions { force, parents: true };
        let removal =
            kin(names, uses).plan(by_name.unwrap_or("e3b0"), Digest::of(b""), name.as_ref(), options);
        removal
            .map(|removal| {
                (removal.untag.iter().map(Reference::familiar).collect(), !removal.delete.is_empty())
            })
            .map_err(|error| error.to_string())
    }

    fn gone(names: &[&str], delete: bool) -> Result<(Vec<String>, bool), String> {
        Ok((names.iter().map(|name| (*name).to_owned()).collect(), delete))
    }

    #[test]
    fn a_name_goes_alone_while_others_remain() {
        assert_eq!(plan(Some("x:1"), &["x:1", "x:2"], false, &[]), gone(&["x:1"], false));
        assert_eq!(plan(Some("x:1"), &["x:1", "y:1"], false, &used(true)), gone(&["x:1"], false));
    }

    #[test]
    fn the_last_name_takes_its_digests_and_the_image_along() {
        let digest = format!("x{DIGEST}");
        assert_eq!(plan(Some("x:1"), &["x:1"], false, &[]), gone(&["x:1"], true));
        assert_eq!(plan(Some("x:1"), &["x:1", &digest], false, &[]), gone(&["x:1", &digest], true));
        let other = format!("y{DIGEST}");
        assert_eq!(plan(Some("x:1"), &["x:1", &other], false, &[]), gone(&["x:1"], false));
    }

    #[test]
    fn the_last_name_of_a_used_image_needs_force() {
        let refused = "conflict: unable to remove repository reference \"x:1\" (must force) - container 0123456789ab is using its referenced image e3b0c44298fc";
        assert_eq!(plan(Some("x:1"), &["x:1"], false, &used(false)), Err(refused.to_owned()));
        assert_eq!(plan(Some("x:1"), &["x:1"], true, &used(false)), gone(&["x:1"], true));
        assert_eq!(
            plan(Some("x:1"), &["x:1"], true, &used(true)),
            gone(&["x:1"], false),
            "it stays without a name"
        );
    }

    #[test]
    fn by_id_needs_force_for_several_repositories_and_stopped_containers() {
        assert_eq!(plan(None, &[], false, &[]), gone(&[], true));
        assert_eq!(plan(None, &["x:1"], false, &[]), gone(&["x:1"], true));
        let error =
            |how: &str, why: &str| Err(format!("conflict: unable to delete e3b0c44298fc ({how}) - {why}"));
        assert_eq!(
            plan(None, &["x:1", "y:1"], false, &[]),
            error("must be forced", "image is referenced in multiple repositories")
        );
        assert_eq!(plan(None, &["x:1", "y:1"], true, &[]), gone(&["x:1", "y:1"], true));
        assert_eq!(
            plan(None, &["x:1"], false, &used(false)),
            error("must be forced", "image is being used by stopped container 0123456789ab")
        );
        assert_eq!(plan(None, &["x:1"], true, &used(false)), gone(&["x:1"], true));
        assert_eq!(
            plan(None, &["x:1"], true, &used(true)),
            error("cannot be forced", "image is being used by running container 0123456789ab")
        );
    }

    /// `base` ← `middle` ← `top`, and what removing the top takes along.
    fn family(
        names: &[(&[u8], &str)],
        uses: &[(&[u8], bool)],
        text: &[u8],
        options: RemoveOptions,
    ) -> Result<Vec<ImageId>, String> {
        let [base, middle, top] = [b"base".as_slice(), b"middle", b"top"].map(Digest::of);
        let kin = Kin {
            references: names.iter().map(|(id, name)| (Digest::of(id), references(&[name]))).collect(),
            parents: [(middle, base), (top, middle)].into(),
            children: [(base, 1), (middle, 1)].into(),
            uses: uses.iter().map(|(id, running)| (Digest::of(id), used(*running))).collect(),
        };
        let id = Digest::of(text);
        kin.plan(&id.hex(), id, None, options)
            .map(|removal| removal.delete)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn parents_go_along_as_long_as_nothing_needs_them() {
        let [base, middle, top] = [b"base".as_slice(), b"middle", b"top"].map(Digest::of);
        let options = RemoveOptions { force: false, parents: true };
        assert_eq!(family(&[], &[], b"top", options), Ok(vec![top, middle, base]));
        assert_eq!(family(&[(b"base", "base:1")], &[], b"top", options), Ok(vec![top, middle]));
        assert_eq!(family(&[], &[(b"middle", false)], b"top", options), Ok(vec![top]));
        assert_eq!(family(&[], &[], b"top", RemoveOptions { parents: false, ..options }), Ok(vec![top]));
        let refused = family(&[], &[], b"middle", RemoveOptions { force: true, ..options }).unwrap_err();
        assert!(refused.ends_with("(cannot be forced) - image has dependent child images"), "{refused}");
    }
}
