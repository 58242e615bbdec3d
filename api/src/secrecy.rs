//! What messages that hold secrets look like in a log: how much there is, and nothing of it.

use std::fmt::{Debug, Formatter, Result};

/// Names of what is there.
macro_rules! says_only {
    ($message:path { $($field:ident),+ }) => {
        impl Debug for $message {
            fn fmt(&self, f: &mut Formatter<'_>) -> Result {
                f.debug_struct(stringify!($message))
                    $(.field(stringify!($field), &self.$field.keys()))+
                    .finish_non_exhaustive()
            }
        }
    };
}

#[cfg(feature = "host")]
mod host {
    use super::*;
    says_only!(crate::host::ConfigMap { data, binary_data });
    says_only!(crate::host::Secret { data });
    says_only!(crate::host::PodMaterials {
        registry_credentials,
        config_maps,
        secrets,
        service_account_tokens
    });

    impl Debug for crate::host::RegistryCredentials {
        fn fmt(&self, f: &mut Formatter<'_>) -> Result {
            f.debug_struct("RegistryCredentials").finish_non_exhaustive()
        }
    }
}

#[cfg(feature = "guest")]
mod guest {
    use super::*;
    says_only!(crate::guest::ConfigMap { data, binary_data });
    says_only!(crate::guest::Secret { data });
    says_only!(crate::guest::Materials {
        config_maps,
        secrets,
        tokens
    });

    impl Debug for crate::guest::ProjectedVolume {
        fn fmt(&self, f: &mut Formatter<'_>) -> Result {
            f.debug_struct("ProjectedVolume")
                .field("name", &self.name)
                .finish_non_exhaustive()
        }
    }
}

#[cfg(all(test, feature = "host"))]
mod tests {
    use crate::host::{ApplyPodRequest, ConfigMap, PodMaterials, RegistryCredentials, Secret};

    #[test]
    fn a_request_in_a_log_shows_no_secret() {
        let materials = PodMaterials {
            registry_credentials: [(
                "registry.example".to_owned(),
                RegistryCredentials {
                    username: "user-4711".into(),
                    password: "pass-4711".into(),
                },
            )]
            .into(),
            config_maps: [(
                "config".to_owned(),
                ConfigMap {
                    data: [("key".to_owned(), "text-4711".to_owned())].into(),
                    ..ConfigMap::default()
                },
            )]
            .into(),
            secrets: [(
                "login".to_owned(),
                Secret {
                    data: [("key".to_owned(), b"4711".to_vec())].into(),
                },
            )]
            .into(),
            service_account_tokens: [(String::new(), b"4711".to_vec())].into(),
            version: 1,
        };
        let request = ApplyPodRequest {
            materials: Some(materials),
            ..ApplyPodRequest::default()
        };
        let shown = format!("{request:?} {:?}", request.materials.as_ref().map(|all| &all.secrets));
        assert!(shown.contains("login") && shown.contains("registry.example"), "{shown}");
        assert!(!shown.contains("4711") && !shown.contains("52, 55, 49, 49"), "{shown}");
    }
}
