//! The command line: what it prints, where, and with which exit code.

use carillon_tests::tools::Running;
use carillon_tests::{Server, carillon, eventually, within};
use serde_json::Value;

/// A listener that is online.
async fn listener(server: &Server, arguments: &[&str]) -> Running {
    let mut command = carillon(&[&["listen"], arguments].concat());
    command.env("CARILLON_DATA_DIR", server.data_dir()).stderr(std::process::Stdio::null());
    let running = Running::start(command);
    let user = arguments.iter().skip_while(|word| **word != "--user").nth(1).unwrap_or(&"me");
    eventually("the listener is online", || async {
        let status = server.get(&format!("users/{user}")).await;
        if status["online"] == true { Ok(()) } else { Err(status) }
    })
    .await;
    running
}

#[tokio::test]
async fn a_push_is_listened_to() {
    let server = Server::start().await;
    let mut alice = listener(&server, &["--user", "alice", "--group", "ringers", "--output", "json"]).await;
    let said = server.cli(&["push", "alice", "hello there"]).await;
    assert!(said.starts_with("accepted as demo/u/alice number 1, id "), "{said}");
    let got: Value = serde_json::from_str(&alice.line().await).unwrap();
    assert_eq!(
        (&got["topic"], &got["payload"], &got["seq"]),
        (&"demo/u/alice".into(), &"hello there".into(), &1.into())
    );

    server.cli(&["push", "--group", "ringers", "to the group"]).await;
    let got: Value = serde_json::from_str(&alice.line().await).unwrap();
    assert_eq!((&got["topic"], &got["payload"]), (&"demo/g/ringers".into(), &"to the group".into()));

    let mut topic = listener(&server, &["--user", "bob", "--topic", "demo/news/+", "-n", "1"]).await;
    server.cli(&["push", "--topic", "news/local", "to a topic"]).await;
    assert_eq!(topic.line().await, "demo/news/local  to a topic");
    assert_eq!(topic.exit_code().await, Some(0), "after one message");

    // A retry with the same id is harmless.
    let first: Value =
        serde_json::from_str(&server.cli(&["push", "alice", "x", "--id", "a", "--output", "json"]).await)
            .unwrap();
    let again: Value =
        serde_json::from_str(&server.cli(&["push", "alice", "x", "--id", "a", "--output", "json"]).await)
            .unwrap();
    assert_eq!((&first["seq"], &again["duplicate"]), (&again["seq"], &true.into()));
    assert_eq!(serde_json::from_str::<Value>(&alice.line().await).unwrap()["id"], "a");

    alice.signal(libc::SIGINT);
    assert_eq!(alice.exit_code().await, Some(0), "Ctrl-C is a good end");
}

#[tokio::test]
async fn what_is_stored_waits_and_what_is_not_does_not() {
    let server = Server::start().await;
    server.cli(&["push", "alice", "kept"]).await;
    server.cli(&["push", "alice", "not kept", "--no-store"]).await;
    server.cli(&["push", "alice", "gone by then", "--ttl", "1"]).await;
    server.cli(&["push", "alice", "at most once", "--qos", "0"]).await;
    tokio::time::sleep(std::time::Duration::from_millis(1500)).await;
    server.cli(&["push", "alice", "last"]).await;
    let got = server.cli(&["listen", "--user", "alice", "-n", "2"]).await;
    assert_eq!(got, "demo/u/alice  kept\ndemo/u/alice  last\n");
}

#[tokio::test]
async fn text_comes_from_standard_input() {
    let server = Server::start().await;
    let mut command = carillon(&["push", "alice", "-"]);
    command
        .env("CARILLON_DATA_DIR", server.data_dir())
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null());
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut stdin, b"two\nlines\n").await.unwrap();
    drop(stdin);
    assert!(within("it ends", child.wait()).await.unwrap().success());
    let kept = server.get("topics/demo%2Fu%2Falice/messages").await;
    assert_eq!(kept["messages"][0]["payload"], "two\nlines");
}

#[tokio::test]
async fn status_and_kick() {
    let server = Server::start().await;
    assert_eq!(server.cli(&["status", "alice"]).await, "alice is offline\n");
    assert_eq!(server.cli(&["kick", "alice"]).await, "alice was not connected\n");
    let _phone = listener(&server, &["--user", "alice", "--device", "phone"]).await;
    let status = server.cli(&["status", "alice"]).await;
    assert!(status.starts_with("alice is online\n  phone  from 127.0.0.1:"), "{status}");
    let since = {
        let status: Value =
            serde_json::from_str(&server.cli(&["status", "alice", "--output", "json"]).await).unwrap();
        status["sessions"][0]["since"].clone()
    };
    assert_eq!(server.cli(&["kick", "alice"]).await, "1 connection of alice was closed\n");
    // It comes back by itself, on another connection.
    eventually("it is back", || async {
        let status = server.get("users/alice").await;
        let new = status["online"] == true && status["sessions"][0]["since"] != since;
        if new { Ok(()) } else { Err(status) }
    })
    .await;
    eventually("the overview counts it", || async {
        let overview = server.cli(&["status"]).await;
        if overview.contains("connections  1") { Ok(()) } else { Err(overview) }
    })
    .await;
}

#[tokio::test]
async fn a_broadcast_reaches_everyone_and_ends() {
    let server = Server::start().await;
    let mut listeners = Vec::new();
    for user in ["alice", "bob", "cleo"] {
        listeners.push(listener(&server, &["--user", user]).await);
    }
    let said = server.cli(&["broadcast", "to all", "--rate", "100"]).await;
    assert!(said.starts_with("finished: sent to 3 of 3 devices, id "), "{said}");
    for listener in &mut listeners {
        assert_eq!(listener.line().await, "demo/all  to all");
    }
    let job: Value =
        serde_json::from_str(&server.cli(&["broadcast", "again", "--output", "json"]).await).unwrap();
    assert_eq!((&job["state"], &job["done"]), (&"finished".into(), &3.into()));
    for listener in &mut listeners {
        assert_eq!(listener.line().await, "demo/all  again");
    }
}

#[tokio::test]
async fn nothing_listening_is_said_with_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    for arguments in
        [&["push", "alice", "x"][..], &["status"], &["kick", "alice"], &["broadcast", "x"], &["listen"]]
    {
        let mut command = carillon(arguments);
        command.env("CARILLON_DATA_DIR", dir.path()).env("CARILLON_ENDPOINT", "http://127.0.0.1:9");
        let output = within("it ends", command.output()).await.unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(3), "{arguments:?}: {stderr}");
        for expected in ["nothing answers at http://127.0.0.1:9", "make dev", "--endpoint"] {
            assert!(stderr.contains(expected), "{arguments:?}: {stderr}");
        }
        assert!(output.stdout.is_empty(), "{arguments:?}");
    }
    let mut command = carillon(&["config", "get", "gateway"]);
    let output = within("it ends", command.env("CARILLON_DATA_DIR", dir.path()).output()).await.unwrap();
    assert_eq!(output.status.code(), Some(3));
    assert!(String::from_utf8_lossy(&output.stderr).contains("--keeper"));
    let output = within("it ends", carillon(&["config", "get", "--keeper", "http://127.0.0.1:9"]).output())
        .await
        .unwrap();
    assert_eq!(output.status.code(), Some(3));
}

#[tokio::test]
async fn mistakes_are_explained() {
    let server = Server::start().await;
    for (arguments, code, expected) in [
        (&["push", "alice"][..], 2, "the user comes first, then the text"),
        (&["push", "alice", "x", "--group", "g"], 2, "only the text is given"),
        (&["push", "alice", "x", "--qos", "3"], 2, "3 is not in 0..=2"),
        (&["push", "al/ice", "x"], 1, "user"),
        (&["push", "--topic", "a/#", "x"], 1, "topic"),
        (&["push", "alice", "x", "--api-key", "wrong"], 1, "CARILLON_API_KEY"),
        (&["push", "alice", "x", "--app", "nobody"], 1, "API key"),
        (&["push", "alice", "x", "--endpoint", "127.0.0.1"], 2, "http://"),
        (&["listen", "--topic", "a/#/b"], 2, "a/#/b"),
        (&["listen", "--token", "not.a.token"], 1, "refused"),
        (&["listen", "--gateway", "mqtts://x"], 2, "TLS"),
        (&["config", "set", "gateway", "max_inflight"], 2, "FIELD=VALUE"),
        (&["config", "rollback", "gateway", "77"], 1, "77"),
    ] {
        let output = server.cli_output(arguments).await;
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {stderr}");
        assert!(stderr.contains(expected), "{arguments:?}: {stderr}");
        assert!(output.stdout.is_empty(), "{arguments:?}: stdout is for results");
    }
}

#[tokio::test]
async fn version_and_completions() {
    let run = async |arguments: &[&str]| within("it ends", carillon(arguments).output()).await.unwrap();
    let version = run(&["version"]).await;
    assert!(
        String::from_utf8_lossy(&version.stdout).starts_with(concat!("carillon ", env!("CARGO_PKG_VERSION")))
    );
    let version: Value = serde_json::from_slice(&run(&["version", "--output", "json"]).await.stdout).unwrap();
    assert_eq!(version["version"], env!("CARGO_PKG_VERSION"));
    for (shell, expected) in
        [("bash", "complete -F"), ("zsh", "#compdef carillon"), ("fish", "complete -c carillon")]
    {
        let script = run(&["completions", shell]).await;
        assert!(script.status.success());
        assert!(String::from_utf8_lossy(&script.stdout).contains(expected), "{shell}");
    }
    for command in
        ["dev", "push", "broadcast", "listen", "status", "kick", "config", "hub", "gateway", "keeper"]
    {
        let help = run(&[command, "--help"]).await;
        assert!(help.status.success() && help.stdout.len() > 100, "{command}");
    }
}
