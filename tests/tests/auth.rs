//! Who a device is and what it may do: tokens, their keys, their end; several apps on one connection; guesses; and that
//! nothing secret is told to a log.

use std::time::{Duration, SystemTime};

use carillon_tests::mqtt::{self, Answer, Raw};
use carillon_tests::tools::{Running, find, mosquitto, run, succeed};
use carillon_tests::{Server, eventually};
use reqwest::Method;
use serde_json::{Value, json};

const SECRET: &str = "the-first-secret-of-at-least-32-bytes";
const SECOND: &str = "another-secret-of-at-least-32-bytes!!";
const API_KEY: &str = "an-api-key-of-shop";
const SHOP: &str = "{api_keys: [{name: k, key: an-api-key-of-shop}], token_keys: [{id: k1, algorithm: HS256, \
    key: the-first-secret-of-at-least-32-bytes}], device_publish: ['up/#', 'd/{user}/#'], \
    device_subscribe: ['u/{user}', 'g/#', 'd/#']}";

fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs()
}

fn signed(secret: &str, claims: Value) -> String {
    let mut all = json!({"app": "shop", "sub": "bob", "iat": now(), "exp": now() + 3600});
    all.as_object_mut().unwrap().extend(claims.as_object().unwrap().clone());
    let key = jsonwebtoken::EncodingKey::from_secret(secret.as_bytes());
    jsonwebtoken::encode(&jsonwebtoken::Header::new(jsonwebtoken::Algorithm::HS256), &all, &key).unwrap()
}

fn token(claims: Value) -> String {
    signed(SECRET, claims)
}

/// Publishes a document as a whole.
async fn document(server: &Server, name: &str, yaml: &str) {
    let file = server.data_dir().with_extension("yaml");
    std::fs::write(&file, yaml).unwrap();
    server.cli(&["config", "set", name, "--file", file.to_str().unwrap()]).await;
}

/// With the app `shop` beside `demo`.
async fn with_shop(extra: &[&str]) -> Server {
    let server = Server::start_with(extra).await;
    document(&server, "app/shop", SHOP).await;
    let known = token(json!({}));
    eventually("the app is known", || async {
        match connack(&server, 5, &known).await.1 {
            Some(0) => Ok(()),
            other => Err(other),
        }
    })
    .await;
    server
}

async fn connack(server: &Server, version: u8, token: &str) -> (Raw, Option<u8>) {
    connack_from(server, "127.0.0.1", version, token).await
}

async fn connack_from(server: &Server, from: &str, version: u8, token: &str) -> (Raw, Option<u8>) {
    let mut raw = Raw::connect_from(from, server.addresses().mqtt).await;
    raw.send(&mqtt::connect_with_token(version, "phone", token)).await;
    match raw.answer().await {
        Answer::Packet(0x20, body) => (raw, Some(body[1])),
        Answer::Closed => (raw, None),
        other => panic!("neither CONNACK nor the end but {other:02x?}"),
    }
}

/// A request to the API of `shop`.
async fn shop(server: &Server, method: Method, path: &str, body: Option<Value>) -> Value {
    let url = format!("{}/v1/apps/shop/{path}", server.addresses().http);
    let mut request = reqwest::Client::new().request(method, url).bearer_auth(API_KEY);
    if let Some(body) = body {
        request = request.json(&body);
    }
    let response = request.send().await.expect("an answer");
    let status = response.status();
    let text = response.text().await.expect("a body");
    assert!(status.is_success(), "{path}: {status}: {text}");
    serde_json::from_str(&text).expect("JSON")
}

async fn push_to_bob(server: &Server, text: &str) {
    shop(server, Method::POST, "users/bob/messages", Some(json!({"payload": text}))).await;
}

async fn subscribe(raw: &mut Raw, packet: &[u8]) -> u8 {
    raw.send(packet).await;
    match raw.answer().await {
        Answer::Packet(0x90, body) => *body.last().unwrap(),
        other => panic!("no SUBACK but {other:02x?}"),
    }
}

/// The reason code of the PUBACK of version 5.
async fn publish(raw: &mut Raw, topic: &str) -> u8 {
    raw.send(&mqtt::publish(5, topic, b"x", Some(9))).await;
    match raw.answer().await {
        Answer::Packet(0x40, body) => body.get(2).copied().unwrap_or(0),
        other => panic!("no PUBACK but {other:02x?}"),
    }
}

/// The next message: topic and payload (of version 5, with QoS 1); acknowledged.
async fn message(raw: &mut Raw) -> (String, String) {
    match raw.answer().await {
        Answer::Packet(0x32, body) => {
            let length = usize::from(body[0]) << 8 | usize::from(body[1]);
            let topic = String::from_utf8(body[2..2 + length].to_vec()).unwrap();
            raw.send(&mqtt::packet(0x40, &body[2 + length..4 + length])).await;
            // Properties of less than 128 bytes.
            let properties = usize::from(body[4 + length]);
            assert!(properties < 0x80);
            (topic, String::from_utf8(body[5 + length + properties..].to_vec()).unwrap())
        }
        other => panic!("no message but {other:02x?}"),
    }
}

fn text(topic: &str, payload: &str) -> (String, String) {
    (topic.to_owned(), payload.to_owned())
}

#[tokio::test]
async fn several_apps_on_one_connection() {
    let server = with_shop(&[]).await;
    let mut raw = Raw::device(server.addresses().mqtt, 5, "alice").await;
    assert_eq!(subscribe(&mut raw, &mqtt::subscribe(5, 1, "u/alice", 1)).await, 1);
    // Without a token it is a topic of the root app: `demo/shop/u/bob`.
    push_to_bob(&server, "waits").await;

    let bobs = token(json!({}));
    let with_token = |filter: &str| mqtt::subscribe_with_token(2, filter, 1, &bobs);
    assert_eq!(subscribe(&mut raw, &with_token("shop/u/bob")).await, 1);
    assert_eq!(message(&mut raw).await, text("shop/u/bob", "waits"));
    push_to_bob(&server, "live").await;
    assert_eq!(message(&mut raw).await, text("shop/u/bob", "live"));
    server.push("alice", "and demo").await;
    assert_eq!(message(&mut raw).await, text("u/alice", "and demo"));

    // By the rights of its user in that app, `{user}` filled in; the token need not be sent again.
    for (filter, code) in [("shop/u/alice", 0x87), ("shop/g/x", 1), ("shop/#", 0x87), ("shop/up/x", 0x87)] {
        assert_eq!(subscribe(&mut raw, &mqtt::subscribe(5, 3, filter, 1)).await, code, "{filter}");
    }
    for (topic, code) in
        [("shop/up/x", 0), ("shop/d/bob/x", 0), ("shop/d/alice/x", 0x87), ("shop/u/bob", 0x87), ("any", 0)]
    {
        assert_eq!(publish(&mut raw, topic).await, code, "{topic}");
    }
    // Another user of the same app, a token for someone else's client id, one that is none.
    for bad in [token(json!({"sub": "eve"})), token(json!({"client_id": "tv"})), "no.such.token".to_owned()] {
        let code = subscribe(&mut raw, &mqtt::subscribe_with_token(4, "shop/g/x", 1, &bad)).await;
        assert_eq!(code, 0x87);
    }

    // Its user is online in that app, and only for as long.
    eventually("bob is online", || async {
        let user = shop(&server, Method::GET, "users/bob", None).await;
        if user["online"] == true && user["sessions"][0]["device"] == "alice" { Ok(()) } else { Err(user) }
    })
    .await;
    // Kicked from shop, it stays in demo; with its token it may come back.
    let kicked = shop(&server, Method::DELETE, "users/bob/sessions", None).await;
    assert_eq!(kicked["kicked"], 1);
    push_to_bob(&server, "unheard").await;
    server.push("alice", "still here").await;
    assert_eq!(message(&mut raw).await, text("u/alice", "still here"));
    assert_eq!(publish(&mut raw, "shop/up/x").await, 0x87);
    assert_eq!(subscribe(&mut raw, &with_token("shop/u/bob")).await, 1);
    assert_eq!(message(&mut raw).await, text("shop/u/bob", "unheard"));
    drop(raw);
    eventually("bob is offline", || async {
        let user = shop(&server, Method::GET, "users/bob", None).await;
        if user["online"] == false { Ok(()) } else { Err(user) }
    })
    .await;

    // What was acked is consumed: the inbox begins with what came since.
    push_to_bob(&server, "later").await;
    let mut raw = Raw::device(server.addresses().mqtt, 5, "alice").await;
    assert_eq!(subscribe(&mut raw, &with_token("shop/u/bob")).await, 1);
    assert_eq!(message(&mut raw).await, text("shop/u/bob", "later"));
    raw.send(&mqtt::packet(0xA2, &[&[0, 5, 0][..], &mqtt::string("shop/u/bob")].concat())).await;
    assert_eq!(raw.answer().await, Answer::Packet(0xB0, vec![0, 5, 0, 0]), "UNSUBACK");
    push_to_bob(&server, "unheard").await;
    assert_eq!(raw.answer_within(Duration::from_millis(500)).await, Answer::Silence);
}

#[tokio::test]
async fn unfinished_qos_2_of_a_further_app_outlives_the_connection() {
    let server = with_shop(&[]).await;
    let mqtt = server.addresses().mqtt;
    let bobs = token(json!({}));
    let kept = mqtt::Connect::kept(5, "alice");
    let mut device = mqtt::Device::connect(mqtt, &kept).await;
    // Not the first identifiers, so that they cannot be right by chance.
    assert_eq!(device.subscribe("hello", 1).await, 1);
    server.publish("hello", "own").await;
    let own = device.got().await;
    assert_eq!(subscribe(&mut device.raw, &mqtt::subscribe_with_token(2, "shop/u/bob", 2, &bobs)).await, 2);
    let message = json!({"payload": "for bob", "qos": 2});
    shop(&server, Method::POST, "users/bob/messages", Some(message)).await;
    let got = device.got().await;
    assert_eq!((got.qos, got.id, got.payload.as_str()), (2, 2, "for bob"));
    device.publish(&mqtt::Publish::new(2, 50, "shop/up/x", "from bob")).await;
    assert!(device.acked(0x50, 50).await < 0x80);
    drop(device);

    let mut device = mqtt::Device::connect(mqtt, &kept).await;
    assert!(device.is_present);
    // It may have been received: what was sent with this identifier is finished before another message has it.
    assert_eq!(device.acked(0x62, got.id).await, 0);
    assert_eq!(device.got().await, mqtt::Publish { dup: true, ..own });
    device.ack(0x70, got.id).await;
    // What the device had sent is remembered as well, without the token.
    device.publish(&mqtt::Publish::new(2, 50, "shop/up/x", "from bob").dup()).await;
    assert_eq!(device.acked(0x50, 50).await, 0);
    device.ack(0x62, 50).await;
    assert_eq!(device.acked(0x70, 50).await, 0);
    // Nobody has consumed the message.
    device.raw.send(&mqtt::subscribe_with_token(2, "shop/u/bob", 2, &bobs)).await;
    assert!(matches!(device.raw.answer().await, Answer::Packet(0x90, _)));
    let again = device.got().await;
    assert_eq!((again.payload.as_str(), again.dup), ("for bob", false));
}

#[tokio::test]
async fn the_end_of_a_further_token_ends_its_app_alone() {
    let server = with_shop(&[]).await;
    server.cli(&["config", "set", "gateway", "token_leeway_seconds=0"]).await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let mut raw = Raw::device(server.addresses().mqtt, 5, "alice").await;
    assert_eq!(subscribe(&mut raw, &mqtt::subscribe(5, 1, "u/alice", 1)).await, 1);
    let short = token(json!({"exp": now() + 3}));
    for filter in ["shop/u/bob", "shop/g/x"] {
        assert_eq!(subscribe(&mut raw, &mqtt::subscribe_with_token(2, filter, 1, &short)).await, 1);
    }
    push_to_bob(&server, "in time").await;
    assert_eq!(message(&mut raw).await, text("shop/u/bob", "in time"));
    assert_eq!(publish(&mut raw, "shop/up/x").await, 0);
    tokio::time::sleep(Duration::from_millis(4500)).await;

    push_to_bob(&server, "too late").await;
    shop(&server, Method::POST, "groups/x/messages", Some(json!({"payload": "too late"}))).await;
    server.push("alice", "goes on").await;
    assert_eq!(message(&mut raw).await, text("u/alice", "goes on"), "and nothing of shop");
    // Refused, and not taken for a topic of the root app.
    assert_eq!(publish(&mut raw, "shop/up/x").await, 0x87);
    assert_eq!(subscribe(&mut raw, &mqtt::subscribe(5, 3, "shop/u/bob", 1)).await, 0x87);
    assert_eq!(subscribe(&mut raw, &mqtt::subscribe_with_token(3, "shop/u/bob", 1, &short)).await, 0x87);
    let user = shop(&server, Method::GET, "users/bob", None).await;
    assert_eq!(user["online"], false, "{user}");
    // A new token, and it goes on where it was.
    let next = token(json!({}));
    assert_eq!(subscribe(&mut raw, &mqtt::subscribe_with_token(4, "shop/u/bob", 1, &next)).await, 1);
    assert_eq!(message(&mut raw).await, text("shop/u/bob", "too late"));
    // A new token in time has no end in between.
    let short = token(json!({"exp": now() + 2}));
    assert_eq!(subscribe(&mut raw, &mqtt::subscribe_with_token(5, "shop/g/y", 1, &short)).await, 1);
    assert_eq!(subscribe(&mut raw, &mqtt::subscribe_with_token(6, "shop/g/y", 1, &next)).await, 1);
    tokio::time::sleep(Duration::from_millis(3500)).await;
    push_to_bob(&server, "still").await;
    assert_eq!(message(&mut raw).await, text("shop/u/bob", "still"));
}

#[tokio::test]
async fn a_session_that_is_kept_keeps_its_own_app() {
    let server = with_shop(&[]).await;
    let keep = {
        // Clean start 0, session expiry 3600.
        let mut body = mqtt::string("MQTT");
        body.extend_from_slice(&[5, 0, 0, 60, 5, 0x11, 0, 0, 0x0E, 0x10]);
        body.extend_from_slice(&mqtt::string("alice"));
        mqtt::packet(0x10, &body)
    };
    let bobs = token(json!({}));
    for is_present in [0, 1] {
        let mut raw = Raw::connect(server.addresses().mqtt).await;
        raw.send(&keep).await;
        match raw.answer().await {
            Answer::Packet(0x20, body) => assert_eq!(body[..2], [is_present, 0]),
            other => panic!("{other:02x?}"),
        }
        if is_present == 1 {
            assert_eq!(message(&mut raw).await, text("demo/g/a", "missed"), "its own");
        } else {
            assert_eq!(subscribe(&mut raw, &mqtt::subscribe(5, 1, "demo/g/a", 1)).await, 1);
        }
        assert_eq!(subscribe(&mut raw, &mqtt::subscribe_with_token(2, "shop/u/bob", 1, &bobs)).await, 1);
        push_to_bob(&server, "one").await;
        assert_eq!(message(&mut raw).await, text("shop/u/bob", "one"));
        server.publish("g/a", "own").await;
        assert_eq!(message(&mut raw).await, text("demo/g/a", "own"));
        raw.send(&[0xE0, 0]).await;
        assert_eq!(raw.answer().await, Answer::Closed);
        server.publish("g/a", "missed").await;
    }
}

#[tokio::test]
async fn mosquitto_serves_two_apps() {
    if find("mosquitto_sub").is_none() {
        return;
    }
    let server = with_shop(&[]).await;
    let bobs = token(json!({}));
    let arguments = [
        "-i",
        "phone",
        "-u",
        "alice",
        "-d",
        "-F",
        "got %t %p",
        "-q",
        "1",
        "-t",
        "u/alice",
        "-t",
        "shop/u/bob",
        "-D",
        "subscribe",
        "user-property",
        "token",
        &bobs,
    ];
    let mut both =
        Running::start(mosquitto("mosquitto_sub", server.addresses().mqtt, "5", &arguments).unwrap());
    both.line_with("Subscribed (mid").await;
    push_to_bob(&server, "to bob").await;
    assert_eq!(both.line_with("got ").await, "got shop/u/bob to bob");
    server.push("alice", "to alice").await;
    assert_eq!(both.line_with("got ").await, "got u/alice to alice");
}

/// Device to device, and device to backend, by the app's rules: with other people's clients, in both versions.
#[tokio::test]
async fn devices_publish_by_the_rules_of_their_app() {
    if find("mosquitto_sub").is_none() {
        return;
    }
    let server = with_shop(&[]).await;
    let (bobs, eves) = (token(json!({})), token(json!({"sub": "eve"})));
    let limited = token(json!({"sub": "eve", "publish": ["d/bob/{user}"], "subscribe": []}));
    for version in ["311", "5"] {
        let listens =
            ["-i", "tv", "-u", "x", "-P", &bobs, "-t", "shop/d/#", "-q", "1", "-d", "-F", "got %t %p"];
        let mut bob =
            Running::start(mosquitto("mosquitto_sub", server.addresses().mqtt, version, &listens).unwrap());
        bob.line_with("Subscribed (mid").await;
        for (token, topic, text) in [
            (&eves, "shop/d/bob/x", "not allowed"),
            (&limited, "shop/d/eve/x", "not by its claims"),
            (&eves, "shop/d/eve/x", "by the rule"),
            (&limited, "shop/d/bob/eve", "by its claim"),
        ] {
            let sends = ["-u", "x", "-P", token, "-t", topic, "-q", "1", "-m", text];
            run(mosquitto("mosquitto_pub", server.addresses().mqtt, version, &sends).unwrap()).await;
        }
        assert_eq!(bob.line_with("got ").await, "got shop/d/eve/x by the rule", "v{version}");
        assert_eq!(bob.line_with("got ").await, "got shop/d/bob/eve by its claim", "v{version}");
        bob.kill().await;
        let upstream =
            ["-u", "x", "-P", &bobs, "-t", "shop/up/order", "-q", "1", "-m", &format!("from v{version}")];
        succeed(mosquitto("mosquitto_pub", server.addresses().mqtt, version, &upstream).unwrap()).await;
    }
    let log = shop(&server, Method::GET, "topics/up/order/messages", None).await;
    let payloads: Vec<&str> =
        log["messages"].as_array().unwrap().iter().map(|m| m["payload"].as_str().unwrap()).collect();
    assert_eq!(payloads, ["from v311", "from v5"]);
}

#[tokio::test]
async fn keys_of_tokens_rotate_live() {
    let server = with_shop(&[]).await;
    let (old, new) = (signed(SECRET, json!({})), signed(SECOND, json!({"sub": "eve"})));
    let (mut connected, code) = connack(&server, 5, &old).await;
    assert_eq!(code, Some(0));
    assert_eq!(connack(&server, 5, &new).await.1, Some(0x86), "nobody knows the second key");
    let second = format!("{{id: k2, algorithm: HS256, key: '{SECOND}'}}");
    server.cli(&["config", "set", "app/shop", &format!("token_keys[1]={second}")]).await;
    eventually("both are good", || async {
        match connack(&server, 5, &new).await.1 {
            Some(0) => Ok(()),
            other => Err(other),
        }
    })
    .await;
    server.cli(&["config", "set", "app/shop", &format!("token_keys=[{second}]")]).await;
    eventually("the first is not", || async {
        // As another device, for the one that is connected is to stay.
        let mut raw = Raw::connect(server.addresses().mqtt).await;
        raw.send(&mqtt::connect_with_token(4, "tv", &old)).await;
        match raw.answer().await {
            Answer::Packet(0x20, body) if body[1] == 4 => Ok(()),
            other => Err(other),
        }
    })
    .await;
    assert_eq!(connack(&server, 5, &new).await.1, Some(0));
    connected.send(&[0xC0, 0]).await;
    assert_eq!(connected.answer().await, Answer::Packet(0xD0, vec![]), "who is connected stays");
}

#[tokio::test]
async fn a_users_tokens_are_revoked_live() {
    let server = with_shop(&[]).await;
    let bobs = token(json!({}));
    let (mut bob, _) = connack(&server, 5, &bobs).await;
    let (mut eve, _) = connack(&server, 5, &token(json!({"sub": "eve"}))).await;
    // Bob is also a guest on somebody's connection.
    let mut host = Raw::device(server.addresses().mqtt, 5, "alice").await;
    assert_eq!(subscribe(&mut host, &mqtt::subscribe_with_token(2, "shop/u/bob", 1, &bobs)).await, 1);

    let answer = shop(&server, Method::POST, "users/bob/revoke", Some(json!({}))).await;
    let before = answer["before"].as_u64().unwrap();
    assert_eq!(bob.answer().await.disconnect(), Some(0x87), "not authorized");
    assert_eq!(bob.answer().await, Answer::Closed);
    assert_eq!(connack(&server, 5, &bobs).await.1, Some(0x87));
    assert_eq!(connack(&server, 4, &bobs).await.1, Some(5), "not authorized");
    assert_eq!(connack(&server, 5, &token(json!({"iat": null}))).await.1.map(|code| code != 0), Some(true));
    let without_iat = {
        let mut claims = json!({"app": "shop", "sub": "bob"});
        claims["exp"] = json!(now() + 3600);
        let key = jsonwebtoken::EncodingKey::from_secret(SECRET.as_bytes());
        jsonwebtoken::encode(&jsonwebtoken::Header::default(), &claims, &key).unwrap()
    };
    assert_eq!(connack(&server, 5, &without_iat).await.1, Some(0x87), "it does not say when it was issued");
    let later = token(json!({"iat": before}));
    assert_eq!(connack(&server, 5, &later).await.1, Some(0), "a new one is good");

    let host = tokio::sync::Mutex::new(host);
    eventually("the guest is out", || async {
        match publish(&mut *host.lock().await, "shop/up/x").await {
            0x87 => Ok(()),
            other => Err(other),
        }
    })
    .await;
    eve.send(&[0xC0, 0]).await;
    assert_eq!(eve.answer().await, Answer::Packet(0xD0, vec![]), "others stay");
    let counted = |name: &'static str| server.metric(name);
    assert_eq!(counted("carillon_gateway_disconnects_total{reason=\"revoked\"}").await, 1.0);
    assert!(counted("carillon_gateway_auth_failures_total{reason=\"revoked\"}").await >= 3.0);

    // One token by its id, through the configuration; and by the command line, in the app that it speaks for.
    let named = token(json!({"sub": "eve", "jti": "lost-phone", "iat": before}));
    let (mut lost, code) = connack(&server, 5, &named).await;
    assert_eq!(code, Some(0));
    server.cli(&["config", "set", "revoked/shop", "tokens.lost-phone=0"]).await;
    assert_eq!(lost.answer().await.disconnect(), Some(0x87));
    assert_eq!(connack(&server, 5, &named).await.1, Some(0x87));
    assert_eq!(connack(&server, 5, &token(json!({"sub": "eve", "jti": "found"}))).await.1, Some(0));
    assert_eq!(connack(&server, 5, &bobs).await.1, Some(0x87), "the user's entry is still there");
    let said = server.cli(&["revoke", "carol"]).await;
    assert!(said.contains("tokens of carol"), "{said}");
    let document = server.cli(&["config", "get", "revoked/demo"]).await;
    assert!(document.contains("carol"), "{document}");
}

#[tokio::test]
async fn who_guesses_is_refused_for_a_while() {
    let server = with_shop(&[]).await;
    server
        .cli(&[
            "config",
            "set",
            "gateway",
            "max_auth_failures=3",
            "auth_block_seconds=3",
            "token_leeway_seconds=0",
        ])
        .await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let (forged, expired) = (signed(SECOND, json!({})), token(json!({"exp": now() - 10})));
    // Tokens that were good once are no guesses, however many.
    for _ in 0..5 {
        assert_eq!(connack_from(&server, "127.0.0.2", 5, &expired).await.1, Some(0x86));
    }
    for _ in 0..3 {
        assert_eq!(connack_from(&server, "127.0.0.2", 5, &forged).await.1, Some(0x86));
    }
    let good = token(json!({}));
    assert_eq!(connack_from(&server, "127.0.0.2", 5, &good).await.1, None, "closed at once, good or not");
    assert_eq!(connack_from(&server, "127.0.0.3", 5, &good).await.1, Some(0), "others are not meant");
    let metric = |name: &'static str| server.metric(name);
    assert_eq!(metric("carillon_gateway_auth_failures_total{reason=\"signature\"}").await, 3.0);
    assert_eq!(metric("carillon_gateway_auth_failures_total{reason=\"expired\"}").await, 5.0);
    assert_eq!(metric("carillon_gateway_accepts_refused_total{reason=\"auth_failures\"}").await, 1.0);
    // Nor does it help to be in already, and to guess with SUBSCRIBEs.
    let mut raw = Raw::device(server.addresses().mqtt, 5, "insider").await;
    for _ in 0..2 {
        let code = subscribe(&mut raw, &mqtt::subscribe_with_token(2, "shop/g/x", 1, &forged)).await;
        assert_eq!(code, 0x87);
    }
    raw.send(&mqtt::subscribe_with_token(2, "shop/g/x", 1, &forged)).await;
    assert_eq!(raw.answer().await.disconnect(), Some(0x87));
    assert_eq!(raw.answer().await, Answer::Closed);
    eventually("it is forgiven", || async {
        match connack_from(&server, "127.0.0.2", 5, &good).await.1 {
            Some(0) => Ok(()),
            other => Err(other),
        }
    })
    .await;
}

/// Everything at the level that tells most, of libraries too.
#[tokio::test]
async fn nothing_secret_is_logged_at_any_level() {
    let server = with_shop(&[]).await;
    let status: Value =
        serde_json::from_str(&server.cli(&["config", "status", "--output", "json"]).await).unwrap();
    let instance = status[0]["instance"].as_str().expect("an instance").to_owned();
    server.cli(&["command", &instance, "log-level", "level=trace,carillon=trace"]).await;
    let second = format!("token_keys[1]={{id: k2, algorithm: HS256, key: '{SECOND}'}}");
    server.cli(&["config", "set", "app/shop", &second]).await;
    let (good, forged) = (token(json!({})), signed("a-forgers-secret-of-at-least-32-bytes", json!({})));
    let (mut device, code) = connack(&server, 5, &good).await;
    assert_eq!(code, Some(0));
    assert_eq!(connack(&server, 5, &forged).await.1, Some(0x86));
    assert_eq!(connack(&server, 4, "hunter2-is-no-token").await.1, Some(4));
    let mut host = Raw::device(server.addresses().mqtt, 5, "alice").await;
    assert_eq!(subscribe(&mut host, &mqtt::subscribe_with_token(2, "shop/g/x", 1, &good)).await, 1);
    assert_eq!(subscribe(&mut host, &mqtt::subscribe_with_token(2, "shop/g/x", 1, &forged)).await, 0x87);
    push_to_bob(&server, "a-secret-payload-from-behind").await;
    assert_eq!(subscribe(&mut device, &mqtt::subscribe(5, 2, "shop/u/bob", 1)).await, 1);
    assert_eq!(message(&mut device).await.1, "a-secret-payload-from-behind");
    device.send(&mqtt::publish(5, "shop/up/x", b"a-secret-payload-from-a-device", Some(5))).await;
    assert!(matches!(device.answer().await, Answer::Packet(0x40, _)));
    device.send(&mqtt::publish(5, "shop/u/bob", b"a-secret-payload-refused", Some(6))).await;
    assert!(matches!(device.answer().await, Answer::Packet(0x40, _)));
    device.send(&[0xFF; 4]).await;
    assert!(device.answer().await.disconnect().is_some());
    shop(&server, Method::POST, "users/bob/revoke", Some(json!({}))).await;
    tokio::time::sleep(Duration::from_secs(2)).await;

    let logs = server.logs();
    for expected in ["TRACE", "connect refused", "connection ends"] {
        assert!(logs.contains(expected), "the log tells everything, but not {expected:?}");
    }
    let part = |token: &str, i: usize| token.split('.').nth(i).unwrap().to_owned();
    let secrets = [
        SECOND.to_owned(),
        API_KEY.to_owned(),
        server.addresses().api_key.clone(),
        "a-forgers-secret".to_owned(),
        "hunter2".to_owned(),
        "a-secret-payload".to_owned(),
        part(&good, 1),
        part(&good, 2),
        part(&forged, 2),
    ];
    let mut found = Vec::new();
    for secret in secrets {
        // As text, or as the numbers of a Vec<u8> that was printed.
        let numbers: Vec<String> = secret.bytes().map(|byte| byte.to_string()).collect();
        for shape in [secret.clone(), numbers.join(", ")] {
            if let Some(line) = logs.lines().find(|line| line.contains(&shape)) {
                found.push(format!("{secret}: {}", line.chars().take(400).collect::<String>()));
            }
        }
    }
    assert!(found.is_empty(), "in the log:\n{}", found.join("\n"));
}
