//! nftables rules, applied by the `nft` program (nft(8)): one transaction at the start, one at the end.

use std::{fmt::Write as _, io, net::Ipv4Addr, process::Stdio};

use tokio::{io::AsyncWriteExt, process::Command};

use super::{
    Config, NetworkError,
    addresses::{TAP_PREFIX, mac_of, tap_name_of},
};

/// Sets up everything, replacing what an earlier flintd left, in one transaction: there is no moment without rules.
pub(super) async fn apply(config: &Config, allowed: &[Ipv4Addr]) -> Result<(), NetworkError> {
    nft("set up its rules", &ruleset(config, allowed)).await
}

/// Removes all rules.
pub(super) async fn remove() -> Result<(), NetworkError> {
    // `add` first, so that `delete` finds something.
    nft(
        "remove its rules",
        "add table inet flint\ndelete table inet flint\nadd table bridge flint\ndelete table bridge flint\n",
    )
    .await
}

/// What a sandbox may send from: its tap, its MAC, its address.
fn source(address: Ipv4Addr) -> String {
    let mac = mac_of(address).map(|byte| format!("{byte:02x}")).join(":");
    format!("{} . {mac} . {address}", tap_name_of(address))
}

/// The guard drops what comes from a tap and is neither IPv4 nor ARP, or names a source that is not the tap's own. IPv6 is
/// dropped too: guests have no IPv6 address yet, and router advertisements of a guest must not reach the host.
fn ruleset(config: &Config, allowed: &[Ipv4Addr]) -> String {
    let (range, bridge) = (config.range, &config.bridge);
    let mut elements = String::new();
    for address in allowed {
        // Writing to a String cannot fail.
        let _ = writeln!(elements, "add element bridge flint sources {{ {} }}", source(*address));
    }
    format!(
        r#"add table inet flint
delete table inet flint
table inet flint {{
    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr {range} oifname != "{bridge}" masquerade
    }}
}}
add table bridge flint
delete table bridge flint
table bridge flint {{
    set sources {{
        type ifname . ether_addr . ipv4_addr
    }}
    chain guard {{
        type filter hook prerouting priority -300; policy accept;
        iifname != "{TAP_PREFIX}*" accept
        ether type ip iifname . ether saddr . ip saddr @sources accept
        ether type arp iifname . ether saddr . arp saddr ip @sources iifname . arp saddr ether . arp saddr ip @sources accept
        drop
    }}
}}
{elements}"#
    )
}

async fn nft(action: &'static str, script: &str) -> Result<(), NetworkError> {
    let failed = |error: io::Error| NetworkError::System("run nft", error);
    let mut child = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(NetworkError::NoNft)?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(script.as_bytes()).await.map_err(failed)?;
    }
    let output = child.wait_with_output().await.map_err(failed)?;
    if output.status.success() {
        return Ok(());
    }
    Err(NetworkError::Nft {
        action,
        output: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    })
}
