//! `carillon operator`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueHint};

use super::LogArgs;

/// Where the keeper of a cluster is, as the operator itself makes its Service.
const KEEPER: &str = "https://{cluster}-keeper.{namespace}.svc:7400";

#[derive(Debug, Clone, Args)]
pub struct OperatorArgs {
    /// Look after this namespace only [default: all]
    #[arg(long, env = "CARILLON_NAMESPACE", value_name = "NAME")]
    pub namespace: Option<String>,
    /// What this process is called in the lease: the name of its pod [default: the host's name]
    #[arg(long, env = "CARILLON_IDENTITY", value_name = "NAME")]
    pub identity: Option<String>,
    /// Where the lease is by which several operators agree on which of them acts [default: the pod's own]
    #[arg(long, env = "CARILLON_LEASE_NAMESPACE", value_name = "NAME")]
    pub lease_namespace: Option<String>,
    /// How long the lease holds without being renewed
    #[arg(long, env = "CARILLON_LEASE_SECONDS", default_value_t = 15, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(6..=600))]
    pub lease_seconds: u64,
    /// The image of clusters that do not say theirs
    #[arg(long, env = "CARILLON_IMAGE", default_value = concat!("carillon:", env!("CARGO_PKG_VERSION")))]
    pub image: String,
    /// How the keeper of a cluster is reached, with {cluster} and {namespace} in it
    #[arg(long, env = "CARILLON_KEEPER_ADDRESS", default_value = KEEPER, hide = true, value_name = "URL")]
    pub keeper_address: String,
    /// Where certificates for the keepers are kept while it runs [default: in the directory for temporary files]
    #[arg(long, env = "CARILLON_DATA_DIR", value_hint = ValueHint::DirPath)]
    pub data_dir: Option<PathBuf>,
    /// Metrics and health
    #[arg(long, env = "CARILLON_OPS", default_value = "127.0.0.1:9090", value_name = "ADDRESS")]
    pub ops: SocketAddr,
    /// How long stopping may take
    #[arg(long, env = "CARILLON_DRAIN_SECONDS", default_value_t = 30, value_name = "SECONDS")]
    pub drain_seconds: u64,
    #[command(flatten)]
    pub logs: LogArgs,
}

impl OperatorArgs {
    pub fn lease(&self) -> Duration {
        Duration::from_secs(self.lease_seconds)
    }
}
