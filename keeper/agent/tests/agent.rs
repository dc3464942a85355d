//! The agent against a real keeper on loopback.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use carillon_agent::admin::{Admin, AdminError, ChangeOptions};
use carillon_agent::app::App;
use carillon_agent::document::{ConfigDocument, DocumentKind, Violation};
use carillon_agent::{Agent, Instance, Live, Options, Role, SlotMap};
use carillon_keeper::{Keeper, KeeperHandle, KeeperOptions, Limits};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::time::timeout;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
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
}

/// The same kind as an older process knows it: stricter.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
struct OldGate {
    max_packet_bytes: u32,
}

impl Default for OldGate {
    fn default() -> Self {
        OldGate { max_packet_bytes: 1024 }
    }
}

impl ConfigDocument for OldGate {
    const KIND: &'static str = "gate";

    fn check(&self, _: Option<&str>) -> Vec<Violation> {
        let bad = self.max_packet_bytes > 5000;
        bad.then(|| Violation::new("max_packet_bytes", "is more than this version can do"))
            .into_iter()
            .collect()
    }
}

async fn start_on(directory: &Path, address: &str, limits: Limits) -> KeeperHandle {
    // A port that was just given up may take a moment.
    let deadline = Instant::now() + Duration::from_secs(5);
    let listener = loop {
        match TcpListener::bind(address).await {
            Ok(listener) => break listener,
            Err(error) if Instant::now() > deadline => panic!("{address}: {error}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    };
    let kinds = vec![DocumentKind::of::<Gate>(), DocumentKind::of::<App>()];
    Keeper::start(KeeperOptions { limits, ..KeeperOptions::new(directory, listener, kinds) }).await.unwrap()
}

async fn start(directory: &Path) -> KeeperHandle {
    start_on(directory, "127.0.0.1:0", Limits::default()).await
}

async fn agent(keeper: &KeeperHandle) -> Agent {
    let agent = Agent::start(Options::new(vec![keeper.endpoint()]));
    timeout(Duration::from_secs(5), agent.ready()).await.unwrap();
    agent
}

fn instance(id: &str, incarnation: u64, roles: &[Role]) -> Instance {
    Instance {
        id: id.to_owned(),
        incarnation,
        roles: roles.to_vec(),
        addresses: BTreeMap::from([("grpc".to_owned(), format!("127.0.0.1:{incarnation}"))]),
        labels: BTreeMap::new(),
        draining: false,
    }
}

/// Waits until what is live is so.
async fn until<T>(live: &mut Live<T>, what: &str, so: impl FnMut(&Arc<T>) -> bool) -> Arc<T> {
    match timeout(Duration::from_secs(8), live.wait_for(so)).await {
        Ok(Ok(value)) => value.clone(),
        Ok(Err(_)) => panic!("the agent has ended while waiting for: {what}"),
        Err(_) => panic!("not within 8 s: {what}"),
    }
}

fn all_owned_by(slots: &SlotMap, id: &str, incarnation: u64) -> bool {
    !slots.slots.is_empty() && slots.slots.iter().all(|s| &*s.instance == id && s.incarnation == incarnation)
}

async fn eventually<T>(what: &str, mut check: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(8);
    loop {
        if let Some(found) = check().await {
            return found;
        }
        assert!(Instant::now() < deadline, "not within 8 s: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn set(path: &str, value: &str) -> Vec<(String, Option<String>)> {
    vec![(path.to_owned(), Some(value.to_owned()))]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_arrives_live_and_is_acknowledged() {
    let directory = TempDir::new().unwrap();
    let keeper = start(directory.path()).await;
    let agent = agent(&keeper).await;
    let admin = Admin::new(vec![keeper.endpoint()]);
    agent.register(instance("gate-0", 1, &[Role::Gateway]));
    let mut gate = agent.config::<Gate>();
    assert_eq!(gate.borrow().max_packet_bytes, 1024, "the default");

    let published =
        admin.set("gate", set("max_packet_bytes", "4096"), ChangeOptions::default()).await.unwrap();
    until(&mut gate, "the change arrives", |gate| gate.max_packet_bytes == 4096).await;
    eventually("the revision is acknowledged", async || {
        let applied = admin.applied(Some("gate")).await.unwrap();
        let done = applied.iter().any(|a| a.instance == "gate-0" && a.applied_revision == published.revision);
        done.then_some(())
    })
    .await;

    let refused =
        admin.set("gate", set("max_packet_bytes", "lots"), ChangeOptions::default()).await.unwrap_err();
    let AdminError::Refused { violations, .. } = refused else { panic!("{refused}") };
    assert_eq!(violations[0].path, "max_packet_bytes");

    // A revision that says the same in other words is not a change.
    gate.mark_unchanged();
    let same = admin.publish("gate", "{max_packet_bytes: 4096}", ChangeOptions::default()).await.unwrap();
    eventually("the revision is acknowledged", async || {
        let applied = admin.applied(Some("gate")).await.unwrap();
        applied.iter().any(|a| a.applied_revision == same.revision).then_some(())
    })
    .await;
    assert!(!gate.has_changed().unwrap());
    // Who asks later gets what is known.
    assert_eq!(agent.config::<Gate>().borrow().max_packet_bytes, 4096);
    agent.stop().await;
    keeper.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_process_cannot_take_is_reported_and_not_delivered() {
    let directory = TempDir::new().unwrap();
    let keeper = start(directory.path()).await;
    let admin = Admin::new(vec![keeper.endpoint()]);
    let agent = agent(&keeper).await;
    agent.register(instance("old-0", 1, &[Role::Gateway]));
    let mut gate = agent.config::<OldGate>();
    admin.set("gate", set("max_packet_bytes", "4000"), ChangeOptions::default()).await.unwrap();
    until(&mut gate, "what it can take", |gate| gate.max_packet_bytes == 4000).await;
    admin.set("gate", set("max_packet_bytes", "9000"), ChangeOptions::default()).await.unwrap();
    let (revision, why) = eventually("the refusal is reported", async || {
        admin.applied(Some("gate")).await.unwrap().into_iter().find_map(|applied| {
            assert_eq!(applied.instance, "old-0");
            applied.refused.filter(|_| applied.applied_revision == 1)
        })
    })
    .await;
    assert_eq!((revision, why.as_str()), (2, "max_packet_bytes: is more than this version can do"));
    assert_eq!(gate.borrow().max_packet_bytes, 4000, "the last good one stays");
    agent.stop().await;
    assert!(admin.applied(None).await.unwrap().is_empty(), "reports go with the instance");
    keeper.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn named_documents() {
    let directory = TempDir::new().unwrap();
    let keeper = start(directory.path()).await;
    let admin = Admin::new(vec![keeper.endpoint()]);
    admin.publish("app/one", "root: true", ChangeOptions::default()).await.unwrap();
    let agent = agent(&keeper).await;
    let mut apps = agent.configs::<App>();
    assert!(apps.borrow()["one"].root);
    let first = apps.borrow()["one"].clone();
    admin.publish("app/two", "anonymous_devices: true", ChangeOptions::default()).await.unwrap();
    let both = until(&mut apps, "a second app", |apps| apps.len() == 2).await;
    assert!(both["two"].anonymous_devices);
    assert!(Arc::ptr_eq(&both["one"], &first), "what has not changed stays what it was");
    admin.change("app/one", carillon_agent::admin::Change::Delete, ChangeOptions::default()).await.unwrap();
    until(&mut apps, "the first app is gone", |apps| apps.len() == 1 && apps.contains_key("two")).await;
    agent.stop().await;
    keeper.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_goes_on_after_the_keeper_was_away() {
    let directory = TempDir::new().unwrap();
    let keeper = start(directory.path()).await;
    let address = keeper.addr().to_string();
    let admin = Admin::new(vec![keeper.endpoint()]);
    let agent = agent(&keeper).await;
    agent.register(instance("hub-0", 7, &[Role::Registry]));
    let (mut gate, mut slots, mut hubs) =
        (agent.config::<Gate>(), agent.slots(), agent.instances(Role::Registry));
    let before = until(&mut slots, "slots are assigned", |slots| all_owned_by(slots, "hub-0", 7)).await;
    until(&mut hubs, "the instance is known", |hubs| hubs.len() == 1).await;

    let mut connected = agent.connected();
    keeper.stop().await;
    timeout(Duration::from_secs(5), connected.wait_for(|connected| !connected)).await.unwrap().unwrap();
    assert_eq!(hubs.borrow().len(), 1, "what was known stays");
    hubs.mark_unchanged();
    slots.mark_unchanged();

    let keeper = start_on(directory.path(), &address, Limits::default()).await;
    admin.set("gate", set("max_packet_bytes", "2000"), ChangeOptions::default()).await.unwrap();
    until(&mut gate, "a change after the restart arrives", |gate| gate.max_packet_bytes == 2000).await;
    assert_eq!(**slots.borrow(), *before, "the same process keeps its slots and their epochs");
    assert!(
        !slots.has_changed().unwrap() && !hubs.has_changed().unwrap(),
        "nothing changed, nobody was told"
    );
    agent.stop().await;

    let (instances, _) = admin.instances().await.unwrap();
    assert!(instances.is_empty(), "deregistered at once");
    keeper.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_keeper_with_other_data_is_taken_anew() {
    let (old, new) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let keeper = start(old.path()).await;
    let address = keeper.addr().to_string();
    let admin = Admin::new(vec![keeper.endpoint()]);
    for value in ["2000", "3000", "4000"] {
        admin.set("gate", set("max_packet_bytes", value), ChangeOptions::default()).await.unwrap();
    }
    let agent = agent(&keeper).await;
    agent.register(instance("hub-0", 7, &[Role::Registry]));
    let (mut gate, mut slots) = (agent.config::<Gate>(), agent.slots());
    assert_eq!(gate.borrow().max_packet_bytes, 4000);
    until(&mut slots, "slots are assigned", |slots| all_owned_by(slots, "hub-0", 7)).await;
    keeper.stop().await;

    let keeper = start_on(new.path(), &address, Limits::default()).await;
    until(&mut gate, "back to the default", |gate| gate.max_packet_bytes == 1024).await;
    eventually("registered with the new one", async || {
        admin.instances().await.ok().filter(|(instances, _)| instances.len() == 1)
    })
    .await;
    agent.stop().await;
    keeper.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_process_gets_its_slots_back_at_once_with_new_epochs() {
    let directory = TempDir::new().unwrap();
    let keeper = start(directory.path()).await;
    let observer = agent(&keeper).await;
    let mut slots = observer.slots();

    // Killed: its task is gone, nobody revokes its lease.
    let first = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let endpoint = keeper.endpoint();
    first.spawn(async move {
        let agent = Agent::start(Options::new(vec![endpoint]));
        agent.register(instance("hub-0", 1, &[Role::Registry]));
        std::future::pending::<()>().await;
    });
    let before = until(&mut slots, "slots of the first", |slots| all_owned_by(slots, "hub-0", 1)).await;
    first.shutdown_background();

    let second = agent(&keeper).await;
    let begun = Instant::now();
    second.register(instance("hub-0", 2, &[Role::Registry]));
    let after = until(&mut slots, "slots of the second", |slots| all_owned_by(slots, "hub-0", 2)).await;
    let took = begun.elapsed();
    assert!(took < Duration::from_millis(500), "{took:?}; the lease would have lasted 10 s");
    for (before, after) in before.slots.iter().zip(&after.slots) {
        assert_eq!(after.epoch, before.epoch + 1);
    }
    // Another joins, one drains.
    let third = agent(&keeper).await;
    third.register(instance("hub-1", 1, &[Role::Registry, Role::Center]));
    let half =
        |slots: &Arc<SlotMap>| slots.slots.iter().filter(|slot| &*slot.instance == "hub-1").count() == 512;
    until(&mut slots, "half of the slots move", half).await;
    let draining = Instance { draining: true, ..instance("hub-0", 2, &[Role::Registry]) };
    second.register(draining);
    until(&mut slots, "all slots leave the draining one", |slots| all_owned_by(slots, "hub-1", 1)).await;
    let mut hubs = observer.instances(Role::Registry);
    until(&mut hubs, "draining is known", |hubs| hubs.iter().any(|hub| hub.id == "hub-0" && hub.draining))
        .await;
    assert_eq!(observer.instances(Role::Center).borrow().len(), 1);
    third.stop().await;
    until(&mut slots, "rather a draining one than none", |slots| all_owned_by(slots, "hub-0", 2)).await;
    second.stop().await;
    until(&mut slots, "nobody is left", |slots| slots.slots.iter().all(|slot| slot.instance.is_empty()))
        .await;
    observer.stop().await;
    keeper.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_that_nobody_keeps_alive_ends_and_a_living_process_registers_again() {
    let directory = TempDir::new().unwrap();
    let limits = Limits {
        instance_ttl: Duration::from_millis(800),
        lease_grace: Duration::from_millis(100),
        ..Limits::default()
    };
    let keeper = start_on(directory.path(), "127.0.0.1:0", limits).await;
    let (observer, living) = (agent(&keeper).await, agent(&keeper).await);
    living.register(instance("living", 1, &[Role::Gateway]));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let endpoint = keeper.endpoint();
    runtime.spawn(async move {
        let agent = Agent::start(Options::new(vec![endpoint]));
        agent.register(instance("dying", 1, &[Role::Gateway]));
        std::future::pending::<()>().await;
    });
    let mut gates = observer.instances(Role::Gateway);
    until(&mut gates, "both are there", |gates| gates.len() == 2).await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(gates.borrow().len(), 2, "kept alive for longer than its time to live");
    runtime.shutdown_background();
    until(&mut gates, "one is gone", |gates| gates.len() == 1 && gates[0].id == "living").await;
    living.stop().await;
    observer.stop().await;
    keeper.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_are_carried_out_once_and_answered() {
    let directory = TempDir::new().unwrap();
    let keeper = start(directory.path()).await;
    let admin = Admin::new(vec![keeper.endpoint()]);
    let worker = agent(&keeper).await;
    worker.register(instance("gate-0", 1, &[Role::Gateway]));
    let mut commands = worker.commands();
    let carried_out = tokio::spawn(async move {
        let mut seen = Vec::new();
        while let Some(command) = commands.recv().await {
            seen.push(command.name.clone());
            let answer = match command.name.as_str() {
                "log-level" => Ok(format!("level is {}", command.arguments["level"])),
                "drop" => continue,
                "end" => break,
                other => Err(format!("unknown command {other}")),
            };
            let _ = command.answer.send(answer);
        }
        seen
    });
    eventually("it is registered", async || admin.instances().await.ok().filter(|(i, _)| i.len() == 1)).await;
    let second = Duration::from_secs(3);
    let arguments = BTreeMap::from([("level".to_owned(), "debug".to_owned())]);
    let done = admin.command("gate-0", "log-level", arguments, second).await.unwrap();
    assert_eq!(done, "level is debug");
    let failed = admin.command("gate-0", "dance", BTreeMap::new(), second).await.unwrap_err().to_string();
    assert_eq!(failed, "command dance at gate-0 failed: unknown command dance");
    let dropped = admin.command("gate-0", "drop", BTreeMap::new(), second).await.unwrap_err().to_string();
    assert_eq!(dropped, "command drop at gate-0 failed: the instance dropped the command");
    let _ = admin.command("gate-0", "end", BTreeMap::new(), second).await;
    assert_eq!(carried_out.await.unwrap(), ["log-level", "dance", "drop", "end"]);
    worker.stop().await;
    keeper.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_agent_waits_for_a_keeper_that_comes_later() {
    let directory = TempDir::new().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    drop(listener);
    let agent = Agent::start(Options::new(vec![format!("http://{address}")]));
    agent.register(instance("early", 1, &[Role::Gateway]));
    assert!(timeout(Duration::from_millis(300), agent.ready()).await.is_err());
    assert_eq!(agent.config::<Gate>().borrow().max_packet_bytes, 1024);
    let keeper = start_on(directory.path(), &address, Limits::default()).await;
    timeout(Duration::from_secs(5), agent.ready()).await.unwrap();
    let mut gates = agent.instances(Role::Gateway);
    until(&mut gates, "it sees itself", |gates| gates.len() == 1).await;
    agent.stop().await;
    keeper.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_starts_from_its_cache_and_agrees_with_the_keeper_later() {
    let (directory, own) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let options = |keeper: &str| {
        Options::new(vec![format!("http://{keeper}")]).with_cache(own.path().join("cache"), "hub-0")
    };
    let keeper = start(directory.path()).await;
    let address = keeper.addr().to_string();
    let admin = Admin::new(vec![keeper.endpoint()]);
    admin.set("gate", set("max_packet_bytes", "4096"), ChangeOptions::default()).await.unwrap();
    let other = agent(&keeper).await;
    other.register(instance("gate-0", 3, &[Role::Gateway]));
    let first = Agent::start(options(&address));
    assert!(!first.is_ready() && first.cluster_id().is_none());
    first.register(instance("hub-0", 1, &[Role::Registry]));
    let (mut slots, mut gates) = (first.slots(), first.instances(Role::Gateway));
    let before = until(&mut slots, "slots are assigned", |slots| all_owned_by(slots, "hub-0", 1)).await;
    until(&mut gates, "the gateway is known", |gates| gates.len() == 1).await;
    let cluster = first.cluster_id();
    // All keepers first, then the process.
    keeper.stop().await;
    first.stop().await;

    let second = Agent::start(options(&address));
    assert!(second.is_ready(), "there is a full view at once");
    timeout(Duration::from_secs(1), second.ready()).await.unwrap();
    assert_eq!(second.cluster_id(), cluster);
    assert_eq!(second.config::<Gate>().borrow().max_packet_bytes, 4096);
    assert_eq!(second.instances(Role::Gateway).borrow()[0].incarnation, 3);
    assert!(!*second.connected().borrow());
    second.register(instance("hub-0", 2, &[Role::Registry]));
    let mut slots = second.slots();
    assert!(all_owned_by(&slots.borrow_and_update(), "hub-0", 2), "it is the successor of the former one");
    assert_eq!(slots.borrow().slots[7].epoch, before.slots[7].epoch, "an epoch is only the keeper's to give");
    assert_eq!(second.instances(Role::Registry).borrow()[0].incarnation, 2);

    let keeper = start_on(directory.path(), &address, Limits::default()).await;
    let mut gate = second.config::<Gate>();
    admin.set("gate", set("max_packet_bytes", "2000"), ChangeOptions::default()).await.unwrap();
    until(&mut gate, "a change arrives again", |gate| gate.max_packet_bytes == 2000).await;
    let after = until(&mut slots, "the keeper gives them to the second", |slots| {
        all_owned_by(slots, "hub-0", 2) && slots.slots[7].epoch > before.slots[7].epoch
    })
    .await;
    assert_eq!(after.slots[7].epoch, before.slots[7].epoch + 1);
    second.stop().await;

    // Nobody else's cache, and nothing at all when it is broken: the process waits for a keeper as if it were new.
    std::fs::write(own.path().join("cache"), b"CARAGENT and then nothing of use").unwrap();
    let third = Agent::start(options(&address));
    assert!(own.path().join("cache.aside").exists());
    timeout(Duration::from_secs(8), third.ready()).await.unwrap();
    assert_eq!(third.config::<Gate>().borrow().max_packet_bytes, 2000);
    third.stop().await;
    other.stop().await;
    keeper.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn instances_tell_how_busy_they_are() {
    let directory = TempDir::new().unwrap();
    let keeper = start(directory.path()).await;
    let admin = Admin::new(vec![keeper.endpoint()]);
    let worker = agent(&keeper).await;
    let connections = Arc::new(std::sync::atomic::AtomicU32::new(7));
    let counted = connections.clone();
    worker.measure("gate-0", move || {
        let now = counted.load(std::sync::atomic::Ordering::Relaxed);
        BTreeMap::from([("connections".to_owned(), f64::from(now))])
    });
    worker.register(instance("gate-0", 1, &[Role::Gateway]));
    let load = async || {
        let live = admin.live().await.unwrap();
        live.first().and_then(|live| live.load.get("connections").copied())
    };
    eventually("the load is told", async || load().await.filter(|load| *load == 7.0)).await;
    let revision = admin.status().await.unwrap().revision;
    connections.store(9, std::sync::atomic::Ordering::Relaxed);
    eventually("its change is told", async || load().await.filter(|load| *load == 9.0)).await;
    assert_eq!(admin.status().await.unwrap().revision, revision, "and nothing of it is written");
    let live = admin.live().await.unwrap().remove(0);
    assert!(live.since_ms > 0 && live.load_age_ms.is_some_and(|age| age < 60_000));

    // Too many numbers are refused, and the instance lives on without.
    worker.measure("gate-0", || (0..100).map(|i| (i.to_string(), 0.0)).collect());
    tokio::time::sleep(Duration::from_millis(4000)).await;
    assert_eq!(load().await, Some(9.0));
    worker.stop().await;
    keeper.stop().await;
}

#[test]
fn futures_can_be_spawned() {
    fn sendable<T: Send>(_: &T) {}
    let admin = Admin::new(Vec::new());
    sendable(&admin.get("gate", None));
    sendable(&admin.set("gate", Vec::new(), ChangeOptions::default()));
    sendable(&admin.command("x", "y", BTreeMap::new(), Duration::ZERO));
    sendable(&admin.instances());
    sendable(&admin.applied(None));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn those_whose_leases_end_together_do_not_come_back_together() {
    const AGENTS: usize = 24;
    let directory = TempDir::new().unwrap();
    let keeper = start(directory.path()).await;
    let admin = Admin::new(vec![keeper.endpoint()]);
    let agents: Vec<Agent> = (0..AGENTS)
        .map(|i| {
            let agent = Agent::start(Options::new(vec![keeper.endpoint()]));
            agent.register(instance(&format!("one-{i}"), 1, &[]));
            agent
        })
        .collect();
    let since = async || -> BTreeMap<String, u64> {
        let live = admin.live().await.unwrap();
        live.into_iter().map(|one| (one.instance.id, one.since_ms)).collect()
    };
    let before =
        eventually("all are there", async || Some(since().await).filter(|all| all.len() == AGENTS)).await;
    let mut client =
        carillon_proto::v1::keeper_client::KeeperClient::connect(keeper.endpoint()).await.unwrap();
    let range = carillon_proto::v1::RangeRequest {
        key: carillon_agent::keys::INSTANCES.to_owned(),
        prefix: true,
        ..Default::default()
    };
    for item in client.range(range).await.unwrap().into_inner().items {
        client.lease_revoke(carillon_proto::v1::LeaseRevokeRequest { lease: item.lease }).await.unwrap();
    }
    let after = eventually("all are back", async || {
        let all = since().await;
        (all.len() == AGENTS && all.iter().all(|(id, since)| before[id] < *since)).then_some(all)
    })
    .await;
    // Each sees it at its next keep-alive, which comes the same time after it had registered; what differs beyond that is
    // the jitter.
    let mut waits: Vec<u64> = after.iter().map(|(id, since)| since - before[id]).collect();
    waits.sort_unstable();
    let spread = waits[AGENTS - 1] - waits[0];
    assert!((1000..2800).contains(&spread), "{waits:?}");
    let densest =
        waits.iter().map(|from| waits.iter().filter(|wait| (*from..from + 250).contains(wait)).count()).max();
    assert!(densest < Some(AGENTS / 2), "{waits:?}");
    for agent in agents {
        agent.stop().await;
    }
    keeper.stop().await;
}
