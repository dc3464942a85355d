//! What this process uses, under the names that every Prometheus dashboard knows: read from /proc at each scrape.

use std::fs;

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{Counter, Gauge, Opts};

/// Collects `process_*`.
pub struct ProcessMetrics {
    cpu_seconds: Counter,
    resident_bytes: Gauge,
    virtual_bytes: Gauge,
    open_files: Gauge,
    max_files: Gauge,
    threads: Gauge,
    started: Gauge,
}

impl ProcessMetrics {
    pub fn new() -> prometheus::Result<Self> {
        let gauge = |name, help| Gauge::with_opts(Opts::new(name, help));
        let metrics = ProcessMetrics {
            cpu_seconds: Counter::with_opts(Opts::new(
                "process_cpu_seconds_total",
                "CPU time used, user and system.",
            ))?,
            resident_bytes: gauge("process_resident_memory_bytes", "Memory in RAM.")?,
            virtual_bytes: gauge("process_virtual_memory_bytes", "Memory mapped.")?,
            open_files: gauge("process_open_fds", "Open file descriptors.")?,
            max_files: gauge("process_max_fds", "Most file descriptors that may be open.")?,
            threads: gauge("process_threads", "Threads.")?,
            started: gauge("process_start_time_seconds", "When the process started, Unix time.")?,
        };
        if let Ok(now) = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH) {
            metrics.started.set(now.as_secs_f64());
        }
        Ok(metrics)
    }

    fn all(&self) -> [&dyn Collector; 7] {
        [
            &self.cpu_seconds,
            &self.resident_bytes,
            &self.virtual_bytes,
            &self.open_files,
            &self.max_files,
            &self.threads,
            &self.started,
        ]
    }

    /// Values that cannot be read keep what they were.
    fn update(&self) {
        if let Some(stat) = fs::read_to_string("/proc/self/stat").ok().as_deref().and_then(Stat::parse) {
            let seconds = stat.cpu_ticks as f64 / TICKS_PER_SECOND;
            self.cpu_seconds.inc_by((seconds - self.cpu_seconds.get()).max(0.0));
            self.threads.set(stat.threads as f64);
            self.virtual_bytes.set(stat.virtual_bytes as f64);
        }
        if let Ok(status) = fs::read_to_string("/proc/self/status")
            && let Some(kib) = field(&status, "VmRSS:")
        {
            self.resident_bytes.set(kib * 1024.0);
        }
        if let Ok(files) = fs::read_dir("/proc/self/fd") {
            // One of them is the directory that is being read.
            self.open_files.set(files.count().saturating_sub(1) as f64);
        }
        if let Ok(limits) = fs::read_to_string("/proc/self/limits")
            && let Some(most) = field(&limits, "Max open files")
        {
            self.max_files.set(most);
        }
    }
}

/// USER_HZ, which Linux has fixed for user space (proc(5)).
const TICKS_PER_SECOND: f64 = 100.0;

/// The first number after a label at the beginning of a line.
fn field(text: &str, label: &str) -> Option<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix(label))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Parts of /proc/self/stat (proc(5)).
#[derive(Debug, PartialEq)]
struct Stat {
    cpu_ticks: u64,
    threads: u64,
    virtual_bytes: u64,
}

impl Stat {
    fn parse(text: &str) -> Option<Stat> {
        // The name in parentheses may hold anything; what is counted begins after it, with field 3.
        let fields: Vec<&str> = text[text.rfind(')')? + 1..].split_whitespace().collect();
        let number = |n: usize| fields.get(n - 3)?.parse::<u64>().ok();
        Some(Stat { cpu_ticks: number(14)? + number(15)?, threads: number(20)?, virtual_bytes: number(23)? })
    }
}

impl Collector for ProcessMetrics {
    fn desc(&self) -> Vec<&Desc> {
        self.all().into_iter().flat_map(Collector::desc).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.update();
        self.all().into_iter().flat_map(Collector::collect).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_is_read_past_any_name() {
        let text = "42 (a) b (c)) S 1 2 3 4 5 6 7 8 9 10 150 50 0 0 20 0 9 0 77 4096 5 6";
        assert_eq!(Stat::parse(text), Some(Stat { cpu_ticks: 200, threads: 9, virtual_bytes: 4096 }));
        assert_eq!(Stat::parse("42 (x"), None);
    }

    #[test]
    fn this_process_uses_something() {
        let metrics = ProcessMetrics::new().unwrap();
        let families = metrics.collect();
        assert_eq!(families.len(), 7);
        for gauge in
            [&metrics.resident_bytes, &metrics.virtual_bytes, &metrics.open_files, &metrics.max_files]
        {
            assert!(gauge.get() > 0.0);
        }
    }
}
