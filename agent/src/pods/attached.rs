//! A container's output as it comes, for those who are attached: bounded, and with each run's end after its last byte.

use std::sync::Arc;

use flint_api::{guest::ContainerExit, host::OutputStream};
use tokio::sync::{
    broadcast::{
        self,
        error::{RecvError, TryRecvError},
    },
    watch,
};

/// Pieces kept for attached clients that are slower than the container.
const BACKLOG: usize = 256;

/// A piece of output.
#[derive(Clone, Debug)]
pub struct Piece {
    /// The container's run that wrote it.
    pub run: u32,
    /// Which of the two.
    pub stream: OutputStream,
    /// The bytes; shared by all clients.
    pub data: Arc<[u8]>,
}

/// The end of a run's output.
#[derive(Clone, Debug)]
struct RunEnd {
    run: u32,
    exit: Option<ContainerExit>,
}

/// Tells whoever is attached to a container.
#[derive(Clone, Debug)]
pub struct Attached {
    pieces: broadcast::Sender<Piece>,
    ended: watch::Sender<Option<RunEnd>>,
}

impl Attached {
    /// Nobody is attached yet.
    pub(super) fn new() -> Self {
        Self {
            pieces: broadcast::Sender::new(BACKLOG),
            ended: watch::Sender::new(None),
        }
    }

    /// Output of a run that has not ended.
    pub(super) fn send(&self, piece: Piece) {
        // Nobody may be attached.
        let _ = self.pieces.send(piece);
    }

    /// A run's output is over; `None`: the sandbox went first.
    pub(super) fn end(&self, run: u32, exit: Option<ContainerExit>) {
        self.ended.send_replace(Some(RunEnd { run, exit }));
    }

    /// A run's output from now on.
    pub fn subscribe(&self, run: u32) -> Subscription {
        Subscription {
            run,
            pieces: self.pieces.subscribe(),
            ended: self.ended.subscribe(),
        }
    }
}

/// What an attached client hears.
#[derive(Debug)]
pub enum Heard {
    /// Output.
    Piece(Piece),
    /// The run and its output are over; `None`: nobody knows how it ended.
    Ended(Option<ContainerExit>),
    /// Output was dropped, because the client did not take it in time.
    TooSlow,
}

/// One attached client's way through a run.
#[derive(Debug)]
pub struct Subscription {
    run: u32,
    pieces: broadcast::Receiver<Piece>,
    ended: watch::Receiver<Option<RunEnd>>,
}

impl Subscription {
    /// What comes next.
    pub async fn next(&mut self) -> Heard {
        let run = self.run;
        let piece = tokio::select! {
            biased;
            piece = self.pieces.recv() => piece.map_err(|error| match error {
                RecvError::Lagged(missed) => TryRecvError::Lagged(missed),
                RecvError::Closed => TryRecvError::Closed,
            }),
            // All that the run wrote was sent before its end was: what is not here now will not come.
            _ = self.ended.wait_for(|ended| ended.as_ref().is_some_and(|end| end.run >= run)) => self.pieces.try_recv(),
        };
        match piece {
            Ok(piece) if piece.run == run => Heard::Piece(piece),
            Err(TryRecvError::Lagged(_)) => Heard::TooSlow,
            // The next run's, or none.
            Ok(_) | Err(TryRecvError::Empty | TryRecvError::Closed) => {
                let ended = self.ended.borrow();
                Heard::Ended(
                    ended
                        .as_ref()
                        .filter(|end| end.run == run)
                        .and_then(|end| end.exit.clone()),
                )
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(run: u32, data: &[u8]) -> Piece {
        Piece {
            run,
            stream: OutputStream::Stdout,
            data: data.into(),
        }
    }

    fn exit(exit_code: u32) -> ContainerExit {
        ContainerExit {
            exit_code,
            ..ContainerExit::default()
        }
    }

    #[tokio::test]
    async fn the_end_comes_after_all_output_and_is_the_runs_own() {
        let attached = Attached::new();
        let mut client = attached.subscribe(0);
        attached.send(piece(0, b"one"));
        attached.send(piece(0, b"two"));
        attached.end(0, Some(exit(7)));
        attached.send(piece(1, b"of the next run"));
        for data in [b"one", b"two"] {
            let Heard::Piece(piece) = client.next().await else {
                panic!()
            };
            assert_eq!(&*piece.data, data);
        }
        let Heard::Ended(Some(end)) = client.next().await else {
            panic!()
        };
        assert_eq!(end.exit_code, 7);
    }

    #[tokio::test]
    async fn who_comes_after_the_end_is_told_it() {
        let attached = Attached::new();
        attached.end(3, Some(exit(0)));
        assert!(matches!(attached.subscribe(3).next().await, Heard::Ended(Some(_))));
        assert!(matches!(attached.subscribe(2).next().await, Heard::Ended(None)));
    }

    #[tokio::test]
    async fn a_client_that_does_not_take_its_output_is_told_so_and_bounded() {
        let attached = Attached::new();
        let mut slow = attached.subscribe(0);
        for _ in 0..=BACKLOG {
            attached.send(piece(0, b"x"));
        }
        assert!(matches!(slow.next().await, Heard::TooSlow));
    }
}
