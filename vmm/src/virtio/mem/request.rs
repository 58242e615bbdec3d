//! Requests and responses of virtio-mem (virtio 1.3, 5.15.6), little endian:
//!
//! ```text
//! request   0 type  2 padding  8 address  16 number of blocks  18 padding   24 bytes
//! response  0 type  2 padding  8 state                                      10 bytes
//! ```

pub(super) const REQUEST_BYTES: usize = 24;
pub(super) const RESPONSE_BYTES: usize = 10;

/// What a driver asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    Plug { address: u64, blocks: u16 },
    Unplug { address: u64, blocks: u16 },
    UnplugAll,
    State { address: u64, blocks: u16 },
    Unknown,
}

impl Request {
    pub(super) fn parse(bytes: &[u8; REQUEST_BYTES]) -> Self {
        let short = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let mut address = [0; 8];
        address.copy_from_slice(&bytes[8..16]);
        let (address, blocks) = (u64::from_le_bytes(address), short(16));
        match short(0) {
            0 => Self::Plug { address, blocks },
            1 => Self::Unplug { address, blocks },
            2 => Self::UnplugAll,
            3 => Self::State { address, blocks },
            _ => Self::Unknown,
        }
    }
}

/// What it is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Response {
    /// ACK.
    Done,
    /// ACK, and the state that was asked for.
    Plugged,
    Unplugged,
    Mixed,
    /// NACK: it would be more than was requested.
    Refused,
    /// Try again.
    Busy,
    /// The request makes no sense.
    Error,
}

impl Response {
    pub(super) fn to_bytes(self) -> [u8; RESPONSE_BYTES] {
        const ACK: u8 = 0;
        let (kind, state) = match self {
            Self::Done | Self::Plugged => (ACK, 0),
            Self::Unplugged => (ACK, 1),
            Self::Mixed => (ACK, 2),
            Self::Refused => (1, 0),
            Self::Busy => (2, 0),
            Self::Error => (3, 0),
        };
        [kind, 0, 0, 0, 0, 0, 0, 0, state, 0]
    }
}
