//! Namespaces that vanish: for the calling process or thread ([`Sandbox`]), and beside it ([`Namespace`]).

use std::fmt;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::linux::fs::MetadataExt;
use std::panic;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::thread;

use crate::netlink::Handle;
use crate::sys::{netns, setns};

/// The interface index of `lo` in each namespace.
const LOOPBACK: u32 = 1;

/// The inode of the network namespace that the process had before its first sandbox. Nothing in this module may touch that one.
static HOST: OnceLock<u64> = OnceLock::new();

/// Proof that the calling thread stands in a network namespace of its own, with loopback up and nothing else in it.
///
/// The namespace goes when its last thread has ended and its last descriptor (device, socket, [`Namespace`]) is closed. Dropping the value
/// does not lead back.
#[derive(Debug)]
pub struct Sandbox {
    rootless: bool,
}

impl Sandbox {
    /// Moves the calling thread into a fresh network namespace; threads and child processes it starts from then on begin there too.
    ///
    /// With CAP_SYS_ADMIN this is `unshare(CLONE_NEWNET)`, which any thread may do at any time. Without, a user namespace is made as well,
    /// in which the caller is root over the new network namespace (and over nothing else): that moves the whole process, and the kernel
    /// refuses it once the process has a second thread, so call this first thing in `main`. In a process that did so, later calls are of
    /// the first sort again.
    ///
    /// Inside, IPv6 does without duplicate address detection, router solicitations and link-local addresses, so that devices carry what the
    /// caller sends and little else.
    ///
    /// # Errors
    ///
    /// `InvalidInput` if a user namespace is needed and the process has several threads; otherwise the kernel's refusal (EPERM, ENOSPC),
    /// with the settings that usually cause it in the message.
    pub fn enter() -> io::Result<Self> {
        HOST.get_or_init(|| current_inode().unwrap_or(0));
        let rootless = match netns::unshare_net() {
            Ok(()) => false,
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                enter_user_namespace()?;
                true
            }
            Err(error) => return Err(told("unshare(CLONE_NEWNET)", &error)),
        };
        furnish()?;
        Ok(Self { rootless })
    }

    /// Whether a user namespace had to be made: BPF, CAP_NET_RAW towards the host and the like are out of reach then.
    pub fn is_rootless(&self) -> bool {
        self.rootless
    }
}

/// A network namespace beside the caller's, held by a descriptor; it vanishes when that and all devices and sockets from it are closed.
pub struct Namespace {
    fd: OwnedFd,
    /// What it was opened by.
    path: Option<PathBuf>,
}

impl Namespace {
    /// Makes a namespace, furnished as [`Sandbox::enter`] does it. Needs CAP_SYS_ADMIN, which any thread of a sandboxed process has.
    ///
    /// The calling thread stays where it is: a helper thread makes the namespace and ends.
    pub fn new() -> io::Result<Self> {
        HOST.get_or_init(|| current_inode().unwrap_or(0));
        on_thread(|| {
            netns::unshare_net().map_err(|error| told("unshare(CLONE_NEWNET)", &error))?;
            furnish()?;
            Self::current()
        })?
    }

    /// A namespace that has a name: `/run/netns/…` as ip-netns(8) makes it, or `/proc/…/ns/net`.
    ///
    /// # Errors
    /// There is none of that name, told with its path.
    pub fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        HOST.get_or_init(|| current_inode().unwrap_or(0));
        let path = path.as_ref();
        let file = setns::open(path).map_err(|error| told(&path.display().to_string(), &error))?;
        Ok(Self {
            fd: file.into(),
            path: Some(path.to_owned()),
        })
    }

    /// The namespace of the calling thread, held by a descriptor.
    pub fn current() -> io::Result<Self> {
        Ok(Self {
            fd: netns::current_net()?,
            path: None,
        })
    }

    /// Runs `work` on a thread inside this namespace and returns its value; a panic in `work` goes on in the caller.
    ///
    /// What `work` opens (sockets, devices, netlink handles) stays in this namespace and may be used anywhere afterwards.
    ///
    /// # Errors
    ///
    /// The thread could not be started, or `setns(2)` was refused (EPERM without CAP_SYS_ADMIN); `work` did not run then.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        on_thread(|| self.enter().map(|()| work()))?
    }

    /// Moves the calling thread into this namespace, for good.
    pub fn enter(&self) -> io::Result<()> {
        netns::enter_net(self.fd.as_fd()).map_err(|error| match (&self.path, error.raw_os_error()) {
            (None, _) => told("setns(CLONE_NEWNET)", &error),
            (Some(path), Some(libc::EINVAL)) => io::Error::new(
                error.kind(),
                format!(
                    "setns({}): {error}: not a network namespace; name a file such as /run/netns/blue",
                    path.display()
                ),
            ),
            (Some(path), _) => told(&format!("setns({})", path.display()), &error),
        })
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl fmt::Debug for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Namespace").field("fd", &self.fd).finish()
    }
}

/// Writes a setting of the calling thread's network namespace: `name` is the path below `/proc/sys`, such as `net/ipv4/ip_forward`.
///
/// # Errors
///
/// `PermissionDenied` in the namespace the process came from: this never changes the host. `InvalidInput` for a name outside `net/`. Else
/// what the kernel says, with the name.
pub fn sysctl(name: &str, value: impl fmt::Display) -> io::Result<()> {
    if !name.starts_with("net/") || name.contains("..") {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("sysctl {name}: only settings below net/ belong to a namespace"),
        ));
    }
    if HOST
        .get()
        .is_none_or(|&host| current_inode().is_ok_and(|here| here == host))
    {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!("sysctl {name}: this thread is in no sandbox; call Sandbox::enter first"),
        ));
    }
    fs::write(format!("/proc/sys/{name}"), value.to_string())
        .map_err(|error| told(&format!("sysctl {name}={value}"), &error))
}

/// Brings loopback up and keeps IPv6 from sending on its own.
fn furnish() -> io::Result<()> {
    Handle::new()?.set_up(LOOPBACK, true)?;
    for (name, value) in [
        ("net/ipv6/conf/default/accept_dad", 0),
        ("net/ipv6/conf/default/dad_transmits", 0),
        ("net/ipv6/conf/default/router_solicitations", 0),
        ("net/ipv6/conf/default/accept_ra", 0),
        ("net/ipv6/conf/default/addr_gen_mode", 1), // 1: no link-local address of the kernel's making
    ] {
        match sysctl(name, value) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => break, // a kernel without IPv6
            result => result?,
        }
    }
    Ok(())
}

/// Becomes root of a new user namespace that owns a new network namespace.
fn enter_user_namespace() -> io::Result<()> {
    let threads = fs::read_dir("/proc/self/task")?.count();
    if threads != 1 {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "a sandbox without CAP_SYS_ADMIN must be entered before the process starts threads; it has {threads}"
            ),
        ));
    }
    let (uid, gid) = netns::effective_ids();
    netns::unshare_user_and_net().map_err(|error| {
        told(
            "unshare(CLONE_NEWUSER | CLONE_NEWNET); run as root, or allow user namespaces (user.max_user_namespaces, \
             kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns, the container's seccomp profile)",
            &error,
        )
    })?;
    for (file, content) in [
        ("/proc/self/setgroups", "deny".to_owned()), // without it, an unprivileged gid_map is refused
        ("/proc/self/uid_map", format!("0 {uid} 1")),
        ("/proc/self/gid_map", format!("0 {gid} 1")),
    ] {
        fs::write(file, content).map_err(|error| told(file, &error))?;
    }
    Ok(())
}

fn current_inode() -> io::Result<u64> {
    Ok(fs::metadata("/proc/thread-self/ns/net")?.st_ino())
}

/// Runs `work` to its end on a thread of its own; its panic goes on in the caller.
fn on_thread<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let thread = thread::Builder::new()
            .name("namespace".to_owned())
            .spawn_scoped(scope, work)?;
        thread.join().or_else(|panic| panic::resume_unwind(panic))
    })
}

/// The error with what was tried in front; kind kept.
fn told(what: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {error}"))
}
