//! What goes wrong at the HTTP and gRPC APIs of a hub: problem documents (RFC 9457), their stable types in one table.

use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tonic::Code;

/// Where problem types live; a type is this and the slug. An identifier that happens to be a URL, stable for ever.
pub const TYPE_PREFIX: &str = "https://carillon.dev/problems/";
/// The media type of a problem document.
pub const MEDIA_TYPE: &str = "application/problem+json";

/// Every kind of problem there is. Slugs never change their meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    Unauthorised,
    Forbidden,
    UnknownApp,
    UnknownBroadcast,
    NoSuchRoute,
    MethodNotAllowed,
    MalformedJson,
    InvalidField,
    PayloadTooLarge,
    RequestTimeout,
    Conflict,
    Refused,
    TooManyRequests,
    Overloaded,
    Unavailable,
    NoGateway,
}

/// One line of the table of problems.
#[derive(Debug)]
pub struct Entry {
    pub kind: Kind,
    pub slug: &'static str,
    pub title: &'static str,
    pub status: StatusCode,
    pub code: Code,
}

const fn entry(kind: Kind, slug: &'static str, title: &'static str, status: StatusCode, code: Code) -> Entry {
    Entry { kind, slug, title, status, code }
}

/// The table, in the order of [`Kind`].
pub static PROBLEMS: [Entry; 16] = [
    entry(
        Kind::Unauthorised,
        "unauthorised",
        "A valid API key is needed",
        StatusCode::UNAUTHORIZED,
        Code::Unauthenticated,
    ),
    entry(
        Kind::Forbidden,
        "forbidden",
        "The API key is another app's",
        StatusCode::FORBIDDEN,
        Code::PermissionDenied,
    ),
    entry(Kind::UnknownApp, "unknown-app", "There is no such app", StatusCode::NOT_FOUND, Code::NotFound),
    entry(
        Kind::UnknownBroadcast,
        "unknown-broadcast",
        "There is no such broadcast",
        StatusCode::NOT_FOUND,
        Code::NotFound,
    ),
    entry(
        Kind::NoSuchRoute,
        "no-such-route",
        "There is no such route",
        StatusCode::NOT_FOUND,
        Code::Unimplemented,
    ),
    entry(
        Kind::MethodNotAllowed,
        "method-not-allowed",
        "The route has no such method",
        StatusCode::METHOD_NOT_ALLOWED,
        Code::Unimplemented,
    ),
    entry(
        Kind::MalformedJson,
        "malformed-json",
        "The body is not the JSON it should be",
        StatusCode::BAD_REQUEST,
        Code::InvalidArgument,
    ),
    entry(
        Kind::InvalidField,
        "invalid-field",
        "A field is wrong",
        StatusCode::BAD_REQUEST,
        Code::InvalidArgument,
    ),
    entry(
        Kind::PayloadTooLarge,
        "payload-too-large",
        "The message or the request is too large",
        StatusCode::PAYLOAD_TOO_LARGE,
        Code::ResourceExhausted,
    ),
    entry(
        Kind::RequestTimeout,
        "request-timeout",
        "The request came too slowly",
        StatusCode::REQUEST_TIMEOUT,
        Code::DeadlineExceeded,
    ),
    entry(
        Kind::Conflict,
        "conflict",
        "The state of it does not allow that",
        StatusCode::CONFLICT,
        Code::FailedPrecondition,
    ),
    entry(
        Kind::Refused,
        "refused",
        "The topic's owner does not accept this",
        StatusCode::UNPROCESSABLE_ENTITY,
        Code::InvalidArgument,
    ),
    entry(
        Kind::TooManyRequests,
        "too-many-requests",
        "The app's rate is used up",
        StatusCode::TOO_MANY_REQUESTS,
        Code::ResourceExhausted,
    ),
    entry(
        Kind::Overloaded,
        "overloaded",
        "A queue is full at the moment",
        StatusCode::SERVICE_UNAVAILABLE,
        Code::Unavailable,
    ),
    entry(
        Kind::Unavailable,
        "unavailable",
        "A part of the cluster does not answer",
        StatusCode::SERVICE_UNAVAILABLE,
        Code::Unavailable,
    ),
    entry(
        Kind::NoGateway,
        "no-gateway",
        "No gateway takes connections at the moment",
        StatusCode::SERVICE_UNAVAILABLE,
        Code::Unavailable,
    ),
];

impl Kind {
    pub fn entry(self) -> &'static Entry {
        &PROBLEMS[self as usize]
    }
}

/// What went wrong with one request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{detail}")]
pub struct Problem {
    pub kind: Kind,
    /// For people: what exactly, and what to do.
    pub detail: String,
    /// The field, parameter or path segment that is wrong.
    pub field: Option<String>,
    /// When to ask again, seconds.
    pub retry_after_seconds: Option<u64>,
}

impl Problem {
    pub fn new(kind: Kind, detail: impl Into<String>) -> Self {
        let retry_after_seconds =
            matches!(kind, Kind::TooManyRequests | Kind::Overloaded | Kind::Unavailable | Kind::NoGateway)
                .then_some(1);
        Problem { kind, detail: detail.into(), field: None, retry_after_seconds }
    }

    /// `what` follows the name of the field: "must be 0 or 1".
    pub fn field(field: impl Into<String>, what: impl std::fmt::Display) -> Self {
        let field = field.into();
        Problem {
            field: Some(field.clone()),
            ..Problem::new(Kind::InvalidField, format!("`{field}` {what}"))
        }
    }

    /// The document, without an `instance`.
    pub fn document(&self) -> ProblemDocument {
        let entry = self.kind.entry();
        ProblemDocument {
            r#type: format!("{TYPE_PREFIX}{}", entry.slug),
            title: entry.title.to_owned(),
            status: entry.status.as_u16(),
            detail: self.detail.clone(),
            field: self.field.clone(),
            instance: None,
            line: None,
        }
    }
}

/// A problem document (RFC 9457).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Problem")]
pub struct ProblemDocument {
    /// Which kind of problem; stable.
    pub r#type: String,
    /// The kind in words.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// What exactly is wrong.
    pub detail: String,
    /// The field, parameter or path segment that is wrong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
    /// This occurrence, as it is in the logs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<String>,
    /// In the answer to a batch: the line of the request, counted from 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub line: Option<u64>,
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let entry = self.kind.entry();
        let mut document = self.document();
        if entry.status.is_server_error() {
            let instance = format!("urn:uuid:{}", uuid::Uuid::now_v7());
            tracing::warn!(problem = entry.slug, detail = %self.detail, %instance, "request failed");
            document.instance = Some(instance);
        }
        let body = serde_json::to_vec(&document).unwrap_or_default();
        let mut response = (entry.status, [(header::CONTENT_TYPE, MEDIA_TYPE)], body).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if self.kind == Kind::Unauthorised {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"carillon\""));
        }
        if let Some(seconds) = self.retry_after_seconds {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

impl From<Problem> for tonic::Status {
    fn from(problem: Problem) -> Self {
        tonic::Status::new(problem.kind.entry().code, problem.detail)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_the_order_of_the_kinds_and_its_slugs_are_unique() {
        let mut slugs = std::collections::BTreeSet::new();
        for (i, entry) in PROBLEMS.iter().enumerate() {
            assert_eq!(entry.kind as usize, i, "{}", entry.slug);
            assert!(slugs.insert(entry.slug), "{} is there twice", entry.slug);
        }
    }
}
