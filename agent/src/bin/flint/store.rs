//! `store`: `usage`, `verify`.

use clap::{Args, Subcommand};
use flint_api::host::{DamagedChunk, GetUsageRequest, StoreUsage, VerifyProgress, VerifyRequest};

use crate::client::Client;
use crate::failure::Failure;
use crate::images::{clear_progress, show_progress};
use crate::output::{self, Format};

/// Show what the chunk store holds; look through it, and repair it.
///
/// Images, and machines that were pulled, are kept as chunks: each once, however many have it, compressed and named by a digest of its
/// bytes. A chunk is compared with its name whenever a guest reads it, so damage never reaches a guest; `verify` finds it before that.
#[derive(Debug, Args)]
#[command(
    after_help = "Exit codes of verify: 0 all is whole or repaired, 1 damage is left.\n\nExamples:\n  flint store\n  flint store verify --repair"
)]
pub struct Store {
    #[command(subcommand)]
    command: Option<StoreCommand>,
}

#[derive(Debug, Subcommand)]
enum StoreCommand {
    /// Show what it holds, and what sharing saves (the default).
    Usage,
    /// Read every chunk and compare it with its name. Pods go on meanwhile.
    Verify {
        /// Bring damaged chunks of images again, from the registries that the images came from.
        #[arg(long)]
        repair: bool,
    },
}

impl Store {
    pub async fn execute(self, client: Client, format: Format) -> Result<u8, Failure> {
        match self.command.unwrap_or(StoreCommand::Usage) {
            StoreCommand::Usage => usage(&client, format).await,
            StoreCommand::Verify { repair } => verify(&client, repair, format).await,
        }
    }
}

async fn usage(client: &Client, format: Format) -> Result<u8, Failure> {
    let usage = client.store().get_usage(GetUsageRequest {}).await?.into_inner();
    match format {
        Format::Json => output::print_json("StoreUsage", &usage)?,
        Format::Text => output::print_table(&["WHAT", "COUNT", "BYTES"], &rows(&usage))?,
    }
    Ok(0)
}

fn rows(usage: &StoreUsage) -> Vec<Vec<String>> {
    let row = |what: &str, count: String, bytes| vec![what.to_owned(), count, output::bytes(bytes)];
    vec![
        row(
            "images, if nothing were shared",
            usage.images.to_string(),
            usage.image_bytes,
        ),
        row("chunks, uncompressed", usage.chunks.to_string(), usage.raw_bytes),
        row(
            "chunks, as they are stored",
            usage.chunks.to_string(),
            usage.stored_bytes,
        ),
        row("pack files", usage.packs.to_string(), usage.pack_bytes),
        row("free on the disk", "-".to_owned(), usage.free_bytes),
    ]
}

async fn verify(client: &Client, repair: bool, format: Format) -> Result<u8, Failure> {
    let mut progress = client.store().verify(VerifyRequest { repair }).await?.into_inner();
    let mut last = None;
    while let Some(step) = progress.message().await? {
        if let Some(chunk) = &step.found {
            clear_progress();
            if format == Format::Text {
                output::print_line(&describe(chunk))?;
            }
        }
        if format == Format::Json {
            output::print_json("VerifyProgress", &step)?;
        }
        show_progress(&format!(
            "{} of {}, {} damaged",
            output::bytes(step.bytes_done),
            output::bytes(step.bytes_total),
            step.damaged
        ));
        last = Some(step);
    }
    clear_progress();
    let done = last.ok_or_else(|| Failure::new("flintd ended the examination without a result"))?;
    if format == Format::Text {
        output::print_line(&sum(&done))?;
    }
    Ok(u8::from(done.damaged > done.repaired))
}

fn describe(chunk: &DamagedChunk) -> String {
    let of = match &chunk.images[..] {
        [] => "of no image".to_owned(),
        images => format!("of {}", images.join(", ")),
    };
    let outcome = match (chunk.repaired, chunk.not_repaired.as_str()) {
        (true, _) => "; repaired".to_owned(),
        (false, "") => String::new(),
        (false, why) => format!("; not repaired: {why}"),
    };
    format!("{} {of}: {}{outcome}", chunk.id, chunk.reason)
}

fn sum(done: &VerifyProgress) -> String {
    let read = format!("{} chunks, {}", done.chunks_done, output::bytes(done.bytes_done));
    match (done.damaged, done.repaired) {
        (0, _) => format!("{read}: all whole"),
        (damaged, 0) => {
            format!("{read}: {damaged} damaged; `flint store verify --repair` brings those of images again")
        }
        (damaged, repaired) => format!("{read}: {damaged} damaged, {repaired} of them repaired"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_chunk_is_told_with_whom_it_hurts_and_what_became_of_it() {
        let chunk = DamagedChunk {
            id: "ab12".into(),
            reason: "its bytes have another name".into(),
            images: vec!["sha256:1".into(), "sha256:2".into()],
            ..Default::default()
        };
        let told = "ab12 of sha256:1, sha256:2: its bytes have another name";
        assert_eq!(describe(&chunk), told);
        let not_repaired = "the registry is down".to_owned();
        let failed = DamagedChunk {
            not_repaired,
            ..chunk.clone()
        };
        assert_eq!(describe(&failed), format!("{told}; not repaired: the registry is down"));
        let repaired = true;
        assert_eq!(
            describe(&DamagedChunk { repaired, ..chunk }),
            format!("{told}; repaired")
        );
    }
}
