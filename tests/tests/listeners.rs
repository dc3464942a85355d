//! Listeners: TLS with clients of every kind, certificates by name and renewed under way, certificates of devices, PROXY
//! protocol, IPv6; added and removed while devices are connected.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use carillon_tests::certificates::{Authority, Pair};
use carillon_tests::mqtt::{self, Answer, Raw};
use carillon_tests::tools::{Running, find, missing, mosquitto, python, run, succeed};
use carillon_tests::{Server, eventually};
use serde_json::{Value, json};
use tokio::process::Command;

/// Names of the server's certificate: how tests reach it.
const LOCAL: [&str; 3] = ["localhost", "127.0.0.1", "::1"];

async fn server_over_tls(pair: &Pair, more: &[&str]) -> Server {
    let flags = [
        "--mqtts",
        "127.0.0.1:0",
        "--wss",
        "127.0.0.1:0",
        "--tls-certificate",
        &pair.certificate,
        "--tls-key",
        &pair.key,
    ];
    Server::start_with(&[&flags[..], more].concat()).await
}

/// Puts these in force as the document's listeners, as one revision with `more` fields.
async fn configure(server: &Server, listeners: Value, more: Value) {
    let mut document = json!({ "listeners": listeners });
    document.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let file = server.data_dir().with_extension("json");
    std::fs::write(&file, document.to_string()).unwrap();
    server.cli(&["config", "set", "gateway", "--file", file.to_str().unwrap()]).await;
}

/// Where a listener listens, once it does so for the `nth` time (from 1).
async fn opened(server: &Server, name: &str, nth: usize) -> SocketAddr {
    eventually("the listener is open", || async {
        let logs = server.logs();
        let wanted = format!("listener=\"{name}\"");
        let mut lines = logs.lines().filter(|line| line.contains(" listening ") && line.contains(&wanted));
        let line = lines.nth(nth - 1).ok_or("not listening")?;
        let address = line.split_once("address=").ok_or("no address")?.1;
        address.split_whitespace().next().unwrap_or_default().parse().map_err(|_| "no address")
    })
    .await
}

/// A metric's value, by its name with labels as it is written; 0 when it is not there.
async fn metric(server: &Server, name: &str) -> f64 {
    let text =
        reqwest::get(format!("{}/metrics", server.addresses().ops)).await.unwrap().text().await.unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ').map(str::to_owned));
    line.map_or(0.0, |value| value.parse().unwrap())
}

async fn metric_reaches(server: &Server, name: &str, least: f64) {
    let family = name.split('{').next().unwrap_or_default();
    eventually(name, || async {
        if metric(server, name).await >= least {
            return Ok(());
        }
        let all =
            reqwest::get(format!("{}/metrics", server.addresses().ops)).await.unwrap().text().await.unwrap();
        Err(all.lines().filter(|line| line.starts_with(family)).map(str::to_owned).collect::<Vec<_>>())
    })
    .await;
}

/// `openssl s_client`: everything it prints.
async fn s_client(server: SocketAddr, arguments: &[&str]) -> Option<String> {
    let mut command = Command::new(find("openssl")?);
    command.args(["s_client", "-connect", &server.to_string()]).args(arguments);
    command.stdin(std::process::Stdio::null()).kill_on_drop(true);
    let output = run(command).await;
    Some(String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
}

/// The common name of the certificate that is shown for a name.
async fn shown_for(server: SocketAddr, name: Option<&str>) -> Option<String> {
    let sni = name.map_or(vec!["-noservername"], |name| vec!["-servername", name]);
    let printed = s_client(server, &sni).await?;
    let subject = printed.lines().find_map(|line| line.trim().strip_prefix("subject=")).unwrap_or_default();
    Some(subject.trim_start_matches("CN").trim_start_matches([' ', '=']).to_owned())
}

async fn pings(raw: &mut Raw) {
    raw.send(&[0xC0, 0]).await;
    assert_eq!(raw.answer().await, Answer::Packet(0xD0, vec![]), "PINGRESP");
}

#[tokio::test]
async fn mosquitto_over_tls() {
    let authority = Authority::new();
    let server = server_over_tls(&authority.server("server", "server", &LOCAL), &[]).await;
    let (mqtts, ca) = (server.addresses().mqtts.unwrap(), authority.ca());
    for version in ["5", "311"] {
        let topic = format!("tls/{version}");
        let over_tls = ["--cafile", &ca, "-t", &topic, "-q", "1"];
        let Some(sub) =
            mosquitto("mosquitto_sub", mqtts, version, &[&over_tls[..], &["-d", "-C", "2"]].concat())
        else {
            return;
        };
        let mut sub = Running::start(sub);
        sub.line_with("SUBACK").await;
        let payload = "x".repeat(50_000);
        let publish =
            mosquitto("mosquitto_pub", mqtts, version, &[&over_tls[..], &["-m", &payload]].concat());
        succeed(publish.unwrap()).await;
        server.publish(&topic, "from a backend").await;
        sub.line_with(&payload).await;
        sub.line_with("from a backend").await;
        assert_eq!(sub.exit_code().await, Some(0));
    }
    metric_reaches(&server, r#"carillon_gateway_tls_handshakes_total{result="full"}"#, 4.0).await;
    // Who does not know the authority says so and goes.
    let other = Authority::new();
    let stranger = ["--cafile", &other.ca(), "-t", "x", "-m", "x"];
    let stranger = mosquitto("mosquitto_pub", mqtts, "5", &stranger).unwrap();
    assert!(!run(stranger).await.status.success());
    metric_reaches(&server, r#"carillon_gateway_tls_handshakes_total{result="refused_by_client"}"#, 1.0)
        .await;
    // Discovery names what there is.
    let endpoints = format!("{}/v1/endpoints?device=x", server.addresses().http);
    let said: Value = reqwest::get(endpoints).await.unwrap().json().await.unwrap();
    assert_eq!(said["endpoints"][0]["mqtts"], format!("mqtts://{mqtts}"), "{said}");
    assert_eq!(
        said["endpoints"][0]["wss"],
        format!("wss://{}/mqtt", server.addresses().wss.unwrap()),
        "{said}"
    );
}

#[tokio::test]
async fn mqtt_js_over_wss() {
    let Some(node) = find("node") else { return };
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    if !repository.join("client/js/node_modules").is_dir() {
        return missing("client/js/node_modules");
    }
    let authority = Authority::new();
    let server = server_over_tls(&authority.server("server", "server", &LOCAL), &[]).await;
    for (url, version) in [
        (format!("wss://{}/mqtt", server.addresses().wss.unwrap()), "5"),
        (format!("wss://{}/mqtt", server.addresses().wss.unwrap()), "4"),
        (format!("mqtts://{}", server.addresses().mqtts.unwrap()), "5"),
    ] {
        let mut command = Command::new(&node);
        command.arg(repository.join("tests/js/mqttjs.mjs")).args([&url, version]).kill_on_drop(true);
        command.env("NODE_EXTRA_CA_CERTS", authority.ca());
        assert_eq!(succeed(command).await.trim(), format!("ok, version {version}"), "{url}");
    }
}

fn tls_check(name: &str, server: SocketAddr, authority: &Authority, more: &[&str]) -> Option<Command> {
    let mut command = Command::new(python()?);
    command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/python/tls_checks.py"));
    command.args([name, &server.ip().to_string(), &server.port().to_string(), &authority.ca()]).args(more);
    command.kill_on_drop(true);
    Some(command)
}

#[tokio::test]
async fn paho_over_tls() {
    let authority = Authority::new();
    let server = server_over_tls(&authority.server("server", "server", &LOCAL), &[]).await;
    let Some(check) = tls_check("paho", server.addresses().mqtts.unwrap(), &authority, &[]) else { return };
    assert_eq!(succeed(check).await.trim(), "ok paho");
}

#[tokio::test]
async fn who_does_not_read_for_a_while_gets_all_of_it() {
    let authority = Authority::new();
    let server = server_over_tls(&authority.server("server", "server", &LOCAL), &[]).await;
    let ca = authority.ca();
    let arguments = ["--cafile", &ca, "-t", "slow", "-q", "1", "-d", "-C", "100", "-F", "%p"];
    let Some(sub) = mosquitto("mosquitto_sub", server.addresses().mqtts.unwrap(), "5", &arguments) else {
        return;
    };
    let mut sub = Running::start(sub);
    sub.line_with("SUBACK").await;
    sub.signal(libc::SIGSTOP);
    // More than sockets and queues hold: records are written in pieces, and the rest is read from the log.
    let payload = |number: usize| format!("{number:03}-{}-{number:03}", "0123456789".repeat(10_000));
    for number in 0..100 {
        server.publish("slow", &payload(number)).await;
    }
    sub.signal(libc::SIGCONT);
    for number in 0..100 {
        let line = sub.line_with("0123456789").await;
        assert!(line == payload(number), "message {number}: {} bytes, {:.20}", line.len(), line);
    }
    assert_eq!(sub.exit_code().await, Some(0));
}

#[tokio::test]
async fn the_name_chooses_the_certificate_and_the_document_the_versions() {
    let authority = Authority::new();
    let server = Server::start().await;
    let (one, wild) = (
        authority.server("one", "one", &["one.example.com"]),
        authority.server("wild", "wild", &["*.example.com"]),
    );
    let pair = |pair: &Pair| json!({ "certificate": pair.certificate, "key": pair.key });
    let certificates = json!([pair(&one), pair(&wild)]);
    configure(
        &server,
        json!([
            { "name": "both", "protocol": "mqtts", "address": "127.0.0.1:0",
              "tls": { "certificates": certificates } },
            { "name": "new", "protocol": "mqtts", "address": "127.0.0.1:0",
              "tls": { "certificates": certificates, "min_version": "1.3" } },
        ]),
        json!({}),
    )
    .await;
    let (both, new) = (opened(&server, "both", 1).await, opened(&server, "new", 1).await);
    for (name, expected) in [
        (Some("one.example.com"), "one"),
        (Some("two.example.com"), "wild"),
        (Some("a.two.example.com"), "one"),
        (Some("elsewhere.org"), "one"),
        (None, "one"),
    ] {
        let Some(shown) = shown_for(both, name).await else { return };
        assert_eq!(shown, expected, "{name:?}");
    }
    for (listener, version, is_spoken) in [
        (both, "-tls1_3", true),
        (both, "-tls1_2", true),
        (both, "-tls1_1", false),
        (new, "-tls1_3", true),
        (new, "-tls1_2", false),
    ] {
        let printed = s_client(listener, &[version, "-CAfile", &authority.ca()]).await.unwrap();
        let is_open = printed.contains("Cipher is TLS_") || printed.contains("Cipher is ECDHE-");
        assert_eq!(is_open, is_spoken, "{version}: {printed}");
    }
    metric_reaches(&server, r#"carillon_gateway_tls_handshakes_total{result="incompatible"}"#, 2.0).await;
    // The subprotocol that is agreed on, or none; an other one is refused (RFC 7301 §3.2).
    for (offered, agreed) in [("mqtt", "ALPN protocol: mqtt"), ("h2", "alert number 120")] {
        let printed = s_client(both, &["-alpn", offered]).await.unwrap();
        assert!(printed.contains(agreed), "{offered}: {printed}");
    }
    assert!(s_client(both, &[]).await.unwrap().contains("No ALPN negotiated"));
}

#[tokio::test]
async fn a_handshake_is_resumed_with_what_the_client_kept() {
    let Some(openssl) = find("openssl") else { return };
    let authority = Authority::new();
    let server = server_over_tls(&authority.server("server", "server", &LOCAL), &[]).await;
    let mqtts = server.addresses().mqtts.unwrap();
    for version in ["-tls1_3", "-tls1_2"] {
        let session = authority.dir().join(version);
        for (flag, expected) in [("-sess_out", "New, "), ("-sess_in", "Reused, ")] {
            let mut command = Command::new("sh");
            // Its standard input stays open for a moment: a ticket comes after the handshake.
            command.args(["-c", r#"sleep 2 | "$@""#, "-"]).arg(&openssl).args(["s_client", version]);
            command.args(["-connect", &mqtts.to_string(), flag]).arg(&session).kill_on_drop(true);
            let output = run(command).await;
            let printed = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(printed.contains(expected), "{version} {flag}: {printed}");
        }
    }
    metric_reaches(&server, r#"carillon_gateway_tls_handshakes_total{result="resumed"}"#, 2.0).await;
}

#[tokio::test]
async fn devices_show_certificates() {
    let (authority, strangers) = (Authority::new(), Authority::new());
    let pair = authority.server("server", "server", &LOCAL);
    let server = Server::start().await;
    let tls = |auth: &str| {
        json!({
            "certificates": [{ "certificate": pair.certificate, "key": pair.key }],
            "client_auth": auth, "client_ca": authority.ca(),
            "client_certificate_user": { "app": "demo" },
        })
    };
    let mut by_uri = tls("required");
    by_uri["client_certificate_user"]["from"] = "dns_name".into();
    configure(
        &server,
        json!([
            { "name": "required", "protocol": "mqtts", "address": "127.0.0.1:0", "tls": tls("required") },
            { "name": "optional", "protocol": "mqtts", "address": "127.0.0.1:0", "tls": tls("optional") },
            { "name": "by-name", "protocol": "mqtts", "address": "127.0.0.1:0", "tls": by_uri },
        ]),
        json!({}),
    )
    .await;
    let required = opened(&server, "required", 1).await;
    let optional = opened(&server, "optional", 1).await;
    let by_name = opened(&server, "by-name", 1).await;
    let alice = authority.client("alice", &["device-7.example.com"]);
    let mallory = strangers.client("alice", &[]);
    let ca = authority.ca();
    let subscribe = |listener: SocketAddr, pair: Option<&Pair>| {
        let mut arguments = vec!["--cafile", &*ca, "-t", "c/#", "-u", "somebody", "-d", "-W", "10", "-E"];
        if let Some(pair) = pair {
            arguments.extend(["--cert", &*pair.certificate, "--key", &*pair.key]);
        }
        mosquitto("mosquitto_sub", listener, "5", &arguments)
    };
    for (listener, pair, is_let_in) in [
        (required, Some(&alice), true),
        (required, None, false),
        (required, Some(&mallory), false),
        (optional, Some(&alice), true),
        (optional, None, true),
        (optional, Some(&mallory), false),
    ] {
        let Some(command) = subscribe(listener, pair) else { return };
        let output = run(command).await;
        assert_eq!(output.status.success(), is_let_in, "{listener} {pair:?}: {output:?}");
    }
    for result in ["no_client_certificate", "bad_client_certificate"] {
        metric_reaches(
            &server,
            &format!(r#"carillon_gateway_tls_handshakes_total{{result="{result}"}}"#),
            1.0,
        )
        .await;
    }
    // Who it is, is what the certificate says, not the user name of its CONNECT.
    for (listener, user) in [(required, "alice"), (by_name, "device-7.example.com")] {
        let arguments = ["--cafile", &ca, "--cert", &alice.certificate, "--key", &alice.key];
        let arguments = [&arguments[..], &["-t", "c/#", "-u", "somebody", "-d"]].concat();
        let mut sub = Running::start(mosquitto("mosquitto_sub", listener, "5", &arguments).unwrap());
        sub.line_with("SUBACK").await;
        let status = server.get(&format!("users/{user}")).await;
        assert_eq!(status["online"], true, "{status}");
        assert_eq!(server.get("users/somebody").await["online"], false);
        sub.kill().await;
    }
    // A certificate without the name that is asked for is no way in.
    let nameless = authority.client("bob", &[]);
    let output = run(subscribe(by_name, Some(&nameless)).unwrap()).await;
    assert!(!output.status.success(), "{output:?}");
    let text = server.logs();
    assert!(!text.contains("PRIVATE KEY"), "nothing secret is logged");
}

#[tokio::test]
async fn the_command_line_can_demand_certificates() {
    let authority = Authority::new();
    let pair = authority.server("server", "server", &LOCAL);
    let ca = authority.ca();
    let server = server_over_tls(&pair, &["--tls-client-ca", &ca]).await;
    let mqtts = server.addresses().mqtts.unwrap();
    let device = authority.client("device", &[]);
    let Some(without) = mosquitto("mosquitto_pub", mqtts, "5", &["--cafile", &ca, "-t", "x", "-m", "x"])
    else {
        return;
    };
    assert!(!run(without).await.status.success());
    let paho = tls_check("paho", mqtts, &authority, &[&device.certificate, &device.key]);
    if let Some(paho) = paho {
        assert_eq!(succeed(paho).await.trim(), "ok paho");
    }
    drop(server);
    // What cannot be served is said at the start, with the flag or the file.
    for (arguments, code, expected) in [
        (&["--mqtts", "127.0.0.1:0"][..], 2, "--tls-certificate"),
        (
            &["--mqtts", "127.0.0.1:0", "--tls-certificate", &ca, "--tls-key", "/nowhere/x.key"],
            1,
            "--mqtts cannot be served: cannot read /nowhere/x.key",
        ),
        (
            &["--wss", "127.0.0.1:0", "--tls-certificate", &ca, "--tls-key", &pair.key],
            1,
            "does not go with the certificate",
        ),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let common = ["dev", "--mqtt", "127.0.0.1:0", "--ws", "127.0.0.1:0", "--http", "127.0.0.1:0"];
        let mut command = carillon_tests::carillon(&common);
        command.args(["--ops", "127.0.0.1:0", "--data-dir"]).arg(dir.path().join("data")).args(arguments);
        let output = run(command).await;
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{stderr}");
        assert!(stderr.contains(expected), "{stderr}");
    }
}

#[tokio::test]
async fn a_certificate_is_renewed_under_a_connection() {
    let authority = Authority::new();
    let server = server_over_tls(&authority.server("server", "before", &LOCAL), &[]).await;
    let (mqtts, ca) = (server.addresses().mqtts.unwrap(), authority.ca());
    let arguments = ["--cafile", &ca, "-t", "held", "-q", "1", "-d", "-C", "2"];
    let Some(sub) = mosquitto("mosquitto_sub", mqtts, "5", &arguments) else { return };
    let mut sub = Running::start(sub);
    sub.line_with("SUBACK").await;
    assert_eq!(shown_for(mqtts, None).await.unwrap(), "before");
    let shows = async |expected: &'static str| {
        eventually("the certificate is shown", || async {
            let shown = shown_for(mqtts, None).await.unwrap();
            if shown == expected { Ok(()) } else { Err(shown) }
        })
        .await;
    };
    authority.server("server", "after", &LOCAL);
    shows("after").await;
    server.publish("held", "still there").await;
    sub.line_with("still there").await;

    // A broken one changes nothing, and is told of.
    let failed = r#"carillon_gateway_certificate_loads_total{result="failed"}"#;
    assert_eq!(metric(&server, failed).await, 0.0);
    std::fs::write(authority.dir().join("server.crt"), "no certificate").unwrap();
    metric_reaches(&server, failed, 1.0).await;
    assert_eq!(shown_for(mqtts, None).await.unwrap(), "after");
    eventually("the status says it", || async {
        let status = status(&server).await;
        if status.contains("no certificate in") && status.contains("listener \"mqtts\"") {
            Ok(())
        } else {
            Err(status)
        }
    })
    .await;
    let expiry =
        metric(&server, r#"carillon_gateway_certificate_expiry_timestamp_seconds{listener="mqtts"}"#).await;
    assert!(expiry > 2e9, "{expiry}");
    // It is said once, not at each look.
    tokio::time::sleep(Duration::from_secs(5)).await;
    let logs = server.logs();
    let said = logs
        .lines()
        .filter(|l| l.contains("not as it should be") && l.contains("listener=\"mqtts\""))
        .count();
    assert_eq!(said, 1, "{logs}");
    assert_eq!(metric(&server, failed).await, 2.0, "once for each of two listeners");

    authority.server("server", "mended", &LOCAL);
    shows("mended").await;
    eventually("the status is clean", || async {
        let status = status(&server).await;
        if status.contains("refused") { Err(status) } else { Ok(()) }
    })
    .await;
    server.publish("held", "all the time").await;
    sub.line_with("all the time").await;
    assert_eq!(sub.exit_code().await, Some(0));
}

/// Its exit code is 1 while something is in the way.
async fn status(server: &Server) -> String {
    let output = server.cli_output(&["config", "status", "gateway"]).await;
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test]
async fn listeners_come_and_go() {
    let server = Server::start().await;
    let plain = |name: &str, address: &str| json!({ "name": name, "protocol": "mqtt", "address": address });
    configure(&server, json!([plain("second", "127.0.0.1:0")]), json!({})).await;
    let second = opened(&server, "second", 1).await;
    let mut held = Raw::device(second, 5, "held").await;
    let open =
        |name: &str| format!(r#"carillon_gateway_listener_open_state{{listener="{name}",protocol="mqtt"}}"#);
    assert_eq!(metric(&server, &open("second")).await, 1.0);

    // One that is in the way of nobody else.
    let other = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = other.local_addr().unwrap();
    let both = json!([plain("blocked", &taken.to_string()), plain("third", "127.0.0.1:0")]);
    configure(&server, both, json!({})).await;
    let third = opened(&server, "third", 1).await;
    Raw::device(third, 5, "third").await;
    eventually("the status says why", || async {
        let status = status(&server).await;
        let expected = format!("listener \"blocked\": the port of {taken} is in use");
        if status.contains(&expected) { Ok(()) } else { Err(status) }
    })
    .await;
    assert_eq!(metric(&server, &open("blocked")).await, 0.0);
    assert_eq!(metric(&server, &open("third")).await, 1.0);
    assert!(server.logs().contains("listener is not as it should be"));

    // The second one is gone, its connection is not.
    let refused = tokio::net::TcpStream::connect(second).await;
    assert!(refused.is_err(), "{refused:?}");
    pings(&mut held).await;
    held.send(&mqtt::subscribe(5, 1, "still", 0)).await;
    assert!(matches!(held.answer().await, Answer::Packet(0x90, _)));
    server.publish("still", "served").await;
    assert!(matches!(held.answer().await, Answer::Packet(0x30 | 0x32, _)));

    // When the address is free it is taken.
    drop(other);
    assert_eq!(opened(&server, "blocked", 1).await, taken);
    Raw::device(taken, 5, "free").await;
    // The same address, now WebSocket: those who are there stay what they are.
    let mut before = Raw::device(taken, 5, "before").await;
    configure(
        &server,
        json!([{ "name": "blocked", "protocol": "ws", "address": taken.to_string() }]),
        json!({}),
    )
    .await;
    eventually("it speaks WebSocket", || async {
        let mut raw = Raw::connect(taken).await;
        raw.send(&mqtt::connect(5, "after", 60)).await;
        match raw.answer_within(Duration::from_millis(500)).await {
            Answer::Packet(0x20, _) => Err("MQTT"),
            _ => Ok(()),
        }
    })
    .await;
    pings(&mut before).await;
    // The command line's listener stays, whatever the document says.
    configure(&server, json!([]), json!({})).await;
    eventually("it is gone", || async {
        match tokio::net::TcpStream::connect(taken).await {
            Err(_) => Ok(()),
            Ok(_) => Err("it accepts"),
        }
    })
    .await;
    Raw::device(server.addresses().mqtt, 5, "always").await;
    pings(&mut before).await;
    pings(&mut held).await;
}

#[tokio::test]
async fn discovery_follows_the_listeners() {
    let authority = Authority::new();
    let pair = authority.server("server", "server", &LOCAL);
    let server = Server::start().await;
    let tls = json!({ "certificates": [{ "certificate": pair.certificate, "key": pair.key }] });
    let named = async |scheme: &'static str, expected: Option<String>| {
        let url = format!("{}/v1/endpoints?device=x", server.addresses().http);
        eventually("the dispatcher names it", || async {
            let said: Value = reqwest::get(&url).await.unwrap().json().await.unwrap();
            let url = said["endpoints"][0][scheme].as_str().map(str::to_owned);
            if url == expected { Ok(()) } else { Err(url) }
        })
        .await;
    };
    named("mqtts", None).await;
    configure(
        &server,
        json!([
            { "name": "one", "protocol": "mqtts", "address": "127.0.0.1:0", "tls": tls },
            { "name": "two", "protocol": "wss", "address": "127.0.0.1:0", "tls": tls,
              "advertise": "push.example.com:443" },
        ]),
        json!({}),
    )
    .await;
    let one = opened(&server, "one", 1).await;
    named("mqtts", Some(format!("mqtts://{one}"))).await;
    named("wss", Some("wss://push.example.com:443/mqtt".to_owned())).await;
    named("mqtt", Some(format!("mqtt://{}", server.addresses().mqtt))).await;
    configure(&server, json!([]), json!({})).await;
    named("mqtts", None).await;
    named("wss", None).await;
    named("ws", Some(format!("ws://{}/mqtt", server.addresses().ws))).await;
}

#[tokio::test]
async fn a_bad_listener_is_refused_with_its_path() {
    let server = Server::start().await;
    let pair = "{certificate: /a.crt, key: /a.key}";
    let one = "name: one, protocol: mqtt, address: \"127.0.0.1:4000\"";
    for (yaml, expected) in [
        (format!("[{{{one}, colour: red}}]"), "listeners[0].colour"),
        ("[{name: one, protocol: mqtt}]".to_owned(), "listeners[0]: missing field `address`"),
        ("[{name: One, protocol: mqtt, address: \"1.2.3.4:1\"}]".to_owned(), "listeners[0].name"),
        ("[{name: ws, protocol: ws, address: \"1.2.3.4:1\"}]".to_owned(), "listeners[0].name"),
        ("[{name: one, protocol: http, address: \"1.2.3.4:1\"}]".to_owned(), "listeners[0].protocol"),
        ("[{name: one, protocol: mqtt, address: \"host:1\"}]".to_owned(), "listeners[0].address"),
        (format!("[{{{one}}}, {{{one}}}]"), "listeners[1].name: is that of listeners[0]"),
        (format!("[{{{one}}}, {{{one}}}]"), "listeners[1].address: is that of listeners[0]"),
        (format!("[{{{one}, advertise: nowhere}}]"), "listeners[0].advertise"),
        (format!("[{{{one}, tls: {{certificates: [{pair}]}}}}]"), "listeners[0].tls: mqtt is not over TLS"),
        (
            "[{name: one, protocol: wss, address: \"1.2.3.4:1\"}]".to_owned(),
            "listeners[0].tls: is missing, which wss needs",
        ),
        (
            "[{name: one, protocol: wss, address: \"1.2.3.4:1\", tls: {certificates: []}}]".to_owned(),
            "listeners[0].tls.certificates",
        ),
        (
            "[{name: one, protocol: wss, address: \"1.2.3.4:1\", tls: {certificates: [{certificate: a, key: /b}]}}]"
                .to_owned(),
            "listeners[0].tls.certificates[0].certificate",
        ),
        (
            format!(
                "[{{name: one, protocol: wss, address: \"1.2.3.4:1\", \
                 tls: {{certificates: [{pair}], client_auth: required}}}}]"
            ),
            "listeners[0].tls.client_ca",
        ),
        (
            format!(
                "[{{name: one, protocol: wss, address: \"1.2.3.4:1\", \
                 tls: {{certificates: [{pair}], client_certificate_user: {{app: demo}}}}}}]"
            ),
            "listeners[0].tls.client_certificate_user",
        ),
    ] {
        let file = server.data_dir().with_extension("yaml");
        std::fs::write(&file, format!("listeners: {yaml}\n")).unwrap();
        let output = server.cli_output(&["config", "set", "gateway", "--file", file.to_str().unwrap()]).await;
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{yaml}: {stderr}");
        assert!(stderr.contains(expected), "{yaml}: {stderr}");
    }
}

/// A PROXY header of version 2 with a body.
fn proxy_header(command: u8, family: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = b"\r\n\r\n\0\r\nQUIT\n".to_vec();
    bytes.extend([command, family]);
    bytes.extend((body.len() as u16).to_be_bytes());
    bytes.extend(body);
    bytes
}

/// Where the keeper of sessions believes a user's device to be.
async fn address_of(server: &Server, user: &str) -> String {
    let status = server.get(&format!("users/{user}")).await;
    status["sessions"][0]["address"].as_str().unwrap_or_default().to_owned()
}

#[tokio::test]
async fn behind_a_proxy() {
    let authority = Authority::new();
    let pair = authority.server("server", "server", &LOCAL);
    let server = Server::start().await;
    configure(
        &server,
        json!([
            { "name": "proxied", "protocol": "mqtt", "address": "127.0.0.1:0", "proxy_protocol": true },
            { "name": "proxied-tls", "protocol": "mqtts", "address": "127.0.0.1:0", "proxy_protocol": true,
              "tls": { "certificates": [{ "certificate": pair.certificate, "key": pair.key }] } },
            { "name": "proxied-ws", "protocol": "ws", "address": "127.0.0.1:0", "proxy_protocol": true },
        ]),
        json!({ "connect_timeout_ms": 2000 }),
    )
    .await;
    let proxied = opened(&server, "proxied", 1).await;
    let v4 = [192, 0, 2, 7, 127, 0, 0, 1, 0x12, 0x67, 0x07, 0x5B].to_vec();
    let mut v6 = vec![0x20, 1, 0xD, 0xB8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7];
    v6.extend([0; 16]);
    v6.extend([0x12, 0x67, 0x07, 0x5B]);
    let with_tlv = [&v4[..], &[0x04, 0, 3, 0, 0, 0]].concat();
    let own = "127.0.0.1:";
    for (user, header, expected) in [
        ("v4", proxy_header(0x21, 0x11, &v4), "192.0.2.7:4711"),
        ("v4-tlv", proxy_header(0x21, 0x11, &with_tlv), "192.0.2.7:4711"),
        ("v6", proxy_header(0x21, 0x21, &v6), "[2001:db8::7]:4711"),
        ("local", proxy_header(0x20, 0x00, &[]), own),
        ("unix", proxy_header(0x21, 0x31, &[0; 216]), own),
        ("unspecified", proxy_header(0x21, 0x00, &[]), own),
    ] {
        // All at once, and byte by byte.
        for piece in [10_000, 1] {
            let mut raw = Raw::connect(proxied).await;
            let bytes = [&header[..], &mqtt::connect(5, user, 60)].concat();
            for piece in bytes.chunks(piece) {
                raw.send(piece).await;
                if piece.len() == 1 {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            }
            match raw.answer().await {
                Answer::Packet(0x20, body) => assert_eq!(body[1], 0, "{user}"),
                other => panic!("{user}: {other:?}"),
            }
            eventually("the address is known", || async {
                let address = address_of(&server, user).await;
                if address.starts_with(expected) { Ok(()) } else { Err(address) }
            })
            .await;
        }
    }
    // What is not a header, or not a right one, is closed at once, and counted by what it was.
    for (bytes, error) in [
        (mqtt::connect(5, "direct", 60), "missing"),
        (b"PROXY TCP4 192.0.2.7 127.0.0.1 4711 1883\r\n".to_vec(), "version_1"),
        (proxy_header(0x31, 0x11, &v4), "version"),
        (proxy_header(0x22, 0x11, &v4), "command"),
        (proxy_header(0x21, 0x44, &v4), "family"),
        (proxy_header(0x21, 0x21, &v4), "addresses"),
        (proxy_header(0x21, 0x11, &[0; 5000]), "too_long"),
    ] {
        let began = Instant::now();
        let mut raw = Raw::connect(proxied).await;
        raw.send(&bytes).await;
        assert_eq!(raw.answer().await, Answer::Closed, "{error}");
        assert!(began.elapsed() < Duration::from_secs(2), "{error}: not by the timeout");
        metric_reaches(&server, &format!(r#"carillon_gateway_proxy_errors_total{{error="{error}"}}"#), 1.0)
            .await;
    }
    // One that never ends is closed when its time is over.
    let mut slow = Raw::connect(proxied).await;
    slow.send(&proxy_header(0x21, 0x11, &v4)[..20]).await;
    assert_eq!(slow.answer_within(Duration::from_millis(500)).await, Answer::Silence);
    assert_eq!(slow.answer().await, Answer::Closed);
    metric_reaches(&server, r#"carillon_gateway_disconnects_total{reason="connect_timeout"}"#, 1.0).await;

    // WebSocket after it.
    let mut web = Raw::connect(opened(&server, "proxied-ws", 1).await).await;
    let request = "GET /mqtt HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
                   Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\
                   Sec-WebSocket-Protocol: mqtt\r\n\r\n";
    web.send(&[&proxy_header(0x21, 0x11, &v4)[..], request.as_bytes()].concat()).await;
    match web.answer().await {
        Answer::Packet(b'H', _) => {}
        other => panic!("no HTTP: {other:?}"),
    }
    // And TLS.
    let tls = opened(&server, "proxied-tls", 1).await;
    let Some(mut check) = tls_check("behind_a_proxy", tls, &authority, &[]) else { return };
    check.stdin(std::process::Stdio::piped());
    let mut check = Running::start(check);
    check.line_with("connected").await;
    eventually("the address is known", || async {
        let address = address_of(&server, "proxied").await;
        if address == "192.0.2.77:4711" { Ok(()) } else { Err(address) }
    })
    .await;
    check.kill().await;
}

#[tokio::test]
async fn a_handshake_has_its_time() {
    let authority = Authority::new();
    let server = server_over_tls(&authority.server("server", "server", &LOCAL), &[]).await;
    let mqtts = server.addresses().mqtts.unwrap();
    server.cli(&["config", "set", "gateway", "connect_timeout_ms=1500"]).await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let mut silent = Raw::connect(mqtts).await;
    let mut half = Raw::connect(mqtts).await;
    half.send(&[0x16, 0x03, 0x01, 0x02, 0x00, 0x01]).await;
    for raw in [&mut silent, &mut half] {
        assert_eq!(raw.answer_within(Duration::from_millis(300)).await, Answer::Silence);
    }
    for raw in [&mut silent, &mut half] {
        assert_eq!(raw.answer().await, Answer::Closed);
    }
    metric_reaches(&server, r#"carillon_gateway_tls_handshakes_total{result="connect_timeout"}"#, 2.0).await;
    // MQTT without TLS is told so by an alert, at once.
    let mut plain = Raw::connect(mqtts).await;
    plain.send(&mqtt::connect(5, "plain", 60)).await;
    match plain.answer().await {
        Answer::Packet(0x15, _) | Answer::Closed => {}
        other => panic!("{other:?}"),
    }
    metric_reaches(&server, r#"carillon_gateway_tls_handshakes_total{result="not_tls"}"#, 1.0).await;
}

#[tokio::test]
async fn over_ipv6() {
    if std::net::TcpListener::bind("[::1]:0").is_err() {
        return missing("IPv6");
    }
    let server = Server::start().await;
    configure(
        &server,
        json!([
            { "name": "six", "protocol": "mqtt", "address": "[::1]:0" },
            { "name": "any", "protocol": "mqtt", "address": "[::]:0" },
        ]),
        json!({}),
    )
    .await;
    let (six, any) = (opened(&server, "six", 1).await, opened(&server, "any", 1).await);
    for (listener, user, expected) in [
        (six, "six", "[::1]:"),
        (SocketAddr::new("::1".parse().unwrap(), any.port()), "six-of-any", "[::1]:"),
        // An IPv4 address is one, whatever the socket.
        (SocketAddr::new("127.0.0.1".parse().unwrap(), any.port()), "four-of-any", "127.0.0.1:"),
    ] {
        let _raw = Raw::device(listener, 5, user).await;
        eventually("the address is known", || async {
            let address = address_of(&server, user).await;
            if address.starts_with(expected) { Ok(()) } else { Err(address) }
        })
        .await;
    }
    let Some(publish) = mosquitto("mosquitto_pub", six, "5", &["-t", "x", "-m", "x", "-q", "1"]) else {
        return;
    };
    succeed(publish).await;
}
