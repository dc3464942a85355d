//! Where devices are sent: the gateways that will take them, the emptiest first.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use carillon_agent::Instance;
use carillon_proto::v1;

/// The gateways that devices can be sent to, with what they hold. Shared by all shards, so that they fill evenly.
#[derive(Debug, Default)]
pub struct Targets {
    all: Vec<Target>,
}

#[derive(Debug)]
struct Target {
    instance: String,
    /// By scheme: "host:port".
    addresses: BTreeMap<String, String>,
    /// Connections as reported, and devices sent there that may not be in the report yet.
    expected: AtomicU64,
    capacity: u64,
    /// Devices sent there since the last report was looked at, and in the time before that.
    sent: AtomicU64,
    sent_before: u64,
}

/// Whom devices may be sent to.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Wanted {
    /// These alone; empty: any.
    pub instances: Vec<String>,
    /// Only gateways that hold less than this.
    pub emptier_than: Option<u64>,
}

impl Targets {
    /// `reports`: what each gateway last said; one that has not is taken for empty. `before`: what was known till now.
    pub fn new(
        own: &str,
        wanted: &Wanted,
        gateways: &[Instance],
        reports: &BTreeMap<String, v1::GatewayReport>,
        before: &Targets,
    ) -> Self {
        let none = v1::GatewayReport::default();
        let is_wanted = |gateway: &&Instance| {
            let report = reports.get(&gateway.id).unwrap_or(&none);
            let leaves = matches!(report.state(), v1::GatewayState::Draining | v1::GatewayState::Drained);
            gateway.id != own
                && !gateway.draining
                && !leaves
                && (wanted.instances.is_empty() || wanted.instances.contains(&gateway.id))
                && wanted.emptier_than.is_none_or(|most| report.connections < most)
        };
        let target = |gateway: &Instance| {
            let report = reports.get(&gateway.id).unwrap_or(&none);
            let earlier = before.all.iter().find(|target| target.instance == gateway.id);
            let sent = earlier.map_or(0, |target| target.sent.load(Ordering::Relaxed));
            let sent_before = earlier.map_or(0, |target| target.sent_before);
            Target {
                instance: gateway.id.clone(),
                addresses: gateway.addresses.clone(),
                expected: AtomicU64::new(report.connections + sent + sent_before),
                capacity: if report.max_connections == 0 { u64::MAX } else { report.max_connections },
                sent: AtomicU64::new(0),
                sent_before: sent,
            }
        };
        Targets { all: gateways.iter().filter(is_wanted).map(target).collect() }
    }

    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// The "host:port" of the emptiest one that has such an address and room; a device counts as sent there.
    pub fn pick(&self, scheme: &str) -> Option<&str> {
        let candidates = self.all.iter().filter_map(|target| {
            let address = target.addresses.get(scheme)?;
            let expected = target.expected.load(Ordering::Relaxed);
            (expected < target.capacity).then_some((target, address, expected))
        });
        let fuller = |a: u64, of: u64, b: u64, of_b: u64| {
            (u128::from(a) * u128::from(of_b)).cmp(&(u128::from(b) * u128::from(of)))
        };
        let (target, address, _) = candidates.min_by(|(a, _, expected_a), (b, _, expected_b)| {
            fuller(*expected_a, a.capacity, *expected_b, b.capacity)
        })?;
        target.expected.fetch_add(1, Ordering::Relaxed);
        target.sent.fetch_add(1, Ordering::Relaxed);
        Some(address)
    }
}

#[cfg(test)]
mod tests {
    use carillon_agent::Role;

    use super::*;

    fn gateway(id: &str, draining: bool) -> Instance {
        let addresses = [("mqtt", "1883"), ("ws", "8083")];
        Instance {
            id: id.to_owned(),
            incarnation: 1,
            roles: vec![Role::Gateway],
            addresses: addresses.map(|(scheme, port)| (scheme.to_owned(), format!("{id}:{port}"))).into(),
            labels: BTreeMap::new(),
            draining,
        }
    }

    fn report(connections: u64, max_connections: u64) -> v1::GatewayReport {
        v1::GatewayReport { connections, max_connections, ..v1::GatewayReport::default() }
    }

    fn reports<const N: usize>(of: [(&str, v1::GatewayReport); N]) -> BTreeMap<String, v1::GatewayReport> {
        of.map(|(id, report)| (id.to_owned(), report)).into()
    }

    fn counts(targets: &Targets, devices: usize) -> BTreeMap<String, usize> {
        let mut counts = BTreeMap::new();
        for _ in 0..devices {
            *counts.entry(targets.pick("mqtt").unwrap_or("nowhere").to_owned()).or_default() += 1;
        }
        counts
    }

    #[test]
    fn the_emptiest_fill_first_and_then_all_evenly() {
        let gateways = [gateway("a", false), gateway("b", false), gateway("c", false)];
        let reports = reports([("a", report(500, 1000)), ("b", report(100, 1000)), ("c", report(200, 1000))]);
        let targets = Targets::new("a", &Wanted::default(), &gateways, &reports, &Targets::default());
        let counts = counts(&targets, 300);
        assert_eq!(counts, [("b:1883".to_owned(), 200), ("c:1883".to_owned(), 100)].into());
        assert_eq!(targets.pick("ws").map(|address| &address[1..]), Some(":8083"));
        assert_eq!(targets.pick("wss"), None);
    }

    #[test]
    fn who_leaves_or_is_full_or_not_wanted_gets_nobody() {
        let gateways = ["a", "b", "c", "d", "e"].map(|id| gateway(id, id == "b"));
        let mut leaving = report(0, 1000);
        leaving.state = v1::GatewayState::Draining.into();
        let reports = reports([("c", leaving), ("d", report(998, 1000)), ("e", report(0, 1000))]);
        let any = Targets::new("a", &Wanted::default(), &gateways, &reports, &Targets::default());
        assert_eq!(counts(&any, 5), [("e:1883".to_owned(), 5)].into());
        let only = Wanted { instances: vec!["d".to_owned()], ..Wanted::default() };
        let only = Targets::new("a", &only, &gateways, &reports, &Targets::default());
        assert_eq!(counts(&only, 3), [("d:1883".to_owned(), 2), ("nowhere".to_owned(), 1)].into());
        let emptier = Wanted { emptier_than: Some(998), ..Wanted::default() };
        let emptier = Targets::new("a", &emptier, &gateways, &reports, &Targets::default());
        assert_eq!(counts(&emptier, 1), [("e:1883".to_owned(), 1)].into());
        let nobody = Wanted { emptier_than: Some(0), ..Wanted::default() };
        assert!(Targets::new("a", &nobody, &gateways, &reports, &Targets::default()).is_empty());
    }

    #[test]
    fn who_was_sent_counts_until_the_reports_show_it() {
        let gateways = [gateway("b", false), gateway("c", false)];
        let first = reports([("b", report(0, 1000)), ("c", report(100, 1000))]);
        let targets = Targets::new("a", &Wanted::default(), &gateways, &first, &Targets::default());
        assert_eq!(counts(&targets, 100), [("b:1883".to_owned(), 100)].into());
        // The same reports once more: b is not empty although it says so.
        let second = Targets::new("a", &Wanted::default(), &gateways, &first, &targets);
        assert_eq!(counts(&second, 10), [("b:1883".to_owned(), 5), ("c:1883".to_owned(), 5)].into());
        // In proportion to what they can hold.
        let large = reports([("b", report(100, 1000)), ("c", report(100, 3000))]);
        let third = Targets::new("a", &Wanted::default(), &gateways, &large, &Targets::default());
        assert_eq!(counts(&third, 200), [("c:1883".to_owned(), 200)].into());
    }
}
