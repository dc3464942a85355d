//! What is not well formed gets a clear answer, and nobody else notices: MQTT packets, HTTP requests, tokens.

use std::time::Duration;

use carillon_tests::Server;
use carillon_tests::mqtt::{self, Answer, Raw, packet, string};
use reqwest::Method;
use serde_json::Value;

/// CONNECT with these bytes for what follows the protocol's name and level.
fn connect_with(name: &str, rest: &[u8]) -> Vec<u8> {
    packet(0x10, &[string(name), rest.to_vec()].concat())
}

#[tokio::test]
async fn a_broken_first_packet_is_answered_or_cut_off() {
    let server = Server::start().await;
    let id = string("x");
    let with_id = |head: &[u8]| [head, &id].concat();
    let refused = |code: u8| Some(code);
    let cases: Vec<(&str, Vec<u8>, Option<u8>)> = vec![
        // (what, bytes, the reason code of a CONNACK; None: the connection is closed without one)
        ("no MQTT at all", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(), None),
        ("a first packet that is no CONNECT", mqtt::publish(4, "a", b"x", None), None),
        ("PINGREQ first", vec![0xC0, 0], None),
        ("a packet type that does not exist", vec![0x00, 0], None),
        ("a length that never ends", vec![0x10, 0xFF, 0xFF, 0xFF, 0xFF, 0x01], None),
        (
            "reserved bits in the fixed header",
            {
                let mut bytes = mqtt::connect(4, "x", 60);
                bytes[0] = 0x11;
                bytes
            },
            None,
        ),
        ("another protocol's name", connect_with("MQIsdp", &with_id(&[3, 2, 0, 60])), None),
        ("a version of the future", connect_with("MQTT", &with_id(&[6, 2, 0, 60, 0])), refused(0x84)),
        ("the reserved connect flag", connect_with("MQTT", &with_id(&[4, 3, 0, 60])), None),
        (
            "a will of QoS 3",
            connect_with("MQTT", &[with_id(&[4, 0x1E, 0, 60]), string("t"), string("m")].concat()),
            None,
        ),
        ("a will that is not there", connect_with("MQTT", &with_id(&[4, 0x06, 0, 60])), None),
        (
            "a client id cut short",
            packet(0x10, &[&string("MQTT")[..], &[4, 2, 0, 60, 0, 9, b'x']].concat()),
            None,
        ),
        (
            "a client id that is not UTF-8",
            connect_with("MQTT", &[&[4, 2, 0, 60, 0, 2], &[0xC3, 0x28][..]].concat()),
            None,
        ),
        ("a client id with NUL", connect_with("MQTT", &[&[4, 2, 0, 60, 0, 1], &[0][..]].concat()), None),
        ("no client id with a session to keep", connect_with("MQTT", &[4, 0, 0, 60, 0, 0]), refused(0x02)),
        ("bytes after the end", packet(0x10, &[&mqtt::connect(4, "x", 60)[2..], b"more"].concat()), None),
        (
            "a property that does not exist",
            connect_with("MQTT", &with_id(&[5, 2, 0, 60, 2, 0x7F, 0])),
            refused(0x81),
        ),
        (
            "a property twice",
            connect_with("MQTT", &with_id(&[5, 2, 0, 60, 10, 0x11, 0, 0, 0, 1, 0x11, 0, 0, 0, 1])),
            refused(0x82),
        ),
        (
            "a receive maximum of 0",
            connect_with("MQTT", &with_id(&[5, 2, 0, 60, 3, 0x21, 0, 0])),
            refused(0x82),
        ),
        (
            "properties longer than the packet",
            connect_with("MQTT", &with_id(&[5, 2, 0, 60, 0x7F])),
            refused(0x81),
        ),
    ];
    for (what, bytes, expected) in cases {
        let mut raw = Raw::connect(server.addresses().mqtt).await;
        raw.send(&bytes).await;
        let answer = raw.answer().await;
        match (expected, &answer) {
            // Saying why is always allowed where closing is: but only ever with a failure.
            (None, Answer::Closed) => continue,
            (None, Answer::Packet(0x20, body)) => assert_ne!(body[1], 0, "{what}: accepted"),
            (Some(code), Answer::Packet(0x20, body)) => assert_eq!(body[1], code, "{what}"),
            _ => panic!("{what}: {answer:02x?}"),
        }
        assert_eq!(raw.answer().await, Answer::Closed, "{what}: it is closed then");
    }
    still_serves(&server).await;
}

#[tokio::test]
async fn a_broken_later_packet_ends_the_connection_with_its_reason() {
    let server = Server::start().await;
    let long = "l/".repeat(600);
    let deep = "/".repeat(40);
    let cases: Vec<(&str, Vec<u8>, u8)> = vec![
        ("a second CONNECT", mqtt::connect(5, "again", 60), 0x82),
        ("CONNACK from a client", vec![0x20, 3, 0, 0, 0], 0x82),
        ("AUTH that nobody asked for", vec![0xF0, 0], 0x82),
        (
            "QoS 3",
            {
                let mut bytes = mqtt::publish(5, "t", b"x", Some(1));
                bytes[0] = 0x36;
                bytes
            },
            0x81,
        ),
        ("a topic alias that was not set", packet(0x30, &[0, 0, 3, 0x23, 0, 1]), 0x82),
        ("packet id 0", mqtt::publish(5, "t", b"x", Some(0)), 0x82),
        ("a wildcard in a topic name", mqtt::publish(5, "t/#", b"x", Some(1)), 0x90),
        ("an empty topic without an alias", mqtt::publish(5, "", b"x", Some(1)), 0x82),
        ("a topic with NUL", mqtt::publish(5, "a\0b", b"x", Some(1)), 0x81),
        ("a topic that is not UTF-8", packet(0x30, &[0, 2, 0xC3, 0x28, 0]), 0x81),
        ("a topic longer than the packet", packet(0x30, &[0, 99, b't', 0]), 0x81),
        ("a topic alias that is too large", packet(0x30, &[0, 1, b't', 3, 0x23, 0xFF, 0xFF]), 0x94),
        ("SUBSCRIBE without a filter", packet(0x82, &[0, 1, 0]), 0x82),
        ("SUBSCRIBE with wrong bits", packet(0x80, &[&[0, 1, 0][..], &string("t"), &[1]].concat()), 0x81),
        ("subscription options from the future", mqtt::subscribe(5, 1, "t", 0xC0), 0x81),
        ("retain handling 3", mqtt::subscribe(5, 1, "t", 0x30), 0x82),
        ("UNSUBSCRIBE without a filter", packet(0xA2, &[0, 1, 0]), 0x82),
        ("PINGREQ with a body", vec![0xC0, 1, 0], 0x81),
        ("a length that never ends", vec![0x30, 0xFF, 0xFF, 0xFF, 0xFF, 0x01], 0x81),
        ("more than may be sent", vec![0x30, 0xFF, 0xFF, 0xFF, 0x7F], 0x95),
    ];
    for (what, bytes, reason) in cases {
        let mut raw = Raw::device(server.addresses().mqtt, 5, "malformed").await;
        raw.send(&bytes).await;
        match raw.answer().await {
            Answer::Packet(0xE0, body) => assert_eq!(body[0], reason, "{what}: {:#04x}", body[0]),
            other => panic!("{what}: no DISCONNECT but {other:02x?}"),
        }
        assert_eq!(raw.answer().await, Answer::Closed, "{what}");
    }
    // 3.1.1 has no DISCONNECT from the server: it is closed.
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("a second CONNECT", mqtt::connect(4, "again", 60)),
        ("CONNACK from a client", vec![0x20, 2, 0, 0]),
        ("AUTH, which 3.1.1 does not have", vec![0xF0, 0]),
        ("QoS 3", {
            let mut bytes = mqtt::publish(4, "t", b"x", Some(1));
            bytes[0] = 0x36;
            bytes
        }),
        ("packet id 0", mqtt::publish(4, "t", b"x", Some(0))),
        ("a wildcard in a topic name", mqtt::publish(4, "t/#", b"x", Some(1))),
        ("an empty topic", mqtt::publish(4, "", b"x", Some(1))),
        ("a topic longer than the packet", packet(0x30, &[0, 99, b't'])),
        ("SUBSCRIBE without a filter", packet(0x82, &[0, 1])),
        ("SUBSCRIBE with wrong bits", packet(0x80, &[&[0, 1][..], &string("t"), &[1]].concat())),
        ("SUBSCRIBE for QoS 3", mqtt::subscribe(4, 1, "t", 3)),
        ("PINGREQ with a body", vec![0xC0, 1, 0]),
        ("a length that never ends", vec![0x30, 0xFF, 0xFF, 0xFF, 0xFF, 0x01]),
        ("more than may be sent", vec![0x30, 0xFF, 0xFF, 0xFF, 0x7F]),
    ];
    for (what, bytes) in cases {
        let mut raw = Raw::device(server.addresses().mqtt, 4, "malformed").await;
        raw.send(&bytes).await;
        assert_eq!(raw.answer().await, Answer::Closed, "{what}, 3.1.1");
    }
    // Filters that are not valid are an answer of their own, and no reason to end the connection.
    let mut raw = Raw::device(server.addresses().mqtt, 5, "filters").await;
    for filter in ["a/#/b", "a#", "a+/b", &long, &deep, "$share//x", "$share/g"] {
        raw.send(&mqtt::subscribe(5, 7, filter, 1)).await;
        match raw.answer().await {
            Answer::Packet(0x90, body) => {
                assert!(matches!(body[3], 0x8F | 0x80), "{filter}: {:#04x}", body[3])
            }
            // A filter that is no filter may be a protocol error too (MQTT 5.0 §4.7.1).
            Answer::Packet(0xE0, body) => {
                assert!(matches!(body[0], 0x8F | 0x81 | 0x82), "{filter}: {:#04x}", body[0]);
                raw = Raw::device(server.addresses().mqtt, 5, "filters").await;
            }
            other => panic!("{filter}: {other:02x?}"),
        }
    }
    still_serves(&server).await;
}

#[tokio::test]
async fn who_says_nothing_or_too_slowly_is_let_go() {
    let server = Server::start().await;
    server.cli(&["config", "set", "gateway", "connect_timeout_ms=500"]).await;
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    loop {
        let mut silent = Raw::connect(server.addresses().mqtt).await;
        let mut slow = Raw::connect(server.addresses().mqtt).await;
        slow.send(&mqtt::connect(5, "slow", 60)[..5]).await;
        let answers = (
            silent.answer_within(Duration::from_secs(2)).await,
            slow.answer_within(Duration::from_secs(2)).await,
        );
        match answers {
            (Answer::Closed | Answer::Packet(..), Answer::Closed | Answer::Packet(..)) => break,
            other => assert!(tokio::time::Instant::now() < deadline, "still connected: {other:?}"),
        }
    }
    still_serves(&server).await;
}

#[tokio::test]
async fn tokens_that_are_none_are_refused() {
    let server = Server::start().await;
    let secret = "0123456789abcdef0123456789abcdef";
    server
        .cli(&[
            "config",
            "set",
            "app/demo",
            &format!("token_keys=[{{id: one, algorithm: HS256, key: {secret}}}]"),
        ])
        .await;
    // Tokens made with another implementation (see the comment of each).
    let cases = [
        ("not a token at all", "hunter2"),
        ("three parts of nothing", ".."),
        ("no base64", "a.b.c"),
        // {"alg":"none"} {"app":"demo","sub":"alice","exp":4102444800}
        (
            "algorithm none",
            "eyJhbGciOiJub25lIn0.eyJhcHAiOiJkZW1vIiwic3ViIjoiYWxpY2UiLCJleHAiOjQxMDI0NDQ4MDB9.",
        ),
        // The right claims, the signature of another key.
        (
            "a forged signature",
            "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJhcHAiOiJkZW1vIiwic3ViIjoiYWxpY2UiLCJleHAiOjQxMDI0NDQ4MDB9.\
             AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
        ),
    ];
    for (what, token) in cases {
        for version in [4, 5] {
            let mut raw = Raw::connect(server.addresses().mqtt).await;
            let mut body = string("MQTT");
            body.extend_from_slice(&[version, 0xC2, 0, 60]);
            if version == 5 {
                body.push(0);
            }
            for text in ["x", "alice", token] {
                body.extend(string(text));
            }
            raw.send(&packet(0x10, &body)).await;
            match raw.answer().await {
                Answer::Packet(0x20, body) => {
                    let known: &[u8] = if version == 5 { &[0x86, 0x87] } else { &[4, 5] };
                    assert!(known.contains(&body[1]), "{what}, version {version}: {:#04x}", body[1]);
                }
                other => panic!("{what}: no CONNACK but {other:02x?}"),
            }
            assert_eq!(raw.answer().await, Answer::Closed, "{what}");
        }
    }
}

#[tokio::test]
async fn http_requests_that_are_wrong_get_a_problem_document() {
    let server = Server::start().await;
    let messages = "users/alice/messages";
    let big = format!("{{\"payload\": \"{}\"}}", "x".repeat(300 * 1024));
    // (method, path below the app, body, status, the problem's slug, the field)
    let cases: &[(Method, &str, &str, u16, &str, &str)] = &[
        (Method::POST, messages, "", 400, "malformed-json", ""),
        (Method::POST, messages, "{", 400, "malformed-json", ""),
        (Method::POST, messages, "[]", 400, "malformed-json", ""),
        (Method::POST, messages, "{} {}", 400, "malformed-json", ""),
        (Method::POST, messages, "{}", 400, "invalid-field", "payload"),
        (Method::POST, messages, "{\"payload\": 5}", 400, "invalid-field", "payload"),
        (
            Method::POST,
            messages,
            "{\"payload\": \"x\", \"payload_base64\": \"eA==\"}",
            400,
            "invalid-field",
            "payload_base64",
        ),
        (Method::POST, messages, "{\"payload_base64\": \"%\"}", 400, "invalid-field", "payload_base64"),
        (Method::POST, messages, "{\"payload\": \"x\", \"qos\": 3}", 400, "invalid-field", "qos"),
        (Method::POST, messages, "{\"payload\": \"x\", \"qos\": \"1\"}", 400, "invalid-field", "qos"),
        (
            Method::POST,
            messages,
            "{\"payload\": \"x\", \"ttl_seconds\": -1}",
            400,
            "invalid-field",
            "ttl_seconds",
        ),
        (Method::POST, messages, "{\"payload\": \"x\", \"id\": \"\"}", 400, "invalid-field", "id"),
        (Method::POST, messages, "{\"payload\": \"x\", \"idd\": \"a\"}", 400, "invalid-field", "idd"),
        (Method::POST, messages, &big, 413, "payload-too-large", "payload"),
        (Method::POST, "users/a%2Fb/messages", "{\"payload\": \"x\"}", 400, "invalid-field", "user"),
        (Method::POST, "messages", "{\"payload\": \"x\"}", 400, "invalid-field", "topic"),
        (Method::POST, "messages", "{\"payload\": \"x\", \"topic\": \"a/+\"}", 400, "invalid-field", "topic"),
        (
            Method::POST,
            "broadcasts",
            "{\"payload\": \"x\", \"rate_per_second\": -1}",
            400,
            "invalid-field",
            "rate_per_second",
        ),
        (Method::GET, "broadcasts/none", "", 404, "unknown-broadcast", ""),
        (Method::GET, "topics/demo%2Fx/messages?after=nowhere", "", 400, "invalid-field", "after"),
        (Method::GET, "topics/demo%2Fx/messages?limit=many", "", 400, "invalid-field", "limit"),
        (Method::GET, "nothing/here", "", 404, "no-such-route", ""),
        (Method::PATCH, messages, "", 405, "method-not-allowed", ""),
    ];
    for (method, path, body, status, slug, field) in cases {
        let what = format!("{method} {path} {}", &body[..body.len().min(60)]);
        let request = server.request(method.clone(), path).header("content-type", "application/json");
        let response = request.body(body.to_string()).send().await.unwrap();
        assert_eq!(response.status().as_u16(), *status, "{what}");
        assert_eq!(response.headers()["content-type"], "application/problem+json", "{what}");
        let problem: Value = response.json().await.unwrap();
        let kind = problem["type"].as_str().unwrap();
        assert!(kind.ends_with(&format!("/{slug}")), "{what}: {problem}");
        assert_eq!(problem["status"], *status, "{what}");
        assert!(problem["detail"].as_str().is_some_and(|detail| detail.len() > 10), "{what}: {problem}");
        if !field.is_empty() {
            assert_eq!(problem["field"], *field, "{what}: {problem}");
        }
    }
    // More than a request may be is refused by its announcement, before it is sent.
    let address: std::net::SocketAddr =
        server.addresses().http.trim_start_matches("http://").parse().unwrap();
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let key = &server.addresses().api_key;
    let head = format!(
        "POST /v1/apps/demo/{messages} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Length: 99999999\r\n\r\n"
    );
    tokio::io::AsyncWriteExt::write_all(&mut stream, head.as_bytes()).await.unwrap();
    let mut answer = [0; 12];
    let read = tokio::io::AsyncReadExt::read_exact(&mut stream, &mut answer);
    tokio::time::timeout(Duration::from_secs(10), read).await.expect("an answer in time").unwrap();
    assert_eq!(&answer, b"HTTP/1.1 413");

    let url = server.url(messages);
    let http = reqwest::Client::new();
    for (key, status) in [(None, 401), (Some(""), 401), (Some("wrong"), 401)] {
        let mut request = http.post(&url).json(&serde_json::json!({ "payload": "x" }));
        if let Some(key) = key {
            request = request.bearer_auth(key);
        }
        let response = request.send().await.unwrap();
        assert_eq!(response.status().as_u16(), status, "{key:?}");
        assert_eq!(response.headers()["www-authenticate"], "Bearer realm=\"carillon\"");
    }
    still_serves(&server).await;
}

#[tokio::test]
async fn bytes_that_are_no_http_are_cut_off() {
    let server = Server::start().await;
    let address = server.addresses().http.trim_start_matches("http://").parse().unwrap();
    for bytes in [
        &b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"[..],
        b"BREW /pot HTCPCP/1.0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST /v1/apps/demo/messages HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"\0\0\0\0\0\0\0\0\r\n\r\n",
    ] {
        let mut stream = tokio::net::TcpStream::connect::<std::net::SocketAddr>(address).await.unwrap();
        tokio::io::AsyncWriteExt::write_all(&mut stream, bytes).await.unwrap();
        let mut answer = Vec::new();
        let read = tokio::io::AsyncReadExt::read_to_end(&mut stream, &mut answer);
        // Cut off, with or without a word; never a success, and never held open.
        let _ = tokio::time::timeout(Duration::from_secs(10), read).await.expect("it is cut off");
        let answer = String::from_utf8_lossy(&answer);
        assert!(
            answer.is_empty() || answer.starts_with("HTTP/1.1 4") || answer.starts_with("HTTP/1.0 4"),
            "{answer}"
        );
    }
    still_serves(&server).await;
}

/// The process is well: it takes a push and delivers it.
async fn still_serves(server: &Server) {
    let accepted = server.push("survivor", "well").await;
    let kept = server.get("topics/demo%2Fu%2Fsurvivor/messages").await;
    assert_eq!(kept["messages"][0]["id"], accepted["id"]);
    let mut raw = Raw::device(server.addresses().mqtt, 5, "survivor").await;
    raw.send(&[0xC0, 0]).await;
    assert_eq!(raw.answer().await, Answer::Packet(0xD0, vec![]), "PINGRESP");
}
