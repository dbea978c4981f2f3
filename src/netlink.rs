//! Links, addresses, routes and 64-bit counters of one network namespace, through rtnetlink.
//!
//! A [`Handle`] speaks `rtnetlink(7)` over a socket of its own. Calls are synchronous: each sends one request and waits for the kernel's
//! acknowledgement, for 30 seconds at most. Nothing is asked of `ip(8)` or any other program.
//!
//! ```no_run
//! use tun_driver::netlink::Handle;
//!
//! # fn main() -> std::io::Result<()> {
//! let netlink = Handle::new()?;
//! let index = netlink.index_of("gw0")?;
//! netlink.add_address(index, "10.0.0.1".parse().unwrap(), 24)?;
//! netlink.set_mtu(index, 1400)?;
//! netlink.set_up(index, true)?;
//! println!("{} packets read from the device", netlink.stats(index)?.tx_packets);
//! # Ok(())
//! # }
//! ```

use std::cell::Cell;
use std::error;
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::thread;
use std::time::{Duration, Instant};

use netlink_packet_core::{
    ErrorMessage, NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkHeader,
    NetlinkMessage, NetlinkPayload, Nla, NlasIterator,
};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage, Stats64,
};
use netlink_packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
#[cfg(feature = "lab")]
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

use crate::sys::fd;

/// How long one request may take, all its answers included: it waits for the RTNL lock, which the end of
/// other devices and namespaces holds for seconds on a busy machine.
const BOUND: Duration = Duration::from_secs(30);

/// The kernel fills at most this much into one message to a socket that asks for no more (NLMSG_GOODSIZE is 8 KiB, dumps use up to 32 KiB).
const MESSAGE_MAX: usize = 64 * 1024;

/// An rtnetlink socket in the network namespace of the thread that made it.
///
/// It stays in that namespace wherever it is used later, and may travel to another thread (`Send`); one thread uses it at a time.
///
/// # Errors
///
/// Every method gives an [`io::Error`] whose inner error is a [`RequestError`]: the request by its rtnetlink name, the kernel's errno and,
/// where the kernel adds one, its explanation. `TimedOut` if no answer came within 30 seconds. Common errnos: EPERM (no CAP_NET_ADMIN in
/// this namespace), ENODEV (no such link), EEXIST (name, address or route exists), EBUSY.
pub struct Handle {
    socket: Socket,
    sequence: Cell<u32>,
}

/// A network device as rtnetlink describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Link {
    /// Its number, unique in its namespace.
    pub index: u32,
    /// Its name, at most 15 bytes.
    pub name: String,
    /// What made it: `tun`, `veth`, `bridge`, …; empty for loopback and most hardware.
    pub kind: String,
    /// The largest packet above the link layer, in bytes.
    pub mtu: u32,
    /// Administratively up (IFF_UP).
    pub up: bool,
    /// Up and able to carry packets (IFF_RUNNING). A TUN device without an attached queue is not.
    pub running: bool,
    /// The hardware address; `None` where the device has none of six bytes (TUN).
    pub mac: Option<[u8; 6]>,
    /// The bridge or other device that it belongs to.
    pub master: Option<u32>,
    /// Length of the transmit queue in packets; a TUN/TAP queue's ring has this size.
    pub txqueuelen: u32,
    /// Transmit queues; those of a TUN/TAP device are what user space receives from.
    pub num_tx_queues: u32,
    /// Receive queues.
    pub num_rx_queues: u32,
    /// The largest superpacket in bytes that the stack may hand to the device.
    pub gso_max_size: Option<u32>,
    /// The most segments in such a superpacket.
    pub gso_max_segs: Option<u32>,
    /// The largest superpacket in bytes that the stack may put together from what the device delivers.
    pub gro_max_size: Option<u32>,
    /// What only TUN/TAP devices have.
    pub tun: Option<TunLink>,
    /// Its counters.
    pub stats: LinkStats,
}

/// What rtnetlink tells of a TUN/TAP device (`IFLA_TUN_*`, linux/if_link.h).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct TunLink {
    /// Ethernet frames (TAP) instead of IP packets (TUN).
    pub tap: bool,
    /// Opened with packet info in front of each packet.
    pub packet_info: bool,
    /// Opened with a virtio net header in front of each packet.
    pub vnet_header: bool,
    /// Stays when the last descriptor is closed.
    pub persistent: bool,
    /// Opened with `IFF_MULTI_QUEUE`.
    pub multi_queue: bool,
    /// Attached queues.
    pub queues: u32,
    /// Detached queues.
    pub disabled_queues: u32,
    /// The user that may attach without CAP_NET_ADMIN.
    pub owner: Option<u32>,
    /// The group that may attach without CAP_NET_ADMIN.
    pub group: Option<u32>,
}

/// A device's counters since it was made: `struct rtnl_link_stats64` (linux/if_link.h), with the kernel's names.
///
/// The kernel counts from its own side: what user space sends into a TUN/TAP device are the device's `rx_…`, what user space receives from
/// it are its `tx_…`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
#[allow(missing_docs)] // the kernel's names say it, and its header documents them
pub struct LinkStats {
    pub rx_packets: u64,
    pub tx_packets: u64,
    pub rx_bytes: u64,
    pub tx_bytes: u64,
    pub rx_errors: u64,
    pub tx_errors: u64,
    pub rx_dropped: u64,
    pub tx_dropped: u64,
    pub multicast: u64,
    pub collisions: u64,
    pub rx_length_errors: u64,
    pub rx_over_errors: u64,
    pub rx_crc_errors: u64,
    pub rx_frame_errors: u64,
    pub rx_fifo_errors: u64,
    pub rx_missed_errors: u64,
    pub tx_aborted_errors: u64,
    pub tx_carrier_errors: u64,
    pub tx_fifo_errors: u64,
    pub tx_heartbeat_errors: u64,
    pub tx_window_errors: u64,
    pub rx_compressed: u64,
    pub tx_compressed: u64,
    pub rx_nohandler: u64,
    pub rx_otherhost_dropped: u64,
}

/// A request that the kernel refused, or that got no answer. Found inside the [`io::Error`] of each call; see [`RequestError::of`].
#[derive(Debug)]
pub struct RequestError {
    request: &'static str,
    source: io::Error,
    explanation: String,
}

impl Handle {
    /// Opens a socket in the calling thread's network namespace.
    pub fn new() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE).map_err(|error| failed("socket(AF_NETLINK)", error))?;
        // The kernel chooses the port.
        let address = SocketAddr::new(0, 0);
        socket
            .bind(&address)
            .map_err(|error| failed("bind(AF_NETLINK)", error))?;
        socket
            .connect(&address)
            .map_err(|error| failed("connect(AF_NETLINK)", error))?;
        // Both only make refusals speak; a kernel without them (before 4.12) is no worse for it.
        let _ = socket.set_cap_ack(true);
        let _ = socket.set_ext_ack(true);
        Ok(Self {
            socket,
            sequence: Cell::new(0),
        })
    }

    /// The number of the link called `name`. ENODEV if there is none.
    pub fn index_of(&self, name: &str) -> io::Result<u32> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        self.one_link(message).map(|link| link.index)
    }

    /// The link with number `index`. ENODEV if there is none.
    pub fn link(&self, index: u32) -> io::Result<Link> {
        self.one_link(link_message(index))
    }

    /// All links of the namespace.
    pub fn links(&self) -> io::Result<Vec<Link>> {
        let answers = self.request(
            "RTM_GETLINK (dump)",
            RouteNetlinkMessage::GetLink(LinkMessage::default()),
            NLM_F_DUMP,
        )?;
        Ok(answers.into_iter().filter_map(parse_link).collect())
    }

    /// The counters of link `index`.
    pub fn stats(&self, index: u32) -> io::Result<LinkStats> {
        self.link(index).map(|link| link.stats)
    }

    /// Sets a link administratively up or down.
    pub fn set_up(&self, index: u32, up: bool) -> io::Result<()> {
        let mut message = link_message(index);
        message.header.change_mask = LinkFlags::Up;
        message.header.flags = if up { LinkFlags::Up } else { LinkFlags::empty() };
        self.act("RTM_SETLINK (up or down)", RouteNetlinkMessage::SetLink(message), 0)
    }

    /// Waits until a link that was set up carries packets (IFF_RUNNING), looking every millisecond.
    ///
    /// Between `set_up` on the second end of a veth pair (or a port's own carrier) and that moment the kernel drops what is sent: it learns of
    /// the carrier asynchronously, up to a second later.
    ///
    /// # Errors
    ///
    /// `TimedOut` if it does not within `bound`.
    pub fn wait_running(&self, index: u32, bound: Duration) -> io::Result<()> {
        let deadline = Instant::now() + bound;
        while !self.link(index)?.running {
            if Instant::now() >= deadline {
                let error = io::Error::new(io::ErrorKind::TimedOut, "the link has no carrier; is its other end up?");
                return Err(failed("wait for IFF_RUNNING", error));
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Sets the MTU in bytes. EINVAL outside what the device takes (68 … 65,535 for TUN).
    pub fn set_mtu(&self, index: u32, mtu: u32) -> io::Result<()> {
        self.set("RTM_SETLINK (mtu)", index, LinkAttribute::Mtu(mtu))
    }

    /// Sets the transmit queue's length in packets. A TUN/TAP device resizes the rings of its queues; what does not fit is dropped.
    pub fn set_txqueuelen(&self, index: u32, packets: u32) -> io::Result<()> {
        self.set("RTM_SETLINK (txqueuelen)", index, LinkAttribute::TxQueueLen(packets))
    }

    /// Sets the hardware address. EOPNOTSUPP for devices that have none (TUN).
    pub fn set_mac(&self, index: u32, mac: [u8; 6]) -> io::Result<()> {
        self.set("RTM_SETLINK (address)", index, LinkAttribute::Address(mac.to_vec()))
    }

    /// Sets the largest superpacket in bytes that the stack hands to the device.
    pub fn set_gso_max_size(&self, index: u32, bytes: u32) -> io::Result<()> {
        self.set("RTM_SETLINK (gso_max_size)", index, LinkAttribute::GsoMaxSize(bytes))
    }

    /// Sets the largest superpacket in bytes that the stack puts together from what the device delivers.
    pub fn set_gro_max_size(&self, index: u32, bytes: u32) -> io::Result<()> {
        self.set("RTM_SETLINK (gro_max_size)", index, LinkAttribute::GroMaxSize(bytes))
    }

    /// Renames a link. EEXIST if the name is taken, EINVAL if the kernel takes no such name; EBUSY on kernels that want it down first.
    pub fn rename(&self, index: u32, name: &str) -> io::Result<()> {
        self.set("RTM_SETLINK (name)", index, LinkAttribute::IfName(name.to_owned()))
    }

    /// Makes a link a port of the bridge (or other device) `master`, or of none.
    pub fn set_master(&self, index: u32, master: Option<u32>) -> io::Result<()> {
        self.set(
            "RTM_SETLINK (master)",
            index,
            LinkAttribute::Controller(master.unwrap_or(0)),
        )
    }

    /// Moves a link to another network namespace. It goes down and loses its addresses; its number may change there.
    pub fn move_to_namespace(&self, index: u32, namespace: BorrowedFd<'_>) -> io::Result<()> {
        self.set(
            "RTM_SETLINK (namespace)",
            index,
            LinkAttribute::NetNsFd(namespace.as_raw_fd()),
        )
    }

    /// Deletes a link; of a veth pair, both ends.
    pub fn delete(&self, index: u32) -> io::Result<()> {
        self.act("RTM_DELLINK", RouteNetlinkMessage::DelLink(link_message(index)), 0)
    }

    /// Makes a pair of virtual Ethernet devices and returns their numbers. EEXIST if a name is taken.
    pub fn add_veth(&self, name: &str, peer_name: &str) -> io::Result<(u32, u32)> {
        let mut peer = LinkMessage::default();
        peer.attributes.push(LinkAttribute::IfName(peer_name.to_owned()));
        let info = vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
        ];
        self.add_link("RTM_NEWLINK (veth)", name, info)?;
        Ok((self.index_of(name)?, self.index_of(peer_name)?))
    }

    /// Makes a bridge and returns its number.
    pub fn add_bridge(&self, name: &str) -> io::Result<u32> {
        self.add_link("RTM_NEWLINK (bridge)", name, vec![LinkInfo::Kind(InfoKind::Bridge)])?;
        self.index_of(name)
    }

    /// Gives a link an address; the kernel adds the route to its network when the link is up. EEXIST if it has it.
    ///
    /// An IPv6 address is usable when this returns: duplicate address detection, which would keep it from use for about a second, is left
    /// out (IFA_F_NODAD).
    pub fn add_address(&self, index: u32, address: IpAddr, prefix: u8) -> io::Result<()> {
        let message = RouteNetlinkMessage::NewAddress(address_message(index, address, prefix));
        self.act("RTM_NEWADDR", message, NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Takes an address from a link. EADDRNOTAVAIL if it has no such address.
    pub fn del_address(&self, index: u32, address: IpAddr, prefix: u8) -> io::Result<()> {
        self.act(
            "RTM_DELADDR",
            RouteNetlinkMessage::DelAddress(address_message(index, address, prefix)),
            0,
        )
    }

    /// Routes `net`/`prefix` over link `index`, through `gateway` if there is one. ENETDOWN while the link is down, EEXIST if there is
    /// such a route. Families of `net` and `gateway` must be the same.
    pub fn add_route(&self, net: IpAddr, prefix: u8, gateway: Option<IpAddr>, index: u32) -> io::Result<()> {
        let mut message = route_message(net, prefix, RouteType::Unicast);
        // IPv4 wants to know whether the destination is on the link; IPv6 does not look at it.
        message.header.scope = if gateway.is_none() && net.is_ipv4() {
            RouteScope::Link
        } else {
            RouteScope::Universe
        };
        message.attributes.push(RouteAttribute::Oif(index));
        if let Some(gateway) = gateway {
            message
                .attributes
                .push(RouteAttribute::Gateway(RouteAddress::from(gateway)));
        }
        self.act(
            "RTM_NEWROUTE",
            RouteNetlinkMessage::NewRoute(message),
            NLM_F_CREATE | NLM_F_EXCL,
        )
    }

    /// Drops, silently, whatever is routed to `net`/`prefix`.
    pub fn add_blackhole(&self, net: IpAddr, prefix: u8) -> io::Result<()> {
        let message = RouteNetlinkMessage::NewRoute(route_message(net, prefix, RouteType::BlackHole));
        self.act("RTM_NEWROUTE (blackhole)", message, NLM_F_CREATE | NLM_F_EXCL)
    }

    /// The route of the main table that packets to the first address of `net`/`prefix` take, if it
    /// is to exactly that network. `None` says nothing: the kernel looks up addresses, not networks
    /// (`inet6_rtm_valid_getroute_req`: 128 bits), so a longer prefix or a rule may come first; and
    /// one before 4.13 knows no RTM_F_FIB_MATCH, and answers with a route to the address.
    pub(crate) fn route_in_use(&self, net: IpAddr, prefix: u8) -> Option<Route> {
        let mut message = RouteMessage::default();
        message.header.address_family = family(net);
        message.header.destination_prefix_length = if net.is_ipv4() { 32 } else { 128 };
        // Without the second, the answer of IPv4 names the main table, whatever table it is from
        // (`inet_rtm_getroute`).
        message.header.flags = RouteFlags::FibMatch | RouteFlags::LookupTable;
        message
            .attributes
            .push(RouteAttribute::Destination(RouteAddress::from(net)));
        let message = RouteNetlinkMessage::GetRoute(message);
        let answers = self.gather("RTM_GETROUTE", message, 0, |answer| parse_route(answer, net, prefix));
        answers.ok()?.pop()
    }

    /// The routes of the main table to exactly `net`/`prefix`, as the kernel lists them: equal
    /// metrics in the order of its choice. The kernel sends the whole table.
    pub(crate) fn routes_to(&self, net: IpAddr, prefix: u8) -> io::Result<Vec<Route>> {
        let mut message = RouteMessage::default();
        message.header.address_family = family(net);
        // Of a table that may have a million, few are kept.
        self.gather(
            "RTM_GETROUTE (dump)",
            RouteNetlinkMessage::GetRoute(message),
            NLM_F_DUMP,
            |answer| parse_route(answer, net, prefix),
        )
    }

    /// The addresses of all links, of the family of `like`: link, address, length of the prefix.
    pub(crate) fn addresses(&self, like: IpAddr) -> io::Result<Vec<(u32, IpAddr, u8)>> {
        let mut message = AddressMessage::default();
        message.header.family = family(like);
        self.gather(
            "RTM_GETADDR (dump)",
            RouteNetlinkMessage::GetAddress(message),
            NLM_F_DUMP,
            parse_address,
        )
    }

    /// Removes the route to `net`/`prefix`. ESRCH if there is none.
    pub fn del_route(&self, net: IpAddr, prefix: u8) -> io::Result<()> {
        let mut message = route_message(net, prefix, RouteType::Unspec);
        // "Any", in both: without it only a route of this protocol and scope would be found.
        message.header.protocol = RouteProtocol::Unspec;
        message.header.scope = RouteScope::NoWhere;
        self.act("RTM_DELROUTE", RouteNetlinkMessage::DelRoute(message), 0)
    }

    /// Enters, for good, the hardware address that belongs to `address` on link `index`; replaces what is there.
    pub fn add_neighbour(&self, index: u32, address: IpAddr, mac: [u8; 6]) -> io::Result<()> {
        let mut message = NeighbourMessage::default();
        message.header.family = family(address);
        message.header.ifindex = index;
        message.header.state = NeighbourState::Permanent;
        message
            .attributes
            .push(NeighbourAttribute::Destination(NeighbourAddress::from(address)));
        message
            .attributes
            .push(NeighbourAttribute::LinkLayerAddress(mac.to_vec()));
        self.act(
            "RTM_NEWNEIGH",
            RouteNetlinkMessage::NewNeighbour(message),
            NLM_F_CREATE | NLM_F_REPLACE,
        )
    }

    /// Drops at the route lookup, in both families, what comes in by the device called `name` and is not for an address of this namespace.
    #[cfg(feature = "lab")]
    pub(crate) fn add_blackhole_rule(&self, name: &str) -> io::Result<()> {
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let message = RouteNetlinkMessage::NewRule(blackhole_rule(family, name));
            match self.act("RTM_NEWRULE (blackhole)", message, NLM_F_CREATE | NLM_F_EXCL) {
                // A kernel without IPv6, or without policy routing for it: nothing of that family passes, or the caller sends IPv4.
                Err(error)
                    if family == AddressFamily::Inet6
                        && RequestError::of(&error).and_then(RequestError::raw_os_error)
                            == Some(libc::EAFNOSUPPORT) => {}
                result => result?,
            }
        }
        Ok(())
    }

    /// Takes back [`add_blackhole_rule`](Self::add_blackhole_rule).
    #[cfg(feature = "lab")]
    pub(crate) fn del_blackhole_rule(&self, name: &str) -> io::Result<()> {
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            self.act(
                "RTM_DELRULE (blackhole)",
                RouteNetlinkMessage::DelRule(blackhole_rule(family, name)),
                0,
            )?;
        }
        Ok(())
    }

    fn one_link(&self, message: LinkMessage) -> io::Result<Link> {
        const REQUEST: &str = "RTM_GETLINK";
        let answers = self.request(REQUEST, RouteNetlinkMessage::GetLink(message), 0)?;
        let link = answers.into_iter().find_map(parse_link);
        link.ok_or_else(|| {
            failed(
                REQUEST,
                io::Error::new(io::ErrorKind::InvalidData, "the answer has no link"),
            )
        })
    }

    fn add_link(&self, request: &'static str, name: &str, info: Vec<LinkInfo>) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        message.attributes.push(LinkAttribute::LinkInfo(info));
        self.act(
            request,
            RouteNetlinkMessage::NewLink(message),
            NLM_F_CREATE | NLM_F_EXCL,
        )
    }

    fn set(&self, request: &'static str, index: u32, attribute: LinkAttribute) -> io::Result<()> {
        let mut message = link_message(index);
        message.attributes.push(attribute);
        self.act(request, RouteNetlinkMessage::SetLink(message), 0)
    }

    fn act(&self, request: &'static str, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.request(request, message, flags).map(drop)
    }

    /// Sends one request and gathers its answers up to the acknowledgement or the end of the dump.
    fn request(
        &self,
        request: &'static str,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        self.gather(request, message, flags, Some)
    }

    /// The same, of the answers what `keep` makes of them.
    fn gather<T>(
        &self,
        request: &'static str,
        message: RouteNetlinkMessage,
        flags: u16,
        keep: impl Fn(RouteNetlinkMessage) -> Option<T>,
    ) -> io::Result<Vec<T>> {
        let sequence = self.sequence.get().wrapping_add(1);
        self.sequence.set(sequence);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        header.sequence_number = sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);

        let deadline = Instant::now() + BOUND;
        self.socket.send(&bytes, 0).map_err(|error| failed(request, error))?;
        let mut answers = Vec::new();
        loop {
            let datagram = self.receive(deadline).map_err(|error| failed(request, error))?;
            let mut rest = datagram.as_slice();
            while !rest.is_empty() {
                let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest).map_err(|error| {
                    failed(
                        request,
                        io::Error::new(io::ErrorKind::InvalidData, format!("unreadable answer: {error}")),
                    )
                })?;
                // The kernel aligns each message to four bytes; the last one's padding may be missing.
                let length = (message.header.length as usize).next_multiple_of(4).max(4);
                rest = rest.get(length..).unwrap_or_default();
                if message.header.sequence_number != sequence {
                    continue; // late answer to a request that timed out
                }
                match message.payload {
                    NetlinkPayload::Error(error) if error.code.is_none() => return Ok(answers),
                    NetlinkPayload::Error(error) => return Err(refused(request, &error)),
                    NetlinkPayload::Done(_) => return Ok(answers),
                    NetlinkPayload::InnerMessage(answer) => answers.extend(keep(answer)),
                    _ => {}
                }
            }
        }
    }

    /// The next datagram; `TimedOut` if there is none until the deadline.
    fn receive(&self, deadline: Instant) -> io::Result<Vec<u8>> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "the kernel did not answer within 30 s",
                ));
            }
            let mut wait = [libc::pollfd {
                fd: self.socket.as_raw_fd(),
                events: libc::POLLIN,
                revents: 0,
            }];
            if fd::poll(&mut wait, Some(left))? == 0 {
                continue;
            }
            let mut buffer = Vec::with_capacity(MESSAGE_MAX);
            match self.socket.recv(&mut buffer, libc::MSG_DONTWAIT | libc::MSG_TRUNC) {
                Ok(length) if length > buffer.len() => {
                    return Err(io::Error::new(
                        io::ErrorKind::InvalidData,
                        "the answer is longer than 64 KiB",
                    ));
                }
                Ok(_) => return Ok(buffer),
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle").field("fd", &self.socket.as_raw_fd()).finish()
    }
}

impl LinkStats {
    /// What was counted since `earlier`, counter by counter.
    pub fn since(&self, earlier: &Self) -> Self {
        macro_rules! difference {
            ($($field:ident)*) => { Self { $($field: self.$field.wrapping_sub(earlier.$field)),* } };
        }
        difference!(rx_packets tx_packets rx_bytes tx_bytes rx_errors tx_errors rx_dropped tx_dropped multicast collisions
            rx_length_errors rx_over_errors rx_crc_errors rx_frame_errors rx_fifo_errors rx_missed_errors
            tx_aborted_errors tx_carrier_errors tx_fifo_errors tx_heartbeat_errors tx_window_errors
            rx_compressed tx_compressed rx_nohandler rx_otherhost_dropped)
    }
}

impl From<Stats64> for LinkStats {
    fn from(stats: Stats64) -> Self {
        macro_rules! copy {
            ($($field:ident)*) => { Self { $($field: stats.$field),* } };
        }
        copy!(rx_packets tx_packets rx_bytes tx_bytes rx_errors tx_errors rx_dropped tx_dropped multicast collisions
            rx_length_errors rx_over_errors rx_crc_errors rx_frame_errors rx_fifo_errors rx_missed_errors
            tx_aborted_errors tx_carrier_errors tx_fifo_errors tx_heartbeat_errors tx_window_errors
            rx_compressed tx_compressed rx_nohandler rx_otherhost_dropped)
    }
}

impl RequestError {
    /// The request behind an error of this module.
    pub fn of(error: &io::Error) -> Option<&Self> {
        error.get_ref()?.downcast_ref()
    }

    /// What was asked, by its rtnetlink name, such as `RTM_NEWADDR`.
    pub fn request(&self) -> &'static str {
        self.request
    }

    /// The kernel's error number; `None` where no answer came or it could not be read.
    pub fn raw_os_error(&self) -> Option<i32> {
        self.source.raw_os_error()
    }

    /// The kernel's own explanation (extended acknowledgement); empty where it gives none.
    pub fn explanation(&self) -> &str {
        &self.explanation
    }
}

impl fmt::Display for RequestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.request, self.source)?;
        match self.explanation.as_str() {
            "" => Ok(()),
            explanation => write!(f, ": {explanation}"),
        }
    }
}

impl error::Error for RequestError {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        Some(&self.source)
    }
}

fn failed(request: &'static str, source: io::Error) -> io::Error {
    io::Error::new(
        source.kind(),
        RequestError {
            request,
            source,
            explanation: String::new(),
        },
    )
}

fn refused(request: &'static str, answer: &ErrorMessage) -> io::Error {
    const NETLINK_HEADER_LEN: usize = 16;
    const NLMSGERR_ATTR_MSG: u16 = 1; // linux/netlink.h
    // Behind the error code: the header of the request (nothing else of it, as NETLINK_CAP_ACK is set), then attributes.
    let attributes = answer.header.get(NETLINK_HEADER_LEN..).unwrap_or_default();
    let explanation = NlasIterator::new(attributes)
        .map_while(Result::ok)
        .find(|attribute| attribute.kind() == NLMSGERR_ATTR_MSG)
        .map(|attribute| {
            String::from_utf8_lossy(attribute.value())
                .trim_end_matches('\0')
                .to_owned()
        });
    let source = answer.to_io();
    io::Error::new(
        source.kind(),
        RequestError {
            request,
            source,
            explanation: explanation.unwrap_or_default(),
        },
    )
}

fn link_message(index: u32) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message
}

fn address_message(index: u32, address: IpAddr, prefix: u8) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(address);
    message.header.prefix_len = prefix;
    message.header.index = index;
    // Two attributes with one meaning, unless the link is point-to-point with a peer: then they differ.
    message.attributes.push(AddressAttribute::Local(address));
    message.attributes.push(AddressAttribute::Address(address));
    if address.is_ipv6() {
        message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
    }
    message
}

fn route_message(net: IpAddr, prefix: u8, kind: RouteType) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(net);
    message.header.destination_prefix_length = prefix;
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Static;
    message.header.kind = kind;
    if net != IpAddr::from(Ipv4Addr::UNSPECIFIED) && net != IpAddr::from(Ipv6Addr::UNSPECIFIED) {
        message
            .attributes
            .push(RouteAttribute::Destination(RouteAddress::from(net)));
    }
    message
}

#[cfg(feature = "lab")]
fn blackhole_rule(family: AddressFamily, name: &str) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = family;
    message.header.action = RuleAction::Blackhole;
    message.attributes.push(RuleAttribute::Iifname(name.to_owned()));
    message.attributes.push(RuleAttribute::Priority(1)); // behind the local table (0), in front of the main one (32766)
    message
}

/// One route, as far as it says where packets go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Route {
    /// The links that it leads over; none for a route that drops.
    pub(crate) links: Vec<u32>,
    pub(crate) gateway: Option<IpAddr>,
    /// The least is taken.
    pub(crate) metric: u32,
}

fn parse_route(answer: RouteNetlinkMessage, net: IpAddr, prefix: u8) -> Option<Route> {
    let RouteNetlinkMessage::NewRoute(message) = answer else {
        return None;
    };
    let header = &message.header;
    // A dump is of all tables and families where the kernel does not filter, and lists cached
    // exceptions on some.
    if header.address_family != family(net)
        || header.table != RouteHeader::RT_TABLE_MAIN
        || header.destination_prefix_length != prefix
    {
        return None;
    }
    let mut destination = match net {
        IpAddr::V4(_) => IpAddr::from(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(_) => IpAddr::from(Ipv6Addr::UNSPECIFIED),
    };
    let mut route = Route {
        links: Vec::new(),
        gateway: None,
        metric: 0,
    };
    for attribute in message.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(address)) => destination = address.into(),
            RouteAttribute::Destination(RouteAddress::Inet6(address)) => destination = address.into(),
            RouteAttribute::Gateway(RouteAddress::Inet(address)) => route.gateway = Some(address.into()),
            RouteAttribute::Gateway(RouteAddress::Inet6(address)) => route.gateway = Some(address.into()),
            RouteAttribute::Oif(link) => route.links.push(link),
            RouteAttribute::MultiPath(hops) => route.links.extend(hops.iter().map(|hop| hop.interface_index)),
            RouteAttribute::Priority(metric) => route.metric = metric,
            _ => {}
        }
    }
    if !matches!(message.header.kind, RouteType::Unicast | RouteType::Local) {
        // The kernel names the loopback as the link of an IPv6 route that drops.
        route.links.clear();
    }
    same_network(destination, net, prefix).then_some(route)
}

fn parse_address(answer: RouteNetlinkMessage) -> Option<(u32, IpAddr, u8)> {
    let RouteNetlinkMessage::NewAddress(message) = answer else {
        return None;
    };
    let mut address = None;
    for attribute in &message.attributes {
        match attribute {
            // With a peer, the network is that of the peer, which this attribute then names.
            AddressAttribute::Address(peer) => address = Some(*peer),
            AddressAttribute::Local(local) => address = address.or(Some(*local)),
            _ => {}
        }
    }
    Some((message.header.index, address?, message.header.prefix_len))
}

/// Whether two addresses agree in their first `prefix` bits.
pub(crate) fn same_network(one: IpAddr, other: IpAddr, prefix: u8) -> bool {
    let bits = |address| match address {
        IpAddr::V4(address) => u128::from(Ipv4Addr::to_bits(address)) << 96,
        IpAddr::V6(address) => Ipv6Addr::to_bits(address),
    };
    let differing = bits(one) ^ bits(other);
    one.is_ipv4() == other.is_ipv4() && (prefix == 0 || differing >> (128 - u32::from(prefix.min(128))) == 0)
}

/// The first address of the network that an address is in.
pub(crate) fn network_of(address: IpAddr, prefix: u8) -> IpAddr {
    match address {
        IpAddr::V4(address) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(prefix.min(32))).unwrap_or(0);
            Ipv4Addr::from_bits(address.to_bits() & mask).into()
        }
        IpAddr::V6(address) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(prefix.min(128))).unwrap_or(0);
            Ipv6Addr::from_bits(address.to_bits() & mask).into()
        }
    }
}

fn family(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

fn parse_link(answer: RouteNetlinkMessage) -> Option<Link> {
    let RouteNetlinkMessage::NewLink(message) = answer else {
        return None;
    };
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        kind: String::new(),
        mtu: 0,
        up: message.header.flags.contains(LinkFlags::Up),
        running: message.header.flags.contains(LinkFlags::Running),
        mac: None,
        master: None,
        txqueuelen: 0,
        num_tx_queues: 0,
        num_rx_queues: 0,
        gso_max_size: None,
        gso_max_segs: None,
        gro_max_size: None,
        tun: None,
        stats: LinkStats::default(),
    };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Mtu(mtu) => link.mtu = mtu,
            LinkAttribute::Address(address) => link.mac = address.try_into().ok(),
            LinkAttribute::Controller(master) => link.master = Some(master).filter(|&master| master != 0),
            LinkAttribute::TxQueueLen(packets) => link.txqueuelen = packets,
            LinkAttribute::NumTxQueues(count) => link.num_tx_queues = count,
            LinkAttribute::NumRxQueues(count) => link.num_rx_queues = count,
            LinkAttribute::GsoMaxSize(bytes) => link.gso_max_size = Some(bytes),
            LinkAttribute::GsoMaxSegs(count) => link.gso_max_segs = Some(count),
            LinkAttribute::GroMaxSize(bytes) => link.gro_max_size = Some(bytes),
            LinkAttribute::Stats64(stats) => link.stats = stats.into(),
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    match info {
                        LinkInfo::Kind(kind) => link.kind = kind.to_string(),
                        LinkInfo::Data(InfoData::Tun(attributes)) => link.tun = Some(parse_tun(&attributes)),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    Some(link)
}

/// The kernel's `tun_fill_info`, attribute by attribute (linux/if_link.h, `IFLA_TUN_*`).
fn parse_tun(attributes: &[impl Nla]) -> TunLink {
    const IFF_TAP: u32 = 2;
    let mut tun = TunLink::default();
    for attribute in attributes {
        let mut value = [0; 4];
        let Some(bytes) = value.get_mut(..attribute.value_len()) else {
            continue;
        };
        attribute.emit_value(bytes);
        let number = match bytes.len() {
            1 => u32::from(value[0]),
            4 => u32::from_ne_bytes(value),
            _ => continue,
        };
        match attribute.kind() {
            1 => tun.owner = Some(number),
            2 => tun.group = Some(number),
            3 => tun.tap = number == IFF_TAP,
            4 => tun.packet_info = number != 0,
            5 => tun.vnet_header = number != 0,
            6 => tun.persistent = number != 0,
            7 => tun.multi_queue = number != 0,
            8 => tun.queues = number,
            9 => tun.disabled_queues = number,
            _ => {}
        }
    }
    tun
}

#[cfg(all(test, feature = "lab"))]
mod tests {
    use super::*;
    use crate::lab::Sandbox;

    /// What `ip rule add lookup 100 priority 1` does, and `ip route add NET/16 dev LINK table 100`.
    fn route_by_rule(netlink: &Handle, net: IpAddr, link: u32) {
        const TABLE: u8 = 100;
        let mut rule = RuleMessage::default();
        rule.header.family = family(net);
        rule.header.action = RuleAction::ToTable;
        rule.header.table = TABLE;
        rule.attributes.push(RuleAttribute::Priority(1));
        let rule = RouteNetlinkMessage::NewRule(rule);
        netlink.act("RTM_NEWRULE", rule, NLM_F_CREATE | NLM_F_EXCL).unwrap();
        let mut route = route_message(net, 16, RouteType::Unicast);
        route.header.table = TABLE;
        route.attributes.push(RouteAttribute::Oif(link));
        let route = RouteNetlinkMessage::NewRoute(route);
        netlink.act("RTM_NEWROUTE", route, NLM_F_CREATE | NLM_F_EXCL).unwrap();
    }

    fn asks_about_the_main_table() {
        let netlink = Handle::new().unwrap();
        let (main, other) = netlink.add_veth("main", "other").unwrap();
        netlink.set_up(main, true).unwrap();
        netlink.set_up(other, true).unwrap();
        for net in ["10.5.0.0", "fd05::"].map(|net| net.parse::<IpAddr>().unwrap()) {
            netlink.add_route(net, 16, None, main).unwrap();
            let used = netlink.route_in_use(net, 16).map(|route| route.links);
            assert!(used.is_none_or(|links| links == [main]), "{net}");
            route_by_rule(&netlink, net, other);
            assert_eq!(netlink.route_in_use(net, 16), None, "{net}");
            assert_eq!(netlink.routes_to(net, 16).unwrap()[0].links, [main], "{net}");
        }
    }

    #[test]
    fn a_route_of_another_table_is_not_taken_for_one_of_the_main_table() {
        let thread = std::thread::spawn(|| match Sandbox::enter() {
            Ok(_) => asks_about_the_main_table(),
            Err(error) => {
                assert!(std::env::var_os("TUN_DRIVER_REQUIRE_NETNS").is_none(), "{error}");
                eprintln!("skipped: no namespace can be had: {error}");
            }
        });
        thread.join().expect("only routes of the main table");
    }
}
