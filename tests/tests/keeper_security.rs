//! Three keepers, a hub and a gateway as processes that show each other certificates: who is let in, who may what, and that all
//! certificates, their authority too, are replaced while everything runs.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::Output;
use std::time::{Duration, SystemTime};

use carillon_tests::carillon;
use carillon_tests::certificates::{Authority, Pair, write};
use carillon_tests::cluster::{Process, addresses};
use carillon_tests::keepers::patiently;
use carillon_tests::mqtt::{Connect, Device};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(60);
const API_KEY: &str = "key-of-the-tests";

/// Shows what everyone has logged when a test fails.
struct All {
    keepers: Vec<Process>,
    others: Vec<Process>,
}

impl Drop for All {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.keepers.iter().chain(&self.others).for_each(Process::show_last_logs);
        }
    }
}

/// A person or a tool: with which certificate, trusting whom.
struct Person<'a> {
    keepers: &'a str,
    ca: String,
    pair: Pair,
    dir: &'a Path,
}

impl Person<'_> {
    async fn tries(&self, arguments: &[&str]) -> Output {
        let mut command = carillon(arguments);
        command
            .env("CARILLON_KEEPER", self.keepers)
            .env("CARILLON_KEEPER_CA", &self.ca)
            .env("CARILLON_KEEPER_CERTIFICATE", &self.pair.certificate)
            .env("CARILLON_KEEPER_KEY", &self.pair.key)
            .env("CARILLON_AUTHOR", "mallory")
            .env("CARILLON_DATA_DIR", self.dir);
        tokio::time::timeout(Duration::from_secs(300), command.output())
            .await
            .expect("it ends")
            .expect("it runs")
    }

    /// It must succeed; gives its stdout.
    async fn does(&self, arguments: &[&str]) -> Result<String, String> {
        let output = self.tries(arguments).await;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }

    /// It must fail with this exit code; gives its stderr.
    #[track_caller]
    fn refused(output: &Output, code: i32) -> String {
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{text}");
        text
    }
}

async fn push(client: &reqwest::Client, http: SocketAddr, device: &mut Device, text: &str) {
    let url = format!("http://{http}/v1/apps/demo/messages");
    let body = json!({ "topic": "news", "payload": text, "id": text });
    let pushed = async || {
        let answer = client.post(&url).bearer_auth(API_KEY).json(&body).send().await;
        let answer = answer.map_err(|error| error.to_string())?;
        if answer.status().is_success() { Ok(()) } else { Err(answer.text().await.unwrap_or_default()) }
    };
    patiently("a push is accepted", PATIENCE, pushed).await.unwrap_or_else(|error| panic!("{error}"));
    let got = tokio::time::timeout(PATIENCE, device.got()).await.expect("the message comes");
    assert_eq!(got.payload, text);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keepers_hub_gateway_and_people_with_certificates_that_are_all_replaced() {
    let pid = std::process::id();
    let ip = Ipv4Addr::new(127, 32 + (pid % 16) as u8, (pid / 16 % 256) as u8, 1);
    let dir = tempfile::tempdir().unwrap();
    let client = reqwest::Client::builder().timeout(Duration::from_secs(60)).build().unwrap();
    let year = SystemTime::now() + Duration::from_secs(365 * 24 * 3600);
    let name = ip.to_string();
    let (old, new) = (Authority::new(), Authority::new());
    // What everyone trusts, in one file, as it is mounted.
    let ca = dir.path().join("ca.crt");
    let read = |path: String| std::fs::read_to_string(path).unwrap();
    write(&ca, &read(old.ca()));
    let ca_text = ca.to_str().unwrap();
    let keeper_pair = old.member("keeper", "keeper", &[&name], year);
    let (hub_pair, gateway_pair) =
        (old.member("hub", "hub", &[], year), old.member("gateway", "gateway/edge-1", &[], year));

    let grpc: [SocketAddr; 3] = addresses(ip);
    let ops: [SocketAddr; 5] = addresses(ip);
    let peers = grpc.map(|address| address.to_string()).join(",");
    let urls = grpc.map(|address| format!("https://{address}")).join(",");
    let mut all = All { keepers: Vec::new(), others: Vec::new() };
    for (place, address) in grpc.iter().enumerate() {
        let address = address.to_string();
        let role = ["keeper", "--grpc", &address, "--peers", &peers, "--tls-client-ca", ca_text];
        let tls = ["--tls-certificate", &keeper_pair.certificate, "--tls-key", &keeper_pair.key];
        let role = [&role[..], &tls[..]].concat();
        all.keepers.push(Process::start(dir.path(), &format!("keeper-{place}"), &role, ops[place], &client));
    }
    let person = |authority: &Authority, uri: &str, until: SystemTime| Person {
        keepers: &urls,
        ca: ca_text.to_owned(),
        pair: authority.member(&uri.replace('/', "-"), uri, &[], until),
        dir: dir.path(),
    };
    let alice = person(&old, "operator/alice", year);
    let settled = async || {
        let list = alice.does(&["keeper", "member", "list", "--output", "json"]).await?;
        let members: Vec<Value> = serde_json::from_str(&list).map_err(|error| error.to_string())?;
        let voters = members.iter().filter(|member| member["voter"] == true).count();
        if voters == 3 { Ok(()) } else { Err(list) }
    };
    patiently("three keepers with a vote", PATIENCE, settled).await.unwrap_or_else(|error| panic!("{error}"));
    let status = alice.does(&["keeper", "status"]).await.unwrap();
    assert_eq!(status.matches("  TLS").count(), 3, "{status}");

    // A hub and a gateway, and a push through them.
    let [hub_grpc, http, mqtt, ws] = addresses(ip);
    let [hub_text, http_text, mqtt_text, ws_text] =
        [hub_grpc, http, mqtt, ws].map(|address: SocketAddr| address.to_string());
    let access = |pair: &Pair| {
        [
            "--keeper",
            &urls,
            "--keeper-ca",
            ca_text,
            "--keeper-certificate",
            &pair.certificate,
            "--keeper-key",
            &pair.key,
        ]
        .map(str::to_owned)
    };
    let start = |name: &str, role: &[&str], pair: &Pair, ops: SocketAddr| {
        let access = access(pair);
        let role: Vec<&str> = role.iter().copied().chain(access.iter().map(String::as_str)).collect();
        Process::start(dir.path(), name, &role, ops, &client)
    };
    all.others.push(start("hub", &["hub", "--grpc", &hub_text, "--http", &http_text], &hub_pair, ops[3]));
    let gateway = ["gateway", "--mqtt", &mqtt_text, "--ws", &ws_text, "--shards", "2"];
    all.others.push(start("gateway", &gateway, &gateway_pair, ops[4]));
    let yaml = format!(
        "root: true\nanonymous_devices: true\napi_keys: [{{ name: tests, key: {API_KEY} }}]\n\
         device_publish: ['#']\ndevice_subscribe: ['#']\n"
    );
    let document = dir.path().join("demo.yaml");
    std::fs::write(&document, yaml).unwrap();
    alice.does(&["config", "set", "app/demo", "--file", document.to_str().unwrap()]).await.unwrap();
    let history = alice.does(&["config", "history", "app/demo"]).await.unwrap();
    assert!(history.contains("alice") && !history.contains("mallory"), "{history}");
    for process in &all.others {
        process.ready().await;
    }
    let mut device = Device::connect(mqtt, &Connect::new(5, "device")).await;
    assert_eq!(device.subscribe("news", 1).await, 1);
    push(&client, http, &mut device, "first").await;
    // What a hub may change: revocations, through its API.
    let url = format!("http://{http}/v1/apps/demo/users/eve/revoke");
    let revoked = client.post(url).bearer_auth(API_KEY).json(&json!({})).send().await.unwrap();
    assert!(revoked.status().is_success(), "{}", revoked.text().await.unwrap());
    let history = alice.does(&["config", "history", "revoked/demo"]).await.unwrap();
    assert!(history.contains("  hub "), "{history}");

    // Who may only look, and who may not even do that.
    let bob = person(&old, "viewer/bob", year);
    assert!(bob.does(&["instances"]).await.unwrap().contains("edge-1"));
    let text = Person::refused(&bob.tries(&["config", "set", "gateway", "max_packet_bytes=65536"]).await, 1);
    let expected = "viewer/bob may not call Keeper.PublishConfig: that needs the role operator or hub";
    assert!(text.contains(expected), "{text}");
    let expired = person(&old, "operator/late", SystemTime::now() - Duration::from_secs(3600));
    let text =
        Person::refused(&expired.tries(&["config", "set", "gateway", "max_packet_bytes=65536"]).await, 3);
    assert!(text.contains("it does not take the certificate shown here: CertificateExpired"), "{text}");
    let stranger = person(&new, "operator/eve", year);
    let text = Person::refused(&stranger.tries(&["instances"]).await, 3);
    assert!(text.contains("it does not take the certificate shown here"), "{text}");
    let modern = Person { ca: new.ca(), ..person(&old, "operator/modern", year) };
    let text = Person::refused(&modern.tries(&["instances"]).await, 3);
    assert!(text.contains("UnknownIssuer"), "{text}");
    let plain = carillon(&["instances", "--keeper", &urls]).output().await.unwrap();
    let text = Person::refused(&plain, 2);
    assert!(text.contains("needs certificates: --keeper-ca"), "{text}");

    // Another authority, and everyone's certificates from it, step by step; nothing is restarted. First both are trusted …
    let before = alice.does(&["instances", "--output", "json"]).await.unwrap();
    write(&ca, &format!("{}{}", read(old.ca()), read(new.ca())));
    let eve_gets_in = async || stranger.does(&["instances"]).await.map(drop);
    patiently("the new authority is trusted", PATIENCE, eve_gets_in).await.unwrap_or_else(|e| panic!("{e}"));
    // … then everyone's own are new …
    let take_over = |files: &Pair, fresh: &Pair| {
        for (from, to) in [(&fresh.key, &files.key), (&fresh.certificate, &files.certificate)] {
            write(Path::new(to), &read(from.clone()));
        }
    };
    take_over(&keeper_pair, &new.member("keeper", "keeper", &[&name], year));
    take_over(&hub_pair, &new.member("hub", "hub", &[], year));
    take_over(&gateway_pair, &new.member("gateway", "gateway/edge-1", &[], year));
    let served = async || modern.does(&["instances"]).await.map(drop);
    patiently("keepers show their new certificate", PATIENCE, served).await.unwrap_or_else(|e| panic!("{e}"));
    // … then only the new one is trusted.
    write(&ca, &read(new.ca()));
    let late = async || {
        let output = alice.tries(&["instances"]).await;
        if output.status.success() { Err("still let in") } else { Ok(output) }
    };
    let output =
        patiently("the old authority is forgotten", PATIENCE, late).await.unwrap_or_else(|e| panic!("{e}"));
    Person::refused(&output, 3);
    push(&client, http, &mut device, "second").await;

    // Whoever loses its keeper comes to another with its new certificate, and the keepers to each other.
    all.keepers[0].kill().await;
    let carol = person(&new, "operator/carol", year);
    let set = async || carol.does(&["config", "set", "gateway", "max_packet_bytes=70000"]).await.map(drop);
    patiently("two keepers decide", PATIENCE, set).await.unwrap_or_else(|error| panic!("{error}"));
    let applied = async || {
        let status = carol.does(&["config", "status", "gateway"]).await?;
        let done = status.lines().any(|line| line.contains("revision 1"));
        if done { Ok(()) } else { Err(status) }
    };
    patiently("the gateway has applied it", PATIENCE, applied)
        .await
        .unwrap_or_else(|error| panic!("{error}"));
    let ids = |list: &str| {
        let list: Vec<Value> = serde_json::from_str(list).map_err(|error| error.to_string())?;
        Ok::<_, String>(list.iter().map(|one| one["id"].to_string()).collect::<Vec<_>>())
    };
    let there = async || {
        let now = ids(&carol.does(&["instances", "--output", "json"]).await?)?;
        if now == ids(&before)? { Ok(()) } else { Err(format!("{now:?}")) }
    };
    patiently("the same instances", PATIENCE, there).await.unwrap_or_else(|error| panic!("{error}"));
    push(&client, http, &mut device, "third").await;
}
