//! The shim, for real: containers from a busybox root file system.
//!
//! Needs root, `/bin/busybox` (Debian's busybox-static) and `unshare`. Each test runs itself again in mount and network
//! namespaces of its own, and leaves no process, cgroup, mount or file behind.

mod apart;
mod bench;
mod external;

use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use guest_runtime::cgroup::Cgroup;
use guest_runtime::shim::record::{self, EXIT_FILE};
use guest_runtime::shim::{ConsoleSize, ErrorKind, Exit, LogDriver, Reply, Request, ShimSpec, Status, Stdin};
use guest_runtime::{defaults, device_filter, reap};
use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Spec, User};

use bench::*;

#[test]
fn a_container_runs_and_its_status_output_and_log_are_kept() {
    isolated(|| {
        let bench = Bench::new();
        let shim = bench.shell("echo out; echo err >&2; exit 7");
        assert_eq!(shim.connect().state().unwrap().status, Status::Empty);
        let (exit, stdout, stderr) = shim.run();
        assert_eq!((exit.code, stdout.as_str(), stderr.as_str()), (7, "out\n", "err\n"));
        assert!(!exit.oom_killed);
        let kept: Exit = record::read(&shim.dir, EXIT_FILE).unwrap().unwrap();
        assert_eq!(kept, exit);
        let log = fs::read_to_string(shim.dir.join("json.log")).unwrap();
        assert!(log.contains(r#"{"log":"out\n","stream":"stdout","time":""#), "{log}");
        assert!(log.contains(r#"{"log":"err\n","stream":"stderr","time":""#), "{log}");
        let state = shim.connect().state().unwrap();
        assert_eq!((state.status, state.exit), (Status::Stopped, Some(exit)));
        shim.delete();
    });
}

#[test]
fn output_before_an_attach_is_only_in_the_log() {
    isolated(|| {
        let bench = Bench::new();
        let shim = bench.shim_with(&["sh", "-c", "echo early; read line; echo late $line"], |shim, _| {
            shim.stdin = Stdin::Open;
        });
        shim.connect().create().unwrap();
        shim.connect().start(None).unwrap();
        let log = || fs::read_to_string(shim.dir.join("json.log")).unwrap();
        wait_until("the first line in the log", || log().contains("early"));
        let mut attached = shim.connect().attach(None, true, true, true).unwrap();
        attached.write_all(b"now\n").unwrap();
        assert_eq!(attached.read_split().unwrap().0, b"late now\n");
        assert!(log().contains("late now"));
        shim.delete();
    });
}

#[test]
fn input_goes_through_and_ends_with_the_client() {
    isolated(|| {
        let bench = Bench::new();
        let shim = bench.shim_with(&["cat"], |shim, _| shim.stdin = Stdin::Once);
        let mut attached = shim.connect().attach(None, true, true, true).unwrap();
        let data: Vec<u8> = (0..1_000_000_u32).map(|number| (number % 253) as u8).collect();
        let mut writer = attached.writer().unwrap();
        let sent = data.clone();
        let feeding = std::thread::spawn(move || {
            writer.write_all(&sent).unwrap();
            writer.shutdown(std::net::Shutdown::Write).unwrap();
        });
        shim.connect().create().unwrap();
        shim.connect().start(None).unwrap();
        assert!(attached.read_split().unwrap().0 == data);
        feeding.join().unwrap();
        assert_eq!(shim.connect().wait(None).unwrap().code, 0);
        shim.delete();
    });
}

#[test]
fn open_input_survives_a_client_and_closes_on_request() {
    isolated(|| {
        let bench = Bench::new();
        let shim = bench.shim_with(&["cat"], |shim, _| shim.stdin = Stdin::Open);
        shim.connect().create().unwrap();
        shim.connect().start(None).unwrap();
        let mut watcher = shim.connect().attach(None, false, true, false).unwrap();
        for word in ["one\n", "two\n"] {
            let mut feeder = shim.connect().attach(None, true, false, false).unwrap();
            feeder.write_all(word.as_bytes()).unwrap();
            feeder.close_stdin().unwrap();
        }
        wait_until("both words in the log", || {
            let log = fs::read_to_string(shim.dir.join("json.log")).unwrap();
            log.contains("one") && log.contains("two")
        });
        assert_eq!(shim.connect().state().unwrap().status, Status::Running);
        shim.connect().ask(&Request::CloseStdin { process: None }).unwrap();
        assert_eq!(watcher.read_split().unwrap().0, b"one\ntwo\n");
        assert_eq!(shim.connect().wait(None).unwrap().code, 0);
        shim.delete();
    });
}

#[test]
fn a_terminal_has_a_size_echoes_and_can_be_resized() {
    isolated(|| {
        let bench = Bench::new();
        let script = "stty size; read line; stty size; tty; id -u; echo got:$line";
        let shim = bench.shim_with(&["sh", "-c", script], |shim, _| {
            shim.terminal = true;
            shim.stdin = Stdin::Once;
            shim.console_size = Some(ConsoleSize { width: 100, height: 40 });
        });
        shim.connect().create().unwrap();
        let mut attached = shim.connect().attach(None, true, true, true).unwrap();
        shim.connect().start(None).unwrap();
        let mut seen = Vec::new();
        let mut chunk = [0; 512];
        while !String::from_utf8_lossy(&seen).contains("40 100") {
            let count = attached.read(&mut chunk).unwrap();
            assert!(count > 0, "{seen:?}");
            seen.extend_from_slice(&chunk[..count]);
        }
        shim.connect().ask(&Request::Resize { process: None, width: 132, height: 50 }).unwrap();
        attached.write_all(b"word\n").unwrap();
        attached.read_to_end(&mut seen).unwrap();
        let seen = String::from_utf8(seen).unwrap();
        assert!(seen.contains("word\r\n50 132\r\n/dev/pts/0\r\n0\r\ngot:word\r\n"), "{seen:?}");
        let log = fs::read_to_string(shim.dir.join("json.log")).unwrap();
        assert!(log.contains(r#"{"log":"got:word\r\n","stream":"stdout""#), "{log}");
        assert_eq!(shim.connect().wait(None).unwrap().code, 0);
        shim.delete();
    });
}

#[test]
fn a_process_starts_with_nothing_blocked_confined_and_in_its_environment() {
    isolated(|| {
        let bench = Bench::new();
        let script = "cat /proc/self/status; ls /proc/self/fd | wc -l; echo HOME=$HOME";
        let check = |shown: &str| {
            for line in [
                "SigBlk:\t0000000000000000",
                "SigIgn:\t0000000000000000",
                "Seccomp:\t2",
                "NoNewPrivs:\t0",
                "CapEff:\t00000000a80425fb",
                "CapPrm:\t00000000a80425fb",
                "CapBnd:\t00000000a80425fb",
                "CapInh:\t0000000000000000",
                "CapAmb:\t0000000000000000",
                "HOME=/root",
            ] {
                assert!(shown.lines().any(|shown| shown == line), "{line:?} in {shown}");
            }
            // The three streams, and the folder being listed.
            assert!(shown.lines().any(|line| line == "4"), "{shown}");
        };
        let shim = bench.shell(script);
        let (exit, stdout, stderr) = shim.run();
        assert_eq!(exit.code, 0, "{stderr}");
        check(&stdout);
        shim.delete();
        let shim = bench.idle();
        let (code, shown) = shim.exec_output("e", &["sh", "-c", script]);
        assert_eq!(code, 0, "{shown}");
        check(&shown);
        shim.delete();
    });
}

#[test]
fn the_environment_keeps_its_order_and_gains_a_home() {
    isolated(|| {
        let bench = Bench::new();
        let expected = "PATH=/sbin:/bin\nB=2\nA=1\nHOME=/root\n";
        let shim = bench.shim(&["env"]);
        assert_eq!(shim.run().1, expected);
        shim.delete();
        let shim = bench.idle();
        assert_eq!(shim.exec_output("e", &["env"]), (0, expected.to_owned()));
        shim.delete();
    });
}

#[test]
fn the_filter_refuses_namespaces_and_mounts_in_init_and_exec() {
    isolated(|| {
        let bench = Bench::new();
        let script = "unshare -U true; mount -t tmpfs x /tmp; chroot / true && echo chroot works";
        let check = |shown: &str| {
            assert!(shown.contains("unshare: unshare(0x10000000): Operation not permitted"), "{shown}");
            assert!(
                shown.contains("permission denied") || shown.contains("Operation not permitted"),
                "{shown}"
            );
            assert!(shown.contains("chroot works"), "{shown}");
        };
        let shim = bench.shell(script);
        let (_, stdout, stderr) = shim.run();
        check(&format!("{stdout}{stderr}"));
        shim.delete();
        let shim = bench.idle();
        check(&shim.exec_output("e", &["sh", "-c", script]).1);
        shim.delete();
    });
}

#[test]
fn another_user_can_use_its_streams_by_name() {
    isolated(|| {
        let bench = Bench::new();
        let user = || {
            let mut user = User::default();
            user.set_uid(1000).set_gid(1000);
            user
        };
        let script = "id -u; echo named > /dev/stdout; grep CapEff /proc/self/status; echo $HOME";
        let expected = "1000\nnamed\nCapEff:\t0000000000000000\n/home/user\n";
        let shim = bench.shim_with(&["sh", "-c", script], |_, spec| {
            let mut process = spec.process().clone().unwrap();
            process.set_user(user());
            spec.set_process(Some(process));
        });
        let (exit, stdout, stderr) = shim.run();
        assert_eq!((exit.code, stdout.as_str(), stderr.as_str()), (0, expected, ""));
        shim.delete();
        let shim = bench.idle();
        let mut wanted = process(&["sh", "-c", script]);
        wanted.set_user(user());
        shim.exec("e", wanted, false, Stdin::None).unwrap();
        let id = Some("e".to_owned());
        let mut attached = shim.connect().attach(id.clone(), false, true, true).unwrap();
        shim.connect().start(id).unwrap();
        let (stdout, stderr) = attached.read_split().unwrap();
        assert_eq!((String::from_utf8(stdout).unwrap().as_str(), stderr.as_slice()), (expected, &b""[..]));
        shim.delete();
    });
}

#[test]
fn a_program_that_cannot_run_is_named_and_leaves_nothing() {
    isolated(|| {
        let bench = Bench::new();
        let cases = [
            (
                "nothing-like-it",
                ErrorKind::NotFound,
                "exec: \"nothing-like-it\": executable file not found in $PATH",
            ),
            ("/no/such", ErrorKind::NotFound, "exec: \"/no/such\": stat /no/such: no such file or directory"),
            ("/etc/passwd", ErrorKind::NotExecutable, "exec: \"/etc/passwd\": permission denied"),
            ("/etc", ErrorKind::NotExecutable, "exec: \"/etc\": is a directory"),
        ];
        for (program, kind, message) in cases {
            let shim = bench.shim(&[program]);
            assert_eq!(refusal(shim.connect().create()), (kind, message.to_owned()));
            assert!(!Cgroup::open(&shim.cgroup).unwrap().exists());
            assert!(!shim.dir.join("runtime").exists() && !shim.dir.join("bundle").exists());
            assert_eq!(shim.connect().state().unwrap().status, Status::Empty);
            shim.delete();
        }
        let shim = bench.shim(&["garbage"]);
        shim.connect().create().unwrap();
        let expected = (ErrorKind::NotExecutable, "exec /bin/garbage: exec format error".to_owned());
        assert_eq!(refusal(shim.connect().start(None)), expected);
        assert_eq!(shim.connect().wait(None).unwrap().code, 126);
        shim.delete();
    });
}

#[test]
fn a_spec_that_cannot_be_met_is_explained_and_leaves_nothing() {
    isolated(|| {
        let bench = Bench::new();
        let shim = bench.shim_with(&["true"], |_, spec| {
            let mut mounts = spec.mounts().clone().unwrap();
            let mut mount = mounts[0].clone();
            mount
                .set_destination("/data".into())
                .set_source(Some("/no/such/source".into()))
                .set_typ(Some("bind".into()))
                .set_options(Some(vec!["rbind".into()]));
            mounts.push(mount);
            spec.set_mounts(Some(mounts));
        });
        let (kind, message) = refusal(shim.connect().create());
        assert_eq!(kind, ErrorKind::Other);
        assert!(message.contains("/no/such/source"), "{message}");
        assert!(!Cgroup::open(&shim.cgroup).unwrap().exists());
        shim.delete();
        let shim = bench.shim_with(&["true"], |_, spec| {
            let mut linux = spec.linux().clone().unwrap();
            linux.set_cgroups_path(Some("relative".into()));
            spec.set_linux(Some(linux));
        });
        assert!(refusal(shim.connect().create()).1.contains("must be absolute"));
        shim.delete();
    });
}

#[test]
fn other_processes_run_beside_init_with_their_own_streams() {
    isolated(|| {
        let bench = Bench::new();
        let shim = bench.idle();
        assert_eq!(shim.exec_output("one", &["sh", "-c", "echo hi; exit 3"]), (3, "hi\n".to_owned()));
        shim.exec("cat", process(&["cat"]), false, Stdin::Once).unwrap();
        let id = Some("cat".to_owned());
        let mut attached = shim.connect().attach(id.clone(), true, true, true).unwrap();
        shim.connect().start(id.clone()).unwrap();
        attached.write_all(b"through").unwrap();
        attached.close_stdin().unwrap();
        assert_eq!(attached.read_split().unwrap().0, b"through");
        assert_eq!(shim.connect().wait(id).unwrap().code, 0);
        shim.exec("tty", process(&["sh", "-c", "stty size; tty"]), true, Stdin::None).unwrap();
        let id = Some("tty".to_owned());
        let mut attached = shim.connect().attach(id.clone(), false, true, true).unwrap();
        shim.connect().start(id).unwrap();
        let mut seen = String::new();
        attached.read_to_string(&mut seen).unwrap();
        assert_eq!(seen, "30 90\r\n/dev/pts/0\r\n");
        shim.exec("sleep", process(&["sleep", "100"]), false, Stdin::None).unwrap();
        let id = Some("sleep".to_owned());
        let pid = shim.connect().start(id.clone()).unwrap();
        assert_eq!(shim.connect().state().unwrap().execs["sleep"], pid);
        shim.connect().ask(&Request::Kill { signal: 15, process: id.clone() }).unwrap();
        assert_eq!(shim.connect().wait(id).unwrap().code, 143);
        shim.connect().ask(&Request::Forget { id: "sleep".into() }).unwrap();
        assert_eq!(refusal(shim.connect().wait(Some("sleep".into()))).0, ErrorKind::NoProcess);
        shim.delete();
    });
}

#[test]
fn a_process_that_cannot_run_says_why_and_ends_its_streams() {
    isolated(|| {
        let bench = Bench::new();
        let shim = bench.idle();
        for (id, program, kind, code) in [
            ("a", "nope", ErrorKind::NotFound, 127),
            ("b", "/etc", ErrorKind::NotExecutable, 126),
            ("c", "garbage", ErrorKind::NotExecutable, 126),
        ] {
            shim.exec(id, process(&[program]), false, Stdin::None).unwrap();
            let id = Some(id.to_owned());
            let mut attached = shim.connect().attach(id.clone(), false, true, true).unwrap();
            assert_eq!(refusal(shim.connect().start(id.clone())).0, kind);
            assert_eq!(attached.read_split().unwrap(), (vec![], vec![]));
            assert_eq!(shim.connect().wait(id).unwrap().code, code);
        }
        shim.delete();
    });
}

/// The children of a process that have ended and that it has not collected.
fn zombies(parent: u32) -> Vec<String> {
    let processes = fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().path());
    let stats = processes.filter_map(|path| fs::read_to_string(path.join("stat")).ok());
    let is_ours = |stat: &String| {
        let fields = stat.rsplit_once(')').unwrap().1;
        fields.starts_with(&format!(" Z {parent} "))
    };
    stats.filter(is_ours).collect()
}

#[test]
fn processes_that_could_not_start_are_collected_and_do_not_delay_the_end() {
    isolated(|| {
        let bench = Bench::new();
        let shim = bench.idle();
        let shim_pid = shim.child.as_ref().unwrap().id();
        for round in 0..30 {
            let program = ["nope", "/etc", "garbage"][round % 3];
            let id = format!("e{round}");
            shim.exec(&id, process(&[program]), false, Stdin::None).unwrap();
            refusal(shim.connect().start(Some(id.clone())));
            // Nothing more is asked of the shim: it has to find out by itself.
            let deadline = Instant::now() + Duration::from_secs(60);
            while !zombies(shim_pid).is_empty() {
                assert!(Instant::now() < deadline, "round {round}: {:?}", zombies(shim_pid));
                std::thread::sleep(Duration::from_millis(1));
            }
            shim.connect().ask(&Request::Forget { id }).unwrap();
        }
        // The end of a pid namespace waits until the last process in it has been collected.
        shim.exec("last", process(&["nope"]), false, Stdin::None).unwrap();
        refusal(shim.connect().start(Some("last".into())));
        let before = Instant::now();
        shim.connect().ask(&Request::Kill { signal: 9, process: None }).unwrap();
        assert_eq!(shim.connect().wait(None).unwrap().code, 137);
        let took = before.elapsed();
        assert!(took < Duration::from_secs(60), "{took:?}");
        assert_eq!(zombies(shim_pid), Vec::<String>::new());
        shim.delete();
    });
}

#[test]
fn a_container_may_only_read_its_cgroups_unless_privileged() {
    isolated(|| {
        let bench = Bench::new();
        let own_view = |_: &mut ShimSpec, spec: &mut Spec| {
            let mut linux = spec.linux().clone().unwrap();
            let mut namespaces = linux.namespaces().clone().unwrap();
            let mut own = LinuxNamespace::default();
            own.set_typ(LinuxNamespaceType::Cgroup).set_path(None);
            namespaces.push(own);
            linux.set_namespaces(Some(namespaces));
            spec.set_linux(Some(linux));
        };
        // The mounts, and then whatever in them could be made or written.
        let script = "grep ' /sys/fs/cgroup' /proc/self/mounts; cd /sys/fs/cgroup; for folder in . */; do \
                      mkdir $folder/made && echo made in $folder && rmdir $folder/made; done; \
                      echo 7 > pids/pids.max && echo written; true";
        let run = |change: &dyn Fn(&mut ShimSpec, &mut Spec)| {
            let shim = bench.shim_with(&["sh", "-c", script], |shim, spec| change(shim, spec));
            let (exit, stdout, stderr) = shim.run();
            assert_eq!(exit.code, 0, "{stderr}");
            shim.delete();
            stdout
        };
        let check = |shown: &str| {
            assert!(shown.contains(" /sys/fs/cgroup "), "{shown}");
            for line in shown.lines() {
                let options = line.split(' ').nth(3).unwrap_or_default();
                assert!(options.starts_with("ro,nosuid,nodev,noexec,"), "{line:?} in {shown}");
            }
        };
        check(&run(&own_view));
        check(&run(&|_, _| {}));
        let shown = run(&|shim, spec| {
            own_view(shim, spec);
            spec.set_mounts(Some(defaults::privileged_mounts(defaults::SHM_SIZE_BYTES)));
        });
        assert!(shown.contains("made in"), "{shown}");
        // The host's own are as they were.
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        assert!(
            !mounts.lines().any(|line| line.contains(" /sys/fs/cgroup") && line.contains(" ro,")),
            "{mounts}"
        );
        pure_cgroup_v2();
        check(&run(&own_view));
    });
}

#[test]
fn a_kill_for_want_of_memory_is_told_while_the_container_runs() {
    isolated(|| {
        let bench = Bench::new();
        // The shell is spared: it is small.
        let script = "tail /dev/zero; exec sleep 1000";
        let shim = bench.shim_with(&["sh", "-c", script], |_, spec| {
            let mut linux = spec.linux().clone().unwrap();
            let mut resources = linux.resources().clone().unwrap_or_default();
            let mut memory = oci_spec::runtime::LinuxMemory::default();
            memory.set_limit(Some(16 << 20)).set_swap(Some(16 << 20));
            resources.set_memory(Some(memory));
            linux.set_resources(Some(resources));
            spec.set_linux(Some(linux));
        });
        shim.connect().create().unwrap();
        let mut waiting = shim.connect();
        shim.connect().start(None).unwrap();
        let told = waiting.call(&Request::Wait { process: None, ooms: Some(0) }).unwrap();
        assert!(matches!(told, Reply::OutOfMemory { count: 1.. }), "{told:?}");
        let state = shim.connect().state().unwrap();
        assert_eq!(state.status, Status::Running);
        assert!(state.ooms > 0);
        shim.connect().ask(&Request::Kill { signal: 9, process: None }).unwrap();
        let exit = shim.connect().wait(None).unwrap();
        assert!(exit.code == 137 && exit.oom_killed, "{exit:?}");
        shim.delete();
    });
}

#[test]
fn a_paused_or_stopped_container_refuses_processes() {
    isolated(|| {
        let bench = Bench::new();
        let shim = bench.idle();
        shim.connect().ask(&Request::Pause).unwrap();
        assert_eq!(shim.connect().state().unwrap().status, Status::Paused);
        let (kind, message) = refusal(shim.exec("e", process(&["true"]), false, Stdin::None));
        assert_eq!(kind, ErrorKind::Conflict);
        assert!(message.contains("is paused"), "{message}");
        shim.connect().ask(&Request::Resume).unwrap();
        assert_eq!(shim.exec_output("f", &["echo", "again"]).1, "again\n");
        shim.connect().ask(&Request::Pause).unwrap();
        shim.connect().ask(&Request::Kill { signal: 9, process: None }).unwrap();
        assert_eq!(shim.connect().wait(None).unwrap().code, 137);
        let (kind, message) = refusal(shim.exec("g", process(&["true"]), false, Stdin::None));
        assert_eq!(kind, ErrorKind::Conflict);
        assert!(message.contains("is not running"), "{message}");
        shim.delete();
    });
}

#[test]
fn killing_init_ends_everything_and_a_signal_can_be_handled() {
    isolated(|| {
        let bench = Bench::new();
        let shim = bench
            .shell("trap 'echo bye; exit 4' TERM; sleep 1000 & sleep 1000 & echo up; while :; do wait; done");
        shim.connect().create().unwrap();
        let mut attached = shim.connect().attach(None, false, true, true).unwrap();
        shim.connect().start(None).unwrap();
        let mut first = [0; 11];
        attached.read_exact(&mut first).unwrap();
        assert_eq!(&first[8..], b"up\n");
        shim.connect().ask(&Request::Kill { signal: 15, process: None }).unwrap();
        assert_eq!(shim.connect().wait(None).unwrap().code, 4);
        assert_eq!(attached.read_split().unwrap().0, b"bye\n");
        assert_eq!(
            refusal(shim.connect().ask(&Request::Kill { signal: 9, process: None })).0,
            ErrorKind::Conflict
        );
        shim.delete();
        let shim = bench.idle();
        shim.exec("e", process(&["sleep", "100"]), false, Stdin::None).unwrap();
        shim.connect().start(Some("e".into())).unwrap();
        shim.connect().ask(&Request::Kill { signal: 9, process: None }).unwrap();
        assert_eq!(shim.connect().wait(None).unwrap().code, 137);
        assert_eq!(shim.connect().wait(Some("e".into())).unwrap().code, 137);
        shim.delete();
    });
}

#[test]
fn a_grandchild_holding_the_pipe_delays_the_end_by_two_seconds_at_most() {
    isolated(|| {
        let bench = Bench::new();
        let shim = bench.idle();
        let before = Instant::now();
        assert_eq!(shim.exec_output("e", &["sh", "-c", "sleep 500 & echo x"]), (0, "x\n".to_owned()));
        let took = before.elapsed();
        assert!(took > Duration::from_secs(1) && took < Duration::from_secs(100), "{took:?}");
        shim.delete();
    });
}

#[test]
fn without_a_pid_namespace_the_end_of_init_ends_the_rest() {
    isolated(|| {
        let bench = Bench::new();
        let shim = bench.shim_with(&["sh", "-c", "sleep 1000 & exit 5"], |_, spec| {
            let mut linux = spec.linux().clone().unwrap();
            let namespaces = linux.namespaces().clone().unwrap();
            let kept = namespaces.into_iter().filter(|one| one.typ() != LinuxNamespaceType::Pid).collect();
            linux.set_namespaces(Some(kept));
            spec.set_linux(Some(linux));
        });
        assert_eq!(shim.run().0.code, 5);
        shim.delete();
    });
}

#[test]
fn twenty_containers_at_once() {
    isolated(|| {
        let bench = Bench::new();
        let before = Instant::now();
        let shims: Vec<_> =
            (0..20).map(|number| bench.shell(&format!("echo {number}; exit {number}"))).collect();
        std::thread::scope(|scope| {
            for (number, shim) in shims.into_iter().enumerate() {
                scope.spawn(move || {
                    let (exit, stdout, _) = shim.run();
                    assert_eq!((exit.code, stdout), (number as i32, format!("{number}\n")));
                    shim.delete();
                });
            }
        });
        say(&format!("measured: 20 containers at once: {} ms", before.elapsed().as_millis()));
    });
}

#[test]
fn a_killed_shim_is_cleaned_up_after_at_any_moment() {
    isolated(|| {
        let bench = Bench::new();
        // Never created, created, running with another process, ended.
        for steps in 0..4 {
            let mut shim = bench.shell(if steps == 3 { "exit 9" } else { "sleep 1000 & sleep 1000" });
            if steps > 0 {
                shim.connect().create().unwrap();
            }
            if steps > 1 {
                shim.connect().start(None).unwrap();
            }
            if steps == 3 {
                assert_eq!(shim.connect().wait(None).unwrap().code, 9);
            }
            shim.kill_shim();
            let exit = reap(&shim.dir).unwrap();
            assert_eq!(exit.map(|exit| exit.code), (steps == 3).then_some(9));
            shim.assert_clean();
            reap(&shim.dir).unwrap();
        }
        // At some moment of a creation.
        let mut slowest = Duration::ZERO;
        for delay_ms in [0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 25, 30] {
            let mut shim = bench.shell("sleep 1000");
            let mut connection = shim.connect();
            let creating = std::thread::spawn(move || connection.create().is_ok());
            std::thread::sleep(Duration::from_millis(delay_ms));
            shim.kill_shim();
            let before = Instant::now();
            reap(&shim.dir).unwrap();
            slowest = slowest.max(before.elapsed());
            creating.join().unwrap();
            shim.assert_clean();
        }
        say(&format!("measured: slowest reap of a half-made container: {} ms", slowest.as_millis()));
    });
}

#[test]
fn a_living_shim_can_be_reaped_too() {
    isolated(|| {
        let bench = Bench::new();
        let mut shim = bench.idle();
        reap(&shim.dir).unwrap();
        shim.child.take().unwrap().wait().unwrap();
        shim.assert_clean();
    });
}

#[test]
fn a_slow_client_gets_everything_even_after_delete() {
    isolated(|| {
        let bench = Bench::new();
        let shim = bench.shell("head -c 1500000 /dev/zero");
        shim.connect().create().unwrap();
        let mut attached = shim.connect().attach(None, false, true, true).unwrap();
        shim.connect().start(None).unwrap();
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(shim.connect().state().unwrap().status, Status::Running, "the queue is bounded");
        let mut start = vec![0; 1_200_000];
        attached.read_exact(&mut start).unwrap();
        shim.connect().wait(None).unwrap();
        shim.connect().ask(&Request::Delete).unwrap();
        let mut rest = Vec::new();
        attached.read_to_end(&mut rest).unwrap();
        let headers = (start.len() + rest.len() - 1_500_000) as u64;
        assert!(headers > 0 && headers.is_multiple_of(8), "{headers}");
        let mut shim = shim;
        assert!(shim.child.take().unwrap().wait().unwrap().success());
        shim.assert_clean();
    });
}

#[test]
fn foreign_bytes_end_their_connection_and_nothing_else() {
    isolated(|| {
        let bench = Bench::new();
        let shim = bench.idle();
        for bytes in
            [&b"\xff\xff\xff\xff"[..], b"\x03\x00\x00\x00{x}", b"\x02\x00\x00\x00{}GET / HTTP/1.1\r\n\r\n"]
        {
            let mut stream = guest_runtime::shim::socket::connect(&shim.dir, "shim.sock").unwrap();
            stream.set_read_timeout(Some(TIMEOUT)).unwrap();
            stream.write_all(bytes).unwrap();
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer).unwrap();
            assert!(String::from_utf8_lossy(&answer).contains("error"), "{answer:?}");
        }
        assert_eq!(shim.connect().state().unwrap().status, Status::Running);
        shim.delete();
    });
}

#[test]
fn the_device_filter_is_accepted_by_the_kernel_and_works() {
    isolated(|| {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let unified =
            mounts.lines().find(|line| line.contains(" - cgroup2 ")).and_then(|line| line.split(' ').nth(4));
        let Some(unified) = unified else {
            say("SKIPPED the device filter: no cgroup v2 is mounted");
            return;
        };
        let group = Path::new(unified).join(format!("guest-runtime-devices-{}", std::process::id()));
        fs::create_dir(&group).unwrap();
        let attached = device_filter::attach(&group, &defaults::device_rules());
        let script = "echo $$ > $0/cgroup.procs && head -c 1 /dev/zero | wc -c && echo x > /dev/null && head -c 1 /dev/kmsg";
        let output = Command::new("sh").args(["-c", script]).arg(&group).output().unwrap();
        wait_until("the group to empty", || fs::remove_dir(&group).is_ok());
        attached.unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), "1\n");
        assert!(String::from_utf8_lossy(&output.stderr).contains("Operation not permitted"), "{output:?}");
    });
}

/// Makes this mount namespace look as the machine does: cgroup v2 and nothing else.
fn pure_cgroup_v2() {
    let script = "umount -R /sys/fs/cgroup && mount -t cgroup2 cgroup2 /sys/fs/cgroup";
    let output = Command::new("sh").args(["-c", script]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn on_pure_cgroup_v2_devices_are_filtered_and_all_else_works() {
    isolated(|| {
        pure_cgroup_v2();
        let bench = Bench::new();
        let own_view = |_: &mut ShimSpec, spec: &mut Spec| {
            let mut linux = spec.linux().clone().unwrap();
            let mut namespaces = linux.namespaces().clone().unwrap();
            let mut own = LinuxNamespace::default();
            own.set_typ(LinuxNamespaceType::Cgroup).set_path(None);
            namespaces.push(own);
            linux.set_namespaces(Some(namespaces));
            spec.set_linux(Some(linux));
        };
        let script = "grep ^0: /proc/self/cgroup; ls /sys/fs/cgroup/cgroup.procs; mknod /tmp/kmsg c 1 11 && echo made; \
                      head -c 1 /tmp/kmsg; mknod /tmp/zero c 1 5 && head -c 1 /tmp/zero | wc -c";
        let shim = bench.shim_with(&["sh", "-c", script], own_view);
        let (exit, stdout, stderr) = shim.run();
        assert_eq!(stdout, "0::/\n/sys/fs/cgroup/cgroup.procs\nmade\n1\n", "{stderr}");
        assert!(stderr.contains("Operation not permitted"), "{stderr}");
        assert_eq!(exit.code, 0);
        shim.delete();

        let shim = bench.shim_with(&["sleep", "1000"], own_view);
        shim.connect().create().unwrap();
        shim.connect().start(None).unwrap();
        let (_, shown) = shim.exec_output("e", &["sh", "-c", "head -c 1 /tmp/kmsg; cat /proc/self/cgroup"]);
        assert!(shown.contains("Operation not permitted") && shown.contains("0::/\n"), "{shown}");
        shim.connect().ask(&Request::Pause).unwrap();
        assert_eq!(refusal(shim.exec("f", process(&["true"]), false, Stdin::None)).0, ErrorKind::Conflict);
        shim.connect().ask(&Request::Kill { signal: 9, process: None }).unwrap();
        assert_eq!(shim.connect().wait(None).unwrap().code, 137);
        shim.delete();

        let mut shim = bench.shim_with(&["sleep", "1000"], own_view);
        shim.connect().create().unwrap();
        shim.connect().start(None).unwrap();
        shim.kill_shim();
        reap(&shim.dir).unwrap();
        shim.assert_clean();
    });
}

#[test]
fn short_lines_stream_fast() {
    isolated(|| {
        const TOTAL: usize = 64 << 20;
        let bench = Bench::new();
        let line = b"a line of forty bytes, newline included\n";
        fs::write(bench.folder.join("rootfs/lines"), line.repeat(TOTAL / line.len() + 1)).unwrap();
        for (what, driver) in
            [("with a json-file log", LogDriver::JsonFile), ("without a log", LogDriver::None)]
        {
            let shim = bench.shim_with(&["cat", "/lines"], |shim, _| shim.log.driver = driver);
            shim.connect().create().unwrap();
            let mut attached = shim.connect().attach(None, false, true, true).unwrap();
            let before = Instant::now();
            shim.connect().start(None).unwrap();
            let (stdout, _) = attached.read_split().unwrap();
            let took = before.elapsed();
            assert_eq!(stdout.len(), (TOTAL / 40 + 1) * 40);
            say(&format!(
                "measured: 64 MiB of short lines through attach {what}: {:.0} MB/s ({} ms)",
                TOTAL as f64 / 1e6 / took.as_secs_f64(),
                took.as_millis()
            ));
            if driver == LogDriver::JsonFile {
                let log = fs::read_to_string(shim.dir.join("json.log")).unwrap();
                assert_eq!(log.lines().count(), TOTAL / 40 + 1);
            }
            shim.delete();
        }
    });
}

/// The proportional set size of a process in KiB.
fn pss(pid: u32) -> u64 {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

#[test]
fn the_cost_of_a_container_is_measured() {
    isolated(|| {
        const ROUNDS: usize = 20;
        let bench = Bench::new();
        // crun refuses a hybrid layout; in this mount namespace there is none.
        let _ = Command::new("umount").arg("/sys/fs/cgroup/unified").stderr(Stdio::null()).status().unwrap();
        let median = |mut times: Vec<f64>| {
            times.sort_by(f64::total_cmp);
            format!("median {:.1}, min {:.1}", times[times.len() / 2], times[0])
        };
        let milliseconds = |since: Instant| since.elapsed().as_secs_f64() * 1e3;
        let crun = Path::new("/usr/bin/crun");
        let (mut ours, mut theirs, mut execs) = (vec![], vec![], vec![]);
        for round in 0..ROUNDS {
            let before = Instant::now();
            let shim = bench.shim(&["true"]);
            let mut connection = shim.connect();
            connection.create().unwrap();
            connection.start(None).unwrap();
            assert_eq!(connection.wait(None).unwrap().code, 0);
            shim.delete();
            ours.push(milliseconds(before));
            if crun.exists() {
                let name = format!("crun-{round}");
                let bundle = bench.folder.join(&name);
                fs::create_dir_all(&bundle).unwrap();
                bench.spec(&name, &["true"]).save(bundle.join("config.json")).unwrap();
                let before = Instant::now();
                let status = Command::new(crun)
                    .arg("--root")
                    .arg(bench.folder.join("crun-state"))
                    .args(["--cgroup-manager", "cgroupfs", "run", "--bundle"])
                    .arg(&bundle)
                    .arg(format!("test-{}-{name}", std::process::id()))
                    .stdin(Stdio::null())
                    .output()
                    .unwrap();
                if status.status.success() {
                    theirs.push(milliseconds(before));
                } else if round == 0 {
                    say(&format!(
                        "measured: crun failed: {}",
                        String::from_utf8_lossy(&status.stderr).trim()
                    ));
                }
            }
        }
        say(&format!("measured: launch, create, start, wait, delete, ms: {}", median(ours)));
        if !theirs.is_empty() {
            say(&format!("measured: crun run of the same bundle, ms: {}", median(theirs)));
        }
        let shims: Vec<_> = (0..5).map(|_| bench.idle()).collect();
        for round in 0..ROUNDS {
            let before = Instant::now();
            assert_eq!(shims[0].exec_output(&format!("e{round}"), &["true"]).0, 0);
            execs.push(milliseconds(before));
        }
        say(&format!("measured: exec of true, prepare to wait, ms: {}", median(execs)));
        let total: u64 = shims.iter().map(|shim| pss(shim.child.as_ref().unwrap().id())).sum();
        say(&format!("measured: PSS of a shim, 5 running: {} KiB", total / 5));
        for shim in shims {
            shim.delete();
        }
    });
}
