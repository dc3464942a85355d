//! The embedded store against a model of it: random appends, reads, subscriptions, acks and reopenings; after each the
//! answers have to be the model's. The model keeps a cursor for every topic of every session from the start,
//! where the store keeps baselines and finds positions when it needs them.

use std::collections::BTreeMap;
use std::path::Path;

use carillon_hub::saver::{Embedded, Limits, Logs, Metrics, Sessions, Store};
use carillon_proto::{topic, v1};
use proptest::prelude::*;

const TOPICS: [&str; 6] =
    ["demo/u/alice", "demo/u/bob", "demo/news", "demo/g/room", "demo/g/room/side", "demo/short"];
const FILTERS: [&str; 8] = [
    "demo/u/alice",
    "demo/u/bob",
    "demo/news",
    "demo/g/room",
    "demo/#",
    "demo/u/+",
    "demo/g/#",
    "demo/short",
];
const CLIENTS: usize = 3;
const USERS: [&str; CLIENTS] = ["alice", "bob", "bob"];
/// `demo/short` keeps so many.
const SHORT: usize = 4;

#[derive(Debug, Clone)]
enum Step {
    Append {
        topic: usize,
        count: u64,
        gap: u64,
    },
    Read {
        topic: usize,
        after: u64,
        limit: u32,
    },
    Open {
        client: usize,
        clean: bool,
    },
    Subscribe {
        client: usize,
        filter: usize,
    },
    Unsubscribe {
        client: usize,
        filter: usize,
    },
    /// A hundredth part of the topic's head.
    Ack {
        client: usize,
        topic: usize,
        percent: u64,
        kept: bool,
    },
    Close {
        client: usize,
        forget: bool,
    },
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    let (topic, filter, client) = (0..TOPICS.len(), 0..FILTERS.len(), 0..CLIENTS);
    prop_oneof![
        6 => (topic.clone(), 1..6_u64, 1..3_u64).prop_map(|(topic, count, gap)| Step::Append { topic, count, gap }),
        3 => (topic.clone(), 0..30_u64, 0..8_u32)
            .prop_map(|(topic, after, limit)| Step::Read { topic, after, limit }),
        3 => (client.clone(), prop::bool::weighted(0.15)).prop_map(|(client, clean)| Step::Open { client, clean }),
        4 => (client.clone(), filter.clone()).prop_map(|(client, filter)| Step::Subscribe { client, filter }),
        1 => (client.clone(), filter).prop_map(|(client, filter)| Step::Unsubscribe { client, filter }),
        6 => (client.clone(), topic, 0..120_u64, prop::bool::weighted(0.8))
            .prop_map(|(client, topic, percent, kept)| Step::Ack { client, topic, percent, kept }),
        1 => (client, prop::bool::weighted(0.4)).prop_map(|(client, forget)| Step::Close { client, forget }),
        1 => Just(Step::Reopen),
    ]
}

#[derive(Default)]
struct Log {
    seqs: Vec<u64>,
    trimmed: u64,
    exists: bool,
}

impl Log {
    fn head(&self) -> u64 {
        self.seqs.last().copied().unwrap_or(0)
    }

    fn readable(&self, after: u64) -> Vec<u64> {
        self.seqs.iter().copied().filter(|&seq| seq > after.max(self.trimmed)).collect()
    }
}

#[derive(Default)]
struct Client {
    attachment: u64,
    filters: Vec<usize>,
    /// By topic, for every topic that a filter matches.
    cursors: BTreeMap<usize, u64>,
}

#[derive(Default)]
struct Model {
    logs: [Log; TOPICS.len()],
    clients: [Option<Client>; CLIENTS],
}

fn is_inbox(name: &str) -> bool {
    topic::inbox_user(name).is_some()
}

impl Model {
    fn append(&mut self, at: usize, seq: u64) {
        let log = &mut self.logs[at];
        log.seqs.push(seq);
        if !log.exists {
            log.exists = true;
            for client in self.clients.iter_mut().flatten() {
                if client.filters.iter().any(|&filter| topic::matches(FILTERS[filter], TOPICS[at])) {
                    client.cursors.entry(at).or_insert(0);
                }
            }
        }
        if TOPICS[at] == "demo/short" {
            let kept = log.readable(0);
            if kept.len() > SHORT {
                log.trimmed = kept[kept.len() - SHORT - 1];
            }
        }
    }

    fn consume(&mut self, at: usize, acked: Option<u64>) {
        if !is_inbox(TOPICS[at]) {
            return;
        }
        // Somebody else who reads an inbox does not empty it.
        let is_own = |(client, session): (usize, &Option<Client>)| {
            let filters = session.iter().flat_map(|session| &session.filters);
            owns(client, at) && filters.into_iter().any(|&held| topic::matches(FILTERS[held], TOPICS[at]))
        };
        if acked.is_none() && !self.clients.iter().enumerate().any(is_own) {
            return;
        }
        let cursors = self.clients.iter().flatten().filter_map(|client| client.cursors.get(&at)).copied();
        if let Some(least) = cursors.chain(acked).min() {
            let log = &mut self.logs[at];
            log.trimmed = log.trimmed.max(least);
        }
    }

    fn subscribe(&mut self, client: usize, filter: usize) {
        let Some(client) = &mut self.clients[client] else { return };
        if client.filters.contains(&filter) {
            return;
        }
        client.filters.push(filter);
        for (at, log) in self.logs.iter().enumerate() {
            if log.exists && topic::matches(FILTERS[filter], TOPICS[at]) {
                let exact_inbox = FILTERS[filter] == TOPICS[at] && is_inbox(TOPICS[at]);
                let start = if exact_inbox { log.trimmed } else { log.head() };
                client.cursors.entry(at).or_insert(start);
            }
        }
    }

    fn unsubscribe(&mut self, client: usize, filter: usize) {
        let Some(session) = &mut self.clients[client] else { return };
        if !session.filters.contains(&filter) {
            return;
        }
        session.filters.retain(|&held| held != filter);
        let filters = session.filters.clone();
        session
            .cursors
            .retain(|&at, _| filters.iter().any(|&held| topic::matches(FILTERS[held], TOPICS[at])));
        for (at, name) in TOPICS.iter().enumerate() {
            if topic::matches(FILTERS[filter], name) {
                self.consume(at, None);
            }
        }
    }

    fn forget(&mut self, client: usize) {
        let Some(session) = self.clients[client].take() else { return };
        for at in session.cursors.into_keys() {
            self.consume(at, None);
        }
    }

    fn ack(&mut self, client: usize, kept: bool, at: usize, seq: u64) {
        let mut acked = seq.min(self.logs[at].head());
        if !self.logs[at].exists {
            return;
        }
        if kept
            && let Some(session) = self.clients[client].as_mut()
            && let Some(cursor) = session.cursors.get_mut(&at)
        {
            *cursor = acked.max(*cursor);
            acked = *cursor;
        }
        if kept || owns(client, at) {
            self.consume(at, owns(client, at).then_some(acked));
        }
    }

    fn backlog(&self, client: usize) -> Vec<(String, u64, u64)> {
        let mut backlog = Vec::new();
        for (&at, &cursor) in self.clients[client].iter().flat_map(|client| &client.cursors) {
            let log = &self.logs[at];
            if !log.readable(cursor).is_empty() {
                backlog.push((TOPICS[at].to_owned(), cursor.max(log.trimmed), log.head()));
            }
        }
        backlog.sort();
        backlog
    }
}

fn open(path: &Path) -> Embedded {
    let metrics = Metrics::register(&prometheus::Registry::new()).expect("metrics");
    let limits = Limits { reserve_bytes: 0, ..Limits::default() };
    Embedded::open(path, "test", limits, metrics).expect("the store opens")
}

fn session(client: usize) -> Option<v1::SessionRef> {
    let user = USERS[client].to_owned();
    Some(v1::SessionRef { app: "demo".to_owned(), user, client_id: format!("c{client}") })
}

/// Is this topic the inbox of the client's user?
fn owns(client: usize, at: usize) -> bool {
    TOPICS[at] == format!("demo/u/{}", USERS[client])
}

fn append(name: &str, seq: u64) -> v1::Append {
    let message = v1::Message {
        topic: name.to_owned(),
        payload: format!("{name} {seq}").into(),
        epoch: 1,
        seq,
        ..v1::Message::default()
    };
    let retention = v1::Retention {
        consumed: is_inbox(name),
        max_count: if name == "demo/short" { SHORT as u64 } else { 0 },
        ..v1::Retention::default()
    };
    let slot = topic::slot_of(name);
    v1::Append {
        slot,
        message: Some(message),
        log: true,
        retention: Some(retention),
        ..v1::Append::default()
    }
}

async fn check_reads(store: &Embedded, model: &Model) {
    for (at, log) in model.logs.iter().enumerate() {
        let head = store.heads(vec![TOPICS[at].to_owned()]).await.expect("heads")[0];
        assert_eq!((head.seq, head.trimmed), (log.head(), log.trimmed), "head of {}", TOPICS[at]);
        let read = v1::Read { topic: TOPICS[at].to_owned(), after: 0, limit: 1000, max_bytes: 0 };
        let reply = store.read(read).await.expect("a read");
        let seqs: Vec<u64> = reply.messages.iter().map(|message| message.seq).collect();
        assert_eq!(seqs, log.readable(0), "messages of {}", TOPICS[at]);
        for message in reply.messages {
            assert_eq!(message.payload, format!("{} {}", TOPICS[at], message.seq));
        }
    }
}

async fn run(steps: Vec<Step>) {
    let directory = tempfile::tempdir().expect("a directory");
    let mut store = open(directory.path());
    let mut model = Model::default();
    for step in steps {
        match step {
            Step::Append { topic, count, gap } => {
                let first = model.logs[topic].head();
                let seqs: Vec<u64> = (1..=count).map(|number| first + number * gap).collect();
                let batch = seqs.iter().map(|&seq| append(TOPICS[topic], seq)).collect();
                let mut prev = first;
                for (result, &seq) in store.append(batch).await.into_iter().zip(&seqs) {
                    assert_eq!(result.expect("appended").prev, prev);
                    prev = seq;
                    model.append(topic, seq);
                }
            }
            Step::Read { topic, after, limit } => {
                let read = v1::Read { topic: TOPICS[topic].to_owned(), after, limit, max_bytes: 0 };
                let reply = store.read(read).await.expect("a read");
                let mut expected = model.logs[topic].readable(after);
                let whole = expected.len();
                expected.truncate(if limit == 0 { 100 } else { limit as usize });
                let seqs: Vec<u64> = reply.messages.iter().map(|message| message.seq).collect();
                assert_eq!(seqs, expected);
                if expected.len() < whole {
                    assert_eq!(Some(&reply.next), seqs.last());
                } else {
                    assert!(reply.next >= model.logs[topic].head());
                }
            }
            Step::Open { client, clean } => {
                if clean {
                    model.forget(client);
                }
                let open = v1::OpenSession {
                    session: session(client),
                    clean_start: clean,
                    expiry_seconds: 3600,
                    ..v1::OpenSession::default()
                };
                let opened = store.open_session(open).await.expect("opened");
                assert_eq!(opened.present, model.clients[client].is_some());
                let kept = model.clients[client].get_or_insert_default();
                kept.attachment = opened.attachment;
                let filters: Vec<_> = opened.subscriptions.into_iter().map(|one| one.filter).collect();
                assert_eq!(filters, kept.filters.iter().map(|&filter| FILTERS[filter]).collect::<Vec<_>>());
                let mut backlog: Vec<_> =
                    opened.backlog.into_iter().map(|one| (one.topic, one.after, one.head)).collect();
                backlog.sort();
                assert_eq!(backlog, model.backlog(client));
            }
            Step::Subscribe { client, filter } => {
                let Some(kept) = &model.clients[client] else { continue };
                let (attachment, existed) = (kept.attachment, kept.filters.contains(&filter));
                model.subscribe(client, filter);
                let subscriptions = vec![v1::Subscription {
                    filter: FILTERS[filter].to_owned(),
                    qos: 1,
                    ..v1::Subscription::default()
                }];
                let subscribe = v1::Subscribe { session: session(client), attachment, subscriptions };
                let result = store.subscribe(subscribe).await.expect("subscribed").remove(0);
                assert_eq!(result.existed, existed);
                if let Some(at) = TOPICS.iter().position(|name| *name == FILTERS[filter]) {
                    let cursors = &model.clients[client].as_ref().expect("kept").cursors;
                    let after = cursors.get(&at).copied().unwrap_or(0).max(model.logs[at].trimmed);
                    let position = &result.positions[0];
                    assert_eq!((position.after, position.head), (after, model.logs[at].head()));
                }
            }
            Step::Unsubscribe { client, filter } => {
                let Some(kept) = &model.clients[client] else { continue };
                let (attachment, filters) = (kept.attachment, vec![FILTERS[filter].to_owned()]);
                let unsubscribe = v1::Unsubscribe { session: session(client), attachment, filters };
                store.unsubscribe(unsubscribe).await.expect("unsubscribed");
                model.unsubscribe(client, filter);
            }
            Step::Ack { client, topic, percent, kept } => {
                let seq = model.logs[topic].head() * percent / 100;
                let attachment = match &model.clients[client] {
                    Some(session) if kept => session.attachment,
                    _ => 0,
                };
                let positions = vec![v1::AckPosition { topic: TOPICS[topic].to_owned(), seq }];
                store.ack(v1::Ack { session: session(client), attachment, positions }).await.expect("acked");
                model.ack(client, attachment != 0, topic, seq);
            }
            Step::Close { client, forget } => {
                let Some(kept) = &model.clients[client] else { continue };
                let close = v1::CloseSession {
                    session: session(client),
                    attachment: kept.attachment,
                    expiry_seconds: if forget { 0 } else { 3600 },
                    ..v1::CloseSession::default()
                };
                store.close_session(close).await.expect("closed");
                if forget {
                    model.forget(client);
                }
            }
            Step::Reopen => {
                store.stop().await;
                drop(store);
                store = open(directory.path());
            }
        }
        check_reads(&store, &model).await;
    }
    store.stop().await;
}

/// As many as `PROPTEST_CASES` says, few by default: each opens a store, and syncs at every step.
fn config() -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(32);
    ProptestConfig { cases, max_shrink_iters: 300, failure_persistence: None, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn the_store_does_what_the_model_does(steps in prop::collection::vec(step(), 1..80)) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        runtime.block_on(run(steps));
    }
}
