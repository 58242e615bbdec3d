//! `doctor`: what this host can do. It needs no flintd.

use clap::Args;
use flintd::probe::{self, Check, Verdict};
use serde_json::json;

use crate::failure::Failure;
use crate::output::{self, Format};

/// Say what this host can and cannot do for Flint, and what to do about each lack.
///
/// Exits with 1 if something is missing that Flint cannot do without.
#[derive(Debug, Args)]
pub struct Doctor {}

impl Doctor {
    pub fn execute(self, format: Format) -> Result<u8, Failure> {
        let checks = probe::all();
        match format {
            Format::Json => output::print_line(&to_json(&checks).to_string())?,
            Format::Text => checks.iter().try_for_each(print)?,
        }
        Ok(u8::from(checks.iter().any(|check| check.verdict == Verdict::Missing)))
    }
}

fn print(check: &Check) -> Result<(), Failure> {
    output::print_line(&format!(
        "{:<8} {:<20} {}",
        check.verdict.word(),
        check.name,
        check.found
    ))?;
    match &check.remedy {
        Some(remedy) => output::print_line(&format!("{:<30}-> {remedy}", "")),
        None => Ok(()),
    }
}

fn to_json(checks: &[Check]) -> serde_json::Value {
    let checks: Vec<_> = checks
        .iter()
        .map(|check| {
            json!({
                "name": check.name,
                "verdict": check.verdict.word(),
                "found": check.found,
                "remedy": check.remedy,
            })
        })
        .collect();
    json!({ "checks": checks })
}
