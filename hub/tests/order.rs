//! What is published without waiting for answers is sequenced in its order, while the topic's slot moves and while connections are
//! lost: the publisher's side, in front of registries that answer when and what a test says.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::time::Duration;

use carillon_agent::admin::Admin;
use carillon_agent::{Agent, Instance, Role};
use carillon_hub::peers::Directory;
use carillon_hub::registry::{OwnerClient, client};
use carillon_keeper::{Keeper, KeeperHandle, KeeperOptions};
use carillon_proto::topic::{SLOTS, slot_of};
use carillon_proto::v1::{self, PublishCode};
use futures::Stream;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};

const WAIT: Duration = Duration::from_secs(30);
/// Long enough for what must not come to have come.
const QUIET: Duration = Duration::from_millis(300);

/// A publish that has arrived, and the stream that its answer goes to.
struct Arrived {
    request: v1::PublishRequest,
    stream: mpsc::Sender<Result<v1::PublishedBatch, Status>>,
}

impl Arrived {
    fn text(&self) -> &str {
        std::str::from_utf8(&self.request.message.as_ref().unwrap().payload).unwrap()
    }

    async fn answer(self, code: PublishCode, epoch: u64) {
        let correlation = self.request.correlation;
        let reply = v1::Published { correlation, code: code.into(), epoch, ..Default::default() };
        let _ = self.stream.send(Ok(v1::PublishedBatch { replies: vec![reply] })).await;
    }
}

/// A registry that hands each publish to the test.
struct ByHand(mpsc::Sender<Arrived>);

type Replies<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl v1::registry_server::Registry for ByHand {
    type PublishStream = ReceiverStream<Result<v1::PublishedBatch, Status>>;
    type AttachStream = Replies<v1::AttachDown>;

    async fn publish(
        &self,
        request: Request<Streaming<v1::PublishBatch>>,
    ) -> Result<Response<Self::PublishStream>, Status> {
        let (stream, replies) = mpsc::channel(64);
        let (mut inbound, arrived) = (request.into_inner(), self.0.clone());
        tokio::spawn(async move {
            while let Ok(Some(batch)) = inbound.message().await {
                for request in batch.requests {
                    let _ = arrived.send(Arrived { request, stream: stream.clone() }).await;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(replies)))
    }

    async fn attach(
        &self,
        _: Request<Streaming<v1::AttachUp>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        Err(Status::unimplemented("publishes only"))
    }

    async fn sessions(&self, _: Request<v1::SessionsRequest>) -> Result<Response<v1::SessionsReply>, Status> {
        Err(Status::unimplemented("publishes only"))
    }

    async fn kick(&self, _: Request<v1::KickRequest>) -> Result<Response<v1::KickReply>, Status> {
        Err(Status::unimplemented("publishes only"))
    }

    async fn overview(&self, _: Request<v1::OverviewRequest>) -> Result<Response<v1::OverviewReply>, Status> {
        Err(Status::unimplemented("publishes only"))
    }

    async fn start_broadcast(
        &self,
        _: Request<v1::StartBroadcastRequest>,
    ) -> Result<Response<v1::BroadcastJob>, Status> {
        Err(Status::unimplemented("publishes only"))
    }

    async fn get_broadcast(
        &self,
        _: Request<v1::GetBroadcastRequest>,
    ) -> Result<Response<v1::BroadcastJob>, Status> {
        Err(Status::unimplemented("publishes only"))
    }

    async fn control_broadcast(
        &self,
        _: Request<v1::ControlBroadcastRequest>,
    ) -> Result<Response<v1::BroadcastJob>, Status> {
        Err(Status::unimplemented("publishes only"))
    }
}

/// A keeper, registries by hand, and a publisher.
struct World {
    keeper: KeeperHandle,
    admin: Admin,
    agent: Agent,
    owners: OwnerClient,
    _dir: tempfile::TempDir,
}

impl World {
    async fn start() -> World {
        let dir = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let options = KeeperOptions::new(dir.path().join("keeper"), listener, Vec::new());
        let keeper = Keeper::start(options).await.unwrap();
        let agent = Agent::start(carillon_agent::Options::new(vec![keeper.endpoint()]));
        let owners = OwnerClient::start(Directory::new(agent.clone()), client::Options::default());
        let admin = Admin::new(vec![keeper.endpoint()]);
        World { keeper, admin, agent, owners, _dir: dir }
    }

    /// One more registry, which is to get its part of the slots.
    async fn registry(&self, id: &str) -> mpsc::Receiver<Arrived> {
        let (arrived, receiver) = mpsc::channel(64);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let service = v1::registry_server::RegistryServer::new(ByHand(arrived));
        let server = tonic::transport::Server::builder().add_service(service);
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        self.agent.register(Instance {
            id: id.into(),
            incarnation: 1,
            roles: vec![Role::Registry],
            addresses: BTreeMap::from([("grpc".to_owned(), address)]),
            labels: BTreeMap::new(),
            draining: false,
        });
        receiver
    }

    /// Waits until a slot is so.
    async fn until(&self, is_so: impl FnMut(&std::sync::Arc<carillon_agent::SlotMap>) -> bool) {
        let mut slots = self.agent.slots();
        tokio::time::timeout(WAIT, slots.wait_for(is_so)).await.expect("the slots come to it").unwrap();
    }

    fn epoch(&self, topic: &str) -> u64 {
        self.agent.slots().borrow().owner_of(topic).unwrap().1.epoch
    }

    fn publish(
        &self,
        topic: &str,
        text: &str,
    ) -> impl Future<Output = Result<v1::Published, client::PublishError>> + use<> {
        let message = v1::Message {
            topic: topic.into(),
            payload: text.to_owned().into(),
            qos: 1,
            id: uuid::Uuid::now_v7().to_string(),
            ..v1::Message::default()
        };
        self.owners.publish(v1::PublishRequest { message: Some(message), ..Default::default() })
    }
}

async fn next(arrived: &mut mpsc::Receiver<Arrived>) -> Arrived {
    tokio::time::timeout(WAIT, arrived.recv())
        .await
        .expect("something arrives")
        .expect("the registry is there")
}

async fn nothing(arrived: &mut mpsc::Receiver<Arrived>) {
    if let Ok(Some(early)) = tokio::time::timeout(QUIET, arrived.recv()).await {
        panic!("{} overtakes", early.text());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_a_slot_moves_nothing_overtakes() {
    let world = World::start().await;
    let mut former = world.registry("a").await;
    world.until(|map| map.slots.iter().any(|slot| *slot.instance == *"a")).await;
    let mut later = world.registry("b").await;
    world.until(|map| !map.moving_to.is_empty()).await;
    let map = world.agent.slots().borrow().clone();
    let moving = |topic: &String| map.moving_to.contains_key(&slot_of(topic));
    let topic = (0..).map(|n| format!("demo/g/{n}")).find(moving).unwrap();
    let stays = (0..).map(|n| format!("demo/g/{n}")).find(|topic| !moving(topic)).unwrap();

    let first = world.publish(&topic, "1");
    let arrived = next(&mut former).await;
    // The slot goes, before the first is answered.
    let slots: Vec<(u32, u64)> = (0..SLOTS)
        .filter(|slot| map.moving_to.contains_key(slot))
        .map(|slot| (slot, map.slots[slot as usize].epoch))
        .collect();
    assert_eq!(world.admin.yield_slots("a", 1, &slots).await.unwrap() as usize, slots.len());
    world.until(|map| *map.owner_of(&topic).unwrap().1.instance == *"b").await;
    let second = world.publish(&topic, "2");
    let third = world.publish(&topic, "3");
    nothing(&mut later).await;
    // What is published to other owners does not wait.
    let other = world.publish(&stays, "other");
    next(&mut former).await.answer(PublishCode::Accepted, world.epoch(&stays)).await;
    other.await.unwrap();

    arrived.answer(PublishCode::NotOwner, 0).await;
    let arrived = next(&mut later).await;
    assert_eq!(arrived.text(), "1");
    // The next owner may not have heard yet, and then accept what comes behind.
    nothing(&mut later).await;
    arrived.answer(PublishCode::NotOwner, 0).await;
    let arrived = next(&mut later).await;
    assert_eq!(arrived.text(), "1");
    nothing(&mut later).await;
    let epoch = world.epoch(&topic);
    arrived.answer(PublishCode::Accepted, epoch).await;
    for text in ["2", "3"] {
        let arrived = next(&mut later).await;
        assert_eq!(arrived.text(), text);
        arrived.answer(PublishCode::Accepted, epoch).await;
    }
    for answer in [first.await, second.await, third.await] {
        assert_eq!(answer.unwrap().epoch, epoch);
    }
    // Now that it has accepted, one need not wait for the other.
    let (fourth, fifth) = (world.publish(&topic, "4"), world.publish(&topic, "5"));
    let (one, other) = (next(&mut later).await, next(&mut later).await);
    assert_eq!((one.text(), other.text()), ("4", "5"));
    other.answer(PublishCode::Accepted, epoch).await;
    one.answer(PublishCode::Accepted, epoch).await;
    fourth.await.unwrap();
    fifth.await.unwrap();
    world.agent.stop().await;
    world.keeper.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_lost_with_a_connection_is_not_overtaken_on_the_next() {
    let world = World::start().await;
    let mut registry = world.registry("a").await;
    world.until(|map| map.slots.iter().any(|slot| *slot.instance == *"a")).await;
    let epoch = world.epoch("demo/g/a");
    let warm = world.publish("demo/g/a", "warm");
    next(&mut registry).await.answer(PublishCode::Accepted, epoch).await;
    warm.await.unwrap();
    for round in 0..20 {
        let mut published = Vec::new();
        published.push(world.publish("demo/g/a", &format!("{round}-0")));
        let lost = next(&mut registry).await;
        // The stream ends with an error; it is not said when the publisher hears of it.
        let _ = lost.stream.send(Err(Status::unavailable("by the test"))).await;
        for n in 1..20 {
            published.push(world.publish("demo/g/a", &format!("{round}-{n}")));
            if n % 5 == 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        let mut accepted: Vec<String> = Vec::new();
        while accepted.len() < published.len() {
            let arrived = next(&mut registry).await;
            // What was sent with the first one, and is lost like it.
            if arrived.stream.same_channel(&lost.stream) {
                continue;
            }
            if !accepted.iter().any(|text| text == arrived.text()) {
                accepted.push(arrived.text().to_owned());
            }
            arrived.answer(PublishCode::Accepted, epoch).await;
        }
        let expected: Vec<String> = (0..20).map(|n| format!("{round}-{n}")).collect();
        assert_eq!(accepted, expected);
        for answer in published {
            answer.await.unwrap();
        }
    }
    world.agent.stop().await;
    world.keeper.stop().await;
}
