//! A walk over a document that cannot forget a field: what was not taken by the end is a problem.

use std::collections::HashMap;

use serde_json::{Map, Value};

use super::{Note, Problem, ProblemKind, Quantity};

/// Where problems and notes of one document gather.
#[derive(Debug, Default)]
pub(super) struct Findings {
    pub problems: Vec<Problem>,
    pub notes: Vec<Note>,
}

impl Findings {
    pub fn invalid(&mut self, path: &str, message: impl Into<String>) {
        self.problem(path, ProblemKind::Invalid, message.into());
    }

    pub fn unsupported(&mut self, path: &str, message: impl Into<String>) {
        self.problem(path, ProblemKind::Unsupported, message.into());
    }

    fn problem(&mut self, path: &str, kind: ProblemKind, message: String) {
        self.problems.push(Problem {
            path: path.to_owned(),
            kind,
            message,
        });
    }
}

/// One value and the path that leads to it.
#[derive(Debug)]
pub(super) struct Field {
    pub path: String,
    value: Value,
}

impl Field {
    pub fn root(value: Value) -> Self {
        Self {
            path: String::new(),
            value,
        }
    }

    /// The field's text; anything but a string is a problem. YAML's `yes` and `1` are not texts, as in Kubernetes.
    pub fn text(self, findings: &mut Findings) -> String {
        match self.value {
            Value::String(text) => text,
            other => {
                findings.invalid(&self.path, format!("must be a string, not {}", kind_of(&other)));
                String::new()
            }
        }
    }

    pub fn boolean(self, findings: &mut Findings) -> bool {
        self.value.as_bool().unwrap_or_else(|| {
            findings.invalid(
                &self.path,
                format!("must be true or false, not {}", kind_of(&self.value)),
            );
            false
        })
    }

    /// A whole number within `range`.
    pub fn number(self, range: std::ops::RangeInclusive<u64>, findings: &mut Findings) -> u64 {
        match self.value.as_u64() {
            Some(number) if range.contains(&number) => number,
            _ => {
                let (low, high) = range.into_inner();
                findings.invalid(&self.path, format!("must be a whole number from {low} to {high}"));
                low
            }
        }
    }

    pub fn id(self, findings: &mut Findings) -> u32 {
        let number = self.number(0..=u64::from(u32::MAX >> 1), findings);
        u32::try_from(number).unwrap_or_default()
    }

    pub fn quantity(self, findings: &mut Findings) -> Option<Quantity> {
        let text = match &self.value {
            Value::String(text) => text.clone(),
            Value::Number(number) => number.to_string(),
            other => {
                findings.invalid(&self.path, format!("must be a quantity, not {}", kind_of(other)));
                return None;
            }
        };
        text.parse()
            .map_err(|error: super::QuantityError| findings.invalid(&self.path, error.to_string()))
            .ok()
    }

    /// Text that must be one of a few words.
    pub fn word<T: Copy>(self, words: &[(&str, T)], findings: &mut Findings) -> Option<T> {
        let path = self.path.clone();
        let text = self.text(findings);
        let found = words.iter().find(|(word, _)| *word == text).map(|(_, value)| *value);
        if found.is_none() && !text.is_empty() {
            let known: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
            findings.invalid(&path, format!("{text:?} is none of {}", known.join(", ")));
        }
        found
    }

    /// The items of a list; `null` is an empty one.
    pub fn items(self, findings: &mut Findings) -> Vec<Self> {
        match self.value {
            Value::Array(items) => items
                .into_iter()
                .enumerate()
                .map(|(index, value)| Self {
                    path: format!("{}[{index}]", self.path),
                    value,
                })
                .collect(),
            other => {
                findings.invalid(&self.path, format!("must be a list, not {}", kind_of(&other)));
                Vec::new()
            }
        }
    }

    pub fn texts(self, findings: &mut Findings) -> Vec<String> {
        self.items(findings)
            .into_iter()
            .map(|item| item.text(findings))
            .collect()
    }

    /// A map of strings.
    pub fn text_map(self, findings: &mut Findings) -> HashMap<String, String> {
        let object = self.object(findings);
        object
            .into_fields()
            .into_iter()
            .map(|(key, field)| (key, field.text(findings)))
            .collect()
    }

    pub fn object(self, findings: &mut Findings) -> Object {
        let fields = match self.value {
            Value::Object(fields) => fields,
            other => {
                findings.invalid(&self.path, format!("must be a mapping, not {}", kind_of(&other)));
                Map::new()
            }
        };
        let prefix = if self.path.is_empty() {
            String::new()
        } else {
            format!("{}.", self.path)
        };
        let fields = fields
            .into_iter()
            .filter(|(_, value)| !value.is_null())
            .map(|(key, value)| {
                let path = format!("{prefix}{key}");
                (key, Self { path, value })
            })
            .collect();
        Object {
            path: self.path,
            fields,
        }
    }

    /// Whether the field asks for nothing: `false`, zero, empty.
    fn asks_for_nothing(&self) -> bool {
        match &self.value {
            Value::Null => true,
            Value::Bool(flag) => !flag,
            Value::Number(number) => number.as_f64() == Some(0.0),
            Value::String(text) => text.is_empty(),
            Value::Array(items) => items.is_empty(),
            Value::Object(fields) => fields.is_empty(),
        }
    }
}

/// A mapping whose fields are taken one by one.
#[derive(Debug)]
pub(super) struct Object {
    pub path: String,
    fields: Vec<(String, Field)>,
}

impl Object {
    pub fn take(&mut self, name: &str) -> Option<Field> {
        let index = self.fields.iter().position(|(key, _)| key == name)?;
        Some(self.fields.remove(index).1)
    }

    /// Takes a field that must be there; its absence is a problem.
    pub fn require(&mut self, name: &str, findings: &mut Findings) -> Option<Field> {
        let field = self.take(name);
        if field.is_none() {
            findings.invalid(&self.join(name), "is required");
        }
        field
    }

    pub fn text(&mut self, name: &str, findings: &mut Findings) -> String {
        self.take(name).map(|field| field.text(findings)).unwrap_or_default()
    }

    pub fn boolean(&mut self, name: &str, findings: &mut Findings) -> bool {
        self.take(name).is_some_and(|field| field.boolean(findings))
    }

    pub fn texts(&mut self, name: &str, findings: &mut Findings) -> Vec<String> {
        self.take(name).map(|field| field.texts(findings)).unwrap_or_default()
    }

    pub fn text_map(&mut self, name: &str, findings: &mut Findings) -> HashMap<String, String> {
        self.take(name)
            .map(|field| field.text_map(findings))
            .unwrap_or_default()
    }

    /// Takes fields that have no effect here and notes why.
    pub fn without_effect(&mut self, names: &[&str], why: &str, findings: &mut Findings) {
        for field in names.iter().filter_map(|name| self.take(name)) {
            if !field.asks_for_nothing() {
                findings.notes.push(Note {
                    path: field.path,
                    message: why.to_owned(),
                });
            }
        }
    }

    /// Takes a field that may only have the value that is the default anyway.
    pub fn only(&mut self, name: &str, allowed: &[&str], findings: &mut Findings) {
        let Some(field) = self.take(name) else { return };
        let path = field.path.clone();
        let text = field.text(findings);
        if !text.is_empty() && !allowed.contains(&text.as_str()) {
            findings.unsupported(
                &path,
                format!("{text:?} is not supported; only {} is", allowed.join(" or ")),
            );
        }
    }

    /// All fields that were not taken, for a mapping whose keys are anybody's.
    pub fn into_fields(self) -> Vec<(String, Field)> {
        self.fields
    }

    /// Ends the walk over this mapping: whatever was not taken and asks for something is refused by its path.
    pub fn finish(self, findings: &mut Findings) {
        for (_, field) in self.fields.into_iter().filter(|(_, field)| !field.asks_for_nothing()) {
            findings.unsupported(&field.path, "is not supported");
        }
    }

    pub fn join(&self, name: &str) -> String {
        if self.path.is_empty() {
            name.to_owned()
        } else {
            format!("{}.{name}", self.path)
        }
    }
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "a mapping",
    }
}
