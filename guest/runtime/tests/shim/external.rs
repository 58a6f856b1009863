//! The same shim over other runtimes: Debian's crun and runc.

use std::fs;
use std::io::{Read, Write};

use guest_runtime::reap;
use guest_runtime::shim::{ConsoleSize, ErrorKind, ExternalRuntime, Request, Status, Stdin};
use oci_spec::runtime::{LinuxMemory, LinuxPids, LinuxResources};

use crate::bench::*;

/// Runs a body with each runtime that is there; says so of one that is not.
fn with_each(body: impl Fn(&Bench, &str)) {
    isolated(|| {
        let bench = Bench::new();
        // crun refuses to work where both versions of cgroups have controllers: this namespace shows it one.
        let hybrid = std::path::Path::new("/sys/fs/cgroup/unified/cgroup.controllers").exists();
        if hybrid {
            let unmounted =
                std::process::Command::new("umount").arg("/sys/fs/cgroup/unified").status().unwrap();
            assert!(unmounted.success());
        }
        for program in ["crun", "runc"] {
            if !std::process::Command::new(program)
                .arg("--version")
                .output()
                .is_ok_and(|one| one.status.success())
            {
                say(&format!("SKIPPED with {program}: it is not installed (installer/setup --tests does)"));
                continue;
            }
            body(&bench, program);
        }
    });
}

impl Bench {
    fn other(&self, program: &str, arguments: &[&str]) -> Shim {
        self.other_with(program, arguments, |_| {})
    }

    fn other_with(
        &self,
        program: &str,
        arguments: &[&str],
        change: impl FnOnce(&mut guest_runtime::shim::ShimSpec),
    ) -> Shim {
        self.shim_with(arguments, |shim, _| {
            shim.runtime = Some(ExternalRuntime { program: program.into(), arguments: Vec::new() });
            change(shim);
        })
    }

    fn other_idle(&self, program: &str) -> Shim {
        let shim = self.other(program, &["sleep", "1000"]);
        shim.connect().create().unwrap();
        shim.connect().start(None).unwrap();
        shim
    }
}

#[test]
fn a_container_of_another_runtime_runs_and_its_status_and_output_are_kept() {
    with_each(|bench, program| {
        let shim = bench.other(program, &["sh", "-c", "echo out; echo err >&2; exit 7"]);
        let (exit, stdout, stderr) = shim.run();
        assert_eq!((exit.code, stdout.as_str(), stderr.as_str()), (7, "out\n", "err\n"), "{program}");
        let log = fs::read_to_string(shim.dir.join("json.log")).unwrap();
        assert!(log.contains(r#"{"log":"out\n","stream":"stdout","time":""#), "{log}");
        assert_eq!(shim.connect().state().unwrap().status, Status::Stopped);
        shim.delete();
    });
}

#[test]
fn a_terminal_of_another_runtime_has_a_size_and_takes_input() {
    with_each(|bench, program| {
        let shim = bench.other_with(program, &["sh", "-c", "stty size; read line; echo got $line"], |shim| {
            shim.terminal = true;
            shim.stdin = Stdin::Open;
            shim.console_size = Some(ConsoleSize { width: 90, height: 30 });
        });
        shim.connect().create().unwrap();
        let mut attached = shim.connect().attach(None, true, true, true).unwrap();
        shim.connect().start(None).unwrap();
        attached.write_all(b"it\n").unwrap();
        let mut said = String::new();
        attached.read_to_string(&mut said).unwrap();
        assert!(said.contains("30 90") && said.contains("got it"), "{program}: {said}");
        shim.delete();
    });
}

#[test]
fn other_processes_run_in_a_container_of_another_runtime() {
    with_each(|bench, program| {
        let shim = bench.other_idle(program);
        assert_eq!(
            shim.exec_output("e1", &["sh", "-c", "cat /proc/1/cmdline | tr '\\0' ' '; exit 5"]),
            (5, "sleep 1000 ".to_owned())
        );
        // crun 1.8 takes no notice of the size for such a process; it comes from the shim then, a moment later.
        let sized =
            "for i in $(seq 1000); do [ \"$(stty size)\" = '30 90' ] && exit; sleep 0.01; done; exit 1";
        shim.exec("e2", process(&["sh", "-c", sized]), true, Stdin::None).unwrap();
        let id = Some("e2".to_owned());
        let mut attached = shim.connect().attach(id.clone(), false, true, true).unwrap();
        shim.connect().start(id.clone()).unwrap();
        let mut said = String::new();
        attached.read_to_string(&mut said).unwrap();
        assert_eq!(shim.connect().wait(id).unwrap().code, 0, "{program}: {said}");
        let missing = Some("e3".to_owned());
        shim.exec("e3", process(&["nope"]), false, Stdin::None).unwrap();
        let (kind, message) = refusal(shim.connect().start(missing.clone()));
        assert_eq!(kind, ErrorKind::NotFound, "{program}: {message}");
        assert!(message.contains("nope"), "{message}");
        assert_eq!(shim.connect().wait(missing).unwrap().code, 127);
        shim.delete();
    });
}

#[test]
fn a_program_that_another_runtime_cannot_run_is_named_and_leaves_nothing() {
    with_each(|bench, program| {
        for (arguments, kind, part) in [
            (["nope"], ErrorKind::NotFound, "nope"),
            (["/etc/passwd"], ErrorKind::NotExecutable, "ermission denied"),
        ] {
            let shim = bench.other(program, &arguments);
            let created = shim.connect().create();
            let failed = match created {
                // Some find out only when it is started.
                Ok(_) => shim.connect().start(None).map(drop),
                Err(error) => Err(error),
            };
            let (found, message) = refusal(failed);
            assert_eq!(found, kind, "{program}: {message}");
            assert!(message.contains(part), "{program}: {message}");
            shim.delete();
        }
    });
}

#[test]
fn signals_limits_and_pauses_go_through_another_runtime() {
    with_each(|bench, program| {
        let shim = bench
            .other(program, &["sh", "-c", "trap 'exit 9' TERM; echo ready; while :; do sleep 0.1; done"]);
        shim.connect().create().unwrap();
        shim.connect().start(None).unwrap();
        wait_until("it is ready", || {
            fs::read_to_string(shim.dir.join("json.log")).unwrap().contains("ready")
        });
        shim.connect().ask(&Request::Pause).unwrap();
        assert_eq!(shim.connect().state().unwrap().status, Status::Paused);
        shim.connect().ask(&Request::Resume).unwrap();
        let mut resources = LinuxResources::default();
        let (mut memory, mut pids) = (LinuxMemory::default(), LinuxPids::default());
        memory.set_limit(Some(96 << 20));
        pids.set_limit(77);
        resources.set_memory(Some(memory)).set_pids(Some(pids)).set_devices(None);
        shim.connect().ask(&Request::Update { resources: Box::new(resources) }).unwrap();
        let cgroup = guest_runtime::cgroup::Cgroup::open(&shim.cgroup).unwrap();
        let limit = fs::read_to_string(cgroup.file("pids.max").unwrap()).unwrap();
        assert_eq!(limit.trim(), "77", "{program}");
        shim.connect().ask(&Request::Kill { signal: 15, process: None }).unwrap();
        assert_eq!(shim.connect().wait(None).unwrap().code, 9, "{program}");
        let (kind, _) = refusal(shim.connect().ask(&Request::Kill { signal: 15, process: None }));
        assert_eq!(kind, ErrorKind::Conflict);
        shim.delete();
        let shim = bench.other_idle(program);
        shim.connect().ask(&Request::Pause).unwrap();
        shim.connect().ask(&Request::Kill { signal: 9, process: None }).unwrap();
        assert_eq!(shim.connect().wait(None).unwrap().code, 137, "{program}");
        shim.delete();
    });
}

#[test]
fn a_killed_shim_of_another_runtime_is_cleaned_up_after() {
    with_each(|bench, program| {
        let mut shim = bench.other_idle(program);
        let pid = shim.connect().state().unwrap().pid;
        shim.kill_shim();
        assert_eq!(reap(&shim.dir).unwrap(), None);
        shim.assert_clean();
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"));
        assert!(stat.is_err() || stat.unwrap().contains(") Z "), "{program}: init lives");
    });
}

#[test]
fn a_runtime_that_is_not_there_is_named() {
    isolated(|| {
        let bench = Bench::new();
        let shim = bench.other("no-such-runtime", &["true"]);
        let (kind, message) = refusal(shim.connect().create());
        assert_eq!(
            (kind, message.as_str()),
            (ErrorKind::NotFound, "exec: \"no-such-runtime\": executable file not found in $PATH")
        );
        shim.delete();
    });
}
