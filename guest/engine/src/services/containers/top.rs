//! `top`: the processes of a container, as `ps` with the same words would show them.
//!
//! dockerd runs the host's `ps`; there is none in the machine, so what it would print is put together here from
//! `/proc`. [`Layout::parse`] understands the words people use: `-ef`, `aux`, `-o pid,comm=NAME`, `-l`, `-j`, …

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;

use guest_api::container::Top;
use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan, Zoned};

use crate::failure::Failure;

/// Clock ticks in a second, the same on every Linux.
const TICKS: u64 = 100;

/// A column of `ps`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Column {
    User,
    Uid,
    Group,
    Gid,
    Pid,
    Ppid,
    Pgid,
    Sid,
    Cpu,
    PercentCpu,
    PercentMemory,
    VirtualKib,
    ResidentKib,
    Pages,
    Terminal,
    State,
    LongState,
    Flags,
    Priority,
    Nice,
    Address,
    Channel,
    Started,
    StartedFull,
    Elapsed,
    ElapsedSeconds,
    Time,
    BsdTime,
    Threads,
    Name,
    Command,
}

/// Names a column can be asked for by, its default title, and what it shows.
const COLUMNS: &[(&[&str], &str, Column)] = &[
    (&["user", "euser", "uname", "ruser"], "USER", Column::User),
    (&["uid", "euid", "ruid"], "UID", Column::Uid),
    (&["group", "egroup", "rgroup"], "GROUP", Column::Group),
    (&["gid", "egid", "rgid"], "GID", Column::Gid),
    (&["pid", "tgid"], "PID", Column::Pid),
    (&["ppid"], "PPID", Column::Ppid),
    (&["pgid", "pgrp"], "PGID", Column::Pgid),
    (&["sid", "sess", "session"], "SID", Column::Sid),
    (&["c"], "C", Column::Cpu),
    (&["pcpu", "%cpu"], "%CPU", Column::PercentCpu),
    (&["pmem", "%mem"], "%MEM", Column::PercentMemory),
    (&["vsz", "vsize"], "VSZ", Column::VirtualKib),
    (&["rss", "rssize", "rsz"], "RSS", Column::ResidentKib),
    (&["sz"], "SZ", Column::Pages),
    (&["tty", "tname", "tt"], "TTY", Column::Terminal),
    (&["s", "state"], "S", Column::State),
    (&["stat"], "STAT", Column::LongState),
    (&["f", "flag", "flags"], "F", Column::Flags),
    (&["pri"], "PRI", Column::Priority),
    (&["ni", "nice"], "NI", Column::Nice),
    (&["addr"], "ADDR", Column::Address),
    (&["wchan"], "WCHAN", Column::Channel),
    (&["stime", "start", "start_time", "bsdstart"], "STIME", Column::Started),
    (&["lstart"], "STARTED", Column::StartedFull),
    (&["etime"], "ELAPSED", Column::Elapsed),
    (&["etimes"], "ELAPSED", Column::ElapsedSeconds),
    (&["time", "cputime"], "TIME", Column::Time),
    (&["bsdtime"], "TIME", Column::BsdTime),
    (&["nlwp", "thcount"], "NLWP", Column::Threads),
    (&["comm", "ucmd", "ucomm"], "COMMAND", Column::Name),
    (&["cmd"], "CMD", Column::Command),
    (&["args", "command"], "COMMAND", Column::Command),
];

/// Which columns, under which titles.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout(Vec<(String, Column)>);

fn unsupported(what: &str) -> Failure {
    Failure::broken(format!("ps: error: unsupported option '{what}'"))
}

fn columns(named: &[(&str, Column)]) -> Layout {
    Layout(named.iter().map(|(title, column)| ((*title).to_owned(), *column)).collect())
}

impl Layout {
    /// What the words of `ps_args` ask for.
    pub fn parse(words: &str) -> Result<Self, Failure> {
        refuse_disguised_pid(words)?;
        let mut layout = plain();
        let mut own: Vec<(String, Column)> = Vec::new();
        let mut words = words.split_ascii_whitespace();
        while let Some(word) = words.next() {
            if let Some(long) = word.strip_prefix("--") {
                match long.split_once('=').unwrap_or((long, "")) {
                    ("format", list) if !list.is_empty() => add(&mut own, list)?,
                    ("forest" | "headers" | "cols" | "columns" | "width" | "sort", _) => {}
                    _ => return Err(unsupported(word)),
                }
                continue;
            }
            let (dash, letters) = match word.strip_prefix('-') {
                Some(letters) => (true, letters),
                None => (false, word),
            };
            for (at, letter) in letters.char_indices() {
                match (dash, letter) {
                    (_, 'o' | 'O') => {
                        let rest = &letters[at + 1..];
                        let list = if rest.is_empty() { words.next() } else { Some(rest) };
                        add(&mut own, list.ok_or_else(|| unsupported(word))?)?;
                        break;
                    }
                    (true, 'f') => layout = full(),
                    (true, 'F') => layout = extra_full(),
                    (true, 'l') => layout = long(),
                    (_, 'j') => layout = jobs(),
                    (false, 'u') => layout = user_oriented(),
                    // Which processes, how wide, in which order: here they are the container's, whole.
                    (_, 'e' | 'A' | 'a' | 'w' | 'H' | 'y' | 'x' | 'f' | 'c' | 'd' | 'N' | 'r') => {}
                    _ => return Err(unsupported(word)),
                }
            }
        }
        let layout = if own.is_empty() { layout } else { Self(own) };
        // Without it dockerd cannot tell which processes are the container's.
        if layout.0.iter().any(|(title, _)| title == "PID") {
            Ok(layout)
        } else {
            Err(Failure::broken("Couldn't find PID field in ps output"))
        }
    }
}

/// dockerd refuses `-o uid=PID`, which would show other processes under false numbers.
fn refuse_disguised_pid(words: &str) -> Result<(), Failure> {
    let mut all = words.split(|letter: char| letter.is_ascii_whitespace() || letter == ',');
    let bad = all.find_map(|word| {
        let (name, title) = word.split_once('=')?;
        (title.starts_with("PID") && name != "pid").then(|| format!("{name}={title}"))
    });
    bad.map_or(Ok(()), |bad| Err(Failure::broken(format!("specifying \"{bad}\" is not allowed"))))
}

/// Adds the columns of an `-o` list. `name=Title` runs to the end of the list, as with `ps`.
fn add(own: &mut Vec<(String, Column)>, list: &str) -> Result<(), Failure> {
    let mut rest = list;
    while !rest.is_empty() {
        let (item, later) = match rest.split_once(',') {
            Some((item, _)) if item.contains('=') => (rest, ""),
            Some((item, later)) => (item, later),
            None => (rest, ""),
        };
        let (name, title) = match item.split_once('=') {
            Some((name, title)) => (name, Some(title)),
            None => (item, None),
        };
        let found = COLUMNS.iter().find(|(names, ..)| names.contains(&name));
        let (_, default, column) = found.ok_or_else(|| {
            Failure::broken(format!("ps: error: unknown user-defined format specifier \"{name}\""))
        })?;
        own.push((title.unwrap_or(default).to_owned(), *column));
        rest = later;
    }
    Ok(())
}

fn plain() -> Layout {
    columns(&[("PID", Column::Pid), ("TTY", Column::Terminal), ("TIME", Column::Time), ("CMD", Column::Name)])
}

fn full() -> Layout {
    columns(&[
        ("UID", Column::User),
        ("PID", Column::Pid),
        ("PPID", Column::Ppid),
        ("C", Column::Cpu),
        ("STIME", Column::Started),
        ("TTY", Column::Terminal),
        ("TIME", Column::Time),
        ("CMD", Column::Command),
    ])
}

fn extra_full() -> Layout {
    columns(&[
        ("UID", Column::User),
        ("PID", Column::Pid),
        ("PPID", Column::Ppid),
        ("C", Column::Cpu),
        ("SZ", Column::Pages),
        ("RSS", Column::ResidentKib),
        ("STIME", Column::Started),
        ("TTY", Column::Terminal),
        ("TIME", Column::Time),
        ("CMD", Column::Command),
    ])
}

fn user_oriented() -> Layout {
    columns(&[
        ("USER", Column::User),
        ("PID", Column::Pid),
        ("%CPU", Column::PercentCpu),
        ("%MEM", Column::PercentMemory),
        ("VSZ", Column::VirtualKib),
        ("RSS", Column::ResidentKib),
        ("TTY", Column::Terminal),
        ("STAT", Column::LongState),
        ("START", Column::Started),
        ("TIME", Column::BsdTime),
        ("COMMAND", Column::Command),
    ])
}

fn long() -> Layout {
    columns(&[
        ("F", Column::Flags),
        ("S", Column::State),
        ("UID", Column::Uid),
        ("PID", Column::Pid),
        ("PPID", Column::Ppid),
        ("C", Column::Cpu),
        ("PRI", Column::Priority),
        ("NI", Column::Nice),
        ("ADDR", Column::Address),
        ("SZ", Column::Pages),
        ("WCHAN", Column::Channel),
        ("TTY", Column::Terminal),
        ("TIME", Column::Time),
        ("CMD", Column::Name),
    ])
}

fn jobs() -> Layout {
    columns(&[
        ("PID", Column::Pid),
        ("PGID", Column::Pgid),
        ("SID", Column::Sid),
        ("TTY", Column::Terminal),
        ("TIME", Column::Time),
        ("CMD", Column::Name),
    ])
}

/// What `/proc` says about one process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Process {
    pid: i32,
    name: String,
    command: String,
    state: char,
    ppid: i32,
    pgid: i32,
    sid: i32,
    terminal: i32,
    foreground: i32,
    flags: u64,
    cpu_ticks: u64,
    priority: i64,
    nice: i64,
    threads: u64,
    start_ticks: u64,
    virtual_bytes: u64,
    resident_pages: u64,
    uid: u32,
    gid: u32,
}

/// Reads a `stat` line: the name stands in parentheses and may hold anything. Fuzzed.
fn parse_stat(stat: &str) -> Option<Process> {
    let (head, fields) = stat.rsplit_once(')')?;
    let (pid, name) = head.split_once('(')?;
    let fields: Vec<&str> = fields.split_ascii_whitespace().collect();
    let number = |at: usize| fields.get(at)?.parse::<i64>().ok();
    let id = |at: usize| i32::try_from(number(at)?).ok();
    let count = |at: usize| u64::try_from(number(at)?).ok();
    Some(Process {
        pid: pid.trim().parse().ok()?,
        name: name.to_owned(),
        state: fields.first()?.chars().next()?,
        ppid: id(1)?,
        pgid: id(2)?,
        sid: id(3)?,
        terminal: id(4)?,
        foreground: id(5)?,
        flags: count(6)?,
        cpu_ticks: count(11)?.saturating_add(count(12)?),
        priority: number(15)?,
        nice: number(16)?,
        threads: count(17)?,
        start_ticks: count(19)?,
        virtual_bytes: fields.get(20)?.parse().ok()?,
        resident_pages: count(21)?,
        ..Process::default()
    })
}

impl Process {
    /// `None` when it has gone.
    fn read(pid: i32) -> Option<Self> {
        let folder = format!("/proc/{pid}");
        let mut process = parse_stat(&fs::read_to_string(format!("{folder}/stat")).ok()?)?;
        let owner = fs::metadata(&folder).ok()?;
        (process.uid, process.gid) = (owner.uid(), owner.gid());
        let line = fs::read(format!("{folder}/cmdline")).unwrap_or_default();
        let words = String::from_utf8_lossy(&line).trim_end_matches('\0').replace('\0', " ");
        // A process without a command line (a zombie, a thread of the kernel) is shown by its name.
        process.command = if words.is_empty() {
            let gone = if process.state == 'Z' { " <defunct>" } else { "" };
            format!("[{}]{gone}", process.name)
        } else {
            words
        };
        Some(process)
    }
}

/// What the columns of one listing are counted against.
struct World {
    now: Zoned,
    uptime_seconds: f64,
    memory_kib: u64,
    users: BTreeMap<u32, String>,
    groups: BTreeMap<u32, String>,
}

impl World {
    fn read() -> Self {
        let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let uptime = text("/proc/uptime");
        let memory = text("/proc/meminfo");
        let total = memory.lines().find_map(|line| line.strip_prefix("MemTotal:"));
        Self {
            now: Timestamp::now().to_zoned(TimeZone::system()),
            uptime_seconds: uptime.split(' ').next().and_then(|word| word.parse().ok()).unwrap_or(0.0),
            memory_kib: total
                .and_then(|words| words.trim().trim_end_matches(" kB").parse().ok())
                .unwrap_or(0),
            users: names(&text("/etc/passwd")),
            groups: names(&text("/etc/group")),
        }
    }

    fn seconds_of(&self, process: &Process) -> f64 {
        (self.uptime_seconds - process.start_ticks as f64 / TICKS as f64).max(0.0)
    }

    fn start_of(&self, process: &Process) -> Zoned {
        let seconds = self.seconds_of(process) as i64;
        self.now.checked_sub(seconds.seconds()).unwrap_or_else(|_| self.now.clone())
    }

    fn percent_cpu(&self, process: &Process) -> f64 {
        let lived = self.seconds_of(process);
        if lived < 1e-9 { 0.0 } else { 100.0 * (process.cpu_ticks as f64 / TICKS as f64) / lived }
    }

    fn show(&self, process: &Process, column: Column) -> String {
        let name = |names: &BTreeMap<u32, String>, id: u32| {
            names.get(&id).cloned().unwrap_or_else(|| id.to_string())
        };
        let cpu_seconds = process.cpu_ticks / TICKS;
        let page_kib = rustix::param::page_size() as u64 / 1024;
        let resident_kib = process.resident_pages * page_kib;
        match column {
            Column::User => name(&self.users, process.uid),
            Column::Uid => process.uid.to_string(),
            Column::Group => name(&self.groups, process.gid),
            Column::Gid => process.gid.to_string(),
            Column::Pid => process.pid.to_string(),
            Column::Ppid => process.ppid.to_string(),
            Column::Pgid => process.pgid.to_string(),
            Column::Sid => process.sid.to_string(),
            Column::Cpu => format!("{}", self.percent_cpu(process).min(99.0) as u64),
            Column::PercentCpu => format!("{:.1}", self.percent_cpu(process).min(999.9)),
            Column::PercentMemory => {
                format!("{:.1}", 100.0 * resident_kib as f64 / self.memory_kib.max(1) as f64)
            }
            Column::VirtualKib => (process.virtual_bytes / 1024).to_string(),
            Column::ResidentKib => resident_kib.to_string(),
            Column::Pages => (process.virtual_bytes / 1024 / page_kib.max(1)).to_string(),
            Column::Terminal => terminal(process.terminal),
            Column::State => process.state.to_string(),
            Column::LongState => long_state(process),
            // The low bits ps shows: forked but not executed, used super-user rights.
            Column::Flags => ((process.flags >> 6) & 7).to_string(),
            Column::Priority => (60 + process.priority).to_string(),
            Column::Nice => process.nice.to_string(),
            Column::Address | Column::Channel => "-".to_owned(),
            Column::Started => {
                let start = self.start_of(process);
                let pattern = match () {
                    () if start.date() == self.now.date() => "%H:%M",
                    () if start.year() == self.now.year() => "%b%d",
                    () => "%Y",
                };
                start.strftime(pattern).to_string()
            }
            Column::StartedFull => self.start_of(process).strftime("%a %b %e %H:%M:%S %Y").to_string(),
            Column::Elapsed => elapsed(self.seconds_of(process) as u64),
            Column::ElapsedSeconds => (self.seconds_of(process) as u64).to_string(),
            Column::Time => {
                let (days, hours) = (cpu_seconds / 86_400, cpu_seconds / 3600 % 24);
                let days = if days > 0 { format!("{days}-") } else { String::new() };
                format!("{days}{hours:02}:{:02}:{:02}", cpu_seconds / 60 % 60, cpu_seconds % 60)
            }
            Column::BsdTime => format!("{}:{:02}", cpu_seconds / 60, cpu_seconds % 60),
            Column::Threads => process.threads.to_string(),
            Column::Name => {
                let gone = if process.state == 'Z' { " <defunct>" } else { "" };
                format!("{}{gone}", process.name)
            }
            Column::Command => process.command.clone(),
        }
    }
}

/// Names by number of a passwd or group file.
fn names(file: &str) -> BTreeMap<u32, String> {
    let entries = file.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        Some((fields.nth(1)?.parse().ok()?, name.to_owned()))
    });
    // Of several names the first counts.
    let mut found = BTreeMap::new();
    entries.for_each(|(id, name)| _ = found.entry(id).or_insert(name));
    found
}

fn elapsed(seconds: u64) -> String {
    let (days, hours, minutes, rest) =
        (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    match (days, hours) {
        (0, 0) => format!("{minutes:02}:{rest:02}"),
        (0, _) => format!("{hours:02}:{minutes:02}:{rest:02}"),
        _ => format!("{days}-{hours:02}:{minutes:02}:{rest:02}"),
    }
}

fn terminal(number: i32) -> String {
    let number = number.cast_unsigned();
    let (major, minor) = ((number >> 8) & 0xfff, (number & 0xff) | ((number >> 12) & 0xfff00));
    match major {
        0 => "?".to_owned(),
        136..=143 => format!("pts/{}", (major - 136) * 256 + minor),
        4 if minor < 64 => format!("tty{minor}"),
        4 => format!("ttyS{}", minor - 64),
        _ => "?".to_owned(),
    }
}

fn long_state(process: &Process) -> String {
    let mut text = process.state.to_string();
    let mut add = |holds: bool, letter: char| {
        if holds {
            text.push(letter);
        }
    };
    add(process.nice < 0, '<');
    add(process.nice > 0, 'N');
    add(process.sid == process.pid, 's');
    add(process.threads > 1, 'l');
    add(process.foreground > 0 && process.foreground == process.pgid, '+');
    text
}

/// Lists these processes. Those that have gone meanwhile are left out. Reads files.
pub fn list(pids: &[i32], layout: &Layout) -> Top {
    let world = World::read();
    let processes = pids.iter().filter_map(|pid| Process::read(*pid));
    let rows =
        processes.map(|process| layout.0.iter().map(|(_, column)| world.show(&process, *column)).collect());
    Top { processes: rows.collect(), titles: layout.0.iter().map(|(title, _)| title.clone()).collect() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn titles(words: &str) -> Vec<String> {
        Layout::parse(words).unwrap().0.into_iter().map(|(title, _)| title).collect()
    }

    fn refusal(words: &str) -> String {
        Layout::parse(words).unwrap_err().message
    }

    #[test]
    fn common_words_give_the_columns_of_ps() {
        assert_eq!(titles("-ef"), ["UID", "PID", "PPID", "C", "STIME", "TTY", "TIME", "CMD"]);
        assert_eq!(
            titles("aux"),
            ["USER", "PID", "%CPU", "%MEM", "VSZ", "RSS", "TTY", "STAT", "START", "TIME", "COMMAND"]
        );
        assert_eq!(titles("-eopid,user"), ["PID", "USER"]);
        assert_eq!(titles("-o pid,comm -o cmd=What"), ["PID", "COMMAND", "What"]);
        assert_eq!(titles("-e -o pid,args"), ["PID", "COMMAND"]);
        assert_eq!(titles("-A"), ["PID", "TTY", "TIME", "CMD"]);
        assert_eq!(titles("ax --forest"), ["PID", "TTY", "TIME", "CMD"]);
    }

    #[test]
    fn what_dockerd_refuses_is_refused() {
        assert_eq!(refusal("-o comm"), "Couldn't find PID field in ps output");
        assert_eq!(refusal("-o uid=PID"), "specifying \"uid=PID\" is not allowed");
        assert_eq!(refusal("-o colour"), "ps: error: unknown user-defined format specifier \"colour\"");
        assert!(refusal("--help").contains("--help"));
        assert!(refusal("-o").contains("-o"));
    }

    #[test]
    fn this_process_is_listed() {
        let own = i32::try_from(std::process::id()).unwrap();
        let top = list(&[own, i32::MAX], &Layout::parse("-o pid,ppid,comm,args,stime,etime,stat").unwrap());
        assert_eq!(top.processes.len(), 1);
        let row = &top.processes[0];
        assert_eq!(row[0], own.to_string());
        assert!(row.iter().all(|cell| !cell.is_empty()), "{row:?}");
    }

    #[test]
    fn terminals_and_spans_read_as_in_ps() {
        assert_eq!(
            [terminal(0), terminal(34816), terminal(34817), terminal(1025)],
            ["?", "pts/0", "pts/1", "tty1"]
        );
        assert_eq!([elapsed(5), elapsed(3_700), elapsed(90_061)], ["00:05", "01:01:40", "1-01:01:01"]);
    }

    proptest! {
        #[test]
        fn no_words_and_no_stat_line_panic(words in "[-a-zA-Z=, %]{0,30}", stat in ".{0,200}") {
            let _ = Layout::parse(&words);
            let _ = parse_stat(&stat);
            let _ = parse_stat(&format!("1 (x) S {stat}"));
        }
    }
}
