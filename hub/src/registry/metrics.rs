//! The registry's metrics: names and help in one table.

use prometheus::{Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry};

pub const PUBLISHED: (&str, &str) =
    ("carillon_registry_published_total", "Publishes answered, by code (accepted, duplicate, not_owner, …)");
pub const DELIVERED: (&str, &str) =
    ("carillon_registry_delivered_total", "Messages put on the streams to gateways, one for each gateway");
pub const OVERFLOWS: (&str, &str) =
    ("carillon_registry_attach_overflows_total", "Streams to gateways closed because their queue was full");
pub const SAVER_ERRORS: (&str, &str) =
    ("carillon_registry_saver_errors_total", "Questions to the saver that failed");
pub const GAVE_UP: (&str, &str) =
    ("carillon_registry_slots_given_up_total", "Slots found to be owned elsewhere by the saver's fence");
pub const KICKS: (&str, &str) =
    ("carillon_registry_kicks_total", "Sessions that gateways were told to disconnect");
pub const PRESENCE: (&str, &str) = (
    "carillon_registry_presence_events_total",
    "Presence events for webhooks, by outcome (published, dropped)",
);
pub const WILLS: (&str, &str) = (
    "carillon_registry_wills_total",
    "Wills of devices whose gateway was lost, by outcome (published, dropped)",
);
pub const SLOTS: (&str, &str) = ("carillon_registry_slots", "Slots owned by this instance");
pub const SLOTS_NOT_WHOLE: (&str, &str) =
    ("carillon_registry_slots_not_whole", "Slots whose messages go to all gateways");
pub const TOPICS: (&str, &str) = ("carillon_registry_topics", "Topics whose state is kept");
pub const SESSIONS: (&str, &str) = ("carillon_registry_sessions", "Sessions announced by gateways");
pub const ATTACHED: (&str, &str) =
    ("carillon_registry_attached_streams", "Gateways and other receivers attached");
pub const UNANSWERED: (&str, &str) =
    ("carillon_registry_unanswered_messages", "Publishes that wait for their answer");
pub const BROADCASTS: (&str, &str) =
    ("carillon_registry_broadcasts_active", "Broadcast jobs that run or pause");

pub const TAKE_OVER: (&str, &str) = (
    "carillon_registry_take_over_seconds",
    "From hearing that slots are its own until the saver has fenced them: publishers wait for that",
);

#[derive(Clone)]
pub struct Metrics {
    pub published: IntCounterVec,
    pub delivered: IntCounter,
    pub overflows: IntCounter,
    pub saver_errors: IntCounter,
    pub gave_up: IntCounter,
    pub kicks: IntCounter,
    pub presence: IntCounterVec,
    pub wills: IntCounterVec,
    pub slots: IntGauge,
    pub slots_not_whole: IntGauge,
    pub topics: IntGauge,
    pub sessions: IntGauge,
    pub attached: IntGauge,
    pub unanswered: IntGauge,
    pub broadcasts: IntGauge,
    pub take_over: Histogram,
}

impl Metrics {
    /// Errors when one of the names is registered already.
    pub fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let counter = |(name, help): (&str, &str)| {
            let counter = IntCounter::new(name, help)?;
            registry.register(Box::new(counter.clone()))?;
            Ok::<_, prometheus::Error>(counter)
        };
        let gauge = |(name, help): (&str, &str)| {
            let gauge = IntGauge::new(name, help)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok::<_, prometheus::Error>(gauge)
        };
        let counters = |(name, help): (&str, &str), label: &str| {
            let counters = IntCounterVec::new(Opts::new(name, help), &[label])?;
            registry.register(Box::new(counters.clone()))?;
            Ok::<_, prometheus::Error>(counters)
        };
        let take_over = HistogramOpts::new(TAKE_OVER.0, TAKE_OVER.1)
            .buckets(vec![0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0]);
        let take_over = Histogram::with_opts(take_over)?;
        registry.register(Box::new(take_over.clone()))?;
        Ok(Metrics {
            published: counters(PUBLISHED, "code")?,
            delivered: counter(DELIVERED)?,
            overflows: counter(OVERFLOWS)?,
            saver_errors: counter(SAVER_ERRORS)?,
            gave_up: counter(GAVE_UP)?,
            kicks: counter(KICKS)?,
            presence: counters(PRESENCE, "outcome")?,
            wills: counters(WILLS, "outcome")?,
            slots: gauge(SLOTS)?,
            slots_not_whole: gauge(SLOTS_NOT_WHOLE)?,
            topics: gauge(TOPICS)?,
            sessions: gauge(SESSIONS)?,
            attached: gauge(ATTACHED)?,
            unanswered: gauge(UNANSWERED)?,
            broadcasts: gauge(BROADCASTS)?,
            take_over,
        })
    }
}
