//! Reading a container's log, `json-file` (one JSON object a line) or `local` (length, protocol buffer, length), with
//! its rotated files: `.1`, `.2`, … (newest first), and `.gz` when compressed.
//!
//! Synchronous and bounded: each call returns one batch, ready to be sent. Following is the caller's loop.

mod entry;

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use flate2::read::GzDecoder;
use guest_api::frame::{HEADER_LENGTH, Header, Stream};
use jiff::Timestamp;

use entry::Entry;

/// Bytes of output in one batch, about.
const BATCH_BYTES: usize = 128 << 10;
/// Longest line read; the shim writes at most 16 KiB of output a line, escaped at worst six-fold.
const LINE_MAX: u64 = 1 << 20;
/// A frame of several lines ends before the next when it has so many bytes. With a line of 16 KiB it still fits into the
/// 32 KiB that Docker's clients read at once.
const JOINED_BYTES: usize = 16 << 10;
/// Read backwards in steps of this.
const TAIL_BLOCK: u64 = 64 << 10;

/// What a client asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogQuery {
    pub stdout: bool,
    pub stderr: bool,
    pub timestamps: bool,
    /// Labels and variables that the driver's options chose.
    pub details: bool,
    pub follow: bool,
    pub since: Option<Timestamp>,
    pub until: Option<Timestamp>,
    /// Only so many last lines; `None` is all.
    pub tail: Option<usize>,
    /// Lines of one stream that follow each other may share a frame. For a client that copies what is in frames, and does
    /// not take each for a line.
    pub joined: bool,
}

/// How entries are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    JsonFile,
    Local,
}

/// What a batch was.
#[derive(Debug, PartialEq, Eq)]
pub enum Batch {
    /// Bytes to send; may be empty when all lines were filtered out.
    Output(Vec<u8>),
    /// Nothing more for now.
    Idle,
    /// `until` has passed: nothing more at all.
    Done,
}

/// A reader of one container's log.
pub struct LogReader {
    path: PathBuf,
    format: Format,
    query: LogQuery,
    tty: bool,
    /// Rotated files still to be read, oldest last.
    older: Vec<File>,
    current: Option<BufReader<File>>,
    /// The start of a line whose end has not been written yet.
    partial: Vec<u8>,
    /// The last frame of the batch: where it starts, and whose it is.
    frame: Option<(usize, Stream)>,
    done: bool,
}

impl LogReader {
    /// Opens the log. One that does not exist yet is empty. `tty`: no frames.
    pub fn open(path: &Path, format: Format, query: LogQuery, tty: bool) -> io::Result<Self> {
        let mut reader = Self {
            path: path.to_owned(),
            format,
            query,
            tty,
            older: Vec::new(),
            current: None,
            partial: Vec::new(),
            frame: None,
            done: false,
        };
        let mut files = Vec::new();
        for number in 0.. {
            let name = if number == 0 { path.to_owned() } else { numbered(path, number) };
            match File::open(&name) {
                Ok(file) => files.push(file),
                Err(error) if error.kind() == io::ErrorKind::NotFound => match decompressed(&name)? {
                    Some(file) => files.push(file),
                    None => break,
                },
                Err(error) => return Err(error),
            }
        }
        if let Some(tail) = reader.query.tail {
            files = last_lines(files, tail, format)?;
        }
        reader.current = files.pop().map(buffered);
        // `files` is newest first; what is left is read from its end.
        reader.older = files;
        Ok(reader)
    }

    /// The next batch.
    pub fn next(&mut self) -> io::Result<Batch> {
        if self.done {
            return Ok(Batch::Done);
        }
        let mut output = Vec::with_capacity(BATCH_BYTES + BATCH_BYTES / 4);
        let mut read_something = false;
        self.frame = None;
        while output.len() < BATCH_BYTES {
            let Some(current) = &mut self.current else {
                // Not there at the start: look again.
                match File::open(&self.path) {
                    Ok(file) => self.current = Some(buffered(file)),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => break,
                    Err(error) => return Err(error),
                }
                continue;
            };
            let (count, whole) = match self.format {
                Format::JsonFile => {
                    let count = current.take(LINE_MAX).read_until(b'\n', &mut self.partial)?;
                    (count, self.partial.last() == Some(&b'\n') || self.partial.len() as u64 >= LINE_MAX)
                }
                Format::Local => read_local(current, &mut self.partial)?,
            };
            if whole {
                read_something = true;
                let mut line = std::mem::take(&mut self.partial);
                let entry = match self.format {
                    Format::JsonFile => entry::parse_json(&line),
                    Format::Local => entry::parse_local(line.get(4..line.len() - 4).unwrap_or_default()),
                };
                // One cut by a full disk is skipped, as dockerd does.
                if let Some(entry) = entry {
                    self.render(&entry, &mut output);
                }
                line.clear();
                self.partial = line;
                if self.done {
                    break;
                }
            } else if count == 0 && !self.next_file()? {
                break;
            }
        }
        match (read_something, self.done) {
            (true, _) => Ok(Batch::Output(output)),
            (false, true) => Ok(Batch::Done),
            (false, false) => Ok(Batch::Idle),
        }
    }

    /// Goes on to the file written after this one, if there is one.
    fn next_file(&mut self) -> io::Result<bool> {
        if let Some(file) = self.older.pop() {
            self.partial.clear();
            self.current = Some(buffered(file));
            return Ok(true);
        }
        let Some(current) = &self.current else { return Ok(false) };
        let ours = current.get_ref().metadata()?;
        let there = match std::fs::metadata(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            other => other?,
        };
        if (ours.dev(), ours.ino()) == (there.dev(), there.ino()) {
            return Ok(false);
        }
        // Rotated while we followed. Lines between the two looks are read first: the old file is complete now.
        self.partial.clear();
        self.current = Some(buffered(File::open(&self.path)?));
        Ok(true)
    }

    fn render(&mut self, entry: &Entry<'_>, output: &mut Vec<u8>) {
        let query = &self.query;
        if query.since.is_some() || query.until.is_some() {
            let Some(time) = entry.time.moment() else { return };
            if query.until.is_some_and(|until| time > until) {
                self.done = true;
                return;
            }
            if query.since.is_some_and(|since| time < since) {
                return;
            }
        }
        let wanted = if entry.stream == Stream::Stderr { query.stderr } else { query.stdout };
        if !wanted {
            return;
        }
        let start = match self.frame {
            Some((start, stream))
                if query.joined && stream == entry.stream && output.len() - start < JOINED_BYTES =>
            {
                start
            }
            _ => {
                let start = output.len();
                if !self.tty {
                    output.extend_from_slice(&[0; HEADER_LENGTH]);
                    self.frame = Some((start, entry.stream));
                }
                start
            }
        };
        if query.timestamps {
            output.extend_from_slice(entry.time.stamp().unwrap_or_default().as_bytes());
        }
        if query.details {
            let details: Vec<String> = entry
                .attributes
                .iter()
                .map(|(name, value)| format!("{}={}", query_escape(name), query_escape(value)))
                .collect();
            output.extend_from_slice(details.join(",").as_bytes());
            output.push(b' ');
        }
        entry.text.append_to(output);
        if !self.tty {
            let length = u32::try_from(output.len() - start - HEADER_LENGTH).unwrap_or(u32::MAX);
            output[start..start + HEADER_LENGTH]
                .copy_from_slice(&Header { stream: entry.stream, length }.encode());
        }
    }
}

fn buffered(file: File) -> BufReader<File> {
    BufReader::with_capacity(BATCH_BYTES, file)
}

/// Reads on at a `local` entry: how much came, and whether it is whole now.
fn read_local(current: &mut BufReader<File>, partial: &mut Vec<u8>) -> io::Result<(usize, bool)> {
    let mut count = 0;
    loop {
        let wanted = match partial.first_chunk::<4>() {
            None => 4,
            Some(length) => u32::from_be_bytes(*length) as usize + 8,
        };
        if wanted as u64 > LINE_MAX {
            return Err(io::Error::other(format!("the log is damaged: an entry of {wanted} bytes")));
        }
        if partial.len() >= 8 && partial.len() == wanted {
            return Ok((count, true));
        }
        let more = current.by_ref().take((wanted - partial.len()) as u64).read_to_end(partial)?;
        if more == 0 {
            return Ok((count, false));
        }
        count += more;
    }
}

/// A rotated file that was compressed, as an ordinary one in memory.
fn decompressed(name: &Path) -> io::Result<Option<File>> {
    let mut compressed = name.as_os_str().to_owned();
    compressed.push(".gz");
    let packed = match File::open(compressed) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let memory = rustix::fs::memfd_create("log", rustix::fs::MemfdFlags::CLOEXEC)?;
    let mut file = File::from(memory);
    io::copy(&mut GzDecoder::new(packed), &mut file)?;
    file.seek(SeekFrom::Start(0))?;
    Ok(Some(file))
}

/// As Go's `url.QueryEscape`.
fn query_escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => escaped.push(byte.into()),
            b' ' => escaped.push('+'),
            _ => escaped.push_str(&format!("%{byte:02X}")),
        }
    }
    escaped
}

/// The name of a rotated file.
pub fn numbered(path: &Path, number: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{number}"));
    PathBuf::from(name)
}

/// Positions files (newest first) so that only their `tail` last lines are left to read.
fn last_lines(files: Vec<File>, tail: usize, format: Format) -> io::Result<Vec<File>> {
    let mut kept = Vec::new();
    let mut wanted = tail;
    for mut file in files {
        let (start, found) = match format {
            Format::JsonFile => line_start(&mut file, wanted)?,
            Format::Local => entry_start(&mut file, wanted)?,
        };
        file.seek(SeekFrom::Start(start))?;
        kept.push(file);
        if found >= wanted {
            break;
        }
        wanted -= found;
    }
    Ok(kept)
}

/// Where the last `wanted` lines begin, and how many of them there are.
fn line_start(file: &mut File, wanted: usize) -> io::Result<(u64, usize)> {
    let length = file.metadata()?.len();
    if wanted == 0 {
        return Ok((length, 0));
    }
    let mut end = length;
    let mut found = 0;
    let mut block = Vec::new();
    while end > 0 {
        let start = end.saturating_sub(TAIL_BLOCK);
        file.seek(SeekFrom::Start(start))?;
        block.clear();
        file.by_ref().take(end - start).read_to_end(&mut block)?;
        for (offset, byte) in block.iter().enumerate().rev() {
            let position = start + offset as u64;
            // The newline at the very end closes the last line; it does not begin another.
            if *byte == b'\n' && position + 1 != length {
                found += 1;
                if found == wanted {
                    return Ok((position + 1, found));
                }
            }
        }
        end = start;
    }
    Ok((0, if length > 0 { found + 1 } else { 0 }))
}

/// The same of a `local` log: its entries end with their lengths.
fn entry_start(file: &mut File, wanted: usize) -> io::Result<(u64, usize)> {
    let mut start = file.metadata()?.len();
    let mut found = 0;
    while found < wanted && start >= 8 {
        file.seek(SeekFrom::Start(start - 4))?;
        let mut length = [0; 4];
        file.read_exact(&mut length)?;
        match start.checked_sub(u64::from(u32::from_be_bytes(length)) + 8) {
            Some(earlier) => start = earlier,
            // Damaged: what can be read is read.
            None => break,
        }
        found += 1;
    }
    Ok((start, found))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::store::tests::folder;

    fn line(stream: &str, text: &str, second: u32) -> String {
        format!(
            "{}\n",
            serde_json::json!({"log": text, "stream": stream, "time": format!("2026-01-02T03:04:{second:02}.5Z")})
        )
    }

    fn all() -> LogQuery {
        LogQuery { stdout: true, stderr: true, ..LogQuery::default() }
    }

    fn read(reader: &mut LogReader) -> String {
        let mut text = Vec::new();
        while let Batch::Output(bytes) = reader.next().unwrap() {
            text.extend(bytes);
        }
        String::from_utf8(text).unwrap()
    }

    fn with_log(lines: &str, check: impl FnOnce(&Path)) {
        let folder = folder();
        let path = folder.join("log");
        std::fs::write(&path, lines).unwrap();
        check(&path);
        std::fs::remove_dir_all(folder).unwrap();
    }

    fn read_all(path: &Path, query: LogQuery) -> String {
        read(&mut LogReader::open(path, Format::JsonFile, query, true).unwrap())
    }

    #[test]
    fn lines_are_framed_by_stream_unless_there_is_a_terminal() {
        with_log(&(line("stdout", "a\n", 1) + &line("stderr", "bc\n", 2)), |path| {
            let framed = read(&mut LogReader::open(path, Format::JsonFile, all(), false).unwrap());
            assert_eq!(framed.as_bytes(), b"\x01\0\0\0\0\0\0\x02a\n\x02\0\0\0\0\0\0\x03bc\n");
            assert_eq!(read_all(path, all()), "a\nbc\n");
        });
    }

    #[test]
    fn lines_of_one_stream_share_frames_when_they_may() {
        let lines = line("stdout", "a\n", 1) + &line("stdout", "b\n", 2) + &line("stderr", "c\n", 3);
        with_log(&(lines.clone() + &line("stdout", "d\n", 4)), |path| {
            let query = LogQuery { joined: true, ..all() };
            let framed = read(&mut LogReader::open(path, Format::JsonFile, query, false).unwrap());
            assert_eq!(
                framed.as_bytes(),
                b"\x01\0\0\0\0\0\0\x04a\nb\n\x02\0\0\0\0\0\0\x02c\n\x01\0\0\0\0\0\0\x02d\n"
            );
        });
        let many: String = (0..3000).map(|number| line("stdout", &format!("{number:040}\n"), 1)).collect();
        with_log(&many, |path| {
            let query = LogQuery { joined: true, ..all() };
            let mut reader = LogReader::open(path, Format::JsonFile, query, false).unwrap();
            let (mut frames, mut payload) = (0, Vec::new());
            while let Batch::Output(bytes) = reader.next().unwrap() {
                let mut rest = bytes.as_slice();
                while let Some((header, more)) = rest.split_first_chunk::<HEADER_LENGTH>() {
                    let length = Header::decode(*header).unwrap().length as usize;
                    assert!((1..2 * JOINED_BYTES).contains(&length));
                    payload.extend_from_slice(&more[..length]);
                    rest = &more[length..];
                    frames += 1;
                }
            }
            assert_eq!(String::from_utf8(payload).unwrap(), read_all(path, all()));
            assert!((8..20).contains(&frames), "{frames} frames");
        });
    }

    #[test]
    fn queries_select() {
        let lines = line("stdout", "1\n", 1) + &line("stderr", "2\n", 2) + &line("stdout", "3\n", 3);
        with_log(&lines, |path| {
            let at = |second: u32| Some(format!("2026-01-02T03:04:{second:02}Z").parse().unwrap());
            assert_eq!(read_all(path, LogQuery { stderr: false, ..all() }), "1\n3\n");
            assert_eq!(read_all(path, LogQuery { since: at(2), ..all() }), "2\n3\n");
            assert_eq!(read_all(path, LogQuery { until: at(3), ..all() }), "1\n2\n");
            assert_eq!(read_all(path, LogQuery { tail: Some(1), ..all() }), "3\n");
            assert_eq!(read_all(path, LogQuery { tail: Some(0), ..all() }), "");
            assert_eq!(read_all(path, LogQuery { tail: Some(99), ..all() }), "1\n2\n3\n");
            assert_eq!(
                read_all(path, LogQuery { tail: Some(1), timestamps: true, ..all() }),
                "2026-01-02T03:04:03.500000000Z 3\n"
            );
        });
    }

    #[test]
    fn rotated_files_are_read_oldest_first_and_tail_spans_them() {
        with_log(&line("stdout", "5\n", 5), |path| {
            std::fs::write(numbered(path, 1), line("stdout", "3\n", 3) + &line("stdout", "4\n", 4)).unwrap();
            std::fs::write(numbered(path, 2), line("stdout", "1\n", 1) + &line("stdout", "2\n", 2)).unwrap();
            assert_eq!(read_all(path, all()), "1\n2\n3\n4\n5\n");
            assert_eq!(read_all(path, LogQuery { tail: Some(4), ..all() }), "2\n3\n4\n5\n");
        });
    }

    #[test]
    fn following_sees_growth_halves_of_lines_and_rotation() {
        with_log("", |path| {
            let mut reader = LogReader::open(path, Format::JsonFile, all(), true).unwrap();
            assert_eq!(reader.next().unwrap(), Batch::Idle);
            let text = line("stdout", "first\n", 1);
            let mut file = std::fs::OpenOptions::new().append(true).open(path).unwrap();
            file.write_all(&text.as_bytes()[..10]).unwrap();
            assert_eq!(reader.next().unwrap(), Batch::Idle);
            file.write_all(&text.as_bytes()[10..]).unwrap();
            assert_eq!(read(&mut reader), "first\n");

            file.write_all(line("stdout", "last of old\n", 2).as_bytes()).unwrap();
            std::fs::rename(path, numbered(path, 1)).unwrap();
            std::fs::write(path, line("stdout", "first of new\n", 3)).unwrap();
            assert_eq!(read(&mut reader), "last of old\nfirst of new\n");
        });
    }

    #[test]
    fn a_missing_log_is_empty_and_broken_lines_are_skipped() {
        let folder = folder();
        let mut reader = LogReader::open(&folder.join("none"), Format::JsonFile, all(), true).unwrap();
        assert_eq!(reader.next().unwrap(), Batch::Idle);
        std::fs::remove_dir_all(folder).unwrap();
        with_log(&format!("{{\"log\":\"half\n{}", line("stdout", "good\n", 1)), |path| {
            assert_eq!(read_all(path, all()), "good\n");
        });
    }

    #[test]
    fn the_tail_of_a_large_log_is_found_from_its_end() {
        let lines: String = (0..5000).map(|number| line("stdout", &format!("{number}\n"), 1)).collect();
        with_log(&lines, |path| {
            assert_eq!(read_all(path, LogQuery { tail: Some(2), ..all() }), "4998\n4999\n");
            assert_eq!(read_all(path, LogQuery { tail: Some(5000), ..all() }).lines().count(), 5000);
        });
    }

    #[test]
    fn local_logs_are_read_followed_and_tailed_also_when_compressed() {
        let entry = |text: &str| {
            let body = [b"\x0a\x06stdout\x10\x01\x1a", &[text.len() as u8][..], text.as_bytes()].concat();
            let length = (body.len() as u32).to_be_bytes();
            [&length[..], &body, &length].concat()
        };
        let folder = folder();
        let path = folder.join("container.log");
        std::fs::write(&path, [entry("three"), entry("four")].concat()).unwrap();
        let packed = File::create(folder.join("container.log.1.gz")).unwrap();
        let mut encoder = flate2::write::GzEncoder::new(packed, flate2::Compression::fast());
        encoder.write_all(&[entry("one"), entry("two")].concat()).unwrap();
        encoder.finish().unwrap();
        let text = |tail| {
            let query = LogQuery { tail, ..all() };
            read(&mut LogReader::open(&path, Format::Local, query, true).unwrap())
        };
        assert_eq!(text(None), "one\ntwo\nthree\nfour\n");
        assert_eq!(text(Some(3)), "two\nthree\nfour\n");
        assert_eq!(text(Some(0)), "");
        let mut reader = LogReader::open(&path, Format::Local, all(), true).unwrap();
        read(&mut reader);
        let mut file = std::fs::OpenOptions::new().append(true).open(&path).unwrap();
        let five = entry("five");
        file.write_all(&five[..7]).unwrap();
        assert_eq!(reader.next().unwrap(), Batch::Idle);
        file.write_all(&five[7..]).unwrap();
        assert_eq!(read(&mut reader), "five\n");
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn details_come_before_the_line() {
        let line =
            r#"{"log":"x\n","stream":"stdout","attrs":{"a b":"1","c":"é"},"time":"2026-01-02T03:04:05Z"}"#;
        with_log(&format!("{line}\n"), |path| {
            assert_eq!(read_all(path, LogQuery { details: true, ..all() }), "a+b=1,c=%C3%A9 x\n");
        });
    }
}
