//! A registry of a few lines, for what a real one would never do: it lies, stalls, sends endless bodies and counts.

use std::{
    collections::HashMap,
    io::{BufRead, BufReader, Read, Write},
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
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) headers: HashMap<String, String>,
    pub(crate) body: Vec<u8>,
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
    /// After so many bytes the next body that is sent in pieces is cut off.
    cut: Arc<Mutex<Option<usize>>>,
}

/// A connection, encrypted or not.
trait Wire: Read + Write {}
impl<T: Read + Write> Wire for T {}

impl Server {
    /// Serves what `content` holds, unless `special` has an answer.
    pub(crate) fn start(
        content: Content,
        special: impl Fn(&Request) -> Option<Answer> + Send + Sync + 'static,
    ) -> Self {
        Self::start_with(content, special, None)
    }

    /// With TLS when it is given.
    pub(crate) fn start_with(
        content: Content,
        special: impl Fn(&Request) -> Option<Answer> + Send + Sync + 'static,
        tls: Option<Arc<rustls::ServerConfig>>,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let stopping = Arc::new(AtomicBool::new(false));
        let requests = Arc::new(Mutex::new(Vec::new()));
        let cut = Arc::new(Mutex::new(None));
        let (stop, seen, special, content, cut_here): (_, _, Arc<Handler>, _, _) =
            (stopping.clone(), requests.clone(), Arc::new(special), Arc::new(content), cut.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if stop.load(Ordering::SeqCst) {
                    break;
                }
                let (seen, special, content) = (seen.clone(), special.clone(), content.clone());
                let (tls, cut) = (tls.clone(), cut_here.clone());
                std::thread::spawn(move || {
                    // A client that hangs up is none of this thread's business.
                    let _ended = stream.set_nodelay(true).and_then(|()| {
                        // Who greets in TLS where none is spoken is hung up on.
                        let mut first = [0; 1];
                        let encrypted = stream.peek(&mut first)? == 1 && first[0] == 0x16;
                        let wire: Box<dyn Wire> = match tls {
                            Some(tls) => {
                                let session =
                                    rustls::ServerConnection::new(tls).map_err(std::io::Error::other)?;
                                Box::new(rustls::StreamOwned::new(session, stream))
                            }
                            None if encrypted => return Ok(()),
                            None => Box::new(stream),
                        };
                        converse(wire, &seen, special.as_ref(), &content, &cut)
                    });
                });
            }
        });
        Self { address, stopping, requests, cut }
    }

    /// Cuts the connection after so many bytes of the next `PATCH`.
    pub(crate) fn cut_next_upload(&self, after: usize) {
        *self.cut.lock().expect("cut") = Some(after);
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
    wire: Box<dyn Wire>,
    seen: &Mutex<Vec<Request>>,
    special: &Handler,
    content: &Content,
    cut: &Mutex<Option<usize>>,
) -> std::io::Result<()> {
    let mut reader = BufReader::new(wire);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 || !line.ends_with("\r\n") {
            return Ok(());
        }
        let mut words = line.split(' ').map(str::to_owned);
        let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let mut headers = HashMap::new();
        loop {
            let mut header = String::new();
            reader.read_line(&mut header)?;
            match header.trim_end().split_once(": ") {
                Some((name, value)) => drop(headers.insert(name.to_ascii_lowercase(), value.to_owned())),
                None => break,
            }
        }
        let mut length: usize =
            headers.get("content-length").map_or(0, |length| length.parse().expect("a length"));
        let cut_off = if method == "PATCH" { cut.lock().expect("cut").take() } else { None };
        length = length.min(cut_off.unwrap_or(length));
        let mut body = vec![0; length];
        reader.read_exact(&mut body)?;
        let request = Request { method, path, headers, body };
        seen.lock().expect("requests").push(request.clone());
        let answer = special(&request).unwrap_or_else(|| content.answer(&request));
        if cut_off.is_some() {
            return Ok(());
        }
        let head = request.method == "HEAD";
        let stream = reader.get_mut();
        match answer {
            Answer::Full(status, headers, body) => {
                write!(stream, "HTTP/1.1 {status} X\r\n")?;
                // A 204 has no body, and says nothing about one.
                if status != 204 {
                    write!(stream, "content-length: {}\r\n", body.len())?;
                }
                for (name, value) in headers {
                    write!(stream, "{name}: {value}\r\n")?;
                }
                stream.write_all(b"\r\n")?;
                stream.write_all(if head { &[] } else { &body })?;
                stream.flush()?;
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
