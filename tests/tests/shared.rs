//! Shared subscriptions (MQTT 5.0 §4.8.2) over two gateway processes, with clients that nobody here wrote, and with raw
//! bytes where a client would be too well behaved.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use carillon_tests::cluster::Cluster;
use carillon_tests::mqtt::{self, Answer, Connect, Device, Raw};
use carillon_tests::tools::{Running, find, mosquitto};
use carillon_tests::{Server, eventually};
use tokio::sync::mpsc;

/// Long enough for what should not come to have come.
const MOMENT: Duration = Duration::from_millis(700);

/// A `mosquitto_sub` whose subscription is in force; what it receives goes into the channel with its name.
struct Subscriber {
    pid: libc::pid_t,
    task: tokio::task::JoinHandle<()>,
}

type Received = (String, String);

impl Subscriber {
    async fn start(
        name: &str,
        gateway: SocketAddr,
        version: &str,
        arguments: &[&str],
        to: &mpsc::UnboundedSender<Received>,
    ) -> Subscriber {
        let arguments = [&["-d", "-F", "got %p", "-i", name], arguments].concat();
        let command = mosquitto("mosquitto_sub", gateway, version, &arguments).expect("found before");
        let mut running = Running::start(command);
        let pid = running.pid() as libc::pid_t;
        let (name, to) = (name.to_owned(), to.clone());
        // A session that was kept gets its messages before its SUBSCRIBE is answered.
        loop {
            let line = running.line().await;
            if line.contains("Subscribed (mid") {
                break;
            }
            if let Some(text) = line.strip_prefix("got ") {
                let _ = to.send((name.clone(), text.to_owned()));
            }
        }
        let task = tokio::spawn(async move {
            while let Some(line) = running.next().await {
                if let Some(text) = line.strip_prefix("got ") {
                    let _ = to.send((name.clone(), text.to_owned()));
                }
            }
        });
        Subscriber { pid, task }
    }

    fn signal(&self, signal: libc::c_int) {
        // SAFETY: kill has no memory effects; the child is reaped by its task alone, which lives.
        assert_eq!(unsafe { libc::kill(self.pid, signal) }, 0);
    }

    /// SIGKILL: its connection ends, its session may go on.
    fn kill(&self) {
        self.signal(libc::SIGKILL);
    }
}

impl Drop for Subscriber {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Publishes texts to a topic, one after the other, stored (QoS 1 through the API).
async fn publish(cluster: &Cluster, topic: &str, texts: impl IntoIterator<Item = String>) {
    for text in texts {
        cluster.publish(topic, &text).await;
    }
}

fn numbered(range: std::ops::Range<usize>) -> impl Iterator<Item = String> {
    range.map(|number| number.to_string())
}

/// What has been received, until all of `expected` has and then for a moment more: by text, the names of who got it.
async fn collect(
    received: &mut mpsc::UnboundedReceiver<Received>,
    expected: impl IntoIterator<Item = String>,
) -> BTreeMap<String, Vec<String>> {
    let mut missing: std::collections::BTreeSet<String> = expected.into_iter().collect();
    let mut all: BTreeMap<String, Vec<String>> = BTreeMap::new();
    loop {
        let patience = if missing.is_empty() { MOMENT } else { carillon_tests::PATIENCE };
        match tokio::time::timeout(patience, received.recv()).await {
            Ok(Some((name, text))) => {
                missing.remove(&text);
                all.entry(text).or_default().push(name);
            }
            Ok(None) => panic!("the subscribers have ended"),
            Err(_) if missing.is_empty() => return all,
            Err(_) => panic!("{} were not received: {missing:?}; got {all:?}", missing.len()),
        }
    }
}

fn each_once(all: &BTreeMap<String, Vec<String>>, count: usize) {
    assert_eq!(all.len(), count, "{all:?}");
    let twice: Vec<_> = all.iter().filter(|(_, names)| names.len() != 1).collect();
    assert!(twice.is_empty(), "received more than once: {twice:?}");
}

fn by_name(all: &BTreeMap<String, Vec<String>>) -> BTreeMap<&str, usize> {
    let mut counts = BTreeMap::new();
    for name in all.values().flatten() {
        *counts.entry(name.as_str()).or_default() += 1;
    }
    counts
}

#[tokio::test]
async fn each_message_goes_to_one_member_over_all_gateways_and_versions() {
    if find("mosquitto_sub").is_none() {
        return;
    }
    let cluster = Cluster::start(2, "").await;
    let (a, b) = (cluster.gateways[0].mqtt, cluster.gateways[1].mqtt);
    let (to, mut members) = mpsc::unbounded_channel();
    let (to_other, mut other) = mpsc::unbounded_channel();
    let (to_plain, mut plain) = mpsc::unbounded_channel();
    let wild = ["-t", "$share/g/work/#", "-q", "1"];
    // The same share, named with and without the root app.
    let named = ["-t", "$share/g/demo/work/#", "-q", "1"];
    let _members = [
        Subscriber::start("a5", a, "5", &wild, &to).await,
        Subscriber::start("a3", a, "311", &named, &to).await,
        Subscriber::start("b5", b, "5", &named, &to).await,
        Subscriber::start("b3", b, "311", &wild, &to).await,
    ];
    // Without wildcards, with QoS 0, and with another name: shares of their own.
    let _other = [
        Subscriber::start("o5", a, "5", &["-t", "$share/other/work/1", "-q", "0"], &to_other).await,
        Subscriber::start("o3", b, "311", &["-t", "$share/other/work/1", "-q", "0"], &to_other).await,
    ];
    let _plain = Subscriber::start("p", b, "5", &["-t", "work/#", "-q", "1"], &to_plain).await;

    const COUNT: usize = 200;
    publish(&cluster, "work/1", numbered(0..COUNT)).await;
    let all = collect(&mut members, numbered(0..COUNT)).await;
    each_once(&all, COUNT);
    let counts = by_name(&all);
    eprintln!("members: {counts:?}");
    assert!(counts.len() == 4 && counts.values().all(|&count| count == COUNT / 4), "not in turn: {counts:?}");
    let all = collect(&mut other, numbered(0..COUNT)).await;
    each_once(&all, COUNT);
    eprintln!("another share: {:?}", by_name(&all));
    assert_eq!(by_name(&all).len(), 2);
    each_once(&collect(&mut plain, numbered(0..COUNT)).await, COUNT);

    // From devices, QoS 0 and 1, on another topic of the filter.
    for qos in ["0", "1"] {
        for text in numbered(1000..1020) {
            let text = format!("{qos}-{text}");
            let arguments = ["-t", "work/x/y", "-q", qos, "-m", &text];
            let command = mosquitto("mosquitto_pub", b, "5", &arguments).expect("found before");
            carillon_tests::tools::succeed(command).await;
        }
    }
    let expected =
        ["0", "1"].iter().flat_map(|qos| numbered(1000..1020).map(move |text| format!("{qos}-{text}")));
    each_once(&collect(&mut members, expected).await, 40);
}

#[tokio::test]
async fn what_a_killed_member_had_not_acknowledged_goes_to_another() {
    if find("mosquitto_sub").is_none() {
        return;
    }
    let cluster = Cluster::start(2, "").await;
    let (to, mut received) = mpsc::unbounded_channel();
    let arguments = ["-t", "$share/g/jobs", "-q", "1"];
    let victim = Subscriber::start("victim", cluster.gateways[1].mqtt, "5", &arguments, &to).await;
    let _heir = Subscriber::start("heir", cluster.gateways[0].mqtt, "311", &arguments, &to).await;
    publish(&cluster, "jobs", numbered(0..10)).await;
    let all = collect(&mut received, numbered(0..10)).await;
    assert_eq!(by_name(&all), BTreeMap::from([("heir", 5), ("victim", 5)]));

    // It is sent its part, and acknowledges nothing any more.
    victim.signal(libc::SIGSTOP);
    publish(&cluster, "jobs", numbered(10..30)).await;
    let mut early = 0;
    while let Ok(Some((name, _))) = tokio::time::timeout(MOMENT, received.recv()).await {
        assert_eq!(name, "heir");
        early += 1;
    }
    assert_eq!(early, 10, "the other half is with the victim");
    victim.kill();
    let mut late = Vec::new();
    while late.len() < 10 {
        let (name, text) = carillon_tests::within("the rest", received.recv()).await.expect("a message");
        assert_eq!(name, "heir");
        late.push(text);
    }
    eprintln!("given to another: {late:?}");
    assert!(tokio::time::timeout(MOMENT, received.recv()).await.is_err(), "nothing comes twice");
}

#[tokio::test]
async fn a_gateway_that_is_killed_takes_no_message_with_it() {
    if find("mosquitto_sub").is_none() {
        return;
    }
    let mut cluster = Cluster::start(3, "").await;
    let (to, mut received) = mpsc::unbounded_channel();
    let arguments = ["-t", "$share/g/jobs/+", "-q", "1"];
    let victims = [
        Subscriber::start("v5", cluster.gateways[1].mqtt, "5", &arguments, &to).await,
        Subscriber::start("v3", cluster.gateways[1].mqtt, "311", &arguments, &to).await,
    ];
    let _rest = [
        Subscriber::start("r5", cluster.gateways[0].mqtt, "5", &arguments, &to).await,
        Subscriber::start("r3", cluster.gateways[2].mqtt, "311", &arguments, &to).await,
    ];
    // The victims take nothing in: what is on its way to them dies with their gateway.
    victims.iter().for_each(|victim| victim.signal(libc::SIGSTOP));
    publish(&cluster, "jobs/1", numbered(0..40)).await;
    cluster.gateways[1].kill().await;
    victims.iter().for_each(Subscriber::kill);
    publish(&cluster, "jobs/1", numbered(40..80)).await;
    let all = collect(&mut received, numbered(0..80)).await;
    each_once(&all, 80);
    eprintln!("{:?}", by_name(&all));
    assert!(all.values().flatten().all(|name| name.starts_with('r')), "{all:?}");
}

#[tokio::test]
async fn while_all_members_are_away_messages_wait_for_the_first_that_returns() {
    if find("mosquitto_sub").is_none() {
        return;
    }
    let cluster = Cluster::start(2, "").await;
    for (version, keep, filter) in
        [("5", &["-c", "-x", "3600"][..], "$share/g/kept5/#"), ("311", &["-c"], "$share/g/kept3/x")]
    {
        let topic = if version == "5" { "kept5/x" } else { "kept3/x" };
        let arguments = [&["-t", filter, "-q", "1"], keep].concat();
        let (to, mut received) = mpsc::unbounded_channel();
        let (one, two) = (format!("one{version}"), format!("two{version}"));
        let first = Subscriber::start(&one, cluster.gateways[0].mqtt, version, &arguments, &to).await;
        let second = Subscriber::start(&two, cluster.gateways[1].mqtt, version, &arguments, &to).await;
        publish(&cluster, topic, numbered(0..10)).await;
        each_once(&collect(&mut received, numbered(0..10)).await, 10);
        first.kill();
        second.kill();
        tokio::time::sleep(MOMENT).await;
        publish(&cluster, topic, numbered(10..30)).await;
        // On the other gateway.
        let again = Subscriber::start(&one, cluster.gateways[1].mqtt, version, &arguments, &to).await;
        each_once(&collect(&mut received, numbered(10..30)).await, 20);
        again.kill();
        // A member that keeps nothing comes and goes: the share is kept for the others all the same.
        let guest =
            Subscriber::start("guest", cluster.gateways[1].mqtt, "5", &["-t", filter, "-q", "1"], &to).await;
        publish(&cluster, topic, numbered(30..40)).await;
        each_once(&collect(&mut received, numbered(30..40)).await, 10);
        guest.signal(libc::SIGSTOP);
        publish(&cluster, topic, numbered(40..50)).await;
        guest.kill();
        tokio::time::sleep(MOMENT).await;
        publish(&cluster, topic, numbered(50..60)).await;
        let _second = Subscriber::start(&two, cluster.gateways[0].mqtt, version, &arguments, &to).await;
        let all = collect(&mut received, numbered(40..60)).await;
        each_once(&all, 20);
        assert_eq!(by_name(&all).into_keys().collect::<Vec<_>>(), [two.as_str()]);
    }
}

#[tokio::test]
async fn a_member_that_is_taken_over_goes_on_where_it_is_now() {
    if find("mosquitto_sub").is_none() {
        return;
    }
    let cluster = Cluster::start(2, "").await;
    let (to, mut received) = mpsc::unbounded_channel();
    let arguments = ["-t", "$share/g/jobs", "-q", "1", "-c", "-x", "3600"];
    let before = Subscriber::start("mover", cluster.gateways[0].mqtt, "5", &arguments, &to).await;
    publish(&cluster, "jobs", numbered(0..5)).await;
    each_once(&collect(&mut received, numbered(0..5)).await, 5);
    before.signal(libc::SIGSTOP);
    publish(&cluster, "jobs", numbered(5..10)).await;
    // The same session, on the other gateway; nobody tells the former connection that it is over.
    let _now = Subscriber::start("mover", cluster.gateways[1].mqtt, "5", &arguments, &to).await;
    publish(&cluster, "jobs", numbered(10..15)).await;
    each_once(&collect(&mut received, numbered(5..15)).await, 10);
    before.kill();
}

#[tokio::test]
async fn a_hub_that_is_killed_loses_nothing_that_was_accepted() {
    if find("mosquitto_sub").is_none() {
        return;
    }
    let mut cluster = Cluster::start(2, "").await;
    let (to, mut received) = mpsc::unbounded_channel();
    let arguments = ["-t", "$share/g/jobs/#", "-q", "1"];
    let stopped = Subscriber::start("stopped", cluster.gateways[0].mqtt, "5", &arguments, &to).await;
    let _member = Subscriber::start("member", cluster.gateways[1].mqtt, "311", &arguments, &to).await;
    publish(&cluster, "jobs/1", numbered(0..10)).await;
    each_once(&collect(&mut received, numbered(0..10)).await, 10);
    stopped.signal(libc::SIGSTOP);
    publish(&cluster, "jobs/1", numbered(10..20)).await;
    cluster.kill_hub().await;
    cluster.restart_hub().await;
    // Its gateway knows that it has gone before the share is at home again, or after.
    stopped.kill();
    publish(&cluster, "jobs/1", numbered(20..40)).await;
    publish(&cluster, "jobs/2", numbered(40..60)).await;
    let all = collect(&mut received, numbered(10..60)).await;
    let twice = all.values().filter(|names| names.len() > 1).count();
    eprintln!("{twice} of {} came twice", all.len());
}

#[tokio::test]
async fn shares_are_served_on_while_their_homes_move() {
    if find("mosquitto_sub").is_none() {
        return;
    }
    const TOPICS: usize = 8;
    let mut cluster = Cluster::start(2, "").await;
    let (to, mut received) = mpsc::unbounded_channel();
    // Two shares a topic, with and without a wildcard, at home all over the slots.
    let filters =
        (0..TOPICS).flat_map(|i| [format!("$share/w{i}/jobs/{i}/#"), format!("$share/e{i}/jobs/{i}/x")]);
    let filters: Vec<String> = filters.collect();
    let arguments: Vec<&str> = filters.iter().flat_map(|filter| ["-t", filter]).chain(["-q", "1"]).collect();
    let _members = [
        Subscriber::start("five", cluster.gateways[0].mqtt, "5", &arguments, &to).await,
        Subscriber::start("three", cluster.gateways[1].mqtt, "311", &arguments, &to).await,
    ];
    let texts =
        |range: std::ops::Range<usize>| range.map(|n| (format!("jobs/{}/x", n % TOPICS), n.to_string()));
    let mut got: BTreeMap<String, usize> = BTreeMap::new();
    let mut published = 0..0;
    for step in ["at first", "a registry comes", "it stops", "another comes", "it is killed"] {
        published = published.end..published.end + 80;
        match step {
            "a registry comes" | "another comes" => cluster.add_registry().await,
            "it stops" => cluster.stop_registry().await,
            "it is killed" => cluster.kill_registry().await,
            _ => {}
        }
        // Slots move while this is published: readiness and death are only the beginning of that.
        for (topic, text) in texts(published.clone()) {
            cluster.publish(&topic, &text).await;
        }
        let is_missing = |got: &BTreeMap<String, usize>| {
            published.clone().any(|n| got.get(&n.to_string()).copied().unwrap_or(0) < 2)
        };
        while is_missing(&got) {
            match tokio::time::timeout(carillon_tests::PATIENCE, received.recv()).await {
                Ok(Some((_, text))) => *got.entry(text).or_default() += 1,
                _ => panic!("{step}: not all came: {got:?}"),
            }
        }
        let twice = published.clone().filter(|n| got[&n.to_string()] > 2).count();
        // Each share is at home once, and they are not all at one place while there are two.
        let homes = eventually("the shares are at home", || async {
            let homes = cluster.hub_metrics("carillon_shares_open").await;
            let is_so =
                homes.iter().sum::<f64>() as usize == 2 * TOPICS && homes.iter().all(|&open| open > 0.0);
            if is_so { Ok(homes) } else { Err(homes) }
        })
        .await;
        eprintln!(
            "{step}: at home {homes:?}; all of {published:?} came to both shares, {twice} of them again"
        );
        assert!(step != "at first" || twice == 0);
    }
}

/// A member by hand, version 5: acknowledges only what it is told to.
async fn member(server: SocketAddr, client_id: &str, window: u16, filter: &str) -> Raw {
    let connect = Connect::new(5, client_id).with(0x21, &window.to_be_bytes());
    let mut raw = Device::connect(server, &connect).await.raw;
    raw.send(&mqtt::subscribe(5, 1, filter, 1)).await;
    match raw.answer().await {
        Answer::Packet(0x90, body) => assert_eq!(body, [0, 1, 0, 1], "granted QoS 1"),
        other => panic!("no SUBACK but {other:02x?}"),
    }
    raw
}

/// The packet identifier of the PUBLISH that comes next, version 5, and whether DUP is set.
async fn publish_id(raw: &mut Raw) -> Option<u16> {
    match raw.answer_within(MOMENT).await {
        Answer::Packet(first, body) if first & 0xF0 == 0x30 => {
            let topic = usize::from(u16::from_be_bytes([body[0], body[1]]));
            Some(u16::from_be_bytes([body[2 + topic], body[3 + topic]]))
        }
        Answer::Silence => None,
        other => panic!("no PUBLISH but {other:02x?}"),
    }
}

#[tokio::test]
async fn a_full_window_is_passed_over_and_when_all_are_full_messages_wait() {
    let cluster = Cluster::start(2, "").await;
    let filter = "$share/g/jobs";
    let mut narrow = member(cluster.gateways[1].mqtt, "narrow", 1, filter).await;
    let mut wide = member(cluster.gateways[0].mqtt, "wide", 4, filter).await;
    publish(&cluster, "jobs", numbered(0..20)).await;
    let first = publish_id(&mut narrow).await.expect("one message");
    assert_eq!(publish_id(&mut narrow).await, None, "its window is full");
    let mut ids = Vec::new();
    for _ in 0..4 {
        ids.push(publish_id(&mut wide).await.expect("four messages"));
    }
    assert_eq!(publish_id(&mut wide).await, None, "its window is full too");
    // Whoever has room gets what waits: all the rest, one by one, through the wide one.
    let mut got = 5;
    while got < 20 {
        wide.send(&mqtt::packet(0x40, &ids.remove(0).to_be_bytes())).await;
        ids.push(publish_id(&mut wide).await.expect("the next one"));
        got += 1;
    }
    narrow.send(&mqtt::packet(0x40, &first.to_be_bytes())).await;
    assert_eq!(publish_id(&mut narrow).await, None, "nothing is left");
}

#[tokio::test]
async fn after_an_unsubscribe_nothing_comes_and_what_was_sent_may_be_acknowledged() {
    let cluster = Cluster::start(1, "").await;
    let filter = "$share/g/jobs";
    let mut leaving = member(cluster.gateways[0].mqtt, "leaving", 10, filter).await;
    publish(&cluster, "jobs", numbered(0..1)).await;
    let id = publish_id(&mut leaving).await.expect("a message");
    let mut staying = member(cluster.gateways[0].mqtt, "staying", 10, filter).await;
    let mut body = vec![0, 2, 0];
    body.extend_from_slice(&mqtt::string(filter));
    leaving.send(&mqtt::packet(0xA2, &body)).await;
    assert_eq!(leaving.answer().await, Answer::Packet(0xB0, vec![0, 2, 0, 0]));
    publish(&cluster, "jobs", numbered(1..4)).await;
    for _ in 1..4 {
        let id = publish_id(&mut staying).await.expect("all of the later ones");
        staying.send(&mqtt::packet(0x40, &id.to_be_bytes())).await;
    }
    assert_eq!(publish_id(&mut leaving).await, None);
    // What it had before is its own to finish.
    assert_eq!(publish_id(&mut staying).await, None);
    leaving.send(&mqtt::packet(0x40, &id.to_be_bytes())).await;
    leaving.send(&mqtt::packet(0xA2, &body)).await;
    assert_eq!(leaving.answer().await, Answer::Packet(0xB0, vec![0, 2, 0, 0x11]), "there is none any more");
    drop(leaving);
    assert_eq!(publish_id(&mut staying).await, None, "it was acknowledged");
}

#[tokio::test]
async fn filters_that_are_wrong_and_no_local_are_refused_as_the_standard_says() {
    let server = Server::start().await;
    let mqtt = server.addresses().mqtt;
    for (filter, options, reason) in [
        ("$share/g", 1, 0x8F),
        ("$share//x", 1, 0x8F),
        ("$share/g/", 1, 0x8F),
        ("$share/g+/x", 1, 0x8F),
        ("$share/#/x", 1, 0x8F),
        ("$share/g/x/#/y", 1, 0x8F),
        // No Local [MQTT-3.8.3-4].
        ("$share/g/x", 0b101, 0x82),
    ] {
        let mut raw = Raw::device(mqtt, 5, "wrong").await;
        raw.send(&mqtt::subscribe(5, 1, filter, options)).await;
        assert_eq!(raw.answer().await.disconnect(), Some(reason), "{filter}");
    }
    // What is below the share must be allowed; its name is no part of the topic.
    server.cli(&["config", "set", "app/demo", "device_subscribe=['allowed/#']"]).await;
    eventually("the rights are in force", || async {
        let mut raw = Raw::device(mqtt, 5, "asking").await;
        let mut codes = Vec::new();
        for filter in ["$share/g/allowed/x", "$share/g/demo/allowed/#", "$share/allowed/x", "$share/g/#"] {
            raw.send(&mqtt::subscribe(5, 1, filter, 1)).await;
            match raw.answer().await {
                Answer::Packet(0x90, body) => codes.push(body[3]),
                other => panic!("no SUBACK but {other:02x?}"),
            }
        }
        if codes == [1, 1, 0x87, 0x87] { Ok(()) } else { Err(codes) }
    })
    .await;
    server.cli(&["config", "set", "app/demo", "device_subscribe=['#']"]).await;
    // Like any other subscription they count.
    server.cli(&["config", "set", "gateway", "max_subscriptions=2"]).await;
    eventually("the limit is in force", || async {
        let mut raw = Raw::device(mqtt, 5, "many").await;
        let mut codes = Vec::new();
        for (id, filter) in [(1, "$share/g/x"), (2, "y"), (3, "$share/g/z"), (4, "$share/g/x")] {
            raw.send(&mqtt::subscribe(5, id, filter, 1)).await;
            match raw.answer().await {
                Answer::Packet(0x90, body) => codes.push(body[3]),
                other => panic!("no SUBACK but {other:02x?}"),
            }
        }
        if codes == [1, 1, 0x97, 1] { Ok(()) } else { Err(codes) }
    })
    .await;
}
