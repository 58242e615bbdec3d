//! Templates for other hosts, and from them: a host that is given one fills its pool without having booted it.
//!
//! ```text
//!   current    <state>/templates/<key>  ──opened, verified──>  files + TemplateRecord
//!   adopt      files + TemplateRecord  ──same kernel, initrd, command line?──>  a VMM loads it  ──>  sealed as <key>, the pool begins anew
//! ```
//!
//! Whether this host can run a template is flint-vmm's to say, which loads it before anything here is given up: it names the line of
//! the passport, or of the machine's shape, that differs. What runs in the template is compared here, since pods that are
//! clones and pods that are booted have to be alike.

use std::{
    fs::{self, File},
    io::{self, Read as _},
    os::fd::{AsFd, AsRawFd},
    path::{Path, PathBuf},
    sync::Arc,
};

use blake3::Hasher;
use nix::{
    fcntl::{AT_FDCWD, AtFlags},
    unistd::linkat,
};
use prost::Message;

use super::{
    Shared,
    parked::{LoadFailure, load, new_name},
    template::{DRAFT, PLACEHOLDER_MAC, Template, folder_of, key, make_folder, seal},
};
use crate::{
    sandbox::{
        SandboxError, blocking, file_error,
        means::{Means, Wish},
        shell::Shell,
        supervisor::{explain, supervise},
        supplies::Supply,
    },
    timeline::Timeline,
};

/// What is told of a template that goes to other hosts.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct TemplateRecord {
    /// Digest of the guests' kernel.
    #[prost(string, tag = "1")]
    kernel: String,
    /// Digest of their initrd; empty: none.
    #[prost(string, tag = "2")]
    initrd: String,
    /// Their kernel's command line.
    #[prost(string, tag = "3")]
    cmdline: String,
}

/// A template's two files, as flint-vmm writes them.
#[derive(Debug)]
pub struct TemplateFiles {
    /// The machine.
    pub state: File,
    /// Its memory.
    pub memory: File,
}

/// The template of one host's pool, for whoever moves it.
#[derive(Clone, Debug)]
pub struct Templates {
    pub(in crate::sandbox) means: Arc<Means>,
    pub(super) shared: Arc<Shared>,
}

impl Templates {
    /// The template that clones are made of now.
    ///
    /// # Errors
    /// [`SandboxError::NoTemplate`]; when it is damaged or cannot be read.
    pub async fn current(&self) -> Result<(TemplateRecord, TemplateFiles), SandboxError> {
        let supply = self.means.supplies.take().await?;
        let record = self.record(&supply).await?;
        let folder = self.folder().join(key(&self.means, &supply, &self.shared.shape)?);
        if !folder.exists() {
            return Err(SandboxError::NoTemplate);
        }
        let path = folder.clone();
        let template = blocking(move || Template::open(folder)).await?;
        let Template { state, memory, .. } = template.map_err(|source| SandboxError::Template { path, source })?;
        Ok((record, TemplateFiles { state, memory }))
    }

    /// Files without names, for a template that comes.
    ///
    /// # Errors
    /// When they cannot be made.
    pub fn draft(&self) -> Result<TemplateFiles, SandboxError> {
        let folder = self.folder();
        make_folder(&folder)?;
        let file = || tempfile::tempfile_in(&folder).map_err(file_error("make a file in", &folder));
        Ok(TemplateFiles {
            state: file()?,
            memory: file()?,
        })
    }

    /// Whether a template is of the guests that this host has, before it is fetched.
    ///
    /// # Errors
    /// [`SandboxError::ForeignTemplate`] with what differs.
    pub async fn check(&self, record: &TemplateRecord) -> Result<(), SandboxError> {
        if self.shared.size == 0 {
            return Err(SandboxError::ForeignTemplate(
                "this flintd keeps no clones (--pool 0)".into(),
            ));
        }
        let supply = self.means.supplies.take().await?;
        let own = self.record(&supply).await?;
        let config = &self.means.config;
        let initrd = config.initrd.as_deref().unwrap_or(Path::new("none"));
        let differs = |what: String| Err(SandboxError::ForeignTemplate(what));
        if record.kernel != own.kernel {
            return differs(format!("its kernel is another one than {}", config.kernel.display()));
        }
        if record.initrd != own.initrd {
            return differs(format!("its initrd is another one than {}", initrd.display()));
        }
        if record.cmdline != own.cmdline {
            let (its, here) = (record.cmdline.escape_debug(), own.cmdline);
            return differs(format!("its kernel's command line is \"{its}\", here it is \"{here}\""));
        }
        Ok(())
    }

    /// Makes a template that was checked, whose files are whole, this host's: the pool is filled with clones of it from now on.
    ///
    /// # Errors
    /// [`SandboxError::ForeignTemplate`] with what flint-vmm says; when it cannot be kept. Then this host's own is in use as before.
    pub async fn adopt(&self, files: TemplateFiles) -> Result<(), SandboxError> {
        let Self { means, shared } = self;
        let _mine = shared.arranging.lock().await;
        let supply = means.supplies.take().await?;
        let folder = self.folder().join(key(means, &supply, &shared.shape)?);
        self.try_out(&files).await?;
        let draft = tempfile::Builder::new().prefix(DRAFT).tempdir_in(self.folder());
        let draft = draft.map_err(file_error("make a folder in", self.folder()))?;
        for (name, file) in [("state", &files.state), ("memory", &files.memory)] {
            let path = draft.path().join(name);
            link(file, &path).map_err(file_error("name", path))?;
        }
        blocking(move || {
            if folder.exists() {
                // Clones have its files open.
                fs::remove_dir_all(&folder).map_err(file_error("remove", &folder))?;
            }
            seal(draft, folder)
        })
        .await??;
        tracing::info!("a template from another host takes the place of this host's own");
        shared.replaced.notify_one();
        Ok(())
    }

    /// Has a VMM load a template, and ends it.
    async fn try_out(&self, files: &TemplateFiles) -> Result<(), SandboxError> {
        let Self { means, shared } = self;
        let name = new_name("trial")?;
        let (held, plan) = means.hold(Wish {
            id: &name,
            net: false,
            limits: shared.shape.limits(),
            images: Vec::new(),
        })?;
        let (end, attach) = supervise(held);
        let guard = end.kill_on_drop();
        shared.answer_for(&name, &end);
        let machine = shared.shape.machine(PLACEHOLDER_MAC);
        let loaded = async {
            let shell = Shell::spawn(plan, attach, &Timeline::new()).await?;
            let loaded = load(&shell, machine, [files.state.as_fd(), files.memory.as_fd()]).await;
            loaded.map_err(|failure| match failure {
                LoadFailure::Refused(line) => SandboxError::ForeignTemplate(line),
                LoadFailure::Other(error) => error,
            })
        };
        let outcome = loaded.await;
        if let Err(error) = outcome {
            return Err(explain(&end, error).await);
        }
        drop(guard);
        end.wait().await;
        Ok(())
    }

    async fn record(&self, supply: &Supply) -> Result<TemplateRecord, SandboxError> {
        let config = &self.means.config;
        let (kernel, initrd) = (supply.kernel()?, supply.initrd()?);
        let digests = blocking(move || {
            let initrd = initrd.map(digest).transpose()?;
            Ok((digest(kernel)?, initrd.unwrap_or_default()))
        });
        let (kernel, initrd) = digests.await?.map_err(file_error("read", &config.kernel))?;
        Ok(TemplateRecord {
            kernel,
            initrd,
            cmdline: self.shared.shape.cmdline(&config.cmdline),
        })
    }

    fn folder(&self) -> PathBuf {
        folder_of(&self.means)
    }
}

fn digest(mut file: File) -> io::Result<String> {
    let mut hasher = Hasher::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hasher.finalize().to_hex().to_string()),
            count => hasher.update(&buffer[..count]),
        };
    }
}

/// Gives a file a name that had none (open(2), O_TMPFILE).
fn link(file: &File, path: &Path) -> io::Result<()> {
    let unnamed = format!("/proc/self/fd/{}", file.as_raw_fd());
    linkat(AT_FDCWD, unnamed.as_str(), AT_FDCWD, path, AtFlags::AT_SYMLINK_FOLLOW).map_err(io::Error::from)
}
