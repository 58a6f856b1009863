//! What the rules look at: every crate of the checkout with its manifest's dependencies and its sources.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::{fs, io};

use toml::{Table, Value};

/// Folders of the checkout that hold crates.
const FOLDERS: [&str; 6] = ["host", "guest", "vm-image", "tunnel", "installer", "tests"];

/// The checkout.
#[derive(Debug, Default)]
pub struct Tree {
    /// Folders listed as members of the workspace.
    pub members: BTreeSet<String>,
    /// Folders deliberately outside the workspace.
    pub excluded: BTreeSet<String>,
    /// Every crate found, listed or not.
    pub crates: Vec<Crate>,
}

/// One crate.
#[derive(Debug, Default, Clone)]
pub struct Crate {
    /// Folder, relative to the checkout.
    pub folder: String,
    /// Package name.
    pub name: String,
    /// Whether the lints come from the workspace.
    pub shares_lints: bool,
    /// Dependencies of all kinds.
    pub dependencies: Vec<Dependency>,
    /// Paths of `[[bin]]` entries, relative to the folder.
    pub bins: Vec<String>,
    /// All Rust files.
    pub sources: Vec<Source>,
}

/// One line of a manifest's dependency tables.
#[derive(Debug, Clone)]
pub struct Dependency {
    /// Package name.
    pub name: String,
    /// Whether version and path come from the workspace.
    pub shared: bool,
}

/// One Rust file.
#[derive(Debug, Clone)]
pub struct Source {
    /// Path, relative to the crate's folder.
    pub path: String,
    /// Its text.
    pub text: String,
}

impl Source {
    /// Whether cargo compiles this file as the root of a library, program or test of its own.
    #[must_use]
    pub fn is_root(&self, bins: &[String]) -> bool {
        let parts: Vec<&str> = self.path.split('/').collect();
        match parts[..] {
            ["build.rs"] | ["src", "lib.rs" | "main.rs"] | ["src", "bin", _, "main.rs"] => true,
            ["src", "bin", _] | ["tests" | "benches" | "examples", _] => true,
            _ => bins.contains(&self.path),
        }
    }
}

impl Tree {
    /// Reads the checkout at `root`.
    ///
    /// # Errors
    /// When a file cannot be read, or a manifest is not TOML; the message names it.
    pub fn read(root: &Path) -> io::Result<Self> {
        let manifest = table(&root.join("Cargo.toml"))?;
        let list = |key: &str| strings(manifest.get("workspace").and_then(|workspace| workspace.get(key)));
        let mut tree = Self { members: list("members"), excluded: list("exclude"), crates: Vec::new() };
        for folder in FOLDERS {
            collect(root, &root.join(folder), &mut tree.crates)?;
        }
        tree.crates.sort_by(|one, other| one.folder.cmp(&other.folder));
        Ok(tree)
    }
}

fn collect(root: &Path, folder: &Path, crates: &mut Vec<Crate>) -> io::Result<()> {
    if !folder.is_dir() {
        return Ok(());
    }
    if folder.join("Cargo.toml").is_file() {
        crates.push(read_crate(root, folder)?);
    }
    for entry in entries(folder)? {
        if entry.is_dir() && !is_hidden_or_output(&entry) {
            collect(root, &entry, crates)?;
        }
    }
    Ok(())
}

fn read_crate(root: &Path, folder: &Path) -> io::Result<Crate> {
    let manifest = table(&folder.join("Cargo.toml"))?;
    let text = |value: Option<&Value>| value.and_then(Value::as_str).unwrap_or_default().to_owned();
    let bins = manifest.get("bin").and_then(Value::as_array).cloned().unwrap_or_default();
    let mut sources = Vec::new();
    read_sources(folder, folder, &mut sources)?;
    Ok(Crate {
        folder: relative(root, folder),
        name: text(manifest.get("package").and_then(|package| package.get("name"))),
        shares_lints: manifest.get("lints").is_some_and(shared),
        dependencies: dependencies(&manifest),
        bins: bins.iter().map(|bin| text(bin.get("path"))).collect(),
        sources,
    })
}

/// Dependencies of every kind, for every target.
fn dependencies(manifest: &Table) -> Vec<Dependency> {
    let targets = manifest.get("target").and_then(Value::as_table);
    let targets = targets.into_iter().flat_map(Table::values).filter_map(Value::as_table);
    let mut found = Vec::new();
    for table in targets.chain([manifest]) {
        for kind in ["dependencies", "dev-dependencies", "build-dependencies"] {
            let Some(list) = table.get(kind).and_then(Value::as_table) else { continue };
            found.extend(list.iter().map(|(name, value)| {
                let package = value.get("package").and_then(Value::as_str);
                Dependency { name: package.unwrap_or(name).to_owned(), shared: shared(value) }
            }));
        }
    }
    found
}

fn shared(value: &Value) -> bool {
    value.get("workspace").and_then(Value::as_bool) == Some(true)
}

fn read_sources(crate_folder: &Path, folder: &Path, sources: &mut Vec<Source>) -> io::Result<()> {
    for entry in entries(folder)? {
        if entry.is_dir() {
            // A crate inside a crate is its own.
            if !is_hidden_or_output(&entry) && !entry.join("Cargo.toml").is_file() {
                read_sources(crate_folder, &entry, sources)?;
            }
        } else if entry.extension().is_some_and(|extension| extension == "rs") {
            sources.push(Source { path: relative(crate_folder, &entry), text: read(&entry)? });
        }
    }
    Ok(())
}

fn entries(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut paths: Vec<PathBuf> =
        fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<io::Result<_>>()?;
    paths.sort();
    Ok(paths)
}

fn is_hidden_or_output(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name == "target" || name.to_string_lossy().starts_with('.'))
}

fn table(path: &Path) -> io::Result<Table> {
    read(path)?
        .parse()
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, format!("`{}`: {error}", path.display())))
}

fn read(path: &Path) -> io::Result<String> {
    fs::read_to_string(path)
        .map_err(|error| io::Error::new(error.kind(), format!("`{}`: {error}", path.display())))
}

fn strings(value: Option<&Value>) -> BTreeSet<String> {
    let list = value.and_then(Value::as_array).into_iter().flatten();
    list.filter_map(Value::as_str).map(str::to_owned).collect()
}

fn relative(base: &Path, path: &Path) -> String {
    path.strip_prefix(base).unwrap_or(path).to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(manifest: &str) -> Vec<(String, bool)> {
        let found = dependencies(&manifest.parse().unwrap());
        found.into_iter().map(|dependency| (dependency.name, dependency.shared)).collect()
    }

    #[test]
    fn dependencies_of_every_kind_are_found() {
        let manifest = "
            [target.'cfg(unix)'.dependencies]
            libc.workspace = true
            [dependencies]
            renamed = { package = \"serde\", version = \"1\" }
            [dev-dependencies]
            proptest = \"1\"
            [build-dependencies]
            cc = { workspace = true }";
        let expected = [("libc", true), ("serde", false), ("proptest", false), ("cc", true)];
        assert_eq!(names(manifest), expected.map(|(name, shared)| (name.to_owned(), shared)));
    }

    #[test]
    fn roots_are_what_cargo_compiles_on_its_own() {
        let bins = ["src/program.rs".to_owned()];
        let is_root = |path: &str| Source { path: path.to_owned(), text: String::new() }.is_root(&bins);
        for path in
            ["src/lib.rs", "src/main.rs", "src/bin/shim.rs", "tests/run.rs", "build.rs", "src/program.rs"]
        {
            assert!(is_root(path), "{path}");
        }
        for path in ["src/list.rs", "src/net/mod.rs", "tests/run/helper.rs"] {
            assert!(!is_root(path), "{path}");
        }
    }
}
