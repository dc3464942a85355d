//! The command line: every command and flag, each flag also an environment variable `CARILLON_…`.

pub mod bench;
pub mod config;
pub mod keeper;
mod operator;
mod people;
mod processes;
mod security;

use clap::{Parser, Subcommand, ValueEnum};

pub use self::operator::*;
pub use self::people::*;
pub use self::processes::*;
pub use self::security::*;

/// Where everything of one machine is kept unless said otherwise.
pub const DEFAULT_DATA_DIR: &str = "./carillon-data";
/// Where `carillon dev` answers unless said otherwise.
pub const DEFAULT_ENDPOINT: &str = "http://127.0.0.1:8080";

const AFTER_HELP: &str = "\
Exit codes:
  0  done
  1  refused or failed; stderr says why
  2  the command line is wrong
  3  nothing answers there: worth trying again later";

/// Push messages to users, groups and everyone, over MQTT.
#[derive(Debug, Parser)]
#[command(name = "carillon", version, after_help = AFTER_HELP, propagate_version = true, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run everything in one process, on this machine: the quickest way to a push
    Dev(DevArgs),
    /// Run a keeper (configuration, discovery, slots), or look at it and change its members
    Keeper(KeeperArgs),
    /// Run a hub: registry, center, saver, coordinator, dispatcher, or some of them
    Hub(HubArgs),
    /// Run a gateway: it holds the devices' connections
    Gateway(GatewayArgs),
    /// Run the operator: it turns resources of Kubernetes into running pods
    Operator(OperatorArgs),

    /// Push a message to a user (or to a group, or a topic)
    Push(PushArgs),
    /// Push a message to everyone in the app, at a rate, and watch how far it is
    Broadcast(BroadcastArgs),
    /// Be a device: print what it receives
    Listen(ListenArgs),
    /// Show the app's live numbers, or whether a user is online
    Status(StatusArgs),
    /// Disconnect all devices of a user
    Kick(KickArgs),
    /// Refuse a user's tokens from now on, and disconnect who is connected with one
    Revoke(RevokeArgs),
    /// Read and change the cluster's configuration, live
    #[command(subcommand)]
    Config(config::ConfigCommand),
    /// Send all devices of a gateway to other gateways, at a rate, and watch how far it is
    Drain(DrainArgs),
    /// Send some devices of a gateway to emptier gateways
    Rebalance(RebalanceArgs),
    /// List the cluster's processes: who they are, where, and how busy
    Instances(InstancesArgs),
    /// Have a running process do something, such as log more
    #[command(name = "command")]
    Send(CommandArgs),
    /// Put load on what runs, and measure it
    #[command(subcommand)]
    Bench(bench::BenchCommand),
    /// Print the version
    Version(VersionArgs),
    /// Print the completions of a shell: source them, or put them where the shell looks
    Completions { shell: clap_complete::Shell },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OutputFormat {
    Text,
    Json,
}

/// `http://host:port` or `https://host:port` of a keeper's node.
fn keeper_url(text: &str) -> Result<String, String> {
    const FORM: &str = "must be http://host:port, or https://host:port with certificates";
    let rest = text.strip_prefix("http://").or_else(|| text.strip_prefix("https://")).ok_or(FORM)?;
    let (host, port) = rest.trim_end_matches('/').rsplit_once(':').ok_or(FORM)?;
    if host.is_empty() || port.parse::<u16>().is_err() {
        return Err(FORM.to_owned());
    }
    Ok(text.trim_end_matches('/').to_owned())
}

/// One without TLS.
fn plain_keeper_url(text: &str) -> Result<String, String> {
    match keeper_url(text) {
        Ok(url) if url.starts_with("http://") => Ok(url),
        _ => Err("must be http://host:port".to_owned()),
    }
}
