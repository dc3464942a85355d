//! The commands for people: push, broadcast, listen, status, kick, revoke, config. Results go to stdout, all else to stderr.

mod bench;
mod broadcast;
mod config;
mod instances;
mod keeper;
mod listen;
mod moves;
mod push;
mod status;

use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;

use carillon_agent::admin::AdminError;
use carillon_client::{ApiError, Backend};
use clap::CommandFactory;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use crate::args::{ClientArgs, Command, DEFAULT_ENDPOINT, KeeperArgs, OutputFormat};
use crate::connect_file::Connect;

/// Why a command failed, and with which code it exits.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// Exit code 1.
    #[error("{0}")]
    Failed(String),
    /// Exit code 2.
    #[error("{0}")]
    Usage(String),
    /// Exit code 3.
    #[error("{0}")]
    Unreachable(String),
    /// Whoever reads our output has gone: no failure.
    #[error("the output was closed")]
    Closed,
}

impl CliError {
    pub fn exit_code(&self) -> ExitCode {
        match self {
            CliError::Closed => ExitCode::SUCCESS,
            CliError::Failed(_) => ExitCode::from(1),
            CliError::Usage(_) => ExitCode::from(2),
            CliError::Unreachable(_) => ExitCode::from(3),
        }
    }
}

impl From<ApiError> for CliError {
    fn from(error: ApiError) -> Self {
        match &error {
            ApiError::Unreachable { .. } => CliError::Unreachable(format!(
                "{error}: start it with `make dev` or `carillon dev`, or say with --endpoint where it is"
            )),
            ApiError::Timeout { .. } => CliError::Unreachable(error.to_string()),
            ApiError::Problem(problem) if problem.status == 401 => CliError::Failed(format!(
                "{error}\n`carillon dev` prints one and leaves it in its data directory; pass it with --api-key or \
                 CARILLON_API_KEY, or run this where ./carillon-data is"
            )),
            ApiError::Endpoint(_) => CliError::Usage(error.to_string()),
            ApiError::Problem(_) | ApiError::Unexpected { .. } => CliError::Failed(error.to_string()),
        }
    }
}

impl From<AdminError> for CliError {
    fn from(error: AdminError) -> Self {
        match &error {
            AdminError::Unreachable { .. } => CliError::Unreachable(format!(
                "{error}\nstart it with `make dev` or `carillon dev`, or say with --keeper where it is"
            )),
            AdminError::Refused { document, violations } => {
                let mut text = format!("{document} was not changed:");
                for violation in violations {
                    text.push_str(&format!("\n  {violation}"));
                }
                CliError::Failed(text)
            }
            _ => CliError::Failed(error.to_string()),
        }
    }
}

impl From<io::Error> for CliError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe => CliError::Closed,
            _ => CliError::Failed(error.to_string()),
        }
    }
}

/// Carries out one command.
pub async fn run(command: Command) -> Result<(), CliError> {
    match command {
        Command::Push(args) => push::run(args).await,
        Command::Broadcast(args) => broadcast::run(args).await,
        Command::Listen(args) => listen::run(args).await,
        Command::Status(args) => status::run(args).await,
        Command::Kick(args) => status::kick(args).await,
        Command::Revoke(args) => status::revoke(args).await,
        Command::Drain(args) => moves::drain(args).await,
        Command::Rebalance(args) => moves::rebalance(args).await,
        Command::Config(command) => config::run(command).await,
        Command::Instances(args) => instances::run(args).await,
        Command::Send(args) => config::command(args).await,
        Command::Bench(command) => bench::run(command).await,
        Command::Version(args) => version(args.output),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut crate::args::Cli::command(), "carillon", &mut script);
            Ok(io::stdout().write_all(&script)?)
        }
        Command::Keeper(KeeperArgs { command: Some(command), .. }) => keeper::run(command).await,
        Command::Dev(_)
        | Command::Keeper(_)
        | Command::Hub(_)
        | Command::Gateway(_)
        | Command::Operator(_) => {
            unreachable!("processes are started by main")
        }
    }
}

fn version(output: OutputFormat) -> Result<(), CliError> {
    #[derive(Serialize)]
    struct Version {
        version: &'static str,
        target: String,
        debug: bool,
    }
    let version = Version {
        version: env!("CARGO_PKG_VERSION"),
        target: format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS),
        debug: cfg!(debug_assertions),
    };
    print(output, &version, |version| format!("carillon {} ({})", version.version, version.target))
}

/// A result: text for people, or one line of JSON.
pub fn print<T: Serialize>(
    output: OutputFormat,
    value: &T,
    text: impl FnOnce(&T) -> String,
) -> Result<(), CliError> {
    let mut stdout = io::stdout().lock();
    match output {
        OutputFormat::Text => writeln!(stdout, "{}", text(value))?,
        OutputFormat::Json => {
            let line = serde_json::to_string(value).map_err(|error| CliError::Failed(error.to_string()))?;
            writeln!(stdout, "{line}")?;
        }
    }
    Ok(stdout.flush()?)
}

/// The backend that the flags, the environment and the data directory speak of, in this order.
fn backend(args: &ClientArgs) -> Result<Backend, CliError> {
    let left = left_behind(&args.people.data_dir);
    let endpoint = endpoint(args, left.as_ref());
    let key = match (&args.api_key, &left) {
        (Some(key), _) => key.clone(),
        // The key is for the process that left it, and goes nowhere but to this machine.
        (None, Some(left)) if is_local(&endpoint) && args.app == left.app => left.api_key.clone(),
        (None, _) => String::new(),
    };
    Ok(Backend::new(endpoint, &args.app, key)?)
}

fn endpoint(args: &ClientArgs, left: Option<&Connect>) -> String {
    let left = left.map(|left| left.endpoint.clone());
    args.endpoint.clone().or(left).unwrap_or_else(|| DEFAULT_ENDPOINT.to_owned())
}

fn left_behind(data_dir: &Path) -> Option<Connect> {
    Connect::read(data_dir)
}

fn is_local(endpoint: &str) -> bool {
    let host = endpoint.split_once("://").map_or(endpoint, |(_, rest)| rest);
    let host = host.split('/').next().unwrap_or_default();
    let host = host
        .strip_prefix('[')
        .and_then(|h| h.split(']').next())
        .unwrap_or_else(|| host.split(':').next().unwrap_or_default());
    matches!(host, "localhost" | "127.0.0.1" | "::1" | "0.0.0.0" | "::")
}

/// The text of an argument; `-` is standard input, without its last line end.
fn text(argument: String) -> Result<Vec<u8>, CliError> {
    /// More cannot be pushed anyway.
    const MOST_BYTES: u64 = 16 * 1024 * 1024;
    if argument != "-" {
        return Ok(argument.into_bytes());
    }
    let mut text = Vec::new();
    io::Read::read_to_end(&mut io::Read::take(io::stdin().lock(), MOST_BYTES + 1), &mut text)?;
    if text.len() as u64 > MOST_BYTES {
        return Err(CliError::Failed(format!("standard input is longer than {MOST_BYTES} bytes")));
    }
    if text.last() == Some(&b'\n') {
        text.pop();
    }
    Ok(text)
}

/// The progress of something with devices, for people who look; `ctrl_c`: what Ctrl-C does to it.
fn bar(ctrl_c: &str) -> ProgressBar {
    let target = if std::io::stderr().is_terminal() {
        ProgressDrawTarget::stderr()
    } else {
        ProgressDrawTarget::hidden()
    };
    let bar = ProgressBar::with_draw_target(Some(1), target);
    let template = format!(
        "{{bar:40.cyan/black.bright}} {{human_pos}}/{{human_len}} devices  {{per_sec}}  {{msg}}  (Ctrl-C {ctrl_c})"
    );
    match ProgressStyle::with_template(&template) {
        Ok(style) => bar.with_style(style.progress_chars("━╸─")),
        Err(_) => bar,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_stays_on_this_machine() {
        for (endpoint, expected) in [
            ("http://127.0.0.1:8080", true),
            ("http://localhost", true),
            ("http://[::1]:8080/x", true),
            ("http://127.0.0.1.example.com:80", false),
            ("https://push.example.com", false),
        ] {
            assert_eq!(is_local(endpoint), expected, "{endpoint}");
        }
    }

    #[test]
    fn the_command_line_is_well_formed() {
        crate::args::Cli::command().debug_assert();
    }
}
