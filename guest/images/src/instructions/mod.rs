//! Instructions of a Dockerfile that change how an image runs and nothing in its files: what `docker commit --change` and
//! `docker import --change` take.
//!
//! The rules are those of Docker's classic builder: a line may go on after a backslash, comments and empty lines are skipped,
//! and `$NAME`, `${NAME}`, `${NAME:-word}` and `${NAME:+word}` stand for the environment as it is at that instruction.

mod words;

use std::path::{Path, PathBuf};

use crate::{Config, Error, Healthcheck, Result};
use words::{expand, fields};

/// Bytes of all instructions at most.
const BYTES_MAX: usize = 1 << 20;
/// Ports of one range at most: there are no more.
const PORTS_MAX: u32 = 65_536;

/// Applies instructions, each of which may have several lines. On an error nothing is promised about `config`.
pub fn apply(config: &mut Config, changes: &[String]) -> Result<()> {
    if changes.iter().map(String::len).sum::<usize>() > BYTES_MAX {
        return Err(Error::invalid(format!("the changes have more than {BYTES_MAX} bytes")));
    }
    let mut applying = Applying { config, cmd_was_set: false };
    for line in lines(&changes.join("\n")) {
        applying.line(&line)?;
    }
    Ok(())
}

/// Fuzz entry: arbitrary text as instructions.
pub fn fuzz(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        let _outcome = apply(&mut Config::default(), &[text.to_owned()]);
    }
}

/// The instructions, each in one line.
fn lines(text: &str) -> Vec<String> {
    let mut lines = Vec::new();
    let mut current = String::new();
    for line in text.lines() {
        let trimmed = line.trim_start();
        if trimmed.starts_with('#') || (trimmed.is_empty() && current.is_empty()) {
            continue;
        }
        let line = if current.is_empty() { trimmed } else { line };
        match line.trim_end().strip_suffix('\\') {
            Some(part) => current.push_str(part),
            None => {
                current.push_str(line.trim_end());
                lines.push(std::mem::take(&mut current));
            }
        }
    }
    if !current.is_empty() {
        lines.push(current);
    }
    lines
}

struct Applying<'a> {
    config: &'a mut Config,
    /// An entry point takes an earlier command away, unless that came with these changes.
    cmd_was_set: bool,
}

impl Applying<'_> {
    fn line(&mut self, line: &str) -> Result<()> {
        let (name, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let rest = rest.trim();
        let instruction = name.to_ascii_uppercase();
        let needed = |words: &[String]| {
            if words.is_empty() {
                return Err(Error::invalid(format!("{instruction} requires at least one argument")));
            }
            Ok(())
        };
        match instruction.as_str() {
            "CMD" => {
                self.config.cmd = Some(self.command(rest));
                self.cmd_was_set = !rest.is_empty();
            }
            "ENTRYPOINT" => {
                self.config.entrypoint = Some(self.command(rest));
                if !self.cmd_was_set {
                    self.config.cmd = None;
                }
            }
            "ENV" => {
                for (name, value) in self.pairs(&instruction, rest)? {
                    self.set_env(&name, &value);
                }
            }
            "LABEL" => {
                for (name, value) in self.pairs(&instruction, rest)? {
                    self.config.labels.insert(name, value);
                }
            }
            "EXPOSE" => {
                let ports = self.words(rest)?;
                needed(&ports)?;
                for port in ports.iter().flat_map(|word| word.split_whitespace()) {
                    for exposed in exposed(port)? {
                        self.config.exposed_ports.insert(exposed, serde_json::json!({}));
                    }
                }
            }
            "ONBUILD" => self.on_build(rest)?,
            "USER" => self.config.user = self.single(&instruction, rest)?,
            "VOLUME" => {
                let volumes = match json_words(rest) {
                    Some(words) => words,
                    None => self.words(rest)?,
                };
                needed(&volumes)?;
                for volume in volumes {
                    if volume.is_empty() {
                        return Err(Error::invalid("VOLUME specified can not be an empty string"));
                    }
                    self.config.volumes.insert(volume, serde_json::json!({}));
                }
            }
            "WORKDIR" => {
                let path = expand(rest, &self.config.env)?;
                if path.is_empty() {
                    return Err(Error::invalid("WORKDIR requires exactly one argument"));
                }
                self.config.working_dir = absolute(&self.config.working_dir, &path);
            }
            "STOPSIGNAL" => self.config.stop_signal = stop_signal(self.single(&instruction, rest)?)?,
            "HEALTHCHECK" => self.config.healthcheck = Some(self.healthcheck(rest)?),
            _ => return Err(Error::invalid(format!("{name} is not a valid change command"))),
        }
        Ok(())
    }

    /// `["program", "argument"]`, or a line for the shell.
    fn command(&self, text: &str) -> Vec<String> {
        if let Some(words) = json_words(text) {
            return words;
        }
        if text.is_empty() {
            return Vec::new();
        }
        let shell = if self.config.shell.is_empty() {
            vec!["/bin/sh".to_owned(), "-c".to_owned()]
        } else {
            self.config.shell.clone()
        };
        shell.into_iter().chain([text.to_owned()]).collect()
    }

    fn words(&self, text: &str) -> Result<Vec<String>> {
        fields(text)?.iter().map(|word| expand(word, &self.config.env)).collect()
    }

    fn single(&self, instruction: &str, text: &str) -> Result<String> {
        match &fields(text)?[..] {
            [word] => expand(word, &self.config.env),
            _ => Err(Error::invalid(format!("{instruction} requires exactly one argument"))),
        }
    }

    /// `name=value name=value …`, or, as of old, `name value`.
    fn pairs(&self, instruction: &str, text: &str) -> Result<Vec<(String, String)>> {
        let words = fields(text)?;
        let first = words
            .first()
            .ok_or_else(|| Error::invalid(format!("{instruction} requires at least one argument")))?;
        let env = &self.config.env;
        let named = |name: String| {
            if name.is_empty() {
                return Err(Error::invalid(format!("{instruction} names can not be blank")));
            }
            Ok(name)
        };
        if !first.contains('=') {
            let value = text[first.len().min(text.len())..].trim();
            if value.is_empty() {
                return Err(Error::invalid(format!("{instruction} must have two arguments")));
            }
            return Ok(vec![(named(expand(first, env)?)?, expand(value, env)?)]);
        }
        words
            .iter()
            .map(|word| {
                let (name, value) = word.split_once('=').ok_or_else(|| {
                    Error::invalid(format!(
                        "Syntax error - can't find = in \"{word}\". Must be of the form: name=value"
                    ))
                })?;
                Ok((named(expand(name, env)?)?, expand(value, env)?))
            })
            .collect()
    }

    fn set_env(&mut self, name: &str, value: &str) {
        let entry = format!("{name}={value}");
        let same = |known: &&mut String| known.split('=').next() == Some(name);
        match self.config.env.iter_mut().find(same) {
            Some(known) => *known = entry,
            None => self.config.env.push(entry),
        }
    }

    fn on_build(&mut self, text: &str) -> Result<()> {
        let trigger = text.split_whitespace().next().unwrap_or_default().to_ascii_uppercase();
        match trigger.as_str() {
            "" => Err(Error::invalid("ONBUILD requires at least one argument")),
            "ONBUILD" => Err(Error::invalid("Chaining ONBUILD via `ONBUILD ONBUILD` isn't allowed")),
            "FROM" | "MAINTAINER" => {
                Err(Error::invalid(format!("{trigger} isn't allowed as an ONBUILD trigger")))
            }
            _ => {
                self.config.on_build.push(text.to_owned());
                Ok(())
            }
        }
    }

    fn healthcheck(&self, text: &str) -> Result<Healthcheck> {
        let mut check = Healthcheck::default();
        let mut rest = text;
        while rest.starts_with("--") {
            let (flag, after) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
            let (name, value) = flag.split_once('=').unwrap_or((flag, ""));
            match name {
                "--interval" => check.interval = duration(name, value)?,
                "--timeout" => check.timeout = duration(name, value)?,
                "--start-period" => check.start_period = duration(name, value)?,
                "--start-interval" => check.start_interval = duration(name, value)?,
                "--retries" => {
                    let retries = value.parse::<i64>().ok().filter(|retries| *retries >= 0);
                    check.retries = retries.ok_or_else(|| {
                        Error::invalid(format!(
                            "--retries must be at least 1 (or 0 for the default), not `{value}`"
                        ))
                    })?;
                }
                _ => return Err(Error::invalid(format!("unknown flag: {name}"))),
            }
            rest = after.trim_start();
        }
        let (kind, command) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
        let command = command.trim();
        check.test = match (kind.to_ascii_uppercase().as_str(), json_words(command)) {
            ("NONE", _) if command.is_empty() => vec!["NONE".to_owned()],
            ("NONE", _) => return Err(Error::invalid("HEALTHCHECK NONE takes no arguments")),
            ("CMD", _) if command.is_empty() => {
                return Err(Error::invalid("Missing command after HEALTHCHECK CMD"));
            }
            ("CMD", Some(words)) => ["CMD".to_owned()].into_iter().chain(words).collect(),
            ("CMD", None) => vec!["CMD-SHELL".to_owned(), command.to_owned()],
            ("", _) => return Err(Error::invalid("HEALTHCHECK requires at least one argument")),
            _ => {
                return Err(Error::invalid(format!("Unknown type \"{kind}\" in HEALTHCHECK (try CMD)")));
            }
        };
        Ok(check)
    }
}

/// The strings of a JSON array; anything else is not one.
fn json_words(text: &str) -> Option<Vec<String>> {
    text.starts_with('[').then(|| serde_json::from_str(text).ok()).flatten()
}

/// `80`, `80/tcp`, `8000-8010/udp`; what a publication says before it (`ip:host:`) is ignored.
fn exposed(text: &str) -> Result<Vec<String>> {
    let (port, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    let protocol = protocol.to_ascii_lowercase();
    if !matches!(protocol.as_str(), "tcp" | "udp" | "sctp") {
        return Err(Error::invalid(format!("invalid proto: {protocol}")));
    }
    let port = port.rsplit(':').next().unwrap_or_default();
    let bad = || Error::invalid(format!("invalid containerPort: {port}"));
    let number = |text: &str| text.parse::<u32>().ok().filter(|port| *port < PORTS_MAX).ok_or_else(bad);
    let (first, last) = match port.split_once('-') {
        Some((first, last)) => (number(first)?, number(last)?),
        None => (number(port)?, number(port)?),
    };
    if last < first {
        return Err(bad());
    }
    Ok((first..=last).map(|port| format!("{port}/{protocol}")).collect())
}

fn absolute(current: &str, path: &str) -> String {
    let joined = if current.is_empty() { Path::new("/").join(path) } else { Path::new(current).join(path) };
    let mut plain = PathBuf::from("/");
    for component in joined.components() {
        match component {
            std::path::Component::Normal(name) => plain.push(name),
            std::path::Component::ParentDir => _ = plain.pop(),
            _ => {}
        }
    }
    plain.to_string_lossy().into_owned()
}

/// A number or a name, with or without `SIG`.
fn stop_signal(text: String) -> Result<String> {
    const NAMES: &str = " ABRT ALRM BUS CHLD CLD CONT FPE HUP ILL INT IO IOT KILL PIPE POLL PROF PWR QUIT SEGV STKFLT STOP \
                         SYS TERM TRAP TSTP TTIN TTOU URG USR1 USR2 VTALRM WINCH XCPU XFSZ RTMIN RTMAX ";
    let bare = text.to_ascii_uppercase();
    let bare = bare.strip_prefix("SIG").unwrap_or(&bare);
    let is_number = text.parse::<u8>().is_ok_and(|number| (1..=64).contains(&number));
    let real_time = bare
        .strip_prefix("RTMIN+")
        .or_else(|| bare.strip_prefix("RTMAX-"))
        .is_some_and(|offset| offset.parse::<u8>().is_ok_and(|offset| offset <= 30));
    let is_name = !bare.is_empty() && !bare.contains(' ') && NAMES.contains(&format!(" {bare} "));
    if is_number || is_name || real_time {
        Ok(text)
    } else {
        Err(Error::invalid(format!("invalid signal: {text}")))
    }
}

/// Go's durations: `1m30s`, `500ms`. In nanoseconds; 0, or at least a millisecond.
fn duration(flag: &str, text: &str) -> Result<i64> {
    let bad = || Error::invalid(format!("{flag}: invalid duration \"{text}\""));
    if text == "0" {
        return Ok(0);
    }
    let mut rest = text;
    let mut total = 0f64;
    if rest.is_empty() {
        return Err(bad());
    }
    while !rest.is_empty() {
        let digits = rest.find(|letter: char| !letter.is_ascii_digit() && letter != '.').ok_or_else(bad)?;
        let value: f64 = rest[..digits].parse().map_err(|_| bad())?;
        let unit_end = rest[digits..]
            .find(|letter: char| letter.is_ascii_digit() || letter == '.')
            .map_or(rest.len(), |end| digits + end);
        let unit = match &rest[digits..unit_end] {
            "ns" => 1.0,
            "us" | "µs" | "μs" => 1e3,
            "ms" => 1e6,
            "s" => 1e9,
            "m" => 60e9,
            "h" => 3600e9,
            _ => return Err(bad()),
        };
        total += value * unit;
        rest = &rest[unit_end..];
    }
    if !(total == 0.0 || (1e6..=i64::MAX as f64 / 2.0).contains(&total)) {
        return Err(Error::invalid(format!(
            "Interval \"{}\" cannot be less than 1ms",
            flag.trim_start_matches('-')
        )));
    }
    Ok(total as i64)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn applied(changes: &[&str]) -> Result<Config> {
        let mut config = Config {
            env: vec!["PATH=/bin".to_owned(), "A=1".to_owned()],
            cmd: Some(vec!["old".to_owned()]),
            working_dir: "/srv".to_owned(),
            ..Config::default()
        };
        let changes: Vec<String> = changes.iter().map(|change| (*change).to_owned()).collect();
        apply(&mut config, &changes).map(|()| config)
    }

    fn refused(change: &str) -> String {
        applied(&[change]).expect_err(change).to_string()
    }

    #[test]
    fn commands_have_two_forms() {
        let config = applied(&[r#"CMD ["bash", "-l"]"#, "ENTRYPOINT exec top -b"]).expect("applied");
        assert_eq!(config.cmd.expect("set"), ["bash", "-l"]);
        assert_eq!(config.entrypoint.expect("set"), ["/bin/sh", "-c", "exec top -b"]);
        assert_eq!(applied(&["entrypoint [\"x\"]"]).expect("applied").cmd, None, "the old command goes");
        // What is no JSON is a line for the shell, as in Docker.
        assert_eq!(applied(&["CMD [bash]"]).expect("applied").cmd.expect("set")[2], "[bash]");
    }

    #[test]
    fn names_and_values_come_in_both_forms_and_are_expanded() {
        let config = applied(&[
            r#"ENV B=$A C="two words" D='$A' E=${X:-${A}5} A=\$2"#,
            "ENV F three  words $A",
            r#"LABEL com.example.x="a b" y=z"#,
        ])
        .expect("applied");
        let env = ["PATH=/bin", "A=$2", "B=1", "C=two words", "D=$A", "E=15", "F=three  words $2"];
        assert_eq!(config.env, env);
        assert_eq!((config.labels["com.example.x"].as_str(), config.labels["y"].as_str()), ("a b", "z"));
        assert!(refused("ENV A").contains("two arguments"));
        assert!(refused("ENV =x").contains("blank"));
        assert!(refused("ENV A=1 B").contains("can't find = in \"B\""));
    }

    #[test]
    fn ports_volumes_users_and_folders_are_set() {
        let config = applied(&[
            "EXPOSE 80 53/UDP 7000-7002",
            r#"VOLUME ["/data", "/log"]"#,
            "VOLUME /a /b",
            "USER app:${A}",
            "WORKDIR sub/../x",
            "STOPSIGNAL SIGRTMIN+3",
            "ONBUILD RUN make",
        ])
        .expect("applied");
        let ports: Vec<_> = config.exposed_ports.keys().collect();
        assert_eq!(ports, ["53/udp", "7000/tcp", "7001/tcp", "7002/tcp", "80/tcp"]);
        assert_eq!(config.volumes.len(), 4);
        assert_eq!((config.user.as_str(), config.working_dir.as_str()), ("app:1", "/srv/x"));
        assert_eq!(
            (config.stop_signal.as_str(), &config.on_build[..]),
            ("SIGRTMIN+3", &["RUN make".to_owned()][..])
        );
        assert!(refused("EXPOSE 80/foo").contains("invalid proto: foo"));
        assert!(refused("EXPOSE 99999").contains("invalid containerPort"));
        assert!(refused("STOPSIGNAL SIGNOPE").contains("invalid signal"));
        assert!(refused("ONBUILD FROM x").contains("isn't allowed"));
        assert!(refused("USER a b").contains("exactly one"));
    }

    #[test]
    fn health_checks_are_read() {
        let config =
            applied(&["HEALTHCHECK --interval=1m30s --timeout=500ms --retries=3 CMD curl -f http://x"]);
        let check = config.expect("applied").healthcheck.expect("set");
        assert_eq!(check.test, ["CMD-SHELL", "curl -f http://x"]);
        assert_eq!((check.interval, check.timeout, check.retries), (90_000_000_000, 500_000_000, 3));
        let check = applied(&[r#"HEALTHCHECK CMD ["a"]"#]).expect("applied").healthcheck.expect("set");
        assert_eq!(check.test, ["CMD", "a"]);
        let none = applied(&["HEALTHCHECK NONE"]).expect("applied").healthcheck.expect("set");
        assert_eq!(none.test, ["NONE"]);
        assert!(refused("HEALTHCHECK --interval=1us CMD x").contains("1ms"));
        assert!(refused("HEALTHCHECK PING").contains("Unknown type"));
    }

    #[test]
    fn lines_go_on_and_comments_are_skipped() {
        let config = applied(&["# a comment\n\nENV X=1 \\\n  Y=2\nUSER nobody"]).expect("applied");
        assert!(config.env.contains(&"Y=2".to_owned()) && config.user == "nobody");
    }

    #[test]
    fn what_changes_files_is_refused() {
        assert_eq!(refused("RUN make"), "RUN is not a valid change command");
        assert_eq!(refused("bogus"), "bogus is not a valid change command");
    }

    proptest! {
        #[test]
        fn any_text_is_taken_or_refused(text in "(ENV|LABEL|EXPOSE|HEALTHCHECK|CMD|VOLUME|WORKDIR) [ -~\\n\"'$\\\\{}]{0,40}") {
            fuzz(text.as_bytes());
        }
    }
}
