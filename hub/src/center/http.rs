//! HTTP+JSON: the routes of the table, each a thin skin over a method of the core.

use std::future::Future;
use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::{FromRequestParts, MatchedPath, Path, Query, Request, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, any, delete, get, post};
use bytes::BytesMut;
use carillon_agent::Role;
use carillon_proto::v1::broadcast_control::State as Control;
use carillon_proto::v1::center_server::CenterServer;
use futures::StreamExt;
use http::request::Parts;
use http::{HeaderName, HeaderValue, Method, StatusCode, header};
use serde::de::DeserializeOwned;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;
use tonic::server::NamedService;
use tower_http::cors::CorsLayer;

use super::body::{
    AcceptedBody, BroadcastBody, JobBody, KickedBody, MessageBody, PulledBody, RevokeBody, RevokedBody,
    TopicMessageBody, UserBody, parse,
};
use super::grpc::Grpc;
use super::routes::{Op, ROUTES};
use super::{Caller, Center, DEFAULT_PULL, Push, To, auth, batch, openapi};
use crate::problem::{Kind, Problem};

/// All routes of the center, and a problem for all else under `/v1`; beside them the gRPC service, so that one port
/// serves both.
pub fn router(center: Center) -> axum::Router {
    let grpc = center.grpc_service();
    let grpc_path = format!("/{}/{{*method}}", <CenterServer<Grpc> as NamedService>::NAME);
    let mut router = axum::Router::new();
    let mut served = std::collections::BTreeSet::new();
    for route in ROUTES.iter().filter(|route| route.role == Role::Center) {
        // The controls of a broadcast are several operations of the API, but one route.
        if served.insert((route.served_as, route.method.as_str())) {
            router = router.route(route.served_as, handler(route.op));
        }
    }
    router = router.method_not_allowed_fallback(method_not_allowed);
    for rest in ["/v1", "/v1/", "/v1/{*rest}"] {
        router = router.route(rest, any(no_such_route));
    }
    router
        .layer(middleware::from_fn_with_state(center.clone(), admit))
        .layer(cors())
        .layer(middleware::from_fn_with_state(center.clone(), observe))
        .with_state(center)
        .route_service(&grpc_path, grpc)
}

fn handler(op: Op) -> MethodRouter<Center> {
    match op {
        Op::PushToUser => post(push_to_user),
        Op::PushToGroup => post(push_to_group),
        Op::PushToTopic => post(push_to_topic),
        Op::PushBatch => post(push_batch),
        Op::StartBroadcast => post(start_broadcast),
        Op::GetBroadcast => get(get_broadcast),
        Op::PauseBroadcast | Op::ResumeBroadcast | Op::CancelBroadcast => post(control_broadcast),
        Op::GetUser => get(get_user),
        Op::KickUser => delete(kick_user),
        Op::RevokeUser => post(revoke_user),
        Op::PullMessages => get(pull),
        Op::GetOverview => get(overview),
        Op::GetOpenApi => get(openapi_document),
        // The dispatcher serves it; it is not among the center's routes.
        Op::GetEndpoints => any(no_such_route),
    }
}

/// Browsers of any origin may call: what protects the API is the key, and that no browser adds by itself.
pub(crate) fn cors() -> CorsLayer {
    CorsLayer::new()
        .allow_origin(tower_http::cors::Any)
        .allow_methods([Method::GET, Method::POST, Method::DELETE])
        .allow_headers([header::AUTHORIZATION, header::CONTENT_TYPE])
        .expose_headers([header::RETRY_AFTER, header::WWW_AUTHENTICATE])
        .max_age(Duration::from_secs(3600))
}

pub(crate) async fn method_not_allowed(request: Request) -> Problem {
    let (method, path) = (request.method(), request.uri().path());
    Problem::new(Kind::MethodNotAllowed, format!("{path} has no method {method}; see /v1/openapi.json"))
}

async fn no_such_route(request: Request) -> Problem {
    no_route(request.uri().path())
}

fn no_route(path: &str) -> Problem {
    Problem::new(Kind::NoSuchRoute, format!("there is nothing at {path}; see /v1/openapi.json"))
}

/// Counts and times each request.
async fn observe(State(center): State<Center>, request: Request, next: Next) -> Response {
    let started = Instant::now();
    let in_flight = center.inner.metrics.begin();
    // A method that nobody knows must not become a label.
    let method = match *request.method() {
        Method::GET | Method::POST | Method::DELETE | Method::HEAD | Method::OPTIONS => {
            request.method().as_str()
        }
        _ => "OTHER",
    };
    let route = match request.extensions().get::<MatchedPath>() {
        Some(path) => format!("{method} {}", path.as_str()),
        None => method.to_owned(),
    };
    let response = next.run(request).await;
    drop(in_flight);
    center.inner.metrics.request(&route, response.status().as_str(), started.elapsed());
    response
}

/// Lets in as many requests as there may be at a time, for as long as each may take.
async fn admit(State(center): State<Center>, request: Request, next: Next) -> Response {
    let Ok(_permit) = center.inner.requests.try_acquire() else {
        return Problem::new(Kind::Overloaded, "too many requests are being carried out").into_response();
    };
    let limit = center.inner.options.request_timeout;
    let mut response = match tokio::time::timeout(limit, next.run(request)).await {
        Ok(response) => response,
        Err(_) => {
            Problem::new(Kind::Unavailable, format!("no answer within {} s", limit.as_secs())).into_response()
        }
    };
    response.headers_mut().entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    response
}

/// The segments of the path, decoded.
struct Segments<T>(T);

impl<T: DeserializeOwned + Send> FromRequestParts<Center> for Segments<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, center: &Center) -> Result<Self, Problem> {
        match Path::<T>::from_request_parts(parts, center).await {
            Ok(Path(segments)) => Ok(Segments(segments)),
            Err(rejection) => {
                Err(Problem::field("path", format!("cannot be read: {}", rejection.body_text())))
            }
        }
    }
}

/// The parameters after the `?`: each at most once, and none that nobody asks for.
pub(crate) struct Parameters(Vec<(String, String)>);

impl Parameters {
    pub(crate) fn of(parts: &Parts) -> Result<Self, Problem> {
        let Query(pairs) = Query::<Vec<(String, String)>>::try_from_uri(&parts.uri)
            .map_err(|error| Problem::field("query", format!("cannot be read: {}", error.body_text())))?;
        for (i, (name, _)) in pairs.iter().enumerate() {
            if pairs[..i].iter().any(|(earlier, _)| earlier == name) {
                return Err(Problem::field(name, "is given twice"));
            }
        }
        Ok(Parameters(pairs))
    }

    pub(crate) fn take(&mut self, name: &str) -> Option<String> {
        let at = self.0.iter().position(|(known, _)| known == name)?;
        Some(self.0.swap_remove(at).1)
    }

    /// All known ones were taken.
    pub(crate) fn end(self) -> Result<(), Problem> {
        match self.0.first() {
            Some((name, _)) => Err(Problem::field(name, "is not a parameter of this route")),
            None => Ok(()),
        }
    }
}

fn caller(center: &Center, parts: &Parts, app: &str) -> Result<Caller, Problem> {
    let header = parts.headers.get(header::AUTHORIZATION).map(HeaderValue::as_bytes);
    center.authorise(app, auth::bearer(header))
}

/// Nothing may follow the `?`.
fn no_parameters(parts: &Parts) -> Result<(), Problem> {
    Parameters::of(parts)?.end()
}

/// A body that was read, and its part of the memory for bodies.
struct Read {
    bytes: BytesMut,
    _budget: OwnedSemaphorePermit,
}

async fn read_body(center: &Center, parts: &Parts, body: Body) -> Result<Read, Problem> {
    let options = &center.inner.options;
    let limit = options.max_body_bytes;
    let too_large = || {
        Problem::new(
            Kind::PayloadTooLarge,
            format!("the body is longer than {limit} bytes (larger ones: a batch)"),
        )
    };
    let announced = content_length(parts);
    if announced.is_some_and(|length| length > limit as u64) {
        return Err(too_large());
    }
    let kib = announced.map_or(limit, |length| length as usize).div_ceil(1024).max(1);
    let budget = center
        .inner
        .bodies_kib
        .clone()
        .try_acquire_many_owned(u32::try_from(kib).unwrap_or(u32::MAX))
        .map_err(|_| Problem::new(Kind::Overloaded, "too many large requests are being carried out"))?;
    let deadline = Instant::now() + options.body_timeout;
    let mut bytes = BytesMut::new();
    let mut stream = body.into_data_stream();
    loop {
        let chunk = match tokio::time::timeout_at(deadline, stream.next()).await {
            Err(_) => {
                let seconds = options.body_timeout.as_secs();
                return Err(Problem::new(
                    Kind::RequestTimeout,
                    format!("the body did not come within {seconds} s"),
                ));
            }
            Ok(None) => return Ok(Read { bytes, _budget: budget }),
            Ok(Some(Err(error))) => {
                return Err(Problem::new(Kind::MalformedJson, format!("the body cannot be read: {error}")));
            }
            Ok(Some(Ok(chunk))) => chunk,
        };
        if bytes.len() + chunk.len() > limit {
            return Err(too_large());
        }
        bytes.extend_from_slice(&chunk);
    }
}

fn content_length(parts: &Parts) -> Option<u64> {
    parts.headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// The caller, checked before anything of the body is read, and the body.
async fn message<T: DeserializeOwned>(
    center: &Center,
    app: &str,
    request: Request,
) -> Result<(Caller, T), Problem> {
    let (parts, body) = request.into_parts();
    let caller = caller(center, &parts, app)?;
    no_parameters(&parts)?;
    let read = read_body(center, &parts, body).await?;
    Ok((caller, parse(&read.bytes)?))
}

async fn push(center: &Center, caller: &Caller, push: Push) -> Result<Response, Problem> {
    let accepted = center.push(caller, push)?.await?;
    Ok((StatusCode::ACCEPTED, Json(AcceptedBody::from(accepted))).into_response())
}

async fn push_to_user(
    State(center): State<Center>,
    Segments((app, user)): Segments<(String, String)>,
    request: Request,
) -> Result<Response, Problem> {
    let (caller, body) = message::<MessageBody>(&center, &app, request).await?;
    push(&center, &caller, body.into_push(To::User(user))?).await
}

async fn push_to_group(
    State(center): State<Center>,
    Segments((app, group)): Segments<(String, String)>,
    request: Request,
) -> Result<Response, Problem> {
    let (caller, body) = message::<MessageBody>(&center, &app, request).await?;
    push(&center, &caller, body.into_push(To::Group(group))?).await
}

async fn push_to_topic(
    State(center): State<Center>,
    Segments(app): Segments<String>,
    request: Request,
) -> Result<Response, Problem> {
    let (caller, body) = message::<TopicMessageBody>(&center, &app, request).await?;
    let to = body.to()?;
    push(&center, &caller, body.into_push(to)?).await
}

async fn push_batch(
    State(center): State<Center>,
    Segments(app): Segments<String>,
    request: Request,
) -> Result<Response, Problem> {
    let (parts, body) = request.into_parts();
    let caller = caller(&center, &parts, &app)?;
    no_parameters(&parts)?;
    let limit = center.inner.options.max_batch_bytes;
    if content_length(&parts).is_some_and(|length| length > limit as u64) {
        return Err(Problem::new(Kind::PayloadTooLarge, format!("the batch is longer than {limit} bytes")));
    }
    let lines = batch::start(&center, caller, body)?;
    Ok(([(header::CONTENT_TYPE, batch::MEDIA_TYPE)], Body::from_stream(lines)).into_response())
}

async fn start_broadcast(
    State(center): State<Center>,
    Segments(app): Segments<String>,
    request: Request,
) -> Result<Response, Problem> {
    let (caller, body) = message::<BroadcastBody>(&center, &app, request).await?;
    let job = center.start_broadcast(&caller, body.into_broadcast()?).await?;
    let location = format!("/v1/apps/{app}/broadcasts/{}", percent_encode(&job.id));
    let location = HeaderValue::from_str(&location).ok().map(|value| [(header::LOCATION, value)]);
    let body = Json(JobBody::from(job));
    Ok(match location {
        Some(location) => (StatusCode::ACCEPTED, location, body).into_response(),
        None => (StatusCode::ACCEPTED, body).into_response(),
    })
}

/// A path segment (RFC 3986 §2.3: unreserved characters stay).
fn percent_encode(segment: &str) -> String {
    let mut encoded = String::with_capacity(segment.len());
    for byte in segment.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

async fn get_broadcast(
    State(center): State<Center>,
    Segments((app, job)): Segments<(String, String)>,
    request: Request,
) -> Result<Json<JobBody>, Problem> {
    let (parts, _) = request.into_parts();
    let caller = caller(&center, &parts, &app)?;
    no_parameters(&parts)?;
    Ok(Json(center.broadcast(&caller, &job).await?.into()))
}

async fn control_broadcast(
    State(center): State<Center>,
    Segments((app, job)): Segments<(String, String)>,
    request: Request,
) -> Result<Response, Problem> {
    let (parts, _) = request.into_parts();
    let caller = caller(&center, &parts, &app)?;
    no_parameters(&parts)?;
    // The id may hold colons itself: what follows the last one is the verb.
    let (job, control) = match job.rsplit_once(':') {
        Some((job, "pause")) => (job, Control::Pause),
        Some((job, "resume")) => (job, Control::Run),
        Some((job, "cancel")) => (job, Control::Cancel),
        _ => {
            let problem = Problem::new(
                Kind::MethodNotAllowed,
                "a POST to a broadcast ends in :pause, :resume or :cancel, as in /v1/apps/demo/broadcasts/sale:pause",
            );
            return Ok(([(header::ALLOW, "GET,HEAD")], problem).into_response());
        }
    };
    let job = center.control_broadcast(&caller, job, control).await?;
    Ok(Json(JobBody::from(job)).into_response())
}

async fn get_user(
    State(center): State<Center>,
    Segments((app, user)): Segments<(String, String)>,
    request: Request,
) -> Result<Json<UserBody>, Problem> {
    let (parts, _) = request.into_parts();
    let caller = caller(&center, &parts, &app)?;
    no_parameters(&parts)?;
    Ok(Json(center.user(&caller, &user).await?.into()))
}

async fn kick_user(
    State(center): State<Center>,
    Segments((app, user)): Segments<(String, String)>,
    request: Request,
) -> Result<Json<KickedBody>, Problem> {
    let (parts, _) = request.into_parts();
    let caller = caller(&center, &parts, &app)?;
    let mut parameters = Parameters::of(&parts)?;
    let device = parameters.take("device");
    parameters.end()?;
    Ok(Json(KickedBody { kicked: center.kick(&caller, &user, device.as_deref()).await? }))
}

async fn revoke_user(
    State(center): State<Center>,
    Segments((app, user)): Segments<(String, String)>,
    request: Request,
) -> Result<Json<RevokedBody>, Problem> {
    let (caller, body) = message::<RevokeBody>(&center, &app, request).await?;
    let before = center.revoke(&caller, &user, body.before, body.token_lifetime_seconds).await?;
    Ok(Json(RevokedBody { before }))
}

async fn pull(
    State(center): State<Center>,
    Segments((app, rest)): Segments<(String, String)>,
    request: Request,
) -> Result<Json<PulledBody>, Problem> {
    let (parts, _) = request.into_parts();
    let caller = caller(&center, &parts, &app)?;
    // As it was sent: the last segment is the word itself, not part of a topic that ends in it.
    let name = match (parts.uri.path().ends_with("/messages"), rest.strip_suffix("/messages")) {
        (true, Some(name)) => name,
        _ => return Err(no_route(parts.uri.path())),
    };
    let mut parameters = Parameters::of(&parts)?;
    let after = parameters.take("after");
    let limit = match parameters.take("limit") {
        None => DEFAULT_PULL,
        Some(limit) => limit.parse().map_err(|_| Problem::field("limit", "must be a number"))?,
    };
    parameters.end()?;
    Ok(Json(center.pull(&caller, name, after.as_deref(), limit).await?.into()))
}

async fn overview(
    State(center): State<Center>,
    Segments(app): Segments<String>,
    request: Request,
) -> Result<Response, Problem> {
    let (parts, _) = request.into_parts();
    let caller = caller(&center, &parts, &app)?;
    no_parameters(&parts)?;
    Ok(Json(center.overview(&caller).await?).into_response())
}

fn openapi_document() -> impl Future<Output = Response> + Send {
    std::future::ready(
        ([(HeaderName::from_static("content-type"), "application/json")], openapi::text()).into_response(),
    )
}
