//! Batches: a line for each line, in order, whatever some of them are; and their bounds.

use std::time::{Duration, Instant};

use carillon_hub::center;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::owner::EPOCH;
use crate::{DEMO, Harness, SHOP};

const BATCH: &str = "/v1/apps/demo/messages:batch";

async fn send(harness: &Harness, body: impl Into<reqwest::Body>) -> Vec<Value> {
    let response = harness.request("POST", BATCH).body(body).send().await.expect("an answer");
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-type"], "application/x-ndjson");
    lines(&response.text().await.expect("lines"))
}

fn lines(text: &str) -> Vec<Value> {
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{line:?}: {error}")))
        .collect()
}

#[tokio::test]
async fn a_thousand_lines_come_back_in_order() {
    let harness = Harness::start().await;
    harness.owner.state.lock().delay = Some(Duration::from_millis(20));
    let body: String = (0..1000)
        .map(|i| {
            format!(
                "{}\n",
                json!({"user": format!("u{}", i % 7), "payload": i.to_string(), "id": format!("i{i}")})
            )
        })
        .collect();
    let begun = Instant::now();
    let answers = send(&harness, body).await;
    // One after the other they would take 20 s.
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    assert_eq!(answers.len(), 1000);
    for (i, answer) in answers.iter().enumerate() {
        let (topic, seq) = (format!("demo/u/u{}", i % 7), i as u64 / 7 + 1);
        assert_eq!(*answer, json!({"id": format!("i{i}"), "topic": topic, "epoch": EPOCH, "seq": seq}));
    }
    let state = harness.owner.state.lock();
    let order: Vec<_> = state
        .published
        .iter()
        .filter_map(|request| request.message.as_ref())
        .map(|message| &message.id[..])
        .collect();
    assert!(
        order.iter().enumerate().all(|(i, id)| *id == format!("i{i}")),
        "queued in the order of the lines"
    );
}

#[tokio::test]
async fn a_bad_line_gives_a_problem_and_the_others_go_on() {
    let options = center::Options { max_line_bytes: 400, ..center::Options::default() };
    let harness = Harness::with(options).await;
    let body = [
        r#"{"user": "a", "payload": "1"}"#.to_owned(),
        "not json".to_owned(),
        String::new(),
        r#"{"group": "g", "payload": "2"}"#.to_owned() + "\r",
        r#"{"payload": "3"}"#.to_owned(),
        json!({"user": "a", "payload": "x".repeat(1000)}).to_string(),
        r#"{"topic": "fail/refused", "payload": "4"}"#.to_owned(),
        "[1]".to_owned(),
        r#"{"topic": "t", "payload": "5", "qos": 3}"#.to_owned(),
        r#"{"topic": "t", "payload": "6"}"#.to_owned(),
    ];
    let answers = send(&harness, body.join("\n")).await;
    let short: Vec<_> = answers
        .iter()
        .map(|answer| match answer["type"].as_str() {
            Some(kind) => {
                (kind.rsplit('/').next().unwrap_or_default(), answer["line"].as_u64().unwrap_or_default())
            }
            None => (answer["topic"].as_str().unwrap_or_default(), 0),
        })
        .collect();
    assert_eq!(
        short,
        [
            ("demo/u/a", 0),
            ("malformed-json", 2),
            ("demo/g/g", 0),
            ("invalid-field", 5),
            ("payload-too-large", 6),
            ("refused", 7),
            ("malformed-json", 8),
            ("invalid-field", 9),
            ("demo/t", 0),
        ]
    );
    assert_eq!(answers[7]["field"], "qos");
}

#[tokio::test]
async fn a_batch_that_is_too_long_ends_with_a_problem() {
    let options = center::Options { max_batch_lines: 3, max_batch_bytes: 1000, ..center::Options::default() };
    let harness = Harness::with(options).await;
    let line = "{\"user\": \"a\", \"payload\": \"x\"}\n";
    let answers = send(&harness, line.repeat(3)).await;
    assert!(answers.len() == 3 && answers.iter().all(|answer| answer["seq"].is_u64()), "{answers:?}");
    let answers = send(&harness, line.repeat(5)).await;
    assert_eq!(answers.len(), 4);
    assert_eq!(
        (&answers[3]["type"], &answers[3]["line"]),
        (&json!("https://carillon.dev/problems/payload-too-large"), &json!(4))
    );
    // Of known length it is refused before anything is read; else when it has become too long.
    let response = harness.request("POST", BATCH).body(" ".repeat(1001)).send().await.expect("an answer");
    assert_eq!(response.status(), 413);
    let chunks: Vec<Result<String, std::io::Error>> = (0..11).map(|_| Ok(" ".repeat(100))).collect();
    let answers = send(&harness, reqwest::Body::wrap_stream(futures::stream::iter(chunks))).await;
    assert_eq!(answers.len(), 1, "{answers:?}");
    assert_eq!(answers[0]["type"], "https://carillon.dev/problems/payload-too-large");
    assert_eq!(send(&harness, "").await, Vec::<Value>::new());
}

#[tokio::test]
async fn a_client_that_reads_only_after_it_has_sent_all_is_served() {
    let harness = Harness::start().await;
    // Answers of about 9 MB: more than the sockets between hold.
    let count = 60_000;
    let body = format!("{}\n", json!({"topic": "x".repeat(100), "payload": ""})).repeat(count);
    let mut socket = tokio::net::TcpStream::connect(&harness.address).await.expect("connected");
    let head = format!(
        "POST {BATCH} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {DEMO}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    );
    socket.write_all(head.as_bytes()).await.expect("sent");
    let sent = tokio::time::timeout(Duration::from_secs(60), socket.write_all(body.as_bytes())).await;
    sent.expect("the batch is read although nobody reads the answer").expect("sent");
    let mut answer = Vec::new();
    tokio::time::timeout(Duration::from_secs(60), socket.read_to_end(&mut answer))
        .await
        .expect("in time")
        .expect("read");
    let text = String::from_utf8(answer).expect("text");
    assert_eq!(text.matches("\"seq\":").count(), count);
}

#[tokio::test]
async fn lines_wait_for_their_apps_rate_and_batches_for_a_place() {
    let options = center::Options { max_batches: 1, ..center::Options::default() };
    let harness = Harness::with(options).await;
    let begun = Instant::now();
    let line = "{\"user\": \"a\", \"payload\": \"x\"}\n";
    let shop = |body: String| {
        harness.client.post(harness.url("/v1/apps/shop/messages:batch")).bearer_auth(SHOP).body(body).send()
    };
    let slow = async {
        let response = shop(line.repeat(25)).await.expect("an answer");
        lines(&response.text().await.expect("lines"))
    };
    let second = async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        shop(line.to_owned()).await.expect("an answer").status()
    };
    let (answers, second) = tokio::join!(slow, second);
    assert_eq!(second, 503);
    assert!(answers.len() == 25 && answers.iter().all(|answer| answer["seq"].is_u64()), "{answers:?}");
    // Ten at once, the other fifteen at ten a second.
    let took = begun.elapsed();
    assert!((Duration::from_millis(1400)..Duration::from_secs(10)).contains(&took), "{took:?}");
}

#[tokio::test]
async fn a_batch_that_stops_coming_is_ended() {
    let options = center::Options { body_timeout: Duration::from_millis(200), ..center::Options::default() };
    let harness = Harness::with(options).await;
    let (sender, receiver) = tokio::sync::mpsc::channel::<Result<String, std::io::Error>>(1);
    sender.send(Ok("{\"user\": \"a\", \"payload\": \"x\"}\n{\"user".to_owned())).await.expect("open");
    let body = reqwest::Body::wrap_stream(tokio_stream::wrappers::ReceiverStream::new(receiver));
    let answers = send(&harness, body).await;
    assert_eq!(answers.len(), 2, "{answers:?}");
    assert_eq!(
        (&answers[0]["seq"], &answers[1]["type"]),
        (&json!(1), &json!("https://carillon.dev/problems/request-timeout"))
    );
    drop(sender);
}
