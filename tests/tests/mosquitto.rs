//! mosquitto's own clients, MQTT 5 and 3.1.1, against a real process.

use std::time::Duration;

use carillon_tests::mqtt::{self, Answer, Raw};
use carillon_tests::tools::{Running, find, mosquitto, run, succeed};
use carillon_tests::{Server, eventually, within};

const VERSIONS: [&str; 2] = ["5", "311"];
/// What a subscriber prints of a message: topic, QoS, retain, payload.
const FORMAT: &str = "got %t q%q r%r %p";

/// A subscriber whose subscriptions are in force.
async fn subscriber(server: &Server, version: &str, arguments: &[&str]) -> Option<Running> {
    let arguments = [&["-d", "-F", FORMAT], arguments].concat();
    let mut running =
        Running::start(mosquitto("mosquitto_sub", server.addresses().mqtt, version, &arguments)?);
    running.line_with("Subscribed (mid").await;
    Some(running)
}

/// The next message that a subscriber prints.
async fn got(subscriber: &mut Running) -> String {
    let line = subscriber.line_with("got ").await;
    line["got ".len()..].to_owned()
}

async fn publish(server: &Server, version: &str, arguments: &[&str]) {
    let command =
        mosquitto("mosquitto_pub", server.addresses().mqtt, version, arguments).expect("found before");
    succeed(command).await;
}

#[tokio::test]
async fn what_is_published_arrives_with_its_quality_of_service() {
    if find("mosquitto_sub").is_none() {
        return;
    }
    let server = Server::start().await;
    for version in VERSIONS {
        for (subscribed, published) in
            ["00", "01", "02", "10", "11", "12", "20", "21", "22"].map(|both| both.split_at(1))
        {
            let delivered = subscribed.min(published);
            let topic = format!("hello/{version}/{subscribed}/{published}");
            let mut subscriber =
                subscriber(&server, version, &["-t", &topic, "-q", subscribed]).await.unwrap();
            publish(&server, version, &["-t", &topic, "-q", published, "-m", "hello world"]).await;
            assert_eq!(
                got(&mut subscriber).await,
                format!("{topic} q{delivered} r0 hello world"),
                "v{version}"
            );
        }
    }
}

#[tokio::test]
async fn versions_understand_each_other() {
    if find("mosquitto_sub").is_none() {
        return;
    }
    let server = Server::start().await;
    let mut five = subscriber(&server, "5", &["-t", "mixed", "-q", "1"]).await.unwrap();
    let mut three = subscriber(&server, "311", &["-t", "mixed", "-q", "1"]).await.unwrap();
    publish(&server, "5", &["-t", "mixed", "-q", "1", "-m", "from 5"]).await;
    publish(&server, "311", &["-t", "mixed", "-q", "1", "-m", "from 3"]).await;
    for subscriber in [&mut five, &mut three] {
        assert_eq!(got(subscriber).await, "mixed q1 r0 from 5");
        assert_eq!(got(subscriber).await, "mixed q1 r0 from 3");
    }
}

#[tokio::test]
async fn wildcards_match_as_the_standard_says() {
    if find("mosquitto_sub").is_none() {
        return;
    }
    let server = Server::start().await;
    for version in VERSIONS {
        let base = format!("w{version}");
        let mut one = subscriber(&server, version, &["-t", &format!("{base}/+/c"), "-q", "1"]).await.unwrap();
        let mut all = subscriber(&server, version, &["-t", &format!("{base}/#"), "-q", "1"]).await.unwrap();
        for topic in ["", "/a", "/b/c", "/b/c/d", "/x/c"] {
            publish(&server, version, &["-t", &format!("{base}{topic}"), "-q", "1", "-m", topic]).await;
        }
        let mut seen = Vec::new();
        for _ in 0..5 {
            seen.push(got(&mut all).await);
        }
        seen.sort();
        let expected =
            ["", "/a", "/b/c", "/b/c/d", "/x/c"].map(|topic| format!("{base}{topic} q1 r0 {topic}"));
        assert_eq!(seen, expected, "v{version}");
        let mut seen = vec![got(&mut one).await, got(&mut one).await];
        seen.sort();
        assert_eq!(seen, ["/b/c", "/x/c"].map(|topic| format!("{base}{topic} q1 r0 {topic}")), "v{version}");
    }
}

#[tokio::test]
async fn wildcards_leave_dollar_topics_alone() {
    if find("mosquitto_sub").is_none() {
        return;
    }
    let server = Server::start().await;
    for version in VERSIONS {
        let mut hash = subscriber(&server, version, &["-t", "#"]).await.unwrap();
        let mut plus = subscriber(&server, version, &["-t", "+/dollar"]).await.unwrap();
        publish(&server, version, &["-t", "$own/dollar", "-q", "1", "-m", "hidden"]).await;
        publish(&server, version, &["-t", "plain/dollar", "-q", "1", "-m", "seen"]).await;
        assert_eq!(got(&mut hash).await, "plain/dollar q0 r0 seen", "v{version}");
        assert_eq!(got(&mut plus).await, "plain/dollar q0 r0 seen", "v{version}");
    }
}

#[tokio::test]
async fn retained_messages_wait_for_new_subscribers() {
    if find("mosquitto_sub").is_none() {
        return;
    }
    let server = Server::start().await;
    for version in VERSIONS {
        let topic = format!("retained/{version}");
        for qos in ["0", "1"] {
            let text = format!("kept at {qos}");
            publish(&server, version, &["-t", &topic, "-q", qos, "-r", "-m", &text]).await;
            // Nobody acknowledges QoS 0: a subscriber that is quick may still be there before it, and gets it live.
            eventually("it is retained", || async {
                let one = ["-t", topic.as_str(), "-q", "1", "-C", "1", "-W", "5", "-F", FORMAT];
                let output =
                    run(mosquitto("mosquitto_sub", server.addresses().mqtt, version, &one).unwrap()).await;
                let got = String::from_utf8_lossy(&output.stdout).trim().to_owned();
                if got == format!("got {topic} q{qos} r1 {text}") { Ok(()) } else { Err(got) }
            })
            .await;
            // By a wildcard too.
            let mut late = subscriber(&server, version, &["-t", "retained/+", "-q", "1"]).await.unwrap();
            assert!(late.line_with(&text).await.contains(" r1 "), "v{version}");
        }
        // An empty one takes it away.
        publish(&server, version, &["-t", &topic, "-q", "1", "-r", "-n"]).await;
        let none = ["-t", topic.as_str(), "-W", "1"];
        let output = run(mosquitto("mosquitto_sub", server.addresses().mqtt, version, &none).unwrap()).await;
        assert_eq!(output.status.code(), Some(27), "v{version}: a timeout, for there is nothing: {output:?}");
    }
}

#[tokio::test]
async fn a_will_is_sent_for_who_is_lost_and_not_for_who_leaves() {
    if find("mosquitto_sub").is_none() {
        return;
    }
    let server = Server::start().await;
    for version in VERSIONS {
        let topic = format!("will/{version}");
        let mut watcher = subscriber(&server, version, &["-t", &topic, "-q", "1"]).await.unwrap();
        let will = ["--will-topic", topic.as_str(), "--will-qos", "1", "--will-payload"];
        // mosquitto_sub asks for its will even when it is told to end, mosquitto_pub does not.
        publish(&server, version, &[&will[..], &["left", "-t", "x", "-q", "1", "-m", "x"]].concat()).await;
        let dies = [&will[..], &["lost", "-t", "x"]].concat();
        subscriber(&server, version, &dies).await.unwrap().kill().await;
        assert_eq!(
            got(&mut watcher).await,
            format!("{topic} q1 r0 lost"),
            "v{version}: and none of who left"
        );
    }
}

#[tokio::test]
async fn a_kept_session_gets_what_it_missed_in_order() {
    if find("mosquitto_sub").is_none() {
        return;
    }
    let server = Server::start().await;
    for version in VERSIONS {
        let topic = format!("missed/{version}");
        let id = format!("phone-{version}");
        let mut session = vec!["-i", &id, "-c", "-t", &topic, "-q", "1"];
        if version == "5" {
            session.extend(["-x", "3600"]);
        }
        // Subscribes, and leaves.
        let leave = [session.as_slice(), &["-E"]].concat();
        succeed(mosquitto("mosquitto_sub", server.addresses().mqtt, version, &leave).unwrap()).await;
        for text in ["one", "two", "three"] {
            publish(&server, version, &["-t", &topic, "-q", "1", "-m", text]).await;
        }
        // Not `-C 3`: that client closes its socket right behind its PUBACKs. If the SUBACK is unread then, or an earlier
        // PUBACK not yet confirmed by TCP (Nagle's algorithm), its own kernel drops what it has not sent, and resets.
        let back = [session.as_slice(), &["-W", "2", "-F", "%p"]].concat();
        for expected in [["one", "two", "three"].as_slice(), &["four"]] {
            let output =
                run(mosquitto("mosquitto_sub", server.addresses().mqtt, version, &back).unwrap()).await;
            let got = String::from_utf8_lossy(&output.stdout).into_owned();
            assert_eq!(got.lines().collect::<Vec<_>>(), expected, "v{version}");
            publish(&server, version, &["-t", &topic, "-q", "1", "-m", "four"]).await;
        }
    }
}

/// Only its user empties an inbox, not somebody else who may read it.
#[tokio::test]
async fn another_user_does_not_consume_an_inbox() {
    if find("mosquitto_sub").is_none() {
        return;
    }
    let server = Server::start().await;
    server.cli(&["push", "jane", "for jane"]).await;
    for user in ["alice", "jane"] {
        let read = ["-u", user, "-t", "demo/u/jane", "-q", "1", "-C", "1", "-W", "5"];
        let got = succeed(mosquitto("mosquitto_sub", server.addresses().mqtt, "5", &read).unwrap()).await;
        assert_eq!(got.trim(), "for jane", "{user}");
    }
    let again = ["-u", "jane", "-t", "demo/u/jane", "-q", "1", "-C", "1", "-W", "1"];
    let output = run(mosquitto("mosquitto_sub", server.addresses().mqtt, "5", &again).unwrap()).await;
    assert_eq!(String::from_utf8_lossy(&output.stdout), "", "jane has had it");
}

#[tokio::test]
async fn a_clean_start_forgets_the_session() {
    if find("mosquitto_sub").is_none() {
        return;
    }
    let server = Server::start().await;
    for version in VERSIONS {
        let topic = format!("clean/{version}");
        let id = format!("cleaner-{version}");
        let mut kept = vec!["-i", &id, "-c", "-t", &topic, "-q", "1", "-E"];
        if version == "5" {
            kept.extend(["-x", "3600"]);
        }
        succeed(mosquitto("mosquitto_sub", server.addresses().mqtt, version, &kept).unwrap()).await;
        publish(&server, version, &["-t", &topic, "-q", "1", "-m", "missed"]).await;
        // Without -c: clean. What was missed is gone, the next one comes.
        let mut clean = subscriber(&server, version, &["-i", &id, "-t", &topic, "-q", "1"]).await.unwrap();
        publish(&server, version, &["-t", &topic, "-q", "1", "-m", "next"]).await;
        assert_eq!(got(&mut clean).await, format!("{topic} q1 r0 next"), "v{version}");
    }
}

#[tokio::test]
async fn a_silent_device_is_disconnected_after_one_and_a_half_keep_alives() {
    let server = Server::start().await;
    for version in [4, 5] {
        let mut raw = Raw::connect(server.addresses().mqtt).await;
        raw.send(&mqtt::connect(version, "silent", 2)).await;
        assert!(matches!(raw.answer().await, Answer::Packet(0x20, _)));
        let began = std::time::Instant::now();
        if version == 5 {
            assert_eq!(raw.answer().await.disconnect(), Some(0x8D), "keep alive timeout");
        }
        assert_eq!(raw.answer().await, Answer::Closed, "version {version}");
        let took = began.elapsed();
        assert!(
            took > Duration::from_millis(2500) && took < Duration::from_secs(6),
            "version {version}: {took:?}"
        );
    }
    // Who pings stays.
    let mut raw = Raw::connect(server.addresses().mqtt).await;
    raw.send(&mqtt::connect(4, "pings", 1)).await;
    assert!(matches!(raw.answer().await, Answer::Packet(0x20, _)));
    for _ in 0..4 {
        tokio::time::sleep(Duration::from_millis(700)).await;
        raw.send(&[0xC0, 0]).await;
        assert_eq!(raw.answer().await, Answer::Packet(0xD0, vec![]), "PINGRESP");
    }
}

#[tokio::test]
async fn a_push_reaches_an_inbox() {
    if find("mosquitto_sub").is_none() {
        return;
    }
    let server = Server::start().await;
    for version in VERSIONS {
        let user = format!("alice-{version}");
        server.push(&user, "while away").await;
        let inbox = format!("demo/u/{user}");
        let mut device = subscriber(&server, version, &["-u", &user, "-t", &inbox, "-q", "1"]).await.unwrap();
        server.push(&user, "while there").await;
        assert_eq!(got(&mut device).await, format!("{inbox} q1 r0 while away"), "v{version}");
        assert_eq!(got(&mut device).await, format!("{inbox} q1 r0 while there"), "v{version}");
    }
}

#[tokio::test]
async fn a_kept_session_gets_each_message_of_qos_2_once() {
    if find("mosquitto_sub").is_none() {
        return;
    }
    let server = Server::start().await;
    for version in VERSIONS {
        let topic = format!("once/{version}");
        let id = format!("once-{version}");
        let mut session = vec!["-i", &id, "-c", "-t", &topic, "-q", "2"];
        if version == "5" {
            session.extend(["-x", "3600"]);
        }
        let leave = [session.as_slice(), &["-E"]].concat();
        succeed(mosquitto("mosquitto_sub", server.addresses().mqtt, version, &leave).unwrap()).await;
        let mut command =
            mosquitto("mosquitto_pub", server.addresses().mqtt, version, &["-t", &topic, "-q", "2", "-l"])
                .unwrap();
        let mut sender = command.stdin(std::process::Stdio::piped()).spawn().unwrap();
        let lines: String = (0..200).map(|i| format!("{i}\n")).collect();
        let mut stdin = sender.stdin.take().unwrap();
        tokio::io::AsyncWriteExt::write_all(&mut stdin, lines.as_bytes()).await.unwrap();
        drop(stdin);
        assert!(within("the sender ends", sender.wait()).await.unwrap().success());
        // (Not killed in the middle: a client that has no session on its disk loses what it had not released.)
        let back = [session.as_slice(), &["-W", "3", "-F", "%p q%q"]].concat();
        let expected: Vec<String> = (0..200).map(|i| format!("{i} q2")).collect();
        for expected in [&expected[..], &[]] {
            let output =
                run(mosquitto("mosquitto_sub", server.addresses().mqtt, version, &back).unwrap()).await;
            let got = String::from_utf8_lossy(&output.stdout).into_owned();
            assert_eq!(got.lines().collect::<Vec<_>>(), expected, "v{version}");
        }
    }
}

#[tokio::test]
async fn many_messages_stay_in_order() {
    if find("mosquitto_sub").is_none() {
        return;
    }
    let server = Server::start().await;
    for version in VERSIONS {
        let topic = format!("many/{version}");
        let mut receiver = subscriber(&server, version, &["-t", &topic, "-q", "1"]).await.unwrap();
        let mut command =
            mosquitto("mosquitto_pub", server.addresses().mqtt, version, &["-t", &topic, "-q", "1", "-l"])
                .unwrap();
        let mut sender = command.stdin(std::process::Stdio::piped()).spawn().unwrap();
        let lines: String = (0..1000).map(|i| format!("{i}\n")).collect();
        let mut stdin = sender.stdin.take().unwrap();
        tokio::io::AsyncWriteExt::write_all(&mut stdin, lines.as_bytes()).await.unwrap();
        drop(stdin);
        for i in 0..1000 {
            assert_eq!(got(&mut receiver).await, format!("{topic} q1 r0 {i}"), "v{version}");
        }
        assert!(within("the sender ends", sender.wait()).await.unwrap().success());
    }
}
