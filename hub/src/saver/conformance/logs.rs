//! Cases of logs, retained messages and records.

use super::*;
use crate::saver::store::{MAX_MESSAGE_BYTES, MAX_RECORD_BYTES};

const NEWS: &str = "demo/news";

pub async fn appends_are_read_in_order(ground: Ground) {
    let store = ground.open().await;
    for seq in 1..=5 {
        let appended = one(&store, append(NEWS, seq)).await.unwrap();
        assert_eq!(appended, v1::Appended { duplicate: false, epoch: 1, seq, prev: seq - 1 });
    }
    fill(&store, NEWS, 6..=20).await;
    assert_eq!(seqs(&store, NEWS, 0).await, (1..=20).collect::<Vec<_>>());
    assert_eq!(seqs(&store, NEWS, 17).await, [18, 19, 20]);
    assert_eq!(seqs(&store, NEWS, 20).await, [0; 0]);
    assert_eq!(seqs(&store, "demo/nothing", 0).await, [0; 0]);
    assert_eq!(head(&store, NEWS).await, v1::Head { epoch: 1, seq: 20, trimmed: 0, retained: false });
    // What comes back is what was given, with what the store knows of it.
    let mut given = message(NEWS, 21);
    given.properties = Some(v1::Properties {
        payload_is_utf8: true,
        content_type: "text/plain".to_owned(),
        response_topic: "demo/answers".to_owned(),
        correlation_data: vec![0, 1, 255].into(),
        user: vec![v1::UserProperty { key: "k".to_owned(), value: "v".to_owned() }],
    });
    given.publisher = session("c1");
    one(&store, append_of(given.clone())).await.unwrap();
    let read = v1::Read { topic: NEWS.to_owned(), after: 20, ..v1::Read::default() };
    let reply = store.read(read).await.unwrap();
    assert_eq!(reply.messages, [v1::Message { prev: 20, stored: true, ..given }]);
}

pub async fn reads_stop_at_their_limits(ground: Ground) {
    let store = ground.open().await;
    let sized = |seq, bytes: usize| {
        append_of(v1::Message { payload: vec![b'x'; bytes].into(), ..message(NEWS, seq) })
    };
    let appends = (1..=10).map(|seq| sized(seq, 1000)).chain([sized(11, 50_000)]).collect();
    assert!(store.append(appends).await.iter().all(Result::is_ok));
    let read = async |after, limit, max_bytes| {
        let read = v1::Read { topic: NEWS.to_owned(), after, limit, max_bytes };
        let reply = store.read(read).await.unwrap();
        (reply.messages.iter().map(|message| message.seq).collect::<Vec<_>>(), reply.next)
    };
    assert_eq!(read(0, 3, 0).await, (vec![1, 2, 3], 3));
    assert_eq!(read(3, 3, 0).await, (vec![4, 5, 6], 6));
    assert_eq!(read(0, 0, 2500).await, (vec![1, 2], 2));
    assert_eq!(read(9, 0, 2500).await, (vec![10], 10));
    // At least one, however large.
    assert_eq!(read(10, 0, 2500).await, (vec![11], 11));
    assert_eq!(read(100, 0, 0).await.0, [0; 0]);
    // The default of 100, and the most of 1000.
    fill(&store, "demo/many", 1..=1500).await;
    let many = v1::Read { topic: "demo/many".to_owned(), ..v1::Read::default() };
    assert_eq!(store.read(many.clone()).await.unwrap().messages.len(), 100);
    let most = v1::Read { limit: u32::MAX, max_bytes: u32::MAX, ..many };
    assert_eq!(store.read(most).await.unwrap().messages.len(), 1000);
}

pub async fn prev_is_the_stored_message_before(ground: Ground) {
    let store = ground.open().await;
    let results = store.append([3, 4, 9].map(|seq| append(NEWS, seq)).into()).await;
    let prevs: Vec<u64> = results.into_iter().map(|result| result.unwrap().prev).collect();
    assert_eq!(prevs, [0, 3, 4]);
    assert_eq!(one(&store, append(NEWS, 12)).await.unwrap().prev, 9);
    assert_eq!(seqs(&store, NEWS, 5).await, [9, 12]);
}

pub async fn seqs_have_to_grow(ground: Ground) {
    let store = ground.open().await;
    fill(&store, NEWS, [5]).await;
    is_invalid(one(&store, append(NEWS, 4)).await);
    // Under a new owner as well.
    let newer = v1::Message { epoch: 2, id: "other".to_owned(), ..message(NEWS, 5) };
    is_invalid(one(&store, append_of(newer)).await);
    fill(&store, NEWS, [6]).await;
    assert_eq!(seqs(&store, NEWS, 0).await, [5, 6]);
}

pub async fn a_repeated_append_is_answered_again(ground: Ground) {
    let store = ground.open().await;
    fill(&store, NEWS, 1..=3).await;
    // Its answer was lost: it is that message, not a duplicate of it.
    for _ in 0..2 {
        let again = one(&store, append(NEWS, 2)).await.unwrap();
        assert_eq!(again, v1::Appended { duplicate: false, epoch: 1, seq: 2, prev: 1 });
    }
    let twice = store.append(vec![append(NEWS, 4), append(NEWS, 4)]).await;
    assert_eq!(twice[0], twice[1]);
    assert_eq!(seqs(&store, NEWS, 0).await, [1, 2, 3, 4]);
}

pub async fn a_deposed_owner_is_fenced_off(ground: Ground) {
    let store = ground.open().await;
    let slot = topic::slot_of(NEWS);
    let under = |epoch, seq| append_of(v1::Message { epoch, ..message(NEWS, seq) });
    one(&store, under(3, 1)).await.unwrap();
    store.fence(slot, 5).await.unwrap();
    store.fence(slot, 5).await.unwrap();
    let fenced = Err(StoreError::Fenced { slot, epoch: 3, current: 5 });
    assert_eq!(one(&store, under(3, 2)).await, fenced);
    assert!(matches!(store.fence(slot, 4).await, Err(StoreError::Fenced { .. })));
    one(&store, under(5, 2)).await.unwrap();
    // Whoever appends under a newer epoch has fenced off the older.
    one(&store, under(7, 3)).await.unwrap();
    assert!(matches!(one(&store, under(5, 4)).await, Err(StoreError::Fenced { .. })));
    // A retained message is an append as well; other slots are not concerned.
    let retained = v1::Append { log: false, retain: true, ..under(5, 4) };
    assert!(matches!(one(&store, retained).await, Err(StoreError::Fenced { .. })));
    let other = (0..).map(|n| format!("demo/other/{n}")).find(|name| topic::slot_of(name) != slot).unwrap();
    fill(&store, &other, [1]).await;
    let store = ground.reopen(store).await;
    assert!(matches!(one(&store, under(6, 4)).await, Err(StoreError::Fenced { .. })));
    assert_eq!(head(&store, NEWS).await, v1::Head { epoch: 7, seq: 3, trimmed: 0, retained: false });
    is_invalid(store.fence(topic::SLOTS, 1).await);
}

pub async fn an_id_is_accepted_once(ground: Ground) {
    let store = ground.open().await;
    let with = |topic: &str, seq, id: &str| {
        let message = v1::Message { id: id.to_owned(), ..message(topic, seq) };
        v1::Append { idempotent: true, ..append_of(message) }
    };
    let results = store.append(vec![with(NEWS, 1, "a"), with(NEWS, 2, "a"), with(NEWS, 3, "b")]).await;
    let results: Vec<_> = results.into_iter().map(Result::unwrap).collect();
    assert!(!results[0].duplicate && results[1].duplicate && !results[2].duplicate);
    assert_eq!((results[1].epoch, results[1].seq), (1, 1));
    let again = one(&store, with(NEWS, 4, "b")).await.unwrap();
    assert!(again.duplicate && again.seq == 3);
    assert!(!one(&store, with("demo/other", 1, "a")).await.unwrap().duplicate);
    assert!(!one(&store, with(NEWS, 4, "")).await.unwrap().duplicate);
    assert!(!one(&store, with(NEWS, 5, "")).await.unwrap().duplicate);
    let store = ground.reopen(store).await;
    let again = one(&store, with(NEWS, 6, "a")).await.unwrap();
    assert!(again.duplicate && again.seq == 1);
    assert_eq!(seqs(&store, NEWS, 0).await, [1, 3, 4, 5]);
}

pub async fn ids_are_forgotten_after_a_day(ground: Ground) {
    let store = ground.open().await;
    let with = |seq| {
        let message = v1::Message { id: "a".to_owned(), ..message(NEWS, seq) };
        v1::Append { idempotent: true, ..append_of(message) }
    };
    one(&store, with(1)).await.unwrap();
    assert_eq!(store.sweep(now_ms() + 23 * 3_600_000).await.unwrap().ids, 0);
    assert!(one(&store, with(2)).await.unwrap().duplicate);
    assert_eq!(store.sweep(now_ms() + 25 * 3_600_000).await.unwrap().ids, 1);
    assert!(!one(&store, with(2)).await.unwrap().duplicate);
}

pub async fn refused_appends_leave_the_others_alone(ground: Ground) {
    let store = ground.open().await;
    fill(&store, NEWS, [1]).await;
    let wrong_slot = v1::Append { slot: (topic::slot_of(NEWS) + 1) % topic::SLOTS, ..append(NEWS, 3) };
    let batch =
        vec![append(NEWS, 2), append(NEWS, 1_000_000), append(NEWS, 3), wrong_slot, append("demo/x", 1)];
    let results = store.append(batch).await;
    let succeeded: Vec<bool> = results.iter().map(Result::is_ok).collect();
    assert_eq!(succeeded, [true, true, false, false, true]);
    assert_eq!(seqs(&store, NEWS, 0).await, [1, 2, 1_000_000]);
    assert_eq!(seqs(&store, "demo/x", 0).await, [1]);
    assert!(store.append(Vec::new()).await.is_empty());
}

pub async fn heads_come_in_the_order_asked(ground: Ground) {
    let store = ground.open().await;
    fill(&store, "demo/a", 1..=2).await;
    fill(&store, "demo/b", 1..=7).await;
    let asked = ["demo/b", "demo/none", "demo/a", "demo/b"].map(str::to_owned).into();
    let heads: Vec<u64> = store.heads(asked).await.unwrap().iter().map(|head| head.seq).collect();
    assert_eq!(heads, [7, 0, 2, 7]);
    assert_eq!(store.heads(Vec::new()).await.unwrap(), []);
}

pub async fn heads_say_whether_there_is_a_retained_message(ground: Ground) {
    let store = ground.open().await;
    let has = |topic: &'static str| {
        let store = &store;
        async move { store.heads(vec![topic.to_owned()]).await.unwrap()[0].retained }
    };
    fill(&store, "demo/a", 1..=2).await;
    assert!(!has("demo/a").await && !has("demo/b").await);
    for (topic, log) in [("demo/a", true), ("demo/b", false)] {
        for (seq, text) in [(3, "kept"), (4, "")] {
            let append = append_of(v1::Message { payload: text.into(), ..message(topic, seq) });
            one(&store, v1::Append { log, retain: true, ..append }).await.unwrap();
            assert_eq!(has(topic).await, seq == 3, "{topic}");
        }
    }
}

pub async fn logs_survive_reopening(ground: Ground) {
    let mut store = ground.open().await;
    for round in 0..3 {
        fill(&store, NEWS, round * 10 + 1..=round * 10 + 10).await;
        store = ground.reopen(store).await;
        assert_eq!(seqs(&store, NEWS, 0).await, (1..=round * 10 + 10).collect::<Vec<_>>());
    }
    assert_eq!(one(&store, append(NEWS, 31)).await.unwrap().prev, 30);
}

pub async fn retained_messages_match_filters(ground: Ground) {
    let store = ground.open().await;
    let retain = |topic: &str, seq, payload: &str| {
        let message = v1::Message { payload: payload.to_owned().into(), ..message(topic, seq) };
        v1::Append { log: false, retain: true, ..append_of(message) }
    };
    for topic in ["demo/a", "demo/a/b", "demo/a/c", "demo/ab", "other/a"] {
        one(&store, retain(topic, 1, topic)).await.unwrap();
    }
    let found = async |filter: &str, limit| {
        let messages = store.retained(filter.to_owned(), limit).await.unwrap();
        assert!(messages.iter().all(|message| message.retain));
        messages.into_iter().map(|message| message.topic).collect::<Vec<_>>()
    };
    assert_eq!(found("demo/#", 0).await, ["demo/a", "demo/a/b", "demo/a/c", "demo/ab"]);
    assert_eq!(found("demo/a/#", 0).await, ["demo/a", "demo/a/b", "demo/a/c"]);
    assert_eq!(found("demo/+", 0).await, ["demo/a", "demo/ab"]);
    assert_eq!(found("+/a", 0).await, ["demo/a", "other/a"]);
    assert_eq!(found("demo/a/b", 0).await, ["demo/a/b"]);
    assert_eq!(found("demo/none", 0).await, [""; 0]);
    assert_eq!(found("demo/#", 2).await.len(), 2);
    // Not in the log.
    assert_eq!(seqs(&store, "demo/a", 0).await, [0; 0]);
    // Replaced, also by one that goes to the log; cleared.
    one(&store, v1::Append { log: true, ..retain("demo/a", 2, "new") }).await.unwrap();
    one(&store, retain("demo/a/b", 2, "")).await.unwrap();
    let messages = store.retained("demo/a/#".to_owned(), 0).await.unwrap();
    let payloads: Vec<&[u8]> = messages.iter().map(|message| &message.payload[..]).collect();
    assert_eq!(payloads, [&b"new"[..], b"demo/a/c"]);
    assert_eq!(seqs(&store, "demo/a", 0).await, [2]);
    is_invalid(store.retained("demo/#/x".to_owned(), 0).await);
}

pub async fn retained_messages_survive_and_expire(ground: Ground) {
    let store = ground.open().await;
    let retain = |topic: &str, expires_ms, payload: &str| {
        let message = v1::Message { expires_ms, payload: payload.to_owned().into(), ..message(topic, 1) };
        v1::Append { log: false, retain: true, ..append_of(message) }
    };
    let now = now_ms();
    let batch = vec![
        retain("demo/stays", 0, "x"),
        retain("demo/expired", now - 1, "x"),
        retain("demo/expires", now + 3_600_000, "x"),
        retain("demo/cleared", 0, "x"),
        retain("demo/cleared", 0, ""),
    ];
    assert!(store.append(batch).await.iter().all(Result::is_ok));
    let found = async |store: &Arc<dyn Store>| {
        let messages = store.retained("demo/#".to_owned(), 0).await.unwrap();
        messages.into_iter().map(|message| message.topic).collect::<Vec<_>>()
    };
    assert_eq!(found(&store).await, ["demo/expires", "demo/stays"]);
    let store = ground.reopen(store).await;
    assert_eq!(found(&store).await, ["demo/expires", "demo/stays"]);
    store.sweep(now + 7_200_000).await.unwrap();
    assert_eq!(found(&store).await, ["demo/stays"]);
}

pub async fn records_are_kept_listed_and_expire(ground: Ground) {
    let store = ground.open().await;
    let put = |kind: &str, key: &str, value: &str, expires_ms| v1::PutRecord {
        kind: kind.to_owned(),
        key: key.to_owned(),
        value: value.to_owned().into(),
        expires_ms,
        ..v1::PutRecord::default()
    };
    let now = now_ms();
    for (key, value) in [("a/1", "one"), ("a/2", "two"), ("b/1", "three")] {
        store.put_record(put("job", key, value, 0)).await.unwrap();
    }
    store.put_record(put("other", "a/1", "four", 0)).await.unwrap();
    store.put_record(put("job", "a/3", "five", now + 3_600_000)).await.unwrap();
    store.put_record(put("job", "a/1", "again", 0)).await.unwrap();
    let store = ground.reopen(store).await;
    let get = async |kind: &str, key: &str| {
        let record = store.get_record(kind.to_owned(), key.to_owned()).await.unwrap();
        record.map(|record| String::from_utf8(record.value.to_vec()).unwrap())
    };
    assert_eq!(get("job", "a/1").await.as_deref(), Some("again"));
    assert_eq!(get("other", "a/1").await.as_deref(), Some("four"));
    assert_eq!(get("job", "a").await, None);
    let list = async |prefix: &str, limit| {
        let list = v1::ListRecords { kind: "job".to_owned(), prefix: prefix.to_owned(), limit };
        store.list_records(list).await.unwrap().into_iter().map(|record| record.key).collect::<Vec<_>>()
    };
    assert_eq!(list("", 0).await, ["a/1", "a/2", "a/3", "b/1"]);
    assert_eq!(list("a/", 0).await, ["a/1", "a/2", "a/3"]);
    assert_eq!(list("a/", 2).await, ["a/1", "a/2"]);
    // One that has expired already is how it is removed.
    store.put_record(put("job", "a/3", "five", 1)).await.unwrap();
    assert_eq!(get("job", "a/3").await, None);
    assert_eq!(list("a/", 0).await, ["a/1", "a/2"]);
}

pub async fn what_is_malformed_is_refused(ground: Ground) {
    let store = ground.open().await;
    is_invalid(one(&store, v1::Append { message: None, ..append(NEWS, 1) }).await);
    is_invalid(one(&store, append("demo/+", 1)).await);
    is_invalid(one(&store, append("", 1)).await);
    is_invalid(one(&store, append(NEWS, 0)).await);
    is_invalid(one(&store, append_of(v1::Message { epoch: 0, ..message(NEWS, 1) })).await);
    is_invalid(one(&store, append_of(v1::Message { id: "x".repeat(300), ..message(NEWS, 1) })).await);
    is_invalid(one(&store, v1::Append { log: false, retain: false, ..append(NEWS, 1) }).await);
    let large = v1::Message { payload: vec![0; MAX_MESSAGE_BYTES].into(), ..message(NEWS, 1) };
    is_invalid(one(&store, append_of(large)).await);
    assert_eq!(head(&store, NEWS).await, v1::Head::default());
    is_invalid(store.read(v1::Read { topic: "demo/#".to_owned(), ..v1::Read::default() }).await);
    let record = v1::PutRecord { kind: "k".to_owned(), key: "a".to_owned(), ..v1::PutRecord::default() };
    is_invalid(store.put_record(v1::PutRecord { kind: String::new(), ..record.clone() }).await);
    is_invalid(store.put_record(v1::PutRecord { key: "a\0b".to_owned(), ..record.clone() }).await);
    let large = v1::PutRecord { value: vec![0; MAX_RECORD_BYTES + 1].into(), ..record };
    is_invalid(store.put_record(large).await);
    let nobody = v1::OpenSession { expiry_seconds: 1, ..v1::OpenSession::default() };
    is_invalid(store.open_session(nobody).await);
    let strange = v1::SessionRef { client_id: "a\0b".to_owned(), ..session("c").unwrap() };
    let strange = v1::OpenSession { session: Some(strange), expiry_seconds: 1, ..v1::OpenSession::default() };
    is_invalid(store.open_session(strange).await);
    let opened = open(&store, "c1").await;
    let subscriptions = vec![subscription("demo/a"), subscription("demo/#/b")];
    let subscribe = v1::Subscribe { session: session("c1"), attachment: opened.attachment, subscriptions };
    is_invalid(store.subscribe(subscribe).await);
    // All or nothing.
    assert_eq!(open(&store, "c1").await.subscriptions, []);
}

pub async fn concurrent_appends_keep_their_topics_order(ground: Ground) {
    let store = ground.open().await;
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..8 {
        let store = store.clone();
        tasks.spawn(async move {
            let topic = format!("demo/concurrent/{task}");
            for batch in 0..20 {
                fill(&store, &topic, batch * 10 + 1..=batch * 10 + 10).await;
            }
        });
    }
    while let Some(task) = tasks.join_next().await {
        task.unwrap();
    }
    for task in 0..8 {
        let topic = format!("demo/concurrent/{task}");
        assert_eq!(seqs(&store, &topic, 0).await, (1..=200).collect::<Vec<_>>());
    }
}
