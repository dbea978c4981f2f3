//! `bpf(2)`, as much of it as a program that drops every packet needs.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

// linux/bpf.h: enum bpf_cmd, bpf_prog_type, bpf_attach_type.
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
const BPF_TCX_INGRESS: u32 = 46;
// linux/pkt_cls.h
const TC_ACT_SHOT: i32 = 2;

/// `struct bpf_insn` (linux/bpf.h).
#[repr(C)]
#[allow(non_camel_case_types)]
struct bpf_insn {
    code: u8,
    regs: u8,
    off: i16,
    imm: i32,
}
const _: () = assert!(size_of::<bpf_insn>() == 8);

/// The part of `union bpf_attr` (linux/bpf.h) that BPF_PROG_LOAD reads, up to `expected_attach_type`.
#[repr(C)]
#[allow(non_camel_case_types)]
#[derive(Default)]
struct bpf_attr_prog_load {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
}
const _: () = assert!(size_of::<bpf_attr_prog_load>() == 72);

/// The part of `union bpf_attr` (linux/bpf.h) that BPF_LINK_CREATE reads, up to `flags`.
#[repr(C)]
#[allow(non_camel_case_types)]
struct bpf_attr_link_create {
    prog_fd: u32,
    target_ifindex: u32,
    attach_type: u32,
    flags: u32,
}
const _: () = assert!(size_of::<bpf_attr_link_create>() == 16);

/// Drops all that device `index` of the calling thread's network namespace delivers, before anything of the stack sees it, until the
/// descriptor is closed. Needs CAP_BPF and CAP_NET_ADMIN outside of any user namespace, and kernel 6.6.
pub(crate) fn drop_ingress(index: u32) -> io::Result<OwnedFd> {
    let program = [
        bpf_insn {
            code: 0xb7,
            regs: 0,
            off: 0,
            imm: TC_ACT_SHOT,
        }, // BPF_ALU64 | BPF_MOV | BPF_K: r0 = TC_ACT_SHOT
        bpf_insn {
            code: 0x95,
            regs: 0,
            off: 0,
            imm: 0,
        }, // BPF_JMP | BPF_EXIT
    ];
    let license = c"MIT";
    let load = bpf_attr_prog_load {
        prog_type: BPF_PROG_TYPE_SCHED_CLS,
        insn_cnt: program.len() as u32,
        insns: program.as_ptr() as u64,
        license: license.as_ptr() as u64,
        prog_name: *b"tun_driver_sink\0",
        expected_attach_type: BPF_TCX_INGRESS,
        ..Default::default()
    };
    // SAFETY: `load` has the layout that BPF_PROG_LOAD reads; instructions and licence outlive the call.
    let program = unsafe { bpf(BPF_PROG_LOAD, &load) }?;
    let link = bpf_attr_link_create {
        prog_fd: program.as_fd().as_raw_fd() as u32,
        target_ifindex: index,
        attach_type: BPF_TCX_INGRESS,
        flags: 0,
    };
    // SAFETY: `link` has the layout that BPF_LINK_CREATE reads. The link holds the program, whose descriptor may close now.
    unsafe { bpf(BPF_LINK_CREATE, &link) }
}

/// bpf(2) for the commands that give a descriptor.
///
/// # Safety
/// `A` is laid out as `command` reads it, and what its addresses point to is readable during the call.
unsafe fn bpf<A>(command: libc::c_int, attributes: &A) -> io::Result<OwnedFd> {
    // SAFETY: the caller vouches for the attributes; the size says how much of them there is.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<A>()) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else knows; bpf(2) sets CLOEXEC on it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}
