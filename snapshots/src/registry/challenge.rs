//! What a registry wants to be shown: the `WWW-Authenticate` header of a refusal (RFC 9110, 11.6.1; distribution
//! specification, "token").

use http_auth::ChallengeRef;
use reqwest::Url;

/// What is asked for. Of several offers a bearer token comes first, as with other clients.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Challenge {
    /// A token from this address.
    Bearer(Url),
    /// User name and password.
    Basic,
}

impl Challenge {
    /// Reads `header`, which came for a request about `repository`; the error says what is wrong with it.
    pub(crate) fn parse(header: &str, repository: &str) -> Result<Self, String> {
        let offers = http_auth::parse_challenges(header).map_err(|error| error.to_string())?;
        let offer = |scheme: &str| offers.iter().find(|offer| offer.scheme.eq_ignore_ascii_case(scheme));
        match (offer("bearer"), offer("basic")) {
            (Some(bearer), _) => token_address(bearer, repository).map(Self::Bearer),
            (None, Some(_)) => Ok(Self::Basic),
            (None, None) => Err("it offers neither Basic nor Bearer".to_owned()),
        }
    }
}

fn token_address(offer: &ChallengeRef<'_>, repository: &str) -> Result<Url, String> {
    let parameter = |name: &str| {
        let mut parameters = offer.params.iter();
        let found = parameters.find(|(key, _)| key.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.to_unescaped())
    };
    let realm = parameter("realm").ok_or("it has no realm")?;
    let mut url = Url::parse(&realm).map_err(|error| format!("realm {realm:?}: {error}"))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(format!("realm {realm:?} is no http address"));
    }
    let scope = parameter("scope").unwrap_or_else(|| format!("repository:{repository}:pull"));
    url.query_pairs_mut().append_pair("scope", &scope);
    if let Some(service) = parameter("service") {
        url.query_pairs_mut().append_pair("service", &service);
    }
    Ok(url)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_preferred_and_asked_for_with_scope_and_service() {
        let header =
            r#"Basic realm="b", Bearer realm="https://auth.example/t?x=1",service="s p",scope="repository:a/b:pull""#;
        let Ok(Challenge::Bearer(url)) = Challenge::parse(header, "other") else {
            panic!("no token is asked for")
        };
        assert_eq!(
            url.as_str(),
            "https://auth.example/t?x=1&scope=repository%3Aa%2Fb%3Apull&service=s+p"
        );
        let Ok(Challenge::Bearer(url)) = Challenge::parse(r#"bearer REALM="https://h/""#, "t/app") else {
            panic!("no token is asked for")
        };
        assert_eq!(url.query(), Some("scope=repository%3At%2Fapp%3Apull"));
        assert_eq!(Challenge::parse(r#"Basic realm="x""#, ""), Ok(Challenge::Basic));
    }

    #[test]
    fn challenges_without_sense_are_named() {
        for (header, said) in [
            ("", ""),
            ("Digest realm=\"x\"", "neither Basic nor Bearer"),
            ("Bearer service=\"s\"", "no realm"),
            ("Bearer realm=\"ftp://h/\"", "no http address"),
            ("Bearer realm=\"/token\"", "/token"),
        ] {
            let error = Challenge::parse(header, "t/app").unwrap_err();
            assert!(error.contains(said), "{header}: {error}");
        }
    }
}
