//! Which kernel this is. Only for what cannot be found out by asking: see where it is used.

/// (major, minor) of the running kernel; (0, 0) if it does not say.
pub(crate) fn release() -> (u32, u32) {
    // SAFETY: utsname is a plain C struct that uname fills.
    let name = unsafe {
        let mut name: libc::utsname = std::mem::zeroed();
        libc::uname(&raw mut name);
        name
    };
    let text: String = name.release.iter().take_while(|&&c| c != 0).map(|&c| c as u8 as char).collect();
    parse(&text)
}

fn parse(release: &str) -> (u32, u32) {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn releases_as_distributions_write_them() {
        assert_eq!(parse("6.18.44-fc-v669"), (6, 18));
        assert_eq!(parse("6.1.0-18-amd64"), (6, 1));
        assert_eq!(parse("7.0-rc1"), (7, 0));
        assert_eq!(parse("what"), (0, 0));
    }
}
