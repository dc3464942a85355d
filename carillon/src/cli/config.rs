//! `carillon config`: documents of the keeper, changed live; `carillon command`: have a process do something.

use std::path::Path;
use std::time::Duration;

use carillon_agent::admin::{Admin, Applied, Change, ChangeOptions, Revision};

use super::{CliError, left_behind, print, text};
use crate::args::{CommandArgs, ConfigCommand, KeeperClientArgs};

pub async fn run(command: ConfigCommand) -> Result<(), CliError> {
    match command {
        ConfigCommand::Get { document: Some(document), revision, raw, keeper } => {
            let found = admin(&keeper)?.get(&document, revision).await?;
            print(keeper.output, &found, |found| {
                if raw {
                    return found.revision.yaml.trim_end().to_owned();
                }
                let state = match found.revision.revision {
                    0 => "never changed: all defaults".to_owned(),
                    revision => format!("revision {revision}"),
                };
                format!("# {document}, {state}\n{}", yaml(&found.effective).trim_end())
            })
        }
        ConfigCommand::Get { document: None, keeper, .. } => list(&keeper).await,
        ConfigCommand::Set { document, fields, file, comment, dry_run, keeper } => {
            let change = match file {
                Some(path) => Change::Yaml(read(&path)?),
                None => Change::Sets(fields.iter().map(|field| assignment(field)).collect::<Result<_, _>>()?),
            };
            let options = ChangeOptions { author: author(), comment, expected_revision: None, dry_run };
            let revision = admin(&keeper)?.change(&document, change, options).await?;
            print(keeper.output, &revision, |revision| {
                if dry_run { format!("{document} would be accepted") } else { accepted(revision) }
            })
        }
        ConfigCommand::History { document, keeper } => {
            let history = admin(&keeper)?.history(&document, 0).await?;
            print(keeper.output, &history, |history| {
                if history.is_empty() {
                    return format!("{document} was never changed");
                }
                let line = |revision: &Revision| {
                    let (author, time) = (&revision.author, rfc3339(revision.time_ms));
                    format!("{:>5}  {time}  {author:<16}  {}", revision.revision, revision.comment)
                        .trim_end()
                        .to_owned()
                };
                history.iter().map(line).collect::<Vec<_>>().join("\n")
            })
        }
        ConfigCommand::Rollback { document, revision, keeper } => {
            let options = ChangeOptions { author: author(), ..ChangeOptions::default() };
            let revision = admin(&keeper)?.rollback(&document, revision, options).await?;
            print(keeper.output, &revision, accepted)
        }
        ConfigCommand::Status { document, keeper } => {
            let applied = admin(&keeper)?.applied(document.as_deref()).await?;
            print(keeper.output, &applied, |applied| {
                let line = |one: &Applied| {
                    let refused = one.refused.as_ref();
                    let refused = refused.map(|(n, why)| format!("  refused {n}: {why}")).unwrap_or_default();
                    format!(
                        "{:<24}  {:<16}  revision {}{refused}",
                        one.instance, one.document, one.applied_revision
                    )
                };
                applied.iter().map(line).collect::<Vec<_>>().join("\n")
            })
        }
    }
}

/// `carillon command`.
pub async fn command(args: CommandArgs) -> Result<(), CliError> {
    let arguments = args.arguments.iter().map(|text| {
        let (name, value) =
            text.split_once('=').ok_or_else(|| CliError::Usage(format!("{text:?} is not NAME=VALUE")))?;
        Ok((name.to_owned(), value.to_owned()))
    });
    let arguments = arguments.collect::<Result<_, CliError>>()?;
    let within = Duration::from_secs(args.within);
    let answer = admin(&args.keeper)?.command(&args.instance, &args.name, arguments, within).await?;
    print(args.keeper.output, &answer, Clone::clone)
}

async fn list(keeper: &KeeperClientArgs) -> Result<(), CliError> {
    let admin = admin(keeper)?;
    let published = admin.list(None).await?;
    let kinds = admin.kinds().await?;
    print(keeper.output, &published, |published| {
        let mut lines: Vec<String> = published
            .iter()
            .map(|revision| format!("{:<24}  revision {}", revision.document, revision.revision))
            .collect();
        // Kinds of which there is one, also when it was never changed: so that people find them.
        for kind in kinds.iter().filter(|kind| !kind.named) {
            if !published.iter().any(|revision| revision.document == kind.kind) {
                lines.push(format!("{:<24}  defaults", kind.kind));
            }
        }
        lines.sort();
        lines.join("\n")
    })
}

fn accepted(revision: &Revision) -> String {
    format!("{} is at revision {}; running processes follow", revision.document, revision.revision)
}

/// `field=value`; without a value the field is taken out.
fn assignment(text: &str) -> Result<(String, Option<String>), CliError> {
    match text.split_once('=') {
        Some((path, value)) if !path.trim().is_empty() => {
            Ok((path.trim().to_owned(), (!value.is_empty()).then(|| value.to_owned())))
        }
        _ => Err(CliError::Usage(format!("{text:?} is not FIELD=VALUE, as in: max_packet_bytes=1048576"))),
    }
}

fn read(path: &Path) -> Result<String, CliError> {
    if path == Path::new("-") {
        let bytes = text("-".to_owned())?;
        return String::from_utf8(bytes)
            .map_err(|_| CliError::Failed("standard input is not UTF-8".to_owned()));
    }
    std::fs::read_to_string(path)
        .map_err(|error| CliError::Failed(format!("cannot read {}: {error}", path.display())))
}

fn yaml(value: &serde_json::Value) -> String {
    serde_yaml::to_string(value).unwrap_or_else(|_| value.to_string())
}

pub(super) fn admin(args: &KeeperClientArgs) -> Result<Admin, CliError> {
    if !args.keeper.is_empty() {
        return Ok(Admin::new(args.keeper.clone()));
    }
    match left_behind(&args.data_dir) {
        Some(left) => Ok(Admin::new(vec![left.keeper])),
        None => Err(CliError::Unreachable(format!(
            "no keeper is known: nothing was left in {}; run this where `carillon dev` runs, or say with --keeper \
             where it is",
            args.data_dir.display()
        ))),
    }
}

/// Who changes it, for the history: the name of the account.
fn author() -> String {
    ["CARILLON_AUTHOR", "USER", "LOGNAME"]
        .iter()
        .find_map(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
        .unwrap_or_else(|| "unknown".to_owned())
}

/// Unix milliseconds as RFC 3339, in UTC (the civil date as in Hinnant's days algorithm).
pub(super) fn rfc3339(ms: u64) -> String {
    let (days, second) = (ms / 86_400_000, ms / 1000 % 86_400);
    let z = days + 719_468;
    let (era, day_of_era) = (z / 146_097, z % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_of_year = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_of_year + 2) / 5 + 1;
    let month = if month_of_year < 10 { month_of_year + 3 } else { month_of_year - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", second / 3600, second / 60 % 60, second % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn assignments_are_read() {
        assert_eq!(assignment("a.b=1").unwrap(), ("a.b".to_owned(), Some("1".to_owned())));
        assert_eq!(assignment("a=x=y").unwrap(), ("a".to_owned(), Some("x=y".to_owned())));
        assert_eq!(assignment("a=").unwrap(), ("a".to_owned(), None));
        assert!(assignment("a").is_err() && assignment("=1").is_err());
    }

    #[test]
    fn times_are_told() {
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00Z");
        assert_eq!(rfc3339(951_827_696_000), "2000-02-29T12:34:56Z");
        assert_eq!(rfc3339(1_735_689_599_999), "2024-12-31T23:59:59Z");
    }
}
