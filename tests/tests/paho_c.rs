//! Paho's C library against a real process: `tests/c/paho_checks.c`, a test for each check, built here with `cc`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use carillon_tests::certificates::Authority;
use carillon_tests::mqtt::{self, Answer, Raw};
use carillon_tests::tools::{find, missing, run, succeed};
use carillon_tests::{Server, eventually};
use tokio::process::Command;
use tokio::sync::OnceCell;

const SOURCE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/c/paho_checks.c");

/// The library looks up once a second, so several connections take their time; each step has its own limit in there.
const ENOUGH: Duration = Duration::from_secs(90);

/// The program, built once; none, said loudly, where there is no compiler or library.
async fn program() -> Option<&'static Path> {
    static PROGRAM: OnceCell<Result<PathBuf, &'static str>> = OnceCell::const_new();
    match PROGRAM.get_or_init(build).await {
        Ok(program) => Some(program),
        Err(lacking) => {
            missing(lacking);
            None
        }
    }
}

async fn build() -> Result<PathBuf, &'static str> {
    let cc = find("cc").ok_or("a C compiler")?;
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join("paho_checks");
    // Is the library there? Only then is it our fault if the program does not build.
    let mut probe = Command::new(&cc);
    probe.args(["-include", "MQTTAsync.h", "-x", "c", "-fsyntax-only", "/dev/null"]);
    if !run(probe).await.status.success() {
        return Err("Paho's C library (libpaho-mqtt-dev)");
    }
    let mut command = Command::new(cc);
    command.args(["-std=gnu11", "-O1", "-Wall", "-Wextra", "-o"]).arg(&program).arg(SOURCE);
    command.args(["-lpaho-mqtt3as", "-lpthread"]);
    succeed(command).await;
    Ok(program)
}

async fn holds(name: &str, uri: &str, more: &[&str]) {
    let Some(program) = program().await else { return };
    let mut command = Command::new(program);
    command.args([name, uri]).args(more).kill_on_drop(true);
    let output = tokio::time::timeout(ENOUGH, command.output()).await.expect("it ends").expect("it runs");
    let printed = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert_eq!(printed.trim(), format!("ok {name}"));
    assert!(output.status.success(), "{}", output.status);
}

async fn check(name: &str) {
    if program().await.is_none() {
        return;
    }
    let server = Server::start().await;
    holds(name, &format!("tcp://{}", server.addresses().mqtt), &[]).await;
}

macro_rules! checks {
    ($($name:ident)*; $($other:literal)*) => {
        $(#[tokio::test]
        async fn $name() {
            check(stringify!($name)).await;
        })*

        /// The program and this list are the same.
        #[tokio::test]
        async fn every_check_is_a_test() {
            let Some(program) = program().await else { return };
            let mut command = Command::new(program);
            command.arg("list");
            let printed = succeed(command).await;
            let mut listed: Vec<&str> = printed.split_whitespace().collect();
            let mut tested = vec![$(stringify!($name),)* $($other),*];
            listed.sort_unstable();
            tested.sort_unstable();
            assert_eq!(listed, tested);
        }
    };
}

checks! {
    everything_arrives_once_in_order
    quality_of_service_is_the_lower_of_both
    sessions_are_kept
    sessions_expire
    retained_messages
    wills_are_sent
    a_will_may_be_delayed
    properties_travel
    messages_expire
    request_and_response
    aliases_both_ways
    receive_maximum_is_kept
    reason_codes
    many_filters_have_a_code_each
    bad_tokens_are_refused
    taken_over
    subscription_options
    shared_subscriptions
    lost_connections_are_made_again;
    // Those that need more than a server, below.
    "server_keep_alive"
    "over_another_transport"
}

#[tokio::test]
async fn server_keep_alive() {
    if program().await.is_none() {
        return;
    }
    let server = Server::start().await;
    server.cli(&["config", "set", "gateway", "max_keep_alive_seconds=4"]).await;
    in_force(&server).await;
    holds("server_keep_alive", &format!("tcp://{}", server.addresses().mqtt), &[]).await;
}

/// Waits until the gateway has applied what was configured.
async fn in_force(server: &Server) {
    eventually("CONNACK says Server Keep Alive", || async {
        let mut raw = Raw::connect(server.addresses().mqtt).await;
        raw.send(&mqtt::connect(5, "asks", 60)).await;
        match raw.answer().await {
            Answer::Packet(0x20, body) if body.windows(3).any(|some| some == [0x13, 0, 4]) => Ok(()),
            other => Err(other),
        }
    })
    .await;
}

#[tokio::test]
async fn over_tls_and_web_sockets() {
    if program().await.is_none() {
        return;
    }
    let authority = Authority::new();
    let pair = authority.server("server", "server", &["localhost", "127.0.0.1"]);
    let any = "127.0.0.1:0";
    let flags =
        ["--mqtts", any, "--wss", any, "--tls-certificate", &pair.certificate, "--tls-key", &pair.key];
    let server = Server::start_with(&flags).await;
    let at = server.addresses();
    let ca = authority.ca();
    for (uri, more) in [
        (format!("ws://{}/mqtt", at.ws), vec![]),
        (format!("ssl://{}", at.mqtts.unwrap()), vec![ca.as_str()]),
        (format!("wss://{}/mqtt", at.wss.unwrap()), vec![ca.as_str()]),
    ] {
        holds("over_another_transport", &uri, &more).await;
    }
}
