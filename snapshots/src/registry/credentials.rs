//! Credentials for a registry: those of a pull, else those of docker's configuration.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use super::RegistryError;

/// A user name and a password or access token.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Credentials {
    /// Who.
    pub username: String,
    /// The proof; never shown.
    pub password: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("username", &self.username)
            .finish_non_exhaustive()
    }
}

#[derive(Deserialize)]
struct DockerConfig {
    #[serde(default)]
    auths: HashMap<String, DockerAuth>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct DockerAuth {
    auth: String,
    username: String,
    password: String,
}

/// What docker's configuration has for `host`. It is read at each pull: people log in while we run.
pub(crate) fn from_docker(config: Option<&Path>, host: &str) -> Result<Option<Credentials>, RegistryError> {
    let Some(path) = config.map(Path::to_path_buf).or_else(default_path) else {
        return Ok(None);
    };
    let wrong = |reason: String| RegistryError::DockerConfig {
        path: path.clone(),
        reason,
    };
    let text = match std::fs::read(&path) {
        Ok(text) => text,
        // The default file is nobody's promise; one that was configured is.
        Err(_) if config.is_none() => return Ok(None),
        Err(error) => return Err(wrong(error.to_string())),
    };
    // Only the position of a mistake is told: what stands there may be a secret.
    let parsed: DockerConfig = serde_json::from_slice(&text).map_err(|error| {
        wrong(format!(
            "line {}, column {} is not what it should be",
            error.line(),
            error.column()
        ))
    })?;
    let Some((key, auth)) = parsed.auths.iter().find(|(key, _)| names(key, host)) else {
        return Ok(None);
    };
    auth.credentials()
        .map(Some)
        .ok_or_else(|| wrong(format!("the entry for {key} holds no user name and password")))
}

fn default_path() -> Option<PathBuf> {
    std::env::var_os("HOME").map(|home| Path::new(&home).join(".docker/config.json"))
}

/// Whether docker's key (`host`, `https://host`, `https://index.docker.io/v1/`) names the registry `host`.
fn names(key: &str, host: &str) -> bool {
    let bare = key.split_once("://").map_or(key, |(_, rest)| rest);
    let bare = bare.split('/').next().unwrap_or(bare);
    bare == host || (host == "docker.io" && matches!(bare, "index.docker.io" | "registry-1.docker.io"))
}

impl DockerAuth {
    fn credentials(&self) -> Option<Credentials> {
        if self.auth.is_empty() {
            let Self { username, password, .. } = self;
            return (!username.is_empty()).then(|| Credentials {
                username: username.clone(),
                password: password.clone(),
            });
        }
        let decoded = String::from_utf8(STANDARD.decode(self.auth.trim()).ok()?).ok()?;
        let (username, password) = decoded.split_once(':')?;
        Some(Credentials {
            username: username.to_owned(),
            password: password.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lookup(json: &str, host: &str) -> Result<Option<Credentials>, RegistryError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), json).unwrap();
        from_docker(Some(file.path()), host)
    }

    #[test]
    fn an_entry_is_found_by_host_however_it_is_written() {
        // "u:p:q"
        let json = |key: &str| format!(r#"{{"auths":{{"{key}":{{"auth":"dTpwOnE="}}}}}}"#);
        for key in ["h:5000", "https://h:5000", "http://h:5000/v2/"] {
            let found = lookup(&json(key), "h:5000").unwrap().unwrap();
            assert_eq!((found.username.as_str(), found.password.as_str()), ("u", "p:q"));
        }
        assert!(
            lookup(&json("https://index.docker.io/v1/"), "docker.io")
                .unwrap()
                .is_some()
        );
        assert!(lookup(&json("h:5000"), "other").unwrap().is_none());
    }

    #[test]
    fn a_broken_file_is_an_error_that_shows_no_secret() {
        for json in [
            r#"{"auths":{"h":{"auth":"c2VjcmV0"}}}"#,
            r#"{"auths":{"h":{"auth":"c2VjcmV0","#,
        ] {
            let error = lookup(json, "h").unwrap_err().to_string();
            assert!(!error.contains("c2VjcmV0") && !error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn debug_shows_no_password() {
        let shown = format!(
            "{:?}",
            Credentials {
                username: "u".into(),
                password: "hunter2".into()
            }
        );
        assert!(!shown.contains("hunter2"));
    }
}
