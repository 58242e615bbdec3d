//! Ends of processes, matched to whoever waits for them.
//!
//! PID 1 reaps everything: its helpers, the containers' first processes, exec'd programs and orphans. A process that
//! matters may end before PID 1 has learnt its pid from the helper that made it. So while a helper is under way (a
//! [`Birth`] exists) ends of unknown processes are kept; when none is, they can only be orphans and are forgotten.
//!
//! Pids come back after `pid_max` forks; a kept end would be overwritten only if that many processes came and went
//! during one helper's run. Everything runs on one thread, so between spawning and registering nothing is reaped.

use std::{
    collections::HashMap,
    process::ExitStatus,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use tokio::sync::oneshot;

use crate::sys;

/// How and when a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// Exit code or signal.
    pub status: ExitStatus,
    /// When it was reaped.
    pub at: SystemTime,
}

/// The table of ends.
#[derive(Debug, Default, Clone)]
pub struct Reaper(Arc<Mutex<Table>>);

#[derive(Debug, Default)]
struct Table {
    awaited: HashMap<i32, oneshot::Sender<Ended>>,
    kept: HashMap<i32, Ended>,
    births: usize,
}

/// Tells the end of one process.
pub type EndReceiver = oneshot::Receiver<Ended>;

impl Reaper {
    /// Keeps ends of unknown processes until the returned value is dropped.
    pub fn birth(&self) -> Birth {
        self.table().births += 1;
        Birth(self.clone())
    }

    /// Reaps every child that has ended.
    pub fn reap(&self) {
        while let Some((pid, status)) = sys::wait_any() {
            self.record(
                pid,
                Ended {
                    status,
                    at: SystemTime::now(),
                },
            );
        }
    }

    fn record(&self, pid: i32, ended: Ended) {
        let mut table = self.table();
        if let Some(waiter) = table.awaited.remove(&pid) {
            // The waiter may have gone away with its client.
            let _ = waiter.send(ended);
        } else if table.births > 0 {
            table.kept.insert(pid, ended);
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// While it exists, no end is lost.
#[derive(Debug)]
pub struct Birth(Reaper);

impl Birth {
    /// The end of `pid`, which was born under this birth: possibly already kept.
    pub fn claim(&self, pid: i32) -> EndReceiver {
        let (sender, receiver) = oneshot::channel();
        let mut table = self.0.table();
        match table.kept.remove(&pid) {
            Some(ended) => {
                // The receiver is right here.
                let _ = sender.send(ended);
            }
            None => {
                table.awaited.insert(pid, sender);
            }
        }
        receiver
    }
}

impl Drop for Birth {
    fn drop(&mut self) {
        let mut table = self.0.table();
        table.births -= 1;
        if table.births == 0 {
            table.kept.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    fn ended(code: i32) -> Ended {
        Ended {
            status: ExitStatus::from_raw(code << 8),
            at: SystemTime::UNIX_EPOCH,
        }
    }

    #[test]
    fn an_end_that_comes_before_its_claim_is_kept() {
        let reaper = Reaper::default();
        let birth = reaper.birth();
        reaper.record(7, ended(3));
        assert_eq!(birth.claim(7).try_recv().unwrap(), ended(3));
    }

    #[test]
    fn an_end_that_comes_after_its_claim_is_delivered_after_the_birth() {
        let reaper = Reaper::default();
        let birth = reaper.birth();
        let mut receiver = birth.claim(7);
        drop(birth);
        assert!(receiver.try_recv().is_err());
        reaper.record(7, ended(4));
        assert_eq!(receiver.try_recv().unwrap(), ended(4));
    }

    #[test]
    fn orphans_are_forgotten_when_the_last_birth_is_over() {
        let reaper = Reaper::default();
        let (first, second) = (reaper.birth(), reaper.birth());
        reaper.record(8, ended(0));
        drop(first);
        assert_eq!(reaper.table().kept.len(), 1);
        drop(second);
        assert!(reaper.table().kept.is_empty());
        reaper.record(9, ended(0));
        assert!(reaper.table().kept.is_empty());
    }

    #[test]
    fn a_waiter_that_went_away_does_no_harm() {
        let reaper = Reaper::default();
        let birth = reaper.birth();
        drop(birth.claim(5));
        reaper.record(5, ended(1));
        assert!(reaper.table().awaited.is_empty());
    }

    #[test]
    fn concurrent_births_each_get_their_own_process() {
        let reaper = Reaper::default();
        let births: Vec<Birth> = (0..50).map(|_| reaper.birth()).collect();
        let early: Vec<i32> = (0..50).filter(|pid| pid % 2 == 0).collect();
        for pid in &early {
            reaper.record(*pid, ended(*pid));
        }
        let mut receivers: Vec<EndReceiver> = births.iter().zip(0..).map(|(birth, pid)| birth.claim(pid)).collect();
        drop(births);
        for pid in (0..50).rev().filter(|pid| pid % 2 == 1) {
            reaper.record(pid, ended(pid));
        }
        for (pid, receiver) in (0..).zip(&mut receivers) {
            assert_eq!(receiver.try_recv().unwrap(), ended(pid));
        }
    }
}
