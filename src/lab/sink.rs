//! A place right behind a device where packets end.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;

use crate::netlink::Handle;
use crate::sys::bpf;

/// Drops what is written to a TUN/TAP device right behind it, so that a measurement has the device in it and not the stack. The device
/// counts the packets as usual (`rx_packets`). Ends when dropped.
pub struct Sink {
    means: Means,
}

enum Means {
    /// Closing the descriptor detaches the program.
    Bpf(#[allow(dead_code)] OwnedFd),
    Routing {
        netlink: Handle,
        name: String,
    },
}

impl Sink {
    /// A sink behind device `index` of the calling thread's namespace: by [`with_bpf`](Self::with_bpf), or else by
    /// [`with_routing`](Self::with_routing). Say which one ([`kind`](Self::kind)) beside any figure: their costs differ.
    pub fn behind(index: u32) -> io::Result<Self> {
        Self::with_bpf(index).or_else(|_| Self::with_routing(index))
    }

    /// A sink by a BPF program at the device's ingress that drops every packet before the stack sees it. Kernel 6.6 and later, root.
    ///
    /// # Errors
    ///
    /// EPERM without CAP_BPF and CAP_NET_ADMIN (always so in a user namespace), EINVAL on an older kernel, ENODEV without such a device.
    pub fn with_bpf(index: u32) -> io::Result<Self> {
        Ok(Self {
            means: Means::Bpf(bpf::drop_ingress(index)?),
        })
    }

    /// A sink by a routing rule: IP packets that come in by the device are dropped at the route lookup, unless they are for an address of
    /// this namespace; send to others. Needs no privilege over the host.
    pub fn with_routing(index: u32) -> io::Result<Self> {
        let netlink = Handle::new()?;
        let name = netlink.link(index)?.name;
        netlink.add_blackhole_rule(&name)?;
        Ok(Self {
            means: Means::Routing { netlink, name },
        })
    }

    /// What it is, for the output.
    pub fn kind(&self) -> &'static str {
        match self.means {
            Means::Bpf(_) => "BPF drop at tc ingress",
            Means::Routing { .. } => "routing drop",
        }
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        if let Means::Routing { netlink, name } = &self.means {
            // It may have gone with its namespace's owner; nothing is left to do then.
            let _ = netlink.del_blackhole_rule(name);
        }
    }
}

impl fmt::Debug for Sink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sink").field("kind", &self.kind()).finish()
    }
}
