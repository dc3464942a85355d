//! Who may do what, as a table.

use tonic::Code;

use super::*;

fn caller(role: CertificateRole, name: Option<&str>) -> Caller {
    Caller::Certified(Arc::new(Subject {
        role,
        name: name.map(str::to_owned),
        cluster: None,
        not_before: 0,
        not_after: i64::MAX,
    }))
}

fn may(role: CertificateRole, method: &str) -> bool {
    match caller(role, None).admit(&format!("/carillon.v1.{method}")) {
        Ok(()) => true,
        Err(status) => {
            assert_eq!(status.code(), Code::PermissionDenied, "{status}");
            assert!(status.message().starts_with(&format!("{role} may not call ")), "{status}");
            false
        }
    }
}

#[test]
fn every_call_is_decided_and_what_is_not_is_refused() {
    let services = [
        ("Keeper", include_str!("../../../proto/proto/carillon/v1/keeper.proto")),
        ("KeeperPeer", include_str!("../../../proto/proto/carillon/v1/keeper_peer.proto")),
    ];
    let mut calls = 0;
    for (service, text) in services {
        for line in text.lines() {
            let Some(rest) = line.trim().strip_prefix("rpc ") else { continue };
            let method = rest.split('(').next().unwrap();
            assert!(need(&format!("/carillon.v1.{service}/{method}")).is_some(), "{service}.{method}");
            calls += 1;
        }
    }
    assert!(calls > 30, "{calls}");
    for path in ["/carillon.v1.Keeper/Nothing", "/carillon.v1.Keeper/", "/carillon.v2.Keeper/Range", "/", ""]
    {
        assert_eq!(need(path), None, "{path}");
        let refusal = caller(Operator, Some("alice")).admit(path).unwrap_err();
        assert!(refusal.message().starts_with("operator/alice may not call "), "{refusal}");
        assert!(Caller::Anyone.admit(path).is_ok());
    }
}

#[test]
fn what_each_role_may() {
    for (method, who) in [
        ("Keeper/Range", "keeper operator gateway hub viewer"),
        ("Keeper/Watch", "keeper operator gateway hub viewer"),
        ("Keeper/GetConfig", "keeper operator gateway hub viewer"),
        ("Keeper/KeeperStatus", "keeper operator gateway hub viewer"),
        ("Keeper/Register", "operator gateway hub"),
        ("Keeper/LeaseKeepAlive", "operator gateway hub"),
        ("Keeper/LeaseRevoke", "operator gateway hub"),
        ("Keeper/ReportConfig", "operator gateway hub"),
        ("Keeper/AnswerCommand", "operator gateway hub"),
        ("Keeper/ClaimSaver", "operator gateway hub"),
        ("Keeper/PublishConfig", "operator hub"),
        ("Keeper/Txn", "operator"),
        ("Keeper/LeaseGrant", "operator"),
        ("Keeper/SendCommand", "operator"),
        ("Keeper/MemberRemove", "operator"),
        ("Keeper/SaveSnapshot", "operator"),
        ("KeeperPeer/Append", "keeper"),
        ("KeeperPeer/Propose", "keeper"),
        ("KeeperPeer/Join", "keeper"),
        ("KeeperPeer/Identify", "keeper"),
    ] {
        let allowed = CertificateRole::ALL.into_iter().filter(|&role| may(role, method));
        let allowed: Vec<&str> = allowed.map(CertificateRole::as_str).collect();
        assert_eq!(allowed.join(" "), who, "{method}");
    }
    let refusal = caller(Viewer, Some("bob")).admit("/carillon.v1.Keeper/PublishConfig").unwrap_err();
    let text = "viewer/bob may not call Keeper.PublishConfig: that needs the role operator or hub";
    assert_eq!(refusal.message(), text);
    let nobody = Caller::Nobody(SubjectError::NoRole).admit("/carillon.v1.Keeper/KeeperStatus").unwrap_err();
    assert_eq!(nobody.code(), Code::Unauthenticated);
}

#[test]
fn an_instance_is_spoken_for_by_its_own_role_and_name() {
    let record = |roles: &[&str]| v1::InstanceRecord {
        id: "one".to_owned(),
        roles: roles.iter().map(ToString::to_string).collect(),
        ..Default::default()
    };
    let (gateway, hub, both, none) =
        (record(&["gateway"]), record(&["registry", "center"]), record(&["gateway", "saver"]), record(&[]));
    let later = record(&["registry", "a-role-of-a-later-version"]);
    for (caller, allowed) in [
        (caller(Gateway, None), [true, false, false, false, false]),
        (caller(Gateway, Some("one")), [true, false, false, false, false]),
        (caller(Gateway, Some("two")), [false; 5]),
        (caller(Hub, None), [false, true, true, false, false]),
        (caller(Hub, Some("one")), [false, true, true, false, false]),
        (caller(Hub, Some("two")), [false; 5]),
        (caller(Operator, Some("alice")), [true; 5]),
        (caller(Viewer, None), [false; 5]),
        (caller(Keeper, None), [false; 5]),
        (Caller::Anyone, [true; 5]),
    ] {
        let checked = [&gateway, &hub, &later, &both, &none].map(|one| caller.check_instance(one).is_ok());
        assert_eq!(checked, allowed, "{caller}");
    }
    let text = |caller: Caller, record| caller.check_instance(record).unwrap_err().message().to_owned();
    assert_eq!(
        text(caller(Gateway, None), &hub),
        "gateway may not speak for instance one (registry, center): that needs the role hub"
    );
    assert_eq!(
        text(caller(Gateway, Some("two")), &gateway),
        "gateway/two may not speak for instance one (gateway): that needs a certificate of gateway/one, or of gateway"
    );
}

#[test]
fn a_hub_changes_revocations_and_nothing_else() {
    let checked = |role, document| caller(role, Some("x")).check_document(document).is_ok();
    assert!(
        checked(Hub, "revoked/demo") && checked(Operator, "revoked/demo") && checked(Operator, "app/demo")
    );
    assert!(!checked(Hub, "app/demo") && !checked(Hub, "hub") && !checked(Hub, "revokedx/demo"));
    assert!(!checked(Gateway, "revoked/demo") && !checked(Viewer, "revoked/demo"));
    let refusal = caller(Hub, None).check_document("gateway").unwrap_err();
    assert_eq!(refusal.message(), "hub may not change the document gateway: that needs the role operator");
}

#[test]
fn a_viewer_does_not_get_at_secrets_by_way_of_keys() {
    let viewer = caller(Viewer, None);
    for (key, prefix, allowed) in [
        ("mine/1", false, true),
        ("mine/", true, true),
        ("carillon/instances/", true, true),
        ("carillon/slots", false, true),
        ("carillon/applied/x", true, true),
        ("carillon/config/app/demo", false, false),
        ("carillon/history/", true, false),
        ("carillon/commands/", true, false),
        ("carillon/what-comes-later", false, false),
        ("carillon/", true, false),
        ("car", true, false),
        ("car", false, true),
        ("", true, false),
    ] {
        assert_eq!(viewer.check_keys(key, prefix).is_ok(), allowed, "{key} {prefix}");
        for role in [Operator, Gateway, Hub, Keeper] {
            assert!(caller(role, None).check_keys(key, prefix).is_ok(), "{role} {key}");
        }
    }
    assert!(!viewer.sees_secrets() && caller(Hub, None).sees_secrets());
}

#[test]
fn the_certificate_says_who_has_changed_something() {
    let author = |caller: Caller| caller.author("mallory".to_owned());
    assert_eq!(author(caller(Operator, Some("alice"))), "alice");
    // A certificate for all operators: who of them it is, they say themselves.
    assert_eq!(author(caller(Operator, None)), "mallory");
    assert_eq!(author(caller(Hub, None)), "hub");
    assert_eq!(author(caller(Hub, Some("hub-1"))), "hub-1");
    assert_eq!(author(Caller::Anyone), "mallory");
}
