//! Which flintd to talk to: this host's by its unix socket, or another one's by mutual TLS.

use std::error::Error;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity, Uri};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use crate::failure::Failure;

/// Longest wait for a connection over the network.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// What to do where the host did not like what it was shown.
const REFUSED: &str = "it did not take the certificate of --tls-cert, which must be valid today, made for clients, and signed by the CA of \
                       flintd's --tls-client-ca";

#[derive(Debug, Args)]
pub struct Target {
    /// Socket of this host's flintd.
    #[arg(
        long,
        global = true,
        env = "FLINT_SOCKET",
        default_value = "/run/flint/flintd.sock",
        value_name = "PATH"
    )]
    socket: PathBuf,

    /// Another host's flintd, instead of this host's; needs the three --tls options.
    #[arg(long, global = true, env = "FLINT_HOST", value_name = "NAME:PORT")]
    host: Option<String>,

    /// Certificate of the CA that signed that host's, PEM.
    #[arg(long, global = true, env = "FLINT_TLS_CA", value_name = "FILE")]
    tls_ca: Option<PathBuf>,

    /// Certificate to show to that host, PEM; for clients, signed by the CA that it was given.
    #[arg(long, global = true, env = "FLINT_TLS_CERT", value_name = "FILE")]
    tls_cert: Option<PathBuf>,

    /// Key of the certificate, PEM.
    #[arg(long, global = true, env = "FLINT_TLS_KEY", value_name = "FILE")]
    tls_key: Option<PathBuf>,
}

impl Target {
    /// A connection that answers.
    pub async fn connect(&self) -> Result<Channel, Failure> {
        match &self.host {
            Some(host) => self.connect_tls(host).await,
            None => connect_unix(&self.socket).await,
        }
    }

    async fn connect_tls(&self, host: &str) -> Result<Channel, Failure> {
        let failure = |why: &str| Failure::new(format!("cannot reach flintd at {host}: {why}"));
        let failed = |error: &dyn Error| failure(&flintd::chain(error)).hint(advice(error));
        let endpoint = Endpoint::from_shared(format!("https://{host}"))
            .map_err(|_| Failure::new(format!("{host:?} is no NAME:PORT")).hint("for example --host flint-3.lan:7443"))?
            .tls_config(self.tls()?)
            .map_err(|error| failed(&error))?
            .connect_timeout(CONNECT_TIMEOUT);
        let channel = endpoint.connect().await.map_err(|error| failed(&error))?;
        // In TLS 1.3 a client learns only by the first answer whether its certificate was taken (RFC 8446, 4.4.2.4).
        let mut health = HealthClient::new(channel.clone());
        match health.check(HealthCheckRequest::default()).await {
            // No server has sent a status that has a source.
            Err(status) if status.source().is_some() => {
                Err(failure("it closed the connection after the TLS handshake").hint(REFUSED))
            }
            _ => Ok(channel),
        }
    }

    fn tls(&self) -> Result<ClientTlsConfig, Failure> {
        let read = |file: &Option<PathBuf>, option: &str| {
            let Some(file) = file else {
                let hint = "--host goes with --tls-ca, --tls-cert and --tls-key";
                return Err(Failure::new(format!("{option} is missing")).hint(hint));
            };
            std::fs::read(file).map_err(|error| Failure::local(&format!("read {} for {option}", file.display()), error))
        };
        let ca = Certificate::from_pem(read(&self.tls_ca, "--tls-ca")?);
        let identity = Identity::from_pem(read(&self.tls_cert, "--tls-cert")?, read(&self.tls_key, "--tls-key")?);
        Ok(ClientTlsConfig::new().ca_certificate(ca).identity(identity))
    }
}

/// What to do about a connection that did not come about.
fn advice(error: &dyn Error) -> &'static str {
    let text = flintd::chain(error);
    let has = |word: &str| text.contains(word);
    if has("fatal alert") {
        REFUSED
    } else if has("certificate") {
        "the host's certificate must be signed by the CA of --tls-ca, and be made for the name or address in --host"
    } else if has("PEM") || has("key") {
        "--tls-ca, --tls-cert and --tls-key are PEM files, the last two of one pair"
    } else {
        "does flintd run there with --listen-tls, and does the network let this through?"
    }
}

async fn connect_unix(socket: &Path) -> Result<Channel, Failure> {
    let path = socket.to_owned();
    let connector = tower::service_fn(move |_: Uri| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    // The URI is never resolved: the connector above knows where to go.
    let channel = Endpoint::from_static("http://flintd")
        .connect_with_connector(connector)
        .await;
    match channel {
        Ok(channel) => Ok(channel),
        Err(_) => Err(unreachable_daemon(socket).await),
    }
}

/// Says why the daemon cannot be reached; the transport's own error does not.
async fn unreachable_daemon(socket: &Path) -> Failure {
    let failure = |why: &str| Failure::new(format!("cannot reach flintd at {}: {why}", socket.display()));
    match UnixStream::connect(socket).await {
        Err(error) if error.kind() == ErrorKind::NotFound => failure("there is no such socket")
            .hint("start the daemon (`flintd`, as root), or name its socket with --socket or FLINT_SOCKET"),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => failure("nobody listens there")
            .hint("flintd has ended; start it again: its pods go on running and it finds them"),
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            failure("permission denied").hint("run as root or as a member of flintd's socket group")
        }
        Err(error) => failure(&error.to_string()),
        Ok(_) => failure("it accepts connections and does not speak gRPC")
            .hint("it serves root, the user that it runs as, and --socket-group; or it is another program"),
    }
}
