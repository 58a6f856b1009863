//! Logging drivers: which options they take, where a container's log is, and what its shim is told.
//!
//! `json-file` and `local` can be read. `syslog` and `journald` cannot, so a `local` log is kept beside them for
//! `logs`, as dockerd keeps one. Options are checked when the container is made, the receiver when it starts.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use guest_api::container::LogConfig;
use guest_runtime::shim::{Forward, Log, LogDriver, Syslog};
use regex::Regex;

use super::log::Format;
use super::record::Record;
use crate::failure::Failure;

/// What `local` keeps unless told otherwise, and so do the logs kept beside other drivers.
const LOCAL_SIZE_BYTES: u64 = 20 << 20;
const LOCAL_FILES: u32 = 5;

/// Options of every driver.
const COMMON: [&str; 2] = ["mode", "max-buffer-size"];
/// Options of drivers that cannot be read.
const CACHE: [&str; 4] = ["cache-disabled", "cache-max-size", "cache-max-file", "cache-compress"];
/// Options that choose what is told about the container.
const ATTRIBUTES: [&str; 5] = ["labels", "labels-regex", "env", "env-regex", "tag"];

const FACILITIES: [&str; 20] = [
    "kern", "user", "mail", "daemon", "auth", "syslog", "lpr", "news", "uucp", "cron", "authpriv", "ftp",
    "local0", "local1", "local2", "local3", "local4", "local5", "local6", "local7",
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Driver {
    JsonFile,
    Local,
    Syslog,
    Journald,
    None,
}

/// Drivers of dockerd that the engine has not.
const NOT_OFFERED: [&str; 6] = ["awslogs", "fluentd", "gcplogs", "gelf", "logentries", "splunk"];

impl Driver {
    fn of(name: &str) -> Result<Self, Failure> {
        Ok(match name {
            "" | "json-file" => Driver::JsonFile,
            "local" => Driver::Local,
            "syslog" => Driver::Syslog,
            "journald" => Driver::Journald,
            "none" => Driver::None,
            other if NOT_OFFERED.contains(&other) => {
                return Err(Failure::invalid(format!("logger: no log driver named '{other}' is registered")));
            }
            // dockerd looks for a plugin of that name.
            other => {
                return Err(Failure::invalid(format!(
                    "error looking up logging plugin {other}: plugin \"{other}\" not found"
                )));
            }
        })
    }

    fn is_forwarded(self) -> bool {
        matches!(self, Driver::Syslog | Driver::Journald)
    }

    fn takes(self, option: &str) -> bool {
        let own: &[&str] = match self {
            Driver::JsonFile | Driver::Local => &["max-size", "max-file", "compress"],
            Driver::Syslog => &["syslog-address", "syslog-facility", "syslog-format"],
            Driver::Journald => &[],
            Driver::None => return false,
        };
        own.contains(&option)
            || COMMON.contains(&option)
            || (self != Driver::Local && ATTRIBUTES.contains(&option))
            || (self.is_forwarded() && CACHE.contains(&option))
    }
}

/// Refuses drivers there are not, and options and values they do not take.
pub fn verify(config: &LogConfig) -> Result<(), Failure> {
    let driver = Driver::of(&config.kind)?;
    for (name, value) in &config.config {
        if !driver.takes(name) {
            return Err(Failure::invalid(format!("unknown log opt '{name}' for {} log driver", config.kind)));
        }
        let good = match name.as_str() {
            "mode" => matches!(value.as_str(), "" | "blocking" | "non-blocking"),
            "max-size" | "cache-max-size" => value == "-1" || bytes(value).is_some(),
            "max-buffer-size" => bytes(value).is_some(),
            "max-file" | "cache-max-file" => value.parse::<u32>().is_ok_and(|count| count > 0),
            "compress" | "cache-compress" | "cache-disabled" => boolean(value).is_some(),
            "labels-regex" | "env-regex" => Regex::new(value).is_ok(),
            "syslog-facility" => facility(value).is_some(),
            "syslog-format" => matches!(value.as_str(), "" | "rfc3164" | "rfc5424" | "rfc5424micro"),
            "syslog-address" => {
                let scheme = value.split_once("://").map(|(scheme, _)| scheme);
                matches!(scheme, Some("unix" | "unixgram" | "udp" | "tcp"))
            }
            _ => true,
        };
        if !good {
            return Err(Failure::invalid(format!("invalid value '{value}' for log option '{name}'")));
        }
    }
    let option = |name: &str| config.config.get(name);
    if option("max-buffer-size").is_some() && option("mode").is_none_or(|mode| mode != "non-blocking") {
        return Err(Failure::invalid(
            "logger: max-buffer-size option is only supported with 'mode=non-blocking'",
        ));
    }
    let unlimited = option("max-size").is_none_or(|size| size == "-1");
    let compress = option("compress").and_then(|value| boolean(value)) == Some(true);
    let files: u32 = option("max-file").and_then(|files| files.parse().ok()).unwrap_or(1);
    if driver == Driver::JsonFile && compress && (unlimited || files < 2) {
        return Err(Failure::invalid(
            "compress cannot be true when max-file is less than 2 or max-size is not set",
        ));
    }
    Ok(())
}

/// Where the `json-file` log of a container is.
pub fn json_path(data: &Path, id: &str) -> PathBuf {
    data.join(format!("{id}-json.log"))
}

/// Where a container's log can be read; `None` when it cannot.
pub fn readable(data: &Path, record: &Record) -> Option<(PathBuf, Format)> {
    let config = &record.host.log_config;
    match Driver::of(&config.kind).ok()? {
        Driver::JsonFile => Some((json_path(data, &record.id), Format::JsonFile)),
        Driver::Local => Some((data.join("local-logs/container.log"), Format::Local)),
        Driver::None => None,
        Driver::Syslog | Driver::Journald => {
            let disabled = config.config.get("cache-disabled").and_then(|value| boolean(value)) == Some(true);
            (!disabled).then(|| (data.join("container-cached.log"), Format::Local))
        }
    }
}

/// What the shim is told.
pub fn plan(data: &Path, record: &Record) -> Result<Log, Failure> {
    let config = &record.host.log_config;
    let driver = Driver::of(&config.kind)?;
    let option = |name: &str| config.config.get(name).map(String::as_str);
    let kept = readable(data, record);
    if let Some(folder) = kept.as_ref().and_then(|(path, _)| path.parent()) {
        std::fs::create_dir_all(folder)
            .map_err(|error| Failure::internal("cannot make the folder of the container's log", &error))?;
    }
    let prefix = if driver.is_forwarded() { "cache-" } else { "" };
    let own = |name: &str| option(&format!("{prefix}{name}"));
    let binary = kept.as_ref().is_some_and(|(_, format)| *format == Format::Local);
    let size = own("max-size").filter(|size| *size != "-1").and_then(bytes);
    let files = own("max-file").and_then(|files| files.parse().ok());
    let forward = match driver {
        Driver::Syslog => Some(Forward::Syslog(Syslog {
            address: option("syslog-address").unwrap_or_default().to_owned(),
            facility: option("syslog-facility").and_then(facility).unwrap_or(3),
            tag: tag(option("tag").unwrap_or("{{.ID}}"), record)?,
            format: option("syslog-format").unwrap_or_default().to_owned(),
        })),
        Driver::Journald => Some(Forward::Journal { fields: journal_fields(record, option("tag"))? }),
        _ => None,
    };
    Ok(Log {
        driver: match &kept {
            None => LogDriver::None,
            Some((_, Format::JsonFile)) => LogDriver::JsonFile,
            Some((_, Format::Local)) => LogDriver::Local,
        },
        path: kept.map(|(path, _)| path).unwrap_or_default(),
        max_size_bytes: if binary { Some(size.unwrap_or(LOCAL_SIZE_BYTES)) } else { size },
        max_files: if binary { Some(files.unwrap_or(LOCAL_FILES)) } else { files },
        compress: own("compress").and_then(boolean).unwrap_or(binary),
        attributes: if driver == Driver::JsonFile { attributes(record)? } else { BTreeMap::new() },
        forward,
    })
}

/// Labels and variables that the options choose, and the tag if one was asked for.
fn attributes(record: &Record) -> Result<BTreeMap<String, String>, Failure> {
    let mut chosen = extra(record);
    if let Some(template) = record.host.log_config.config.get("tag") {
        chosen.insert("tag".to_owned(), tag(template, record)?);
    }
    Ok(chosen)
}

fn extra(record: &Record) -> BTreeMap<String, String> {
    let options = &record.host.log_config.config;
    let chooser = |list: &str, pattern: &str| {
        let names: Vec<String> =
            options.get(list).into_iter().flat_map(|names| names.split(',')).map(str::to_owned).collect();
        // One that cannot be understood was refused when the container was made.
        let pattern = options.get(pattern).and_then(|pattern| Regex::new(pattern).ok());
        move |name: &str| {
            names.iter().any(|wanted| wanted == name)
                || pattern.as_ref().is_some_and(|pattern| pattern.is_match(name))
        }
    };
    let label = chooser("labels", "labels-regex");
    let variable = chooser("env", "env-regex");
    let labels = record.config.labels.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    let variables = record.config.env.iter().flatten().filter_map(|entry| entry.split_once('='));
    labels
        .filter(|(name, _)| label(name))
        .chain(variables.filter(|(name, _)| variable(name)))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

fn journal_fields(record: &Record, template: Option<&str>) -> Result<BTreeMap<String, String>, Failure> {
    let tag = tag(template.unwrap_or("{{.ID}}"), record)?;
    let mut fields: BTreeMap<String, String> = extra(record)
        .into_iter()
        .map(|(name, value)| {
            // The journal takes upper case letters, digits and underscores, and none of the latter in front.
            let name = name.to_ascii_uppercase().replace(|letter: char| !letter.is_ascii_alphanumeric(), "_");
            (name.trim_start_matches('_').to_owned(), value)
        })
        .filter(|(name, _)| !name.is_empty())
        .collect();
    fields.extend(
        [
            ("CONTAINER_ID", record.short_id()),
            ("CONTAINER_ID_FULL", record.id.as_str()),
            ("CONTAINER_NAME", record.name.as_str()),
            ("CONTAINER_TAG", tag.as_str()),
            ("IMAGE_NAME", record.config.image.as_str()),
            ("SYSLOG_IDENTIFIER", tag.as_str()),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned())),
    );
    Ok(fields)
}

/// Fills in a tag's template.
fn tag(template: &str, record: &Record) -> Result<String, Failure> {
    let mut text = String::new();
    let mut rest = template;
    while let Some((before, after)) = rest.split_once("{{") {
        let (name, later) = after.split_once("}}").ok_or_else(|| bad_tag(template, "unclosed action"))?;
        text.push_str(before);
        let image = record.image_id.trim_start_matches("sha256:");
        text.push_str(match name.trim() {
            ".ID" => record.short_id(),
            ".FullID" => &record.id,
            ".Name" => &record.name,
            ".ImageID" => image.get(..12).unwrap_or(image),
            ".ImageFullID" => &record.image_id,
            ".ImageName" => &record.config.image,
            ".DaemonName" => "docker",
            other => return Err(bad_tag(template, &format!("`{other}` is not known"))),
        });
        rest = later;
    }
    text.push_str(rest);
    Ok(text)
}

fn bad_tag(template: &str, why: &str) -> Failure {
    Failure::broken(format!("failed to initialize logging driver: template: log-tag: `{template}`: {why}"))
}

/// `daemon`, `local0`, `3`.
fn facility(text: &str) -> Option<u8> {
    if text.is_empty() {
        return Some(3);
    }
    if let Ok(number) = text.parse::<u8>() {
        return (number <= 23).then_some(number);
    }
    // The numbers from 12 to 15 have no names here.
    let at = u8::try_from(FACILITIES.iter().position(|name| *name == text)?).ok()?;
    Some(if at >= 12 { at + 4 } else { at })
}

fn boolean(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

/// `10m`, `1g`, `500`: binary multiples, as Docker reads them.
fn bytes(text: &str) -> Option<u64> {
    let lower = text.to_ascii_lowercase();
    let bare = lower.trim_end_matches('b').trim_end_matches('i');
    let (number, unit) = match bare.char_indices().last()? {
        (at, 'k') => (&bare[..at], 1 << 10),
        (at, 'm') => (&bare[..at], 1 << 20),
        (at, 'g') => (&bare[..at], 1 << 30),
        _ => (bare, 1),
    };
    number.parse::<u64>().ok()?.checked_mul(unit).filter(|bytes| *bytes > 0)
}

#[cfg(test)]
mod tests {
    use super::super::record::tests::record;
    use super::*;

    fn config(kind: &str, options: &[(&str, &str)]) -> LogConfig {
        let config = options.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        LogConfig { kind: kind.to_owned(), config }
    }

    fn refusal(kind: &str, options: &[(&str, &str)]) -> String {
        verify(&config(kind, options)).unwrap_err().message
    }

    #[test]
    fn each_driver_takes_its_own_options() {
        for (kind, options) in [
            (
                "json-file",
                vec![("max-size", "10m"), ("max-file", "3"), ("compress", "true"), ("labels", "a")],
            ),
            ("local", vec![("max-size", "1k"), ("mode", "non-blocking"), ("max-buffer-size", "4m")]),
            (
                "syslog",
                vec![("syslog-address", "udp://127.0.0.1:514"), ("syslog-facility", "local3"), ("tag", "x")],
            ),
            ("journald", vec![("tag", "{{.Name}}"), ("cache-disabled", "true")]),
            ("none", vec![]),
        ] {
            assert!(verify(&config(kind, &options)).is_ok(), "{kind}");
        }
        assert_eq!(refusal("asdf", &[]), "error looking up logging plugin asdf: plugin \"asdf\" not found");
        assert_eq!(refusal("json-file", &[("x", "1")]), "unknown log opt 'x' for json-file log driver");
        assert_eq!(refusal("local", &[("labels", "1")]), "unknown log opt 'labels' for local log driver");
        assert!(verify(&config("json-file", &[("max-file", "3")])).is_ok());
        assert!(
            refusal("json-file", &[("max-file", "3"), ("compress", "true")]).contains("max-size is not set")
        );
        assert!(refusal("syslog", &[("syslog-address", "ftp://x")]).contains("syslog-address"));
        assert!(refusal("json-file", &[("max-size", "big")]).contains("'big'"));
    }

    #[test]
    fn labels_variables_and_the_tag_are_told() {
        let mut record = record();
        record.config.labels.insert("tier".into(), "front".into());
        record.config.env = Some(vec!["STAGE=test".into(), "SECRET=x".into()]);
        record.host.log_config = config(
            "json-file",
            &[("labels", "tier,none"), ("env-regex", "^STA"), ("tag", "{{.Name}}/{{.ID}}")],
        );
        let data = std::env::temp_dir().join(format!("logging-{}", std::process::id()));
        let plan = plan(&data, &record).unwrap();
        std::fs::remove_dir_all(&data).unwrap();
        let expected = [("STAGE", "test"), ("tag", "web/3f2a9c1d77e0"), ("tier", "front")];
        let expected = expected.map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(plan.attributes, expected.into());
        assert_eq!((plan.driver, plan.max_size_bytes, plan.compress), (LogDriver::JsonFile, None, false));
    }

    #[test]
    fn what_cannot_be_read_has_a_local_log_beside_it() {
        let mut record = record();
        record.host.log_config = config("syslog", &[("syslog-facility", "local1")]);
        let (path, format) = readable(Path::new("/d"), &record).unwrap();
        assert_eq!((path, format), (PathBuf::from("/d/container-cached.log"), Format::Local));
        record.host.log_config.config.insert("cache-disabled".into(), "true".into());
        assert!(readable(Path::new("/d"), &record).is_none());
        record.host.log_config = config("none", &[]);
        assert!(readable(Path::new("/d"), &record).is_none());
        assert_eq!(
            [facility("local1"), facility("daemon"), facility("23"), facility("nobody")],
            [Some(17), Some(3), Some(23), None]
        );
    }

    #[test]
    fn log_sizes_are_binary() {
        assert_eq!(bytes("10m"), Some(10 << 20));
        assert_eq!(bytes("1GB"), Some(1 << 30));
        assert_eq!(bytes("500"), Some(500));
        assert_eq!(bytes("0"), None);
        assert_eq!(bytes(""), None);
        assert_eq!(bytes("99999999999999999999g"), None);
    }
}
