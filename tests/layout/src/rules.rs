//! The rules. Each is a function from the tree to sentences, one for each violation, that a person can act on.

use crate::tree::{Crate, Tree};

/// Programs, the highest level that product crates have.
const PROGRAMS: u8 = 3;
/// Tests may use everything.
const TESTS: u8 = 4;
/// A crate imports lower levels; never its own level, never upward.
const LEVELS: [(u8, &[&str]); 5] = [
    (0, &["host-api", "host-frames", "guest-protocol", "guest-api", "guest-fault", "guest-mountinfo"]),
    (
        1,
        &[
            "host-hypervisor",
            "host-devices",
            "host-fs",
            "host-net",
            "host-forward",
            "tunnel",
            "guest-runtime",
            "guest-images",
            "guest-network",
            "guest-volumes",
        ],
    ),
    (2, &["host-vmm", "guest-build"]),
    (
        PROGRAMS,
        &[
            "host-cli",
            "host-daemon",
            "host-tray",
            "guest-agent",
            "guest-engine",
            "installer-pack",
            "vm-image-builder",
            "vm-image-hello",
        ],
    ),
    (TESTS, &["tests-harness", "tests-e2e", "tests-bench", "tests-api", "tests-layout", "tests-fuzz"]),
];
/// What both sides of the wall may import.
const CONTRACT: [&str; 2] = ["guest-protocol", "guest-api"];
/// Clients: they see vocabulary only. If they need more, an API is missing something.
const CLIENTS: [&str; 2] = ["host-cli", "host-tray"];
/// Foreign crates with rooms of their own, and why.
const ROOMS: [(&[&str], &[&str], &str); 7] = [
    (&["kvm-ioctls", "kvm-bindings"], &["host-hypervisor"], "all hypervisor calls are in host-hypervisor"),
    (
        &["vm-memory"],
        // The tests map files with it, as it does so without `unsafe`.
        &["host-devices", "host-hypervisor", "host-vmm", "tests-e2e"],
        "guest memory is touched only by devices, hypervisor and machine",
    ),
    (
        &["virtio-queue", "vmm-sys-util"],
        &["host-devices", "host-hypervisor", "host-vmm"],
        "guest memory is touched only by devices, hypervisor and machine",
    ),
    (&["virtio-bindings", "vhost"], &["host-devices"], "device models are in host-devices"),
    (&["boringtun"], &["tunnel"], "WireGuard is in tunnel"),
    (&["libcontainer"], &["guest-runtime"], "it forks and may run only in the single-threaded shim"),
    (&["libfuzzer-sys"], &["tests-fuzz"], "fuzz targets are in tests/fuzz"),
];
/// Crates that must work without an async runtime: pure cores, device threads, single-threaded programs.
const SYNCHRONOUS: [&str; 8] = [
    "host-api",
    "guest-api",
    "guest-protocol",
    "host-net",
    "host-devices",
    "host-fs",
    "host-hypervisor",
    "guest-runtime",
];
const ASYNC: [&str; 5] = ["tokio", "tokio-util", "tokio-stream", "tokio-vsock", "futures-util"];
/// What does I/O, which the vocabulary must not.
const INPUT_OUTPUT: [&str; 6] = ["rustix", "nix", "libc", "mio", "socket2", "hyper"];
/// Where `unsafe` may stand: everywhere in the crate, or below one folder.
const UNSAFE: [(&str, &str); 4] = [
    ("host-hypervisor", "src/"),
    ("host-devices", "src/"),
    ("guest-agent", "src/sys/"),
    ("guest-runtime", "src/sys/"),
];
/// File names that say nothing about what is inside.
const EMPTY_NAMES: [&str; 8] = ["utils", "util", "common", "helpers", "helper", "manager", "misc", "shared"];

/// Every violation of every rule.
#[must_use]
pub fn violations(tree: &Tree) -> Vec<String> {
    let mut found = membership(tree);
    for each in &tree.crates {
        found.extend(names(each));
        found.extend(imports(each));
        found.extend(foreign(each));
        if !tree.excluded.contains(&each.folder) {
            found.extend(versions(each));
        }
        found.extend(unsafe_code(each));
        found.extend(documentation(each));
        found.extend(files(each));
        found.extend(fuzz_targets(each));
    }
    found
}

fn membership(tree: &Tree) -> Vec<String> {
    let mut found = Vec::new();
    for each in &tree.crates {
        if !tree.members.contains(&each.folder) && !tree.excluded.contains(&each.folder) {
            found.push(format!(
                "{} is a crate but no member of the workspace: list it in Cargo.toml",
                each.folder
            ));
        }
    }
    for member in &tree.members {
        if !tree.crates.iter().any(|each| each.folder == *member) {
            found.push(format!("{member} is a member of the workspace but there is no crate"));
        }
    }
    found
}

fn names(each: &Crate) -> Vec<String> {
    let expected = each.folder.replace('/', "-");
    if each.name != expected {
        return vec![format!(
            "{} is named {}: call it {expected}, the path with dashes",
            each.folder, each.name
        )];
    }
    if level(&each.name).is_none() {
        return vec![format!("{} has no level: give it one in tests/layout/src/rules.rs", each.name)];
    }
    Vec::new()
}

fn imports(each: &Crate) -> Vec<String> {
    let mut found = Vec::new();
    let Some(own) = level(&each.name) else { return found };
    for dependency in each.dependencies.iter().map(|dependency| dependency.name.as_str()) {
        let Some(other) = level(dependency) else { continue };
        let name = &each.name;
        if own < TESTS && other == TESTS {
            found.push(format!("{name} imports {dependency}: product code does not import tests"));
        } else if own < TESTS && side(name) != side(dependency) && !CONTRACT.contains(&dependency) {
            found.push(format!(
                "{name} imports {dependency}: {} crates meet {} crates only through {}",
                side(name),
                side(dependency),
                CONTRACT.join(" and ")
            ));
        } else if CLIENTS.contains(&name.as_str()) && other > 0 {
            found.push(format!("{name} imports {dependency}: clients see only the vocabulary (level 0)"));
        } else if other >= own && dependency != "tests-harness" {
            found.push(format!(
                "{name} (level {own}) imports {dependency} (level {other}): a crate imports lower levels only; \
                 join the two in a crate above both"
            ));
        }
    }
    found
}

fn foreign(each: &Crate) -> Vec<String> {
    let mut found = Vec::new();
    for dependency in each.dependencies.iter().map(|dependency| dependency.name.as_str()) {
        let name = each.name.as_str();
        for (crates, rooms, reason) in ROOMS {
            if crates.contains(&dependency) && !rooms.contains(&name) {
                found.push(format!(
                    "{name} imports {dependency}, which belongs in {}: {reason}",
                    rooms.join(", ")
                ));
            }
        }
        if SYNCHRONOUS.contains(&name) && ASYNC.contains(&dependency) {
            found.push(format!(
                "{name} imports {dependency}: it is called or runs on its own thread, never async"
            ));
        }
        if level(name) == Some(0) && INPUT_OUTPUT.contains(&dependency) {
            found.push(format!("{name} imports {dependency}: the vocabulary does no I/O"));
        }
    }
    found
}

fn versions(each: &Crate) -> Vec<String> {
    let mut found = Vec::new();
    for dependency in each.dependencies.iter().filter(|dependency| !dependency.shared) {
        found.push(format!(
            "{} names a version of {}: write `{}.workspace = true` and put the version into the workspace's table",
            each.name, dependency.name, dependency.name
        ));
    }
    if !each.shares_lints {
        found.push(format!("{} has lints of its own: write `workspace = true` under `[lints]`", each.name));
    }
    found
}

fn unsafe_code(each: &Crate) -> Vec<String> {
    let allowed = UNSAFE.iter().find(|(name, _)| *name == each.name).map(|(_, folder)| *folder);
    let mut found = Vec::new();
    for source in &each.sources {
        let path = format!("{}/{}", each.folder, source.path);
        // libfuzzer-sys's macro expands to an exported C function.
        let fuzz_target = each.name == "tests-fuzz" && source.path.starts_with("fuzz_targets/");
        if allowed.is_none()
            && source.is_root(&each.bins)
            && !fuzz_target
            && !has_line(&source.text, "#![forbid(unsafe_code)]")
        {
            found.push(format!("{path} has no `#![forbid(unsafe_code)]`"));
        }
        if !allowed.is_some_and(|folder| source.path.starts_with(folder))
            && let Some(line) = unsafe_line(&source.text)
        {
            let place =
                allowed.map_or("nowhere in this crate".to_owned(), |folder| format!("only in {folder}"));
            found.push(format!("{path}:{line} uses `unsafe`, which may stand {place}"));
        }
    }
    found
}

fn documentation(each: &Crate) -> Vec<String> {
    if !matches!(level(&each.name), Some(0 | 1)) {
        return Vec::new();
    }
    let root = each.sources.iter().find(|source| source.path == "src/lib.rs");
    let warned = root.is_some_and(|root| {
        ["warn", "deny"].iter().any(|word| has_line(&root.text, &format!("#![{word}(missing_docs)]")))
    });
    if warned {
        return Vec::new();
    }
    vec![format!(
        "{}/src/lib.rs has no `#![warn(missing_docs)]`: levels 0 and 1 document what is public",
        each.folder
    )]
}

fn files(each: &Crate) -> Vec<String> {
    let mut found = Vec::new();
    for source in &each.sources {
        let path = format!("{}/{}", each.folder, source.path);
        let Some(stem) = source.path.strip_suffix(".rs") else { continue };
        for part in stem.split('/').filter(|part| EMPTY_NAMES.contains(part)) {
            found.push(format!("{path}: `{part}` names nothing; call it by what it holds"));
        }
        let inside = format!("{stem}/");
        if !source.is_root(&each.bins) && each.sources.iter().any(|other| other.path.starts_with(&inside)) {
            found.push(format!("{path} stands beside its own folder: make it {}/{stem}/mod.rs", each.folder));
        }
    }
    found
}

fn fuzz_targets(each: &Crate) -> Vec<String> {
    if each.name != "tests-fuzz" {
        return Vec::new();
    }
    let listed = |path: &str| each.bins.iter().any(|bin| bin == path);
    let targets = each.sources.iter().filter(|source| source.path.starts_with("fuzz_targets/"));
    let unlisted = targets.clone().filter(|source| !listed(&source.path));
    let absent = each.bins.iter().filter(|bin| !targets.clone().any(|source| source.path == **bin));
    unlisted
        .map(|source| format!("{}/{} is not run: add a `[[bin]]` for it", each.folder, source.path))
        .chain(absent.map(|bin| format!("{}/{bin} has a `[[bin]]` but does not exist", each.folder)))
        .collect()
}

fn level(name: &str) -> Option<u8> {
    LEVELS.iter().find(|(_, names)| names.contains(&name)).map(|(level, _)| *level)
}

/// The part of a name before its first dash: host, guest, vm, tunnel, installer, tests.
fn side(name: &str) -> &str {
    name.split('-').next().unwrap_or(name)
}

fn has_line(text: &str, line: &str) -> bool {
    text.lines().any(|each| each.trim() == line)
}

/// The number of the first line with the keyword `unsafe` in code, as opposed to words about it.
fn unsafe_line(text: &str) -> Option<usize> {
    text.lines()
        .position(|line| {
            let code = line.split("//").next().unwrap_or_default();
            ["unsafe {", "unsafe fn ", "unsafe impl ", "unsafe extern ", "unsafe trait ", "#[unsafe("]
                .iter()
                .any(|keyword| code.match_indices(keyword).any(|(at, _)| !code[..at].contains('"')))
        })
        .map(|index| index + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::{Dependency, Source};

    /// A crate without fault; `dependencies` by name.
    fn sample(name: &str, dependencies: &[&str]) -> Crate {
        Crate {
            folder: name.replacen('-', "/", 1),
            name: name.to_owned(),
            shares_lints: true,
            dependencies: dependencies
                .iter()
                .map(|name| Dependency { name: (*name).to_owned(), shared: true })
                .collect(),
            bins: Vec::new(),
            sources: vec![source("src/lib.rs", "#![forbid(unsafe_code)]\n#![warn(missing_docs)]\n")],
        }
    }

    fn source(path: &str, text: &str) -> Source {
        Source { path: path.to_owned(), text: text.to_owned() }
    }

    fn check(each: Crate, expected: &[&str]) {
        let members = [each.folder.clone()].into();
        let tree = Tree { members, excluded: Default::default(), crates: vec![each] };
        assert_eq!(violations(&tree), expected);
    }

    #[test]
    fn allowed_imports_pass() {
        check(sample("host-vmm", &["host-devices", "host-net", "guest-protocol", "vm-memory", "serde"]), &[]);
        check(sample("guest-engine", &["guest-images", "guest-api", "tokio"]), &[]);
        check(sample("host-cli", &["host-api", "guest-api", "tokio"]), &[]);
        check(sample("tests-e2e", &["tests-harness"]), &[]);
    }

    #[test]
    fn the_wall_is_crossed_only_by_the_contract() {
        check(
            sample("guest-engine", &["host-forward"]),
            &[
                "guest-engine imports host-forward: guest crates meet host crates only through guest-protocol and guest-api",
            ],
        );
        check(
            sample("host-daemon", &["guest-images"]),
            &[
                "host-daemon imports guest-images: host crates meet guest crates only through guest-protocol and guest-api",
            ],
        );
    }

    #[test]
    fn mechanisms_do_not_know_each_other() {
        check(
            sample("host-net", &["host-devices"]),
            &["host-net (level 1) imports host-devices (level 1): a crate imports lower levels only; \
               join the two in a crate above both"],
        );
    }

    #[test]
    fn clients_see_only_the_vocabulary_and_products_no_tests() {
        check(
            sample("host-cli", &["host-vmm"]),
            &["host-cli imports host-vmm: clients see only the vocabulary (level 0)"],
        );
        check(
            sample("host-vmm", &["tests-harness"]),
            &["host-vmm imports tests-harness: product code does not import tests"],
        );
    }

    #[test]
    fn foreign_crates_stay_in_their_rooms() {
        check(
            sample("host-net", &["tokio"]),
            &["host-net imports tokio: it is called or runs on its own thread, never async"],
        );
        check(
            sample("host-daemon", &["kvm-ioctls"]),
            &[
                "host-daemon imports kvm-ioctls, which belongs in host-hypervisor: all hypervisor calls are in \
               host-hypervisor",
            ],
        );
        check(
            sample("guest-protocol", &["rustix"]),
            &["guest-protocol imports rustix: the vocabulary does no I/O"],
        );
    }

    #[test]
    fn versions_and_lints_come_from_the_workspace() {
        let mut each = sample("host-vmm", &["serde"]);
        each.dependencies[0].shared = false;
        each.shares_lints = false;
        check(
            each,
            &[
                "host-vmm names a version of serde: write `serde.workspace = true` and put the version into the \
                 workspace's table",
                "host-vmm has lints of its own: write `workspace = true` under `[lints]`",
            ],
        );
    }

    #[test]
    fn unsafe_stands_only_where_it_may() {
        let mut each = sample("host-vmm", &[]);
        each.sources = vec![source("src/lib.rs", "fn a() {\n    unsafe { b() }\n}\n")];
        check(
            each,
            &[
                "host/vmm/src/lib.rs has no `#![forbid(unsafe_code)]`",
                "host/vmm/src/lib.rs:2 uses `unsafe`, which may stand nowhere in this crate",
            ],
        );
        let mut each = sample("guest-agent", &[]);
        each.sources.push(source("src/sys/linux.rs", "unsafe { b() }\n"));
        each.sources.push(source(
            "src/clock.rs",
            "// unsafe { b() }\nlet word = \"unsafe { b() }\";\nunsafe fn c() {}\n",
        ));
        check(each, &["guest/agent/src/clock.rs:3 uses `unsafe`, which may stand only in src/sys/"]);
    }

    #[test]
    fn low_levels_warn_about_missing_docs() {
        let mut each = sample("host-net", &[]);
        each.sources = vec![source("src/lib.rs", "#![forbid(unsafe_code)]\n")];
        check(
            each,
            &["host/net/src/lib.rs has no `#![warn(missing_docs)]`: levels 0 and 1 document what is public"],
        );
    }

    #[test]
    fn files_are_named_after_what_they_hold_and_folders_hold_their_root() {
        let mut each = sample("host-vmm", &[]);
        for path in ["src/utils.rs", "src/attach.rs", "src/attach/net.rs", "src/boot/mod.rs"] {
            each.sources.push(source(path, ""));
        }
        check(
            each,
            &[
                "host/vmm/src/utils.rs: `utils` names nothing; call it by what it holds",
                "host/vmm/src/attach.rs stands beside its own folder: make it host/vmm/src/attach/mod.rs",
            ],
        );
    }

    #[test]
    fn every_fuzz_target_has_a_bin_and_every_bin_a_target() {
        let mut each = sample("tests-fuzz", &["libfuzzer-sys"]);
        each.sources = vec![source("fuzz_targets/fuzz_new.rs", "")];
        each.bins = vec!["fuzz_targets/fuzz_old.rs".to_owned()];
        check(
            each,
            &[
                "tests/fuzz/fuzz_targets/fuzz_new.rs is not run: add a `[[bin]]` for it",
                "tests/fuzz/fuzz_targets/fuzz_old.rs has a `[[bin]]` but does not exist",
            ],
        );
    }

    #[test]
    fn crates_are_members_and_named_by_their_path() {
        let tree = Tree {
            members: ["host/gone".to_owned()].into(),
            excluded: Default::default(),
            crates: vec![Crate { name: "vmm".into(), ..sample("host-vmm", &[]) }],
        };
        assert_eq!(
            violations(&tree),
            [
                "host/vmm is a crate but no member of the workspace: list it in Cargo.toml",
                "host/gone is a member of the workspace but there is no crate",
                "host/vmm is named vmm: call it host-vmm, the path with dashes",
            ]
        );
    }
}
