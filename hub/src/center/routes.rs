//! The table of routes: what is served, where, and what it may answer. The router and the OpenAPI document are both
//! made from it.

use carillon_agent::Role;
use http::Method;

use crate::problem::Kind;

/// An operation of the API.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Op {
    PushToUser,
    PushToGroup,
    PushToTopic,
    PushBatch,
    StartBroadcast,
    GetBroadcast,
    PauseBroadcast,
    ResumeBroadcast,
    CancelBroadcast,
    GetUser,
    KickUser,
    RevokeUser,
    PullMessages,
    GetOverview,
    GetOpenApi,
    GetEndpoints,
}

/// One operation: where it is and what it may answer.
#[derive(Debug)]
pub struct Route {
    pub op: Op,
    pub id: &'static str,
    /// Which role serves it.
    pub role: Role,
    pub method: Method,
    /// The path as OpenAPI has it.
    pub path: &'static str,
    /// The path as the router has it.
    pub served_as: &'static str,
    /// Needs an API key.
    pub key: bool,
    pub summary: &'static str,
    pub success: u16,
    /// Parameters after the `?`.
    pub query: &'static [Parameter],
    /// What may be in the way: lists that are common to several, and its own.
    problems: &'static [&'static [Kind]],
}

impl Route {
    /// Everything that may be in the way.
    pub fn problems(&self) -> impl Iterator<Item = Kind> + '_ {
        self.problems.iter().copied().flatten().copied()
    }
}

/// A parameter.
#[derive(Debug)]
pub struct Parameter {
    pub name: &'static str,
    pub required: bool,
    pub description: &'static str,
    /// A whole number from and to; text when there is none.
    pub range: Option<(u64, u64)>,
    pub example: &'static str,
}

/// Where the dispatcher answers.
pub const ENDPOINTS: &str = "/v1/endpoints";
/// Where the OpenAPI document is.
pub const OPENAPI: &str = "/v1/openapi.json";

/// Of every route that needs a key.
const KEYED: &[Kind] = &[
    Kind::Unauthorised,
    Kind::Forbidden,
    Kind::UnknownApp,
    Kind::InvalidField,
    Kind::Overloaded,
    Kind::Unavailable,
];
/// Of those with a body of JSON.
const JSON: &[Kind] = &[Kind::MalformedJson, Kind::PayloadTooLarge, Kind::RequestTimeout];
const PUSH: &[&[Kind]] = &[KEYED, JSON, &[Kind::Refused, Kind::TooManyRequests]];
const CONTROL: &[&[Kind]] = &[KEYED, &[Kind::UnknownBroadcast, Kind::Conflict, Kind::Refused]];
const QUERY: &[&[Kind]] = &[KEYED, &[Kind::Refused]];

/// Every operation there is.
pub static ROUTES: &[Route] = &[
    Route {
        op: Op::PushToUser,
        id: "pushToUser",
        role: Role::Center,
        method: Method::POST,
        path: "/v1/apps/{app}/users/{user}/messages",
        served_as: "/v1/apps/{app}/users/{user}/messages",
        key: true,
        summary: "Push a message to a user: to all devices that are online, and kept for those that are not.",
        success: 202,
        query: &[],
        problems: PUSH,
    },
    Route {
        op: Op::PushToGroup,
        id: "pushToGroup",
        role: Role::Center,
        method: Method::POST,
        path: "/v1/apps/{app}/groups/{group}/messages",
        served_as: "/v1/apps/{app}/groups/{group}/messages",
        key: true,
        summary: "Push a message to a group: to every device that is subscribed to it.",
        success: 202,
        query: &[],
        problems: PUSH,
    },
    Route {
        op: Op::PushToTopic,
        id: "pushToTopic",
        role: Role::Center,
        method: Method::POST,
        path: "/v1/apps/{app}/messages",
        served_as: "/v1/apps/{app}/messages",
        key: true,
        summary: "Push a message to a topic of the app.",
        success: 202,
        query: &[],
        problems: PUSH,
    },
    Route {
        op: Op::PushBatch,
        id: "pushBatch",
        role: Role::Center,
        method: Method::POST,
        path: "/v1/apps/{app}/messages:batch",
        served_as: "/v1/apps/{app}/messages:batch",
        key: true,
        summary: "Push many messages, one a line (NDJSON). The answer has a line for each line that is not blank, in \
                  their order; a bad line gives a problem and the others go on.",
        success: 200,
        query: &[],
        problems: &[KEYED, &[Kind::PayloadTooLarge]],
    },
    Route {
        op: Op::StartBroadcast,
        id: "startBroadcast",
        role: Role::Center,
        method: Method::POST,
        path: "/v1/apps/{app}/broadcasts",
        served_as: "/v1/apps/{app}/broadcasts",
        key: true,
        summary: "Send a message to everyone in the app, at a rate.",
        success: 202,
        query: &[],
        problems: &[KEYED, JSON, &[Kind::Conflict, Kind::Refused, Kind::TooManyRequests]],
    },
    Route {
        op: Op::GetBroadcast,
        id: "getBroadcast",
        role: Role::Center,
        method: Method::GET,
        path: "/v1/apps/{app}/broadcasts/{id}",
        served_as: "/v1/apps/{app}/broadcasts/{id}",
        key: true,
        summary: "How far a broadcast is.",
        success: 200,
        query: &[],
        problems: &[KEYED, &[Kind::UnknownBroadcast]],
    },
    Route {
        op: Op::PauseBroadcast,
        id: "pauseBroadcast",
        role: Role::Center,
        method: Method::POST,
        path: "/v1/apps/{app}/broadcasts/{id}:pause",
        served_as: "/v1/apps/{app}/broadcasts/{id}",
        key: true,
        summary: "Pause a broadcast.",
        success: 200,
        query: &[],
        problems: CONTROL,
    },
    Route {
        op: Op::ResumeBroadcast,
        id: "resumeBroadcast",
        role: Role::Center,
        method: Method::POST,
        path: "/v1/apps/{app}/broadcasts/{id}:resume",
        served_as: "/v1/apps/{app}/broadcasts/{id}",
        key: true,
        summary: "Go on with a paused broadcast.",
        success: 200,
        query: &[],
        problems: CONTROL,
    },
    Route {
        op: Op::CancelBroadcast,
        id: "cancelBroadcast",
        role: Role::Center,
        method: Method::POST,
        path: "/v1/apps/{app}/broadcasts/{id}:cancel",
        served_as: "/v1/apps/{app}/broadcasts/{id}",
        key: true,
        summary: "End a broadcast: who has not been sent it yet is not sent it.",
        success: 200,
        query: &[],
        problems: CONTROL,
    },
    Route {
        op: Op::GetUser,
        id: "getUser",
        role: Role::Center,
        method: Method::GET,
        path: "/v1/apps/{app}/users/{user}",
        served_as: "/v1/apps/{app}/users/{user}",
        key: true,
        summary: "Is a user online, and with which devices?",
        success: 200,
        query: &[],
        problems: QUERY,
    },
    Route {
        op: Op::KickUser,
        id: "kickUser",
        role: Role::Center,
        method: Method::DELETE,
        path: "/v1/apps/{app}/users/{user}/sessions",
        served_as: "/v1/apps/{app}/users/{user}/sessions",
        key: true,
        summary: "Disconnect a user's devices. They may come back; to keep them out, stop giving them tokens.",
        success: 200,
        query: &[Parameter {
            name: "device",
            required: false,
            description: "Only the device with this MQTT client id.",
            range: None,
            example: "phone-1",
        }],
        problems: QUERY,
    },
    Route {
        op: Op::RevokeUser,
        id: "revokeUser",
        role: Role::Center,
        method: Method::POST,
        path: "/v1/apps/{app}/users/{user}/revoke",
        served_as: "/v1/apps/{app}/users/{user}/revoke",
        key: true,
        summary: "Revoke a user's tokens: those issued before a time are refused from now on, and the devices that are \
                  connected with one are disconnected.",
        success: 200,
        query: &[],
        problems: &[KEYED, JSON, &[Kind::Conflict, Kind::Refused]],
    },
    Route {
        op: Op::PullMessages,
        id: "pullMessages",
        role: Role::Center,
        method: Method::GET,
        path: "/v1/apps/{app}/topics/{topic}/messages",
        served_as: "/v1/apps/{app}/topics/{*rest}",
        key: true,
        summary: "Read a topic's log. The topic is given in full or without the app's level, its slashes as they are \
                  or percent-encoded.",
        success: 200,
        query: &[
            Parameter {
                name: "after",
                required: false,
                description: "Only messages after this position, {epoch}:{seq}; without it, from the log's beginning.",
                range: None,
                example: "1:42",
            },
            Parameter {
                name: "limit",
                required: false,
                description: "How many messages at most.",
                range: Some((1, super::MAX_PULL as u64)),
                example: "100",
            },
        ],
        problems: &[KEYED, &[Kind::NoSuchRoute, Kind::Refused]],
    },
    Route {
        op: Op::GetOverview,
        id: "getOverview",
        role: Role::Center,
        method: Method::GET,
        path: "/v1/apps/{app}/overview",
        served_as: "/v1/apps/{app}/overview",
        key: true,
        summary: "Live numbers of the app: connections, deliveries, rates, by gateway.",
        success: 200,
        query: &[],
        problems: QUERY,
    },
    Route {
        op: Op::GetOpenApi,
        id: "getOpenApi",
        role: Role::Center,
        method: Method::GET,
        path: OPENAPI,
        served_as: OPENAPI,
        key: false,
        summary: "This document.",
        success: 200,
        query: &[],
        problems: &[&[Kind::Overloaded]],
    },
    Route {
        op: Op::GetEndpoints,
        id: "getEndpoints",
        role: Role::Dispatcher,
        method: Method::GET,
        path: ENDPOINTS,
        served_as: ENDPOINTS,
        key: false,
        summary: "Which gateways a device should try, in this order. Asked by devices; needs no key.",
        success: 200,
        query: &[Parameter {
            name: "device",
            required: true,
            description: "What tells the device from others, such as its MQTT client id.",
            range: None,
            example: "phone-1",
        }],
        problems: &[&[Kind::InvalidField, Kind::NoGateway]],
    },
];

/// What each `{name}` of a path is, with an example.
pub fn path_parameter(name: &str) -> Option<(&'static str, &'static str)> {
    Some(match name {
        "app" => ("The app.", "demo"),
        "user" => ("The user.", "alice"),
        "group" => ("The group.", "team-7"),
        "id" => ("The broadcast's id.", "spring-sale"),
        "topic" => ("The topic.", "u/alice"),
        _ => return None,
    })
}
