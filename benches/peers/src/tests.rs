//! Every way moves packets intact through the harness, and makes the same device.
//!
//! Without privileges they do nothing, unless `TUN_DRIVER_REQUIRE_NETNS` says that they must.

use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

use serde_json::Value;
use tun_driver::lab::cases::{self, Load, Way};
use tun_driver::lab::measure::Plan;
use tun_driver::lab::offered::{Offer, offered};
use tun_driver::lab::wire::{self, Carrier, Datagrams, DatagramsEnd, Places, Transfer};
use tun_driver::lab::{Namespace, Sandbox};

use crate::versions;
use crate::ways::{self, Whose};

/// One at a time: they count packets and share two CPUs.
static TURN: Mutex<()> = Mutex::new(());

fn in_sandbox(test: impl FnOnce(&Sandbox)) {
    let _turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    match Sandbox::enter() {
        Ok(sandbox) => test(&sandbox),
        Err(error) if std::env::var_os("TUN_DRIVER_REQUIRE_NETNS").is_some() => panic!("{error}"),
        Err(error) => eprintln!("not tested: {error}"),
    }
}

fn once() -> Plan {
    Plan {
        rounds: 1,
        warm_up: 0,
        ..Plan::default()
    }
}

const LOAD: Load = Load {
    packet_len: 1400,
    packets: 64,
    stretches: 3,
};

fn nothing(_: tun_driver::lab::measure::Turn) -> std::io::Result<()> {
    Ok(())
}

#[test]
fn every_way_drains_and_sends_each_packet() {
    in_sandbox(|sandbox| {
        let taking = ways::moving();
        let ways: Vec<&dyn Way> = taking.iter().map(|taking| &*taking.way).collect();
        // Both fail if a packet or a byte is missing.
        let drained = cases::drain(sandbox, &ways, LOAD, &once(), &mut nothing).expect("drain");
        let (sent, _) = cases::sink(sandbox, &ways, LOAD, &once(), &mut nothing).expect("sink");
        for report in [drained, sent] {
            assert_eq!(report.ways.len(), taking.len());
            assert!(report.ways.iter().all(|way| way.samples[0].packets == 3 * 64));
        }
    });
}

#[test]
fn every_way_answers() {
    in_sandbox(|sandbox| {
        let taking = ways::echoing();
        let ways: Vec<&dyn Way> = taking.iter().map(|taking| &*taking.way).collect();
        let trips = cases::round_trip(sandbox, &ways, 100, &once(), &mut nothing).expect("round trip");
        assert!(trips.histograms.iter().all(|histogram| histogram.len() == 100));
    });
}

#[test]
fn every_way_serves_what_is_offered() {
    in_sandbox(|sandbox| {
        let taking = ways::serving();
        let ways: Vec<&dyn Way> = taking.iter().map(|taking| &*taking.way).collect();
        let offer = Offer {
            time: Duration::from_millis(100),
            ..Offer::at(Some(20_000))
        };
        // Fails if one is doubled, reordered or changed.
        let served = offered(sandbox, &ways, offer, &once(), &mut nothing).expect("offered");
        for (taking, tally) in taking.iter().zip(&served.tallies) {
            // A machine that is busy otherwise may overflow the queue.
            assert!(
                tally.sent > 1_000 && tally.lost < tally.sent / 2,
                "{}: {tally:?}",
                taking.entry.name
            );
        }
    });
}

#[test]
fn every_carrier_carries_datagrams_intact() {
    in_sandbox(|sandbox| {
        let taking = ways::carrying(true);
        // What puts segments together expects TCP; UDP superpackets are another matter.
        let ways: Vec<&dyn Carrier> = taking
            .iter()
            .filter(|taking| taking.entry.tier == 1)
            .map(|taking| &*taking.way)
            .collect();
        for (packet_len, end) in [
            (64, DatagramsEnd::Receiver),
            (1400, DatagramsEnd::Receiver),
            (1400, DatagramsEnd::Sink),
        ] {
            let load = Datagrams {
                rate: Some(10_000),
                packet_len,
                flows: 4,
                time: Duration::from_millis(100),
                end,
            };
            // Fails if one is doubled, reordered or changed.
            let carried = wire::datagrams(sandbox, &ways, load, Places::FREE, &once(), &mut nothing).expect("carried");
            for way in &carried.report.ways {
                let sample = &way.samples[0];
                let lost = sample.figure("lost_ppm");
                // A machine that is busy otherwise may overflow the queue.
                assert!(
                    (500..=1_000).contains(&sample.packets),
                    "{}: {} packets, {lost} ppm lost",
                    way.name,
                    sample.packets
                );
                assert_eq!(sample.figure("unexplained"), 0.0, "{}", way.name);
                assert!(!sample.cpu.is_zero(), "{}: its threads' time is known", way.name);
            }
        }
    });
}

#[test]
fn every_carrier_carries_tcp_both_ways() {
    in_sandbox(|sandbox| {
        if wire::iperf3_version().is_err() {
            assert!(
                std::env::var_os("TUN_DRIVER_REQUIRE_ALL").is_none(),
                "there is no iperf3"
            );
            eprintln!("not tested: there is no iperf3");
            return;
        }
        let taking = ways::carrying(true);
        let ways: Vec<&dyn Carrier> = taking.iter().map(|taking| &*taking.way).collect();
        let transfer = Transfer {
            streams: 2,
            time: Duration::from_secs(1),
        };
        let report = wire::tcp(sandbox, &ways, transfer, Places::FREE, &once(), &mut nothing).expect("carried");
        for way in &report.ways {
            let sample = &way.samples[0];
            assert!(sample.figure("gbit_per_s") > 0.01, "{}: {sample:?}", way.name);
            assert!(sample.figure("cpu_s_per_gb") > 0.0, "{}: {sample:?}", way.name);
        }
    });
}

/// What the kernel says of a device, without what differs by its name or time.
fn device(end: &Namespace, name: &str) -> Value {
    let output = end
        .run(|| Command::new("ip").args(["-d", "-j", "link", "show", name]).output())
        .expect("entered")
        .expect("ip");
    let links: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let link = &links[0];
    serde_json::json!({
        "mtu": link["mtu"], "txqlen": link["txqlen"], "qdisc": link["qdisc"], "tun": link["linkinfo"]["info_data"], "queues": link["num_tx_queues"],
        "gso": link["gso_max_size"],
    })
}

#[test]
fn all_make_the_same_device_in_tier_1() {
    in_sandbox(|_| {
        let mut first: Option<Value> = None;
        for taking in ways::carrying(true) {
            let ends = [Namespace::new().expect("one"), Namespace::new().expect("another")];
            let name = &taking.entry.name;
            let opened = taking.way.open([&ends[0], &ends[1]], "same0").expect(name);
            let seen = ends.each_ref().map(|end| device(end, "same0"));
            assert_eq!(seen[0], seen[1], "{name}");
            assert_eq!(seen[0]["tun"]["type"], "tun", "{name}: {}", seen[0]);
            assert_eq!(
                seen[0]["tun"]["vnet_hdr"],
                taking.entry.tier == 2,
                "{name}: {}",
                seen[0]
            );
            if taking.entry.tier == 1 {
                assert_eq!(first.get_or_insert(seen[0].clone()), &seen[0], "{name}");
            }
            drop(opened);
        }
        assert!(first.is_some());
    });
}

#[test]
fn each_case_begins_with_the_measures_and_has_ours() {
    for entries in [ways::moving(), ways::serving(), ways::echoing()]
        .map(|ways| ways.into_iter().map(|taking| taking.entry).collect::<Vec<_>>())
        .into_iter()
        .chain([ways::carrying(true), ways::carrying(false)].map(|ways| ways.into_iter().map(|t| t.entry).collect()))
    {
        assert_eq!(entries[0].name, ways::BASELINE);
        assert_eq!(entries[1].name, ways::PLAIN);
        assert!(entries.iter().any(|entry| entry.whose == Whose::Ours));
        let mut names: Vec<&str> = entries.iter().map(|entry| entry.name.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), entries.len(), "names are unique");
    }
}

#[test]
fn versions_are_those_of_the_lock_file() {
    let found = versions();
    let version = |name: &str| {
        found
            .iter()
            .find(|(known, _)| known == name)
            .map(|(_, version)| version.as_str())
    };
    assert_eq!(version("tun-tap"), Some("0.1.4"));
    assert!(version("tun-rs").is_some_and(|version| version.starts_with("2.8.")));
    assert_eq!(version("tun_driver"), Some("0.1.0"));
}
