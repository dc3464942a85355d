//! An API server that is played: it keeps what is applied, as one does, and writes down who wrote what.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;

use http::{Method, Request, Response};
use kube::Client;
use kube::client::Body;
use parking_lot::Mutex;
use serde_json::{Value, json};

#[derive(Default)]
pub struct State {
    /// By path.
    objects: BTreeMap<String, Value>,
    pub writes: Vec<String>,
    /// Kinds (the plural in the path) that are not known.
    pub unknown: Vec<&'static str>,
    count: u64,
}

#[derive(Clone, Default)]
pub struct Api(pub Arc<Mutex<State>>);

fn failure(code: u16, reason: &str) -> (u16, Value) {
    let message = format!("played: {reason}");
    (
        code,
        json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "reason": reason, "code": code}),
    )
}

impl Api {
    pub fn client(&self) -> Client {
        let api = self.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let api = api.clone();
            async move {
                let (parts, body) = request.into_parts();
                let body = body.collect_bytes().await.unwrap();
                let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
                let query = parts.uri.query().unwrap_or_default();
                let (code, answer) = api.0.lock().answer(&parts.method, parts.uri.path(), query, body);
                let answer = Body::from(serde_json::to_vec(&answer).unwrap());
                Ok::<_, Infallible>(Response::builder().status(code).body(answer).unwrap())
            }
        });
        Client::new(service, "push")
    }

    /// The object that ends so, as `statefulsets/chat-keeper`.
    pub fn get(&self, end: &str) -> Option<Value> {
        let state = self.0.lock();
        let found = state.objects.iter().find(|(path, _)| path.ends_with(&format!("/{end}")));
        found.map(|(_, object)| object.clone())
    }

    pub fn change(&self, end: &str, change: impl FnOnce(&mut Value)) {
        let mut state = self.0.lock();
        let found = state.objects.iter_mut().find(|(path, _)| path.ends_with(&format!("/{end}")));
        change(found.unwrap_or_else(|| panic!("there is no {end}")).1);
    }

    pub fn put(&self, path: &str, object: Value) {
        self.0.lock().objects.insert(path.to_owned(), object);
    }

    pub fn delete(&self, end: &str) {
        self.0.lock().objects.retain(|path, _| !path.ends_with(&format!("/{end}")));
    }

    /// What was written since this was last asked.
    pub fn writes(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().writes)
    }
}

impl State {
    fn answer(&mut self, method: &Method, path: &str, query: &str, body: Value) -> (u16, Value) {
        if self.unknown.iter().any(|kind| path.contains(&format!("/{kind}/"))) {
            return failure(404, "NotFound");
        }
        let (own, is_status) = match path.strip_suffix("/status") {
            Some(own) => (own, true),
            None => (path, false),
        };
        match *method {
            Method::GET => match self.objects.get(path) {
                Some(object) => (200, object.clone()),
                None if path.ends_with("/persistentvolumeclaims") => {
                    let within = format!("{path}/");
                    let items = self.objects.iter().filter(|(at, claim)| {
                        at.starts_with(&within)
                            && claim["metadata"]["labels"].as_object().is_some_and(|labels| {
                                labels.values().all(|value| query.contains(value.as_str().unwrap_or("?")))
                            })
                    });
                    let items: Vec<&Value> = items.map(|(_, claim)| claim).collect();
                    (
                        200,
                        json!({"apiVersion": "v1", "kind": "PersistentVolumeClaimList", "metadata": {}, "items": items}),
                    )
                }
                None => failure(404, "NotFound"),
            },
            Method::PATCH => {
                self.count += 1;
                let end: Vec<&str> = path.rsplitn(3, '/').collect();
                self.writes.push(if is_status {
                    "status".to_owned()
                } else {
                    format!("{}/{}", end[1], end[0])
                });
                let before = self.objects.get(own).cloned();
                let mut object = before.clone().unwrap_or(Value::Null);
                if is_status {
                    object["status"] = body["status"].clone();
                } else if query.contains("force=true") {
                    let status = object.get("status").cloned();
                    let old = object.get("metadata").cloned().unwrap_or(Value::Null);
                    object = body;
                    object["metadata"]["uid"] =
                        old.get("uid").cloned().unwrap_or_else(|| json!(format!("uid-{}", self.count)));
                    let generation = old.get("generation").and_then(Value::as_i64).unwrap_or(0) + 1;
                    object["metadata"]["generation"] = json!(generation);
                    // Filled in, as a server does.
                    if object["kind"] == "Service" && object["spec"].get("clusterIP").is_none() {
                        object["spec"]["clusterIP"] = json!("10.0.0.1");
                    }
                    if let Some(status) = status {
                        object["status"] = status;
                    }
                } else {
                    // One field of a volume.
                    object["spec"]["resources"]["requests"] = body["spec"]["resources"]["requests"].clone();
                }
                self.objects.insert(own.to_owned(), object.clone());
                (200, object)
            }
            Method::DELETE => {
                let end: Vec<&str> = path.rsplitn(3, '/').collect();
                self.writes.push(format!("delete {}/{}", end[1], end[0]));
                match self.objects.remove(path) {
                    Some(object) => (200, object),
                    None => failure(404, "NotFound"),
                }
            }
            _ => failure(405, "MethodNotAllowed"),
        }
    }
}
