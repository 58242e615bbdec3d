//! The template: a sandbox that was saved when flint-init had dialled, before any pod was put in it.
//!
//! ```text
//!   <state>/templates/<key>/state     the machine, a snapshot of flint-vmm's
//!                          /memory    its memory; clones map it
//!                          /seal      digests of both
//!                     draft-xxxxxx/   one that is being made: named by its key when all of it is on the disk
//! ```
//!
//! The key is a digest over all that a template depends on: kernel, initrd, command line, flint-vmm, the host's kernel and
//! processor, the machine's shape. What has another key, or none, is removed when flintd starts; what does not match its seal, or is
//! refused by flint-vmm, is removed and made anew. Clones that run keep the files that they mapped, whatever their names.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::{DirBuilderExt, FileExt, MetadataExt},
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use blake3::{Hash, Hasher};
use flint_api::vmm::{self, request::Command};
use nix::{
    errno::Errno,
    sys::utsname::uname,
    unistd::{Whence, lseek},
};
use prost::Message;
use tempfile::TempDir;
use thiserror::Error;

use super::{Shared, WorkingSet, parked::new_name, shape::Shape};
use crate::{
    chain,
    sandbox::{
        SandboxError, blocking, file_error,
        means::{Means, Wish},
        shell::{Shell, dialled, load_kernel},
        supervisor::{End, explain, supervise},
        supplies::Supply,
    },
    timeline::Timeline,
};

/// Of a template's network interface: locally administered, and no pod's.
pub(super) const PLACEHOLDER_MAC: [u8; 6] = [0x02, 0xff, 0, 0, 0, 1];
/// Of what is written here; another one makes other keys.
const FORMAT: &str = "flint template 2";
pub(super) const DRAFT: &str = "draft-";
const PAGE: usize = 4096;
const ZEROS: [u8; PAGE] = [0; PAGE];

/// What is wrong with a template.
#[derive(Debug, Error)]
pub enum TemplateError {
    /// It is not what was made.
    #[error("its {0} is damaged")]
    Damaged(&'static str),
    /// flint-vmm does not take it.
    #[error("flint-vmm refuses it: {0}")]
    Refused(String),
    /// It cannot be read.
    #[error("its {0} cannot be read")]
    Read(&'static str, #[source] io::Error),
}

/// A template that can be cloned.
#[derive(Debug)]
pub(super) struct Template {
    folder: PathBuf,
    pub(super) state: File,
    pub(super) memory: File,
    /// None: nobody is to look.
    working_set: Option<Arc<WorkingSet>>,
}

impl Template {
    /// The template for this host as it is now: the one that is there, if it is sound, or a new one.
    pub(super) async fn open_or_make(means: &Means, shared: &Shared) -> Result<Self, SandboxError> {
        let mut template = Self::find_or_make(means, shared).await?;
        let wanted = means.config.pool.working_sets;
        let working_set = wanted.map(|bytes| WorkingSet::open(&template.folder, bytes, &shared.metrics));
        template.working_set = working_set.map(Arc::new);
        Ok(template)
    }

    async fn find_or_make(means: &Means, shared: &Shared) -> Result<Self, SandboxError> {
        let _mine = shared.arranging.lock().await;
        let supply = means.supplies.take().await?;
        let templates = folder_of(means);
        make_folder(&templates)?;
        let key = key(means, &supply, &shared.shape)?;
        remove_others(&templates, &key)?;
        let folder = templates.join(&key);
        if folder.exists() {
            let there = folder.clone();
            match blocking(move || Self::open(there)).await? {
                Ok(template) => return Ok(template),
                Err(error) => {
                    tracing::warn!(folder = %folder.display(), error = chain(&error), "a template is made anew");
                    fs::remove_dir_all(&folder).map_err(file_error("remove", &folder))?;
                }
            }
        }
        make(means, shared, &supply, &templates, &folder).await
    }

    fn new(folder: PathBuf, state: File, memory: File) -> Self {
        Self {
            folder,
            state,
            memory,
            working_set: None,
        }
    }

    /// What its clones use.
    pub(super) fn working_set(&self) -> Option<&Arc<WorkingSet>> {
        self.working_set.as_ref()
    }

    /// Waits until somebody has recorded that.
    pub(super) async fn recorded(&self) {
        match &self.working_set {
            Some(set) => set.recorded().await,
            None => std::future::pending().await,
        }
    }

    /// Opens one and looks whether it is what was made.
    pub(super) fn open(folder: PathBuf) -> Result<Self, TemplateError> {
        let file = |name| File::open(folder.join(name)).map_err(|error| TemplateError::Read(name, error));
        let (state, memory) = (file("state")?, file("memory")?);
        let seal = fs::read_to_string(folder.join("seal")).map_err(|error| TemplateError::Read("seal", error))?;
        let mut lines = seal.lines();
        for (name, file) in [("state", &state), ("memory", &memory)] {
            let digest = digest(file).map_err(|error| TemplateError::Read(name, error))?;
            if lines.next() != Some(seal_line(name, digest).as_str()) {
                return Err(TemplateError::Damaged(name));
            }
        }
        Ok(Self::new(folder, state, memory))
    }

    /// As LoadSnapshot takes them.
    pub(super) fn files(&self) -> [BorrowedFd<'_>; 2] {
        [self.state.as_fd(), self.memory.as_fd()]
    }

    pub(super) fn error(&self, source: TemplateError) -> SandboxError {
        SandboxError::Template {
            path: self.folder.clone(),
            source,
        }
    }

    /// Removes it, so that the next one is made anew.
    pub(super) fn discard(self) {
        if let Err(error) = fs::remove_dir_all(&self.folder) {
            tracing::warn!(folder = %self.folder.display(), %error, "a template that cannot be used is still there");
        }
    }
}

/// Where the templates of a host are.
pub(super) fn folder_of(means: &Means) -> PathBuf {
    means.config.state_dir.join("templates")
}

/// Makes that folder, if it is not there.
pub(super) fn make_folder(templates: &Path) -> Result<(), SandboxError> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(templates);
    made.map_err(file_error("make", templates))
}

/// Removes drafts, and templates for what this host no longer is.
fn remove_others(templates: &Path, key: &str) -> Result<(), SandboxError> {
    let entries = fs::read_dir(templates).map_err(file_error("list", templates))?;
    for entry in entries.flatten().filter(|entry| entry.file_name() != key) {
        let path = entry.path();
        fs::remove_dir_all(&path).map_err(file_error("remove", &path))?;
        let draft = entry.file_name().to_string_lossy().starts_with(DRAFT);
        tracing::info!(template = %path.display(), draft, "removed: it is not for this host as it is now");
    }
    Ok(())
}

/// Boots, saves, seals and names a template.
async fn make(
    means: &Means,
    shared: &Shared,
    supply: &Supply,
    templates: &Path,
    folder: &Path,
) -> Result<Template, SandboxError> {
    // Removes itself, unless it becomes the template.
    let draft = tempfile::Builder::new().prefix(DRAFT).tempdir_in(templates);
    let draft = draft.map_err(file_error("make a folder in", templates))?;
    let name = new_name("template")?;
    let (held, plan) = means.hold(Wish {
        id: &name,
        net: false,
        limits: shared.shape.template_limits(),
        images: Vec::new(),
    })?;
    let (end, attach) = supervise(held);
    let _guard = end.kill_on_drop();
    shared.answer_for(&name, &end);
    let timeline = Timeline::new();
    let stage = timeline.begin("template");
    let saved = async {
        let shell = Shell::spawn(plan, attach, &timeline).await?;
        save(means, &shared.shape, supply, &shell, &end, draft.path()).await
    };
    if let Err(error) = saved.await {
        return Err(explain(&end, error).await);
    }
    end.kill();
    end.wait().await;
    let to = folder.to_owned();
    let template = blocking(move || seal(draft, to)).await??;
    shared.metrics.templates.inc();
    tracing::info!(folder = %folder.display(), took = ?stage.end(), "made a template");
    Ok(template)
}

async fn save(
    means: &Means,
    shape: &Shape,
    supply: &Supply,
    shell: &Shell,
    end: &End,
    draft: &Path,
) -> Result<(), SandboxError> {
    let [state, memory] = ["state", "memory"].map(|name| {
        let path = draft.join(name);
        File::create_new(&path).map_err(file_error("make", path))
    });
    let (state, memory) = (state?, memory?);
    let (kernel, initrd) = (supply.kernel()?, supply.initrd()?);
    let control = &shell.control;
    let machine = shape.machine(PLACEHOLDER_MAC);
    control.command(Command::CreateMachine(machine), &[]).await?;
    load_kernel(
        control,
        &shape.cmdline(&means.config.cmdline),
        kernel.as_fd(),
        initrd.as_ref().map(AsFd::as_fd),
    )
    .await?;
    shell.bind_host().await?;
    control.command(Command::Start(vmm::Start {}), &[]).await?;
    dialled(end, means.config.boot_timeout).await?;
    control.command(Command::Pause(vmm::Pause {}), &[]).await?;
    let files = [state.as_fd(), memory.as_fd()];
    Ok(control
        .command(Command::SaveSnapshot(vmm::SaveSnapshot::default()), &files)
        .await?)
}

/// Brings all of a draft to the disk, and then gives it its name.
pub(super) fn seal(draft: TempDir, folder: PathBuf) -> Result<Template, SandboxError> {
    let mut seal = String::new();
    for name in ["state", "memory"] {
        let path = draft.path().join(name);
        let digest = File::open(&path).and_then(|file| {
            file.sync_all()?;
            digest(&file)
        });
        seal += &seal_line(name, digest.map_err(file_error("read and sync", &path))?);
        seal += "\n";
    }
    let path = draft.path().join("seal");
    let written = File::create_new(&path).and_then(|mut file| {
        file.write_all(seal.as_bytes())?;
        file.sync_all()
    });
    written.map_err(file_error("write", &path))?;
    sync_folder(draft.path())?;
    fs::rename(draft.path(), &folder).map_err(file_error("name", &folder))?;
    // It has another name now: there is nothing to remove.
    let _ = draft.keep();
    sync_folder(folder.parent().unwrap_or(&folder))?;
    let open = |name| {
        let path = folder.join(name);
        File::open(&path).map_err(file_error("open", path))
    };
    let (state, memory) = (open("state")?, open("memory")?);
    Ok(Template::new(folder, state, memory))
}

fn sync_folder(folder: &Path) -> Result<(), SandboxError> {
    let synced = File::open(folder).and_then(|folder| folder.sync_all());
    synced.map_err(file_error("sync", folder))
}

fn seal_line(name: &str, digest: Hash) -> String {
    format!("{name} {digest}")
}

/// Digest over length and pages that are not zero: holes, which a copy may fill, and zeros are the same.
fn digest(file: &File) -> io::Result<Hash> {
    let length = file.metadata()?.len();
    let mut hasher = Hasher::new();
    hasher.update(&length.to_le_bytes());
    let mut buffer = vec![0; 64 * PAGE];
    let mut at = 0;
    while let Some(data) = next_data(file, at)? {
        // Ranges of data begin and end anywhere; pages are counted from the file's start.
        at = data - data % PAGE as u64;
        let wanted = buffer
            .len()
            .min(usize::try_from(length.saturating_sub(at)).unwrap_or(usize::MAX));
        file.read_exact_at(&mut buffer[..wanted], at)?;
        for page in buffer[..wanted].chunks(PAGE) {
            if *page != ZEROS[..page.len()] {
                hasher.update(&at.to_le_bytes());
                hasher.update(page);
            }
            at += page.len() as u64;
        }
    }
    Ok(hasher.finalize())
}

/// Where data begins at or after a place. The position that this moves is not used: all reading is by offset.
fn next_data(file: &File, at: u64) -> io::Result<Option<u64>> {
    let at = i64::try_from(at).map_err(io::Error::other)?;
    match lseek(file, at, Whence::SeekData) {
        Err(Errno::ENXIO) => Ok(None),
        other => Ok(Some(other?.cast_unsigned())),
    }
}

/// Names what a template depends on. Files go by what changes with every write and replacement, not by their bytes: this runs
/// before each first start.
pub(super) fn key(means: &Means, supply: &Supply, shape: &Shape) -> Result<String, SandboxError> {
    let mut hasher = Hasher::new();
    let mut add = |part: &[u8]| {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    };
    add(FORMAT.as_bytes());
    add(&shape.machine(PLACEHOLDER_MAC).encode_to_vec());
    add(shape.cmdline(&means.config.cmdline).as_bytes());
    add(&fingerprint(File::open(means.supplies.vmm()), means.supplies.vmm())?);
    add(&fingerprint(Ok(supply.kernel()?), &means.config.kernel)?);
    if let (Some(initrd), Some(path)) = (supply.initrd()?, &means.config.initrd) {
        add(&fingerprint(Ok(initrd), path)?);
    }
    let host = uname().map_err(|errno| file_error("ask for the name of", "this host")(errno.into()))?;
    for part in [host.release(), host.version(), host.machine()] {
        add(part.as_encoded_bytes());
    }
    add(processor()?.as_bytes());
    Ok(hasher.finalize().to_hex()[..32].to_owned())
}

fn fingerprint(file: io::Result<File>, path: &Path) -> Result<Vec<u8>, SandboxError> {
    let data = file
        .and_then(|file| file.metadata())
        .map_err(file_error("look at", path))?;
    let numbers = [
        data.dev(),
        data.ino(),
        data.size(),
        data.mtime().cast_unsigned(),
        data.mtime_nsec().cast_unsigned(),
        data.ctime().cast_unsigned(),
        data.ctime_nsec().cast_unsigned(),
    ];
    Ok(numbers.into_iter().flat_map(u64::to_le_bytes).collect())
}

/// What /proc/cpuinfo says about the first processor, without what changes from one moment to the next.
fn processor() -> Result<String, SandboxError> {
    let path = Path::new("/proc/cpuinfo");
    let text = fs::read_to_string(path).map_err(file_error("read", path))?;
    let lasting = |line: &&str| !line.starts_with("cpu MHz") && !line.starts_with("bogomips");
    Ok(text
        .lines()
        .take_while(|line| !line.is_empty())
        .filter(lasting)
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A template of files that are no snapshot, sealed.
    fn sealed(templates: &Path) -> Template {
        let draft = tempfile::Builder::new().prefix(DRAFT).tempdir_in(templates).unwrap();
        fs::write(draft.path().join("state"), "state").unwrap();
        let memory = File::create(draft.path().join("memory")).unwrap();
        memory.set_len(1 << 20).unwrap();
        memory.write_all_at(&[7; 3], 500_000).unwrap();
        seal(draft, templates.join("key")).unwrap()
    }

    #[test]
    fn a_sealed_template_opens_and_no_draft_is_left() {
        let templates = tempfile::tempdir().unwrap();
        sealed(templates.path());
        let names: Vec<_> = fs::read_dir(templates.path())
            .unwrap()
            .flatten()
            .map(|entry| entry.file_name())
            .collect();
        assert_eq!(names, ["key"]);
        Template::open(templates.path().join("key")).unwrap();
    }

    #[test]
    fn zeros_and_holes_are_the_same_and_everything_else_is_not() {
        let templates = tempfile::tempdir().unwrap();
        let folder = sealed(templates.path()).folder;
        let write = |name: &str, byte: u8, at| {
            let file = File::options().write(true).open(folder.join(name)).unwrap();
            file.write_all_at(&[byte], at).unwrap();
        };
        let damage = || match Template::open(folder.clone()) {
            Err(TemplateError::Damaged(name)) => name,
            other => panic!("{other:?}"),
        };
        write("memory", 0, 4096);
        Template::open(folder.clone()).unwrap();
        for at in [0, 500_002, (1 << 20) - 1] {
            write("memory", 1, at);
            assert_eq!(damage(), "memory", "at {at}");
            write("memory", if at == 500_002 { 7 } else { 0 }, at);
            Template::open(folder.clone()).unwrap();
        }
        write("state", b'x', 4);
        assert_eq!(damage(), "state");
        fs::remove_file(folder.join("state")).unwrap();
        assert!(matches!(
            Template::open(folder.clone()),
            Err(TemplateError::Read("state", _))
        ));
    }

    #[test]
    fn what_is_not_for_this_host_goes() {
        let templates = tempfile::tempdir().unwrap();
        sealed(templates.path());
        for name in ["draft-1", "other"] {
            fs::create_dir(templates.path().join(name)).unwrap();
        }
        remove_others(templates.path(), "key").unwrap();
        assert_eq!(fs::read_dir(templates.path()).unwrap().count(), 1);
        assert!(templates.path().join("key/seal").exists());
    }
}
