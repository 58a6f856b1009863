//! A small HTTP client on a unix socket, one connection a request, and the stock command line.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tests_harness::{Finished, Timed};

const ANSWER_TIME_MAX: Duration = Duration::from_secs(60);
/// The version the golden answers were recorded with.
const API_VERSION: &str = "1.45";

/// Talks to one engine.
pub struct Client {
    socket: PathBuf,
}

/// An answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

impl Client {
    pub fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned() }
    }

    /// Sends a request with these headers and reads the whole answer.
    pub fn send(
        &self,
        method: &str,
        target: &str,
        headers: &[(String, String)],
        body: &[u8],
    ) -> Result<Answer> {
        let mut stream = UnixStream::connect(&self.socket)
            .with_context(|| format!("cannot connect to `{}`", self.socket.display()))?;
        stream.set_read_timeout(Some(ANSWER_TIME_MAX))?;
        let mut request = format!("{method} {target} HTTP/1.1\r\nHost: engine\r\nConnection: close\r\n");
        for (name, value) in headers {
            request += &format!("{name}: {value}\r\n");
        }
        if !body.is_empty() {
            request += &format!("Content-Length: {}\r\n", body.len());
        }
        request += "\r\n";
        // In one piece: a refusal may come, and the connection go, before all of it is read.
        stream.write_all(&[request.as_bytes(), body].concat())?;
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).with_context(|| format!("no whole answer to {method} {target}"))?;
        parse(&bytes, method == "HEAD").with_context(|| format!("the answer to {method} {target}"))
    }

    /// Loads an image archive.
    pub fn load(&self, archive: &[u8]) -> Result<()> {
        let headers = [("Content-Type".to_owned(), "application/x-tar".to_owned())];
        let answer = self.send("POST", "/images/load?quiet=1", &headers, archive)?;
        if answer.status != 200 {
            bail!("cannot load the image: {}", String::from_utf8_lossy(&answer.body));
        }
        Ok(())
    }

    /// Removes every container: lists show them all.
    pub fn clear(&self) -> Result<()> {
        let answer = self.send("GET", "/containers/json?all=1", &[], b"")?;
        let containers: Vec<serde_json::Value> = serde_json::from_slice(&answer.body)?;
        for container in containers {
            let id = container["Id"].as_str().context("a container without id")?;
            let answer = self.send("DELETE", &format!("/containers/{id}?force=1&v=1"), &[], b"")?;
            if answer.status != 204 {
                bail!("cannot remove container {id}: {}", String::from_utf8_lossy(&answer.body));
            }
        }
        Ok(())
    }

    /// Runs `docker` with these words.
    pub fn docker(&self, words: &[String]) -> Result<Finished> {
        let mut command = Command::new("docker");
        let configuration = tempfile::tempdir()?;
        command
            .args(words)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("DOCKER_HOST", format!("unix://{}", self.socket.display()))
            .env("DOCKER_CONFIG", configuration.path())
            .env("DOCKER_API_VERSION", API_VERSION)
            .env("DOCKER_CLI_HINTS", "false")
            .env("TZ", "UTC");
        Timed::new(command).run()
    }
}

/// Takes an answer apart.
fn parse(bytes: &[u8], head_only: bool) -> Result<Answer> {
    let end = bytes.windows(4).position(|four| four == b"\r\n\r\n").context("no end of the headers")?;
    let head = std::str::from_utf8(&bytes[..end])?;
    let mut lines = head.split("\r\n");
    let status = lines.next().and_then(|line| line.split(' ').nth(1)?.parse().ok()).context("no status")?;
    let headers: Vec<(String, String)> = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        .collect();
    let mut answer = Answer { status, headers, body: bytes[end + 4..].to_vec() };
    if !head_only && answer.header("transfer-encoding") == Some("chunked") {
        answer.body = chunks(&answer.body)?;
    }
    Ok(answer)
}

fn chunks(mut bytes: &[u8]) -> Result<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let end = bytes.windows(2).position(|two| two == b"\r\n").context("a chunk without size")?;
        let size = usize::from_str_radix(std::str::from_utf8(&bytes[..end])?, 16)?;
        if size == 0 {
            return Ok(body);
        }
        let rest = &bytes[end + 2..];
        body.extend_from_slice(rest.get(..size).context("a chunk is cut")?);
        bytes = rest.get(size + 2..).context("a chunk is cut")?;
    }
}
