//! SIGKILL in the middle of 10,000 accepted pushes: whatever was accepted is delivered, and in order.
//!
//! Half of the users are online while the process dies, half are away until it is back. `CARILLON_CRASH_ROUNDS` says how
//! often it is repeated (1 unless said; `make test` says 20 in CI). The counts of each round are printed.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use carillon_tests::{Server, eventually};
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::{ConnectProperties, Filter, Packet, Publish};
use rumqttc::v5::{AsyncClient, Event, MqttOptions};
use serde_json::{Value, json};

const PUSHES: usize = 10_000;
const USERS: usize = 40;
/// Pushes in one request, and requests under way at the same time.
const BATCH: usize = 50;
const PUSHERS: usize = 8;

/// What was accepted: id → (user, epoch, seq).
type Accepted = HashMap<String, (String, u64, u64)>;

/// What one device has received, in the order in which it came.
#[derive(Default)]
struct Inbox {
    received: Mutex<Vec<(String, u64)>>,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_accepted_push_outlives_a_kill() {
    let rounds =
        std::env::var("CARILLON_CRASH_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(1);
    for number in 1..=rounds {
        let began = Instant::now();
        let counts = round(number).await;
        let line = format!("round {number}/{rounds}: {counts} in {:.1} s\n", began.elapsed().as_secs_f64());
        // Past the test runner's capture: these counts are the point.
        let _ = std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes());
    }
}

async fn round(number: usize) -> String {
    let mut server = Server::start().await;
    let mqtt = server.addresses().mqtt;
    let users: Vec<String> = (0..USERS).map(|i| format!("user-{i}")).collect();
    let (online, offline) = users.split_at(USERS / 2);

    let mut inboxes: BTreeMap<String, Arc<Inbox>> = BTreeMap::new();
    let mut devices = Vec::new();
    let connected = Arc::new(AtomicUsize::new(0));
    for user in online {
        let inbox = inboxes.entry(user.clone()).or_default().clone();
        devices.push(tokio::spawn(device(mqtt, user.clone(), inbox, connected.clone())));
    }
    eventually("the devices connect", || async {
        let now = connected.load(Ordering::Relaxed);
        if now >= online.len() { Ok(()) } else { Err(now) }
    })
    .await;

    // The process dies somewhere between a fifth and four fifths of the way, elsewhere in each round.
    let fatal = PUSHES / 5 + (number * 7919) % (PUSHES * 3 / 5);
    let accepted = Arc::new(Mutex::new(Accepted::new()));
    let before = Arc::new(AtomicUsize::new(0));
    let kill = Mutex::new(Some(server.killer()));
    let kill = Arc::new(move |accepted: usize| {
        if accepted >= fatal
            && let Some(kill) = kill.lock().unwrap().take()
        {
            kill();
        }
    });
    let mut pushers = Vec::new();
    for pusher in 0..PUSHERS {
        let request = server.request(reqwest::Method::POST, "messages:batch");
        let (accepted, kill, before) = (accepted.clone(), kill.clone(), before.clone());
        let users = users.clone();
        pushers.push(tokio::spawn(async move {
            for batch in (pusher..PUSHES / BATCH).step_by(PUSHERS) {
                let lines = batch_lines(batch, &users);
                loop {
                    let request = request.try_clone().expect("no body yet").body(lines.clone());
                    let done = push(request, &accepted).await;
                    let total = accepted.lock().unwrap().len();
                    kill(total);
                    if done {
                        break;
                    }
                    // It may have been accepted without our knowing: the ids make the retry harmless.
                    before.fetch_add(1, Ordering::Relaxed);
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
        }));
    }
    let status = server.gone().await;
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(libc::SIGKILL), "{status}");
    let at_death = accepted.lock().unwrap().len();
    assert!(at_death < PUSHES, "it died too late to show anything");
    let down = Instant::now();
    server.restart().await;
    let down = down.elapsed();
    let back = Instant::now();
    for pusher in pushers {
        pusher.await.expect("a pusher");
    }
    let accepted = accepted.lock().unwrap().clone();
    assert_eq!(accepted.len(), PUSHES, "all are accepted in the end");
    let all_accepted = back.elapsed();

    for user in offline {
        let inbox = inboxes.entry(user.clone()).or_default().clone();
        devices.push(tokio::spawn(device(mqtt, user.clone(), inbox, connected.clone())));
    }
    let mut expected: BTreeMap<&str, HashSet<&str>> = BTreeMap::new();
    for (id, (user, _, _)) in &accepted {
        expected.entry(user).or_default().insert(id);
    }
    eventually("every accepted push is delivered", || async {
        let mut missing = Vec::new();
        for (user, ids) in &expected {
            let received = inboxes[*user].received.lock().unwrap();
            let received: HashSet<&str> = received.iter().map(|(id, _)| id.as_str()).collect();
            let lost = ids.difference(&received).count();
            if lost > 0 {
                missing.push(format!("{user}: {lost} of {}", ids.len()));
            }
        }
        if missing.is_empty() { Ok(()) } else { Err(missing) }
    })
    .await;
    let all_delivered = back.elapsed();
    // A moment for what should not come any more.
    tokio::time::sleep(Duration::from_millis(200)).await;
    for device in devices {
        device.abort();
    }
    let mut duplicates = 0;
    for (user, inbox) in &inboxes {
        duplicates += check(user, &inbox.received.lock().unwrap(), &accepted);
    }
    format!(
        "{PUSHES} accepted ({at_death} before SIGKILL, {} requests repeated), all delivered to {USERS} users in order, \
         {duplicates} duplicates; back in {:.1} s, then all accepted in {:.1} s, all delivered in {:.1} s;",
        before.load(Ordering::Relaxed),
        down.as_secs_f64(),
        all_accepted.as_secs_f64(),
        all_delivered.as_secs_f64(),
    )
}

/// Lines of one batch, for all users in turn, each with an id of its own.
fn batch_lines(batch: usize, users: &[String]) -> String {
    let mut lines = String::new();
    for i in batch * BATCH..(batch + 1) * BATCH {
        let line = json!({ "user": users[i % users.len()], "payload": format!("message {i}"), "id": format!("id-{i}") });
        lines.push_str(&line.to_string());
        lines.push('\n');
    }
    lines
}

/// Sends a batch and notes what was accepted; true when all of it was. An answer cut off by the death of the process
/// counts as far as it came: a line that says "accepted" is a promise.
async fn push(request: reqwest::RequestBuilder, accepted: &Mutex<Accepted>) -> bool {
    let Ok(mut response) = request.header("content-type", "application/x-ndjson").send().await else {
        return false;
    };
    let mut text = Vec::new();
    let complete = loop {
        match response.chunk().await {
            Ok(Some(chunk)) => text.extend_from_slice(&chunk),
            Ok(None) => break true,
            Err(_) => break false,
        }
    };
    let end = text.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
    let mut good = 0;
    for line in text[..end].split(|&byte| byte == b'\n').filter(|line| !line.is_empty()) {
        let answer: Value = serde_json::from_slice(line).expect("a line of JSON");
        let (Some(id), Some(topic), Some(epoch), Some(seq)) = (
            answer["id"].as_str(),
            answer["topic"].as_str(),
            answer["epoch"].as_u64(),
            answer["seq"].as_u64(),
        ) else {
            continue;
        };
        good += 1;
        let user = topic.rsplit('/').next().expect("a level").to_owned();
        let earlier = accepted.lock().unwrap().insert(id.to_owned(), (user, epoch, seq));
        if let Some((_, _, first)) = earlier {
            assert_eq!(first, seq, "{id} was accepted twice, at two places of {topic}");
        }
    }
    complete && good == BATCH
}

/// A device that keeps its session and comes back by itself.
async fn device(mqtt: SocketAddr, user: String, inbox: Arc<Inbox>, connected: Arc<AtomicUsize>) {
    let mut options = MqttOptions::new(format!("device-of-{user}"), mqtt.ip().to_string(), mqtt.port());
    let mut properties = ConnectProperties::new();
    properties.session_expiry_interval = Some(3600);
    options.set_connect_properties(properties).set_clean_start(false).set_credentials(&user, "");
    loop {
        // A new state for each connection: the server's is what is tested.
        let (client, mut connection) = AsyncClient::new(options.clone(), 16);
        loop {
            match connection.poll().await {
                Ok(Event::Incoming(Packet::ConnAck(connack))) => {
                    if !connack.session_present {
                        let filter = Filter::new(format!("demo/u/{user}"), QoS::AtLeastOnce);
                        client.subscribe_many([filter]).await.expect("a request");
                    }
                }
                Ok(Event::Incoming(Packet::SubAck(_))) => {
                    connected.fetch_add(1, Ordering::Relaxed);
                }
                Ok(Event::Incoming(Packet::Publish(publish))) => {
                    inbox.received.lock().unwrap().push(identity(&publish))
                }
                Ok(_) => {}
                Err(_) => break,
            }
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The message's id and its place in the topic.
fn identity(publish: &Publish) -> (String, u64) {
    let properties = publish.properties.as_ref().expect("properties");
    let get = |name: &str| {
        properties.user_properties.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone())
    };
    (get("id").expect("an id"), get("seq").expect("a seq").parse().expect("a number"))
}

/// Is what a user received what was accepted, at its place, and is nothing that comes for the first time older than
/// something that came before? Gives the number of duplicates.
fn check(user: &str, received: &[(String, u64)], accepted: &Accepted) -> usize {
    let mut seen = HashSet::new();
    let mut newest = 0;
    let mut duplicates = 0;
    for (id, seq) in received {
        let (owner, _, promised) =
            accepted.get(id).unwrap_or_else(|| panic!("{user} got {id}, which nobody accepted"));
        assert_eq!((owner.as_str(), promised), (user, seq), "{id} is not where it was accepted");
        if !seen.insert(id) {
            duplicates += 1;
            continue;
        }
        assert!(*seq > newest, "{user}: {seq} comes for the first time, after {newest}");
        newest = *seq;
    }
    duplicates
}
