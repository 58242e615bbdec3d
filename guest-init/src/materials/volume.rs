//! What files a projected volume has.

use std::collections::HashMap;

use flint_api::guest::{KeyToPath, Materials, ProjectedObject, ProjectedVolume, projected_source::Source};

use super::{
    ConfigError, MaterialsError,
    environment::{no_config_map, no_secret},
    files::{File, Files},
};
use crate::paths::Name;

/// Of tokens that are for one user or group alone.
const TOKEN_MODE: u32 = 0o600;
/// What a file's permissions can be.
const MODES: u32 = 0o777;

/// Checks all of a definition that can lead anywhere.
pub fn check(volume: &ProjectedVolume) -> Result<(), MaterialsError> {
    Name::parse("volume", &volume.name)?;
    let paths = volume.sources.iter().flat_map(|source| match &source.source {
        Some(Source::ConfigMap(object) | Source::Secret(object)) => {
            object.items.iter().map(|item| item.path.as_str()).collect::<Vec<_>>()
        }
        Some(Source::Text(text)) => vec![text.path.as_str()],
        Some(Source::Token(token)) => vec![token.path.as_str()],
        None => Vec::new(),
    });
    for path in paths {
        if !is_inside(path) {
            return Err(MaterialsError::Path {
                volume: volume.name.clone(),
                path: path.chars().take(80).collect(),
            });
        }
    }
    Ok(())
}

/// Whether a path stays in the volume, and away from the names that the volume itself uses.
fn is_inside(path: &str) -> bool {
    let plain = |part: &str| !part.is_empty() && part != "." && part != ".." && part.len() <= 255;
    !path.starts_with("..") && !path.contains('\0') && path.len() <= 4095 && path.split('/').all(plain)
}

/// The files, made of what is known.
pub fn render(volume: &ProjectedVolume, materials: &Materials) -> Result<Files, ConfigError> {
    let in_words = |error: ConfigError| {
        ConfigError(format!(
            "MountVolume.SetUp failed for volume {:?} : {error}",
            volume.name
        ))
    };
    let mut files = Files {
        group: volume.fs_group,
        ..Files::default()
    };
    for source in volume.sources.iter().filter_map(|source| source.source.as_ref()) {
        add(source, volume, materials, &mut files).map_err(in_words)?;
    }
    files.check().map_err(in_words)?;
    Ok(files)
}

fn add(source: &Source, volume: &ProjectedVolume, materials: &Materials, files: &mut Files) -> Result<(), ConfigError> {
    let file = |bytes: &[u8], mode: Option<u32>| File {
        bytes: bytes.to_vec(),
        mode: mode.unwrap_or(volume.default_mode) & MODES,
        owner: None,
    };
    match source {
        Source::ConfigMap(object) => {
            let Some(map) = materials.config_maps.get(&object.name) else {
                return unless_optional(object, no_config_map(&object.name));
            };
            let texts = map.data.iter().map(|(key, text)| (key.as_str(), text.as_bytes()));
            let blobs = map
                .binary_data
                .iter()
                .map(|(key, bytes)| (key.as_str(), bytes.as_slice()));
            let entries = texts.chain(blobs).collect();
            for (item, bytes) in chosen(object, &entries, "configmap references non-existent config key")? {
                files.by_path.insert(item.path, file(bytes, item.mode));
            }
        }
        Source::Secret(object) => {
            let Some(secret) = materials.secrets.get(&object.name) else {
                return unless_optional(object, no_secret(&object.name));
            };
            let entries = secret
                .data
                .iter()
                .map(|(key, bytes)| (key.as_str(), bytes.as_slice()))
                .collect();
            for (item, bytes) in chosen(object, &entries, "references non-existent secret key")? {
                files.by_path.insert(item.path, file(bytes, item.mode));
            }
        }
        Source::Text(text) => {
            files
                .by_path
                .insert(text.path.clone(), file(text.text.as_bytes(), text.mode));
        }
        Source::Token(token) => {
            let Some(bytes) = materials.tokens.get(&token.audience) else {
                let audience = &token.audience;
                return Err(ConfigError(format!(
                    "there is no service account token for audience {audience:?}"
                )));
            };
            let alone = volume.token_uid.is_some() || volume.fs_group.is_some();
            let token_file = File {
                owner: volume.token_uid,
                ..file(bytes, alone.then_some(TOKEN_MODE))
            };
            files.by_path.insert(token.path.clone(), token_file);
        }
    }
    Ok(())
}

fn unless_optional(object: &ProjectedObject, error: ConfigError) -> Result<(), ConfigError> {
    if object.optional { Ok(()) } else { Err(error) }
}

/// Which of an object's entries become files.
fn chosen<'a>(
    object: &ProjectedObject,
    entries: &HashMap<&'a str, &'a [u8]>,
    missing: &str,
) -> Result<Vec<(KeyToPath, &'a [u8])>, ConfigError> {
    if object.items.is_empty() {
        // Keys come from an API server, or from whoever pretends to be one.
        let inside = entries.iter().filter(|(key, _)| is_inside(key) && !key.contains('/'));
        let whole = |(key, bytes): (&&str, &&'a [u8])| {
            let item = KeyToPath {
                key: (*key).to_owned(),
                path: (*key).to_owned(),
                mode: None,
            };
            (item, *bytes)
        };
        return Ok(inside.map(whole).collect());
    }
    let mut files = Vec::with_capacity(object.items.len());
    for item in &object.items {
        match entries.get(item.key.as_str()) {
            Some(bytes) => files.push((item.clone(), *bytes)),
            None if object.optional => {}
            None => return Err(ConfigError(format!("{missing}: {}", item.key))),
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use flint_api::guest::{ConfigMap, ProjectedSource, Secret, TextFile, TokenFile};

    use super::*;

    fn materials() -> Materials {
        let config = ConfigMap {
            data: [("app.conf".to_owned(), "a=1".to_owned())].into(),
            binary_data: [("blob".to_owned(), vec![0, 255])].into(),
        };
        let secret = Secret {
            data: [("password".to_owned(), b"hunter2".to_vec())].into(),
        };
        Materials {
            config_maps: [("config".to_owned(), config)].into(),
            secrets: [("login".to_owned(), secret)].into(),
            tokens: [("api".to_owned(), b"token".to_vec())].into(),
        }
    }

    fn volume(sources: Vec<Source>) -> ProjectedVolume {
        let sources = sources
            .into_iter()
            .map(|source| ProjectedSource { source: Some(source) });
        ProjectedVolume {
            name: "all".to_owned(),
            sources: sources.collect(),
            default_mode: 0o644,
            ..ProjectedVolume::default()
        }
    }

    fn object(name: &str, items: &[(&str, &str)], optional: bool) -> ProjectedObject {
        let item = |(key, path): &(&str, &str)| KeyToPath {
            key: (*key).to_owned(),
            path: (*path).to_owned(),
            mode: Some(0o400),
        };
        ProjectedObject {
            name: name.to_owned(),
            items: items.iter().map(item).collect(),
            optional,
        }
    }

    fn shown(files: &Files) -> Vec<(&str, &[u8], u32)> {
        let by_path = files.by_path.iter();
        by_path
            .map(|(path, file)| (path.as_str(), file.bytes.as_slice(), file.mode))
            .collect()
    }

    #[test]
    fn keys_become_files_and_items_say_where() {
        let text = TextFile {
            path: "labels".to_owned(),
            text: "app=\"web\"".to_owned(),
            mode: None,
        };
        let files = render(
            &volume(vec![
                Source::ConfigMap(object("config", &[], false)),
                Source::Secret(object("login", &[("password", "deep/down/pw")], false)),
                Source::Text(text),
            ]),
            &materials(),
        );
        let files = files.unwrap();
        let expected: [(&str, &[u8], u32); 4] = [
            ("app.conf", b"a=1", 0o644),
            ("blob", &[0, 255], 0o644),
            ("deep/down/pw", b"hunter2", 0o400),
            ("labels", b"app=\"web\"", 0o644),
        ];
        assert_eq!(shown(&files), expected);
    }

    #[test]
    fn a_token_is_for_its_user_alone_where_there_is_one() {
        let token = || {
            Source::Token(TokenFile {
                path: "token".to_owned(),
                audience: "api".to_owned(),
            })
        };
        let of = |volume: ProjectedVolume| {
            let files = render(&volume, &materials()).unwrap();
            (files.by_path["token"].mode, files.by_path["token"].owner)
        };
        assert_eq!(of(volume(vec![token()])), (0o644, None));
        let of_user = ProjectedVolume {
            token_uid: Some(7),
            ..volume(vec![token()])
        };
        assert_eq!(of(of_user), (0o600, Some(7)));
        let of_group = ProjectedVolume {
            fs_group: Some(8),
            ..volume(vec![token()])
        };
        assert_eq!(of(of_group), (0o600, None));
    }

    #[test]
    fn what_is_missing_is_said_in_kubernetes_words_unless_it_is_optional() {
        let cases = [
            (
                Source::ConfigMap(object("nope", &[], false)),
                "configmap \"nope\" not found",
            ),
            (Source::Secret(object("nope", &[], false)), "secret \"nope\" not found"),
            (
                Source::ConfigMap(object("config", &[("nope", "a")], false)),
                "configmap references non-existent config key: nope",
            ),
            (
                Source::Secret(object("login", &[("nope", "a")], false)),
                "references non-existent secret key: nope",
            ),
        ];
        for (source, message) in cases {
            let error = render(&volume(vec![source]), &materials()).unwrap_err();
            assert_eq!(
                error.0,
                format!("MountVolume.SetUp failed for volume \"all\" : {message}")
            );
        }
        let optional = vec![
            Source::ConfigMap(object("nope", &[], true)),
            Source::Secret(object("login", &[("nope", "a")], true)),
        ];
        assert_eq!(shown(&render(&volume(optional), &materials()).unwrap()), []);
    }

    #[test]
    fn paths_that_leave_the_volume_are_refused() {
        let long = "x".repeat(300);
        for path in [
            "",
            "/etc/passwd",
            "../x",
            "a/../../x",
            "..data",
            "a//b",
            ".",
            "a/.",
            "a\0b",
            &long,
        ] {
            let volume = volume(vec![Source::Secret(object("login", &[("password", path)], false))]);
            assert!(matches!(check(&volume), Err(MaterialsError::Path { .. })), "{path:?}");
        }
    }

    #[test]
    fn keys_that_would_leave_the_volume_are_no_files() {
        let mut materials = materials();
        let hostile = ["../up", "a/b", "..data", "..", ""].map(|key| (key.to_owned(), b"x".to_vec()));
        materials
            .secrets
            .insert("hostile".to_owned(), Secret { data: hostile.into() });
        let files = render(&volume(vec![Source::Secret(object("hostile", &[], false))]), &materials);
        assert_eq!(shown(&files.unwrap()), []);
    }

    #[test]
    fn a_file_cannot_be_a_folder_too() {
        let items = [("app.conf", "a"), ("blob", "a/b")];
        let error = render(
            &volume(vec![Source::ConfigMap(object("config", &items, false))]),
            &materials(),
        );
        assert!(error.unwrap_err().0.contains("\"a\" is a file and a folder"));
    }
}
