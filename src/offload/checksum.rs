//! The Internet checksum (RFC 1071): the ones'-complement sum of 16-bit words, inverted.
//!
//! A [`Sum`] is what has been added up so far, in the machine's byte order, which the arithmetic allows as long as all of it is. Parts are added
//! in any order, each begins at an even offset of the whole, and only the last may have an odd length.
//!
//! ```
//! use tun_driver::offload::checksum::{pseudo_header, sum};
//!
//! // UDP from 10.0.0.1:9 to 10.0.0.2:9 with the payload "hi", its checksum field being zero.
//! let datagram = [0, 9, 0, 9, 0, 10, 0, 0, b'h', b'i'];
//! let pseudo = pseudo_header(&[10, 0, 0, 1], &[10, 0, 0, 2], 17, datagram.len() as u32);
//! let checksum = (pseudo + sum(&datagram)).checksum();
//! // Whoever sums up all of it, checksum included, gets all ones.
//! assert!((pseudo + sum(&datagram) + sum(&checksum)).is_whole());
//! ```
//!
//! # Speed
//!
//! In nanoseconds on one core (AMD EPYC, AVX2, in cache), beside copying as many bytes; `cargo bench -p tun_driver_peers --bench offload`:
//!
//! | bytes | 20 | 64 | 256 | 1500 | 9000 | 65536 |
//! |---|--:|--:|--:|--:|--:|--:|
//! | sum | 3.0 | 3.7 | 6.2 | 15 | 66 | 570 |
//! | copy | 3.0 | 2.7 | 3.3 | 17 | 89 | 1150 |
//!
//! The vector unit adds pairs of signed words (`vpmaddwd`), three instructions for 32 bytes. Words of eight bytes with their carries serve short inputs and
//! other processors; what remains at the end is taken in steps, because a copy of unknown length cost 7 of 10 ns there.

#![allow(unsafe_code)] // vector units

use std::ops::{Add, AddAssign};

/// A sum of 16-bit words, not inverted yet.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sum(u64);

/// Below this length no vector unit is asked: what it takes to set it up is not earned back.
#[cfg(target_arch = "x86_64")]
const VECTOR_MIN: usize = 128;

/// Adds up bytes; an odd last one counts as if a zero stood behind it.
#[inline]
pub fn sum(bytes: &[u8]) -> Sum {
    #[cfg(target_arch = "x86_64")]
    if bytes.len() >= VECTOR_MIN && is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2, as was just asked.
        return unsafe { avx2::sum(bytes) };
    }
    portable(bytes)
}

/// What UDP and TCP put in front of their header for the sum (RFC 768, RFC 793, RFC 8200 section 8.1): both addresses, the protocol, and the length of
/// header and payload. Addresses of 4 or 16 bytes.
#[inline]
pub fn pseudo_header(source: &[u8], target: &[u8], protocol: u8, length: u32) -> Sum {
    // With IPv4 the upper half of the length is zero, so that one form serves both.
    portable(source) + portable(target) + Sum::of(protocol.into()) + Sum::of_long(length)
}

/// A checksum after one of its words changed from `old` to `new` (RFC 1624, equation 3). All as in the packet.
#[inline]
pub fn update(checksum: [u8; 2], old: [u8; 2], new: [u8; 2]) -> [u8; 2] {
    let word = u16::from_ne_bytes;
    let sum = u64::from(!word(checksum)) + u64::from(!word(old)) + u64::from(word(new));
    Sum(sum).checksum()
}

impl Sum {
    /// One word of a packet, by its value.
    #[inline]
    pub fn of(word: u16) -> Self {
        Self(word.to_be().into())
    }

    /// Two words of a packet, by their value.
    #[inline]
    pub fn of_long(word: u32) -> Self {
        Self(word.to_be().into())
    }

    /// As a word of a packet, not inverted: what a checksum field holds that somebody else is to finish.
    #[inline]
    pub fn seed(self) -> [u8; 2] {
        self.fold().to_ne_bytes()
    }

    /// As a checksum field holds it.
    #[inline]
    pub fn checksum(self) -> [u8; 2] {
        (!self.fold()).to_ne_bytes()
    }

    /// The same for UDP, where zero says that there is no checksum: all ones stand for it then, which are as good.
    #[inline]
    pub fn checksum_udp(self) -> [u8; 2] {
        match self.checksum() {
            [0, 0] => [0xff, 0xff],
            checksum => checksum,
        }
    }

    /// Whether this can be the sum over something and its checksum.
    #[inline]
    pub fn is_whole(self) -> bool {
        self.fold() == 0xffff
    }

    /// Without the part that was added as this one.
    #[inline]
    pub fn without(self, part: Self) -> Self {
        Self(u64::from(self.fold()) + u64::from(!part.fold()))
    }

    #[inline]
    fn fold(self) -> u16 {
        let sum = (self.0 >> 32) + (self.0 & 0xffff_ffff);
        let sum = (sum >> 16) + (sum & 0xffff);
        let sum = (sum >> 16) + (sum & 0xffff);
        ((sum >> 16) + (sum & 0xffff)) as u16
    }

    /// With room for many more to be added: below 2³³.
    #[inline]
    fn settled(self) -> Self {
        Self((self.0 >> 32) + (self.0 & 0xffff_ffff))
    }
}

/// By their value as a checksum: two forms of zero are the same.
impl PartialEq for Sum {
    fn eq(&self, other: &Self) -> bool {
        let whole = |sum: &Self| match sum.fold() {
            0xffff => 0,
            other => other,
        };
        whole(self) == whole(other)
    }
}

impl Eq for Sum {}

impl Add for Sum {
    type Output = Self;

    #[inline]
    fn add(self, other: Self) -> Self {
        let (sum, carry) = self.0.overflowing_add(other.0);
        Self(sum + u64::from(carry))
    }
}

impl AddAssign for Sum {
    #[inline]
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

/// By words of eight bytes, with their carries.
#[inline]
fn portable(bytes: &[u8]) -> Sum {
    let mut total = Sum(0);
    let (words, rest) = bytes.as_chunks::<8>();
    for word in words {
        total += Sum(u64::from_ne_bytes(*word));
    }
    // Step by step: a copy of a length that is not known costs more than all the rest of a short sum.
    let mut rest = rest;
    if let Some((word, behind)) = rest.split_first_chunk::<4>() {
        total += Sum(u32::from_ne_bytes(*word).into());
        rest = behind;
    }
    if let Some((word, behind)) = rest.split_first_chunk::<2>() {
        total += Sum(u16::from_ne_bytes(*word).into());
        rest = behind;
    }
    if let [last] = rest {
        total += Sum(u16::from_ne_bytes([*last, 0]).into());
    }
    total.settled()
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;

    use super::{Sum, portable};

    /// Bytes per turn of the loop.
    const TURN: usize = 128;

    /// Turns after which the lanes are put together. Each turn adds two words to each of four lanes of 32 bits, as numbers from -32,768 to 32,767; so the
    /// sum of the four stays below 2³¹.
    const TURNS: usize = 1 << 12;

    /// `vpmaddwd` adds up pairs of signed words. Each word is moved down by 32,768 before, by flipping its highest bit, and what that took away is
    /// put back at the end.
    #[target_feature(enable = "avx2")]
    pub(super) fn sum(bytes: &[u8]) -> Sum {
        let mut total = Sum(0);
        let (turns, rest) = bytes.as_chunks::<TURN>();
        for turns in turns.chunks(TURNS) {
            let (ones, flip) = (_mm256_set1_epi16(1), _mm256_set1_epi16(i16::MIN));
            let mut lanes = [_mm256_setzero_si256(); 4];
            for turn in turns {
                for (index, lanes) in lanes.iter_mut().enumerate() {
                    // SAFETY: 32 bytes at a quarter of 128 bytes; the load needs no alignment.
                    let words = unsafe { _mm256_loadu_si256(turn.as_ptr().add(32 * index).cast()) };
                    *lanes = _mm256_add_epi32(*lanes, _mm256_madd_epi16(_mm256_xor_si256(words, flip), ones));
                }
            }
            let [one, two, three, four] = lanes;
            let all = _mm256_add_epi32(_mm256_add_epi32(one, two), _mm256_add_epi32(three, four));
            let mut parts = [0i32; 8];
            // SAFETY: 32 bytes are writable; the store needs no alignment.
            unsafe { _mm256_storeu_si256(parts.as_mut_ptr().cast(), all) };
            let signed: i64 = parts.iter().map(|&part| i64::from(part)).sum();
            let words = (turns.len() * TURN / 2) as i64;
            // Never negative: it is a sum of words.
            total += Sum((signed + words * 32_768) as u64);
        }
        (total + portable(rest)).settled()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// By the book, a word at a time.
    fn naive(bytes: &[u8]) -> u16 {
        let mut sum = 0u32;
        for pair in bytes.chunks(2) {
            sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
            sum = (sum >> 16) + (sum & 0xffff);
        }
        sum as u16
    }

    fn value(sum: Sum) -> u16 {
        u16::from_be_bytes(sum.seed())
    }

    fn random(len: usize, seed: u64) -> Vec<u8> {
        let mut state = seed | 1;
        let next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        };
        std::iter::repeat_with(next).take(len).collect()
    }

    #[test]
    fn all_lengths_at_all_alignments_agree_with_the_book() {
        let bytes = random(2_300, 7);
        for start in 0..33 {
            for len in (0..600).chain([1_023, 1_024, 1_460, 1_500, 2_048, 2_200]) {
                let part = &bytes[start..start + len];
                assert_eq!(value(sum(part)), naive(part), "{start} {len}");
                assert_eq!(value(portable(part)), naive(part), "{start} {len}");
            }
        }
    }

    #[test]
    fn long_and_extreme_inputs_do_not_overflow() {
        for byte in [0, 0x7f, 0x80, 0xff] {
            for len in [65_535, 65_536, 4 << 20, (4 << 20) + 1] {
                let bytes = vec![byte; len];
                assert_eq!(value(sum(&bytes)), naive(&bytes), "{byte} {len}");
            }
        }
        let bytes = random(5 << 20, 3);
        assert_eq!(value(sum(&bytes)), naive(&bytes));
    }

    #[test]
    fn a_computed_zero_is_all_ones_for_udp_only() {
        let sum = Sum::of(0xffff);
        assert_eq!((sum.checksum(), sum.checksum_udp()), ([0, 0], [0xff, 0xff]));
        assert_eq!(Sum::of(0x1234).checksum_udp(), Sum::of(0x1234).checksum());
    }

    #[test]
    fn pseudo_headers_are_those_of_another_library() {
        let (v4, v6) = ([10, 0, 0, 1, 10, 0, 0, 2], random(32, 5));
        let payload = random(77, 9);
        let udp = etherparse::UdpHeader {
            source_port: 5,
            destination_port: 6,
            length: 85,
            checksum: 0,
        };
        let whole = [&udp.to_bytes()[..], &payload].concat();
        let ours = (pseudo_header(&v4[..4], &v4[4..], 17, 85) + sum(&whole)).checksum_udp();
        let theirs = udp
            .calc_checksum_ipv4_raw([10, 0, 0, 1], [10, 0, 0, 2], &payload)
            .unwrap();
        assert_eq!(u16::from_be_bytes(ours), theirs);
        let ours = (pseudo_header(&v6[..16], &v6[16..], 17, 85) + sum(&whole)).checksum_udp();
        let (source, target) = (v6[..16].try_into().unwrap(), v6[16..].try_into().unwrap());
        let theirs = udp.calc_checksum_ipv6_raw(source, target, &payload).unwrap();
        assert_eq!(u16::from_be_bytes(ours), theirs);
    }

    proptest! {
        #[test]
        fn parts_in_any_order_are_the_whole(bytes in prop::collection::vec(any::<u8>(), 0..3_000), at in 0usize..1_500) {
            let at = (2 * at).min(bytes.len() & !1);
            let (front, back) = bytes.split_at(at);
            prop_assert_eq!(sum(back) + sum(front), sum(&bytes));
            prop_assert_eq!((sum(&bytes)).without(sum(front)), sum(back));
        }

        #[test]
        fn what_changed_is_enough(mut bytes in prop::collection::vec(any::<u8>(), 2..200), at in 0usize..100, new in any::<[u8; 2]>()) {
            let at = (2 * at).min(bytes.len() - 2) & !1;
            let before = sum(&bytes).checksum();
            let old = [bytes[at], bytes[at + 1]];
            bytes[at..at + 2].copy_from_slice(&new);
            let told = update(before, old, new);
            // The same number; zero may come in either of its forms.
            prop_assert_eq!(Sum::of(u16::from_be_bytes(told)), Sum::of(u16::from_be_bytes(sum(&bytes).checksum())));
        }
    }
}
