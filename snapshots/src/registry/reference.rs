//! Names of images.

use std::fmt;
use std::str::FromStr;

use super::Digest;

/// A parsed image reference with its defaults filled in: `busybox` is `docker.io/library/busybox:latest`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ImageReference {
    inner: oci_spec::distribution::Reference,
    digest: Option<Digest>,
}

impl ImageReference {
    /// The registry's host, with its port if it has one: "registry.example:5000".
    pub fn registry(&self) -> &str {
        self.inner.registry()
    }

    /// The repository within the registry: "library/busybox".
    pub fn repository(&self) -> &str {
        self.inner.repository()
    }

    /// The tag, if the reference has one. With a digest beside it, it is only a comment.
    pub fn tag(&self) -> Option<&str> {
        self.inner.tag()
    }

    /// The digest, if the reference has one.
    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// What a registry is asked for: the digest, else the tag.
    pub(crate) fn manifest_key(&self) -> String {
        match (self.digest, self.inner.tag()) {
            (Some(digest), _) => digest.to_string(),
            (None, tag) => tag.unwrap_or("latest").to_owned(),
        }
    }
}

impl fmt::Display for ImageReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.inner, f)
    }
}

/// Text that does not name an image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is not an image reference ({reason}); one looks like registry.example:5000/team/app:1.0 or name@sha256:..."
)]
pub struct ParseReferenceError {
    text: String,
    reason: String,
}

impl FromStr for ImageReference {
    type Err = ParseReferenceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = |reason: String| ParseReferenceError {
            text: text.chars().take(300).collect(),
            reason,
        };
        // Longer ones cannot be right, and this bounds the parser's work: host 255, repository 255, tag 128, digest 71.
        if text.len() > 800 {
            return Err(wrong("too long".to_owned()));
        }
        let inner: oci_spec::distribution::Reference = text.parse().map_err(|error| wrong(format!("{error}")))?;
        // The parser takes "Team/app" for a host and then puts it below docker.io, where no name has capitals.
        if inner.repository().bytes().any(|byte| byte.is_ascii_uppercase()) {
            return Err(wrong("a repository's name has no capital letters".to_owned()));
        }
        let digest = inner
            .digest()
            .map(str::parse::<Digest>)
            .transpose()
            .map_err(|error| wrong(error.to_string()))?;
        Ok(Self { inner, digest })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> String {
        text.parse::<ImageReference>().unwrap().to_string()
    }

    #[test]
    fn defaults_are_those_of_docker() {
        assert_eq!(parse("busybox"), "docker.io/library/busybox:latest");
        assert_eq!(parse("team/app:1"), "docker.io/team/app:1");
        assert_eq!(parse("localhost/app"), "localhost/app:latest");
        assert_eq!(parse("registry.example:5000/app"), "registry.example:5000/app:latest");
    }

    #[test]
    fn a_digest_goes_before_a_tag() {
        let digest = Digest::of(b"x");
        let reference: ImageReference = format!("h:1/a:tag@{digest}").parse().unwrap();
        assert_eq!(reference.manifest_key(), digest.to_string());
        assert_eq!(reference.tag(), Some("tag"));
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        let long = "a".repeat(900);
        for text in [
            "",
            "UPPER/Case",
            "Team/app:1",
            "a b",
            "a:b:c",
            "name@sha256:12",
            "h/../x",
            "http://h/a",
            "a@sha512:00",
            &long,
        ] {
            assert!(text.parse::<ImageReference>().is_err(), "{text} was taken");
        }
        let error = "Bad Name".parse::<ImageReference>().unwrap_err().to_string();
        assert!(error.contains("Bad Name"), "{error}");
    }
}
