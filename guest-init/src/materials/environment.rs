//! A container's environment, its arguments and the sub-paths of its mounts, by Kubernetes' rules: variables of envFrom first,
//! those of env over them and in order, each seeing those before it; the image's own are below all and seen by none.

use std::collections::HashMap;

use flint_api::guest::{CreateContainerRequest, EnvFrom, EnvVar, Environment, KeyRef, Materials, env_var::Source};

use super::{
    ConfigError,
    expand::{ExpandError, LONGEST, expand},
};

/// Most that all variables and arguments have together: Linux takes a quarter of the stack's limit, 8 MiB.
const MOST_BYTES: usize = 2 << 20;

type Result<T> = std::result::Result<T, ConfigError>;

/// Resolves a request's environment into its process, and expands what refers to it.
pub fn apply(request: &mut CreateContainerRequest, materials: &Materials) -> Result<()> {
    let Some(environment) = request.environment.take() else {
        return Ok(());
    };
    let variables = Variables::of(&environment, materials)?;
    if let Some(process) = &mut request.process {
        let own = usize::try_from(environment.expand_args_from).unwrap_or(usize::MAX);
        for (index, argument) in process.args.iter_mut().enumerate().skip(own) {
            *argument = variables.expand(argument, &format!("argument {index}"))?;
        }
        process.env.extend(variables.assignments());
        let size = process.env.iter().chain(&process.args).map(String::len).sum::<usize>();
        if size > MOST_BYTES {
            let problem = format!("its variables and arguments are {size} bytes long; {MOST_BYTES} are the most");
            return Err(ConfigError(problem));
        }
    }
    for mount in request.mounts.iter_mut().filter(|mount| mount.expand_sub_path) {
        mount.expand_sub_path = false;
        mount.sub_path = variables.sub_path(&mount.sub_path)?;
    }
    Ok(())
}

/// Names in their order, with values.
#[derive(Debug, Default)]
struct Variables {
    order: Vec<String>,
    values: HashMap<String, String>,
    size: usize,
}

impl Variables {
    fn of(environment: &Environment, materials: &Materials) -> Result<Self> {
        let mut variables = Self::default();
        for from in &environment.from {
            variables.take_all(from, materials)?;
        }
        for variable in &environment.variables {
            if let Some(value) = variables.value_of(variable, &environment.namespace, materials)? {
                variables.set(variable.name.clone(), value)?;
            }
        }
        Ok(variables)
    }

    fn set(&mut self, name: String, value: String) -> Result<()> {
        if name.len().saturating_add(value.len()) >= LONGEST {
            return Err(ConfigError(format!(
                "the variable {} is longer than the 128 KiB that Linux takes",
                shown(&name)
            )));
        }
        if value.contains('\0') {
            return Err(ConfigError(format!("the variable {} has a zero byte", shown(&name))));
        }
        // Values that are overridden count, too: a bound on the work.
        self.size = self.size.saturating_add(name.len()).saturating_add(value.len());
        if self.size > MOST_BYTES {
            return Err(ConfigError(format!(
                "its variables are longer than {MOST_BYTES} bytes together"
            )));
        }
        if self.values.insert(name.clone(), value).is_none() {
            self.order.push(name);
        }
        Ok(())
    }

    /// Everything that an object has; keys in their order, so that runs are alike.
    fn take_all(&mut self, from: &EnvFrom, materials: &Materials) -> Result<()> {
        let mut entries: Vec<(&String, String)> = if from.secret {
            match materials.secrets.get(&from.name) {
                Some(secret) => {
                    let texts = secret
                        .data
                        .iter()
                        .map(|(key, value)| Ok((key, text(value, key, &from.name)?)));
                    texts.collect::<Result<_>>()?
                }
                None if from.optional => return Ok(()),
                None => return Err(no_secret(&from.name)),
            }
        } else {
            match materials.config_maps.get(&from.name) {
                Some(map) => map.data.iter().map(|(key, value)| (key, value.clone())).collect(),
                None if from.optional => return Ok(()),
                None => return Err(no_config_map(&from.name)),
            }
        };
        entries.sort();
        for (key, value) in entries {
            self.set(format!("{}{key}", from.prefix), value)?;
        }
        Ok(())
    }

    /// `None`: it is optional, and not there.
    fn value_of(&self, variable: &EnvVar, namespace: &str, materials: &Materials) -> Result<Option<String>> {
        match &variable.source {
            Some(Source::Value(value)) => self
                .expand(value, &format!("the variable {}", shown(&variable.name)))
                .map(Some),
            Some(Source::Literal(text)) => Ok(Some(text.clone())),
            Some(Source::ConfigMapKey(key)) => of_config_map(key, namespace, materials),
            Some(Source::SecretKey(key)) => of_secret(key, namespace, materials),
            None => Ok(Some(String::new())),
        }
    }

    fn expand(&self, given: &str, what: &str) -> Result<String> {
        expand(given, false, |name| self.values.get(name).map(String::as_str))
            .map_err(|_| ConfigError(format!("{what} is longer than the 128 KiB that Linux takes")))
    }

    fn sub_path(&self, expression: &str) -> Result<String> {
        let expanded = expand(expression, true, |name| self.values.get(name).map(String::as_str));
        let path = expanded.map_err(|error| match error {
            ExpandError::Unknown(name) => {
                ConfigError(format!("missing value for {name:?} in subPathExpr {expression:?}"))
            }
            ExpandError::TooLong => ConfigError(format!("subPathExpr {:?} is too long", shown(expression))),
        })?;
        if path.starts_with('/') || path.split('/').any(|part| part == "..") || path.contains('\0') {
            let problem = format!(
                "subPathExpr {expression:?} is {:?}, which must be relative and without '..'",
                shown(&path)
            );
            return Err(ConfigError(problem));
        }
        Ok(path)
    }

    fn assignments(&self) -> impl Iterator<Item = String> {
        self.order
            .iter()
            .filter_map(|name| Some(format!("{name}={}", self.values.get(name)?)))
    }
}

fn of_config_map(key: &KeyRef, namespace: &str, materials: &Materials) -> Result<Option<String>> {
    let Some(map) = materials.config_maps.get(&key.name) else {
        return if key.optional {
            Ok(None)
        } else {
            Err(no_config_map(&key.name))
        };
    };
    match map.data.get(&key.key) {
        Some(value) => Ok(Some(value.clone())),
        None if key.optional => Ok(None),
        None => Err(no_key(&key.key, "ConfigMap", namespace, &key.name)),
    }
}

fn of_secret(key: &KeyRef, namespace: &str, materials: &Materials) -> Result<Option<String>> {
    let Some(secret) = materials.secrets.get(&key.name) else {
        return if key.optional {
            Ok(None)
        } else {
            Err(no_secret(&key.name))
        };
    };
    match secret.data.get(&key.key) {
        Some(value) => text(value, &key.key, &key.name).map(Some),
        None if key.optional => Ok(None),
        None => Err(no_key(&key.key, "Secret", namespace, &key.name)),
    }
}

fn text(value: &[u8], key: &str, secret: &str) -> Result<String> {
    let text = std::str::from_utf8(value);
    text.map(str::to_owned).map_err(|_| {
        ConfigError(format!(
            "key {key} of secret {secret:?} is not UTF-8 text: mount it as a file"
        ))
    })
}

pub(super) fn no_config_map(name: &str) -> ConfigError {
    ConfigError(format!("configmap {name:?} not found"))
}

pub(super) fn no_secret(name: &str) -> ConfigError {
    ConfigError(format!("secret {name:?} not found"))
}

fn no_key(key: &str, kind: &str, namespace: &str, name: &str) -> ConfigError {
    ConfigError(format!("couldn't find key {key} in {kind} {namespace}/{name}"))
}

/// No more than a line of it.
fn shown(text: &str) -> String {
    text.chars().take(80).collect()
}

#[cfg(test)]
#[path = "environment_tests.rs"]
mod tests;
