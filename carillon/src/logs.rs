//! Structured logs to stderr, whose level can be changed while the process runs.

use std::io::IsTerminal;

use anyhow::Context;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry, fmt, reload};

use crate::args::LogFormat;

/// Changes the level of the running process.
#[derive(Clone)]
pub struct LogHandle {
    filter: reload::Handle<EnvFilter, Registry>,
}

/// Begins logging. `level` is a level or directives: `info,carillon_gateway=debug`.
pub fn start(level: &str, format: LogFormat) -> anyhow::Result<LogHandle> {
    let (filter, handle) = reload::Layer::new(parse(level)?);
    let terminal = std::io::stderr().is_terminal();
    let json = match format {
        LogFormat::Auto => !terminal,
        LogFormat::Text => false,
        LogFormat::Json => true,
    };
    let registry = tracing_subscriber::registry().with(filter);
    if json {
        let layer = fmt::layer().json().flatten_event(true).with_writer(std::io::stderr);
        registry.with(layer).try_init()
    } else {
        registry
            .with(fmt::layer().with_ansi(terminal).with_target(false).with_writer(std::io::stderr))
            .try_init()
    }
    .context("cannot begin to log")?;
    Ok(LogHandle { filter: handle })
}

impl LogHandle {
    /// Sets another level or other directives.
    pub fn set(&self, level: &str) -> anyhow::Result<()> {
        let filter = parse(level)?;
        self.filter.reload(filter).context("cannot change the log level")
    }
}

/// A plain level is Carillon's own; the libraries below it stay one level quieter, for most of what they tell is about
/// themselves.
fn directives(level: &str) -> String {
    match level.to_ascii_lowercase().as_str() {
        "warn" => "error,carillon=warn".to_owned(),
        "info" => "warn,carillon=info".to_owned(),
        "debug" => "info,carillon=debug".to_owned(),
        "trace" => "debug,carillon=trace".to_owned(),
        _ => level.to_owned(),
    }
}

fn parse(level: &str) -> anyhow::Result<EnvFilter> {
    // A bare word would be taken for the name of a module, and everything else would fall silent.
    let levels = ["off", "error", "warn", "info", "debug", "trace"];
    let is_word = !level.contains(['=', ',']);
    if is_word && !levels.iter().any(|known| known.eq_ignore_ascii_case(level)) {
        anyhow::bail!("{level:?} is no log level: use error, warn, info, debug, trace, off, or directives");
    }
    EnvFilter::try_new(directives(level)).with_context(|| {
        format!("{level:?} is no log level: use error, warn, info, debug, trace, off, or directives")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_and_directives_are_understood_and_nonsense_is_not() {
        for level in ["error", "INFO", "debug", "info,carillon_gateway=debug", "off"] {
            assert!(parse(level).is_ok(), "{level}");
        }
        assert!(parse("shouty").is_err());
        let error = format!("{:#}", parse("carillon=loud").unwrap_err());
        assert!(error.contains("is no log level"), "{error}");
    }
}
