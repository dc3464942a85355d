//! Random sessions against a real process (`tests/python/session_fuzz.py`): whatever devices say and in whatever order, it
//! goes on serving the others, and nothing in it panics.

use carillon_tests::Server;
use carillon_tests::tools::python;

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/python/session_fuzz.py");
/// Cases that each show something that no other does.
const CORPUS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/corpus/session");
/// Where the cases of a run that fails are left.
const FAILED: &str = concat!(env!("CARGO_TARGET_TMPDIR"), "/failed-sessions");

/// How long in all; `CARILLON_FUZZ_SECONDS` for more.
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
    let metrics = format!("{}/metrics", server.addresses().ops);
    // The same each time, so that a change alone can make it fail; `CARILLON_FUZZ_SEED` for others.
    let seed = std::env::var("CARILLON_FUZZ_SEED").unwrap_or_else(|_| "1".to_owned());
    let mut command = tokio::process::Command::new(python);
    command.args([SCRIPT, &mqtt, &metrics, "--corpus", CORPUS, "--failed", FAILED]);
    command.args(["--seconds", &seconds().to_string(), "--seed", &seed]).kill_on_drop(true);
    // `CARILLON_FUZZ_KEEP`: where new cases are kept, to be merged into the corpus.
    if let Some(keep) = std::env::var_os("CARILLON_FUZZ_KEEP") {
        command.arg("--keep").arg(keep);
    }
    // The corpus is run as a whole, whatever it takes.
    let within = std::time::Duration::from_secs(seconds() + 180);
    let output = tokio::time::timeout(within, command.output()).await.expect("it ends").expect("it runs");
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "seed {seed}: {said}");
    eprintln!("seed {seed}: {}", said.trim());
    assert!(server.stop(libc::SIGTERM).await.success());
    assert!(!server.logs().contains("panicked"), "{}", server.logs());
}

/// Small enough to be read and run each time, and every case still of the form that is run.
#[test]
fn the_corpus_is_small_and_readable() {
    let mut files = 0;
    let mut bytes = 0;
    for entry in std::fs::read_dir(CORPUS).expect("the corpus is there") {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        files += 1;
        bytes += text.len();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let words: Vec<&str> = line.split(' ').collect();
            let is_right = match words[..] {
                [number, "open" | "close" | "reset"] => number.parse::<u8>().is_ok(),
                [number, "send", hex] => {
                    number.parse::<u8>().is_ok()
                        && hex.len() % 2 == 0
                        && hex.bytes().all(|b| b.is_ascii_hexdigit())
                }
                _ => false,
            };
            assert!(is_right, "{}: {line}", path.display());
        }
    }
    assert!((20..300).contains(&files), "{files} cases");
    assert!(bytes < 1 << 20, "{bytes} bytes");
}
