//! Whether a claim takes longer for a large pod: clones of one template, in turn for the smallest and for the largest, beside those of
//! a template that has no room to grow.
//!
//! What makes a clone large follows its claim without waiting, as soon as it can.

use std::path::Path;
use std::time::{Duration, Instant};

use flint_api::vmm::request::Command;
use flint_api::vmm::{CreateMachine, SetMemory, SetVcpus};

use super::clones::{Template, machine};
use crate::Error;
use crate::report::Report;
use crate::samples::Samples;

const LEAST: u64 = 128 << 20;
const LARGEST: u64 = 32 << 30;
const VCPUS: u32 = 16;

/// What a clone is to become.
#[derive(Clone, Copy)]
enum Size {
    Least,
    Largest,
}

/// Takes the figures.
pub fn measure(vmm: &Path, runs: u32, report: &mut Report) -> Result<(), Error> {
    let fixed = Template::of(vmm, machine(LEAST))?;
    let growing = Template::of(
        vmm,
        CreateMachine {
            vcpus: VCPUS,
            hotplug_bytes: LARGEST - LEAST,
            ..machine(LEAST)
        },
    )?;
    let kinds = [
        ("1 vCPU, 128 MiB, no room", &fixed, Size::Least),
        ("1 vCPU, 128 MiB, room for 16 and 32 GiB", &growing, Size::Least),
        ("16 vCPUs, 32 GiB", &growing, Size::Largest),
    ];
    let mut samples = kinds.map(|(name, ..)| Samples::new(format!("parked clone, {name}")));
    for run in 0..=runs {
        for (samples, (_, template, size)) in samples.iter_mut().zip(kinds) {
            let took = claim(template, size)?;
            // The first one is not counted.
            if run > 0 {
                samples.push(took);
            }
        }
        report.progress(run, runs);
    }
    samples.into_iter().for_each(|samples| report.add(samples));
    Ok(())
}

fn claim(template: &Template, size: Size) -> Result<Duration, Error> {
    let mut sandbox = template.parked()?;
    let begin = Instant::now();
    let mut told = begin;
    template.claim(&mut sandbox)?;
    let mut answers = 1;
    if let Size::Largest = size {
        let plugged_bytes = LARGEST - LEAST;
        sandbox.begin(Command::SetVcpus(SetVcpus { vcpus: VCPUS }))?;
        sandbox.begin(Command::SetMemory(SetMemory { plugged_bytes }))?;
        answers += 2;
    }
    sandbox.wait(answers, || told = Instant::now())?;
    Ok(told - begin)
}
