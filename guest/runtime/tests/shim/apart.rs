//! Containers that are made where the mounts of others are not to be seen.

use std::fs;
use std::path::Path;
use std::process::Command;

use guest_runtime::shim::{Request, ShimSpec};
use oci_spec::runtime::{Mount, Spec};

use crate::bench::*;

fn mount(arguments: &[&str], target: &Path) {
    assert!(Command::new("mount").args(arguments).arg(target).status().unwrap().success(), "{arguments:?}");
}

fn namespace_of(pid: &str) -> std::path::PathBuf {
    fs::read_link(format!("/proc/{pid}/ns/mnt")).unwrap()
}

#[test]
fn a_container_is_made_without_the_mounts_of_others_and_with_its_own() {
    isolated(|| {
        let bench = Bench::new();
        let folder = bench.folder.clone();
        mount(&["--bind", folder.to_str().unwrap()], &folder);
        let (theirs, shared) = (folder.join("theirs"), folder.join("shared"));
        for place in [&theirs, &shared] {
            fs::create_dir(place).unwrap();
            mount(&["-t", "tmpfs", "tmpfs"], place);
            fs::write(place.join("file"), "").unwrap();
        }
        let bind = |source: &Path, destination: &str| {
            let mut mount = Mount::default();
            mount.set_typ(Some("bind".into())).set_source(Some(source.to_owned()));
            mount.set_destination(destination.into()).set_options(Some(vec!["rbind".into()]));
            mount
        };
        let change = |propagation: Option<&'static str>| {
            let (folder, shared) = (folder.clone(), shared.clone());
            move |shim: &mut ShimSpec, spec: &mut Spec| {
                shim.mounts = Some(folder.clone());
                let mut mounts = spec.mounts().clone().unwrap();
                mounts.extend([bind(&folder, "/all"), bind(&shared, "/shared")]);
                spec.set_mounts(Some(mounts));
                let mut linux = spec.linux().clone().unwrap();
                linux.set_rootfs_propagation(propagation.map(str::to_owned));
                spec.set_linux(Some(linux));
            }
        };
        let before = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let mut ended = Vec::new();
        // Whoever passes mounts on sees them all.
        for (propagation, seen) in
            [(None, "/shared/file\n"), (Some("shared"), "/all/theirs/file\n/shared/file\n")]
        {
            let script =
                "for file in /all/theirs/file /shared/file; do test -e $file && echo $file; done; true";
            let mut shim = bench.shim_with(&["sh", "-c", script], change(propagation));
            let (exit, stdout, stderr) = shim.run();
            assert_eq!((exit.code, stdout.as_str()), (0, seen), "{propagation:?}: {stderr}");
            let pid = shim.child.as_ref().unwrap().id().to_string();
            assert_eq!(namespace_of(&pid), namespace_of("self"), "the shim is where it was");
            assert_eq!(fs::read_link(format!("/proc/{pid}/cwd")).unwrap(), Path::new("/"));
            shim.connect().ask(&Request::Delete).unwrap();
            assert!(shim.child.take().unwrap().wait().unwrap().success(), "{}", shim.errors());
            ended.push(shim);
        }
        assert_eq!(fs::read_to_string("/proc/self/mountinfo").unwrap(), before);
        assert!(theirs.join("file").exists());
        for place in [&theirs, &shared, &folder] {
            assert!(Command::new("umount").arg(place).status().unwrap().success(), "{place:?}");
        }
        ended.iter().for_each(Shim::assert_clean);
    });
}

#[test]
fn what_is_no_mount_is_told() {
    isolated(|| {
        let bench = Bench::new();
        let folder = bench.folder.clone();
        let shim = bench.shim_with(&["true"], |shim, _| shim.mounts = Some(folder));
        let error = shim.connect().create().unwrap_err().to_string();
        assert!(error.contains("cannot make the container apart from the mounts of others"), "{error}");
        let pid = shim.child.as_ref().unwrap().id().to_string();
        assert_eq!(namespace_of(&pid), namespace_of("self"));
        shim.delete();
    });
}
