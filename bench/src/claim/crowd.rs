//! What each step costs beside so many parked clones: nothing may grow with their number.

use std::time::{Duration, Instant};

use super::clones::Template;
use crate::Error;
use crate::report::Report;
use crate::samples::Samples;

/// From nothing to a guest that goes on.
const STEPS: [&str; 4] = ["spawn", "reserve", "load", "claim"];

/// Parks more and more clones, and takes the steps beside them.
pub fn measure(template: &Template, counts: &[u32], runs: u32, report: &mut Report) -> Result<(), Error> {
    let mut counts: Vec<usize> = counts.iter().map(|count| *count as usize).collect();
    counts.sort_unstable();
    let mut crowd = Vec::new();
    for count in counts {
        while crowd.len() < count {
            crowd.push(template.parked()?);
        }
        let mut samples = STEPS.map(|step| Samples::new(format!("{step}, beside {count} parked")));
        for run in 0..=runs {
            let took = steps(template)?;
            // The first one is not counted.
            for (samples, took) in samples.iter_mut().zip(took).filter(|_| run > 0) {
                samples.push(took);
            }
        }
        samples.into_iter().for_each(|samples| report.add(samples));
    }
    Ok(())
}

fn steps(template: &Template) -> Result<[Duration; 4], Error> {
    fn timed<T>(step: impl FnOnce() -> Result<T, Error>) -> Result<(Duration, T), Error> {
        let begin = Instant::now();
        let done = step()?;
        Ok((begin.elapsed(), done))
    }
    let outside = template.outside()?;
    let (spawn, mut sandbox) = timed(|| template.spawn(outside))?;
    let (reserve, ()) = timed(|| template.reserve(&mut sandbox))?;
    let (load, ()) = timed(|| template.load(&mut sandbox))?;
    let begin = Instant::now();
    let mut claim = Duration::ZERO;
    template.claim(&mut sandbox)?;
    sandbox.wait(1, || claim = begin.elapsed())?;
    Ok([spawn, reserve, load, claim])
}
