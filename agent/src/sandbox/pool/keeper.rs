//! The task that keeps a pool full: makes the template, clones it, replaces what was claimed or has ended.
//!
//! It lives of events: a claim's end, a clone's end, something made. What fails is tried again after a pause that doubles, and
//! the log says why.

use std::{convert::Infallible, pin::Pin, sync::Arc, time::Duration};

use futures::{StreamExt, stream::FuturesUnordered};
use tokio::time::{Sleep, sleep};
use tokio_util::sync::CancellationToken;

use super::{Shared, lock, parked::Parked, template::Template};
use crate::{
    chain,
    sandbox::{Exited, SandboxError, means::Means},
};

/// Clones that are made at the same time: more would take the processors from the pods.
const AT_ONCE: usize = 2;

/// The pause between two tries.
#[derive(Debug)]
struct Pause(Duration);

impl Pause {
    const FIRST: Duration = Duration::from_secs(1);
    const LONGEST: Duration = Duration::from_secs(300);

    fn next(&mut self) -> Duration {
        let pause = self.0;
        self.0 = (pause * 2).min(Self::LONGEST);
        pause
    }

    fn reset(&mut self) {
        self.0 = Self::FIRST;
    }
}

/// Why a template is not cloned any more.
enum Over {
    /// Another one is there in its place.
    Replaced,
    /// It cannot be used.
    Bad(SandboxError),
}

/// Fills a pool.
pub(super) struct Keeper {
    means: Arc<Means>,
    shared: Arc<Shared>,
    pause: Pause,
}

impl Keeper {
    pub(super) fn new(means: Arc<Means>, shared: Arc<Shared>) -> Self {
        Self {
            means,
            shared,
            pause: Pause(Pause::FIRST),
        }
    }

    /// Works until it is told to stop; then ends what it has made and nobody claimed.
    pub(super) async fn run(mut self, stop: CancellationToken) {
        let never = tokio::select! {
            () = stop.cancelled() => None,
            never = self.work() => Some(never),
        };
        if let Some(never) = never {
            match never {}
        }
        // What was being made has been dropped, which ends it.
        self.shared.clear();
        let ends: Vec<_> = lock(&self.shared.ends).drain().map(|(_, end)| end).collect();
        for end in ends {
            end.wait().await;
        }
    }

    async fn work(&mut self) -> Infallible {
        loop {
            let error = match Template::open_or_make(&self.means, &self.shared).await {
                Ok(template) => {
                    let over = self.keep_full(&template).await;
                    // They are another template's, or may have what it was refused for.
                    self.shared.clear();
                    let Over::Bad(error) = over else { continue };
                    template.discard();
                    error
                }
                Err(error) => error,
            };
            self.failed(&error, "sandboxes are booted until there is a template")
                .await;
        }
    }

    async fn failed(&mut self, error: &SandboxError, consequence: &'static str) {
        self.shared.metrics.failures.inc();
        let pause = self.pause.next();
        tracing::warn!(error = chain(error), ?pause, "{consequence}");
        tokio::select! {
            () = sleep(pause) => {}
            () = self.shared.replaced.notified() => {}
        }
    }

    /// Clones a template until there is another one, or it turns out to be bad.
    async fn keep_full(&mut self, template: &Template) -> Over {
        let Self { means, shared, pause } = self;
        let mut making = FuturesUnordered::new();
        let mut ending = FuturesUnordered::new();
        // One at a time, so that the others can be claimed.
        let mut learning = FuturesUnordered::new();
        let mut rest: Option<Pin<Box<Sleep>>> = None;
        loop {
            let missing = shared
                .size
                .saturating_sub(lock(&shared.parked).len() + making.len() + learning.len());
            let free = if rest.is_none() { AT_ONCE - making.len() } else { 0 };
            making.extend((0..missing.min(free)).map(|_| Parked::make(means, shared, template)));
            if learning.is_empty() {
                learning.extend(shared.take_learner().map(Parked::learn));
            }
            tokio::select! {
                Some(made) = making.next() => match made {
                    Ok(parked) => {
                        pause.reset();
                        ending.push(ended(&parked));
                        shared.put(parked);
                        let count = lock(&shared.parked).len();
                        if count == shared.size {
                            tracing::info!(count, "the pool is full");
                        }
                    }
                    Err(error @ SandboxError::Template { .. }) => return Over::Bad(error),
                    Err(error) => {
                        shared.metrics.failures.inc();
                        let after = pause.next();
                        tracing::warn!(error = chain(&error), pause = ?after, "a clone could not be made");
                        rest = Some(Box::pin(sleep(after)));
                    }
                },
                // Of those that were claimed nothing needs to be done.
                Some((name, exited)) = ending.next() => if shared.forget(&name) {
                    shared.metrics.failures.inc();
                    let after = pause.next();
                    tracing::warn!(name, ?exited, pause = ?after, "a parked clone has ended");
                    rest = Some(Box::pin(sleep(after)));
                },
                Some(learnt) = learning.next() => if let Some(parked) = learnt {
                    tracing::info!(name = parked.name(), "a parked clone has learnt what others use");
                    shared.put(parked);
                },
                () = shared.changed.notified() => {}
                () = template.recorded() => {}
                () = shared.replaced.notified() => return Over::Replaced,
                () = over(&mut rest), if rest.is_some() => rest = None,
            }
        }
    }
}

async fn over(rest: &mut Option<Pin<Box<Sleep>>>) {
    if let Some(rest) = rest {
        rest.as_mut().await;
    }
}

fn ended(parked: &Parked) -> impl Future<Output = (String, Exited)> + use<> {
    let (name, end) = (parked.name().to_owned(), parked.end().clone());
    async move {
        let exited = end.wait().await;
        (name, exited)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_five_minutes_and_begin_anew_after_a_success() {
        let mut pause = Pause(Pause::FIRST);
        let seconds: Vec<_> = (0..11).map(|_| pause.next().as_secs()).collect();
        assert_eq!(seconds, [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]);
        pause.reset();
        assert_eq!(pause.next(), Pause::FIRST);
    }
}
