//! `timeline`: where a pod's start spent its time.

use std::time::Duration;

use clap::Args;
use flint_api::host::{PodStatus, Stage};

use crate::client::Client;
use crate::failure::Failure;
use crate::output::{self, Format};

/// Columns of the waterfall.
const WIDTH: u32 = 40;

/// Show how a pod's start spent its time, stage by stage.
#[derive(Debug, Args)]
pub struct Timeline {
    /// The pod.
    pod: String,
}

impl Timeline {
    pub async fn execute(self, client: Client, format: Format) -> Result<u8, Failure> {
        let status = client.pod(&self.pod).await?.status.unwrap_or_default();
        if format == Format::Json {
            let only = PodStatus {
                timeline: status.timeline,
                ..PodStatus::default()
            };
            output::print_json("PodStatus", &only)?;
        } else {
            output::print_table(&["STAGE", "START", "DURATION", ""], &rows(&status.timeline))?;
        }
        Ok(0)
    }
}

/// A waterfall: each stage as a bar where it stood in the whole.
fn rows(stages: &[Stage]) -> Vec<Vec<String>> {
    let mut spans: Vec<(&str, Duration, Duration)> = stages
        .iter()
        .map(|stage| {
            (
                stage.name.as_str(),
                span(stage.start.as_ref()),
                span(stage.duration.as_ref()),
            )
        })
        .collect();
    spans.sort_by_key(|(_, start, _)| *start);
    let whole = spans
        .iter()
        .map(|(_, start, duration)| *start + *duration)
        .max()
        .unwrap_or_default();
    spans
        .into_iter()
        .map(|(name, start, duration)| {
            let bar = bar(start, duration, whole);
            vec![
                name.to_owned(),
                output::duration(start),
                output::duration(duration),
                bar,
            ]
        })
        .collect()
}

fn bar(start: Duration, duration: Duration, whole: Duration) -> String {
    let column = |time: Duration| {
        let column = time.as_nanos() * u128::from(WIDTH) / whole.as_nanos().max(1);
        usize::try_from(column).unwrap_or(usize::MAX).min(WIDTH as usize)
    };
    let (from, to) = (column(start), column(start + duration));
    format!(
        "|{}{}{}|",
        " ".repeat(from.min(WIDTH as usize - 1)),
        "#".repeat((to - from).max(1)),
        {
            let used = from.min(WIDTH as usize - 1) + (to - from).max(1);
            " ".repeat((WIDTH as usize).saturating_sub(used))
        }
    )
}

fn span(duration: Option<&prost_types::Duration>) -> Duration {
    duration
        .and_then(|duration| Duration::try_from(*duration).ok())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stage(name: &str, start_ms: i32, duration_ms: i32) -> Stage {
        let span = |ms: i32| {
            Some(prost_types::Duration {
                seconds: 0,
                nanos: ms * 1_000_000,
            })
        };
        Stage {
            name: name.into(),
            start: span(start_ms),
            duration: span(duration_ms),
        }
    }

    #[test]
    fn stages_stand_in_order_and_bars_keep_their_width() {
        let rows = rows(&[stage("boot", 50, 50), stage("pull", 0, 50), stage("end", 100, 0)]);

        let names: Vec<_> = rows.iter().map(|row| row[0].as_str()).collect();
        assert_eq!(names, ["pull", "boot", "end"]);
        assert_eq!(rows[0][3], format!("|{}{}|", "#".repeat(20), " ".repeat(20)));
        assert!(rows.iter().all(|row| row[3].len() == WIDTH as usize + 2), "{rows:?}");
    }
}
