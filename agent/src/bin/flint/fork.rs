//! `fork`: new pods of one that runs, as it is now.

use clap::Args;
use flint_api::host::{ForkPodRequest, ListPodsRequest, Pod, PodMeta};

use crate::apply::new_uid;
use crate::client::Client;
use crate::failure::Failure;
use crate::output::{self, Format};
use crate::pods::{self, uid};

/// Make new pods of a running or paused one, as it is now.
///
/// Memory, disk and running programs come along; each fork has an address, host name and random numbers of its own. The pod stands still once
/// and then goes on as before; a paused one stays paused, and its forks run. Connections that its programs have are dead in the forks.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  flint fork web\n  flint fork web --count 3\n  flint fork web --name web-canary")]
pub struct Fork {
    /// The pod.
    #[arg(value_name = "POD")]
    pod: String,
    /// How many forks: 1 to 64, all of them or none.
    #[arg(short, long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=64))]
    count: u8,
    /// What to call them: the name, with -1, -2 and so on where there are several [default: the pod's name with numbers that are free].
    #[arg(long)]
    name: Option<String>,
    /// Return as soon as they are accepted, instead of when they run.
    #[arg(short, long)]
    detach: bool,
}

impl Fork {
    pub async fn execute(self, client: Client, format: Format) -> Result<u8, Failure> {
        let parent = client.pod(&self.pod).await?;
        let request = ForkPodRequest {
            uid: uid(&parent),
            forks: self.metas(&client, &parent).await?,
            lease_epoch: 0,
        };
        let forks = client.pods().fork_pod(request).await?.into_inner().pods;
        let mut failed = None;
        for mut fork in forks {
            if !self.detach {
                fork = pods::until(&client, &fork, is_there).await?;
            }
            failed = failed.or_else(|| failure(&fork));
            match format {
                Format::Json => output::print_json("Pod", &fork)?,
                Format::Text => output::print_line(&fork.meta.unwrap_or_default().name)?,
            }
        }
        failed.map_or(Ok(0), Err)
    }

    async fn metas(&self, client: &Client, parent: &Pod) -> Result<Vec<PodMeta>, Failure> {
        let known = client.pods().list_pods(ListPodsRequest {}).await?.into_inner().pods;
        let of = parent.meta.clone().unwrap_or_default();
        let taken: Vec<_> = known
            .into_iter()
            .filter_map(|pod| pod.meta)
            .filter(|meta| meta.namespace == of.namespace)
            .map(|meta| meta.name)
            .collect();
        let names = names(self.name.as_deref(), &of.name, self.count.into(), &taken);
        let meta = |name| {
            Ok(PodMeta {
                uid: new_uid()?,
                name,
                generation: 1,
                ..of.clone()
            })
        };
        names.into_iter().map(meta).collect()
    }
}

/// Whether a pod that began as another one has its sandbox, or will not get it.
pub fn is_there(pod: &Pod) -> bool {
    pods::is_over(pod) || pod.status.as_ref().is_some_and(|status| status.started_at.is_some())
}

/// Why a pod never had a sandbox.
fn failure(pod: &Pod) -> Option<Failure> {
    let (meta, status) = (pod.meta.clone()?, pod.status.clone()?);
    let failed = pods::is_over(pod) && status.started_at.is_none();
    failed.then(|| Failure::new(format!("{}: {}: {}", meta.name, status.reason, status.message)))
}

/// As many names as forks: the given one, or the parent's with the first numbers that are free.
fn names(given: Option<&str>, parent: &str, count: usize, taken: &[String]) -> Vec<String> {
    match given {
        Some(name) if count == 1 => vec![name.to_owned()],
        Some(name) => (1..=count).map(|number| format!("{name}-{number}")).collect(),
        None => (1..)
            .map(|number| format!("{parent}-{number}"))
            .filter(|name| !taken.contains(name))
            .take(count)
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forks_have_the_names_that_were_asked_for_or_free_ones() {
        let taken = ["web-1".to_owned(), "web-3".to_owned()];
        assert_eq!(names(Some("a"), "web", 1, &taken), ["a"]);
        assert_eq!(names(Some("a"), "web", 2, &taken), ["a-1", "a-2"]);
        assert_eq!(names(None, "web", 3, &taken), ["web-2", "web-4", "web-5"]);
    }
}
