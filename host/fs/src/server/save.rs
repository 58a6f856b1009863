//! What the guest knows and has open, kept and taken up again.

use std::io;
use std::sync::{Mutex, PoisonError};

use rustix::fs::FileType;
use rustix::io::Errno;

use super::Server;
use super::data::{open_flags, reopen};
use super::folder::read_names_of;
use crate::handle::Open;
use crate::node::ROOT;
use crate::saved::{Saved, SavedError, SavedHandle};

/// More devices than a host has, for they are looked through one by one.
const DEVICES_MAX: usize = 4096;

impl Server {
    /// What a saved machine keeps. No request is being served.
    pub fn save(&self) -> io::Result<Saved> {
        let (files, last_file) = self.nodes.save();
        let (handles, last_handle) = self.handles.save()?;
        Ok(Saved { devices: self.devices().clone(), files, last_file, handles, last_handle })
    }

    /// Goes on from that with the exports there are now, before the first request. What cannot be found again is stale for the
    /// guest. The state may be anybody's; after an error the server knows nothing.
    pub fn restore(&self, saved: &Saved) -> Result<(), SavedError> {
        self.try_restore(saved).inspect_err(|_| self.reset())
    }

    fn try_restore(&self, saved: &Saved) -> Result<(), SavedError> {
        self.reset();
        if saved.devices.len() > DEVICES_MAX {
            return Err(SavedError("there are more devices than a host has"));
        }
        self.devices().clone_from(&saved.devices);
        let exports = self.exports.read().unwrap_or_else(PoisonError::into_inner);
        let export = |name: &str| exports.by_name.get(name).cloned();
        self.nodes.restore(&saved.files, saved.last_file, export)?;
        drop(exports);
        let mut lost = 0;
        for handle in &saved.handles {
            if handle.number == 0 || handle.number > saved.last_handle {
                return Err(SavedError("an open file has a number that was never given"));
            }
            match self.open_again(handle) {
                Ok(true) => {}
                Ok(false) => return Err(SavedError("an open file is there twice")),
                Err(error) => {
                    tracing::debug!(handle = handle.number, file = handle.file, %error, "cannot be opened again");
                    lost += 1;
                }
            }
        }
        self.handles.set_last(saved.last_handle);
        if lost > 0 {
            tracing::warn!(lost, "open files in shared folders have gone since the machine was saved");
        }
        Ok(())
    }

    fn open_again(&self, handle: &SavedHandle) -> Result<bool, Errno> {
        if handle.file == ROOT {
            return self.handles.restore(handle.number, Open::Root, None);
        }
        let node = self.nodes.get(handle.file)?;
        let open = match handle.flags {
            Some(flags) => Open::File(reopen(&node, open_flags(flags))?),
            None if node.kind == FileType::Directory => Open::Folder(Mutex::new(read_names_of(&node)?)),
            None => return Err(Errno::NOTDIR),
        };
        self.handles.restore(handle.number, open, Some(node))
    }
}
