//! Where init's output is kept: a file of Docker's `json-file` or `local` format, and a logging service besides.
//!
//! A line of output longer than 16 KiB becomes several entries, all but the last without the newline and all with the
//! first one's time; so does what has no newline at the end of the output. Rotation is `loggerutils.LogFile`'s: before
//! an entry, when the file has reached its limit.
//!
//! One write per piece of output read, so that nothing is held back and nothing is written line by line.

mod forward;
mod json;
mod local;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::write::GzEncoder;
use guest_runtime::shim::{Log, LogDriver};
use jiff::Timestamp;
use memchr::memchr;

use forward::Forwarder;

/// The longest entry, in bytes of output: dockerd's copier buffer.
const ENTRY_LEN_MAX: usize = 16 * 1024;
/// Formatted bytes are written when there are this many: bounds memory when one-byte lines grow seventyfold.
const WRITE_LEN: usize = 256 * 1024;

/// The most that is read of an output at once; a piece of this length is part of a burst.
pub const READ_LEN: usize = 64 * 1024;

/// The two output streams of a process. A terminal has only the first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    Stdout,
    Stderr,
}

impl Stream {
    pub const BOTH: [Self; 2] = [Self::Stdout, Self::Stderr];

    /// Its number in a multiplexed frame.
    pub fn number(self) -> u8 {
        match self {
            Self::Stdout => 1,
            Self::Stderr => 2,
        }
    }

    /// Its place in an array of both.
    pub fn index(self) -> usize {
        self as usize
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

/// How an entry ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// A line, whole.
    Line,
    /// The line goes on in the next entry.
    Split,
    /// The output ended without a newline.
    Output,
}

/// A log file being written.
pub struct LogFile {
    path: PathBuf,
    /// `None`: only forwarded.
    file: Option<File>,
    format: LogDriver,
    compress: bool,
    /// The attributes as a member of a JSON entry.
    attributes: Vec<u8>,
    forward: Option<Forwarder>,
    size_bytes: u64,
    limit_bytes: Option<u64>,
    files_max: u32,
    output: Vec<u8>,
    pending: [Pending; 2],
}

/// The unfinished line of one stream.
#[derive(Default)]
struct Pending {
    bytes: Vec<u8>,
    /// The time of the first entry, when the line has been split.
    split_at: Option<Timestamp>,
}

impl LogFile {
    /// Appends to the file, making it if need be. `None` when nothing is kept nor forwarded.
    pub fn open(log: &Log) -> io::Result<Option<Self>> {
        let forward = log.forward.as_ref().map(Forwarder::connect).transpose()?;
        if log.driver == LogDriver::None && forward.is_none() {
            return Ok(None);
        }
        let file = match log.driver {
            LogDriver::None => None,
            LogDriver::JsonFile | LogDriver::Local => Some(open(&log.path, false)?),
        };
        let size_bytes = file.as_ref().map_or(Ok(0), |file| file.metadata().map(|data| data.len()))?;
        let mut attributes = Vec::new();
        if !log.attributes.is_empty() {
            attributes.extend_from_slice(br#","attrs":"#);
            serde_json::to_writer(&mut attributes, &log.attributes)?;
        }
        Ok(Some(Self {
            path: log.path.clone(),
            file,
            format: log.driver,
            compress: log.compress,
            attributes,
            forward,
            size_bytes,
            limit_bytes: log.max_size_bytes.filter(|limit| *limit > 0),
            files_max: log.max_files.unwrap_or(1).max(1),
            output: Vec::new(),
            pending: Default::default(),
        }))
    }

    /// Logs a piece of output.
    pub fn write(&mut self, stream: Stream, mut bytes: &[u8], now: Timestamp) -> io::Result<()> {
        let is_burst = bytes.len() >= READ_LEN;
        let time = self.stamp(stream, now);
        let mut pending = std::mem::take(&mut self.pending[stream.index()]);
        let result = (|| {
            while !bytes.is_empty() {
                let room = ENTRY_LEN_MAX - pending.bytes.len();
                let window = &bytes[..bytes.len().min(room)];
                if let Some(end) = memchr(b'\n', window) {
                    let split = pending.split_at.take().map(|at| self.stamp(stream, at));
                    let at = split.as_ref().unwrap_or(&time);
                    self.entry(stream, &pending.bytes, &window[..end], End::Line, at)?;
                    pending.bytes.clear();
                    bytes = &bytes[end + 1..];
                } else if window.len() == room {
                    let at = self.stamp(stream, *pending.split_at.get_or_insert(now));
                    self.entry(stream, &pending.bytes, window, End::Split, &at)?;
                    pending.bytes.clear();
                    bytes = &bytes[room..];
                } else {
                    pending.bytes.extend_from_slice(window);
                    bytes = &[];
                }
            }
            self.flush()
        })();
        self.pending[stream.index()] = pending;
        // The memory of a burst is kept for its next piece, and given back when it is over.
        if !is_burst && self.output.capacity() > WRITE_LEN / 4 {
            self.output.shrink_to(0);
        }
        result
    }

    /// Logs what has no newline, at the end of the output.
    pub fn finish(&mut self, now: Timestamp) -> io::Result<()> {
        for stream in Stream::BOTH {
            let pending = std::mem::take(&mut self.pending[stream.index()]);
            if !pending.bytes.is_empty() {
                let time = self.stamp(stream, pending.split_at.unwrap_or(now));
                self.entry(stream, &pending.bytes, &[], End::Output, &time)?;
            }
        }
        self.flush()
    }

    fn entry(&mut self, stream: Stream, head: &[u8], rest: &[u8], end: End, at: &Stamp) -> io::Result<()> {
        if let Some(forward) = &mut self.forward {
            forward.send(stream, &[head, rest].concat(), end, at.time);
        }
        if self.file.is_none() {
            return Ok(());
        }
        if self.limit_bytes.is_some_and(|limit| self.size_bytes + self.output.len() as u64 >= limit) {
            self.flush()?;
            self.rotate()?;
        }
        if self.format == LogDriver::Local {
            local::encode(stream, &[head, rest], end, at.time, &mut self.output);
        } else {
            self.output.extend_from_slice(json::HEAD);
            // A character may be cut between the two; put them together unless the cut is clean.
            if head.is_empty() {
                json::escape(rest, &mut self.output);
            } else if rest.is_empty() {
                json::escape(head, &mut self.output);
            } else {
                json::escape(&[head, rest].concat(), &mut self.output);
            }
            self.output.extend_from_slice(if end == End::Line { &at.line_tail } else { at.tail() });
        }
        if self.output.len() >= WRITE_LEN { self.flush() } else { Ok(()) }
    }

    /// A time for entries of a stream.
    fn stamp(&self, stream: Stream, time: Timestamp) -> Stamp {
        let (name, text) = (stream.name().as_bytes(), time.to_string());
        let parts: [&[u8]; 8] = [
            Stamp::NEWLINE,
            br#"","stream":""#,
            name,
            b"\"",
            &self.attributes,
            br#","time":""#,
            text.as_bytes(),
            b"\"}\n",
        ];
        Stamp { time, line_tail: parts.concat() }
    }

    fn flush(&mut self) -> io::Result<()> {
        let result = self.file.as_mut().map_or(Ok(()), |file| file.write_all(&self.output));
        // On a full disk entries are lost; the container goes on.
        self.size_bytes += self.output.len() as u64;
        self.output.clear();
        result
    }

    /// The files move up by one, and the oldest goes. Compressing takes a moment, in which output waits in its pipe.
    fn rotate(&mut self) -> io::Result<()> {
        if self.files_max > 1 {
            for number in (1..self.files_max - 1).rev() {
                for suffix in ["", ".gz"] {
                    let from = numbered(&self.path, number, suffix);
                    rename_if_there(&from, &numbered(&self.path, number + 1, suffix))?;
                }
            }
            let first = numbered(&self.path, 1, "");
            rename_if_there(&self.path, &first)?;
            if self.compress {
                compress(&first, &numbered(&self.path, 1, ".gz"))?;
            }
        }
        self.file = Some(open(&self.path, true)?);
        self.size_bytes = 0;
        Ok(())
    }
}

/// A time, and what ends a JSON entry of that time: made once for the many lines of one piece of output.
struct Stamp {
    time: Timestamp,
    /// Of one that is a whole line.
    line_tail: Vec<u8>,
}

impl Stamp {
    /// The newline of a line, escaped.
    const NEWLINE: &[u8] = br"\n";

    /// What ends any other entry.
    fn tail(&self) -> &[u8] {
        &self.line_tail[Self::NEWLINE.len()..]
    }
}

fn compress(from: &Path, to: &Path) -> io::Result<()> {
    let temporary = to.with_extension("gz.new");
    let mut encoder = GzEncoder::new(open(&temporary, true)?, Compression::fast());
    io::copy(&mut File::open(from)?, &mut encoder)?;
    encoder.finish()?;
    fs::rename(&temporary, to)?;
    fs::remove_file(from)
}

fn open(path: &Path, truncate: bool) -> io::Result<File> {
    if truncate {
        // Truncation and append do not go together in one open.
        OpenOptions::new().write(true).create(true).truncate(true).mode(0o640).open(path)?;
    }
    OpenOptions::new().append(true).create(true).mode(0o640).open(path)
}

fn numbered(path: &Path, number: u32, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{number}{suffix}"));
    name.into()
}

fn rename_if_there(from: &Path, to: &Path) -> io::Result<()> {
    match fs::rename(from, to) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use guest_runtime::shim::LogDriver;
    use proptest::prelude::*;

    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("shim-log-{name}-{}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }

        fn log(&self, max_size_bytes: Option<u64>, max_files: Option<u32>) -> LogFile {
            let path = self.0.join("x-json.log");
            let log = Log { driver: LogDriver::JsonFile, path, max_size_bytes, max_files, ..Log::default() };
            LogFile::open(&log).unwrap().unwrap()
        }

        fn text(&self, suffix: &str) -> String {
            fs::read_to_string(self.0.join(format!("x-json.log{suffix}"))).unwrap()
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).unwrap();
        }
    }

    fn time(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    const T: &str = "2026-01-02T03:04:05.123456789Z";

    #[test]
    fn lines_look_as_dockers_do() {
        let folder = Folder::new("lines");
        let mut log = folder.log(None, None);
        log.write(Stream::Stdout, b"a \"b\" \\ <c>&\t\x1b[0m\r\n\nhalf", time(T)).unwrap();
        log.write(Stream::Stderr, "é\u{2028}€\n".as_bytes(), time("2026-01-02T03:04:05.120Z")).unwrap();
        log.write(Stream::Stdout, b" done\n", time("2026-01-02T03:04:06Z")).unwrap();
        let expected = concat!(
            r#"{"log":"a \"b\" \\ \u003cc\u003e\u0026\u0009\u001b[0m\r\n","stream":"stdout","time":"2026-01-02T03:04:05.123456789Z"}"#,
            "\n",
            r#"{"log":"\n","stream":"stdout","time":"2026-01-02T03:04:05.123456789Z"}"#,
            "\n",
            "{\"log\":\"é\\u2028€\\n\",\"stream\":\"stderr\",\"time\":\"2026-01-02T03:04:05.12Z\"}\n",
            r#"{"log":"half done\n","stream":"stdout","time":"2026-01-02T03:04:06Z"}"#,
            "\n",
        );
        assert_eq!(folder.text(""), expected);
    }

    #[test]
    fn a_long_line_is_split_as_dockerd_splits_it() {
        let folder = Folder::new("long");
        let mut log = folder.log(None, None);
        log.write(Stream::Stdout, &[b'x'; 20_000], time(T)).unwrap();
        log.write(Stream::Stdout, b"end\n", time("2027-01-01T00:00:00Z")).unwrap();
        let text = folder.text("");
        let entries: Vec<serde_json::Value> =
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(entries[0]["log"], "x".repeat(16_384));
        assert_eq!(entries[1]["log"], format!("{}end\n", "x".repeat(3_616)));
        assert!(entries.iter().all(|entry| entry["time"] == T));
    }

    #[test]
    fn output_without_a_newline_is_logged_at_the_end() {
        let folder = Folder::new("end");
        let mut log = folder.log(None, None);
        log.write(Stream::Stderr, b"oops", time(T)).unwrap();
        assert_eq!(folder.text(""), "");
        log.finish(time(T)).unwrap();
        assert_eq!(folder.text(""), format!("{{\"log\":\"oops\",\"stream\":\"stderr\",\"time\":\"{T}\"}}\n"));
    }

    #[test]
    fn files_rotate_and_the_oldest_goes() {
        let folder = Folder::new("rotate");
        let mut log = folder.log(Some(100), Some(3));
        for number in 0..8 {
            log.write(Stream::Stdout, format!("line {number}\n").as_bytes(), time(T)).unwrap();
        }
        assert!(folder.text("").contains("line 6") && folder.text("").contains("line 7"));
        assert!(folder.text(".1").contains("line 4") && folder.text(".2").contains("line 2"));
        assert!(!folder.0.join("x-json.log.3").exists());
    }

    #[test]
    fn rotated_files_are_compressed_when_asked() {
        let folder = Folder::new("gz");
        let path = folder.0.join("x-json.log");
        let log = Log {
            driver: LogDriver::JsonFile,
            path,
            max_size_bytes: Some(100),
            max_files: Some(3),
            compress: true,
            attributes: [("tier".to_owned(), "front".to_owned())].into(),
            forward: None,
        };
        let mut log = LogFile::open(&log).unwrap().unwrap();
        for number in 0..8 {
            log.write(Stream::Stdout, format!("line {number}\n").as_bytes(), time(T)).unwrap();
        }
        assert!(folder.text("").contains(r#""stream":"stdout","attrs":{"tier":"front"},"time""#));
        let file = File::open(folder.0.join("x-json.log.2.gz")).unwrap();
        let text = io::read_to_string(flate2::read::GzDecoder::new(file)).unwrap();
        assert!(text.contains("line "), "{text}");
        assert!(!folder.0.join("x-json.log.1").exists() && !folder.0.join("x-json.log.3.gz").exists());
    }

    #[test]
    fn nothing_is_kept_without_a_driver() {
        assert!(LogFile::open(&Log::default()).unwrap().is_none());
    }

    #[test]
    fn one_file_is_emptied_when_full() {
        let folder = Folder::new("one");
        let mut log = folder.log(Some(60), None);
        for number in 0..5 {
            log.write(Stream::Stdout, format!("line {number}\n").as_bytes(), time(T)).unwrap();
        }
        assert_eq!(folder.text("").lines().count(), 1);
        assert!(!folder.0.join("x-json.log.1").exists());
    }

    proptest! {
        #[test]
        fn text_comes_back_however_it_is_cut(text in "[a-z\"<é€\n\t😀]{0,200}", cuts in proptest::collection::vec(1_usize..20, 1..20)) {
            let folder = Folder::new("cut");
            let _ = fs::remove_file(folder.0.join("x-json.log"));
            let mut log = folder.log(None, None);
            let mut rest = text.as_bytes();
            for cut in cuts.iter().cycle() {
                if rest.is_empty() { break }
                let (piece, later) = rest.split_at((*cut).min(rest.len()));
                log.write(Stream::Stdout, piece, time(T)).unwrap();
                rest = later;
            }
            log.finish(time(T)).unwrap();
            let logged: String = folder.text("").lines()
                .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["log"].as_str().unwrap().to_owned())
                .collect();
            prop_assert_eq!(logged, text);
        }
    }
}
