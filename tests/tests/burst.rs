//! Everyone loses the connection at once and comes back at once: all are served, nobody waits in vain, and a rate for
//! connects is kept by letting them wait, not by turning them away.

use std::time::Duration;

use carillon_tests::server::binary;
use serde_json::Value;
use tokio::process::Command;

/// The machine may be busy with everything else; what hangs is told from what is slow by far.
const BURST_WITHIN: Duration = Duration::from_secs(240);

#[tokio::test]
async fn all_of_2000_devices_come_back_at_once_and_at_the_rate_that_is_let_in() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let json = directory.path().join("burst.json");
    let mut command = Command::new(env!("CARGO_BIN_EXE_burst"));
    command.arg("--carillon").arg(binary()).arg("--json").arg(&json).kill_on_drop(true);
    command.args(["--count=2000", "--gateways=2", "--shards=1", "--rounds=1", "--limited=250"]);
    let output = tokio::time::timeout(BURST_WITHIN, command.output())
        .await
        .expect("it ends in time")
        .expect("it starts");
    let table = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{table}\n{}", String::from_utf8_lossy(&output.stderr));

    let told: Value = serde_json::from_slice(&std::fs::read(&json).expect("the result")).expect("JSON");
    let [all_at_once, limited] = told["bursts"].as_array().expect("bursts").as_slice() else {
        panic!("two bursts: {told}")
    };
    for burst in [all_at_once, limited] {
        assert_eq!(burst["ready"], 2000, "{table}");
        assert_eq!(burst["back_us"]["count"], 2000, "each once: {table}");
        assert_eq!(burst["timeouts"], 0, "{table}");
        assert_eq!(burst["lost"].as_array().map(Vec::len), Some(0), "{table}");
    }
    assert_eq!(all_at_once["accept_pauses"], 0.0, "the limits by default have room for it: {table}");
    // 1000 devices for each gateway: 250 at once, and 250 in each second after that.
    let pauses = limited["accept_pauses"].as_f64().expect("a number");
    assert!(pauses > 0.0, "{table}");
    // A pause lasts 5 ms at least, and there are two shards: more would be a loop that looks again and again.
    let most = 2.0 * limited["back_us"]["max"].as_f64().expect("a number") / 5000.0;
    assert!(pauses <= most, "{pauses} pauses: {table}");
    assert!(limited["back_us"]["max"].as_u64() > Some(2_500_000), "let in faster than the rate: {table}");
}
