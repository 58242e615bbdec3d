//! struct virtio_net_hdr (virtio 1.3, 5.1.6), which goes before each frame on the ring and on the tap alike.

use virtio_bindings::virtio_net as net;

use crate::virtio::feature;

/// Its size for a driver of virtio 1, and for the tap.
pub(super) const HEADER_BYTES: usize = 12;
/// The largest frame of a guest or host that leaves segmentation to the other side, with its header (5.1.6.3.1).
pub(super) const MAX_FRAME_BYTES: usize = 65_562;

const FLAGS: usize = 0;
const GSO_TYPE: usize = 1;
const NUM_BUFFERS: std::ops::Range<usize> = 10..12;

/// Which features allow the sender of a frame to leave what to its receiver.
pub(super) struct Offloads {
    checksum: u32,
    tcp4: u32,
    tcp6: u32,
}

/// What the driver may leave to the host (5.1.6.2).
pub(super) const FROM_GUEST: Offloads = Offloads {
    checksum: net::VIRTIO_NET_F_CSUM,
    tcp4: net::VIRTIO_NET_F_HOST_TSO4,
    tcp6: net::VIRTIO_NET_F_HOST_TSO6,
};

/// What the host may leave to the driver (5.1.6.4).
pub(super) const TO_GUEST: Offloads = Offloads {
    checksum: net::VIRTIO_NET_F_GUEST_CSUM,
    tcp4: net::VIRTIO_NET_F_GUEST_TSO4,
    tcp6: net::VIRTIO_NET_F_GUEST_TSO6,
};

impl Offloads {
    /// Whether a frame leaves to its receiver only what was negotiated. A frame shorter than its header leaves nothing
    /// whole.
    pub(super) fn allow(&self, features: u64, frame: &[u8]) -> bool {
        let (Some(flags), Some(gso_type)) = (frame.get(FLAGS), frame.get(GSO_TYPE)) else {
            return false;
        };
        let has = |bit| features & feature(bit) != 0;
        let checksum = u32::from(*flags) & net::VIRTIO_NET_HDR_F_NEEDS_CSUM == 0 || has(self.checksum);
        // With the bit for ECN, which is not on offer, it is none of these.
        let segments = match u32::from(*gso_type) {
            net::VIRTIO_NET_HDR_GSO_NONE => true,
            net::VIRTIO_NET_HDR_GSO_TCPV4 => has(self.tcp4),
            net::VIRTIO_NET_HDR_GSO_TCPV6 => has(self.tcp6),
            _ => false,
        };
        checksum && segments
    }
}

/// Completes the header of a frame from the tap: on how many buffers it lies (one, unless buffers are merged), and no flag
/// that the driver did not ask for (5.1.6.4.1).
pub(super) fn complete(frame: &mut [u8], features: u64, buffers: u16) {
    if let Some(count) = frame.get_mut(NUM_BUFFERS) {
        count.copy_from_slice(&buffers.to_le_bytes());
    }
    if let Some(flags) = frame.get_mut(FLAGS)
        && features & feature(net::VIRTIO_NET_F_GUEST_CSUM) == 0
    {
        *flags = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_leaves_to_its_receiver_only_what_was_negotiated() {
        let header = |flags: u32, gso: u32| [u8::try_from(flags).unwrap(), u8::try_from(gso).unwrap()];
        let csum = header(net::VIRTIO_NET_HDR_F_NEEDS_CSUM, net::VIRTIO_NET_HDR_GSO_NONE);
        let tcp4 = header(net::VIRTIO_NET_HDR_F_NEEDS_CSUM, net::VIRTIO_NET_HDR_GSO_TCPV4);
        let tcp6 = header(net::VIRTIO_NET_HDR_F_NEEDS_CSUM, net::VIRTIO_NET_HDR_GSO_TCPV6);
        let udp = header(net::VIRTIO_NET_HDR_F_NEEDS_CSUM, net::VIRTIO_NET_HDR_GSO_UDP);
        let with_csum = feature(net::VIRTIO_NET_F_CSUM);
        let with_tcp4 = with_csum | feature(net::VIRTIO_NET_F_HOST_TSO4);
        let all = with_tcp4 | feature(net::VIRTIO_NET_F_HOST_TSO6);
        assert!(FROM_GUEST.allow(0, &[0, 0]) && !FROM_GUEST.allow(0, &csum));
        assert!(FROM_GUEST.allow(with_csum, &csum) && !FROM_GUEST.allow(with_csum, &tcp4));
        assert!(FROM_GUEST.allow(with_tcp4, &tcp4) && !FROM_GUEST.allow(with_tcp4, &tcp6));
        assert!(FROM_GUEST.allow(all, &tcp6) && !FROM_GUEST.allow(all, &udp));
        assert!(!FROM_GUEST.allow(u64::MAX, &[0]), "cut short");
        assert!(!TO_GUEST.allow(all, &csum), "the other direction's features");
    }

    #[test]
    fn a_driver_without_checksums_sees_no_flags() {
        let mut frame = [0xff; 14];
        complete(&mut frame, 0, 0x0203);
        assert_eq!(frame[FLAGS], 0);
        assert_eq!(frame[NUM_BUFFERS], [3, 2]);
        assert_eq!(frame[12..], [0xff; 2]);
        complete(&mut [0; 3], 0, 1);
    }
}
