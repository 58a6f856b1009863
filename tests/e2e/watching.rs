//! What is done to a shared folder on the computer is heard by who watches it in a container; and what is done to one from
//! inside stays in it.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use tests_harness::{Engine, wait_until};

use crate::inside::{WATCH, play};
use crate::volumes::{ok, same};

crate::scenarios![
    a_watcher_inside_hears_of_changes_outside,
    a_watcher_hears_of_the_first_change_after_it_started,
    a_storm_of_changes_ends_with_what_there_is,
];

fn folder(engine: &Engine, name: &str) -> Result<PathBuf> {
    let folder = engine.path(&format!("share-{name}"));
    fs::create_dir_all(&folder)?;
    Ok(folder)
}

/// Waits until the container has said all these lines.
fn hears(engine: &Engine, container: &str, lines: &[&str]) -> Result<()> {
    wait_until(&format!("{container} hears {lines:?}"), || {
        let said = ok(engine, &["logs", container])?;
        Ok(lines.iter().all(|wanted| said.lines().any(|line| line == *wanted)).then_some(()))
    })
}

fn a_watcher_inside_hears_of_changes_outside(engine: &Engine) -> Result<()> {
    let folder = folder(engine, "watched")?;
    fs::create_dir(folder.join("sub"))?;
    for name in ["page", "replaced"] {
        fs::write(folder.join(name), "old")?;
    }
    let words = [WATCH, "/app", "/app/sub"];
    play(engine, &["-d", "--name", "watcher"], &folder, &words)?;
    let hears = |lines: &[&str]| hears(engine, "watcher", lines);
    hears(&["READY"])?;

    fs::write(folder.join("new"), "data")?;
    hears(&["CREATE new", "CLOSE_WRITE new"])?;
    fs::write(folder.join("page"), "changed")?;
    let found = |name: &str| -> Result<(u64, i64, i64, i64, i64)> {
        let found = fs::metadata(folder.join(name))?;
        Ok((found.len(), found.mtime(), found.mtime_nsec(), found.ctime(), found.ctime_nsec()))
    };
    let before = found("page")?;
    hears(&["MODIFY page", "CLOSE_WRITE page"])?;
    ensure!(found("page")? == before, "telling of a change is no change");
    same(&ok(engine, &["exec", "watcher", "cat", "/app/page"])?, "changed")?;
    fs::rename(folder.join("new"), folder.join("sub/moved"))?;
    hears(&["MOVED_FROM new", "MOVED_TO moved"])?;
    fs::set_permissions(folder.join("sub/moved"), fs::Permissions::from_mode(0o600))?;
    hears(&["ATTRIB moved"])?;
    fs::remove_file(folder.join("sub/moved"))?;
    hears(&["DELETE moved"])?;
    // As editors do: a new file takes the place of the old one.
    fs::write(folder.join("replaced.new"), "newer")?;
    fs::rename(folder.join("replaced.new"), folder.join("replaced"))?;
    hears(&["MOVED_TO replaced"])?;
    same(&ok(engine, &["exec", "watcher", "cat", "/app/replaced"])?, "newer")?;
    fs::remove_dir(folder.join("sub"))?;
    hears(&["DELETE sub", "DELETE_SELF "])?;
    fs::create_dir(folder.join("folder"))?;
    hears(&["CREATE folder"])?;

    // What is done inside is heard once.
    ok(
        engine,
        &["exec", "watcher", "sh", "-c", "printf x > /app/own && mv /app/own /app/own2 && rm /app/own2"],
    )?;
    fs::write(folder.join("last"), "")?;
    hears(&["CREATE last"])?;
    let said = ok(engine, &["logs", "watcher"])?;
    for once in ["CREATE own", "MOVED_FROM own", "MOVED_TO own2", "DELETE own2"] {
        let count = said.lines().filter(|line| *line == once).count();
        ensure!(count == 1, "`{once}` {count} times in\n{said}");
    }
    let mut left: Vec<_> =
        fs::read_dir(&folder)?.map(|entry| Ok(entry?.file_name())).collect::<Result<_>>()?;
    left.sort();
    ensure!(left == ["folder", "last", "page", "replaced"], "{left:?}");
    ok(engine, &["rm", "-f", "watcher"]).map(drop)
}

/// Also when the last container that had a folder bound has only just ended.
fn a_watcher_hears_of_the_first_change_after_it_started(engine: &Engine) -> Result<()> {
    let folder = folder(engine, "first")?;
    for round in 0..4 {
        play(engine, &["-d", "--name", "first"], &folder, &[WATCH, "/app"])?;
        hears(engine, "first", &["READY"])?;
        let name = format!("file-{round}");
        fs::write(folder.join(&name), "")?;
        hears(engine, "first", &[&format!("CREATE {name}")])?;
        ok(engine, &["rm", "-f", "first"])?;
    }
    Ok(())
}

fn a_storm_of_changes_ends_with_what_there_is(engine: &Engine) -> Result<()> {
    const FILES: u64 = 200;
    let folder = folder(engine, "storm")?;
    play(engine, &["-d", "--name", "storm"], &folder, &[WATCH, "/app"])?;
    hears(engine, "storm", &["READY"])?;
    for number in 0..FILES {
        fs::write(folder.join(format!("file-{number}")), number.to_string())?;
        if number % 2 == 0 {
            // Some are gone before they are told of, some between that and the repeating of it.
            thread::sleep(Duration::from_millis(number % 31));
            fs::remove_file(folder.join(format!("file-{number}")))?;
        }
    }
    fs::write(folder.join("last"), "")?;
    hears(engine, "storm", &["CREATE last"])?;
    let said = ok(engine, &["logs", "storm"])?;
    for number in 0..FILES {
        let count = |kind: &str| said.lines().filter(|line| *line == format!("{kind} file-{number}")).count();
        let there = usize::from(number % 2 == 1);
        ensure!(count("CREATE") == count("DELETE") + there, "file-{number} in\n{said}");
    }
    ok(engine, &["rm", "-f", "storm"]).map(drop)
}
