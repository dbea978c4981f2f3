//! What this process is allowed: resource limits, capabilities, processors, the kernel's release.

use std::io;

use super::syscall;

/// linux/capability.h: bit numbers of a capability set.
pub(crate) const CAP_NET_ADMIN: u32 = 12;
pub(crate) const CAP_IPC_LOCK: u32 = 14;

/// geteuid(2).
pub(crate) fn effective_uid() -> u32 {
    // SAFETY: no arguments, cannot fail.
    unsafe { libc::geteuid() }
}

/// The `release` of uname(2), such as `6.1.0-18-amd64`.
pub(crate) fn kernel_release() -> io::Result<String> {
    // SAFETY: struct utsname is byte arrays; all zero is valid.
    let mut name: libc::utsname = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel fills the struct.
    unsafe { syscall!(uname(&raw mut name)) }?;
    let bytes: Vec<u8> = name
        .release
        .iter()
        .map(|&byte| byte as u8)
        .take_while(|&byte| byte != 0)
        .collect();
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// (major, minor) of the running kernel; zeros if it does not say. Only for what cannot be found out by asking.
pub(crate) fn kernel_version() -> (u32, u32) {
    parse_version(&kernel_release().unwrap_or_default())
}

fn parse_version(release: &str) -> (u32, u32) {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|part| part.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// The soft limit of RLIMIT_MEMLOCK in bytes; `None`: no limit.
pub(crate) fn memlock_limit() -> io::Result<Option<u64>> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the kernel fills the struct.
    unsafe { syscall!(getrlimit(libc::RLIMIT_MEMLOCK, &raw mut limit)) }?;
    // rlim_t has 32 bits on some targets.
    #[allow(clippy::unnecessary_cast)]
    let bytes = limit.rlim_cur as u64;
    Ok((limit.rlim_cur != libc::RLIM_INFINITY).then_some(bytes))
}

/// The effective capabilities of the calling thread: capget(2).
pub(crate) fn effective_capabilities() -> io::Result<u64> {
    /// `struct __user_cap_header_struct` of linux/capability.h.
    #[repr(C)]
    struct __user_cap_header_struct {
        version: u32,
        pid: i32,
    }
    /// `struct __user_cap_data_struct` of linux/capability.h.
    #[repr(C)]
    #[derive(Clone, Copy, Default)]
    struct __user_cap_data_struct {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    const _: () = assert!(size_of::<__user_cap_header_struct>() == 8 && size_of::<__user_cap_data_struct>() == 12);
    const _LINUX_CAPABILITY_VERSION_3: u32 = 0x2008_0522;

    let mut header = __user_cap_header_struct {
        version: _LINUX_CAPABILITY_VERSION_3,
        pid: 0,
    };
    let mut data = [__user_cap_data_struct::default(); 2];
    // SAFETY: version 3 writes two data structs, which is what `data` holds.
    unsafe { syscall!(syscall(libc::SYS_capget, &raw mut header, data.as_mut_ptr())) }?;
    Ok(u64::from(data[0].effective) | u64::from(data[1].effective) << 32)
}

/// The processors the calling thread may run on, by number: sched_getaffinity(2).
pub(crate) fn allowed_cpus() -> io::Result<Vec<usize>> {
    // 8192 processors, the most a kernel is built for; a libc cpu_set_t holds 1024 and is refused (EINVAL) on larger machines.
    let mut mask = [0_u64; 128];
    // SAFETY: the kernel writes at most the given number of bytes.
    let bytes = unsafe {
        syscall!(syscall(
            libc::SYS_sched_getaffinity,
            0,
            size_of_val(&mask),
            mask.as_mut_ptr()
        ))
    }? as usize;
    Ok((0..bytes * 8)
        .filter(|&cpu| mask[cpu / 64] >> (cpu % 64) & 1 != 0)
        .collect())
}

#[cfg(test)]
mod tests {
    use super::parse_version;

    #[test]
    fn releases_as_distributions_write_them() {
        assert_eq!(parse_version("6.18.44-fc-v669"), (6, 18));
        assert_eq!(parse_version("6.1.0-18-amd64"), (6, 1));
        assert_eq!(parse_version("7.0-rc1"), (7, 0));
        assert_eq!(parse_version("what"), (0, 0));
    }
}
