//! From publish to delivery: order, durability, retries, slow receivers, restarts.

use std::time::Duration;

use carillon_agent::admin::ChangeOptions;
use carillon_hub::registry::PublishError;
use carillon_proto::v1::{self, PublishCode};

use crate::harness::{Cluster, eventually, message, payloads, request};

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_is_published_is_delivered_in_order_and_is_in_the_log() {
    let cluster = Cluster::start(&[("demo", "")]).await;
    let mut gateway = cluster.attach("g1").await;
    gateway.complete(cluster.slot_epochs()).await;
    let announced = gateway.announce(&["demo/g/a", "demo/#"]).await;
    assert_eq!((announced.heads, announced.not_owner), (vec![0, 0], vec![]));
    let owners = cluster.owners();
    let published: Vec<_> =
        (0..1000).map(|i| owners.publish(request("demo/g/a", &i.to_string(), i % 2))).collect();
    for (i, published) in published.into_iter().enumerate() {
        let published = published.await.unwrap();
        assert_eq!((published.code(), published.seq), (PublishCode::Accepted, i as u64 + 1));
        assert!(published.has_route);
    }
    let messages = gateway.messages(1000).await;
    let (mut last_stored, mut epoch) = (0, 0);
    for (i, message) in messages.iter().enumerate() {
        assert_eq!(message.payload, i.to_string());
        assert_eq!((message.seq, message.prev), (i as u64 + 1, last_stored));
        assert!(message.epoch >= epoch && message.epoch > 0 && message.published_ms > 0);
        epoch = message.epoch;
        assert_eq!(message.stored, i % 2 == 1);
        if message.stored {
            last_stored = message.seq;
        }
    }
    let read = v1::Read { topic: "demo/g/a".into(), after: 0, limit: 1000, max_bytes: 0 };
    let log = cluster.directory().read(read).await.unwrap();
    let stored: Vec<_> =
        messages.iter().filter(|message| message.stored).map(|message| message.seq).collect();
    assert_eq!(log.messages.iter().map(|message| message.seq).collect::<Vec<_>>(), stored);
    assert_eq!(cluster.metric("carillon_registry_delivered_total"), 1000.0);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn numbers_go_on_and_epochs_grow_over_a_restart() {
    let mut cluster = Cluster::start(&[("demo", "")]).await;
    let owners = cluster.owners();
    let first = owners.publish(request("demo/u/alice", "one", 1)).await.unwrap();
    assert_eq!(first.seq, 1);
    let again = v1::PublishRequest { idempotent: true, ..request("demo/u/alice", "one", 1) };
    let twice = owners.publish(again.clone()).await.unwrap();
    assert_eq!(twice.seq, 2);
    cluster.stop_hub().await;
    cluster.start_hub().await;

    let owners = cluster.owners();
    // The same id as before the restart: nothing is published, and its position is the one from before.
    let duplicate = owners.publish(again).await.unwrap();
    assert!(duplicate.duplicate);
    assert_eq!((duplicate.epoch, duplicate.seq), (twice.epoch, twice.seq));
    let mut gateway = cluster.attach("g1").await;
    assert_eq!(gateway.announce(&["demo/u/alice"]).await.heads, [2]);
    let next = owners.publish(request("demo/u/alice", "two", 1)).await.unwrap();
    assert!(next.seq > 2 && next.epoch > first.epoch, "{next:?} after {first:?}");
    let delivered = gateway.messages(1).await;
    assert_eq!((payloads(&delivered), delivered[0].prev), (vec!["two"], 2));
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn publishes_survive_a_restart_of_the_owner_in_order() {
    let mut cluster = Cluster::start(&[("demo", "")]).await;
    // Its own agent, so that it outlives the hub's.
    let agent = carillon_agent::Agent::start(carillon_agent::Options::new(vec![cluster.keeper.endpoint()]));
    agent.ready().await;
    let directory = carillon_hub::peers::Directory::new(agent.clone());
    let options = carillon_hub::registry::client::Options {
        deadline: Duration::from_secs(20),
        ..carillon_hub::registry::client::Options::default()
    };
    let owners = carillon_hub::registry::OwnerClient::start(directory, options);
    owners.publish(request("demo/g/a", "0", 1)).await.unwrap();
    let publisher = tokio::spawn(async move {
        let mut under_way = Vec::new();
        for i in 1..=300 {
            under_way.push(owners.publish(request("demo/g/a", &i.to_string(), 1)));
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        futures::future::join_all(under_way).await
    });
    tokio::time::sleep(Duration::from_millis(100)).await;
    cluster.stop_hub().await;
    cluster.start_hub().await;
    let answers = publisher.await.unwrap();
    let mut seqs = Vec::new();
    for answer in answers {
        seqs.push(answer.expect("accepted within the deadline").seq);
    }
    assert!(seqs.is_sorted(), "{seqs:?}");
    let read = v1::Read { topic: "demo/g/a".into(), after: 0, limit: 1000, max_bytes: 0 };
    let log = cluster.directory().read(read).await.unwrap();
    let expected: Vec<String> = (0..=300).map(|i| i.to_string()).collect();
    assert_eq!(payloads(&log.messages), expected);
    agent.stop().await;
    cluster.stop().await;
}

async fn not_whole(cluster: &Cluster, slots: f64) {
    eventually(&format!("{slots} slots are not whole"), async || {
        (cluster.metric("carillon_registry_slots_not_whole") == slots).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn until_a_slot_is_whole_its_messages_go_to_every_gateway() {
    let cluster = Cluster::start(&[("demo", "")]).await;
    let owners = cluster.owners();
    cluster.register_gateway("g1", 1);
    let mut one = cluster.attach("g1").await;
    let mut two = cluster.attach("g2").await;
    one.announce(&["demo/g/a"]).await;
    one.complete(cluster.slot_epochs()).await;
    assert_eq!(two.announce(&["demo/g/other"]).await.heads, [0]);
    owners.publish(request("demo/g/a", "to both", 0)).await.unwrap();
    assert_eq!(payloads(&one.messages(1).await), ["to both"]);
    assert_eq!(payloads(&two.messages(1).await), ["to both"]);
    not_whole(&cluster, 1024.0).await;
    two.complete(cluster.slot_epochs()).await;
    not_whole(&cluster, 0.0).await;
    owners.publish(request("demo/g/a", "to one", 0)).await.unwrap();
    owners.publish(request("demo/g/other", "to the other", 0)).await.unwrap();
    assert_eq!(payloads(&one.messages(1).await), ["to one"]);
    assert_eq!(payloads(&two.messages(1).await), ["to the other"]);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_receiver_that_does_not_read_loses_its_stream_and_no_one_else_notices() {
    let cluster = Cluster::start(&[("demo", "")]).await;
    let set = [("registry.attach_queue_messages".to_owned(), Some("1000".to_owned()))];
    cluster.admin.set("hub", set.into(), ChangeOptions::default()).await.unwrap();
    let config = cluster.agent().config::<carillon_hub::config::HubConfig>();
    eventually("the limit is in force", async || {
        (config.borrow().registry.attach_queue_messages == 1000).then_some(())
    })
    .await;
    let mut slow = cluster.attach("slow").await;
    let mut fast = cluster.attach("fast").await;
    slow.announce(&["demo/g/a"]).await;
    fast.announce(&["demo/g/a"]).await;
    let owners = cluster.owners();
    let payload = "x".repeat(16 * 1024);
    for _ in 0..40 {
        let batch: Vec<_> = (0..100).map(|_| owners.publish(request("demo/g/a", &payload, 0))).collect();
        for published in batch {
            published.await.unwrap();
        }
        assert_eq!(fast.messages(100).await.len(), 100);
    }
    assert_eq!(slow.end().await.expect("closed with an error").code(), tonic::Code::Unavailable);
    assert_eq!(cluster.metric("carillon_registry_attach_overflows_total"), 1.0);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_newer_incarnation_replaces_the_older_stream() {
    let cluster = Cluster::start(&[("demo", "")]).await;
    let mut old = cluster.attach_as("g1", 1).await;
    old.announce(&["demo/g/a"]).await;
    let mut new = cluster.attach_as("g1", 2).await;
    assert!(old.end().await.is_some());
    new.announce(&["demo/g/b"]).await;
    not_whole(&cluster, 1024.0).await;
    new.complete(cluster.slot_epochs()).await;
    not_whole(&cluster, 0.0).await;
    let owners = cluster.owners();
    // The old one's route is gone.
    assert!(!owners.publish(request("demo/g/a", "x", 0)).await.unwrap().has_route);
    assert!(owners.publish(request("demo/g/b", "x", 0)).await.unwrap().has_route);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_can_never_be_accepted_is_refused_at_once() {
    let cluster = Cluster::start(&[("demo", "")]).await;
    let owners = cluster.owners();
    for (topic, qos, says) in [("demo/+", 1, "wildcard"), ("demo/g/a", 3, "qos is 3")] {
        match owners.publish(request(topic, "x", qos)).await {
            Err(PublishError::Refused(text)) => assert!(text.contains(says), "{text}"),
            other => panic!("{topic}: {other:?}"),
        }
    }
    // A caller that has no owner to turn to hears so when its deadline has passed.
    let mut cluster = cluster;
    let agent = carillon_agent::Agent::start(carillon_agent::Options::new(vec![cluster.keeper.endpoint()]));
    agent.ready().await;
    cluster.stop_hub().await;
    let directory = carillon_hub::peers::Directory::new(agent.clone());
    let options = carillon_hub::registry::client::Options {
        deadline: Duration::from_millis(300),
        ..carillon_hub::registry::client::Options::default()
    };
    let owners = carillon_hub::registry::OwnerClient::start(directory, options);
    let failed = owners.publish(v1::PublishRequest {
        message: Some(message("demo/g/a", "x", 1)),
        ..v1::PublishRequest::default()
    });
    assert!(matches!(failed.await, Err(PublishError::TimedOut(_))));
    agent.stop().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_owner_that_the_saver_knows_to_be_deposed_gives_the_slot_up() {
    let cluster = Cluster::start(&[("demo", "")]).await;
    let options = carillon_hub::registry::client::Options {
        deadline: Duration::from_millis(500),
        ..carillon_hub::registry::client::Options::default()
    };
    let owners = carillon_hub::registry::OwnerClient::start(cluster.directory(), options);
    let published = owners.publish(request("demo/g/a", "x", 1)).await.unwrap();
    let slot = carillon_proto::topic::slot_of("demo/g/a");
    let fence = v1::Fence { slot, epoch: published.epoch + 1 };
    cluster.directory().ask_saver(v1::saver_request::Op::Fence(fence)).await.unwrap();
    match owners.publish(request("demo/g/a", "y", 1)).await {
        Err(PublishError::TimedOut(text)) => assert!(text.contains("NOT_OWNER"), "{text}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(cluster.metric("carillon_registry_slots_given_up_total"), 1.0);
    let read = v1::Read { topic: "demo/g/a".into(), after: 0, limit: 10, max_bytes: 0 };
    assert_eq!(payloads(&cluster.directory().read(read).await.unwrap().messages), ["x"]);
    let elsewhere =
        (0..).map(|i| format!("demo/g/{i}")).find(|name| carillon_proto::topic::slot_of(name) != slot);
    owners.publish(request(&elsewhere.unwrap(), "z", 1)).await.unwrap();
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_publisher_whose_queue_is_full_is_told_at_once() {
    let mut cluster = Cluster::start(&[("demo", "")]).await;
    let agent = carillon_agent::Agent::start(carillon_agent::Options::new(vec![cluster.keeper.endpoint()]));
    agent.ready().await;
    cluster.stop_hub().await;
    let options = carillon_hub::registry::client::Options {
        deadline: Duration::from_secs(2),
        queue: 4,
        queue_bytes: 1000,
    };
    let directory = carillon_hub::peers::Directory::new(agent.clone());
    let owners = carillon_hub::registry::OwnerClient::start(directory, options);
    let too_large = owners.publish(request("demo/g/a", &"x".repeat(1001), 1)).await;
    assert_eq!(too_large.unwrap_err(), PublishError::Overloaded);
    let begun = std::time::Instant::now();
    let answers = (0..50).map(|_| {
        let answer = owners.publish(request("demo/g/a", "x", 1));
        async move { (answer.await.unwrap_err(), begun.elapsed()) }
    });
    let mut overloaded = 0;
    for (error, took) in futures::future::join_all(answers).await {
        match error {
            PublishError::Overloaded => {
                assert!(took < Duration::from_secs(1), "{took:?}");
                overloaded += 1;
            }
            PublishError::TimedOut(_) => assert!(took >= Duration::from_secs(1), "{took:?}"),
            PublishError::Refused(text) => panic!("{text}"),
        }
    }
    assert!((40..50).contains(&overloaded), "{overloaded}");
    // What was given up is forgotten: there is room again.
    cluster.start_hub().await;
    eventually("there is room", async || owners.publish(request("demo/g/a", "x", 1)).await.ok()).await;
    agent.stop().await;
    cluster.stop().await;
}
