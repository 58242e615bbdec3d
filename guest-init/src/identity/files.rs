//! hostname, machine-id, resolv.conf and hosts: written once for the guest, bound into every container.

use std::{fmt::Write as _, fs, net::IpAddr, path::Path};

use flint_api::guest::{AdoptIdentityRequest, Dns};

use super::IdentityError;
use crate::paths;

/// Linux' limit (HOST_NAME_MAX).
const MAX_HOSTNAME: usize = 64;

/// Refuses values that would say something else in the file that they end up in.
pub fn check(request: &AdoptIdentityRequest) -> Result<(), IdentityError> {
    check_hostname("hostname", &request.hostname)?;
    let is_hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    if request.machine_id.len() != 32 || !request.machine_id.bytes().all(is_hex) {
        return Err(IdentityError::invalid(
            "machine_id",
            "must be 32 lower-case hexadecimal digits (machine-id(5))",
        ));
    }
    if let Some(dns) = &request.dns {
        for (index, server) in dns.nameservers.iter().enumerate() {
            check_ip(format!("dns.nameservers[{index}]"), server)?;
        }
        for (field, words) in [("searches", &dns.searches), ("options", &dns.options)] {
            for (index, word) in words.iter().enumerate() {
                check_word(format!("dns.{field}[{index}]"), word)?;
            }
        }
    }
    for (index, alias) in request.host_aliases.iter().enumerate() {
        check_ip(format!("host_aliases[{index}].ip"), &alias.ip)?;
        for (at, name) in alias.hostnames.iter().enumerate() {
            check_word(format!("host_aliases[{index}].hostnames[{at}]"), name)?;
        }
    }
    Ok(())
}

fn check_hostname(field: &str, name: &str) -> Result<(), IdentityError> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'.';
    if name.is_empty() || name.len() > MAX_HOSTNAME || !name.bytes().all(allowed) {
        let problem = format!("{name:?} is not a host name of 1 to {MAX_HOSTNAME} letters, digits, '-' and '.'");
        return Err(IdentityError::invalid(field, problem));
    }
    Ok(())
}

fn check_ip(field: String, text: &str) -> Result<(), IdentityError> {
    match text.parse::<IpAddr>() {
        Ok(_) => Ok(()),
        Err(_) => Err(IdentityError::invalid(field, format!("{text:?} is not an IP address"))),
    }
}

fn check_word(field: String, word: &str) -> Result<(), IdentityError> {
    if word.is_empty() || word.chars().any(|c| c.is_whitespace() || c.is_control() || c == '#') {
        return Err(IdentityError::invalid(field, format!("{word:?} is not a single word")));
    }
    Ok(())
}

/// Writes the files.
pub fn write(request: &AdoptIdentityRequest, addresses: &[IpAddr]) -> Result<(), IdentityError> {
    let files = [
        ("hostname", format!("{}\n", request.hostname)),
        ("machine-id", format!("{}\n", request.machine_id)),
        ("resolv.conf", resolv_conf(request.dns.as_ref())),
        ("hosts", hosts(request, addresses)),
    ];
    for (name, text) in files {
        // In place, not by rename: containers have the inode bound, and see the new text.
        let path = Path::new(paths::ETC).join(name);
        fs::write(&path, text).map_err(|source| IdentityError::File {
            path: path.display().to_string(),
            source,
        })?;
    }
    // The guest's own view, for its resolver and for whoever looks around in a debug shell.
    for name in ["hostname", "machine-id", "resolv.conf", "hosts"] {
        let link = Path::new("/etc").join(name);
        match std::os::unix::fs::symlink(Path::new(paths::ETC).join(name), &link) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(IdentityError::File {
                    path: link.display().to_string(),
                    source: error,
                });
            }
            _ => {}
        }
    }
    Ok(())
}

fn resolv_conf(dns: Option<&Dns>) -> String {
    let mut text = String::new();
    let Some(dns) = dns else { return text };
    if !dns.searches.is_empty() {
        let _ = writeln!(text, "search {}", dns.searches.join(" "));
    }
    for server in &dns.nameservers {
        let _ = writeln!(text, "nameserver {server}");
    }
    if !dns.options.is_empty() {
        let _ = writeln!(text, "options {}", dns.options.join(" "));
    }
    text
}

fn hosts(request: &AdoptIdentityRequest, addresses: &[IpAddr]) -> String {
    let mut text = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n".to_owned();
    let own: Vec<String> = addresses.iter().map(ToString::to_string).collect();
    // A pod without a network still resolves its own name.
    for address in if own.is_empty() {
        vec!["127.0.0.1".to_owned()]
    } else {
        own
    } {
        let _ = writeln!(text, "{address}\t{}", request.hostname);
    }
    for alias in &request.host_aliases {
        let _ = writeln!(text, "{}\t{}", alias.ip, alias.hostnames.join("\t"));
    }
    text
}

#[cfg(test)]
mod tests {
    use flint_api::guest::HostAlias;

    use super::*;

    fn request() -> AdoptIdentityRequest {
        AdoptIdentityRequest {
            hostname: "web-0".into(),
            machine_id: "0123456789abcdef0123456789abcdef".into(),
            dns: Some(Dns {
                nameservers: vec!["10.0.0.10".into()],
                searches: vec!["a.svc".into(), "svc".into()],
                options: vec!["ndots:5".into()],
            }),
            host_aliases: vec![HostAlias {
                ip: "10.1.1.1".into(),
                hostnames: vec!["db".into(), "db.local".into()],
            }],
            ..AdoptIdentityRequest::default()
        }
    }

    #[test]
    fn files_say_what_the_request_says() {
        let request = request();
        check(&request).unwrap();
        assert_eq!(
            resolv_conf(request.dns.as_ref()),
            "search a.svc svc\nnameserver 10.0.0.10\noptions ndots:5\n"
        );
        let hosts = hosts(&request, &["10.88.0.5".parse().unwrap()]);
        assert!(
            hosts.contains("10.88.0.5\tweb-0\n") && hosts.ends_with("10.1.1.1\tdb\tdb.local\n"),
            "{hosts}"
        );
    }

    #[test]
    fn values_that_would_add_lines_are_refused_by_field() {
        let mut bad = request();
        bad.host_aliases[0].hostnames[1] = "x\n6.6.6.6 bank".into();
        assert!(
            check(&bad)
                .unwrap_err()
                .to_string()
                .starts_with("host_aliases[0].hostnames[1]:")
        );
        let mut bad = request();
        bad.dns.as_mut().unwrap().nameservers[0] = "10.0.0.10\nnameserver 6.6.6.6".into();
        assert!(check(&bad).unwrap_err().to_string().starts_with("dns.nameservers[0]:"));
        for hostname in ["", "a b", "ü", "x\n", &"h".repeat(65)] {
            assert!(
                check(&AdoptIdentityRequest {
                    hostname: hostname.into(),
                    ..request()
                })
                .is_err()
            );
        }
        for machine_id in ["", "0123", "0123456789ABCDEF0123456789abcdef"] {
            assert!(
                check(&AdoptIdentityRequest {
                    machine_id: machine_id.into(),
                    ..request()
                })
                .is_err()
            );
        }
    }

    #[test]
    fn a_pod_without_network_resolves_its_own_name() {
        assert!(hosts(&request(), &[]).contains("127.0.0.1\tweb-0\n"));
    }
}
