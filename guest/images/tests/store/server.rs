//! A registry of a few lines, for what a real one would never do: it lies, stalls, sends endless bodies and counts.

use std::{
    collections::HashMap,
    io::{BufRead, BufReader, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use guest_images::{Digest, Reference};

use crate::maker::{MadeImage, OCI_INDEX, OCI_MANIFEST};

/// A request as handlers see it.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) path: String,
    pub(crate) headers: HashMap<String, String>,
}

/// What to answer.
pub(crate) enum Answer {
    /// Status, headers, body.
    Full(u16, Vec<(String, String)>, Vec<u8>),
    /// This many bytes of a body that was announced as longer, then the connection closes.
    Cut(Vec<u8>, u64),
    /// A body without an end.
    Endless,
    /// Headers, and then nothing.
    Stall,
}

impl Answer {
    pub(crate) fn ok(content_type: &str, body: &[u8]) -> Self {
        Self::Full(200, vec![("content-type".to_owned(), content_type.to_owned())], body.to_vec())
    }

    pub(crate) fn status(status: u16, body: &str) -> Self {
        Self::Full(status, Vec::new(), body.as_bytes().to_vec())
    }
}

type Handler = dyn Fn(&Request) -> Option<Answer> + Send + Sync;

/// A server on loopback; it ends when dropped.
pub(crate) struct Server {
    address: SocketAddr,
    stopping: Arc<AtomicBool>,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    /// Serves what `content` holds, unless `special` has an answer.
    pub(crate) fn start(
        content: Content,
        special: impl Fn(&Request) -> Option<Answer> + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let stopping = Arc::new(AtomicBool::new(false));
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (stop, seen, special, content): (_, _, Arc<Handler>, _) =
            (stopping.clone(), requests.clone(), Arc::new(special), Arc::new(content));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if stop.load(Ordering::SeqCst) {
                    break;
                }
                let (seen, special, content) = (seen.clone(), special.clone(), content.clone());
                std::thread::spawn(move || {
                    // A client that hangs up is none of this thread's business.
                    let _ended = converse(stream, &seen, special.as_ref(), &content);
                });
            }
        });
        Self { address, stopping, requests }
    }

    pub(crate) fn honest(content: Content) -> Self {
        Self::start(content, |_| None)
    }

    pub(crate) fn domain(&self) -> String {
        self.address.to_string()
    }

    pub(crate) fn reference(&self, name: &str) -> Reference {
        format!("{}/{name}", self.address).parse().expect("a reference")
    }

    /// How many requests were made whose path contains `part`.
    pub(crate) fn count(&self, part: &str) -> usize {
        self.requests.lock().expect("requests").iter().filter(|request| request.path.contains(part)).count()
    }

    pub(crate) fn requests(&self) -> Vec<Request> {
        self.requests.lock().expect("requests").clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::SeqCst);
        // Wakes the accepting thread.
        let _woken = TcpStream::connect(self.address);
    }
}

/// Manifests by tag and digest, blobs by digest.
#[derive(Clone, Default)]
pub(crate) struct Content {
    manifests: HashMap<String, (String, Vec<u8>)>,
    pub(crate) blobs: HashMap<String, Vec<u8>>,
}

impl Content {
    pub(crate) fn of(name: &str, image: &MadeImage) -> Self {
        Self::default().image(name, image)
    }

    /// `name` is `repository:tag`.
    pub(crate) fn image(mut self, name: &str, image: &MadeImage) -> Self {
        self.blobs.insert(image.id().to_string(), image.config.clone());
        for layer in &image.layers {
            self.blobs.insert(layer.digest().to_string(), layer.blob.clone());
        }
        self.manifest(name, OCI_MANIFEST, &image.manifest)
    }

    pub(crate) fn index(self, name: &str, index: &[u8]) -> Self {
        self.manifest(name, OCI_INDEX, index)
    }

    pub(crate) fn manifest(mut self, name: &str, media_type: &str, bytes: &[u8]) -> Self {
        let (repository, tag) = name.split_once(':').expect("repository:tag");
        for tag in [tag.to_owned(), Digest::of(bytes).to_string()] {
            self.manifests
                .insert(format!("/v2/{repository}/manifests/{tag}"), (media_type.to_owned(), bytes.to_vec()));
        }
        self
    }

    fn answer(&self, request: &Request) -> Answer {
        if let Some((media_type, bytes)) = self.manifests.get(&request.path) {
            return Answer::ok(media_type, bytes);
        }
        if let Some((_, digest)) = request.path.split_once("/blobs/")
            && let Some(bytes) = self.blobs.get(digest)
        {
            let range = request
                .headers
                .get("range")
                .and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok());
            return match range {
                Some(offset) if offset < bytes.len() => {
                    let header = (
                        "content-range".to_owned(),
                        format!("bytes {offset}-{}/{}", bytes.len() - 1, bytes.len()),
                    );
                    Answer::Full(206, vec![header], bytes[offset..].to_vec())
                }
                _ => Answer::ok("application/octet-stream", bytes),
            };
        }
        if request.path == "/v2/" {
            return Answer::status(200, "{}");
        }
        Answer::status(404, r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}"#)
    }
}

fn converse(
    stream: TcpStream,
    seen: &Mutex<Vec<Request>>,
    special: &Handler,
    content: &Content,
) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut stream = stream;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 || !line.ends_with("\r\n") {
            return Ok(());
        }
        let path = line.split(' ').nth(1).unwrap_or("").to_owned();
        let mut headers = HashMap::new();
        loop {
            let mut header = String::new();
            reader.read_line(&mut header)?;
            match header.trim_end().split_once(": ") {
                Some((name, value)) => drop(headers.insert(name.to_ascii_lowercase(), value.to_owned())),
                None => break,
            }
        }
        let request = Request { path, headers };
        seen.lock().expect("requests").push(request.clone());
        match special(&request).unwrap_or_else(|| content.answer(&request)) {
            Answer::Full(status, headers, body) => {
                write!(stream, "HTTP/1.1 {status} X\r\ncontent-length: {}\r\n", body.len())?;
                for (name, value) in headers {
                    write!(stream, "{name}: {value}\r\n")?;
                }
                stream.write_all(b"\r\n")?;
                stream.write_all(&body)?;
            }
            Answer::Cut(body, announced) => {
                write!(stream, "HTTP/1.1 200 X\r\ncontent-length: {announced}\r\n\r\n")?;
                return stream.write_all(&body);
            }
            Answer::Endless => {
                write!(stream, "HTTP/1.1 200 X\r\n\r\n")?;
                loop {
                    stream.write_all(&[b'x'; 8192])?;
                }
            }
            Answer::Stall => {
                write!(stream, "HTTP/1.1 200 X\r\ncontent-length: 1000000\r\n\r\n")?;
                // Until the client hangs up.
                let mut byte = String::new();
                reader.read_line(&mut byte)?;
                return Ok(());
            }
        }
    }
}
