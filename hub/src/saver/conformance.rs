//! What every back end of the saver has to do, as tests against the trait. A back end runs them all with
//! [`saver_conformance!`](crate::saver_conformance), given a way to open its store; each case gets a store of its own.

mod logs;
mod retention;
mod sessions;

use std::sync::Arc;

use async_trait::async_trait;
use carillon_proto::{now_ms, topic, v1};

pub use self::logs::*;
pub use self::retention::*;
pub use self::sessions::*;
use super::store::{Store, StoreError};

/// How a back end's store is opened.
#[async_trait]
pub trait Factory: Send + Sync {
    /// Opens the store of this name: empty the first time, and as it was left after that.
    async fn open(&self, name: &str) -> Arc<dyn Store>;
}

/// Where a case gets its store.
pub struct Ground {
    factory: Arc<dyn Factory>,
    name: String,
}

impl Ground {
    pub fn new(factory: Arc<dyn Factory>, name: &str) -> Self {
        Ground { factory, name: name.to_owned() }
    }

    async fn open(&self) -> Arc<dyn Store> {
        self.factory.open(&self.name).await
    }

    async fn reopen(&self, store: Arc<dyn Store>) -> Arc<dyn Store> {
        store.stop().await;
        drop(store);
        self.open().await
    }
}

/// One test per case. `$factory` is a path to a function without arguments that gives an `Arc<dyn Factory>`.
#[macro_export]
macro_rules! saver_conformance {
    ($factory:path) => {
        $crate::saver_conformance! { @cases $factory:
            appends_are_read_in_order, reads_stop_at_their_limits, prev_is_the_stored_message_before,
            seqs_have_to_grow, a_repeated_append_is_answered_again, a_deposed_owner_is_fenced_off,
            an_id_is_accepted_once, ids_are_forgotten_after_a_day, refused_appends_leave_the_others_alone,
            heads_come_in_the_order_asked, heads_say_whether_there_is_a_retained_message, logs_survive_reopening, retained_messages_match_filters,
            retained_messages_survive_and_expire, records_are_kept_listed_and_expire, what_is_malformed_is_refused,
            concurrent_appends_keep_their_topics_order,
            a_log_is_trimmed_by_count, a_log_is_trimmed_by_bytes, a_log_is_trimmed_by_age,
            expired_messages_are_left_out, retention_may_change, an_inbox_is_consumed_by_an_ack,
            an_inbox_waits_for_every_kept_session, an_inbox_is_released_by_a_session_that_goes,
            a_wildcard_session_holds_an_inbox_too, what_was_trimmed_stays_trimmed,
            a_subscription_begins_at_the_head, an_inbox_begins_at_its_beginning, acks_move_cursors_and_never_back,
            unkept_sessions_are_told_positions, a_wildcard_has_what_came_after_it, a_moved_session_is_refused,
            a_record_beside_a_session_is_written_by_who_has_it,
            a_clean_start_forgets, without_expiry_nothing_is_kept, sessions_expire, a_session_may_never_expire,
            what_was_sent_is_told, delivery_state_is_told_until_it_is_taken_up,
            what_comes_late_ends_no_later_session, unsubscribing_forgets_the_cursor, subscribing_again_keeps_the_cursor,
            qos_0_owes_nothing, sessions_survive_reopening, a_gateway_that_is_gone_is_closed_for,
            overlapping_subscriptions_share_a_cursor, acks_survive_a_stop
        }
    };
    (@cases $factory:path: $($name:ident),* $(,)?) => { $(
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $name() {
            $crate::saver::conformance::$name($crate::saver::conformance::Ground::new($factory(), stringify!($name)))
                .await;
        }
    )* };
}

fn message(topic: &str, seq: u64) -> v1::Message {
    v1::Message {
        topic: topic.to_owned(),
        payload: format!("payload {seq}").into(),
        qos: 1,
        id: format!("id-{seq}"),
        epoch: 1,
        seq,
        published_ms: now_ms(),
        ..v1::Message::default()
    }
}

fn append_of(message: v1::Message) -> v1::Append {
    v1::Append {
        slot: topic::slot_of(&message.topic),
        message: Some(message),
        log: true,
        ..v1::Append::default()
    }
}

fn append(topic: &str, seq: u64) -> v1::Append {
    append_of(message(topic, seq))
}

fn inbox_append(topic: &str, seq: u64) -> v1::Append {
    let retention = v1::Retention { consumed: true, ..v1::Retention::default() };
    v1::Append { retention: Some(retention), ..append(topic, seq) }
}

/// Appends these seqs, all of which have to succeed.
async fn fill(store: &Arc<dyn Store>, topic: &str, seqs: impl IntoIterator<Item = u64>) {
    let inbox = topic::inbox_user(topic).is_some();
    let make = |seq| if inbox { inbox_append(topic, seq) } else { append(topic, seq) };
    for result in store.append(seqs.into_iter().map(make).collect()).await {
        result.expect("an append succeeds");
    }
}

async fn one(store: &Arc<dyn Store>, append: v1::Append) -> Result<v1::Appended, StoreError> {
    let mut results = store.append(vec![append]).await;
    assert_eq!(results.len(), 1);
    results.remove(0)
}

/// The seqs that can be read after this one, and checks that the messages chain.
async fn seqs(store: &Arc<dyn Store>, topic: &str, after: u64) -> Vec<u64> {
    let read = v1::Read { topic: topic.to_owned(), after, limit: 1000, max_bytes: 0 };
    let reply = store.read(read).await.expect("a read succeeds");
    let mut last = after;
    for message in &reply.messages {
        assert!(
            message.prev <= last && message.seq > last,
            "{} after {last}, prev {}",
            message.seq,
            message.prev
        );
        last = message.seq;
    }
    let head = reply.head.expect("a head").seq;
    assert!(reply.next >= head, "read to the end: next {} of {head}", reply.next);
    reply.messages.iter().map(|message| message.seq).collect()
}

async fn head(store: &Arc<dyn Store>, topic: &str) -> v1::Head {
    store.heads(vec![topic.to_owned()]).await.expect("heads")[0]
}

fn session(client_id: &str) -> Option<v1::SessionRef> {
    Some(v1::SessionRef { app: "demo".to_owned(), user: "alice".to_owned(), client_id: client_id.to_owned() })
}

fn subscription(filter: &str) -> v1::Subscription {
    v1::Subscription { filter: filter.to_owned(), qos: 1, ..v1::Subscription::default() }
}

/// Opens with an expiry of an hour.
async fn open(store: &Arc<dyn Store>, client_id: &str) -> v1::SessionOpened {
    let open = v1::OpenSession {
        session: session(client_id),
        gateway: "gateway-1".to_owned(),
        incarnation: 1,
        clean_start: false,
        expiry_seconds: 3600,
        connected_ms: 0,
    };
    store.open_session(open).await.expect("a session opens")
}

async fn subscribe(
    store: &Arc<dyn Store>,
    client_id: &str,
    attachment: u64,
    filters: &[&str],
) -> Vec<v1::SubscribedOne> {
    let subscriptions = filters.iter().map(|filter| subscription(filter)).collect();
    let subscribe = v1::Subscribe { session: session(client_id), attachment, subscriptions };
    store.subscribe(subscribe).await.expect("a subscription succeeds")
}

async fn ack(store: &Arc<dyn Store>, client_id: &str, attachment: u64, topic: &str, seq: u64) {
    try_ack(store, client_id, attachment, topic, seq).await.expect("an ack succeeds");
}

async fn try_ack(
    store: &Arc<dyn Store>,
    client_id: &str,
    attachment: u64,
    topic: &str,
    seq: u64,
) -> Result<(), StoreError> {
    let positions = vec![v1::AckPosition { topic: topic.to_owned(), seq }];
    store.ack(v1::Ack { session: session(client_id), attachment, positions }).await
}

async fn close(store: &Arc<dyn Store>, client_id: &str, attachment: u64, expiry_seconds: u32) {
    let close = v1::CloseSession {
        session: session(client_id),
        attachment,
        expiry_seconds,
        ..v1::CloseSession::default()
    };
    store.close_session(close).await.expect("a session closes");
}

/// (topic, after, head) of a backlog, by topic.
fn backlog(opened: &v1::SessionOpened) -> Vec<(String, u64, u64)> {
    let mut backlog: Vec<_> =
        opened.backlog.iter().map(|one| (one.topic.clone(), one.after, one.head)).collect();
    backlog.sort();
    backlog
}

fn is_invalid<T: std::fmt::Debug>(result: Result<T, StoreError>) {
    assert!(matches!(result, Err(StoreError::Invalid(_))), "{result:?}");
}

fn has_moved<T: std::fmt::Debug>(result: Result<T, StoreError>) {
    assert_eq!(result.map(|_| ()), Err(StoreError::SessionMoved));
}
