//! Slots that go from one living hub to another, under devices and backends that publish all the while.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use carillon_tests::cluster::Cluster;
use carillon_tests::mqtt::{Answer, Connect, Device, Publish};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::sync::{Mutex, mpsc};

const PUBACK: u8 = 0x40;
/// Devices that publish, each to two topics of its own.
const PUBLISHERS: usize = 16;
/// Publishes of one device that are not acknowledged yet.
const WINDOW: u32 = 4;
const PACE: Duration = Duration::from_millis(10);
/// One of these tests at a time: they measure.
static ALONE: Mutex<()> = Mutex::const_new(());

/// What a device has published, and when its acknowledgements came.
struct Published {
    sent: u32,
    acks: Vec<Instant>,
}

/// Publishes 0, 1, 2 … in turn to `move/{name}/a` and `b`, until it is told to stop; then all are acknowledged.
async fn publisher(server: SocketAddr, name: usize, stop: Arc<AtomicBool>) -> Published {
    let mut device = Device::connect(server, &Connect::new(5, &format!("publisher-{name}"))).await;
    let mut published = Published { sent: 0, acks: Vec::new() };
    let id = |n: u32| (n % 60_000) as u16 + 1;
    loop {
        let acked = published.acks.len() as u32;
        let is_over = stop.load(Ordering::Relaxed);
        if is_over && acked == published.sent {
            return published;
        }
        while !is_over && published.sent < acked + WINDOW {
            let n = published.sent;
            let topic = format!("move/{name}/{}", if n.is_multiple_of(2) { "a" } else { "b" });
            device.publish(&Publish::new(1, id(n), &topic, &n.to_string())).await;
            published.sent += 1;
        }
        let code = device.acked(PUBACK, id(acked)).await;
        assert!(code < 0x80, "{name}: {acked} was refused with {code:02x}");
        published.acks.push(Instant::now());
        tokio::time::sleep(PACE).await;
    }
}

/// Gives topic, text, and when it came.
async fn subscriber(server: SocketAddr, to: mpsc::UnboundedSender<(String, u32, Instant)>) {
    let connect = Connect::kept(5, "subscriber").with(0x21, &1000_u16.to_be_bytes());
    let mut device = Device::connect(server, &connect).await;
    assert_eq!(device.subscribe("move/#", 1).await, 1);
    loop {
        match device.raw.answer_within(Duration::from_secs(300)).await {
            Answer::Packet(first, body) if first & 0xF0 == 0x30 => {
                let publish = Publish::parse(5, first, &body);
                device.ack(PUBACK, publish.id).await;
                let number = publish.payload.parse().expect("a number");
                if to.send((publish.topic, number, Instant::now())).is_err() {
                    return;
                }
            }
            other => panic!("{other:02x?}"),
        }
    }
}

/// The longest time between two of these, after `from`.
fn longest(times: impl Iterator<Item = Instant>, from: Instant, until: Instant) -> Duration {
    let mut times: Vec<Instant> = times.filter(|at| (from..until).contains(at)).collect();
    times.sort_unstable();
    times.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hubs_join_and_drain_under_devices_that_publish_and_nothing_is_lost_or_out_of_order() {
    let _alone = ALONE.lock().await;
    let mut cluster = Cluster::start(1, "").await;
    let server = cluster.gateways[0].mqtt;
    let (to, mut arrived) = mpsc::unbounded_channel();
    let subscriber = tokio::spawn(subscriber(server, to));
    let stop = Arc::new(AtomicBool::new(false));
    tokio::time::sleep(Duration::from_secs(1)).await;
    let publishers: Vec<_> =
        (0..PUBLISHERS).map(|name| tokio::spawn(publisher(server, name, stop.clone()))).collect();
    let mut steps = vec![("nothing moves", Instant::now())];
    tokio::time::sleep(Duration::from_secs(4)).await;
    for _ in 0..2 {
        for step in ["a hub joins", "another joins", "it drains", "the first drains"] {
            steps.push((step, Instant::now()));
            match step {
                "a hub joins" | "another joins" => cluster.add_registry().await,
                _ => cluster.stop_registry().await,
            }
            // Until all slots are where they are to be, and longer.
            tokio::time::sleep(Duration::from_secs(3)).await;
        }
    }
    steps.push(("the end", Instant::now()));
    stop.store(true, Ordering::Relaxed);
    let mut published = Vec::new();
    for publisher in publishers {
        published.push(publisher.await.expect("no panic"));
    }
    let total: u32 = published.iter().map(|one| one.sent).sum();
    let mut got: BTreeMap<String, Vec<(u32, Instant)>> = BTreeMap::new();
    let (mut came, mut again) = (0, 0);
    while came < total {
        let next = tokio::time::timeout(carillon_tests::PATIENCE, arrived.recv()).await;
        let Ok(Some((topic, number, at))) = next else { panic!("only {came} of {total} came") };
        let before = got.entry(topic.clone()).or_default();
        match before.last() {
            // At least once: what was there before may come again, and nothing is passed over.
            Some((last, _)) if number <= *last => again += 1,
            Some((last, _)) => assert_eq!(number, last + 2, "{topic}: out of order"),
            None => assert!(number < 2, "{topic}: it begins with {number}"),
        }
        if before.last().is_none_or(|(last, _)| number > *last) {
            before.push((number, at));
            came += 1;
        }
    }
    subscriber.abort();
    for pair in steps.windows(2) {
        let ((step, from), (_, until)) = (pair[0], pair[1]);
        let acks = published.iter().map(|one| longest(one.acks.iter().copied(), from, until));
        let mut acks: Vec<Duration> = acks.collect();
        acks.sort_unstable();
        let deliveries =
            got.values().map(|topic| longest(topic.iter().map(|(_, at)| *at), from, until)).max();
        eprintln!(
            "{step}: longest without an acknowledgement, of a device: {:?}, of the median device {:?}; longest without a delivery, of a topic: {:?}",
            acks[PUBLISHERS - 1],
            acks[PUBLISHERS / 2],
            deliveries.unwrap_or_default(),
        );
        assert!(acks[PUBLISHERS - 1] < Duration::from_secs(5), "{step}");
    }
    let errors: f64 = cluster.hub_metrics("carillon_registry_saver_errors_total").await.iter().sum();
    eprintln!("{total} published, {again} came again; {errors} refused by the saver");
    let logs = cluster.keeper_logs();
    let handed_over = logs.matches("slots handed over").count();
    assert!(handed_over >= 8, "the old owners have handed over themselves: {handed_over} times");
    assert!(!logs.contains("did not give up slots in time"), "and in time");
}

/// Pushes batches of lines to some topics, one batch after the other, until it is told to stop. Nothing of a batch waits for the
/// answer to another line. Gives what each topic's lines were numbered as, in their order.
async fn backend(
    name: usize,
    request: impl Fn() -> reqwest::RequestBuilder,
    stop: Arc<AtomicBool>,
) -> BTreeMap<String, Vec<(u64, u64)>> {
    const TOPICS: usize = 8;
    const LINES: usize = 200;
    let mut numbers: BTreeMap<String, Vec<(u64, u64)>> = BTreeMap::new();
    for batch in 0.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let line = |n: usize| {
            let topic = format!("pushed/{name}/{}", n % TOPICS);
            let line =
                json!({ "topic": topic, "payload": n.to_string(), "id": format!("{name}-{batch}-{n}") });
            format!("{line}\n")
        };
        let body: String = (0..LINES).map(line).collect();
        let answer = request().body(body).send().await.expect("an answer").text().await.expect("a body");
        assert_eq!(answer.lines().count(), LINES);
        for line in answer.lines() {
            let answer: Value = serde_json::from_str(line).expect("JSON");
            let number = |field: &str| answer[field].as_u64().unwrap_or_else(|| panic!("{answer}"));
            let topic = answer["topic"].as_str().expect("a topic").to_owned();
            // One that was tried again may have been accepted before: its number is the first one's.
            numbers.entry(topic).or_default().push((number("epoch"), number("seq")));
        }
    }
    numbers
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_backends_pipeline_is_numbered_in_its_order_while_hubs_join_and_drain() {
    let _alone = ALONE.lock().await;
    let mut cluster = Cluster::start(1, "").await;
    let stop = Arc::new(AtomicBool::new(false));
    let backends: Vec<_> = (0..4)
        .map(|name| {
            let request = cluster.request(Method::POST, "messages:batch");
            let request = move || request.try_clone().expect("it has no body yet");
            tokio::spawn(backend(name, request, stop.clone()))
        })
        .collect();
    for _ in 0..2 {
        cluster.add_registry().await;
        tokio::time::sleep(Duration::from_secs(2)).await;
        cluster.stop_registry().await;
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    stop.store(true, Ordering::Relaxed);
    let (mut total, mut moved) = (0, 0);
    for backend in backends {
        for (topic, numbers) in backend.await.expect("no panic") {
            total += numbers.len();
            moved += numbers.windows(2).filter(|pair| pair[0].0 != pair[1].0).count();
            for pair in numbers.windows(2) {
                assert!(pair[0] < pair[1], "{topic}: {:?} was pushed before {:?}", pair[0], pair[1]);
            }
        }
    }
    eprintln!("{total} pushed; topics got another owner {moved} times");
    assert!(moved >= 16, "half of 32 topics, there and back: {moved}");
}
