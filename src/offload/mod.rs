//! Superpackets without I/O: checksums, the checked virtio-net header, cutting and merging.
//!
//! A superpacket is one packet of up to 64 KiB that stands for many: the headers are there once, and a header of the driver
//! ([`VnetHdr`]) says how it is to be cut into segments. The kernel hands them to a device with offloads instead of cutting them itself, and
//! takes them back in the same form.
//!
//! | module | what it does | kernel source with the same task |
//! |---|---|---|
//! | [`checksum`] | Internet checksums, whole and by what changed | `csum_partial`, RFC 1071, RFC 1624 |
//! | [`headers`] | finds the headers of a packet | `skb_flow_dissect` |
//! | [`vnet`] | checks what a driver's header claims of a packet | `virtio_net_hdr_to_skb` |
//! | [`coalesce`] | finds packets that go together as one superpacket | `inet_gro_receive`, `tcp_gro_receive`, `udp_gro_receive_segment` |
//! | [`split`] | cuts a superpacket, byte for byte like the kernel | `tcp_gso_segment`, `__udp_gso_segment`, `inet_gso_segment` |
//!
//! All of it works on byte slices, allocates nothing, and never panics, whatever the bytes are.

pub mod checksum;
pub mod coalesce;
pub mod headers;
mod set;
pub mod split;
pub mod vnet;

pub use checksum::Sum;
pub use coalesce::{GroTable, Group, Limits, Trust};
pub use headers::{HeaderFault, Headers, Link};
pub use set::Offloads;
pub use split::{Plan, Segments};
pub use vnet::{Gso, GsoType, Meta, VnetFault, VnetHdr};
