//! The part of Docker's `--format` that people use: `json`, `table …`, and text with `{{.Path}}`, `{{json .Path}}`.

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// A parsed `--format`.
#[derive(Debug, PartialEq)]
pub(crate) enum Template {
    /// The whole value as JSON.
    Json,
    /// Pieces one after another.
    Text(Vec<Piece>),
    /// The same, columns separated by tabs under headings.
    Table(Vec<Piece>),
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Piece {
    Literal(String),
    /// A path into the value; printed as JSON or as text.
    Value {
        path: Vec<String>,
        json: bool,
    },
}

impl Template {
    pub(crate) fn parse(text: &str) -> Result<Self> {
        if text == "json" {
            return Ok(Self::Json);
        }
        match text.strip_prefix("table ") {
            Some(columns) => Ok(Self::Table(pieces(columns)?)),
            None => Ok(Self::Text(pieces(text)?)),
        }
    }

    /// One record as a line. For `Table` the cells are separated by tabs.
    pub(crate) fn render(&self, value: &Value) -> Result<String> {
        match self {
            Self::Json => Ok(value.to_string()),
            Self::Text(pieces) | Self::Table(pieces) => {
                pieces.iter().map(|piece| piece.render(value)).collect::<Result<String>>()
            }
        }
    }

    /// The records, with headings and columns if that is what was asked for.
    pub(crate) fn render_all(&self, records: &[Value]) -> Result<String> {
        let lines = records.iter().map(|record| self.render(record)).collect::<Result<Vec<_>>>()?;
        let Self::Table(pieces) = self else {
            return Ok(lines.into_iter().map(|line| line + "\n").collect());
        };
        let heading: String = pieces.iter().map(Piece::heading).collect();
        let headings: Vec<&str> = heading.split('\t').collect();
        let row = |line: &String| {
            let mut cells: Vec<String> = line.split('\t').map(str::to_owned).collect();
            cells.resize(headings.len(), String::new());
            cells
        };
        Ok(crate::output::table(&headings, &lines.iter().map(row).collect::<Vec<_>>()))
    }
}

impl Piece {
    fn render(&self, value: &Value) -> Result<String> {
        match self {
            Self::Literal(text) => Ok(text.clone()),
            Self::Value { path, json } => {
                let found = lookup(value, path)?;
                Ok(match found {
                    _ if *json => found.to_string(),
                    Value::String(text) => text.clone(),
                    Value::Null => "<nil>".into(),
                    other => other.to_string(),
                })
            }
        }
    }

    fn heading(&self) -> String {
        match self {
            Self::Literal(text) => text.clone(),
            Self::Value { path, .. } => match path.last().map(String::as_str) {
                Some("ID") => "ID".into(),
                Some("CreatedAt") => "CREATED AT".into(),
                Some("RunningFor") => "CREATED".into(),
                Some(name) => name.to_uppercase(),
                None => String::new(),
            },
        }
    }
}

fn lookup<'a>(value: &'a Value, path: &[String]) -> Result<&'a Value> {
    path.iter().try_fold(value, |value, key| match value {
        // Keys of labels may hold dots; there is no way to write them here.
        Value::Object(members) => members
            .get(key)
            .with_context(|| format!("template: there is no field `{key}` in `.{}`", path.join("."))),
        _ => bail!("template: `.{}` leads into something that has no fields", path.join(".")),
    })
}

fn pieces(text: &str) -> Result<Vec<Piece>> {
    // As typed in a shell, where a tab is hard to type.
    let text = text.replace("\\t", "\t").replace("\\n", "\n");
    let mut pieces = Vec::new();
    let mut rest = text.as_str();
    while let Some(start) = rest.find("{{") {
        if start > 0 {
            pieces.push(Piece::Literal(rest[..start].to_owned()));
        }
        let end = rest[start..]
            .find("}}")
            .with_context(|| format!("template: `{text}` has a `{{{{` without `}}}}`"))?;
        let action = rest[start + 2..start + end].trim();
        rest = &rest[start + end + 2..];
        let (path, json) = match action.strip_prefix("json ") {
            Some(path) => (path.trim(), true),
            None => (action, false),
        };
        let path = path
            .strip_prefix('.')
            .filter(|path| path.chars().all(|c| c.is_alphanumeric() || "._-".contains(c)));
        let Some(path) = path else {
            bail!(
                "template: `{{{{{action}}}}}` is not supported: use `{{{{.Field}}}}` or `{{{{json .Field}}}}`"
            );
        };
        let path = path.split('.').filter(|key| !key.is_empty()).map(str::to_owned).collect();
        pieces.push(Piece::Value { path, json });
    }
    if !rest.is_empty() {
        pieces.push(Piece::Literal(rest.to_owned()));
    }
    Ok(pieces)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn check(template: &str, expected: &str) {
        let value = json!({"ID": "abc", "State": {"Running": true, "ExitCode": 0, "Error": null}, "Names": ["a", "b"]});
        assert_eq!(Template::parse(template).unwrap().render(&value).unwrap(), expected);
    }

    #[test]
    fn fields_are_filled_in() {
        check("{{.ID}}", "abc");
        check("id={{ .ID }} {{.State.Running}}/{{.State.ExitCode}}!", "id=abc true/0!");
        check("{{json .ID}} {{json .State.Error}}", "\"abc\" null");
        check("{{.State.Error}}", "<nil>");
        check("{{.Names}}", "[\"a\",\"b\"]");
        check(
            "{{json .}}",
            r#"{"ID":"abc","Names":["a","b"],"State":{"Error":null,"ExitCode":0,"Running":true}}"#,
        );
    }

    #[test]
    fn a_table_has_headings() {
        let template = Template::parse("table {{.ID}}\\t{{.RunningFor}}").unwrap();
        let text = template.render_all(&[json!({"ID": "abcdef", "RunningFor": "2 hours ago"})]).unwrap();
        assert_eq!(text, "ID        CREATED\nabcdef    2 hours ago\n");
    }

    #[test]
    fn mistakes_are_named() {
        for text in ["{{.A", "{{range .}}", "{{.A | upper}}"] {
            assert!(Template::parse(text).is_err(), "{text}");
        }
        assert!(
            Template::parse("{{.Nope}}")
                .unwrap()
                .render(&json!({}))
                .unwrap_err()
                .to_string()
                .contains("`Nope`")
        );
    }
}
