//! Cases of what is trimmed from logs, and when.

use super::*;

const NEWS: &str = "demo/news";
const INBOX: &str = "demo/u/alice";

fn kept(seq: u64, retention: v1::Retention) -> v1::Append {
    v1::Append { retention: Some(retention), ..append(NEWS, seq) }
}

pub async fn a_log_is_trimmed_by_count(ground: Ground) {
    let store = ground.open().await;
    let three = v1::Retention { max_count: 3, ..v1::Retention::default() };
    // In one batch as well as one by one.
    assert!(store.append((1..=5).map(|seq| kept(seq, three)).collect()).await.iter().all(Result::is_ok));
    assert_eq!(seqs(&store, NEWS, 0).await, [3, 4, 5]);
    for seq in 6..=10 {
        assert_eq!(one(&store, kept(seq, three)).await.unwrap().prev, seq - 1);
    }
    assert_eq!(seqs(&store, NEWS, 0).await, [8, 9, 10]);
    assert_eq!(head(&store, NEWS).await, v1::Head { epoch: 1, seq: 10, trimmed: 7, retained: false });
    let store = ground.reopen(store).await;
    assert_eq!(seqs(&store, NEWS, 0).await, [8, 9, 10]);
    assert_eq!(head(&store, NEWS).await, v1::Head { epoch: 1, seq: 10, trimmed: 7, retained: false });
    // Remembered: an append that says nothing of it is trimmed as before.
    fill(&store, NEWS, [11]).await;
    assert_eq!(seqs(&store, NEWS, 0).await, [9, 10, 11]);
    // A large limit may be exceeded by a sixteenth.
    let thousand = v1::Retention { max_count: 1000, ..v1::Retention::default() };
    let many = |seq| v1::Append { retention: Some(thousand), ..append("demo/many", seq) };
    for batch in 0..40 {
        let batch = (batch * 100 + 1..=batch * 100 + 100).map(many).collect();
        assert!(store.append(batch).await.iter().all(Result::is_ok));
    }
    let left = 4000 - head(&store, "demo/many").await.trimmed;
    assert!((1000..=1063).contains(&left), "{left}");
}

pub async fn a_log_is_trimmed_by_bytes(ground: Ground) {
    let store = ground.open().await;
    let limit = v1::Retention { max_bytes: 10_000, ..v1::Retention::default() };
    let sized = |seq, bytes: usize| {
        let message = v1::Message { payload: vec![b'x'; bytes].into(), ..message(NEWS, seq) };
        v1::Append { retention: Some(limit), ..append_of(message) }
    };
    for seq in 1..=20 {
        one(&store, sized(seq, 2000)).await.unwrap();
    }
    assert_eq!(seqs(&store, NEWS, 0).await, [17, 18, 19, 20]);
    // The newest always stays.
    one(&store, sized(21, 20_000)).await.unwrap();
    assert_eq!(seqs(&store, NEWS, 0).await, [21]);
    one(&store, sized(22, 100)).await.unwrap();
    assert_eq!(seqs(&store, NEWS, 0).await, [22]);
}

pub async fn a_log_is_trimmed_by_age(ground: Ground) {
    let store = ground.open().await;
    let hour = v1::Retention { max_age_seconds: 3600, ..v1::Retention::default() };
    assert!(store.append((1..=5).map(|seq| kept(seq, hour)).collect()).await.iter().all(Result::is_ok));
    fill(&store, "demo/for/ever", 1..=5).await;
    let now = now_ms();
    assert_eq!(store.sweep(now + 3_000_000).await.unwrap().messages, 0);
    assert_eq!(seqs(&store, NEWS, 0).await.len(), 5);
    let store = ground.reopen(store).await;
    assert_eq!(store.sweep(now + 3_700_000).await.unwrap().messages, 5);
    assert_eq!(seqs(&store, NEWS, 0).await, [0; 0]);
    assert_eq!(head(&store, NEWS).await, v1::Head { epoch: 1, seq: 5, trimmed: 5, retained: false });
    assert_eq!(seqs(&store, "demo/for/ever", 0).await.len(), 5);
    // It goes on where it was.
    assert_eq!(one(&store, kept(6, hour)).await.unwrap().prev, 5);
    assert_eq!(seqs(&store, NEWS, 0).await, [6]);
    // Only what is old: the second half is a second younger.
    let short = v1::Retention { max_age_seconds: 1, ..v1::Retention::default() };
    let topic = "demo/short";
    let brief = |seq| v1::Append { retention: Some(short), ..append(topic, seq) };
    store.append((1..=3).map(brief).collect()).await;
    tokio::time::sleep(std::time::Duration::from_millis(1200)).await;
    let before = now_ms();
    store.append((4..=6).map(brief).collect()).await;
    store.sweep(before).await.unwrap();
    assert_eq!(seqs(&store, topic, 0).await, [4, 5, 6]);
}

pub async fn expired_messages_are_left_out(ground: Ground) {
    let store = ground.open().await;
    let now = now_ms();
    let expiring = |seq, expires_ms| append_of(v1::Message { expires_ms, ..message(NEWS, seq) });
    let past = now - 1000;
    let future = now + 3_600_000;
    let batch = vec![
        expiring(1, past),
        expiring(2, future),
        expiring(3, past),
        expiring(4, past),
        expiring(5, 0),
        expiring(6, past),
    ];
    assert!(store.append(batch).await.iter().all(Result::is_ok));
    // `seqs` checks that they chain in spite of it, and that reading comes to the end.
    assert_eq!(seqs(&store, NEWS, 0).await, [2, 5]);
    assert_eq!(seqs(&store, NEWS, 2).await, [5]);
    assert_eq!(seqs(&store, NEWS, 5).await, [0; 0]);
}

pub async fn retention_may_change(ground: Ground) {
    let store = ground.open().await;
    fill(&store, NEWS, 1..=20).await;
    let five = v1::Retention { max_count: 5, ..v1::Retention::default() };
    one(&store, kept(21, five)).await.unwrap();
    assert_eq!(seqs(&store, NEWS, 0).await, [17, 18, 19, 20, 21]);
    one(&store, kept(22, v1::Retention::default())).await.unwrap();
    assert_eq!(seqs(&store, NEWS, 0).await.len(), 6);
    let second = v1::Retention { max_age_seconds: 1, ..v1::Retention::default() };
    one(&store, kept(23, second)).await.unwrap();
    assert_eq!(store.sweep(now_ms() + 5000).await.unwrap().messages, 7);
    assert_eq!(seqs(&store, NEWS, 0).await, [0; 0]);
}

pub async fn an_inbox_is_consumed_by_an_ack(ground: Ground) {
    let store = ground.open().await;
    fill(&store, INBOX, 1..=5).await;
    // Of a session that is not kept.
    ack(&store, "c1", 0, INBOX, 3).await;
    assert_eq!(seqs(&store, INBOX, 0).await, [4, 5]);
    ack(&store, "c1", 0, INBOX, 1).await;
    assert_eq!(head(&store, INBOX).await.trimmed, 3);
    ack(&store, "c1", 0, INBOX, 100).await;
    assert_eq!(seqs(&store, INBOX, 0).await, [0; 0]);
    fill(&store, INBOX, [6]).await;
    assert_eq!(seqs(&store, INBOX, 0).await, [6]);
    // Another topic is not consumed.
    fill(&store, NEWS, 1..=2).await;
    ack(&store, "c1", 0, NEWS, 2).await;
    assert_eq!(seqs(&store, NEWS, 0).await, [1, 2]);
}

pub async fn an_inbox_waits_for_every_kept_session(ground: Ground) {
    let store = ground.open().await;
    let phone = open(&store, "phone").await.attachment;
    let tablet = open(&store, "tablet").await.attachment;
    subscribe(&store, "phone", phone, &[INBOX]).await;
    subscribe(&store, "tablet", tablet, &[INBOX]).await;
    fill(&store, INBOX, 1..=5).await;
    ack(&store, "phone", phone, INBOX, 4).await;
    assert_eq!(seqs(&store, INBOX, 0).await, [1, 2, 3, 4, 5]);
    ack(&store, "tablet", tablet, INBOX, 2).await;
    assert_eq!(seqs(&store, INBOX, 0).await, [3, 4, 5]);
    // One that is not kept counts for itself alone.
    ack(&store, "browser", 0, INBOX, 5).await;
    assert_eq!(seqs(&store, INBOX, 0).await, [3, 4, 5]);
    ack(&store, "tablet", tablet, INBOX, 5).await;
    assert_eq!(seqs(&store, INBOX, 0).await, [5]);
    ack(&store, "phone", phone, INBOX, 5).await;
    assert_eq!(seqs(&store, INBOX, 0).await, [0; 0]);
}

pub async fn an_inbox_is_released_by_a_session_that_goes(ground: Ground) {
    let store = ground.open().await;
    let phone = open(&store, "phone").await.attachment;
    let tablet = open(&store, "tablet").await.attachment;
    subscribe(&store, "phone", phone, &[INBOX]).await;
    subscribe(&store, "tablet", tablet, &[INBOX]).await;
    fill(&store, INBOX, 1..=5).await;
    ack(&store, "phone", phone, INBOX, 3).await;
    assert_eq!(head(&store, INBOX).await.trimmed, 0);
    close(&store, "tablet", tablet, 0).await;
    assert_eq!(seqs(&store, INBOX, 0).await, [4, 5]);
    // The last one takes nothing with it: what nobody has consumed waits for the next.
    close(&store, "phone", phone, 0).await;
    assert_eq!(seqs(&store, INBOX, 0).await, [4, 5]);
}

pub async fn a_wildcard_session_holds_an_inbox_too(ground: Ground) {
    let store = ground.open().await;
    fill(&store, INBOX, 1..=3).await;
    let archive = open(&store, "archive").await.attachment;
    subscribe(&store, "archive", archive, &["demo/u/+"]).await;
    fill(&store, INBOX, 4..=6).await;
    // It is owed what came after it subscribed.
    ack(&store, "phone", 0, INBOX, 6).await;
    assert_eq!(seqs(&store, INBOX, 0).await, [4, 5, 6]);
    ack(&store, "archive", archive, INBOX, 5).await;
    assert_eq!(seqs(&store, INBOX, 0).await, [6]);
}

pub async fn what_was_trimmed_stays_trimmed(ground: Ground) {
    let mut store = ground.open().await;
    for round in 0..5_u64 {
        fill(&store, INBOX, round * 10 + 1..=round * 10 + 10).await;
        ack(&store, "c1", 0, INBOX, round * 10 + 7).await;
        store = ground.reopen(store).await;
        assert_eq!(seqs(&store, INBOX, 0).await, [round * 10 + 8, round * 10 + 9, round * 10 + 10]);
    }
    assert_eq!(head(&store, INBOX).await, v1::Head { epoch: 1, seq: 50, trimmed: 47, retained: false });
}
