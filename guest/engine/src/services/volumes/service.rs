//! The volume service: makes volumes, finds them, mounts what their options say while they are used, and removes them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use guest_api::volume::{ANONYMOUS_LABEL, UsageData, Volume, VolumeCreate, VolumeList, VolumesPruned};
use guest_api::{ErrorKind, Filters};
use guest_volumes::{LocalVolumes, VolumeError, used_bytes};
use jiff::Timestamp;
use tokio::sync::OwnedMutexGuard;

use super::list::{Listing, Pruning};
use super::record::{DRIVER, VolumeRecord};
use crate::failure::{Failure, chain};
use crate::services::events::Events;
use crate::store::{self, Store};

/// The volume service.
pub struct Volumes {
    local: LocalVolumes,
    store: Store,
    events: Events,
    state: Mutex<State>,
    /// One operation at a time on each name. An entry lives as long as somebody holds or waits for it.
    locks: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
    pruning: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct State {
    records: BTreeMap<String, Arc<VolumeRecord>>,
    /// Containers whose records name a volume.
    users: HashMap<String, BTreeSet<String>>,
    /// Containers for which what the options say is mounted.
    mounted: HashMap<String, BTreeSet<String>>,
}

/// A volume that somebody just asked for.
pub struct Taken {
    pub record: Arc<VolumeRecord>,
    pub mountpoint: PathBuf,
    /// It was not there before.
    pub is_new: bool,
}

fn failure(error: &VolumeError) -> Failure {
    let kind = match error {
        VolumeError::ShortName | VolumeError::Name(_) | VolumeError::Options(_) => ErrorKind::Invalid,
        _ => ErrorKind::Internal,
    };
    Failure::new(kind, chain(error))
}

/// dockerd names the operation and the volume before the reason.
fn during(operation: &str, name: &str) -> impl FnOnce(Failure) -> Failure {
    let prefix = format!("{operation} {name}: ");
    move |failure| Failure::new(failure.kind, prefix + &failure.message)
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, VolumeError> + Send + 'static,
) -> Result<T, Failure> {
    let result = tokio::task::spawn_blocking(work).await;
    result.map_err(|error| Failure::internal("the volumes failed", &error))?.map_err(|error| failure(&error))
}

fn folder(data_root: &Path) -> PathBuf {
    data_root.join("volumes")
}

impl Volumes {
    /// Brings folders and records in line.
    pub fn open(store: Store, events: Events, data_root: &Path) -> anyhow::Result<Self> {
        let local = LocalVolumes::open(&folder(data_root))?;
        let records: BTreeMap<String, Arc<VolumeRecord>> = store
            .all::<VolumeRecord>(store::VOLUMES)?
            .into_iter()
            .map(|(name, record)| (name, Arc::new(record)))
            .collect();
        let recovered = local.recover(&records.keys().cloned().collect())?;
        for name in recovered.unknown {
            tracing::warn!(
                volume = name,
                "a folder with files belongs to no volume; make one of its name to use it"
            );
        }
        for name in recovered.remade {
            tracing::warn!(volume = name, "its data was gone; it is empty now");
        }
        Ok(Self {
            local,
            store,
            events,
            state: Mutex::new(State { records, ..State::default() }),
            locks: Mutex::default(),
            pruning: tokio::sync::Mutex::default(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn lock(&self, name: &str) -> OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
            locks.retain(|_, lock| Arc::strong_count(lock) > 1);
            locks.entry(name.to_owned()).or_default().clone()
        };
        lock.lock_owned().await
    }

    #[cfg(test)]
    pub fn locks_held(&self) -> usize {
        self.locks.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    fn event(&self, action: &str, name: &str, attributes: &[(&str, &str)]) {
        let attributes =
            attributes.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        self.events.publish("volume", action, name, attributes);
    }

    fn show(&self, record: &VolumeRecord) -> Volume {
        record.shown(&self.local.data(&record.name))
    }

    #[cfg(test)]
    pub fn mountpoint(&self, name: &str) -> PathBuf {
        self.local.data(name)
    }

    /// Makes a volume, or finds it.
    pub async fn create(&self, wanted: VolumeCreate) -> Result<Volume, Failure> {
        if wanted.cluster_volume_spec.is_some() {
            return Err(Failure::new(ErrorKind::Unavailable, guest_api::error::NOT_A_SWARM_MANAGER));
        }
        Ok(self.show(&self.take(wanted, None).await?.record))
    }

    /// Makes a volume or finds it, and notes that the container `user` has it from now on. The record of a new one is on
    /// disk before anything that is put into the store later.
    pub async fn take(&self, wanted: VolumeCreate, user: Option<&str>) -> Result<Taken, Failure> {
        let VolumeCreate { mut name, driver, driver_opts, mut labels, .. } = wanted;
        let mut owner = None;
        if name.is_empty() {
            owner = user.map(str::to_owned);
            name = hex::encode(rand::random::<[u8; 32]>());
            labels.get_or_insert_default().insert(ANONYMOUS_LABEL.to_owned(), String::new());
        }
        let _lock = self.lock(&name).await;
        if !matches!(driver.as_str(), "" | DRIVER) {
            return Err(Failure::not_found(format!(
                "create {name}: error looking up volume plugin {driver}: plugin \"{driver}\" not found"
            )));
        }
        let known = self.state().records.get(&name).cloned();
        let mountpoint = self.local.data(&name);
        if let Some(record) = known {
            self.note_user(&name, user);
            return Ok(Taken { record, mountpoint, is_new: false });
        }
        let record = Arc::new(VolumeRecord {
            name: name.clone(),
            created: Timestamp::now(),
            labels,
            options: driver_opts,
            owner,
        });
        let checked = LocalVolumes::check_name(&name).and_then(|()| Ok(record.driver_options()?));
        checked.map_err(|error| during("create", &name)(failure(&error)))?;
        let (local, folder) = (self.local.clone(), name.clone());
        blocking(move || local.create(&folder)).await.map_err(during("create", &name))?;
        guest_fault::point("volume.create.after-folder");
        let saved = match user {
            // The container's own record follows, and is waited for.
            Some(_) => self.store.put_later(store::VOLUMES, &name, &*record).await.map(drop),
            None => self.store.put(store::VOLUMES, &name, &*record).await,
        };
        if let Err(error) = saved {
            let (local, folder) = (self.local.clone(), name.clone());
            let undone = blocking(move || local.hide(&folder).and_then(|()| local.discard(&folder))).await;
            if let Err(also) = undone {
                tracing::warn!(volume = name, error = %also, "left behind");
            }
            return Err(Failure::internal(format!("create {name}: cannot keep the volume's record"), &error));
        }
        guest_fault::point("volume.create.after-record");
        self.state().records.insert(name.clone(), record.clone());
        self.note_user(&name, user);
        self.event("create", &name, &[("driver", DRIVER)]);
        Ok(Taken { record, mountpoint, is_new: true })
    }

    /// Notes that the container `user` has a volume that is there.
    pub async fn join(&self, name: &str, user: &str) -> Result<(), Failure> {
        let _lock = self.lock(name).await;
        self.find(name)?;
        self.note_user(name, Some(user));
        Ok(())
    }

    /// A volume stays when its owner goes. On disk before anything that is put into the store later.
    pub async fn disown(&self, name: &str, owner: &str) -> Result<(), Failure> {
        let _lock = self.lock(name).await;
        let Ok(record) = self.find(name) else { return Ok(()) };
        if record.owner.as_deref() != Some(owner) {
            return Ok(());
        }
        let record = VolumeRecord { owner: None, ..VolumeRecord::clone(&record) };
        let saved = self.store.put_later(store::VOLUMES, name, &record).await.map(drop);
        saved.map_err(|error| Failure::internal("cannot keep the volume's record", &error))?;
        self.state().records.insert(name.to_owned(), Arc::new(record));
        Ok(())
    }

    /// Notes that a container has a volume: at its creation, and when the engine starts.
    pub fn note_user(&self, name: &str, user: Option<&str>) {
        if let Some(user) = user {
            self.state().users.entry(name.to_owned()).or_default().insert(user.to_owned());
        }
    }

    /// Notes that a container has a volume no more.
    pub fn release(&self, name: &str, user: &str) {
        let mut state = self.state();
        if let Some(users) = state.users.get_mut(name) {
            users.remove(user);
            if users.is_empty() {
                state.users.remove(name);
            }
        }
    }

    fn find(&self, name: &str) -> Result<Arc<VolumeRecord>, Failure> {
        let found = self.state().records.get(name).cloned();
        found.ok_or_else(|| Failure::not_found(guest_api::error::no_such_volume(name)))
    }

    pub fn inspect(&self, name: &str) -> Result<Volume, Failure> {
        Ok(self.show(&*self.find(name)?))
    }

    pub fn list(&self, filters: &Filters) -> Result<VolumeList, Failure> {
        let query = Listing::new(filters)?;
        let state = self.state();
        let shown = state
            .records
            .values()
            .filter(|record| query.shows(record, state.users.contains_key(&record.name)));
        Ok(VolumeList { volumes: shown.map(|record| self.show(record)).collect(), warnings: None })
    }

    /// Removes a volume that nobody uses. With `force` one that is not there is fine.
    pub async fn remove(&self, name: &str, force: bool) -> Result<(), Failure> {
        let _lock = self.lock(name).await;
        if let Err(failure) = self.find(name) {
            return if force { Ok(()) } else { Err(failure) };
        }
        let users: Vec<String> = self.state().users.get(name).into_iter().flatten().cloned().collect();
        if !users.is_empty() {
            return Err(Failure::conflict(format!(
                "remove {name}: volume is in use - [{}]",
                users.join(", ")
            )));
        }
        let (local, folder) = (self.local.clone(), name.to_owned());
        let hidden = blocking(move || local.unmount(&folder).and_then(|()| local.hide(&folder))).await;
        hidden.map_err(during("remove", name))?;
        guest_fault::point("volume.remove.after-hide");
        if let Err(error) = self.store.remove(store::VOLUMES, name).await {
            let (local, folder) = (self.local.clone(), name.to_owned());
            if let Err(also) = blocking(move || local.show(&folder)).await {
                tracing::warn!(volume = name, error = %also, "cannot bring it back");
            }
            return Err(Failure::internal(format!("remove {name}: cannot remove its record"), &error));
        }
        guest_fault::point("volume.remove.after-record");
        {
            let mut state = self.state();
            state.records.remove(name);
            state.mounted.remove(name);
        }
        let (local, folder) = (self.local.clone(), name.to_owned());
        if let Err(error) = blocking(move || local.discard(&folder)).await {
            tracing::warn!(volume = name, %error, "some of its files stay until the engine starts again");
        }
        self.event("destroy", name, &[("driver", DRIVER)]);
        Ok(())
    }

    /// Removes the volumes that nobody uses. `all`: named ones too, as older clients expect.
    pub async fn prune(&self, filters: &Filters, all: bool) -> Result<VolumesPruned, Failure> {
        let Ok(_one) = self.pruning.try_lock() else {
            return Err(Failure::conflict("a prune operation is already running"));
        };
        let query = Pruning::new(filters, all)?;
        let chosen: Vec<String> = {
            let state = self.state();
            let free =
                |record: &&Arc<VolumeRecord>| !state.users.contains_key(&record.name) && query.takes(record);
            state.records.values().filter(free).map(|record| record.name.clone()).collect()
        };
        let mut pruned = VolumesPruned::default();
        for name in chosen {
            let bytes = self.used_bytes(&name).await.unwrap_or(0);
            match self.remove(&name, false).await {
                Ok(()) => {
                    pruned.space_reclaimed += bytes;
                    pruned.volumes_deleted.push(name);
                }
                // Taken meanwhile, or gone.
                Err(error) => tracing::info!(volume = name, %error, "not pruned"),
            }
        }
        self.event("prune", "", &[("reclaimed", &pruned.space_reclaimed.to_string())]);
        Ok(pruned)
    }

    async fn used_bytes(&self, name: &str) -> Option<u64> {
        let data = self.local.data(name);
        let counted = tokio::task::spawn_blocking(move || used_bytes(&data)).await.ok()?;
        counted.inspect_err(|error| tracing::warn!(volume = name, %error, "cannot count what it holds")).ok()
    }

    /// All volumes without options, with what they hold and how many containers have them: for `system df`.
    pub async fn usage(&self) -> Vec<Volume> {
        let plain: Vec<(Arc<VolumeRecord>, usize)> = {
            let state = self.state();
            let users = |name: &str| state.users.get(name).map_or(0, BTreeSet::len);
            let plain = state.records.values().filter(|record| !record.has_options());
            plain.map(|record| (record.clone(), users(&record.name))).collect()
        };
        let mut volumes = Vec::with_capacity(plain.len());
        for (record, users) in plain {
            let bytes = self.used_bytes(&record.name).await;
            let size = bytes.map_or(-1, |bytes| i64::try_from(bytes).unwrap_or(i64::MAX));
            let usage = UsageData { ref_count: i64::try_from(users).unwrap_or(i64::MAX), size };
            volumes.push(Volume { usage_data: Some(usage), ..self.show(&record) });
        }
        volumes
    }

    /// Makes a volume's data available to a container that starts: mounts what its options say, once for all. Ends with
    /// [`Volumes::unmount`].
    pub async fn mount(&self, name: &str, user: &str) -> Result<PathBuf, Failure> {
        let _lock = self.lock(name).await;
        let record = self.find(name)?;
        let options = record.driver_options().map_err(|error| failure(&error.into()))?;
        let data = self.local.data(name);
        if let Some(options) = options {
            let (local, folder) = (self.local.clone(), name.to_owned());
            let mounted = blocking(move || local.mount(&folder, &options)).await;
            mounted.map_err(|failure| {
                let text = format!("error while mounting volume '{}': {}", data.display(), failure.message);
                Failure::new(failure.kind, text)
            })?;
            self.state().mounted.entry(name.to_owned()).or_default().insert(user.to_owned());
        }
        Ok(data)
    }

    /// A container that ran when the engine started has it mounted.
    pub fn note_mounted(&self, name: &str, user: &str) {
        let has_options = self.find(name).is_ok_and(|record| record.has_options());
        if has_options {
            self.state().mounted.entry(name.to_owned()).or_default().insert(user.to_owned());
        }
    }

    /// A container needs it no more: the last one unmounts.
    pub async fn unmount(&self, name: &str, user: &str) -> Result<(), Failure> {
        let _lock = self.lock(name).await;
        {
            let mut state = self.state();
            let Some(users) = state.mounted.get_mut(name) else { return Ok(()) };
            users.remove(user);
            if !users.is_empty() {
                return Ok(());
            }
            state.mounted.remove(name);
        }
        let (local, folder) = (self.local.clone(), name.to_owned());
        blocking(move || local.unmount(&folder)).await.map_err(during("unmount", name))
    }

    /// Once the containers are known: unmounts what an engine that was killed left mounted, and removes the volumes that
    /// were made for containers which have gone, or never came to be.
    pub async fn sweep(&self, containers: &BTreeSet<String>) {
        let orphans: Vec<String> = {
            let state = self.state();
            let gone = |record: &&Arc<VolumeRecord>| {
                record.owner.as_ref().is_some_and(|owner| !containers.contains(owner))
                    && !state.users.contains_key(&record.name)
            };
            state.records.values().filter(gone).map(|record| record.name.clone()).collect()
        };
        for name in orphans {
            if let Err(error) = self.remove(&name, true).await {
                tracing::warn!(volume = name, %error, "left behind");
            }
        }
        let idle: Vec<String> = {
            let state = self.state();
            let with_options = state.records.values().filter(|record| record.has_options());
            with_options.map(|it| it.name.clone()).filter(|name| !state.mounted.contains_key(name)).collect()
        };
        for name in idle {
            let (local, folder) = (self.local.clone(), name.clone());
            if let Err(error) = blocking(move || local.unmount(&folder)).await {
                tracing::warn!(volume = name, %error, "left mounted");
            }
        }
    }

    /// Fills an empty volume from a folder of the image of the container `user`.
    pub async fn fill(&self, name: &str, user: &str, source: std::os::fd::OwnedFd) -> Result<(), Failure> {
        let populate = |failure: Failure| {
            Failure::new(failure.kind, format!("failed to populate volume: {}", failure.message))
        };
        self.mount(name, user).await.map_err(populate)?;
        let filled = {
            let _lock = self.lock(name).await;
            let alone = {
                let state = self.state();
                let only = |users: &BTreeSet<String>| users.len() == 1 && users.contains(user);
                // A mounted file system has no place beside its data.
                state.users.get(name).is_some_and(only) && !state.mounted.contains_key(name)
            };
            let (local, folder) = (self.local.clone(), name.to_owned());
            blocking(move || local.fill(&folder, &source, alone)).await.map(drop).map_err(populate)
        };
        let unmounted = self.unmount(name, user).await;
        filled.and(unmounted)
    }

    /// Tells that a container has mounted it.
    pub fn mount_event(
        &self,
        name: &str,
        container: &str,
        destination: &str,
        writable: bool,
        propagation: &str,
    ) {
        let attributes = [
            ("container", container),
            ("destination", destination),
            ("driver", DRIVER),
            ("propagation", propagation),
            ("read/write", if writable { "true" } else { "false" }),
        ];
        self.event("mount", name, &attributes);
    }

    /// Tells that a container has it no longer mounted.
    pub fn unmount_event(&self, name: &str, container: &str) {
        self.event("unmount", name, &[("container", container), ("driver", DRIVER)]);
    }
}
