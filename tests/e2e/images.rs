//! Images: pull from a real registry, load, list, tag, remove.

use anyhow::{Context, Result, ensure};
use std::path::PathBuf;
use tests_harness::{Engine, IMAGE, Layer, TestImage, Timed};

crate::scenarios![
    an_image_is_pulled_and_run,
    layers_are_shared_between_images,
    a_debian_is_pulled_and_run,
    an_image_is_tagged_and_removed,
    an_archive_is_loaded_from_a_file,
    an_image_in_use_stays,
];

fn an_image_is_pulled_and_run(engine: &Engine) -> Result<()> {
    let name = format!("{}/pulled", engine.registry_name());
    let image =
        TestImage::new(vec![Layer::busybox()?, Layer::files([("greeting", b"from a registry\n".to_vec())])?]);
    let digest = engine.registry().push(&image, "pulled", "1")?;
    // `run` pulls what is missing.
    let run = engine.engine(["run", "--rm", &format!("{name}:1"), "cat", "/greeting"])?;
    ensure!(run.stdout == "from a registry\n" && run.stderr.contains("Unable to find image"), "{run:?}");
    let digests = engine.engine(["inspect", "-f", "{{json .RepoDigests}}", &format!("{name}:1")])?.ok()?;
    ensure!(digests == format!("[\"{name}@{digest}\"]"), "{digests}");
    // By digest, and a second time.
    engine.engine(["pull", "-q", &format!("{name}@{digest}")])?.ok()?;
    let again = engine.engine(["pull", &format!("{name}:1")])?;
    ensure!(again.stderr.contains("up to date"), "{again:?}");
    engine.engine(["rmi", "-f", &format!("{name}:1")])?.ok().map(drop)
}

fn layers_are_shared_between_images(engine: &Engine) -> Result<()> {
    let base = Layer::busybox()?;
    let names = ["first", "second"];
    for name in names {
        let image = TestImage::new(vec![base.clone(), Layer::files([("name", name.as_bytes().to_vec())])?]);
        engine.registry().push(&image, name, "latest")?;
        let full = format!("{}/{name}", engine.registry_name());
        let pull = engine.engine(["pull", &full])?;
        ensure!(pull.code == 0, "{pull:?}");
        if name == "second" {
            ensure!(pull.stderr.contains("Already exists"), "the shared layer came twice: {}", pull.stderr);
        }
        let said = engine.engine(["run", "--rm", &full, "cat", "/name"])?.ok()?;
        ensure!(said == name, "{said}");
    }
    // Removing one leaves the other whole.
    engine.engine(["rmi", &format!("{}/first", engine.registry_name())])?.ok()?;
    let second = format!("{}/second", engine.registry_name());
    engine.engine(["run", "--rm", &second, "cat", "/name"])?.ok()?;
    engine.engine(["rmi", &second])?.ok().map(drop)
}

/// A real distribution, made by debootstrap; kept between runs because making it takes a minute.
fn a_debian_is_pulled_and_run(engine: &Engine) -> Result<()> {
    let root = debian_root()?;
    let layer =
        Layer { tar: std::fs::read(&root).with_context(|| format!("cannot read `{}`", root.display()))? };
    let image = TestImage::new(vec![layer]).with_config(serde_json::json!({
        "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
        "Cmd": ["bash"],
    }));
    engine.registry().push(&image, "debian", "minbase")?;
    let name = format!("{}/debian:minbase", engine.registry_name());
    engine.engine(["pull", "-q", &name])?.ok()?;
    let said = engine
        .engine([
            "run",
            "--rm",
            &name,
            "bash",
            "-c",
            "dpkg -s apt | grep ^Status; . /etc/os-release; echo $ID; perl -e 'print 6*7'",
        ])?
        .ok()?;
    ensure!(said == "Status: install ok installed\ndebian\n42", "{said}");
    // Owners and modes came through.
    let said = engine.engine(["run", "--rm", &name, "stat", "-c", "%U %a", "/etc/shadow", "/tmp"])?.ok()?;
    ensure!(said == "root 640\nroot 1777", "{said}");
    engine.engine(["rmi", &name])?.ok().map(drop)
}

/// The archive of that root. The first call needs the way out that the native stage's namespaces do not have.
pub(crate) fn debian_root() -> Result<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")));
    let folder = cache.context("neither XDG_CACHE_HOME nor HOME is set")?.join("engine/tests");
    std::fs::create_dir_all(&folder)?;
    let tar = folder.join("debian-minbase.tar");
    if !tar.is_file() {
        let part = folder.join(format!(".{}.tar", std::process::id()));
        let mut command = std::process::Command::new("debootstrap");
        let scratch = tempfile_dir()?;
        command.args(["--variant=minbase", "bookworm"]).arg(&scratch);
        let made =
            Timed::new(command).within(std::time::Duration::from_secs(900)).run().and_then(|made| made.ok());
        let packed = made.and_then(|_| {
            let mut pack = std::process::Command::new("tar");
            pack.arg("-C")
                .arg(&scratch)
                .args([
                    "--numeric-owner",
                    "--exclude=./dev/*",
                    "--exclude=./var/cache/apt/archives/*.deb",
                    "-cf",
                ])
                .arg(&part)
                .arg(".");
            tests_harness::run(pack)?.ok()
        });
        std::fs::remove_dir_all(&scratch)?;
        packed?;
        std::fs::rename(&part, &tar)?;
    }
    Ok(tar)
}

fn tempfile_dir() -> Result<PathBuf> {
    let folder = std::env::temp_dir().join(format!("engine-debian-{}", std::process::id()));
    std::fs::create_dir(&folder)?;
    Ok(folder)
}

fn an_image_is_tagged_and_removed(engine: &Engine) -> Result<()> {
    engine.engine(["tag", IMAGE, "other:name"])?.ok()?;
    let listed = engine.engine(["images", "--format", "{{.Repository}}:{{.Tag}} {{.ID}}"])?.ok()?;
    let id_of = |name: &str| listed.lines().find_map(|line| line.strip_prefix(name)).map(str::to_owned);
    ensure!(id_of("other:name ").is_some() && id_of("other:name ") == id_of("busybox:test "), "{listed}");
    let removed = engine.engine(["rmi", "other:name"])?.ok()?;
    ensure!(removed == "Untagged: other:name", "{removed}");
    engine.engine(["rmi", "other:name"])?.fails_with(1, "No such image: other:name")?;
    engine.engine(["run", "--rm", IMAGE, "true"])?.ok().map(drop)
}

fn an_archive_is_loaded_from_a_file(engine: &Engine) -> Result<()> {
    let path = engine.path("loaded.tar");
    std::fs::write(
        &path,
        TestImage::new(vec![Layer::busybox()?, Layer::files([("x", b"y".to_vec())])?]).archive("loaded:1")?,
    )?;
    let said = Timed::new({
        let mut command = engine.command(["load", "-i"]);
        command.arg(&path);
        command
    })
    .run()?
    .ok()?;
    ensure!(said == "Loaded image: loaded:1", "{said}");
    let removed = engine.engine(["rmi", "loaded:1"])?.ok()?;
    ensure!(removed.contains("Untagged: loaded:1") && removed.contains("Deleted: sha256:"), "{removed}");
    Ok(())
}

fn an_image_in_use_stays(engine: &Engine) -> Result<()> {
    engine
        .load(&TestImage::new(vec![Layer::busybox()?, Layer::files([("in", b"use".to_vec())])?]), "used:1")?;
    engine.engine(["run", "--name", "user", "used:1", "true"])?.ok()?;
    engine.engine(["rmi", "used:1"])?.fails_with(1, "conflict: unable to remove repository reference")?;
    engine.engine(["rm", "user"])?.ok()?;
    engine.engine(["rmi", "used:1"])?.ok().map(drop)
}
