//! `carillon bench`.

use std::time::Duration;

use clap::{Args, Subcommand};

use super::{OutputFormat, duration, plain_keeper_url};

#[derive(Debug, Clone, Subcommand)]
pub enum BenchCommand {
    /// Measure keepers: writes, reads and watches over their network, all keys below `bench/`
    Keeper(BenchKeeperArgs),
}

#[derive(Debug, Clone, Args)]
pub struct BenchKeeperArgs {
    /// The nodes to measure
    #[arg(long, env = "CARILLON_KEEPER", required = true, value_delimiter = ',', value_name = "URL", value_parser = plain_keeper_url)]
    pub keeper: Vec<String>,
    /// The nodes are etcd's: the same load over etcd's API, to compare with
    #[arg(long)]
    pub etcd: bool,
    /// How many write and read at the same time, one after another
    #[arg(long, value_delimiter = ',', default_value = "1,16,256", value_name = "NUMBERS")]
    pub clients: Vec<usize>,
    /// How long each measurement takes
    #[arg(long, default_value = "5s", value_parser = duration, value_name = "TIME")]
    pub time: Duration,
    /// Size of a value, bytes
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(16..=65536))]
    pub value_bytes: u32,
    /// How many watch one key
    #[arg(long, default_value_t = 1000)]
    pub watchers: usize,
    /// Watches over one connection
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    pub watches_per_connection: u32,
    /// Writes a second that are watched
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=10000))]
    pub watched_rate: u32,
    /// The nodes' processes on this machine: their memory before and after the watches is told
    #[arg(long, value_delimiter = ',', value_name = "PIDS")]
    pub pid: Vec<u32>,
    /// How results are printed
    #[arg(long, env = "CARILLON_OUTPUT", value_enum, default_value_t = OutputFormat::Text)]
    pub output: OutputFormat,
}
