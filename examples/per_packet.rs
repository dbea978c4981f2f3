//! The plain loop: one packet per call, no configuration. Prints what the network stack sends into a TUN device.
//!
//! Run as root, then in another terminal: `ip addr add 10.107.1.2/24 dev mytun; ip link set mytun up; ping 10.107.1.3`.

use tun_driver::{Iface, Mode};

fn main() {
    let iface = Iface::new("mytun", Mode::Tun).expect("Failed to create a TUN device");
    println!("created {}", iface.name());
    // The device's MTU, and four bytes of packet information in front.
    let mut buffer = vec![0; 1504];
    loop {
        let len = iface.recv(&mut buffer).unwrap();
        println!("{} bytes: {:02x?}", len - 4, &buffer[4..len]);
    }
}
