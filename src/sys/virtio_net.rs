//! The header that drivers and packet sockets put in front of packets (linux/virtio_net.h).

use std::mem::size_of;

/// `struct virtio_net_hdr`. All fields in the machine's order.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(non_camel_case_types)]
pub(crate) struct virtio_net_hdr {
    pub(crate) flags: u8,
    pub(crate) gso_type: u8,
    pub(crate) hdr_len: u16,
    pub(crate) gso_size: u16,
    pub(crate) csum_start: u16,
    pub(crate) csum_offset: u16,
}

const _: () = assert!(size_of::<virtio_net_hdr>() == virtio_net_hdr::LEN);

impl virtio_net_hdr {
    pub(crate) const LEN: usize = 10;
    /// `flags`: the checksum from `csum_start` on is to be finished.
    pub(crate) const F_NEEDS_CSUM: u8 = 1;
    /// `flags`: the checksum was verified.
    pub(crate) const F_DATA_VALID: u8 = 2;
    pub(crate) const GSO_NONE: u8 = 0;
    pub(crate) const GSO_TCPV4: u8 = 1;
    pub(crate) const GSO_TCPV6: u8 = 4;
    /// `gso_type`: UDP payloads of `gso_size` bytes each, behind one header. Packet sockets take it since Linux 6.2.
    pub(crate) const GSO_UDP_L4: u8 = 5;
    /// `gso_type`, beside one of the TCP types: the first segment alone has CWR.
    pub(crate) const GSO_ECN: u8 = 0x80;

    pub(crate) fn from_bytes(bytes: [u8; Self::LEN]) -> Self {
        let word = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        Self {
            flags: bytes[0],
            gso_type: bytes[1],
            hdr_len: word(2),
            gso_size: word(4),
            csum_start: word(6),
            csum_offset: word(8),
        }
    }

    pub(crate) fn to_bytes(self) -> [u8; Self::LEN] {
        let Self {
            flags,
            gso_type,
            hdr_len,
            gso_size,
            csum_start,
            csum_offset,
        } = self;
        let mut bytes = [flags, gso_type, 0, 0, 0, 0, 0, 0, 0, 0];
        for (at, field) in [(2, hdr_len), (4, gso_size), (6, csum_start), (8, csum_offset)] {
            bytes[at..at + 2].copy_from_slice(&field.to_ne_bytes());
        }
        bytes
    }
}
