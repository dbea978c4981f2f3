//! The counters of the links, and of the stack between them, that tell where packets were dropped.

use std::fs;
use std::io;

use crate::lab::Namespace;
use crate::netlink::{Handle, LinkStats};

/// The links of one network namespace whose counters are read.
pub(super) struct Links {
    namespace: Namespace,
    handle: Handle,
    /// Name and index.
    links: Vec<(String, u32)>,
}

/// Counters of one namespace at one moment.
#[derive(Clone, Debug, Default)]
pub(super) struct Counts {
    links: Vec<(String, LinkStats)>,
    /// Packets that IP dropped.
    stack: u64,
}

/// Drops of IP by RFC 4293's names, as `/proc/net/snmp` and `/proc/net/snmp6` have them.
/// IPv4's `InNoRoutes` is among the extensions in `/proc/net/netstat`.
const STACK: [&str; 7] = [
    "InHdrErrors",
    "InNoRoutes",
    "InAddrErrors",
    "InUnknownProtos",
    "InDiscards",
    "OutDiscards",
    "OutNoRoutes",
];

impl Links {
    /// # Errors
    /// A link does not exist.
    pub(super) fn new(namespace: Namespace, names: &[&str]) -> io::Result<Self> {
        let handle = namespace.run(Handle::new)??;
        let links = names
            .iter()
            .map(|&name| {
                let index = handle.index_of(name);
                let index = index.map_err(|error| io::Error::new(error.kind(), format!("link {name}: {error}")))?;
                Ok((name.to_owned(), index))
            })
            .collect::<io::Result<_>>()?;
        Ok(Self {
            namespace,
            handle,
            links,
        })
    }

    pub(super) fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    pub(super) fn read(&self) -> io::Result<Counts> {
        let links = self
            .links
            .iter()
            .map(|(name, index)| Ok((name.clone(), self.handle.stats(*index)?)))
            .collect::<io::Result<_>>()?;
        let stack = self.namespace.run(|| {
            let text = fs::read_to_string("/proc/thread-self/net/snmp").unwrap_or_default();
            let six = fs::read_to_string("/proc/thread-self/net/snmp6").unwrap_or_default();
            let more = fs::read_to_string("/proc/thread-self/net/netstat").unwrap_or_default();
            dropped_by_ip(&text, "Ip:") + dropped_by_ip(&more, "IpExt:") + dropped_by_ip6(&six)
        })?;
        Ok(Counts { links, stack })
    }
}

impl Counts {
    pub(super) fn since(&self, earlier: &Self) -> Self {
        Self {
            links: self
                .links
                .iter()
                .zip(&earlier.links)
                .map(|((name, now), (_, then))| (name.clone(), now.since(then)))
                .collect(),
            stack: self.stack - earlier.stack.min(self.stack),
        }
    }

    /// The counters of a link; zeros for one that is not among them.
    pub(super) fn link(&self, name: &str) -> LinkStats {
        let found = self.links.iter().find(|(known, _)| known == name);
        found.map_or_else(LinkStats::default, |(_, stats)| *stats)
    }

    pub(super) fn stack(&self) -> u64 {
        self.stack
    }
}

/// `/proc/net/snmp`, `/proc/net/netstat`: a line of names and a line of values.
fn dropped_by_ip(text: &str, protocol: &str) -> u64 {
    let mut lines = text.lines().filter(|line| line.starts_with(protocol));
    let (Some(names), Some(values)) = (lines.next(), lines.next()) else {
        return 0;
    };
    names
        .split_whitespace()
        .zip(values.split_whitespace())
        .filter(|(name, _)| STACK.contains(name))
        .filter_map(|(_, value)| value.parse::<u64>().ok())
        .sum()
}

/// `/proc/net/snmp6`: a name and a value in each line.
fn dropped_by_ip6(text: &str) -> u64 {
    text.lines()
        .filter_map(|line| line.strip_prefix("Ip6")?.split_once(char::is_whitespace))
        .filter(|(name, _)| STACK.contains(name))
        .filter_map(|(_, value)| value.trim().parse::<u64>().ok())
        .sum()
}

/// Packets that a CPU's backlog had no room for, on the whole machine: the second column of `/proc/net/softnet_stat`.
pub(super) fn softnet_dropped() -> u64 {
    let text = fs::read_to_string("/proc/net/softnet_stat").unwrap_or_default();
    text.lines()
        .filter_map(|line| u64::from_str_radix(line.split_whitespace().nth(1)?, 16).ok())
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ip_dropped_is_read_by_name() {
        let text = "Ip: Forwarding InReceives InHdrErrors InAddrErrors OutNoRoutes ForwDatagrams\nIp: 1 900 2 30 400 9\nIcmp: InMsgs InDiscards\nIcmp: 5 7\n";
        assert_eq!(dropped_by_ip(text, "Ip:"), 432);
        assert_eq!(dropped_by_ip("nothing", "Ip:"), 0);
        let text =
            "TcpExt: A InNoRoutes\nTcpExt: 5 6\nIpExt: InNoRoutes InTruncatedPkts InMcastPkts\nIpExt: 70 800 9\n";
        assert_eq!(dropped_by_ip(text, "IpExt:"), 70);
        let text = "Ip6InReceives   \t70\nIp6InHdrErrors  \t3\nIp6OutDiscards\t4\nIcmp6InDiscards\t8\n";
        assert_eq!(dropped_by_ip6(text), 7);
    }
}
