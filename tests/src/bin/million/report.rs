//! What was measured, as a table for people and as JSON.

use std::fmt::{self, Write as _};
use std::time::Duration;

use carillon_tests::fleet::machine;
use carillon_tests::fleet::snapshot::Snapshot;
use carillon_tests::swarm::histogram::Histogram;
use carillon_tests::swarm::status::Received;
use serde_json::{Value, json};

use super::Args;

/// How the connections were made.
pub struct Ramp {
    pub took: Duration,
    /// Why there are not as many as were asked for.
    pub stopped: Option<String>,
    /// Seconds, connections, MemAvailable in kB.
    pub course: Vec<(f64, u64, u64)>,
}

/// A push, and what came of it.
pub struct Push {
    pub expected: u64,
    pub received: Received,
    /// From the first push to the last delivery, and to the last answer.
    pub to_last: Duration,
    pub to_accepted: Duration,
    /// From each request to its answer.
    pub accepted: Histogram,
    pub before: Snapshot,
    pub after: Snapshot,
}

impl Push {
    pub fn missing(&self) -> u64 {
        self.expected.saturating_sub(self.received.latency.count())
    }
}

/// Everything that was measured.
pub struct Measured {
    /// Before the first connection, with all of them, and at the end.
    pub empty: Snapshot,
    pub held: Snapshot,
    pub after: Snapshot,
    pub ramp: Ramp,
    pub connect_latency: Histogram,
    pub broadcasts: Vec<Push>,
    pub unicast: Push,
}

impl Measured {
    fn per_second(&self) -> f64 {
        self.held.connections as f64 / self.ramp.took.as_secs_f64()
    }

    pub fn json(&self) -> Value {
        json!({
            "connections": self.held.connections,
            "stopped": self.ramp.stopped,
            "connect_seconds": self.ramp.took.as_secs_f64(),
            "connects_per_second": self.per_second(),
            "connect_latency_us": quantiles(&self.connect_latency),
            "course": self.ramp.course.iter().map(|(seconds, connections, left_kb)| json!({
                "seconds": seconds, "connections": connections, "left_kb": left_kb
            })).collect::<Vec<_>>(),
            "empty": self.empty,
            "held": self.held,
            "after": self.after,
            "kernel_kb": self.held.kernel_kb(&self.empty),
            "kernel_slab_kb": self.held.memory.slab_kb as i64 - self.empty.memory.slab_kb as i64,
            "broadcasts": self.broadcasts.iter().map(push_json).collect::<Vec<_>>(),
            "unicast": push_json(&self.unicast),
        })
    }

    pub fn table(&self, args: &Args) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = self.connected(&mut text, args);
        let _ = self.memory(&mut text);
        let _ = self.pushes(&mut text, args);
        let _ = self.cpu(&mut text);
        text
    }

    fn connected(&self, text: &mut String, args: &Args) -> fmt::Result {
        let (held, took) = (&self.held, self.ramp.took.as_secs_f64());
        writeln!(text, "\n{} of {} connections on {}", held.connections, args.count, machine::description())?;
        let version = if args.version == 5 { "5.0" } else { "3.1.1" };
        let (gateways, swarms) = (held.gateways.processes, held.swarms.processes);
        write!(text, "MQTT {version}, QoS {}, two subscriptions each; ", args.qos)?;
        writeln!(text, "{gateways} gateways, {swarms} swarms")?;
        write!(text, "connected in {took:.1} s: {:.0} a second; ", self.per_second())?;
        writeln!(text, "connect to SUBACK {}", shown(&self.connect_latency))
    }

    fn memory(&self, text: &mut String) -> fmt::Result {
        let (held, empty) = (&self.held, &self.empty);
        let each = |kb: i64| kb as f64 * 1024.0 / held.connections.max(1) as f64;
        writeln!(text, "\nmemory, MiB         empty   resident        own   own bytes a connection")?;
        for ((name, now), (_, before)) in held.roles().into_iter().zip(empty.roles()) {
            let name = format!("{name} ({})", now.processes);
            let (had, resident, own) =
                (mib(before.own_kb as i64), mib(now.rss_kb as i64), mib(now.own_kb as i64));
            let grown = each(now.own_kb as i64 - before.own_kb as i64);
            writeln!(text, "{name:<16}{had:>9.1}  {resident:>9.1}  {own:>9.1}  {grown:>9.0}")?;
        }
        let slab_kb = held.memory.slab_kb as i64 - empty.memory.slab_kb as i64;
        for (name, kb) in [("kernel", held.kernel_kb(empty)), ("kernel's slab", slab_kb)] {
            writeln!(text, "{name:<16}{:>9}  {:>9}  {:>9.1}  {:>9.0}", "", "", mib(kb), each(kb))?;
        }
        let (before, left) = (empty.memory.available_kb, held.memory.left_kb(&empty.memory));
        writeln!(text, "available: {:.0} MiB before, {:.0} MiB left", mib(before as i64), mib(left as i64))
    }

    fn pushes(&self, text: &mut String, args: &Args) -> fmt::Result {
        let numbers = |push: &Push| {
            let (delivered, twice) = (push.received.latency.count(), push.received.repeated);
            format!("{delivered} of {} delivered, {twice} twice", push.expected)
        };
        for (index, push) in self.broadcasts.iter().enumerate() {
            let (accepted, last) = (push.to_accepted.as_secs_f64(), push.to_last.as_secs_f64());
            let rate = push.received.latency.count() as f64 / last.max(1e-9);
            writeln!(text, "\nbroadcast {}, {} bytes: {}", index + 1, args.payload, numbers(push))?;
            write!(text, "  accepted in {:.1} ms, the last after {last:.2} s: ", accepted * 1000.0)?;
            writeln!(text, "{rate:.0} deliveries a second")?;
            writeln!(text, "  latency {}", shown(&push.received.latency))?;
        }
        let push = &self.unicast;
        let accepted = push.to_accepted.as_secs_f64();
        write!(text, "\nunicast, {} bytes, {} pushes under way: ", args.payload, args.pushing)?;
        writeln!(text, "{}", numbers(push))?;
        write!(
            text,
            "  all accepted in {accepted:.2} s: {:.0} a second; ",
            push.expected as f64 / accepted.max(1e-9)
        )?;
        writeln!(text, "request to answer {}", shown(&push.accepted))?;
        writeln!(text, "  latency {}", shown(&push.received.latency))
    }

    fn cpu(&self, text: &mut String) -> fmt::Result {
        writeln!(text, "\nCPU, seconds    connecting     broadcast       unicast")?;
        for (index, (name, _)) in self.held.roles().into_iter().enumerate() {
            let cpu_ms = |snapshot: &Snapshot| snapshot.roles()[index].1.cpu_ms as f64;
            let used = |before: &Snapshot, after: &Snapshot| (cpu_ms(after) - cpu_ms(before)) / 1000.0;
            let connecting = used(&self.empty, &self.held);
            let broadcast: f64 = self.broadcasts.iter().map(|push| used(&push.before, &push.after)).sum();
            let unicast = used(&self.unicast.before, &self.unicast.after);
            writeln!(text, "{name:<16}{connecting:>10.1}{broadcast:>14.2}{unicast:>14.2}")?;
        }
        Ok(())
    }
}

fn mib(kilobytes: i64) -> f64 {
    kilobytes as f64 / 1024.0
}

fn quantiles(latency: &Histogram) -> Value {
    json!({
        "count": latency.count(), "mean": latency.mean(), "p50": latency.quantile(0.5), "p90": latency.quantile(0.9),
        "p99": latency.quantile(0.99), "p999": latency.quantile(0.999), "max": latency.max(),
    })
}

fn shown(latency: &Histogram) -> String {
    let ms = |micros: u64| micros as f64 / 1000.0;
    let (p50, p99, max) = (latency.quantile(0.5), latency.quantile(0.99), latency.max());
    format!("p50 {:.1} ms, p99 {:.1} ms, max {:.1} ms", ms(p50), ms(p99), ms(max))
}

fn push_json(push: &Push) -> Value {
    json!({
        "expected": push.expected,
        "delivered": push.received.latency.count(),
        "delivered_twice": push.received.repeated,
        "seconds_to_accepted": push.to_accepted.as_secs_f64(),
        "seconds_to_last": push.to_last.as_secs_f64(),
        "accept_latency_us": quantiles(&push.accepted),
        "latency_us": quantiles(&push.received.latency),
        "before": push.before,
        "after": push.after,
    })
}
