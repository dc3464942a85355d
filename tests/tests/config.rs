//! Configuration that changes on the running process, without a restart.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering};

use carillon_tests::cluster::Cluster;
use carillon_tests::mqtt::{self, Answer, Raw};
use carillon_tests::{Server, eventually};
use serde_json::Value;

/// Is a PUBLISH of so many bytes accepted?
async fn accepts(server: &Server, bytes: usize) -> bool {
    takes(server.addresses().mqtt, bytes).await
}

async fn takes(mqtt: SocketAddr, bytes: usize) -> bool {
    // A device of its own each time: one id at several gateways would be one session that moves.
    static DEVICES: AtomicU32 = AtomicU32::new(0);
    let id = format!("sizes-{}", DEVICES.fetch_add(1, Ordering::Relaxed));
    let mut raw = Raw::device(mqtt, 5, &id).await;
    raw.send(&mqtt::publish(5, "sizes", &vec![b'x'; bytes], Some(1))).await;
    match raw.answer().await {
        Answer::Packet(0x40, _) => true,
        Answer::Packet(0xE0, body) => {
            assert_eq!(body[0], 0x95, "packet too large");
            false
        }
        other => panic!("neither PUBACK nor DISCONNECT but {other:02x?}"),
    }
}

#[tokio::test]
async fn a_limit_takes_effect_on_the_running_gateway() {
    let server = Server::start().await;
    let pid = server.pid();
    assert!(accepts(&server, 5_000).await);
    let mut connected = Raw::device(server.addresses().mqtt, 5, "was there before").await;

    let said = server.cli(&["config", "set", "gateway", "max_packet_bytes=1024"]).await;
    assert!(said.contains("gateway is at revision 1"), "{said}");
    eventually("the limit holds", || async {
        if accepts(&server, 5_000).await { Err("accepted") } else { Ok(()) }
    })
    .await;
    assert!(accepts(&server, 500).await);
    // Nobody is disconnected by a change, and its next packet is measured by it.
    connected.send(&[0xC0, 0]).await;
    assert_eq!(connected.answer().await, Answer::Packet(0xD0, vec![]), "PINGRESP");
    connected.send(&mqtt::publish(5, "sizes", &[b'x'; 5000], Some(1))).await;
    assert_eq!(connected.answer().await.disconnect(), Some(0x95), "packet too large");

    server.cli(&["config", "set", "gateway", "max_packet_bytes=1048576"]).await;
    eventually("and is lifted", || async {
        if accepts(&server, 5_000).await { Ok(()) } else { Err("refused") }
    })
    .await;
    assert_eq!(server.pid(), pid, "one process all the time");
    let status = server.cli(&["config", "status", "gateway", "--wait", "15", "--output", "json"]).await;
    let status: Value = serde_json::from_str(&status).unwrap();
    assert_eq!(status[0]["applied_revision"], 2, "{status}");
}

#[tokio::test]
async fn history_and_rollback() {
    let mut server = Server::start().await;
    server.cli(&["config", "set", "gateway", "max_inflight=10", "--comment", "smaller"]).await;
    server.cli(&["config", "set", "gateway", "max_inflight=20", "receive_maximum=30"]).await;
    let dry = server.cli(&["config", "rollback", "gateway", "1", "--dry-run"]).await;
    assert!(dry.starts_with("gateway would be accepted\n~ max_inflight: 20 -> 10\n"), "{dry}");
    let said = server.cli(&["config", "rollback", "gateway", "1", "--comment", "too many"]).await;
    assert!(said.contains("gateway is at revision 3"), "{said}");
    let now: Value =
        serde_json::from_str(&server.cli(&["config", "get", "gateway", "--output", "json"]).await).unwrap();
    assert_eq!(
        (&now["effective"]["max_inflight"], &now["effective"]["receive_maximum"]),
        (&10.into(), &64.into())
    );
    let history = server.cli(&["config", "history", "gateway"]).await;
    let lines: Vec<&str> = history.lines().collect();
    assert_eq!(lines.len(), 3, "{history}");
    assert!(lines[2].contains("smaller") && lines[0].trim_start().starts_with('3'), "{history}");
    assert!(lines[0].ends_with("rolled back to 1: too many"), "{history}");
    let second = server.cli(&["config", "get", "gateway", "--revision", "2"]).await;
    assert!(second.contains("max_inflight: 20"), "{second}");
    // It outlives the process.
    server.kill().await;
    server.restart().await;
    assert_eq!(server.cli(&["config", "history", "gateway"]).await, history);
    // Without its value, a field is back at its default.
    server.cli(&["config", "set", "gateway", "max_inflight="]).await;
    let now = server.cli(&["config", "get", "gateway"]).await;
    assert!(now.contains("max_inflight: 64"), "{now}");
}

#[tokio::test]
async fn a_bad_document_is_refused_with_the_path_of_what_is_wrong() {
    let server = Server::start().await;
    for (arguments, expected) in [
        (&["gateway", "max_packet_bytes=1"][..], "max_packet_bytes: is 1, must be from 128"),
        (&["gateway", "max_packet_bytes=lots"], "max_packet_bytes"),
        (&["gateway", "no_such_field=1"], "no_such_field"),
        (&["gateway", "max_packet_bytes=lots", "no_such_field=1"], "u32\n  no_such_field: unknown field"),
        (&["gateway", "a[=1"], "a["),
        (&["hub", "registry.no_such=1"], "no_such"),
        (&["app/demo", "limits.max_payload_bytes=0"], "limits.max_payload_bytes"),
        (&["app/demo", "topics[0].filter=a/#/b"], "topics[0].filter"),
        (&["app/demo", "api_keys[0].key=short"], "api_keys[0].key"),
        (&["app/de+mo", "root=true"], "name"),
        (&["gate", "x=1"], "gate"),
        (&["app", "x=1"], "app"),
        (&["gateway/one", "max_inflight=1"], "gateway"),
    ] {
        let output = server.cli_output(&[&["config", "set"], arguments].concat()).await;
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {stderr}");
        assert!(stderr.contains(expected), "{arguments:?}: {stderr}");
    }
    for (yaml, expected) in [
        ("max_inflight: [1", ""),
        ("- 5\n- 6\n", "is not a mapping"),
        ("max_inflight: 1\nmax_inflight: 2\n", "max_inflight"),
        ("max_inflight: 4000000000\n", "max_inflight"),
    ] {
        let file = server.data_dir().with_extension("yaml");
        std::fs::write(&file, yaml).unwrap();
        let output = server.cli_output(&["config", "set", "gateway", "--file", file.to_str().unwrap()]).await;
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{yaml:?}: {stderr}");
        assert!(stderr.contains("gateway") && stderr.contains(expected), "{yaml:?}: {stderr}");
    }
    let output = server.cli_output(&["config", "get", "app/nobody"]).await;
    assert_eq!(output.status.code(), Some(1));
    let get = server.cli(&["config", "get", "gateway"]).await;
    assert!(get.contains("never changed"), "nothing of it was taken: {get}");
}

#[tokio::test]
async fn keys_rotate_without_a_restart() {
    let server = Server::start().await;
    server.cli(&["config", "set", "app/demo", "api_keys[1]={name: second, key: a-second-key-1234}"]).await;
    eventually("the second key is in force", || async {
        let output = server.cli_output(&["push", "alice", "x", "--api-key", "a-second-key-1234"]).await;
        if output.status.success() {
            Ok(())
        } else {
            Err(String::from_utf8_lossy(&output.stderr).into_owned())
        }
    })
    .await;
    server.push("alice", "and the first one still is").await;
    server.cli(&["config", "set", "app/demo", "api_keys=[{name: second, key: a-second-key-1234}]"]).await;
    eventually("the first key is not", || async {
        let output = server.cli_output(&["push", "alice", "x"]).await;
        if output.status.code() == Some(1) { Ok(()) } else { Err(output.status) }
    })
    .await;
}

#[tokio::test]
async fn the_log_level_changes_while_it_runs() {
    let server = Server::start().await;
    let status: Value =
        serde_json::from_str(&server.cli(&["config", "status", "--output", "json"]).await).unwrap();
    let instance = status[0]["instance"].as_str().expect("an instance").to_owned();
    let noise = || server.logs().lines().filter(|line| line.contains("DEBUG")).count();
    assert_eq!(noise(), 0);
    let said = server.cli(&["command", &instance, "log-level", "level=trace"]).await;
    assert_eq!(said.trim(), "the log level is trace");
    eventually("it logs more", || async {
        server.push("alice", "x").await;
        if noise() > 0 { Ok(()) } else { Err("nothing yet") }
    })
    .await;
    for (arguments, expected) in [
        (&["command", &instance, "log-level", "level=carillon=loud"][..], "is no log level"),
        (&["command", &instance, "log-level"], "\"level\" is missing"),
        (&["command", &instance, "dance"], "knows no command \"dance\""),
        (&["command", "nobody", "log-level", "level=info"], "nobody"),
    ] {
        let output = server.cli_output(arguments).await;
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {stderr}");
        assert!(stderr.contains(expected), "{arguments:?}: {stderr}");
    }
}

/// A command that must exit with this code; its stdout and stderr.
async fn config(cluster: &Cluster, arguments: &[&str], code: i32) -> String {
    let output = cluster.cli_output(&[&["config"], arguments].concat()).await;
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8(said).unwrap();
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
    said
}

/// Which of three gateways take a PUBLISH of 5,000 bytes.
async fn which_take(cluster: &Cluster) -> [bool; 3] {
    let mut found = [false; 3];
    for (gateway, takes_it) in found.iter_mut().enumerate() {
        *takes_it = takes(cluster.gateways[gateway].mqtt, 5_000).await;
    }
    found
}

async fn becomes(cluster: &Cluster, expected: [bool; 3]) {
    eventually("the limit is where it is meant to be", || async {
        let found = which_take(cluster).await;
        if found == expected { Ok(()) } else { Err(found) }
    })
    .await;
}

#[tokio::test]
async fn a_change_goes_to_one_of_three_gateways_then_to_all_or_back() {
    let cluster = Cluster::start(3, "").await;
    let one = cluster.gateways[1].id.clone();
    config(&cluster, &["set", "gateway", "max_inflight=30"], 0).await;
    config(&cluster, &["status", "gateway", "--wait", "15"], 0).await;
    let small = ["gateway", "max_packet_bytes=1024"];

    let dry = [&["set"], &small[..], &["--instance", &one, "--dry-run"]].concat();
    let said = config(&cluster, &dry, 0).await;
    let whom = format!("gateway would be accepted, for 1 of the 3 live instances that read it: {one}\n");
    assert_eq!(said, format!("{whom}~ max_packet_bytes: 1048576 -> 1024\n"));
    let release = [&["set"], &small[..], &["--instance", &one]].concat();
    let said = config(&cluster, &release, 0).await;
    assert!(
        said.starts_with(&format!("revision 2 of gateway is released to instance {one}, 1 of the 3")),
        "{said}"
    );
    becomes(&cluster, [true, false, true]).await;
    let said = config(&cluster, &["status", "gateway", "--wait", "15"], 0).await;
    assert!(said.ends_with("gateway: all 3 have what is meant for them\n"), "{said}");
    assert_eq!(said.matches("revision 1").count(), 2, "{said}");
    assert!(said.contains("revision 2  being released to it"), "{said}");

    let said = config(&cluster, &["set", "gateway", "max_inflight=20"], 1).await;
    assert!(said.contains("revision 2 of gateway is being released to instance"), "{said}");
    assert!(
        said.contains(
            "(carillon config promote gateway --revision 2) or take it back (carillon config abandon"
        )
    );
    let said = config(&cluster, &["get", "gateway"], 0).await;
    assert!(
        said.starts_with("# gateway, revision 1\n") && said.contains("max_packet_bytes: 1048576"),
        "{said}"
    );
    assert!(said.ends_with(&format!("# revision 2 is being released to instance {one}\n")), "{said}");
    let said = config(&cluster, &["get"], 0).await;
    assert!(said.contains("revision 2 is being released to"), "{said}");

    let said = config(&cluster, &["explain", "gateway.max_packet_bytes", "--instance", &one], 0).await;
    assert!(said.starts_with("gateway.max_packet_bytes = 1024\n"), "{said}");
    assert!(said.contains(&format!("from the release of revision 2 (for instance {one}) by ")), "{said}");
    assert!(said.contains("over the default: 1048576") && said.contains("which has applied it"), "{said}");
    let said = config(&cluster, &["explain", "gateway.max_packet_bytes"], 0).await;
    assert!(
        said.starts_with("gateway.max_packet_bytes = 1048576\n") && said.contains("but 1024 by the release")
    );
    let said = config(&cluster, &["explain", "gateway", "--output", "json"], 0).await;
    let json: Value = serde_json::from_str(&said).unwrap();
    let values = json["values"].as_array().unwrap();
    let inflight = values.iter().find(|one| one["path"] == "max_inflight").unwrap();
    assert_eq!((&inflight["value"], &inflight["sources"][1]["kind"]), (&30.into(), &"document".into()));

    config(&cluster, &["abandon", "gateway", "--comment", "too small"], 0).await;
    becomes(&cluster, [true, true, true]).await;
    config(&cluster, &["status", "gateway", "--wait", "15"], 0).await;
    config(&cluster, &["abandon", "gateway"], 1).await;

    config(&cluster, &release, 0).await;
    becomes(&cluster, [true, false, true]).await;
    let zero = cluster.gateways[0].id.clone();
    config(&cluster, &["release", "gateway", "--instance", &one, "--instance", &zero], 0).await;
    becomes(&cluster, [false, false, true]).await;
    config(&cluster, &["promote", "gateway", "--revision", "2"], 1).await;
    let said = config(&cluster, &["promote", "gateway", "--revision", "3"], 0).await;
    assert!(said.contains("gateway is at revision 3"), "{said}");
    becomes(&cluster, [false, false, false]).await;

    let said = config(&cluster, &["diff", "gateway"], 0).await;
    assert_eq!(said, "# gateway, revision 1 to 3\n~ max_packet_bytes: 1048576 -> 1024\n");
    let said = config(&cluster, &["diff", "gateway", "2", "3"], 0).await;
    assert_eq!(said, "# gateway: revisions 2 and 3 do not differ\n");
    let said = config(&cluster, &["history", "gateway"], 0).await;
    let steps = ["released to", "released to", "targeted to", "promoted", "abandoned: too small"];
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines.len(), 3 + steps.len(), "{said}");
    assert!(steps.iter().all(|step| said.contains(step)) && said.matches("from 127.").count() == 8, "{said}");

    let said = config(&cluster, &["schema", "gateway"], 0).await;
    let schema: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(schema["properties"]["max_packet_bytes"]["type"], "integer", "{said}");
    config(&cluster, &["schema", "gatway"], 1).await;
    config(&cluster, &["release", "gateway"], 2).await;
    config(&cluster, &["set", "gateway", "max_inflight=1", "--percent", "101"], 2).await;
    config(&cluster, &["set", "gateway", "max_inflight=1", "--label", "pool"], 2).await;
}

#[tokio::test]
async fn a_document_goes_to_one_role_then_to_another() {
    let cluster = Cluster::start(2, "").await;
    let key = "a-key-for-one-role";
    // Gateways ask for a token then, and the center takes another key.
    let fields =
        ["set", "app/demo", "anonymous_devices=false", "api_keys[1]={name: new, key: a-key-for-one-role}"];
    let said = config(&cluster, &[&fields[..], &["--role", "gateway"]].concat(), 0).await;
    assert!(said.contains("is released to role gateway, 2 of the 3 live instances that read it"), "{said}");
    let number = said.split_whitespace().nth(1).expect("its number").to_owned();

    let becomes = async |anonymous: [bool; 2], takes_key: bool| {
        eventually("each role has what is meant for it", || async {
            let mut found = [false; 2];
            for (gateway, found) in found.iter_mut().enumerate() {
                let mut raw = Raw::connect(cluster.gateways[gateway].mqtt).await;
                raw.send(&mqtt::connect(5, "nobody", 60)).await;
                *found = matches!(raw.answer().await, Answer::Packet(0x20, body) if body[1] == 0);
            }
            let request = cluster.request(reqwest::Method::GET, "users/nobody");
            let (client, request) = request.build_split();
            let mut request = request.expect("a request");
            request.headers_mut().insert("authorization", format!("Bearer {key}").parse().expect("a header"));
            let answer = client.execute(request).await.map_err(|error| error.to_string())?;
            let found = (found, answer.status().is_success());
            if found == (anonymous, takes_key) { Ok(()) } else { Err(format!("{found:?}")) }
        })
        .await;
    };
    becomes([false, false], false).await;
    let said = config(&cluster, &["status", "app/demo", "--wait", "15"], 0).await;
    assert_eq!(said.matches("being released to it").count(), 2, "{said}");

    let said = config(&cluster, &["release", "app/demo", "--role", "center"], 0).await;
    // Which one it is about is said, and can be said.
    assert!(said.contains(&format!("revision {number} of app/demo, by ")), "{said}");
    assert!(said.contains(&format!("carillon config promote app/demo --revision {number}")), "{said}");
    becomes([true, true], true).await;
    config(&cluster, &["promote", "app/demo", "--revision", &number], 0).await;
    becomes([false, false], true).await;
    let said = config(&cluster, &["promote", "app/demo"], 1).await;
    assert!(said.contains("nothing of app/demo is being released"), "{said}");
}

#[tokio::test]
async fn a_pool_differs_for_good() {
    let edge: &[&str] = &["--pool", "edge"];
    let cluster = Cluster::start_with(&[edge, &["--label", "zone=b"], &["--pool", "core"]], "").await;
    let said = config(&cluster, &["override", "gateway", "edge", "max_packet_bytes=1024"], 1).await;
    assert!(said.contains("override \"edge\" is new: say whom it is for"), "{said}");
    config(&cluster, &["override", "gateway", "edge", "max_packet_bytes=1024", "--pool", "edge"], 0).await;
    becomes(&cluster, [false, true, true]).await;
    config(&cluster, &["override", "gateway", "edge", "max_inflight=7"], 0).await;
    let said = config(&cluster, &["override", "gateway", "edge", "max_packet_bytes=1"], 1).await;
    assert!(said.contains("max_packet_bytes: is 1, must be from 128"), "{said}");
    let said = config(&cluster, &["get", "gateway"], 0).await;
    let expected = "# override edge, for pool=edge:\n#   max_packet_bytes: 1024\n#   max_inflight: 7\n";
    assert!(said.ends_with(expected), "{said}");
    let said = config(&cluster, &["status", "gateway", "--wait", "15"], 0).await;
    assert_eq!(said.matches("with override edge").count(), 1, "{said}");
    let instance = cluster.gateways[0].id.clone();
    let said = config(&cluster, &["explain", "gateway.max_packet_bytes", "--instance", &instance], 0).await;
    assert!(said.contains("from override edge (for pool=edge), since revision 1 by "), "{said}");
    config(&cluster, &["override", "gateway", "edge", "--remove"], 0).await;
    becomes(&cluster, [true, true, true]).await;
    config(&cluster, &["override", "gateway", "edge", "--remove"], 1).await;
    config(&cluster, &["override", "gateway", "edge"], 2).await;
}

#[tokio::test]
async fn a_release_that_one_refuses_is_seen_and_taken_back() {
    let cluster = Cluster::start(3, "").await;
    let two = cluster.gateways[2].id.clone();
    config(&cluster, &["set", "gateway", "max_inflight=30"], 0).await;
    // An address that no machine of ours has (RFC 5737).
    let listener = "listeners=[{name: far, protocol: mqtt, address: '192.0.2.1:1883'}]";
    config(&cluster, &["set", "gateway", listener, "--instance", &two], 0).await;
    eventually("the one gateway says why not", || async {
        let output = cluster.cli_output(&["config", "status", "gateway"]).await;
        let said = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        let told = said.contains("refused 2: listener \"far\"")
            && said.contains("gateway: 2 of 3 have what is meant for them, 0 lag, 1 refuse")
            && said.contains("gateway is not everywhere yet");
        if told && output.status.code() == Some(1) { Ok(()) } else { Err(said) }
    })
    .await;
    config(&cluster, &["status", "gateway", "--wait", "1"], 1).await;
    config(&cluster, &["status"], 0).await;
    config(&cluster, &["abandon", "gateway"], 0).await;
    let said = config(&cluster, &["status", "gateway", "--wait", "15"], 0).await;
    assert!(said.ends_with("gateway: all 3 have what is meant for them\n"), "{said}");
}

#[tokio::test]
async fn keys_are_shown_to_nobody_who_looks_at_changes() {
    let server = Server::start().await;
    server.cli(&["config", "set", "app/demo", "api_keys[1]={name: second, key: hunter-key-number-1}"]).await;
    server.cli(&["config", "set", "app/demo", "api_keys[1].key=hunter-key-number-2"]).await;
    let mut said =
        server.cli(&["config", "set", "app/demo", "api_keys[1].key=hunter-key-number-3", "--dry-run"]).await;
    assert!(said.contains("~ api_keys[1].key: \"(secret)\" -> \"(another secret)\""), "{said}");
    // With all that a machine is told: the other keys are in the same document.
    for more in [&["--dry-run"][..], &[]] {
        let change = ["config", "set", "app/demo", "limits.push_rate_per_second=9", "--output", "json"];
        said.push_str(&server.cli(&[&change[..], more].concat()).await);
    }
    let url = ["config", "set", "app/demo", "webhook={url: 'https://me:hunter-4@example.com/'}"];
    server.cli(&url).await;
    let wrong = server.cli_output(&["config", "set", "app/demo", "api_keys=hunter-5"]).await;
    let wrong = String::from_utf8(wrong.stderr).unwrap();
    assert!(wrong.contains("api_keys: invalid type: (secret), expected a sequence"), "{wrong}");
    said.push_str(&wrong);
    for output in ["text", "json"] {
        for command in
            [&["history", "app/demo"][..], &["diff", "app/demo", "2", "3"], &["explain", "app/demo"]]
        {
            said.push_str(&server.cli(&[&["config"], command, &["--output", output]].concat()).await);
        }
    }
    assert!(!said.contains("hunter") && said.matches("(another secret)").count() >= 3, "{said}");
    let explained = server.cli(&["config", "explain", "app/demo.api_keys[1].key"]).await;
    assert!(explained.starts_with("app/demo.api_keys[1].key = \"(secret)\"\n"), "{explained}");
    assert!(explained.contains("from the document, since revision 3 by"), "{explained}");
    let explained = server.cli(&["config", "explain", "app/demo.webhook.url"]).await;
    assert!(explained.starts_with("app/demo.webhook.url = \"(secret)\"\n"), "{explained}");
}
