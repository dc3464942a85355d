//! `carillon keeper status`, `member` and `snapshot`.

use std::path::PathBuf;

use carillon_agent::admin::parse_node;
use clap::{Subcommand, ValueHint};

use super::{KeeperClientArgs, OutputFormat, host_port};

#[derive(Debug, Clone, Subcommand)]
pub enum KeeperCommand {
    /// How each keeper is: who leads, how far each has come, what it holds
    Status {
        #[command(flatten)]
        keeper: KeeperClientArgs,
    },
    /// Who belongs to the cluster of keepers
    #[command(subcommand)]
    Member(MemberCommand),
    /// All that the keeper holds, as a file
    #[command(subcommand)]
    Snapshot(SnapshotCommand),
}

#[derive(Debug, Clone, Subcommand)]
pub enum MemberCommand {
    /// All members, as the leader sees them
    List {
        #[command(flatten)]
        keeper: KeeperClientArgs,
    },
    /// Take in the blank keeper that waits at an address
    Add {
        /// Where it is
        #[arg(value_name = "HOST:PORT", value_parser = host_port)]
        address: String,
        #[command(flatten)]
        keeper: KeeperClientArgs,
    },
    /// Take a keeper out
    Remove {
        /// Its id, from `member list`
        #[arg(value_parser = parse_node)]
        node: u64,
        #[command(flatten)]
        keeper: KeeperClientArgs,
    },
    /// Hand the lead to another keeper
    Transfer {
        /// Its id, from `member list` [default: the one that is furthest along]
        #[arg(value_parser = parse_node)]
        node: Option<u64>,
        #[command(flatten)]
        keeper: KeeperClientArgs,
    },
}

#[derive(Debug, Clone, Subcommand)]
pub enum SnapshotCommand {
    /// Write all that the keeper holds to a file
    Save {
        #[arg(value_hint = ValueHint::FilePath)]
        file: PathBuf,
        #[command(flatten)]
        keeper: KeeperClientArgs,
    },
    /// Check a file, and say what it holds
    Inspect {
        #[arg(value_hint = ValueHint::FilePath)]
        file: PathBuf,
        /// How the result is printed
        #[arg(long, env = "CARILLON_OUTPUT", value_enum, default_value_t = OutputFormat::Text)]
        output: OutputFormat,
    },
    /// When all keepers are lost: make the data directory of a first new one
    Restore {
        #[arg(value_hint = ValueHint::FilePath)]
        file: PathBuf,
        /// The new keeper's data directory; it must not be in use
        #[arg(long, env = "CARILLON_DATA_DIR", value_hint = ValueHint::DirPath)]
        data_dir: PathBuf,
        /// The id of the cluster that was lost: everything that knew it goes on
        #[arg(long, env = "CARILLON_CLUSTER", value_name = "ID")]
        cluster: String,
        /// How others will reach the new keeper
        #[arg(long, env = "CARILLON_ADVERTISE_GRPC", value_name = "HOST:PORT", value_parser = host_port)]
        advertise_grpc: String,
        /// How the result is printed
        #[arg(long, env = "CARILLON_OUTPUT", value_enum, default_value_t = OutputFormat::Text)]
        output: OutputFormat,
    },
}
