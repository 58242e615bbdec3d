//! An error and its causes on one line, for the console and for gRPC statuses.

use std::{error::Error, fmt::Write as _};

/// "creating container web: mounting its overlay: No such device". A cause that its parent already quotes is left out.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            // Writing to a String cannot fail.
            let _ = write!(text, ": {cause_text}");
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("reading the page")]
    struct Outer(#[source] std::io::Error);

    #[derive(Debug, thiserror::Error)]
    #[error("wrapped: {0}")]
    struct Quoting(#[source] std::io::Error);

    #[test]
    fn causes_follow_their_error() {
        assert_eq!(chain(&Outer(std::io::Error::other("torn"))), "reading the page: torn");
    }

    #[test]
    fn a_quoted_cause_is_not_repeated() {
        assert_eq!(chain(&Quoting(std::io::Error::other("torn"))), "wrapped: torn");
    }
}
