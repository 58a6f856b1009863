//! Debian packages: which one a file of this machine came from, and downloads of packages that need not be installed.
//!
//! Downloads go through apt, so mirrors, proxies and signatures are the machine's own. If apt as configured does not know
//! the package (no lists yet, or the suite is not among its sources), a private apt state is made in the cache from the
//! machine's Debian sources plus the backports suite on the same mirror. Neither way needs root or changes the machine.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::cache::Cache;
use crate::command;
use crate::report;

/// A family of packages of which the newest is wanted: every name with this start and end.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Family {
    pub(crate) prefix: &'static str,
    pub(crate) suffix: &'static str,
}

impl Family {
    fn contains(self, name: &str) -> bool {
        name.len() >= self.prefix.len() + self.suffix.len()
            && name.starts_with(self.prefix)
            && name.ends_with(self.suffix)
    }

    /// The newest of these names, by the numbers in them.
    fn newest<'a>(self, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
        names.filter(|name| self.contains(name)).max_by_key(|name| numbers(name))
    }
}

/// The package downloaded last, or the newest there is if none was downloaded yet or `refresh` asks for it.
///
/// Keeping to the one downloaded makes a second build need no network, and two builds on one machine alike.
pub(crate) fn fetch(cache: &Cache, family: Family, refresh: bool) -> Result<PathBuf> {
    let folder = cache.folder("packages")?;
    if !refresh && let Some(path) = downloaded(&folder, family)? {
        return Ok(path);
    }
    let apt = Apt::knowing(family, &folder)?;
    let name = apt.newest(family)?.with_context(|| {
        format!(
            "no package `{}…{}` in the package sources of this machine or in backports",
            family.prefix, family.suffix
        )
    })?;
    report::step(format_args!("downloading the Debian package {name}"));
    let unfinished = folder.join(format!(".unfinished-{}", std::process::id()));
    fs::create_dir(&unfinished).with_context(|| format!("cannot make `{}`", unfinished.display()))?;
    let result = apt.download(&name, &unfinished).and_then(|file| {
        let target = folder.join(file.file_name().context("a download without a name")?);
        fs::rename(&file, &target).with_context(|| format!("cannot keep `{}`", target.display()))?;
        Ok(target)
    });
    fs::remove_dir_all(&unfinished).with_context(|| format!("cannot remove `{}`", unfinished.display()))?;
    result
}

/// Names and versions of the packages that own these files.
pub(crate) fn owners(files: &[PathBuf]) -> Result<BTreeMap<String, String>> {
    // A library in /usr/lib may be recorded under /lib, its place before the two were merged.
    let spellings = files.iter().flat_map(|path| {
        let short = path.strip_prefix("/usr").map(|rest| Path::new("/").join(rest));
        [Some(path.clone()), short.ok()].into_iter().flatten()
    });
    let found = command::run(Command::new("dpkg-query").arg("--search").args(spellings))?;
    let found = String::from_utf8_lossy(&found.stdout).into_owned();
    let mut packages = Vec::new();
    for path in files {
        let package = found.lines().find_map(|line| {
            let (package, owned) = line.rsplit_once(": ")?;
            let owned = Path::new(owned);
            (owned == path || path.strip_prefix("/usr").is_ok_and(|rest| Path::new("/").join(rest) == owned))
                .then_some(package)
        });
        packages.push(package.with_context(|| format!("`{}` belongs to no Debian package", path.display()))?);
    }
    packages.sort_unstable();
    packages.dedup();
    let versions = command::output(
        Command::new("dpkg-query").args(["--show", "--showformat", "${Package} ${Version}\n"]).args(packages),
    )?;
    Ok(versions
        .lines()
        .filter_map(|line| line.split_once(' '))
        .map(|(name, version)| (name.to_owned(), version.to_owned()))
        .collect())
}

/// apt with a choice of package sources.
struct Apt {
    options: Vec<String>,
}

impl Apt {
    /// apt as configured if it knows the family, else with private sources.
    fn knowing(family: Family, folder: &Path) -> Result<Self> {
        let configured = Self { options: Vec::new() };
        if configured.newest(family)?.is_some() {
            return Ok(configured);
        }
        let private = Self::private(&folder.join("apt"))?;
        report::step(format_args!("reading the package lists of Debian and its backports"));
        command::output(private.command("apt-get").args(["update", "-qq"]))?;
        Ok(private)
    }

    fn private(state: &Path) -> Result<Self> {
        for folder in ["lists/partial", "archives/partial"] {
            let folder = state.join(folder);
            fs::create_dir_all(&folder).with_context(|| format!("cannot make `{}`", folder.display()))?;
        }
        let release = fs::read_to_string("/etc/os-release").context("cannot read `/etc/os-release`")?;
        let codename = os_release(&release, "VERSION_CODENAME")
            .context("`/etc/os-release` has no VERSION_CODENAME; the kernel comes from Debian's packages")?;
        let indices = command::output(Command::new("apt-get").args(["update", "--print-uris"]))?;
        let sources = private_sources(&indices, codename)
            .with_context(|| format!("apt's sources name no mirror of Debian `{codename}`"))?;
        let list = state.join("sources.list");
        fs::write(&list, sources).with_context(|| format!("cannot write `{}`", list.display()))?;
        let options = [
            format!("Dir::Etc::sourcelist={}", list.display()),
            "Dir::Etc::sourceparts=/dev/null".to_owned(),
            format!("Dir::State::lists={}", state.join("lists").display()),
            format!("Dir::Cache={}", state.display()),
            format!("Dir::Cache::archives={}", state.join("archives").display()),
        ];
        Ok(Self { options: options.into() })
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        // Root would drop to a user who cannot write below root's home.
        command.args(["-o", "APT::Sandbox::User=root"]);
        for option in &self.options {
            command.args(["-o", option]);
        }
        command
    }

    fn newest(&self, family: Family) -> Result<Option<String>> {
        let names = command::output(self.command("apt-cache").args(["pkgnames", family.prefix]))?;
        // A name may be known only because another package mentions it.
        let mut names: Vec<&str> = names.lines().collect();
        while let Some(name) = family.newest(names.iter().copied()) {
            let shown = command::run(self.command("apt-cache").args(["show", "--no-all-versions", name]))?;
            if shown.status.success() && !shown.stdout.is_empty() {
                return Ok(Some(name.to_owned()));
            }
            names.retain(|other| *other != name);
        }
        Ok(None)
    }

    fn download(&self, name: &str, folder: &Path) -> Result<PathBuf> {
        command::output(self.command("apt-get").args(["download", "-q", name]).current_dir(folder))?;
        let mut files = fs::read_dir(folder)?.collect::<std::io::Result<Vec<_>>>()?;
        ensure!(files.len() == 1, "apt-get download of `{name}` left {} files", files.len());
        Ok(files.remove(0).path())
    }
}

/// The sources of a private apt: the machine's own mirrors of this release, and backports where the release itself is.
///
/// `indices` is what `apt-get update --print-uris` prints: `'URI/dists/SUITE/InRelease' FILE SIZE` for each suite.
fn private_sources(indices: &str, codename: &str) -> Option<String> {
    let mut lines = Vec::new();
    for line in indices.lines() {
        let place = line.strip_prefix('\'').and_then(|rest| rest.split_once('\'')).map(|(uri, _)| uri);
        let place = place.and_then(|uri| uri.strip_suffix("/InRelease")?.split_once("/dists/"));
        let Some((uri, release)) = place else { continue };
        let suites = if [codename, "stable", "oldstable"].contains(&release) {
            vec![release.to_owned(), format!("{codename}-backports")]
        } else if release.strip_prefix(codename).is_some_and(|rest| rest.starts_with('-')) {
            vec![release.to_owned()]
        } else {
            continue;
        };
        lines.extend(suites.iter().map(|suite| {
            format!("deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] {uri} {suite} main\n")
        }));
    }
    lines.sort();
    lines.dedup();
    lines.iter().any(|line| line.contains("-backports ")).then(|| lines.concat())
}

fn os_release<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='))?;
    Some(value.trim_matches('"'))
}

fn downloaded(folder: &Path, family: Family) -> Result<Option<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("cannot list `{}`", folder.display()))? {
        let entry = entry?;
        let file = entry.file_name();
        let name = file.to_str().and_then(|file| file.strip_suffix(".deb")?.split('_').next());
        if name.is_some_and(|name| family.contains(name)) {
            found.push((entry.metadata()?.modified()?, entry.path()));
        }
    }
    Ok(found.into_iter().max().map(|(_, path)| path))
}

/// The numbers in a name, for comparing: `6.12.100` is newer than `6.12.99`.
fn numbers(name: &str) -> Vec<u64> {
    name.split(|character: char| !character.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const KERNELS: Family = Family { prefix: "linux-image-6.12.", suffix: "-cloud-amd64" };

    #[test]
    fn the_newest_of_a_family_is_found_by_its_numbers() {
        let names = [
            "linux-image-6.12.99+deb12-cloud-amd64",
            "linux-image-6.12.117+deb12-cloud-amd64",
            "linux-image-6.12.118+deb12-rt-amd64",
            "linux-image-6.12.119+deb12-cloud-amd64-dbg",
            "linux-image-6.13.1+deb12-cloud-amd64",
        ];
        assert_eq!(KERNELS.newest(names.into_iter()), Some("linux-image-6.12.117+deb12-cloud-amd64"));
        assert_eq!(KERNELS.newest(["linux-image-6.12-amd64"].into_iter()), None);
    }

    #[test]
    fn private_sources_are_the_machines_mirrors_and_backports() {
        let indices = "\
            'http://mirror.example/debian/dists/bookworm/InRelease' mirror_bookworm_InRelease 0 \n\
            'http://mirror.example/security/dists/bookworm-security/InRelease' mirror_security_InRelease 0 \n\
            'http://vendor.example/apt/dists/cloud-bookworm/InRelease' vendor_InRelease 0 \n\
            'http://odd.example/Packages' odd 0\n\
            noise\n";
        let key = "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]";
        assert_eq!(
            private_sources(indices, "bookworm").unwrap(),
            format!(
                "{key} http://mirror.example/debian bookworm main\n\
                 {key} http://mirror.example/debian bookworm-backports main\n\
                 {key} http://mirror.example/security bookworm-security main\n"
            )
        );
        assert_eq!(private_sources("'http://vendor.example/apt/dists/sid/InRelease' x 0", "bookworm"), None);
    }

    #[test]
    fn the_release_name_is_read_with_and_without_quotes() {
        assert_eq!(
            os_release("ID=debian\nVERSION_CODENAME=bookworm\n", "VERSION_CODENAME"),
            Some("bookworm")
        );
        assert_eq!(os_release("VERSION_CODENAME=\"trixie\"\n", "VERSION_CODENAME"), Some("trixie"));
        assert_eq!(os_release("ID=debian\n", "VERSION_CODENAME"), None);
    }
}
