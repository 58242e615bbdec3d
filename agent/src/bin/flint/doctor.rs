//! `doctor`: what this host can do. It needs no flintd, and asks one that is there.

use clap::Args;
use flint_api::host::GetHostRequest;
use flintd::probe::{self, Check, Verdict};
use serde_json::json;

use crate::client::Client;
use crate::failure::Failure;
use crate::output::{self, Format};

/// Say what this host can and cannot do for Flint, and what to do about each lack.
///
/// Exits with 1 if something is missing that Flint cannot do without.
#[derive(Debug, Args)]
pub struct Doctor {}

impl Doctor {
    pub async fn execute(self, client: Result<Client, Failure>, format: Format) -> Result<u8, Failure> {
        let mut checks = probe::all();
        checks.push(flintd(client).await);
        match format {
            Format::Json => output::print_line(&to_json(&checks).to_string())?,
            Format::Text => checks.iter().try_for_each(print)?,
        }
        Ok(u8::from(checks.iter().any(|check| check.verdict == Verdict::Missing)))
    }
}

/// What flintd itself says: it may see another `/dev/kvm` than this program, and it alone knows its kernel.
async fn flintd(client: Result<Client, Failure>) -> Check {
    const NAME: &str = "flintd";
    const REMEDY: &str = "put that right; flintd goes on as it is";
    let answer = match client {
        Ok(client) => client.host().get_host(GetHostRequest {}).await.map_err(Failure::from),
        Err(failure) => Err(failure),
    };
    match answer.map(tonic::Response::into_inner) {
        Ok(host) if host.not_ready.is_empty() => {
            let pool = host.pool.unwrap_or_default();
            let parked = match pool.size {
                0 => String::new(),
                size => format!("; {} of {size} clones are parked for them", pool.parked),
            };
            let found = format!("version {} answers and can start pods{parked}", host.version);
            Check::good(NAME, found)
        }
        Ok(host) => {
            let (found, remedy) = host.not_ready.rsplit_once("; ").unwrap_or((&host.not_ready, REMEDY));
            Check::missing(NAME, format!("it answers, and cannot start pods: {found}"), remedy)
        }
        Err(failure) => {
            let (found, remedy) = failure.into_parts();
            Check::limited(NAME, found, remedy.unwrap_or_else(|| "see flintd's log".into()))
        }
    }
}

fn print(check: &Check) -> Result<(), Failure> {
    output::print_line(&format!(
        "{:<8} {:<20} {}",
        check.verdict.word(),
        check.name,
        check.found
    ))?;
    match &check.remedy {
        Some(remedy) => output::print_line(&format!("{:<30}-> {remedy}", "")),
        None => Ok(()),
    }
}

fn to_json(checks: &[Check]) -> serde_json::Value {
    let checks: Vec<_> = checks
        .iter()
        .map(|check| {
            json!({
                "name": check.name,
                "verdict": check.verdict.word(),
                "found": check.found,
                "remedy": check.remedy,
            })
        })
        .collect();
    json!({ "checks": checks })
}
