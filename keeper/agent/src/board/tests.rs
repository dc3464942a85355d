//! What is known and who is told, without a keeper.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::*;

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
struct Gate {
    limit: u32,
}

impl ConfigDocument for Gate {
    const KIND: &'static str = "gate";
}

fn event(key: &str, revision: u64, record: &impl prost::Message) -> v1::WatchEvent {
    let value = record.encode_to_vec().into();
    let item = v1::KeyValue { key: key.to_owned(), value, mod_revision: revision, ..Default::default() };
    v1::WatchEvent { item: Some(item), deleted: false }
}

fn deletion(key: &str, revision: u64) -> v1::WatchEvent {
    let item = v1::KeyValue { key: key.to_owned(), mod_revision: revision, ..Default::default() };
    v1::WatchEvent { item: Some(item), deleted: true }
}

fn document(revision: u64, yaml: &str) -> v1::WatchEvent {
    let record =
        v1::ConfigRevision { document: "gate".into(), revision, yaml: yaml.into(), ..Default::default() };
    event(&keys::config("gate"), revision, &record)
}

fn command(state: v1::CommandState, deadline_ms: u64) -> v1::WatchEvent {
    let record = v1::CommandRecord {
        id: "c".into(),
        instance: "me".into(),
        name: "drain".into(),
        deadline_ms,
        state: state.into(),
        ..Default::default()
    };
    event(&keys::command("me", "c"), 1, &record)
}

fn registered() -> Board {
    let mut board = Board::new();
    let me = Instance::from_record(v1::InstanceRecord { id: "me".into(), ..Default::default() });
    board.registrations.insert("me".into(), me);
    board
}

#[test]
fn what_is_in_the_way_of_a_document_is_told_until_it_is_not() {
    let mut board = Board::new();
    board.config::<Gate>();
    assert!(!board.report_problem("gate", Some("too early".into())));
    board.replace("c".into(), vec![document(1, "limit: 5")], 0);
    let told = |board: &mut Board| {
        let report = board.untold(9);
        board.told(&report);
        report
            .into_iter()
            .map(|one| (one.applied_revision, one.refused_revision, one.refusal))
            .collect::<Vec<_>>()
    };
    told(&mut board);
    assert!(board.report_problem("gate", Some("a port is in use".into())));
    assert_eq!(told(&mut board), [(1, 1, "a port is in use".into())]);
    assert!(!board.report_problem("gate", Some("a port is in use".into())), "no news");
    assert!(board.report_problem("gate", None));
    assert_eq!(told(&mut board), [(1, 0, String::new())]);
    // A revision that was refused as a whole is what counts.
    board.events(2, &[document(2, "limit: no")], 0);
    assert!(!board.report_problem("gate", Some("a port is in use".into())));
    assert_eq!(told(&mut board)[0].1, 2);
}

#[test]
fn a_document_is_applied_refused_and_taken_away() {
    let mut board = Board::new();
    let mut gate = board.config::<Gate>();
    board.replace("c".into(), vec![document(1, "limit: 5")], 0);
    assert!(gate.has_changed().unwrap());
    assert_eq!(gate.borrow_and_update().limit, 5);
    let report = board.untold(9);
    assert_eq!((report.len(), report[0].applied_revision), (1, 1));
    board.told(&report);
    assert!(board.untold(9).is_empty());

    board.events(2, &[document(2, "limit: no")], 0);
    assert!(!gate.has_changed().unwrap());
    let report = board.untold(9);
    assert_eq!((report[0].applied_revision, report[0].refused_revision), (1, 2));
    assert_eq!(report[0].refusal, "limit: invalid type: string \"no\", expected u32");
    // It changes while the report is under way.
    board.events(3, &[document(3, "limit: 6")], 0);
    board.told(&report);
    assert_eq!(board.untold(9)[0].applied_revision, 3);

    board.events(4, &[deletion(&keys::config("gate"), 4)], 0);
    assert_eq!(gate.borrow_and_update().limit, 0, "the default");
}

#[test]
fn another_text_under_the_same_number_is_applied() {
    let mut board = Board::new();
    let mut gate = board.config::<Gate>();
    board.replace("c".into(), vec![document(6, "limit: 1")], 0);
    assert_eq!(gate.borrow_and_update().limit, 1);
    // The cluster was lost, restored at revision 5, and changed again.
    board.replace("c".into(), vec![document(6, "limit: 2")], 0);
    assert_eq!(gate.borrow_and_update().limit, 2);
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
struct Door {
    width: u32,
}

impl ConfigDocument for Door {
    const KIND: &'static str = "door";
    const NAMED: bool = true;
}

#[test]
fn a_document_that_is_only_being_released_is_had_by_who_says_late_who_it_is() {
    let candidate = v1::ConfigRevision {
        document: "door/a".into(),
        revision: 1,
        yaml: "width: 7".into(),
        ..Default::default()
    };
    let release = v1::ConfigRelease {
        candidate: Some(candidate),
        target: Some(v1::ConfigTarget { roles: vec!["gateway".into()], ..Default::default() }),
    };
    let mut board = Board::new();
    let mut doors = board.configs::<Door>();
    board.replace("c".into(), vec![event(&keys::release("door/a"), 1, &release)], 0);
    assert!(doors.borrow_and_update().is_empty(), "it is not known who this is");
    board.register(Instance { roles: vec![Role::Gateway], ..Instance::new("me") });
    assert_eq!(doors.borrow_and_update()["a"].width, 7);
    assert_eq!((board.untold(9).len(), board.untold(9)[0].applied_revision), (1, 1));
    // And nothing is told of it by others.
    let mut other = Board::new();
    let doors = other.configs::<Door>();
    other.replace("c".into(), vec![event(&keys::release("door/a"), 1, &release)], 0);
    other.register(Instance { roles: vec![Role::Registry], ..Instance::new("other") });
    assert!(doors.borrow().is_empty() && other.untold(9).is_empty());
}

#[test]
fn the_same_state_again_tells_nobody() {
    let mut board = Board::new();
    let mut gate = board.config::<Gate>();
    let mut gateways = board.instances(Role::Gateway);
    let record = v1::InstanceRecord {
        id: "g".into(),
        roles: vec!["gateway".into(), "new-role".into()],
        ..Default::default()
    };
    let state = vec![document(1, "limit: 5"), event(&keys::instance("g"), 2, &record)];
    board.replace("c".into(), state.clone(), 0);
    gate.mark_unchanged();
    assert_eq!(gateways.borrow_and_update().len(), 1);
    board.replace("c".into(), state, 0);
    assert!(!gate.has_changed().unwrap() && !gateways.has_changed().unwrap());
    // Another cluster: the same revision need not be the same document.
    board.replace("d".into(), vec![document(1, "limit: 7")], 0);
    assert_eq!(gate.borrow_and_update().limit, 7);
    assert!(gateways.borrow_and_update().is_empty());
}

#[test]
fn unreadable_records_are_passed_over() {
    let mut board = Board::new();
    let slots = board.slots();
    let mut broken = deletion(keys::SLOTS, 1);
    broken.deleted = false;
    broken.item.as_mut().unwrap().value = vec![0xff; 4].into();
    board.events(1, &[broken, document(1, "")], 0);
    assert!(slots.borrow().slots.is_empty());
    assert_eq!(board.view.revision, 1);
}

#[test]
fn a_command_is_begun_once() {
    let mut board = registered();
    assert_eq!(board.events(1, &[command(v1::CommandState::CommandPending, 100)], 50).len(), 1);
    assert_eq!(board.events(2, &[command(v1::CommandState::CommandRunning, 100)], 50).len(), 0);
    // The whole state anew, as after a long interruption.
    assert_eq!(board.replace("c".into(), vec![command(v1::CommandState::CommandPending, 100)], 60).len(), 0);
    assert!(board.answers.is_empty());
}

#[test]
fn a_command_of_a_former_life_is_not_begun_again() {
    let mut board = registered();
    assert_eq!(board.replace("c".into(), vec![command(v1::CommandState::CommandRunning, 100)], 60).len(), 0);
    assert_eq!(board.answers[0].state(), v1::CommandState::CommandFailed);
    assert_eq!(board.answers[0].output, "the instance restarted while carrying it out");
}

#[test]
fn a_command_past_its_deadline_or_for_another_is_left_alone() {
    let mut board = registered();
    assert_eq!(board.events(1, &[command(v1::CommandState::CommandPending, 100)], 100).len(), 0);
    let mut other = Board::new();
    assert_eq!(other.events(1, &[command(v1::CommandState::CommandPending, 100)], 50).len(), 0);
}

#[test]
fn slots_are_read_whatever_the_record() {
    let owner = v1::slot_record::Owner { instance: "a".into(), incarnation: 3 };
    let record = v1::SlotRecord {
        owners: vec![owner],
        owner_of: vec![1, 0, 9],
        epochs: vec![5, 6, 7],
        moving_to: vec![0, 1, 9],
    };
    let map = slot_map(4, record);
    assert_eq!(map.revision, 4);
    let flat: Vec<_> = map.slots.iter().map(|slot| (&*slot.instance, slot.incarnation, slot.epoch)).collect();
    assert_eq!(flat, [("a", 3, 5), ("", 0, 6), ("", 0, 7)]);
    assert_eq!(map.moving_to, BTreeMap::from([(1, "a".into())]));
}
