//! Statements of the standard that no other test shows, byte by byte; and that `docs/mqtt-conformance.md`, which lists them
//! all, names tests that exist.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use carillon_tests::mqtt::{self, Answer, Connect, Device, Publish, Raw, packet, string};
use carillon_tests::{Server, eventually};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const PUBACK: u8 = 0x40;
const PUBREC: u8 = 0x50;
const PUBREL: u8 = 0x62;
const PUBCOMP: u8 = 0x70;
/// Longer than the gateway's `max_topic_bytes`: refused by itself.
const TOO_LONG: usize = 2000;

async fn device(server: SocketAddr, version: u8, client_id: &str) -> Device {
    Device::connect(server, &Connect::new(version, client_id)).await
}

/// Is this property, with this value, among those of an answer?
fn says(answer: &[u8], property: &[u8]) -> bool {
    answer.windows(property.len()).any(|some| some == property)
}

/// The DISCONNECT that must come, and the end of the connection behind it; gives its reason code.
async fn disconnected(raw: &mut Raw) -> u8 {
    let answer = raw.answer().await;
    let code = answer.disconnect().unwrap_or_else(|| panic!("no DISCONNECT but {answer:02x?}"));
    assert_eq!(raw.answer().await, Answer::Closed);
    code
}

/// [MQTT-1.5.4-3] U+FEFF is a character like others, wherever there is a string.
#[tokio::test]
async fn a_byte_order_mark_is_kept() {
    let server = Server::start().await;
    let mqtt = server.addresses().mqtt;
    let text = "\u{feff}a\u{feff}";
    let mut with = device(mqtt, 5, text).await;
    let mut without = device(mqtt, 5, "a").await;
    assert_eq!(with.subscribe(text, 1).await, 1);
    assert_eq!(without.subscribe("a", 1).await, 1);
    let property = [string(text), string(text)].concat();
    without.publish(&Publish::new(1, 1, text, text).with(0x26, &property)).await;
    assert_eq!(without.acked(PUBACK, 1).await, 0);
    let got = with.got().await;
    assert_eq!((got.topic.as_str(), got.payload.as_str()), (text, text));
    assert_eq!(got.property(0x26), Some(&property[..]));
    without.nothing().await;
}

/// MQTT 5.0 §1.5.4: what is no well-formed UTF-8 is malformed, noncharacters are not.
#[tokio::test]
async fn strings_are_utf8_and_nothing_else() {
    let server = Server::start().await;
    let mqtt = server.addresses().mqtt;
    let bad: [(&str, &[u8]); 6] = [
        ("a surrogate", &[0xED, 0xA0, 0x80]),
        ("an overlong form", &[0xC0, 0xAF]),
        ("beyond U+10FFFF", &[0xF4, 0x90, 0x80, 0x80]),
        ("a continuation byte alone", &[0x80]),
        ("cut short", &[0xE2, 0x82]),
        ("U+0000", &[0]),
    ];
    for (what, bytes) in bad {
        let text = [&(bytes.len() as u16).to_be_bytes(), bytes].concat();
        for version in [4, 5] {
            let no_properties: &[u8] = if version == 5 { &[0] } else { &[] };
            let publish = packet(0x30, &[&text, no_properties].concat());
            let subscribe = packet(0x82, &[&[0, 1], no_properties, &text, &[0]].concat());
            for packet in [publish, subscribe] {
                let mut raw = Raw::device(mqtt, version, "utf8").await;
                raw.send(&packet).await;
                match version {
                    5 => assert_eq!(disconnected(&mut raw).await, 0x81, "{what}"),
                    _ => assert_eq!(raw.answer().await, Answer::Closed, "{what}"),
                }
            }
        }
        let user_property =
            packet(0x30, &[&string("t")[..], &[(text.len() + 4) as u8, 0x26, 0, 1, b'n'], &text].concat());
        let mut raw = Raw::device(mqtt, 5, "utf8").await;
        raw.send(&user_property).await;
        assert_eq!(disconnected(&mut raw).await, 0x81, "{what}, as the value of a user property");
    }
    let mut fine = device(mqtt, 5, "fine").await;
    for text in ["\u{fffe}", "\u{10ffff}", "\u{1d11e}", "\u{e000}"] {
        assert_eq!(fine.subscribe(text, 0).await, 0, "{text:?} is allowed");
        fine.publish(&Publish::new(0, 0, text, "x")).await;
        assert_eq!(fine.got().await.topic, text);
    }
    // Control characters may be refused (§1.5.4): in topics they are, alone, and elsewhere they are handed on.
    assert_eq!(fine.subscribe("a\u{1}", 0).await, 0x8F);
    let pair = [string("\u{1}"), string("\u{7f}\u{85}")].concat();
    assert_eq!(fine.subscribe("controls", 0).await, 0);
    fine.publish(&Publish::new(0, 0, "controls", "x").with(0x26, &pair)).await;
    assert_eq!(fine.got().await.property(0x26), Some(&pair[..]));
}

/// [MQTT-3.1.2-21], [MQTT-3.2.2-21]: the keep alive of CONNACK is the one that holds.
#[tokio::test]
async fn the_servers_keep_alive_holds() {
    let server = Server::start().await;
    server.cli(&["config", "set", "gateway", "max_keep_alive_seconds=2"]).await;
    let mqtt = server.addresses().mqtt;
    for asked in [60, 0] {
        let connect = Connect { keep_alive: asked, ..Connect::new(5, "asks more") };
        let mut told = eventually("the gateway has its configuration", || async {
            let device = Device::connect(mqtt, &connect).await;
            if says(&device.connack, &[0x13, 0, 2]) { Ok(device) } else { Err(device.connack.clone()) }
        })
        .await;
        let began = Instant::now();
        assert_eq!(disconnected(&mut told.raw).await, 0x8D);
        assert!(began.elapsed() >= Duration::from_millis(2500), "{:?}", began.elapsed());
    }
    let connect = Connect { keep_alive: 1, ..Connect::new(5, "asks less") };
    let less = Device::connect(mqtt, &connect).await;
    assert!(!says(&less.connack, &[0x13, 0]), "{:02x?}", less.connack);
}

/// [MQTT-3.1.2-24]: an answer that is larger than the device takes is not sent.
#[tokio::test]
async fn no_answer_is_larger_than_the_device_takes() {
    let server = Server::start().await;
    let mqtt = server.addresses().mqtt;
    // CONNACK says what may not be left out, so there is none that fits.
    for max in [8_u32, 12] {
        let mut raw = Raw::connect(mqtt).await;
        raw.send(&Connect::new(5, "").with(0x27, &max.to_be_bytes()).bytes()).await;
        assert_eq!(raw.answer().await, Answer::Packet(0x20, vec![0, 0x95, 0]));
        assert_eq!(raw.answer().await, Answer::Closed);
    }
    let takes_20 = Connect::new(5, "takes 20").with(0x27, &20_u32.to_be_bytes());
    let filters = |count: usize| -> Vec<u8> { (0..count).flat_map(|i| string(&format!("f/{i}"))).collect() };
    let options = |count: usize| -> Vec<u8> {
        (0..count).flat_map(|i| [string(&format!("f/{i}")), vec![0]].concat()).collect()
    };
    // SUBACK and UNSUBACK have 5 bytes and one for each filter.
    let mut device = Device::connect(mqtt, &takes_20).await;
    device.raw.send(&packet(0x82, &[&[0, 1, 0][..], &options(15)].concat())).await;
    assert!(matches!(device.raw.answer().await, Answer::Packet(0x90, body) if body.len() == 18));
    device.raw.send(&packet(0xA2, &[&[0, 2, 0][..], &filters(15)].concat())).await;
    assert!(matches!(device.raw.answer().await, Answer::Packet(0xB0, body) if body.len() == 18));
    for (first, body) in [(0x82, options(16)), (0xA2, filters(16))] {
        let mut device = Device::connect(mqtt, &takes_20).await;
        device.raw.send(&packet(first, &[&[0, 1, 0][..], &body].concat())).await;
        // Neither does its DISCONNECT say more than the device takes.
        assert_eq!(device.raw.answer().await, Answer::Packet(0xE0, vec![0x95]));
        assert_eq!(device.raw.answer().await, Answer::Closed);
    }
    // [MQTT-3.2.2-19]: a refusal that would be too large with its reason comes without.
    let refused = |max: u32| {
        let mut body = string("MQTT");
        body.extend_from_slice(&[5, 0xC2, 0, 60, 5, 0x27]);
        body.extend_from_slice(&max.to_be_bytes());
        body.extend([string("x"), string("alice"), string("not.a.token")].concat());
        packet(0x10, &body)
    };
    for (max, has_reason) in [(1000, true), (12, false)] {
        let mut raw = Raw::connect(mqtt).await;
        raw.send(&refused(max)).await;
        match raw.answer().await {
            Answer::Packet(0x20, body) => {
                assert!(body[1] >= 0x80 && body.len() + 2 <= max as usize, "{body:02x?}");
                assert_eq!(body.get(3) == Some(&0x1F), has_reason, "{body:02x?}");
            }
            other => panic!("{other:02x?}"),
        }
    }
    device_still_served(mqtt).await;
}

async fn device_still_served(mqtt: SocketAddr) {
    device(mqtt, 5, "is served").await.nothing().await;
}

/// [MQTT-3.1.2-29]: without Request Problem Information no answer but CONNACK and DISCONNECT has a reason string.
#[tokio::test]
async fn no_reasons_for_who_does_not_ask() {
    let server = Server::start().await;
    let mut device =
        Device::connect(server.addresses().mqtt, &Connect::new(5, "quiet").with(0x17, &[0])).await;
    let long = "x".repeat(TOO_LONG);
    device.raw.send(&mqtt::subscribe(5, 1, &long, 1)).await;
    assert_eq!(device.raw.answer().await, Answer::Packet(0x90, vec![0, 1, 0, 0x8F]));
    device.publish(&Publish::new(1, 2, &long, "x")).await;
    match device.raw.answer().await {
        Answer::Packet(0x40, body) => {
            assert!(body[2] >= 0x80 && body.len() == 3, "{body:02x?}");
        }
        // A topic name that is not valid may end the connection (§4.13.2): with no word about why.
        Answer::Packet(0xE0, body) => assert_eq!(body.len(), 1, "{body:02x?}"),
        other => panic!("{other:02x?}"),
    }
}

/// [MQTT-3.1.3-6], [MQTT-3.1.3-7], [MQTT-3.2.2-16].
#[tokio::test]
async fn an_empty_client_id_is_given_one_of_its_own() {
    let server = Server::start().await;
    let mqtt = server.addresses().mqtt;
    let assigned = |device: &Device| -> String {
        let at = device.connack.iter().position(|&byte| byte == 0x12).expect("Assigned Client Identifier");
        let length = usize::from(u16::from_be_bytes([device.connack[at + 1], device.connack[at + 2]]));
        String::from_utf8(device.connack[at + 3..at + 3 + length].to_vec()).unwrap()
    };
    let mut devices = Vec::new();
    for _ in 0..20 {
        devices.push(device(mqtt, 5, "").await);
    }
    let names: HashSet<String> = devices.iter().map(assigned).collect();
    assert_eq!(names.len(), 20, "each has its own: {names:?}");
    for device in &mut devices {
        device.nothing().await;
    }
    // It is the client id that the session is found by.
    let mut kept = Device::connect(mqtt, &Connect { client_id: String::new(), ..Connect::kept(5, "") }).await;
    let name = assigned(&kept);
    assert_eq!(kept.subscribe("assigned", 1).await, 1);
    kept.raw.send(&[0xE0, 0]).await;
    assert!(Device::connect(mqtt, &Connect::kept(5, &name)).await.is_present);
    // 3.1.1 has no way to tell it, and no need to.
    device(mqtt, 4, "").await.nothing().await;
}

/// [MQTT-3.3.4-3] to [MQTT-3.3.4-5]: the identifiers of all subscriptions that match, in one message.
#[tokio::test]
async fn a_message_has_the_identifiers_of_all_that_match() {
    let server = Server::start().await;
    let mut device = device(server.addresses().mqtt, 5, "identified").await;
    for (filter, identifier) in [("ids/a", &[7][..]), ("ids/+", &[0x80, 1]), ("ids/#", &[]), ("other", &[9])]
    {
        let properties = match identifier {
            [] => vec![0],
            some => [&[some.len() as u8 + 1, 0x0B], some].concat(),
        };
        device.raw.send(&packet(0x82, &[&[0, 1][..], &properties, &string(filter), &[1]].concat())).await;
        assert!(matches!(device.raw.answer().await, Answer::Packet(0x90, _)));
    }
    device.raw.send(&mqtt::publish(5, "ids/a", b"x", None)).await;
    let got = device.got().await;
    let mut ids: Vec<&[u8]> =
        got.properties.iter().filter(|(id, _)| *id == 0x0B).map(|(_, value)| &value[..]).collect();
    ids.sort_unstable();
    assert_eq!(ids, [&[7][..], &[0x80, 1]]);
    device.nothing().await;
}

/// [MQTT-3.14.0-1]: who is refused, whatever he says behind his CONNECT, gets a CONNACK and the end.
#[tokio::test]
async fn who_is_refused_gets_no_disconnect() {
    let server = Server::start().await;
    let broken = packet(0x36, &string("t"));
    let connects = [
        mqtt::connect_with_token(5, "x", "not.a.token"),
        packet(0x10, &[string("MQTT"), vec![6, 2, 0, 60, 0, 0, 1, b'x']].concat()),
    ];
    for connect in connects {
        let mut raw = Raw::connect(server.addresses().mqtt).await;
        raw.send(&[connect, broken.clone(), vec![0xF0, 0]].concat()).await;
        assert!(matches!(raw.answer().await, Answer::Packet(0x20, body) if body[1] >= 0x80));
        assert_eq!(raw.answer().await, Answer::Closed);
    }
}

/// [MQTT-3.14.2-2], and what may be changed.
#[tokio::test]
async fn a_disconnect_may_change_the_expiry_but_not_from_0() {
    let server = Server::start().await;
    let mqtt = server.addresses().mqtt;
    let leaves_with = |seconds: u32| packet(0xE0, &[&[0, 5, 0x11][..], &seconds.to_be_bytes()].concat());
    let mut device = device(mqtt, 5, "none").await;
    device.raw.send(&leaves_with(5)).await;
    assert_eq!(disconnected(&mut device.raw).await, 0x82);
    for (seconds, is_kept) in [(600, true), (0, false)] {
        let kept = Connect::kept(5, &format!("kept-{seconds}"));
        let mut device = Device::connect(mqtt, &kept).await;
        assert_eq!(device.subscribe("expiry", 1).await, 1);
        device.raw.send(&leaves_with(seconds)).await;
        assert_eq!(device.raw.answer().await, Answer::Closed);
        assert_eq!(Device::connect(mqtt, &kept).await.is_present, is_kept, "expiry {seconds}");
    }
}

/// [MQTT-4.3.3-13], and the sender's side of it: the exchange goes on when the message has expired under way.
#[tokio::test]
async fn expiry_does_not_stop_an_exchange() {
    let server = Server::start().await;
    let mqtt = server.addresses().mqtt;
    let (mut receiver, mut sender) = (device(mqtt, 5, "receiver").await, device(mqtt, 5, "sender").await);
    assert_eq!(receiver.subscribe("brief", 2).await, 2);
    sender.publish(&Publish::new(2, 7, "brief", "x").with(0x02, &1_u32.to_be_bytes())).await;
    assert_eq!(sender.acked(PUBREC, 7).await, 0);
    let got = receiver.got().await;
    tokio::time::sleep(Duration::from_millis(2200)).await;
    sender.ack(PUBREL, 7).await;
    assert_eq!(sender.acked(PUBCOMP, 7).await, 0);
    receiver.ack(PUBREC, got.id).await;
    assert_eq!(receiver.acked(PUBREL, got.id).await, 0);
    receiver.ack(PUBCOMP, got.id).await;
    receiver.nothing().await;
}

/// [MQTT-4.8.2-6]: a member that refuses a message has had it.
#[tokio::test]
async fn what_a_member_refuses_goes_to_nobody_else() {
    let server = Server::start().await;
    let mqtt = server.addresses().mqtt;
    let (mut one, mut two) = (device(mqtt, 5, "one").await, device(mqtt, 5, "two").await);
    let mut sender = device(mqtt, 5, "sender").await;
    for member in [&mut one, &mut two] {
        assert_eq!(member.subscribe("$share/g/refused", 1).await, 1);
    }
    for (id, payload) in [(1, "first"), (2, "second")] {
        sender.publish(&Publish::new(1, id, "refused", payload)).await;
        assert_eq!(sender.acked(PUBACK, id).await, 0);
    }
    let (for_one, for_two) = (one.got().await, two.got().await);
    assert_ne!(for_one.payload, for_two.payload);
    one.raw.send(&packet(PUBACK, &[&for_one.id.to_be_bytes()[..], &[0x83]].concat())).await;
    two.ack(PUBACK, for_two.id).await;
    one.raw.send(&[0xE0, 0]).await;
    // Longer than it takes to hand a message on.
    tokio::time::sleep(Duration::from_millis(700)).await;
    two.nothing().await;
}

/// 3.1.1, [MQTT-3.3.5-2]: a PUBLISH that is not allowed is acknowledged, and goes nowhere.
#[tokio::test]
async fn a_forbidden_publish_of_3_1_1_is_acknowledged_and_dropped() {
    let server = Server::start().await;
    server.cli(&["config", "set", "app/demo", "device_publish=[allowed/#]"]).await;
    let mqtt = server.addresses().mqtt;
    let mut five = device(mqtt, 5, "five").await;
    eventually("the rule is in force", || async {
        let mut five = device(mqtt, 5, "asks").await;
        five.publish(&Publish::new(1, 1, "forbidden", "asks")).await;
        match five.acked(PUBACK, 1).await {
            0x87 => Ok(()),
            other => Err(other),
        }
    })
    .await;
    let mut watcher = device(mqtt, 4, "watcher").await;
    assert_eq!(watcher.subscribe("#", 2).await, 2);
    let mut four = device(mqtt, 4, "four").await;
    four.publish(&Publish::new(1, 1, "forbidden", "x")).await;
    four.acked(PUBACK, 1).await;
    four.publish(&Publish::new(2, 2, "forbidden", "x")).await;
    four.acked(PUBREC, 2).await;
    four.ack(PUBREL, 2).await;
    four.acked(PUBCOMP, 2).await;
    four.publish(&Publish::new(0, 0, "forbidden", "x")).await;
    four.publish(&Publish::new(1, 3, "allowed/x", "y")).await;
    four.acked(PUBACK, 3).await;
    assert_eq!(watcher.got().await.topic, "allowed/x");
    watcher.nothing().await;
    five.publish(&Publish::new(2, 1, "forbidden", "x")).await;
    assert_eq!(five.acked(PUBREC, 1).await, 0x87);
}

/// 3.1.1, [MQTT-3.1.2-2]: MQTT 3.1 is told that its version is not served, in its own words.
#[tokio::test]
async fn mqtt_3_1_is_refused_with_return_code_1() {
    let server = Server::start().await;
    for (name, level) in [("MQIsdp", 3), ("MQTT", 3), ("MQTT", 2)] {
        let mut raw = Raw::connect(server.addresses().mqtt).await;
        raw.send(&packet(0x10, &[string(name), vec![level, 2, 0, 60], string("old")].concat())).await;
        assert_eq!(raw.answer().await, Answer::Packet(0x20, vec![0, 1]), "{name} {level}");
        assert_eq!(raw.answer().await, Answer::Closed);
    }
}

/// §3.14.2.1: a backend's kick is an administrative action.
#[tokio::test]
async fn who_is_kicked_is_told_so() {
    let server = Server::start().await;
    let mut device = device(server.addresses().mqtt, 5, "kicked").await;
    server.cli(&["kick", "kicked"]).await;
    assert_eq!(disconnected(&mut device.raw).await, 0x98);
}

/// Who goes on sending when it is disconnected is not cut off before it could hear why: its writes go through for a moment.
#[tokio::test]
async fn a_disconnect_is_heard_by_who_goes_on_sending() {
    let server = Server::start().await;
    let mut device = TcpStream::connect(server.addresses().mqtt).await.unwrap();
    device.write_all(&mqtt::connect(5, "talks", 60)).await.unwrap();
    // 64 unfinished at most, and two more.
    for id in 1..=66 {
        device.write_all(&Publish::new(2, id, "talks", "x").bytes(5)).await.unwrap();
    }
    // Long enough for the server to have closed it, not for it to have forgotten it.
    tokio::time::sleep(Duration::from_millis(300)).await;
    for id in 1_u16..=64 {
        let sent = device.write_all(&packet(PUBREL, &id.to_be_bytes())).await;
        assert!(sent.is_ok(), "PUBREL {id}: {sent:?}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let mut all = Vec::new();
    carillon_tests::within("the end", device.read_to_end(&mut all)).await.unwrap();
    let last = all.windows(4).rposition(|some| some[0] == 0xE0 && some[2] == 0x93);
    assert!(last.is_some(), "no DISCONNECT 0x93 in {all:02x?}");
}

/// Each test that the table names is one that exists.
#[test]
fn the_table_names_tests_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let read = |path: &str| {
        std::fs::read_to_string(root.join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
    };
    let table = read("docs/mqtt-conformance.md");
    let file = |module: &str| match module {
        "codec" => "gateway/src/codec/tests/malformed.rs".to_owned(),
        "vectors" | "server" | "round_trip" => format!("gateway/src/codec/tests/{module}.rs"),
        "codec::shared" => "gateway/src/codec/tests/shared.rs".to_owned(),
        "inflight" | "publishing" | "aliases" => format!("gateway/src/shard/{module}.rs"),
        "saver" => "hub/src/saver/conformance/sessions.rs".to_owned(),
        _ => format!("tests/tests/{module}.rs"),
    };
    let (mut named, mut wrong) = (0, Vec::new());
    let mut statements = 0;
    for line in table.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| ---")) {
        let Some(shown) = line.trim_end_matches('|').rsplit(" | ").next() else { continue };
        statements += 1;
        if shown.trim() == "–" {
            wrong.push(format!("no test: {line}"));
        }
        for name in shown.split('`').skip(1).step_by(2) {
            named += 1;
            let exists = if name.contains('/') {
                root.join(name).is_file()
            } else if !name.starts_with(char::is_lowercase) || name.contains(' ') {
                // A byte, a packet, a setting: what the row talks of.
                true
            } else if let Some((module, test)) = name.rsplit_once("::").filter(|_| name != "codec::shared") {
                let text = read(&file(module));
                // A function, or the name in the list that a macro makes tests of.
                let is_listed = |line: &str| line.trim().trim_end_matches(';') == test;
                text.contains(&format!("fn {test}(")) || text.lines().any(is_listed)
            } else if name.contains('_') {
                ["sessions", "logs", "retention"].iter().any(|part| {
                    read(&format!("hub/src/saver/conformance/{part}.rs")).contains(&format!("fn {name}("))
                })
            } else {
                root.join(file(name)).is_file()
            };
            if !exists {
                wrong.push(format!("no such test: {name}: {line}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(statements > 100 && named > 150, "{statements} rows with {named} names: is it the table?");
}
