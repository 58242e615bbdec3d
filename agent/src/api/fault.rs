//! Errors as clients see them: a status code, a message that says what to do, and details that a program can read.

use std::{collections::HashMap, time::Duration};

use flint_snapshots::{images::ErrorKind, machines::MachineError};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, QuotaViolation, StatusExt as _};

use crate::{
    backend::ImageError,
    chain,
    pods::{PodError, journal::OutOfRange},
    sandbox::SandboxError,
    saved::SavedError,
    travel::TravelError,
};

/// Domain of every `ErrorInfo`.
pub const DOMAIN: &str = "flint.host";
/// When to ask a registry again.
const REGISTRY_RETRY: Duration = Duration::from_secs(10);

/// A status with an `ErrorInfo`.
pub(super) fn fault(code: Code, reason: &str, message: impl Into<String>) -> Status {
    Status::with_error_details(code, message, info(reason))
}

/// A status that says when to come again.
pub(super) fn fault_retry(code: Code, reason: &str, message: impl Into<String>, after: Duration) -> Status {
    let mut details = info(reason);
    details.set_retry_info(Some(after));
    Status::with_error_details(code, message, details)
}

/// A request with one wrong field.
pub(super) fn bad_field(field: &str, description: impl Into<String>) -> Status {
    let description = description.into();
    let message = format!("{field} {description}");
    let mut details = info("INVALID");
    details.add_bad_request_violation(field, description);
    Status::with_error_details(Code::InvalidArgument, message, details)
}

fn info(reason: &str) -> ErrorDetails {
    ErrorDetails::with_error_info(reason, DOMAIN, HashMap::new())
}

impl From<PodError> for Status {
    fn from(error: PodError) -> Self {
        let message = error.to_string();
        match error {
            PodError::Invalid(violations) => {
                let unsupported = violations.iter().all(|violation| violation.unsupported);
                let (code, reason) = if unsupported {
                    (Code::Unimplemented, "UNSUPPORTED")
                } else {
                    (Code::InvalidArgument, "INVALID")
                };
                let mut details = info(reason);
                let violations = violations
                    .into_iter()
                    .map(|v| FieldViolation::new(v.field, v.description));
                details.set_bad_request(violations.collect::<Vec<_>>());
                Status::with_error_details(code, message, details)
            }
            PodError::Shortage(shortage) => {
                let mut details = info(shortage.reason);
                details.set_quota_failure(vec![QuotaViolation::new("host", message.clone())]);
                Status::with_error_details(Code::ResourceExhausted, message, details)
            }
            PodError::Draining => fault(Code::Unavailable, "DRAINING", message),
            PodError::NotReady(_) => fault(Code::FailedPrecondition, "HOST_NOT_READY", message),
            PodError::NotFound(_) => fault(Code::NotFound, "POD_NOT_FOUND", message),
            PodError::Taken(_) => fault(Code::AlreadyExists, "POD_EXISTS", message),
            PodError::ForkCount { .. } => bad_field("forks", message),
            PodError::Stale { .. } => fault(Code::Aborted, "STALE_GENERATION", message),
            PodError::StaleMaterials { .. } => fault(Code::Aborted, "STALE_MATERIALS", message),
            PodError::NotUp(_) => fault(Code::FailedPrecondition, "POD_NOT_RUNNING", message),
            PodError::Terminating(_) => fault(Code::FailedPrecondition, "POD_TERMINATING", message),
            PodError::Starting(_) => fault(Code::FailedPrecondition, "POD_STARTING", message),
            PodError::Saved(error) => error.into(),
            PodError::Hook { .. } => fault(Code::FailedPrecondition, "HOOK_FAILED", message),
            PodError::Paused(_) => fault(Code::FailedPrecondition, "POD_PAUSED", message),
            PodError::Sandbox { .. } => fault(Code::Internal, "SANDBOX", message),
            PodError::NotEnded(_) => fault(Code::FailedPrecondition, "POD_NOT_ENDED", message),
            PodError::NoContainer { .. } => fault(Code::NotFound, "CONTAINER_NOT_FOUND", message),
            PodError::NotRunning { .. } => fault(Code::FailedPrecondition, "CONTAINER_NOT_RUNNING", message),
            PodError::NoPrevious(_) => fault(Code::NotFound, "NO_PREVIOUS_RUN", message),
            PodError::Store(_) => fault_retry(Code::Unavailable, "STORE", message, Duration::from_secs(5)),
            PodError::Logs { .. } => fault(Code::Internal, "LOGS", message),
        }
    }
}

impl From<SavedError> for Status {
    fn from(error: SavedError) -> Self {
        let message = chain(&error);
        match error {
            SavedError::Name(_) => bad_field("name", message),
            SavedError::Exists(_) => fault(Code::AlreadyExists, "SNAPSHOT_EXISTS", message),
            SavedError::NotFound(_) => fault(Code::NotFound, "SNAPSHOT_NOT_FOUND", message),
            SavedError::InUse(_) => fault(Code::FailedPrecondition, "SNAPSHOT_IN_USE", message),
            SavedError::TooMany(_) => fault(Code::ResourceExhausted, "TOO_MANY_SNAPSHOTS", message),
            SavedError::NoSpace(_) => fault(Code::ResourceExhausted, "NO_SPACE", message),
            SavedError::File { .. } => fault(Code::Internal, "SNAPSHOTS", message),
        }
    }
}

impl From<ImageError> for Status {
    fn from(error: ImageError) -> Self {
        of_image(&error, error.to_string())
    }
}

fn of_image(error: &ImageError, message: String) -> Status {
    match error {
        ImageError::Invalid(_) => fault(Code::InvalidArgument, "INVALID_IMAGE", message),
        ImageError::NotFound(_) => fault(Code::NotFound, "IMAGE_NOT_FOUND", message),
        ImageError::Denied(_) => fault(Code::PermissionDenied, "REGISTRY_DENIED", message),
        ImageError::Unavailable(_) => fault_retry(Code::Unavailable, "REGISTRY_UNAVAILABLE", message, REGISTRY_RETRY),
        ImageError::Corrupt(_) => fault(Code::DataLoss, "IMAGE_CORRUPT", message),
        ImageError::Unsupported(_) => fault(Code::Unimplemented, "IMAGE_UNSUPPORTED", message),
        ImageError::InUse(_) => fault(Code::FailedPrecondition, "IMAGE_IN_USE", message),
        ImageError::NoSpace(_) => fault(Code::ResourceExhausted, "NO_SPACE", message),
        ImageError::Internal(_) => fault(Code::Internal, "IMAGE_STORE", message),
    }
}

impl From<TravelError> for Status {
    fn from(error: TravelError) -> Self {
        let message = chain(&error);
        match error {
            TravelError::Saved(error) => error.into(),
            TravelError::Machine(error) => of_machine(&error, message),
            TravelError::Template(SandboxError::NoTemplate) => fault(Code::FailedPrecondition, "NO_TEMPLATE", message),
            TravelError::Template(SandboxError::ForeignTemplate(_)) => {
                fault(Code::FailedPrecondition, "TEMPLATE_REFUSED", message)
            }
            TravelError::Template(_) => fault(Code::Internal, "TEMPLATE", message),
            TravelError::Unknown { .. } | TravelError::UnknownTemplate { .. } => {
                fault(Code::Unimplemented, "SNAPSHOT_UNSUPPORTED", message)
            }
            TravelError::Senseless { .. } => fault(Code::DataLoss, "SNAPSHOT_CORRUPT", message),
            TravelError::Image { source, .. } => of_image(&source, message),
            TravelError::Device { .. } => fault(Code::FailedPrecondition, "IMAGE_DIFFERS", message),
            TravelError::Worker(_) => fault(Code::Internal, "SNAPSHOTS", message),
        }
    }
}

/// On the way to or from a registry.
fn of_machine(error: &MachineError, message: String) -> Status {
    match error.kind() {
        ErrorKind::Invalid => bad_field("reference", message),
        ErrorKind::NotFound => fault(Code::NotFound, "REFERENCE_NOT_FOUND", message),
        ErrorKind::Denied => fault(Code::PermissionDenied, "REGISTRY_DENIED", message),
        ErrorKind::Unavailable | ErrorKind::Deadline => {
            fault_retry(Code::Unavailable, "REGISTRY_UNAVAILABLE", message, REGISTRY_RETRY)
        }
        ErrorKind::BadImage => fault(Code::DataLoss, "SNAPSHOT_CORRUPT", message),
        ErrorKind::Unsupported => fault(Code::Unimplemented, "SNAPSHOT_UNSUPPORTED", message),
        ErrorKind::DiskFull => fault(Code::ResourceExhausted, "NO_SPACE", message),
        ErrorKind::InUse | ErrorKind::Internal => fault(Code::Internal, "SNAPSHOTS", message),
    }
}

impl From<OutOfRange> for Status {
    fn from(range: OutOfRange) -> Self {
        let OutOfRange { oldest, newest } = range;
        let message =
            format!("the history goes from revision {oldest} to {newest}: list the pods again and watch from there");
        fault(Code::OutOfRange, "REVISION_OUT_OF_RANGE", message)
    }
}
