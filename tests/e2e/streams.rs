//! Standard streams across all walls: bulk both ways, half-closes, slow readers, many short connections.

use anyhow::{Context, Result, bail, ensure};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::time::Duration;
use tests_harness::{Engine, IMAGE, PATIENCE, Usage};

crate::scenarios![
    input_comes_back_after_the_half_close,
    bulk_goes_in,
    bulk_comes_out,
    a_slow_reader_gets_everything,
    a_reader_that_leaves_does_not_hang_the_engine,
    many_short_connections_leave_nothing_open,
    a_reset_by_the_client_ends_the_stream,
    a_reset_by_the_engine_reaches_the_client,
];

const MIB: usize = 1 << 20;
/// As much as the issue of a stalled stream needs to show.
const BULK: usize = 64 * MIB;

fn input_comes_back_after_the_half_close(engine: &Engine) -> Result<()> {
    let said = engine.engine_with_input(["run", "-i", "--rm", IMAGE, "cat"], "hi\n")?.ok()?;
    ensure!(said == "hi", "{said}");
    // The answer comes only after the input has ended.
    let said = engine
        .engine_with_input(["run", "-i", "--rm", IMAGE, "sh", "-c", "wc -c; echo done"], vec![b'x'; 100_000])?
        .ok()?;
    ensure!(said == "100000\ndone", "{said}");
    // Nobody's input is an empty one.
    let said = engine.engine(["run", "--rm", IMAGE, "sh", "-c", "wc -c"])?.ok()?;
    ensure!(said == "0", "{said}");
    Ok(())
}

fn bulk_goes_in(engine: &Engine) -> Result<()> {
    let said = engine.engine_with_input(["run", "-i", "--rm", IMAGE, "md5sum"], vec![0; BULK])?.ok()?;
    ensure!(said.starts_with("7f614da9329cd3aebf59b91aadc30bf0"), "{said}");
    Ok(())
}

fn bulk_comes_out(engine: &Engine) -> Result<()> {
    let mut child = engine
        .command(["run", "--rm", IMAGE, "dd", "if=/dev/zero", "bs=65536", "count=1024"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let mut output = child.stdout.take().context("no pipe")?;
    let received = std::io::copy(&mut output, &mut std::io::sink())?;
    ensure!(child.wait()?.success() && received == BULK as u64, "{received} bytes came out");
    Ok(())
}

fn a_slow_reader_gets_everything(engine: &Engine) -> Result<()> {
    let mut child = engine
        .command(["run", "--rm", IMAGE, "seq", "1", "400000"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let mut output = child.stdout.take().context("no pipe")?;
    let mut text = Vec::new();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let count = output.read(&mut buffer)?;
        if count == 0 {
            break;
        }
        text.extend_from_slice(&buffer[..count]);
        if text.len() < MIB {
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    ensure!(child.wait()?.success());
    let lines = text.split(|byte| *byte == b'\n').count() - 1;
    ensure!(lines == 400_000 && text.ends_with(b"400000\n"), "{lines} lines");
    Ok(())
}

fn a_reader_that_leaves_does_not_hang_the_engine(engine: &Engine) -> Result<()> {
    let mut child = engine
        .command([
            "run",
            "--rm",
            "--name",
            "gusher",
            IMAGE,
            "sh",
            "-c",
            "while :; do echo aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa; done",
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let mut byte = [0];
    child.stdout.take().context("no pipe")?.read_exact(&mut byte)?;
    child.kill()?;
    child.wait()?;
    engine.engine(["rm", "-f", "gusher"])?.ok()?;
    engine.engine(["run", "--rm", IMAGE, "true"])?.ok().map(drop)
}

fn many_short_connections_leave_nothing_open(engine: &Engine) -> Result<()> {
    let before = Usage::settled(engine)?;
    let workers: Vec<_> = (0..4)
        .map(|_| {
            let socket = engine.docker_socket();
            std::thread::spawn(move || (0..2500).try_for_each(|_| ping_at(&socket)))
        })
        .collect();
    for worker in workers {
        match worker.join() {
            Ok(result) => result?,
            Err(_) => bail!("a worker panicked"),
        }
    }
    before.comes_back(engine)
}

/// A client that goes with bytes unread: its end resets, and everything behind it lets go.
fn a_reset_by_the_client_ends_the_stream(engine: &Engine) -> Result<()> {
    let gusher = ["run", "-d", "--rm", "--name", "gusher", IMAGE, "sh", "-c", "while :; do seq 1 100; done"];
    engine.engine(gusher)?.ok()?;
    let before = Usage::settled(engine)?;
    for _ in 0..20 {
        let mut stream = UnixStream::connect(engine.docker_socket())?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream
            .write_all(b"GET /containers/gusher/logs?follow=1&stdout=1 HTTP/1.1\r\nHost: docker\r\n\r\n")?;
        let mut start = [0; 4096];
        stream.read_exact(&mut start)?;
        ensure!(start.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&start));
    }
    let back = before.comes_back(engine);
    engine.engine(["rm", "-f", "gusher"])?.ok()?;
    back
}

/// An engine that refuses a body it has not read: its end resets, and the client hears of it instead of writing for ever.
fn a_reset_by_the_engine_reaches_the_client(engine: &Engine) -> Result<()> {
    let before = Usage::settled(engine)?;
    for _ in 0..20 {
        let mut stream = UnixStream::connect(engine.docker_socket())?;
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.write_all(
            b"POST /containers/create HTTP/1.1\r\nHost: docker\r\nContent-Type: application/json\r\n\
              Content-Length: 1099511627776\r\n\r\n",
        )?;
        let blanks = [b' '; 64 * 1024];
        let refused = (0..BULK / blanks.len()).find_map(|_| stream.write_all(&blanks).err());
        let kind = refused.context("the engine took 64 MiB of blanks for a container")?.kind();
        ensure!(matches!(kind, ErrorKind::BrokenPipe | ErrorKind::ConnectionReset), "{kind}");
    }
    before.comes_back(engine)
}

fn ping_at(socket: &std::path::Path) -> Result<()> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"GET /_ping HTTP/1.1\r\nHost: docker\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    ensure!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("OK"), "{answer}");
    Ok(())
}
