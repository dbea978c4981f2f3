//! Which queue the kernel sends a flow to, as the documentation of `Engine` has it: automatic steering by what this device's user writes.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use common::{again, need_tun, trial};
use tun_driver::lab::packet::{Framing, Spec};
use tun_driver::lab::{Filler, Namespace, Tracker, sysctl};
use tun_driver::{Batch, Builder, Endpoint, Engine, Handler, Mode, MultiQueue, PortId, Worker};

fn main() {
    let trials: [(&str, fn()); 8] = [
        ("a flow that is answered where it came in stays there", stays),
        ("both directions of a TCP connection stay on one worker", tcp),
        ("a flow follows the queue that it was last written to, at once", follows),
        ("fragments go by addresses, whatever their flow", fragments),
        ("IPv6 flows are told apart by ports", ipv6),
        ("a flow that is not written to goes by its hash again", expires),
        ("a queue that goes leaves its flows to the last one", queue_less),
        ("no packet is lost while queues come and go", come_and_go),
    ];
    common::run(
        trials
            .into_iter()
            .map(|(name, work)| {
                trial(name, move || {
                    need_tun();
                    work();
                })
            })
            .collect(),
    );
}

const HERE: Ipv4Addr = Ipv4Addr::new(10, 6, 0, 1);
const THERE: Ipv4Addr = Ipv4Addr::new(10, 6, 0, 2);

fn device(name: &str, queues: usize, address: Ipv4Addr) -> MultiQueue {
    let _ = sysctl("net/ipv6/conf/default/disable_ipv6", 1);
    Builder::new(name, Mode::Tun)
        .queues(queues)
        .address(address, 24)
        .up(true)
        .open()
        .unwrap()
}

/// One packet that a handler saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    /// Which source of the engine, and which of its queues.
    source: usize,
    queue: usize,
    /// The lower and the higher port number: the same in both directions. Zeroes for fragments.
    flow: (u16, u16),
    number: u8,
}

#[derive(Clone, Copy, Debug)]
enum Answer {
    Nothing,
    /// Addresses and ports swapped, out where it came in.
    Echo,
    /// Out by the other device of this worker.
    Across,
}

struct Logging {
    ports: Vec<(PortId, usize, usize)>,
    answer: Answer,
    log: Vec<Seen>,
}

impl Handler for Logging {
    fn packets(&mut self, worker: &mut Worker, port: PortId, batch: &mut Batch) {
        let &(_, source, queue) = self.ports.iter().find(|(id, ..)| *id == port).unwrap();
        for packet in batch.iter() {
            let fragment = packet[0] == 0x45 && packet[6] & 0x3f | packet[7] != 0;
            let at = if packet[0] == 0x45 { 20 } else { 40 };
            let ends = [at, at + 2].map(|at| u16::from_be_bytes([packet[at], packet[at + 1]]));
            let flow = (*ends.iter().min().unwrap(), *ends.iter().max().unwrap());
            self.log.push(Seen {
                source,
                queue,
                flow: if fragment { (0, 0) } else { flow },
                number: packet.last().copied().unwrap(),
            });
        }
        let out = match self.answer {
            Answer::Nothing => return,
            Answer::Echo => {
                for packet in batch.iter_mut() {
                    let (source, target) = packet[12..20].split_at_mut(4);
                    source.swap_with_slice(target);
                    let (source, target) = packet[20..24].split_at_mut(2);
                    source.swap_with_slice(target);
                }
                port
            }
            Answer::Across => self.ports.iter().find(|(_, other, _)| *other != source).unwrap().0,
        };
        let sent = worker.send_many(out, batch);
        assert_eq!((sent.refusal, sent.stopped), (None, None));
    }
}

fn start(devices: Vec<MultiQueue>, workers: usize, answer: Answer) -> Engine<Logging> {
    let mut builder = Engine::builder().workers(workers);
    for device in devices {
        builder = builder.device(device);
    }
    let start = move |seat: &mut tun_driver::Seat<'_>| {
        let ports = seat.ports().iter().map(|port| (port.id, port.source, port.number));
        Ok(Logging {
            ports: ports.collect(),
            answer,
            log: Vec::new(),
        })
    };
    builder.start(start).unwrap()
}

/// What all workers saw since the last call.
fn log(engine: &Engine<Logging>) -> Vec<Seen> {
    let workers = 0..engine.workers().len();
    let taken = workers.map(|worker| {
        engine
            .run_on(worker, |handler, _| std::mem::take(&mut handler.log))
            .unwrap()
    });
    taken.flatten().collect()
}

/// What all workers see until there are `count` packets.
fn wait_for(engine: &Engine<Logging>, count: usize) -> Vec<Seen> {
    let end = Instant::now() + Duration::from_secs(20) * common::slowness();
    let mut seen = log(engine);
    while seen.len() < count {
        assert!(Instant::now() < end, "{} of {count}: {seen:?}", seen.len());
        thread::sleep(Duration::from_millis(1));
        seen.extend(log(engine));
    }
    seen
}

/// Sends one packet from here, and says which queue it came to.
fn queue_of(engine: &Engine<Logging>, client: &UdpSocket, far: SocketAddr) -> usize {
    client.send_to(&[7], far).unwrap();
    let seen = wait_for(engine, 1);
    assert_eq!(seen.len(), 1, "{seen:?}");
    seen[0].queue
}

/// Writes one packet of the flow between `far` and `near` to a queue of the only worker.
fn write_to(engine: &Engine<Logging>, queue: usize, far: SocketAddr, near: SocketAddr) {
    let sent = engine.run_on(0, move |handler, worker| {
        let (port, ..) = handler.ports[queue];
        let mut packet = [0; 60];
        let length = Spec::new(far, near).build(&mut packet, 60, 0, 0);
        worker.send(port, &packet[..length])
    });
    sent.unwrap().unwrap();
}

fn client() -> UdpSocket {
    let client = UdpSocket::bind((HERE, 0)).unwrap();
    client
        .set_read_timeout(Some(Duration::from_secs(20) * common::slowness()))
        .unwrap();
    client
}

fn stays() {
    const FLOWS: usize = 32;
    const TRIPS: u8 = 50;
    let engine = start(vec![device("s0", 4, HERE)], 4, Answer::Echo);
    let clients: Vec<UdpSocket> = (0..FLOWS).map(|_| client()).collect();
    for trip in 0..TRIPS {
        for client in &clients {
            client.send_to(&[trip], (THERE, 7)).unwrap();
        }
        for client in &clients {
            let mut answer = [0; 4];
            assert_eq!(again(|| client.recv(&mut answer)).unwrap(), 1);
            assert_eq!(answer[0], trip);
        }
    }
    let mut flows: BTreeMap<(u16, u16), Vec<Seen>> = BTreeMap::new();
    for seen in wait_for(&engine, FLOWS * usize::from(TRIPS)) {
        flows.entry(seen.flow).or_default().push(seen);
    }
    assert_eq!(flows.len(), FLOWS);
    for (flow, seen) in &flows {
        assert!(
            seen.iter().all(|packet| packet.queue == seen[0].queue),
            "{flow:?}: {seen:?}"
        );
        assert!(
            seen.iter().map(|packet| packet.number).eq(0..TRIPS),
            "{flow:?}: {seen:?}"
        );
    }
    let used: BTreeSet<usize> = flows.values().map(|seen| seen[0].queue).collect();
    assert!(used.len() > 1, "32 flows on one of four queues");
}

fn tcp() {
    const CONNECTIONS: usize = 12;
    const BYTES: usize = 100_000;
    let there = Namespace::new().unwrap();
    let right = there.run(|| device("s1", 3, THERE)).unwrap();
    let engine = start(vec![device("s0", 3, HERE), right], 3, Answer::Across);
    let listener = there.run(|| TcpListener::bind((THERE, 0))).unwrap().unwrap();
    let address = listener.local_addr().unwrap();
    let server = thread::spawn(move || {
        for _ in 0..CONNECTIONS {
            let (mut stream, _) = listener.accept().unwrap();
            stream
                .set_read_timeout(Some(Duration::from_secs(20) * common::slowness()))
                .unwrap();
            let mut got = vec![0; BYTES];
            stream.read_exact(&mut got).unwrap();
            stream.write_all(&got).unwrap();
        }
    });
    for connection in 0..CONNECTIONS {
        let mut stream = TcpStream::connect(address).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20) * common::slowness()))
            .unwrap();
        let sent: Vec<u8> = (0..BYTES).map(|at| (at * 7 + connection) as u8).collect();
        stream.write_all(&sent).unwrap();
        let mut got = vec![0; BYTES];
        stream.read_exact(&mut got).unwrap();
        assert!(got == sent);
    }
    server.join().unwrap();
    let seen = log(&engine);
    let mut flows: BTreeMap<(u16, u16), BTreeSet<(usize, usize)>> = BTreeMap::new();
    for packet in &seen {
        flows
            .entry(packet.flow)
            .or_default()
            .insert((packet.source, packet.queue));
    }
    assert_eq!(flows.len(), CONNECTIONS);
    for (flow, places) in &flows {
        let queue = places.first().unwrap().1;
        // Queue k of both devices is worker k's.
        assert_eq!(places, &BTreeSet::from([(0, queue), (1, queue)]), "{flow:?}");
    }
    let used: BTreeSet<usize> = flows.values().map(|places| places.first().unwrap().1).collect();
    assert!(used.len() > 1, "{CONNECTIONS} connections on one of three queues");
    assert!(engine.stop_within(Duration::from_secs(10)).is_clean());
}

fn follows() {
    let engine = start(vec![device("s0", 4, HERE)], 1, Answer::Nothing);
    let (client, far) = (client(), SocketAddr::from((THERE, 7)));
    let near = client.local_addr().unwrap();
    let hashed = queue_of(&engine, &client, far);
    assert_eq!(queue_of(&engine, &client, far), hashed, "what is not known is hashed");
    for queue in [1, 3, 0, 2, 3] {
        write_to(&engine, queue, far, near);
        for _ in 0..3 {
            assert_eq!(queue_of(&engine, &client, far), queue, "one write moves it");
        }
    }
}

fn fragments() {
    const FLOWS: u16 = 16;
    let engine = start(vec![device("s0", 4, HERE)], 1, Answer::Nothing);
    let client = client();
    let near = client.local_addr().unwrap();
    for flow in 0..FLOWS {
        write_to(&engine, usize::from(flow) % 4, (THERE, 4000 + flow).into(), near);
        client.send_to(&[1; 3000], (THERE, 4000 + flow)).unwrap();
    }
    // Three of each.
    let seen = wait_for(&engine, usize::from(FLOWS) * 3);
    assert!(seen.iter().all(|packet| packet.flow == (0, 0)));
    assert!(seen.iter().all(|packet| packet.queue == seen[0].queue), "{seen:?}");
}

fn ipv6() {
    let _ = sysctl("net/ipv6/conf/default/accept_dad", 0);
    let device = Builder::new("s6", Mode::Tun)
        .queues(4)
        .address("fd00:6::1".parse::<std::net::Ipv6Addr>().unwrap(), 64)
        .up(true)
        .open()
        .unwrap();
    common::await_address("fd00:6::1".parse().unwrap());
    let engine = start(vec![device], 1, Answer::Nothing);
    let client = UdpSocket::bind("[fd00:6::1]:0").unwrap();
    for flow in 0..32 {
        client.send_to(&[1], ("fd00:6::2", 4000 + flow)).unwrap();
    }
    let near = client.local_addr().unwrap().port();
    let mut seen = wait_for(&engine, 32);
    let end = Instant::now() + Duration::from_secs(20) * common::slowness();
    let ours = |seen: &[Seen]| -> Vec<Seen> {
        let ours = seen
            .iter()
            .filter(|packet| packet.flow.0 == near || packet.flow.1 == near);
        ours.copied().collect()
    };
    while ours(&seen).len() < 32 && Instant::now() < end {
        seen.extend(log(&engine));
    }
    let used: BTreeSet<usize> = ours(&seen).iter().map(|packet| packet.queue).collect();
    assert!(used.len() > 1, "{used:?}");
}

/// Being sent to does not keep a flow known, only being written does.
fn expires() {
    let engine = start(vec![device("s0", 4, HERE)], 1, Answer::Nothing);
    let (client, far) = (client(), SocketAddr::from((THERE, 7)));
    let near = client.local_addr().unwrap();
    let hashed = queue_of(&engine, &client, far);
    let other = (hashed + 1) % 4;
    write_to(&engine, other, far, near);
    let end = Instant::now() + Duration::from_secs(30) * common::slowness();
    let mut steps = 0u8;
    loop {
        client.send_to(&[steps], far).unwrap();
        let seen = wait_for(&engine, 1);
        assert_eq!((seen.len(), seen[0].number), (1, steps), "once, and in order");
        assert!(seen[0].queue == other || seen[0].queue == hashed, "{seen:?}");
        if seen[0].queue == hashed {
            break;
        }
        assert!(Instant::now() < end, "it never expires");
        steps += 1;
        thread::sleep(Duration::from_millis(200));
    }
    assert!(steps > 0, "it was not forgotten at once");
    // And back, as soon as it is written to again.
    write_to(&engine, other, far, near);
    assert_eq!(queue_of(&engine, &client, far), other);
}

/// The last queue takes the place of the one that goes, with its flows; its own go somewhere, and back when they are written to.
fn queue_less() {
    let engine = start(vec![device("s0", 4, HERE)], 1, Answer::Nothing);
    let (client, of_gone, of_last) = (client(), (THERE, 7).into(), (THERE, 8).into());
    let near = client.local_addr().unwrap();
    write_to(&engine, 1, of_gone, near);
    write_to(&engine, 3, of_last, near);
    assert_eq!(queue_of(&engine, &client, of_gone), 1);
    assert_eq!(queue_of(&engine, &client, of_last), 3);
    let gone = engine.run_on(0, |handler, _| handler.ports[1].0).unwrap();
    drop(engine.detach(0, gone).unwrap());
    assert_eq!(queue_of(&engine, &client, of_gone), 3);
    // Wherever that is: it arrives, once.
    let _somewhere = queue_of(&engine, &client, of_last);
    write_to(&engine, 3, of_last, near);
    assert_eq!(queue_of(&engine, &client, of_last), 3);
}

/// Counts what it sees.
struct Counting(Tracker);

impl Handler for Counting {
    fn packets(&mut self, _: &mut Worker, _: PortId, batch: &mut Batch) {
        for packet in batch.drain() {
            self.0.record(Framing::NONE.check(&packet));
        }
    }
}

fn come_and_go() {
    let device = device("s0", 2, HERE);
    let (index, settings) = (device.index().unwrap(), device.device().unwrap().clone());
    let engine = Engine::builder()
        .device(device)
        .workers(2)
        .start(|_| Ok(Counting(Tracker::new(64))))
        .unwrap();
    let mut filler = Filler::new(index, THERE.into(), 64).unwrap();
    let mut sent = 0;
    let received = || engine.stats().total().received_packets;
    let mut offer = |wait: bool| {
        filler.fill(64, 100).unwrap();
        sent += 64;
        let end = Instant::now() + Duration::from_secs(20) * common::slowness();
        // With half a queue's length still under way at most.
        while received() + if wait { 0 } else { 200 } < sent {
            assert!(Instant::now() < end, "{} of {sent}", received());
            thread::sleep(Duration::from_micros(200));
        }
    };
    for round in 0..10 {
        // While packets flow: a queue more.
        let mut added = None;
        for step in 0..20 {
            offer(false);
            if step == 10 {
                let queue = settings.add_queue().unwrap();
                added = Some(engine.attach(round % 2, queue).unwrap());
            }
        }
        // What lies in a queue goes with it: this one is emptied before.
        offer(true);
        let released = engine.detach(round % 2, added.unwrap()).unwrap();
        assert!(released.counters.received_packets > 0, "no flow came to the new queue");
        assert!(released.undelivered.is_empty() && matches!(released.endpoint, Endpoint::Queue(_)));
        drop(released);
        for _ in 0..5 {
            offer(false);
        }
    }
    offer(true);
    let mut books = Tracker::new(64);
    for worker in 0..2 {
        books.merge(&engine.run_on(worker, |handler, _| handler.0.clone()).unwrap());
    }
    filler.tell(&mut books);
    let summary = books.summary();
    assert_eq!(
        (summary.lost, summary.duplicates, summary.damaged, summary.invented),
        (0, 0, 0, 0),
        "{summary}"
    );
}
