//! How a process starts and ends: what stands in its way is said in one clear sentence.

use std::net::TcpListener;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;

use carillon_tests::mqtt::{Answer, Raw, connect};
use carillon_tests::{Server, carillon, eventually, within};
use serde_json::Value;

const ANY: &str = "127.0.0.1:0";

/// Starts `carillon dev`, which must fail; gives its one sentence.
async fn refusal(dir: &Path, flags: &[&str]) -> String {
    let mut arguments = vec!["dev", "--data-dir", dir.to_str().unwrap()];
    for (flag, value) in [("--mqtt", ANY), ("--ws", ANY), ("--http", ANY), ("--ops", ANY)] {
        if !flags.contains(&flag) {
            arguments.extend([flag, value]);
        }
    }
    arguments.extend(flags);
    let output = within("it gives up", carillon(&arguments).output()).await.unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(output.stdout.is_empty(), "nothing is announced");
    let sentences: Vec<&str> = stderr.lines().filter(|line| line.starts_with("carillon: ")).collect();
    assert_eq!(sentences.len(), 1, "one sentence: {stderr}");
    sentences[0].to_owned()
}

#[tokio::test]
async fn a_port_in_use_is_named_with_the_flag_that_changes_it() {
    let other = TcpListener::bind(ANY).unwrap();
    let taken = other.local_addr().unwrap().to_string();
    for flag in ["--mqtt", "--ws", "--http", "--ops"] {
        let dir = tempfile::tempdir().unwrap();
        let said = refusal(&dir.path().join("data"), &[flag, &taken]).await;
        assert!(said.contains(&taken) && said.contains("in use") && said.contains(flag), "{flag}: {said}");
    }
    // Another Carillon is no exception: ports are not shared by accident.
    let server = Server::start().await;
    let dir = tempfile::tempdir().unwrap();
    let taken = server.addresses().mqtt.to_string();
    let said = refusal(&dir.path().join("data"), &["--mqtt", &taken]).await;
    assert!(said.contains(&taken) && said.contains("in use"), "{said}");
}

#[tokio::test]
async fn a_second_process_on_the_same_directory_is_refused() {
    let server = Server::start().await;
    let said = refusal(server.data_dir(), &[]).await;
    assert!(said.contains("in use by another process") && said.contains(&server.pid().to_string()), "{said}");
    // And the first one has not noticed.
    server.push("alice", "still there").await;
}

#[tokio::test]
async fn a_foreign_directory_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("diary.txt"), "dear").unwrap();
    let said = refusal(dir.path(), &[]).await;
    assert!(said.contains("not Carillon's (diary.txt)"), "{said}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[tokio::test]
async fn a_corrupt_directory_is_said_to_be_corrupt() {
    for (file, content) in [("carillon.json", "{\"format\": "), ("keeper/keeper.json", "not json")] {
        let mut server = Server::start().await;
        assert!(server.stop(libc::SIGTERM).await.success());
        std::fs::write(server.data_dir().join(file), content).unwrap();
        let said = refusal(server.data_dir(), &[]).await;
        assert!(said.contains("corrupt") || said.contains("damaged"), "{file}: {said}");
        assert!(said.contains(file.rsplit('/').next().unwrap()) || said.contains("keeper"), "{file}: {said}");
    }
    let mut server = Server::start().await;
    assert!(server.stop(libc::SIGTERM).await.success());
    std::fs::write(server.data_dir().join("carillon.json"), "{\"format\": 2}").unwrap();
    let said = refusal(server.data_dir(), &[]).await;
    assert!(said.contains("newer Carillon (format 2"), "{said}");
}

#[tokio::test]
async fn a_damaged_store_is_not_served_from() {
    let mut server = Server::start().await;
    server.push("alice", "kept").await;
    assert!(server.stop(libc::SIGTERM).await.success());
    // Every file of the saver is overwritten with rubbish of the same length.
    let mut files = 0;
    let mut directories = vec![server.data_dir().join("saver")];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else if let Ok(length @ 1..) = std::fs::metadata(&path).map(|data| data.len()) {
                std::fs::write(&path, vec![0xA5; length as usize]).unwrap();
                files += 1;
            }
        }
    }
    assert!(files > 0);
    let said = refusal(server.data_dir(), &[]).await;
    assert!(said.contains("saver"), "{said}");
}

#[tokio::test]
async fn signals_end_it_in_order() {
    for signal in [libc::SIGINT, libc::SIGTERM] {
        let mut server = Server::start().await;
        server.push("alice", "before").await;
        let status = server.stop(signal).await;
        assert_eq!((status.code(), status.signal()), (Some(0), None), "signal {signal}");
        server.restart().await;
        let kept = server.get("topics/demo%2Fu%2Falice/messages").await;
        assert_eq!(kept["messages"][0]["payload"], "before");
    }
}

#[tokio::test]
async fn a_clean_stop_with_devices_is_quick() {
    let mut server = Server::start().await;
    let mut devices = Vec::new();
    for i in 0..50 {
        devices.push(carillon_tests::mqtt::Raw::device(server.addresses().mqtt, 5, &format!("d{i}")).await);
    }
    let began = std::time::Instant::now();
    assert!(server.stop(libc::SIGINT).await.success());
    assert!(began.elapsed().as_secs() < 8, "{:?}", began.elapsed());
    for mut device in devices {
        match device.answer().await {
            carillon_tests::mqtt::Answer::Packet(0xE0, body) => {
                assert_eq!(body[0], 0x8B, "server shutting down")
            }
            other => panic!("no DISCONNECT but {other:02x?}"),
        }
    }
}

#[tokio::test]
async fn a_wrong_command_line_is_a_usage_error() {
    for arguments in
        [&["dev", "--mqtt", "nowhere"][..], &["dev", "--log-format", "loud"], &["fly"], &["push"], &["hub"]]
    {
        let output = within("it ends", carillon(arguments).output()).await.unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("try '--help'"), "{arguments:?}");
    }
    let dir = tempfile::tempdir().unwrap();
    let said = refusal(&dir.path().join("data"), &["--log-level", "carillon=loud"]).await;
    assert!(said.contains("log level"), "{said}");
}

#[tokio::test]
async fn flags_are_environment_variables_too() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = carillon(&["dev"]);
    command.env("CARILLON_DATA_DIR", dir.path().join("elsewhere")).env("CARILLON_OUTPUT", "json");
    for name in ["CARILLON_MQTT", "CARILLON_WS", "CARILLON_HTTP", "CARILLON_OPS"] {
        command.env(name, ANY);
    }
    let mut running = carillon_tests::tools::Running::start(command);
    let said: Value = serde_json::from_str(&running.line().await).unwrap();
    assert!(said["endpoint"].as_str().unwrap().starts_with("http://127.0.0.1:"), "{said}");
    assert!(dir.path().join("elsewhere/connect.json").is_file());
    running.signal(libc::SIGTERM);
    assert_eq!(running.exit_code().await, Some(0));
}

#[tokio::test]
async fn metrics_and_health_are_served() {
    let server = Server::start().await;
    server.push("alice", "hello").await;
    let ops = &server.addresses().ops;
    let get = |path: &'static str| {
        let url = format!("{ops}{path}");
        async move {
            let response = reqwest::get(url).await.unwrap();
            (response.status().as_u16(), response.text().await.unwrap())
        }
    };
    assert_eq!(get("/healthz").await, (200, "alive\n".to_owned()));
    assert_eq!(get("/readyz").await, (200, "ready\n".to_owned()));
    let (status, metrics) = get("/metrics").await;
    assert_eq!(status, 200);
    for name in [
        "carillon_gateway_",
        "carillon_registry_",
        "carillon_center_",
        "carillon_saver_",
        "carillon_keeper_",
        "process_resident_memory_bytes ",
        "carillon_process_build_info{command=\"dev\"",
    ] {
        assert!(metrics.lines().any(|line| line.starts_with(name)), "{name} is missing in\n{metrics}");
    }
    for line in metrics.lines().filter(|line| line.starts_with("# TYPE ")) {
        let name = line.split(' ').nth(2).unwrap();
        assert!(name.starts_with("carillon_") || name.starts_with("process_"), "{name}");
    }
}

#[tokio::test]
async fn the_roles_run_as_processes_of_their_own() {
    let dir = tempfile::tempdir().unwrap();
    let data = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    // Ports that the kernel has just given and taken back: nobody else gets them so soon.
    let ports: Vec<String> = {
        let sockets: Vec<TcpListener> = (0..8).map(|_| TcpListener::bind(ANY).unwrap()).collect();
        sockets.iter().map(|socket| socket.local_addr().unwrap().to_string()).collect()
    };
    let keeper_url = format!("http://{}", ports[0]);
    let start = |arguments: &[&str]| {
        carillon(arguments).stderr(std::process::Stdio::null()).spawn().expect("it starts")
    };
    let mut keeper =
        start(&["keeper", "--data-dir", &data("keeper"), "--grpc", &ports[0], "--ops", &ports[1]]);
    let mut hub = start(&[
        "hub",
        "--data-dir",
        &data("hub"),
        "--keeper",
        &keeper_url,
        "--grpc",
        &ports[2],
        "--http",
        &ports[3],
        "--ops",
        &ports[4],
    ]);
    let mut gateway = start(&[
        "gateway",
        "--instance",
        "edge-0",
        "--data-dir",
        &data("gateway"),
        "--keeper",
        &keeper_url,
        "--mqtt",
        &ports[5],
        "--ws",
        &ports[6],
        "--ops",
        &ports[7],
    ]);
    for (name, ops) in [("keeper", &ports[1]), ("hub", &ports[4]), ("gateway", &ports[7])] {
        eventually(&format!("the {name} is ready"), || async {
            let answer =
                reqwest::get(format!("http://{ops}/readyz")).await.map_err(|error| error.to_string())?;
            let ready = answer.status().is_success();
            let text = answer.text().await.map_err(|error| error.to_string())?;
            if ready { Ok(()) } else { Err(text) }
        })
        .await;
    }
    let run = |arguments: Vec<String>| async move {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let output = within("it ends", carillon(&arguments).output()).await.unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let to = |words: &[&str]| words.iter().map(ToString::to_string).collect::<Vec<_>>();
    let instances = run(to(&["instances", "--keeper", &keeper_url])).await;
    assert!(instances.lines().any(|line| line.starts_with("edge-0 ")), "{instances}");
    let key = "a-key-of-the-shop-app";
    run(to(&[
        "config",
        "set",
        "app/shop",
        "--keeper",
        &keeper_url,
        &format!("api_keys=[{{name: test, key: {key}}}]"),
        "anonymous_devices=true",
        "root=true",
    ]))
    .await;
    let endpoint = format!("http://{}", ports[3]);
    let connection = ["--app", "shop", "--endpoint", &endpoint, "--api-key", key];
    eventually("the app's key is known", || async {
        let output = carillon(&[&["push", "alice", "across processes"], &connection[..]].concat())
            .output()
            .await
            .unwrap();
        if output.status.success() {
            Ok(())
        } else {
            Err(String::from_utf8_lossy(&output.stderr).into_owned())
        }
    })
    .await;
    let listened = run(to(&[&["listen", "--user", "alice", "-n", "1"], &connection[..]].concat())).await;
    assert_eq!(listened.trim(), "shop/u/alice  across processes");
    for (name, process) in [("gateway", &mut gateway), ("hub", &mut hub), ("keeper", &mut keeper)] {
        // SAFETY: kill has no memory effects; the child is not reaped yet, so the id is its own.
        assert_eq!(unsafe { libc::kill(process.id().unwrap() as libc::pid_t, libc::SIGTERM) }, 0);
        assert_eq!(within("it ends", process.wait()).await.unwrap().code(), Some(0), "{name}");
    }
    let other = ["gateway", "--instance", "edge-1", "--data-dir", &data("gateway"), "--keeper", &keeper_url];
    let output = within("it gives up", carillon(&other).output()).await.unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("--instance is \"edge-1\"") && said.contains("is \"edge-0\"'s"), "{said}");
}

/// A process with its log in a file.
fn logged(arguments: &[&str], log: &Path) -> tokio::process::Child {
    carillon(arguments).stderr(std::fs::File::create(log).unwrap()).spawn().expect("it starts")
}

/// As soon as somebody listens there.
async fn first_connection(address: &str) -> Raw {
    let address = address.parse().unwrap();
    within("somebody listens", async {
        while tokio::net::TcpStream::connect(address).await.is_err() {
            tokio::time::sleep(std::time::Duration::from_micros(200)).await;
        }
    })
    .await;
    Raw::connect(address).await
}

#[tokio::test]
async fn a_gateway_takes_no_device_before_it_knows_its_configuration() {
    let dir = tempfile::tempdir().unwrap();
    let data = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let log = dir.path().join("log");
    let ports: Vec<String> = {
        let sockets: Vec<TcpListener> = (0..8).map(|_| TcpListener::bind(ANY).unwrap()).collect();
        sockets.iter().map(|socket| socket.local_addr().unwrap().to_string()).collect()
    };
    let url = format!("http://{}", ports[0]);
    let gateway = |name: &str| {
        let (data, any) = (data(name), ANY);
        let arguments = ["gateway", "--data-dir", &data, "--keeper", &url, "--mqtt", &ports[2]];
        logged(&[&arguments[..], &["--ws", any, "--ops", any, "--log-format", "text"]].concat(), &log)
    };
    // There is no keeper: it serves all the same, but not at once, and says so.
    let began = std::time::Instant::now();
    let mut alone = gateway("alone");
    let mut device = first_connection(&ports[2]).await;
    let took = began.elapsed();
    assert!(took.as_secs_f64() > 4.5, "{took:?}");
    device.send(&connect(5, "early", 60)).await;
    assert!(matches!(device.answer().await, Answer::Packet(0x20, _)));
    let said = std::fs::read_to_string(&log).unwrap();
    assert!(said.contains("serving with the default limits"), "{said}");
    alone.kill().await.unwrap();

    let mut keeper =
        logged(&["keeper", "--data-dir", &data("keeper"), "--grpc", &ports[0], "--ops", ANY], &log);
    eventually("the keeper takes a document", || async {
        let set = ["config", "set", "gateway", "deny=['127.0.0.0/8']", "--keeper", &url];
        let output = within("it ends", carillon(&set).output()).await.unwrap();
        if output.status.success() {
            Ok(())
        } else {
            Err(String::from_utf8_lossy(&output.stderr).into_owned())
        }
    })
    .await;
    let mut fastest = std::time::Duration::MAX;
    for round in 0..5 {
        let began = std::time::Instant::now();
        let mut gateway = gateway(&format!("gateway-{round}"));
        let mut device = first_connection(&ports[2]).await;
        fastest = fastest.min(began.elapsed());
        device.send(&connect(5, "early", 60)).await;
        assert_eq!(device.answer().await, Answer::Closed, "nobody may connect, the first one neither");
        gateway.kill().await.unwrap();
    }
    // One of five, also on a busy machine.
    assert!(fastest.as_secs() < 4, "as soon as it knows: {fastest:?}");
    keeper.kill().await.unwrap();
}
