//! The same calls over gRPC, on the port that serves HTTP too.

use carillon_proto::v1;
use carillon_proto::v1::center_client::CenterClient;
use carillon_proto::v1::push_request::To;
use tonic::metadata::MetadataValue;
use tonic::transport::Channel;
use tonic::{Code, Request};

use crate::owner::EPOCH;
use crate::{DEMO, Harness, SHOP};

async fn client(harness: &Harness) -> CenterClient<Channel> {
    CenterClient::connect(harness.url("")).await.expect("connected")
}

fn with_key<T>(key: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    let value = MetadataValue::try_from(format!("Bearer {key}")).expect("ASCII");
    request.metadata_mut().insert("authorization", value);
    request
}

fn push(to: Option<To>, payload: &str) -> v1::PushRequest {
    v1::PushRequest {
        app: "demo".to_owned(),
        to,
        payload: payload.to_owned().into(),
        ..v1::PushRequest::default()
    }
}

fn user(name: &str) -> Option<To> {
    Some(To::User(name.to_owned()))
}

#[tokio::test]
async fn calls_do_what_those_over_http_do() {
    let harness = Harness::start().await;
    let mut client = client(&harness).await;
    let reply = client.push(with_key(DEMO, push(user("alice"), "hi"))).await.expect("accepted").into_inner();
    assert_eq!(
        (reply.topic.as_str(), reply.epoch, reply.seq, reply.duplicate),
        ("demo/u/alice", EPOCH, 1, false)
    );
    let with_id = v1::PushRequest { id: "one".to_owned(), ..push(Some(To::Topic("news".to_owned())), "x") };
    for duplicate in [false, true] {
        let reply = client.push(with_key(DEMO, with_id.clone())).await.expect("accepted").into_inner();
        assert_eq!((reply.topic.as_str(), reply.seq, reply.duplicate), ("demo/news", 1, duplicate));
    }
    let pull =
        v1::PullRequest { app: "demo".to_owned(), topic: "u/alice".to_owned(), ..v1::PullRequest::default() };
    let pulled = client.pull(with_key(DEMO, pull)).await.expect("pulled").into_inner();
    assert_eq!((pulled.messages.len(), pulled.next.as_str(), pulled.more), (1, "7:1", false));

    let session =
        v1::SessionRef { app: "demo".to_owned(), user: "alice".to_owned(), client_id: "tv".to_owned() };
    harness.owner.state.lock().sessions =
        vec![v1::OnlineSession { session: Some(session), ..v1::OnlineSession::default() }];
    let who = v1::SessionsRequest { app: "demo".to_owned(), user: "alice".to_owned() };
    assert!(client.get_user(with_key(DEMO, who)).await.expect("found").into_inner().online);
    let kick = v1::KickRequest { app: "demo".to_owned(), user: "alice".to_owned(), client_id: String::new() };
    assert_eq!(client.kick_user(with_key(DEMO, kick)).await.expect("kicked").into_inner().kicked, 1);

    let start = v1::CenterBroadcastRequest {
        app: "demo".to_owned(),
        payload: "all".into(),
        id: "job".to_owned(),
        ..v1::CenterBroadcastRequest::default()
    };
    let job = client.start_broadcast(with_key(DEMO, start)).await.expect("started").into_inner();
    assert_eq!((job.id.as_str(), job.state()), ("job", v1::broadcast_job::State::Running));
    let control = v1::ControlBroadcastRequest {
        app: "demo".to_owned(),
        job: "job".to_owned(),
        state: v1::broadcast_control::State::Pause.into(),
    };
    client.control_broadcast(with_key(DEMO, control)).await.expect("paused");
    let get = v1::GetBroadcastRequest { app: "demo".to_owned(), job: "job".to_owned() };
    let job = client.get_broadcast(with_key(DEMO, get)).await.expect("found").into_inner();
    assert_eq!(job.state(), v1::broadcast_job::State::Paused);
}

#[tokio::test]
async fn errors_have_the_code_and_say_the_field() {
    let harness = Harness::start().await;
    let mut client = client(&harness).await;
    let refused = client.push(push(user("alice"), "x")).await.expect_err("no key");
    assert_eq!(refused.code(), Code::Unauthenticated);
    let large = "x".repeat(1001);
    for (key, request, code, says) in [
        ("wrong-key-0123456789", push(user("alice"), "x"), Code::Unauthenticated, "API key"),
        (SHOP, push(user("alice"), "x"), Code::PermissionDenied, "`shop`"),
        (
            DEMO,
            v1::PushRequest { app: "nope".to_owned(), ..push(user("alice"), "x") },
            Code::NotFound,
            "`nope`",
        ),
        (DEMO, push(None, "x"), Code::InvalidArgument, "`to` is missing"),
        (DEMO, push(user("a/b"), "x"), Code::InvalidArgument, "`user`"),
        (DEMO, v1::PushRequest { qos: Some(3), ..push(user("alice"), "x") }, Code::InvalidArgument, "`qos`"),
        (DEMO, push(user("alice"), &large), Code::ResourceExhausted, "max_payload_bytes"),
        (DEMO, push(Some(To::Topic("fail/refused".to_owned())), "x"), Code::InvalidArgument, "no, never"),
        (DEMO, push(Some(To::Topic("fail/store".to_owned())), "x"), Code::Unavailable, "disk is full"),
    ] {
        let status = client.push(with_key(key, request)).await.expect_err(says);
        assert_eq!(status.code(), code, "{status}");
        assert!(status.message().contains(says), "{status}");
    }
    let get = v1::GetBroadcastRequest { app: "demo".to_owned(), job: "none".to_owned() };
    assert_eq!(client.get_broadcast(with_key(DEMO, get)).await.expect_err("none").code(), Code::NotFound);
    let control = v1::ControlBroadcastRequest { app: "demo".to_owned(), job: "none".to_owned(), state: 0 };
    let status = client.control_broadcast(with_key(DEMO, control)).await.expect_err("to do what?");
    assert_eq!(status.code(), Code::InvalidArgument);
}

#[tokio::test]
async fn a_stream_of_pushes_is_answered_in_its_order() {
    let harness = Harness::start().await;
    harness.owner.state.lock().delay = Some(std::time::Duration::from_millis(5));
    let mut client = client(&harness).await;
    let requests: Vec<_> = (0..2000)
        .map(|i| {
            let receiver = if i % 100 == 50 { "a/b" } else { "alice" };
            v1::PushRequest { id: format!("i{i}"), ..push(user(receiver), "x") }
        })
        .collect();
    let request = with_key(DEMO, futures::stream::iter(requests));
    let mut replies = client.push_stream(request).await.expect("begun").into_inner();
    let (mut count, mut seq) = (0, 0);
    while let Some(reply) = replies.message().await.expect("a reply") {
        assert_eq!(reply.id, format!("i{count}"));
        if count % 100 == 50 {
            assert!(reply.error.contains("`user`"), "{reply:?}");
        } else {
            seq += 1;
            assert_eq!((reply.error.as_str(), reply.seq), ("", seq));
        }
        count += 1;
    }
    assert_eq!(count, 2000);
    let empty = futures::stream::iter(Vec::<v1::PushRequest>::new());
    assert_eq!(client.push_stream(empty).await.expect_err("no key").code(), Code::Unauthenticated);
}
