//! Log lines as the Container Runtime Interface has them: `<RFC 3339 time, nanoseconds> <stdout|stderr> <F|P> <text>`.
//!
//! `F` is a full line, `P` a part of one: the rest follows under the same stream's next entry. What a container wrote
//! without a newline is written as `P` at once, so that a prompt shows and nothing waits in memory.

use std::time::{Duration, SystemTime};

use flint_api::host::{LogEntry, OutputStream};

use crate::pods::timestamp;

/// Longest text of one entry, as containerd cuts.
pub(super) const MAX_TEXT: usize = 16 << 10;

/// Appends a chunk of output as entries.
pub(super) fn format(out: &mut Vec<u8>, time_ns: u64, stream: OutputStream, data: &[u8]) {
    let name = if stream == OutputStream::Stderr {
        "stderr"
    } else {
        "stdout"
    };
    // Made once: in a flood of short lines it is most of what is written.
    let begin = format!("{} {name} ", rfc3339(time_ns));
    for line in data.split_inclusive(|byte| *byte == b'\n') {
        let (text, complete) = match line.strip_suffix(b"\n") {
            Some(text) => (text, true),
            None => (line, false),
        };
        let pieces = text.len().div_ceil(MAX_TEXT).max(1);
        for (index, piece) in text.chunks(MAX_TEXT).chain(text.is_empty().then_some(text)).enumerate() {
            let tag: &[u8] = if complete && index + 1 == pieces { b"F " } else { b"P " };
            for part in [begin.as_bytes(), tag, piece, b"\n"] {
                out.extend_from_slice(part);
            }
        }
    }
}

/// Reads an entry, without its newline; `None` for what no flintd wrote.
pub(super) fn parse(line: &[u8]) -> Option<LogEntry> {
    let mut parts = line.splitn(4, |byte| *byte == b' ');
    let time = parse_rfc3339(std::str::from_utf8(parts.next()?).ok()?)?;
    let stream = match parts.next()? {
        b"stdout" => OutputStream::Stdout,
        b"stderr" => OutputStream::Stderr,
        _ => return None,
    };
    let full = match parts.next()? {
        b"F" => true,
        b"P" => false,
        _ => return None,
    };
    let mut text = parts.next()?.to_vec();
    if full {
        text.push(b'\n');
    }
    Some(LogEntry {
        time: Some(timestamp(time)),
        stream: stream.into(),
        line: text,
    })
}

/// A moment in UTC, `2026-11-22T21:05:29.000000001Z`. Civil date from days by counting in eras of 400 years that begin in
/// March, so that a leap day is the last of its year.
fn rfc3339(time_ns: u64) -> String {
    let (seconds, nanos) = (time_ns / 1_000_000_000, time_ns % 1_000_000_000);
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let shifted = days + 719_468;
    let (era, day) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day_of_year = day - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{nanos:09}Z")
}

/// Reads a moment in UTC, with or without a fraction of a second.
pub(crate) fn parse_rfc3339(text: &str) -> Option<SystemTime> {
    let (date, time) = text.strip_suffix('Z')?.split_once('T')?;
    let number = |text: Option<&str>| text.and_then(|text| text.parse::<u64>().ok());
    let mut date = date.split('-');
    let (year, month, day) = (number(date.next())?, number(date.next())?, number(date.next())?);
    let (time, fraction) = time.split_once('.').unwrap_or((time, "0"));
    let mut time = time.split(':');
    let (hour, minute, second) = (number(time.next())?, number(time.next())?, number(time.next())?);
    if fraction.is_empty() || fraction.len() > 9 || !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let nanos: u32 = format!("{fraction:0<9}").parse().ok()?;
    if !(1970..=9999).contains(&year) || !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    if hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    let year = if month <= 2 { year - 1 } else { year };
    let (era, year_of_era) = (year / 400, year % 400);
    let shifted_month = if month > 2 { month - 3 } else { month + 9 };
    let day_of_year = (153 * shifted_month + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    let days = (era * 146_097 + day_of_era).checked_sub(719_468)?;
    let seconds = days * 86_400 + hour * 3600 + minute * 60 + second;
    SystemTime::UNIX_EPOCH.checked_add(Duration::new(seconds, nanos))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_read_as_a_kubelet_expects_them() {
        let mut out = Vec::new();
        format(
            &mut out,
            1_795_381_529_000_000_042,
            OutputStream::Stdout,
            b"hello\n\nwor",
        );
        format(&mut out, 951_782_399_999_999_999, OutputStream::Stderr, b"ld\n");
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "2026-11-22T21:05:29.000000042Z stdout F hello\n\
             2026-11-22T21:05:29.000000042Z stdout F \n\
             2026-11-22T21:05:29.000000042Z stdout P wor\n\
             2000-02-28T23:59:59.999999999Z stderr F ld\n"
        );
    }

    #[test]
    fn what_is_written_is_read_back_with_time_stream_and_newline() {
        for (time, data) in [
            (0, "a b c\n"),
            (951_827_696_123_456_789, "partial"),
            (4_102_444_800_000_000_000, "\n"),
        ] {
            let mut out = Vec::new();
            format(&mut out, time, OutputStream::Stderr, data.as_bytes());
            let entry = parse(out.strip_suffix(b"\n").unwrap()).unwrap();
            assert_eq!(entry.line, data.as_bytes());
            assert_eq!(entry.stream(), OutputStream::Stderr);
            let read = entry.time.unwrap();
            assert_eq!(
                u64::try_from(read.seconds).unwrap() * 1_000_000_000 + u64::try_from(read.nanos).unwrap(),
                time
            );
        }
    }

    #[test]
    fn a_line_that_is_too_long_is_cut_into_parts_and_whole_again_when_joined() {
        for length in [MAX_TEXT - 1, MAX_TEXT, MAX_TEXT + 1, 3 * MAX_TEXT] {
            let mut data = vec![b'x'; length];
            data.push(b'\n');
            let mut out = Vec::new();
            format(&mut out, 1, OutputStream::Stdout, &data);
            let mut joined = Vec::new();
            for line in out.split_inclusive(|byte| *byte == b'\n') {
                assert!(line.len() <= MAX_TEXT + 64);
                joined.extend(parse(line.strip_suffix(b"\n").unwrap()).unwrap().line);
            }
            assert_eq!(joined, data);
        }
    }

    #[test]
    fn what_is_not_an_entry_is_not_taken_for_one() {
        for line in [
            "",
            "x",
            "2026-11-22T21:05:29.1Z stdout",
            "2026-11-22T21:05:29.x1Z stdout F x",
            "2026-13-22T21:05:29.1Z stdout F x",
            "9 stdout F x",
        ] {
            assert!(parse(line.as_bytes()).is_none(), "{line}");
        }
    }
}
