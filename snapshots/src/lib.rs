//! What a sandbox starts from: chunks, images as block devices made of them, and machine snapshots.
//!
//! ```text
//!   tar layers --layer::ingest--> LayerIndex + chunks --image::assemble--> Image (EROFS metadata + where data lies)
//!                                    |                                        |
//!                                    v                                        v  device::Table::build
//!                               chunk store (packs) <--device::Packs-- ImageDevice (block reads, verified)
//! ```
//!
//! The reading side ([`device`], [`chunk`]) is always there and small: flint-vmm uses it and nothing else. The writing side
//! is behind the feature `store` and serves flintd.

#[cfg(feature = "store")]
pub mod access;
mod bytes;
pub mod chunk;
pub mod device;
#[cfg(feature = "store")]
mod erofs;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
#[cfg(feature = "store")]
pub mod image;
#[cfg(feature = "store")]
pub mod images;
#[cfg(feature = "store")]
mod import;
#[cfg(feature = "store")]
pub mod layer;
#[cfg(feature = "store")]
pub mod machines;
#[cfg(feature = "store")]
pub mod registry;
#[cfg(feature = "store")]
pub mod store;
#[cfg(test)]
#[cfg(feature = "store")]
mod testing;
