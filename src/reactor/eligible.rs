//! What this worker may take now.

/// Why nothing should be claimed: less than `wanted` bytes free where builds write, or no inodes.
pub fn short_of_disk(folder: &std::path::Path, wanted: u64) -> Option<String> {
    const MIB: u64 = 1 << 20;
    // Somebody may have removed it under us.
    let made = || std::fs::create_dir_all(folder).is_ok();
    let stat = match nix::sys::statvfs::statvfs(folder) {
        Err(nix::errno::Errno::ENOENT) if made() => return short_of_disk(folder, wanted),
        Ok(stat) => stat,
        Err(error) => return Some(format!("cannot look at `{}`: {error}", folder.display())),
    };
    let free = stat.blocks_available() * stat.fragment_size();
    if free < wanted {
        return Some(format!(
            "out of disk: {} MiB free in {}, {} MiB wanted ([worker] min_free_disk)",
            free / MIB,
            folder.display(),
            wanted / MIB
        ));
    }
    // A file system that makes them as it needs them says that it has none.
    (stat.files() > 0 && stat.files_available() == 0)
        .then(|| format!("out of disk: no inodes free in {}", folder.display()))
}

/// Whether `name` matches `pattern`, in which `*` stands for any characters and `?` for one.
pub fn matches(pattern: &str, name: &str) -> bool {
    fn rest(pattern: &[u8], name: &[u8]) -> bool {
        match (pattern.split_first(), name.split_first()) {
            (None, None) => true,
            (Some((b'*', after)), _) => {
                rest(after, name) || name.split_first().is_some_and(|(_, name)| rest(pattern, name))
            }
            (Some((p, after)), Some((n, name))) => (*p == b'?' || p == n) && rest(after, name),
            (Some(_), None) | (None, Some(_)) => false,
        }
    }
    rest(pattern.as_bytes(), name.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn patterns_of_builder_names() {
        for (pattern, name, expected) in [
            ("*", "linux", true),
            ("linux", "linux", true),
            ("linux", "linux2", false),
            ("lin*", "linux", true),
            ("*-nightly", "linux-nightly", true),
            ("*-nightly", "linux", false),
            ("l?nux", "linux", true),
            ("", "x", false),
            ("a*b*c", "aXbYc", true),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }
}
