//! What was measured, for people, programs, and `docs/results.md`.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use serde::Serialize;

use crate::samples::{Samples, StageSamples};
use crate::{Error, Format};

/// Figures with all that is needed to judge them.
#[derive(Debug, Serialize)]
pub struct Report {
    command: String,
    level: String,
    facts: Vec<(String, String)>,
    amounts: Vec<(String, u64)>,
    stages: Vec<StageSamples>,
    timings: Vec<Samples>,
    claims: Vec<Claim>,
}

/// How claims of one kind went, beside the least that they can cost.
#[derive(Debug, Serialize)]
struct Claim {
    name: String,
    count: usize,
    p50_ns: u64,
    p99_ns: u64,
    floor_p50_ns: u64,
    /// p50 / floor's p50.
    ratio: f64,
}

impl Report {
    pub fn new(level: &str, facts: Vec<(String, String)>) -> Self {
        let mut words = std::env::args();
        let program = words.next().unwrap_or_default();
        let program = program.rsplit('/').next().unwrap_or_default().to_owned();
        let command = std::iter::once(program)
            .chain(words.map(quoted))
            .collect::<Vec<_>>()
            .join(" ");
        Self {
            command,
            level: level.to_owned(),
            facts,
            amounts: Vec::new(),
            stages: Vec::new(),
            timings: Vec::new(),
            claims: Vec::new(),
        }
    }

    pub fn fact(&mut self, name: &str, fact: impl Into<String>) {
        self.facts.push((name.to_owned(), fact.into()));
    }

    /// How one time compares with another, if both were taken.
    pub fn ratio(&mut self, what: &str, ours: Option<Duration>, theirs: Option<Duration>) {
        if let (Some(ours), Some(theirs)) = (ours, theirs) {
            let ratio = ours.as_secs_f64() / theirs.as_secs_f64();
            self.fact("ratio", format!("{what}, medians: {ratio:.2}"));
        }
    }

    /// A number of bytes.
    pub fn amount(&mut self, name: impl Into<String>, bytes: u64) {
        self.amounts.push((name.into(), bytes));
    }

    pub fn add(&mut self, samples: Samples) {
        self.timings.push(samples);
    }

    /// Claims of one kind, and the floor of the same run.
    pub fn add_claim(&mut self, claims: &Samples, floor: &Samples) {
        let (Some(p50), Some(p99), Some(floor)) = (claims.median(), claims.quantile(99, 100), floor.median()) else {
            return;
        };
        let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.claims.push(Claim {
            name: claims.name.clone(),
            count: claims.len(),
            p50_ns: nanos(p50),
            p99_ns: nanos(p99),
            floor_p50_ns: nanos(floor),
            ratio: p50.as_secs_f64() / floor.as_secs_f64(),
        });
    }

    /// A stage of a start.
    pub fn add_stage(&mut self, stage: StageSamples) {
        self.stages.push(stage);
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
        if !self.stages.is_empty() {
            text += &format!(
                "{:>10} {:>10} {:>10} {:>10} {:>4}\n",
                "start", "median", "min", "max", "n"
            );
        }
        for stage in &self.stages {
            let (start, [median, min, max]) = stage_figures(stage);
            let (name, n) = (stage.name(), stage.durations.len());
            text += &format!("{start:>10} {median:>10} {min:>10} {max:>10} {n:>4}  {name}\n");
        }
        if !self.claims.is_empty() {
            text += &format!(
                "{:>10} {:>10} {:>10} {:>6} {:>4}\n",
                "p50", "p99", "floor p50", "ratio", "n"
            );
        }
        for claim in &self.claims {
            let [p50, p99, floor] = claim.times();
            let Claim { name, count, ratio, .. } = claim;
            text += &format!("{p50:>10} {p99:>10} {floor:>10} {ratio:>6.2} {count:>4}  {name}\n");
        }
        if !self.timings.is_empty() {
            let [median, p99, min, max] = ["median", "p99", "min", "max"];
            text += &format!("{median:>10} {p99:>10} {min:>10} {max:>10} {:>4}\n", "n");
        }
        for samples in &self.timings {
            let ([median, min, max], p99) = (figures(samples), p99(samples));
            text += &format!(
                "{median:>10} {p99:>10} {min:>10} {max:>10} {:>4}  {}\n",
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
        if !self.stages.is_empty() {
            text += "\n| stage | start, median | duration, median | min | max | n |\n|---|---|---|---|---|---|\n";
        }
        for stage in &self.stages {
            let (start, [median, min, max]) = stage_figures(stage);
            let (name, n) = (stage.name(), stage.durations.len());
            text += &format!("| {name} | {start} | {median} | {min} | {max} | {n} |\n");
        }
        if !self.claims.is_empty() {
            text += "\n| claim | p50 | p99 | floor's p50 | ratio | n |\n|---|---|---|---|---|---|\n";
        }
        for claim in &self.claims {
            let [p50, p99, floor] = claim.times();
            let Claim { name, count, ratio, .. } = claim;
            text += &format!("| {name} | {p50} | {p99} | {floor} | {ratio:.2} | {count} |\n");
        }
        if !self.timings.is_empty() {
            text += "\n| what | median | p99 | min | max | n |\n|---|---|---|---|---|---|\n";
        }
        for samples in &self.timings {
            let ([median, min, max], p99) = (figures(samples), p99(samples));
            let (name, n) = (&samples.name, samples.len());
            text += &format!("| {name} | {median} | {p99} | {min} | {max} | {n} |\n");
        }
        text
    }
}

impl Claim {
    fn times(&self) -> [String; 3] {
        [self.p50_ns, self.p99_ns, self.floor_p50_ns]
            .map(|nanos| format!("{:.3} ms", Duration::from_nanos(nanos).as_secs_f64() * 1e3))
    }
}

/// Median, least and most.
fn figures(samples: &Samples) -> [String; 3] {
    [(1, 2), (0, 1), (1, 1)].map(|(n, d)| samples.quantile(n, d).map(milliseconds).unwrap_or_default())
}

fn p99(samples: &Samples) -> String {
    samples.quantile(99, 100).map(milliseconds).unwrap_or_default()
}

/// A stage's start, and its durations where it has any.
fn stage_figures(stage: &StageSamples) -> (String, [String; 3]) {
    let start = stage.starts.median().map(milliseconds).unwrap_or_default();
    let durations = if stage.is_moment() {
        ["-".to_owned(), String::new(), String::new()]
    } else {
        figures(&stage.durations)
    };
    (start, durations)
}

/// A word of a command line as a shell takes it.
fn quoted(word: String) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=@,".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

fn milliseconds(duration: Duration) -> String {
    format!("{:.2} ms", duration.as_secs_f64() * 1e3)
}

fn kib(bytes: u64) -> String {
    format!("{} KiB", bytes.div_ceil(1024))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_has_a_start_and_no_duration() {
        let mut report = Report::new("test", Vec::new());
        for (name, duration) in [("vmm.boot", 30), ("first-output", 0)] {
            let mut stage = StageSamples::new(name);
            stage.push(Duration::from_millis(12), Duration::from_millis(duration));
            report.add_stage(stage);
        }

        let text = report.markdown();

        assert!(
            text.contains("| vmm.boot | 12.00 ms | 30.00 ms | 30.00 ms | 30.00 ms | 1 |"),
            "{text}"
        );
        assert!(text.contains("| first-output | 12.00 ms | - |  |  | 1 |"), "{text}");
    }

    #[test]
    fn a_command_can_be_pasted_into_a_shell() {
        assert_eq!(quoted("--level".into()), "--level");
        assert_eq!(quoted("emulated host".into()), "'emulated host'");
        assert_eq!(quoted("it's".into()), r"'it'\''s'");
        assert_eq!(quoted(String::new()), "''");
    }
}
