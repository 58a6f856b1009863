//! `engine cp`: files out of a container and into one. Where things end up, and under which name, is as with `docker cp`.

use crate::arguments::CpArgs;
use crate::docker::{ApiError, Docker, encode};
use crate::output::{note, size};
use crate::pull::upload;
use anyhow::{Context, Result, bail, ensure};
use guest_api::files::{PATH_STAT_HEADER, PathStat};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::{Method, StatusCode};
use std::fs::Metadata;
use std::io::{self, ErrorKind, PipeReader, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe;

/// Standard input or output, as an archive.
const STREAM: &str = "-";
/// Of Go's `os.FileMode`.
const GO_FOLDER: u32 = 1 << 31;
const GO_LINK: u32 = 1 << 27;
/// So many links in a row lead nowhere.
const LINKS_MAX: usize = 32;

/// One of the two ends, as typed.
#[derive(Debug, PartialEq)]
enum End<'a> {
    Stream,
    Local(&'a str),
    Container { name: &'a str, path: &'a str },
}

impl<'a> End<'a> {
    fn parse(typed: &'a str) -> Self {
        if typed == STREAM {
            return Self::Stream;
        }
        match typed.split_once(':') {
            // A colon in a path of this computer is kept apart by a `/` or `./` before it.
            Some((name, path)) if !typed.starts_with(['/', '.']) => Self::Container { name, path },
            _ => Self::Local(typed),
        }
    }
}

pub(crate) async fn copy(docker: &Docker, args: &CpArgs) -> Result<()> {
    let (bytes, target) = match (End::parse(&args.source), End::parse(&args.target)) {
        (End::Container { .. }, End::Container { .. }) => {
            bail!("copying between containers is not supported")
        }
        (End::Container { name, path }, target) => {
            let container = Container { docker, name };
            let bytes = match target {
                End::Local(target) => container.copy_out(path, target, args).await?,
                _ => return container.stream_out(path, args).await,
            };
            (bytes, args.target.clone())
        }
        (source, End::Container { name, path }) => {
            let container = Container { docker, name };
            let bytes = match source {
                End::Local(source) => container.copy_in(source, path, args).await?,
                _ => return container.stream_in(path, args).await,
            };
            (bytes, args.target.clone())
        }
        _ => bail!("must specify at least one container source"),
    };
    if !args.quiet {
        note(&format!("Successfully copied {} to {target}", size(i64::try_from(bytes)?)));
    }
    Ok(())
}

struct Container<'a> {
    docker: &'a Docker,
    name: &'a str,
}

impl Container<'_> {
    fn archive(&self, path: &str) -> String {
        format!("/containers/{}/archive?path={}", encode(self.name), encode(path))
    }

    /// What is at a path; `None` when there is nothing.
    async fn stat(&self, path: &str) -> Result<Option<PathStat>> {
        match self.docker.stream(Method::HEAD, &self.archive(path), crate::docker::empty()).await {
            Ok(response) => {
                let header = response.headers().get(PATH_STAT_HEADER);
                let stat = header.and_then(|value| PathStat::decode(value.as_bytes()));
                stat.map(Some).context("the engine did not say what is at the path in the container")
            }
            Err(error) => match error.downcast_ref::<ApiError>() {
                // No container is an error of the copy itself, which words it better than an answer without a body.
                Some(api) if api.status == StatusCode::NOT_FOUND => Ok(None),
                _ => Err(error),
            },
        }
    }

    /// The path at the end of a chain of links, and what is there.
    async fn resolved(&self, path: &str) -> Result<(String, Option<PathStat>)> {
        let mut path = path.to_owned();
        for _ in 0..LINKS_MAX {
            match self.stat(&path).await? {
                Some(stat) if stat.mode & GO_LINK != 0 => path = stat.link_target,
                stat => return Ok((path, stat)),
            }
        }
        bail!("`{path}` in the container is the end of too many symbolic links")
    }

    async fn opened(&self, path: &str, args: &CpArgs) -> Result<(String, Incoming)> {
        let path = if args.follow_link { self.resolved(path).await?.0 } else { path.to_owned() };
        let response = self.docker.stream(Method::GET, &self.archive(&path), crate::docker::empty()).await?;
        Ok((path, response.into_body()))
    }

    async fn stream_out(&self, path: &str, args: &CpArgs) -> Result<()> {
        crate::archive::copy(self.opened(path, args).await?.1, &mut crate::output::stdout()).await
    }

    async fn stream_in(&self, path: &str, args: &CpArgs) -> Result<()> {
        let (path, stat) = self.resolved(path).await?;
        ensure!(
            stat.is_none_or(|stat| stat.mode & GO_FOLDER != 0),
            "destination \"{}:{path}\" must be a directory",
            self.name
        );
        self.put(&path, upload(tokio::io::stdin()), args).await
    }

    async fn put(&self, folder: &str, body: crate::docker::Body, args: &CpArgs) -> Result<()> {
        let owners = if args.archive { "&copyUIDGID=true" } else { "" };
        let path = format!("{}&noOverwriteDirNonDir=true{owners}", self.archive(folder));
        self.docker.stream(Method::PUT, &path, body).await.map(drop)
    }

    /// The bytes that came.
    async fn copy_out(&self, source: &str, target: &str, args: &CpArgs) -> Result<u64> {
        let (source, mut body) = self.opened(source, args).await?;
        let (reader, writer) = io::pipe().context("cannot make a pipe")?;
        let place = Place::of(Path::new(target), target.ends_with('/'))?;
        let keep_owners = args.archive;
        let unpacking =
            tokio::task::spawn_blocking(move || place.unpack(reader, base_name(&source), keep_owners));
        let mut writer = pipe::Sender::from_owned_fd(OwnedFd::from(writer))?;
        let mut bytes = 0;
        let passed = async {
            while let Some(frame) = body.frame().await {
                if let Ok(data) = frame.context("the engine broke off the archive")?.into_data() {
                    bytes += u64::try_from(data.len())?;
                    writer.write_all(&data).await?;
                }
            }
            Ok::<_, anyhow::Error>(())
        }
        .await;
        drop(writer);
        // Whoever unpacks knows better why a pipe broke.
        unpacking.await?.with_context(|| format!("cannot copy to `{target}`"))?;
        passed.map(|()| bytes)
    }

    /// The bytes that went.
    async fn copy_in(&self, source: &str, target: &str, args: &CpArgs) -> Result<u64> {
        let told = || format!("cannot copy `{source}`");
        let follow = args.follow_link || source.ends_with('/');
        let path = PathBuf::from(source);
        let metadata = if follow { path.metadata() } else { path.symlink_metadata() }.with_context(told)?;
        let (target, stat) = self.resolved(target).await?;
        let is_folder = stat.as_ref().map(|stat| stat.mode & GO_FOLDER != 0);
        let (folder, name) = match is_folder {
            Some(true) => (target.as_str(), base_name(source)),
            Some(false) if metadata.is_dir() => bail!("cannot copy directory"),
            None if !metadata.is_dir() && target.ends_with('/') => bail!("no such directory"),
            _ => split(&target),
        };
        let (reader, writer) = io::pipe().context("cannot make a pipe")?;
        let name = name.to_owned();
        let packing = tokio::task::spawn_blocking(move || pack(&path, &metadata, &name, follow, writer));
        let body = upload(pipe::Receiver::from_owned_fd(OwnedFd::from(reader))?);
        let sent = self.put(folder, body, args).await;
        // An engine that refuses leaves a broken pipe behind it, and says why itself.
        match (packing.await?, sent) {
            (Ok(bytes), Ok(())) => Ok(bytes),
            (Err(error), Err(refused)) if error.kind() == ErrorKind::BrokenPipe => Err(refused),
            (Err(error), _) => Err(error).with_context(told),
            (Ok(_), Err(refused)) => Err(refused),
        }
    }
}

/// Where on this computer things go.
#[derive(Debug, PartialEq)]
enum Place {
    /// Into this folder, under their own names.
    Into(PathBuf),
    /// As this name; whether something that is no folder is there now.
    As { path: PathBuf, is_file: bool, must_be_folder: bool },
}

impl Place {
    fn of(path: &Path, must_be_folder: bool) -> Result<Self> {
        match path.metadata() {
            Ok(metadata) if metadata.is_dir() => return Ok(Self::Into(path.to_owned())),
            Ok(_) => return Ok(Self::As { path: path.to_owned(), is_file: true, must_be_folder }),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| format!("cannot look at `{}`", path.display())),
        }
        let parent = parent(path);
        ensure!(parent.is_dir(), "invalid output path: directory \"{}\" does not exist", parent.display());
        Ok(Self::As { path: path.to_owned(), is_file: false, must_be_folder })
    }

    /// What is unpacked under another name is whole before it gets it.
    fn unpack(self, archive: PipeReader, name: &str, keep_owners: bool) -> Result<()> {
        let (path, is_file, must_be_folder) = match self {
            Self::Into(folder) => return unpack(archive, &folder, keep_owners),
            Self::As { path, is_file, must_be_folder } => (path, is_file, must_be_folder),
        };
        let beside = parent(&path).join(format!(".engine-cp.{}", std::process::id()));
        std::fs::create_dir(&beside)
            .with_context(|| format!("cannot make the folder `{}`", beside.display()))?;
        let result = (|| {
            unpack(archive, &beside, keep_owners)?;
            let came = if name == "." { beside.clone() } else { beside.join(name) };
            let is_folder = came.symlink_metadata()?.is_dir();
            ensure!(!(is_file && is_folder), "cannot copy directory");
            ensure!(is_folder || !must_be_folder, "no such directory");
            Ok(std::fs::rename(&came, &path)?)
        })();
        match std::fs::remove_dir_all(&beside) {
            Err(error) if error.kind() != ErrorKind::NotFound && result.is_ok() => {
                Err(error).with_context(|| format!("cannot remove the folder `{}`", beside.display()))
            }
            _ => result,
        }
    }
}

fn unpack(archive: PipeReader, folder: &Path, keep_owners: bool) -> Result<()> {
    let mut archive = tar::Archive::new(archive);
    archive.set_preserve_ownerships(keep_owners);
    // Refuses what would land outside the folder, by its name or through a link.
    archive.unpack(folder)?;
    // The end of the archive is not always the end of what comes.
    io::copy(&mut archive.into_inner(), &mut io::sink())?;
    Ok(())
}

/// Writes `path` as an archive in which it is called `name`; the bytes of it.
fn pack(path: &Path, metadata: &Metadata, name: &str, follow: bool, target: impl Write) -> io::Result<u64> {
    let mut builder = tar::Builder::new(Counted { target, bytes: 0 });
    builder.follow_symlinks(false);
    if metadata.is_dir() {
        builder.append_dir_all(name, path)?;
    } else if follow {
        builder.append_path_with_name(std::fs::canonicalize(path)?, name)?;
    } else {
        builder.append_path_with_name(path, name)?;
    }
    let mut counted = builder.into_inner()?;
    counted.flush()?;
    Ok(counted.bytes)
}

struct Counted<W> {
    target: W,
    bytes: u64,
}

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let count = self.target.write(buffer)?;
        self.bytes += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.target.flush()
    }
}

/// The last name of a path as typed; `.` for `x/.` and for the root.
fn base_name(path: &str) -> &str {
    match path.trim_end_matches('/').rsplit('/').next() {
        None | Some("" | "..") => ".",
        Some(name) => name,
    }
}

/// The folder of a path in a container, and its last name.
fn split(path: &str) -> (&str, &str) {
    let path = path.trim_end_matches("/.").trim_end_matches('/');
    match path.rsplit_once('/') {
        None => ("/", path),
        Some(("", name)) => ("/", name),
        Some((folder, name)) => (folder, name),
    }
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_colon_names_a_container_unless_a_path_began() {
        assert_eq!(End::parse("web:/etc/x:y"), End::Container { name: "web", path: "/etc/x:y" });
        for local in ["/a:b", "./a:b", "../a:b", "plain"] {
            assert_eq!(End::parse(local), End::Local(local));
        }
        assert_eq!(End::parse("-"), End::Stream);
    }

    #[test]
    fn names_are_the_last_of_a_path() {
        for (path, name) in
            [("/a/b", "b"), ("/a/b/", "b"), ("/a/.", "."), ("/", "."), ("b", "b"), ("..", ".")]
        {
            assert_eq!(base_name(path), name, "{path}");
        }
        for (path, parts) in
            [("/a/b", ("/a", "b")), ("/b/", ("/", "b")), ("b", ("/", "b")), ("/a/b/.", ("/a", "b"))]
        {
            assert_eq!(split(path), parts, "{path}");
        }
    }

    /// Packs `source` as `name` and unpacks it at `target`, as two copies would.
    fn through(source: &Path, name: &str, target: &Path) -> Result<()> {
        let place = Place::of(target, false)?;
        let (reader, writer) = io::pipe()?;
        std::thread::scope(|scope| {
            let packing = scope.spawn(|| pack(source, &source.symlink_metadata()?, name, false, writer));
            let unpacked = place.unpack(reader, name, false);
            let packed = packing.join().expect("it does not panic");
            unpacked?;
            assert!(packed? > 0);
            Ok(())
        })
    }

    #[test]
    fn things_land_where_docker_puts_them() {
        let folder = std::env::temp_dir().join(format!("host-cli-copy-{}", std::process::id()));
        let tree = folder.join("tree");
        std::fs::create_dir_all(tree.join("inner")).unwrap();
        std::fs::create_dir(folder.join("there")).unwrap();
        std::fs::write(tree.join("inner/file"), "text").unwrap();
        let read = |path: &str| std::fs::read_to_string(folder.join(path)).unwrap();

        through(&tree, "tree", &folder.join("new")).unwrap();
        assert_eq!(read("new/inner/file"), "text", "a folder under a new name");
        through(&tree, "tree", &folder.join("there")).unwrap();
        assert_eq!(read("there/tree/inner/file"), "text", "a folder into one");
        through(&tree, ".", &folder.join("there")).unwrap();
        assert_eq!(read("there/inner/file"), "text", "what is in a folder into one");
        through(&tree, ".", &folder.join("fresh")).unwrap();
        assert_eq!(read("fresh/inner/file"), "text", "what is in a folder under a new name");
        through(&tree.join("inner/file"), "file", &folder.join("renamed")).unwrap();
        assert_eq!(read("renamed"), "text", "a file under a new name");
        std::fs::write(folder.join("renamed"), "older").unwrap();
        through(&tree.join("inner/file"), "file", &folder.join("renamed")).unwrap();
        assert_eq!(read("renamed"), "text", "a file over a file");

        let refused = through(&tree, "tree", &folder.join("renamed")).unwrap_err().to_string();
        assert_eq!((refused.as_str(), read("renamed").as_str()), ("cannot copy directory", "text"));
        let refused = through(&tree, "tree", &folder.join("no/such")).unwrap_err().to_string();
        assert!(refused.contains("does not exist"), "{refused}");
        let left: Vec<_> =
            std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert!(!left.iter().any(|name| name.to_string_lossy().starts_with(".engine-cp")), "{left:?}");
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn an_archive_cannot_write_beside_its_folder() {
        let folder = std::env::temp_dir().join(format!("host-cli-escape-{}", std::process::id()));
        let target = folder.join("target");
        std::fs::create_dir_all(&target).unwrap();
        let mut builder = tar::Builder::new(Vec::new());
        let entry = |kind: tar::EntryType, link: &str| {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(kind);
            header.set_size(0);
            header.set_mode(0o644);
            if !link.is_empty() {
                header.set_link_name(link).unwrap();
            }
            header
        };
        let mut link = entry(tar::EntryType::Symlink, "..");
        builder.append_data(&mut link, "out", io::empty()).unwrap();
        let mut file = entry(tar::EntryType::Regular, "");
        builder.append_data(&mut file, "out/canary", io::empty()).unwrap();
        let bytes = builder.into_inner().unwrap();
        let (reader, mut writer) = io::pipe().unwrap();
        writer.write_all(&bytes).unwrap();
        drop(writer);
        assert!(unpack(reader, &target, false).is_err());
        assert!(!folder.join("canary").exists());
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
