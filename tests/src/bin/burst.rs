//! `make burst`: 30,000 devices over two gateways lose their connections in one moment and come back in the same one; then
//! the same where connects are let in at a rate. Everyone must be served, and nobody may wait in vain.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use carillon_tests::fleet::snapshot::Snapshot;
use carillon_tests::fleet::swarms::{Order, Swarm, Swarms};
use carillon_tests::fleet::{Fleet, Plan, drive, machine, say};
use carillon_tests::swarm::histogram::Histogram;
use carillon_tests::swarm::status::{CUT, RESET, Report};
use carillon_tests::swarm::sys;
use clap::Parser;
use serde_json::{Value, json};

/// How long the devices may take to connect at the beginning, and to come back.
const BACK_WITHIN: Duration = Duration::from_secs(180);
/// From one thing to the next: what was begun has ended by then, and a changed document is in force.
const SETTLE: Duration = Duration::from_secs(4);
const TICK: Duration = Duration::from_millis(50);

/// Cuts all devices of some gateways off at once, and measures how they come back.
#[derive(Debug, Parser)]
struct Args {
    /// Devices, in all
    #[arg(long, default_value_t = 30_000, value_parser = clap::value_parser!(u32).range(1..))]
    count: u32,
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    gateways: u32,
    /// Threads that hold connections, of each gateway; 0: one for each CPU
    #[arg(long, default_value_t = 0)]
    shards: u32,
    /// Times that all are cut off with the gateways' limits as they are
    #[arg(long, default_value_t = 2)]
    rounds: u32,
    /// Then once more with this many connects a second let in by each gateway; 0: not
    #[arg(long, value_name = "PER_SECOND", default_value_t = 1000)]
    limited: u32,
    /// Of subscriptions
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(0..=1))]
    qos: u8,
    /// The devices' sessions outlive their connections
    #[arg(long)]
    kept: bool,
    /// MQTT version: 4 (3.1.1) or 5
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u8).range(4..=5))]
    version: u8,
    /// The program under test
    #[arg(long, value_name = "PATH", default_value = "target/dist/carillon")]
    carillon: PathBuf,
    /// Changes the gateways' limits: a field of the `gateway` document. May be repeated
    #[arg(long, value_name = "FIELD=VALUE")]
    gateway_set: Vec<String>,
    /// Everything that was measured, as JSON
    #[arg(long, value_name = "PATH", default_value = "target/burst.json")]
    json: PathBuf,
}

fn main() -> ExitCode {
    let args = Args::parse();
    drive(Box::pin(run(args)))
}

async fn run(args: Args) -> anyhow::Result<()> {
    if args.count < args.gateways {
        bail!("--count {}: less than a device for each of {} gateways", args.count, args.gateways);
    }
    sys::raise_open_files().context("cannot raise the number of open files")?;
    let fleet = Fleet::start(&Plan {
        carillon: args.carillon.clone(),
        gateways: args.gateways,
        shards: args.shards,
        lift_limits: false,
        gateway_fields: args.gateway_set.clone(),
    })
    .await?;
    let mut storm = Storm { swarms: Swarms::default(), fleet, args };
    storm.connect().await?;
    let mut bursts = Vec::new();
    for round in 1..=storm.args.rounds {
        bursts.push(storm.burst(format!("burst {round}")).await?);
    }
    let rate = storm.args.limited;
    if rate > 0 {
        let limits = [format!("connect_rate_per_second={rate}"), format!("connect_burst={rate}")];
        storm.fleet.set_gateway(&limits).await?;
        bursts.push(storm.burst(format!("{rate}/s let in by each")).await?);
    }
    storm.tell(&bursts)
}

struct Storm {
    args: Args,
    // In this order they end: nobody has to clean up after connections.
    swarms: Swarms,
    fleet: Fleet,
}

/// One time that all were cut off.
struct Burst {
    what: String,
    report: Report,
    /// Connects that did not become ready, by reason, each of them tried again.
    failed: Vec<(String, u64)>,
    lost: Vec<(String, u64)>,
    /// Times that a gateway left further connections in the kernel's queue for a while.
    pauses: f64,
    ready: u64,
    before: Snapshot,
    after: Snapshot,
}

impl Burst {
    /// Devices that waited in vain: 30 s, for whatever.
    fn timeouts(&self) -> u64 {
        self.failed.iter().filter(|(reason, _)| reason.starts_with("waited")).map(|(_, count)| count).sum()
    }

    fn refused(&self) -> u64 {
        self.failed.iter().filter(|(reason, _)| reason.starts_with("refused")).map(|(_, count)| count).sum()
    }

    fn cpu_ms(&self) -> [(&'static str, u64); 5] {
        let mut used = self.after.roles().map(|(role, usage)| (role, usage.cpu_ms));
        for ((_, used), (_, before)) in used.iter_mut().zip(self.before.roles()) {
            *used -= before.cpu_ms;
        }
        used
    }

    fn json(&self) -> Value {
        let quantiles = |histogram: &Histogram| {
            json!({
                "count": histogram.count(), "p50": histogram.quantile(0.5), "p99": histogram.quantile(0.99), "max": histogram.max()
            })
        };
        json!({
            "what": self.what, "ready": self.ready, "refused": self.refused(), "timeouts": self.timeouts(),
            "failed": self.failed, "lost": self.lost, "accept_pauses": self.pauses,
            "back_us": quantiles(&self.report.back), "connect_to_suback_us": quantiles(&self.report.connect),
            "cpu_ms": self.cpu_ms().into_iter().collect::<std::collections::BTreeMap<_, _>>(),
            "before": self.before, "after": self.after,
        })
    }
}

impl Storm {
    /// A swarm for each gateway, all of them there.
    async fn connect(&mut self) -> anyhow::Result<()> {
        let Args { count, gateways, .. } = self.args;
        let mut first = 0;
        for index in 0..gateways {
            let share = count / gateways + u32::from(index < count % gateways);
            let mut arguments = vec![
                format!("--version={}", self.args.version),
                format!("--qos={}", self.args.qos),
                "--keep-alive=600".to_owned(),
            ];
            arguments.extend(self.args.kept.then(|| "--kept".to_owned()));
            let order = Order {
                gateway: self.fleet.mqtt(index),
                source: self.fleet.source(index),
                count: share,
                first,
                arguments,
            };
            first += u64::from(share);
            self.swarms.0.push(Swarm::start(&format!("swarm-{index}"), &order, self.fleet.dir())?);
        }
        let began = Instant::now();
        self.all_are_there(1, began).await?;
        say(&format!("{count} connected in {:.1} s", began.elapsed().as_secs_f64()));
        Ok(())
    }

    /// Waits until every device is there for the so manieth time; whoever is late is in the report.
    async fn all_are_there(&mut self, times: u64, began: Instant) -> anyhow::Result<()> {
        loop {
            let are_there = self.swarms.0.iter().all(|swarm| {
                let status = swarm.status();
                status.cut == (times - 1) * u64::from(swarm.count) && status.ready == swarm.count
            });
            if are_there || began.elapsed() > BACK_WITHIN {
                return Ok(());
            }
            self.fleet.check()?;
            self.swarms.check()?;
            tokio::time::sleep(TICK).await;
        }
    }

    async fn burst(&mut self, what: String) -> anyhow::Result<Burst> {
        tokio::time::sleep(SETTLE).await;
        self.swarms.tell(RESET).await?;
        let (failed_before, lost_before) = self.swarms.troubles();
        let pauses_before = self.pauses().await?;
        let before = Snapshot::take(&self.fleet, &self.swarms)?;
        if before.connections != u64::from(self.args.count) {
            bail!(
                "{} of {} are connected: {failed_before:?} {lost_before:?}",
                before.connections,
                self.args.count
            );
        }
        say(&format!("{what}: {} are cut off", before.connections));
        let times = self.swarms.0.iter().map(|swarm| swarm.status().cut / u64::from(swarm.count)).max();
        let began = Instant::now();
        self.swarms.tell(CUT).await?;
        self.all_are_there(times.unwrap_or(0) + 2, began).await?;
        let after = Snapshot::take(&self.fleet, &self.swarms)?;
        let report = self.swarms.report().await?;
        let (failed, lost) = self.swarms.troubles();
        let since = |now: std::collections::BTreeMap<String, u64>,
                     before: &std::collections::BTreeMap<String, u64>| {
            now.into_iter()
                .map(|(reason, count)| (reason.clone(), count - before.get(&reason).copied().unwrap_or(0)))
                .filter(|(_, count)| *count > 0)
                .collect::<Vec<_>>()
        };
        Ok(Burst {
            what,
            report,
            failed: since(failed, &failed_before),
            lost: since(lost, &lost_before),
            pauses: self.pauses().await? - pauses_before,
            ready: self.swarms.ready(),
            before,
            after,
        })
    }

    async fn pauses(&self) -> anyhow::Result<f64> {
        let mut all = 0.0;
        for gateway in 0..self.args.gateways {
            all += self.fleet.gateway_metric(gateway, "carillon_gateway_accept_pauses_total").await?;
        }
        Ok(all)
    }

    /// The table on stdout, and all of it as JSON. Fails if somebody is not back or has waited in vain.
    fn tell(&self, bursts: &[Burst]) -> anyhow::Result<()> {
        let args = &self.args;
        let mut text = String::new();
        let _ = writeln!(
            text,
            "\n{} devices, {} gateways, MQTT {}, QoS {}, sessions {}, on {}",
            args.count,
            args.gateways,
            if args.version == 5 { "5.0" } else { "3.1.1" },
            args.qos,
            if args.kept { "kept" } else { "ended" },
            machine::description()
        );
        let _ = writeln!(
            text,
            "\nms                     all back   p50 back  connect p50     p99     max  refused  timeouts  pauses   CPU: gateways   hub  swarms"
        );
        for burst in bursts {
            let (back, connect) = (&burst.report.back, &burst.report.connect);
            let ms = |micros: u64| micros / 1000;
            let [(_, gateways), (_, hub), _, (_, swarms), _] = burst.cpu_ms();
            let _ = writeln!(
                text,
                "{:<22}{:>9}{:>11}{:>13}{:>8}{:>8}{:>9}{:>10}{:>8}{:>16}{:>6}{:>8}",
                burst.what,
                ms(back.max()),
                ms(back.quantile(0.5)),
                ms(connect.quantile(0.5)),
                ms(connect.quantile(0.99)),
                ms(connect.max()),
                burst.refused(),
                burst.timeouts(),
                burst.pauses,
                gateways,
                hub,
                swarms
            );
        }
        for burst in bursts {
            for (what, reasons) in [("tried in vain", &burst.failed), ("lost", &burst.lost)] {
                for (reason, count) in reasons {
                    let _ = writeln!(text, "{}: {what}: {count}: {reason}", burst.what);
                }
            }
        }
        for lines in self.fleet.logged() {
            let _ = writeln!(text, "{lines}");
        }
        let document = json!({
            "machine": machine::description(),
            "settings": {
                "count": args.count, "gateways": args.gateways, "shards": args.shards, "qos": args.qos,
                "version": args.version, "kept": args.kept, "limited": args.limited,
                "gateway_limits_changed": self.fleet.changed,
            },
            "bursts": bursts.iter().map(Burst::json).collect::<Vec<_>>(),
        });
        if let Some(directory) = args.json.parent() {
            std::fs::create_dir_all(directory)?;
        }
        std::fs::write(&args.json, serde_json::to_vec_pretty(&document)?)
            .with_context(|| format!("cannot write {}", args.json.display()))?;
        std::io::stdout().write_all(text.as_bytes())?;
        for burst in bursts {
            if burst.ready < u64::from(args.count) {
                bail!("{}: {} of {} are back after {BACK_WITHIN:?}", burst.what, burst.ready, args.count);
            }
            if burst.timeouts() > 0 {
                bail!("{}: {} connects timed out", burst.what, burst.timeouts());
            }
        }
        Ok(())
    }
}
