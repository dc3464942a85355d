//! `swarm`: a crowd of MQTT devices in one process; see `carillon_tests::swarm`. `million`, `soak` and `burst` start it; by hand:
//! `(sleep 60; echo report; sleep 1) | swarm --gateway 127.0.0.1:1883 --count 1000`.

use std::net::{Ipv4Addr, SocketAddrV4};

use anyhow::{Context, bail};
use carillon_tests::swarm::crowd::{Crowd, Options};
use carillon_tests::swarm::sys;
use clap::Parser;

/// Files that are no devices: standard streams, epoll, and some to spare.
const OTHER_FILES: u64 = 16;

/// Many MQTT devices in one process. Says how they are on stdout, a JSON line a second; ends when stdin does.
#[derive(Debug, Parser)]
struct Args {
    /// Where they connect to
    #[arg(long, value_name = "ADDRESS")]
    gateway: SocketAddrV4,
    /// The first address that they come from; the next one is used every 8,000 devices
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    source: Ipv4Addr,
    /// How many
    #[arg(long)]
    count: u32,
    /// The first one is user and client `d{FIRST}`
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// MQTT version: 4 (3.1.1) or 5
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u8).range(4..=5))]
    version: u8,
    /// Of their subscriptions
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=1))]
    qos: u8,
    /// Their sessions outlive their connections
    #[arg(long)]
    kept: bool,
    /// Keep-alive, seconds; 0: none
    #[arg(long, value_name = "SECONDS", default_value_t = 1200)]
    keep_alive: u16,
    /// Longest keep-alive: each device has one from --keep-alive to this [default: --keep-alive]
    #[arg(long, value_name = "SECONDS")]
    keep_alive_max: Option<u16>,
    /// Most devices between connect and SUBACK
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    window: u32,
    /// Connects a second while ramping up; 0: as fast as the window allows
    #[arg(long, default_value_t = 0)]
    rate: u32,
    /// Connections ended, and made again, a second
    #[arg(long, value_name = "PER_SECOND", default_value_t = 0.0)]
    churn: f64,
    /// Devices among them that never send anything after CONNECT: the gateway has to end them
    #[arg(long, default_value_t = 0)]
    silent: u32,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let files = sys::raise_open_files().context("cannot raise the number of open files")?;
    if u64::from(args.count) + OTHER_FILES > files {
        bail!("--count {}: this process may open {files} files (ulimit -Hn)", args.count);
    }
    if !args.churn.is_finite() || args.churn < 0.0 {
        bail!("--churn {}: must be 0 or more", args.churn);
    }
    let longest = args.keep_alive_max.unwrap_or(args.keep_alive);
    if longest < args.keep_alive {
        bail!("--keep-alive-max {longest}: must be --keep-alive ({}) or more", args.keep_alive);
    }
    if args.silent > 0 && args.keep_alive == 0 {
        bail!("--silent {}: without a keep-alive nobody ends them", args.silent);
    }
    let mut crowd = Crowd::new(Options {
        gateway: args.gateway,
        source: args.source,
        count: args.count,
        first: args.first,
        version: args.version,
        qos: args.qos,
        kept: args.kept,
        keep_alive: (args.keep_alive, longest),
        window: args.window,
        rate: args.rate,
        churn_per_second: args.churn,
        silent: args.silent,
    })?;
    crowd.run().context("the swarm cannot go on")
}
