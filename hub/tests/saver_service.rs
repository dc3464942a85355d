//! `Saver.Exchange` over a real connection: order, batching, errors, stopping.

use std::time::Duration;

use carillon_hub::saver::{Saver, SaverError, SaverOptions};
use carillon_proto::exchange::{Exchange, Options, Saving};
use carillon_proto::v1::saver_reply::Result as Reply;
use carillon_proto::v1::saver_request::Op;
use carillon_proto::{topic, v1};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::{Endpoint, Server};

struct Running {
    saver: Saver,
    exchange: Exchange<Saving>,
    registry: prometheus::Registry,
    directory: tempfile::TempDir,
}

async fn start() -> Running {
    let directory = tempfile::tempdir().expect("a directory");
    let registry = prometheus::Registry::new();
    let mut options = SaverOptions::new(directory.path().join("saver"), "test");
    options.limits.reserve_bytes = 0;
    let saver = Saver::open(options, &registry).await.expect("the saver opens");
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let router = Server::builder().add_service(saver.service());
    tokio::spawn(router.serve_with_incoming(TcpListenerStream::new(listener)));
    let endpoint = Endpoint::from_shared(format!("http://{address}")).expect("an endpoint");
    let exchange = Exchange::start(endpoint, Options::default());
    Running { saver, exchange, registry, directory }
}

fn request(op: Op) -> v1::SaverRequest {
    v1::SaverRequest { correlation: 0, op: Some(op) }
}

fn append(topic: &str, seq: u64) -> v1::SaverRequest {
    let message = v1::Message {
        topic: topic.to_owned(),
        payload: format!("{seq}").into(),
        id: format!("{topic}{seq}"),
        epoch: 1,
        seq,
        ..v1::Message::default()
    };
    let slot = topic::slot_of(topic);
    request(Op::Append(v1::Append { slot, message: Some(message), log: true, ..v1::Append::default() }))
}

async fn call(running: &Running, op: Op) -> Reply {
    running.exchange.call(request(op)).await.expect("an answer").result.expect("a result")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn appends_in_flight_keep_their_order() {
    let running = start().await;
    let mut answers = Vec::new();
    // Were two of one topic carried out in another order, the later would be refused.
    for seq in 1..=500 {
        for number in 0..10 {
            answers.push((seq, running.exchange.call(append(&format!("demo/{number}"), seq))));
        }
    }
    for (seq, answer) in answers {
        match answer.await.expect("an answer").result {
            Some(Reply::Appended(appended)) => {
                assert_eq!((appended.seq, appended.prev, appended.duplicate), (seq, seq - 1, false));
            }
            other => panic!("{other:?}"),
        }
    }
    let topics = (0..10).map(|number| format!("demo/{number}")).collect();
    let Reply::Heads(heads) = call(&running, Op::Heads(v1::Heads { topics })).await else { panic!("heads") };
    assert!(heads.heads.iter().all(|head| head.seq == 500));
    // Group commit: far fewer commits than appends.
    let families = running.registry.gather();
    let commits: f64 = families
        .iter()
        .filter(|family| family.name() == "carillon_saver_commits_total")
        .flat_map(|family| family.get_metric())
        .map(|metric| metric.get_counter().get_value())
        .sum();
    assert!(commits > 0.0 && commits < 1000.0, "{commits} commits for 5000 appends");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_operation_crosses_the_wire() {
    let running = start().await;
    let session =
        Some(v1::SessionRef { app: "demo".to_owned(), user: "u".to_owned(), client_id: "c".to_owned() });
    let done = Reply::Done(v1::Done {});
    let slot = topic::slot_of("demo/a");
    assert_eq!(call(&running, Op::Fence(v1::Fence { slot, epoch: 1 })).await, done);
    let open = v1::OpenSession { session: session.clone(), expiry_seconds: 60, ..v1::OpenSession::default() };
    let Reply::SessionOpened(opened) = call(&running, Op::OpenSession(open)).await else { panic!("opened") };
    let attachment = opened.attachment;
    // In flight together, in this order: a cursor can only move once it is there.
    let subscription =
        v1::Subscription { filter: "demo/a".to_owned(), qos: 1, ..v1::Subscription::default() };
    let subscriptions = vec![subscription];
    let subscribed = running.exchange.call(request(Op::Subscribe(v1::Subscribe {
        session: session.clone(),
        attachment,
        subscriptions,
    })));
    let filters = vec!["demo/b".to_owned()];
    let unsubscribe = v1::Unsubscribe { session: session.clone(), attachment, filters };
    let unsubscribed = running.exchange.call(request(Op::Unsubscribe(unsubscribe)));
    assert!(matches!(subscribed.await.unwrap().result, Some(Reply::Subscribed(_))));
    assert_eq!(unsubscribed.await.unwrap().result, Some(done.clone()));
    for seq in 1..=3 {
        running.exchange.call(append("demo/a", seq)).await.expect("appended");
    }
    let positions = vec![v1::AckPosition { topic: "demo/a".to_owned(), seq: 2 }];
    let ack = v1::Ack { session: session.clone(), attachment, positions };
    let acked = running.exchange.call(request(Op::Ack(ack)));
    let close = v1::CloseSession {
        session: session.clone(),
        attachment,
        expiry_seconds: 60,
        ..v1::CloseSession::default()
    };
    let closed = running.exchange.call(request(Op::CloseSession(close)));
    let open = v1::OpenSession { session: session.clone(), expiry_seconds: 60, ..v1::OpenSession::default() };
    let opened = running.exchange.call(request(Op::OpenSession(open)));
    assert_eq!(acked.await.unwrap().result, Some(done.clone()));
    assert_eq!(closed.await.unwrap().result, Some(done.clone()));
    let Some(Reply::SessionOpened(opened)) = opened.await.unwrap().result else { panic!("opened") };
    assert_eq!((opened.present, opened.backlog[0].after, opened.backlog[0].head), (true, 2, 3));
    let read = v1::Read { topic: "demo/a".to_owned(), after: 1, ..v1::Read::default() };
    let Reply::Read(read) = call(&running, Op::Read(read)).await else { panic!("read") };
    assert_eq!(read.messages.iter().map(|message| message.seq).collect::<Vec<_>>(), [2, 3]);
    let retained = v1::Retained { filter: "#".to_owned(), limit: 0 };
    assert_eq!(call(&running, Op::Retained(retained)).await, Reply::Retained(v1::RetainedReply::default()));
    let (kind, key) = ("job".to_owned(), "1".to_owned());
    let value = b"x".to_vec().into();
    let put = v1::PutRecord {
        kind: kind.clone(),
        key: key.clone(),
        value,
        expires_ms: 0,
        ..v1::PutRecord::default()
    };
    assert_eq!(call(&running, Op::PutRecord(put)).await, done);
    let Reply::Records(one) = call(&running, Op::GetRecord(v1::GetRecord { kind: kind.clone(), key })).await
    else {
        panic!("a record")
    };
    let list = v1::ListRecords { kind, prefix: String::new(), limit: 0 };
    assert_eq!(call(&running, Op::ListRecords(list)).await, Reply::Records(one.clone()));
    assert_eq!(one.records.len(), 1);
    // Errors have their code, and say what is wrong.
    let stale = v1::Ack { session, attachment: attachment - 1 + 1, positions: Vec::new() };
    let Reply::Error(error) = call(&running, Op::Ack(stale)).await else { panic!("an error") };
    assert_eq!(error.code(), v1::saver_error::Code::SessionMoved);
    call(&running, Op::Fence(v1::Fence { slot, epoch: 5 })).await;
    let answer = running.exchange.call(append("demo/a", 4)).await.expect("an answer").result;
    let Some(Reply::Error(error)) = answer else { panic!("an error") };
    assert_eq!(error.code(), v1::saver_error::Code::Fenced);
    assert!(error.text.contains("epoch 5"), "{}", error.text);
    let nothing = v1::SaverRequest { correlation: 0, op: None };
    let Some(Reply::Error(error)) = running.exchange.call(nothing).await.unwrap().result else {
        panic!("an error")
    };
    assert_eq!(error.code(), v1::saver_error::Code::Invalid);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_answers_and_lets_go() {
    let running = start().await;
    let answers: Vec<_> = (1..=200).map(|seq| running.exchange.call(append("demo/a", seq))).collect();
    for answer in answers {
        answer.await.expect("an answer");
    }
    tokio::time::timeout(Duration::from_secs(10), running.saver.stop()).await.expect("it stops");
    // The directory is free, all is there; the same registry is refused a second time.
    let options = SaverOptions::new(running.directory.path().join("saver"), "test");
    let again = Saver::open(options.clone(), &running.registry).await;
    assert!(matches!(again, Err(SaverError::Metrics(_))));
    let saver = Saver::open(options, &prometheus::Registry::new()).await.expect("it opens again");
    assert_eq!(saver.store().heads(vec!["demo/a".to_owned()]).await.expect("heads")[0].seq, 200);
    saver.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_answers_are_sent_in_parts() {
    let running = start().await;
    for seq in 1..=20 {
        let mut request = append("demo/large", seq);
        if let Some(Op::Append(append)) = &mut request.op
            && let Some(message) = &mut append.message
        {
            message.payload = vec![b'x'; 1 << 20].into();
        }
        let answer = running.exchange.call(request).await.expect("an answer").result;
        assert!(matches!(answer, Some(Reply::Appended(_))), "{answer:?}");
    }
    // 16 answers of 4 MiB: two of them fit into one message of the wire's.
    let read = v1::Read { topic: "demo/large".to_owned(), after: 0, limit: 1000, max_bytes: 4 << 20 };
    let reads: Vec<_> = (0..16).map(|_| running.exchange.call(request(Op::Read(read.clone())))).collect();
    for answer in reads {
        let Some(Reply::Read(reply)) = answer.await.expect("an answer").result else { panic!("read") };
        assert_eq!((reply.messages.len(), reply.next), (4, 4));
    }
}
