//! Where two answers differ, and which differences are known.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Mutex;

use anyhow::{Context, Result};
use serde_json::Value;

/// The known differences. A place is `conversation` `step` `pointer`, each a prefix; an empty one is any.
pub struct Differences {
    known: Vec<Known>,
    seen: Mutex<BTreeSet<usize>>,
}

struct Known {
    conversation: String,
    step: String,
    pointer: String,
    why: String,
}

impl Differences {
    /// A list of objects with the members `conversation`, `step`, `pointer` and `why`.
    pub fn read(path: &Path) -> Result<Self> {
        let list: Vec<Value> = serde_json::from_str(&std::fs::read_to_string(path)?)?;
        let member = |known: &Value, name: &str| known[name].as_str().unwrap_or_default().to_owned();
        let known = list.iter().map(|known| {
            let why =
                known["why"].as_str().with_context(|| format!("a difference without `why`: {known}"))?;
            Ok(Known {
                conversation: member(known, "conversation"),
                step: member(known, "step"),
                pointer: member(known, "pointer"),
                why: why.to_owned(),
            })
        });
        Ok(Self { known: known.collect::<Result<_>>()?, seen: Mutex::default() })
    }

    /// The unknown differences between two answers, as lines.
    pub fn of(&self, conversation: &str, expected: &Value, answer: &Value) -> Vec<String> {
        let step = answer["step"].as_str().unwrap_or_default();
        let found = RefCell::new(Vec::new());
        compare("", expected, answer, &|pointer, text| {
            found.borrow_mut().push((pointer.to_owned(), text));
        });
        let unknown = |(pointer, text): (String, String)| {
            let known = self.known.iter().position(|known| {
                let same = known.conversation.is_empty() || known.conversation == conversation;
                same && step.starts_with(&known.step) && pointer.starts_with(&known.pointer)
            });
            match known {
                Some(at) => {
                    self.seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner).insert(at);
                    None
                }
                None => Some(format!("  {step}\n    {pointer}: {text}")),
            }
        };
        found.into_inner().into_iter().filter_map(unknown).collect()
    }

    /// Known differences that were not seen.
    pub fn unseen(&self) -> Vec<String> {
        let seen = self.seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let unseen = self.known.iter().enumerate().filter(|(at, _)| !seen.contains(at));
        unseen
            .map(|(_, known)| {
                format!("{} {} {} ({})", known.conversation, known.step, known.pointer, known.why)
            })
            .collect()
    }
}

/// Calls `found` with each place that differs.
fn compare(pointer: &str, expected: &Value, answer: &Value, found: &dyn Fn(&str, String)) {
    match (expected, answer) {
        (Value::Object(expected), Value::Object(answer)) => {
            for (name, value) in expected {
                let pointer = format!("{pointer}/{name}");
                match answer.get(name) {
                    Some(answer) => compare(&pointer, value, answer, found),
                    None => found(&pointer, format!("dockerd has {value}, we have nothing")),
                }
            }
            for (name, value) in answer.iter().filter(|(name, _)| !expected.contains_key(*name)) {
                found(&format!("{pointer}/{name}"), format!("dockerd has nothing, we have {value}"));
            }
        }
        (Value::Array(expected), Value::Array(answer)) if expected.len() == answer.len() => {
            for (at, (expected, answer)) in expected.iter().zip(answer).enumerate() {
                compare(&format!("{pointer}/{at}"), expected, answer, found);
            }
        }
        (expected, answer) if expected == answer => {}
        (expected, answer) => found(pointer, format!("dockerd has {expected}, we have {answer}")),
    }
}
