//! Conditions by table.

use super::*;

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

fn member(place: u32) -> Member {
    Member {
        node: format!("{place:016x}"),
        address: format!("k{place}:7400"),
        place: Some(place),
        voter: true,
        leads: place == 0,
        alive: true,
        caught_up: true,
    }
}

fn part(wanted: i32, ready: i32) -> Option<Workload> {
    Some(Workload { wanted, ready, rolled_out: true })
}

/// All is as it should be.
fn good() -> Facts {
    Facts {
        certificates: Some(Certificates::Ready),
        wanted: 3,
        keeper: part(3, 3),
        hub: part(1, 1),
        members: Some((0..3).map(member).collect()),
        step: Some(Step::Steady),
        config: Some(Accepted::Yes),
        ..Default::default()
    }
}

fn lines(status: &PushClusterStatus) -> Vec<String> {
    let line =
        |c: &Condition| format!("{} {} {} {}", c.type_, c.status, c.reason, c.message).trim_end().to_owned();
    status.conditions.iter().map(line).collect()
}

/// After it has been good.
fn then(facts: &Facts) -> Vec<String> {
    let before = status(&good(), &PushClusterStatus::default(), Some(1), at(0));
    lines(&status(facts, &before, Some(2), at(1)))
}

#[test]
fn a_cluster_that_is_as_it_should_be_is_ready() {
    let first = status(&good(), &PushClusterStatus::default(), Some(1), at(0));
    assert_eq!(
        lines(&first),
        [
            "Ready True Ready",
            "Available True Serving",
            "Progressing False Complete",
            "Degraded False AsExpected",
            "CertificatesReady True Issued",
            "ConfigAccepted True Accepted",
        ]
    );
    assert_eq!(
        (first.observed_generation, first.keeper.ready_replicas, first.hub.ready_replicas),
        (Some(1), 3, 1)
    );
    assert_eq!(first.keeper.members.len(), 3);
    assert_eq!(status(&good(), &first, Some(1), at(9)), first, "nothing to write");
    assert!(!good().is_moving());
}

#[test]
fn a_start_is_progress_and_no_harm() {
    let facts = Facts {
        keeper: part(3, 1),
        hub: part(1, 0),
        members: None,
        step: Some(Step::Wait("nobody leads".to_owned())),
        config: None,
        ..good()
    };
    let first = status(&facts, &PushClusterStatus::default(), Some(1), at(0));
    let expected = [
        "Ready False Starting 1 of 3 keepers are ready, which is no majority",
        "Available False Starting 1 of 3 keepers are ready, which is no majority",
        "Progressing True Starting nobody leads",
        "Degraded False Starting",
        "CertificatesReady True Issued",
        "ConfigAccepted Unknown NotHandedOver",
    ];
    assert_eq!(lines(&first), expected);
    assert_eq!(lines(&status(&facts, &first, Some(1), at(1))), expected);
    // The same later is a failure.
    let later = then(&facts);
    assert_eq!(later[1], "Available False KeeperNotReady 1 of 3 keepers are ready, which is no majority");
    assert_eq!(later[3], "Degraded True KeeperIncomplete 1 of 3 keepers are ready");
}

#[test]
fn what_is_wrong_is_said_where_it_belongs_and_in_the_summary() {
    let refused = Accepted::No { reason: "Refused", message: "spec.config.gateway.x: no".to_owned() };
    let table = [
        (
            Facts { config: Some(refused), ..good() },
            5,
            "ConfigAccepted False Refused spec.config.gateway.x: no",
        ),
        (Facts { hub: part(1, 0), ..good() }, 1, "Available False HubNotReady no hub is ready"),
        (
            Facts { keeper: part(3, 2), ..good() },
            3,
            "Degraded True KeeperIncomplete 2 of 3 keepers are ready",
        ),
        (
            Facts { members: None, unreachable: Some("no answer".to_owned()), ..good() },
            3,
            "Degraded True KeeperUnreachable no answer",
        ),
        (
            Facts { failure: Some(("NameTaken", "Service x".to_owned())), ..good() },
            3,
            "Degraded True NameTaken Service x",
        ),
        (
            Facts {
                certificates: Some(Certificates::Waiting {
                    reason: "CertManagerNotInstalled",
                    message: "install it".to_owned(),
                }),
                ..good()
            },
            4,
            "CertificatesReady False CertManagerNotInstalled install it",
        ),
    ];
    for (facts, place, expected) in table {
        let found = then(&facts);
        assert_eq!(found[place], expected);
        let (_, told) = expected.split_once(' ').unwrap().1.split_once(' ').unwrap();
        assert_eq!(found[0], format!("Ready False {told}"));
    }
}

#[test]
fn a_change_of_members_is_told_and_leaves_it_ready() {
    let facts = Facts { wanted: 5, step: Some(Step::Places(4)), ..good() };
    assert_eq!(then(&facts)[2], "Progressing True MembersChanging 3 of 5 keepers: going to 4 keepers");
    let facts = Facts { wanted: 5, keeper: part(4, 3), step: Some(Step::Wait("x".to_owned())), ..good() };
    assert_eq!(then(&facts)[2], "Progressing True MembersChanging 4 of 5 keepers: x");
    let rolling = Facts { keeper: Some(Workload { rolled_out: false, wanted: 3, ready: 2 }), ..good() };
    let found = then(&rolling);
    assert_eq!(found[0], "Ready True Ready");
    assert_eq!(found[2], "Progressing True RollingOut 2 of 3 keepers are ready");
}

#[test]
fn an_external_store_is_refused() {
    let found = then(&Facts { external_store: true, ..Facts::default() });
    assert!(found[0].starts_with("Ready False StoreNotSupported"), "{found:?}");
    assert!(found[1].starts_with("Available False StoreNotSupported"), "{found:?}");
}
