//! What this host can do, found out by trying.

use std::io;
use std::os::fd::AsFd;
use std::thread;

use io_uring::{IoUring, Probe, cqueue, opcode, squeue};

use crate::attach;
use crate::sys::{host, tun};

/// What this host and this process can do, as [`probe`](Self::probe) found it.
///
/// `None` in a field means that it could not be found out, and the reason is in another field.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Support {
    /// The release of the running kernel, such as `6.1.0-18-amd64`. Only to be shown: nothing here is concluded from it.
    pub kernel_release: Option<String>,
    /// Whether `/dev/net/tun` can be opened, and is the node of the tun driver.
    pub tun_node: TunNode,
    /// The flags that TUNSETIFF knows (TUNGETFEATURES); `None` if the node cannot be opened.
    pub tun_features: Option<u32>,
    /// Whether devices may have several queues (`IFF_MULTI_QUEUE`); `None` if the node cannot be opened.
    pub multi_queue: Option<bool>,
    /// Whether reads and writes of a queue take `RWF_NOWAIT` (Linux 6.4), which the ring backend needs; `None` if the node cannot be opened.
    pub tun_nowait: Option<bool>,
    /// io_uring.
    pub io_uring: IoUringSupport,
    /// How much memory this user may lock, in bytes: RLIMIT_MEMLOCK. `None`: no limit. It binds only without
    /// [`cap_ipc_lock`](Self::cap_ipc_lock).
    pub memlock_limit: Option<u64>,
    /// The calling thread has CAP_IPC_LOCK, so the limit on locked memory does not bind.
    pub cap_ipc_lock: bool,
    /// The calling thread has CAP_NET_ADMIN, so may create devices, if the network namespace is of its user namespace.
    pub cap_net_admin: bool,
    /// The processors that the calling thread may run on, by number.
    pub allowed_cpus: Vec<usize>,
}

/// The state of `/dev/net/tun`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TunNode {
    /// It can be opened.
    Opens,
    /// There is none (ENOENT): no driver, or a container without the device.
    Missing,
    /// There is one, but opening it fails with this errno: EACCES or EPERM (no right to), ENODEV (no driver).
    Refused(i32),
    /// It is a file, a directory or another device, not the character device 10:200.
    Foreign,
}

/// What io_uring offers.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct IoUringSupport {
    /// A ring can be made.
    pub available: bool,
    /// Why not: EPERM (sysctl or seccomp), ENOSYS (no such call, or seccomp), ENOMEM (memory limit).
    pub errno: Option<i32>,
    /// The sysctl `kernel.io_uring_disabled` (Linux 6.6): 0 allowed, 1 for a group and CAP_SYS_ADMIN only, 2 for nobody.
    pub disabled_sysctl: Option<u32>,
    /// `IORING_SETUP_SINGLE_ISSUER` (Linux 6.0).
    pub single_issuer: bool,
    /// `IORING_SETUP_DEFER_TASKRUN` (Linux 6.1), with SINGLE_ISSUER.
    pub defer_taskrun: bool,
    /// `IORING_SETUP_TASKRUN_FLAG` (Linux 5.19), tried with COOP_TASKRUN.
    pub taskrun_flag: bool,
    /// `IORING_SETUP_SUBMIT_ALL` (Linux 5.18).
    pub submit_all: bool,
    /// `IORING_SETUP_NO_SQARRAY` (Linux 6.6).
    pub no_sqarray: bool,
    /// `IORING_OP_READ_FIXED`.
    pub read_fixed: bool,
    /// `IORING_OP_WRITE_FIXED`.
    pub write_fixed: bool,
    /// `IORING_OP_READ`, which serves where buffers cannot be registered.
    pub read: bool,
    /// `IORING_OP_WRITE`, which serves where buffers cannot be registered.
    pub write: bool,
    /// `IORING_OP_POLL_ADD`.
    pub poll_add: bool,
    /// `IORING_OP_ASYNC_CANCEL`.
    pub async_cancel: bool,
    /// `IORING_OP_TIMEOUT`.
    pub timeout: bool,
    /// `IORING_OP_SENDMSG`.
    pub sendmsg: bool,
    /// `IORING_OP_RECVMSG`.
    pub recvmsg: bool,
    /// `IORING_OP_MSG_RING` (Linux 5.18).
    pub msg_ring: bool,
    /// Rings can be entered by a registered descriptor (`IORING_REGISTER_RING_FDS`, Linux 5.18).
    pub registered_ring: bool,
}

impl Support {
    /// Tries what there is to try: opens the node, makes a few small rings, and asks for limits. It creates no device and leaves nothing
    /// behind. It answers for the calling thread; others may have other capabilities and processors.
    ///
    /// ```
    /// let support = tun_driver::Support::probe();
    /// println!("io_uring: {}, multi-queue: {:?}", support.io_uring.available, support.multi_queue);
    /// ```
    pub fn probe() -> Self {
        let node = attach::open_node(true);
        let tun_features = node.as_ref().ok().and_then(|fd| tun::features(fd.as_fd()).ok());
        // If these cannot be asked, they are taken as missing, which is the answer that promises less.
        let capabilities = host::effective_capabilities().unwrap_or(0);
        Self {
            kernel_release: host::kernel_release().ok(),
            tun_features,
            multi_queue: tun_features.map(|features| features & u32::from(tun::IFF_MULTI_QUEUE) != 0),
            tun_nowait: node
                .as_ref()
                .ok()
                .and_then(|fd| tun::unattached_takes_nowait(fd.as_fd())),
            tun_node: match node {
                Ok(_) => TunNode::Opens,
                Err(error) => match error.raw_os_error() {
                    Some(libc::ENOENT) => TunNode::Missing,
                    // Something else opened, or is a directory.
                    None | Some(libc::EISDIR) => TunNode::Foreign,
                    Some(errno) => TunNode::Refused(errno),
                },
            },
            io_uring: IoUringSupport::probe_elsewhere(),
            memlock_limit: host::memlock_limit().unwrap_or(Some(0)),
            cap_ipc_lock: capabilities >> host::CAP_IPC_LOCK & 1 != 0,
            cap_net_admin: capabilities >> host::CAP_NET_ADMIN & 1 != 0,
            allowed_cpus: host::allowed_cpus().unwrap_or_default(),
        }
    }
}

impl IoUringSupport {
    /// On a thread of its own: the end of a ring interrupts the thread that made it, some time later, so that a call of it may fail with EINTR.
    fn probe_elsewhere() -> Self {
        thread::scope(|scope| {
            let probing = thread::Builder::new().name("probe".to_owned());
            match probing.spawn_scoped(scope, Self::probe).map(|probe| probe.join()) {
                Ok(Ok(found)) => found,
                // No thread can be had.
                _ => Self::probe(),
            }
        })
    }

    fn probe() -> Self {
        let plain = IoUring::new(ENTRIES);
        let mut operations = Probe::new();
        let mut registered_ring = false;
        if let Ok(ring) = &plain {
            // Fails before Linux 5.6, and leaves everything unsupported.
            let _ = ring.submitter().register_probe(&mut operations);
            let mut submitter = ring.submitter();
            registered_ring = submitter.register_ring_fd().is_ok();
            if registered_ring {
                // The kernel keeps the registration for this thread, not for the ring: give it back.
                let _ = submitter.unregister_ring_fd();
            }
        }
        let has = |code| operations.is_supported(code);
        Self {
            available: plain.is_ok(),
            errno: plain.as_ref().err().and_then(io::Error::raw_os_error),
            disabled_sysctl: std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled")
                .ok()
                .and_then(|text| text.trim().parse().ok()),
            single_issuer: takes(|ring| _ = ring.setup_single_issuer()),
            defer_taskrun: takes(|ring| _ = ring.setup_single_issuer().setup_defer_taskrun()),
            taskrun_flag: takes(|ring| _ = ring.setup_coop_taskrun().setup_taskrun_flag()),
            submit_all: takes(|ring| _ = ring.setup_submit_all()),
            no_sqarray: takes(|ring| _ = ring.setup_no_sqarray()),
            read_fixed: has(opcode::ReadFixed::CODE),
            write_fixed: has(opcode::WriteFixed::CODE),
            read: has(opcode::Read::CODE),
            write: has(opcode::Write::CODE),
            poll_add: has(opcode::PollAdd::CODE),
            async_cancel: has(opcode::AsyncCancel::CODE),
            timeout: has(opcode::Timeout::CODE),
            sendmsg: has(opcode::SendMsg::CODE),
            recvmsg: has(opcode::RecvMsg::CODE),
            msg_ring: has(opcode::MsgRingData::CODE),
            registered_ring,
        }
    }
}

/// Whether a ring can be made with these set-up flags.
fn takes(flags: impl FnOnce(&mut io_uring::Builder)) -> bool {
    let mut builder = IoUring::<squeue::Entry, cqueue::Entry>::builder();
    flags(&mut builder);
    builder.build(ENTRIES).is_ok()
}

/// The smallest rings that there are.
const ENTRIES: u32 = 2;
