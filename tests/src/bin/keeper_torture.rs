//! `make keeper-torture`: runs against clusters of keepers, each with another seed, until the time is up.
#![allow(clippy::print_stdout, reason = "it talks to people")]

use std::time::{Duration, Instant};

use carillon_tests::keepers::net;
use carillon_tests::torture::{self, Plan};
use clap::Parser;

#[derive(Parser)]
struct Args {
    /// How long
    #[arg(long, default_value_t = 10)]
    minutes: u64,
    /// Length of a run, seconds
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Of the first run; each further one has the next [default: another one each time]
    #[arg(long)]
    seed: Option<u64>,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    anyhow::ensure!(net::possible(), "network namespaces need root and ip");
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_millis() as u64;
    let mut seed = args.seed.unwrap_or(now % 10_000_000);
    let begun = Instant::now();
    let mut operations = 0;
    while begun.elapsed() < Duration::from_secs(args.minutes * 60) {
        println!("seed {seed}");
        let plan = Plan::new(seed, Duration::from_secs(args.seconds));
        let report = torture::run(&plan).await.map_err(anyhow::Error::msg)?;
        println!("seed {seed}: {report}");
        operations += report.done;
        seed += 1;
    }
    println!("{operations} operations, all linearizable");
    Ok(())
}
