//! Whose the files are: on the host's disk and in the guest.

use std::os::unix::fs::MetadataExt;

use rustix::io::Errno;

use super::guest::Guest;
use super::{ROOT, folder, spec};
use crate::ExportSpec;
use crate::owner::Owners;

fn mapped() -> (tempfile::TempDir, Guest, u64) {
    let folder = folder();
    let guest = Guest::new();
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let owners = Owners::Mapped { uid, gid };
    guest.server.add(ExportSpec { owners, ..spec("one", folder.path()) }).unwrap();
    let root = guest.lookup(ROOT, "one").unwrap().node;
    (folder, Guest { uid: 999, gid: 100, ..guest }, root)
}

#[test]
fn files_of_anybody_inside_are_the_users_outside() {
    let (folder, guest, root) = mapped();
    let (file, _) = guest.create(root, "file", 2, 0o4044).unwrap();
    let shown = (file.attributes.uid, file.attributes.gid, file.attributes.mode);
    assert_eq!(shown, (999, 100, 0o104044));
    let on_disk = std::fs::metadata(folder.path().join("file")).unwrap();
    assert_eq!(on_disk.uid(), rustix::process::geteuid().as_raw());
    // Open to us, and without the bit that would lend our rights.
    assert_eq!(on_disk.mode(), 0o100644);
    let made = guest.make_folder(root, "folder", 0).unwrap();
    assert_eq!((made.attributes.uid, made.attributes.mode), (999, 0o40000));
    assert!(guest.lookup(made.node, "x").is_err_and(|error| error == Errno::NOENT));
    // Another guest's kernel, after a reboot, sees the same.
    guest.server.reset();
    let root = guest.lookup(ROOT, "one").unwrap().node;
    let file = guest.lookup(root, "file").unwrap();
    assert_eq!((file.attributes.uid, file.attributes.gid, file.attributes.mode), shown);
}

#[test]
fn owners_and_permissions_are_changed_for_the_guest_alone() {
    let (folder, guest, root) = mapped();
    let path = folder.path().join("file");
    std::fs::write(&path, "x").unwrap();
    let before = std::fs::metadata(&path).unwrap();
    let file = guest.lookup(root, "file").unwrap();
    assert_eq!((file.attributes.uid, file.attributes.mode & 0o777), (before.uid(), before.mode() & 0o777));
    let changed = guest.change(file.node, 1 | 2 | 4, (0o2751, 33, 44, 0)).unwrap();
    assert_eq!((changed.uid, changed.gid, changed.mode), (33, 44, 0o102751));
    let after = std::fs::metadata(&path).unwrap();
    assert_eq!((after.uid(), after.gid(), after.mode()), (before.uid(), before.gid(), 0o100751));
    // The host's own change of permissions counts; the owner stays.
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let seen = guest.attributes(file.node).unwrap();
    assert_eq!((seen.uid, seen.mode), (33, 0o100600));
    // Given back to the user, nothing is noted beside the file any more.
    guest.change(file.node, 1 | 2 | 4, (0o644, before.uid(), before.gid(), 0)).unwrap();
    let mut value = [0; 100];
    let noted = rustix::fs::getxattr(&path, crate::owner::ATTRIBUTE, &mut value);
    assert_eq!(noted.map(drop), Err(Errno::NODATA));
}

#[test]
fn pipes_and_sockets_have_the_permissions_they_were_given() {
    let (folder, guest, root) = mapped();
    for (kind, name) in [(0o010000, "pipe"), (0o140000, "socket")] {
        let made = guest.make_node(root, name, kind | 0o151).unwrap();
        assert_eq!(made.attributes.mode, kind | 0o151);
        assert_eq!(guest.change(made.node, 1, (0o022, 0, 0, 0)).unwrap().mode, kind | 0o022);
        assert_eq!(std::fs::metadata(folder.path().join(name)).unwrap().mode(), kind | 0o022);
        // They stay the user's: there is no place to note another owner.
        assert_eq!(made.attributes.uid, rustix::process::geteuid().as_raw());
    }
}

#[test]
fn writing_takes_the_set_user_bit_away() {
    let (_folder, guest, root) = mapped();
    let (file, handle) = guest.create(root, "file", 2, 0o6755).unwrap();
    guest.write(handle, 0, b"as its owner with the right").unwrap();
    assert_eq!(guest.attributes(file.node).unwrap().mode, 0o106755);
    guest.write_with(handle, 0, b"as somebody else", 4).unwrap();
    assert_eq!(guest.attributes(file.node).unwrap().mode, 0o100755);
    guest.change(file.node, 1, (0o4700, 0, 0, 0)).unwrap();
    let truncated = guest.change(file.node, 1 << 3 | 1 << 11, (0, 0, 0, 0)).unwrap();
    assert_eq!((truncated.mode, truncated.size), (0o100700, 0));
}

#[test]
fn a_set_group_folder_gives_its_group_on() {
    let (_folder, guest, root) = mapped();
    let team = guest.make_folder(root, "team", 0o755).unwrap().node;
    guest.change(team, 1 | 4, (0o2775, 0, 50, 0)).unwrap();
    let (file, _) = guest.create(team, "file", 2, 0o644).unwrap();
    assert_eq!((file.attributes.uid, file.attributes.gid), (999, 50));
    let below = guest.make_folder(team, "below", 0o755).unwrap();
    assert_eq!((below.attributes.gid, below.attributes.mode), (50, 0o42755));
}

#[test]
fn root_passes_owners_through() {
    if !rustix::process::geteuid().is_root() {
        // Only root can give files away, which is what this is about.
        return;
    }
    let folder = folder();
    let guest = Guest::new();
    guest.server.add(ExportSpec { owners: Owners::Passthrough, ..spec("one", folder.path()) }).unwrap();
    let guest = Guest { uid: 999, gid: 100, ..guest };
    let root = guest.lookup(ROOT, "one").unwrap().node;
    let (file, _) = guest.create(root, "file", 2, 0o600).unwrap();
    guest.symbolic_link(root, "link", "file").unwrap();
    for name in ["file", "link"] {
        let on_disk = std::fs::symlink_metadata(folder.path().join(name)).unwrap();
        assert_eq!((on_disk.uid(), on_disk.gid()), (999, 100));
    }
    assert_eq!(guest.change(file.node, 2, (0, 5, 0, 0)).unwrap().uid, 5);
    assert_eq!(std::fs::metadata(folder.path().join("file")).unwrap().uid(), 5);
}
