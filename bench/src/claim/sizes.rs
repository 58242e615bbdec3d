//! Whether a claim takes longer for a large pod: clones of one template, in turn for a small, a middling and the largest one, beside
//! those of a template that has no room to grow.
//!
//! What room to grow costs a parked clone in memory is told as well. What makes a clone large follows its claim without waiting, as soon as it can.

use std::path::Path;
use std::time::{Duration, Instant};

use flint_api::vmm::request::Command;
use flint_api::vmm::{CreateMachine, SetMemory, SetVcpus};

use super::clones::{Template, machine};
use super::density;
use crate::Error;
use crate::report::Report;
use crate::samples::Samples;

const LEAST: u64 = 128 << 20;
const LARGEST: u64 = 32 << 30;
const VCPUS: u32 = 16;
/// Of which the memory is counted.
const CLONES: u32 = 10;

/// What a clone is to become.
#[derive(Clone, Copy)]
struct Size {
    vcpus: u32,
    memory_bytes: u64,
}

/// The first is what a clone is before anything was done for its size.
const SIZES: [Size; 3] = [
    Size {
        vcpus: 1,
        memory_bytes: LEAST,
    },
    Size {
        vcpus: 4,
        memory_bytes: 2 << 30,
    },
    Size {
        vcpus: VCPUS,
        memory_bytes: LARGEST,
    },
];

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
    let [least, middling, largest] = SIZES;
    let kinds = [
        ("1 vCPU, 128 MiB, no room", &fixed, least),
        ("1 vCPU, 128 MiB, room for 16 and 32 GiB", &growing, least),
        ("4 vCPUs, 2 GiB", &growing, middling),
        ("16 vCPUs, 32 GiB", &growing, largest),
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
    for (name, template) in [("without room, parked", &fixed), ("with room, parked", &growing)] {
        density::of_parked(name, template, CLONES, report)?;
    }
    let [_, smallest, larger @ ..] = &samples;
    for (samples, (name, ..)) in larger.iter().zip(&kinds[2..]) {
        if let (Some(theirs), Some(smallest)) = (samples.median(), smallest.median()) {
            let ratio = theirs.as_secs_f64() / smallest.as_secs_f64();
            report.fact(
                "ratio",
                format!("{name} / 1 vCPU, 128 MiB of the same template, medians: {ratio:.2}"),
            );
        }
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
    if size.vcpus > 1 {
        sandbox.begin(Command::SetVcpus(SetVcpus { vcpus: size.vcpus }))?;
        answers += 1;
    }
    if size.memory_bytes > LEAST {
        let plugged_bytes = size.memory_bytes - LEAST;
        sandbox.begin(Command::SetMemory(SetMemory { plugged_bytes }))?;
        answers += 1;
    }
    sandbox.wait(answers, || told = Instant::now())?;
    Ok(told - begin)
}
