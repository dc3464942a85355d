//! A keeper over its wire: keys, watches, leases, configuration, discovery, commands, restarts, and what it refuses.

use std::path::Path;
use std::time::{Duration, Instant};

use carillon_agent::admin::{Admin, AdminError, Change, ChangeOptions};
use carillon_agent::app::App;
use carillon_agent::document::{ConfigDocument, DocumentKind, Violation};
use carillon_keeper::{HomeError, Keeper, KeeperError, KeeperHandle, KeeperOptions, Limits};
use carillon_proto::v1;
use carillon_proto::v1::keeper_client::KeeperClient;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tonic::transport::Channel;
use tonic::{Code, Streaming};
use v1::op::{Op, Put};
use v1::watch_response::Kind;

#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
struct Gate {
    max_packet_bytes: u32,
}

impl Default for Gate {
    fn default() -> Self {
        Gate { max_packet_bytes: 1024 }
    }
}

impl ConfigDocument for Gate {
    const KIND: &'static str = "gate";

    fn check(&self, _: Option<&str>) -> Vec<Violation> {
        let bad = self.max_packet_bytes < 16;
        bad.then(|| Violation::new("max_packet_bytes", "must be at least 16")).into_iter().collect()
    }

    fn check_change(&self, next: &Self) -> Vec<Violation> {
        let bad = next.max_packet_bytes < self.max_packet_bytes / 1000;
        bad.then(|| Violation::new("max_packet_bytes", "shrinks too much at once")).into_iter().collect()
    }
}

async fn options(directory: &Path) -> KeeperOptions {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    KeeperOptions::new(directory, listener, vec![DocumentKind::of::<Gate>(), DocumentKind::of::<App>()])
}

async fn start(directory: &Path) -> KeeperHandle {
    Keeper::start(options(directory).await).await.unwrap()
}

async fn start_limited(directory: &Path, limits: Limits) -> KeeperHandle {
    Keeper::start(KeeperOptions { limits, ..options(directory).await }).await.unwrap()
}

async fn client(keeper: &KeeperHandle) -> KeeperClient<Channel> {
    KeeperClient::connect(keeper.endpoint()).await.unwrap()
}

fn admin(keeper: &KeeperHandle) -> Admin {
    Admin::new(vec![keeper.endpoint()])
}

fn put(key: &str, value: impl Into<Vec<u8>>, lease: u64) -> v1::Op {
    v1::Op { op: Some(Op::Put(Put { key: key.to_owned(), value: value.into().into(), lease })) }
}

fn then(ops: Vec<v1::Op>) -> v1::TxnRequest {
    v1::TxnRequest { then: ops, ..Default::default() }
}

async fn write(client: &mut KeeperClient<Channel>, key: &str, value: &str) -> u64 {
    client.txn(then(vec![put(key, value, 0)])).await.unwrap().into_inner().revision
}

async fn read(client: &mut KeeperClient<Channel>, key: &str) -> Option<String> {
    let request = v1::RangeRequest { key: key.to_owned(), ..Default::default() };
    let items = client.range(request).await.unwrap().into_inner().items;
    items.first().map(|item| String::from_utf8(item.value.to_vec()).unwrap())
}

async fn watch(
    client: &mut KeeperClient<Channel>,
    prefix: &str,
    after_revision: u64,
) -> Streaming<v1::WatchResponse> {
    let request = v1::WatchRequest { prefixes: vec![prefix.to_owned()], after_revision };
    client.watch(request).await.unwrap().into_inner()
}

async fn next(stream: &mut Streaming<v1::WatchResponse>) -> v1::WatchResponse {
    tokio::time::timeout(Duration::from_secs(5), stream.message()).await.unwrap().unwrap().unwrap()
}

fn keys(message: &v1::WatchResponse) -> Vec<&str> {
    message.events.iter().map(|event| event.item.as_ref().unwrap().key.as_str()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_transactions_and_their_bounds() {
    let directory = TempDir::new().unwrap();
    let limits = Limits { quota_bytes: 40_000, request_bytes: 20_000, ..Limits::default() };
    let keeper = start_limited(directory.path(), limits).await;
    let mut client = client(&keeper).await;

    let mut lock = then(vec![put("lock", "mine", 0)]);
    let target = Some(v1::compare::Target::ModRevision(0));
    lock.compare.push(v1::Compare { key: "lock".to_owned(), target });
    assert!(client.txn(lock.clone()).await.unwrap().into_inner().succeeded);
    assert!(!client.txn(lock).await.unwrap().into_inner().succeeded);

    for i in 0..25 {
        write(&mut client, &format!("many/{i:02}"), "x").await;
    }
    let page = v1::RangeRequest { key: "many/".to_owned(), prefix: true, limit: 10, after: String::new() };
    let mut all = Vec::new();
    let mut after = String::new();
    loop {
        let answer = client.range(v1::RangeRequest { after, ..page.clone() }).await.unwrap().into_inner();
        all.extend(answer.items.into_iter().map(|item| item.key));
        if !answer.more {
            break;
        }
        after = all.last().unwrap().clone();
    }
    assert_eq!(all, (0..25).map(|i| format!("many/{i:02}")).collect::<Vec<_>>());

    let delete = |key: &str| v1::Op { op: Some(Op::Delete(key.to_owned())) };
    let delete_prefix = |prefix: &str| v1::Op { op: Some(Op::DeletePrefix(prefix.to_owned())) };
    let refused = [
        (then(vec![put("", "", 0)]), Code::InvalidArgument, "the key of a put is empty"),
        (then(vec![put(&"k".repeat(2000), "", 0)]), Code::InvalidArgument, "longer than 1024 bytes"),
        (then(vec![put("carillon/config/gate", "", 0)]), Code::PermissionDenied, "the keeper's own"),
        (then(vec![delete("carillon/slots")]), Code::PermissionDenied, "the keeper's own"),
        (then(vec![delete_prefix("caril")]), Code::PermissionDenied, "the keeper's own"),
        (then(vec![delete_prefix("")]), Code::InvalidArgument, "the prefix of a delete is empty"),
        (then(vec![v1::Op { op: None }]), Code::InvalidArgument, "an operation is empty"),
        (then(vec![put("k", "", 0); 200]), Code::InvalidArgument, "more than 128 operations"),
        (then(vec![put("k", vec![0; 20_000], 0)]), Code::InvalidArgument, "at most 20000 are allowed"),
        (then(vec![put("k", "", 12345)]), Code::NotFound, "lease 0000000000003039 is not alive"),
    ];
    for (request, code, text) in refused {
        let status = client.txn(request).await.unwrap_err();
        assert!(status.code() == code && status.message().contains(text), "{status:?} instead of {text}");
    }

    // The quota clears itself.
    client.txn(then(vec![put("big/1", vec![0; 18_000], 0)])).await.unwrap();
    client.txn(then(vec![put("big/2", vec![0; 18_000], 0)])).await.unwrap();
    let full = client.txn(then(vec![put("big/3", vec![0; 18_000], 0)])).await.unwrap_err();
    assert_eq!(full.code(), Code::ResourceExhausted, "{full:?}");
    client.txn(then(vec![delete_prefix("big/")])).await.unwrap();
    client.txn(then(vec![put("big/3", vec![0; 18_000], 0)])).await.unwrap();
    keeper.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_of_few_large_entries_is_cut_by_its_size() {
    const MIB: u64 = 1024 * 1024;
    let directory = TempDir::new().unwrap();
    let limits = Limits { log_bytes: 48 * MIB, ..Limits::default() };
    let keeper = start_limited(directory.path(), limits.clone()).await;
    let mut writer = client(&keeper).await;
    let value = "x".repeat(900_000);
    let mut largest = 0;
    for i in 0..180 {
        write(&mut writer, &format!("big/{}", i % 4), &format!("{i} {value}")).await;
        let status = writer.keeper_status(v1::KeeperStatusRequest {}).await.unwrap().into_inner();
        largest = largest.max(status.log_bytes);
        assert!(i > 50 || status.snapshot_index == 0, "there is no need for a snapshot of {i} entries");
    }
    let begun = Instant::now();
    loop {
        let status = writer.keeper_status(v1::KeeperStatusRequest {}).await.unwrap().into_inner();
        assert!(status.last_log_index < 400, "not by the number of entries");
        // What stays is a quarter; files go as a whole, and there is the one that is written.
        if status.snapshot_index > 0 && status.log_bytes < limits.log_bytes {
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(30), "{status:?}, at most {largest}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // What is written while the snapshot is made comes on top.
    assert!(largest < 3 * limits.log_bytes, "{largest}");
    keeper.stop().await;
    let keeper = start_limited(directory.path(), limits).await;
    let found = read(&mut client(&keeper).await, "big/3").await.unwrap();
    assert!(found.starts_with("179 x"), "{}", &found[..10]);
    keeper.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_begins_with_the_state_and_can_be_resumed() {
    let directory = TempDir::new().unwrap();
    let limits = Limits { progress_interval: Duration::from_millis(100), ..Limits::default() };
    let keeper = start_limited(directory.path(), limits).await;
    let mut client = client(&keeper).await;
    write(&mut client, "a/1", "x").await;
    write(&mut client, "b/1", "x").await;

    let mut stream = watch(&mut client, "a/", 0).await;
    let state = next(&mut stream).await;
    assert_eq!((state.kind(), keys(&state)), (Kind::StateEnd, vec!["a/1"]));
    let place = write(&mut client, "a/2", "x").await;
    let events = next(&mut stream).await;
    assert_eq!((events.kind(), events.revision, keys(&events)), (Kind::Events, place, vec!["a/2"]));
    // Quiet for the watcher, though not for the store: the notice brings it forward.
    let later = write(&mut client, "b/2", "x").await;
    loop {
        let notice = next(&mut stream).await;
        assert_eq!(notice.kind(), Kind::Progress);
        if notice.revision == later {
            break;
        }
    }
    drop(stream);

    write(&mut client, "a/3", "x").await;
    let mut resumed = watch(&mut client, "a/", place).await;
    assert_eq!(next(&mut resumed).await.kind(), Kind::Progress, "the greeting");
    assert_eq!(keys(&next(&mut resumed).await), ["a/3"]);

    let ahead = v1::WatchRequest { prefixes: vec!["a/".to_owned()], after_revision: 1_000_000 };
    assert_eq!(client.watch(ahead).await.unwrap_err().code(), Code::OutOfRange);
    assert_eq!(client.watch(v1::WatchRequest::default()).await.unwrap_err().code(), Code::InvalidArgument);
    keeper.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_that_is_too_far_behind_is_told() {
    let directory = TempDir::new().unwrap();
    let keeper = start(directory.path()).await;
    let mut client = client(&keeper).await;
    let place = write(&mut client, "a", "x").await;
    // More than is kept of changes, 16 MiB.
    let value = "x".repeat(900_000);
    for _ in 0..20 {
        write(&mut client, "b", &value).await;
    }
    let mut stream = watch(&mut client, "a", place).await;
    assert_eq!(next(&mut stream).await.kind(), Kind::Progress);
    let compacted = next(&mut stream).await;
    assert_eq!(compacted.kind(), Kind::Compacted);
    assert!(compacted.revision > place);
    assert!(stream.message().await.unwrap().is_none(), "the last message of the stream");
    keeper.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leases_end_when_nobody_keeps_them_alive() {
    let directory = TempDir::new().unwrap();
    let keeper = start(directory.path()).await;
    let mut client = client(&keeper).await;
    let mut leases = Vec::new();
    for i in 0..10 {
        let lease =
            client.lease_grant(v1::LeaseGrantRequest { ttl_ms: 2_000 }).await.unwrap().into_inner().lease;
        client.txn(then(vec![put(&format!("held/{i}"), "", lease)])).await.unwrap();
        leases.push(lease);
    }
    let mut stream = watch(&mut client, "held/", 0).await;
    assert_eq!(next(&mut stream).await.events.len(), 10);
    // One is kept alive, one is given back.
    client.lease_revoke(v1::LeaseRevokeRequest { lease: leases[1] }).await.unwrap();
    assert_eq!(keys(&next(&mut stream).await), ["held/1"]);
    let begun = Instant::now();
    let mut gone = 0;
    while gone < 8 {
        client
            .lease_keep_alive(v1::LeaseKeepAliveRequest { lease: leases[0], ..Default::default() })
            .await
            .unwrap();
        if let Ok(message) = tokio::time::timeout(Duration::from_millis(100), stream.message()).await {
            let message = message.unwrap().unwrap();
            assert!(message.events.iter().all(|event| event.deleted));
            gone += message.events.len();
        }
        assert!(begun.elapsed() < Duration::from_secs(15), "{gone} of 8 leases have ended");
    }
    assert!(read(&mut client, "held/0").await.is_some());
    let late = client
        .lease_keep_alive(v1::LeaseKeepAliveRequest { lease: leases[2], ..Default::default() })
        .await
        .unwrap_err();
    assert_eq!(late.code(), Code::NotFound);
    let short = client.lease_grant(v1::LeaseGrantRequest { ttl_ms: 5 }).await.unwrap_err();
    assert_eq!(short.message(), "ttl_ms is 5, it must be from 500 to 600000");
    keeper.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn documents_are_checked_and_have_a_history() {
    let directory = TempDir::new().unwrap();
    let keeper = start(directory.path()).await;
    let admin = admin(&keeper);
    let by = |author: &str| ChangeOptions { author: author.to_owned(), ..Default::default() };

    let first = admin.get("gate", None).await.unwrap();
    assert_eq!((first.revision.revision, first.effective["max_packet_bytes"].as_u64()), (0, Some(1024)));
    let set = |value: &str| vec![("max_packet_bytes".to_owned(), Some(value.to_owned()))];
    let one = admin.set("gate", set("4096"), by("ann")).await.unwrap();
    assert_eq!(
        (one.revision, one.yaml.as_str(), one.comment.as_str()),
        (1, "max_packet_bytes: 4096\n", "set max_packet_bytes")
    );
    let two = admin.publish("gate", "max_packet_bytes: 8192 # more\n", by("bob")).await.unwrap();
    assert_eq!((two.revision, two.author.as_str()), (2, "bob"));
    let same = admin.publish("gate", "max_packet_bytes: 8192 # more\n", by("cat")).await.unwrap();
    assert_eq!(same.revision, 2, "nothing has changed");
    let dry = admin.set("gate", set("99"), ChangeOptions { dry_run: true, ..by("ann") }).await.unwrap();
    assert_eq!((dry.revision, admin.get("gate", None).await.unwrap().revision.revision), (3, 2));
    let three = admin.rollback("gate", 1, by("ann")).await.unwrap();
    assert_eq!(
        (three.revision, three.yaml.as_str(), three.comment.as_str()),
        (3, "max_packet_bytes: 4096\n", "rolled back to 1")
    );
    let history = admin.history("gate", 0).await.unwrap();
    assert_eq!(history.iter().map(|revision| revision.revision).collect::<Vec<_>>(), [3, 2, 1]);
    assert_eq!(admin.get("gate", Some(2)).await.unwrap().revision.yaml, "max_packet_bytes: 8192 # more\n");

    let conflict = ChangeOptions { expected_revision: Some(2), ..by("ann") };
    let conflict = admin.set("gate", set("5000"), conflict).await.unwrap_err();
    assert!(matches!(conflict, AdminError::Conflict { expected: 2, current: 3, .. }), "{conflict}");

    admin.publish("app/demo", "root: true", by("ann")).await.unwrap();
    admin.publish("app/other", "", by("ann")).await.unwrap();
    let table: Vec<(&str, Change, &str)> = vec![
        (
            "gate",
            Change::Yaml("max_packet_bytes: 3".into()),
            "gate is refused: max_packet_bytes: must be at least 16",
        ),
        (
            "gate",
            Change::Yaml("max_packet_bytes: [".into()),
            "gate is refused: did not find expected node content",
        ),
        (
            "gate",
            Change::Yaml("max_packets: 3".into()),
            "gate is refused: max_packets: unknown field `max_packets`",
        ),
        (
            "gate",
            Change::Yaml("x".repeat(300_000)),
            "gate is refused: is 300000 bytes long, at most 262144 are allowed",
        ),
        (
            "gate",
            Change::Sets(set("much")),
            "gate is refused: max_packet_bytes: invalid type: string \"much\", expected u32",
        ),
        ("gate", Change::Sets(Vec::new()), "a change has from 1 to 256 fields"),
        ("gate", Change::RollbackTo(9), "gate has no revision 9; it has 1 to 3"),
        ("gat", Change::Delete, "there is no kind of document \"gat\"; there are: gate, app"),
        ("gate/x", Change::Delete, "there is one document gate in a cluster, it has no name"),
        ("app", Change::Delete, "\"app\" needs a name without slashes, like app/example"),
        ("app/a/b", Change::Delete, "\"app/a/b\" needs a name without slashes"),
        ("app/none", Change::Delete, "there is no document app/none"),
        ("app/none", Change::RollbackTo(1), "app/none has no revision 1: it was never published"),
        ("app/-", Change::Yaml(String::new()), "app/- is refused: the app's name may hold only letters"),
        (
            "app/other",
            Change::Yaml("root: true".into()),
            "app/other is refused: root: is already true in app/demo",
        ),
        (
            "app/demo",
            Change::Yaml("api_keys: [{name: a, key: short}]".into()),
            "app/demo is refused: api_keys[0].key: is shorter than 16 characters",
        ),
    ];
    for (document, change, expected) in table {
        let error = admin.change(document, change.clone(), by("eve")).await.unwrap_err().to_string();
        assert!(error.starts_with(expected), "{document} {change:?}: {error}");
    }
    admin.publish("gate", "max_packet_bytes: 90000000", by("ann")).await.unwrap();
    let shrunk = admin.set("gate", set("16"), by("ann")).await.unwrap_err();
    assert_eq!(shrunk.to_string(), "gate is refused: max_packet_bytes: shrinks too much at once");

    // Taken away, the name's history stays, and its numbers go on.
    admin.change("app/demo", Change::Delete, by("ann")).await.unwrap();
    assert!(matches!(admin.get("app/demo", None).await, Err(AdminError::NotFound(_))));
    admin.publish("app/other", "root: true", by("ann")).await.unwrap();
    let again = admin.rollback("app/demo", 1, by("ann")).await.unwrap_err();
    assert!(again.to_string().contains("root: is already true in app/other"), "{again}");
    assert_eq!(admin.publish("app/demo", "", by("ann")).await.unwrap().revision, 3);
    let names: Vec<String> =
        admin.list(Some("app")).await.unwrap().into_iter().map(|app| app.document).collect();
    assert_eq!(names, ["app/demo", "app/other"]);
    assert_eq!(admin.list(None).await.unwrap().len(), 3);

    let kinds = admin.kinds().await.unwrap();
    assert_eq!(
        kinds.iter().map(|kind| (kind.kind.as_str(), kind.named)).collect::<Vec<_>>(),
        [("gate", false), ("app", true)]
    );
    assert!(kinds[0].schema["properties"]["max_packet_bytes"].is_object());
    keeper.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_history_has_an_end() {
    let directory = TempDir::new().unwrap();
    let keeper = start(directory.path()).await;
    let admin = admin(&keeper);
    for i in 1..=105 {
        admin
            .publish("gate", &format!("max_packet_bytes: {}", 1000 + i), ChangeOptions::default())
            .await
            .unwrap();
    }
    let history = admin.history("gate", 0).await.unwrap();
    assert_eq!((history.len(), history[0].revision, history[99].revision), (100, 105, 6));
    keeper.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_changes_do_not_lose_each_other() {
    let directory = TempDir::new().unwrap();
    let keeper = start(directory.path()).await;
    let changes = (0..20).map(|i| {
        let admin = admin(&keeper);
        let field = format!("api_keys[{}]", 0);
        let key = format!("{{name: k{i}, key: 0123456789abcdef-{i}}}");
        let document = format!("app/a{}", i % 4);
        tokio::spawn(
            async move { admin.set(&document, vec![(field, Some(key))], ChangeOptions::default()).await },
        )
    });
    for change in changes.collect::<Vec<_>>() {
        change.await.unwrap().unwrap();
    }
    let admin = admin(&keeper);
    for i in 0..4 {
        assert_eq!(admin.get(&format!("app/a{i}"), None).await.unwrap().revision.revision, 5);
    }
    keeper.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_said_of_documents_that_are_not_there_is_not_kept() {
    let directory = TempDir::new().unwrap();
    let keeper = start(directory.path()).await;
    admin(&keeper).publish("app/there", "{}", ChangeOptions::default()).await.unwrap();
    let mut client = client(&keeper).await;
    let instance = v1::InstanceRecord { id: "hub-0".to_owned(), incarnation: 1, ..Default::default() };
    let register = v1::RegisterRequest { instance: Some(instance), ttl_ms: 0 };
    let lease = client.register(register).await.unwrap().into_inner().lease;
    let documents = ["app/there", "app/none-1", "app/none-2", "gate"];
    let applied = documents.map(|document| v1::AppliedConfig {
        instance: "hub-0".to_owned(),
        document: document.to_owned(),
        ..Default::default()
    });
    client.report_config(v1::ReportConfigRequest { lease, applied: applied.to_vec() }).await.unwrap();
    let kept = v1::RangeRequest { key: "carillon/applied/".to_owned(), prefix: true, ..Default::default() };
    let kept = client.range(kept).await.unwrap().into_inner().items;
    let kept: Vec<&str> = kept.iter().map(|item| item.key.as_str()).collect();
    assert_eq!(kept, ["carillon/applied/hub-0/app/there", "carillon/applied/hub-0/gate"]);
    keeper.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_written_is_there_after_a_restart_which_is_quick() {
    let directory = TempDir::new().unwrap();
    let keeper = start(directory.path()).await;
    let before = keeper.status();
    let revision = write(&mut client(&keeper).await, "a", "1").await;
    admin(&keeper).publish("gate", "max_packet_bytes: 77", ChangeOptions::default()).await.unwrap();
    let mut client_before = client(&keeper).await;
    let lease =
        client_before.lease_grant(v1::LeaseGrantRequest { ttl_ms: 500 }).await.unwrap().into_inner().lease;
    keeper.snapshot().await.unwrap();
    keeper.stop().await;

    let begun = Instant::now();
    let keeper = start(directory.path()).await;
    let took = begun.elapsed();
    assert!(took < Duration::from_millis(500), "{took:?}");
    let after = keeper.status();
    assert_eq!((before.cluster_id, before.node_id), (after.cluster_id, after.node_id));
    assert!(after.leads && after.revision > revision);
    let mut client = client(&keeper).await;
    assert_eq!(read(&mut client, "a").await.as_deref(), Some("1"));
    assert_eq!(admin(&keeper).get("gate", None).await.unwrap().effective["max_packet_bytes"], 77);
    let mut resumed = watch(&mut client, "carillon/config/", revision).await;
    assert_eq!(next(&mut resumed).await.kind(), Kind::Progress);
    assert_eq!(keys(&next(&mut resumed).await), ["carillon/config/gate"], "changes are kept over a restart");
    // The lease's time began anew, and there is a grace.
    client.lease_keep_alive(v1::LeaseKeepAliveRequest { lease, ..Default::default() }).await.unwrap();
    keeper.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn directories_that_are_not_ours_are_refused() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("keeper");
    let keeper = start(&path).await;
    let second = Keeper::start(options(&path).await).await.err().unwrap();
    assert!(matches!(second, KeeperError::Home(HomeError::InUse { .. })), "{second}");
    assert!(second.to_string().ends_with("is in use by another process"), "{second}");
    let cluster = keeper.status().cluster_id;
    keeper.stop().await;

    let other = KeeperOptions { cluster_id: Some("other".to_owned()), ..options(&path).await };
    let other = Keeper::start(other).await.err().unwrap().to_string();
    assert!(other.ends_with(&format!("belongs to cluster {cluster}, not to other")), "{other}");

    let identity = path.join("keeper.json");
    let text = std::fs::read_to_string(&identity).unwrap();
    let table = [
        (text.replace("\"format\": 1", "\"format\": 2"), "has format 2, this version knows format 1"),
        (text.replace("\"format\": 1,", ""), "is damaged: it does not say its format"),
        (text[..20].to_owned(), "is damaged: EOF while parsing"),
        (String::new(), "is damaged: EOF while parsing"),
    ];
    for (text, expected) in table {
        std::fs::write(&identity, text).unwrap();
        let error = Keeper::start(options(&path).await).await.err().unwrap().to_string();
        assert!(error.contains(expected), "{error}");
    }
    std::fs::remove_file(&identity).unwrap();
    let lost = Keeper::start(options(&path).await).await.err().unwrap();
    assert!(matches!(lost, KeeperError::Home(HomeError::Foreign { .. })), "{lost}");
    std::fs::write(&identity, text).unwrap();

    std::fs::create_dir_all(path.join("snapshot")).unwrap();
    std::fs::write(path.join("snapshot/current"), b"nonsense").unwrap();
    let broken = Keeper::start(options(&path).await).await.err().unwrap().to_string();
    assert!(broken.contains("the snapshot") && broken.contains("is not one of this version"), "{broken}");
    std::fs::remove_file(path.join("snapshot/current")).unwrap();
    start(&path).await.stop().await;

    let foreign = directory.path().join("foreign");
    std::fs::create_dir(&foreign).unwrap();
    std::fs::write(foreign.join("thesis.txt"), "years of work").unwrap();
    let refused = Keeper::start(options(&foreign).await).await.err().unwrap().to_string();
    assert!(
        refused.ends_with("is not a keeper's data directory: it holds \"thesis.txt\" but no keeper.json"),
        "{refused}"
    );
    assert_eq!(std::fs::read_dir(&foreign).unwrap().count(), 1, "nothing was put there");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn instances_are_replaced_by_their_successors_only() {
    let directory = TempDir::new().unwrap();
    let keeper = start(directory.path()).await;
    let mut client = client(&keeper).await;
    let instance = |incarnation| v1::InstanceRecord {
        id: "hub-0".to_owned(),
        incarnation,
        roles: vec!["registry".to_owned()],
        ..Default::default()
    };
    let register = |incarnation| v1::RegisterRequest { instance: Some(instance(incarnation)), ttl_ms: 0 };
    let first = client.register(register(5)).await.unwrap().into_inner();
    assert_eq!(first.ttl_ms, 10_000);
    let again = client.register(register(5)).await.unwrap().into_inner();
    assert_eq!(again.lease, first.lease, "the same process keeps its lease");
    let older = client.register(register(4)).await.unwrap_err();
    assert_eq!(older.code(), Code::FailedPrecondition, "{older:?}");
    let newer = client.register(register(6)).await.unwrap().into_inner();
    assert_ne!(newer.lease, first.lease);
    assert!(first.token > 0 && again.token == first.token && newer.token > first.token, "tokens fence");
    let plain = client.lease_grant(v1::LeaseGrantRequest { ttl_ms: 5000 }).await.unwrap().into_inner();
    assert!(plain.token > newer.token);
    let gone = client
        .lease_keep_alive(v1::LeaseKeepAliveRequest { lease: first.lease, ..Default::default() })
        .await
        .unwrap_err();
    assert_eq!(gone.code(), Code::NotFound);
    let (instances, _) = admin(&keeper).instances().await.unwrap();
    assert_eq!(instances.iter().map(|i| i.incarnation).collect::<Vec<_>>(), [6]);

    for id in ["", "a/b", "ä", &"x".repeat(200)] {
        let bad = v1::InstanceRecord { id: id.to_owned(), ..instance(1) };
        let status =
            client.register(v1::RegisterRequest { instance: Some(bad), ttl_ms: 0 }).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{id:?}: {status:?}");
    }
    let nobody = admin(&keeper).command("nobody", "drain", Default::default(), Duration::from_secs(1)).await;
    assert_eq!(nobody.unwrap_err().to_string(), "there is no instance \"nobody\"");
    // Registered, but no agent behind it.
    let silent =
        admin(&keeper).command("hub-0", "drain", Default::default(), Duration::from_millis(200)).await;
    let silent = silent.unwrap_err().to_string();
    assert_eq!(silent, "command drain at hub-0 was not answered in time: the instance did not take it up");
    keeper.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metrics_are_there_while_the_keeper_runs() {
    let directory = TempDir::new().unwrap();
    let registry = prometheus::Registry::new();
    let keeper =
        Keeper::start(KeeperOptions { registry: Some(registry.clone()), ..options(directory.path()).await })
            .await
            .unwrap();
    write(&mut client(&keeper).await, "abc", "12").await;
    let value = |name: &str| {
        let families = registry.gather();
        let family = families.iter().find(|family| family.name() == name)?;
        let metric = family.get_metric().first()?;
        Some(metric.get_gauge().get_value().max(metric.get_counter().get_value()))
    };
    for (name, _) in carillon_keeper::metrics::ALL {
        // By label; the peers' are of a leader that has some.
        use carillon_keeper::metrics::{PEER_LAG, PEER_ROUND_TRIP_SECONDS, PROPOSALS_FAILED, REFUSED};
        let counted_later = [REFUSED, PROPOSALS_FAILED, PEER_LAG, PEER_ROUND_TRIP_SECONDS].contains(&name);
        assert!(counted_later || value(name).is_some(), "{name} is missing");
    }
    assert_eq!(value(carillon_keeper::metrics::LEADER), Some(1.0));
    assert_eq!(value(carillon_keeper::metrics::STORE_BYTES), Some(5.0));
    assert_eq!(value(carillon_keeper::metrics::REQUESTS), Some(1.0));
    keeper.stop().await;
    assert!(registry.gather().is_empty());
}

#[tokio::test]
async fn nobody_there_is_said_clearly() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let admin = Admin::new(vec![format!("http://{address}")]);
    let error = admin.status().await.unwrap_err().to_string();
    assert!(error.starts_with(&format!("no keeper answers at http://{address}: ")), "{error}");
    assert!(error.contains("Connection refused"), "{error}");
}
