//! The lists of `rootfs/contents.list` and `kernel/modules.list`: one entry a line, each with its reason.

use std::fmt;

use anyhow::{Context, Result, bail, ensure};

/// One line of `rootfs/contents.list`; the file's head explains each kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Item {
    Directory { path: String, mode: u32 },
    Link { path: String, target: String },
    Character { path: String, major: u32, minor: u32, mode: u32 },
    File { path: String, mode: u32 },
    Program { path: String, name: String },
    Tool { path: String },
    Tree { path: String },
    Certificates { path: String },
    Image { path: String, name: String },
}

impl fmt::Display for Item {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, path) = match self {
            Self::Directory { path, .. } => ("directory", path),
            Self::Link { path, .. } => ("link", path),
            Self::Character { path, .. } => ("character", path),
            Self::File { path, .. } => ("file", path),
            Self::Program { path, .. } => ("program", path),
            Self::Tool { path } => ("tool", path),
            Self::Tree { path } => ("tree", path),
            Self::Certificates { path } => ("certificates", path),
            Self::Image { path, .. } => ("image", path),
        };
        write!(formatter, "{kind} {path}")
    }
}

/// Reads the list of the root file system.
pub(crate) fn contents(text: &str) -> Result<Vec<Item>> {
    lines(text, |words| {
        Ok(match *words {
            ["directory", path, mode] => Item::Directory { path: path.into(), mode: octal(mode)? },
            ["link", path, target] => Item::Link { path: path.into(), target: target.into() },
            ["character", path, numbers, mode] => {
                let (major, minor) =
                    numbers.split_once(':').with_context(|| format!("`{numbers}` is not MAJOR:MINOR"))?;
                Item::Character {
                    path: path.into(),
                    major: major.parse()?,
                    minor: minor.parse()?,
                    mode: octal(mode)?,
                }
            }
            ["file", path, mode] => Item::File { path: path.into(), mode: octal(mode)? },
            ["program", path, name] => Item::Program { path: path.into(), name: name.into() },
            ["tool", path] => Item::Tool { path: path.into() },
            ["tree", path] => Item::Tree { path: path.into() },
            ["certificates", path] => Item::Certificates { path: path.into() },
            ["image", path, name] => Item::Image { path: path.into(), name: name.into() },
            _ => bail!("`{}` is no entry this builder knows", words.join(" ")),
        })
    })
}

/// One line of `kernel/modules.list`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Module {
    pub(crate) name: String,
    pub(crate) load: Load,
}

/// When a module is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Load {
    /// At every start.
    Always,
    /// The same, but it may fail: it serves hardware that not every machine has.
    Tried,
    /// When the kernel asks for something that it provides.
    Asked,
}

/// Reads the list of kernel modules.
pub(crate) fn modules(text: &str) -> Result<Vec<Module>> {
    lines(text, |words| match *words {
        [word] => {
            let (name, load) = match (word.strip_prefix('-'), word.strip_prefix('?')) {
                (Some(name), _) => (name, Load::Tried),
                (None, Some(name)) => (name, Load::Asked),
                (None, None) => (word, Load::Always),
            };
            Ok(Module { name: name.to_owned(), load })
        }
        _ => bail!("`{}` is not one module name", words.join(" ")),
    })
}

fn lines<T>(text: &str, parse: impl Fn(&[&str]) -> Result<T>) -> Result<Vec<T>> {
    let mut items = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let (entry, reason) = line.split_once('#').unwrap_or((line, ""));
        let words: Vec<&str> = entry.split_whitespace().collect();
        if words.is_empty() {
            continue;
        }
        let item = parse(&words).and_then(|item| {
            ensure!(!reason.trim().is_empty(), "the entry has no reason; add one after `#`");
            Ok(item)
        });
        items.push(item.with_context(|| format!("line {}: `{}`", index + 1, line.trim()))?);
    }
    Ok(items)
}

fn octal(mode: &str) -> Result<u32> {
    u32::from_str_radix(mode, 8)
        .ok()
        .filter(|mode| *mode <= 0o7777)
        .with_context(|| format!("`{mode}` is not a mode such as 0755"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_read_and_comments_are_not() {
        let items = contents(
            "# head\n\ndirectory /proc 0555 # mount point\ncharacter /dev/console 5:1 0600 # PID 1\n",
        );
        assert_eq!(
            items.unwrap(),
            [
                Item::Directory { path: "/proc".into(), mode: 0o555 },
                Item::Character { path: "/dev/console".into(), major: 5, minor: 1, mode: 0o600 },
            ]
        );
    }

    #[test]
    fn an_entry_without_a_reason_is_refused_with_its_line() {
        let error = contents("# head\ntool /usr/sbin/nft\n").unwrap_err();
        assert_eq!(
            format!("{error:#}"),
            "line 2: `tool /usr/sbin/nft`: the entry has no reason; add one after `#`"
        );
    }

    #[test]
    fn wrong_entries_are_refused() {
        for line in [
            "socket /a # x",
            "directory /a 99 # x",
            "character /a 5 0600 # x",
            "tool # x",
            "file /a 77777 # x",
        ] {
            assert!(contents(line).is_err(), "{line}");
        }
        assert!(modules("two words # x").is_err());
    }

    #[test]
    fn the_lists_of_the_product_are_read() {
        let items = contents(include_str!("../../rootfs/contents.list")).unwrap();
        assert!(items.contains(&Item::Program { path: "/init".into(), name: "init".into() }));
        let modules = modules(include_str!("../../kernel/modules.list")).unwrap();
        for (name, load) in [("overlay", Load::Always), ("ptp_kvm", Load::Tried), ("nfsv4", Load::Asked)] {
            assert!(modules.contains(&Module { name: name.into(), load }), "{name}");
        }
    }
}
