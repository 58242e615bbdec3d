//! `logs`.

use std::io;

use clap::Args;
use flint_api::host::{LogBatch, LogEntry, LogsRequest, OutputStream};
use prost_types::Timestamp;

use crate::client::Client;
use crate::failure::Failure;
use crate::output::{self, Format};
use crate::pods;

/// Print a container's log.
#[derive(Debug, Args)]
pub struct Logs {
    /// The pod.
    pod: String,
    /// The container; may be left out where the pod has one.
    #[arg(short, long)]
    container: Option<String>,
    /// Go on as the container writes, until it has ended for good.
    #[arg(short, long)]
    follow: bool,
    /// Only the last LINES lines.
    #[arg(long, value_name = "LINES")]
    tail: Option<u64>,
    /// Only what is newer than this: seconds, or a duration such as 90s, 10m, 2h.
    #[arg(long, value_name = "AGE", value_parser = age)]
    since: Option<u64>,
    /// Of the run before the present one.
    #[arg(short, long)]
    previous: bool,
    /// Put each line's time before it.
    #[arg(short, long)]
    timestamps: bool,
    /// Stop after so many bytes.
    #[arg(long, value_name = "BYTES", default_value_t = 0, hide_default_value = true)]
    limit_bytes: u64,
}

impl Logs {
    pub async fn execute(self, client: Client, format: Format) -> Result<u8, Failure> {
        let pod = client.pod(&self.pod).await?;
        let request = LogsRequest {
            uid: pods::uid(&pod),
            container: self.container.unwrap_or_default(),
            follow: self.follow,
            tail_lines: self.tail,
            since: self.since.map(since),
            previous: self.previous,
            limit_bytes: self.limit_bytes,
        };
        let mut batches = client.streams().log_batches(request).await?.into_inner();
        while let Some(batch) = batches.message().await? {
            if format == Format::Json {
                say_gap(&batch);
                for entry in &batch.entries {
                    output::print_json("LogEntry", entry)?;
                }
            } else {
                print(&batch, self.timestamps)?;
            }
        }
        Ok(0)
    }
}

/// To standard output what the container wrote to its own, to standard error the same; one write for what follows one
/// another on the same.
pub fn print(batch: &LogBatch, timestamps: bool) -> Result<(), Failure> {
    say_gap(batch);
    for entries in batch.entries.chunk_by(|one, next| one.stream == next.stream) {
        let mut text = Vec::new();
        for entry in entries {
            append(&mut text, entry, timestamps);
        }
        if entries
            .first()
            .is_some_and(|entry| entry.stream() == OutputStream::Stderr)
        {
            output::write_out(&mut io::stderr().lock(), &text)?;
        } else {
            output::write_out(&mut io::stdout().lock(), &text)?;
        }
    }
    Ok(())
}

fn append(text: &mut Vec<u8>, entry: &LogEntry, timestamps: bool) {
    if let (true, Some(time)) = (timestamps, entry.time.as_ref()) {
        text.extend_from_slice(time.to_string().as_bytes());
        text.push(b' ');
    }
    text.extend_from_slice(&entry.line);
}

fn say_gap(batch: &LogBatch) {
    if batch.gap {
        eprintln!("flint: a part of the log was rotated away before it could be read");
    }
}

fn since(seconds: u64) -> Timestamp {
    let now = std::time::SystemTime::now();
    now.checked_sub(std::time::Duration::from_secs(seconds))
        .unwrap_or(std::time::UNIX_EPOCH)
        .into()
}

/// `90`, `90s`, `10m`, `2h`, `1d` as seconds.
fn age(text: &str) -> Result<u64, String> {
    let (number, factor) = match text.char_indices().last() {
        Some((end, 's')) => (&text[..end], 1),
        Some((end, 'm')) => (&text[..end], 60),
        Some((end, 'h')) => (&text[..end], 3600),
        Some((end, 'd')) => (&text[..end], 86_400),
        _ => (text, 1),
    };
    let number: u64 = number
        .parse()
        .map_err(|_| "write for example 90s, 10m, 2h or 1d".to_owned())?;
    number.checked_mul(factor).ok_or_else(|| "is too long ago".to_owned())
}

#[cfg(test)]
mod tests {
    use super::age;

    #[test]
    fn ages_have_units() {
        assert_eq!(age("90"), Ok(90));
        assert_eq!(age("10m"), Ok(600));
        assert_eq!(age("2h"), Ok(7200));
        for wrong in [
            "",
            "m",
            "1.5h",
            "-3s",
            "99999999999999999999d",
            "9999999999999999999d",
            "١s",
        ] {
            assert!(age(wrong).is_err(), "{wrong}");
        }
    }
}
