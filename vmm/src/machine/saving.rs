//! Saving a machine while its guest goes on: memory is copied in rounds, and the guest is stopped for the last one.
//!
//! ```text
//!  log on | round 0: all pages | round 1: written meanwhile | ... | stop: written meanwhile, vCPUs, devices | log off
//!  guest    runs                 runs                               stands still                              runs
//! ```
//!
//! Written to by the guest: KVM's dirty log. By a device: `memory::dirty`. What belongs into the file is told by the page tables
//! and not by the logs, as in a machine that stands still; the logs only tell what was copied too early. So a page that was
//! given back to the host meanwhile goes out of the file again.
//!
//! To turn KVM's log on or off is to change a memory slot, for which KVM waits until no vCPU is in the middle of using it: some
//! milliseconds for each, while the guest runs.

use std::time::Instant;

use kvm_bindings::KVM_MEM_LOG_DIRTY_PAGES;
use vm_memory::GuestMemoryRegion;

use super::snapshot::{Report, Save, SaveRequest};
use super::{Error, Machine, kvm, parts};
use crate::memory;
use crate::memory::pages::{PAGE, Pages};
use crate::memory::writer::Over;

/// What a step copies: a few milliseconds.
const STEP: u64 = 4 << 20;
/// So little is copied while the guest stands still.
const ENOUGH: u64 = 4 << 20;
/// A guest that writes as fast as it is copied is stopped all the same.
const MAX_ROUNDS: u32 = 6;

/// What is to be done next.
pub(super) enum Next {
    /// Another step.
    Copy,
    /// The last one.
    Stop,
}

/// How the guest is when it is saved, or when that failed.
pub(super) enum Finished {
    Running(Result<Report, Error>),
    /// As was asked for, or because it cannot go on.
    Paused(Result<Report, Error>),
}

/// A save in the course of which the guest runs.
pub(super) struct Live {
    save: Save,
    /// What is left of this round.
    round: Pages,
    /// What was copied, in this round and those before.
    copied: Pages,
    /// Written to since it was copied.
    stale: Pages,
    report: Report,
    stay_paused: bool,
}

impl Live {
    pub(super) fn begin(machine: &Machine, request: SaveRequest) -> Result<Self, Error> {
        let stay_paused = request.stay_paused;
        let save = Save::begin(machine, request)?;
        let begun = machine
            .begin_log()
            .and_then(|()| save.pages(machine, &machine.plugged_somewhere()));
        match begun {
            Ok(round) => Ok(Self {
                report: Report {
                    id: save.id,
                    ..Report::default()
                },
                save,
                round,
                copied: Pages::default(),
                stale: Pages::default(),
                stay_paused,
            }),
            Err(error) => {
                save.abandon();
                // The first failure is the one that is told.
                let _ = machine.end_log();
                Err(error)
            }
        }
    }

    pub(super) fn step(&mut self, machine: &Machine) -> Result<Next, Error> {
        if self.round.is_empty() {
            return self.next_round(machine);
        }
        let some = self.round.take_first(STEP / PAGE);
        let over = if self.report.rounds == 0 {
            Over::Holes
        } else {
            Over::Anything
        };
        self.report.written += self.copy(machine, &some, over)?;
        self.copied = self.copied.or(&some);
        Ok(Next::Copy)
    }

    fn next_round(&mut self, machine: &Machine) -> Result<Next, Error> {
        self.report.rounds += 1;
        let before = self.stale.bytes();
        self.stale = machine.take_log()?;
        let (now, first) = (self.stale.bytes(), self.report.rounds == 1);
        // What shrinks by less than a half is not worth another round.
        if now <= ENOUGH || self.report.rounds >= MAX_ROUNDS || !first && now > before / 2 {
            return Ok(Next::Stop);
        }
        self.round = self.stale.clone();
        Ok(Next::Copy)
    }

    /// Stops the guest, saves it and lets it go on, if it is to.
    pub(super) fn finish(mut self, machine: &Machine) -> Finished {
        let stopped = Instant::now();
        let saved = match machine.pause() {
            Ok(()) => self.save_stopped(machine),
            Err(error) => Err(error),
        };
        if saved.is_err() {
            self.save.abandon();
        }
        if saved.is_ok() && self.stay_paused {
            self.report.paused = Some(stopped.elapsed());
            return Finished::Paused(Ok(self.report));
        }
        if let Err(stuck) = resume_logged(machine) {
            return Finished::Paused(Err(stuck));
        }
        self.report.paused = Some(stopped.elapsed());
        Finished::Running(saved.map(|()| self.report))
    }

    fn save_stopped(&mut self, machine: &Machine) -> Result<(), Error> {
        let state = machine.take(self.save.id)?;
        let stale = self.stale.or(&machine.take_log()?);
        let wanted = self.save.pages(machine, &machine.plugged()?)?;
        let again = self.copied.and(&stale).and(&wanted);
        let mut written = self.copy(machine, &again, Over::Anything)?;
        written += self.copy(machine, &wanted.without(&self.copied), Over::Holes)?;
        let given_back = self.copied.without(&wanted);
        self.save.memory.remove(&given_back).map_err(memory::Error::File)?;
        self.report.written += written;
        self.report.written_paused = written;
        self.save.finish(state, wanted, None)
    }

    fn copy(&mut self, machine: &Machine, pages: &Pages, over: Over) -> Result<u64, Error> {
        let copied = self.save.memory.copy(&machine.memory, pages, over);
        Ok(copied.map_err(memory::Error::File)?)
    }

    /// Leaves no files and no log.
    pub(super) fn abandon(self, machine: &Machine) {
        self.save.abandon();
        // The failure that led here is the one that is told.
        let _ = machine.end_log();
    }
}

/// Has a machine go on that may have been stopped by a save. Its logs end when it runs: it takes some time to end them.
pub(super) fn resume_logged(machine: &Machine) -> Result<(), Error> {
    machine.resume()?;
    if machine.is_logged() {
        // What was saved is whole whether this works or not; a log that stays on only costs.
        let _ = machine.end_log();
    }
    Ok(())
}

impl Machine {
    fn is_logged(&self) -> bool {
        memory::numbered(&self.memory).any(|(_, region)| memory::dirty(region).is_on())
    }

    fn begin_log(&self) -> Result<(), Error> {
        // Devices' first: it costs nothing, and what is in it too early only is copied again.
        for (_, region) in memory::numbered(&self.memory) {
            memory::dirty(region).begin();
        }
        parts::register_memory(&self.vm, &self.memory, KVM_MEM_LOG_DIRTY_PAGES)
    }

    fn end_log(&self) -> Result<(), Error> {
        for (_, region) in memory::numbered(&self.memory) {
            memory::dirty(region).end();
        }
        parts::register_memory(&self.vm, &self.memory, 0)
    }

    /// What was written since the log began or this was last called.
    fn take_log(&self) -> Result<Pages, Error> {
        let (mut guests, mut devices) = (Pages::default(), Pages::default());
        for (slot, (first, region)) in (0..).zip(memory::numbered(&self.memory)) {
            memory::dirty(region).take(first, &mut devices);
            // A region is mapped, so its length is a usize.
            let length = usize::try_from(region.len()).unwrap_or(usize::MAX);
            let log = self.vm.get_dirty_log(slot, length);
            guests.push_bits(first, log.map_err(kvm("reading which pages the guest has written"))?);
        }
        Ok(guests.or(&devices))
    }
}
