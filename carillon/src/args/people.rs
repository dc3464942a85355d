//! The commands for people, and whom they talk to.

use std::path::PathBuf;
use std::time::Duration;

use carillon_agent::Role;
use clap::{Args, ValueHint};

use super::{DEFAULT_DATA_DIR, KeeperAccessArgs, OutputFormat, keeper_url};

/// What every command for people has that talks to somebody.
#[derive(Debug, Clone, Args)]
pub struct PeopleArgs {
    /// Where `carillon dev` keeps its data
    #[arg(
        long, env = "CARILLON_DATA_DIR", default_value = DEFAULT_DATA_DIR, value_hint = ValueHint::DirPath,
        help_heading = "Connection"
    )]
    pub data_dir: PathBuf,
    /// How results are printed
    #[arg(long, env = "CARILLON_OUTPUT", value_enum, default_value_t = OutputFormat::Text, help_heading = "Connection")]
    pub output: OutputFormat,
}

/// Whom to talk to, and how to answer.
#[derive(Debug, Clone, Args)]
pub struct ClientArgs {
    /// The app
    #[arg(long, env = "CARILLON_APP", default_value = "demo", help_heading = "Connection")]
    pub app: String,
    /// The API's address [default: what `carillon dev` left in the data directory, else http://127.0.0.1:8080]
    #[arg(long, env = "CARILLON_ENDPOINT", value_name = "URL", value_hint = ValueHint::Url, help_heading = "Connection")]
    pub endpoint: Option<String>,
    /// An API key of the app [default: what `carillon dev` left in the data directory]
    #[arg(
        long,
        env = "CARILLON_API_KEY",
        value_name = "KEY",
        hide_env_values = true,
        help_heading = "Connection"
    )]
    pub api_key: Option<String>,
    #[command(flatten)]
    pub people: PeopleArgs,
}

#[derive(Debug, Args)]
#[command(
    override_usage = "carillon push [OPTIONS] <USER> <TEXT>\n       carillon push [OPTIONS] --group <GROUP> <TEXT>\n       carillon push [OPTIONS] --topic <TOPIC> <TEXT>"
)]
pub struct PushArgs {
    /// The user, then the text; only the text with --group or --topic. `-` reads the text from standard input
    #[arg(required = true, num_args = 1..=2, value_names = ["USER", "TEXT"])]
    pub user_and_text: Vec<String>,
    /// To a group
    #[arg(long, conflicts_with = "topic")]
    pub group: Option<String>,
    /// To a topic, with or without the app's level
    #[arg(long)]
    pub topic: Option<String>,
    /// 0: at most once; 1: at least once; 2: exactly once
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(0..=2))]
    pub qos: u8,
    /// Not delivered after so many seconds
    #[arg(long, value_name = "SECONDS")]
    pub ttl: Option<u32>,
    /// Makes a retry harmless: a second push with the same id is the first one
    #[arg(long)]
    pub id: Option<String>,
    /// Keep it for who is away, whatever the app's rules say
    #[arg(long, conflicts_with = "no_store")]
    pub store: bool,
    /// Only for who is there now
    #[arg(long)]
    pub no_store: bool,
    /// Also keep it as the topic's retained message: new subscribers get it first
    #[arg(long)]
    pub retain: bool,
    #[command(flatten)]
    pub client: ClientArgs,
}

#[derive(Debug, Args)]
pub struct BroadcastArgs {
    /// What to send; `-` reads it from standard input
    pub text: String,
    /// Sends per second over all gateways [default: the app's limit]
    #[arg(long, value_name = "PER_SECOND")]
    pub rate: Option<f64>,
    /// Not delivered after so many seconds
    #[arg(long, value_name = "SECONDS")]
    pub ttl: Option<u32>,
    /// Makes a retry harmless
    #[arg(long)]
    pub id: Option<String>,
    /// Do not wait for the end
    #[arg(long)]
    pub detach: bool,
    #[command(flatten)]
    pub client: ClientArgs,
}

#[derive(Debug, Args)]
pub struct ListenArgs {
    /// As which user; its inbox and the broadcasts are subscribed to
    #[arg(long, default_value = "me", env = "CARILLON_USER")]
    pub user: String,
    /// Only this topic filter, as an MQTT client would say it; may be repeated
    #[arg(long)]
    pub topic: Vec<String>,
    /// Also this group; may be repeated
    #[arg(long)]
    pub group: Vec<String>,
    /// 0 or 1: the highest quality of service wanted
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(0..=1))]
    pub qos: u8,
    /// The client id, for a session that is kept [default: a random one, not kept]
    #[arg(long, value_name = "ID")]
    pub device: Option<String>,
    /// How long the session is kept while away; needs --device
    #[arg(long, value_name = "SECONDS", requires = "device", default_value_t = 0)]
    pub session_expiry: u32,
    /// The device's token (JWT); without one it is anonymous
    #[arg(long, env = "CARILLON_TOKEN", hide_env_values = true)]
    pub token: Option<String>,
    /// A gateway's address, mqtt://host:port or ws://host:port/mqtt [default: the dispatcher is asked]
    #[arg(long, value_name = "URL")]
    pub gateway: Option<String>,
    /// End after so many messages
    #[arg(long, short = 'n', value_name = "MESSAGES")]
    pub count: Option<u64>,
    #[command(flatten)]
    pub client: ClientArgs,
}

#[derive(Debug, Args)]
pub struct StatusArgs {
    /// The user; without one, the app's live numbers
    pub user: Option<String>,
    #[command(flatten)]
    pub client: ClientArgs,
}

#[derive(Debug, Args)]
pub struct KickArgs {
    pub user: String,
    #[command(flatten)]
    pub client: ClientArgs,
}

#[derive(Debug, Args)]
pub struct RevokeArgs {
    /// The user; tokens issued to it later are good
    pub user: String,
    #[command(flatten)]
    pub client: ClientArgs,
}

#[derive(Debug, Args)]
pub struct VersionArgs {
    /// How it is printed
    #[arg(long, value_enum, default_value_t = OutputFormat::Text)]
    pub output: OutputFormat,
}

#[derive(Debug, Args)]
pub struct InstancesArgs {
    /// Only those that have this role
    #[arg(long)]
    pub role: Option<Role>,
    #[command(flatten)]
    pub keeper: KeeperClientArgs,
}

#[derive(Debug, Args)]
pub struct CommandArgs {
    /// Its instance id, as `carillon instances` lists them
    pub instance: String,
    /// What it shall do: log-level; of a gateway: drain, drain-abort, drain-status, rebalance
    pub name: String,
    /// What it needs for it: level=debug
    #[arg(value_name = "NAME=VALUE")]
    pub arguments: Vec<String>,
    /// How long it may take
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=600))]
    pub within: u64,
    #[command(flatten)]
    pub keeper: KeeperClientArgs,
}

#[derive(Debug, Args)]
pub struct DrainArgs {
    /// The gateway's instance id, as `carillon status` lists them
    pub instance: String,
    /// Devices sent away each second [default: drain.rate_per_second of the gateway's configuration]
    #[arg(long, value_name = "PER_SECOND")]
    pub rate: Option<f64>,
    /// Who is left after this time is disconnected at once: 90s, 10m, 2h [default: drain.deadline_seconds]
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub deadline: Option<Duration>,
    /// Only to these gateways; may be repeated [default: all that are not draining]
    #[arg(long, value_name = "INSTANCE")]
    pub to: Vec<String>,
    /// Stop it, and take devices again
    #[arg(long, conflicts_with_all = ["rate", "deadline", "to", "detach", "status"])]
    pub abort: bool,
    /// Only say how far it is
    #[arg(long, conflicts_with_all = ["rate", "deadline", "to", "detach"])]
    pub status: bool,
    /// Do not wait for the end
    #[arg(long)]
    pub detach: bool,
    #[command(flatten)]
    pub keeper: KeeperClientArgs,
}

#[derive(Debug, Args)]
pub struct RebalanceArgs {
    /// The gateway's instance id, as `carillon status` lists them
    pub instance: String,
    /// How many devices go
    #[arg(long, value_name = "DEVICES", required_unless_present_any = ["down_to", "abort"], conflicts_with = "down_to")]
    pub count: Option<u64>,
    /// How many stay
    #[arg(long, value_name = "DEVICES")]
    pub down_to: Option<u64>,
    /// Devices sent away each second [default: drain.rate_per_second of the gateway's configuration]
    #[arg(long, value_name = "PER_SECOND")]
    pub rate: Option<f64>,
    /// Devices that connected less than this ago stay [default: rebalance_cooldown_seconds]
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub cooldown: Option<Duration>,
    /// Only to these gateways; may be repeated [default: all that are emptier]
    #[arg(long, value_name = "INSTANCE")]
    pub to: Vec<String>,
    /// Stop it
    #[arg(long, conflicts_with_all = ["count", "down_to", "rate", "cooldown", "to", "detach"])]
    pub abort: bool,
    /// Do not wait for the end
    #[arg(long)]
    pub detach: bool,
    #[command(flatten)]
    pub keeper: KeeperClientArgs,
}

/// Seconds, or a number with a unit: `90`, `90s`, `10m`, `2h`.
pub fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3600,
        unit => return Err(format!("the unit {unit:?} is not known: it is s, m or h")),
    };
    let number: u64 =
        digits.parse().map_err(|_| "must be a whole number with a unit: 90s, 10m, 2h".to_owned())?;
    number.checked_mul(unit).map(Duration::from_secs).ok_or_else(|| "is too long".to_owned())
}

/// Where the keeper is.
#[derive(Debug, Clone, Args)]
pub struct KeeperClientArgs {
    /// The keeper's nodes [default: what `carillon dev` left in the data directory]
    #[arg(
        long,
        env = "CARILLON_KEEPER",
        value_delimiter = ',',
        value_name = "URL",
        value_parser = keeper_url,
        help_heading = "Connection"
    )]
    pub keeper: Vec<String>,
    #[command(flatten)]
    pub access: KeeperAccessArgs,
    #[command(flatten)]
    pub people: PeopleArgs,
}
