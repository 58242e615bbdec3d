//! What went wrong, said for a person: what was being done, why it failed, what to do next.

use std::error::Error as _;
use std::fmt::Write as _;
use std::process::ExitCode;

use tonic::{Code, Status};
use tonic_types::StatusExt;

/// A connection that broke: flintd closes one that it does not serve, and so does its end.
const BROKEN: &str = "the connection broke; on its unix socket flintd serves root, the user that it runs as, and --socket-group; \
                      is it still running? `systemctl status flintd` or its log says";

/// An error as the user sees it.
#[derive(Debug)]
pub struct Failure {
    message: String,
    hint: Option<String>,
}

impl Failure {
    /// Something that flint itself found wrong.
    pub fn new(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            hint: None,
        }
    }

    /// An error of this machine, met while doing `what`.
    pub fn local(what: &str, error: impl std::error::Error) -> Self {
        Self::new(format!("cannot {what}: {}", flintd::chain(&error)))
    }

    /// What to do next.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// What went wrong, and what to do next.
    pub fn into_parts(self) -> (String, Option<String>) {
        (self.message, self.hint)
    }

    /// Prints it on stderr, and is the exit code.
    pub fn report(self, code: u8) -> ExitCode {
        eprintln!("flint: {}", self.message);
        if let Some(hint) = self.hint {
            eprintln!("flint: {hint}");
        }
        ExitCode::from(code)
    }
}

impl From<Status> for Failure {
    /// flintd's own words, the fields that it names, and a hint by the kind of error.
    fn from(status: Status) -> Self {
        let mut message = status.message().to_owned();
        if message.is_empty() {
            message = format!("flintd answered {:?} and said no more", status.code());
        }
        let details = status.get_error_details();
        for violation in details.bad_request().into_iter().flat_map(|bad| &bad.field_violations) {
            // A message with one violation already says it all.
            if !message.contains(&violation.field) {
                let _ = write!(message, "\n  {}: {}", violation.field, violation.description);
            }
        }
        // flintd's messages say what to do where it has to do with what was asked; the hints are about everything else.
        let reason = details.error_info().map(|info| info.reason.as_str());
        // Only this end knows a source: what came over the wire has words alone.
        let broke = status.source().is_some();
        let hint = match (status.code(), reason) {
            (Code::Unavailable | Code::Unknown | Code::Cancelled, None) if broke => Some(BROKEN),
            (Code::Unavailable, None) => Some("is flintd still running? `systemctl status flintd` or its log says"),
            (Code::PermissionDenied, None) => Some("run as root or as a member of flintd's socket group"),
            (Code::ResourceExhausted, Some("OutOfcpu" | "OutOfmemory" | "OutOfpods")) => {
                Some("`flint ps` shows what runs; stop something or ask for less")
            }
            (Code::FailedPrecondition, Some("HOST_NOT_READY")) => {
                Some("`flint doctor` says more; once it is put right, try again: flintd goes on as it is")
            }
            _ => None,
        };
        Self {
            message,
            hint: hint.map(str::to_owned),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use tonic_types::ErrorDetails;

    use super::*;

    fn hint(code: Code, reason: Option<&str>) -> Option<String> {
        let details = reason.map(|reason| ErrorDetails::with_error_info(reason, "flint.host", HashMap::new()));
        let status = Status::with_error_details(code, "no", details.unwrap_or_default());
        Failure::from(status).into_parts().1
    }

    #[test]
    fn a_connection_that_breaks_is_told_from_what_flintd_says() {
        let broken = Status::from_error(Box::new(std::io::Error::from(std::io::ErrorKind::BrokenPipe)));
        assert_eq!(Failure::from(broken).into_parts().1.as_deref(), Some(BROKEN));
        assert_eq!(hint(Code::Unknown, None), None);
    }

    #[test]
    fn a_hint_is_about_what_flintd_did_not_say() {
        assert!(hint(Code::Unavailable, None).is_some_and(|hint| hint.contains("flintd")));
        assert_eq!(hint(Code::Unavailable, Some("REGISTRY_UNAVAILABLE")), None);
        assert_eq!(hint(Code::PermissionDenied, Some("REGISTRY_DENIED")), None);
        assert!(hint(Code::ResourceExhausted, Some("OutOfmemory")).is_some());
        assert!(hint(Code::FailedPrecondition, Some("HOST_NOT_READY")).is_some_and(|hint| hint.contains("doctor")));
    }
}
