//! Folders of one's own in containers: natively the very folder, in the machine a shared one. Nobody should see a difference.

use anyhow::{Context, Result, anyhow, ensure};
use rustix::fs::{CWD, RenameFlags};
use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tests_harness::{Engine, IMAGE, Stage};

use crate::inside::{ATTACK, READY, play};
use crate::volumes::{docker, ok, same, says};
use crate::work;

crate::scenarios![
    each_side_sees_what_the_other_writes,
    an_edit_is_seen_by_a_container_that_runs,
    files_keep_their_kinds_links_and_names,
    what_is_made_inside_is_the_users_outside,
    a_share_that_is_read_only_is_not_written,
    the_host_path_is_what_inspect_shows,
    links_do_not_lead_out_of_a_share,
    races_do_not_lead_out_of_a_share,
    random_work_on_a_file_leaves_what_it_should,
    random_work_on_a_tree_ends_as_on_a_disk,
    what_is_not_shared_is_refused_with_the_cure,
    the_socket_of_the_engine_can_be_bound,
];

/// A folder of ours to share.
fn folder(engine: &Engine, name: &str) -> Result<PathBuf> {
    let folder = engine.path(&format!("share-{name}"));
    fs::create_dir_all(&folder)?;
    Ok(folder)
}

fn bind(folder: &std::path::Path) -> String {
    format!("{}:/app", folder.display())
}

fn each_side_sees_what_the_other_writes(engine: &Engine) -> Result<()> {
    let folder = folder(engine, "both")?;
    fs::write(folder.join("from-outside"), "hello")?;
    let script = "cat /app/from-outside && printf world > /app/from-inside && ls /app";
    same(&says(engine, &["-v", &bind(&folder)], script)?, "hellofrom-inside\nfrom-outside")?;
    same(&fs::read_to_string(folder.join("from-inside"))?, "world")?;
    // A single file, too; what replaces its content shows.
    let file = format!("{}:/etc/one", folder.join("from-outside").display());
    same(&says(engine, &["-v", &file], "cat /etc/one; printf changed > /etc/one")?, "hello")?;
    same(&fs::read_to_string(folder.join("from-outside"))?, "changed")?;
    // Larger than any cache on the way, and whole.
    let large: Vec<u8> = (0..3_000_000u32).flat_map(|number| number.to_le_bytes()).collect();
    fs::write(folder.join("large"), &large)?;
    says(engine, &["-v", &bind(&folder)], "cp /app/large /app/copy && cmp /app/large /app/copy")?;
    ensure!(fs::read(folder.join("copy"))? == large, "the copy differs");
    Ok(())
}

fn an_edit_is_seen_by_a_container_that_runs(engine: &Engine) -> Result<()> {
    let folder = folder(engine, "edit")?;
    fs::write(folder.join("page"), "one")?;
    ok(engine, &["run", "-d", "--name", "server", "-v", &bind(&folder), IMAGE, "sleep", "1000"])?;
    let inside = |script: &str| ok(engine, &["exec", "server", "sh", "-c", script]);
    same(&inside("cat /app/page")?, "one")?;
    fs::write(folder.join("page"), "three")?;
    inside("until test \"$(cat /app/page)\" = three; do sleep 0.1; done")?;
    // As editors do: a new file takes the place of the old one.
    fs::write(folder.join("page.new"), "and four")?;
    fs::rename(folder.join("page.new"), folder.join("page"))?;
    inside("until test \"$(cat /app/page)\" = 'and four'; do sleep 0.1; done")?;
    fs::remove_file(folder.join("page"))?;
    inside("while test -e /app/page; do sleep 0.1; done")?;
    fs::create_dir(folder.join("new"))?;
    inside("until test -d /app/new; do sleep 0.1; done")?;
    ok(engine, &["rm", "-f", "server"]).map(drop)
}

fn files_keep_their_kinds_links_and_names(engine: &Engine) -> Result<()> {
    let folder = folder(engine, "kinds")?;
    let script = "cd /app && printf x > a && ln a b && ln -s a c && mkdir -p d/e && mkfifo p && printf u > Straße && \
                  printf l > straße && mv d/e d/f && exec 3<>a && rm a && printf more >&3 && cat b && \
                  stat -c '%h %s' b && rmdir d/f";
    same(&says(engine, &["-v", &bind(&folder)], script)?, "more1 4")?;
    ensure!(!folder.join("a").exists() && folder.join("d").is_dir() && !folder.join("d/f").exists());
    same(&fs::read_to_string(folder.join("b"))?, "more")?;
    same(&fs::read_link(folder.join("c"))?.display().to_string(), "a")?;
    same(&fs::read_to_string(folder.join("Straße"))?, "u")?;
    same(&fs::read_to_string(folder.join("straße"))?, "l")
}

fn what_is_made_inside_is_the_users_outside(engine: &Engine) -> Result<()> {
    let folder = folder(engine, "owner")?;
    let script = "umask 022; touch /app/file && mkdir /app/sub && stat -c '%u %a' /app/file /app/sub";
    same(&says(engine, &["-v", &bind(&folder)], script)?, "0 644\n0 755")?;
    let own = fs::metadata(&folder)?.uid();
    for name in ["file", "sub"] {
        let owner = fs::metadata(folder.join(name))?.uid();
        ensure!(owner == own, "{name} belongs to {owner} instead of {own}");
    }
    // Inside it is whose it was given to.
    says(engine, &["-v", &bind(&folder)], "chown 1234:99 /app/file && chmod 640 /app/file")?;
    same(&says(engine, &["-v", &bind(&folder)], "stat -c '%u:%g %a' /app/file")?, "1234:99 640")
}

fn a_share_that_is_read_only_is_not_written(engine: &Engine) -> Result<()> {
    let folder = folder(engine, "read-only")?;
    fs::write(folder.join("file"), "kept")?;
    let read_only = format!("{}:ro", bind(&folder));
    let script = "cat /app/file; touch /app/new 2>/dev/null || printf ' no'; printf x 2>/dev/null > /app/file || printf ' no'";
    same(&says(engine, &["-v", &read_only], script)?, "kept no no")?;
    same(&fs::read_to_string(folder.join("file"))?, "kept")
}

fn the_host_path_is_what_inspect_shows(engine: &Engine) -> Result<()> {
    let folder = folder(engine, "shown")?;
    ok(engine, &["create", "--name", "shown", "-v", &bind(&folder), IMAGE, "true"])?;
    let source = ok(engine, &["inspect", "-f", "{{(index .Mounts 0).Source}}", "shown"])?;
    ok(engine, &["rm", "shown"])?;
    same(&source, &folder.display().to_string())
}

fn links_do_not_lead_out_of_a_share(engine: &Engine) -> Result<()> {
    let (inside, outside) = (folder(engine, "in")?, folder(engine, "out")?);
    fs::write(outside.join("canary"), "secret")?;
    symlink(outside.join("canary"), inside.join("absolute"))?;
    symlink("../share-out/canary", inside.join("relative"))?;
    let script = "for link in absolute relative; do cat /app/$link 2>/dev/null && echo leaked; \
                  printf x 2>/dev/null > /app/$link; done; ln -s / /app/root; cat /app/root/app/root/proc/1/comm >/dev/null";
    let said = says(engine, &["-v", &bind(&inside)], script)?;
    ensure!(!said.contains("leaked"), "{said:?}");
    same(&fs::read_to_string(outside.join("canary"))?, "secret")
}

/// A folder and a link out change places on both sides at once.
fn races_do_not_lead_out_of_a_share(engine: &Engine) -> Result<()> {
    let (inside, outside) = (folder(engine, "attacked")?, engine.path("share-attacked-out"));
    fs::create_dir_all(&outside)?;
    fs::write(outside.join("canary"), "secret")?;
    // The same name beside the share for `..`.
    let beside = engine.path("out");
    symlink(&outside, &beside)?;
    symlink(&outside, inside.join("hosts"))?;
    let ended = AtomicBool::new(false);
    let exchanged = std::thread::scope(|scope| {
        let exchanging = scope.spawn(|| {
            let (way, link, mut count) = (inside.join("way"), inside.join("hosts"), 0);
            while !ended.load(Ordering::Relaxed) {
                if inside.join(READY).exists() {
                    let flags = RenameFlags::EXCHANGE;
                    count += usize::from(rustix::fs::renameat_with(CWD, &way, CWD, &link, flags).is_ok());
                }
                std::thread::sleep(Duration::from_micros(300));
            }
            count
        });
        let attacked = play(engine, &["--rm"], &inside, &[ATTACK, &outside.display().to_string()]);
        ended.store(true, Ordering::Relaxed);
        let exchanged = exchanging.join().map_err(|_| anyhow!("the other side panicked"))?;
        attacked.map(|_| exchanged)
    })?;
    ensure!(exchanged > 0, "nothing changed places outside");
    same(&fs::read_to_string(outside.join("canary"))?, "secret")?;
    let names: Vec<_> = fs::read_dir(&outside)?.collect();
    ensure!(names.len() == 1, "{names:?}");
    fs::remove_file(beside)?;
    Ok(())
}

fn random_work_on_a_file_leaves_what_it_should(engine: &Engine) -> Result<()> {
    let folder = folder(engine, "random")?;
    play(engine, &["--rm"], &folder, &[work::FILE, "/app/file", "4711"])?;
    let (file, model) = (fs::read(folder.join("file"))?, fs::read(folder.join("file.model"))?);
    ensure!(file == model, "outside, the file is another than inside");
    Ok(())
}

fn random_work_on_a_tree_ends_as_on_a_disk(engine: &Engine) -> Result<()> {
    let folder = folder(engine, "tree")?;
    let said =
        play(engine, &["--rm", "--tmpfs", "/plain"], &folder, &[work::TREE, "/app", "/plain", "4711"])?;
    same(&work::tree(&folder)?, &said)
}

fn what_is_not_shared_is_refused_with_the_cure(engine: &Engine) -> Result<()> {
    if engine.stage == Stage::Native {
        // Nothing lies between the engine and the folders.
        return Ok(());
    }
    let refused = docker(engine, &["run", "--rm", "-v", "/usr/share:/x", IMAGE, "true"])?;
    refused.fails_with(125, "`/usr/share` is not shared with the machine")?;
    let folder = folder(engine, "way-out")?;
    symlink("/usr/share", folder.join("link"))?;
    let bind = format!("{}:/x", folder.join("link").display());
    docker(engine, &["run", "--rm", "-v", &bind, IMAGE, "true"])?
        .fails_with(125, "`paths` below `[shares]`")?;
    ensure!(ok(engine, &["ps", "-aq"])?.is_empty(), "a refused container is left");
    Ok(())
}

fn the_socket_of_the_engine_can_be_bound(engine: &Engine) -> Result<()> {
    let source = match engine.stage {
        Stage::Native => engine.docker_socket(),
        // Clients mean the engine's, wherever it is.
        _ => "/var/run/docker.sock".into(),
    };
    let bind = format!("{}:/var/run/docker.sock", source.display());
    let said = says(engine, &["-v", &bind], "test -S /var/run/docker.sock && echo socket");
    same(&said.context("the engine's socket is not there")?, "socket")
}
