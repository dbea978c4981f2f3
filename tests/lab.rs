//! The laboratory itself: what the other tests and the benchmarks stand on.

mod common;

use std::collections::HashSet;
use std::fs;
use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::os::linux::fs::MetadataExt;
use std::process::Command;
use std::thread;

use common::trial;
use tun_driver::lab::{Namespace, Sandbox, sysctl};

fn main() {
    common::run(vec![
        trial(
            "a trial stands alone in its namespace, loopback up",
            alone_with_loopback,
        ),
        trial(
            "a namespace is another one, and its sockets stay in it",
            namespace_is_another,
        ),
        trial("a panic inside a namespace reaches the caller", panic_in_namespace),
        trial("a setting is the namespace's own", sysctl_is_local),
        trial("a thread can sandbox itself again", sandbox_again),
        trial("child processes start inside", children_start_inside),
    ])
}

fn inode() -> u64 {
    fs::metadata("/proc/thread-self/ns/net").unwrap().st_ino()
}

fn devices() -> HashSet<String> {
    let table = fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    table
        .lines()
        .skip(2)
        .filter_map(|line| Some(line.split_once(':')?.0.trim().to_owned()))
        .collect()
}

fn alone_with_loopback() {
    // Kernels with tunnel modules built in put their fallback devices (sit0, tunl0, …) into each namespace; real ones are not among them.
    assert!(devices().contains("lo"));
    assert!(
        !devices().contains("eth0"),
        "the host's devices are visible: {:?}",
        devices()
    );
    assert_ne!(inode(), fs::metadata("/proc/1/ns/net").map_or(0, |host| host.st_ino()));
    let receiver = UdpSocket::bind("127.0.0.1:0").unwrap();
    let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
    sender.send_to(b"up", receiver.local_addr().unwrap()).unwrap();
    assert_eq!(receiver.recv(&mut [0; 16]).unwrap(), 2);
}

fn namespace_is_another() {
    let here = inode();
    let other = Namespace::new().unwrap();
    let there = other.run(inode).unwrap();
    assert_ne!(here, there);
    assert_eq!(inode(), here, "the caller does not move");
    let fd = fs::metadata(format!(
        "/proc/self/fd/{}",
        std::os::fd::AsRawFd::as_raw_fd(&other.as_fd())
    ))
    .unwrap();
    assert_eq!(fd.st_ino(), there);

    // The same port twice: only possible in two namespaces.
    let first = UdpSocket::bind("127.0.0.1:4000").unwrap();
    let second = other.run(|| UdpSocket::bind("127.0.0.1:4000").unwrap()).unwrap();
    let stranger = UdpSocket::bind("127.0.0.1:0").unwrap();
    second.set_nonblocking(true).unwrap();
    stranger.send_to(b"x", "127.0.0.1:4000").unwrap();
    assert_eq!(first.recv(&mut [0; 4]).unwrap(), 1);
    assert_eq!(
        second.recv(&mut [0; 4]).unwrap_err().kind(),
        std::io::ErrorKind::WouldBlock
    );

    thread::spawn(move || {
        other.enter().unwrap();
        assert_eq!(inode(), there);
    })
    .join()
    .unwrap();
}

fn panic_in_namespace() {
    let other = Namespace::new().unwrap();
    let outcome = std::panic::catch_unwind(|| {
        other
            .run(|| std::panic::resume_unwind(Box::new("inside")))
            .map(|(): ()| ())
            .unwrap();
    });
    assert_eq!(*outcome.unwrap_err().downcast::<&str>().unwrap(), "inside");
}

fn sysctl_is_local() {
    let read = || {
        fs::read_to_string("/proc/sys/net/ipv4/ip_forward")
            .unwrap()
            .trim()
            .to_owned()
    };
    let other = Namespace::new().unwrap();
    sysctl("net/ipv4/ip_forward", 1).unwrap();
    assert_eq!(read(), "1");
    other.run(|| sysctl("net/ipv4/ip_forward", 0)).unwrap().unwrap();
    assert_eq!(other.run(read).unwrap(), "0");
    assert_eq!(read(), "1");

    assert_eq!(
        sysctl("kernel/hostname", "x").unwrap_err().kind(),
        std::io::ErrorKind::InvalidInput
    );
    assert_eq!(
        sysctl("net/../kernel/hostname", "x").unwrap_err().kind(),
        std::io::ErrorKind::InvalidInput
    );
    let unknown = sysctl("net/ipv4/no_such_setting", 1).unwrap_err();
    assert!(unknown.to_string().contains("no_such_setting"), "{unknown}");
}

fn sandbox_again() {
    let before = inode();
    let sandbox = Sandbox::enter().unwrap();
    assert_ne!(inode(), before);
    assert!(
        !sandbox.is_rootless(),
        "the process is privileged over its namespaces by now"
    );
}

fn children_start_inside() {
    let output = Command::new("readlink").arg("/proc/self/ns/net").output().unwrap();
    assert!(output.status.success());
    assert_eq!(
        String::from_utf8(output.stdout).unwrap().trim(),
        format!("net:[{}]", inode())
    );
}
