//! Kubernetes' Pod, mapped to the host API without losing a field.
//!
//! ```text
//! YAML or JSON --parse--> documents --walk--> (PodMeta, PodSpec)   or every problem, each with its path
//! ```
//!
//! Every field of a manifest is mapped, or refused by its path, or (where it only speaks to a scheduler) returned as a
//! [`Note`]: nothing is dropped silently. A field that is `null`, or that asks for nothing beyond the default, counts as
//! absent, so manifests as `kubectl get -o yaml` prints them are understood.
//!
//! It lives beside the contracts because everybody who speaks for Kubernetes needs the same mapping.

mod env;
mod fields;
mod objects;
mod pod;
mod quantity;
mod volumes;

use std::fmt;

use serde_json::Value;
use thiserror::Error;

use crate::host::{PodMeta, PodSpec};

pub use objects::Objects;
pub use quantity::{Quantity, QuantityError};

/// A pod as a manifest asks for it. `meta.uid` and `meta.generation` are as written there, mostly empty.
#[derive(Debug, Clone, PartialEq)]
pub struct Manifest {
    /// Name, namespace, labels, annotations.
    pub meta: PodMeta,
    /// What to run.
    pub spec: PodSpec,
    /// Fields that were understood and have no meaning on one host.
    pub notes: Vec<Note>,
}

/// A field that has no effect here, for the user to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// Path of the field, as in `spec.nodeSelector`.
    pub path: String,
    /// Why it has no effect.
    pub message: String,
}

/// What is wrong with one field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Path of the field, as in `spec.containers[0].image`.
    pub path: String,
    /// Whether the field or its value is at fault.
    pub kind: ProblemKind,
    /// What is wrong, without the path.
    pub message: String,
}

/// Sorts problems as the host API does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProblemKind {
    /// The value is wrong; no host would take it (`INVALID_ARGUMENT`).
    Invalid,
    /// Flint does not have the field, or not with this value (`UNIMPLEMENTED`).
    Unsupported,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path, self.message)
    }
}

/// Why a manifest was not taken.
#[derive(Debug, Error)]
pub enum ManifestError {
    /// Not YAML or JSON at all, or past the parser's limits.
    #[error("the manifest cannot be read as YAML: {0}")]
    Syntax(String),
    /// Nothing in it.
    #[error("the manifest holds no document")]
    Empty,
    /// All that is wrong with one document's fields, in the order of the manifest.
    #[error("the manifest's document {document} was refused:{}", list(.problems))]
    Refused {
        /// Counted from 1.
        document: usize,
        /// At least one.
        problems: Vec<Problem>,
    },
}

fn list(problems: &[Problem]) -> String {
    problems.iter().map(|problem| format!("\n  {problem}")).collect()
}

/// What manifests hold.
#[derive(Debug, Default)]
pub struct Documents {
    /// Pods, in their order.
    pub pods: Vec<Manifest>,
    /// What they refer to.
    pub objects: Objects,
}

/// Reads every document of a manifest, which may hold several: pods, and the configMaps and secrets that they use. All or none.
///
/// # Errors
/// [`ManifestError`], naming each field at fault.
pub fn documents_from_yaml(text: &str) -> Result<Documents, ManifestError> {
    // Permissions are written as 0644, by YAML 1.1, which is what Kubernetes reads.
    let options = serde_saphyr::options! { legacy_octal_numbers: true };
    let values: Vec<Value> = serde_saphyr::from_multiple_with_options(text, options)
        .map_err(|error| ManifestError::Syntax(error.to_string()))?;
    let mut documents = Documents::default();
    let mut empty = true;
    for (index, value) in values.into_iter().enumerate().filter(|(_, value)| !value.is_null()) {
        empty = false;
        let refused = |problems| ManifestError::Refused {
            document: index + 1,
            problems,
        };
        if objects::is_object(&value) {
            documents.objects.add(value).map_err(refused)?;
        } else {
            documents.pods.push(pod_from_value(value).map_err(refused)?);
        }
    }
    if empty {
        Err(ManifestError::Empty)
    } else {
        Ok(documents)
    }
}

/// Reads every pod of a manifest, which may hold several YAML documents. All or none.
///
/// # Errors
/// [`ManifestError`], naming each field at fault.
pub fn pods_from_yaml(text: &str) -> Result<Vec<Manifest>, ManifestError> {
    let pods = documents_from_yaml(text)?.pods;
    if pods.is_empty() {
        Err(ManifestError::Empty)
    } else {
        Ok(pods)
    }
}

/// Maps one Pod, as JSON.
///
/// # Errors
/// Everything that is wrong with it.
pub fn pod_from_value(document: Value) -> Result<Manifest, Vec<Problem>> {
    pod::map(document)
}

#[cfg(test)]
mod tests;
