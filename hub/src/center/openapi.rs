//! The OpenAPI 3.1 document, made from the table of routes and the types of the bodies.

use std::sync::LazyLock;

use bytes::Bytes;
use schemars::generate::SchemaSettings;
use schemars::{JsonSchema, SchemaGenerator};
use serde_json::{Map, Value, json};

use super::batch;
use super::body::{
    AcceptedBody, BatchLine, BatchResult, BroadcastBody, JobBody, KickedBody, MessageBody, PulledBody,
    RevokeBody, RevokedBody, TopicMessageBody, UserBody,
};
use super::overview::Overview;
use super::routes::{Op, Parameter, ROUTES, Route, path_parameter};
use crate::dispatcher::Endpoints;
use crate::problem::{self, Kind, ProblemDocument};

/// The document as it is served.
pub fn text() -> Bytes {
    static TEXT: LazyLock<Bytes> =
        LazyLock::new(|| serde_json::to_vec(&document()).unwrap_or_default().into());
    TEXT.clone()
}

/// The document.
pub fn document() -> Value {
    let settings = SchemaSettings::draft2020_12().with(|settings| {
        settings.definitions_path = "/components/schemas".into();
        settings.meta_schema = None;
    });
    let mut generator = settings.into_generator();
    let mut paths = Map::new();
    for route in ROUTES {
        let operation = operation(route, &mut generator);
        let path = paths.entry(route.path).or_insert_with(|| json!({}));
        path[route.method.as_str().to_ascii_lowercase()] = operation;
    }
    let problem = generator.subschema_for::<ProblemDocument>();
    let mut responses = Map::new();
    for kind in problem_kinds() {
        let entry = kind.entry();
        let mut response = json!({
            "description": entry.title,
            "content": {(problem::MEDIA_TYPE): {"schema": problem}},
        });
        if let Some(headers) = problem_headers(kind) {
            response["headers"] = headers;
        }
        responses.insert(entry.slug.to_owned(), response);
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Carillon",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Push messages to users, groups and topics, broadcast, look up who is online, read topics.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {
            "schemas": generator.take_definitions(true),
            "responses": responses,
            "securitySchemes": {
                "apiKey": {"type": "http", "scheme": "bearer", "description": "An API key of the app."},
            },
        },
    })
}

fn problem_kinds() -> impl Iterator<Item = Kind> {
    problem::PROBLEMS.iter().map(|entry| entry.kind)
}

fn problem_headers(kind: Kind) -> Option<Value> {
    if kind == Kind::Unauthorised {
        return Some(json!({"www-authenticate": {"schema": {"type": "string"}}}));
    }
    let again = problem::Problem::new(kind, "").retry_after_seconds.is_some();
    again.then(|| {
        json!({"retry-after": {"description": "When to ask again, seconds.", "schema": {"type": "integer"}}})
    })
}

fn operation(route: &Route, generator: &mut SchemaGenerator) -> Value {
    let (request, response) = bodies(route.op, generator);
    let mut responses = Map::new();
    responses.insert(
        route.success.to_string(),
        json!({"description": response.what, "content": {(response.media_type): response.content()}}),
    );
    // One response a status: several kinds of problem may share it, told apart by their `type`.
    let mut by_status = std::collections::BTreeMap::<u16, Vec<Kind>>::new();
    for kind in route.problems() {
        by_status.entry(kind.entry().status.as_u16()).or_default().push(kind);
    }
    for (status, kinds) in by_status {
        let response = match kinds.as_slice() {
            [only] => json!({"$ref": format!("#/components/responses/{}", only.entry().slug)}),
            several => {
                let titles: Vec<_> = several.iter().map(|kind| kind.entry().title).collect();
                let mut response = json!({
                    "description": titles.join(" · "),
                    "content": {(problem::MEDIA_TYPE): {"schema": generator.subschema_for::<ProblemDocument>()}},
                });
                if let Some(headers) = several.iter().find_map(|kind| problem_headers(*kind)) {
                    response["headers"] = headers;
                }
                response
            }
        };
        responses.insert(status.to_string(), response);
    }
    let mut operation = json!({
        "operationId": route.id,
        "summary": route.summary,
        "tags": [format!("{:?}", route.role).to_ascii_lowercase()],
        "parameters": parameters(route),
        "responses": responses,
        "security": if route.key { json!([{"apiKey": []}]) } else { json!([]) },
    });
    if let Some(request) = request {
        operation["requestBody"] = json!({
            "required": true,
            "description": request.what,
            "content": {(request.media_type): request.content()},
        });
    }
    operation
}

fn parameters(route: &Route) -> Vec<Value> {
    let mut parameters = Vec::new();
    for name in route.path.split(['{', '}']).skip(1).step_by(2) {
        if let Some((description, example)) = path_parameter(name) {
            parameters.push(json!({
                "name": name, "in": "path", "required": true, "description": description,
                "schema": {"type": "string"}, "example": example,
            }));
        }
    }
    for Parameter { name, required, description, range, example } in route.query {
        let (schema, example) = match range {
            Some((from, to)) => (
                json!({"type": "integer", "minimum": from, "maximum": to}),
                example.parse::<u64>().map_or(Value::Null, Value::from),
            ),
            None => (json!({"type": "string"}), json!(example)),
        };
        parameters.push(json!({
            "name": name, "in": "query", "required": required, "description": description,
            "schema": schema, "example": example,
        }));
    }
    parameters
}

/// What one side sends.
struct Content {
    what: &'static str,
    media_type: &'static str,
    schema: Value,
    example: Value,
}

impl Content {
    fn json<T: JsonSchema>(what: &'static str, example: Value, generator: &mut SchemaGenerator) -> Self {
        let schema = generator.subschema_for::<T>().to_value();
        Content { what, media_type: "application/json", schema, example }
    }

    /// Lines of JSON: the schema is that of one line, the example a text.
    fn lines<T: JsonSchema>(what: &'static str, example: &[Value], generator: &mut SchemaGenerator) -> Self {
        let lines: Vec<_> = example.iter().map(|line| format!("{line}\n")).collect();
        Content {
            media_type: batch::MEDIA_TYPE,
            ..Content::json::<T>(what, lines.concat().into(), generator)
        }
    }

    fn content(&self) -> Value {
        if self.media_type == batch::MEDIA_TYPE {
            // OpenAPI 3.1 has no word for a sequence of lines: the body is a text, each line of which is this.
            let schema = json!({"type": "string", "contentMediaType": "application/json", "contentSchema": self.schema});
            return json!({"schema": schema, "example": self.example});
        }
        json!({"schema": self.schema, "example": self.example})
    }
}

/// What is sent and answered, with examples. The examples are what a server with one gateway might say.
fn bodies(op: Op, generator: &mut SchemaGenerator) -> (Option<Content>, Content) {
    let accepted = |topic: &str| json!({"id": "order-4711", "topic": topic, "epoch": 3, "seq": 42});
    let job = |state: &str, done: u64| {
        json!({
            "id": "spring-sale", "topic": "demo/all", "epoch": 3, "seq": 7, "state": state, "total": 15000,
            "done": done, "rate_per_second": 1000.0, "started_at": "2026-03-20T09:00:00.000Z",
        })
    };
    let message = json!({"payload": "your parcel is here", "id": "order-4711", "ttl_seconds": 3600});
    let told = "The message was accepted; if it is stored, it is durable.";
    let numbers = json!({
        "connections": 2, "delivered": 4021, "published": 12, "dropped": 0,
        "delivered_per_second": 33.5, "published_per_second": 0.0,
    });
    match op {
        Op::PushToUser => (
            Some(Content::json::<MessageBody>("The message.", message, generator)),
            Content::json::<AcceptedBody>(told, accepted("demo/u/alice"), generator),
        ),
        Op::PushToGroup => (
            Some(Content::json::<MessageBody>("The message.", message, generator)),
            Content::json::<AcceptedBody>(told, accepted("demo/g/team-7"), generator),
        ),
        Op::PushToTopic => (
            Some(Content::json::<TopicMessageBody>(
                "The message and its topic.",
                json!({"topic": "news/local", "payload_base64": "aGVsbG8=", "retain": true}),
                generator,
            )),
            Content::json::<AcceptedBody>(told, accepted("demo/news/local"), generator),
        ),
        Op::PushBatch => {
            let problem = problem::Problem::field("qos", "must be 0, 1 or 2").document();
            let problem = ProblemDocument { line: Some(2), ..problem };
            (
                Some(Content::lines::<BatchLine>(
                    "A message a line. Blank lines are skipped.",
                    &[
                        json!({"user": "alice", "payload": "one"}),
                        json!({"topic": "news", "payload": "two", "qos": 3}),
                    ],
                    generator,
                )),
                Content::lines::<BatchResult>(
                    "What became of each line, in their order.",
                    &[accepted("demo/u/alice"), json!(problem)],
                    generator,
                ),
            )
        }
        Op::StartBroadcast => (
            Some(Content::json::<BroadcastBody>(
                "The message and its rate.",
                json!({"payload": "spring is here", "rate_per_second": 1000.0, "id": "spring-sale"}),
                generator,
            )),
            Content::json::<JobBody>("The broadcast was begun.", job("running", 0), generator),
        ),
        Op::GetBroadcast => {
            (None, Content::json::<JobBody>("The broadcast.", job("running", 7300), generator))
        }
        Op::PauseBroadcast => {
            (None, Content::json::<JobBody>("It is paused.", job("paused", 7300), generator))
        }
        Op::ResumeBroadcast => {
            (None, Content::json::<JobBody>("It goes on.", job("running", 7300), generator))
        }
        Op::CancelBroadcast => {
            let mut cancelled = job("cancelled", 7300);
            cancelled["ended_at"] = json!("2026-03-20T09:00:08.120Z");
            (None, Content::json::<JobBody>("It has ended.", cancelled, generator))
        }
        Op::GetUser => (
            None,
            Content::json::<UserBody>(
                "The user's devices that are online.",
                json!({"online": true, "sessions": [{
                    "device": "phone-1", "gateway": "gateway-0", "since": "2026-03-20T08:12:31.004Z",
                    "address": "203.0.113.7:50112",
                }]}),
                generator,
            ),
        ),
        Op::KickUser => {
            (None, Content::json::<KickedBody>("How many were told to go.", json!({"kicked": 1}), generator))
        }
        Op::RevokeUser => (
            Some(Content::json::<RevokeBody>(
                "Which tokens.",
                json!({"before": 1_774_000_000, "token_lifetime_seconds": 86_400}),
                generator,
            )),
            Content::json::<RevokedBody>("They are revoked.", json!({"before": 1_774_000_000}), generator),
        ),
        Op::PullMessages => (
            None,
            Content::json::<PulledBody>(
                "Messages, oldest first.",
                json!({"messages": [{
                    "id": "order-4711", "topic": "demo/u/alice", "epoch": 3, "seq": 42,
                    "payload": "your parcel is here", "qos": 1, "published_at": "2026-03-20T09:00:00.000Z",
                    "expires_at": "2026-03-20T10:00:00.000Z",
                }], "next": "3:42", "more": false}),
                generator,
            ),
        ),
        Op::GetOverview => {
            let mut gateway = numbers.clone();
            gateway["gateway"] = json!("gateway-0");
            gateway["age_seconds"] = json!(0.4);
            gateway["state"] = json!("draining");
            gateway["moving"] = json!({
                "kind": "drain", "began_ms": 1_767_225_600_000_u64, "ended_ms": 0, "aborted": false,
                "rate_per_second": 1000.0, "total": 15, "moved": 13, "left": 2
            });
            let mut overview = numbers;
            overview["app"] = json!("demo");
            overview["gateways"] = json!([gateway]);
            (None, Content::json::<Overview>("The numbers.", overview, generator))
        }
        Op::GetOpenApi => (
            None,
            Content {
                what: "An OpenAPI 3.1 document.",
                media_type: "application/json",
                schema: json!({"type": "object"}),
                example: json!({"openapi": "3.1.0"}),
            },
        ),
        Op::GetEndpoints => (
            None,
            Content::json::<Endpoints>(
                "Gateways to try, best first.",
                json!({"endpoints": [{
                    "gateway": "gateway-0", "mqtt": "mqtt://gateway-0.example.com:1883",
                    "ws": "ws://gateway-0.example.com:8083/mqtt",
                }], "ttl_seconds": 60}),
                generator,
            ),
        ),
    }
}
