//! Which containers there are: by id, and by name.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, PoisonError, RwLock};

use tokio::sync::{mpsc, watch};

use super::driver::Command;
use super::names;
use super::record::View;
use crate::failure::Failure;

/// The way to one container's driver, and to what it published last.
#[derive(Clone)]
pub struct Handle {
    pub commands: mpsc::Sender<Command>,
    pub views: watch::Receiver<Arc<View>>,
}

impl Handle {
    pub fn view(&self) -> Arc<View> {
        self.views.borrow().clone()
    }
}

/// The index. The lock is held for look-ups only, never over anything that waits.
#[derive(Default)]
pub struct Index {
    inner: RwLock<Inner>,
}

#[derive(Default)]
struct Inner {
    handles: BTreeMap<String, Handle>,
    /// Also holds names of containers that are just being made.
    names: HashMap<String, String>,
}

impl Index {
    fn read(&self) -> std::sync::RwLockReadGuard<'_, Inner> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, Inner> {
        self.inner.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a name for a container, or a random one.
    pub fn reserve_name(&self, wanted: Option<&str>, id: &str) -> Result<String, Failure> {
        let mut inner = self.write();
        let name = match wanted {
            Some(name) => {
                if let Some(owner) = inner.names.get(name) {
                    return Err(Failure::conflict(guest_api::error::name_conflict(name, owner)));
                }
                name.to_owned()
            }
            None => (0..)
                .map(names::random)
                .find(|name| !inner.names.contains_key(name))
                .ok_or_else(|| Failure::broken("no random name is free"))?,
        };
        inner.names.insert(name.clone(), id.to_owned());
        Ok(name)
    }

    /// Gives a name back, if `id` has it.
    pub fn release_name(&self, name: &str, id: &str) {
        let mut inner = self.write();
        if inner.names.get(name).is_some_and(|owner| owner == id) {
            inner.names.remove(name);
        }
    }

    /// A new id whose first twelve digits are nobody else's: folders and interfaces are named after them.
    pub fn new_id(&self) -> String {
        let inner = self.read();
        loop {
            let id = names::random_id();
            let short = &id[..12];
            if !inner
                .handles
                .range(short.to_owned()..)
                .next()
                .is_some_and(|(other, _)| other.starts_with(short))
            {
                return id;
            }
        }
    }

    pub fn insert(&self, id: &str, handle: Handle) {
        self.write().handles.insert(id.to_owned(), handle);
    }

    /// Forgets a container and all its names.
    pub fn forget(&self, id: &str) {
        let mut inner = self.write();
        inner.handles.remove(id);
        inner.names.retain(|_, owner| owner != id);
    }

    /// A container by id, name (with or without slash) or the start of its id.
    pub fn find(&self, wanted: &str) -> Result<Handle, Failure> {
        let inner = self.read();
        let bare = wanted.strip_prefix('/').unwrap_or(wanted);
        let missing = || Failure::not_found(guest_api::error::no_such_container(wanted));
        if let Some(handle) = inner.handles.get(bare) {
            return Ok(handle.clone());
        }
        // A name may be reserved before its container is complete; then there is no handle yet.
        if let Some(handle) = inner.names.get(bare).and_then(|id| inner.handles.get(id)) {
            return Ok(handle.clone());
        }
        if bare.is_empty() {
            return Err(missing());
        }
        let mut matches = inner.handles.range(bare.to_owned()..).take_while(|(id, _)| id.starts_with(bare));
        match (matches.next(), matches.next()) {
            (Some((_, handle)), None) => Ok(handle.clone()),
            (Some(_), Some(_)) => {
                Err(Failure::invalid(format!("multiple IDs found with provided prefix: {bare}")))
            }
            (None, _) => Err(missing()),
        }
    }

    pub fn all(&self) -> Vec<Handle> {
        self.read().handles.values().cloned().collect()
    }

    /// Lets go of every driver.
    pub fn clear(&self) {
        let mut inner = self.write();
        inner.handles.clear();
        inner.names.clear();
    }
}

#[cfg(test)]
mod tests {
    use guest_api::ErrorKind;

    use super::super::record::tests::record;
    use super::super::table::Phase;
    use super::*;

    fn handle(id: &str) -> Handle {
        let mut record = record();
        record.id = id.to_owned();
        let view = View {
            record: Arc::new(record),
            phase: Phase::Created,
            live: None,
            runs_ended: 0,
            removed: false,
        };
        Handle { commands: mpsc::channel(1).0, views: watch::channel(Arc::new(view)).1 }
    }

    fn found(index: &Index, wanted: &str) -> Result<String, ErrorKind> {
        index.find(wanted).map(|handle| handle.view().record.id.clone()).map_err(|failure| failure.kind)
    }

    #[test]
    fn containers_are_found_by_id_name_and_prefix() {
        let index = Index::default();
        for (id, name) in [("abc111", "web"), ("abc222", "def"), ("def333", "db")] {
            index.reserve_name(Some(name), id).unwrap();
            index.insert(id, handle(id));
        }
        assert_eq!(found(&index, "abc111"), Ok("abc111".into()));
        assert_eq!(found(&index, "/web"), Ok("abc111".into()));
        assert_eq!(found(&index, "def"), Ok("abc222".into()), "a name wins over a prefix");
        assert_eq!(found(&index, "def3"), Ok("def333".into()));
        assert_eq!(found(&index, "abc"), Err(ErrorKind::Invalid));
        assert_eq!(found(&index, ""), Err(ErrorKind::NotFound));
        assert_eq!(found(&index, "nope"), Err(ErrorKind::NotFound));
        index.forget("abc111");
        assert_eq!(found(&index, "web"), Err(ErrorKind::NotFound));
        assert!(index.reserve_name(Some("web"), "new").is_ok());
    }

    #[test]
    fn a_name_is_given_once() {
        let index = Index::default();
        index.reserve_name(Some("web"), "one").unwrap();
        let failure = index.reserve_name(Some("web"), "two").unwrap_err();
        assert_eq!(failure.message, guest_api::error::name_conflict("web", "one"));
        assert_eq!(found(&index, "web"), Err(ErrorKind::NotFound), "reserved, not there yet");
        index.release_name("web", "two");
        assert!(index.reserve_name(Some("web"), "two").is_err(), "only the owner gives it back");
        index.release_name("web", "one");
        assert!(index.reserve_name(Some("web"), "two").is_ok());
        assert!(index.reserve_name(None, "three").unwrap().contains('_'));
    }
}
