//! Volumes and mounts, with the stock client.

use anyhow::{Result, bail, ensure};
use std::collections::HashSet;
use std::process::Command;
use tests_harness::{Engine, Finished, IMAGE, Layer, Stage, TestImage, Timed};

crate::scenarios![
    a_named_volume_outlives_its_containers,
    anonymous_volumes_go_with_their_container_when_asked,
    a_new_volume_is_filled_from_the_image,
    folders_are_bound_and_made_on_the_way,
    read_only_mounts_are_read_only,
    mounts_in_the_long_form_work,
    mistakes_in_mounts_are_named_and_leave_nothing,
    volumes_of_other_containers_are_taken_over,
    a_container_that_was_never_started_lends_its_volumes,
    memory_is_mounted_where_asked,
    volumes_in_use_stay_and_unused_ones_are_pruned,
    containers_are_found_by_their_volumes,
    mounts_are_passed_on_as_asked,
    a_folder_of_a_file_server_is_mounted_with_the_options_given,
];

pub(crate) fn docker(engine: &Engine, arguments: &[&str]) -> Result<Finished> {
    match engine.docker(arguments) {
        Some(command) => tests_harness::run(command),
        None => bail!(
            "there is no docker CLI on this computer: install one (`apt-get install docker.io` or newer) to run this check"
        ),
    }
}

/// What the client says when it succeeds.
pub(crate) fn ok(engine: &Engine, arguments: &[&str]) -> Result<String> {
    docker(engine, arguments)?.ok()
}

fn volumes(engine: &Engine) -> Result<HashSet<String>> {
    Ok(ok(engine, &["volume", "ls", "-q"])?.lines().map(str::to_owned).collect())
}

/// What a container of its own says with these mounts.
pub(crate) fn says(engine: &Engine, mounts: &[&str], script: &str) -> Result<String> {
    let arguments = [&["run", "--rm"], mounts, &[IMAGE, "sh", "-c", script]].concat();
    ok(engine, &arguments)
}

pub(crate) fn same(what: &str, wanted: &str) -> Result<()> {
    ensure!(what == wanted, "{what:?} instead of {wanted:?}");
    Ok(())
}

/// Where something is mounted, natively: in the machine nobody looks.
fn mount_points(engine: &Engine) -> Result<Vec<String>> {
    if engine.stage != Stage::Native {
        return Ok(Vec::new());
    }
    let table = std::fs::read_to_string("/proc/self/mountinfo")?;
    Ok(table.lines().filter_map(|line| Some(line.split(' ').nth(4)?.to_owned())).collect())
}

fn a_named_volume_outlives_its_containers(engine: &Engine) -> Result<()> {
    same(&ok(engine, &["volume", "create", "--label", "of=test", "notes"])?, "notes")?;
    same(&ok(engine, &["volume", "create", "notes"])?, "notes")?;
    says(engine, &["-v", "notes:/data"], "echo kept > /data/file")?;
    same(&says(engine, &["-v", "notes:/data"], "cat /data/file")?, "kept")?;
    let shown =
        ok(engine, &["volume", "inspect", "-f", "{{.Name}} {{.Driver}} {{.Scope}} {{.Labels}}", "notes"])?;
    same(&shown, "notes local local map[of:test]")?;
    let ours =
        engine.engine(["inspect", "--type", "volume", "-f", "{{.Name}} {{.Driver}}", "notes"])?.ok()?;
    same(&ours, "notes local")?;
    same(&ok(engine, &["volume", "ls", "-q", "-f", "label=of=test"])?, "notes")?;
    // One that is not there yet is made.
    says(engine, &["-v", "by-the-way:/data"], "touch /data/file")?;
    same(&ok(engine, &["volume", "rm", "notes", "by-the-way"])?, "notes\nby-the-way")?;
    docker(engine, &["volume", "inspect", "notes"])?.fails_with(1, "no such volume")?;
    docker(engine, &["volume", "rm", "notes"])?.fails_with(1, "no such volume")?;
    docker(engine, &["volume", "create", "x"])?.fails_with(1, "volume name is too short")?;
    docker(engine, &["volume", "create", "-d", "nfs", "far"])?.fails_with(1, "nfs")?;
    ensure!(!volumes(engine)?.contains("far"));
    Ok(())
}

fn anonymous_volumes_go_with_their_container_when_asked(engine: &Engine) -> Result<()> {
    let before = volumes(engine)?;
    says(engine, &["-v", "/data", "-v", "stays:/named"], "touch /data/a /named/b")?;
    let mut with_the_named = before.clone();
    with_the_named.insert("stays".to_owned());
    ensure!(volumes(engine)? == with_the_named, "--rm: {:?}", volumes(engine)?);
    for (force, left) in [(&["rm"][..], 1), (&["rm", "-v"], 0)] {
        ok(engine, &["run", "--name", "anonymous", "-v", "/data", "-v", "stays:/named", IMAGE, "true"])?;
        ok(engine, &[force, &["anonymous"]].concat())?;
        let now = volumes(engine)?;
        let new: Vec<&String> = now.difference(&with_the_named).collect();
        ensure!(new.len() == left, "{force:?}: {new:?}");
        for name in new {
            ok(engine, &["volume", "rm", name])?;
        }
    }
    ok(engine, &["volume", "rm", "stays"]).map(drop)
}

/// An image with files, owners and modes in a folder that is to be a volume.
fn image_with_files(engine: &Engine) -> Result<()> {
    let image = TestImage::new(vec![
        Layer::busybox()?,
        Layer::files([("data/deep/file", b"of the image\n".to_vec())])?,
    ]);
    engine.load(&image, "with-files")
}

fn a_new_volume_is_filled_from_the_image(engine: &Engine) -> Result<()> {
    image_with_files(engine)?;
    let see = |mount: &str| -> Result<String> {
        ok(engine, &["run", "--rm", "-v", mount, "with-files", "sh", "-c", "cat /data/deep/file"])
    };
    same(&see("filled:/data")?, "of the image")?;
    same(
        &says(engine, &["-v", "filled:/x"], "cat /x/deep/file; rm -r /x/deep; touch /x/own")?,
        "of the image",
    )?;
    // One that has something is left as it is; so is one that is not to be filled.
    ensure!(see("filled:/data").is_err());
    ensure!(see("not-filled:/data:nocopy").is_err());
    let long = "type=volume,source=not-filled-either,target=/data,volume-nocopy";
    same(&ok(engine, &["run", "--rm", "--mount", long, "with-files", "ls", "/data"])?, "")?;
    ok(engine, &["volume", "rm", "filled", "not-filled", "not-filled-either"])?;
    ok(engine, &["rmi", "with-files"]).map(drop)
}

fn folders_are_bound_and_made_on_the_way(engine: &Engine) -> Result<()> {
    let folder = format!("/tmp/engine-test-{}", std::process::id());
    let bind = format!("{folder}/a/b:/there");
    same(&says(engine, &["-v", &bind], "echo bound > /there/file; stat -c %a /there")?, "755")?;
    same(&says(engine, &["-v", &format!("{folder}:/up")], "cat /up/a/b/file")?, "bound")?;
    // A file, and the long form, which makes nothing.
    let file = format!("{folder}/a/b/file:/etc/one:ro");
    same(&says(engine, &["-v", &file], "cat /etc/one; echo x > /etc/one || true")?, "bound")?;
    let missing = format!("type=bind,source={folder}/none,target=/x");
    docker(engine, &["run", "--rm", "--mount", &missing, IMAGE, "true"])?
        .fails_with(125, &format!("bind source path does not exist: {folder}/none"))?;
    says(engine, &["-v", "/tmp:/up"], &format!("rm -r /up/{}", &folder["/tmp/".len()..])).map(drop)
}

fn read_only_mounts_are_read_only(engine: &Engine) -> Result<()> {
    says(engine, &["-v", "fixed:/data"], "echo once > /data/file")?;
    for mount in
        [&["-v", "fixed:/data:ro"][..], &["--mount", "type=volume,source=fixed,target=/data,readonly"]]
    {
        let said = says(engine, mount, "cat /data/file; touch /data/other 2>&1 || true")?;
        ensure!(said.starts_with("once\n") && said.contains("Read-only file system"), "{mount:?}: {said}");
    }
    // Written to although the root is not.
    says(engine, &["--read-only", "-v", "fixed:/data"], "touch /data/other && ! touch /other 2>/dev/null")?;
    ok(engine, &["volume", "rm", "fixed"]).map(drop)
}

fn mounts_in_the_long_form_work(engine: &Engine) -> Result<()> {
    let labelled = "type=volume,source=long,target=/data,volume-label=of=long";
    says(engine, &["--mount", labelled], "mkdir -p /data/a/b; echo deep > /data/a/b/file; ln -s / /data/up")?;
    same(&ok(engine, &["volume", "inspect", "-f", "{{.Labels.of}}", "long"])?, "long")?;
    let below = "type=volume,source=long,target=/data,volume-subpath=a/b";
    same(&says(engine, &["--mount", below], "ls /data; cat /data/file")?, "file\ndeep")?;
    // The client makes 127 of a file that is not there, whichever it is.
    for (path, code, part) in [
        ("none", 127, "none: no such file or directory"),
        ("up", 125, "path concatenation escapes the base directory"),
        ("../long", 125, "subpath must be a relative path within the volume"),
    ] {
        let wrong = format!("type=volume,source=long,target=/data,volume-subpath={path}");
        let before = mount_points(engine)?;
        let run = docker(engine, &["run", "--rm", "--mount", &wrong, IMAGE, "true"])?;
        ensure!(run.code == code && run.stderr.contains(part), "{path}: {run:?}");
        ensure!(mount_points(engine)? == before, "{path}: {:?}", mount_points(engine)?);
    }
    ok(engine, &["create", "--name", "shown", "-v", "long:/z", "--mount", below, IMAGE, "true"])?;
    let shown = ok(
        engine,
        &["inspect", "-f", "{{range .Mounts}}{{.Type}} {{.Name}} {{.Destination}} {{.RW}};{{end}}", "shown"],
    )?;
    let mut shown: Vec<&str> = shown.split_terminator(';').collect();
    shown.sort_unstable();
    ensure!(shown == ["volume long /data true", "volume long /z true"], "{shown:?}");
    ok(engine, &["rm", "shown"])?;
    ok(engine, &["volume", "rm", "long"]).map(drop)
}

fn mistakes_in_mounts_are_named_and_leave_nothing(engine: &Engine) -> Result<()> {
    let (before, points) = (volumes(engine)?, mount_points(engine)?);
    let containers = ok(engine, &["ps", "-aq"])?;
    for (arguments, part) in [
        (&["-v", "relative/path:/x"][..], "includes invalid characters for a local volume name"),
        (&["-v", "name:/"], "destination can't be '/'"),
        (&["-v", "name:relative"], "mount path must be absolute"),
        (&["-v", "name:/x:sideways"], "invalid mode: sideways"),
        (&["-v", "one:/x", "-v", "two:/x"], "Duplicate mount point: /x"),
        (
            &["--mount", "type=bind,source=/none/at/all,target=/x"],
            "bind source path does not exist: /none/at/all",
        ),
        (&["--mount", "type=volume,source=name,target=relative"], "mount path must be absolute"),
        (&["--mount", "type=volume,source=name,target=/x,volume-driver=nfs"], "nfs"),
        (&["--volumes-from", "nobody"], "No such container: nobody"),
        (&["--volumes-from", ""], "empty"),
        (&["--tmpfs", "/x:size=nonsense"], "size"),
    ] {
        let run =
            docker(engine, &[&["run", "--rm", "--pull", "never"], arguments, &[IMAGE, "true"]].concat())?;
        ensure!(run.code == 125 && run.stderr.contains(part), "{arguments:?}: {run:?}");
    }
    // A start that fails after its mounts were made.
    docker(engine, &["run", "--rm", "-v", "/x", "--tmpfs", "/y", IMAGE, "no-such-program"])?.exits(127)?;
    ensure!(ok(engine, &["ps", "-aq"])? == containers);
    ensure!(mount_points(engine)? == points, "{:?}", mount_points(engine)?);
    let left: Vec<String> = volumes(engine)?.difference(&before).cloned().collect();
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}

fn volumes_of_other_containers_are_taken_over(engine: &Engine) -> Result<()> {
    ok(
        engine,
        &["run", "-d", "--name", "lender", "-v", "lent:/lent", "-v", "/anonymous", IMAGE, "sleep", "1000"],
    )?;
    ok(engine, &["exec", "lender", "sh", "-c", "echo one > /lent/file; echo two > /anonymous/file"])?;
    let from = |mode: &str, script: &str| says(engine, &["--volumes-from", &format!("lender{mode}")], script);
    same(&from("", "cat /lent/file /anonymous/file; echo three > /anonymous/file")?, "one\ntwo")?;
    // Its anonymous volume has not gone with the container that borrowed it.
    same(&ok(engine, &["exec", "lender", "cat", "/anonymous/file"])?, "three")?;
    let said = from(":ro", "touch /lent/x 2>&1 || true")?;
    ensure!(said.contains("Read-only file system"), "{said}");
    // One's own mount wins, but not a place without a source.
    let own = |mount: &str| {
        says(engine, &["--volumes-from", "lender", "-v", mount], "ls /lent; cat /anonymous/file")
    };
    same(&own("own:/lent")?, "three")?;
    same(&own("/lent")?, "file\nthree")?;
    ok(engine, &["rm", "-f", "-v", "lender"])?;
    ok(engine, &["volume", "rm", "lent", "own"]).map(drop)
}

fn a_container_that_was_never_started_lends_its_volumes(engine: &Engine) -> Result<()> {
    image_with_files(engine)?;
    ok(engine, &["create", "--name", "holder", "-v", "/data", "with-files", "true"])?;
    same(
        &says(engine, &["--volumes-from", "holder"], "cat /data/deep/file; echo more > /data/more")?,
        "of the image",
    )?;
    same(&says(engine, &["--volumes-from", "holder"], "cat /data/more")?, "more")?;
    let before = volumes(engine)?.len();
    ok(engine, &["rm", "-v", "holder"])?;
    ensure!(volumes(engine)?.len() + 1 == before, "its anonymous volume goes with it");
    ok(engine, &["rmi", "with-files"]).map(drop)
}

fn memory_is_mounted_where_asked(engine: &Engine) -> Result<()> {
    let table = "grep ' /scratch ' /proc/self/mounts";
    let plain = says(engine, &["--tmpfs", "/scratch"], table)?;
    for word in ["tmpfs /scratch tmpfs", "nosuid", "nodev", "noexec"] {
        ensure!(plain.contains(word), "{plain}");
    }
    let sized = says(engine, &["--tmpfs", "/scratch:size=1m,mode=700,exec"], table)?;
    ensure!(
        sized.contains("size=1024k") && sized.contains("mode=700") && !sized.contains("noexec"),
        "{sized}"
    );
    let long = ["--mount", "type=tmpfs,target=/scratch,tmpfs-size=2m,tmpfs-mode=1770"];
    let long = says(engine, &long, &format!("{table}; stat -c %a /scratch"))?;
    ensure!(long.contains("size=2048k") && long.ends_with("1770"), "{long}");
    // Full is full, and gone is gone.
    let full = "dd if=/dev/zero of=/scratch/file bs=64k count=32 2>&1 || true";
    let said = says(engine, &["--tmpfs", "/scratch:size=1m"], full)?;
    ensure!(said.contains("No space left on device"), "{said}");
    Ok(())
}

fn volumes_in_use_stay_and_unused_ones_are_pruned(engine: &Engine) -> Result<()> {
    let id = ok(engine, &["create", "--name", "user", "-v", "used:/a", "-v", "/b", IMAGE, "true"])?;
    let refused = docker(engine, &["volume", "rm", "used"])?;
    refused.fails_with(1, &format!("remove used: volume is in use - [{id}]"))?;
    docker(engine, &["volume", "rm", "-f", "used"])?.fails_with(1, "volume is in use")?;
    ok(engine, &["volume", "create", "idle"])?;
    ok(engine, &["volume", "create", "--label", "keep", "labelled"])?;
    let nameless = ok(engine, &["volume", "create"])?;
    // Without more only those without a name.
    let said = ok(engine, &["volume", "prune", "-f"])?;
    ensure!(said.contains(&nameless) && !said.contains("idle"), "{said}");
    let said = ok(engine, &["volume", "prune", "-f", "-a", "--filter", "label!=keep"])?;
    ensure!(said.contains("idle") && !said.contains("used") && !said.contains("labelled"), "{said}");
    ensure!(volumes(engine)?.contains("used") && volumes(engine)?.contains("labelled"));
    ok(engine, &["rm", "-v", "user"])?;
    ok(engine, &["volume", "rm", "used", "labelled"])?;
    // Not there, and forced: fine.
    ok(engine, &["volume", "rm", "-f", "used"]).map(drop)
}

fn containers_are_found_by_their_volumes(engine: &Engine) -> Result<()> {
    ok(engine, &["create", "--name", "finder", "-v", "found:/place", IMAGE, "true"])?;
    for (filter, found) in [("found", "finder"), ("/place", "finder"), ("foun", ""), ("/other", "")] {
        let filter = format!("volume={filter}");
        same(&ok(engine, &["ps", "-a", "--format", "{{.Names}}", "--filter", &filter])?, found)?;
    }
    same(&ok(engine, &["ps", "-a", "--format", "{{.Mounts}}", "--filter", "name=finder"])?, "found")?;
    let dangling = |value: &str| ok(engine, &["volume", "ls", "-q", "-f", &format!("dangling={value}")]);
    ensure!(dangling("false")?.contains("found") && !dangling("true")?.contains("found"));
    ok(engine, &["rm", "finder"])?;
    ensure!(dangling("true")?.contains("found"));
    ok(engine, &["volume", "rm", "found"]).map(drop)
}

/// With a folder on a mount that is shared: what is mounted in it later, on either side.
fn mounts_are_passed_on_as_asked(engine: &Engine) -> Result<()> {
    if engine.stage != Stage::Native {
        // What is mounted in the machine cannot be made shared from here.
        let private = docker(engine, &["run", "--rm", "-v", "/tmp:/m:rshared", IMAGE, "true"])?;
        ensure!(private.code == 0 || private.stderr.contains("is not a shared mount"), "{private:?}");
        return Ok(());
    }
    let folder = engine.path("shared-mount");
    std::fs::create_dir_all(&folder)?;
    let mount = |arguments: &[&str]| -> Result<()> {
        let mut command = Command::new("mount");
        command.args(arguments);
        Timed::new(command).run()?.ok().map(drop)
    };
    let path = folder.display().to_string();
    mount(&["-t", "tmpfs", "none", &path])?;
    let result = (|| {
        docker(engine, &["run", "--rm", "-v", &format!("{path}:/m:rshared"), IMAGE, "true"])?
            .fails_with(125, "it is not a shared mount")?;
        docker(engine, &["run", "--rm", "-v", &format!("{path}:/m:slave"), IMAGE, "true"])?
            .fails_with(125, "it is not a shared or slave mount")?;
        mount(&["--make-shared", &path])?;
        std::fs::create_dir_all(folder.join("theirs"))?;
        std::fs::create_dir_all(folder.join("ours"))?;
        for (mode, outward, inward) in [
            ("", false, false),
            (":rprivate", false, false),
            (":rslave", false, true),
            (":rshared", true, true),
        ] {
            let bind = format!("{path}:/m{mode}");
            let script = "mount -t tmpfs none /m/theirs && touch /m/theirs/mounted && sleep 1000";
            ok(
                engine,
                &["run", "-d", "--name", "passer", "--privileged", "-v", &bind, IMAGE, "sh", "-c", script],
            )?;
            let inside = |script: &str| ok(engine, &["exec", "passer", "sh", "-c", script]);
            inside("until test -e /m/theirs/mounted; do sleep 0.1; done")?;
            let passed_out = folder.join("theirs/mounted").exists();
            let ours = folder.join("ours").display().to_string();
            mount(&["-t", "tmpfs", "none", &ours])?;
            let passed_in = inside("grep -c ' /m/ours ' /proc/self/mounts || true")? == "1";
            let mut command = Command::new("umount");
            command.arg(&ours);
            Timed::new(command).run()?.ok()?;
            if passed_out {
                inside("busybox umount /m/theirs")?;
            }
            ok(engine, &["rm", "-f", "passer"])?;
            ensure!(
                (passed_out, passed_in) == (outward, inward),
                "{mode:?}: {passed_out} out, {passed_in} in"
            );
        }
        Ok(())
    })();
    let mut command = Command::new("umount");
    command.args(["-R", "-l", &path]);
    Timed::new(command).run()?.ok()?;
    result
}

/// No server is here to mount from: what the kernel says shows that it was asked for the right thing.
fn a_folder_of_a_file_server_is_mounted_with_the_options_given(engine: &Engine) -> Result<()> {
    let closed = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let (server, why) = match engine.stage {
        Stage::Native => ("127.0.0.1", &["connection refused", "no such device"][..]),
        // The machine brings the file system along, and loads it for this.
        Stage::Qemu | Stage::Kvm => ("198.18.0.254", &["connection refused"][..]),
    };
    let options = format!("o=addr={server},vers=4.2,port={closed},soft,timeo=10,retrans=1");
    let create =
        ["volume", "create", "--opt", "type=nfs", "--opt", "device=:/share", "--opt", &options, "shared"];
    same(&ok(engine, &create)?, "shared")?;
    let run = docker(engine, &["run", "--rm", "-v", "shared:/share", IMAGE, "true"])?;
    let said = run.stderr.to_lowercase();
    ensure!(run.code == 125 && why.iter().any(|why| said.contains(why)), "{said}");
    ensure!(said.contains(":/share") && said.contains(&format!("port={closed}")), "{said}");
    ok(engine, &["volume", "rm", "shared"]).map(drop)
}
