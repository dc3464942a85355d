//! How near the process is to the memory limit that will be enforced first: that of its cgroup, of any cgroup around
//! it (version 1 or 2, or both), or the machine's.

use std::fs;
use std::path::{Path, PathBuf};

/// Memory used, and the limit that it is measured by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    pub used_bytes: u64,
    pub limit_bytes: u64,
}

impl Memory {
    pub fn ratio(self) -> f64 {
        self.used_bytes as f64 / self.limit_bytes.max(1) as f64
    }
}

/// The files of one version of cgroups.
struct Files {
    limits: &'static [&'static str],
    used: &'static str,
    /// In `memory.stat`: file pages that the kernel takes back before it kills anyone.
    reclaimable: &'static str,
}

const V1: Files = Files {
    limits: &["memory.limit_in_bytes"],
    used: "memory.usage_in_bytes",
    reclaimable: "total_inactive_file",
};
const V2: Files =
    Files { limits: &["memory.max", "memory.high"], used: "memory.current", reclaimable: "inactive_file" };

/// Where a controller's hierarchy is mounted: the cgroup that is shown as its root, and the directory.
struct Mount {
    root: String,
    point: PathBuf,
}

/// The limit that is nearest to being reached. `root`: the directory that holds `proc` and `sys`. None where nothing of
/// it can be read (not Linux).
pub fn tightest(root: &Path) -> Option<Memory> {
    let groups = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let mounts = fs::read_to_string(root.join("proc/self/mountinfo")).unwrap_or_default();
    let mut found: Vec<Memory> = Vec::new();
    for line in groups.lines() {
        // "4:memory:/path" (version 1), "0::/path" (version 2).
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        let is_v2 = controllers.is_empty();
        if is_v2 || controllers.split(',').any(|name| name == "memory") {
            let files = if is_v2 { &V2 } else { &V1 };
            if let Some(mount) = mount(&mounts, is_v2) {
                found.extend(walk(root, &mount, path, files));
            }
        }
    }
    if let (Some(used_bytes), Some(limit_bytes)) = (resident_bytes(root), total_bytes(root)) {
        // Of the machine's memory only our own part counts: what others use is theirs to answer for.
        found.push(Memory { used_bytes, limit_bytes });
    }
    found.into_iter().max_by(|a, b| a.ratio().total_cmp(&b.ratio()))
}

/// The mount of the version 2 hierarchy, or of version 1's memory controller, in the lines of `mountinfo` (proc(5)):
/// "36 35 98:0 {root} {mount point} {options} … - {type} {source} {super options}".
fn mount(mounts: &str, is_v2: bool) -> Option<Mount> {
    mounts.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let mut after = after.split(' ');
        let (kind, options) = (after.next()?, after.nth(1)?);
        let fits = if is_v2 {
            kind == "cgroup2"
        } else {
            kind == "cgroup" && options.split(',').any(|o| o == "memory")
        };
        let mut before = before.split(' ').skip(3);
        let (shown, point) = (before.next()?, before.next()?);
        fits.then(|| Mount { root: shown.to_owned(), point: point.trim_start_matches('/').into() })
    })
}

/// The limits of a cgroup and of all around it.
fn walk(root: &Path, mount: &Mount, group: &str, files: &Files) -> Vec<Memory> {
    let top = root.join(&mount.point);
    // In a container's own namespace the path begins at what is mounted; else what is mounted is a part of the path. A
    // path that leads elsewhere ("/../…") cannot be seen from here: what is mounted is then the best that is known.
    let below = match group.strip_prefix(mount.root.trim_end_matches('/')) {
        Some(rest) if !group.contains("..") && (rest.is_empty() || rest.starts_with('/')) => rest,
        _ => "",
    };
    let mut at = top.join(below.trim_start_matches('/'));
    let mut found = Vec::new();
    loop {
        found.extend(limit(&at, files));
        if at == top || !at.starts_with(&top) || !at.pop() {
            return found;
        }
    }
}

fn limit(group: &Path, files: &Files) -> Option<Memory> {
    let number = |name: &str| fs::read_to_string(group.join(name)).ok()?.trim().parse::<u64>().ok();
    // "max" is no number. Version 1 says "none" as a number that no machine has.
    let limit_bytes =
        files.limits.iter().filter_map(|name| number(name)).filter(|&bytes| bytes < 1 << 60).min()?;
    let stat = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
    let reclaimable = stat
        .lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(name, _)| *name == files.reclaimable)
        .and_then(|(_, bytes)| bytes.trim().parse().ok())
        .unwrap_or(0);
    Some(Memory { used_bytes: number(files.used)?.saturating_sub(reclaimable), limit_bytes })
}

fn total_bytes(root: &Path) -> Option<u64> {
    let info = fs::read_to_string(root.join("proc/meminfo")).ok()?;
    let line = info.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// Resident memory of this process.
pub fn resident_bytes(root: &Path) -> Option<u64> {
    let statm = fs::read_to_string(root.join("proc/self/statm")).ok()?;
    let pages: u64 = statm.split(' ').nth(1)?.parse().ok()?;
    // SAFETY: sysconf has no preconditions.
    let page_bytes = u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096);
    Some(pages * page_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1024 * 1024;
    const V2_MOUNT: &str = "30 23 0:26 / /sys/fs/cgroup ro,nosuid - cgroup2 cgroup rw,nsdelegate\n";
    const V1_MOUNTS: &str = "31 23 0:28 / /sys/fs/cgroup ro - tmpfs tmpfs rw\n\
        33 31 0:30 / /sys/fs/cgroup/cpu,cpuacct ro shared:9 master:1 - cgroup cgroup rw,cpu,cpuacct\n\
        35 31 0:32 / /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n";

    /// A machine of 8 GiB on which this process has 100 MiB resident, and these files.
    fn machine(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        // SAFETY: sysconf has no preconditions.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as u64;
        let statm = format!("99999 {} 10 1 0 10 0", 100 * MIB / page);
        let own =
            [("proc/meminfo", "MemTotal:        8388608 kB\nMemFree:  1 kB\n"), ("proc/self/statm", &statm)];
        for (path, text) in own.iter().chain(files) {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    fn found(files: &[(&str, &str)]) -> (u64, u64) {
        let memory = tightest(machine(files).path()).unwrap();
        (memory.used_bytes / MIB, memory.limit_bytes / MIB)
    }

    #[test]
    fn without_a_limit_it_is_the_machine() {
        assert_eq!(found(&[]), (100, 8192));
        let unlimited = [
            ("proc/self/cgroup", "0::/\n"),
            ("proc/self/mountinfo", V2_MOUNT),
            ("sys/fs/cgroup/memory.max", "max\n"),
            ("sys/fs/cgroup/memory.high", "max\n"),
            ("sys/fs/cgroup/memory.current", "9999999999\n"),
        ];
        assert_eq!(found(&unlimited), (100, 8192), "v2, max");
        let unlimited = [
            ("proc/self/cgroup", "4:memory:/\n"),
            ("proc/self/mountinfo", V1_MOUNTS),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "9999999999\n"),
        ];
        assert_eq!(found(&unlimited), (100, 8192), "v1, as good as none");
    }

    #[test]
    fn a_container_in_its_own_namespace() {
        let files = [
            ("proc/self/cgroup", "0::/\n"),
            ("proc/self/mountinfo", V2_MOUNT),
            ("sys/fs/cgroup/memory.max", "536870912\n"),
            ("sys/fs/cgroup/memory.high", "max\n"),
            ("sys/fs/cgroup/memory.current", "419430400\n"),
            ("sys/fs/cgroup/memory.stat", "anon 1\ninactive_file 104857600\nactive_file 5\n"),
        ];
        assert_eq!(found(&files), (300, 512), "what is only cached is not counted");
    }

    #[test]
    fn the_tightest_of_nested_groups() {
        let group = |path: &str, name: &str| format!("sys/fs/cgroup{path}/memory.{name}");
        let (pod, own) = ("/kubepods/pod1", "/kubepods/pod1/box");
        let files = [
            ("proc/self/cgroup".to_owned(), "0::/kubepods/pod1/box\n"),
            ("proc/self/mountinfo".to_owned(), V2_MOUNT),
            (group(own, "max"), "max\n"),
            (group(own, "current"), "209715200\n"),
            (group(pod, "max"), "1073741824\n"),
            (group(pod, "high"), "314572800\n"),
            (group(pod, "current"), "262144000\n"),
            (group("/kubepods", "max"), "4294967296\n"),
            (group("/kubepods", "current"), "1073741824\n"),
        ];
        let files: Vec<(&str, &str)> = files.iter().map(|(path, text)| (path.as_str(), *text)).collect();
        assert_eq!(found(&files), (250, 300), "the pod's, by its high mark");
        let mut fuller = files.clone();
        fuller.push(("sys/fs/cgroup/kubepods/memory.current", "4080218931"));
        assert_eq!(found(&fuller).1, 4096, "the one around the pod is nearer to its end");
    }

    #[test]
    fn version_1_nested_and_as_a_container_sees_it() {
        let nested = [
            ("proc/self/cgroup", "5:cpu,cpuacct:/a\n4:memory:/a/b\n1:name=systemd:/a\n"),
            ("proc/self/mountinfo", V1_MOUNTS),
            ("sys/fs/cgroup/memory/a/b/memory.limit_in_bytes", "9223372036854771712"),
            ("sys/fs/cgroup/memory/a/b/memory.usage_in_bytes", "104857600"),
            ("sys/fs/cgroup/memory/a/memory.limit_in_bytes", "209715200"),
            ("sys/fs/cgroup/memory/a/memory.usage_in_bytes", "157286400"),
            ("sys/fs/cgroup/memory/a/memory.stat", "inactive_file 1\ntotal_inactive_file 52428800\n"),
        ];
        assert_eq!(found(&nested), (100, 200));
        // Without a namespace of its own: the path is the host's, mounted is only the container's part.
        let container = [
            ("proc/self/cgroup", "4:memory:/docker/abc\n"),
            (
                "proc/self/mountinfo",
                "35 31 0:32 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n",
            ),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "209715200"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "104857600"),
        ];
        assert_eq!(found(&container), (100, 200));
        let elsewhere = container
            .map(|(path, text)| (path, if path.ends_with("cgroup") { "4:memory:/../x\n" } else { text }));
        assert_eq!(found(&elsewhere), (100, 200), "a path that leads out of what is mounted");
    }

    #[test]
    fn hybrid_memory_is_in_version_1() {
        let mounts =
            format!("{V1_MOUNTS}41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n");
        let files = [
            ("proc/self/cgroup", "4:memory:/a\n0::/a\n"),
            ("proc/self/mountinfo", mounts.as_str()),
            ("sys/fs/cgroup/memory/a/memory.limit_in_bytes", "209715200"),
            ("sys/fs/cgroup/memory/a/memory.usage_in_bytes", "104857600"),
            ("sys/fs/cgroup/unified/a/cgroup.procs", "1"),
        ];
        assert_eq!(found(&files), (100, 200));
    }

    #[test]
    fn nonsense_and_nothing_are_no_limit() {
        let files = [
            ("proc/self/cgroup", "what\n0::/gone\n4:memory\n"),
            (
                "proc/self/mountinfo",
                "x\n1 2 3 - cgroup2\n30 23 0:26 / /sys/fs/cgroup ro - cgroup2 cgroup rw\n",
            ),
            ("sys/fs/cgroup/memory.max", "lots"),
        ];
        assert_eq!(found(&files), (100, 8192));
        assert_eq!(tightest(tempfile::tempdir().unwrap().path()), None);
        assert!(tightest(Path::new("/")).unwrap().ratio() > 0.0, "this very machine");
    }
}
