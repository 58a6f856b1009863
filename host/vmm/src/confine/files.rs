//! The files that a thread may open: Landlock (Linux `Documentation/userspace-api/landlock.rst`).

use std::path::{Path, PathBuf};
use std::sync::Once;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, PathFd, PathFdError, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};

use super::ConfineError;

/// The newest rules known here. An older kernel enforces those it has.
const RULES: ABI = ABI::V6;

/// Files and folders that may be opened; nothing else can be.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Files {
    written: Vec<PathBuf>,
    shared: Vec<(PathBuf, bool)>,
}

impl Files {
    /// Adds a folder whose files may be made, read, written, renamed and removed; nothing in it can be executed.
    pub fn writing(mut self, folder: &Path) -> Self {
        self.written.push(folder.to_owned());
        self
    }

    /// Adds a folder that a guest shares, or one file: everything may be done in it but to listen or to make devices.
    pub fn sharing(mut self, path: &Path, read_only: bool) -> Self {
        self.shared.push((path.to_owned(), read_only));
        self
    }

    /// Restricts the calling thread and those it starts.
    pub(super) fn restrict(&self) -> Result<(), ConfineError> {
        let status = self.enforce().map_err(ConfineError::Files)?;
        if status == RulesetStatus::NotEnforced {
            static TOLD: Once = Once::new();
            TOLD.call_once(|| {
                tracing::warn!("this kernel has no Landlock: the VM process can open what its user can open");
            });
        }
        Ok(())
    }

    fn enforce(&self) -> Result<RulesetStatus, RulesetError> {
        let file = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::Truncate;
        let entries = AccessFs::ReadDir | AccessFs::MakeReg | AccessFs::RemoveFile | AccessFs::Refer;
        let tree = AccessFs::MakeDir
            | AccessFs::RemoveDir
            | AccessFs::MakeSym
            | AccessFs::MakeFifo
            | AccessFs::MakeSock;
        let read = AccessFs::ReadFile | AccessFs::ReadDir;
        let mut rules = Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(RULES))?
            // The NAT connects on the guest's behalf; nobody here listens.
            .handle_access(AccessNet::BindTcp)?
            .scope(Scope::AbstractUnixSocket)?
            .create()?;
        let written = self.written.iter().map(|path| (path, file | entries));
        let shared = self.shared.iter().map(|(path, read_only)| match read_only {
            true => (path, read),
            false => (path, file | entries | tree),
        });
        for (path, access) in written.chain(shared) {
            if let Some(beneath) = open(path) {
                let access = if path.is_dir() { access } else { access & AccessFs::from_file(RULES) };
                rules = rules.add_rule(PathBeneath::new(beneath, access))?;
            }
        }
        Ok(rules.restrict_self()?.ruleset)
    }
}

/// What is not there cannot be opened anyway; who needs it says so.
fn open(path: &Path) -> Option<PathFd> {
    let opened: Result<PathFd, PathFdError> = PathFd::new(path);
    opened
        .inspect_err(|error| tracing::debug!(path = %path.display(), %error, "not allowed: it is not there"))
        .ok()
}
