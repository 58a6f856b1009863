//! The least of an HTTP client: one connection over a unix socket, so that a figure is the engine's time and not a client's.

use anyhow::{Context, Result, bail, ensure};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

pub(super) struct Api(BufReader<UnixStream>);

impl Api {
    pub(super) fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket)
            .with_context(|| format!("cannot connect to `{}`", socket.display()))?;
        Ok(Self(BufReader::new(stream)))
    }

    /// Posts a request that takes the connection over, and reads it to its end.
    pub(super) fn stream(mut self, path: &str, body: &str) -> Result<()> {
        self.send("POST", path, body)?;
        let status = self.line()?;
        let mut rest = Vec::new();
        self.0.read_to_end(&mut rest)?;
        if !status.contains(" 200 ") && !status.contains(" 101 ") {
            bail!("POST {path}: {status} {}", String::from_utf8_lossy(&rest));
        }
        Ok(())
    }

    fn send(&mut self, method: &str, path: &str, body: &str) -> Result<()> {
        let kind = if body.is_empty() { "" } else { "Content-Type: application/json\r\n" };
        let request = format!(
            "{method} /v1.41{path} HTTP/1.1\r\nHost: docker\r\n{kind}Content-Length: {}\r\n\r\n{body}",
            body.len()
        );
        Ok(self.0.get_mut().write_all(request.as_bytes())?)
    }

    /// Sends a request with a JSON body, or none, and answers the body of a success.
    pub(super) fn call(&mut self, method: &str, path: &str, body: &str) -> Result<Vec<u8>> {
        self.send(method, path, body)?;
        let status = self.line()?;
        let code: u16 = status.split(' ').nth(1).and_then(|code| code.parse().ok()).context("no status")?;
        let (mut length, mut chunked) = (0, false);
        loop {
            let line = self.line()?.to_ascii_lowercase();
            if line.is_empty() {
                break;
            }
            match line.split_once(':').map(|(name, value)| (name, value.trim())) {
                Some(("content-length", value)) => length = value.parse()?,
                Some(("transfer-encoding", "chunked")) => chunked = true,
                _ => {}
            }
        }
        let mut answer = Vec::new();
        while chunked {
            let size = usize::from_str_radix(self.line()?.trim(), 16)?;
            self.exactly(size, &mut answer)?;
            self.line()?;
            chunked = size > 0;
        }
        self.exactly(length, &mut answer)?;
        if code >= 400 {
            bail!("{method} {path}: {code} {}", String::from_utf8_lossy(&answer));
        }
        Ok(answer)
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.0.read_line(&mut line)?;
        if line.is_empty() {
            bail!("the engine closed the connection");
        }
        Ok(line.trim_end().to_owned())
    }

    fn exactly(&mut self, length: usize, into: &mut Vec<u8>) -> Result<()> {
        let before = into.len();
        into.resize(before + length, 0);
        Ok(self.0.read_exact(&mut into[before..])?)
    }

    /// Creates a container of the test image; answers its id.
    pub(super) fn create(&mut self, command: &str) -> Result<String> {
        self.create_with(command, serde_json::json!({}))
    }

    /// The same with a `HostConfig`.
    pub(super) fn create_with(&mut self, command: &str, host: serde_json::Value) -> Result<String> {
        let words: Vec<&str> = command.split(' ').collect();
        let body = serde_json::json!({ "Image": tests_harness::IMAGE, "Cmd": words, "HostConfig": host });
        self.made("/containers/create", &body.to_string())
    }

    /// The id of what a request makes.
    fn made(&mut self, path: &str, body: &str) -> Result<String> {
        let answer: serde_json::Value = serde_json::from_slice(&self.call("POST", path, body)?)?;
        Ok(answer["Id"].as_str().context("no id")?.to_owned())
    }

    /// Makes an exec of `true`, starts it on a connection of its own, and asks how it ended.
    pub(super) fn exec(&mut self, other: Self, container: &str) -> Result<()> {
        let body = r#"{"AttachStdout":true,"AttachStderr":true,"Cmd":["true"]}"#;
        let id = self.made(&format!("/containers/{container}/exec"), body)?;
        other.stream(&format!("/exec/{id}/start"), r#"{"Detach":false,"Tty":false}"#)?;
        let ended: serde_json::Value =
            serde_json::from_slice(&self.call("GET", &format!("/exec/{id}/json"), "")?)?;
        ensure!(ended["ExitCode"] == 0, "the exec ended with {}", ended["ExitCode"]);
        Ok(())
    }

    /// Create, start, wait, delete.
    pub(super) fn cycle(&mut self) -> Result<()> {
        let id = self.create("true")?;
        self.call("POST", &format!("/containers/{id}/start"), "")?;
        self.call("POST", &format!("/containers/{id}/wait"), "")?;
        self.call("DELETE", &format!("/containers/{id}"), "").map(drop)
    }
}
