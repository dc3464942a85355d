//! `make soak`: one gateway with 19,000 connections for an hour, one in a hundred of them ended and made again each
//! second, with traffic: memory must stay flat, who pings must never be dropped, who falls silent must be dropped in time.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use carillon_tests::fleet::fit::{Line, line};
use carillon_tests::fleet::machine::{self, Usage};
use carillon_tests::fleet::swarms::{Order, Swarm, Swarms};
use carillon_tests::fleet::{Fleet, Plan, drive, say};
use carillon_tests::swarm::status::{Silent, Status};
use carillon_tests::swarm::sys::{self, monotonic_ns};
use carillon_tests::swarm::wire::{Kind, Stamp};
use clap::Parser;
use serde::Serialize;
use serde_json::json;

/// Steady growth above this is a leak. Churn of 190 a second makes 684,000 connections an hour: it is a byte and a half
/// for each of them.
const LEAK_KB_PER_HOUR: f64 = 1024.0;
/// With less than this after the warm-up nothing is said about leaks: noise would look like growth.
const JUDGED_FROM: Duration = Duration::from_secs(20 * 60);
/// How long the devices may take to connect at the beginning.
const RAMP_WITHIN: Duration = Duration::from_secs(300);
const TICK: Duration = Duration::from_millis(100);

/// Holds connections on one gateway for a long time, with churn and traffic, and judges what becomes of it.
#[derive(Debug, Parser)]
struct Args {
    /// How long, without the ramp
    #[arg(long, default_value_t = 60.0)]
    minutes: f64,
    /// What is sampled before this does not count for growth [default: a sixth of --minutes]
    #[arg(long, value_name = "MINUTES")]
    warm_up: Option<f64>,
    /// Connections
    #[arg(long, default_value_t = 19_000, value_parser = clap::value_parser!(u32).range(1..))]
    count: u32,
    /// Of them, those that never send anything after CONNECT
    #[arg(long, default_value_t = 200)]
    silent: u32,
    /// Connections ended and made again, percent of all a second
    #[arg(long, value_name = "PERCENT", default_value_t = 1.0)]
    churn: f64,
    /// Shortest and longest keep-alive, seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    keep_alive: u16,
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    keep_alive_max: u16,
    /// Messages to single users, a second
    #[arg(long, value_name = "PER_SECOND", default_value_t = 50.0)]
    pushes: f64,
    /// From one broadcast to the next
    #[arg(long, value_name = "SECONDS", default_value_t = 60.0)]
    broadcast_every: f64,
    /// Of subscriptions and pushes
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(0..=1))]
    qos: u8,
    /// MQTT version: 4 (3.1.1) or 5
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u8).range(4..=5))]
    version: u8,
    /// From one sample to the next
    #[arg(long, value_name = "SECONDS", default_value_t = 5.0)]
    sample: f64,
    /// The program under test
    #[arg(long, value_name = "PATH", default_value = "target/dist/carillon")]
    carillon: PathBuf,
    /// Threads that hold connections; 0: one for each CPU
    #[arg(long, default_value_t = 0)]
    shards: u32,
    /// Changes the gateway's limits: a field of the `gateway` document. May be repeated
    #[arg(long, value_name = "FIELD=VALUE")]
    gateway_set: Vec<String>,
    /// All samples and the result, as JSON
    #[arg(long, value_name = "PATH", default_value = "target/soak.json")]
    json: PathBuf,
}

/// At one moment.
#[derive(Debug, Clone, Serialize)]
struct Sample {
    seconds: f64,
    gateway: Usage,
    hub: Usage,
    keeper: Usage,
    /// As the gateway counts them.
    connections: f64,
    /// Entries in its timer wheels; none if it does not say.
    timers: Option<f64>,
    pushed: u64,
    swarm: Status,
}

fn main() -> ExitCode {
    let args = Args::parse();
    drive(Box::pin(run(args)))
}

async fn run(args: Args) -> anyhow::Result<()> {
    if !(args.minutes.is_finite() && args.minutes > 0.0 && args.sample > 0.0 && args.broadcast_every > 0.0) {
        bail!("--minutes, --sample and --broadcast-every must be more than 0");
    }
    if args.silent >= args.count {
        bail!("--silent {} must be less than --count {}", args.silent, args.count);
    }
    sys::raise_open_files().context("cannot raise the number of open files")?;
    let mut swarms = Swarms::default();
    let mut fleet = Fleet::start(&Plan {
        carillon: args.carillon.clone(),
        gateways: 1,
        shards: args.shards,
        lift_limits: true,
        gateway_fields: args.gateway_set.clone(),
    })
    .await?;
    let order = Order {
        gateway: fleet.mqtt(0),
        source: fleet.source(0),
        count: args.count,
        first: 0,
        arguments: [
            format!("--version={}", args.version),
            format!("--qos={}", args.qos),
            format!("--keep-alive={}", args.keep_alive),
            format!("--keep-alive-max={}", args.keep_alive_max),
            format!("--silent={}", args.silent),
            format!("--churn={}", f64::from(args.count) * args.churn / 100.0),
        ]
        .into(),
    };
    swarms.0.push(Swarm::start("swarm", &order, fleet.dir())?);
    let began = Instant::now();
    while swarms.0[0].status().connects < u64::from(args.count) {
        fleet.check()?;
        swarms.check()?;
        let status = swarms.0[0].status();
        if status.gave_up || began.elapsed() > RAMP_WITHIN {
            bail!("{} of {} connected: {:?}", status.ready, args.count, status.failed);
        }
        tokio::time::sleep(TICK).await;
    }
    say(&format!("{} connected in {:.1} s", args.count, began.elapsed().as_secs_f64()));

    let samples = hold(&args, &mut fleet, &mut swarms).await?;
    let report = swarms.report().await?;
    let judged = judge(&args, &samples);
    let (delivered, latency) = (report.unicast.latency.count(), &report.unicast.latency);
    let mut text = judged.text.clone();
    let _ = writeln!(
        text,
        "traffic: {delivered} messages to single users delivered (p50 {:.1} ms, p99 {:.1} ms, max {:.1} ms), {} twice; {} deliveries of broadcasts, {} twice",
        latency.quantile(0.5) as f64 / 1000.0,
        latency.quantile(0.99) as f64 / 1000.0,
        latency.max() as f64 / 1000.0,
        report.unicast.repeated,
        report.broadcast.latency.count(),
        report.broadcast.repeated
    );
    let document = json!({
        "machine": machine::description(),
        "settings": {
            "minutes": args.minutes, "count": args.count, "silent": args.silent, "churn_percent": args.churn,
            "keep_alive_seconds": [args.keep_alive, args.keep_alive_max], "pushes_per_second": args.pushes,
            "broadcast_every_seconds": args.broadcast_every, "qos": args.qos, "version": args.version,
            "shards": args.shards, "gateway_limits_changed": fleet.changed,
        },
        "lines": judged.lines.iter().map(|(what, whole, half)| json!({
            "what": what, "kb_per_hour": whole, "second_half_kb_per_hour": half
        })).collect::<Vec<_>>(),
        "failures": judged.failures,
        "samples": samples,
    });
    if let Some(directory) = args.json.parent() {
        std::fs::create_dir_all(directory)?;
    }
    std::fs::write(&args.json, serde_json::to_vec(&document)?)
        .with_context(|| format!("cannot write {}", args.json.display()))?;
    std::io::stdout().write_all(text.as_bytes())?;
    if !judged.failures.is_empty() {
        bail!("{}", judged.failures.join("; "));
    }
    Ok(())
}

/// Sends and samples for as long as was asked.
async fn hold(args: &Args, fleet: &mut Fleet, swarms: &mut Swarms) -> anyhow::Result<Vec<Sample>> {
    let began = Instant::now();
    let (mut samples, mut pushed, mut broadcasts) = (Vec::new(), 0_u64, 0_u64);
    let mut said = 0.0;
    loop {
        let seconds = began.elapsed().as_secs_f64();
        if samples.len() as f64 * args.sample <= seconds {
            fleet.check()?;
            swarms.check()?;
            let sample = Sample {
                seconds,
                gateway: Usage::of(fleet.gateways[0].pid())?,
                hub: Usage::of(fleet.hub.pid())?,
                keeper: Usage::of(fleet.keeper.pid())?,
                connections: fleet.gateway_metric(0, "carillon_gateway_connections").await?,
                timers: fleet.gateway_metric(0, "carillon_gateway_timer_entries").await.ok(),
                pushed,
                swarm: swarms.0[0].status(),
            };
            if seconds >= said {
                said += 60.0;
                say(&format!(
                    "{:5.1} min  gateway {} kB resident, {} kB its own; {} connections, {} made again, {} lost",
                    seconds / 60.0,
                    sample.gateway.rss_kb,
                    sample.gateway.own_kb,
                    sample.connections,
                    sample.swarm.churned,
                    sample.swarm.lost.values().sum::<u64>()
                ));
            }
            samples.push(sample);
        }
        if seconds >= args.minutes * 60.0 {
            return Ok(samples);
        }
        // Rounds go from 1 to 250 and on from there: two of the same are far apart.
        let stamp =
            |kind, number: u64| Stamp { kind, round: (number % 250) as u8 + 1, sent_ns: monotonic_ns() };
        let talking = u64::from(args.count - args.silent);
        while (pushed as f64) < args.pushes * seconds {
            // All of them in turn, in a scattered order.
            let user = u64::from(args.silent) + pushed.wrapping_mul(7919) % talking;
            let payload = stamp(Kind::Unicast, pushed / talking).payload(100);
            fleet
                .post(&format!("users/d{user}/messages"), &json!({ "payload": payload, "qos": args.qos }))
                .await?;
            pushed += 1;
        }
        if seconds >= (broadcasts + 1) as f64 * args.broadcast_every {
            let payload = stamp(Kind::Broadcast, broadcasts).payload(100);
            fleet.post("broadcasts", &json!({ "payload": payload, "qos": args.qos })).await?;
            broadcasts += 1;
        }
        tokio::time::sleep(TICK).await;
    }
}

/// What became of it.
struct Judged {
    text: String,
    failures: Vec<String>,
    /// Of memory, kB an hour: after the warm-up, and in the second half of that.
    lines: Vec<(&'static str, Option<Line>, Option<Line>)>,
}

fn judge(args: &Args, samples: &[Sample]) -> Judged {
    let (Some(first), Some(last)) = (samples.first(), samples.last()) else {
        return Judged {
            text: String::new(),
            failures: vec!["nothing was sampled".to_owned()],
            lines: Vec::new(),
        };
    };
    let warm_up = args.warm_up.unwrap_or(args.minutes / 6.0) * 60.0;
    let warm: Vec<&Sample> = samples.iter().filter(|sample| sample.seconds >= warm_up).collect();
    let half = &warm[warm.len() / 2..];
    let (mut text, mut failures, mut lines) = (String::new(), Vec::new(), Vec::new());
    let _ = writeln!(
        text,
        "\n{} connections for {:.0} min, {} made again ({} % a second), keep-alive {} to {} s, MQTT {}, QoS {}, on {}",
        args.count,
        last.seconds / 60.0,
        last.swarm.churned,
        args.churn,
        args.keep_alive,
        args.keep_alive_max,
        if args.version == 5 { "5.0" } else { "3.1.1" },
        args.qos,
        machine::description()
    );

    // --- memory ---
    let _ = writeln!(text, "\nkB                    first     warm     last   kB an hour  second half   R²");
    let long_enough = last.seconds - warm_up >= JUDGED_FROM.as_secs_f64();
    type Value = fn(&Sample) -> f64;
    let roles: [(&str, Value); 4] = [
        ("gateway resident", |sample| sample.gateway.rss_kb as f64),
        ("gateway own", |sample| sample.gateway.own_kb as f64),
        ("hub own", |sample| sample.hub.own_kb as f64),
        ("keeper own", |sample| sample.keeper.own_kb as f64),
    ];
    for (what, value) in roles {
        let points = |samples: &[&Sample]| -> Vec<(f64, f64)> {
            samples.iter().map(|sample| (sample.seconds / 3600.0, value(sample))).collect()
        };
        let (whole, second) = (line(&points(&warm)), line(&points(half)));
        let slope = |line: &Option<Line>| line.map_or(f64::NAN, |line| line.slope);
        let _ = writeln!(
            text,
            "{what:<18}{:>9.0}{:>9.0}{:>9.0}{:>13.0}{:>13.0}{:>5.2}",
            value(first),
            warm.first().map_or(f64::NAN, |sample| value(sample)),
            value(last),
            slope(&whole),
            slope(&second),
            whole.map_or(f64::NAN, |line| line.r_squared)
        );
        // What levels off grows in the first half only.
        let grows = slope(&whole) > LEAK_KB_PER_HOUR && slope(&second) > LEAK_KB_PER_HOUR;
        if what.starts_with("gateway") && long_enough && grows {
            failures.push(format!("{what} memory grows steadily, by {:.0} kB an hour", slope(&second)));
        }
        lines.push((what, whole, second));
    }
    if !long_enough {
        let _ = writeln!(text, "too short to judge growth: that takes {:?} after the warm-up", JUDGED_FROM);
    } else if failures.is_empty() {
        let _ = writeln!(
            text,
            "no leak: the gateway does not steadily grow by more than {LEAK_KB_PER_HOUR} kB an hour"
        );
    }
    let _ = writeln!(
        text,
        "gateway: files {} warm, {} last; timer entries {} warm, {} last; CPU {:.1} % of one",
        warm.first().map_or(0, |sample| sample.gateway.files),
        last.gateway.files,
        shown(warm.first().and_then(|sample| sample.timers)),
        shown(last.timers),
        (last.gateway.cpu_ms - first.gateway.cpu_ms) as f64 / (last.seconds - first.seconds).max(1.0) / 10.0
    );

    // --- keep-alive ---
    let swarm = &last.swarm;
    let lost: u64 = swarm.lost.values().sum();
    let _ = writeln!(
        text,
        "pings {}, answered {}; connections lost that did ping: {lost}",
        swarm.pings, swarm.pongs
    );
    for (reason, count) in swarm.lost.iter().chain(&swarm.failed) {
        failures.push(format!("{count} connections: {reason}"));
    }
    // Those under way when it was sampled, and those of connections that churn ended.
    let unanswered = swarm.pings.saturating_sub(swarm.pongs);
    if unanswered as f64 > 0.01 * swarm.pings as f64 + 100.0 {
        failures.push(format!("{unanswered} of {} pings were not answered", swarm.pings));
    }
    let silent = &swarm.silent;
    let mean = |from: &Silent, to: &Silent| {
        (to.sum_late_ms - from.sum_late_ms) as f64 / (to.ended - from.ended).max(1) as f64
    };
    let third = |share: usize| &samples[(samples.len() - 1) * share / 3].swarm.silent;
    let _ = writeln!(
        text,
        "silent devices dropped {} times, {} to {} ms after 1.5 keep-alives (mean {:.0}; first third {:.0}, last third {:.0})",
        silent.ended,
        silent.least_late_ms,
        silent.most_late_ms,
        mean(&Silent::default(), silent),
        mean(&Silent::default(), third(1)),
        mean(third(2), silent)
    );
    if silent.off > 0 {
        failures.push(format!("{} silent devices were dropped more than a second off", silent.off));
    }
    // Each comes back within 2 s, and is silent again. Half of it is a wide margin.
    let cycle = f64::from(args.keep_alive_max) * 1.5 + 3.0;
    let expected = (f64::from(args.silent) * (last.seconds / cycle).floor() * 0.5) as u64;
    if silent.ended < expected {
        failures.push(format!(
            "silent devices were dropped {} times, rather than at least {expected}",
            silent.ended
        ));
    }
    let held = f64::from(swarm.ready + swarm.pending);
    if (last.connections - held).abs() > 0.01 * held + 50.0 {
        failures.push(format!("the gateway counts {} connections, the swarm {held}", last.connections));
    }
    Judged { text, failures, lines }
}

fn shown(number: Option<f64>) -> String {
    number.map_or_else(|| "unknown".to_owned(), |number| format!("{number:.0}"))
}
