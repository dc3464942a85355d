//! `carillon config status`: has everyone what is meant for it?

use std::time::{Duration, Instant};

use carillon_agent::admin::{Admin, Standing, State};

use crate::args::OutputFormat;
use crate::cli::{CliError, print};

/// Between two looks while it is waited.
const PAUSE: Duration = Duration::from_millis(300);

pub async fn run(
    admin: &Admin,
    document: Option<&str>,
    wait: Option<u64>,
    output: OutputFormat,
) -> Result<(), CliError> {
    let deadline = Instant::now() + Duration::from_secs(wait.unwrap_or(0));
    let standings = loop {
        let standings = admin.standings(document).await?;
        let everywhere = standings.iter().all(|one| one.state == State::Applied);
        if everywhere || Instant::now() >= deadline {
            break standings;
        }
        tokio::time::sleep(PAUSE).await;
    };
    print(output, &standings, |standings| {
        let mut lines: Vec<String> = standings.iter().map(line).collect();
        if let Some(document) = document {
            lines.push(verdict(document, standings));
        }
        lines.join("\n")
    })?;
    match document {
        Some(document) if standings.iter().any(|one| one.state != State::Applied) => {
            Err(CliError::Failed(format!("{document} is not everywhere yet")))
        }
        _ => Ok(()),
    }
}

fn line(one: &Standing) -> String {
    let applied = &one.applied;
    let mut notes = Vec::new();
    if one.by_release {
        notes.push("being released to it".to_owned());
    }
    if !one.overrides.is_empty() {
        notes.push(format!("with override {}", one.overrides.join(", ")));
    }
    if one.state == State::Lags {
        notes.push(format!("lags: revision {} is meant for it", one.meant_revision));
    }
    notes.extend(applied.refused.as_ref().map(|(revision, why)| format!("refused {revision}: {why}")));
    let at = match one.silent {
        true => "nothing yet".to_owned(),
        false => format!("revision {}", applied.applied_revision),
    };
    let (instance, document) = (&applied.instance, &applied.document);
    format!("{instance:<24}  {document:<16}  {at}  {}", notes.join("; ")).trim_end().to_owned()
}

/// One sentence about all.
fn verdict(document: &str, standings: &[Standing]) -> String {
    let count = |state| standings.iter().filter(|one| one.state == state).count();
    let (applied, lags, refuses) = (count(State::Applied), count(State::Lags), count(State::Refuses));
    match standings.len() {
        0 => format!("{document}: nobody reads it at present"),
        all if all == applied => format!("{document}: all {all} have what is meant for them"),
        all => format!(
            "{document}: {applied} of {all} have what is meant for them, {lags} lag, {refuses} refuse"
        ),
    }
}
