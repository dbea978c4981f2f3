//! What is still to be done with a packet before it can go over a wire.

use crate::offload::{Gso, GsoType, Headers, Meta, VnetFault};

/// What a driver said of a packet, as far as it was believed, beside the packet's bytes. Places are offsets in its slot, so that they stay right
/// while the packet's ends move.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Shape {
    #[default]
    Plain,
    Verified,
    Unfinished {
        start: u32,
        /// From there on.
        field: u16,
    },
    Gso {
        kind: GsoType,
        ecn: bool,
        size: u16,
        /// Where the IP header begins.
        network: u32,
        /// The errno with which a segment that stood in front was refused; 0 if none was.
        torn: u16,
    },
}

impl Shape {
    /// Of a packet that begins at `at` in its slot.
    #[inline]
    pub(crate) fn of(meta: &Meta, at: u32) -> Self {
        match *meta {
            Meta::Plain => Self::Plain,
            Meta::Verified => Self::Verified,
            Meta::Unfinished { start, field } => Self::Unfinished {
                start: at + start as u32,
                field: (field - start) as u16,
            },
            Meta::Gso(Gso {
                kind,
                size,
                ecn,
                ref headers,
            }) => Self::Gso {
                kind,
                ecn,
                size,
                network: at + headers.network as u32,
                torn: 0,
            },
        }
    }

    /// What it says of a packet that begins at `at` in its slot, held against that packet.
    #[inline]
    pub(crate) fn meta(self, packet: &[u8], at: u32) -> Result<Meta, VnetFault> {
        match self {
            Self::Plain => Ok(Meta::Plain),
            Self::Verified => Ok(Meta::Verified),
            Self::Unfinished { start, field } => {
                let start = start.checked_sub(at).ok_or(VnetFault::Checksum)? as usize;
                let field = start + usize::from(field);
                // The driver's header has 16 bits for each.
                if field + 2 > packet.len() || field > usize::from(u16::MAX) {
                    return Err(VnetFault::Checksum);
                }
                Ok(Meta::Unfinished { start, field })
            }
            Self::Gso {
                kind,
                ecn,
                size,
                network,
                ..
            } => {
                let network = network.checked_sub(at).ok_or(VnetFault::Length)? as usize;
                let headers = Headers::parse_at(packet, network).map_err(VnetFault::Headers)?;
                let gso = Gso {
                    kind,
                    size,
                    ecn,
                    headers,
                };
                gso.check(packet)?;
                Ok(Meta::Gso(gso))
            }
        }
    }

    /// The same of a copy that begins at `to` in its slot instead of at `from`. What did not fit does not fit the copy either.
    pub(crate) fn moved(self, from: u32, to: u32) -> Self {
        let moved = |place: u32| (place + to).saturating_sub(from);
        match self {
            Self::Unfinished { start, field } => Self::Unfinished {
                start: moved(start),
                field,
            },
            Self::Gso {
                kind,
                ecn,
                size,
                network,
                torn,
            } => Self::Gso {
                kind,
                ecn,
                size,
                network: moved(network),
                torn,
            },
            whole => whole,
        }
    }

    /// After the packet's bytes or bounds changed: what was verified is so no longer.
    #[inline]
    pub(crate) fn unverify(&mut self) {
        if *self == Self::Verified {
            *self = Self::Plain;
        }
    }

    #[inline]
    pub(crate) fn is_gso(self) -> bool {
        matches!(self, Self::Gso { .. })
    }
}
