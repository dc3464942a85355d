//! Configuration that is not the same for all: gray releases, overrides, where a value comes from, and who has what.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use carillon_agent::admin::{
    Admin, Change, ChangeOptions, Explained, Published, ReleaseAction, Standing, State,
};
use carillon_agent::app::App;
use carillon_agent::document::{ConfigDocument, DocumentKind, Violation};
use carillon_agent::target::Target;
use carillon_agent::{Agent, Instance, Live, Options, Role, keys};
use carillon_keeper::{Keeper, KeeperHandle, KeeperOptions};
use carillon_proto::v1;
use carillon_proto::v1::keeper_client::KeeperClient;
use prost::Message as _;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tempfile::TempDir;
use tokio::net::TcpListener;

/// Generous: the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(40);

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
struct Gate {
    low: u32,
    high: u32,
    names: Vec<String>,
    password: Option<String>,
    steps: u32,
}

impl Default for Gate {
    fn default() -> Self {
        Gate { low: 1, high: 10, names: vec!["a".to_owned()], password: None, steps: 0 }
    }
}

impl ConfigDocument for Gate {
    const KIND: &'static str = "gate";
    const SECRETS: &'static [&'static str] = &["password"];

    fn check(&self, _: Option<&str>) -> Vec<Violation> {
        let wrong = self.low > self.high;
        wrong.then(|| Violation::new("low", format!("is {}, more than high", self.low))).into_iter().collect()
    }

    fn check_change(&self, next: &Self) -> Vec<Violation> {
        let back = next.steps < self.steps;
        back.then(|| Violation::new("steps", "only grows")).into_iter().collect()
    }
}

/// The same kind as an older process knows it: stricter.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
struct OldGate {
    high: u32,
}

impl ConfigDocument for OldGate {
    const KIND: &'static str = "gate";

    fn check(&self, _: Option<&str>) -> Vec<Violation> {
        let bad = self.high > 100;
        bad.then(|| Violation::new("high", "is more than this version can do")).into_iter().collect()
    }
}

async fn start(directory: &Path) -> (KeeperHandle, Admin) {
    start_at(directory, "127.0.0.1:0").await
}

async fn start_at(directory: &Path, address: &str) -> (KeeperHandle, Admin) {
    // A port that was just given up may take a moment.
    let begun = Instant::now();
    let listener = loop {
        match TcpListener::bind(address).await {
            Ok(listener) => break listener,
            Err(error) => assert!(begun.elapsed() < PATIENCE, "{address}: {error}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    let kinds = vec![DocumentKind::of::<Gate>(), DocumentKind::of::<App>()];
    let keeper = Keeper::start(KeeperOptions::new(directory, listener, kinds)).await.unwrap();
    let admin = Admin::new(vec![keeper.endpoint()]);
    (keeper, admin)
}

struct Process<T> {
    agent: Agent,
    gate: Live<T>,
}

async fn process<T: ConfigDocument>(keeper: &KeeperHandle, id: &str, labels: &[(&str, &str)]) -> Process<T> {
    let process = begin(Options::new(vec![keeper.endpoint()]), id, labels);
    let mut known = process.agent.instances(Role::Gateway);
    let is_known = known.wait_for(|known| known.iter().any(|one| one.id == id));
    tokio::time::timeout(PATIENCE, is_known).await.unwrap().unwrap();
    process
}

/// It need not have reached a keeper.
fn begin<T: ConfigDocument>(options: Options, id: &str, labels: &[(&str, &str)]) -> Process<T> {
    let agent = Agent::start(options);
    let labels: BTreeMap<String, String> =
        labels.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect();
    agent.identify(id, &[Role::Gateway], labels.clone());
    let gate = agent.config::<T>();
    agent.register(Instance { roles: vec![Role::Gateway], labels, ..Instance::new(id) });
    Process { agent, gate }
}

fn to(instances: &[&str], labels: &[(&str, &str)]) -> Target {
    Target {
        instances: instances.iter().map(ToString::to_string).collect(),
        labels: labels.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect(),
        ..Target::default()
    }
}

fn by(author: &str) -> ChangeOptions {
    ChangeOptions { author: author.to_owned(), ..ChangeOptions::default() }
}

fn sets(fields: &[(&str, &str)]) -> Vec<(String, Option<String>)> {
    fields.iter().map(|(path, value)| (path.to_string(), Some(value.to_string()))).collect()
}

async fn release(admin: &Admin, fields: &[(&str, &str)], target: Target) -> Published {
    let options = ChangeOptions { release_to: Some(target), ..by("ann") };
    admin.publish_change("gate", Change::Sets(sets(fields)), options).await.unwrap()
}

async fn over(
    admin: &Admin,
    document: &str,
    name: &str,
    target: Target,
    fields: &[(&str, &str)],
) -> Published {
    let change = Change::Override { name: name.to_owned(), target: Some(target), sets: sets(fields) };
    admin.publish_change(document, change, by("ann")).await.unwrap()
}

async fn refused(admin: &Admin, change: Change, options: ChangeOptions) -> String {
    admin.publish_change("gate", change, options).await.unwrap_err().to_string()
}

/// Waits until everyone has what is meant for them.
async fn settled(admin: &Admin) -> Vec<Standing> {
    let begun = Instant::now();
    loop {
        let standings = admin.standings(Some("gate")).await.unwrap();
        if !standings.is_empty() && standings.iter().all(|one| one.state == State::Applied) {
            return standings;
        }
        assert!(begun.elapsed() < PATIENCE, "{standings:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// `high` of each.
fn highs(processes: &[Process<Gate>]) -> Vec<u32> {
    processes.iter().map(|process| process.gate.borrow().high).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revision_goes_to_some_first_then_to_all_or_back() {
    let directory = TempDir::new().unwrap();
    let (keeper, admin) = start(directory.path()).await;
    let mut all = Vec::new();
    for (id, pool) in [("gw-0", "core"), ("gw-1", "core"), ("gw-2", "edge")] {
        all.push(process::<Gate>(&keeper, id, &[("pool", pool)]).await);
    }
    admin.set("gate", sets(&[("high", "20")]), by("ann")).await.unwrap();
    settled(&admin).await;
    assert_eq!(highs(&all), [20, 20, 20]);

    let published = release(&admin, &[("high", "30")], to(&["gw-1"], &[])).await;
    assert_eq!((published.revision.revision, published.readers), (2, 3));
    assert_eq!(published.matched, ["gw-1"]);
    let standings = settled(&admin).await;
    let of = |standings: &[Standing]| -> Vec<(u64, bool)> {
        standings.iter().map(|one| (one.applied.applied_revision, one.by_release)).collect()
    };
    assert_eq!((of(&standings), highs(&all)), (vec![(1, false), (2, true), (1, false)], vec![20, 30, 20]));

    // An agent that knows nothing of releases reads this record.
    let mut client = KeeperClient::connect(keeper.endpoint()).await.unwrap();
    let range = v1::RangeRequest { key: keys::config("gate"), ..Default::default() };
    let stable = client.range(range).await.unwrap().into_inner().items.remove(0);
    assert_eq!(v1::ConfigRevision::decode(stable.value).unwrap().revision, 1);
    let shown = admin.get("gate", None).await.unwrap();
    assert_eq!((shown.revision.revision, shown.release.unwrap().candidate.revision), (1, 2));

    // One at a time, whatever it is; but the very same again is no other one.
    for change in [
        Change::Sets(sets(&[("high", "40")])),
        Change::RollbackTo(1),
        Change::Delete,
        Change::RemoveOverride("none".to_owned()),
    ] {
        let said = refused(&admin, change.clone(), by("bob")).await;
        let expected = match change {
            Change::RemoveOverride(_) => "there is no override \"none\"; there is none",
            _ => {
                "revision 2 of gate is being released to instance gw-1, by ann: first promote it to all (carillon config \
                 promote gate --revision 2) or take it back (carillon config abandon gate --revision 2)"
            }
        };
        assert_eq!(said, expected, "{change:?}");
    }
    assert_eq!(release(&admin, &[("high", "30")], to(&["gw-1"], &[])).await.revision.revision, 2);

    // To others: who is not among them goes back.
    let edge = ReleaseAction::Target(to(&[], &[("pool", "edge")]));
    let done = admin.release("gate", edge, 2, "bob", "the edge is better").await.unwrap();
    assert_eq!(done.matched, ["gw-2"]);
    settled(&admin).await;
    assert_eq!(highs(&all), [20, 20, 30]);
    // A process that comes now is decided on as well, from its first configuration on.
    let late = process::<Gate>(&keeper, "gw-3", &[("pool", "edge")]).await;
    assert_eq!(late.gate.borrow().high, 30);
    late.agent.stop().await;

    let other = admin.release("gate", ReleaseAction::Promote, 9, "bob", "").await.unwrap_err();
    assert!(other.to_string().starts_with("gate is at revision 2 by now, not at 9"), "{other}");
    // Not whichever it happens to be.
    let unsaid = admin.release("gate", ReleaseAction::Promote, 0, "bob", "").await.unwrap_err();
    assert_eq!(unsaid.to_string(), "say which revision of gate is meant: 2 is being released");
    admin.release("gate", ReleaseAction::Abandon, 2, "bob", "too high").await.unwrap();
    let standings = settled(&admin).await;
    assert_eq!((of(&standings), highs(&all)), (vec![(1, false); 3], vec![20, 20, 20]));
    let nothing = admin.release("gate", ReleaseAction::Promote, 2, "bob", "").await.unwrap_err();
    assert_eq!(nothing.to_string(), "nothing of gate is being released");

    // Its number is not used again; promoted, the next one keeps its own.
    let half = Target { per_ten_thousand: Some(5000), ..Target::default() };
    let published = release(&admin, &[("high", "50")], half).await;
    assert_eq!(published.revision.revision, 3);
    let standings = settled(&admin).await;
    let chosen: Vec<&str> =
        standings.iter().filter(|one| one.by_release).map(|one| one.applied.instance.as_str()).collect();
    assert_eq!(published.matched, chosen, "the keeper and the agents mean the same ones");
    admin.release("gate", ReleaseAction::Promote, 3, "bob", "").await.unwrap();
    let standings = settled(&admin).await;
    assert_eq!((of(&standings), highs(&all)), (vec![(3, false); 3], vec![50, 50, 50]));

    let history = admin.history("gate", 0).await.unwrap();
    let told: Vec<String> = history
        .iter()
        .map(|revision| {
            let step = |step: &carillon_agent::admin::Step| {
                assert!(step.peer.starts_with("127.0.0.1:") && step.time_ms > 0, "{step:?}");
                let to = step.target.as_ref().map(|target| format!("({target})")).unwrap_or_default();
                format!("{}{to} by {} {}", step.what, step.author, step.comment)
            };
            assert!(revision.peer.starts_with("127.0.0.1:"), "{revision:?}");
            let steps: Vec<String> = revision.steps.iter().map(step).collect();
            format!("{}: {}", revision.revision, steps.join(", "))
        })
        .collect();
    assert_eq!(
        told,
        [
            "3: released(50 %) by ann , promoted by bob ",
            "2: released(instance gw-1) by ann , targeted(pool=edge) by bob the edge is better, abandoned by bob too high",
            "1: ",
        ]
    );
    // What was abandoned is not what 3 was made from.
    let (from, into, differences) = admin.diff("gate", None, None).await.unwrap();
    assert_eq!((from, into, differences.len(), differences[0].path.as_str()), (1, 3, 1, "high"));
    keeper.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_release_outlives_a_restart_and_makes_sense_or_is_refused() {
    let directory = TempDir::new().unwrap();
    let (keeper, admin) = start(directory.path()).await;
    admin.set("gate", sets(&[("high", "20"), ("steps", "1")]), by("ann")).await.unwrap();
    let some = |target: Target| ChangeOptions { release_to: Some(target), ..by("ann") };
    let one = || to(&["gw-1"], &[]);
    let high = |value: &str| Change::Sets(sets(&[("high", value)]));
    for (change, options, expected) in [
        (high("30"), some(Target::default()), "a release is to some processes first: say to which"),
        (
            high("30"),
            some(Target { roles: vec!["gatway".to_owned()], ..Target::default() }),
            "\"gatway\" is not a role; the roles are gateway,",
        ),
        (high("30"), some(to(&["a b"], &[])), "instance id \"a b\" may hold only"),
        (high("20"), some(one()), "gate is already so at revision 1: there is nothing to release"),
        (Change::Delete, some(one()), "gate can be taken away from all only, not from some first"),
        (high("0"), some(one()), "gate is refused: low: is 1, more than high"),
        (
            Change::Sets(sets(&[("steps", "2")])),
            some(one()),
            "gate is refused: steps: could not be taken back, so it cannot be released to some first: only grows",
        ),
    ] {
        let said = refused(&admin, change, options).await;
        assert!(said.starts_with(expected), "{said}");
    }
    let dry = ChangeOptions { dry_run: true, ..some(one()) };
    let dry = admin.publish_change("gate", high("30"), dry).await.unwrap();
    assert_eq!((dry.matched.len(), dry.readers, dry.differences.len()), (0, 0, 1), "nobody is there");
    assert!(admin.releases().await.unwrap().is_empty());

    release(&admin, &[("high", "30")], one()).await;
    keeper.stop().await;
    let (keeper, admin) = start(directory.path()).await;
    let found = admin.releases().await.unwrap();
    assert_eq!((found.len(), found[0].candidate.revision, &found[0].target), (1, 2, &one()));
    admin.release("gate", ReleaseAction::Promote, 2, "ann", "").await.unwrap();
    assert_eq!(admin.get("gate", None).await.unwrap().effective["high"], 30);
    keeper.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn some_differ_for_good() {
    let directory = TempDir::new().unwrap();
    let (keeper, admin) = start(directory.path()).await;
    admin.set("gate", sets(&[("high", "20"), ("low", "5")]), by("ann")).await.unwrap();
    let mut all = Vec::new();
    for (id, pool) in [("gw-0", "core"), ("gw-1", "edge"), ("gw-2", "edge")] {
        all.push(process::<Gate>(&keeper, id, &[("pool", pool)]).await);
    }
    let pool = |name: &str| to(&[], &[("pool", name)]);
    over(&admin, "gate", "edge", pool("edge"), &[("high", "8"), ("names", "[x, y]")]).await;
    over(&admin, "gate", "one", to(&["gw-1"], &[]), &[("low", "null"), ("names[0]", "z")]).await;
    let standings = settled(&admin).await;
    let mine: Vec<String> = standings.iter().map(|one| one.overrides.join("+")).collect();
    assert_eq!(mine, ["", "edge+one", "edge"]);
    let has = |process: &Process<Gate>| {
        let gate = process.gate.borrow();
        (gate.low, gate.high, gate.names.join(" "))
    };
    let expected = [(5, 20, "a"), (1, 8, "z"), (5, 8, "x y")].map(|(l, h, n)| (l, h, n.to_owned()));
    assert_eq!(all.iter().map(has).collect::<Vec<_>>(), expected);

    // All that it may come to for somebody is checked, also what changes beneath.
    let low = |value: &str| Change::Sets(sets(&[("low", value)]));
    for (change, expected) in [
        (low("9"), "gate is refused: low: is 9, more than high (with override edge)"),
        (low("25"), "gate is refused: low: is 25, more than high"),
        (
            Change::Override { name: "edge".into(), target: None, sets: sets(&[("high", "0")]) },
            "gate is refused: low: is 5, more than high",
        ),
        (
            Change::Override { name: "edge".into(), target: None, sets: sets(&[("hihg", "0")]) },
            "gate is refused: hihg: unknown field `hihg`",
        ),
        (
            Change::OverrideYaml { name: "one".into(), target: None, yaml: "{low: 10}".into() },
            "gate is refused: low: is 10, more than high (with overrides edge and one)",
        ),
        (
            Change::Override { name: "new".into(), target: None, sets: sets(&[("high", "9")]) },
            "override \"new\" is new: say whom it is for",
        ),
        (
            Change::Override {
                name: "new".into(),
                target: Some(Target { per_ten_thousand: Some(1), ..Target::default() }),
                sets: sets(&[("high", "9")]),
            },
            "gate is refused: overrides.new: is for a percentage",
        ),
        (Change::RemoveOverride("new".into()), "there is no override \"new\"; there are: edge, one"),
    ] {
        let said = refused(&admin, change.clone(), by("bob")).await;
        assert!(said.starts_with(expected), "{change:?}: {said}");
    }

    // The same field for a whole app: no two of them may be the root for anybody.
    admin.publish("app/demo", "root: true", by("ann")).await.unwrap();
    admin.publish("app/other", "", by("ann")).await.unwrap();
    let root =
        Change::Override { name: "e".into(), target: Some(pool("edge")), sets: sets(&[("root", "true")]) };
    let said = admin.publish_change("app/other", root.clone(), by("ann")).await.unwrap_err().to_string();
    assert_eq!(
        said,
        "app/other is refused: root: is already true in app/demo: a cluster has at most one root app (with override e)"
    );
    admin.publish("app/demo", "", by("ann")).await.unwrap();
    admin.publish_change("app/other", root, by("ann")).await.unwrap();
    let said = admin.publish("app/demo", "root: true", by("ann")).await.unwrap_err().to_string();
    assert!(said.contains("root: is already true in app/other"), "{said}");

    // Overrides come and go with revisions, and with releases.
    let whole = admin.get("gate", None).await.unwrap().revision;
    assert_eq!((whole.revision, whole.overrides.len()), (3, 2));
    let removed =
        admin.publish_change("gate", Change::RemoveOverride("edge".into()), by("ann")).await.unwrap();
    let paths: Vec<&str> = removed.differences.iter().map(|one| one.path.as_str()).collect();
    assert_eq!(
        paths,
        ["overrides.edge for", "overrides.edge.high", "overrides.edge.names[0]", "overrides.edge.names[1]"]
    );
    settled(&admin).await;
    assert_eq!(highs(&all), [20, 20, 20]);
    admin.rollback("gate", 3, by("ann")).await.unwrap();
    settled(&admin).await;
    assert_eq!(highs(&all), [20, 8, 8]);
    // Somebody who is told of it later than it registers is another one from then on.
    let mut moved = all.remove(0);
    moved.agent.register(Instance {
        id: "gw-0".to_owned(),
        incarnation: 1,
        roles: vec![Role::Gateway],
        addresses: BTreeMap::new(),
        labels: BTreeMap::from([("pool".to_owned(), "edge".to_owned())]),
        draining: false,
    });
    tokio::time::timeout(PATIENCE, moved.gate.wait_for(|gate: &Arc<Gate>| gate.high == 8))
        .await
        .unwrap()
        .unwrap();
    keeper.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_is_known_who_has_what_and_who_refuses() {
    let directory = TempDir::new().unwrap();
    let (keeper, admin) = start(directory.path()).await;
    let new = process::<Gate>(&keeper, "new", &[]).await;
    let old = process::<OldGate>(&keeper, "old", &[]).await;
    admin.set("gate", sets(&[("high", "50")]), by("ann")).await.unwrap();
    settled(&admin).await;
    let published = release(
        &admin,
        &[("high", "500")],
        Target { roles: vec!["gateway".to_owned()], ..Target::default() },
    )
    .await;
    assert_eq!(published.matched, ["new", "old"]);
    let begun = Instant::now();
    let standings = loop {
        let standings = admin.standings(Some("gate")).await.unwrap();
        let states: Vec<State> = standings.iter().map(|one| one.state).collect();
        if states == [State::Applied, State::Refuses] {
            break standings;
        }
        assert!(begun.elapsed() < PATIENCE, "{standings:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    let refuses = &standings[1];
    assert_eq!((refuses.meant_revision, refuses.applied.applied_revision), (2, 1));
    let why = refuses.applied.refused.clone().unwrap();
    assert_eq!(why, (2, "high: is more than this version can do".to_owned()));
    assert_eq!((new.gate.borrow().high, old.gate.borrow().high), (500, 50));
    admin.release("gate", ReleaseAction::Abandon, 2, "ann", "").await.unwrap();
    settled(&admin).await;

    // An instance that reads a document and has not said anything about it lags.
    let mut client = KeeperClient::connect(keeper.endpoint()).await.unwrap();
    let silent = v1::InstanceRecord {
        id: "silent".to_owned(),
        incarnation: 1,
        kinds: vec!["gate".to_owned()],
        ..Default::default()
    };
    client.register(v1::RegisterRequest { instance: Some(silent), ttl_ms: 0 }).await.unwrap();
    let standings = admin.standings(Some("gate")).await.unwrap();
    assert_eq!(
        standings.iter().map(|one| (one.state, one.silent)).collect::<Vec<_>>(),
        [(State::Applied, false), (State::Applied, false), (State::Lags, true)]
    );
    let strange = v1::InstanceRecord {
        id: "strange".to_owned(),
        labels: [("pool".to_owned(), "a b".to_owned())].into(),
        ..Default::default()
    };
    let strange =
        client.register(v1::RegisterRequest { instance: Some(strange), ttl_ms: 0 }).await.unwrap_err();
    assert!(strange.message().starts_with("label pool=\"a b\": a value has"), "{strange}");
    assert!(admin.standings(Some("gat")).await.is_err());
    keeper.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn instances_of_one_process_have_one_configuration() {
    let directory = TempDir::new().unwrap();
    let (keeper, admin) = start(directory.path()).await;
    let both = process::<Gate>(&keeper, "gw", &[]).await;
    both.agent.register(Instance {
        id: "hub".to_owned(),
        incarnation: 1,
        roles: vec![Role::Registry],
        addresses: BTreeMap::new(),
        labels: BTreeMap::new(),
        draining: false,
    });
    let begun = Instant::now();
    while settled(&admin).await.len() < 2 {
        assert!(begun.elapsed() < PATIENCE);
    }
    let published = release(&admin, &[("high", "30")], to(&["hub"], &[])).await;
    assert_eq!(published.matched, ["gw", "hub"]);
    let standings = settled(&admin).await;
    assert!(standings.iter().all(|one| one.by_release && one.applied.applied_revision == 1), "{standings:?}");
    assert_eq!(both.gate.borrow().high, 30);
    keeper.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_a_value_comes_from() {
    let directory = TempDir::new().unwrap();
    let (keeper, admin) = start(directory.path()).await;
    let _one = process::<Gate>(&keeper, "gw-1", &[("pool", "edge")]).await;
    let explain = async |path: &str, instance: Option<&str>| -> Explained {
        let mut found = admin.explain("gate", path, instance).await.unwrap();
        assert_eq!(found.values.len(), 1, "{found:?}");
        found.values.remove(0)
    };
    let told = |one: &Explained| -> Vec<String> {
        let source = |source: &carillon_agent::admin::Source| {
            format!("{} {} {} {}", source.kind, source.value, source.revision, source.author)
        };
        one.sources.iter().map(source).collect()
    };
    assert_eq!(told(&explain("high", Some("gw-1")).await), ["default 10 0 "]);
    admin.set("gate", sets(&[("high", "20")]), by("ann")).await.unwrap();
    admin.set("gate", sets(&[("low", "2")]), by("bob")).await.unwrap();
    over(&admin, "gate", "edge", to(&[], &[("pool", "edge")]), &[("high", "30"), ("names", "[x]")]).await;
    admin.set("gate", sets(&[("steps", "0")]), by("cat")).await.unwrap();
    release(&admin, &[("low", "4")], to(&["gw-1"], &[])).await;
    settled(&admin).await;

    let high = explain("high", Some("gw-1")).await;
    assert_eq!(told(&high), ["default 10 0 ", "document 20 1 ann", "override 30 3 ann"]);
    assert_eq!((high.value, high.sources[2].override_name.as_str()), (30.into(), "edge"));
    assert!(high.sources[1].peer.starts_with("127.0.0.1:") && high.sources[1].time_ms > 0);
    let low = explain("low", Some("gw-1")).await;
    assert_eq!(told(&low), ["default 1 0 ", "document 2 2 bob", "release 4 5 ann"]);
    assert_eq!(low.sources[2].target.as_ref().unwrap().to_string(), "instance gw-1");
    assert_eq!(told(&explain("names[0]", Some("gw-1")).await), ["default \"a\" 0 ", "override \"x\" 3 ann"]);

    // For nobody in particular it is said for whom it is another.
    let low = explain("low", None).await;
    assert_eq!((told(&low).len(), low.value.clone()), (2, 2.into()));
    assert_eq!(
        (low.elsewhere.len(), low.elsewhere[0].kind, &low.elsewhere[0].value),
        (1, "release", &4.into())
    );
    let high = explain("high", None).await;
    assert_eq!(
        (high.elsewhere[0].kind, high.elsewhere[0].target.as_ref().unwrap().to_string().as_str()),
        ("override", "pool=edge")
    );
    let whole = admin.explain("gate", "", Some("gw-1")).await.unwrap();
    assert_eq!((whole.values.len(), whole.revision, whole.by_release), (5, 5, true));
    assert_eq!(whole.overrides, ["edge"]);
    let standing = whole.standing.unwrap();
    assert_eq!((standing.state, standing.applied.applied_revision), (State::Applied, 5));

    for (document, path, instance, expected) in [
        ("gate", "hihg", None, "gate has no \"hihg\": it has high, low, names, password, steps"),
        ("gate", "names[3]", None, "names of gate has no \"names[3]\": it is a list of 1"),
        ("gate", "high.x", None, "high of gate has no \"high.x\": it is 20"),
        ("gate", "a..b", None, "\"a..b\" is not a path like"),
        ("gate", "high", Some("gw-9"), "there is no instance \"gw-9\"; there are: gw-1"),
        ("app/none", "root", None, "there is no document app/none"),
        ("gat", "high", None, "there is no kind of document"),
    ] {
        let said = admin.explain(document, path, instance).await.unwrap_err().to_string();
        assert!(said.starts_with(expected), "{said}");
    }
    keeper.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn secrets_are_not_told() {
    let directory = TempDir::new().unwrap();
    let (keeper, admin) = start(directory.path()).await;
    let mut said = String::new();
    let published = |value: &str| Change::Sets(sets(&[("password", value), ("high", "20")]));
    for value in ["hunter-one", "hunter-two"] {
        let done = admin.publish_change("gate", published(value), by("ann")).await.unwrap();
        said.push_str(&format!("{:?}{}", done.differences, done.revision.comment));
    }
    let done = over(&admin, "gate", "e", to(&["x"], &[]), &[("password", "hunter-three")]).await;
    said.push_str(&format!("{:?}{}", done.differences, done.revision.comment));
    said.push_str(&format!("{:?}", admin.history("gate", 0).await.unwrap()));
    said.push_str(&format!("{:?}", admin.diff("gate", Some(1), Some(2)).await.unwrap()));
    said.push_str(&format!("{:?}", admin.explain("gate", "", None).await.unwrap()));
    let deeper = admin.explain("gate", "password.x", None).await.unwrap_err();
    said.push_str(&deeper.to_string());
    assert!(!said.contains("hunter"), "{said}");
    let (_, _, differences) = admin.diff("gate", Some(1), Some(2)).await.unwrap();
    assert_eq!((differences.len(), differences[0].after.clone().unwrap()), (1, "(another secret)".into()));
    // Who reads the document itself gets it.
    assert_eq!(admin.get("gate", None).await.unwrap().effective["password"], "hunter-two");
    keeper.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_starts_without_a_keeper_has_what_was_meant_for_it() {
    let (directory, own) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let (keeper, admin) = start(directory.path()).await;
    let (address, endpoint) = (keeper.addr().to_string(), keeper.endpoint());
    let everyone = [("gw-0", "core"), ("gw-1", "core"), ("gw-2", "edge"), ("gw-3", "edge")];
    let all = || -> Vec<Process<Gate>> {
        let one = |(id, pool): &(&str, &str)| {
            let options = Options::new(vec![endpoint.clone()]).with_cache(own.path().join(id), *id);
            begin(options, id, &[("pool", pool)])
        };
        everyone.iter().map(one).collect()
    };
    let first = all();
    admin.set("gate", sets(&[("high", "20")]), by("ann")).await.unwrap();
    over(&admin, "gate", "edge", to(&[], &[("pool", "edge")]), &[("high", "8")]).await;
    release(&admin, &[("high", "30"), ("low", "3")], to(&["gw-1", "gw-3"], &[])).await;
    let begun = Instant::now();
    while settled(&admin).await.len() < everyone.len() {
        assert!(begun.elapsed() < PATIENCE);
    }
    let has = |all: &[Process<Gate>]| -> Vec<(u32, u32)> {
        let one = |process: &Process<Gate>| (process.gate.borrow().low, process.gate.borrow().high);
        all.iter().map(one).collect()
    };
    let meant = [(1, 20), (3, 30), (1, 8), (3, 8)];
    assert_eq!(has(&first), meant);
    keeper.stop().await;
    for process in &first {
        process.agent.stop().await;
    }

    let restarted = carillon_proto::now_ms();
    let second = all();
    assert_eq!(has(&second), meant, "the same, and from the first moment on");
    assert!(second.iter().all(|process| process.agent.is_ready() && !*process.agent.connected().borrow()));
    // The process of another pool, on the same data: by what it is now, not by what it was.
    second[0].agent.stop().await;
    let options = Options::new(vec![endpoint.clone()]).with_cache(own.path().join("gw-0"), "gw-0");
    let moved = begin::<Gate>(options, "gw-0", &[("pool", "edge")]);
    assert_eq!(has(&[moved]), [(1, 8)]);

    let (keeper, admin) = start_at(directory.path(), &address).await;
    let begun = Instant::now();
    loop {
        let live = admin.live().await.unwrap();
        let back = live.iter().filter(|one| one.instance.incarnation >= restarted).count();
        if back == everyone.len() {
            break;
        }
        assert!(begun.elapsed() < PATIENCE, "{live:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let standings = settled(&admin).await;
    let told: Vec<(u64, bool)> =
        standings.iter().map(|one| (one.applied.applied_revision, one.by_release)).collect();
    assert_eq!(told, [(2, false), (3, true), (2, false), (3, true)], "they tell what they started with");
    admin.release("gate", ReleaseAction::Abandon, 3, "ann", "").await.unwrap();
    settled(&admin).await;
    assert_eq!(has(&second)[1..], [(1, 20), (1, 8), (1, 8)], "and follow again");
    keeper.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_override_is_taken_away_only_as_any_change_is_made() {
    let directory = TempDir::new().unwrap();
    let (keeper, admin) = start(directory.path()).await;
    admin.set("gate", sets(&[("steps", "1")]), by("ann")).await.unwrap();
    let edge = || to(&[], &[("pool", "edge")]);
    over(&admin, "gate", "edge", edge(), &[("steps", "5")]).await;
    let only_grows = "gate is refused: steps: only grows (without override edge)";
    assert_eq!(refused(&admin, Change::RemoveOverride("edge".into()), by("bob")).await, only_grows);
    // To give it to others is to take it from these.
    let moved = Change::Override {
        name: "edge".into(),
        target: Some(to(&[], &[("pool", "core")])),
        sets: Vec::new(),
    };
    assert_eq!(refused(&admin, moved, by("bob")).await, only_grows);
    assert_eq!(refused(&admin, Change::RollbackTo(1), by("bob")).await, only_grows);
    // Once all have come so far, it may go.
    admin.set("gate", sets(&[("steps", "5")]), by("ann")).await.unwrap();
    admin.publish_change("gate", Change::RemoveOverride("edge".into()), by("ann")).await.unwrap();
    assert!(admin.get("gate", None).await.unwrap().revision.overrides.is_empty());
    keeper.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_overrides_come_to_for_a_process_of_several_instances_is_checked() {
    let directory = TempDir::new().unwrap();
    let (keeper, admin) = start(directory.path()).await;
    let both = process::<Gate>(&keeper, "gw", &[("pool", "edge")]).await;
    let core = [("pool".to_owned(), "core".to_owned())].into();
    both.agent.register(Instance { roles: vec![Role::Registry], labels: core, ..Instance::new("hub") });
    let begun = Instant::now();
    while settled(&admin).await.len() < 2 {
        assert!(begun.elapsed() < PATIENCE);
    }
    // No instance is in both pools, but this process is.
    over(&admin, "gate", "edge", to(&[], &[("pool", "edge")]), &[("low", "9")]).await;
    let high = || Change::Override {
        name: "core".into(),
        target: Some(to(&[], &[("pool", "core")])),
        sets: sets(&[("high", "5")]),
    };
    let said = refused(&admin, high(), by("bob")).await;
    assert_eq!(said, "gate is refused: low: is 9, more than high (with overrides edge and core)");
    both.agent.stop().await;
    let begun = Instant::now();
    while !admin.live().await.unwrap().is_empty() {
        assert!(begun.elapsed() < PATIENCE);
    }
    admin.publish_change("gate", high(), by("bob")).await.unwrap();
    keeper.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_release_grows_from_a_tenth_to_all() {
    const AGENTS: usize = 60;
    let directory = TempDir::new().unwrap();
    let (keeper, admin) = start(directory.path()).await;
    let mut all = Vec::new();
    for i in 0..AGENTS {
        let process = begin::<Gate>(Options::new(vec![keeper.endpoint()]), &format!("gw-{i}"), &[]);
        all.push(process);
    }
    let begun = Instant::now();
    while admin.live().await.unwrap().len() < AGENTS {
        assert!(begun.elapsed() < PATIENCE, "not all are there");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    admin.set("gate", sets(&[("high", "20")]), by("ann")).await.unwrap();
    let has = async || -> Vec<bool> {
        settled(&admin).await;
        all.iter().map(|process| process.gate.borrow().high == 30).collect()
    };
    assert!(has().await.iter().all(|has| !has));
    let percent = |share: u32| Target { per_ten_thousand: Some(share * 100), ..Target::default() };
    let mut before = vec![false; AGENTS];
    for (share, expected) in [(10, 2..=11), (50, 22..=38), (100, AGENTS..=AGENTS)] {
        let published = if share == 10 {
            release(&admin, &[("high", "30")], percent(share)).await
        } else {
            admin.release("gate", ReleaseAction::Target(percent(share)), 2, "ann", "").await.unwrap()
        };
        let now = has().await;
        let count = now.iter().filter(|has| **has).count();
        assert!(expected.contains(&count), "{share} %: {count} of {AGENTS}");
        assert_eq!((published.matched.len(), published.readers), (count, AGENTS as u32));
        let lost = before.iter().zip(&now).filter(|(before, now)| **before && !**now).count();
        assert_eq!(lost, 0, "{share} %: who had it keeps it");
        before = now;
    }
    admin.release("gate", ReleaseAction::Promote, 2, "ann", "").await.unwrap();
    assert!(has().await.iter().all(|has| *has));
    for process in &all {
        process.agent.stop().await;
    }
    keeper.stop().await;
}
