//! What goes well: push, broadcast, look up, kick, pull, overview, which gateways; and what browsers ask first.

use std::time::Duration;

use carillon_proto::v1;
use serde_json::{Value, json};

use crate::Harness;
use crate::owner::EPOCH;

#[tokio::test]
async fn a_push_reaches_its_topic_as_it_was_asked_for() {
    let harness = Harness::start().await;
    let (status, answer) =
        harness.json("POST", "/v1/apps/demo/users/al%20ice/messages", r#"{"payload": "hi"}"#).await;
    assert_eq!(status, 202, "{answer}");
    assert_eq!(
        (&answer["topic"], &answer["epoch"], &answer["seq"]),
        (&json!("demo/u/al ice"), &json!(EPOCH), &json!(1))
    );
    assert_eq!(answer.get("duplicate"), None);
    let id = answer["id"].as_str().expect("made").parse::<uuid::Uuid>().expect("a UUID");
    assert_eq!(id.get_version_num(), 7);

    let (status, answer) =
        harness.json("POST", "/v1/apps/demo/groups/team/messages", r#"{"payload": "hi"}"#).await;
    assert_eq!((status, &answer["topic"]), (202, &json!("demo/g/team")));

    let body = json!({
        "topic": "demo/news/local", "payload_base64": "/wA=", "qos": 0, "ttl_seconds": 60, "store": true, "id": "n-1",
        "retain": true, "content_type": "application/x", "properties": {"b": "2", "a": "1"},
    });
    for topic in ["demo/news/local", "news/local"] {
        let mut body = body.clone();
        body["topic"] = json!(topic);
        let (status, answer) = harness.json("POST", "/v1/apps/demo/messages", &body.to_string()).await;
        assert_eq!(
            (status, &answer["topic"], &answer["id"]),
            (202, &json!("demo/news/local"), &json!("n-1"))
        );
        assert_eq!(answer["seq"], 1, "the second is a retry of the first");
        assert_eq!(answer.get("duplicate").is_some(), topic == "news/local");
    }
    // A name that only begins like the app is below it.
    let (_, answer) =
        harness.json("POST", "/v1/apps/demo/messages", r#"{"topic": "demo", "payload": ""}"#).await;
    assert_eq!(answer["topic"], "demo/demo");

    let state = harness.owner.state.lock();
    let first = &state.published[0];
    let message = first.message.as_ref().expect("sent");
    assert_eq!((message.qos, first.store, first.idempotent, message.retain), (1, None, false, false));
    assert_eq!((message.expires_ms, &message.payload[..]), (0, &b"hi"[..]));
    assert!(message.properties.as_ref().is_some_and(|properties| properties.payload_is_utf8));
    let last = &state.published[2];
    let message = last.message.as_ref().expect("sent");
    assert_eq!((message.qos, last.store, last.idempotent, message.retain), (0, Some(true), true, true));
    assert_eq!(message.expires_ms, message.published_ms + 60_000);
    assert_eq!(message.payload[..], [0xff, 0]);
    let properties = message.properties.clone().expect("given");
    assert_eq!((properties.content_type.as_str(), properties.payload_is_utf8), ("application/x", false));
    let user: Vec<_> = properties.user.iter().map(|pair| (pair.key.as_str(), pair.value.as_str())).collect();
    assert_eq!(user, [("a", "1"), ("b", "2")]);
}

#[tokio::test]
async fn what_was_pushed_is_pulled_page_by_page() {
    let harness = Harness::start().await;
    for i in 0..5 {
        let body = json!({"payload": format!("m{i}"), "properties": {"n": i.to_string()}});
        harness.json("POST", "/v1/apps/demo/users/alice/messages", &body.to_string()).await;
    }
    harness
        .json("POST", "/v1/apps/demo/users/alice/messages", r#"{"payload_base64": "/w==", "ttl_seconds": 9}"#)
        .await;
    let mut seen = Vec::new();
    let mut after = "0:0".to_owned();
    let paths = ["u%2Falice", "demo%2Fu%2Falice", "u/alice", "demo/u/alice"];
    for path in paths {
        let path = format!("/v1/apps/demo/topics/{path}/messages?limit=2&after={after}");
        let (status, page) = harness.json("GET", &path, "").await;
        assert_eq!(status, 200, "{page}");
        let messages = page["messages"].as_array().expect("messages");
        seen.extend(messages.iter().cloned());
        after = page["next"].as_str().expect("a position").to_owned();
        let more = seen.len() < 6;
        assert_eq!(page["more"], more, "{page}");
    }
    assert_eq!(after, format!("{EPOCH}:6"));
    let payloads: Vec<_> = seen.iter().map(|message| message["payload"].as_str()).collect();
    assert_eq!(payloads, [Some("m0"), Some("m1"), Some("m2"), Some("m3"), Some("m4"), None]);
    assert_eq!(seen[5]["payload_base64"], "/w==");
    assert!(seen[5]["expires_at"].as_str().is_some_and(|time| time.ends_with('Z')));
    assert_eq!((&seen[0]["seq"], &seen[0]["epoch"]), (&json!(1), &json!(EPOCH)));
    assert_eq!(seen[3]["properties"]["n"], "3");
    // A topic that never was: nothing, from where one asked.
    let (status, page) = harness.json("GET", "/v1/apps/demo/topics/none/messages?after=2:9", "").await;
    assert_eq!((status, page), (200, json!({"messages": [], "next": "2:9", "more": false})));
}

#[tokio::test]
async fn a_broadcast_is_started_watched_and_controlled() {
    let harness = Harness::start().await;
    let body = r#"{"payload": "hi all", "rate_per_second": 50, "id": "a:b/c"}"#;
    let request = harness.request("POST", "/v1/apps/demo/broadcasts").body(body);
    let response = request.send().await.expect("an answer");
    assert_eq!(response.status(), 202);
    let location = response.headers()["location"].to_str().expect("a path").to_owned();
    assert_eq!(location, "/v1/apps/demo/broadcasts/a%3Ab%2Fc");
    let job: Value = response.json().await.expect("a job");
    assert_eq!(
        (&job["id"], &job["topic"], &job["state"]),
        (&json!("a:b/c"), &json!("demo/all"), &json!("running"))
    );
    assert_eq!((&job["rate_per_second"], &job["total"], &job["done"]), (&json!(50.0), &json!(10), &json!(0)));
    assert!(job["started_at"].as_str().is_some_and(|time| time.starts_with("20")), "{job}");

    assert_eq!(harness.json("GET", &location, "").await, (200, job));
    for (verb, state) in [("pause", "paused"), ("resume", "running"), ("cancel", "cancelled")] {
        let (status, job) = harness.json("POST", &format!("{location}:{verb}"), "").await;
        assert_eq!((status, &job["state"]), (200, &json!(state)), "{job}");
        assert_eq!(job.get("ended_at").is_some(), verb == "cancel");
    }
    let (status, problem) = harness.json("POST", &format!("{location}:pause"), "").await;
    assert_eq!((status, &problem["detail"]), (409, &json!("the broadcast has ended")));
    let state = harness.owner.state.lock();
    assert!(state.broadcasts[0].idempotent);
    assert_eq!(
        state.broadcasts[0].message.as_ref().map(|message| &message.payload[..]),
        Some(&b"hi all"[..])
    );
}

#[tokio::test]
async fn a_user_is_looked_up_and_kicked() {
    let harness = Harness::start().await;
    let online = |user: &str, device: &str, since_ms| v1::OnlineSession {
        session: Some(v1::SessionRef {
            app: "demo".to_owned(),
            user: user.to_owned(),
            client_id: device.to_owned(),
        }),
        gateway: "gateway-0".to_owned(),
        since_ms,
        address: "203.0.113.7:50112".to_owned(),
    };
    harness.owner.state.lock().sessions =
        vec![online("alice", "tv", 2_000), online("alice", "phone", 1_000), online("bob", "phone", 0)];
    let (status, user) = harness.json("GET", "/v1/apps/demo/users/alice", "").await;
    let session = |device: &str, since: &str| json!({"device": device, "gateway": "gateway-0", "since": since, "address": "203.0.113.7:50112"});
    let phone = session("phone", "1970-01-01T00:00:01.000Z");
    let tv = session("tv", "1970-01-01T00:00:02.000Z");
    assert_eq!((status, user), (200, json!({"online": true, "sessions": [phone, tv]})));

    let kick = "/v1/apps/demo/users/alice/sessions";
    assert_eq!(harness.json("DELETE", &format!("{kick}?device=tv"), "").await, (200, json!({"kicked": 1})));
    assert_eq!(harness.json("DELETE", kick, "").await, (200, json!({"kicked": 1})));
    assert_eq!(harness.json("DELETE", kick, "").await, (200, json!({"kicked": 0})));
    let (_, user) = harness.json("GET", "/v1/apps/demo/users/alice", "").await;
    assert_eq!(user, json!({"online": false, "sessions": []}));
    assert_eq!(harness.json("GET", "/v1/apps/demo/users/bob", "").await.1["online"], true);
}

#[tokio::test]
async fn an_overview_shows_the_apps_own_numbers() {
    let harness = Harness::start().await;
    let report = |delivered| {
        let apps = [("demo", 3), ("shop", 50)].map(|(app, connections)| v1::AppReport {
            app: app.to_owned(),
            connections,
            delivered,
            ..v1::AppReport::default()
        });
        let report = v1::GatewayReport {
            connections: 53,
            apps: apps.to_vec(),
            bytes_resident: 1,
            ..v1::GatewayReport::default()
        };
        vec![v1::GatewayOverview { instance: "gateway-0".to_owned(), report: Some(report), age_ms: 0 }]
    };
    harness.owner.state.lock().reports = report(100);
    let (status, first) = harness.json("GET", "/v1/apps/demo/overview", "").await;
    assert_eq!(
        (status, &first["connections"], &first["delivered"]),
        (200, &json!(3), &json!(100)),
        "{first}"
    );
    assert_eq!(first["delivered_per_second"], Value::Null);
    for _ in 0..5 {
        harness.json("GET", "/v1/apps/demo/overview", "").await;
    }
    assert_eq!(harness.owner.state.lock().asked_overview, 1, "many consoles ask the owners once");
    tokio::time::sleep(Duration::from_millis(700)).await;
    harness.owner.state.lock().reports = report(200);
    let (_, second) = harness.json("GET", "/v1/apps/demo/overview", "").await;
    let rate = second["delivered_per_second"].as_f64().expect("two reports");
    assert!((1.0..150.0).contains(&rate), "{rate}");
    assert_eq!(second["gateways"][0]["gateway"], "gateway-0");
}

#[tokio::test]
async fn a_device_is_told_gateways_and_browsers_may_ask() {
    let harness = Harness::start().await;
    let response = harness
        .client
        .get(harness.url("/v1/endpoints?device=phone-1"))
        .header("origin", "https://example.com")
        .send()
        .await
        .expect("an answer");
    assert_eq!(response.headers()["access-control-allow-origin"], "*");
    let endpoints: Value = response.json().await.expect("JSON");
    assert_eq!(endpoints["ttl_seconds"], 60);
    let list = endpoints["endpoints"].as_array().expect("a list");
    assert_eq!(list.len(), 2);
    let name = list[0]["gateway"].as_str().expect("a name");
    assert_eq!(
        list[0],
        json!({
            "gateway": name, "mqtt": format!("mqtt://{name}:1883"), "ws": format!("ws://{name}:8083/mqtt"),
        })
    );

    let preflight = harness
        .client
        .request(reqwest::Method::OPTIONS, harness.url("/v1/apps/demo/users/alice/sessions"))
        .header("origin", "https://example.com")
        .header("access-control-request-method", "DELETE")
        .header("access-control-request-headers", "authorization,content-type")
        .send()
        .await
        .expect("an answer");
    assert_eq!(preflight.status(), 200);
    let allowed = |name: &str| preflight.headers()[name].to_str().expect("text").to_ascii_lowercase();
    assert_eq!(allowed("access-control-allow-origin"), "*");
    assert!(allowed("access-control-allow-methods").contains("delete"));
    assert!(allowed("access-control-allow-headers").contains("authorization"));
    assert!(!preflight.headers().contains_key("access-control-allow-credentials"));
    // Also what is refused can be read by a page.
    let refused =
        harness.client.get(harness.url("/v1/apps/demo/overview")).header("origin", "https://example.com");
    let refused = refused.send().await.expect("an answer");
    assert_eq!(
        (refused.status().as_u16(), &refused.headers()["access-control-allow-origin"]),
        (401, &"*".parse().expect("a value"))
    );
}

#[tokio::test]
async fn every_request_is_counted_under_its_route() {
    let harness = Harness::start().await;
    harness.json("POST", "/v1/apps/demo/users/alice/messages", r#"{"payload": "x"}"#).await;
    harness.json("POST", "/v1/apps/demo/users/bob/messages", r#"{"payload": "x", "qos": 9}"#).await;
    harness.json("GET", "/v1/nothing/here", "").await;
    harness.json("GET", "/v1/endpoints?device=a", "").await;
    let mut text = String::new();
    let families = harness.metrics.gather();
    prometheus::TextEncoder::new().encode_utf8(&families, &mut text).expect("text");
    for line in [
        r#"carillon_center_requests_total{route="POST /v1/apps/{app}/users/{user}/messages",status="202"} 1"#,
        r#"carillon_center_requests_total{route="POST /v1/apps/{app}/users/{user}/messages",status="400"} 1"#,
        r#"carillon_center_requests_total{route="GET /v1/{*rest}",status="404"} 1"#,
        r#"carillon_center_pushes_total{result="accepted"} 1"#,
        r#"carillon_center_pushes_total{result="invalid-field"} 1"#,
        r#"carillon_center_in_flight_requests 0"#,
        r#"carillon_dispatcher_requests_total{status="200"} 1"#,
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
}

#[tokio::test]
async fn a_users_tokens_are_revoked() {
    let harness = Harness::start().await;
    let url = "/v1/apps/demo/users/alice/revoke";
    let (status, body) = harness.json("POST", url, "{}").await;
    let now = carillon_proto::now_ms() / 1000;
    let before = body["before"].as_u64().expect("a time");
    assert!(status == 200 && (now..=now + 1).contains(&before), "{status} {body}");
    let limited = r#"{"before": 1000, "token_lifetime_seconds": 99999999999}"#;
    assert_eq!(harness.json("POST", url, limited).await, (200, json!({"before": 1000})));
    let revoked: Vec<_> = harness.owner.state.lock().revoked.clone();
    let of =
        |i: usize| (revoked[i].0.as_str(), revoked[i].1.as_str(), revoked[i].2.before, revoked[i].2.forget);
    assert_eq!(of(0), ("demo", "alice", before, 0));
    // And the clock skew that gateways may allow.
    assert_eq!(of(1), ("demo", "alice", 1000, 1000 + 99_999_999_999 + 3600));
    for (url, body, status, field) in [
        (url, r#"{"before": 99999999999}"#, 400, "before"),
        (url, r#"{"after": 1}"#, 400, "after"),
        ("/v1/apps/demo/users/a%2Fb/revoke", "{}", 400, "user"),
    ] {
        let (got, problem) = harness.json("POST", url, body).await;
        assert_eq!((got, problem["field"].as_str()), (status, Some(field)), "{problem}");
    }
    assert_eq!(harness.json("POST", "/v1/apps/demo/users/one-too-many/revoke", "{}").await.0, 409);
}
