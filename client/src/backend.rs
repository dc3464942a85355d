//! The HTTP client of a backend: push, broadcast, users, pull, over the center's JSON API.

mod types;

use std::time::Duration;

use reqwest::{Method, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;

pub use types::*;

/// A backend of one app. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Backend {
    http: reqwest::Client,
    endpoint: String,
    app: String,
    key: String,
}

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// Nothing listens there, or the connection broke before the answer came.
    #[error("nothing answers at {endpoint}")]
    Unreachable { endpoint: String, source: reqwest::Error },
    #[error("no answer from {endpoint} in time")]
    Timeout { endpoint: String },
    /// The server says what is wrong (RFC 9457).
    #[error("{0}")]
    Problem(Problem),
    #[error("{endpoint} answered {status} with what is no answer of Carillon: {body}")]
    Unexpected { endpoint: String, status: u16, body: String },
    #[error("{0:?} is not an HTTP endpoint: it must begin with http:// or https://")]
    Endpoint(String),
}

impl ApiError {
    /// Would the same call have a chance later?
    pub fn is_retryable(&self) -> bool {
        match self {
            ApiError::Unreachable { .. } | ApiError::Timeout { .. } => true,
            ApiError::Problem(problem) => matches!(problem.status, 429 | 502..=504),
            ApiError::Unexpected { status, .. } => matches!(status, 429 | 502..=504),
            ApiError::Endpoint(_) => false,
        }
    }
}

/// How long one call may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// Characters of an unexpected answer that are shown.
const SHOWN_BODY_CHARS: usize = 200;

impl Backend {
    /// `endpoint` as `http://host:port`; `key` is an API key of `app`.
    pub fn new(
        endpoint: impl Into<String>,
        app: impl Into<String>,
        key: impl Into<String>,
    ) -> Result<Self, ApiError> {
        let endpoint = normal(&endpoint.into())?;
        let http = client(&endpoint, CALL_TIMEOUT)?;
        Ok(Backend { http, endpoint, app: app.into(), key: key.into() })
    }

    /// Pushes one message; returns once it is accepted, which for a stored message means stored.
    pub async fn push(&self, to: &To, message: &Push) -> Result<Pushed, ApiError> {
        let path = match to {
            To::User(user) => self.path(&["users", user, "messages"]),
            To::Group(group) => self.path(&["groups", group, "messages"]),
            To::Topic(_) => self.path(&["messages"]),
        };
        let topic = if let To::Topic(topic) = to { Some(topic.as_str()) } else { None };
        self.call(Method::POST, &path, Some(&PushBody { topic, user: None, group: None, message })).await
    }

    /// Pushes many messages in one request; one answer each, in the order given.
    pub async fn push_batch(&self, messages: &[(To, Push)]) -> Result<Vec<BatchResult>, ApiError> {
        let mut body = Vec::new();
        for (to, message) in messages {
            let line = match to {
                To::User(user) => PushBody { topic: None, user: Some(user), group: None, message },
                To::Group(group) => PushBody { topic: None, user: None, group: Some(group), message },
                To::Topic(topic) => PushBody { topic: Some(topic), user: None, group: None, message },
            };
            // A struct of strings and numbers always serializes.
            if serde_json::to_writer(&mut body, &line).is_ok() {
                body.push(b'\n');
            }
        }
        let path = self.path(&["messages:batch"]);
        let request = self
            .http
            .post(format!("{}{path}", self.endpoint))
            .bearer_auth(&self.key)
            .header("content-type", "application/x-ndjson")
            .body(body);
        let (status, text) = self.text(request).await?;
        text.lines()
            .filter(|line| !line.trim().is_empty())
            .map(|line| serde_json::from_str(line).map_err(|_| unexpected(&self.endpoint, status, line)))
            .collect()
    }

    /// Starts a broadcast to everyone in the app.
    pub async fn broadcast(&self, request: &BroadcastRequest) -> Result<Broadcast, ApiError> {
        self.call(Method::POST, &self.path(&["broadcasts"]), Some(request)).await
    }

    /// How far a broadcast is.
    pub async fn broadcast_status(&self, id: &str) -> Result<Broadcast, ApiError> {
        self.call(Method::GET, &self.path(&["broadcasts", id]), None::<&()>).await
    }

    /// Pauses, resumes or cancels a broadcast.
    pub async fn broadcast_control(&self, id: &str, action: BroadcastAction) -> Result<Broadcast, ApiError> {
        let path = format!("{}:{}", self.path(&["broadcasts", id]), action.as_str());
        self.call(Method::POST, &path, None::<&()>).await
    }

    /// Is a user online, and with which sessions?
    pub async fn user(&self, user: &str) -> Result<User, ApiError> {
        self.call(Method::GET, &self.path(&["users", user]), None::<&()>).await
    }

    /// Disconnects all sessions of a user; gives their number.
    pub async fn kick(&self, user: &str) -> Result<Kicked, ApiError> {
        self.call(Method::DELETE, &self.path(&["users", user, "sessions"]), None::<&()>).await
    }

    /// Revokes a user's tokens, those issued up to now: they are refused, and who is connected with one is disconnected.
    pub async fn revoke(&self, user: &str) -> Result<Revoked, ApiError> {
        let all = serde_json::Map::new();
        self.call(Method::POST, &self.path(&["users", user, "revoke"]), Some(&all)).await
    }

    /// Reads what a topic keeps, after a position (`{epoch}:{seq}`; empty = from the beginning).
    pub async fn pull(&self, topic: &str, after: &str, limit: u32) -> Result<Pulled, ApiError> {
        let path = self.path(&["topics", topic, "messages"]);
        let query = if after.is_empty() { String::new() } else { format!("after={}&", segment(after)) };
        self.call(Method::GET, &format!("{path}?{query}limit={limit}"), None::<&()>).await
    }

    /// The numbers of the app and of the gateways.
    pub async fn overview(&self) -> Result<Overview, ApiError> {
        self.call(Method::GET, &self.path(&["overview"]), None::<&()>).await
    }

    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    fn path(&self, segments: &[&str]) -> String {
        let mut path = format!("/v1/apps/{}", segment(&self.app));
        for each in segments {
            path.push('/');
            path.push_str(&segment(each));
        }
        path
    }

    async fn call<B: Serialize, T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&B>,
    ) -> Result<T, ApiError> {
        let mut request =
            self.http.request(method, format!("{}{path}", self.endpoint)).bearer_auth(&self.key);
        if let Some(body) = body {
            request = request.json(body);
        }
        let (status, text) = self.text(request).await?;
        serde_json::from_str(&text).map_err(|_| unexpected(&self.endpoint, status, &text))
    }

    async fn text(&self, request: reqwest::RequestBuilder) -> Result<(StatusCode, String), ApiError> {
        answer(&self.endpoint, request).await
    }
}

/// Which gateways a device should try, best first, as `mqtt://host:port`. Needs no key.
pub async fn endpoints(dispatcher: &str, device: &str, timeout: Duration) -> Result<Vec<String>, ApiError> {
    let dispatcher = normal(dispatcher)?;
    let http = client(&dispatcher, timeout)?;
    let request = http.get(format!("{dispatcher}/v1/endpoints?device={}", segment(device)));
    let (status, text) = answer(&dispatcher, request).await?;
    let answer: Endpoints =
        serde_json::from_str(&text).map_err(|_| unexpected(&dispatcher, status, &text))?;
    Ok(answer.addresses())
}

fn normal(endpoint: &str) -> Result<String, ApiError> {
    if endpoint.starts_with("http://") || endpoint.starts_with("https://") {
        Ok(endpoint.trim_end_matches('/').to_owned())
    } else {
        Err(ApiError::Endpoint(endpoint.to_owned()))
    }
}

fn client(endpoint: &str, timeout: Duration) -> Result<reqwest::Client, ApiError> {
    reqwest::Client::builder()
        .timeout(timeout)
        .connect_timeout(Duration::from_secs(5))
        .build()
        .map_err(|source| ApiError::Unreachable { endpoint: endpoint.to_owned(), source })
}

async fn answer(endpoint: &str, request: reqwest::RequestBuilder) -> Result<(StatusCode, String), ApiError> {
    let failed = |source: reqwest::Error| {
        if source.is_timeout() && !source.is_connect() {
            ApiError::Timeout { endpoint: endpoint.to_owned() }
        } else {
            ApiError::Unreachable { endpoint: endpoint.to_owned(), source }
        }
    };
    let response = request.send().await.map_err(failed)?;
    let status = response.status();
    let text = response.text().await.map_err(failed)?;
    if status.is_success() {
        return Ok((status, text));
    }
    match serde_json::from_str::<Problem>(&text) {
        Ok(problem) if !problem.title.is_empty() => {
            Err(ApiError::Problem(Problem { status: status.as_u16(), ..problem }))
        }
        _ => Err(unexpected(endpoint, status, &text)),
    }
}

fn unexpected(endpoint: &str, status: StatusCode, body: &str) -> ApiError {
    let body = body.chars().take(SHOWN_BODY_CHARS).collect();
    ApiError::Unexpected { endpoint: endpoint.to_owned(), status: status.as_u16(), body }
}

/// Percent-encodes one path segment or query value (RFC 3986 §2.1).
fn segment(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~' | b':') {
            encoded.push(byte as char);
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_are_encoded() {
        assert_eq!(segment("alice"), "alice");
        assert_eq!(segment("a b/c?d#é"), "a%20b%2Fc%3Fd%23%C3%A9");
        assert_eq!(segment("1:42"), "1:42");
    }

    #[tokio::test]
    async fn nothing_listening_is_named() {
        let backend = Backend::new("http://127.0.0.1:9/", "demo", "key").unwrap();
        let error = backend.user("alice").await.unwrap_err();
        assert_eq!(error.to_string(), "nothing answers at http://127.0.0.1:9");
        assert!(error.is_retryable());
        assert!(Backend::new("127.0.0.1:8080", "demo", "key").is_err());
    }
}
