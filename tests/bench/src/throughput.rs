//! Bytes a second across the wall, through the NAT, and from a registry.

use crate::boot::mib;
use crate::figure;
use anyhow::{Context, Result, ensure};
use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::Stdio;
use std::time::Instant;
use tests_harness::{Engine, IMAGE, Layer, TestImage};

const BULK: u64 = 256 << 20;
/// Bytes of text in the file that is printed four times.
const MEASURED_TEXT: usize = 16 << 20;

pub(crate) fn vsock(engine: &Engine) -> Result<()> {
    let start = Instant::now();
    let mut child = engine
        .command(["run", "-i", "--rm", IMAGE, "sh", "-c", "cat > /dev/null"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()?;
    let mut input = child.stdin.take().context("no pipe")?;
    std::io::copy(&mut std::io::repeat(0).take(BULK), &mut input)?;
    drop(input);
    ensure!(child.wait()?.success());
    figure("host to container (stdin, start included)", mib(BULK) / start.elapsed().as_secs_f64(), "MiB/s");
    // Lines of text, as programs print them: the json-file log is part of the path.
    let text =
        "a line of sixty-four bytes, which is about what programs print\n\n".repeat(MEASURED_TEXT / 64);
    let image = TestImage::new(vec![Layer::busybox()?, Layer::files([("text", text.into_bytes())])?]);
    engine.load(&image, "text:1")?;
    let start = Instant::now();
    let mut child = engine
        .command(["run", "--rm", "text:1", "cat", "/text", "/text", "/text", "/text"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let received = std::io::copy(&mut child.stdout.take().context("no pipe")?, &mut std::io::sink())?;
    ensure!(child.wait()?.success() && received == 4 * MEASURED_TEXT as u64, "{received} bytes came out");
    figure(
        "container to host (stdout, start included)",
        mib(received) / start.elapsed().as_secs_f64(),
        "MiB/s",
    );
    engine.engine(["rmi", "text:1"])?.ok().map(drop)
}

pub(crate) fn nat(engine: &Engine) -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port().to_string();
    let count = format!("count={}", BULK >> 20);
    // `nc -e` gives the socket to `dd`: nc itself copies a kilobyte at a time.
    let address = engine.outside_address();
    let sending = engine.spawn([
        "run",
        "--rm",
        IMAGE,
        "nc",
        address,
        &port,
        "-e",
        "dd",
        "if=/dev/zero",
        "bs=1M",
        &count,
    ])?;
    let (mut stream, _) = listener.accept()?;
    let start = Instant::now();
    let mut received = 0;
    let mut buffer = vec![0; 256 * 1024];
    while received < BULK {
        match stream.read(&mut buffer)? {
            0 => break,
            count => received += count as u64,
        }
    }
    figure("container to host through the NAT", mib(received) / start.elapsed().as_secs_f64(), "MiB/s");
    drop(stream);
    sending.finish()?;
    let receiving =
        engine.spawn(["run", "--rm", IMAGE, "nc", address, &port, "-e", "sh", "-c", "wc -c >&2"])?;
    let (mut stream, _) = listener.accept()?;
    let start = Instant::now();
    let zeroes = vec![0; 1 << 20];
    for _ in 0..BULK >> 20 {
        stream.write_all(&zeroes)?;
    }
    drop(stream);
    let received = receiving.finish()?;
    figure("host to container through the NAT", mib(BULK) / start.elapsed().as_secs_f64(), "MiB/s");
    ensure!(received.stderr.trim() == BULK.to_string(), "{received:?}");
    Ok(())
}

/// About 200 MiB in five layers that hardly compress, so that the figure is about moving and unpacking them.
pub(crate) fn pull(engine: &Engine) -> Result<()> {
    let mut layers = vec![Layer::busybox()?];
    for seed in 1..=4 {
        layers.push(Layer::noise(&format!("noise{seed}"), 48 << 20, seed)?);
    }
    engine.registry().push(&TestImage::new(layers), "large", "1")?;
    let name = format!("{}/large:1", engine.registry_name());
    let start = Instant::now();
    engine.engine(["pull", "-q", &name])?.ok()?;
    let seconds = start.elapsed().as_secs_f64();
    figure("pull of 192 MiB in four layers", seconds, "s");
    figure("the same", 192.0 / seconds, "MiB/s");
    engine.engine(["rmi", &name])?.ok().map(drop)
}
