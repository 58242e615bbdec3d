//! The header of a vsock packet (virtio 1.3, 5.10.6).

/// struct virtio_vsock_hdr.
pub const HEADER_BYTES: usize = 44;
/// VIRTIO_VSOCK_TYPE_STREAM.
pub const STREAM: u16 = 1;
/// The host's context id.
pub const HOST_CID: u64 = 2;
/// VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE: the sender receives no more.
pub const NO_RECEIVE: u32 = 1;
/// VIRTIO_VSOCK_SHUTDOWN_F_SEND: the sender sends no more.
pub const NO_SEND: u32 = 2;

/// What a packet is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Op {
    /// Asks for a connection.
    Request = 1,
    /// Grants it.
    Response = 2,
    /// Refuses or ends it.
    Reset = 3,
    /// Ends one direction or both.
    Shutdown = 4,
    /// Carries data.
    Data = 5,
    /// Tells buffer space.
    CreditUpdate = 6,
    /// Asks for buffer space to be told.
    CreditRequest = 7,
}

impl Op {
    fn from_wire(value: u16) -> Option<Self> {
        Some(match value {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// A packet's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Sender's context id.
    pub source_cid: u64,
    /// Receiver's context id.
    pub destination_cid: u64,
    /// Sender's port.
    pub source_port: u32,
    /// Receiver's port.
    pub destination_port: u32,
    /// Bytes of payload.
    pub len: u32,
    /// Stream or another kind.
    pub kind: u16,
    /// What it is for; `None`: nothing known.
    pub op: Option<Op>,
    /// Shutdown flags.
    pub flags: u32,
    /// All of the sender's buffer space.
    pub buffer_size: u32,
    /// Bytes that the sender has taken out of its buffer, counted modulo 2^32.
    pub forwarded: u32,
}

impl Header {
    /// From the wire.
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Self {
        let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        Self {
            source_cid: u64_at(0),
            destination_cid: u64_at(8),
            source_port: u32_at(16),
            destination_port: u32_at(20),
            len: u32_at(24),
            kind: u16_at(28),
            op: Op::from_wire(u16_at(30)),
            flags: u32_at(32),
            buffer_size: u32_at(36),
            forwarded: u32_at(40),
        }
    }

    /// To the wire.
    pub fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..8].copy_from_slice(&self.source_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.destination_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.source_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.destination_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.map_or(0, |op| op as u16).to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buffer_size.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.forwarded.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives_the_wire() {
        let header = Header {
            source_cid: 0x0102_0304_0506_0708,
            destination_cid: HOST_CID,
            source_port: 1,
            destination_port: u32::MAX,
            len: 3,
            kind: STREAM,
            op: Some(Op::CreditRequest),
            flags: 4,
            buffer_size: 5,
            forwarded: 6,
        };
        assert_eq!(Header::parse(&header.to_bytes()), header);
    }
}
