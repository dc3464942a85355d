//! Keepers over TLS: who is let in, what each role may, whose name is in the history, and certificates that are renewed or end
//! while everything runs.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use carillon_agent::admin::{Admin, AdminError, ChangeOptions, Protection};
use carillon_agent::app::App;
use carillon_agent::document::DocumentKind;
use carillon_agent::revoked::Revoked;
use carillon_agent::tls::{Tls, TlsFiles};
use carillon_agent::{Agent, Instance, Options, Role, tls};
use carillon_keeper::{Keeper, KeeperError, KeeperHandle, KeeperOptions};
use carillon_proto::v1;
use carillon_proto::v1::keeper_client::KeeperClient;
use carillon_proto::v1::keeper_peer_client::KeeperPeerClient;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType,
};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

/// Generous: the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(60);
const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);

/// An authority, and the files of those whom it has signed.
struct Authority {
    dir: TempDir,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Authority {
        let dir = TempDir::new().unwrap();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // A name of its own, or else another one's signature would be looked for under it.
        let name = dir.path().to_string_lossy().into_owned();
        params.distinguished_name.push(DnType::CommonName, name);
        replace(&dir.path().join("ca.crt"), &params.self_signed(&key).unwrap().pem());
        Authority { dir, issuer: Issuer::new(params, key) }
    }

    /// A certificate for `carillon://{uri}`, or for nobody, that ends so long from now, or ended so long ago.
    fn write(&self, file: &str, uri: Option<&str>, ends: SystemTime) -> TlsFiles {
        let names = ["localhost", "127.0.0.1", "127.0.9.1", "127.0.9.2", "127.0.9.3"];
        let mut params = CertificateParams::new(names.map(str::to_owned).to_vec()).unwrap();
        let uri = uri.map(|uri| SanType::URI(format!("carillon://{uri}").try_into().unwrap()));
        params.subject_alt_names.extend(uri);
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.not_before = (SystemTime::now() - YEAR).into();
        params.not_after = ends.into();
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let at = |end: &str| self.dir.path().join(format!("{file}.{end}"));
        replace(&at("key"), &key.serialize_pem());
        replace(&at("crt"), &certificate.pem());
        TlsFiles { authorities: self.dir.path().join("ca.crt"), certificate: at("crt"), key: at("key") }
    }

    fn tls(&self, uri: &str) -> Arc<Tls> {
        let file = uri.replace('/', "-");
        Tls::open(self.write(&file, Some(uri), SystemTime::now() + YEAR)).unwrap()
    }
}

/// As a whole, like a mounted secret.
fn replace(path: &Path, text: &str) {
    let new = path.with_extension("new");
    std::fs::write(&new, text).unwrap();
    std::fs::rename(new, path).unwrap();
}

async fn options(dir: &Path, address: &str, tls: Option<Arc<Tls>>) -> KeeperOptions {
    let listener = TcpListener::bind(address).await.unwrap();
    let kinds = vec![DocumentKind::of::<Revoked>(), DocumentKind::of::<App>()];
    let mut options = KeeperOptions::new(dir, listener, kinds);
    options.tls = tls;
    options
}

/// One that is alone, on a directory that lives as long as it is held.
async fn keeper(authority: &Authority) -> (KeeperHandle, TempDir) {
    let dir = TempDir::new().unwrap();
    let options = options(dir.path(), "127.0.0.1:0", Some(authority.tls("keeper"))).await;
    (Keeper::start(options).await.unwrap(), dir)
}

async fn channel(url: &str, tls: Option<&Arc<Tls>>) -> Result<Channel, String> {
    let endpoint = Endpoint::from_shared(url.to_owned()).unwrap().connect_timeout(Duration::from_secs(20));
    tls::connect(&endpoint, tls).await
}

async fn client(keeper: &KeeperHandle, tls: &Arc<Tls>) -> KeeperClient<Channel> {
    KeeperClient::new(channel(&keeper.endpoint(), Some(tls)).await.unwrap())
}

fn record(id: &str, roles: &[Role]) -> v1::InstanceRecord {
    v1::InstanceRecord {
        id: id.to_owned(),
        incarnation: 1,
        roles: roles.iter().map(ToString::to_string).collect(),
        ..Default::default()
    }
}

async fn register(
    client: &mut KeeperClient<Channel>,
    id: &str,
    roles: &[Role],
    incarnation: u64,
) -> Result<u64, Status> {
    let instance = v1::InstanceRecord { incarnation, ..record(id, roles) };
    let request = v1::RegisterRequest { instance: Some(instance), ttl_ms: 60_000 };
    client.register(request).await.map(|answer| answer.into_inner().lease)
}

fn publish(document: &str, yaml: &str, author: &str) -> v1::PublishConfigRequest {
    v1::PublishConfigRequest {
        document: document.to_owned(),
        change: Some(v1::publish_config_request::Change::Yaml(yaml.to_owned())),
        author: author.to_owned(),
        ..Default::default()
    }
}

#[track_caller]
fn denied<T: std::fmt::Debug>(outcome: Result<T, Status>, expected: &str) {
    let status = outcome.expect_err("it is refused");
    assert_eq!((status.code(), status.message()), (Code::PermissionDenied, expected));
}

async fn until(what: &str, mut is_so: impl AsyncFnMut() -> Result<(), String>) {
    let begun = Instant::now();
    while let Err(reason) = is_so().await {
        assert!(begun.elapsed() < PATIENCE, "{what}: {reason}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn three_keepers_and_their_agents_find_each_other_over_tls() {
    let authority = Authority::new();
    let dir = TempDir::new().unwrap();
    let mut started = Vec::new();
    for place in 1..=3 {
        let tls = authority.tls(&format!("keeper/{place}"));
        let dir = dir.path().join(place.to_string());
        started.push(options(&dir, &format!("127.0.9.{place}:0"), Some(tls)).await);
    }
    let peers: Vec<String> =
        started.iter().map(|options| options.listener.local_addr().unwrap().to_string()).collect();
    let mut keepers = Vec::new();
    for mut options in started {
        options.peers.clone_from(&peers);
        keepers.push(Keeper::start(options).await.unwrap());
    }
    let urls: Vec<String> = keepers.iter().map(KeeperHandle::endpoint).collect();
    assert!(urls.iter().all(|url| url.starts_with("https://")), "{urls:?}");
    let admin = Admin::secured(urls.clone(), Some(authority.tls("operator/alice")));
    let settled = async || match admin.members().await {
        Ok(members) if members.len() == 3 && members.iter().all(|member| member.voter) => Ok(()),
        other => Err(format!("{other:?}")),
    };
    until("three keepers with a vote", settled).await;
    assert_eq!(admin.status().await.unwrap().protection, Protection::Tls);

    // Told of one keeper, so that the others are learned with the right scheme.
    let agent =
        Agent::start(Options::new(vec![urls[0].clone()]).with_tls(Some(authority.tls("gateway/edge-1"))));
    let mut instance = Instance::new("edge-1").with_address("mqtt", "10.0.0.1:1883");
    instance.roles = vec![Role::Gateway];
    agent.register(instance);
    let apps = agent.configs::<App>();
    let options = ChangeOptions { author: "mallory".to_owned(), ..ChangeOptions::default() };
    let revision = admin.publish("app/demo", "root: true", options).await.unwrap();
    assert_eq!(revision.author, "alice", "a name that is only claimed");
    until("the agent has the document", async || {
        let known = apps.borrow().contains_key("demo");
        if known { Ok(()) } else { Err("not yet".to_owned()) }
    })
    .await;
    until("the instance is there", async || match admin.live().await {
        Ok(live) if live.len() == 1 => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;

    // All goes on by way of the others, with another leader.
    let lost = keepers.iter().position(|keeper| keeper.status().leads).unwrap();
    keepers.remove(lost).stop().await;
    let changed = async || {
        let options = ChangeOptions::default();
        let sets = vec![("anonymous_devices".to_owned(), Some("true".to_owned()))];
        admin.set("app/demo", sets, options).await.map(drop).map_err(|error| error.to_string())
    };
    until("the document is changed", changed).await;
    until("the agent has the change", async || {
        let known = apps.borrow().get("demo").is_some_and(|app| app.anonymous_devices);
        if known { Ok(()) } else { Err("not yet".to_owned()) }
    })
    .await;
    agent.stop().await;
    for keeper in keepers {
        keeper.stop().await;
    }
}

#[tokio::test]
async fn each_role_may_what_is_its_own() {
    let authority = Authority::new();
    let (keeper, _dir) = keeper(&authority).await;
    let mut operator = client(&keeper, &authority.tls("operator")).await;
    let mut viewer = client(&keeper, &authority.tls("viewer/bob")).await;
    let mut gateway = client(&keeper, &authority.tls("gateway/edge-1")).await;
    let mut gateways = client(&keeper, &authority.tls("gateway")).await;
    let mut hub = client(&keeper, &authority.tls("hub/hub-1")).await;
    let hub_roles = [Role::Registry, Role::Center];

    // Instances: of one's own role, under one's own name.
    let edge = register(&mut gateway, "edge-1", &[Role::Gateway], 1).await.unwrap();
    let lease = register(&mut hub, "hub-1", &hub_roles, 1).await.unwrap();
    denied(
        register(&mut gateway, "edge-2", &[Role::Gateway], 1).await,
        "gateway/edge-1 may not speak for instance edge-2 (gateway): that needs a certificate of gateway/edge-2, or of gateway",
    );
    denied(
        register(&mut gateways, "hub-2", &hub_roles, 1).await,
        "gateway may not speak for instance hub-2 (registry, center): that needs the role hub",
    );
    // Not even one that calls itself a gateway may take the place of a hub.
    denied(
        register(&mut gateways, "hub-1", &[Role::Gateway], 2).await,
        "gateway may not speak for instance hub-1 (registry, center): that needs the role hub",
    );
    denied(
        register(&mut viewer, "edge-3", &[Role::Gateway], 1).await,
        "viewer/bob may not call Keeper.Register: that needs the role operator or gateway or hub",
    );
    register(&mut gateways, "edge-2", &[Role::Gateway], 1).await.unwrap();
    register(&mut operator, "mixed", &[Role::Gateway, Role::Saver], 1).await.unwrap();

    // Leases: those of one's own instances.
    let keep = |lease| v1::LeaseKeepAliveRequest { lease, load: [("cpu".to_owned(), 0.5)].into() };
    gateway.lease_keep_alive(keep(edge)).await.unwrap();
    gateways.lease_keep_alive(keep(edge)).await.unwrap();
    denied(
        gateway.lease_keep_alive(keep(lease)).await,
        "gateway/edge-1 may not speak for instance hub-1 (registry, center): that needs the role hub",
    );
    denied(
        hub.lease_revoke(v1::LeaseRevokeRequest { lease: edge }).await,
        "hub/hub-1 may not speak for instance edge-1 (gateway): that needs the role gateway",
    );
    let granted = operator.lease_grant(v1::LeaseGrantRequest { ttl_ms: 60_000 }).await.unwrap().into_inner();
    let touched = hub.lease_keep_alive(keep(granted.lease)).await.unwrap_err();
    assert!(touched.message().starts_with("hub/hub-1 may not touch the lease "), "{touched}");
    assert_eq!(gateway.lease_keep_alive(keep(4711)).await.unwrap_err().code(), Code::NotFound);

    // Reports: under one's own lease, about oneself.
    let report = |lease, instance: &str| v1::ReportConfigRequest {
        lease,
        applied: vec![v1::AppliedConfig {
            instance: instance.to_owned(),
            document: "app/demo".to_owned(),
            applied_revision: 1,
            ..Default::default()
        }],
    };
    gateway.report_config(report(edge, "edge-1")).await.unwrap();
    denied(
        gateway.report_config(report(edge, "hub-1")).await,
        "gateway/edge-1 may not report for hub-1: the lease is another instance's",
    );

    // Documents: an operator all, a hub revocations.
    let accepted = |answer: Result<tonic::Response<v1::PublishConfigResponse>, Status>| match answer
        .unwrap()
        .into_inner()
        .outcome
    {
        Some(v1::publish_config_response::Outcome::Accepted(revision)) => revision.author,
        other => panic!("{other:?}"),
    };
    let author = accepted(operator.publish_config(publish("app/demo", "root: true", "carol")).await);
    assert_eq!(author, "carol", "a certificate for all operators names nobody");
    let author =
        accepted(hub.publish_config(publish("revoked/demo", "users: {}\ntokens: {a: 0}", "x")).await);
    assert_eq!(author, "hub-1");
    denied(
        hub.publish_config(publish("app/demo", "root: false", "alice")).await,
        "hub/hub-1 may not change the document app/demo: that needs the role operator",
    );
    for client in [&mut viewer, &mut gateway] {
        let status = client.publish_config(publish("revoked/demo", "{}", "")).await.unwrap_err();
        assert_eq!(status.code(), Code::PermissionDenied, "{status}");
    }

    // Commands: sent by operators, answered by whom they are for.
    let send = v1::SendCommandRequest {
        instance: "edge-1".to_owned(),
        name: "sing".to_owned(),
        timeout_ms: 500,
        ..Default::default()
    };
    denied(
        hub.send_command(send.clone()).await,
        "hub/hub-1 may not call Keeper.SendCommand: that needs the role operator",
    );
    let command = operator.send_command(send).await.unwrap().into_inner().command.unwrap();
    let answer = v1::AnswerCommandRequest {
        instance: "edge-1".to_owned(),
        id: command.id.clone(),
        state: v1::CommandState::CommandDone.into(),
        output: String::new(),
    };
    denied(
        hub.answer_command(answer.clone()).await,
        "hub/hub-1 may not speak for instance edge-1 (gateway): that needs the role gateway",
    );
    // Its time is over, which says that it was looked at.
    assert_eq!(gateway.answer_command(answer).await.unwrap_err().code(), Code::FailedPrecondition);

    // Reading: everyone, but a viewer no secrets.
    let range = |key: &str| v1::RangeRequest { key: key.to_owned(), prefix: true, ..Default::default() };
    for client in [&mut viewer, &mut gateway, &mut hub, &mut operator] {
        client.list_instances(v1::ListInstancesRequest {}).await.unwrap();
        client.keeper_status(v1::KeeperStatusRequest {}).await.unwrap();
        client.config_status(v1::ConfigStatusRequest::default()).await.unwrap();
        assert_eq!(client.range(range("carillon/instances/")).await.unwrap().into_inner().items.len(), 4);
    }
    gateway.range(range("carillon/config/")).await.unwrap();
    for prefix in ["carillon/config/", "", "carillon/h"] {
        let expected = format!(
            "viewer/bob may not read the keys {prefix:?}: that needs the role operator: they may hold secrets"
        );
        denied(viewer.range(range(prefix)).await, &expected);
        let watch = v1::WatchRequest { prefixes: vec![prefix.to_owned()], after_revision: 0 };
        denied(viewer.watch(watch).await, &expected);
    }

    let yaml = "api_keys: [{name: one, key: a-secret-of-16-bytes}]";
    operator.publish_config(publish("app/keys", yaml, "")).await.unwrap();
    for (client, open) in [(&mut viewer, false), (&mut gateway, true), (&mut operator, true)] {
        let get = v1::GetConfigRequest { document: "app/keys".to_owned(), revision: 0 };
        let got = client.get_config(get).await.unwrap().into_inner();
        let listed = client.list_config(v1::ListConfigRequest::default()).await.unwrap().into_inner();
        let history = v1::ConfigHistoryRequest { document: "app/keys".to_owned(), limit: 0 };
        let history = client.config_history(history).await.unwrap().into_inner();
        assert!(!history.revisions[0].yaml.contains("a-secret"), "nobody sees them there");
        for text in
            [got.effective_json.clone(), got.revision.unwrap().yaml, format!("{:?}", listed.documents)]
        {
            assert!(text.contains("one"), "{text}");
            assert_eq!(text.contains("a-secret-of-16-bytes"), open, "{text}");
        }
    }

    // The keeper's own affairs.
    for client in [&mut viewer, &mut gateway, &mut hub] {
        let status = client.txn(v1::TxnRequest::default()).await.unwrap_err();
        assert!(
            status.message().contains("may not call Keeper.Txn: that needs the role operator"),
            "{status}"
        );
        let status = client.save_snapshot(v1::SaveSnapshotRequest {}).await.unwrap_err();
        assert_eq!(status.code(), Code::PermissionDenied, "{status}");
        let remove = v1::MemberRemoveRequest { node_id: keeper.status().node_id };
        assert_eq!(client.member_remove(remove).await.unwrap_err().code(), Code::PermissionDenied);
    }
    operator.txn(v1::TxnRequest::default()).await.unwrap();
    operator.save_snapshot(v1::SaveSnapshotRequest {}).await.unwrap();

    // Between keepers: keepers alone.
    for (uri, allowed) in [("operator", false), ("gateway", false), ("hub", false), ("keeper/other", true)] {
        let channel = channel(&keeper.endpoint(), Some(&authority.tls(uri))).await.unwrap();
        let mut peer = KeeperPeerClient::new(channel);
        let identified = peer.identify(v1::IdentifyRequest { confirm: false }).await;
        assert_eq!(identified.is_ok(), allowed, "{uri}: {identified:?}");
        let proposed = peer.propose(tokio_stream::empty()).await.unwrap_err();
        // A keeper is asked next which cluster it is of.
        let expected = if allowed { Code::FailedPrecondition } else { Code::PermissionDenied };
        assert_eq!(proposed.code(), expected, "{uri}: {proposed}");
    }
    keeper.stop().await;
}

#[tokio::test]
async fn strangers_are_refused_and_told_why() {
    let authority = Authority::new();
    let (registry, dir) = (prometheus::Registry::new(), TempDir::new().unwrap());
    let mut options = self::options(dir.path(), "127.0.0.1:0", Some(authority.tls("keeper"))).await;
    options.registry = Some(registry.clone());
    let keeper = Keeper::start(options).await.unwrap();
    let url = keeper.endpoint();
    let refusal = async |tls: &Arc<Tls>| channel(&url, Some(tls)).await.expect_err("it is refused");

    // Signed by somebody else, but with our authority to check the keeper with.
    let other = Authority::new();
    let mut files = other.write("other", Some("operator"), SystemTime::now() + YEAR);
    files.authorities = authority.dir.path().join("ca.crt");
    let text = refusal(&Tls::open(files).unwrap()).await;
    assert!(text.contains("it does not take the certificate shown here"), "{text}");
    // A keeper of somebody else.
    let text = refusal(&other.tls("operator")).await;
    assert!(text.contains("UnknownIssuer"), "{text}");
    // Of yesterday.
    let yesterday = SystemTime::now() - Duration::from_secs(24 * 3600);
    let expired = Tls::open(authority.write("expired", Some("operator"), yesterday)).unwrap();
    let text = refusal(&expired).await;
    assert!(text.contains("it does not take the certificate shown here: CertificateExpired"), "{text}");
    // Which a person reads, and nothing was done.
    let admin = Admin::secured(vec![url.clone()], Some(expired));
    let error = admin.publish("app/demo", "root: true", ChangeOptions::default()).await.unwrap_err();
    assert!(matches!(error, AdminError::Unreachable { .. }), "{error}");
    assert!(error.to_string().contains("CertificateExpired"), "{error}");

    // Without TLS.
    let plain = channel(&url.replace("https", "http"), None).await;
    let answer = match plain {
        Ok(channel) => KeeperClient::new(channel).keeper_status(v1::KeeperStatusRequest {}).await,
        Err(error) => Err(Status::unavailable(error)),
    };
    let status = answer.expect_err("it is refused");
    assert!(![Code::Ok, Code::PermissionDenied].contains(&status.code()), "not even heard: {status}");
    // What does not go together is said before anything is tried.
    let error = channel(&url, None).await.unwrap_err();
    assert!(error.contains("needs certificates, and none were given"), "{error}");
    let error = channel(&url.replace("https", "http"), Some(&authority.tls("viewer"))).await.unwrap_err();
    assert!(error.contains("is without TLS, and certificates were given"), "{error}");

    // With a certificate that is nobody's. Our own side would not even start with it.
    let nobody = authority.write("nobody", None, SystemTime::now() + YEAR);
    let error = Tls::open(nobody.clone()).unwrap_err().to_string();
    assert!(
        error.contains("nobody.crt: the certificate has no role: it needs a URI carillon://ROLE"),
        "{error}"
    );
    let mut client = KeeperClient::new(nobodys_channel(&url, &nobody).await);
    let status = client.keeper_status(v1::KeeperStatusRequest {}).await.unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated);
    assert!(status.message().contains("the certificate has no role"), "{status}");

    // All of it is counted.
    let metric = |name: &str, what: &str| {
        let families = registry.gather();
        let family = families.iter().find(|family| family.name() == name).expect("the metric");
        let of = |metric: &&prometheus::proto::Metric| {
            what.is_empty() || metric.get_label().iter().any(|label| label.value() == what)
        };
        let found = family.get_metric().iter().find(of).expect("the label").clone();
        found.get_counter().get_value() + found.get_gauge().get_value()
    };
    // The other authority's, yesterday's twice, and the one without TLS.
    assert!(metric("carillon_keeper_denied_total", "connection") >= 4.0);
    assert_eq!(metric("carillon_keeper_denied_total", "call"), 1.0);
    let ends = authority.tls("keeper").now().subject.not_after as f64;
    assert!(metric("carillon_keeper_certificate_expiry_timestamp_seconds", "") >= ends - 600.0);

    // Who is no keeper does not become one, nor is taken for one.
    let dir = TempDir::new().unwrap();
    let options = self::options(dir.path(), "127.0.0.1:0", Some(authority.tls("hub/hub-1"))).await;
    let error = Keeper::start(options).await.map(|_| ()).unwrap_err();
    assert!(matches!(error, KeeperError::NotAKeeper { .. }), "{error}");
    assert!(error.to_string().contains("that of hub/hub-1: a keeper needs one with"), "{error}");
    let impostor = impostor(&authority).await;
    let text = channel(&impostor, Some(&authority.tls("gateway"))).await.unwrap_err();
    assert!(text.contains("it is no keeper: its certificate is that of hub/hub-1"), "{text}");
    keeper.stop().await;
}

/// A connection with a certificate that carillon itself would not take.
async fn nobodys_channel(url: &str, files: &TlsFiles) -> Channel {
    use carillon_agent::pem;
    use rustls::sign::SingleCertAndKey;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let read = |path| pem::read(path).unwrap();
    let chain = pem::certificates(&files.certificate, &read(&files.certificate)).unwrap();
    let key = pem::certified(&files.certificate, chain, &files.key, &read(&files.key), &provider).unwrap();
    let roots = pem::authorities(&files.authorities, &read(&files.authorities)).unwrap();
    let builder = rustls::ClientConfig::builder_with_provider(provider);
    let mut config = builder
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(key)));
    config.alpn_protocols = vec![b"h2".to_vec()];
    let config = Arc::new(config);
    let connector = tower::service_fn(move |uri: tonic::transport::Uri| {
        let config = config.clone();
        async move {
            let tcp = tokio::net::TcpStream::connect(("127.0.0.1", uri.port_u16().unwrap())).await?;
            let name = "127.0.0.1".try_into().unwrap();
            let stream = tokio_rustls::TlsConnector::from(config).connect(name, tcp).await?;
            std::io::Result::Ok(hyper_util::rt::TokioIo::new(stream))
        }
    });
    Endpoint::from_shared(url.to_owned()).unwrap().connect_with_connector(connector).await.unwrap()
}

/// Listens with the certificate of a hub.
async fn impostor(authority: &Authority) -> String {
    let loaded = authority.tls("hub/hub-1").now();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://{}", listener.local_addr().unwrap());
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(loaded.certified.clone())));
    config.alpn_protocols = vec![b"h2".to_vec()];
    tokio::spawn(async move {
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        while let Ok((tcp, _)) = listener.accept().await {
            let _ = acceptor.accept(tcp).await;
        }
    });
    url
}

/// When the certificate ends that a keeper shows to who connects now.
async fn shown(keeper: &KeeperHandle, authority: &Authority) -> i64 {
    let files = authority.write("looker", Some("viewer"), SystemTime::now() + YEAR);
    let roots = carillon_agent::pem::read(&files.authorities).unwrap();
    let roots = carillon_agent::pem::authorities(&files.authorities, &roots).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let tcp = tokio::net::TcpStream::connect(keeper.addr()).await.unwrap();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let stream = connector.connect("127.0.0.1".try_into().unwrap(), tcp).await.unwrap();
    let certificate = stream.get_ref().1.peer_certificates().unwrap()[0].clone();
    carillon_agent::subject::Subject::of(&certificate).unwrap().not_after
}

#[tokio::test]
async fn a_renewed_certificate_is_taken_up_and_nobody_is_dropped() {
    let authority = Authority::new();
    let (keeper, _dir) = keeper(&authority).await;
    let mut client = client(&keeper, &authority.tls("operator")).await;
    let watch = v1::WatchRequest { prefixes: vec!["x/".to_owned()], after_revision: 0 };
    let mut watching = client.watch(watch).await.unwrap().into_inner();
    assert_eq!(watching.message().await.unwrap().unwrap().kind(), v1::watch_response::Kind::StateEnd);
    let before = shown(&keeper, &authority).await;

    // Something that is of no use first: what was good stays in force.
    let certificate = authority.dir.path().join("keeper.crt");
    replace(&certificate, "not a certificate");
    tokio::time::sleep(tls::CHECK_INTERVAL + Duration::from_millis(500)).await;
    assert_eq!(shown(&keeper, &authority).await, before);
    // Files that were mistaken for one another, and one that has ended already.
    for (uri, until) in [("hub", SystemTime::now() + 3 * YEAR), ("keeper", SystemTime::now() - YEAR / 365)] {
        authority.write("keeper", Some(uri), until);
        tokio::time::sleep(tls::CHECK_INTERVAL + Duration::from_millis(500)).await;
        assert_eq!(shown(&keeper, &authority).await, before, "{uri}");
    }
    authority.write("keeper", Some("keeper"), SystemTime::now() + 2 * YEAR);
    until("the keeper shows its new certificate", async || {
        let now = shown(&keeper, &authority).await;
        if now > before + 300 * 24 * 3600 { Ok(()) } else { Err(format!("{now}")) }
    })
    .await;

    let put = v1::op::Put { key: "x/1".to_owned(), value: "1".into(), lease: 0 };
    let then = vec![v1::Op { op: Some(v1::op::Op::Put(put)) }];
    client.txn(v1::TxnRequest { then, ..Default::default() }).await.unwrap();
    loop {
        let message = watching.message().await.expect("the watch goes on").unwrap();
        if !message.events.is_empty() {
            break;
        }
    }
    drop(watching);
    keeper.stop().await;
}

#[tokio::test]
async fn a_connection_ends_with_its_certificate_and_comes_back_with_the_next() {
    let authority = Authority::new();
    let (keeper, _dir) = keeper(&authority).await;
    let admin = Admin::secured(vec![keeper.endpoint()], Some(authority.tls("operator")));
    let soon = SystemTime::now() + Duration::from_secs(6);
    let start = |id: &str| {
        let files = authority.write(id, Some(&format!("gateway/{id}")), soon);
        let tls = Tls::open(files).unwrap();
        let agent = Agent::start(Options::new(vec![keeper.endpoint()]).with_tls(Some(tls)));
        let mut instance = Instance::new(id);
        instance.roles = vec![Role::Gateway];
        agent.register(instance);
        agent
    };
    let (renewed, forgotten) = (start("renewed"), start("forgotten"));
    let ids = async || {
        let live = admin.live().await.map_err(|error| error.to_string())?;
        Ok::<_, String>(live.into_iter().map(|one| (one.instance.id, one.since_ms)).collect::<Vec<_>>())
    };
    until("both are there", async || {
        let there = ids().await?;
        if there.len() == 2 { Ok(()) } else { Err(format!("{there:?}")) }
    })
    .await;
    let since = ids().await.unwrap().into_iter().find(|(id, _)| id == "renewed").unwrap().1;
    assert!(SystemTime::now() < soon, "the machine is too busy for this test");
    authority.write("renewed", Some("gateway/renewed"), SystemTime::now() + YEAR);

    // The one that was not renewed is cut off, and its lease lapses; the other is the same instance all along.
    until("one has lost its connection", async || {
        let connected = *forgotten.connected().borrow();
        if connected { Err("still connected".to_owned()) } else { Ok(()) }
    })
    .await;
    assert!(SystemTime::now() > soon, "cut off before its time");
    until("one is left", async || {
        let there = ids().await?;
        if there == [("renewed".to_owned(), since)] { Ok(()) } else { Err(format!("{there:?}")) }
    })
    .await;
    assert!(!*forgotten.connected().borrow());
    until("the other is connected", async || {
        let connected = *renewed.connected().borrow();
        if connected { Ok(()) } else { Err("not connected".to_owned()) }
    })
    .await;
    forgotten.stop().await;
    renewed.stop().await;
    keeper.stop().await;
}

#[tokio::test]
async fn a_keeper_says_how_it_is_reached() {
    let dir = TempDir::new().unwrap();
    for (address, expected) in [("127.0.0.1:0", Protection::Loopback), ("0.0.0.0:0", Protection::Open)] {
        let keeper = Keeper::start(options(dir.path(), address, None).await).await.unwrap();
        let url = format!("http://127.0.0.1:{}", keeper.addr().port());
        assert_eq!(Admin::new(vec![url]).status().await.unwrap().protection, expected);
        keeper.stop().await;
    }
}

/// A watch that has said its first word, or why there is none.
async fn watched(client: &mut KeeperClient<Channel>) -> Result<tonic::Streaming<v1::WatchResponse>, Status> {
    let request = v1::WatchRequest { prefixes: vec!["x/".to_owned()], after_revision: 0 };
    let mut stream = client.watch(request).await?.into_inner();
    stream.message().await?;
    Ok(stream)
}

#[tokio::test]
async fn nobody_takes_the_watches_of_all() {
    let authority = Authority::new();
    let dir = TempDir::new().unwrap();
    let mut options = self::options(dir.path(), "127.0.0.1:0", Some(authority.tls("keeper"))).await;
    (options.limits.watches, options.limits.watches_per_caller) = (7, 2);
    let keeper = Keeper::start(options).await.unwrap();
    let mut held = Vec::new();
    // Another connection of the same viewer is the same caller.
    for uri in ["viewer/bob", "viewer/bob", "viewer/eve", "gateway", "gateway"] {
        held.push(watched(&mut client(&keeper, &authority.tls(uri)).await).await.unwrap());
    }
    for (uri, who) in [("viewer/bob", "viewer/bob"), ("gateway", "gateway at 127.0.0.1")] {
        let status = watched(&mut client(&keeper, &authority.tls(uri)).await).await.unwrap_err();
        let text = format!("{who} has 2 watches already, the most that one caller may have here");
        assert_eq!((status.code(), status.message()), (Code::ResourceExhausted, text.as_str()));
    }
    for uri in ["hub/hub-1", "hub/hub-2"] {
        held.push(watched(&mut client(&keeper, &authority.tls(uri)).await).await.unwrap());
    }
    let mut eve = client(&keeper, &authority.tls("viewer/eve")).await;
    let status = watched(&mut eve).await.unwrap_err();
    let text = "there are 7 watches already, the most that a keeper has";
    assert_eq!((status.code(), status.message()), (Code::ResourceExhausted, text));
    // What is given up is there for others.
    held.remove(0);
    until("there is room again", async || {
        watched(&mut eve).await.map(|stream| held.push(stream)).map_err(|status| status.to_string())
    })
    .await;
    drop(held);
    keeper.stop().await;

    // Without TLS it is the address that counts.
    let mut options = self::options(dir.path(), "127.0.0.1:0", None).await;
    options.limits.watches_per_caller = 1;
    let keeper = Keeper::start(options).await.unwrap();
    let from = async |address: &str| {
        let endpoint = Endpoint::from_shared(keeper.endpoint()).unwrap();
        let endpoint = endpoint.local_address(Some(address.parse().unwrap()));
        KeeperClient::new(endpoint.connect().await.unwrap())
    };
    let _one = watched(&mut from("127.0.9.11").await).await.unwrap();
    let status = watched(&mut from("127.0.9.11").await).await.unwrap_err();
    assert!(status.message().starts_with("127.0.9.11 has 1 watches already"), "{status}");
    let _other = watched(&mut from("127.0.9.12").await).await.unwrap();
    keeper.stop().await;
}

async fn tcp_from(address: &str, keeper: &KeeperHandle) -> std::io::Result<tokio::net::TcpStream> {
    let socket = tokio::net::TcpSocket::new_v4()?;
    socket.bind(std::net::SocketAddr::new(address.parse().unwrap(), 0))?;
    socket.connect(keeper.addr()).await
}

/// Shakes hands with the keeper from an address, as an operator; how long that took.
async fn shakes_hands(address: &str, keeper: &KeeperHandle, tls: &Arc<Tls>) -> Result<Duration, String> {
    let loaded = tls.now();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider);
    let certified = rustls::sign::SingleCertAndKey::from(loaded.certified.clone());
    let mut config = builder
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(loaded.authorities.clone())
        .with_client_cert_resolver(Arc::new(certified));
    config.alpn_protocols = vec![b"h2".to_vec()];
    let begun = Instant::now();
    let tcp = tcp_from(address, keeper).await.map_err(|error| error.to_string())?;
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let mut stream =
        connector.connect("127.0.0.1".try_into().unwrap(), tcp).await.map_err(|error| error.to_string())?;
    // The keeper's first word says that it has taken the certificate.
    tokio::io::AsyncReadExt::read_u8(&mut stream).await.map_err(|error| error.to_string())?;
    Ok(begun.elapsed())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_say_nothing_keep_nobody_out() {
    let authority = Authority::new();
    let (keeper, _dir) = keeper(&authority).await;
    let tls = authority.tls("operator");
    shakes_hands("127.0.9.21", &keeper, &tls).await.unwrap();
    // As many as there is room for, and more, from so few addresses that each has more than its part.
    let mut silent = Vec::new();
    let fill = async |silent: &mut Vec<_>| {
        for stranger in 31..=36 {
            for _ in 0..80 {
                silent.push(tcp_from(&format!("127.0.9.{stranger}"), &keeper).await.unwrap());
            }
        }
    };
    fill(&mut silent).await;
    let took = shakes_hands("127.0.9.21", &keeper, &tls).await.expect("who is known is let in at once");
    assert!(took < Duration::from_secs(8), "before the strangers' time is over: {took:?}");
    // So are newcomers once the silent ones have had a while: long before their time is over.
    let begun = Instant::now();
    until("a newcomer is let in", async || shakes_hands("127.0.9.22", &keeper, &tls).await.map(drop)).await;
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    drop(silent);
    keeper.stop().await;
}

#[tokio::test]
async fn a_certificate_for_another_cluster_is_refused_on_both_sides() {
    let authority = Authority::new();
    let dir = TempDir::new().unwrap();
    let tls = authority.tls("keeper?cluster=blue");
    let keeper = Keeper::start(options(dir.path(), "127.0.0.1:0", Some(tls)).await).await.unwrap();
    for uri in ["operator?cluster=blue", "operator/alice?cluster=blue", "operator"] {
        client(&keeper, &authority.tls(uri)).await.txn(v1::TxnRequest::default()).await.unwrap();
    }
    let red = authority.tls("operator?cluster=red");
    let error = channel(&keeper.endpoint(), Some(&red)).await.unwrap_err();
    let expected =
        "it is a keeper of another cluster: the certificate is for cluster blue, and this is cluster red";
    assert!(error.contains(expected), "{error}");
    // One that does not look at the keeper's certificate.
    let mut client = KeeperClient::new(nobodys_channel(&keeper.endpoint(), red.files()).await);
    for status in [
        client.txn(v1::TxnRequest::default()).await.unwrap_err(),
        client.keeper_status(v1::KeeperStatusRequest {}).await.unwrap_err(),
    ] {
        let expected = "the certificate is for cluster red, and this is cluster blue";
        assert_eq!((status.code(), status.message()), (Code::Unauthenticated, expected));
    }
    keeper.stop().await;
}

#[tokio::test]
async fn what_processes_say_of_documents_tells_viewers_no_secrets() {
    let authority = Authority::new();
    let (keeper, _dir) = keeper(&authority).await;
    let mut operator = client(&keeper, &authority.tls("operator")).await;
    let mut viewer = client(&keeper, &authority.tls("viewer/bob")).await;
    let mut gateway = client(&keeper, &authority.tls("gateway/edge-1")).await;
    let lease = register(&mut gateway, "edge-1", &[Role::Gateway], 1).await.unwrap();
    let yaml = "api_keys: [{name: one, key: \"hunter \\\"quoted\\\" key\"}]\nwebhook: {url: 'https://me:hunter-pass@x/', \
                secret: hunter-secret}";
    let published = operator.publish_config(publish("app/demo", yaml, "")).await.unwrap().into_inner();
    assert!(!format!("{published:?}").contains("hunter"), "{published:?}");

    // A process of another version may say anything.
    let refusal = "api_keys[0].key: invalid value: string \"hunter \\\"quoted\\\" key\"; webhook: `hunter-secret` is bad, \
                   https://me:hunter-pass@x/ does not answer";
    let applied = v1::AppliedConfig {
        instance: "edge-1".to_owned(),
        document: "app/demo".to_owned(),
        refused_revision: 1,
        refusal: refusal.to_owned(),
        ..Default::default()
    };
    gateway.report_config(v1::ReportConfigRequest { lease, applied: vec![applied] }).await.unwrap();
    let expected = "api_keys[0].key: invalid value: string \"(secret)\"; webhook: `(secret)` is bad, (secret) does not answer";
    let request = v1::ConfigStatusRequest { document: "app/demo".to_owned() };
    let status = viewer.config_status(request).await.unwrap().into_inner();
    assert_eq!(status.applied[0].refusal, expected);
    let range = v1::RangeRequest { key: "carillon/applied/".to_owned(), prefix: true, ..Default::default() };
    let raw = viewer.range(range).await.unwrap().into_inner();
    assert!(!String::from_utf8_lossy(&raw.items[0].value).contains("hunter"), "{raw:?}");
    let explain = v1::ExplainConfigRequest {
        document: "app/demo".to_owned(),
        instance: "edge-1".to_owned(),
        ..Default::default()
    };
    let explained = format!("{:?}", viewer.explain_config(explain).await.unwrap().into_inner());
    assert!(explained.contains("webhook.url") && !explained.contains("hunter"), "{explained}");
    let get = v1::GetConfigRequest { document: "app/demo".to_owned(), revision: 0 };
    let got = format!("{:?}", viewer.get_config(get).await.unwrap().into_inner());
    assert!(got.contains("webhook") && !got.contains("hunter"), "{got}");

    // Nor does the keeper, to whoever gets a field wrong.
    let wrong = operator.publish_config(publish("app/demo", "api_keys: hunter-key", "")).await.unwrap();
    let said = format!("{wrong:?}");
    assert!(
        said.contains("invalid type: (secret), expected a sequence") && !said.contains("hunter"),
        "{said}"
    );
    keeper.stop().await;
}

#[tokio::test]
async fn nobody_joins_the_process_of_another_by_saying_so() {
    let authority = Authority::new();
    let (keeper, _dir) = keeper(&authority).await;
    let mut operator = client(&keeper, &authority.tls("operator")).await;
    let mut hub = client(&keeper, &authority.tls("hub/hub-1")).await;
    let mut gateway = client(&keeper, &authority.tls("gateway")).await;
    for (id, role) in [("hub-1", Role::Registry), ("edge-1", Role::Gateway), ("edge-2", Role::Gateway)] {
        let client = if role == Role::Gateway { &mut gateway } else { &mut hub };
        let instance =
            v1::InstanceRecord { process: 7, kinds: vec!["app".to_owned()], ..record(id, &[role]) };
        // What it says of its certificate does not count either.
        let instance = v1::InstanceRecord { registered_by: "hub/hub-1".to_owned(), ..instance };
        client.register(v1::RegisterRequest { instance: Some(instance), ttl_ms: 60_000 }).await.unwrap();
    }
    operator.publish_config(publish("app/demo", "", "")).await.unwrap();
    let matched = async |operator: &mut KeeperClient<Channel>, role: Role| {
        let target = v1::ConfigTarget { roles: vec![role.to_string()], ..Default::default() };
        let request = v1::PublishConfigRequest {
            release_to: Some(target),
            dry_run: true,
            ..publish("app/demo", "root: true", "")
        };
        operator.publish_config(request).await.unwrap().into_inner().matched
    };
    assert_eq!(matched(&mut operator, Role::Gateway).await, ["edge-1", "edge-2"]);
    assert_eq!(matched(&mut operator, Role::Registry).await, ["hub-1"]);
    keeper.stop().await;
}
