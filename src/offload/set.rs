//! Which offloads a device has.

use std::fmt;
use std::ops::{BitOr, BitOrAssign, Sub};

/// A set of offloads: what the kernel may hand over unfinished or uncut, and what it takes so.
///
/// ```
/// use tun_driver::Offloads;
///
/// let wanted = Offloads::TSO4 | Offloads::TSO6;
/// assert!(wanted.contains(Offloads::CSUM)); // which they need
/// assert_eq!((Offloads::all() - Offloads::USO).to_string(), "csum tso4 tso6 tso-ecn");
/// ```
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Offloads(u8);

const CSUM: u8 = 1;
const TSO4: u8 = 2;
const TSO6: u8 = 4;
const TSO_ECN: u8 = 8;
const USO: u8 = 16;

impl Offloads {
    /// Checksums are left to be finished (`TUN_F_CSUM`).
    pub const CSUM: Self = Self(CSUM);
    /// Superpackets of TCP over IPv4 (`TUN_F_TSO4`), and with them `CSUM`.
    pub const TSO4: Self = Self(CSUM | TSO4);
    /// Superpackets of TCP over IPv6 (`TUN_F_TSO6`), and with them `CSUM`.
    pub const TSO6: Self = Self(CSUM | TSO6);
    /// Superpackets of TCP of which the first segment alone has CWR (`TUN_F_TSO_ECN`). Says nothing without TSO4 or TSO6.
    pub const TSO_ECN: Self = Self(CSUM | TSO_ECN);
    /// Superpackets of UDP over both (`TUN_F_USO4`, `TUN_F_USO6`; Linux 6.2), and with them `CSUM`.
    pub const USO: Self = Self(CSUM | USO);

    /// No offloads.
    pub const fn none() -> Self {
        Self(0)
    }

    /// All that there are.
    pub const fn all() -> Self {
        Self(CSUM | TSO4 | TSO6 | TSO_ECN | USO)
    }

    /// Whether all of `other` is in it.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether there is none.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether there are superpackets in it.
    pub const fn has_superpackets(self) -> bool {
        self.0 & (TSO4 | TSO6 | USO) != 0
    }

    pub(crate) const fn bits(self) -> u8 {
        self.0
    }

    /// Of bits that [`bits`](Self::bits) gave.
    pub(crate) const fn from_bits(bits: u8) -> Self {
        Self(bits)
    }
}

impl BitOr for Offloads {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl BitOrAssign for Offloads {
    fn bitor_assign(&mut self, other: Self) {
        *self = *self | other;
    }
}

/// Without those of the other; `CSUM` stays unless it is the only one there, as others need it.
impl Sub for Offloads {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        if other.0 == CSUM {
            return Self(0);
        }
        Self(self.0 & !(other.0 & !CSUM))
    }
}

impl fmt::Display for Offloads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("none");
        }
        let names = [
            (CSUM, "csum"),
            (TSO4, "tso4"),
            (TSO6, "tso6"),
            (TSO_ECN, "tso-ecn"),
            (USO, "uso"),
        ];
        let mut gap = "";
        for (_, name) in names.into_iter().filter(|(bit, _)| self.0 & bit != 0) {
            write!(f, "{gap}{name}")?;
            gap = " ";
        }
        Ok(())
    }
}

impl fmt::Debug for Offloads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Offloads({self})")
    }
}
