//! Where the host API is offered: a unix socket for local tools, TLS with client certificates for the network.

use std::{
    fs, io,
    net::SocketAddr,
    os::unix::fs::{FileTypeExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use nix::unistd::{Gid, chown};
use thiserror::Error;
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio_stream::{Stream, StreamExt as _, wrappers::TcpListenerStream, wrappers::UnixListenerStream};
use tonic::{
    service::Routes,
    transport::{Certificate, Identity, Server, ServerTlsConfig},
};
use tracing::warn;

/// Calls at a time on one connection; more wait in their client.
const STREAMS: u32 = 1024;
const KEEPALIVE: Duration = Duration::from_secs(30);

/// A listener could not be opened.
#[derive(Debug, Error)]
pub enum ListenError {
    /// The socket.
    #[error("listening on {address}: {source}")]
    Bind {
        /// Where.
        address: String,
        /// Why not.
        source: io::Error,
    },
    /// A file of the TLS configuration.
    #[error("reading {path} for TLS: {source}")]
    TlsFile {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The TLS configuration as a whole.
    #[error(
        "the TLS certificate, key or client CA cannot be used; all are PEM files, see --tls-cert, --tls-key, --tls-client-ca"
    )]
    Tls(#[source] tonic::transport::Error),
    /// The server.
    #[error("serving the host API: {0}")]
    Serve(tonic::transport::Error),
}

/// Files of the TLS side.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// Certificate chain of this host, PEM.
    pub cert: PathBuf,
    /// Its key, PEM.
    pub key: PathBuf,
    /// Who may call: certificates signed by this CA, PEM.
    pub client_ca: PathBuf,
}

fn server() -> Server {
    Server::builder()
        .max_concurrent_streams(STREAMS)
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .http2_max_pending_accept_reset_streams(Some(64))
        .tcp_nodelay(true)
}

/// A unix socket that only root, and one group if it is given, may use.
pub fn unix(path: &Path, group: Option<u32>) -> Result<UnixListener, ListenError> {
    let failed = |source| ListenError::Bind {
        address: path.display().to_string(),
        source,
    };
    match fs::symlink_metadata(path) {
        // Left by a flintd that was killed: the lock file says that no other one runs.
        Ok(found) if found.file_type().is_socket() => fs::remove_file(path).map_err(failed)?,
        Ok(_) => {
            return Err(failed(io::Error::new(
                io::ErrorKind::AlreadyExists,
                "there is a file that is no socket",
            )));
        }
        Err(_) => {}
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    let mode = if group.is_some() { 0o660 } else { 0o600 };
    if let Some(group) = group {
        chown(path, None, Some(Gid::from_raw(group))).map_err(|error| failed(error.into()))?;
    }
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(failed)?;
    Ok(listener)
}

/// Connections of those who may: root, this process's own user, and the group. The socket's mode says so already; the
/// credentials say it of connections that were made before the mode was set.
fn admitted(listener: UnixListener, group: Option<u32>) -> impl Stream<Item = io::Result<UnixStream>> {
    let own = nix::unistd::geteuid().as_raw();
    UnixListenerStream::new(listener).filter_map(move |stream| {
        let stream = match stream {
            Ok(stream) => stream,
            Err(error) => return Some(Err(error)),
        };
        match stream.peer_cred() {
            Ok(peer) if peer.uid() == 0 || peer.uid() == own || may(&peer, group) => Some(Ok(stream)),
            Ok(peer) => {
                warn!(
                    uid = peer.uid(),
                    gid = peer.gid(),
                    "refused a connection to the unix socket"
                );
                None
            }
            Err(error) => {
                warn!(%error, "a connection without credentials was refused");
                None
            }
        }
    })
}

/// Whether a peer is in the group: its own group, or a supplementary one, which the socket's mode has checked.
fn may(peer: &tokio::net::unix::UCred, group: Option<u32>) -> bool {
    let Some(group) = group else { return false };
    if peer.gid() == group {
        return true;
    }
    let supplementary = peer
        .pid()
        .and_then(|pid| fs::read_to_string(format!("/proc/{pid}/status")).ok());
    let groups = supplementary
        .as_deref()
        .and_then(|text| text.lines().find_map(|line| line.strip_prefix("Groups:")));
    groups.is_some_and(|groups| groups.split_whitespace().any(|gid| gid.parse() == Ok(group)))
}

/// Serves the API on a unix socket until told to stop.
pub async fn serve_unix(
    listener: UnixListener,
    group: Option<u32>,
    routes: Routes,
    stop: impl Future<Output = ()>,
) -> Result<(), ListenError> {
    let incoming = admitted(listener, group);
    server()
        .add_routes(routes)
        .serve_with_incoming_shutdown(incoming, stop)
        .await
        .map_err(ListenError::Serve)
}

/// A TCP listener.
pub async fn tcp(address: SocketAddr) -> Result<TcpListener, ListenError> {
    let bound = TcpListener::bind(address).await;
    bound.map_err(|source| ListenError::Bind {
        address: address.to_string(),
        source,
    })
}

/// A server that lets a client without a certificate of the CA get no further than the handshake.
pub fn tls_server(files: &TlsFiles) -> Result<Server, ListenError> {
    let read = |path: &PathBuf| {
        fs::read(path).map_err(|source| ListenError::TlsFile {
            path: path.clone(),
            source,
        })
    };
    let tls = ServerTlsConfig::new()
        .identity(Identity::from_pem(read(&files.cert)?, read(&files.key)?))
        .client_ca_root(Certificate::from_pem(read(&files.client_ca)?))
        .timeout(Duration::from_secs(10));
    server().tls_config(tls).map_err(ListenError::Tls)
}

/// Serves the API over TLS until told to stop.
pub async fn serve_tls(
    listener: TcpListener,
    mut server: Server,
    routes: Routes,
    stop: impl Future<Output = ()>,
) -> Result<(), ListenError> {
    let incoming = TcpListenerStream::new(listener);
    server
        .add_routes(routes)
        .serve_with_incoming_shutdown(incoming, stop)
        .await
        .map_err(ListenError::Serve)
}
