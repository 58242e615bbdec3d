//! What was measured, for people, programs, and `docs/results.md`.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use serde::Serialize;

use crate::samples::Samples;
use crate::{Error, Format};

/// Figures with all that is needed to judge them.
#[derive(Debug, Serialize)]
pub struct Report {
    command: String,
    level: String,
    facts: Vec<(String, String)>,
    amounts: Vec<(String, u64)>,
    timings: Vec<Samples>,
}

impl Report {
    pub fn new(level: &str, facts: Vec<(String, String)>) -> Self {
        let mut words = std::env::args();
        let program = words.next().unwrap_or_default();
        let program = program.rsplit('/').next().unwrap_or_default().to_owned();
        let command = std::iter::once(program).chain(words).collect::<Vec<_>>().join(" ");
        Self {
            command,
            level: level.to_owned(),
            facts,
            amounts: Vec::new(),
            timings: Vec::new(),
        }
    }

    pub fn fact(&mut self, name: &str, fact: impl Into<String>) {
        self.facts.push((name.to_owned(), fact.into()));
    }

    /// A number of bytes.
    pub fn amount(&mut self, name: impl Into<String>, bytes: u64) {
        self.amounts.push((name.into(), bytes));
    }

    pub fn add(&mut self, samples: Samples) {
        self.timings.push(samples);
    }

    /// Tells somebody who waits how far it is.
    pub fn progress(&self, done: u32, of: u32) {
        if io::stderr().is_terminal() {
            eprint!("\r\x1b[K{done} of {of}{}", if done == of { "\n" } else { "" });
        }
    }

    pub fn print(&self, format: Format) -> Result<(), Error> {
        let text = match format {
            Format::Json => format!("{}\n", serde_json::to_string(self)?),
            Format::Text => self.text(),
            Format::Markdown => self.markdown(),
        };
        io::stdout().lock().write_all(text.as_bytes())?;
        Ok(())
    }

    fn text(&self) -> String {
        let facts = self.facts.iter().map(|(name, fact)| format!("{name}: {fact}\n"));
        let amounts = self
            .amounts
            .iter()
            .map(|(name, bytes)| format!("{:>12}  {name}\n", kib(*bytes)));
        let mut text: String = std::iter::once(format!("level: {}\n", self.level))
            .chain(facts)
            .chain(amounts)
            .collect();
        if !self.timings.is_empty() {
            text += &format!("{:>10} {:>10} {:>10} {:>4}\n", "median", "min", "max", "n");
        }
        for samples in &self.timings {
            let [median, min, max] = self.figures(samples);
            text += &format!(
                "{median:>10} {min:>10} {max:>10} {:>4}  {}\n",
                samples.len(),
                samples.name
            );
        }
        text
    }

    fn markdown(&self) -> String {
        let mut text = format!("`{}` (level: {})\n\n", self.command, self.level);
        text.extend(self.facts.iter().map(|(name, fact)| format!("- {name}: {fact}\n")));
        if !self.amounts.is_empty() {
            text += "\n| what | size |\n|---|---|\n";
            text.extend(
                self.amounts
                    .iter()
                    .map(|(name, bytes)| format!("| {name} | {} |\n", kib(*bytes))),
            );
        }
        if !self.timings.is_empty() {
            text += "\n| what | median | min | max | n |\n|---|---|---|---|---|\n";
        }
        for samples in &self.timings {
            let [median, min, max] = self.figures(samples);
            text += &format!("| {} | {median} | {min} | {max} | {} |\n", samples.name, samples.len());
        }
        text
    }

    fn figures(&self, samples: &Samples) -> [String; 3] {
        [(1, 2), (0, 1), (1, 1)].map(|(n, d)| samples.quantile(n, d).map(milliseconds).unwrap_or_default())
    }
}

fn milliseconds(duration: Duration) -> String {
    format!("{:.2} ms", duration.as_secs_f64() * 1e3)
}

fn kib(bytes: u64) -> String {
    format!("{} KiB", bytes.div_ceil(1024))
}
