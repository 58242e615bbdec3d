//! The template of a host's pool to other hosts and from them, as a machine without a pod.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use flint_api::host;
use flint_snapshots::machines::{Machines, Notes};
use prost::Message;

use super::{Progress, TravelError, login, tell, watcher, without_tag};
use crate::sandbox::pool::{TemplateFiles, TemplateRecord, Templates};

const VERSION: u32 = 1;
/// The note that has the record.
const RECORD: &str = "flint.template";
const FILES: [&str; 2] = ["state", "memory"];

/// A template's record on its way.
#[derive(Clone, PartialEq, Message)]
struct TravelTemplate {
    #[prost(uint32, tag = "1")]
    version: u32,
    #[prost(message, optional, tag = "2")]
    template: Option<TemplateRecord>,
}

/// Moves the template between this host and registries.
#[derive(Clone)]
pub struct TemplateMover {
    templates: Option<Templates>,
    machines: Machines,
}

impl TemplateMover {
    /// Of this host's pool, if it can have one, and chunks.
    #[must_use]
    pub fn new(templates: Option<Templates>, machines: Machines) -> Self {
        Self { templates, machines }
    }

    fn templates(&self) -> Result<&Templates, TravelError> {
        self.templates
            .as_ref()
            .ok_or_else(|| crate::sandbox::SandboxError::NoTemplate.into())
    }

    /// Pushes it; where it is then, by digest. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`TravelError`]; the registry shows nothing of it then.
    pub async fn push(
        &self,
        reference: &str,
        credentials: Option<host::RegistryCredentials>,
        progress: &Progress,
    ) -> Result<String, TravelError> {
        tell(progress, "read");
        let (record, TemplateFiles { state, memory }) = self.templates()?.current().await?;
        let files = FILES.map(str::to_owned).into_iter().zip([state, memory]);
        let digest = self
            .machines
            .push_files(
                files.collect(),
                notes(record),
                reference,
                credentials.map(login),
                &watcher("send", progress),
            )
            .await?;
        Ok(format!("{}@{digest}", without_tag(reference)))
    }

    /// Pulls one and has the pool filled with clones of it. Dropped, it leaves the host's own where it is. Must be called within a
    /// tokio runtime.
    ///
    /// # Errors
    /// [`TravelError`]; the host's own is in use as before then.
    pub async fn pull(
        &self,
        reference: &str,
        credentials: Option<host::RegistryCredentials>,
        progress: &Progress,
    ) -> Result<(), TravelError> {
        let templates = self.templates()?;
        tell(progress, "resolve");
        let found = self.machines.find(reference, credentials.map(login)).await?;
        let record = record(found.machine().notes()).map_err(|reason| TravelError::UnknownTemplate {
            reference: reference.to_owned(),
            reason,
        })?;
        templates.check(&record).await?;
        let fetched = found.fetch(&watcher("fetch", progress)).await?;
        tell(progress, "write");
        let files = templates.draft()?;
        let handles = [files.state.try_clone(), files.memory.try_clone()];
        let mut named = Vec::with_capacity(FILES.len());
        for (name, handle) in FILES.into_iter().zip(handles) {
            named.push((
                name.to_owned(),
                handle.map_err(|error| TravelError::Worker(error.to_string()))?,
            ));
        }
        // The chunks go: nobody needs them once the files are there.
        drop(fetched.lay_out(named).await?);
        templates.adopt(files).await?;
        Ok(())
    }
}

fn notes(record: TemplateRecord) -> Notes {
    let travelling = TravelTemplate {
        version: VERSION,
        template: Some(record),
    };
    Notes::from([(RECORD.to_owned(), STANDARD.encode(travelling.encode_to_vec()))])
}

/// What notes have, or why it is none.
fn record(notes: &Notes) -> Result<TemplateRecord, String> {
    let note = notes.get(RECORD).ok_or("it is no template")?;
    let bytes = STANDARD.decode(note).map_err(|error| error.to_string())?;
    let travelling = TravelTemplate::decode(bytes.as_slice()).map_err(|error| error.to_string())?;
    match travelling {
        TravelTemplate {
            version: VERSION,
            template: Some(record),
        } => Ok(record),
        TravelTemplate { version, .. } => Err(format!("it has version {version}, this flintd reads version {VERSION}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_arrives_as_it_was_sent_and_anything_else_is_said_to_be_none() {
        let sent = TemplateRecord::default();
        assert_eq!(record(&notes(sent.clone())), Ok(sent));
        assert_eq!(record(&Notes::new()), Err("it is no template".to_owned()));
        for nonsense in ["%", "/////w==", ""] {
            let notes = Notes::from([(RECORD.to_owned(), nonsense.to_owned())]);
            record(&notes).unwrap_err();
        }
    }
}
