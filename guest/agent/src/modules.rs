//! Kernel modules, loaded in the order that the image's builder worked out.
//!
//! The list is one path a line. A path that begins with `-` is optional: a kernel may have it built in, or the
//! hardware may be missing; any failure to load it is normal.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use tracing::{debug, warn};

/// Where the builder puts the list.
const LIST: &str = "/etc/engine/modules";

#[derive(Debug, PartialEq, Eq)]
struct Module {
    path: PathBuf,
    optional: bool,
}

/// Loads every module of the list. What cannot be loaded is logged: whether the machine can do without shows when
/// the thing it serves (disk, network, vsock) is missing.
pub fn load() {
    let list = match fs::read_to_string(LIST) {
        Ok(list) => list,
        // A kernel that has everything built in comes without a list.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return,
        Err(error) => return warn!(list = LIST, %error, "cannot read the list of kernel modules"),
    };
    for module in parse(&list) {
        let began = std::time::Instant::now();
        let result = load_one(&module.path);
        debug!(module = %module.path.display(), took = ?began.elapsed(), "module");
        match (result, module.optional) {
            (Ok(()), _) => {}
            (Err(error), true) => {
                debug!(module = %module.path.display(), %error, "optional module not loaded")
            }
            (Err(error), false) => warn!(module = %module.path.display(), %error, "module not loaded"),
        }
    }
}

fn parse(list: &str) -> Vec<Module> {
    let lines = list.lines().map(|line| line.split('#').next().unwrap_or_default().trim());
    lines
        .filter(|line| !line.is_empty())
        .map(|line| match line.strip_prefix('-') {
            Some(path) => Module { path: path.trim().into(), optional: true },
            None => Module { path: line.into(), optional: false },
        })
        .collect()
}

fn load_one(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    match rustix::system::finit_module(&file, c"", 0) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_has_paths_comments_and_optional_lines() {
        let list = "# order matters\n/lib/modules/6/a.ko\n\n  - /lib/modules/6/b.ko # hardware\r\n/lib/modules/6/c.ko\n";
        let module = |path: &str, optional| Module { path: path.into(), optional };
        let expected = [
            module("/lib/modules/6/a.ko", false),
            module("/lib/modules/6/b.ko", true),
            module("/lib/modules/6/c.ko", false),
        ];
        assert_eq!(parse(list), expected);
    }

    #[test]
    fn a_missing_module_is_an_error_of_that_module_only() {
        assert_eq!(load_one(Path::new("/nonexistent/x.ko")).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
