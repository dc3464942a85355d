//! Cases of sessions: positions, cursors, attachment, expiry.

use super::*;
use crate::saver::store::NEVER;

const NEWS: &str = "demo/news";
const INBOX: &str = "demo/u/alice";

fn position(result: &v1::SubscribedOne) -> (u64, u64) {
    assert_eq!(result.positions.len(), 1);
    (result.positions[0].after, result.positions[0].head)
}

pub async fn a_subscription_begins_at_the_head(ground: Ground) {
    let store = ground.open().await;
    fill(&store, NEWS, 1..=3).await;
    let opened = open(&store, "c1").await;
    assert!(!opened.present && opened.kept && opened.attachment > 0 && opened.subscriptions.is_empty());
    let results = subscribe(&store, "c1", opened.attachment, &[NEWS, "demo/not/yet"]).await;
    assert!(!results[0].existed && !results[1].existed);
    assert_eq!((position(&results[0]), position(&results[1])), ((3, 3), (0, 0)));
    // Nothing is waiting; then what came since is.
    assert_eq!(open(&store, "c1").await.backlog, []);
    fill(&store, NEWS, 4..=5).await;
    fill(&store, "demo/not/yet", 1..=2).await;
    let opened = open(&store, "c1").await;
    assert!(opened.present);
    assert_eq!(opened.subscriptions, [subscription(NEWS), subscription("demo/not/yet")]);
    assert_eq!(backlog(&opened), [(NEWS.to_owned(), 3, 5), ("demo/not/yet".to_owned(), 0, 2)]);
}

pub async fn an_inbox_begins_at_its_beginning(ground: Ground) {
    let store = ground.open().await;
    fill(&store, INBOX, 1..=5).await;
    ack(&store, "c0", 0, INBOX, 2).await;
    let attachment = open(&store, "c1").await.attachment;
    let results = subscribe(&store, "c1", attachment, &[INBOX]).await;
    assert_eq!(position(&results[0]), (2, 5));
    assert_eq!(backlog(&open(&store, "c1").await), [(INBOX.to_owned(), 2, 5)]);
}

pub async fn acks_move_cursors_and_never_back(ground: Ground) {
    let store = ground.open().await;
    let attachment = open(&store, "c1").await.attachment;
    subscribe(&store, "c1", attachment, &[NEWS]).await;
    fill(&store, NEWS, 1..=10).await;
    ack(&store, "c1", attachment, NEWS, 6).await;
    ack(&store, "c1", attachment, NEWS, 4).await;
    // A topic that it does not subscribe to, or that is not there, is passed over.
    ack(&store, "c1", attachment, "demo/none", 4).await;
    let opened = open(&store, "c1").await;
    assert_eq!(backlog(&opened), [(NEWS.to_owned(), 6, 10)]);
    // An ack beyond the head is one of the head.
    ack(&store, "c1", opened.attachment, NEWS, 99).await;
    fill(&store, NEWS, 11..=12).await;
    assert_eq!(backlog(&open(&store, "c1").await), [(NEWS.to_owned(), 10, 12)]);
}

pub async fn unkept_sessions_are_told_positions(ground: Ground) {
    let store = ground.open().await;
    fill(&store, NEWS, 1..=3).await;
    fill(&store, INBOX, 1..=4).await;
    ack(&store, "c1", 0, INBOX, 1).await;
    let subscriptions = [NEWS, INBOX, "demo/none", "demo/#"].map(subscription).into();
    let subscribe = v1::Subscribe { session: None, attachment: 0, subscriptions };
    let results = store.subscribe(subscribe).await.unwrap();
    assert!(results.iter().all(|result| !result.existed));
    assert_eq!(position(&results[0]), (3, 3));
    assert_eq!(position(&results[1]), (1, 4));
    assert_eq!(position(&results[2]), (0, 0));
    assert_eq!(results[3].positions, []);
}

pub async fn a_wildcard_has_what_came_after_it(ground: Ground) {
    let store = ground.open().await;
    fill(&store, "demo/room/old", 1..=3).await;
    fill(&store, "demo/room/still", 1..=3).await;
    let attachment = open(&store, "c1").await.attachment;
    let results = subscribe(&store, "c1", attachment, &["demo/room/+"]).await;
    assert!(!results[0].existed && results[0].positions.is_empty());
    assert_eq!(open(&store, "c1").await.backlog, []);
    fill(&store, "demo/room/old", 4..=8).await;
    fill(&store, "demo/room/new", 1..=2).await;
    fill(&store, "demo/else", 1..=2).await;
    let expected = [("demo/room/new".to_owned(), 0, 2), ("demo/room/old".to_owned(), 3, 8)];
    let opened = open(&store, "c1").await;
    assert_eq!(backlog(&opened), expected);
    // The same after reopening, told again, and moved on by acks.
    let store = ground.reopen(store).await;
    let opened = open(&store, "c1").await;
    assert_eq!(backlog(&opened), expected);
    let again = subscribe(&store, "c1", opened.attachment, &["demo/room/+"]).await;
    assert!(again[0].existed);
    assert_eq!(again[0].positions.len(), 2);
    ack(&store, "c1", opened.attachment, "demo/room/old", 7).await;
    ack(&store, "c1", opened.attachment, "demo/room/new", 2).await;
    assert_eq!(backlog(&open(&store, "c1").await), [("demo/room/old".to_owned(), 7, 8)]);
}

pub async fn a_moved_session_is_refused(ground: Ground) {
    let store = ground.open().await;
    fill(&store, NEWS, 1..=5).await;
    let first = open(&store, "c1").await.attachment;
    subscribe(&store, "c1", first, &[NEWS]).await;
    fill(&store, NEWS, 6..=9).await;
    let second = open(&store, "c1").await.attachment;
    assert!(second > first);
    has_moved(try_ack(&store, "c1", first, NEWS, 9).await);
    let subscriptions = vec![subscription("demo/x")];
    let subscribe = v1::Subscribe { session: session("c1"), attachment: first, subscriptions };
    has_moved(store.subscribe(subscribe).await);
    let filters = vec![NEWS.to_owned()];
    let unsubscribe = v1::Unsubscribe { session: session("c1"), attachment: first, filters };
    has_moved(store.unsubscribe(unsubscribe).await);
    let close = v1::CloseSession { session: session("c1"), attachment: first, ..v1::CloseSession::default() };
    has_moved(store.close_session(close).await);
    has_moved(try_ack(&store, "unknown", first, NEWS, 9).await);
    let third = open(&store, "c1").await;
    assert_eq!(backlog(&third), [(NEWS.to_owned(), 5, 9)]);
    assert_eq!(third.subscriptions, [subscription(NEWS)]);
    // Also by a session that was forgotten and is another now, and after reopening.
    let clean = v1::OpenSession {
        session: session("c1"),
        clean_start: true,
        expiry_seconds: 60,
        ..Default::default()
    };
    let fourth = store.open_session(clean).await.unwrap().attachment;
    assert!(fourth > third.attachment);
    has_moved(try_ack(&store, "c1", third.attachment, NEWS, 9).await);
    let store = ground.reopen(store).await;
    has_moved(try_ack(&store, "c1", third.attachment, NEWS, 9).await);
    assert!(open(&store, "c1").await.attachment > fourth);
}

pub async fn a_record_beside_a_session_is_written_by_who_has_it(ground: Ground) {
    let store = ground.open().await;
    let put = async |value: &str, attachment| {
        let record = v1::PutRecord {
            kind: "beside".to_owned(),
            key: "c1".to_owned(),
            value: value.to_owned().into(),
            session: session("c1"),
            attachment,
            ..v1::PutRecord::default()
        };
        store.put_record(record).await
    };
    let first = open(&store, "c1").await.attachment;
    put("first", first).await.unwrap();
    let second = open(&store, "c1").await.attachment;
    put("second", second).await.unwrap();
    has_moved(put("deposed", first).await);
    has_moved(put("nobody", 0).await);
    let found = store.get_record("beside".to_owned(), "c1".to_owned()).await.unwrap();
    assert_eq!(found.map(|record| record.value), Some("second".into()));
    // Closed it is still the same one's; forgotten it is nobody's.
    close(&store, "c1", second, 60).await;
    put("closed", second).await.unwrap();
    close(&store, "c1", second, 0).await;
    has_moved(put("forgotten", second).await);
}

pub async fn a_clean_start_forgets(ground: Ground) {
    let store = ground.open().await;
    let attachment = open(&store, "c1").await.attachment;
    subscribe(&store, "c1", attachment, &[NEWS, "demo/#"]).await;
    fill(&store, NEWS, 1..=3).await;
    let clean = v1::OpenSession {
        session: session("c1"),
        clean_start: true,
        expiry_seconds: 3600,
        ..v1::OpenSession::default()
    };
    let opened = store.open_session(clean).await.unwrap();
    assert!(!opened.present && opened.kept && opened.subscriptions.is_empty() && opened.backlog.is_empty());
    // A subscription made now is a new one.
    let results = subscribe(&store, "c1", opened.attachment, &[NEWS]).await;
    assert!(!results[0].existed);
    assert_eq!(position(&results[0]), (3, 3));
}

pub async fn without_expiry_nothing_is_kept(ground: Ground) {
    let store = ground.open().await;
    let attachment = open(&store, "c1").await.attachment;
    subscribe(&store, "c1", attachment, &[NEWS]).await;
    let brief = v1::OpenSession { session: session("c1"), expiry_seconds: 0, ..v1::OpenSession::default() };
    let opened = store.open_session(brief.clone()).await.unwrap();
    assert!(!opened.kept && !opened.present && opened.backlog.is_empty());
    has_moved(try_ack(&store, "c1", attachment, NEWS, 1).await);
    assert!(!store.open_session(brief).await.unwrap().kept);
    assert!(!open(&store, "c1").await.present);
}

pub async fn sessions_expire(ground: Ground) {
    let store = ground.open().await;
    for client in ["closed", "open", "forgotten"] {
        let attachment = open(&store, client).await.attachment;
        subscribe(&store, client, attachment, &[NEWS]).await;
        match client {
            "closed" => close(&store, client, attachment, 60).await,
            "forgotten" => close(&store, client, attachment, 0).await,
            _ => {}
        }
    }
    let now = now_ms();
    assert_eq!(store.sweep(now + 50_000).await.unwrap().sessions, 0);
    assert_eq!(store.sweep(now + 70_000).await.unwrap().sessions, 1);
    assert!(!open(&store, "closed").await.present);
    assert!(!open(&store, "forgotten").await.present);
    // One that is open does not expire.
    assert!(open(&store, "open").await.present);
    // The expiry of the close counts: and it is not found although no sweep has come by.
    let attachment = open(&store, "brief").await.attachment;
    close(&store, "brief", attachment, 1).await;
    tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
    assert!(!open(&store, "brief").await.present);
}

pub async fn a_session_may_never_expire(ground: Ground) {
    let store = ground.open().await;
    let attachment = open(&store, "c1").await.attachment;
    close(&store, "c1", attachment, NEVER).await;
    let century = 100 * 365 * 24 * 3_600_000;
    assert_eq!(store.sweep(now_ms() + century).await.unwrap().sessions, 0);
    assert!(open(&store, "c1").await.present);
}

pub async fn what_was_sent_is_told(ground: Ground) {
    let store = ground.open().await;
    let attachment = open(&store, "c1").await.attachment;
    subscribe(&store, "c1", attachment, &[NEWS, "demo/wild/#"]).await;
    fill(&store, NEWS, 1..=5).await;
    fill(&store, "demo/wild/x", 1..=5).await;
    ack(&store, "c1", attachment, NEWS, 2).await;
    let sent = [(NEWS, 4), ("demo/wild/x", 3), ("demo/none", 3)];
    let sent = sent.map(|(topic, seq)| v1::AckPosition { topic: topic.to_owned(), seq }).into();
    let close =
        v1::CloseSession { session: session("c1"), attachment, expiry_seconds: 60, sent, delivery: None };
    store.close_session(close).await.unwrap();
    let store = ground.reopen(store).await;
    let opened = open(&store, "c1").await;
    let mut sent: Vec<_> =
        opened.backlog.iter().map(|one| (one.topic.as_str(), one.after, one.sent)).collect();
    sent.sort();
    assert_eq!(sent, [(NEWS, 2, 4), ("demo/wild/x", 0, 3)]);
}

pub async fn delivery_state_is_told_until_it_is_taken_up(ground: Ground) {
    let store = ground.open().await;
    let first = open(&store, "c1").await;
    assert_eq!(first.delivery, None, "a new session has none");
    let state = v1::DeliveryState {
        in_flight: vec![
            v1::InFlight { packet_id: 7, qos: 2, topic: NEWS.to_owned(), seq: 3, ..v1::InFlight::default() },
            v1::InFlight { packet_id: 2, qos: 2, released: true, ..v1::InFlight::default() },
            v1::InFlight {
                packet_id: 3,
                qos: 1,
                topic: NEWS.to_owned(),
                seq: 1,
                retained: true,
                ..v1::InFlight::default()
            },
        ],
        sent: vec![v1::AckPosition { topic: NEWS.to_owned(), seq: 4 }],
        received: vec![
            v1::ReceivedPublish { packet_id: 9, message_id: String::new() },
            v1::ReceivedPublish { packet_id: 10, message_id: "an id".to_owned() },
        ],
    };
    let close_with = |attachment, delivery| v1::CloseSession {
        session: session("c1"),
        attachment,
        expiry_seconds: 60,
        delivery,
        ..v1::CloseSession::default()
    };
    store.close_session(close_with(first.attachment, Some(state.clone()))).await.unwrap();
    // It is as durable as the session, and in the same order.
    let store = ground.reopen(store).await;
    let second = open(&store, "c1").await;
    assert_eq!(second.delivery, Some(state.clone()));
    // That gateway was killed before it had done anything with it.
    let third = open(&store, "c1").await;
    assert_eq!((third.present, third.delivery), (true, Some(state.clone())));
    has_moved(try_ack(&store, "c1", second.attachment, NEWS, 1).await);
    let store = ground.reopen(store).await;
    // Any operation shows that it goes on from there: identifiers may stand for other messages from then on.
    let nothing = v1::Ack { session: session("c1"), attachment: third.attachment, positions: Vec::new() };
    store.ack(nothing).await.unwrap();
    let fourth = open(&store, "c1").await;
    let rest = v1::DeliveryState { received: Vec::new(), ..state.clone() };
    assert_eq!(
        fourth.delivery,
        Some(rest),
        "what was in flight is so until a device has acknowledged something"
    );
    subscribe(&store, "c1", fourth.attachment, &[NEWS]).await;
    fill(&store, NEWS, 1..=2).await;
    ack(&store, "c1", fourth.attachment, NEWS, 1).await;
    let store = ground.reopen(store).await;
    let fourth = open(&store, "c1").await;
    assert_eq!((fourth.present, fourth.delivery), (true, None));
    // A later closing without any replaces it, a clean start forgets it, an old attachment cannot set it.
    store.close_session(close_with(fourth.attachment, Some(state.clone()))).await.unwrap();
    store.close_session(close_with(fourth.attachment, None)).await.unwrap();
    let fifth = open(&store, "c1").await;
    assert_eq!(fifth.delivery, None);
    has_moved(store.close_session(close_with(fourth.attachment, Some(state.clone()))).await);
    store.close_session(close_with(fifth.attachment, Some(state))).await.unwrap();
    let clean = v1::OpenSession {
        session: session("c1"),
        clean_start: true,
        expiry_seconds: 60,
        ..Default::default()
    };
    assert_eq!(store.open_session(clean).await.unwrap().delivery, None);
}

pub async fn what_comes_late_ends_no_later_session(ground: Ground) {
    let store = ground.open().await;
    let connected = |connected_ms, expiry_seconds| v1::OpenSession {
        session: session("c1"),
        clean_start: expiry_seconds == 0,
        expiry_seconds,
        connected_ms,
        ..v1::OpenSession::default()
    };
    let first = store.open_session(connected(1000, 60)).await.unwrap();
    let second = store.open_session(connected(3000, 60)).await.unwrap();
    let store = ground.reopen(store).await;
    // The first gateway could not tell the saver before: neither that the connection ended, expiry 0, …
    let close =
        v1::CloseSession { attachment: first.attachment, session: session("c1"), ..Default::default() };
    has_moved(store.close_session(close).await);
    // … nor that a device of its wanted nothing kept, at 2000.
    has_moved(store.open_session(connected(2000, 0)).await);
    let third = open(&store, "c1").await;
    assert!(third.present && third.attachment > second.attachment);
    // Opened by somebody who does not say when, and a later wish.
    assert!(!store.open_session(connected(4000, 0)).await.unwrap().kept);
    assert!(!open(&store, "c1").await.present);
}

pub async fn unsubscribing_forgets_the_cursor(ground: Ground) {
    let store = ground.open().await;
    let attachment = open(&store, "c1").await.attachment;
    subscribe(&store, "c1", attachment, &[NEWS, "demo/wild/#"]).await;
    fill(&store, NEWS, 1..=3).await;
    fill(&store, "demo/wild/x", 1..=3).await;
    ack(&store, "c1", attachment, "demo/wild/x", 1).await;
    let filters = [NEWS, "demo/wild/#", "demo/never"].map(str::to_owned).into();
    store.unsubscribe(v1::Unsubscribe { session: session("c1"), attachment, filters }).await.unwrap();
    let opened = open(&store, "c1").await;
    assert!(opened.subscriptions.is_empty() && opened.backlog.is_empty());
    let results = subscribe(&store, "c1", opened.attachment, &[NEWS, "demo/wild/#"]).await;
    assert_eq!(position(&results[0]), (3, 3));
    assert!(!results[1].existed);
    assert_eq!(open(&store, "c1").await.backlog, []);
}

pub async fn subscribing_again_keeps_the_cursor(ground: Ground) {
    let store = ground.open().await;
    let attachment = open(&store, "c1").await.attachment;
    subscribe(&store, "c1", attachment, &[NEWS]).await;
    fill(&store, NEWS, 1..=5).await;
    ack(&store, "c1", attachment, NEWS, 2).await;
    let changed = v1::Subscription { no_local: true, identifier: 7, ..subscription(NEWS) };
    let again = v1::Subscribe { session: session("c1"), attachment, subscriptions: vec![changed.clone()] };
    let results = store.subscribe(again).await.unwrap();
    assert!(results[0].existed);
    assert_eq!(position(&results[0]), (2, 5));
    assert_eq!(open(&store, "c1").await.subscriptions, [changed]);
}

pub async fn qos_0_owes_nothing(ground: Ground) {
    let store = ground.open().await;
    let attachment = open(&store, "c1").await.attachment;
    let with = |filter: &str, qos| v1::Subscribe {
        session: session("c1"),
        attachment,
        subscriptions: vec![v1::Subscription { qos, ..subscription(filter) }],
    };
    store.subscribe(with(NEWS, 0)).await.unwrap();
    store.subscribe(with("demo/wild/#", 0)).await.unwrap();
    store.subscribe(with(INBOX, 0)).await.unwrap();
    fill(&store, NEWS, 1..=3).await;
    fill(&store, "demo/wild/x", 1..=3).await;
    fill(&store, INBOX, 1..=3).await;
    // It holds no inbox back.
    ack(&store, "c2", 0, INBOX, 2).await;
    assert_eq!(seqs(&store, INBOX, 0).await, [3]);
    // With QoS 1 it begins now, the inbox with what waits.
    assert_eq!(position(&store.subscribe(with(NEWS, 1)).await.unwrap()[0]), (3, 3));
    assert_eq!(store.subscribe(with("demo/wild/#", 1)).await.unwrap()[0].positions, []);
    assert_eq!(position(&store.subscribe(with(INBOX, 1)).await.unwrap()[0]), (2, 3));
    fill(&store, NEWS, [4]).await;
    fill(&store, "demo/wild/x", [4]).await;
    let opened = open(&store, "c1").await;
    let expected = [(NEWS.to_owned(), 3, 4), (INBOX.to_owned(), 2, 3), ("demo/wild/x".to_owned(), 3, 4)];
    assert_eq!(backlog(&opened), expected);
    // And back: nothing is owed any more.
    let attachment = opened.attachment;
    store.subscribe(v1::Subscribe { attachment, ..with(NEWS, 0) }).await.unwrap();
    store.subscribe(v1::Subscribe { attachment, ..with(INBOX, 0) }).await.unwrap();
    store.subscribe(v1::Subscribe { attachment, ..with("demo/wild/#", 0) }).await.unwrap();
    assert_eq!(open(&store, "c1").await.backlog, []);
}

pub async fn sessions_survive_reopening(ground: Ground) {
    let store = ground.open().await;
    let mut attachments = Vec::new();
    for number in 0..20 {
        let client = format!("c{number}");
        let attachment = open(&store, &client).await.attachment;
        subscribe(&store, &client, attachment, &[NEWS]).await;
        attachments.push(attachment);
    }
    fill(&store, NEWS, 1..=20).await;
    for (number, &attachment) in attachments.iter().enumerate() {
        ack(&store, &format!("c{number}"), attachment, NEWS, number as u64).await;
    }
    let store = ground.reopen(store).await;
    // The store was away, the gateway was not: its acks still count, and the session counts as open.
    ack(&store, "c19", attachments[19], NEWS, 20).await;
    assert_eq!(store.sweep(now_ms() + 3_700_000).await.unwrap().sessions, 19);
    assert!(open(&store, "c19").await.present);
    assert_eq!(open(&store, "c19").await.backlog, []);
    assert!(!open(&store, "c3").await.present);
}

pub async fn a_gateway_that_is_gone_is_closed_for(ground: Ground) {
    let store = ground.open().await;
    let open_at = async |client: &str, gateway: &str, incarnation| {
        let open = v1::OpenSession {
            session: session(client),
            gateway: gateway.to_owned(),
            incarnation,
            clean_start: false,
            expiry_seconds: 60,
            connected_ms: 0,
        };
        store.open_session(open).await.unwrap();
    };
    open_at("old", "gateway-1", 1).await;
    open_at("new", "gateway-1", 2).await;
    open_at("other", "gateway-2", 1).await;
    assert_eq!(store.close_attached("gateway-1".to_owned(), 2).await.unwrap(), 1);
    assert_eq!(store.close_attached("gateway-1".to_owned(), 2).await.unwrap(), 0);
    assert_eq!(store.sweep(now_ms() + 61_000).await.unwrap().sessions, 1);
    assert!(!open(&store, "old").await.present);
    assert!(open(&store, "new").await.present && open(&store, "other").await.present);
}

pub async fn overlapping_subscriptions_share_a_cursor(ground: Ground) {
    let store = ground.open().await;
    let attachment = open(&store, "c1").await.attachment;
    subscribe(&store, "c1", attachment, &["demo/#"]).await;
    fill(&store, NEWS, 1..=4).await;
    // What the wildcard is owed is not lost by naming the topic as well.
    let results = subscribe(&store, "c1", attachment, &[NEWS]).await;
    assert_eq!(position(&results[0]), (0, 4));
    let opened = open(&store, "c1").await;
    assert_eq!(backlog(&opened), [(NEWS.to_owned(), 0, 4)]);
    ack(&store, "c1", opened.attachment, NEWS, 3).await;
    let filters = vec![NEWS.to_owned()];
    let unsubscribe = v1::Unsubscribe { session: session("c1"), attachment: opened.attachment, filters };
    store.unsubscribe(unsubscribe).await.unwrap();
    assert_eq!(backlog(&open(&store, "c1").await), [(NEWS.to_owned(), 3, 4)]);
}

pub async fn acks_survive_a_stop(ground: Ground) {
    let mut store = ground.open().await;
    let mut attachment = open(&store, "c1").await.attachment;
    subscribe(&store, "c1", attachment, &[NEWS]).await;
    fill(&store, NEWS, 1..=10).await;
    for seq in 1..=4 {
        ack(&store, "c1", attachment, NEWS, seq * 2).await;
        store = ground.reopen(store).await;
        let opened = open(&store, "c1").await;
        assert_eq!(backlog(&opened), [(NEWS.to_owned(), seq * 2, 10)]);
        attachment = opened.attachment;
    }
}
