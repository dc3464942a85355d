use super::*;
use carillon_agent::app::{TokenAlgorithm, TokenKey};
use carillon_agent::revoked::Revoked;
use jsonwebtoken::Algorithm;
use serde_json::json;

const SECRET: &str = "a secret of at least thirty-two bytes";

fn apps() -> Apps {
    let demo = App { root: true, anonymous_devices: true, ..App::default() };
    let key = TokenKey { id: "k1".into(), algorithm: TokenAlgorithm::HS256, key: SECRET.into() };
    let shop = App { token_keys: vec![key], ..App::default() };
    [("demo".to_owned(), Arc::new(demo)), ("shop".to_owned(), Arc::new(shop))].into()
}

fn keyring(apps: &Apps) -> Keyring {
    Keyring::default().next(apps, &BTreeMap::new())
}

fn connect<'a>(client_id: &'a str, username: Option<&'a str>, password: Option<&'a [u8]>) -> Connect<'a> {
    Connect {
        version: crate::codec::Version::V5,
        clean_start: true,
        keep_alive: 0,
        client_id,
        username,
        password,
        will: None,
        session_expiry: 0,
        receive_maximum: 10,
        maximum_packet_size: None,
        topic_alias_maximum: 0,
        request_response_information: false,
        request_problem_information: true,
        user_properties: Default::default(),
        authentication_method: None,
        authentication_data: None,
    }
}

fn token(claims: &serde_json::Value, secret: &str) -> Vec<u8> {
    let key = jsonwebtoken::EncodingKey::from_secret(secret.as_bytes());
    let mut header = jsonwebtoken::Header::new(Algorithm::HS256);
    header.kid = Some("k1".into());
    jsonwebtoken::encode(&header, claims, &key).unwrap().into_bytes()
}

fn in_an_hour() -> u64 {
    carillon_proto::now_ms() / 1000 + 3600
}

/// A device without a certificate.
fn admit(
    connect: &Connect<'_>,
    apps: &Apps,
    keyring: &Keyring,
    leeway_seconds: u32,
) -> Result<Admitted, Refusal> {
    super::admit(connect, None, apps, keyring, leeway_seconds)
}

#[test]
fn a_token_names_app_and_user() {
    let token = token(&json!({"app": "shop", "sub": "alice", "exp": in_an_hour()}), SECRET);
    let admitted =
        admit(&connect("phone", Some("ignored"), Some(&token)), &apps(), &keyring(&apps()), 60).unwrap();
    assert_eq!(
        (&*admitted.app, admitted.user.as_str(), admitted.client_id.as_str()),
        ("shop", "alice", "phone")
    );
    assert!(!admitted.is_root);
    let app = &apps()["shop"];
    let rights = admitted.rights.as_deref();
    assert!(may_subscribe(app, rights, "alice", "u/alice") && !may_subscribe(app, rights, "alice", "u/bob"));
    assert!(may_publish(app, rights, "alice", "up/x") && !may_publish(app, rights, "alice", "u/alice"));
}

#[test]
fn a_token_may_say_what_its_device_may_do() {
    let claims = json!({"app": "shop", "sub": "alice", "exp": in_an_hour(), "publish": ["from/{user}/#"]});
    let admitted =
        admit(&connect("phone", None, Some(&token(&claims, SECRET))), &apps(), &keyring(&apps()), 60)
            .unwrap();
    let (app, rights) = (&apps()["shop"], admitted.rights.as_deref());
    assert!(may_publish(app, rights, "alice", "from/alice/x") && !may_publish(app, rights, "alice", "up/x"));
    assert!(may_subscribe(app, rights, "alice", "u/alice"));
}

#[test]
fn bad_tokens_are_refused_with_what_is_wrong() {
    let apps = apps();
    let good = json!({"app": "shop", "sub": "alice", "exp": in_an_hour()});
    let with = |field: &str, value: serde_json::Value| {
        let mut claims = good.clone();
        claims[field] = value;
        token(&claims, SECRET)
    };
    use Failure::*;
    let cases: Vec<(&str, Vec<u8>, u8, Failure, &str)> = vec![
        ("not a token", b"secret".to_vec(), 0x86, Malformed, "not a token"),
        ("not utf-8", vec![0xff, 0xfe], 0x86, Malformed, "not UTF-8"),
        (
            "wrong secret",
            token(&good, "another secret of thirty-two bytes!!"),
            0x86,
            Signature,
            "InvalidSignature",
        ),
        ("expired", with("exp", json!(1000)), 0x86, Expired, "ExpiredSignature"),
        ("not yet", with("nbf", json!(in_an_hour())), 0x86, Expired, "ImmatureSignature"),
        ("unknown app", with("app", json!("nope")), 0x87, UnknownApp, "app is not known"),
        ("app without keys", with("app", json!("demo")), 0x86, Signature, "no key"),
        (
            "no app",
            token(&json!({"sub": "a", "exp": in_an_hour()}), SECRET),
            0x86,
            Malformed,
            "missing field `app`",
        ),
        ("bad user", with("sub", json!("a/b")), 0x86, Malformed, "sub may not contain"),
        ("bad filter", with("publish", json!(["a#"])), 0x86, Malformed, "\"a#\" has a #"),
        ("other client id", with("client_id", json!("tablet")), 0x85, Mismatch, "another client id"),
    ];
    for (name, token, reason, failure, text) in cases {
        let refusal = admit(&connect("phone", None, Some(&token)), &apps, &keyring(&apps), 60).unwrap_err();
        assert_eq!((refusal.reason, refusal.failure), (reason, Some(failure)), "{name}: {}", refusal.text);
        assert!(refusal.text.contains(text), "{name}: {}", refusal.text);
    }
}

#[test]
fn a_revoked_token_is_refused_and_a_later_one_is_not() {
    let apps = apps();
    let revoked = |yaml: &str| {
        let document = carillon_agent::document::parse::<Revoked>(Some("shop"), yaml).unwrap();
        BTreeMap::from([("shop".to_owned(), Arc::new(document))])
    };
    let before = keyring(&apps);
    let keyring = before.next(&apps, &revoked("{users: {alice: {before: 1000}}, tokens: {t1: 0}}"));
    assert_eq!(keyring.revoked_since(&before), ["shop"]);
    assert!(keyring.next(&apps, &revoked("{}")).revoked_since(&keyring) == ["shop"]);
    for (extra, is_refused) in [
        (json!({}), true),
        (json!({"iat": 999}), true),
        (json!({"iat": 1000}), false),
        (json!({"iat": 1000, "jti": "t1"}), true),
        (json!({"iat": 1000, "jti": "t2"}), false),
        (json!({"sub": "bob"}), false),
    ] {
        let mut claims = json!({"app": "shop", "sub": "alice", "exp": in_an_hour()});
        claims.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        let token = token(&claims, SECRET);
        let refused = admit(&connect("phone", None, Some(&token)), &apps, &keyring, 60).err();
        let expected = is_refused.then_some((reason::NOT_AUTHORIZED, Some(Failure::Revoked)));
        assert_eq!(refused.map(|refusal| (refusal.reason, refusal.failure)), expected, "{extra}");
    }
}

#[test]
fn keys_rotate_with_their_app() {
    let apps = apps();
    let first = keyring(&apps);
    let claims = json!({"app": "shop", "sub": "alice", "exp": in_an_hour()});
    let token = |secret: &str| token(&claims, secret);
    let (old, new) = (token(SECRET), token("another secret of thirty-two bytes!!"));
    let is_admitted = |apps: &Apps, keyring: &Keyring, token: &[u8]| {
        admit(&connect("phone", None, Some(token)), apps, keyring, 60).is_ok()
    };
    assert!(is_admitted(&apps, &first, &old) && !is_admitted(&apps, &first, &new));
    let mut rotated = apps.clone();
    let key = TokenKey {
        id: "k1".into(),
        algorithm: TokenAlgorithm::HS256,
        key: "another secret of thirty-two bytes!!".into(),
    };
    rotated.insert("shop".into(), Arc::new(App { token_keys: vec![key], ..App::default() }));
    let second = first.next(&rotated, &BTreeMap::new());
    assert!(!is_admitted(&rotated, &second, &old) && is_admitted(&rotated, &second, &new));
}

#[test]
fn an_anonymous_device_is_its_user_name_or_its_client_id() {
    let apps = apps();
    let user = |c: &str, u| {
        admit(&connect(c, u, None), &apps, &Keyring::default(), 60).map(|admitted| admitted.user)
    };
    assert_eq!(user("phone", Some("alice")).unwrap(), "alice");
    assert_eq!(user("phone/1", None).unwrap(), "phone_1");
    assert_eq!(user("$coordinator", None).unwrap(), "_coordinator");
    assert_eq!(user("x", Some("$coordinator")).unwrap_err().reason, 0x86);
    assert!(user("", None).unwrap().starts_with("auto-"));
    assert_eq!(user("phone", Some("a/b")).unwrap_err().reason, 0x86);
    let mut closed = apps.clone();
    closed.insert("demo".into(), Arc::new(App { root: true, ..App::default() }));
    assert_eq!(
        admit(&connect("phone", None, None), &closed, &Keyring::default(), 60).unwrap_err().reason,
        0x87
    );
    assert_eq!(
        admit(&connect("phone", None, None), &Apps::new(), &Keyring::default(), 60).unwrap_err().reason,
        0x88
    );
}

#[test]
fn a_subscription_must_be_covered_wholly() {
    for (allowed, filter, expected) in [
        ("#", "#", true),
        ("#", "a/+/b", true),
        ("a/#", "a", true),
        ("a/#", "#", false),
        ("a/#", "+/b", false),
        ("a/+", "a/+", true),
        ("a/+", "a/#", false),
        ("a/b", "a/+", false),
        ("a/+/c", "a/b/c", true),
        ("a/+", "a", false),
    ] {
        assert_eq!(covers(allowed, filter), expected, "{allowed} covers {filter}");
    }
}

#[test]
fn topics_of_the_root_app_may_leave_it_out() {
    assert_eq!(resolve("demo", true, "hello"), Some(("demo/hello".into(), true)));
    assert_eq!(resolve("demo", true, "demo/hello"), Some(("demo/hello".into(), false)));
    assert_eq!(resolve("shop", false, "hello"), None);
}

#[test]
fn a_certificate_names_the_user() {
    let apps = apps();
    let app = apps.keys().next().unwrap().clone();
    let certificate = |app: &str, user: &str| {
        Some(CertificateUser { app: app.to_owned(), user: user.to_owned(), not_after: 4_000_000_000 })
    };
    let admitted = super::admit(
        &connect("phone", Some("mallory"), None),
        certificate(&app, "alice"),
        &apps,
        &keyring(&apps),
        60,
    );
    let admitted = admitted.unwrap();
    assert_eq!((&*admitted.app, &*admitted.user, admitted.expires), (&*app, "alice", 4_000_000_000));
    for (app, user, reason) in [("nobody", "alice", 0x87), (&*app, "a/b", 0x86), (&*app, "$sys", 0x86)] {
        let refusal =
            super::admit(&connect("phone", None, None), certificate(app, user), &apps, &keyring(&apps), 60)
                .unwrap_err();
        assert_eq!(refusal.reason, reason, "{}", refusal.text);
    }
    // A token, if there is one, decides.
    let refusal = super::admit(
        &connect("phone", None, Some(b"no token")),
        certificate(&app, "alice"),
        &apps,
        &keyring(&apps),
        60,
    )
    .unwrap_err();
    assert_eq!(refusal.reason, 0x86);
}

/// Public keys, and tokens of alice in shop that expire in 2100, signed once by their private halves.
const SIGNED: [(TokenAlgorithm, &str, &str); 3] = [
    (
        TokenAlgorithm::RS256,
        "-----BEGIN PUBLIC KEY-----\nMIIBIjANBgkqhkiG9w0BAQEFAAOCAQ8AMIIBCgKCAQEAr20D8lE8LNK5/vm8SlXC\ns6RoMdyYLO0zh2Gd92oSUkKorodpKb3uej+4n+UBDd8K/4087vpBkY8lV/I6QzYm\nvlZRsp4pySg/JixRJG1CO4E+HTOiINk7PlHLgmL4A1zsuVXSMl0aUI5W8wMEpWuN\nT/YwwCd2D4zjP/gn7CX1D840oE1GSWIyecT7t0mWpQ87e16a9pT3MGihvmtvQxTi\n+dOQDNcT4zJ5o+xaMJU5ZgErPdO40CMnZ5agliESg6F0a5mu4+x27yLgoKKZpa2h\n8rS4xh+Zs9uN+rnGy0tg2OVD6jmqJovDr782NR67Si1DpZ+WvbROvkwvhsV6gbXo\nOQIDAQAB\n-----END PUBLIC KEY-----\n",
        "eyJhbGciOiJSUzI1NiIsInR5cCI6IkpXVCJ9.eyJhcHAiOiJzaG9wIiwic3ViIjoiYWxpY2UiLCJleHAiOjQxMDI0NDQ4MDB9.pns5CHXNCGYLxUk6DH39ygQZfg1Y-PVNcryTiEL7Eo3WgSp_aKfBCpizyJteRFKBZhAf8GWXgUJ3FWvWedoVgiSZhWIrRGyuzoAA61QOHYjqPTDW2jERdcKKfptSwppmN-iVMCt6DiXH9V6yqxqZhjV806-M_pIWUcyMe0FtpzHYofE01BbN-fLswx5yDoCiMIuYBM9QEZw_vo1zBn3VYBsVha-U6TpWjwZXihD5c6_4GOa_sHSKiHmysnhuPhrLEEl1ScBL_z_yHUZZRaWdS--2_yxBDVZBg5NfH10DvWUHq89FtpMjTqhBxj5iV3K4zPDww7oOW00e-nsYsHyPtA",
    ),
    (
        TokenAlgorithm::ES256,
        "-----BEGIN PUBLIC KEY-----\nMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAErmsN0tkMvgZGlWcyg0Sax+ActVsv\nP9Q9PNL2xApfilnTTJdjEZzcH4vGR97TU1Ds6FIMVLFO+1tSzydTY6bYHg==\n-----END PUBLIC KEY-----\n",
        "eyJhbGciOiJFUzI1NiIsInR5cCI6IkpXVCJ9.eyJhcHAiOiJzaG9wIiwic3ViIjoiYWxpY2UiLCJleHAiOjQxMDI0NDQ4MDB9.sf2WAltiYfahh4yfnF9MXy2nVAA2-nN0SSbWEgB4DpBWQAt5DAVVWYYPaTBkWPbH5bao9fPbSYwNAsl3rdpoRw",
    ),
    (
        TokenAlgorithm::EdDSA,
        "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEACRTZPnSfcWzU0xsnVr9MTV5eIL/Gf7kQr7wkYWkmMfA=\n-----END PUBLIC KEY-----\n",
        "eyJhbGciOiJFZERTQSIsInR5cCI6IkpXVCJ9.eyJhcHAiOiJzaG9wIiwic3ViIjoiYWxpY2UiLCJleHAiOjQxMDI0NDQ4MDB9.iRLcMejKmWKGKgjgQuHIulAWUE7cRJEINIMgksO7tBugTWfIqs72BbUJFneS6d5RKdN3EgNv4WFNTcZovSjQBQ",
    ),
];

#[test]
fn tokens_of_every_algorithm_are_checked_with_public_keys() {
    for (algorithm, key, token) in SIGNED {
        let key = TokenKey { id: "k".into(), algorithm, key: key.into() };
        let shop = App { token_keys: vec![key], ..App::default() };
        let apps: Apps = [("shop".to_owned(), Arc::new(shop))].into();
        let keyring = keyring(&apps);
        let admitted = admit(&connect("phone", None, Some(token.as_bytes())), &apps, &keyring, 60).unwrap();
        assert_eq!((&*admitted.app, admitted.user.as_str()), ("shop", "alice"), "{algorithm:?}");
        // Another signature of the same length.
        let at = token.len() - 10;
        let other = if &token[at..=at] == "A" { "B" } else { "A" };
        let forged = format!("{}{other}{}", &token[..at], &token[at + 1..]);
        let refusal =
            admit(&connect("phone", None, Some(forged.as_bytes())), &apps, &keyring, 60).unwrap_err();
        assert_eq!(refusal.failure, Some(Failure::Signature), "{algorithm:?}");
    }
    let [(_, key, _), ..] = SIGNED;
    let shop = App {
        token_keys: vec![TokenKey { id: "k1".into(), algorithm: TokenAlgorithm::RS256, key: key.into() }],
        ..App::default()
    };
    let apps: Apps = [("shop".to_owned(), Arc::new(shop))].into();
    let confused = token(&json!({"app": "shop", "sub": "alice", "exp": in_an_hour()}), key);
    let refusal = admit(&connect("phone", None, Some(&confused)), &apps, &keyring(&apps), 60).unwrap_err();
    assert_eq!(refusal.failure, Some(Failure::Signature), "the key says which algorithm, not the token");
}
