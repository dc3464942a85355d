//! What processes and the machine use, read from /proc, and which limits of the machine will be met.

use std::fs;
use std::path::Path;

use anyhow::Context;
use serde::Serialize;

/// What one process, or several together, use.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Usage {
    pub processes: u64,
    /// Resident, kB; pages of the program that processes share are in each one's.
    pub rss_kb: u64,
    /// Resident and its own: without the program's pages and other files', kB.
    pub own_kb: u64,
    /// CPU since its start, milliseconds. What the kernel does for a socket, loopback included, is in here.
    pub cpu_ms: u64,
    pub files: u64,
}

impl Usage {
    pub fn of(pid: u32) -> anyhow::Result<Usage> {
        let read = |file: &str| {
            let path = format!("/proc/{pid}/{file}");
            fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))
        };
        let status = read("status")?;
        let stat = read("stat")?;
        // After the name, which may hold anything, in parentheses: field 3 and on; CPU is 14 and 15.
        let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        let field = |number: usize| -> u64 {
            after_name.split_whitespace().nth(number - 3).and_then(|text| text.parse().ok()).unwrap_or(0)
        };
        Ok(Usage {
            processes: 1,
            rss_kb: kilobytes(&status, "VmRSS:").context("no VmRSS")?,
            own_kb: kilobytes(&status, "RssAnon:").context("no RssAnon")?,
            cpu_ms: (field(14) + field(15)) * 1000 / ticks_per_second(),
            files: fs::read_dir(format!("/proc/{pid}/fd"))?.count() as u64,
        })
    }

    /// Of several processes; those that have ended are left out.
    pub fn sum(pids: impl IntoIterator<Item = u32>) -> Usage {
        pids.into_iter().filter_map(|pid| Usage::of(pid).ok()).fold(Usage::default(), Usage::plus)
    }

    fn plus(self, other: Usage) -> Usage {
        Usage {
            processes: self.processes + other.processes,
            rss_kb: self.rss_kb + other.rss_kb,
            own_kb: self.own_kb + other.own_kb,
            cpu_ms: self.cpu_ms + other.cpu_ms,
            files: self.files + other.files,
        }
    }
}

fn ticks_per_second() -> u64 {
    // SAFETY: a call without memory.
    u64::try_from(unsafe { libc::sysconf(libc::_SC_CLK_TCK) }).unwrap_or(100).max(1)
}

/// The number of a line `Name:   1234 kB`.
fn kilobytes(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

/// The machine's memory, kB.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Memory {
    /// MemAvailable: too much by what the kernel counts as reclaimable and is not, the inodes and names of open sockets.
    pub available_kb: u64,
    /// All of the kernel's small objects, sockets above all.
    pub slab_kb: u64,
    /// Of them, what the kernel believes that it can give back.
    pub reclaimable_kb: u64,
}

impl Memory {
    pub fn read() -> anyhow::Result<Memory> {
        let text = fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
        let number =
            |name: &str| kilobytes(&text, name).with_context(|| format!("/proc/meminfo has no {name}"));
        Ok(Memory {
            available_kb: number("MemAvailable:")?,
            slab_kb: number("Slab:")?,
            reclaimable_kb: number("SReclaimable:")?,
        })
    }

    /// What is left, if what has been added to the reclaimable since then is sockets' and so is not.
    pub fn left_kb(&self, since: &Memory) -> u64 {
        self.available_kb.saturating_sub(self.reclaimable_kb.saturating_sub(since.reclaimable_kb))
    }
}

/// What the machine is, for the report.
pub fn description() -> String {
    let cpus = std::thread::available_parallelism().map_or(0, |count| count.get());
    let memory = fs::read_to_string("/proc/meminfo").ok().and_then(|text| kilobytes(&text, "MemTotal:"));
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let memory = memory.unwrap_or(0) as f64 / (1024.0 * 1024.0);
    format!("{cpus} CPUs, {memory:.1} GiB, Linux {}", kernel.trim())
}

/// Which limits of this machine will stop so many connections, both ends of each being on it, as sentences.
pub fn limits_in_the_way(connections: u64, per_process: u64, open_files: u64) -> Vec<String> {
    let sysctl = |name: &str| -> Option<u64> {
        let path = Path::new("/proc/sys").join(name.replace('.', "/"));
        fs::read_to_string(path).ok()?.split_whitespace().next()?.parse().ok()
    };
    let mut found = Vec::new();
    let mut need = |name: &str, has: Option<u64>, needed: u64, why: &str| {
        if let Some(has) = has.filter(|&has| has < needed) {
            found.push(format!("{name} is {has}, and {needed} are needed: {why}"));
        }
    };
    need("ulimit -Hn", Some(open_files), per_process + 300, "a file for each connection of a gateway");
    let in_use = fs::read_to_string("/proc/sys/fs/file-nr").ok();
    let in_use: u64 = in_use.and_then(|text| text.split_whitespace().next()?.parse().ok()).unwrap_or(0);
    need(
        "fs.file-max",
        sysctl("fs.file-max"),
        in_use + 2 * connections,
        "a file for each end of a connection",
    );
    let watches = "each end of a connection is watched";
    need("fs.epoll.max_user_watches", sysctl("fs.epoll.max_user_watches"), 2 * connections, watches);
    need("net.core.somaxconn", sysctl("net.core.somaxconn"), 512, "connections that are not accepted yet");
    // Loaded, but in use only if a rule makes it so: then it counts.
    if sysctl("net.netfilter.nf_conntrack_count").is_some_and(|count| count > 0) {
        let has = sysctl("net.netfilter.nf_conntrack_max");
        need("net.netfilter.nf_conntrack_max", has, connections, "connections are tracked here");
    }
    found
}
