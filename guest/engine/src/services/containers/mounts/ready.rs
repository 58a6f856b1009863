//! From the record to what the runtime mounts, while a container starts; and back when it has ended.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use guest_volumes::{
    PROPAGATION_DEFAULT, PropagationError, check_shared, check_slave, merge_tmpfs_options, open_beneath,
    open_within,
};
use rustix::fs::OFlags;

use super::super::record::Record;
use super::super::run::{Context, blocking, runtime_text};
use super::point::{MountKind, MountPoint};
use super::temporary;
use super::wanted::check_source;
use crate::failure::Failure;
use crate::host::{Place, Shares};
use crate::plan::Undo;

/// What dockerd adds when a folder and a file meet.
const MISMATCH: &str = ": Are you trying to mount a directory onto a file (or vice-versa)? Check if the specified host path \
                        exists and is the expected type";

/// One mount for the runtime.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadyMount {
    pub destination: PathBuf,
    /// `None` is a tmpfs.
    pub source: Option<PathBuf>,
    pub options: Vec<String>,
}

/// All mounts for the runtime, in the order they are made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ready {
    pub mounts: Vec<ReadyMount>,
    /// What the root of the container must be for them: `shared` or `slave`.
    pub rootfs_propagation: Option<String>,
    /// Something has to be unmounted once the container has its own.
    pub temporary: bool,
}

/// Mounts what has to be, makes missing folders, and describes everything. The root file system is mounted.
pub async fn make_ready(context: &Arc<Context>, record: &Record, undo: &mut Undo) -> Result<Ready, Failure> {
    if record.mounts.is_empty() && record.host.tmpfs.as_ref().is_none_or(BTreeMap::is_empty) {
        return Ok(Ready::default());
    }
    let tmpfs = record.host.tmpfs.clone().unwrap_or_default();
    let record = Arc::new(record.clone());
    let (run_folder, rootfs) = (context.run_folder(&record.id), context.rootfs(&record.id));
    undo.push("follow changes of the container's binds no longer", {
        let (changes, record) = (context.shares.changes.clone(), record.clone());
        move || async move {
            changes.end(&record.id);
            Ok(())
        }
    });
    let mut sources = Vec::new();
    let mut temporary = false;
    for (number, point) in record.mounts.iter().enumerate() {
        // A tmpfs of the short form lies over everything else.
        if tmpfs.keys().any(|place| Path::new(place) == point.destination) {
            continue;
        }
        let mut source = point.source.clone();
        if point.is_volume() {
            source = context.volumes.mount(&point.name, &record.id).await?;
            announce(context, &record, point);
            undo.push("unmount a volume", {
                let (context, record, point) = (context.clone(), record.clone(), point.clone());
                move || async move { Ok(unmount(&context, &record, &point).await?) }
            });
        }
        if point.kind == MountKind::Image || !point.subpath.is_empty() {
            if !temporary {
                temporary = true;
                undo.push("unmount what was mounted for the start", {
                    let run_folder = run_folder.clone();
                    move || async move {
                        Ok(tokio::task::spawn_blocking(move || temporary::clear(&run_folder)).await??)
                    }
                });
            }
            source = mount_part(context, &run_folder, number, point, source).await?;
        }
        if point.kind == MountKind::Bind {
            source = bind_source(&context.shares, point).await?;
            context.shares.changes.bind(&record.id, &source).await;
        }
        sources.push((number, source));
    }
    let data_root = context.data_root().to_owned();
    let described = tokio::task::spawn_blocking(move || {
        let points: Vec<(&MountPoint, &Path)> =
            sources.iter().map(|(number, source)| (&record.mounts[*number], source.as_path())).collect();
        describe(&points, &tmpfs, &rootfs, &data_root)
    });
    let mut ready = described
        .await
        .map_err(|error| Failure::internal("preparing the container's mounts failed", &error))??;
    ready.temporary = temporary;
    Ok(ready)
}

fn announce(context: &Context, record: &Record, point: &MountPoint) {
    let place = point.destination.display().to_string();
    context.volumes.mount_event(&point.name, &record.id, &place, !point.read_only, &point.propagation);
}

async fn unmount(context: &Context, record: &Record, point: &MountPoint) -> Result<(), Failure> {
    context.volumes.unmount(&point.name, &record.id).await?;
    context.volumes.unmount_event(&point.name, &record.id);
    Ok(())
}

/// The container has ended: its volumes are mounted for it no more, and nobody hears what changes in its binds. Goes on past failures and logs them.
pub async fn end(context: &Context, record: &Record) {
    context.shares.changes.end(&record.id);
    for point in record.mounts.iter().filter(|point| point.is_volume()) {
        if let Err(error) = unmount(context, record, point).await {
            tracing::warn!(container = record.short_id(), volume = point.name, %error, "stays mounted");
        }
    }
}

/// Mounts an image, or part of it or of a volume, for the runtime to find.
async fn mount_part(
    context: &Arc<Context>,
    run_folder: &Path,
    number: usize,
    point: &MountPoint,
    volume: PathBuf,
) -> Result<PathBuf, Failure> {
    let base = if point.kind == MountKind::Image {
        let whole = temporary::place(run_folder, number);
        let (snapshotter, key, target) = (context.snapshotter(), point.snapshot.clone(), whole.clone());
        blocking(move || snapshotter.mount(&key, &target)).await?;
        whole
    } else {
        volume
    };
    if point.subpath.is_empty() {
        return Ok(base);
    }
    // Beside the numbers of whole mounts.
    let (run_folder, subpath, number) = (run_folder.to_owned(), point.subpath.clone(), number + PARTS_FROM);
    let attached = tokio::task::spawn_blocking(move || {
        let whole = base.join(&subpath);
        let failed = |error: &io::Error| {
            let shown = whole.display();
            if error.raw_os_error() == Some(rustix::io::Errno::XDEV.raw_os_error()) {
                return Failure::invalid(format!(
                    "path concatenation escapes the base directory, base: {}, subpath: {subpath}",
                    base.display()
                ));
            }
            match error.kind() {
                io::ErrorKind::NotFound => {
                    let missing =
                        whole.ancestors().take_while(|path| path.symlink_metadata().is_err()).last();
                    Failure::not_found(format!(
                        "cannot access path {shown}: lstat {}: no such file or directory",
                        missing.unwrap_or(&whole).display()
                    ))
                }
                _ => Failure::internal(format!("cannot access path {shown}"), error),
            }
        };
        let folder = temporary::open(&base).map_err(|error| failed(&error))?;
        let part =
            open_beneath(&folder, Path::new(&subpath), OFlags::PATH).map_err(|error| failed(&error))?;
        temporary::attach(&part, &run_folder, number).map_err(|error| failed(&error))
    });
    attached.await.map_err(|error| Failure::internal("mounting part of a volume failed", &error))?
}

/// Numbers of parts begin here.
const PARTS_FROM: usize = 1 << 16;

fn describe(
    points: &[(&MountPoint, &Path)],
    tmpfs: &BTreeMap<String, String>,
    rootfs: &Path,
    data_root: &Path,
) -> Result<Ready, Failure> {
    let mut ready = Ready::default();
    let root = temporary::open(rootfs)
        .map_err(|error| Failure::internal("cannot open the root file system", &error))?;
    let existing = |place: &Path| {
        open_within(&root, place, OFlags::PATH).ok().and_then(|found| fs::File::from(found).metadata().ok())
    };
    for (point, source) in points {
        if point.kind == MountKind::Tmpfs {
            let metadata = existing(&point.destination);
            ready.mounts.push(tmpfs_mount(&point.destination, &point.options, metadata.as_ref())?);
            continue;
        }
        let options = options(point, source, data_root, &mut ready.rootfs_propagation)?;
        // What lies in another mount is not to be seen yet.
        let nested = points.iter().any(|(other, _)| {
            other.destination != point.destination && point.destination.starts_with(&other.destination)
        });
        if !nested
            && let (Ok(from), Some(onto)) = (fs::metadata(source), existing(&point.destination))
            && from.is_dir() != onto.is_dir()
        {
            let (source, place) = (source.display(), point.destination.display());
            let text = runtime_text(&format!(
                "runc create failed: unable to start container process: error during container init: error mounting \
                 {:?} to rootfs at {:?}: mount {source}:{place}, flags: 0x5000: not a directory",
                source.to_string(),
                place.to_string()
            ));
            return Err(Failure::invalid(text + MISMATCH));
        }
        let mount = ReadyMount {
            destination: point.destination.clone(),
            source: Some((*source).to_owned()),
            options,
        };
        ready.mounts.push(mount);
    }
    for (place, words) in tmpfs {
        let place = Path::new(place);
        ready.mounts.push(tmpfs_mount(place, words, existing(place).as_ref())?);
    }
    // What lies in another's place comes after it.
    ready.mounts.sort_by_key(|mount| mount.destination.components().count());
    Ok(ready)
}

/// Where the source of a bind is. In the short form it is made when it is missing.
async fn bind_source(shares: &Shares, point: &MountPoint) -> Result<PathBuf, Failure> {
    let place = match shares.find(&point.source, !point.must_exist).await? {
        Place::At(place) => return Ok(place),
        missing => {
            check_source(point, true)?;
            missing.path()?
        }
    };
    let what = format!("error while creating mount source path '{}'", point.source.display());
    let source = place.clone();
    let made = tokio::task::spawn_blocking(move || fs::create_dir_all(&source)).await;
    made.map_err(|error| Failure::internal(&what, &error))?
        .map_err(|error| Failure::internal(&what, &error))?;
    Ok(place)
}

fn options(
    point: &MountPoint,
    source: &Path,
    data_root: &Path,
    rootfs: &mut Option<String>,
) -> Result<Vec<String>, Failure> {
    let conflict = |what: &str| Err(Failure::broken(format!("mount options conflict: {what}")));
    match (point.read_only, point.read_only_non_recursive, point.read_only_force_recursive) {
        (false, true, _) => return conflict("!ReadOnly && BindOptions.ReadOnlyNonRecursive"),
        (false, _, true) => return conflict("!ReadOnly && BindOptions.ReadOnlyForceRecursive"),
        (_, true, true) => return conflict("ReadOnlyNonRecursive && BindOptions.ReadOnlyForceRecursive"),
        _ => {}
    }
    let mut options = vec![if point.non_recursive { "bind" } else { "rbind" }.to_owned()];
    if point.read_only {
        options.push(if point.read_only_non_recursive { "ro" } else { "rro" }.to_owned());
    }
    let mut propagation = point.propagation.as_str();
    let broken = |error: &PropagationError| match error {
        PropagationError::Private { .. } => Failure::broken(error.to_string()),
        other => Failure::internal("cannot tell how the source of a mount passes mounts on", other),
    };
    if propagation.ends_with("shared") {
        check_shared(source).map_err(|error| broken(&error))?;
        *rootfs = Some("shared".to_owned());
    } else if propagation.ends_with("slave") {
        match check_slave(source) {
            Ok(()) => _ = rootfs.get_or_insert_with(|| "slave".to_owned()),
            // Nobody asked for it: it was our own precaution.
            Err(_) if !point.propagation_asked && around(source, data_root) => {
                propagation = PROPAGATION_DEFAULT
            }
            Err(error) => return Err(broken(&error)),
        }
    }
    if !propagation.is_empty() {
        options.push(propagation.to_owned());
    }
    Ok(options)
}

fn around(source: &Path, data_root: &Path) -> bool {
    let (source, root) = (source.display().to_string(), data_root.display().to_string());
    source.starts_with(&root) || root.starts_with(&source)
}

/// A tmpfs over a folder of the image keeps that one's permissions, unless it is given others.
fn tmpfs_mount(place: &Path, words: &str, existing: Option<&fs::Metadata>) -> Result<ReadyMount, Failure> {
    let first = ["noexec", "nosuid", "nodev", PROPAGATION_DEFAULT];
    let mode = existing
        .filter(|metadata| metadata.is_dir())
        .map(|metadata| format!("mode={:04o}", metadata.permissions().mode() & 0o7777));
    let given = words.split(',').filter(|_| !words.is_empty());
    let all = first.into_iter().chain(mode.as_deref()).chain(given);
    let options = merge_tmpfs_options(all).map_err(|error| Failure::broken(error.to_string()))?;
    Ok(ReadyMount { destination: place.to_owned(), source: None, options })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::Changes;
    use crate::store::tests::folder;

    fn bind(source: &str, destination: &str) -> MountPoint {
        MountPoint {
            source: source.into(),
            destination: destination.into(),
            propagation: "rprivate".into(),
            ..MountPoint::default()
        }
    }

    fn described(points: &[MountPoint], tmpfs: &[(&str, &str)]) -> Result<Ready, Failure> {
        let root = folder();
        fs::create_dir_all(root.join("bin")).unwrap();
        fs::create_dir_all(root.join("tmp")).unwrap();
        fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
        fs::write(root.join("file"), "").unwrap();
        std::os::unix::fs::symlink("/etc/passwd", root.join("link")).unwrap();
        let points: Vec<(&MountPoint, &Path)> =
            points.iter().map(|point| (point, point.source.as_path())).collect();
        let tmpfs = tmpfs.iter().map(|(place, words)| ((*place).to_owned(), (*words).to_owned())).collect();
        let result = describe(&points, &tmpfs, &root, Path::new("/var/lib/engine"));
        fs::remove_dir_all(root).unwrap();
        result
    }

    #[test]
    fn words_for_the_runtime() {
        let mut read_only = bind("/etc", "/a/b");
        read_only.read_only = true;
        let mut shallow = bind("/etc", "/c");
        (shallow.read_only, shallow.read_only_non_recursive, shallow.non_recursive) = (true, true, true);
        let volume = MountPoint { kind: MountKind::Volume, propagation: String::new(), ..bind("/etc", "/v") };
        let ready =
            described(&[read_only, shallow, volume], &[("/tmp", "size=1m,exec"), ("/new", "")]).unwrap();
        let words = |place: &str| {
            let mount = ready.mounts.iter().find(|mount| mount.destination == Path::new(place)).unwrap();
            mount.options.join(",")
        };
        assert_eq!(words("/a/b"), "rbind,rro,rprivate");
        assert_eq!(words("/c"), "bind,ro,rprivate");
        assert_eq!(words("/v"), "rbind");
        assert_eq!(words("/tmp"), "nosuid,nodev,rprivate,mode=1777,size=1m,exec");
        assert_eq!(words("/new"), "noexec,nosuid,nodev,rprivate");
        assert_eq!(ready.mounts.last().unwrap().destination, Path::new("/a/b"));
        assert_eq!(ready.rootfs_propagation, None);
    }

    #[test]
    fn a_folder_and_a_file_do_not_meet() {
        for (source, destination) in [("/etc", "/file"), ("/etc/passwd", "/bin")] {
            let failure = described(&[bind(source, destination)], &[]).unwrap_err();
            assert!(failure.message.contains("not a directory"), "{failure}");
            assert!(failure.message.contains("Are you trying to mount a directory onto a file"), "{failure}");
            assert_eq!(failure.kind, guest_api::ErrorKind::Invalid);
        }
        // The link leads to nothing within the root, and a file within another mount is not to be seen.
        described(&[bind("/etc", "/link")], &[]).unwrap();
        described(&[bind("/etc", "/bin"), bind("/etc/passwd", "/bin/passwd")], &[]).unwrap();
    }

    #[test]
    fn conflicting_options_have_dockerds_sentences() {
        let refusal = |change: &dyn Fn(&mut MountPoint)| {
            let mut point = bind("/etc", "/x");
            change(&mut point);
            described(&[point], &[]).unwrap_err().message
        };
        assert_eq!(
            refusal(&|point| point.read_only_force_recursive = true),
            "mount options conflict: !ReadOnly && BindOptions.ReadOnlyForceRecursive"
        );
        assert_eq!(
            refusal(&|point| point.read_only_non_recursive = true),
            "mount options conflict: !ReadOnly && BindOptions.ReadOnlyNonRecursive"
        );
        assert!(described(&[], &[("/x", "frob")]).unwrap_err().message.starts_with("invalid tmpfs option"));
    }

    #[tokio::test]
    async fn a_missing_source_is_made_for_the_short_form_only() {
        let folder = tempfile::tempdir().unwrap();
        let shares = Shares {
            outside: None,
            changes: Changes::default(),
            socket: None,
            data_root: "/var/lib/engine".into(),
        };
        let source = folder.path().join("a/b");
        let mut point = bind(source.to_str().unwrap(), "/x");
        point.must_exist = true;
        let refused = bind_source(&shares, &point).await.unwrap_err().message;
        assert!(
            refused.ends_with(&format!("bind source path does not exist: {}", source.display())),
            "{refused}"
        );
        assert!(!folder.path().join("a").exists());
        point.must_exist = false;
        assert_eq!(bind_source(&shares, &point).await.unwrap(), source);
        assert!(source.is_dir());
    }
}
