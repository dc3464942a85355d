//! The authority over years: everyone trusts everyone at each time, and nothing is written when nothing is due.

use super::*;

const START: i64 = 1_800_000_000;
const ROLES: [CertificateRole; 3] =
    [CertificateRole::Keeper, CertificateRole::Hub, CertificateRole::Operator];

/// What a pod has mounted: its certificate, and whom it trusts.
#[derive(Clone, PartialEq, Debug)]
struct Mounted {
    pair: Pair,
    bundle: String,
}

fn names(role: CertificateRole) -> Vec<String> {
    if role == CertificateRole::Keeper { vec!["*.peers.push.svc".to_owned()] } else { Vec::new() }
}

/// One pass of the operator.
fn pass(authority: Option<Authority>, held: &[Option<Mounted>], now: i64) -> (Authority, Vec<Mounted>) {
    let authority = authority.map(|authority| Authority::read(&authority.write()).expect("readable"));
    let authority = Authority::as_of(authority, None, "chat", now).unwrap();
    let mounted = ROLES.iter().zip(held).map(|(&role, held)| {
        let held = held.as_ref().map(|held| held.pair.clone());
        let pair = authority.certificate(role, &names(role), held, now).unwrap();
        Mounted { pair, bundle: authority.bundle() }
    });
    let mounted = mounted.collect();
    (authority, mounted)
}

/// Does `who` take `other`'s certificate at that time?
fn trusts(who: &Mounted, other: &Mounted, now: i64) -> bool {
    let der = first_der(&other.pair.certificate).unwrap();
    let (_, certificate) = X509Certificate::from_der(&der).unwrap();
    let valid = |certificate: &X509Certificate<'_>| {
        let validity = certificate.validity();
        (validity.not_before.timestamp()..=validity.not_after.timestamp()).contains(&now)
    };
    let authorities =
        who.bundle.split_inclusive("-----END CERTIFICATE-----\n").map(|pem| first_der(pem).unwrap());
    valid(&certificate)
        && authorities.into_iter().any(|der| {
            let (_, authority) = X509Certificate::from_der(&der).unwrap();
            valid(&authority) && authority.subject().as_raw() == certificate.issuer().as_raw()
        })
}

#[test]
fn everyone_trusts_everyone_over_years_though_files_come_late() {
    let (mut authority, mut secrets) = pass(None, &[None, None, None], START);
    let first = authority.clone();
    let mut pods = secrets.clone();
    let (mut now, mut renewals, mut authorities, mut step) = (START, 0, 1, 0);
    while now < START + 5 * 365 * DAY {
        let moving = authority.next.is_some() || authority.previous.is_some();
        now += if moving { 600 } else { 7 * 3600 };
        step += 1;
        // A pod has what was there a pass or two before; some have the newest, others not.
        for place in 0..pods.len() {
            if (step + place) % 2 == 0 {
                pods[place] = secrets[place].clone();
            }
        }
        let held: Vec<Option<Mounted>> = secrets.iter().cloned().map(Some).collect();
        let (then, written) = pass(Some(authority.clone()), &held, now);
        for (one, i) in pods.iter().zip(0..) {
            for (other, j) in pods.iter().zip(0..) {
                assert!(trusts(one, other, now), "{i} does not trust {j} {} s on", now - START);
            }
        }
        authorities += i32::from(then.current != authority.current);
        renewals += i32::from(written[0].pair != secrets[0].pair);
        (authority, secrets) = (then, written);
    }
    assert_eq!(authorities, 3, "after two years, and after four");
    assert!((28..=36).contains(&renewals), "every sixty days: {renewals}");
    assert!(
        !authority.bundle().contains(first.current.certificate.as_str()),
        "the first is not trusted any more"
    );
}

#[test]
fn nothing_changes_until_something_is_due() {
    let (authority, mounted) = pass(None, &[None, None, None], START);
    for later in [0, 1, DAY, 59 * DAY] {
        let held: Vec<Option<Mounted>> = mounted.iter().cloned().map(Some).collect();
        let (same, unchanged) = pass(Some(authority.clone()), &held, START + later);
        assert!(same == authority && unchanged == mounted, "{later} s on");
    }
}

#[test]
fn a_certificate_that_is_not_as_it_should_be_is_made_anew() {
    let (authority, mounted) = pass(None, &[None, None, None], START);
    let (keeper, hub) = (mounted[0].pair.clone(), mounted[1].pair.clone());
    let good = |held: Pair, role, names: &[String], now| {
        authority.certificate(role, names, Some(held.clone()), now).unwrap() == held
    };
    let role = CertificateRole::Keeper;
    assert!(good(keeper.clone(), role, &names(role), START));
    assert!(!good(keeper.clone(), role, &["other.push.svc".to_owned()], START), "other names");
    assert!(!good(hub.clone(), role, &names(role), START), "another role");
    assert!(!good(keeper.clone(), role, &names(role), START + 61 * DAY), "two thirds of its time are over");
    let stolen = Pair { certificate: keeper.certificate.clone(), key: hub.key };
    assert!(!good(stolen, role, &names(role), START), "another's key");
    let (other, _) = pass(None, &[None, None, None], START);
    let foreign = other.certificate(role, &names(role), None, START).unwrap();
    assert!(!good(foreign, role, &names(role), START), "another authority's");
    let nonsense = Pair { certificate: "x".to_owned(), key: "y".to_owned() };
    assert!(!good(nonsense, role, &names(role), START));
}

#[test]
fn an_authority_that_was_lost_stays_trusted_for_a_day() {
    let (lost, held) = pass(None, &[None, None, None], START);
    let authority = Authority::as_of(None, Some(held[0].bundle.clone()), "chat", START + DAY).unwrap();
    assert!(authority.bundle().contains(&lost.current.certificate));
    let later = Authority::as_of(Some(authority), None, "chat", START + 2 * DAY).unwrap();
    assert!(!later.bundle().contains(&lost.current.certificate));
    // One that has expired while nobody looked is not waited for.
    let far = START + AUTHORITY_SECONDS + DAY;
    let new = Authority::as_of(Some(lost.clone()), None, "chat", far).unwrap();
    assert_ne!(new.current, lost.current);
    assert_eq!(new.bundle(), new.current.certificate);
    let damaged =
        BTreeMap::from([("tls.crt".to_owned(), "x".to_owned()), ("tls.key".to_owned(), "y".to_owned())]);
    assert_eq!(Authority::read(&damaged), None);
}
