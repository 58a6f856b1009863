//! Takes out of answers what differs from run to run and from computer to computer.

use serde_json::{Map, Value};

/// Members whose values belong to the moment: a number that is not zero, or text that is not empty, is as good as another.
const MOMENTARY: [&str; 34] = [
    "Created",
    "CreatedAt",
    "time",
    "timeNano",
    "Pid",
    "Size",
    "SizeRw",
    "SizeRootFs",
    "SharedSize",
    "VirtualSize",
    "LayersSize",
    "execDuration",
    "ResolvConfPath",
    "HostnamePath",
    "HostsPath",
    "LogPath",
    "SandboxKey",
    "GraphDriver",
    "IPAddress",
    "Gateway",
    "MacAddress",
    "SandboxID",
    "IPv4Address",
    "Subnet",
    "Mountpoint",
    "Source",
    "Layers",
    "DNSNames",
    "StartedAt",
    "FinishedAt",
    "LowerDir",
    "SpaceReclaimed",
    "LastTagTime",
    "RefCount",
];

/// A value under its member's name.
pub fn value(name: &str, json: &Value) -> Value {
    let momentary = MOMENTARY.contains(&name);
    match json {
        Value::Number(number) if momentary && number.as_f64() != Some(0.0) => "<number>".into(),
        Value::String(told) if momentary && !told.is_empty() && told != "0001-01-01T00:00:00Z" => {
            "<text>".into()
        }
        Value::String(told) if name == "Status" => columns(told).into(),
        Value::String(told) => text(told).into(),
        Value::Array(_) if momentary => "<list>".into(),
        Value::Object(_) if momentary => "<object>".into(),
        Value::Array(items) => items.iter().map(|item| value(name, item)).collect(),
        Value::Object(members) => {
            members.iter().map(|(key, member)| (text(key), value(key, member))).collect::<Map<_, _>>().into()
        }
        other => other.clone(),
    }
}

/// Types and names only.
pub fn shape(json: &Value) -> Value {
    match json {
        Value::Null => Value::Null,
        Value::Bool(_) => "bool".into(),
        Value::Number(_) => "number".into(),
        Value::String(_) => "string".into(),
        Value::Array(items) => {
            items.first().map_or_else(|| Value::Array(Vec::new()), |item| vec![shape(item)].into())
        }
        Value::Object(members) => {
            members.iter().map(|(key, member)| (key.clone(), shape(member))).collect::<Map<_, _>>().into()
        }
    }
}

/// Text with ids, digests and moments replaced.
pub fn text(told: &str) -> String {
    let mut kept = String::new();
    let mut rest = told;
    while let Some(start) = rest.find(|letter: char| letter.is_ascii_alphanumeric()) {
        kept.push_str(&rest[..start]);
        let word = &rest[start..];
        if let Some(length) = moment(word) {
            kept.push_str("<time>");
            rest = &word[length..];
            continue;
        }
        let end = word.find(|letter: char| !letter.is_ascii_alphanumeric()).unwrap_or(word.len());
        let hex = word[..end].bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        match end {
            64 if hex => kept.push_str("<id>"),
            12 if hex => kept.push_str("<short id>"),
            _ => kept.push_str(&word[..end]),
        }
        rest = &word[end..];
    }
    kept.push_str(rest);
    kept
}

/// Bytes of an RFC 3339 moment at the start, but for the one that means never.
fn moment(text: &str) -> Option<usize> {
    let bytes = text.as_bytes();
    let digits = |range: std::ops::Range<usize>| {
        bytes.get(range).is_some_and(|part| part.iter().all(u8::is_ascii_digit))
    };
    let shaped = digits(0..4)
        && bytes.get(4) == Some(&b'-')
        && digits(5..7)
        && bytes.get(10) == Some(&b'T')
        && digits(11..13);
    if !shaped || text.starts_with("0001") {
        return None;
    }
    Some(
        text.find(|letter: char| !matches!(letter, '0'..='9' | ':' | '.' | 'T' | 'Z' | '-'))
            .unwrap_or(text.len()),
    )
}

/// A line of a table: how wide columns are and how long ago it was says nothing.
pub fn columns(line: &str) -> String {
    let cells: Vec<&str> = line.split("   ").map(str::trim).filter(|cell| !cell.is_empty()).collect();
    let cells = cells.into_iter().map(|cell| {
        if cell.ends_with(" ago") || cell.starts_with("Up ") {
            let start = cell.find(|letter: char| letter.is_ascii_digit() || letter == 'L').unwrap_or(0);
            let state =
                if cell.starts_with("Exited") { cell.find(')').map_or(0, |end| end + 1) } else { start };
            return format!("{}<ago>", &cell[..state]);
        }
        let size = ["kB", "MB", "GB", "B"].iter().find_map(|unit| cell.strip_suffix(unit));
        if size.is_some_and(|number| number.parse::<f64>().is_ok()) {
            "<size>".to_owned()
        } else {
            cell.to_owned()
        }
    });
    cells.collect::<Vec<_>>().join(" | ")
}
