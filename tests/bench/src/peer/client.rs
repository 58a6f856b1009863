//! The stock client alone: the same commands against a server that knows every answer at once. No engine can be faster than
//! this by that client; what a promise on it may miss is this part.

use super::side::Side;
use super::{Step, run, stream};
use crate::boot::median;
use crate::figure;
use anyhow::{Context, Result, bail};
use serde_json::json;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

const ROUNDS: usize = 15;
/// The id of a container that prints the lines, and of all others.
const PRINTS: char = 'c';
const SILENT: char = '0';
/// Of a frame of output, without its header.
const FRAME_BYTES: usize = 64 << 10;
/// How a connection is taken over.
const TAKEN_OVER: &str = "HTTP/1.1 101 UPGRADED\r\nContent-Type: application/vnd.docker.multiplexed-stream\r\n\
                          Connection: Upgrade\r\nUpgrade: tcp\r\n\r\n";

/// Prints how long the client takes for each.
pub(crate) fn client() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("docker.sock");
    let listener = UnixListener::bind(&socket)?;
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || serve(stream));
        }
    });
    let side = Side::of_socket(socket, folder.path());
    let steps: [(&str, &str, Step); 6] = [
        ("version", "ms", run::version),
        ("run", "ms", run::run),
        ("exec", "ms", run::exec),
        ("parallel", "s for 50", |side| Ok(run::milliseconds(|| run::start_many(side))? / 1e3)),
        ("ps", "ms", run::list),
        ("attach", "MiB/s", stream::attach),
    ];
    for (name, unit, step) in steps {
        let rounds = (0..ROUNDS).map(|_| step(&side)).collect::<Result<Vec<_>>>()?;
        figure(&format!("client alone: {name}"), median(rounds.into_iter()), unit);
    }
    Ok(())
}

/// Answers requests until the connection ends or is taken over.
fn serve(stream: UnixStream) -> Result<()> {
    let mut stream = BufReader::new(stream);
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let mut words = line.split(' ');
        let (method, path) = words.next().zip(words.next()).context("no request")?;
        let body = body(&mut stream)?;
        // `/v1.45/containers/json?all=1`
        let path = path.split('?').next().unwrap_or_default();
        let path =
            path.strip_prefix("/v1.").and_then(|rest| rest.split_once('/')).map_or(path, |(_, rest)| rest);
        let words: Vec<&str> = path.split('/').filter(|word| !word.is_empty()).collect();
        let (status, answer) = match (method, &words[..]) {
            (_, ["_ping"]) => (200, json!("OK")),
            ("GET", ["version"]) => (200, json!({ "Version": "1", "ApiVersion": "1.45", "Os": "linux" })),
            ("GET", ["containers", "json"]) => (200, list()),
            ("POST", ["containers", "create"]) => {
                let wanted: serde_json::Value = serde_json::from_slice(&body)?;
                let kind = if wanted["Cmd"][0] == "cat" { PRINTS } else { SILENT };
                (201, json!({ "Id": id(kind), "Warnings": [] }))
            }
            ("GET", ["containers", _, "json"]) => (200, inspected()),
            ("POST", ["containers", _, "start"]) => (204, json!(null)),
            ("POST", ["containers", _, "wait"]) => (200, json!({ "StatusCode": 0 })),
            ("POST", ["containers", _, "exec"]) => (201, json!({ "Id": id(SILENT) })),
            ("GET", ["exec", _, "json"]) => {
                (200, json!({ "ID": id(SILENT), "Running": false, "ExitCode": 0 }))
            }
            ("POST", ["containers", of, "attach"]) => {
                return take_over(stream.get_mut(), of.starts_with(PRINTS));
            }
            ("POST", ["exec", _, "start"]) => return take_over(stream.get_mut(), false),
            _ => bail!("the client asks for {method} {path}"),
        };
        let answer = if status == 204 { String::new() } else { answer.to_string() };
        let head = format!(
            "HTTP/1.1 {status} OK\r\nApi-Version: 1.45\r\nOstype: linux\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n",
            answer.len()
        );
        let answer = if method == "HEAD" { head } else { head + &answer };
        stream.get_mut().write_all(answer.as_bytes())?;
    }
}

/// Reads the rest of a request; answers its body.
fn body(stream: &mut BufReader<UnixStream>) -> Result<Vec<u8>> {
    let mut length = 0;
    loop {
        let mut line = String::new();
        stream.read_line(&mut line)?;
        match line.trim_end().split_once(':') {
            Some((name, value)) if name.eq_ignore_ascii_case("content-length") => {
                length = value.trim().parse()?
            }
            Some(_) => {}
            None => break,
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    Ok(body)
}

/// Takes a connection over and sends all the lines, or nothing.
fn take_over(stream: &mut UnixStream, prints: bool) -> Result<()> {
    stream.write_all(TAKEN_OVER.as_bytes())?;
    if prints {
        stream.write_all(&frames(&stream::lines_of(stream::BYTES))?)?;
    }
    Ok(stream.shutdown(std::net::Shutdown::Write)?)
}

/// Output as an engine frames it.
fn frames(text: &[u8]) -> Result<Vec<u8>> {
    let mut frames = Vec::with_capacity(text.len() + text.len() / 1000);
    for piece in text.chunks(FRAME_BYTES) {
        frames.extend_from_slice(&[1, 0, 0, 0]);
        frames.extend_from_slice(&u32::try_from(piece.len())?.to_be_bytes());
        frames.extend_from_slice(piece);
    }
    Ok(frames)
}

fn id(kind: char) -> String {
    kind.to_string().repeat(64)
}

/// As much as the client looks at before an exec.
fn inspected() -> serde_json::Value {
    json!({ "Id": id(SILENT), "State": { "Status": "running", "Running": true }, "Config": { "Tty": false } })
}

/// As many containers as [`run::thousand`] makes, each as long as a real one.
fn list() -> serde_json::Value {
    let network = json!({
        "IPAMConfig": null, "Links": null, "Aliases": null, "MacAddress": "", "DriverOpts": null,
        "NetworkID": id(SILENT), "EndpointID": "", "Gateway": "", "IPAddress": "", "IPPrefixLen": 0,
        "IPv6Gateway": "", "GlobalIPv6Address": "", "GlobalIPv6PrefixLen": 0, "DNSNames": null
    });
    let one = |number: usize| {
        json!({
            "Id": format!("{number:064x}"), "Names": [format!("/dreamy_name{number}")],
            "Image": tests_harness::IMAGE, "ImageID": format!("sha256:{}", id(SILENT)), "Command": "true",
            "Created": 1_760_000_000, "Ports": [], "Labels": {}, "State": "created", "Status": "Created",
            "HostConfig": { "NetworkMode": "bridge" }, "NetworkSettings": { "Networks": { "bridge": network } },
            "Mounts": []
        })
    };
    (0..run::LISTED).map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_answered_and_a_stream_ends() {
        let (mut near, far) = UnixStream::pair().unwrap();
        let server = std::thread::spawn(move || serve(far));
        let requests = [
            "HEAD /_ping HTTP/1.1\r\n\r\n".to_owned(),
            "POST /v1.45/containers/create HTTP/1.1\r\nContent-Length: 15\r\n\r\n{\"Cmd\":[\"cat\"]}"
                .to_owned(),
            format!("POST /v1.45/containers/{}/attach?stream=1 HTTP/1.1\r\n\r\n", id(SILENT)),
        ];
        near.write_all(requests.concat().as_bytes()).unwrap();
        let mut answer = String::new();
        near.read_to_string(&mut answer).unwrap();
        server.join().unwrap().unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.ends_with(TAKEN_OVER), "{answer}");
        assert!(answer.contains(&format!("{{\"Id\":\"{}\"", id(PRINTS))), "{answer}");
    }

    #[test]
    fn output_comes_in_frames() {
        let frames = frames(&[b'x'; FRAME_BYTES + 3]).unwrap();
        assert_eq!(frames[..8], [1, 0, 0, 0, 0, 1, 0, 0]);
        assert_eq!(frames[8 + FRAME_BYTES..], *b"\x01\0\0\0\0\0\0\x03xxx");
    }
}
