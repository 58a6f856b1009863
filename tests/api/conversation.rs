//! What is said, and holding it.
//!
//! A step begins at the start of a line and is a request, `METHOD TARGET [BODY]`, or a command, `docker WORDS`; its
//! lines of directives are indented:
//!
//! ```text
//! POST /v1.45/containers/create?name=one {"Image": "busybox:test"}
//!   id = /Id                 what follows may say {id}
//!   header X-Thing: value    one more header; Content-Type is application/json where there is a body
//!   shape                    only types and names are compared: the values are this computer's
//!   sorted                   a list or lines in no order
//!   quiet                    said, but not compared
//!   until STATUS             said again until the status is that, or the command exits with it
//! ```

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tests_harness::wait_until;

use crate::client::{Answer, Client};
use crate::normal;

/// One step.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Step {
    pub line: String,
    saved: Vec<(String, String)>,
    headers: Vec<(String, String)>,
    shape: bool,
    sorted: bool,
    quiet: bool,
    until: Option<u16>,
}

pub fn parse(text: &str) -> Result<Vec<Step>> {
    let mut steps: Vec<Step> = Vec::new();
    for line in text.lines().filter(|line| !line.trim().is_empty() && !line.starts_with('#')) {
        if !line.starts_with(' ') {
            steps.push(Step { line: line.to_owned(), ..Step::default() });
            continue;
        }
        let step = steps.last_mut().context("a directive before the first step")?;
        match line.trim().split_once(' ').unwrap_or((line.trim(), "")) {
            ("shape", "") => step.shape = true,
            ("sorted", "") => step.sorted = true,
            ("quiet", "") => step.quiet = true,
            ("until", status) => step.until = Some(status.parse()?),
            ("header", header) => {
                let (name, value) = header.split_once(':').context("a header has a colon")?;
                step.headers.push((name.to_owned(), value.trim().to_owned()));
            }
            (name, pointer) => {
                let pointer =
                    pointer.strip_prefix("= ").with_context(|| format!("`{line}` is no directive"))?;
                step.saved.push((name.to_owned(), pointer.to_owned()));
            }
        }
    }
    Ok(steps)
}

/// Says every step and returns the answers, normalised, without those of quiet steps.
pub fn hold(steps: &[Step], client: &Client) -> Result<Vec<Value>> {
    let mut variables = BTreeMap::new();
    let mut answers = Vec::new();
    for step in steps {
        let answer = say(step, client, &mut variables).with_context(|| step.line.clone())?;
        if !step.quiet {
            answers.push(answer);
        }
    }
    Ok(answers)
}

fn say(step: &Step, client: &Client, variables: &mut BTreeMap<String, String>) -> Result<Value> {
    let line = filled(&step.line, variables);
    let (status, body) = wait_until(&format!("the status {:?}", step.until), || {
        let answer = match line.strip_prefix("docker ") {
            Some(words) => command(step, client, words)?,
            None => request(step, client, &line, variables)?,
        };
        Ok(Some(answer).filter(|(status, _)| step.until.is_none_or(|until| until == *status)))
    })?;
    let mut answer = json!({"step": step.line, "status": status});
    if let (Value::Object(answer), Value::Object(more)) = (&mut answer, body) {
        answer.extend(more);
    }
    Ok(answer)
}

fn filled(text: &str, variables: &BTreeMap<String, String>) -> String {
    let mut text = text.to_owned();
    for (name, value) in variables {
        text = text.replace(&format!("{{{name}}}"), value);
    }
    text
}

fn command(step: &Step, client: &Client, words: &str) -> Result<(u16, Value)> {
    let finished = client.docker(&split(words))?;
    let status = u16::try_from(finished.code).unwrap_or(u16::MAX);
    let lines = |told: &str| {
        let text = normal::text(told);
        let mut lines: Vec<String> = text.lines().map(normal::columns).collect();
        if step.sorted {
            lines.sort();
        }
        lines
    };
    let (output, errors) = (lines(&finished.stdout), lines(&finished.stderr));
    Ok((status, if step.shape { json!({}) } else { json!({"stdout": output, "stderr": errors}) }))
}

/// Words as a shell splits them, with single quotes.
fn split(text: &str) -> Vec<String> {
    let (mut words, mut word, mut quoted, mut any) = (Vec::new(), String::new(), false, false);
    for letter in text.chars() {
        match letter {
            '\'' => (quoted, any) = (!quoted, true),
            ' ' if !quoted => {
                if any {
                    words.push(std::mem::take(&mut word));
                }
                any = false;
            }
            _ => {
                word.push(letter);
                any = true;
            }
        }
    }
    if any {
        words.push(word);
    }
    words
}

fn request(
    step: &Step,
    client: &Client,
    line: &str,
    variables: &mut BTreeMap<String, String>,
) -> Result<(u16, Value)> {
    let (method, rest) = line.split_once(' ').context("METHOD TARGET")?;
    let (target, body) = rest.split_once(' ').unwrap_or((rest, ""));
    let mut headers = step.headers.clone();
    let typed = headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("content-type"));
    if !body.is_empty() && !typed {
        headers.push(("Content-Type".to_owned(), "application/json".to_owned()));
    }
    let answer = client.send(method, target, &headers, body.as_bytes())?;
    let body = body_of(&answer);
    for (name, pointer) in &step.saved {
        // Without an answer the difference shows here; what follows names something that is not there.
        let value = body.pointer(pointer).unwrap_or(&Value::Null);
        let text = value.as_str().map_or_else(|| "missing".to_owned(), str::to_owned);
        variables.insert(name.clone(), text);
    }
    let mut normalised = if step.shape { normal::shape(&body) } else { normal::value("", &body) };
    if step.sorted
        && let Value::Array(items) = &mut normalised
    {
        items.sort_by_key(Value::to_string);
    }
    let common = ["api-version", "docker-experimental", "ostype", "server"];
    let common: Vec<&str> = common.into_iter().filter(|name| answer.header(name).is_some()).collect();
    let told = json!({"type": answer.header("content-type"), "headers": common, "body": normalised});
    Ok((answer.status, told))
}

/// JSON, a list of JSON values written after one another, or text.
fn body_of(answer: &Answer) -> Value {
    let values: Result<Vec<Value>, _> =
        serde_json::Deserializer::from_slice(&answer.body).into_iter().collect();
    let is_json = answer.header("content-type").is_some_and(|kind| kind.starts_with("application/json"));
    match values {
        Ok(mut values) if is_json && values.len() == 1 => values.remove(0),
        Ok(values) if is_json => Value::Array(values),
        _ => Value::String(String::from_utf8_lossy(&answer.body).into_owned()),
    }
}
