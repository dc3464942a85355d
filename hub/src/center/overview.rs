//! Live numbers of an app: what the gateways last reported, and rates from two reports in a row.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use carillon_proto::v1;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

/// Reports closer together than this are one report, seen twice.
const SAME_REPORT: Duration = Duration::from_millis(400);

/// What an app is doing on all gateways.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Overview {
    pub app: String,
    #[serde(flatten)]
    pub numbers: Numbers,
    /// The gateways, by name, with the app's part of each.
    pub gateways: Vec<GatewayNumbers>,
}

/// One gateway's part.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct GatewayNumbers {
    pub gateway: String,
    /// Age of its last report.
    pub age_seconds: f64,
    /// `active`, `draining`, `drained`.
    pub state: String,
    /// The drain or rebalance that runs, or else the last one; null when there was none since it started.
    pub moving: Option<Moving>,
    #[serde(flatten)]
    pub numbers: Numbers,
}

/// How far a gateway is that sends devices to others.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Moving {
    /// `drain`, `rebalance`.
    pub kind: String,
    /// Unix time in milliseconds.
    pub began_ms: u64,
    /// 0 while it runs.
    pub ended_ms: u64,
    pub aborted: bool,
    pub rate_per_second: f64,
    /// Devices to be moved, when it began.
    pub total: u64,
    pub moved: u64,
    pub left: u64,
}

impl From<&v1::MoveProgress> for Moving {
    fn from(progress: &v1::MoveProgress) -> Self {
        Moving {
            kind: progress.kind().name().to_owned(),
            began_ms: progress.began_ms,
            ended_ms: progress.ended_ms,
            aborted: progress.aborted,
            rate_per_second: progress.rate_per_second,
            total: progress.total,
            moved: progress.moved,
            left: progress.left,
        }
    }
}

/// Totals since the gateways started. Rates are over the time between their last two reports; null until there are
/// two.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Numbers {
    pub connections: u64,
    /// Messages sent to devices.
    pub delivered: u64,
    /// Messages published by devices.
    pub published: u64,
    /// Messages with QoS 0 that slow devices lost.
    pub dropped: u64,
    pub delivered_per_second: Option<f64>,
    pub published_per_second: Option<f64>,
}

impl Numbers {
    fn add(&mut self, other: &Numbers) {
        let sum = |a: Option<f64>, b: Option<f64>| match (a, b) {
            (None, None) => None,
            (a, b) => Some(a.unwrap_or(0.0) + b.unwrap_or(0.0)),
        };
        self.connections += other.connections;
        self.delivered += other.delivered;
        self.published += other.published;
        self.dropped += other.dropped;
        self.delivered_per_second = sum(self.delivered_per_second, other.delivered_per_second);
        self.published_per_second = sum(self.published_per_second, other.published_per_second);
    }
}

/// The last two reports of every gateway.
#[derive(Default)]
pub struct Sampler {
    gateways: BTreeMap<String, Pair>,
    pub sampled: Option<Instant>,
}

struct Pair {
    before: Option<Sample>,
    last: Sample,
}

struct Sample {
    at: Instant,
    apps: HashMap<String, v1::AppReport>,
    state: v1::GatewayState,
    moving: Option<v1::MoveProgress>,
}

impl Sampler {
    /// Takes in what all gateways reported last; those that are not there any more are forgotten.
    pub fn take(&mut self, now: Instant, reports: Vec<v1::GatewayOverview>) {
        self.sampled = Some(now);
        let mut gateways = std::mem::take(&mut self.gateways);
        for overview in reports {
            let report = overview.report.unwrap_or_default();
            let at = now.checked_sub(Duration::from_millis(overview.age_ms)).unwrap_or(now);
            let state = report.state();
            let moving = report.moving;
            let apps = report.apps.into_iter().map(|app| (app.app.clone(), app)).collect();
            let sample = Sample { at, apps, state, moving };
            let pair = match gateways.remove(&overview.instance) {
                None => Pair { before: None, last: sample },
                Some(pair) if at.saturating_duration_since(pair.last.at) < SAME_REPORT => pair,
                Some(pair) => Pair { before: Some(pair.last), last: sample },
            };
            self.gateways.insert(overview.instance, pair);
        }
    }

    /// The numbers of one app.
    pub fn overview(&self, now: Instant, app: &str) -> Overview {
        let mut overview = Overview { app: app.to_owned(), ..Overview::default() };
        for (gateway, pair) in &self.gateways {
            let numbers = pair.numbers(app);
            overview.numbers.add(&numbers);
            let age_seconds = now.saturating_duration_since(pair.last.at).as_secs_f64();
            overview.gateways.push(GatewayNumbers {
                gateway: gateway.clone(),
                age_seconds,
                state: pair.last.state.name().to_owned(),
                moving: pair.last.moving.as_ref().map(Moving::from),
                numbers,
            });
        }
        overview
    }
}

impl Pair {
    fn numbers(&self, app: &str) -> Numbers {
        let none = v1::AppReport::default();
        let last = self.last.apps.get(app).unwrap_or(&none);
        let rate = |total: fn(&v1::AppReport) -> u64| {
            let before = self.before.as_ref()?;
            let seconds = self.last.at.saturating_duration_since(before.at).as_secs_f64();
            // Totals that went back are those of a gateway that started anew: they say nothing about a rate yet.
            let grown = total(last).checked_sub(before.apps.get(app).map_or(0, total))?;
            (seconds > 0.0).then(|| grown as f64 / seconds)
        };
        Numbers {
            connections: last.connections,
            delivered: last.delivered,
            published: last.published,
            dropped: last.dropped,
            delivered_per_second: rate(|report| report.delivered),
            published_per_second: rate(|report| report.published),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(gateway: &str, age_ms: u64, connections: u64, delivered: u64) -> v1::GatewayOverview {
        let demo = v1::AppReport {
            app: "demo".to_owned(),
            connections,
            delivered,
            published: delivered / 2,
            ..v1::AppReport::default()
        };
        let other = v1::AppReport { app: "other".to_owned(), connections: 1000, ..v1::AppReport::default() };
        let report = v1::GatewayReport {
            connections: connections + 1000,
            apps: vec![demo, other],
            bytes_resident: 1,
            ..v1::GatewayReport::default()
        };
        v1::GatewayOverview { instance: gateway.to_owned(), report: Some(report), age_ms }
    }

    #[test]
    fn rates_come_from_two_reports_and_sum_over_gateways() {
        let mut sampler = Sampler::default();
        let start = Instant::now() + Duration::from_secs(100);
        let mut draining = report("b", 500, 4, 1000);
        if let Some(report) = &mut draining.report {
            report.state = v1::GatewayState::Draining.into();
            report.moving = Some(v1::MoveProgress { total: 7, moved: 3, left: 4, ..Default::default() });
        }
        sampler.take(start, vec![report("a", 0, 3, 100), draining]);
        let first = sampler.overview(start, "demo");
        assert_eq!((first.numbers.connections, first.numbers.delivered), (7, 1100));
        assert_eq!(first.numbers.delivered_per_second, None);
        let states: Vec<_> = first.gateways.iter().map(|gateway| gateway.state.as_str()).collect();
        assert_eq!(states, ["active", "draining"]);
        let moving = first.gateways[1].moving.as_ref().expect("it drains");
        assert_eq!((moving.kind.as_str(), moving.total, moving.moved, moving.left), ("drain", 7, 3, 4));

        // The same reports once more, a little later, change nothing.
        let soon = start + Duration::from_millis(300);
        sampler.take(soon, vec![report("a", 300, 3, 100), report("b", 800, 4, 1000)]);
        assert_eq!(sampler.overview(soon, "demo").numbers.delivered_per_second, None);

        let later = start + Duration::from_secs(2);
        sampler.take(later, vec![report("a", 0, 5, 300), report("b", 500, 4, 1010)]);
        let second = sampler.overview(later, "demo");
        assert_eq!(second.numbers.connections, 9);
        let rate = second.numbers.delivered_per_second.expect("two reports");
        assert!((rate - 105.0).abs() < 0.01, "{rate}");
        assert_eq!(second.gateways.len(), 2);
        assert!((second.gateways[1].age_seconds - 0.5).abs() < 0.01);

        // A gateway that started anew counts from 0; one that left is gone.
        let last = start + Duration::from_secs(4);
        sampler.take(last, vec![report("a", 0, 1, 5)]);
        let third = sampler.overview(last, "demo");
        assert_eq!((third.gateways.len(), third.numbers.delivered_per_second), (1, None));
        assert_eq!(sampler.overview(last, "nobody").numbers.connections, 0);
    }
}
