//! QEMU's control: JSON messages, a line each, on its standard streams (QEMU Machine Protocol specification).

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use crate::Error;

/// How long QEMU may be silent while something is awaited.
const PATIENCE: Duration = Duration::from_secs(60);

/// A connection. It ends with its QEMU.
pub struct Qmp {
    to: ChildStdin,
    from: Receiver<Value>,
    /// Events that came while an answer was awaited.
    events: Vec<Value>,
}

impl Qmp {
    /// To a QEMU that was started with `-qmp stdio` and pipes.
    pub fn open(qemu: &mut Child) -> Result<Self, Error> {
        let (Some(to), Some(from)) = (qemu.stdin.take(), qemu.stdout.take()) else {
            return Err("QEMU was started without pipes".into());
        };
        let (tell, messages) = channel();
        // It ends when QEMU closes its end.
        thread::spawn(move || {
            let lines = BufReader::new(from).lines().map_while(Result::ok);
            let mut messages = lines.filter_map(|line| serde_json::from_str(&line).ok());
            messages.all(|message: Value| tell.send(message).is_ok())
        });
        let mut qmp = Self {
            to,
            from: messages,
            events: Vec::new(),
        };
        qmp.command("qmp_capabilities", &json!({}))?;
        let events = json!({ "capabilities": [{ "capability": "events", "state": true }] });
        qmp.command("migrate-set-capabilities", &events)?;
        Ok(qmp)
    }

    /// Has QEMU do something, and waits for its answer.
    pub fn command(&mut self, name: &str, arguments: &Value) -> Result<(), Error> {
        writeln!(self.to, "{}", json!({ "execute": name, "arguments": arguments }))?;
        loop {
            let message = self.next()?;
            if message.get("return").is_some() {
                return Ok(());
            }
            if let Some(error) = message.get("error") {
                return Err(format!("QEMU refuses {name}: {}", error["desc"]).into());
            }
            self.events.push(message);
        }
    }

    /// Waits for an event that `look` finds something in.
    fn event<T>(&mut self, look: impl Fn(&Value) -> Option<T>) -> Result<T, Error> {
        let mut early = std::mem::take(&mut self.events).into_iter();
        if let Some(found) = early.find_map(|event| look(&event)) {
            return Ok(found);
        }
        loop {
            if let Some(found) = look(&self.next()?) {
                return Ok(found);
            }
        }
    }

    /// Waits until the guest runs.
    pub fn resumed(&mut self) -> Result<(), Error> {
        self.event(|event| (event["event"] == "RESUME").then_some(()))
    }

    /// Waits until a machine that is being saved is.
    pub fn saved(&mut self) -> Result<(), Error> {
        let end = self.event(|event| {
            let status = event["data"]["status"]
                .as_str()
                .filter(|_| event["event"] == "MIGRATION")?;
            matches!(status, "completed" | "failed").then(|| status.to_owned())
        })?;
        let saved = (end == "completed").then_some(());
        saved.ok_or_else(|| "QEMU could not save its machine".into())
    }

    fn next(&mut self) -> Result<Value, Error> {
        self.from.recv_timeout(PATIENCE).map_err(|error| match error {
            RecvTimeoutError::Timeout => format!("QEMU has been silent for {PATIENCE:?}").into(),
            RecvTimeoutError::Disconnected => "QEMU has ended".into(),
        })
    }
}
