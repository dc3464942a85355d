//! Histories of a cluster of keepers under faults, judged by checkers that are themselves checked.

use std::time::Duration;

use carillon_tests::keepers::net;
use carillon_tests::tools;
use carillon_tests::torture::{self, Plan};

/// A run has at least so many.
const OPERATIONS: usize = 3000;

/// `CARILLON_TORTURE_SEED`, or another one each time.
fn seed(number: u64) -> u64 {
    let given = std::env::var("CARILLON_TORTURE_SEED").ok().and_then(|seed| seed.parse().ok());
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() as u64;
    given.unwrap_or(now % 1_000_000 * 10 + number)
}

async fn one_run(number: u64) {
    if !net::possible() {
        return tools::missing("root, to make network namespaces with ip,");
    }
    let plan = Plan { operations: OPERATIONS, ..Plan::new(seed(number), Duration::from_secs(18)) };
    eprintln!("seed {}", plan.seed);
    let report = torture::run(&plan).await.unwrap_or_else(|error| panic!("{error}"));
    eprintln!("seed {}: {report}", plan.seed);
    assert!(report.done >= OPERATIONS, "too few operations to say anything: {}", report.done);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_never_contradicts_itself() {
    for number in 0..3 {
        one_run(number).await;
    }
}
