use super::*;
use carillon_agent::app::TokenKey;
use serde_json::json;

const SECRET: &str = "a secret of at least thirty-two bytes";

fn apps() -> Apps {
    let demo = App { root: true, anonymous_devices: true, ..App::default() };
    let key = TokenKey { id: "k1".into(), algorithm: TokenAlgorithm::HS256, key: SECRET.into() };
    let shop = App { token_keys: vec![key], ..App::default() };
    [("demo".to_owned(), Arc::new(demo)), ("shop".to_owned(), Arc::new(shop))].into()
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
fn admit(connect: &Connect<'_>, apps: &Apps, leeway_seconds: u32) -> Result<Admitted, Refusal> {
    super::admit(connect, None, apps, leeway_seconds)
}

#[test]
fn a_token_names_app_and_user() {
    let token = token(&json!({"app": "shop", "sub": "alice", "exp": in_an_hour()}), SECRET);
    let admitted = admit(&connect("phone", Some("ignored"), Some(&token)), &apps(), 60).unwrap();
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
    let admitted = admit(&connect("phone", None, Some(&token(&claims, SECRET))), &apps(), 60).unwrap();
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
    let cases: Vec<(&str, Vec<u8>, u8, &str)> = vec![
        ("not a token", b"secret".to_vec(), 0x86, "not a token"),
        ("not utf-8", vec![0xff, 0xfe], 0x86, "not UTF-8"),
        ("wrong secret", token(&good, "another secret of thirty-two bytes!!"), 0x86, "InvalidSignature"),
        ("expired", with("exp", json!(1000)), 0x86, "ExpiredSignature"),
        ("not yet", with("nbf", json!(in_an_hour())), 0x86, "ImmatureSignature"),
        ("unknown app", with("app", json!("nope")), 0x87, "app is not known"),
        ("app without keys", with("app", json!("demo")), 0x86, "no key"),
        ("no app", token(&json!({"sub": "a", "exp": in_an_hour()}), SECRET), 0x86, "missing field `app`"),
        ("bad user", with("sub", json!("a/b")), 0x86, "sub may not contain"),
        ("bad filter", with("publish", json!(["a#"])), 0x86, "\"a#\" has a #"),
        ("other client id", with("client_id", json!("tablet")), 0x85, "another client id"),
    ];
    for (name, token, reason, text) in cases {
        let refusal = admit(&connect("phone", None, Some(&token)), &apps, 60).unwrap_err();
        assert_eq!(refusal.reason, reason, "{name}: {}", refusal.text);
        assert!(refusal.text.contains(text), "{name}: {}", refusal.text);
    }
}

#[test]
fn an_anonymous_device_is_its_user_name_or_its_client_id() {
    let apps = apps();
    let user = |c: &str, u| admit(&connect(c, u, None), &apps, 60).map(|admitted| admitted.user);
    assert_eq!(user("phone", Some("alice")).unwrap(), "alice");
    assert_eq!(user("phone/1", None).unwrap(), "phone_1");
    assert_eq!(user("$coordinator", None).unwrap(), "_coordinator");
    assert_eq!(user("x", Some("$coordinator")).unwrap_err().reason, 0x86);
    assert!(user("", None).unwrap().starts_with("auto-"));
    assert_eq!(user("phone", Some("a/b")).unwrap_err().reason, 0x86);
    let mut closed = apps.clone();
    closed.insert("demo".into(), Arc::new(App { root: true, ..App::default() }));
    assert_eq!(admit(&connect("phone", None, None), &closed, 60).unwrap_err().reason, 0x87);
    assert_eq!(admit(&connect("phone", None, None), &Apps::new(), 60).unwrap_err().reason, 0x88);
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
    let admitted =
        super::admit(&connect("phone", Some("mallory"), None), certificate(&app, "alice"), &apps, 60);
    let admitted = admitted.unwrap();
    assert_eq!((&*admitted.app, &*admitted.user, admitted.expires), (&*app, "alice", 4_000_000_000));
    for (app, user, reason) in [("nobody", "alice", 0x87), (&*app, "a/b", 0x86), (&*app, "$sys", 0x86)] {
        let refusal =
            super::admit(&connect("phone", None, None), certificate(app, user), &apps, 60).unwrap_err();
        assert_eq!(refusal.reason, reason, "{}", refusal.text);
    }
    // A token, if there is one, decides.
    let refusal =
        super::admit(&connect("phone", None, Some(b"no token")), certificate(&app, "alice"), &apps, 60)
            .unwrap_err();
    assert_eq!(refusal.reason, 0x86);
}
