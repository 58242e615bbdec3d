//! A gRPC channel to flint-init, over the VMM's vsock socket.

use std::{io, path::PathBuf};

use flint_api::guest::PORT;
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};
use tonic::transport::{Channel, Endpoint};
use tower::service_fn;

/// Longest first line of an answer: "OK 4294967295\n" and some grace.
const MAX_ANSWER_BYTES: usize = 32;

/// A channel that is connected, and connects again whenever the connection was lost.
pub(super) async fn connect(vsock: PathBuf) -> Result<Channel, tonic::transport::Error> {
    endpoint()
        .connect_with_connector(service_fn(move |_| open(vsock.clone())))
        .await
}

/// The same, but it connects at its first use.
pub(super) fn connect_lazily(vsock: PathBuf) -> Channel {
    endpoint().connect_with_connector_lazy(service_fn(move |_| open(vsock.clone())))
}

/// The name is for HTTP's sake only: every connection goes to the socket.
fn endpoint() -> Endpoint {
    Endpoint::from_static("http://guest")
}

/// A byte stream to flint-init's port ("hybrid vsock": see BindVsock in vmm.proto).
async fn open(vsock: PathBuf) -> io::Result<TokioIo<UnixStream>> {
    let mut stream = UnixStream::connect(vsock).await?;
    stream.write_all(format!("CONNECT {PORT}\n").as_bytes()).await?;
    let mut answer = Vec::new();
    // Byte by byte: what follows the line belongs to gRPC already.
    while answer.last() != Some(&b'\n') {
        if answer.len() == MAX_ANSWER_BYTES {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the VMM's answer to CONNECT is too long",
            ));
        }
        answer.push(stream.read_u8().await?);
    }
    if !answer.starts_with(b"OK ") {
        return Err(io::Error::new(
            io::ErrorKind::ConnectionRefused,
            "nothing listens on flint-init's port",
        ));
    }
    Ok(TokioIo::new(stream))
}
