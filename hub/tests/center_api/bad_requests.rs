//! A table of requests that are wrong, each with the one answer it gets; and that the API's description has foreseen
//! each of these answers.

use std::time::Duration;

use carillon_hub::center;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::{DEMO, Harness, SHOP};

/// Who asks.
#[derive(Clone, Copy)]
enum With {
    Demo,
    Shop,
    Header(&'static str),
    Nothing,
}

struct Bad {
    with: With,
    method: &'static str,
    path: String,
    body: Vec<u8>,
    status: u16,
    slug: &'static str,
    field: Option<&'static str>,
    /// What the detail must say.
    says: &'static str,
}

#[allow(clippy::too_many_arguments)] // the columns of a table
fn bad(
    with: With,
    method: &'static str,
    path: impl Into<String>,
    body: impl Into<Vec<u8>>,
    status: u16,
    slug: &'static str,
    field: Option<&'static str>,
    says: &'static str,
) -> Bad {
    Bad { with, method, path: path.into(), body: body.into(), status, slug, field, says }
}

fn table() -> Vec<Bad> {
    use With::{Demo, Header, Nothing, Shop};
    let inbox = "/v1/apps/demo/users/alice/messages";
    let topic = "/v1/apps/demo/messages";
    let broadcasts = "/v1/apps/demo/broadcasts";
    let field = |path: &str, body: &str, field, says| {
        bad(Demo, "POST", path, body, 400, "invalid-field", Some(field), says)
    };
    let malformed = |body: &[u8], says| bad(Demo, "POST", inbox, body, 400, "malformed-json", None, says);
    let get = |path: &str, name, says| bad(Demo, "GET", path, "", 400, "invalid-field", Some(name), says);
    let fails = |how: &str, status, slug, says| {
        bad(
            Demo,
            "POST",
            topic,
            format!(r#"{{"topic":"fail/{how}","payload":"x"}}"#),
            status,
            slug,
            None,
            says,
        )
    };
    let unauthorised = |with| bad(with, "POST", inbox, "{}", 401, "unauthorised", None, "API key");
    vec![
        // Tokens.
        unauthorised(Nothing),
        unauthorised(Header("")),
        unauthorised(Header("Bearer")),
        unauthorised(Header("Bearer ")),
        unauthorised(Header("Bearer wrong-key-0123456789")),
        unauthorised(Header("Bearer demo-key-012345678")),
        unauthorised(Header("Basic ZGVtbzpkZW1v")),
        unauthorised(Header("demo-key-0123456789")),
        bad(Shop, "POST", inbox, "{}", 403, "forbidden", None, "`shop`"),
        bad(Shop, "GET", "/v1/apps/demo/users/alice", "", 403, "forbidden", None, "`shop`"),
        bad(Shop, "POST", "/v1/apps/demo/messages:batch", "", 403, "forbidden", None, "`shop`"),
        bad(Demo, "POST", "/v1/apps/nope/users/alice/messages", "{}", 404, "unknown-app", Some("app"), "`nope`"),
        bad(Nothing, "GET", "/v1/apps/nope/overview", "", 401, "unauthorised", None, "API key"),
        // Routes and methods.
        bad(Demo, "GET", "/v1", "", 404, "no-such-route", None, "/v1"),
        bad(Demo, "GET", "/v1/nothing", "", 404, "no-such-route", None, "/v1/nothing"),
        bad(Demo, "POST", "/v1/apps/demo/nothing", "", 404, "no-such-route", None, "openapi.json"),
        bad(Demo, "GET", "/v1/apps/demo/topics/a/b", "", 404, "no-such-route", None, "topics/a/b"),
        bad(Demo, "GET", "/v1/apps/demo/topics/messages", "", 404, "no-such-route", None, "topics/messages"),
        bad(Demo, "GET", "/v1/apps/demo/topics/a%2Fmessages", "", 404, "no-such-route", None, "messages"),
        bad(Demo, "GET", inbox, "", 405, "method-not-allowed", None, "GET"),
        bad(Demo, "DELETE", "/v1/apps/demo/users/alice", "", 405, "method-not-allowed", None, "DELETE"),
        bad(Demo, "PUT", topic, "", 405, "method-not-allowed", None, "PUT"),
        bad(Demo, "POST", "/v1/endpoints", "", 405, "method-not-allowed", None, "POST"),
        bad(Demo, "POST", "/v1/apps/demo/broadcasts/one:stop", "", 405, "method-not-allowed", None, "POST"),
        bad(Demo, "POST", "/v1/apps/demo/broadcasts/one", "", 405, "method-not-allowed", None, "POST"),
        // JSON.
        malformed(b"", "empty"),
        malformed(b"  \r\n", "empty"),
        malformed(b"{", "line 1 column 1"),
        malformed(b"{\n  \"payload\": \"x\",\n}", "line 3 column 1"),
        malformed(b"{\"payload\": \"x\"} x", "line 1 column 18"),
        malformed(b"[\"x\"]", "a JSON object"),
        malformed(b"\"x\"", "a JSON object"),
        malformed(b"null", "a JSON object"),
        malformed(b"payload=x", "line 1 column 1"),
        malformed(b"{\"payload\": \"\xff\"}", "line 1"),
        malformed(b"{\"payload\": \"\\udc00\"}", "line 1"),
        malformed("[".repeat(100_000).as_bytes(), "line 1 column 100000"),
        // Fields.
        field(inbox, r#"{"payload": 5}"#, "payload", "expected a string"),
        field(inbox, r#"{"payload": {"a": 1}}"#, "payload", "expected a string"),
        field(inbox, r#"{"body": "x"}"#, "body", "unknown field `body`"),
        field(inbox, r#"{"payload": "x", "topic": "y"}"#, "topic", "unknown field"),
        field(inbox, r#"{"payload": "x", "payload": "y"}"#, "payload", "duplicate field"),
        field(inbox, "{}", "payload", "missing"),
        field(inbox, r#"{"payload": "x", "payload_base64": "eA=="}"#, "payload_base64", "one too many"),
        field(inbox, r#"{"payload_base64": "e"}"#, "payload_base64", "not base64"),
        field(inbox, r#"{"payload_base64": "%%%%"}"#, "payload_base64", "not base64"),
        field(inbox, r#"{"payload": "x", "qos": 3}"#, "qos", "must be 0, 1 or 2"),
        field(inbox, r#"{"payload": "x", "qos": -1}"#, "qos", "invalid value"),
        field(inbox, r#"{"payload": "x", "qos": 4294967297}"#, "qos", "must be 0, 1 or 2"),
        field(inbox, r#"{"payload": "x", "qos": "1"}"#, "qos", "invalid type"),
        field(inbox, r#"{"payload": "x", "ttl_seconds": -5}"#, "ttl_seconds", "invalid value"),
        field(inbox, r#"{"payload": "x", "ttl_seconds": 1.5}"#, "ttl_seconds", "invalid type"),
        field(inbox, r#"{"payload": "x", "store": "yes"}"#, "store", "invalid type"),
        field(inbox, r#"{"payload": "x", "retain": 1}"#, "retain", "invalid type"),
        field(inbox, r#"{"payload": "x", "properties": {"a": 1}}"#, "properties.a", "expected a string"),
        field(inbox, r#"{"payload": "x", "properties": []}"#, "properties", "expected a map"),
        field(inbox, r#"{"payload": "x", "properties": {"a\u0000": ""}}"#, "properties", "NUL"),
        field(inbox, r#"{"payload": "x", "content_type": "a\u0000"}"#, "content_type", "NUL"),
        field(
            inbox,
            &json!({"payload": "x", "properties": {"a": "b".repeat(20_000)}}).to_string(),
            "properties",
            "longer than",
        ),
        field(
            inbox,
            &json!({"payload": "x", "properties": (0..65).map(|i| (i.to_string(), "")).collect::<std::collections::BTreeMap<_, _>>()})
                .to_string(),
            "properties",
            "more than 64",
        ),
        // Ids.
        field(inbox, r#"{"payload": "x", "id": ""}"#, "id", "1 to 128 visible ASCII"),
        field(inbox, r#"{"payload": "x", "id": "a b"}"#, "id", "visible ASCII"),
        field(inbox, r#"{"payload": "x", "id": "é"}"#, "id", "visible ASCII"),
        field(inbox, &json!({"payload": "x", "id": "a".repeat(129)}).to_string(), "id", "1 to 128"),
        // Receivers.
        field("/v1/apps/demo/users/a%2Fb/messages", r#"{"payload": "x"}"#, "user", "may not contain"),
        field("/v1/apps/demo/users/%2B/messages", r#"{"payload": "x"}"#, "user", "may not contain"),
        field("/v1/apps/demo/users/a%00/messages", r#"{"payload": "x"}"#, "user", "NUL"),
        field(&format!("/v1/apps/demo/users/{}/messages", "a".repeat(257)), r#"{"payload": "x"}"#, "user", "256 bytes"),
        field("/v1/apps/demo/groups/%23/messages", r#"{"payload": "x"}"#, "group", "may not contain"),
        field("/v1/apps/demo/users/%ff/messages", r#"{"payload": "x"}"#, "path", "UTF-8"),
        field(&format!("{inbox}?qos=1"), r#"{"payload": "x"}"#, "qos", "not a parameter"),
        // Topics.
        field(topic, r#"{"payload": "x"}"#, "topic", "missing"),
        field(topic, r#"{"payload": "x", "topic": ""}"#, "topic", "empty"),
        field(topic, r#"{"payload": "x", "topic": "demo/"}"#, "topic", "empty"),
        field(topic, r#"{"payload": "x", "topic": "a/+"}"#, "topic", "wildcard"),
        field(topic, r##"{"payload": "x", "topic": "#"}"##, "topic", "wildcard"),
        field(topic, r#"{"payload": "x", "topic": "a\u0001"}"#, "topic", "control"),
        field(topic, &json!({"payload": "x", "topic": "a".repeat(1025)}).to_string(), "topic", "1024 bytes"),
        field(topic, &json!({"payload": "x", "topic": "a".repeat(1024)}).to_string(), "topic", "1024 bytes"),
        field(topic, &json!({"payload": "x", "topic": "/".repeat(31)}).to_string(), "topic", "32 levels"),
        // Sizes. `demo` allows 1,000 bytes of payload; a body may have a MiB.
        bad(
            Demo,
            "POST",
            inbox,
            json!({"payload": "x".repeat(1001)}).to_string(),
            413,
            "payload-too-large",
            Some("payload"),
            "1001 bytes",
        ),
        bad(Demo, "POST", inbox, vec![b' '; 1024 * 1024 + 1], 413, "payload-too-large", None, "1048576 bytes"),
        bad(
            Demo,
            "POST",
            broadcasts,
            json!({"payload": "x".repeat(1001)}).to_string(),
            413,
            "payload-too-large",
            Some("payload"),
            "max_payload_bytes",
        ),
        // Broadcasts.
        field(broadcasts, "{}", "payload", "missing"),
        field(broadcasts, r#"{"payload": "x", "rate_per_second": -1}"#, "rate_per_second", "from 0"),
        field(broadcasts, r#"{"payload": "x", "rate_per_second": 1e10}"#, "rate_per_second", "to 1000000000"),
        field(broadcasts, r#"{"payload": "x", "rate_per_second": "fast"}"#, "rate_per_second", "invalid type"),
        field(broadcasts, r#"{"payload": "x", "retain": true}"#, "retain", "unknown field"),
        field(broadcasts, r#"{"payload": "x", "id": "a b"}"#, "id", "visible ASCII"),
        bad(Demo, "GET", format!("{broadcasts}/none"), "", 404, "unknown-broadcast", None, "no such broadcast"),
        bad(Demo, "POST", format!("{broadcasts}/none:pause"), "", 404, "unknown-broadcast", None, "no such"),
        get("/v1/apps/demo/broadcasts/a%20b", "id", "visible ASCII"),
        // Users.
        get("/v1/apps/demo/users/a%2Fb", "user", "may not contain"),
        get("/v1/apps/demo/users/alice?full=1", "full", "not a parameter"),
        bad(
            Demo,
            "DELETE",
            "/v1/apps/demo/users/alice/sessions?device=",
            "",
            400,
            "invalid-field",
            Some("device"),
            "empty",
        ),
        bad(
            Demo,
            "DELETE",
            "/v1/apps/demo/users/alice/sessions?device=a&device=b",
            "",
            400,
            "invalid-field",
            Some("device"),
            "twice",
        ),
        bad(Demo, "GET", "/v1/apps/demo/users/nobody-answers", "", 503, "unavailable", None, "no registry"),
        // Pull.
        get("/v1/apps/demo/topics/a/messages?after=5", "after", "{epoch}:{seq}"),
        get("/v1/apps/demo/topics/a/messages?after=1:", "after", "{epoch}:{seq}"),
        get("/v1/apps/demo/topics/a/messages?after=1:-1", "after", "{epoch}:{seq}"),
        get("/v1/apps/demo/topics/a/messages?after=%2B1:1", "after", "{epoch}:{seq}"),
        get("/v1/apps/demo/topics/a/messages?after=1:2:3", "after", "{epoch}:{seq}"),
        get("/v1/apps/demo/topics/a/messages?after=1:18446744073709551616", "after", "{epoch}:{seq}"),
        get("/v1/apps/demo/topics/a/messages?limit=0", "limit", "from 1 to 1000"),
        get("/v1/apps/demo/topics/a/messages?limit=1001", "limit", "from 1 to 1000"),
        get("/v1/apps/demo/topics/a/messages?limit=many", "limit", "a number"),
        get("/v1/apps/demo/topics/a/messages?from=1", "from", "not a parameter"),
        get("/v1/apps/demo/topics/%2B/messages", "topic", "wildcard"),
        // The dispatcher.
        bad(Nothing, "GET", "/v1/endpoints", "", 400, "invalid-field", Some("device"), "missing"),
        bad(Nothing, "GET", "/v1/endpoints?device=", "", 400, "invalid-field", Some("device"), "empty"),
        bad(Nothing, "GET", "/v1/endpoints?device=a&user=b", "", 400, "invalid-field", Some("user"), "not a parameter"),
        // What the owner says.
        fails("not-owner", 503, "unavailable", "moving"),
        fails("store", 503, "unavailable", "the disk is full"),
        fails("overloaded", 503, "overloaded", "too much"),
        fails("refused", 422, "refused", "no, never"),
        fails("full", 503, "overloaded", "waiting"),
        fails("away", 503, "unavailable", "may or may not"),
    ]
}

/// The problems that the description has for this request, by status; None when it does not know the route.
fn foreseen(document: &Value, method: &str, path: &str) -> Option<Vec<String>> {
    let path = path.split('?').next().unwrap_or_default();
    let matches = |template: &str| {
        if let Some((before, after)) = template.split_once("{topic}") {
            let (before, after) = (before.replace("{app}", "demo"), after);
            return path
                .strip_prefix(&before)
                .is_some_and(|rest| rest.ends_with(after) && rest.len() > after.len());
        }
        let (mine, theirs): (Vec<_>, Vec<_>) = (path.split('/').collect(), template.split('/').collect());
        mine.len() == theirs.len()
            && mine.iter().zip(&theirs).all(|(mine, theirs)| match theirs.split_once('}') {
                Some((_, verb)) if theirs.starts_with('{') => {
                    mine.ends_with(verb) && (!verb.is_empty() || !mine.contains(':'))
                }
                _ => mine == theirs,
            })
    };
    let (_, operations) = document["paths"].as_object()?.iter().find(|(template, operations)| {
        matches(template) && operations.get(method.to_ascii_lowercase()).is_some()
    })?;
    let responses = operations[method.to_ascii_lowercase()]["responses"].as_object()?;
    Some(responses.keys().cloned().collect())
}

#[tokio::test]
async fn every_bad_request_gets_its_problem() {
    let harness = Harness::start().await;
    let (_, document) = harness.json("GET", "/v1/openapi.json", "").await;
    for case in table() {
        let name = format!(
            "{} {} {:?}",
            case.method,
            case.path,
            String::from_utf8_lossy(&case.body[..case.body.len().min(80)])
        );
        let mut request =
            harness.client.request(case.method.parse().expect("a method"), harness.url(&case.path));
        request = match case.with {
            With::Demo => request.bearer_auth(DEMO),
            With::Shop => request.bearer_auth(SHOP),
            With::Header(value) => request.header("authorization", value),
            With::Nothing => request,
        };
        let response =
            request.body(case.body).send().await.unwrap_or_else(|error| panic!("{name}: {error:?}"));
        let status = response.status().as_u16();
        let headers = response.headers().clone();
        let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        let problem: Value =
            response.json().await.unwrap_or_else(|error| panic!("{name}: {status}, {error}"));
        assert_eq!(status, case.status, "{name}: {problem}");
        assert_eq!(header("content-type"), Some("application/problem+json"), "{name}");
        assert_eq!(
            problem["type"],
            format!("https://carillon.dev/problems/{}", case.slug),
            "{name}: {problem}"
        );
        assert_eq!(problem["status"], case.status, "{name}");
        assert_eq!(problem["field"].as_str(), case.field, "{name}: {problem}");
        assert!(problem["title"].as_str().is_some_and(|title| !title.is_empty()), "{name}");
        let detail = problem["detail"].as_str().unwrap_or_default();
        assert!(detail.contains(case.says), "{name}: {detail:?} does not say {:?}", case.says);
        assert_eq!(header("www-authenticate").is_some(), status == 401, "{name}");
        assert_eq!(header("retry-after").is_some(), status == 503, "{name}");
        assert_eq!(
            problem["instance"].is_string(),
            status == 503,
            "{name}: what is ours to look into has a number"
        );
        assert_eq!(header("allow").is_some(), status == 405, "{name}: {headers:?}");
        if !matches!(case.slug, "no-such-route" | "method-not-allowed") {
            let foreseen =
                foreseen(&document, case.method, &case.path).unwrap_or_else(|| panic!("{name}: unknown"));
            assert!(foreseen.contains(&status.to_string()), "{name}: {status} is not among {foreseen:?}");
        }
    }
    let state = harness.owner.state.lock();
    assert!(state.logs.is_empty(), "nothing was published: {:?}", state.logs.keys());
    assert!(state.broadcasts.is_empty());
}

#[tokio::test]
async fn an_app_cannot_push_faster_than_its_limit() {
    let harness = Harness::start().await;
    let push = |i: usize| {
        let request = harness.client.post(harness.url("/v1/apps/shop/users/bob/messages")).bearer_auth(SHOP);
        request.body(format!(r#"{{"payload": "{i}"}}"#)).send()
    };
    let begun = std::time::Instant::now();
    let responses = futures::future::join_all((0..40).map(push)).await;
    // Ten at once, and ten more each second that it took.
    let most = 11 + begun.elapsed().as_millis() as usize / 100;
    let mut accepted = 0;
    for response in responses {
        let response = response.expect("an answer");
        if response.status() == 429 {
            assert!(response.headers().contains_key("retry-after"));
            let problem: Value = response.json().await.expect("a problem");
            assert_eq!(problem["type"], "https://carillon.dev/problems/too-many-requests");
            assert!(
                problem["detail"].as_str().unwrap_or_default().contains("10 pushes per second"),
                "{problem}"
            );
        } else {
            assert_eq!(response.status(), 202);
            accepted += 1;
        }
    }
    assert!((10..=most).contains(&accepted), "{accepted} were accepted, {most} may be");
}

#[tokio::test]
async fn a_body_that_does_not_come_and_one_too_many_are_refused() {
    let options = center::Options {
        body_timeout: Duration::from_secs(2),
        max_requests: 1,
        ..center::Options::default()
    };
    let harness = Harness::with(options).await;
    let mut slow = tokio::net::TcpStream::connect(&harness.address).await.expect("connected");
    let head = format!(
        "POST /v1/apps/demo/users/alice/messages HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {DEMO}\r\n\
         content-length: 100\r\n\r\n{{\"payload\""
    );
    slow.write_all(head.as_bytes()).await.expect("sent");
    tokio::time::sleep(Duration::from_millis(100)).await;
    let (status, problem) = harness.json("GET", "/v1/apps/demo/users/alice", "").await;
    assert_eq!((status, problem["type"].as_str()), (503, Some("https://carillon.dev/problems/overloaded")));
    let mut answer = Vec::new();
    let mut part = [0; 4096];
    while !String::from_utf8_lossy(&answer).contains("request-timeout") {
        let read =
            tokio::time::timeout(Duration::from_secs(10), slow.read(&mut part)).await.expect("in time");
        let read = read.expect("an answer");
        assert!(read > 0, "closed after {}", String::from_utf8_lossy(&answer));
        answer.extend_from_slice(&part[..read]);
    }
    assert!(answer.starts_with(b"HTTP/1.1 408 "), "{}", String::from_utf8_lossy(&answer));
    let (status, _) = harness.json("GET", "/v1/apps/demo/users/alice", "").await;
    assert_eq!(status, 200, "its place is free again");
}

#[tokio::test]
async fn with_every_gateway_draining_there_is_none_to_try() {
    let harness = Harness::start().await;
    harness.gateways.send_modify(|gateways| {
        for gateway in std::sync::Arc::make_mut(gateways) {
            gateway.draining = true;
        }
    });
    let (status, problem) = harness.json("GET", "/v1/endpoints?device=phone", "").await;
    assert_eq!((status, problem["type"].as_str()), (503, Some("https://carillon.dev/problems/no-gateway")));
}
