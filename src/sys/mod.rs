//! Floor 0: the kernel's ABI. The only modules that know ioctl numbers, struct layouts and raw system calls.
#![allow(unsafe_code)]

pub(crate) mod ancillary;
#[cfg(feature = "lab")]
pub(crate) mod bpf;
pub(crate) mod cpu;
pub(crate) mod fd;
pub(crate) mod forked;
#[cfg(feature = "lab")]
pub(crate) mod frames;
pub(crate) mod host;
#[cfg(feature = "lab")]
pub(crate) mod lab;
pub(crate) mod netdevice;
#[cfg(feature = "lab")]
pub(crate) mod netns;
pub(crate) mod notices;
pub(crate) mod setns;
pub(crate) mod socket;
pub(crate) mod socket_options;
pub(crate) mod tun;
pub(crate) mod uring;
pub(crate) mod virtio_net;

/// A call that failed, where a function makes several.
#[derive(Debug)]
pub(crate) struct FailedCall {
    pub(crate) call: &'static str,
    pub(crate) error: std::io::Error,
}

impl FailedCall {
    /// For `map_err`.
    pub(crate) fn of(call: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |error| Self { call, error }
    }
}

impl From<FailedCall> for std::io::Error {
    fn from(failed: FailedCall) -> Self {
        failed.error
    }
}

/// Calls a libc function and turns -1 into the errno of this thread.
macro_rules! syscall {
    ($name:ident($($arg:expr),* $(,)?)) => {{
        let result = libc::$name($($arg),*);
        if result == -1 { Err(std::io::Error::last_os_error()) } else { Ok(result) }
    }};
}
pub(crate) use syscall;
