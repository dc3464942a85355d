//! `make million`: one machine, many gateways, as many real MQTT connections as it is asked for or as it holds; then one
//! broadcast to all of them, and a message to each of some. See docs/performance.md.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use carillon_tests::fleet::machine::{self, Memory};
use carillon_tests::fleet::snapshot::Snapshot;
use carillon_tests::fleet::swarms::{Order, Swarm, Swarms};
use carillon_tests::fleet::{Fleet, Plan, drive, say};
use carillon_tests::swarm::histogram::Histogram;
use carillon_tests::swarm::status::{HALT, RESET, Received};
use carillon_tests::swarm::sys::{self, monotonic_ns};
use carillon_tests::swarm::wire::{Kind, Stamp};
use clap::Parser;
use futures::StreamExt;
use serde_json::json;

mod report;

use report::{Measured, Push, Ramp};

/// Without a further delivery for so long, what is missing is given up.
const NO_PROGRESS: Duration = Duration::from_secs(20);
/// After the last connect, before memory is read: allocators give back what they no longer need.
const SETTLE: Duration = Duration::from_secs(5);
/// Processes whose logs the table quotes; the JSON quotes all.
const SHOWN_LOGS: usize = 3;

/// Holds many MQTT connections on this machine, with as many gateways as that takes, one hub and one keeper, and
/// measures what they use. Both ends of every connection are here.
#[derive(Debug, Parser)]
struct Args {
    /// Connections in all
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u32).range(1..))]
    count: u32,
    /// Connections of one gateway, and of one swarm: a process may open only so many files
    #[arg(long, default_value_t = 19_000, value_parser = clap::value_parser!(u32).range(1..))]
    per_gateway: u32,
    /// The program under test
    #[arg(long, value_name = "PATH", default_value = "target/dist/carillon")]
    carillon: PathBuf,
    /// Threads that hold connections, of each gateway
    #[arg(long, default_value_t = 1)]
    shards: u32,
    /// Of the subscriptions (each device has two: its inbox, and `all`) and of what is sent
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=1))]
    qos: u8,
    /// MQTT version: 4 (3.1.1) or 5
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u8).range(4..=5))]
    version: u8,
    /// Of each device, seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 1200)]
    keep_alive: u16,
    /// Swarms that connect at the same time
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    ramping: u32,
    /// Most devices of a swarm between connect and SUBACK
    #[arg(long, default_value_t = 256)]
    window: u32,
    #[arg(long, value_name = "BYTES", default_value_t = 256)]
    payload: usize,
    /// Broadcasts to all, one after the other
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=100))]
    broadcasts: u8,
    /// Users that get a message each
    #[arg(long, default_value_t = 10_000)]
    unicasts: u32,
    /// Pushes under way at the same time
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    pushing: u32,
    /// No more connections when less than this is available of the machine's memory, MiB; at half of it the run ends
    #[arg(long, value_name = "MIB", default_value_t = 1024)]
    floor: u64,
    /// Changes the gateways' limits: a field of the `gateway` document. May be repeated
    #[arg(long, value_name = "FIELD=VALUE")]
    gateway_set: Vec<String>,
    /// Everything that was measured, as JSON
    #[arg(long, value_name = "PATH", default_value = "target/million.json")]
    json: PathBuf,
}

fn main() -> ExitCode {
    let args = Args::parse();
    drive(Box::pin(run(args)))
}

async fn run(args: Args) -> anyhow::Result<()> {
    let files = sys::raise_open_files().context("cannot raise the number of open files")?;
    let gateways = args.count.div_ceil(args.per_gateway);
    let in_the_way = machine::limits_in_the_way(args.count.into(), args.per_gateway.into(), files);
    in_the_way.iter().for_each(|limit| say(&format!("in the way: {limit}")));

    say(&format!("starting 1 keeper, 1 hub, {gateways} gateways"));
    let plan = Plan {
        carillon: args.carillon.clone(),
        gateways,
        shards: args.shards,
        lift_limits: true,
        gateway_fields: args.gateway_set.clone(),
    };
    let fleet = Fleet::start(&plan).await?;
    let mut run = Run { fleet, swarms: Swarms::default(), start: Memory::read()?, args };
    let empty = run.snapshot()?;
    let ramp = run.connect().await?;
    tokio::time::sleep(SETTLE).await;
    let held = run.snapshot()?;
    let connect_latency = run.swarms.report().await?.connect;
    let mut broadcasts = Vec::new();
    for round in 1..=run.args.broadcasts {
        broadcasts.push(run.broadcast(round).await?);
    }
    let unicast = run.unicast().await?;
    let after = run.snapshot()?;
    run.fleet.check()?;
    run.tell(Measured { empty, held, after, ramp, connect_latency, broadcasts, unicast }, &in_the_way)
}

struct Run {
    args: Args,
    // In this order they end: nobody has to clean up after connections.
    swarms: Swarms,
    fleet: Fleet,
    /// Before the first connection.
    start: Memory,
}

impl Run {
    /// Connects swarm after swarm, each to a gateway of its own, until all are there or nothing more goes.
    async fn connect(&mut self) -> anyhow::Result<Ramp> {
        let (began, floor_kb) = (Instant::now(), self.args.floor * 1024);
        let (mut stopped, mut course): (Option<String>, Vec<(f64, u64, u64)>) = (None, Vec::new());
        let count = self.fleet.gateways.len() as u32;
        let mut first = 0;
        loop {
            let settled = self.swarms.0.iter().filter(|swarm| swarm.status().settled).count() as u32;
            let (started, ready) = (self.swarms.0.len() as u32, self.swarms.ready());
            let left_kb = Memory::read()?.left_kb(&self.start);
            let seconds = began.elapsed().as_secs_f64();
            if course.last().is_none_or(|&(last, _, _)| seconds >= last + 5.0) {
                course.push((seconds, ready, left_kb));
                say(&format!("{seconds:5.0} s  {ready:>9} connected  {:>7} MiB available", left_kb / 1024));
            }
            if stopped.is_none() {
                if left_kb < floor_kb {
                    stopped = Some(format!("memory: less than {} MiB is available", self.args.floor));
                } else if self.swarms.0.iter().any(|swarm| swarm.status().gave_up) {
                    let (failed, _) = self.swarms.troubles();
                    let most = failed.into_iter().max_by_key(|(_, count)| *count);
                    stopped = Some(
                        most.map_or_else(String::new, |(reason, count)| format!("{reason} ({count} times)")),
                    );
                }
                if let Some(reason) = &stopped {
                    say(&format!("no more connections: {reason}"));
                    self.swarms.tell(HALT).await?;
                } else if started < count && started - settled < self.args.ramping {
                    let share = self.args.count / count + u32::from(started < self.args.count % count);
                    let order = Order {
                        gateway: self.fleet.mqtt(started),
                        source: self.fleet.source(started),
                        count: share,
                        first,
                        arguments: [
                            format!("--version={}", self.args.version),
                            format!("--qos={}", self.args.qos),
                            format!("--keep-alive={}", self.args.keep_alive),
                            format!("--window={}", self.args.window),
                        ]
                        .into(),
                    };
                    first += u64::from(share);
                    self.swarms.0.push(Swarm::start(&format!("swarm-{started}"), &order, self.fleet.dir())?);
                }
            }
            if settled == started && (started == count || stopped.is_some()) {
                course.push((seconds, ready, left_kb));
                return Ok(Ramp { took: began.elapsed(), stopped, course });
            }
            if left_kb < floor_kb / 2 {
                bail!(
                    "less than {} MiB of memory is available: ended before the kernel does it",
                    self.args.floor / 2
                );
            }
            self.fleet.check()?;
            self.swarms.check()?;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    async fn broadcast(&mut self, round: u8) -> anyhow::Result<Push> {
        self.swarms.tell(RESET).await?;
        let before = self.snapshot()?;
        say(&format!("broadcast {round} to {}", before.connections));
        let sent_ns = monotonic_ns();
        let payload = Stamp { kind: Kind::Broadcast, round, sent_ns }.payload(self.args.payload);
        self.fleet.post("broadcasts", &json!({ "payload": payload, "qos": self.args.qos })).await?;
        let accepted_ns = monotonic_ns();
        let mut accepted = Histogram::default();
        accepted.record((accepted_ns - sent_ns) / 1000);
        let expected = before.connections;
        let received = self.arrived(expected, Kind::Broadcast).await?;
        Ok(Push {
            expected,
            to_last: Duration::from_nanos(received.last_ns.saturating_sub(sent_ns)),
            to_accepted: Duration::from_nanos(accepted_ns - sent_ns),
            received,
            accepted,
            before,
            after: self.snapshot()?,
        })
    }

    async fn unicast(&mut self) -> anyhow::Result<Push> {
        self.swarms.tell(RESET).await?;
        let before = self.snapshot()?;
        // Spread evenly over everyone; of a swarm that is not complete, over its first ones, which are there.
        let mut first = 0;
        let mut users = Vec::new();
        for swarm in &mut self.swarms.0 {
            let present = u64::from(swarm.report().await?.present);
            users.extend(first..first + present);
            first += u64::from(swarm.count);
        }
        let wanted = (self.args.unicasts as usize).min(users.len());
        let users = (0..wanted).map(|index| users[index * users.len() / wanted]);
        say(&format!("a message to each of {wanted} users"));
        let began_ns = monotonic_ns();
        let mut accepted = Histogram::default();
        {
            let run = &*self;
            let mut answers = futures::stream::iter(users)
                .map(|user| async move {
                    let sent_ns = monotonic_ns();
                    let payload = Stamp { kind: Kind::Unicast, round: 1, sent_ns }.payload(run.args.payload);
                    let body = json!({ "payload": payload, "qos": run.args.qos });
                    run.fleet.post(&format!("users/d{user}/messages"), &body).await?;
                    anyhow::Ok((monotonic_ns() - sent_ns) / 1000)
                })
                .buffer_unordered(run.args.pushing as usize);
            while let Some(micros) = answers.next().await {
                accepted.record(micros?);
            }
        }
        let to_accepted = Duration::from_nanos(monotonic_ns() - began_ns);
        let received = self.arrived(wanted as u64, Kind::Unicast).await?;
        Ok(Push {
            expected: wanted as u64,
            to_last: Duration::from_nanos(received.last_ns.saturating_sub(began_ns)),
            to_accepted,
            received,
            accepted,
            before,
            after: self.snapshot()?,
        })
    }

    /// Waits until so many deliveries are there, or no more come.
    async fn arrived(&mut self, expected: u64, kind: Kind) -> anyhow::Result<Received> {
        let (mut last, mut since) = (0, Instant::now());
        loop {
            let report = self.swarms.report().await?;
            let received = match kind {
                Kind::Broadcast => report.broadcast,
                Kind::Unicast => report.unicast,
            };
            let count = received.latency.count();
            if count >= expected || since.elapsed() > NO_PROGRESS {
                return Ok(received);
            }
            if count > last {
                (last, since) = (count, Instant::now());
            }
            self.fleet.check()?;
            if Memory::read()?.left_kb(&self.start) < self.args.floor * 1024 / 2 {
                bail!(
                    "less than {} MiB of memory is available: ended before the kernel does it",
                    self.args.floor / 2
                );
            }
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    }

    fn snapshot(&self) -> anyhow::Result<Snapshot> {
        Snapshot::take(&self.fleet, &self.swarms)
    }

    /// The table on stdout, and all of it as JSON. Fails if not everything went well.
    fn tell(&self, measured: Measured, in_the_way: &[String]) -> anyhow::Result<()> {
        let args = &self.args;
        let (failed, lost) = self.swarms.troubles();
        let mut document = measured.json();
        document["machine"] = machine::description().into();
        document["asked_for"] = args.count.into();
        document["limits_in_the_way"] = json!(in_the_way);
        document["gateway_limits_changed"] = json!(self.fleet.changed);
        document["settings"] = json!({
            "shards": args.shards, "qos": args.qos, "version": args.version, "keep_alive_seconds": args.keep_alive,
            "payload_bytes": args.payload, "ramping": args.ramping, "window": args.window, "pushing": args.pushing,
        });
        document["failed"] = json!(failed);
        document["lost"] = json!(lost);
        document["logged"] = json!(self.fleet.logged());
        if let Some(directory) = args.json.parent() {
            std::fs::create_dir_all(directory)?;
        }
        std::fs::write(&args.json, serde_json::to_vec_pretty(&document)?)
            .with_context(|| format!("cannot write {}", args.json.display()))?;
        let mut table = measured.table(args);
        let logged = self.fleet.logged();
        for lines in logged.iter().take(SHOWN_LOGS) {
            table.push_str(&format!("{lines}\n"));
        }
        if logged.len() > SHOWN_LOGS {
            table.push_str(&format!("{} more processes have logged something\n", logged.len() - SHOWN_LOGS));
        }
        for (what, reasons) in [("connects that failed", &failed), ("connections lost", &lost)] {
            for (reason, count) in reasons {
                table.push_str(&format!("{what}: {count}: {reason}\n"));
            }
        }
        std::io::stdout().write_all(table.as_bytes())?;
        if let Some(stopped) = &measured.ramp.stopped {
            bail!("{} of {} connections: {stopped}", measured.held.connections, args.count);
        }
        let missing: u64 = measured.broadcasts.iter().chain([&measured.unicast]).map(Push::missing).sum();
        if missing > 0 {
            bail!("{missing} messages did not arrive");
        }
        Ok(())
    }
}
