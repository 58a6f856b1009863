//! The engine killed at every step of what changes its data: a restarted one has no orphan, its data is sound, and the
//! same command works.

use crate::Scenario;
use crate::docker::docker;
use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;
use tests_harness::{Engine, IMAGE, Layer, TestImage, wait_until};

const NAME: &str = "fault";
/// The container that a command works on.
const OTHER: &str = "fault-other";

/// Programs without debug assertions have no fault points: there is nothing to run then.
pub(crate) fn native_scenarios() -> Vec<Scenario> {
    if !cfg!(debug_assertions) {
        return Vec::new();
    }
    vec![
        Scenario { name: "faults::killed_while_a_container_changes", body: containers },
        Scenario { name: "faults::killed_while_images_come_and_go", body: images },
        Scenario { name: "faults::killed_while_volumes_and_networks_change", body: volumes_and_networks },
    ]
}

/// A verb, and where the engine is killed on its way.
struct Verb {
    points: &'static [&'static str],
    /// What has to be there before.
    before: Vec<Vec<String>>,
    command: Vec<String>,
    /// Takes everything away that the verb and what was before made; what is not there is fine.
    after: Vec<Vec<String>>,
    /// Whether the command, given again to the restarted engine, works: else it may be done already.
    again: Again,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Again {
    Works,
    /// It works, or says that it is done.
    MayBeDone,
}

fn words(text: &str) -> Vec<String> {
    text.split(' ').map(str::to_owned).collect()
}

fn containers(engine: &Engine) -> Result<()> {
    let sleeping = format!("{IMAGE} sleep 1000");
    let create = Verb {
        points: &["create.after-snapshot", "create.after-record"],
        before: Vec::new(),
        command: words(&format!("create --name {NAME} {sleeping}")),
        after: vec![words(&format!("rm -f {NAME}"))],
        again: Again::MayBeDone,
    };
    let run = Verb {
        points: &[
            "start.after-mount",
            "start.after-files",
            "start.after-shim",
            "start.after-create",
            "start.after-record",
            "start.after-start",
        ],
        before: vec![words(&format!("create --name {NAME} {sleeping}"))],
        command: words(&format!("start {NAME}")),
        after: vec![words(&format!("rm -f {NAME}"))],
        again: Again::Works,
    };
    let stop = Verb {
        points: &["stop.after-signal", "stop.after-shim", "stop.after-teardown"],
        before: vec![words(&format!("run -d --name {NAME} {sleeping}"))],
        command: words(&format!("stop -t 1 {NAME}")),
        after: vec![words(&format!("rm -f {NAME}"))],
        again: Again::Works,
    };
    let remove = Verb {
        points: &["remove.after-run", "remove.after-record", "remove.after-snapshot"],
        before: vec![words(&format!("run -d --name {NAME} {sleeping}"))],
        command: words(&format!("rm -f {NAME}")),
        after: Vec::new(),
        again: Again::Works,
    };
    every_point(engine, &[create, run, stop, remove])
}

fn images(engine: &Engine) -> Result<()> {
    let image = TestImage::new(vec![Layer::busybox()?, Layer::files([("brought", b"by fault".to_vec())])?]);
    let name = format!("{}/{NAME}", engine.registry_name());
    engine.registry().push(&image, NAME, "1")?;
    let (archive, root, saved) =
        (engine.path("fault.tar"), engine.path("root.tar"), engine.path("saved.tar"));
    std::fs::write(&archive, image.archive("fault-loaded:1")?)?;
    // Another one: what the registry has is not sent.
    let sent = TestImage::new(vec![Layer::files([("sent", b"by fault".to_vec())])?]);
    let (outgoing, target) =
        (engine.path("outgoing.tar"), format!("{}/fault-sent:1", engine.registry_name()));
    std::fs::write(&outgoing, sent.archive(&target)?)?;
    std::fs::write(&root, &Layer::busybox()?.tar)?;
    let shown = |path: &Path| path.display().to_string();
    let tidy = vec![
        words(&format!("rm -f {OTHER}")),
        words(&format!("rmi -f {name}:1 fault-loaded:1 fault-committed:1 fault-imported:1 {target}")),
        // One that was complete when the engine was killed has lost its name to the second.
        words("image prune -f"),
    ];
    let verb = |points, before, command: Vec<String>| Verb {
        points,
        before,
        command,
        after: tidy.clone(),
        again: Again::Works,
    };
    let pull = verb(
        &["pull-blob-arrived", "pull-layer-unpacked", "pull-layers-placed", "pull-committed"],
        Vec::new(),
        words(&format!("pull {name}:1")),
    );
    let push = verb(
        &["push-upload-begun", "push-layers-sent", "push-config-sent", "push-manifest-sent"],
        vec![words(&format!("load -i {}", shown(&outgoing)))],
        words(&format!("push {target}")),
    );
    let load = verb(
        &[
            "load.after-file",
            "load.after-archive",
            "pull-layer-unpacked",
            "pull-layers-placed",
            "pull-committed",
        ],
        Vec::new(),
        words(&format!("load -i {}", shown(&archive))),
    );
    let save = verb(&["save.after-blobs"], Vec::new(), words(&format!("save -o {} {IMAGE}", shown(&saved))));
    let import = verb(
        &["compose.after-read", "compose.after-layer", "pull-layers-placed", "pull-committed"],
        Vec::new(),
        words(&format!("import {} fault-imported:1", shown(&root))),
    );
    let commit = verb(
        &[
            "compose.after-read",
            "compose.after-layer",
            "pull-layer-unpacked",
            "pull-layers-placed",
            "pull-committed",
        ],
        vec![vec![
            "run".into(),
            "-d".into(),
            "--name".into(),
            OTHER.into(),
            IMAGE.into(),
            "sh".into(),
            "-c".into(),
            "echo new >/file; sleep 1000".into(),
        ]],
        words(&format!("commit {OTHER} fault-committed:1")),
    );
    let remove = Verb {
        points: &["rmi.before-index", "rmi.after-index", "rmi.after-blobs"],
        before: vec![words(&format!("load -i {}", shown(&archive)))],
        command: words("rmi fault-loaded:1"),
        after: tidy.clone(),
        again: Again::MayBeDone,
    };
    every_point(engine, &[pull, push, load, save, import, commit, remove])
}

fn volumes_and_networks(engine: &Engine) -> Result<()> {
    let tidy = vec![
        words(&format!("rm -f {OTHER}")),
        words(&format!("volume rm -f {NAME}")),
        words(&format!("network rm {NAME}")),
    ];
    let verb = |points, before, command: &str, again| Verb {
        points,
        before,
        command: words(command),
        after: tidy.clone(),
        again,
    };
    let network = words(&format!("network create {NAME}"));
    let on_default = words(&format!("run -d --name {OTHER} {IMAGE} sleep 1000"));
    let on_both = words(&format!("network connect {NAME} {OTHER}"));
    every_point(
        engine,
        &[
            verb(
                &["volume.create.after-folder", "volume.create.after-record"],
                Vec::new(),
                &format!("volume create {NAME}"),
                Again::Works,
            ),
            verb(
                &["volume.remove.after-hide", "volume.remove.after-record"],
                vec![words(&format!("volume create {NAME}"))],
                &format!("volume rm {NAME}"),
                Again::MayBeDone,
            ),
            verb(
                &["network.create.after-raise", "network.create.after-record"],
                Vec::new(),
                &format!("network create {NAME}"),
                Again::MayBeDone,
            ),
            verb(
                &["network.remove.after-record"],
                vec![network.clone()],
                &format!("network rm {NAME}"),
                Again::MayBeDone,
            ),
            verb(
                &["network.connect.after-plug", "network.connect.after-keep"],
                vec![network.clone(), on_default.clone()],
                &format!("network connect {NAME} {OTHER}"),
                Again::Works,
            ),
            verb(
                &["network.disconnect.after-keep", "network.disconnect.after-unplug"],
                vec![network, on_default, on_both],
                &format!("network disconnect {NAME} {OTHER}"),
                Again::MayBeDone,
            ),
        ],
    )
}

fn every_point(engine: &Engine, verbs: &[Verb]) -> Result<()> {
    engine.remove_containers()?;
    // Brings up what stays: the default bridge, and the parent of the containers' cgroups.
    docker(engine, &["run", "--rm", IMAGE, "true"])?.ok()?;
    docker(engine, &["image", "prune", "-f"])?.ok()?;
    // What other scenarios left to be collected goes.
    engine.end_native(false)?;
    engine.boot()?;
    docker(engine, &["run", "--rm", IMAGE, "true"])?.ok()?;
    let before = wait_until("the engine is at rest", || {
        let now = belongings(engine)?;
        std::thread::sleep(Duration::from_millis(300));
        Ok((belongings(engine)? == now).then_some(now))
    })?;
    for verb in verbs {
        for point in verb.points {
            let outcome = at_point(engine, verb, point, &before);
            outcome.with_context(|| format!("`{}`, killed at {point}", verb.command.join(" ")))?;
        }
    }
    Ok(())
}

fn at_point(engine: &Engine, verb: &Verb, point: &str, before: &BTreeSet<String>) -> Result<()> {
    let run = |command: &Vec<String>| docker(engine, &command.iter().map(String::as_str).collect::<Vec<_>>());
    for command in &verb.before {
        run(command)?.ok()?;
    }
    let mut containers = identities(engine)?;
    engine.end_native(true)?;
    engine.boot_with_fault(point)?;
    let outcome = run(&verb.command)?;
    engine.await_end().with_context(|| format!("{outcome:?}"))?;
    ensure!(outcome.code != 0, "it succeeded although the engine was killed");
    engine.boot()?;
    let again = run(&verb.command)?;
    let done = ["No such", "no such", "not found", "already in use", "already exists", "is not connected"];
    let is_done = done.iter().any(|text| again.stderr.contains(text));
    ensure!(
        again.code == 0 || (verb.again == Again::MayBeDone && is_done),
        "given again it does not work: {again:?}"
    );
    containers.extend(identities(engine)?);
    for command in &verb.after {
        // What is not there cannot be removed, which some of these say.
        run(command)?;
    }
    let mut now = BTreeSet::new();
    wait_until("nothing is left", || {
        now = belongings(engine)?;
        Ok((now == *before).then_some(()))
    })
    .with_context(|| format!("left or lost: {:?}", now.symmetric_difference(before).collect::<Vec<_>>()))?;
    let left = cgroups(&containers)?;
    ensure!(left.is_empty(), "cgroups are left: {left:?}");
    docker(engine, &["run", "--rm", "--name", NAME, IMAGE, "true"])?.ok()?;
    engine.end_native(false)?;
    engine.expect_sound_data()?;
    engine.boot()
}

/// Everything an engine has in the kernel and in its folders: processes, mounts, namespaces, interfaces, layers, blobs.
fn belongings(engine: &Engine) -> Result<BTreeSet<String>> {
    let data = engine.path("data");
    let mut all = BTreeSet::new();
    let shims = engine.processes().list().into_iter().filter(|process| process.name == "shim");
    all.extend(shims.map(|process| format!("shim {}", process.pid)));
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    let below = data.display().to_string();
    let places = mounts.lines().filter_map(|line| line.split(' ').nth(4));
    all.extend(places.filter(|place| place.starts_with(&below)).map(|place| format!("mount {place}")));
    let interfaces = std::fs::read_to_string("/proc/self/net/dev")?;
    let interfaces = interfaces.lines().filter_map(|line| line.split_once(':'));
    all.extend(interfaces.map(|(name, _)| format!("interface {}", name.trim())));
    for folder in [
        "run/containers",
        "run/netns",
        "run/networks",
        "containers",
        "volumes",
        "volumes/.new",
        "images/layers",
        "images/snapshots",
        "images/blobs/sha256",
        "images/blobs/partial",
    ] {
        let names = names(&data.join(folder))?;
        // What has come of a blob is kept for the next try, and collected when it is old.
        let kept = |name: &String| folder == "images/blobs/partial" && name.len() == 64;
        all.extend(names.into_iter().filter(|name| !kept(name)).map(|name| format!("{folder}/{name}")));
    }
    Ok(all)
}

/// The containers' cgroups. Other engines of this computer have theirs beside them.
fn cgroups(containers: &BTreeSet<String>) -> Result<Vec<String>> {
    let root = Path::new("/sys/fs/cgroup");
    let hierarchies = names(root)?.into_iter().map(|name| root.join(name)).chain([root.to_path_buf()]);
    let theirs = hierarchies.flat_map(|hierarchy| {
        containers.iter().map(move |id| hierarchy.join("engine").join(id)).collect::<Vec<_>>()
    });
    Ok(theirs.filter(|folder| folder.exists()).map(|folder| folder.display().to_string()).collect())
}

fn identities(engine: &Engine) -> Result<BTreeSet<String>> {
    let listed = docker(engine, &["ps", "-aq", "--no-trunc"])?.ok()?;
    Ok(listed.lines().map(str::to_owned).collect())
}

fn names(folder: &Path) -> Result<Vec<String>> {
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    match std::fs::read_dir(folder) {
        Ok(entries) => entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => bail!("{}: {error}", folder.display()),
    }
}
