//! Credentials for a registry: those of a pull, else those of docker's configuration.

use std::collections::BTreeMap;
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

/// What there is to log in with at a registry.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Login {
    /// User name and password.
    pub(crate) credentials: Option<Credentials>,
    /// Where docker's configuration says that they are, if that is a place where this client does not look.
    pub(crate) elsewhere: Option<String>,
}

impl From<Credentials> for Login {
    fn from(credentials: Credentials) -> Self {
        Self {
            credentials: Some(credentials),
            elsewhere: None,
        }
    }
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct DockerConfig {
    auths: BTreeMap<String, DockerAuth>,
    cred_helpers: BTreeMap<String, String>,
    creds_store: String,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct DockerAuth {
    auth: String,
    username: String,
    password: String,
    identitytoken: String,
}

/// What docker's configuration has for `host`. It is read at each pull: people log in while we run.
///
/// A credential helper is a program of the user who logged in; a daemon does not run it. A public image can be pulled all
/// the same, so that is told only when the registry asks for credentials.
pub(crate) fn from_docker(config: Option<&Path>, host: &str) -> Result<Login, RegistryError> {
    let Some(path) = config.map(Path::to_path_buf).or_else(default_path) else {
        return Ok(Login::default());
    };
    let wrong = |reason: String| RegistryError::DockerConfig {
        path: path.clone(),
        reason,
    };
    let text = match std::fs::read(&path) {
        Ok(text) => text,
        // The default file is nobody's promise; one that was configured is.
        Err(_) if config.is_none() => return Ok(Login::default()),
        Err(error) => return Err(wrong(error.to_string())),
    };
    login(&text, host).map_err(wrong)
}

/// What the text of a docker configuration has for `host`; the error says what is wrong with it.
pub(crate) fn login(text: &[u8], host: &str) -> Result<Login, String> {
    // Only the position of a mistake is told: what stands there may be a secret.
    let parsed: DockerConfig = serde_json::from_slice(text).map_err(|error| {
        format!(
            "line {}, column {} is not what it should be",
            error.line(),
            error.column()
        )
    })?;
    let entry = parsed.auths.iter().find(|(key, _)| names(key, host));
    match entry.filter(|(_, auth)| !auth.is_empty()) {
        Some((_, auth)) if auth.is_token_only() => Ok(Login {
            credentials: None,
            elsewhere: Some("an identity token".to_owned()),
        }),
        Some((key, auth)) => auth
            .credentials()
            .map(Login::from)
            .ok_or_else(|| format!("the entry for {key} holds no user name and password")),
        // docker login leaves an empty entry behind where a helper keeps the secret.
        None => Ok(Login {
            credentials: None,
            elsewhere: parsed
                .helper(host)
                .map(|name| format!("the helper docker-credential-{name}")),
        }),
    }
}

impl DockerConfig {
    fn helper(&self, host: &str) -> Option<&str> {
        let own = self.cred_helpers.iter().find(|(key, _)| names(key, host));
        own.map(|(_, name)| name)
            .or(Some(&self.creds_store))
            .map(String::as_str)
            .filter(|name| !name.is_empty())
    }
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
    fn is_empty(&self) -> bool {
        self.auth.is_empty() && self.username.is_empty() && self.identitytoken.is_empty()
    }

    /// docker keeps such a token (OAuth 2) beside a user name without a password.
    fn is_token_only(&self) -> bool {
        !self.identitytoken.is_empty() && self.credentials().is_none_or(|found| found.password.is_empty())
    }

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

    fn lookup(json: &str, host: &str) -> Result<Login, RegistryError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), json).unwrap();
        from_docker(Some(file.path()), host)
    }

    #[test]
    fn an_entry_is_found_by_host_however_it_is_written() {
        // "u:p:q"
        let json = |key: &str| format!(r#"{{"auths":{{"{key}":{{"auth":"dTpwOnE="}}}}}}"#);
        for key in ["h:5000", "https://h:5000", "http://h:5000/v2/"] {
            let found = lookup(&json(key), "h:5000").unwrap().credentials.unwrap();
            assert_eq!((found.username.as_str(), found.password.as_str()), ("u", "p:q"));
        }
        let hub = lookup(&json("https://index.docker.io/v1/"), "docker.io").unwrap();
        assert!(hub.credentials.is_some());
        for other in ["other", "h:5001", "h", "xh:5000", "h:5000.example"] {
            assert_eq!(lookup(&json("h:5000"), other).unwrap(), Login::default(), "{other}");
        }
    }

    #[test]
    fn secrets_kept_elsewhere_are_named_and_hinder_no_anonymous_pull() {
        let helper = r#"{"credHelpers":{"h":"pass"},"auths":{"h":{}}}"#;
        let store = r#"{"credsStore":"desktop","auths":{"h":{}}}"#;
        let token = r#"{"auths":{"h":{"auth":"dTo=","identitytoken":"c2VjcmV0"}}}"#;
        for (json, place) in [
            (helper, "docker-credential-pass"),
            (store, "docker-credential-desktop"),
            (token, "identity token"),
        ] {
            let found = lookup(json, "h").unwrap();
            assert_eq!(found.credentials, None, "{json}");
            assert!(found.elsewhere.unwrap().contains(place), "{json}");
        }
        assert_eq!(lookup(helper, "other").unwrap(), Login::default());
        let both = r#"{"credsStore":"desktop","auths":{"h":{"auth":"dTpw"}}}"#;
        assert!(lookup(both, "h").unwrap().credentials.is_some());
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
