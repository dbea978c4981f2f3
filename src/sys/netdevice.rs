//! Settings of network devices through the ioctls of netdevice(7): linux/sockios.h, linux/if.h, linux/ethtool.h.

use std::borrow::Cow;
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::OnceLock;

use super::{syscall, tun};

// The kernel copies the whole struct both ways; a shorter one would be overrun.
#[cfg(target_pointer_width = "64")]
const _: () = assert!(size_of::<libc::ifreq>() == 40);
#[cfg(target_pointer_width = "32")]
const _: () = assert!(size_of::<libc::ifreq>() == 32);

/// The name of a network device: at most 15 bytes, none of them NUL.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct IfName([u8; libc::IFNAMSIZ]);

impl IfName {
    /// Asks the kernel for `tun%d` or `tap%d`.
    pub(crate) const EMPTY: Self = Self([0; libc::IFNAMSIZ]);

    /// The longest name in bytes; one byte of IFNAMSIZ is the NUL behind it.
    pub(crate) const MAX_LEN: usize = libc::IFNAMSIZ - 1;

    /// As much of `name` as fits, up to its first NUL.
    pub(crate) fn truncated(name: &str) -> Self {
        let mut bytes = [0; libc::IFNAMSIZ];
        for (to, from) in bytes[..Self::MAX_LEN]
            .iter_mut()
            .zip(name.bytes().take_while(|&byte| byte != 0))
        {
            *to = from;
        }
        Self(bytes)
    }

    pub(crate) fn from_ifreq(ifreq: &libc::ifreq) -> Self {
        let mut bytes = ifreq.ifr_name.map(|byte| byte as u8);
        bytes[Self::MAX_LEN] = 0;
        Self(bytes)
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        let len = self.0.iter().position(|&byte| byte == 0).unwrap_or(Self::MAX_LEN);
        &self.0[..len]
    }

    /// The kernel takes bytes that are no UTF-8; those come out as U+FFFD.
    pub(crate) fn lossy(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(self.as_bytes())
    }
}

impl fmt::Debug for IfName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.lossy(), f)
    }
}

/// An `ifreq` with a name and nothing else.
pub(crate) fn ifreq_named(name: &IfName) -> libc::ifreq {
    // SAFETY: struct ifreq is integers, arrays and a pointer; all zero is valid.
    let mut ifreq: libc::ifreq = unsafe { std::mem::zeroed() };
    ifreq.ifr_name = name.0.map(|byte| byte as libc::c_char);
    ifreq
}

/// A socket that only serves as the address of the ioctls. They concern the devices of the network namespace in which the socket was
/// made, whatever thread of whatever namespace calls.
#[derive(Debug)]
pub(crate) struct ControlSocket(OwnedFd);

impl ControlSocket {
    /// A socket in the namespace of the calling thread.
    pub(crate) fn new() -> io::Result<Self> {
        // AF_UNIX answers the device ioctls like any other family, and is the last one that a sandbox would forbid.
        // SAFETY: no pointers.
        let fd = unsafe { syscall!(socket(libc::AF_UNIX, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0)) }?;
        // SAFETY: the descriptor is new and nobody else's.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// SIOCGIFINDEX; ENODEV where there is no such device.
    pub(crate) fn index(&self, name: &IfName) -> io::Result<u32> {
        let mut ifreq = ifreq_named(name);
        self.ioctl(libc::SIOCGIFINDEX, &mut ifreq)?;
        // SAFETY: the kernel wrote ifr_ifindex.
        Ok(unsafe { ifreq.ifr_ifru.ifru_ifindex } as u32)
    }

    /// SIOCGIFNAME: what the device with this index is called now; ENODEV where it is gone.
    pub(crate) fn name(&self, index: u32) -> io::Result<IfName> {
        let mut ifreq = ifreq_named(&IfName::EMPTY);
        ifreq.ifr_ifru.ifru_ifindex = index as libc::c_int;
        self.ioctl(libc::SIOCGIFNAME, &mut ifreq)?;
        Ok(IfName::from_ifreq(&ifreq))
    }

    /// SIOCGIFMTU.
    pub(crate) fn mtu(&self, name: &IfName) -> io::Result<u32> {
        let mut ifreq = ifreq_named(name);
        self.ioctl(libc::SIOCGIFMTU, &mut ifreq)?;
        // SAFETY: the kernel wrote ifr_mtu.
        Ok(unsafe { ifreq.ifr_ifru.ifru_mtu } as u32)
    }

    /// SIOCSIFMTU.
    pub(crate) fn set_mtu(&self, name: &IfName, mtu: u32) -> io::Result<()> {
        let mut ifreq = ifreq_named(name);
        ifreq.ifr_ifru.ifru_mtu = libc::c_int::try_from(mtu).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
        self.ioctl(libc::SIOCSIFMTU, &mut ifreq)
    }

    /// SIOCGIFTXQLEN.
    pub(crate) fn tx_queue_len(&self, name: &IfName) -> io::Result<u32> {
        let mut ifreq = ifreq_named(name);
        self.ioctl(libc::SIOCGIFTXQLEN, &mut ifreq)?;
        // ifr_qlen is the int at the head of the union, like ifr_metric.
        // SAFETY: the kernel wrote that int.
        Ok(unsafe { ifreq.ifr_ifru.ifru_metric } as u32)
    }

    /// SIOCSIFTXQLEN.
    pub(crate) fn set_tx_queue_len(&self, name: &IfName, packets: u32) -> io::Result<()> {
        let mut ifreq = ifreq_named(name);
        ifreq.ifr_ifru.ifru_metric =
            libc::c_int::try_from(packets).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
        self.ioctl(libc::SIOCSIFTXQLEN, &mut ifreq)
    }

    /// SIOCETHTOOL with ETHTOOL_GTXCSUM: whether the device takes packets whose checksum is not finished. One that does not takes no UDP
    /// superpacket either.
    #[cfg(feature = "lab")]
    pub(crate) fn tx_checksum_offload(&self, name: &IfName) -> io::Result<bool> {
        self.ethtool_value(name, ETHTOOL_GTXCSUM, 0).map(|value| value != 0)
    }

    /// SIOCETHTOOL with ETHTOOL_STXCSUM.
    #[cfg(feature = "lab")]
    pub(crate) fn set_tx_checksum_offload(&self, name: &IfName, on: bool) -> io::Result<()> {
        self.ethtool_value(name, ETHTOOL_STXCSUM, u32::from(on)).map(drop)
    }

    #[cfg(feature = "lab")]
    fn ethtool_value(&self, name: &IfName, cmd: u32, data: u32) -> io::Result<u32> {
        let mut value = ethtool_value { cmd, data };
        let mut ifreq = ifreq_named(name);
        ifreq.ifr_ifru.ifru_data = (&raw mut value).cast();
        self.ioctl(libc::SIOCETHTOOL, &mut ifreq)?;
        Ok(value.data)
    }

    /// SIOCGIFHWADDR, of an Ethernet device.
    pub(crate) fn mac(&self, name: &IfName) -> io::Result<[u8; 6]> {
        let mut ifreq = ifreq_named(name);
        self.ioctl(libc::SIOCGIFHWADDR, &mut ifreq)?;
        // SAFETY: the kernel wrote ifr_hwaddr, a struct sockaddr of plain bytes.
        let address = unsafe { ifreq.ifr_ifru.ifru_hwaddr };
        let mut mac = [0; 6];
        for (to, from) in mac.iter_mut().zip(address.sa_data) {
            *to = from as u8;
        }
        Ok(mac)
    }

    /// SIOCSIFHWADDR, of an Ethernet device.
    pub(crate) fn set_mac(&self, name: &IfName, mac: [u8; 6]) -> io::Result<()> {
        // SAFETY: struct sockaddr is integers; all zero is valid.
        let mut address: libc::sockaddr = unsafe { std::mem::zeroed() };
        address.sa_family = libc::ARPHRD_ETHER;
        for (to, from) in address.sa_data.iter_mut().zip(mac) {
            *to = from as libc::c_char;
        }
        let mut ifreq = ifreq_named(name);
        ifreq.ifr_ifru.ifru_hwaddr = address;
        self.ioctl(libc::SIOCSIFHWADDR, &mut ifreq)
    }

    /// SIOCGIFFLAGS, of which IFF_UP.
    pub(crate) fn is_up(&self, name: &IfName) -> io::Result<bool> {
        Ok(self.flags(name)? & libc::IFF_UP as libc::c_short != 0)
    }

    /// SIOCGIFFLAGS and SIOCSIFFLAGS: sets or clears IFF_UP.
    pub(crate) fn set_up(&self, name: &IfName, up: bool) -> io::Result<()> {
        let now = self.flags(name)?;
        let bit = libc::IFF_UP as libc::c_short;
        let mut ifreq = ifreq_named(name);
        ifreq.ifr_ifru.ifru_flags = if up { now | bit } else { now & !bit };
        self.ioctl(libc::SIOCSIFFLAGS, &mut ifreq)
    }

    /// SIOCETHTOOL with ETHTOOL_GDRVINFO: the driver's name, and what it calls its bus ("tun" or "tap" for the driver "tun").
    pub(crate) fn driver(&self, name: &IfName) -> io::Result<(String, String)> {
        // SAFETY: integers and byte arrays; all zero is valid.
        let mut info: ethtool_drvinfo = unsafe { std::mem::zeroed() };
        info.cmd = ETHTOOL_GDRVINFO;
        let mut ifreq = ifreq_named(name);
        ifreq.ifr_ifru.ifru_data = (&raw mut info).cast();
        // For this request the kernel fills the ethtool_drvinfo behind ifr_data, which outlives the call.
        self.ioctl(libc::SIOCETHTOOL, &mut ifreq)?;
        let text = |bytes: &[u8; 32]| {
            let len = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
            String::from_utf8_lossy(&bytes[..len]).into_owned()
        };
        Ok((text(&info.driver), text(&info.bus_info)))
    }

    /// SIOCETHTOOL with ETHTOOL_GFEATURES: what the device leaves unfinished or uncut now, as the
    /// TUN_F_* that switch it on.
    pub(crate) fn active_offloads(&self, name: &IfName) -> io::Result<u32> {
        /// The same for every device of a running kernel.
        static PLACES: OnceLock<[Option<u32>; FEATURES.len()]> = OnceLock::new();
        let places = match PLACES.get() {
            Some(places) => places,
            None => {
                let places = self.feature_places(name)?;
                PLACES.get_or_init(|| places)
            }
        };
        // 32 features to a block.
        const BLOCKS: usize = 8;
        let mut features = ethtool_gfeatures::<BLOCKS> {
            cmd: ETHTOOL_GFEATURES,
            size: BLOCKS as u32,
            features: [[0; 4]; BLOCKS],
        };
        let mut ifreq = ifreq_named(name);
        ifreq.ifr_ifru.ifru_data = (&raw mut features).cast();
        // For this request the kernel fills at most `size` blocks behind ifr_data, which outlive
        // the call.
        self.ioctl(libc::SIOCETHTOOL, &mut ifreq)?;
        let is_active = |&place: &u32| {
            let block = features.features.get(place as usize / 32);
            block.is_some_and(|[_, _, active, _]| active >> (place % 32) & 1 != 0)
        };
        let active = places
            .iter()
            .zip(FEATURES)
            .filter(|(place, _)| place.as_ref().is_some_and(is_active));
        Ok(active.fold(0, |flags, (_, (_, flag))| flags | flag))
    }

    /// ETHTOOL_GSSET_INFO and ETHTOOL_GSTRINGS: the numbers of the features by name, which differ
    /// from kernel to kernel.
    fn feature_places(&self, name: &IfName) -> io::Result<[Option<u32>; FEATURES.len()]> {
        let mut info = ethtool_sset_info {
            cmd: ETHTOOL_GSSET_INFO,
            reserved: 0,
            sset_mask: 1 << ETH_SS_FEATURES,
            data: [0],
        };
        let mut ifreq = ifreq_named(name);
        ifreq.ifr_ifru.ifru_data = (&raw mut info).cast();
        // One bit of the mask is set, so the kernel fills one number.
        self.ioctl(libc::SIOCETHTOOL, &mut ifreq)?;
        const WORDS: usize = ETH_GSTRING_LEN / size_of::<u32>();
        // The head of `struct ethtool_gstrings`, then the strings.
        let mut strings = vec![0_u32; 3 + info.data[0] as usize * WORDS];
        strings[..3].copy_from_slice(&[ETHTOOL_GSTRINGS, ETH_SS_FEATURES, info.data[0]]);
        let mut ifreq = ifreq_named(name);
        ifreq.ifr_ifru.ifru_data = strings.as_mut_ptr().cast();
        // The kernel fills as many strings as it said above: their number is fixed when it is
        // built.
        self.ioctl(libc::SIOCETHTOOL, &mut ifreq)?;
        let mut places = [None; FEATURES.len()];
        for (number, string) in strings[3..].chunks_exact(WORDS).enumerate() {
            let bytes: Vec<u8> = string.iter().flat_map(|word| word.to_ne_bytes()).collect();
            let len = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
            for (place, (feature, _)) in places.iter_mut().zip(FEATURES) {
                if feature.as_bytes() == &bytes[..len] {
                    *place = Some(number as u32);
                }
            }
        }
        Ok(places)
    }

    fn flags(&self, name: &IfName) -> io::Result<libc::c_short> {
        let mut ifreq = ifreq_named(name);
        self.ioctl(libc::SIOCGIFFLAGS, &mut ifreq)?;
        // SAFETY: the kernel wrote ifr_flags.
        Ok(unsafe { ifreq.ifr_ifru.ifru_flags })
    }

    fn ioctl(&self, request: libc::c_ulong, ifreq: &mut libc::ifreq) -> io::Result<()> {
        // SAFETY: only called with requests of this module, each of which takes a whole struct ifreq; where it carries a pointer
        // (SIOCETHTOOL), the caller made it point to the struct that the request fills.
        unsafe { syscall!(ioctl(self.0.as_raw_fd(), request as libc::Ioctl, &raw mut *ifreq)) }?;
        Ok(())
    }
}

/// linux/ethtool.h.
const ETHTOOL_GDRVINFO: u32 = 0x0000_0003;
const ETHTOOL_GSTRINGS: u32 = 0x0000_001b;
const ETHTOOL_GSSET_INFO: u32 = 0x0000_0037;
const ETHTOOL_GFEATURES: u32 = 0x0000_003a;
const ETH_SS_FEATURES: u32 = 4;
const ETH_GSTRING_LEN: usize = 32;

/// What set_offload of tun.c switches, by the features' names (net/ethtool/common.c).
const FEATURES: [(&str, u32); 5] = [
    ("tx-checksum-ip-generic", tun::TUN_F_CSUM),
    ("tx-tcp-segmentation", tun::TUN_F_TSO4),
    ("tx-tcp6-segmentation", tun::TUN_F_TSO6),
    ("tx-tcp-ecn-segmentation", tun::TUN_F_TSO_ECN),
    ("tx-udp-segmentation", tun::TUN_F_USO4 | tun::TUN_F_USO6),
];

/// `struct ethtool_sset_info` (linux/ethtool.h) with room for one number.
#[repr(C)]
#[allow(non_camel_case_types)]
struct ethtool_sset_info {
    cmd: u32,
    reserved: u32,
    sset_mask: u64,
    data: [u32; 1],
}

const _: () = assert!(std::mem::offset_of!(ethtool_sset_info, data) == 16);

/// `struct ethtool_gfeatures` (linux/ethtool.h) with room for some blocks of `struct
/// ethtool_get_features_block`: available, requested, active, never_changed.
#[repr(C)]
#[allow(non_camel_case_types)]
struct ethtool_gfeatures<const BLOCKS: usize> {
    cmd: u32,
    size: u32,
    features: [[u32; 4]; BLOCKS],
}

const _: () = assert!(size_of::<ethtool_gfeatures<2>>() == 40);
#[cfg(feature = "lab")]
const ETHTOOL_GTXCSUM: u32 = 0x16;
#[cfg(feature = "lab")]
const ETHTOOL_STXCSUM: u32 = 0x17;

/// `struct ethtool_value` (linux/ethtool.h).
#[cfg(feature = "lab")]
#[repr(C)]
#[allow(non_camel_case_types)]
struct ethtool_value {
    cmd: u32,
    data: u32,
}

#[cfg(feature = "lab")]
const _: () = assert!(size_of::<ethtool_value>() == 8);

/// `struct ethtool_drvinfo` of linux/ethtool.h.
#[repr(C)]
struct ethtool_drvinfo {
    cmd: u32,
    driver: [u8; 32],
    version: [u8; 32],
    fw_version: [u8; 32],
    bus_info: [u8; 32],
    erom_version: [u8; 32],
    reserved2: [u8; 12],
    n_priv_flags: u32,
    n_stats: u32,
    testinfo_len: u32,
    eedump_len: u32,
    regdump_len: u32,
}
const _: () = assert!(size_of::<ethtool_drvinfo>() == 196);

#[cfg(test)]
mod tests {
    use super::IfName;

    #[test]
    fn a_name_keeps_fifteen_bytes_and_ends_at_a_nul() {
        assert_eq!(IfName::truncated("").as_bytes(), b"");
        assert_eq!(IfName::truncated("123456789012345").as_bytes(), b"123456789012345");
        assert_eq!(IfName::truncated("1234567890123456").as_bytes(), b"123456789012345");
        assert_eq!(IfName::truncated("ab\0cd").as_bytes(), b"ab");
        // Cut in the middle of a character: the kernel takes bytes.
        assert_eq!(IfName::truncated("12345678901234é").as_bytes(), b"12345678901234\xc3");
        assert_eq!(IfName::truncated("12345678901234é").lossy(), "12345678901234\u{fffd}");
    }
}
