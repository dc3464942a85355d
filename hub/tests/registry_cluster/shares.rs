//! Shared subscriptions, seen from where two gateways and a publisher stand.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use carillon_agent::{Agent, Instance, Role};
use carillon_hub::peers::GRPC;
use carillon_hub::registry::OwnerClient;
use carillon_proto::topic::slot_of;
use carillon_proto::v1::{
    self, broadcast_job, saver_reply, saver_request::Op, settlement::Outcome, shares_down, shares_up,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use crate::harness::{Cluster, WAIT, eventually, message, request};

const WORK: &str = "$share/g/demo/work/#";
/// Long enough for what should not come to have come.
const MOMENT: Duration = Duration::from_millis(300);

/// A gateway's stream, by hand.
struct Stream {
    up: mpsc::Sender<v1::SharesUp>,
    down: Streaming<v1::SharesDown>,
    /// Came in one batch, and were not looked at yet.
    batch: VecDeque<v1::Assignment>,
}

impl Stream {
    async fn open(cluster: &Cluster) -> Stream {
        let (up, outbound) = mpsc::channel(64);
        let hello = v1::SharesHello { instance: "gateway".into(), incarnation: 1 };
        up.send(v1::SharesUp { body: Some(shares_up::Body::Hello(hello)) }).await.unwrap();
        let mut client = v1::shares_client::SharesClient::connect(cluster.grpc_url()).await.unwrap();
        let down = client.serve(ReceiverStream::new(outbound)).await.unwrap().into_inner();
        Stream { up, down, batch: VecDeque::new() }
    }

    async fn say(&self, body: shares_up::Body) {
        self.up.send(v1::SharesUp { body: Some(body) }).await.unwrap();
    }

    async fn next(&mut self) -> shares_down::Body {
        let next = tokio::time::timeout(WAIT, self.down.message()).await.expect("something comes");
        next.expect("the stream is well").expect("it goes on").body.expect("a body")
    }

    async fn nothing(&mut self) {
        assert!(self.batch.is_empty(), "unexpected: {:?}", self.batch);
        if let Ok(message) = tokio::time::timeout(MOMENT, self.down.message()).await {
            panic!("unexpected: {message:?}");
        }
    }

    async fn join(&mut self, member: u64, share: &str, window: u32, expiry_seconds: u32) {
        let join = v1::JoinShare { member, share: share.into(), window, expiry_seconds };
        self.say(shares_up::Body::Join(join)).await;
        match self.next().await {
            shares_down::Body::Joined(joined) => assert_eq!(joined.member, member),
            other => panic!("not joined but {other:?}"),
        }
    }

    async fn leave(&self, member: u64, kept_seconds: u32) {
        self.say(shares_up::Body::Leave(v1::LeaveShare { member, kept_seconds })).await;
    }

    /// The next message: for which member, by which token, its payload.
    async fn assigned(&mut self) -> (u64, u64, String) {
        if self.batch.is_empty() {
            match self.next().await {
                shares_down::Body::Assignments(v1::Assignments { assignments }) => {
                    self.batch.extend(assignments)
                }
                other => panic!("no message but {other:?}"),
            }
        }
        let v1::Assignment { member, token, message } = self.batch.pop_front().expect("no empty batches");
        (member, token, String::from_utf8(message.unwrap().payload.to_vec()).unwrap())
    }

    async fn settle(&self, member: u64, token: u64, outcome: Outcome) {
        let settlements = vec![v1::Settlement { member, token, outcome: outcome.into() }];
        self.say(shares_up::Body::Settlements(v1::Settlements { settlements })).await;
    }

    /// The next messages, settled at once.
    async fn take(&mut self, count: usize) -> Vec<(u64, String)> {
        let mut taken = Vec::new();
        for _ in 0..count {
            let (member, token, payload) = self.assigned().await;
            self.settle(member, token, Outcome::Done).await;
            taken.push((member, payload));
        }
        taken
    }
}

async fn publish(owners: &OwnerClient, topic: &str, payloads: std::ops::Range<u32>) {
    for payload in payloads {
        owners.publish(request(topic, &payload.to_string(), 1)).await.unwrap();
    }
}

fn texts(range: std::ops::Range<u32>) -> Vec<String> {
    range.map(|number| number.to_string()).collect()
}

async fn cluster() -> (Cluster, OwnerClient) {
    let cluster = Cluster::start(&[("demo", "")]).await;
    let owners = cluster.owners();
    (cluster, owners)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn members_on_two_streams_share_what_is_published_after_they_joined() {
    let (cluster, owners) = cluster().await;
    publish(&owners, "demo/work/1", 0..3).await;
    let (mut one, mut two) = (Stream::open(&cluster).await, Stream::open(&cluster).await);
    one.join(7, WORK, 10, 0).await;
    two.join(7, WORK, 10, 0).await;
    one.join(8, "$share/h/demo/work/1", 10, 0).await;
    publish(&owners, "demo/work/1", 3..7).await;
    // Not stored, and of another topic of the filter alone.
    owners.publish(request("demo/work/2", "light", 0)).await.unwrap();
    owners.publish(request("demo/play", "not for us", 1)).await.unwrap();
    let mut first: Vec<(u64, String)> = one.take(7).await;
    first.sort();
    let second: Vec<String> = two.take(2).await.into_iter().map(|(_, text)| text).collect();
    let of =
        |member| first.iter().filter(|(m, _)| *m == member).map(|(_, text)| text.clone()).collect::<Vec<_>>();
    assert_eq!(
        (of(7).as_slice(), second.as_slice()),
        (&["3", "5", "light"].map(String::from)[..], &["4", "6"].map(String::from)[..])
    );
    assert_eq!(of(8), texts(3..7));
    one.nothing().await;
    two.nothing().await;
    assert_eq!(cluster.metric("carillon_shares_open"), 2.0);
    assert_eq!(cluster.metric("carillon_shares_members"), 3.0);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_is_not_settled_goes_to_another_when_its_member_or_its_stream_ends() {
    let (cluster, owners) = cluster().await;
    let (mut one, mut two) = (Stream::open(&cluster).await, Stream::open(&cluster).await);
    one.join(1, WORK, 10, 0).await;
    one.join(2, WORK, 10, 0).await;
    publish(&owners, "demo/work/1", 0..4).await;
    let mut of_first = Vec::new();
    for _ in 0..4 {
        let (member, _, text) = one.assigned().await;
        if member == 1 {
            of_first.push(text);
        }
    }
    assert_eq!(of_first, ["0", "2"]);
    one.leave(1, 0).await;
    for text in ["0", "2"] {
        let (member, token, again) = one.assigned().await;
        assert_eq!((member, again.as_str()), (2, text));
        // No room: it waits until there is somebody who has.
        one.settle(2, token, Outcome::Busy).await;
    }
    two.join(1, WORK, 10, 0).await;
    assert_eq!(two.take(2).await, [(1, "0".into()), (1, "2".into())]);
    drop(one);
    assert_eq!(two.take(2).await, [(1, "1".into()), (1, "3".into())]);
    assert_eq!(cluster.metric("carillon_shares_members"), 1.0);
    two.nothing().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_share_is_kept_for_members_that_are_away_and_over_when_none_is_kept() {
    let (cluster, owners) = cluster().await;
    let mut one = Stream::open(&cluster).await;
    for share in [WORK, "$share/g/demo/work/1"] {
        one.join(1, share, 10, 3600).await;
        publish(&owners, "demo/work/1", 0..4).await;
        // Out of turn: only what was not settled comes again.
        let mut tokens = Vec::new();
        for _ in 0..4 {
            tokens.push(one.assigned().await.1);
        }
        one.settle(1, tokens[1], Outcome::Done).await;
        one.settle(1, tokens[3], Outcome::Done).await;
        one.leave(1, 3600).await;
        eventually("it is closed", async || (cluster.metric("carillon_shares_open") == 0.0).then_some(()))
            .await;
        publish(&owners, "demo/work/1", 4..6).await;
        one.join(2, share, 10, 0).await;
        let taken: Vec<String> = one.take(4).await.into_iter().map(|(_, text)| text).collect();
        assert_eq!(taken, ["0", "2", "4", "5"]);
        // It keeps nothing itself, but the share is kept for the one that is away.
        one.leave(2, 0).await;
        eventually("it is closed", async || (cluster.metric("carillon_shares_open") == 0.0).then_some(()))
            .await;
        publish(&owners, "demo/work/1", 6..8).await;
        one.join(3, share, 10, 0).await;
        let taken: Vec<String> = one.take(2).await.into_iter().map(|(_, text)| text).collect();
        assert_eq!(taken, ["6", "7"]);
        one.leave(3, 0).await;
    }
    // Nobody keeps this one.
    let share = "$share/brief/demo/work/1";
    one.join(4, share, 10, 0).await;
    one.leave(4, 0).await;
    eventually("it is closed", async || (cluster.metric("carillon_shares_open") == 0.0).then_some(())).await;
    publish(&owners, "demo/work/1", 8..9).await;
    one.join(5, share, 10, 0).await;
    one.nothing().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_share_outlives_its_hub() {
    let (mut cluster, owners) = cluster().await;
    let mut one = Stream::open(&cluster).await;
    // Its session is not kept, but it does not end with the hub either.
    one.join(1, WORK, 1, 0).await;
    publish(&owners, "demo/work/1", 0..5).await;
    assert_eq!(one.take(1).await, [(1, "0".into())]);
    // So that one is settled.
    assert_eq!(one.assigned().await.2, "1");
    cluster.stop_hub().await;
    let end = tokio::time::timeout(WAIT, async { while let Ok(Some(_)) = one.down.message().await {} }).await;
    end.expect("the stream ends with the hub");
    cluster.start_hub().await;
    let mut two = Stream::open(&cluster).await;
    two.join(1, WORK, 10, 0).await;
    let taken: Vec<String> = two.take(4).await.into_iter().map(|(_, text)| text).collect();
    assert_eq!(taken, texts(1..5), "all that was not settled");
    two.nothing().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_home_that_was_deposed_writes_nothing_over_what_its_successor_has_written() {
    let (cluster, owners) = cluster().await;
    let mut one = Stream::open(&cluster).await;
    one.join(1, WORK, 10, 3600).await;
    publish(&owners, "demo/work/1", 0..3).await;
    let mut tokens = Vec::new();
    for _ in 0..3 {
        tokens.push(one.assigned().await.1);
    }
    // Settled beyond the cursor: this home has something to write when it ends.
    one.settle(1, tokens[2], Outcome::Done).await;
    // Another home, of which this one has not heard.
    let directory = cluster.directory();
    let session = v1::SessionRef { app: "demo".into(), user: "$share".into(), client_id: WORK.into() };
    let open = v1::OpenSession {
        session: Some(session.clone()),
        gateway: "successor/shares".into(),
        incarnation: 1,
        clean_start: false,
        expiry_seconds: 3600,
        connected_ms: 0,
    };
    let attachment = match directory.ask_saver(Op::OpenSession(open)).await.unwrap() {
        saver_reply::Result::SessionOpened(opened) => {
            assert!(opened.present, "it is the share's session");
            opened.attachment
        }
        other => panic!("{other:?}"),
    };
    let put = v1::PutRecord {
        kind: "share".into(),
        key: WORK.into(),
        value: "the successor's".into(),
        session: Some(session),
        attachment,
        ..v1::PutRecord::default()
    };
    directory.ask_saver(Op::PutRecord(put)).await.unwrap();
    // The cursor can move, which is how this one learns of it: and it has gone.
    one.settle(1, tokens[0], Outcome::Done).await;
    match one.next().await {
        shares_down::Body::Lost(lost) => assert_eq!(lost.member, 1),
        other => panic!("not lost but {other:?}"),
    }
    let get = v1::GetRecord { kind: "share".into(), key: WORK.into() };
    match directory.ask_saver(Op::GetRecord(get)).await.unwrap() {
        saver_reply::Result::Records(v1::Records { records }) => {
            assert_eq!(records[0].value, "the successor's");
        }
        other => panic!("{other:?}"),
    }
    cluster.stop().await;
}

/// A registry that is in discovery, owns nothing, and cannot be reached, until it is stopped.
async fn unreachable_registry(cluster: &Cluster) -> Agent {
    let agent = Agent::start(carillon_agent::Options::new(vec![cluster.keeper.endpoint()]));
    agent.register(Instance {
        id: "unreachable".into(),
        incarnation: 1,
        roles: vec![Role::Registry],
        addresses: BTreeMap::from([(GRPC.to_owned(), "127.0.0.1:1".to_owned())]),
        labels: BTreeMap::new(),
        draining: true,
    });
    registries(cluster, 2).await;
    agent
}

/// Waits until so many are known.
async fn registries(cluster: &Cluster, count: usize) {
    let directory = cluster.directory();
    let known = async || (directory.instances(Role::Registry).len() == count).then_some(());
    eventually("the registries are known", known).await;
}

/// As an owner does that ends before it can tell anybody.
async fn stored_and_not_sent(cluster: &Cluster, topic: &str, payload: &str) {
    let slot = slot_of(topic);
    let epoch = cluster.slot_epochs()[slot as usize].epoch;
    let message = v1::Message { epoch, seq: 1, stored: true, ..message(topic, payload, 1) };
    let append = v1::Append { slot, message: Some(message), log: true, ..v1::Append::default() };
    match cluster.directory().ask_saver(Op::Append(append)).await.unwrap() {
        saver_reply::Result::Appended(_) => {}
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_share_that_waits_for_a_registry_goes_on_when_that_has_gone() {
    let (cluster, owners) = cluster().await;
    let mut one = Stream::open(&cluster).await;
    one.join(1, WORK, 10, 0).await;
    let registry = unreachable_registry(&cluster).await;
    // By what is settled the share notices that it must wait.
    publish(&owners, "demo/work/1", 0..1).await;
    one.take(1).await;
    tokio::time::sleep(MOMENT).await;
    publish(&owners, "demo/work/1", 1..2).await;
    one.nothing().await;
    registry.stop().await;
    registries(&cluster, 1).await;
    publish(&owners, "demo/work/1", 2..4).await;
    let taken: Vec<String> = one.take(3).await.into_iter().map(|(_, text)| text).collect();
    assert_eq!(taken, texts(1..4));
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_a_registry_that_has_gone_had_stored_and_not_sent_is_found() {
    let (cluster, owners) = cluster().await;
    let mut one = Stream::open(&cluster).await;
    one.join(1, WORK, 10, 0).await;
    let registry = unreachable_registry(&cluster).await;
    stored_and_not_sent(&cluster, "demo/work/new", "0").await;
    one.nothing().await;
    registry.stop().await;
    // Well before the logs are looked at anyway.
    assert_eq!(one.take(1).await, [(1, "0".into())]);
    publish(&owners, "demo/work/new", 1..2).await;
    assert_eq!(one.take(1).await, [(1, "1".into())]);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_broadcast_goes_to_one_member_and_is_not_held_up_by_it() {
    let (cluster, _) = cluster().await;
    let mut one = Stream::open(&cluster).await;
    one.join(1, "$share/g/demo/#", 10, 0).await;
    one.join(2, "$share/g/demo/#", 10, 0).await;
    let request = v1::StartBroadcastRequest {
        message: Some(v1::Message { id: "job".into(), ..message("demo/all", "hear, hear", 1) }),
        store: None,
        idempotent: true,
        rate_per_second: 10.0,
    };
    cluster.registry().await.start_broadcast(request).await.unwrap();
    assert_eq!(one.take(1).await, [(1, "hear, hear".into())]);
    one.nothing().await;
    eventually("the job ends", async || {
        let get = v1::GetBroadcastRequest { app: "demo".into(), job: "job".into() };
        let job = cluster.registry().await.get_broadcast(get).await.unwrap().into_inner();
        (job.state() == broadcast_job::State::Finished).then_some(())
    })
    .await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn more_shares_than_may_be_are_refused() {
    let (cluster, _) = cluster().await;
    let limit = "shares: {max_shares: 1}";
    cluster.admin.publish("hub", limit, carillon_agent::admin::ChangeOptions::default()).await.unwrap();
    let mut one = Stream::open(&cluster).await;
    one.join(1, WORK, 10, 0).await;
    one.join(2, WORK, 10, 0).await;
    eventually("the limit is in force", async || {
        let join = v1::JoinShare { member: 3, share: "$share/x/demo/x".into(), window: 1, expiry_seconds: 0 };
        one.say(shares_up::Body::Join(join)).await;
        match one.next().await {
            shares_down::Body::Refused(refused) => {
                assert_eq!(refused.text, "this instance is home to 1 shares already");
                Some(())
            }
            _ => {
                one.leave(3, 0).await;
                None
            }
        }
    })
    .await;
    assert_eq!(cluster.metric("carillon_shares_refused_total"), 1.0);
    cluster.stop().await;
}
