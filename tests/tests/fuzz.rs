//! Random sessions against a real process (`tests/python/session_fuzz.py`): whatever devices say and in whatever order, it
//! goes on serving the others, and nothing in it panics.

use carillon_tests::Server;
use carillon_tests::tools::python;

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/python/session_fuzz.py");

/// How long; `CARILLON_FUZZ_SECONDS` for more.
fn seconds() -> u64 {
    let set = std::env::var("CARILLON_FUZZ_SECONDS").ok();
    set.map_or(30, |set| set.parse().expect("CARILLON_FUZZ_SECONDS is a number"))
}

#[tokio::test]
async fn nothing_that_devices_say_stops_the_gateway() {
    let Some(python) = python() else { return };
    let mut server = Server::start().await;
    // Else this address would be refused for its bad tokens.
    server.cli(&["config", "set", "gateway", "max_auth_failures=0"]).await;
    // In force within a second of its arrival.
    tokio::time::sleep(std::time::Duration::from_secs(3)).await;
    let mqtt = server.addresses().mqtt.to_string();
    // The same each time, so that a change alone can make it fail; `CARILLON_FUZZ_SEED` for others.
    let seed = std::env::var("CARILLON_FUZZ_SEED").unwrap_or_else(|_| "1".to_owned());
    let mut command = tokio::process::Command::new(python);
    command.args([SCRIPT, &mqtt, &seconds().to_string(), &seed]).kill_on_drop(true);
    let within = std::time::Duration::from_secs(seconds() + 60);
    let output = tokio::time::timeout(within, command.output()).await.expect("it ends").expect("it runs");
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "seed {seed}: {said}");
    eprintln!("seed {seed}: {}", said.trim());
    assert!(server.stop(libc::SIGTERM).await.success());
    assert!(!server.logs().contains("panicked"), "{}", server.logs());
}
