//! `images`, `pull`, and the progress of both.

use std::io::{self, IsTerminal, Write as _};
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use flint_api::host::{
    Image, ImportRequest, ListImagesRequest, PullProgress, PullRequest, RegistryCredentials, RemoveImageRequest,
};
use tonic::Streaming;

use crate::client::Client;
use crate::failure::Failure;
use crate::output::{self, Format};

/// List, import and remove images.
#[derive(Debug, Args)]
pub struct Images {
    #[command(subcommand)]
    command: Option<ImagesCommand>,
}

#[derive(Debug, Subcommand)]
enum ImagesCommand {
    /// List images (the default).
    #[command(visible_alias = "list")]
    Ls,
    /// Take an image from an OCI layout folder, or an oci-archive or docker-archive file.
    Import {
        /// The folder or file, on this host.
        path: PathBuf,
        /// Name to give it, instead of the name that the archive has.
        #[arg(long, value_name = "REFERENCE")]
        name: Option<String>,
    },
    /// Remove images that no pod uses.
    Rm {
        /// Digests or references.
        #[arg(required = true)]
        images: Vec<String>,
    },
}

impl Images {
    pub async fn execute(self, client: Client, format: Format) -> Result<u8, Failure> {
        match self.command.unwrap_or(ImagesCommand::Ls) {
            ImagesCommand::Ls => list(&client, format).await?,
            ImagesCommand::Import { path, name } => {
                output::print_line(&import(&client, &path, name).await?)?;
            }
            ImagesCommand::Rm { images } => {
                for image in images {
                    let request = RemoveImageRequest { image: image.clone() };
                    let freed = client.images().remove(request).await?.into_inner().freed_bytes;
                    output::print_line(&format!("{image}: {} freed", output::bytes(freed)))?;
                }
            }
        }
        Ok(0)
    }
}

async fn list(client: &Client, format: Format) -> Result<(), Failure> {
    let response = client.images().list(ListImagesRequest {}).await?.into_inner();
    if format == Format::Json {
        return output::print_json("ListImagesResponse", &response);
    }
    let rows: Vec<_> = response.images.iter().map(row).collect();
    output::print_table(
        &[
            "REFERENCE",
            "DIGEST",
            "COMPRESSED",
            "DEVICE",
            "STORED",
            "PULLED",
            "IN USE",
        ],
        &rows,
    )
}

fn row(image: &Image) -> Vec<String> {
    vec![
        if image.references.is_empty() {
            "-".into()
        } else {
            image.references.join(",")
        },
        image.digest.chars().take(19).collect(),
        output::bytes(image.compressed_bytes),
        output::bytes(image.device_bytes),
        output::bytes(image.stored_bytes),
        output::age(image.pulled_at.as_ref()),
        if image.in_use { "yes" } else { "no" }.into(),
    ]
}

/// Takes an image from this host's files; its reference or digest, to run it by.
pub async fn import(client: &Client, path: &Path, name: Option<String>) -> Result<String, Failure> {
    let path = std::fs::canonicalize(path)
        .map_err(|error| Failure::local(&format!("find {}", path.display()), error))?
        .to_str()
        .map(str::to_owned)
        .ok_or_else(|| Failure::new(format!("{} is no UTF-8 path", path.display())))?;
    let request = ImportRequest {
        path,
        reference: name.unwrap_or_default(),
    };
    let progress = client.images().import(request).await?.into_inner();
    let image = follow(progress).await?;
    Ok(image.references.first().cloned().unwrap_or(image.digest))
}

/// Bring an image to this host.
#[derive(Debug, Args)]
pub struct Pull {
    /// Registry reference, as in registry.example/app:1 or app@sha256:...
    reference: String,
    /// User name for the registry; the password comes from standard input or FLINT_REGISTRY_PASSWORD.
    #[arg(short, long)]
    username: Option<String>,
    /// Be content with what is here under that reference.
    #[arg(long)]
    if_not_present: bool,
}

impl Pull {
    pub async fn execute(self, client: Client, format: Format) -> Result<u8, Failure> {
        let credentials = self
            .username
            .map(|name| credentials(name, "pull -u USER"))
            .transpose()?;
        let request = PullRequest {
            reference: self.reference,
            credentials,
            if_not_present: self.if_not_present,
        };
        let image = follow(client.images().pull(request).await?.into_inner()).await?;
        match format {
            Format::Json => output::print_json("Image", &image)?,
            Format::Text => output::print_line(&image.digest)?,
        }
        Ok(0)
    }
}

/// The user's name with a password that was given; `command` is for who gave none.
pub fn credentials(username: String, command: &str) -> Result<RegistryCredentials, Failure> {
    if let Ok(password) = std::env::var("FLINT_REGISTRY_PASSWORD") {
        return Ok(RegistryCredentials { username, password });
    }
    if io::stdin().is_terminal() {
        return Err(Failure::new("no password given").hint(format!(
            "put it in FLINT_REGISTRY_PASSWORD, or pipe it in: flint {command} REFERENCE <password-file"
        )));
    }
    let mut password = String::new();
    io::stdin()
        .read_line(&mut password)
        .map_err(|error| Failure::local("read the password", error))?;
    Ok(RegistryCredentials {
        username,
        password: password.trim_end_matches(['\r', '\n']).to_owned(),
    })
}

/// Shows progress until the image is there.
async fn follow(mut progress: Streaming<PullProgress>) -> Result<Image, Failure> {
    let mut last = None;
    while let Some(step) = progress.message().await? {
        show_progress(&describe(&step));
        last = step.image;
    }
    clear_progress();
    last.ok_or_else(|| Failure::new("flintd ended the pull without an image"))
}

/// Shows how a pull that a pod waits for comes along: flintd lets several callers share the work, so this only listens in.
pub async fn show_pull(client: Client, reference: String) {
    let request = PullRequest {
        reference,
        credentials: None,
        if_not_present: true,
    };
    // What goes wrong is told by the pod's own status.
    let Ok(response) = client.images().pull(request).await else {
        return;
    };
    let mut progress = response.into_inner();
    while let Ok(Some(step)) = progress.message().await {
        show_progress(&describe(&step));
    }
}

/// Says on the terminal's line how far something is.
pub fn show_progress(said: &str) {
    if io::stderr().is_terminal() {
        eprint!("\r\x1b[K{said}");
        let _ = io::stderr().flush();
    }
}

fn describe(step: &PullProgress) -> String {
    let done = output::bytes(step.bytes_done);
    let bytes = match step.bytes_total {
        0 if step.bytes_done == 0 => String::new(),
        0 => format!(", {done}"),
        total => format!(
            ", {done} of {} ({}%)",
            output::bytes(total),
            step.bytes_done.saturating_mul(100) / total
        ),
    };
    match step.layers_total {
        0 => format!("{}{bytes}", step.stage),
        total => format!("{}: {} of {total} layers{bytes}", step.stage, step.layers_done),
    }
}

/// Leaves the terminal's line as it was.
pub fn clear_progress() {
    if io::stderr().is_terminal() {
        eprint!("\r\x1b[K");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_says_what_is_known() {
        let step = PullProgress {
            stage: "fetch".into(),
            ..PullProgress::default()
        };
        assert_eq!(describe(&step), "fetch");

        let step = PullProgress {
            bytes_done: 512,
            bytes_total: 1024,
            layers_done: 1,
            layers_total: 3,
            ..step
        };
        assert_eq!(describe(&step), "fetch: 1 of 3 layers, 512 B of 1.0 KiB (50%)");
    }
}
