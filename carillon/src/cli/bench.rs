//! `carillon bench`: load on what runs, measured from outside.

mod etcd;
mod store;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::task::JoinSet;

use super::{CliError, print};
use crate::args::bench::{BenchCommand, BenchKeeperArgs};
use store::Store;

/// Keys that are written and read; one more is watched.
const KEYS: usize = 10_000;
/// Clients that share a connection.
const CLIENTS_PER_CONNECTION: usize = 16;
/// A watch must begin within this, and a watched write be seen by everyone.
const PATIENCE: Duration = Duration::from_secs(30);

pub async fn run(command: BenchCommand) -> Result<(), CliError> {
    match command {
        BenchCommand::Keeper(args) => keeper(args).await,
    }
}

/// One measurement.
#[derive(Debug, Serialize)]
struct Measured {
    what: String,
    clients: usize,
    per_second: f64,
    #[serde(flatten)]
    latency: Latency,
    failed: usize,
    /// Time of the processes' CPUs that one took, all nodes together, microseconds.
    cpu_us: Option<f64>,
}

/// Milliseconds.
#[derive(Debug, Serialize)]
struct Latency {
    p50_ms: f64,
    p99_ms: f64,
    max_ms: f64,
}

impl Latency {
    fn of(mut micros: Vec<u64>) -> Latency {
        micros.sort_unstable();
        let at = |part: f64| {
            let place = (micros.len() as f64 * part) as usize;
            micros.get(place.min(micros.len().saturating_sub(1))).map_or(0.0, |&us| us as f64 / 1000.0)
        };
        Latency { p50_ms: at(0.5), p99_ms: at(0.99), max_ms: at(1.0) }
    }
}

#[derive(Debug, Serialize)]
struct Report {
    measured: Vec<Measured>,
    /// Memory of the processes that a watch takes, bytes; all nodes together.
    bytes_per_watch: Option<f64>,
}

fn failed(error: impl std::fmt::Display) -> CliError {
    CliError::Failed(error.to_string())
}

/// The same load, for as long as it is to last, from so many clients at once.
async fn load(args: &BenchKeeperArgs, clients: usize, what: &str, write: bool) -> Result<Measured, CliError> {
    let value = vec![b'v'; args.value_bytes as usize];
    let mut tasks = JoinSet::new();
    let (begun, busy) = (Instant::now(), cpu(&args.pid)?);
    let until = begun + args.time;
    for connection in 0..clients.div_ceil(CLIENTS_PER_CONNECTION) {
        let node = &args.keeper[connection % args.keeper.len()];
        let store = Store::connect(node, args.etcd).await.map_err(failed)?;
        let share = (clients - connection * CLIENTS_PER_CONNECTION).min(CLIENTS_PER_CONNECTION);
        for place in 0..share {
            let (mut store, value) = (store.clone(), value.clone());
            let mut next = connection * CLIENTS_PER_CONNECTION + place;
            tasks.spawn(async move {
                let (mut micros, mut failures) = (Vec::new(), 0);
                while Instant::now() < until {
                    next = (next * 7919 + 1) % KEYS;
                    let key = format!("bench/{next:05}");
                    let asked = Instant::now();
                    let outcome =
                        if write { store.put(&key, &value).await } else { store.get(&key).await.map(drop) };
                    match outcome {
                        Ok(()) => micros.push(asked.elapsed().as_micros() as u64),
                        Err(_) => failures += 1,
                    }
                }
                (micros, failures)
            });
        }
    }
    let (mut all, mut failures) = (Vec::new(), 0);
    while let Some(done) = tasks.join_next().await {
        let (micros, failed) = done.map_err(failed)?;
        all.extend(micros);
        failures += failed;
    }
    let per_second = all.len() as f64 / begun.elapsed().as_secs_f64();
    let cpu_us = each(busy, cpu(&args.pid)?, all.len()).map(|seconds| seconds * 1e6);
    let latency = Latency::of(all);
    Ok(Measured { what: what.to_owned(), clients, per_second, latency, failed: failures, cpu_us })
}

/// Many watch a key that is written at a rate: from the moment of the write to the moment that each sees it.
async fn watched(args: &BenchKeeperArgs) -> Result<(Measured, Option<f64>), CliError> {
    let before = memory(&args.pid)?;
    let (clock, stop) = (Instant::now(), Arc::new(AtomicBool::new(false)));
    let (watching, mut tasks) = (Arc::new(AtomicUsize::new(0)), JoinSet::new());
    let mut connection = None;
    for place in 0..args.watchers {
        if place % args.watches_per_connection as usize == 0 {
            let node = &args.keeper[place / args.watches_per_connection as usize % args.keeper.len()];
            connection = Some(Store::connect(node, args.etcd).await.map_err(failed)?);
        }
        let Some(store) = connection.clone() else { continue };
        let mut events = store.watch("bench/watched").await.map_err(failed)?;
        let (stop, watching) = (stop.clone(), watching.clone());
        tasks.spawn(async move {
            watching.fetch_add(1, Ordering::Relaxed);
            let mut micros = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                // The value begins with the time of the write.
                let Ok(Some(value)) = events.next().await else { break };
                let Some(written) = value.first_chunk::<8>() else { continue };
                let now = clock.elapsed().as_micros() as u64;
                micros.push(now.saturating_sub(u64::from_be_bytes(*written)));
            }
            micros
        });
    }
    let begun = Instant::now();
    while watching.load(Ordering::Relaxed) < args.watchers && begun.elapsed() < PATIENCE {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    let bytes = each(before, memory(&args.pid)?, args.watchers);
    let mut writer = Store::connect(&args.keeper[0], args.etcd).await.map_err(failed)?;
    let mut tick = tokio::time::interval(Duration::from_secs(1) / args.watched_rate);
    let mut value = vec![b'v'; args.value_bytes as usize];
    let (begun, busy, mut writes) = (Instant::now(), cpu(&args.pid)?, 0usize);
    while begun.elapsed() < args.time {
        tick.tick().await;
        let now = clock.elapsed().as_micros() as u64;
        value[..8].copy_from_slice(&now.to_be_bytes());
        writer.put("bench/watched", &value).await.map_err(failed)?;
        writes += 1;
    }
    let took = begun.elapsed();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let busy = (busy, cpu(&args.pid)?);
    stop.store(true, Ordering::Relaxed);
    // Everyone hears of the end.
    writer.put("bench/watched", b"end").await.map_err(failed)?;
    let mut all = Vec::new();
    while let Ok(Some(done)) = tokio::time::timeout(PATIENCE, tasks.join_next()).await {
        all.extend(done.map_err(failed)?);
    }
    let missing = (writes * args.watchers).saturating_sub(all.len());
    let measured = Measured {
        what: "watch".to_owned(),
        clients: args.watchers,
        per_second: all.len() as f64 / took.as_secs_f64(),
        cpu_us: each(busy.0, busy.1, all.len()).map(|seconds| seconds * 1e6),
        latency: Latency::of(all),
        failed: missing,
    };
    Ok((measured, bytes))
}

/// Resident memory of processes, bytes; None: of none.
fn memory(pids: &[u32]) -> Result<Option<f64>, CliError> {
    sum(pids, "status", |status| {
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        line.trim().split(' ').next()?.parse::<f64>().ok().map(|kb| kb * 1024.0)
    })
}

/// CPU time that processes have used, user and system, seconds; None: of none.
fn cpu(pids: &[u32]) -> Result<Option<f64>, CliError> {
    sum(pids, "stat", |stat| {
        // The name may hold anything, spaces too.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let ticks = fields.get(11)?.parse::<f64>().ok()? + fields.get(12)?.parse::<f64>().ok()?;
        // What `sysconf(_SC_CLK_TCK)` is everywhere.
        Some(ticks / 100.0)
    })
}

fn sum(pids: &[u32], file: &str, read: impl Fn(&str) -> Option<f64>) -> Result<Option<f64>, CliError> {
    let mut all = None;
    for pid in pids {
        let text = std::fs::read_to_string(format!("/proc/{pid}/{file}"))
            .map_err(|error| CliError::Failed(format!("process {pid}: {error}")))?;
        all = Some(all.unwrap_or(0.0) + read(&text).unwrap_or(0.0));
    }
    Ok(all)
}

/// What each of so many took.
fn each(before: Option<f64>, after: Option<f64>, count: usize) -> Option<f64> {
    Some((after? - before?).max(0.0) / count.max(1) as f64)
}

async fn keeper(args: BenchKeeperArgs) -> Result<(), CliError> {
    let mut measured = Vec::new();
    // First: what a load has left behind would be taken for room by the watches.
    let (watch, bytes_per_watch) = match args.watchers {
        0 => (None, None),
        _ => watched(&args).await.map(|(watch, bytes)| (Some(watch), bytes))?,
    };
    for &clients in &args.clients {
        measured.push(load(&args, clients, "write", true).await?);
    }
    for &clients in &args.clients {
        measured.push(load(&args, clients, "read", false).await?);
    }
    measured.extend(watch);
    print(args.output, &Report { measured, bytes_per_watch }, |report| {
        let mut lines = vec![format!(
            "{:<6} {:>8} {:>12} {:>10} {:>10} {:>10} {:>7} {:>10}",
            "", "clients", "a second", "p50 ms", "p99 ms", "max ms", "failed", "CPU us"
        )];
        for one in &report.measured {
            let Latency { p50_ms, p99_ms, max_ms } = one.latency;
            let cpu = one.cpu_us.map_or_else(|| "-".to_owned(), |us| format!("{us:.0}"));
            lines.push(format!(
                "{:<6} {:>8} {:>12.0} {p50_ms:>10.2} {p99_ms:>10.2} {max_ms:>10.2} {:>7} {cpu:>10}",
                one.what, one.clients, one.per_second, one.failed
            ));
        }
        if let Some(bytes) = report.bytes_per_watch {
            lines.push(format!("memory of a watch: {bytes:.0} bytes"));
        }
        lines.join("\n")
    })
}
