//! The API's description says what is true: every operation in it is served, every route served is in it, and its
//! examples are what the types take and give.

use std::collections::BTreeSet;

use carillon_hub::center::Overview;
use carillon_hub::center::body::{
    AcceptedBody, BatchLine, BatchResult, BroadcastBody, JobBody, KickedBody, MessageBody, PulledBody,
    RevokeBody, RevokedBody, TopicMessageBody, UserBody,
};
use carillon_hub::center::routes::ROUTES;
use carillon_hub::dispatcher::Endpoints;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::Harness;

#[tokio::test]
async fn what_is_described_is_served_and_what_is_served_is_described() {
    let harness = Harness::start().await;
    let response = harness.client.get(harness.url("/v1/openapi.json")).send().await.expect("an answer");
    assert_eq!(response.headers()["content-type"], "application/json");
    let document: Value = response.json().await.expect("JSON");
    assert_eq!(document["openapi"], "3.1.0");

    let mut described = BTreeSet::new();
    let mut ids = BTreeSet::new();
    for (path, operations) in document["paths"].as_object().expect("paths") {
        for (method, operation) in operations.as_object().expect("operations") {
            described.insert((method.to_ascii_uppercase(), path.clone()));
            let id = operation["operationId"].as_str().expect("an id").to_owned();
            assert!(ids.insert(id.clone()), "{id} is there twice");
            // With the examples of its parameters and its body it is found, and answers as it is described.
            let mut url = path.clone();
            let mut query = Vec::new();
            for parameter in operation["parameters"].as_array().expect("parameters") {
                let name = parameter["name"].as_str().expect("a name");
                let example = match &parameter["example"] {
                    Value::String(text) => text.clone(),
                    other => other.to_string(),
                };
                match parameter["in"].as_str() {
                    Some("path") => url = url.replace(&format!("{{{name}}}"), &example),
                    Some("query") => query.push(format!("{name}={example}")),
                    other => panic!("{id}: a parameter in {other:?}"),
                }
            }
            assert!(!url.contains('{'), "{id}: {url} has a parameter that is not described");
            if !query.is_empty() {
                url = format!("{url}?{}", query.join("&"));
            }
            let body =
                operation["requestBody"]["content"].as_object().and_then(|content| content.values().next());
            let body = match body.map(|body| &body["example"]) {
                Some(Value::String(lines)) => lines.clone(),
                Some(example) => example.to_string(),
                None => String::new(),
            };
            let request = harness
                .client
                .request(method.to_ascii_uppercase().parse().expect("a method"), harness.url(&url));
            let keyed = operation["security"].as_array().is_some_and(|needed| !needed.is_empty());
            let bare = request
                .try_clone()
                .expect("a body in memory")
                .body(body.clone())
                .send()
                .await
                .expect("an answer");
            assert_eq!(bare.status() == 401, keyed, "{id}");
            let answer = request.bearer_auth(crate::DEMO).body(body).send().await.expect("an answer");
            let status = answer.status().as_u16().to_string();
            let media_type = answer.headers()["content-type"].to_str().expect("text").to_owned();
            let text = answer.text().await.expect("text");
            assert_ne!(status, "405", "{id} is not served: {text}");
            let response = &operation["responses"][&status];
            let not_served = media_type == "application/problem+json" && text.contains("no-such-route");
            assert!(!not_served, "{id} is not served: {text}");
            assert!(response.is_object(), "{id}: {status} is not described: {text}");
            if let Some(content) = response["content"].as_object() {
                assert!(content.contains_key(&media_type), "{id}: {media_type} is not described");
            }
        }
    }
    let served: BTreeSet<_> =
        ROUTES.iter().map(|route| (route.method.to_string(), route.path.to_owned())).collect();
    assert_eq!(described, served);
    // Each reference leads somewhere.
    let text = document.to_string();
    for reference in text.split("\"$ref\":\"#").skip(1).filter_map(|rest| rest.split('"').next()) {
        assert!(document.pointer(reference).is_some(), "{reference} leads nowhere");
    }
}

/// The example is read as the type, and written again as it was.
fn holds<T: Serialize + DeserializeOwned>(name: &str, example: &Value) {
    let read: T =
        serde_json::from_value(example.clone()).unwrap_or_else(|error| panic!("{name}: {error}: {example}"));
    let written = serde_json::to_value(&read).unwrap_or_else(|error| panic!("{name}: {error}"));
    assert_eq!(&written, example, "{name}");
}

fn hold_lines<T: Serialize + DeserializeOwned>(name: &str, example: &Value) {
    for line in example.as_str().unwrap_or_else(|| panic!("{name}: not lines")).lines() {
        holds::<T>(name, &serde_json::from_str(line).unwrap_or_else(|error| panic!("{name}: {error}")));
    }
}

type Check = fn(&str, &Value);

#[test]
fn every_example_is_one() {
    let document = carillon_hub::center::openapi::document();
    let checks: [(&str, Option<Check>, Check); 16] = [
        ("pushToUser", Some(holds::<MessageBody>), holds::<AcceptedBody>),
        ("pushToGroup", Some(holds::<MessageBody>), holds::<AcceptedBody>),
        ("pushToTopic", Some(holds::<TopicMessageBody>), holds::<AcceptedBody>),
        ("pushBatch", Some(hold_lines::<BatchLine>), hold_lines::<BatchResult>),
        ("startBroadcast", Some(holds::<BroadcastBody>), holds::<JobBody>),
        ("getBroadcast", None, holds::<JobBody>),
        ("pauseBroadcast", None, holds::<JobBody>),
        ("resumeBroadcast", None, holds::<JobBody>),
        ("cancelBroadcast", None, holds::<JobBody>),
        ("getUser", None, holds::<UserBody>),
        ("kickUser", None, holds::<KickedBody>),
        ("revokeUser", Some(holds::<RevokeBody>), holds::<RevokedBody>),
        ("pullMessages", None, holds::<PulledBody>),
        ("getOverview", None, holds::<Overview>),
        ("getOpenApi", None, holds::<Value>),
        ("getEndpoints", None, holds::<Endpoints>),
    ];
    assert_eq!(checks.len(), ROUTES.len());
    for route in ROUTES {
        let (_, request, response) = checks
            .iter()
            .find(|(id, ..)| *id == route.id)
            .unwrap_or_else(|| panic!("{} is not checked", route.id));
        let operation = &document["paths"][route.path][route.method.as_str().to_ascii_lowercase()];
        let example = |side: &Value| {
            side["content"].as_object().and_then(|content| Some(content.values().next()?["example"].clone()))
        };
        let sent = example(&operation["requestBody"]);
        assert_eq!(sent.is_some(), request.is_some(), "{}", route.id);
        if let (Some(sent), Some(check)) = (sent, request) {
            check(route.id, &sent);
        }
        let answered = example(&operation["responses"][route.success.to_string()]);
        response(route.id, &answered.unwrap_or_else(|| panic!("{} has no example", route.id)));
    }
}
