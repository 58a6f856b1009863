//! Extended attributes: the user's own. What the kernel or the host's security modules keep in them is not shared.

use std::ffi::CStr;
use std::sync::Arc;

use rustix::fs::{FileType, XattrFlags};
use rustix::io::Errno;

use super::Server;
use crate::node::{Node, ROOT};
use crate::owner::{ATTRIBUTE, path_of};
use crate::reply::{Reply, Writer};

/// The kernel's own limit, of a value as of a list (`XATTR_SIZE_MAX`, `XATTR_LIST_MAX`).
const BYTES_MAX: usize = 64 << 10;

/// Whether the guest may know of an attribute.
fn is_shared(name: &[u8]) -> bool {
    name.starts_with(b"user.") && name != ATTRIBUTE.as_bytes()
}

/// Only these have attributes of users.
fn has_attributes(node: &Node) -> bool {
    matches!(node.kind, FileType::RegularFile | FileType::Directory)
}

impl Server {
    pub(super) fn set_xattr(
        &self,
        number: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
    ) -> Result<Reply, Errno> {
        let node = self.changeable_attributes(number, name)?;
        let flags = XattrFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        rustix::fs::setxattr(path_of(&node.file), name, value, flags)?;
        Ok(Reply::Bytes(Vec::new()))
    }

    pub(super) fn remove_xattr(&self, number: u64, name: &CStr) -> Result<Reply, Errno> {
        let node = self.changeable_attributes(number, name)?;
        rustix::fs::removexattr(path_of(&node.file), name)?;
        Ok(Reply::Bytes(Vec::new()))
    }

    fn changeable_attributes(&self, number: u64, name: &CStr) -> Result<Arc<Node>, Errno> {
        let node = self.changeable(number)?;
        match (is_shared(name.to_bytes()), has_attributes(&node)) {
            (false, _) => Err(Errno::OPNOTSUPP),
            (true, false) => Err(Errno::PERM),
            (true, true) => Ok(node),
        }
    }

    pub(super) fn get_xattr(&self, number: u64, name: &CStr, size: u32) -> Result<Reply, Errno> {
        if number == ROOT || !is_shared(name.to_bytes()) {
            return Err(Errno::OPNOTSUPP);
        }
        let node = self.nodes.get(number)?;
        if !has_attributes(&node) {
            return Err(Errno::NODATA);
        }
        let path = path_of(&node.file);
        if size == 0 {
            return Ok(length(rustix::fs::getxattr_query(path, name)?));
        }
        let mut value = vec![0; (size as usize).min(BYTES_MAX)];
        let count = rustix::fs::getxattr(path, name, &mut value[..])?;
        value.truncate(count);
        Ok(Reply::Bytes(value))
    }

    pub(super) fn list_xattr(&self, number: u64, size: u32) -> Result<Reply, Errno> {
        let mut names = Vec::new();
        if number != ROOT {
            let node = self.nodes.get(number)?;
            if has_attributes(&node) {
                let mut all = vec![0; BYTES_MAX];
                let count = match rustix::fs::listxattr(path_of(&node.file), &mut all[..]) {
                    Err(Errno::OPNOTSUPP) => 0,
                    result => result?,
                };
                let shared = all[..count].split_inclusive(|byte| *byte == 0);
                shared
                    .filter(|name| is_shared(name.strip_suffix(&[0]).unwrap_or(name)))
                    .for_each(|name| names.extend_from_slice(name));
            }
        }
        match size as usize {
            0 => Ok(length(names.len())),
            size if size < names.len() => Err(Errno::RANGE),
            _ => Ok(Reply::Bytes(names)),
        }
    }
}

/// `fuse_getxattr_out`.
fn length(count: usize) -> Reply {
    let mut writer = Writer::default();
    writer.u32(count as u32).u32(0);
    writer.done()
}
