//! Which folders are watched, and which names in them the guest knows.

use std::collections::{HashMap, HashSet};
use std::ffi::{CStr, CString};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::{Notifier, Token};

/// Folders watched at most: each takes memory of the host's kernel, and of what the user may have.
const FOLDERS_MAX: usize = 1 << 14;

struct Watched {
    token: Token,
    names: HashMap<CString, u64>,
}

/// The folders, by their numbers.
#[derive(Default)]
pub struct Folders {
    notifier: Option<Arc<dyn Notifier>>,
    /// Everything known below these is watched. Counts who wants it.
    roots: HashMap<u64, usize>,
    watched: HashMap<u64, Watched>,
    /// One folder of the host may be in several exports.
    tokens: HashMap<Token, Vec<u64>>,
    /// Somebody was told that not all are watched.
    told: bool,
}

impl Folders {
    /// Begins or ends watching; nothing is watched at first.
    pub fn watch_with(&mut self, notifier: Option<Arc<dyn Notifier>>) {
        *self = Self { notifier, ..Self::default() };
    }

    /// Nothing is, and nothing will be.
    pub fn is_idle(&self) -> bool {
        self.notifier.is_none()
    }

    pub fn add_root(&mut self, number: u64) {
        *self.roots.entry(number).or_default() += 1;
    }

    pub fn remove_root(&mut self, number: u64) {
        if let Some(count) = self.roots.get_mut(&number) {
            *count -= 1;
            if *count == 0 {
                self.roots.remove(&number);
            }
        }
    }

    pub fn is_root(&self, number: u64) -> bool {
        self.roots.contains_key(&number)
    }

    pub fn is_watched(&self, number: u64) -> bool {
        self.watched.contains_key(&number)
    }

    /// The folders that are watched.
    pub fn all(&self) -> impl Iterator<Item = u64> {
        self.watched.keys().copied()
    }

    /// Watches a folder. Without success it is as if nothing changed in it, which is said once.
    pub fn watch(&mut self, number: u64, folder: &OwnedFd) {
        let Some(notifier) = &self.notifier else { return };
        if self.watched.contains_key(&number) {
            return;
        }
        let token = match self.watched.len() < FOLDERS_MAX {
            true => notifier.add(folder).map_err(|error| match error {
                rustix::io::Errno::NOSPC => {
                    "the user has no watches left (fs.inotify.max_user_watches)".to_owned()
                }
                error => error.to_string(),
            }),
            false => Err(format!("{FOLDERS_MAX} are watched")),
        };
        match token {
            Ok(token) => {
                self.tokens.entry(token).or_default().push(number);
                self.watched.insert(number, Watched { token, names: HashMap::new() });
            }
            Err(why) if !std::mem::replace(&mut self.told, true) => {
                tracing::warn!(
                    why,
                    "not all shared folders are watched: containers are not told what changes in the others"
                );
            }
            Err(_) => {}
        }
    }

    /// Watches only those of `numbers`.
    pub fn keep_only(&mut self, numbers: &HashSet<u64>) {
        let gone: Vec<u64> = self.all().filter(|number| !numbers.contains(number)).collect();
        gone.into_iter().for_each(|number| self.unwatch(number));
    }

    /// Watches a folder no longer.
    pub fn unwatch(&mut self, number: u64) {
        let Some(Watched { token, .. }) = self.watched.remove(&number) else { return };
        let Some(others) = self.tokens.get_mut(&token) else { return };
        others.retain(|other| *other != number);
        if others.is_empty() {
            self.tokens.remove(&token);
            if let Some(notifier) = &self.notifier {
                notifier.remove(token);
            }
        }
    }

    /// The host's kernel watches it no longer.
    pub fn gone(&mut self, token: Token) {
        for number in self.tokens.remove(&token).into_iter().flatten() {
            self.watched.remove(&number);
        }
    }

    /// The folders that a token stands for.
    pub fn of(&self, token: Token) -> &[u64] {
        self.tokens.get(&token).map_or(&[], Vec::as_slice)
    }

    /// The file the guest knows by this name in a watched folder.
    pub fn known(&self, folder: u64, name: &CStr) -> Option<u64> {
        self.watched.get(&folder)?.names.get(name).copied()
    }

    /// The guest knows a file by this name.
    pub fn named(&mut self, folder: u64, name: &CStr, number: u64) {
        if let Some(watched) = self.watched.get_mut(&folder) {
            watched.names.insert(name.to_owned(), number);
        }
    }

    /// It knows that file by this name no more.
    pub fn unnamed(&mut self, folder: u64, name: &CStr, number: u64) {
        if let Some(watched) = self.watched.get_mut(&folder)
            && watched.names.get(name) == Some(&number)
        {
            watched.names.remove(name);
        }
    }
}
