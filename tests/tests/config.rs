//! Configuration that changes on the running process, without a restart.

use carillon_tests::mqtt::{self, Answer, Raw};
use carillon_tests::{Server, eventually};
use serde_json::Value;

/// Is a PUBLISH of so many bytes accepted?
async fn accepts(server: &Server, bytes: usize) -> bool {
    let mut raw = Raw::device(server.addresses().mqtt, 5, "sizes").await;
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
    let status = server.cli(&["config", "status", "gateway", "--output", "json"]).await;
    let status: Value = serde_json::from_str(&status).unwrap();
    assert_eq!(status[0]["applied_revision"], 2, "{status}");
}

#[tokio::test]
async fn history_and_rollback() {
    let mut server = Server::start().await;
    server.cli(&["config", "set", "gateway", "max_inflight=10", "--comment", "smaller"]).await;
    server.cli(&["config", "set", "gateway", "max_inflight=20", "receive_maximum=30"]).await;
    let said = server.cli(&["config", "rollback", "gateway", "1"]).await;
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
        ("- a\n- b\n", ""),
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
