//! Doors for the fuzz targets (feature `fuzzing`): parsers that are no part of the public API, each fed with bytes, and ways
//! to make digests good again, so that damage gets past them.

use crate::chunk::ChunkSink;
use crate::device;
use crate::images::ingest;
use crate::layer::{self, LayerIndex};
use crate::machines;
use crate::registry::{self, Challenge, Choice, Digest};

/// Reads a layer as it is stored: gzip, zstd or plain.
pub fn compressed_layer(stored: &[u8], sink: &mut impl ChunkSink, limits: &layer::Limits) -> Option<LayerIndex> {
    let unpacked = ingest::unpack(&mut &stored[..], sink, limits);
    unpacked.result.ok().map(|(index, _)| index)
}

/// How a layer can be read in part, encoded.
pub fn layer_access(stored: &[u8], sink: &mut impl ChunkSink, limits: &layer::Limits) -> Option<Vec<u8>> {
    let unpacked = ingest::unpack(&mut &stored[..], sink, limits);
    let read = unpacked.into_access(Digest::of(stored), stored.len() as u64);
    read.ok().map(|(_, access)| access.encode())
}

/// Reads a manifest or an index, and chooses out of the latter.
pub fn registry_document(bytes: &[u8]) {
    let limits = registry::Limits::default();
    if let Ok(registry::Document::Index(choices)) = registry::parse_document(bytes, "an image", &limits) {
        let _ = Choice::pick(&choices, "an image");
    }
}

/// Reads an image's configuration.
pub fn image_configuration(bytes: &[u8]) {
    if let Ok((configuration, _)) = registry::parse_config(bytes, 1, "an image") {
        let _ = crate::images::ImageConfig::from(&configuration);
    }
}

/// Looks a registry up in docker's configuration.
pub fn docker_configuration(bytes: &[u8], host: &str) {
    let _ = registry::docker_login(bytes, host);
}

/// Reads a `WWW-Authenticate` header. Where a token is to be had from is told.
pub fn challenge(header: &str) -> Option<String> {
    match Challenge::parse(header, "team/app") {
        Ok(Challenge::Bearer(url)) => Some(url.into()),
        Ok(Challenge::Basic) | Err(_) => None,
    }
}

/// Makes the digests of a device table good, as somebody would who wants to deceive. Does nothing to what is too short.
pub fn seal_table(table: &mut [u8]) {
    device::seal(table);
}

/// As [`seal_table`], for an encoded layer index.
pub fn seal_index(index: &mut [u8]) {
    layer::seal(index);
}

/// Reads a machine snapshot's record, as a registry has it; whether what was read comes back when it is written and read again.
pub fn machine_record(bytes: &[u8]) -> bool {
    machines::comes_back(bytes)
}
