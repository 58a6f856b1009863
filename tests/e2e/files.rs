//! Files that move in and out of containers and images: cp, diff, export, import, commit, save, load. With the stock client,
//! and with what it does not do.

use anyhow::{Context, Result, bail, ensure};
use std::io::Write;
use std::process::{Command, Stdio};
use tests_harness::{Engine, Finished, IMAGE, Timed};

crate::scenarios![
    files_are_copied_both_ways,
    our_copies_land_where_the_stock_clients_do,
    a_copy_does_not_leave_the_container,
    a_copy_sees_what_the_engine_and_the_user_have_mounted,
    a_copy_into_a_volume_lands_in_the_volume,
    read_only_places_are_refused,
    kinds_are_not_replaced_by_copies,
    a_dropped_copy_leaves_nothing_mounted,
    changes_are_told_as_docker_tells_them,
    an_exported_root_is_imported_and_runs,
    a_commit_keeps_changes_and_settings,
    a_commit_of_nothing_has_no_layer,
    saved_images_are_loaded_again_as_they_were,
    an_archive_that_lies_is_refused,
];

fn docker(engine: &Engine, arguments: &[&str]) -> Result<Finished> {
    tests_harness::run(command(engine, arguments)?)
}

fn command(engine: &Engine, arguments: &[&str]) -> Result<Command> {
    match engine.docker(arguments) {
        Some(command) => Ok(command),
        None => bail!(
            "there is no docker CLI on this computer: install one (`apt-get install docker.io` or newer) to run this check"
        ),
    }
}

fn docker_with_input(engine: &Engine, arguments: &[&str], input: Vec<u8>) -> Result<Finished> {
    Timed::new(command(engine, arguments)?).input(input).run()
}

/// The bytes that the client writes to its standard output.
fn bytes(engine: &Engine, arguments: &[&str]) -> Result<Vec<u8>> {
    let output = command(engine, arguments)?.output().context("cannot run docker")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(output.stdout)
}

/// The names in an archive, in its order.
fn names(archive: &[u8]) -> Result<Vec<String>> {
    let mut archive = tar::Archive::new(archive);
    archive.entries()?.map(|entry| Ok(entry?.path()?.display().to_string())).collect()
}

/// A container that has run `script`; removed by [`remove`].
fn ran(engine: &Engine, name: &str, script: &str) -> Result<()> {
    docker(engine, &["run", "--name", name, IMAGE, "sh", "-c", script])?.ok().map(drop)
}

fn remove(engine: &Engine, name: &str) -> Result<()> {
    docker(engine, &["rm", "-f", "-v", name])?.ok().map(drop)
}

fn files_are_copied_both_ways(engine: &Engine) -> Result<()> {
    let folder = engine.path("copied");
    std::fs::create_dir_all(folder.join("from/deep"))?;
    std::fs::write(folder.join("from/deep/file"), "hello\n")?;
    std::fs::hard_link(folder.join("from/deep/file"), folder.join("from/link"))?;
    std::os::unix::fs::symlink("deep/file", folder.join("from/symlink"))?;
    let path = |name: &str| folder.join(name).display().to_string();
    // Into one that was never started; what is in the folder, not the folder.
    docker(engine, &["create", "--name", "copies", IMAGE, "sh", "-c", "cat /in/deep/file; cat /in/symlink"])?
        .ok()?;
    docker(engine, &["cp", &path("from"), "copies:/in"])?.ok()?;
    let said = docker(engine, &["start", "-a", "copies"])?.ok()?;
    ensure!(said == "hello\nhello", "{said}");
    // And out of it, stopped as it is.
    docker(engine, &["cp", "copies:/in", &path("to")])?.ok()?;
    ensure!(std::fs::read_to_string(folder.join("to/deep/file"))? == "hello\n");
    ensure!(std::fs::read_link(folder.join("to/symlink"))?.ends_with("deep/file"));
    let archive = bytes(engine, &["cp", "copies:/in/.", "-"])?;
    ensure!(names(&archive)?.iter().all(|name| name.starts_with('.')), "{:?}", names(&archive)?);
    let archive = bytes(engine, &["cp", "copies:/in", "-"])?;
    ensure!(names(&archive)?.contains(&"in/deep/file".to_owned()), "{:?}", names(&archive)?);
    // A file under another name, and by way of a link.
    docker(engine, &["cp", "-L", "copies:/in/symlink", &path("followed")])?.ok()?;
    ensure!(std::fs::read_to_string(folder.join("followed"))? == "hello\n");
    let missing = docker(engine, &["cp", "copies:/nowhere", "-"])?;
    missing.fails_with(1, "Could not find the file /nowhere in container copies")?;
    remove(engine, "copies")
}

/// Links of an image, or made by a container, are resolved inside of it.
fn a_copy_does_not_leave_the_container(engine: &Engine) -> Result<()> {
    let escapes =
        "mkdir -p /etc; echo inside > /etc/marker; ln -s ../../../../../../etc/marker /up; ln -s /etc /door";
    ran(engine, "escapes", escapes)?;
    let archive = bytes(engine, &["cp", "-L", "escapes:/up", "-"])?;
    let mut archive = tar::Archive::new(&archive[..]);
    let mut entry = archive.entries()?.next().context("an empty archive")??;
    let text = std::io::read_to_string(&mut entry)?;
    ensure!(text == "inside\n", "{text:?}");
    let file = engine.path("through-the-door");
    std::fs::write(&file, "through")?;
    docker(engine, &["cp", &file.display().to_string(), "escapes:/door/x"])?.ok()?;
    let archive = names(&bytes(engine, &["cp", "escapes:/etc", "-"])?)?;
    ensure!(archive.contains(&"etc/x".to_owned()), "{archive:?}");
    remove(engine, "escapes")
}

/// As its processes see it, but for what is in memory only, as with dockerd.
fn a_copy_sees_what_the_engine_and_the_user_have_mounted(engine: &Engine) -> Result<()> {
    let script = "echo memory > /t/inside; echo kept > /data/inside; touch /done; exec sleep 1000";
    docker(
        engine,
        &[
            "run",
            "-d",
            "--name",
            "seen",
            "--hostname",
            "seer",
            "--tmpfs",
            "/t",
            "-v",
            "/data",
            IMAGE,
            "sh",
            "-c",
            script,
        ],
    )?
    .ok()?;
    tests_harness::wait_until("the container has written", || {
        Ok((docker(engine, &["exec", "seen", "ls", "/done"])?.code == 0).then_some(()))
    })?;
    let text = |path: &str| -> Result<String> {
        let archive = bytes(engine, &["cp", path, "-"])?;
        let mut archive = tar::Archive::new(&archive[..]);
        let mut entry = archive.entries()?.next().context("an empty archive")??;
        Ok(std::io::read_to_string(&mut entry)?)
    };
    ensure!(text("seen:/etc/hostname")? == "seer\n");
    ensure!(text("seen:/etc/hosts")?.contains("\tseer\n"));
    ensure!(text("seen:/data/inside")? == "kept\n");
    docker(engine, &["cp", "seen:/t/inside", "-"])?.fails_with(1, "Could not find the file /t/inside")?;
    let file = engine.path("for-the-mounts");
    std::fs::write(&file, "came")?;
    let file = file.display().to_string();
    docker(engine, &["cp", &file, "seen:/data/came"])?.ok()?;
    docker(engine, &["cp", &file, "seen:/t/came"])?.ok()?;
    let said = docker(engine, &["exec", "seen", "sh", "-c", "cat /data/came; ls /t"])?.ok()?;
    ensure!(said == "cameinside", "{said}");
    docker(engine, &["cp", &file, "seen:/etc/hosts"])?.fails_with(1, "/hosts")?;
    docker(engine, &["stop", "-t", "0", "seen"])?.ok()?;
    ensure!(text("seen:/etc/hostname")? == "seer\n");
    remove(engine, "seen")
}

fn a_copy_into_a_volume_lands_in_the_volume(engine: &Engine) -> Result<()> {
    let file = engine.path("for-the-volume");
    std::fs::write(&file, "kept")?;
    docker(engine, &["create", "--name", "keeper", "-v", "files-kept:/data", IMAGE, "cat", "/data/file"])?
        .ok()?;
    docker(engine, &["cp", &file.display().to_string(), "keeper:/data/file"])?.ok()?;
    let said = docker(engine, &["start", "-a", "keeper"])?.ok()?;
    ensure!(said == "kept", "{said}");
    let exported = names(&bytes(engine, &["export", "keeper"])?)?;
    ensure!(!exported.contains(&"data/file".to_owned()), "an export has no volumes: {exported:?}");
    // It is there for others too.
    let said = docker(engine, &["run", "--rm", "-v", "files-kept:/x:ro", IMAGE, "cat", "/x/file"])?.ok()?;
    ensure!(said == "kept", "{said}");
    remove(engine, "keeper")?;
    docker(engine, &["create", "--name", "fixed", "-v", "files-kept:/data:ro", IMAGE, "true"])?.ok()?;
    docker(engine, &["cp", &file.display().to_string(), "fixed:/data/x"])?
        .fails_with(1, "mounted volume is marked read-only")?;
    remove(engine, "fixed")?;
    docker(engine, &["volume", "rm", "files-kept"])?.ok().map(drop)
}

fn read_only_places_are_refused(engine: &Engine) -> Result<()> {
    let file = engine.path("not-wanted");
    std::fs::write(&file, "x")?;
    let file = file.display().to_string();
    docker(engine, &["create", "--name", "fixed", "--read-only", IMAGE, "true"])?.ok()?;
    docker(engine, &["cp", &file, "fixed:/x"])?.fails_with(1, "container rootfs is marked read-only")?;
    remove(engine, "fixed")
}

fn kinds_are_not_replaced_by_copies(engine: &Engine) -> Result<()> {
    ran(engine, "kinds", "mkdir -p /place/name")?;
    let mut archive = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(1);
    header.set_mode(0o644);
    archive.append_data(&mut header, "name", &b"x"[..])?;
    let archive = archive.into_inner()?;
    let refused = docker_with_input(engine, &["cp", "-", "kinds:/place"], archive.clone())?;
    refused.fails_with(1, "cannot overwrite directory \"/place/name\" with non-directory \"/place\"")?;
    let refused = docker_with_input(engine, &["cp", "-", "kinds:/nowhere"], archive)?;
    ensure!(refused.code != 0, "{refused:?}");
    remove(engine, "kinds")
}

/// A client that goes away in the middle takes its mounts along.
fn a_dropped_copy_leaves_nothing_mounted(engine: &Engine) -> Result<()> {
    ran(
        engine,
        "dropped",
        "dd if=/dev/zero of=/large bs=1M count=64 2>/dev/null || head -c 67108864 /dev/zero > /large || true",
    )?;
    for _ in 0..3 {
        let mut copy = command(engine, &["cp", "dropped:/", "-"])?.stdout(Stdio::piped()).spawn()?;
        let mut some = [0; 4096];
        let mut output = copy.stdout.take().context("no output")?;
        std::io::Read::read_exact(&mut output, &mut some)?;
        drop(output);
        copy.kill()?;
        copy.wait()?;
    }
    // That nothing is left is looked at when the engine has ended; here, that the container can go.
    remove(engine, "dropped")
}

fn changes_are_told_as_docker_tells_them(engine: &Engine) -> Result<()> {
    docker(engine, &["create", "--name", "changes", IMAGE, "true"])?.ok()?;
    let none = docker(engine, &["diff", "changes"])?.ok()?;
    ensure!(none.is_empty(), "{none}");
    docker(engine, &["start", "-a", "changes"])?.ok()?;
    let none = docker(engine, &["diff", "changes"])?.ok()?;
    ensure!(none.is_empty(), "what the runtime makes is nobody's change: {none}");
    remove(engine, "changes")?;
    ran(engine, "changes", "mkdir /new && echo x > /new/file && rm /bin/ls && echo hosts > /etc/marker")?;
    let told = docker(engine, &["diff", "changes"])?.ok()?;
    let lines: Vec<&str> = told.lines().collect();
    ensure!(lines.contains(&"A /new") && lines.contains(&"A /new/file"), "{told}");
    ensure!(lines.contains(&"C /bin") && lines.contains(&"D /bin/ls"), "{told}");
    let size =
        docker(engine, &["ps", "-a", "-s", "--filter", "name=changes", "--format", "{{.Size}}"])?.ok()?;
    ensure!(size.starts_with("8B (virtual "), "{size}");
    remove(engine, "changes")
}

fn an_exported_root_is_imported_and_runs(engine: &Engine) -> Result<()> {
    ran(engine, "exported", "echo greeting > /greeting")?;
    let archive = bytes(engine, &["export", "exported"])?;
    ensure!(names(&archive)?.contains(&"greeting".to_owned()));
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packed.write_all(&archive)?;
    let import = [
        "import",
        "-m",
        "from a test",
        "-c",
        "CMD [\"cat\", \"/greeting\"]",
        "-c",
        "ENV PATH=/bin",
        "-",
        "imported:1",
    ];
    let id = docker_with_input(engine, &import, packed.finish()?)?.ok()?;
    ensure!(id.starts_with("sha256:"), "{id}");
    let said = docker(engine, &["run", "--rm", "imported:1"])?.ok()?;
    ensure!(said == "greeting", "{said}");
    let history = docker(engine, &["history", "--format", "{{.Comment}}", "imported:1"])?.ok()?;
    ensure!(history == "from a test", "{history}");
    let refused = docker_with_input(engine, &["import", "-", "imported:2"], b"no archive".to_vec())?;
    ensure!(refused.code != 0, "{refused:?}");
    let listed = docker(engine, &["images", "-q", "imported:2"])?.ok()?;
    ensure!(listed.is_empty(), "{listed}");
    docker(engine, &["rmi", "imported:1"])?.ok()?;
    remove(engine, "exported")
}

fn a_commit_keeps_changes_and_settings(engine: &Engine) -> Result<()> {
    ran(engine, "committed", "echo kept > /kept; rm /bin/ls; mkdir -p /etc/own")?;
    let commit = [
        "commit",
        "-a",
        "Ana",
        "-m",
        "a change",
        "-c",
        "CMD cat /kept",
        "-c",
        "LABEL made=here",
        "-c",
        "EXPOSE 80",
        "committed",
        "made:1",
    ];
    docker(engine, &commit)?.ok()?;
    let said = docker(engine, &["run", "--rm", "made:1"])?.ok()?;
    ensure!(said == "kept", "{said}");
    let gone = docker(engine, &["run", "--rm", "made:1", "sh", "-c", "test -e /bin/ls"])?;
    ensure!(gone.code == 1, "what was removed stays removed: {gone:?}");
    let shown = "{{.Author}}|{{.Comment}}|{{.Config.Labels.made}}|{{json .Config.ExposedPorts}}|{{len .RootFS.Layers}}";
    let shown = docker(engine, &["image", "inspect", "-f", shown, "made:1"])?.ok()?;
    ensure!(shown == "Ana|a change|here|{\"80/tcp\":{}}|2", "{shown}");
    let refused = docker(engine, &["commit", "-c", "RUN true", "committed"])?;
    refused.fails_with(1, "RUN is not a valid change command")?;
    // A running container goes on afterwards.
    docker(engine, &["run", "-d", "--name", "busy", IMAGE, "sh", "-c", "read forever < /dev/zero"])?.ok()?;
    docker(engine, &["commit", "busy", "made:2"])?.ok()?;
    let state = docker(engine, &["inspect", "-f", "{{.State.Paused}}", "busy"])?.ok()?;
    ensure!(state == "false", "{state}");
    remove(engine, "busy")?;
    remove(engine, "committed")?;
    docker(engine, &["rmi", "made:1", "made:2"])?.ok().map(drop)
}

fn a_commit_of_nothing_has_no_layer(engine: &Engine) -> Result<()> {
    ran(engine, "idle", "true")?;
    docker(engine, &["commit", "idle", "idle:1"])?.ok()?;
    let layers =
        docker(engine, &["image", "inspect", "-f", "{{len .RootFS.Layers}}", "idle:1", IMAGE])?.ok()?;
    let counts: Vec<&str> = layers.lines().collect();
    ensure!(counts.len() == 2 && counts[0] == counts[1], "{layers}");
    docker(engine, &["rmi", "idle:1"])?.ok()?;
    remove(engine, "idle")
}

fn saved_images_are_loaded_again_as_they_were(engine: &Engine) -> Result<()> {
    ran(engine, "saved", "echo saved > /saved")?;
    docker(engine, &["commit", "saved", "saved:1"])?.ok()?;
    docker(engine, &["tag", "saved:1", "saved:2"])?.ok()?;
    remove(engine, "saved")?;
    let archive = bytes(engine, &["save", "saved", IMAGE])?;
    ensure!(
        archive == bytes(engine, &["save", IMAGE, "saved:2", "saved:1"])?,
        "the same images, other bytes"
    );
    let listed = names(&archive)?;
    for name in ["index.json", "manifest.json", "oci-layout", "repositories"] {
        ensure!(listed.iter().any(|listed| listed == name), "no {name} in {listed:?}");
    }
    let id = docker(engine, &["image", "inspect", "-f", "{{.Id}}", "saved:1"])?.ok()?;
    docker(engine, &["rmi", "saved:1", "saved:2"])?.ok()?;
    let mut packed = zstd::stream::Encoder::new(Vec::new(), 1)?;
    packed.write_all(&archive)?;
    let loaded = docker_with_input(engine, &["load"], packed.finish()?)?.ok()?;
    ensure!(loaded.contains("Loaded image: saved:1") && loaded.contains("Loaded image: saved:2"), "{loaded}");
    let again = docker(engine, &["image", "inspect", "-f", "{{.Id}}", "saved:1"])?.ok()?;
    ensure!(again == id, "{again} {id}");
    let said = docker(engine, &["run", "--rm", "saved:2", "cat", "/saved"])?.ok()?;
    ensure!(said == "saved", "{said}");
    ensure!(archive == bytes(engine, &["save", "saved", IMAGE])?, "a load changed what is saved");
    docker(engine, &["save", "nowhere:1"])?.fails_with(1, "reference does not exist")?;
    docker(engine, &["rmi", "saved:1", "saved:2"])?.ok().map(drop)
}

fn an_archive_that_lies_is_refused(engine: &Engine) -> Result<()> {
    let archive = bytes(engine, &["save", IMAGE])?;
    let half = docker_with_input(engine, &["load"], archive[..archive.len() / 2].to_vec())?;
    ensure!(half.code != 0, "half an archive is none: {half:?}");
    let nothing = docker_with_input(engine, &["load"], b"no archive at all".to_vec())?;
    ensure!(nothing.code != 0, "{nothing:?}");
    docker(engine, &["run", "--rm", IMAGE, "true"])?.ok().map(drop)
}

/// Sources in a container or on this computer, and targets: new names, folders, files, links, and what is refused.
const COPIES: [(&str, &str); 13] = [
    ("tree", "new"),
    ("tree", "there"),
    ("tree/.", "there"),
    ("tree/.", "fresh"),
    ("tree", "taken"),
    ("alone", "renamed"),
    ("alone", "taken"),
    ("alone", "there"),
    ("alone", "to-there/deep"),
    ("alone", "absent/"),
    ("alone", "no/such"),
    ("link", "there"),
    ("nothing", "there"),
];
const TREE: &str = "mkdir -p tree/inner; echo text >tree/inner/file; chmod 700 tree/inner; echo alone >alone; ln -s tree link";
const TARGETS: &str = "mkdir there; echo taken >taken; ln -s there to-there";
const LISTING: &str = r#"find . | sort | while read name; do stat -c "%n %a %F %u" "$name"; cat "$name" 2>/dev/null || true; done"#;

fn our_copies_land_where_the_stock_clients_do(engine: &Engine) -> Result<()> {
    let script = format!("mkdir /source && cd /source && {TREE}; sleep 1000");
    docker(engine, &["run", "-d", "--init", "--name", "copied", IMAGE, "sh", "-c", &script])?.ok()?;
    let local = engine.path("copies");
    let shell = |folder: &std::path::Path, script: &str| {
        std::fs::create_dir_all(folder)?;
        let mut command = Command::new("sh");
        command.args(["-c", script]).current_dir(folder);
        tests_harness::run(command)?.ok()
    };
    shell(&local.join("source"), TREE)?;
    let mut seen = Vec::new();
    for client in ["docker", "engine"] {
        let copy = |arguments: &[&str]| match client {
            "docker" => docker(engine, arguments),
            _ => engine.engine(arguments),
        };
        let here = local.join(client);
        shell(&here, TARGETS)?;
        let inside = format!("mkdir /{client} && cd /{client} && {TARGETS}");
        engine.engine(["exec", "copied", "sh", "-c", &inside])?.ok()?;
        let mut codes = Vec::new();
        for (source, target) in COPIES {
            let (out, to) = (format!("copied:/source/{source}"), format!("{}/{target}", here.display()));
            let (from, into) =
                (format!("{}/source/{source}", local.display()), format!("copied:/{client}/{target}"));
            codes.push((source, target, copy(&["cp", &out, &to])?.code, copy(&["cp", &from, &into])?.code));
        }
        codes.push((
            "link",
            "-L",
            copy(&["cp", "-L", "copied:/source/link", &format!("{}/followed", here.display())])?.code,
            0,
        ));
        let inside = format!("cd /{client} && {LISTING}");
        let inside = engine.engine(["exec", "copied", "sh", "-c", &inside])?.ok()?;
        seen.push((codes, shell(&here, LISTING)?, inside));
    }
    let [theirs, ours] = seen.as_slice() else { bail!("two clients") };
    ensure!(theirs == ours, "theirs: {theirs:#?}\nours: {ours:#?}");
    // Through archives on the standard streams, and what no client does.
    let packed =
        engine.command(["cp", "copied:/source/tree", "-"]).output().context("cannot run engine")?.stdout;
    ensure!(names(&packed)?.iter().any(|name| name == "tree/inner/file"), "{:?}", names(&packed)?);
    engine.engine_with_input(["cp", "-", "copied:/engine/there"], packed)?.ok()?;
    engine.engine(["cp", "copied:/a", "copied:/b"])?.fails_with(1, "between containers is not supported")?;
    engine.engine(["cp", "a", "b"])?.fails_with(1, "at least one container")?;
    engine.engine(["cp", "nobody:/a", "b"])?.fails_with(1, "No such container: nobody")?;
    std::fs::remove_dir_all(&local)?;
    remove(engine, "copied")
}
