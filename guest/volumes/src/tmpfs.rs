//! Options of tmpfs mounts: from numbers to words, and several lists merged into one without repetition.

use guest_api::mount::TmpfsOptions;
use thiserror::Error;

/// Options that take a value.
const VALUES: [&str; 7] = ["size", "mode", "uid", "gid", "nr_inodes", "nr_blocks", "mpol"];
/// Words that set or clear the same flag, of which the last one counts.
const FLAGS: [&[&str]; 11] = [
    &["ro", "rw"],
    &["suid", "nosuid"],
    &["dev", "nodev"],
    &["exec", "noexec"],
    &["sync", "async"],
    &["dirsync"],
    &["mand", "nomand"],
    &["atime", "noatime"],
    &["diratime", "nodiratime"],
    &["relatime", "norelatime"],
    &["strictatime", "nostrictatime"],
];
/// How mounts are passed on, of which there is one.
const PROPAGATION: [&str; 8] =
    ["private", "rprivate", "shared", "rshared", "slave", "rslave", "unbindable", "runbindable"];

/// Why options of a tmpfs make no sense.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum TmpfsError {
    /// An option of the long form that it does not have.
    #[error("invalid option: {0}")]
    Unknown(String),
    /// An option of the long form with too few or too many parts.
    #[error("invalid option array length")]
    Length,
    /// A word that no tmpfs knows, as Go prints its parts.
    #[error("invalid tmpfs option [{0}]")]
    Word(String),
}

/// The words of the long form's options.
pub(crate) fn words(options: Option<&TmpfsOptions>, read_only: bool) -> Result<String, TmpfsError> {
    let mut words = Vec::new();
    if read_only {
        words.push("ro".to_owned());
    }
    let Some(options) = options else { return Ok(words.join(",")) };
    if options.mode != 0 {
        words.push(format!("mode={:o}", options.mode));
    }
    if options.size_bytes != 0 {
        let units = [("g", 1 << 30), ("m", 1 << 20), ("k", 1 << 10), ("", 1)];
        let unit = units.iter().find(|(_, bytes)| options.size_bytes % bytes == 0);
        let (unit, bytes) = unit.copied().unwrap_or(("", 1));
        words.push(format!("size={}{unit}", options.size_bytes / bytes));
    }
    for option in &options.options {
        let (name, value) = match option.as_slice() {
            [name] => (name, None),
            [name, value] => (name, Some(value)),
            _ => return Err(TmpfsError::Length),
        };
        if !matches!(name.as_str(), "exec" | "noexec") {
            return Err(TmpfsError::Unknown(name.clone()));
        }
        words.push(value.map_or_else(|| name.clone(), |value| format!("{name}={value}")));
    }
    Ok(words.join(","))
}

/// Takes out what a later option overrides, and refuses what no tmpfs knows.
pub fn merge<'a>(options: impl IntoIterator<Item = &'a str>) -> Result<Vec<String>, TmpfsError> {
    let all: Vec<&str> = options.into_iter().collect();
    let mut kept: Vec<String> = Vec::new();
    let mut seen: Vec<&str> = Vec::new();
    for option in all.iter().rev().filter(|option| **option != "defaults") {
        let key = if PROPAGATION.contains(option) {
            "propagation"
        } else if let Some(words) = FLAGS.iter().find(|words| words.contains(option)) {
            words[0]
        } else {
            match option.split_once('=') {
                Some((name, _)) if VALUES.contains(&name) => name,
                parts => {
                    let shown = match parts {
                        Some((name, value)) => format!("{name:?} {value:?}"),
                        None => format!("{option:?}"),
                    };
                    return Err(TmpfsError::Word(shown));
                }
            }
        };
        if !seen.contains(&key) {
            seen.push(key);
            kept.insert(0, (*option).to_owned());
        }
    }
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_word_counts() {
        let merged = merge(["noexec", "nosuid", "nodev", "rprivate", "exec", "size=1m", "size=2m"]).unwrap();
        assert_eq!(merged, ["nosuid", "nodev", "rprivate", "exec", "size=2m"]);
        assert_eq!(merge(["frob"]).unwrap_err().to_string(), "invalid tmpfs option [\"frob\"]");
        assert_eq!(merge(["a=b"]).unwrap_err().to_string(), "invalid tmpfs option [\"a\" \"b\"]");
        assert_eq!(merge([""]).unwrap_err().to_string(), "invalid tmpfs option [\"\"]");
    }

    #[test]
    fn numbers_become_words() {
        let words = |size_bytes, mode, read_only| {
            words(Some(&TmpfsOptions { size_bytes, mode, options: Vec::new() }), read_only).unwrap()
        };
        assert_eq!(words(1 << 20, 0o700, false), "mode=700,size=1m");
        assert_eq!(words(3 << 30, 0, true), "ro,size=3g");
        assert_eq!(words(1025, 0, false), "size=1025");
        assert_eq!(words(0, 0, false), "");
        let options = vec![vec!["noexec".to_owned()], vec!["exec".to_owned(), "1".to_owned()]];
        let given = TmpfsOptions { options, ..TmpfsOptions::default() };
        assert_eq!(super::words(Some(&given), false).unwrap(), "noexec,exec=1");
        let wrong = TmpfsOptions { options: vec![vec!["size".to_owned()]], ..TmpfsOptions::default() };
        assert_eq!(super::words(Some(&wrong), false).unwrap_err().to_string(), "invalid option: size");
        let empty = TmpfsOptions { options: vec![vec![]], ..TmpfsOptions::default() };
        assert!(super::words(Some(&empty), false).is_err());
    }
}
