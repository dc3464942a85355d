//! Devices are sent to other gateways: at a rate, each once, and nothing is lost; an abort stops it.
//!
//! `CARILLON_DRAIN_DEVICES` and `CARILLON_DRAIN_RATE` make the drain as large and as fast as wanted (2,000 at 500 a second
//! unless said). The figures are printed.

use std::collections::{BTreeMap, HashSet};
use std::io::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use carillon_tests::cluster::Cluster;
use carillon_tests::device::{Device, Journey, Options, Packet, roam};
use carillon_tests::eventually;
use parking_lot::Mutex;
use serde_json::json;
use tokio::task::JoinHandle;

fn number(name: &str, default: usize) -> usize {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn say(line: &str) {
    // Past the test runner's capture: these figures are the point.
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Devices that keep their sessions and go where they are sent; dropped, they are gone.
struct Fleet {
    journeys: Vec<Arc<Mutex<Journey>>>,
    names: Vec<String>,
    versions: Vec<u8>,
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for Fleet {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl Fleet {
    /// Connects them to a gateway, some at a time; returns when all have subscribed to their inboxes.
    async fn connect(
        cluster: &Cluster,
        gateway: usize,
        versions: &[u8],
        count: usize,
        prefix: &str,
    ) -> Fleet {
        let mut fleet = Fleet { journeys: vec![], names: vec![], versions: vec![], tasks: vec![] };
        let server = cluster.gateways[gateway].mqtt;
        for i in 0..count {
            let version = versions[i % versions.len()];
            let name = format!("{prefix}-{i}");
            let journey = Arc::new(Mutex::new(Journey::default()));
            let options = Options::kept(version, &name);
            fleet.tasks.push(tokio::spawn(roam(server, options, cluster.dispatcher(), journey.clone())));
            fleet.journeys.push(journey);
            fleet.names.push(name);
            fleet.versions.push(version);
            if i % 200 == 199 {
                fleet.all_there(i + 1 - 100).await;
            }
        }
        fleet.all_there(count).await;
        fleet
    }

    async fn all_there(&self, count: usize) {
        eventually("the devices are connected", || async {
            let there = self.journeys.iter().filter(|journey| journey.lock().server.is_some()).count();
            if there >= count { Ok(()) } else { Err((there, self.lost())) }
        })
        .await;
    }

    fn lost(&self) -> Vec<String> {
        self.journeys.iter().flat_map(|journey| journey.lock().lost.clone()).take(5).collect()
    }

    fn moves(&self) -> Vec<Instant> {
        let mut moves: Vec<Instant> = self
            .journeys
            .iter()
            .flat_map(|j| j.lock().moves.iter().map(|m| m.0).collect::<Vec<_>>())
            .collect();
        moves.sort_unstable();
        moves
    }

    fn by_server(&self) -> BTreeMap<SocketAddr, usize> {
        let mut by_server = BTreeMap::new();
        for journey in &self.journeys {
            if let Some(server) = journey.lock().server {
                *by_server.entry(server).or_default() += 1;
            }
        }
        by_server
    }
}

/// Pushes to all of them in turn until told to stop; gives what was accepted for each.
fn pushing(
    cluster: &Cluster,
    names: &[String],
    per_second: usize,
    stop: Arc<AtomicBool>,
    accepted: Arc<AtomicUsize>,
) -> JoinHandle<Vec<HashSet<String>>> {
    const BATCH: usize = 20;
    let request = cluster.request(reqwest::Method::POST, "messages:batch");
    let names = names.to_vec();
    tokio::spawn(async move {
        let mut sent: Vec<HashSet<String>> = vec![HashSet::new(); names.len()];
        let mut tick = tokio::time::interval(Duration::from_secs_f64(BATCH as f64 / per_second as f64));
        let mut next = 0;
        while !stop.load(Ordering::Relaxed) {
            tick.tick().await;
            let mut lines = String::new();
            let batch: Vec<(usize, String)> =
                (0..BATCH).map(|i| ((next + i) % names.len(), format!("message-{}", next + i))).collect();
            next += BATCH;
            for (user, text) in &batch {
                let line = json!({ "user": names[*user], "payload": text, "id": text });
                lines.push_str(&format!("{line}\n"));
            }
            let request = request.try_clone().expect("no body yet").body(lines);
            let response = request.header("content-type", "application/x-ndjson").send().await;
            let text = response.expect("an answer").text().await.expect("a body");
            let good = text.lines().filter(|line| line.contains("\"seq\"")).count();
            assert_eq!(good, BATCH, "all are accepted: {text}");
            accepted.fetch_add(BATCH, Ordering::Relaxed);
            for (user, text) in batch {
                sent[user].insert(text);
            }
        }
        sent
    })
}

async fn all_received(fleet: &Fleet, sent: &[HashSet<String>]) {
    let began = Instant::now();
    loop {
        let missing: usize = fleet
            .journeys
            .iter()
            .zip(sent)
            .map(|(journey, sent)| sent.difference(&journey.lock().received).count())
            .sum();
        if missing == 0 {
            return;
        }
        assert!(began.elapsed() < Duration::from_secs(60), "{missing} messages are missing");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_moves_every_device_once_at_its_rate_and_loses_nothing() {
    let devices = number("CARILLON_DRAIN_DEVICES", 2000);
    let rate = number("CARILLON_DRAIN_RATE", 500);
    let cluster = Cluster::start(3, "").await;
    let first = &cluster.gateways[0];
    let began = Instant::now();
    let fleet = Fleet::connect(&cluster, 0, &[5, 4], devices, "device").await;
    let connected = began.elapsed();
    assert_eq!(fleet.by_server(), [(first.mqtt, devices)].into());

    let (stop, accepted) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let pushing = pushing(&cluster, &fleet.names, 400, stop.clone(), accepted.clone());
    tokio::time::sleep(Duration::from_secs(1)).await;
    let rate_text = rate.to_string();
    let arguments = ["drain", &first.id, "--rate", &rate_text, "--deadline", "10m"];
    let draining = cluster.cli(&arguments);
    let refusals = async {
        eventually("it drains", || async {
            if fleet.moves().len() > devices / 20 { Ok(()) } else { Err("not yet") }
        })
        .await;
        assert!(!cluster.is_ready(0).await, "a gateway that drains is not ready");
        let others = [cluster.gateways[1].mqtt, cluster.gateways[2].mqtt];
        let refused = Device::connect(first.mqtt, &Options::kept(5, "late")).await.expect("an answer").err();
        let refused = refused.expect("nobody new is taken");
        assert_eq!(refused.code, 0x9C);
        let reference: SocketAddr =
            refused.reference.expect("a Server Reference").parse().expect("host:port");
        assert!(others.contains(&reference), "{reference} of {others:?}");
        let refused = Device::connect(first.mqtt, &Options::kept(4, "late")).await.expect("an answer").err();
        assert_eq!(refused.expect("nor by 3.1.1").code, 3);
        let sent_to = cluster.dispatch("late").await.expect("a gateway");
        assert!(others.contains(&sent_to), "{sent_to} of {others:?}");
        let status = cluster.status(0).await;
        assert_eq!((&status["state"], &status["moving"]["total"]), (&json!("draining"), &json!(devices)));
        let second = cluster.cli_output(&["drain", &first.id]).await;
        let said = String::from_utf8_lossy(&second.stderr).into_owned();
        assert!(!second.status.success() && said.contains("a drain is under way"), "{said}");
    };
    let (said, ()) = tokio::join!(draining, refusals);
    assert!(said.contains(&format!("{devices} of {devices} devices moved, 0 left")), "{said}");
    tokio::time::sleep(Duration::from_secs(1)).await;
    stop.store(true, Ordering::Relaxed);
    let sent = pushing.await.expect("the pusher");
    all_received(&fleet, &sent).await;

    let moves = fleet.moves();
    assert_eq!(moves.len(), devices, "every device moved, and once");
    for (journey, version) in fleet.journeys.iter().zip(&fleet.versions) {
        let journey = journey.lock();
        assert_eq!((journey.moves.len(), &journey.lost), (1, &Vec::new()));
        assert_eq!(journey.referred, usize::from(*version == 5), "{version}");
        assert_eq!(journey.refused, 0);
        assert_ne!(journey.server, Some(first.mqtt));
    }
    let seconds = (moves[moves.len() - 1] - moves[0]).as_secs_f64();
    let measured = (moves.len() - 1) as f64 / seconds;
    let busiest = busiest_second(&moves);
    let again: usize = fleet.journeys.iter().map(|journey| journey.lock().again).sum();
    say(&format!(
        "drain: {devices} devices connected in {:.1} s, moved in {seconds:.2} s: {measured:.1} a second of {rate} \
         asked for ({:+.2} %), at most {busiest} in any second; {} messages pushed meanwhile, all delivered, {again} \
         of them again; by gateway {:?}",
        connected.as_secs_f64(),
        (measured / rate as f64 - 1.0) * 100.0,
        accepted.load(Ordering::Relaxed),
        fleet.by_server(),
    ));
    assert!((measured / rate as f64 - 1.0).abs() <= 0.05, "{measured} a second, {rate} were asked for");
    assert!(busiest as f64 <= rate as f64 * 1.6, "{busiest} in one second");
    // Spread over both, as the Server References said and as the dispatcher does.
    for (server, count) in fleet.by_server() {
        assert!((0.4..=0.6).contains(&(count as f64 / devices as f64)), "{server}: {count}");
    }
    assert_eq!(cluster.status(0).await["state"], "drained");
    assert_eq!(cluster.metric(0, "carillon_gateway_moved_total").await, devices as f64);
    // And back: it takes devices again.
    cluster.cli(&["drain", &first.id, "--abort"]).await;
    assert!(cluster.is_ready(0).await);
    Device::connected(first.mqtt, &Options::kept(5, "late")).await;
}

/// The most moves in any time of a second.
fn busiest_second(moves: &[Instant]) -> usize {
    let mut first = 0;
    let mut most = 0;
    for (i, at) in moves.iter().enumerate() {
        while *at - moves[first] >= Duration::from_secs(1) {
            first += 1;
        }
        most = most.max(i + 1 - first);
    }
    most
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_abort_stops_a_drain_and_the_gateway_takes_devices_again() {
    let cluster = Cluster::start(2, "").await;
    let fleet = Fleet::connect(&cluster, 0, &[5], 300, "device").await;
    let first = &cluster.gateways[0];
    cluster.cli(&["drain", &first.id, "--rate", "60", "--detach"]).await;
    eventually("some are moved", || async { if fleet.moves().len() > 30 { Ok(()) } else { Err(()) } }).await;
    let said = cluster.cli(&["drain", &first.id, "--abort"]).await;
    let status = cluster.status(0).await;
    let moved = status["moving"]["moved"].as_u64().expect("a number");
    assert!(moved < 290, "there was something to abort: {moved}");
    assert!(said.contains(&format!("{moved} devices were moved")), "{said}, {moved}");
    assert_eq!((&status["state"], &status["moving"]["aborted"]), (&json!("active"), &json!(true)));
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(fleet.moves().len() as u64, moved, "nobody is moved after the abort");
    assert_eq!(cluster.status(0).await["moving"]["moved"], moved);
    assert!(cluster.is_ready(0).await);
    Device::connected(first.mqtt, &Options::kept(5, "late")).await;
    let idle = cluster.cli_output(&["drain", &first.id, "--abort"]).await;
    assert!(String::from_utf8_lossy(&idle.stderr).contains("nothing to abort"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn at_the_deadline_everyone_goes_and_what_cannot_be_done_is_said() {
    let cluster = Cluster::start(2, "").await;
    let fleet = Fleet::connect(&cluster, 0, &[5, 4], 200, "device").await;
    let first = &cluster.gateways[0];
    let refused = |arguments: &'static [&'static str]| {
        let mut all = vec!["command", first.id.as_str()];
        all.extend(arguments);
        let cluster = &cluster;
        async move {
            let output = cluster.cli_output(&all).await;
            assert_eq!(output.status.code(), Some(1), "{all:?}");
            String::from_utf8_lossy(&output.stderr).into_owned()
        }
    };
    for (arguments, text) in [
        (&["drain", "rate_per_second=0"][..], "rate_per_second is 0, must be from 0.1"),
        (&["drain", "deadline_seconds=0"], "deadline_seconds is 0, must be from 1"),
        (&["drain", "rate=5"], "there is no argument \"rate\""),
        (&["drain", "target=nobody"], "no other gateway takes devices"),
        (&["rebalance"], "one of the arguments"),
        (&["rebalance", "count=many"], "the argument \"count\" is \"many\""),
    ] {
        let said = refused(arguments).await;
        assert!(said.contains(text), "{arguments:?}: {said}");
    }
    assert!(cluster.is_ready(0).await, "none of these has changed anything");
    let began = Instant::now();
    let said = cluster.cli(&["drain", &first.id, "--rate", "1", "--deadline", "3s"]).await;
    assert!(said.contains("200 of 200 devices moved"), "{said}");
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
    fleet.all_there(200).await;
    eventually("all are at the other gateway", || async {
        let by_server = fleet.by_server();
        if by_server == [(cluster.gateways[1].mqtt, 200)].into() { Ok(()) } else { Err(by_server) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_has_something_under_way_gets_time_to_end_it() {
    /// Acks what it was sent after a while, or never; when it was told to go, from when the first was.
    async fn end(mut device: Device, ack: Option<(Duration, u16)>) -> Instant {
        if let Some((after, packet_id)) = ack {
            tokio::time::sleep(after).await;
            device.ack(packet_id).await.expect("a connection");
        }
        let end = device.next().await.expect("an end");
        assert!(matches!(end, Packet::End(Some((0x9C, Some(_))))), "{end:?}");
        Instant::now()
    }
    let cluster = Cluster::start(2, "").await;
    let [first, second] = [0, 1].map(|i| cluster.gateways[i].mqtt);
    let mut devices = Vec::new();
    for name in ["idle", "late", "never"] {
        let mut device = Device::connected(first, &Options::kept(5, name)).await;
        device.subscribe(&format!("demo/u/{name}"), 1).await.expect("a SUBACK");
        if name != "idle" {
            cluster.push(name, "hello").await;
            let message = device.message(Duration::from_secs(5)).await.expect("a message");
            devices.push((device, message.id));
        } else {
            devices.push((device, 0));
        }
    }
    let arguments = ["drain", &cluster.gateways[0].id, "--rate", "100"];
    let mut devices = devices.into_iter();
    let mut next = || devices.next().expect("three");
    let ((idle, _), (late, packet_id), (never, _)) = (next(), next(), next());
    let (_, idle, late, never) = tokio::join!(
        cluster.cli(&arguments),
        end(idle, None),
        end(late, Some((Duration::from_millis(1200), packet_id))),
        end(never, None),
    );
    assert!(late > idle && late < never, "{:?} {:?}", late - idle, never - idle);
    let patience = never - idle;
    assert!(patience > Duration::from_millis(1700), "{patience:?}");
    // What was acked is not sent again, what was not is.
    let mut late = Device::connected(second, &Options::kept(5, "late")).await;
    let mut never = Device::connected(second, &Options::kept(5, "never")).await;
    assert!(late.session_present && never.session_present);
    let again = never.message(Duration::from_secs(5)).await.expect("once more");
    assert_eq!((again.payload.as_str(), again.dup), ("hello", true));
    assert_eq!(late.message(Duration::from_millis(300)).await, None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rebalance_moves_as_many_as_asked_and_nobody_in_circles() {
    let cluster = Cluster::start(2, "").await;
    let fleet = Fleet::connect(&cluster, 0, &[5], 150, "device").await;
    let old = Fleet::connect(&cluster, 0, &[4], 20, "old").await;
    let (first, second) = (&cluster.gateways[0], &cluster.gateways[1]);
    // All have connected just now.
    let said = cluster.cli(&["rebalance", &first.id, "--count", "60"]).await;
    assert!(said.contains("0 of 0 devices moved"), "{said}");
    let said =
        cluster.cli(&["rebalance", &first.id, "--down-to", "110", "--rate", "100", "--cooldown", "0s"]).await;
    assert!(said.contains("active; rebalance finished: 60 of 60 devices moved"), "{said}");
    eventually("they have arrived", || async {
        let by_server = fleet.by_server();
        if by_server == [(first.mqtt, 90), (second.mqtt, 60)].into() { Ok(()) } else { Err(by_server) }
    })
    .await;
    assert_eq!(fleet.moves().len(), 60);
    assert!(old.moves().is_empty(), "3.1.1 cannot be told where to go");
    // The other one is emptier now, and does not send them back; nor does it take more than it can get.
    let back = cluster.cli_output(&["rebalance", &second.id, "--count", "10", "--cooldown", "0s"]).await;
    assert!(String::from_utf8_lossy(&back.stderr).contains("none is emptier"), "{back:?}");
    let said = cluster.cli(&["rebalance", &first.id, "--count", "1000"]).await;
    assert!(said.contains("0 of 0"), "within the cool-down: {said}");
    assert!(cluster.is_ready(0).await && cluster.is_ready(1).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_that_is_told_to_stop_sends_its_devices_away_first() {
    let mut cluster = Cluster::start(2, "").await;
    let fleet = Fleet::connect(&cluster, 0, &[5, 4], 200, "device").await;
    cluster.cli(&["config", "set", "gateway", "drain.rate_per_second=100"]).await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let began = Instant::now();
    cluster.gateways[0].signal(libc::SIGTERM);
    let status = cluster.gateways[0].gone().await;
    assert!(status.success(), "{status}: {}", cluster.gateways[0].logs());
    assert!(began.elapsed() > Duration::from_millis(1500), "at its rate: {:?}", began.elapsed());
    eventually("all are at the other gateway", || async {
        let by_server = fleet.by_server();
        if by_server == [(cluster.gateways[1].mqtt, 200)].into() { Ok(()) } else { Err(by_server) }
    })
    .await;
    for journey in &fleet.journeys {
        let journey = journey.lock();
        assert_eq!((journey.moves.len(), &journey.lost), (1, &Vec::new()));
    }
    // The last one has nowhere to send them: it ends at once.
    let mut device = Device::connected(cluster.gateways[1].mqtt, &Options::kept(5, "last")).await;
    cluster.gateways[1].signal(libc::SIGTERM);
    loop {
        if let Packet::End(why) = device.next().await.expect("an end") {
            break assert_eq!(why, Some((0x8B, None)), "server shutting down");
        }
    }
    assert!(cluster.gateways[1].gone().await.success());
}
