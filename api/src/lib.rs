//! Flint's contracts: what passes between its parts, as generated from the `.proto` files of this crate.
//!
//! ```text
//! flint, flint-node --[host]--> flintd --[vmm]--> flint-vmm
//!                                  +-----[guest]-------------> flint-init
//! ```
//!
//! The `.proto` files are the reference; their comments say what each field means.

/// Host API, `flint.host.v1`: pods, streams and images of one host, over gRPC.
#[cfg(feature = "host")]
pub mod host {
    #![allow(missing_docs, clippy::all, clippy::pedantic)]
    tonic::include_proto!("flint.host.v1");
    /// The contract's descriptors, for gRPC server reflection.
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/host.bin"));
}

#[cfg(feature = "kubernetes")]
pub mod kubernetes;

#[cfg(any(feature = "host", feature = "guest"))]
mod secrecy;

/// Guest API, `flint.guest.v1`: what flint-init offers to flintd, as gRPC over vsock.
#[cfg(feature = "guest")]
pub mod guest {
    #![allow(missing_docs, clippy::all, clippy::pedantic)]
    tonic::include_proto!("flint.guest.v1");
    /// Port that flint-init listens on in the guest, and dials on the host when it is ready.
    pub const PORT: u32 = 1024;
}

/// VMM control, `flint.vmm.v1`: packets with file descriptors between flintd and flint-vmm.
#[cfg(feature = "vmm")]
pub mod vmm {
    #![allow(missing_docs, clippy::all, clippy::pedantic)]
    include!(concat!(env!("OUT_DIR"), "/flint.vmm.v1.rs"));
    /// Largest packet in either direction.
    pub const MAX_PACKET: usize = 64 << 10;
    /// Most file descriptors in one packet.
    pub const MAX_FDS: usize = 64;
    /// flint-vmm's process exit code is this plus the [`ExitReason`].
    pub const EXIT_CODE_BASE: i32 = 64;
}
