//! Floor 2: packet memory. One arena per worker, divided into slots; a [`PacketBuf`] is a range of a slot.
//!
//! ```text
//! slot = | hidden reserve (vnet header, alignment) | headroom | packet ………………… | tailroom |
//! ```
//!
//! Every byte of the arena is at any time in exactly one of three hands: free (the arena's), lent to the kernel (the ring's), or part
//! of one packet view (the user's). That is what makes the slices of a [`PacketBuf`] sound.

mod arena;
mod batch;
mod packet;
mod remote;
mod shape;

pub use crate::sys::ancillary::LocalAddr;
#[cfg(test)]
pub(crate) use arena::Shared;
pub use arena::leaked_arenas;
pub(crate) use arena::{
    Account, Arena, ArenaConfig, HIDDEN_RESERVE, LARGE_PACKET, LINK_HEADER, MOST_ACCOUNTS, SizeClass, leak_memory,
};
pub use batch::{Batch, Drain};
pub use packet::{NoRoom, PacketBuf};
pub use remote::RemoteBuf;
pub(crate) use shape::Shape;
