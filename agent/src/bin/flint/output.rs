//! Tables for people, protobuf's JSON for programs.

use std::io::{self, Write};
use std::time::Duration;

use prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage, SerializeOptions};
use prost_types::Timestamp;

use crate::failure::Failure;

/// How results are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// For people.
    Text,
    /// The API's messages, as protobuf's canonical JSON.
    Json,
}

/// Prints a message of the host API as one line of JSON. The contract's own descriptors do the mapping, so that no field can
/// be forgotten.
pub fn print_json(name: &str, message: &impl Message) -> Result<(), Failure> {
    let json = to_json(name, message)?;
    print_line(&json.to_string())
}

fn to_json(name: &str, message: &impl Message) -> Result<serde_json::Value, Failure> {
    let pool = DescriptorPool::decode(flint_api::host::DESCRIPTORS)
        .map_err(|error| Failure::local("read the API's descriptors", error))?;
    let descriptor = pool
        .get_message_by_name(&format!("flint.host.v1.{name}"))
        .ok_or_else(|| Failure::new(format!("the API has no message {name}")))?;
    let dynamic = DynamicMessage::decode(descriptor, message.encode_to_vec().as_slice())
        .map_err(|error| Failure::local("map the answer to JSON", error))?;
    let options = SerializeOptions::new()
        .stringify_64_bit_integers(false)
        .skip_default_fields(false);
    dynamic
        .serialize_with_options(serde_json::value::Serializer, &options)
        .map_err(|error| Failure::local("map the answer to JSON", error))
}

/// Prints a line; a reader that went away (`flint ps | head -1`) ends flint as quietly as it ends others.
pub fn print_line(line: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    write_out(&mut out, line.as_bytes()).and_then(|()| write_out(&mut out, b"\n"))
}

/// Writes bytes to stdout or stderr at once.
pub fn write_out(out: &mut impl Write, bytes: &[u8]) -> Result<(), Failure> {
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        result => result.map_err(|error| Failure::local("write the output", error)),
    }
}

/// Lines up columns by their widest cell.
pub fn print_table(head: &[&str], rows: &[Vec<String>]) -> Result<(), Failure> {
    let width = |column: usize| {
        let cells = rows
            .iter()
            .filter_map(|row| row.get(column))
            .map(|cell| cell.chars().count());
        cells.chain([head[column].len()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let line = |cells: Vec<&str>| {
        let padded = cells.iter().zip(&widths).map(|(cell, &width)| format!("{cell:width$}"));
        padded.collect::<Vec<_>>().join("   ").trim_end().to_owned()
    };
    print_line(&line(head.to_vec()))?;
    rows.iter()
        .try_for_each(|row| print_line(&line(row.iter().map(String::as_str).collect())))
}

/// `950us`, `12.3ms`, `4.5s`, `3m`, `2h`, `5d`: two or three digits say enough.
pub fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    match duration.as_secs() {
        0 if seconds < 1e-3 => format!("{}us", duration.as_micros()),
        0 => format!("{:.1}ms", seconds * 1e3),
        1..60 => format!("{seconds:.1}s"),
        s @ 60..3600 => format!("{}m", s / 60),
        s @ 3600..86_400 => format!("{}h", s / 3600),
        s => format!("{}d", s / 86_400),
    }
}

/// The time since, by this machine's clock; nothing for a time in the future.
pub fn age(time: Option<&Timestamp>) -> String {
    let elapsed = time
        .and_then(|time| std::time::SystemTime::try_from(*time).ok())
        .and_then(|time| time.elapsed().ok());
    elapsed.map_or_else(
        || "-".to_owned(),
        |elapsed| duration(Duration::from_secs(elapsed.as_secs())),
    )
}

/// `1.5 GiB`.
#[expect(clippy::cast_precision_loss, reason = "two digits are shown")]
pub fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{bytes} B")
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flint_api::host::{ContainerStatus, Pod, PodStatus, Terminated, container_status};

    #[test]
    fn json_names_every_field_and_spells_enums_out() {
        let terminated = Terminated {
            exit_code: 3,
            reason: "Error".into(),
            ..Terminated::default()
        };
        let container = ContainerStatus {
            name: "main".into(),
            state: Some(container_status::State::Terminated(terminated)),
            ..ContainerStatus::default()
        };
        let status = PodStatus {
            phase: 4,
            containers: vec![container],
            ..PodStatus::default()
        };
        let pod = Pod {
            status: Some(status),
            revision: 7,
            ..Pod::default()
        };

        let json = to_json("Pod", &pod).unwrap();

        assert_eq!(json["status"]["phase"], "FAILED");
        assert_eq!(json["status"]["containers"][0]["terminated"]["exitCode"], 3);
        assert_eq!(json["revision"], 7);
    }

    #[test]
    fn durations_and_sizes_read_well() {
        assert_eq!(duration(Duration::from_micros(950)), "950us");
        assert_eq!(duration(Duration::from_micros(12_340)), "12.3ms");
        assert_eq!(duration(Duration::from_millis(4500)), "4.5s");
        assert_eq!(duration(Duration::from_secs(7300)), "2h");
        assert_eq!(bytes(512), "512 B");
        assert_eq!(bytes(3 << 29), "1.5 GiB");
    }
}
