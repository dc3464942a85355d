//! The flags of what serves: `dev`, `keeper`, `hub`, `gateway`.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use carillon_agent::Role;
use clap::{Args, ValueEnum, ValueHint};

use super::{DEFAULT_DATA_DIR, KeeperAccessArgs, KeeperTlsArgs, OutputFormat, keeper_url};

#[derive(Debug, Clone, Args)]
pub struct LogArgs {
    /// What is logged: error, warn, info, debug, trace, or directives as `info,carillon_gateway=debug`
    #[arg(long, env = "CARILLON_LOG_LEVEL", default_value = "info", value_name = "LEVEL")]
    pub log_level: String,
    /// How: text for people, json for machines, auto = text on a terminal
    #[arg(long, env = "CARILLON_LOG_FORMAT", value_enum, default_value_t = LogFormat::Auto)]
    pub log_format: LogFormat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    Auto,
    Text,
    Json,
}

#[derive(Debug, Clone, Args)]
pub struct DevArgs {
    /// Where everything is kept; made when it is not there
    #[arg(long, env = "CARILLON_DATA_DIR", default_value = DEFAULT_DATA_DIR, value_hint = ValueHint::DirPath)]
    pub data_dir: PathBuf,
    /// MQTT for devices. Port 0 = a free one, also below
    #[arg(long, env = "CARILLON_MQTT", default_value = "127.0.0.1:1883", value_name = "ADDRESS")]
    pub mqtt: SocketAddr,
    /// MQTT over WebSocket, for browsers
    #[arg(long, env = "CARILLON_WS", default_value = "127.0.0.1:8083", value_name = "ADDRESS")]
    pub ws: SocketAddr,
    #[command(flatten)]
    pub tls: TlsArgs,
    /// The API for backends, and the console
    #[arg(long, env = "CARILLON_HTTP", default_value = "127.0.0.1:8080", value_name = "ADDRESS")]
    pub http: SocketAddr,
    /// Metrics and health
    #[arg(long, env = "CARILLON_OPS", default_value = "127.0.0.1:9090", value_name = "ADDRESS")]
    pub ops: SocketAddr,
    /// Threads that hold connections; 0 = one for each CPU
    #[arg(long, env = "CARILLON_SHARDS", default_value_t = 0)]
    pub shards: usize,
    /// How long stopping may take
    #[arg(long, env = "CARILLON_DRAIN_SECONDS", default_value_t = 10, value_name = "SECONDS")]
    pub drain_seconds: u64,
    /// What is printed once it serves: a page for people, or one line of JSON
    #[arg(long, env = "CARILLON_OUTPUT", value_enum, default_value_t = OutputFormat::Text)]
    pub output: OutputFormat,
    // Quieter than the roles by themselves: the terminal belongs to the page it prints.
    /// What is logged: error, warn, info, debug, trace, or directives as `info,carillon_gateway=debug`
    #[arg(long, env = "CARILLON_LOG_LEVEL", default_value = "warn", value_name = "LEVEL")]
    pub log_level: String,
    /// How: text for people, json for machines, auto = text on a terminal
    #[arg(long, env = "CARILLON_LOG_FORMAT", value_enum, default_value_t = LogFormat::Auto)]
    pub log_format: LogFormat,
}

/// What every process of a cluster has.
#[derive(Debug, Clone, Args)]
pub struct ProcessArgs {
    /// Where its identity and its data are kept
    #[arg(long, env = "CARILLON_DATA_DIR", default_value = DEFAULT_DATA_DIR, value_hint = ValueHint::DirPath)]
    pub data_dir: PathBuf,
    /// Metrics and health
    #[arg(long, env = "CARILLON_OPS", default_value = "127.0.0.1:9090", value_name = "ADDRESS")]
    pub ops: SocketAddr,
    /// How long stopping may take
    #[arg(long, env = "CARILLON_DRAIN_SECONDS", default_value_t = 30, value_name = "SECONDS")]
    pub drain_seconds: u64,
    #[command(flatten)]
    pub logs: LogArgs,
}

impl ProcessArgs {
    pub fn drain(&self) -> Duration {
        Duration::from_secs(self.drain_seconds)
    }
}

#[derive(Debug, Clone, Args)]
#[command(
    args_conflicts_with_subcommands = true,
    subcommand_help_heading = "Commands for a keeper that runs"
)]
pub struct KeeperArgs {
    #[command(flatten)]
    pub process: ProcessArgs,
    /// gRPC for all other processes. Without TLS anyone who reaches it may change the cluster: keep it inside
    #[arg(long, env = "CARILLON_GRPC", default_value = "127.0.0.1:7400", value_name = "ADDRESS")]
    pub grpc: SocketAddr,
    /// How others reach the gRPC address, as host:port, when it is not the one it listens on
    #[arg(long, env = "CARILLON_ADVERTISE_GRPC", value_name = "HOST:PORT", value_parser = host_port)]
    pub advertise_grpc: Option<String>,
    /// All keepers that are to form the cluster, this one among them; the first by name founds it [default: this one alone]
    #[arg(long, env = "CARILLON_PEERS", value_delimiter = ',', value_name = "HOST:PORT", value_parser = host_port)]
    pub peers: Vec<String>,
    /// The cluster that it must be; a new one gets this id [default: whichever]
    #[arg(long, env = "CARILLON_CLUSTER", value_name = "ID")]
    pub cluster: Option<String>,
    #[command(flatten)]
    pub tls: KeeperTlsArgs,
    /// Entries after which a snapshot is made, and the log before it given up [default: 20000]
    #[arg(long, env = "CARILLON_SNAPSHOT_EVERY", hide = true, value_name = "ENTRIES", value_parser = clap::value_parser!(u64).range(10..))]
    pub snapshot_every: Option<u64>,
    #[command(subcommand)]
    pub command: Option<super::keeper::KeeperCommand>,
}

/// `host:port`
pub fn host_port(text: &str) -> Result<String, String> {
    match text.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port != 0) => {
            Ok(text.to_owned())
        }
        _ => Err("must be host:port".to_owned()),
    }
}

/// What a process is told apart by: configuration can be for some of them.
#[derive(Debug, Clone, Args)]
pub struct LabelArgs {
    /// What this process is called in the cluster; unlike that of any other [default: the name in its certificate for the
    /// keepers, or one that is made up at the first start and kept in the data directory]
    #[arg(long, env = "CARILLON_INSTANCE", value_name = "ID", value_parser = instance)]
    pub instance: Option<String>,
    /// A label of this process; may be repeated
    #[arg(long = "label", env = "CARILLON_LABELS", value_delimiter = ',', value_name = "KEY=VALUE", value_parser = label)]
    labels: Vec<(String, String)>,
    /// The same as --label pool=NAME
    #[arg(long, env = "CARILLON_POOL", value_name = "NAME", value_parser = pool)]
    pool: Option<(String, String)>,
}

impl LabelArgs {
    pub fn labels(&self) -> BTreeMap<String, String> {
        self.labels.iter().chain(&self.pool).cloned().collect()
    }
}

fn instance(id: &str) -> Result<String, String> {
    carillon_agent::keys::check_instance(id)?;
    Ok(id.to_owned())
}

/// `key=value`
pub(super) fn label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("must be KEY=VALUE")?;
    let label = (key.to_owned(), value.to_owned());
    carillon_agent::target::check_labels(&BTreeMap::from([label.clone()]))?;
    Ok(label)
}

pub(super) fn pool(name: &str) -> Result<(String, String), String> {
    label(&format!("pool={name}"))
}

#[derive(Debug, Clone, Args)]
pub struct HubArgs {
    #[command(flatten)]
    pub process: ProcessArgs,
    #[command(flatten)]
    pub labels: LabelArgs,
    /// The keeper's nodes
    #[arg(long, env = "CARILLON_KEEPER", required = true, value_delimiter = ',', value_name = "URL", value_parser = keeper_url)]
    pub keeper: Vec<String>,
    #[command(flatten)]
    pub access: KeeperAccessArgs,
    /// Which roles
    #[arg(
        long, env = "CARILLON_ROLES", value_delimiter = ',', value_name = "ROLES",
        default_value = "registry,center,saver,coordinator,dispatcher", value_parser = hub_role
    )]
    pub roles: Vec<Role>,
    /// The store of the saver that is lost, or given up with all messages and sessions in it: the one here is the saver instead
    #[arg(long, env = "CARILLON_TAKE_OVER_SAVER", value_name = "STORE")]
    pub take_over_saver: Option<String>,
    /// The API for backends, and the console
    #[arg(long, env = "CARILLON_HTTP", default_value = "127.0.0.1:8080", value_name = "ADDRESS")]
    pub http: SocketAddr,
    /// gRPC for the other processes of the cluster: keep it inside
    #[arg(long, env = "CARILLON_GRPC", default_value = "127.0.0.1:7401", value_name = "ADDRESS")]
    pub grpc: SocketAddr,
    /// How others reach the gRPC address, as host:port, when it is not the one it listens on
    #[arg(long, env = "CARILLON_ADVERTISE_GRPC", value_name = "HOST:PORT")]
    pub advertise_grpc: Option<String>,
}

#[derive(Debug, Clone, Args)]
pub struct GatewayArgs {
    #[command(flatten)]
    pub process: ProcessArgs,
    #[command(flatten)]
    pub labels: LabelArgs,
    /// The keeper's nodes
    #[arg(long, env = "CARILLON_KEEPER", required = true, value_delimiter = ',', value_name = "URL", value_parser = keeper_url)]
    pub keeper: Vec<String>,
    #[command(flatten)]
    pub access: KeeperAccessArgs,
    /// MQTT for devices; none: not at all, where all are to use TLS
    #[arg(long, env = "CARILLON_MQTT", default_value = "127.0.0.1:1883", value_name = "ADDRESS", value_parser = or_none)]
    pub mqtt: OrNone,
    /// MQTT over WebSocket; none: not at all
    #[arg(long, env = "CARILLON_WS", default_value = "127.0.0.1:8083", value_name = "ADDRESS", value_parser = or_none)]
    pub ws: OrNone,
    #[command(flatten)]
    pub tls: TlsArgs,
    /// How devices reach the MQTT address, as host:port, when it is not the one it listens on
    #[arg(long, env = "CARILLON_ADVERTISE_MQTT", value_name = "HOST:PORT")]
    pub advertise_mqtt: Option<String>,
    /// How devices reach the WebSocket address, as host:port, when it is not the one it listens on
    #[arg(long, env = "CARILLON_ADVERTISE_WS", value_name = "HOST:PORT")]
    pub advertise_ws: Option<String>,
    /// How devices reach the MQTT over TLS address, as host:port, when it is not the one it listens on
    #[arg(long, env = "CARILLON_ADVERTISE_MQTTS", value_name = "HOST:PORT")]
    pub advertise_mqtts: Option<String>,
    /// How devices reach the WebSocket over TLS address, as host:port, when it is not the one it listens on
    #[arg(long, env = "CARILLON_ADVERTISE_WSS", value_name = "HOST:PORT")]
    pub advertise_wss: Option<String>,
    /// Threads that hold connections; 0 = one for each CPU
    #[arg(long, env = "CARILLON_SHARDS", default_value_t = 0)]
    pub shards: usize,
}

/// An address to listen on, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OrNone(pub Option<SocketAddr>);

fn or_none(text: &str) -> Result<OrNone, String> {
    match text {
        "none" => Ok(OrNone(None)),
        address => match address.parse() {
            Ok(address) => Ok(OrNone(Some(address))),
            Err(_) => Err("must be ip:port, or none".to_owned()),
        },
    }
}

/// Listeners over TLS. More of them, and more of what they can do, are in the `gateway` document.
#[derive(Debug, Clone, Args)]
pub struct TlsArgs {
    /// MQTT over TLS for devices [default: none]
    #[arg(long, env = "CARILLON_MQTTS", value_name = "ADDRESS", requires_all = ["tls_certificate", "tls_key"])]
    pub mqtts: Option<SocketAddr>,
    /// MQTT over WebSocket over TLS [default: none]
    #[arg(long, env = "CARILLON_WSS", value_name = "ADDRESS", requires_all = ["tls_certificate", "tls_key"])]
    pub wss: Option<SocketAddr>,
    /// The certificate for both, and those between it and the root (PEM); read again when it changes
    #[arg(long, env = "CARILLON_TLS_CERTIFICATE", value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub tls_certificate: Option<PathBuf>,
    /// The certificate's private key (PEM)
    #[arg(long, env = "CARILLON_TLS_KEY", value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub tls_key: Option<PathBuf>,
    /// Devices must show a certificate that one of these authorities has signed (PEM)
    #[arg(long, env = "CARILLON_TLS_CLIENT_CA", value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub tls_client_ca: Option<PathBuf>,
}

fn hub_role(name: &str) -> Result<Role, String> {
    let role: Role = name.trim().parse().map_err(|error: carillon_agent::UnknownRole| error.to_string())?;
    if role == Role::Gateway {
        Err("a hub has no gateway: run `carillon gateway`".to_owned())
    } else {
        Ok(role)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gateway_can_be_without_listeners_of_the_command_line() {
        assert_eq!(or_none("none"), Ok(OrNone(None)));
        assert_eq!(or_none("[::1]:1883"), Ok(OrNone(Some("[::1]:1883".parse().unwrap()))));
        assert_eq!(or_none("off"), Err("must be ip:port, or none".to_owned()));
        let tls =
            TlsArgs { mqtts: None, wss: None, tls_certificate: None, tls_key: None, tls_client_ca: None };
        let some = Some("127.0.0.1:0".parse().unwrap());
        for (mqtt, ws, expected) in [(None, None, 0), (some, None, 1), (None, some, 1), (some, some, 2)] {
            assert_eq!(crate::listeners::of_flags(mqtt, ws, &tls).unwrap().len(), expected);
        }
    }
}
