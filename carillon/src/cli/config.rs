//! `carillon config`: documents of the keeper, changed live; `carillon command`: have a process do something.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use carillon_agent::admin::{
    Admin, Change, ChangeOptions, Difference, Document, Published, ReleaseAction, Revision,
};
use carillon_agent::tls::Tls;
use serde_json::json;

use super::{CliError, left_behind, print, text};
use crate::args::config::{ConfigCommand, DecideArgs};
use crate::args::{CommandArgs, KeeperClientArgs};

mod explaining;
mod standings;

pub async fn run(command: ConfigCommand) -> Result<(), CliError> {
    match command {
        ConfigCommand::Get { document: Some(document), revision, raw, keeper } => {
            let found = admin(&keeper)?.get(&document, revision).await?;
            print(keeper.people.output, &found, |found| {
                if raw { found.revision.yaml.trim_end().to_owned() } else { got(found) }
            })
        }
        ConfigCommand::Get { document: None, keeper, .. } => list(&keeper).await,
        ConfigCommand::Set { document, fields, file, comment, dry_run, target, keeper } => {
            let change = match file {
                Some(path) => Change::Yaml(read(&path)?),
                None => Change::Sets(assignments(&fields)?),
            };
            let release_to = target.target();
            let options =
                ChangeOptions { author: author(), comment, expected_revision: None, dry_run, release_to };
            publish(&document, change, options, &keeper).await
        }
        ConfigCommand::Override {
            document,
            name,
            fields,
            file,
            remove,
            comment,
            dry_run,
            target,
            keeper,
        } => {
            let target = target.target();
            let change = match file {
                _ if remove => Change::RemoveOverride(name),
                Some(path) => Change::OverrideYaml { name, target, yaml: read(&path)? },
                None if fields.is_empty() && target.is_none() => {
                    let text =
                        "nothing to do: give fields (FIELD=VALUE), a --file, whom it is for, or --remove";
                    return Err(CliError::Usage(text.to_owned()));
                }
                None => Change::Override { name, target, sets: assignments(&fields)? },
            };
            let options = ChangeOptions { author: author(), comment, dry_run, ..ChangeOptions::default() };
            publish(&document, change, options, &keeper).await
        }
        ConfigCommand::Rollback { document, revision, comment, dry_run, target, keeper } => {
            let release_to = target.target();
            let options =
                ChangeOptions { author: author(), comment, expected_revision: None, dry_run, release_to };
            publish(&document, Change::RollbackTo(revision), options, &keeper).await
        }
        ConfigCommand::Release { document, revision, comment, target, keeper } => {
            let target = target.target().ok_or_else(|| {
                CliError::Usage("say to whom: --percent, --instance, --role, --label or --pool".to_owned())
            })?;
            let action = ReleaseAction::Target(target);
            let done =
                decide(action, &DecideArgs { document, revision, comment, keeper: keeper.clone() }).await?;
            print(keeper.people.output, &done, released)
        }
        ConfigCommand::Promote(args) => {
            let done = decide(ReleaseAction::Promote, &args).await?;
            print(args.keeper.people.output, &done, |done| accepted(&done.revision))
        }
        ConfigCommand::Abandon(args) => {
            let done = decide(ReleaseAction::Abandon, &args).await?;
            print(args.keeper.people.output, &done, |done| {
                let revision = &done.revision;
                format!(
                    "revision {} of {} is taken back; running processes follow",
                    revision.revision, revision.document
                )
            })
        }
        ConfigCommand::History { document, keeper } => {
            let history = admin(&keeper)?.history(&document, 0).await?;
            print(keeper.people.output, &history, |history| match history.as_slice() {
                [] => format!("{document} was never changed"),
                all => all.iter().map(past).collect::<Vec<_>>().join("\n"),
            })
        }
        ConfigCommand::Diff { document, from, to, keeper } => {
            let (from, to, differences) = admin(&keeper)?.diff(&document, from, to).await?;
            let value = json!({ "document": document, "from": from, "to": to, "differences": differences });
            print(keeper.people.output, &value, |_| match differences.as_slice() {
                [] => format!("# {document}: revisions {from} and {to} do not differ"),
                all => format!("# {document}, revision {from} to {to}\n{}", differing(all)),
            })
        }
        ConfigCommand::Explain { field, instance, keeper } => {
            explaining::run(&admin(&keeper)?, &field, instance.as_deref(), keeper.people.output).await
        }
        ConfigCommand::Status { document, wait, keeper } => {
            standings::run(&admin(&keeper)?, document.as_deref(), wait, keeper.people.output).await
        }
        ConfigCommand::Schema { kind, keeper } => {
            let kinds = admin(&keeper)?.kinds().await?;
            let Some(found) = kinds.iter().find(|known| known.kind == kind) else {
                let known = kinds.iter().map(|known| known.kind.as_str()).collect::<Vec<_>>().join(", ");
                return Err(CliError::Failed(format!(
                    "there is no kind of document {kind:?}; there are: {known}"
                )));
            };
            print(keeper.people.output, &found.schema, |schema| format!("{schema:#}"))
        }
    }
}

async fn publish(
    document: &str,
    change: Change,
    options: ChangeOptions,
    keeper: &KeeperClientArgs,
) -> Result<(), CliError> {
    let (dry_run, to_some) = (options.dry_run, options.release_to.is_some());
    let published = admin(keeper)?.publish_change(document, change, options).await?;
    print(keeper.people.output, &published, |published| match (dry_run, to_some) {
        (false, false) => accepted(&published.revision),
        (false, true) => released(published),
        (true, to_some) => {
            let whom = if to_some { format!(", for {}", meant(published)) } else { String::new() };
            let said = format!("{document} would be accepted{whom}");
            match published.differences.as_slice() {
                [] => format!("{said}; nothing changes"),
                all => format!("{said}\n{}", differing(all)),
            }
        }
    })
}

async fn decide(action: ReleaseAction, args: &DecideArgs) -> Result<Published, CliError> {
    let admin = admin(&args.keeper)?;
    let revision = match args.revision {
        Some(revision) => revision,
        None => released_now(&admin, &args.document).await?,
    };
    Ok(admin.release(&args.document, action, revision, &author(), &args.comment).await?)
}

/// The revision that is being released. It is shown: whoever decides about it is to see which one it is, and if another one
/// takes its place meanwhile, the decision is not about that.
async fn released_now(admin: &Admin, document: &str) -> Result<u64, CliError> {
    let releases = admin.releases().await?;
    let Some(release) = releases.iter().find(|release| release.candidate.document == document) else {
        return Err(CliError::Failed(format!("nothing of {document} is being released")));
    };
    let (candidate, target) = (&release.candidate, &release.target);
    let (number, time) = (candidate.revision, rfc3339(candidate.time_ms));
    eprintln!(
        "revision {number} of {document}, by {} at {time}, is being released to {target}",
        candidate.author
    );
    Ok(number)
}

/// A document for people: YAML, and as comments what is not in force for all.
fn got(found: &Document) -> String {
    let document = &found.revision.document;
    let state = match found.revision.revision {
        0 => "never changed: all defaults".to_owned(),
        revision => format!("revision {revision}"),
    };
    let mut text = format!("# {document}, {state}\n{}", yaml(&found.effective).trim_end());
    for one in &found.revision.overrides {
        text.push_str(&format!("\n# override {}, for {}:", one.name, one.target));
        one.yaml.lines().for_each(|line| text.push_str(&format!("\n#   {line}")));
    }
    if let Some(release) = &found.release {
        text.push_str(&format!(
            "\n# revision {} is being released to {}",
            release.candidate.revision, release.target
        ));
    }
    text
}

/// For which of the live processes something is.
fn meant(published: &Published) -> String {
    /// … of which so many are named.
    const NAMED: usize = 5;
    let (matched, readers) = (&published.matched, published.readers);
    let names = matched.iter().take(NAMED).map(String::as_str).collect::<Vec<_>>().join(", ");
    match matched.len() {
        0 => format!("none of the {readers} live instances that read it"),
        count if count > NAMED => format!("{count} of the {readers} live instances that read it: {names}, …"),
        count => format!("{count} of the {readers} live instances that read it: {names}"),
    }
}

fn released(published: &Published) -> String {
    let (document, number) = (&published.revision.document, published.revision.revision);
    let target = published.revision.steps.last().and_then(|step| step.target.clone()).unwrap_or_default();
    format!(
        "revision {number} of {document} is released to {target}, {}\nthen: carillon config promote {document} --revision \
         {number}, or carillon config abandon {document} --revision {number}",
        meant(published)
    )
}

/// `~ a: 1 -> 2`, `+ b: 3`, `- c: 4`
fn differing(differences: &[Difference]) -> String {
    let line = |one: &Difference| match (&one.before, &one.after) {
        (Some(before), Some(after)) => format!("~ {}: {before} -> {after}", one.path),
        (None, Some(after)) => format!("+ {}: {after}", one.path),
        (Some(before), None) => format!("- {}: {before}", one.path),
        (None, None) => String::new(),
    };
    differences.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// A line of the history, and one for each step of a release.
fn past(revision: &Revision) -> String {
    let from = |peer: &str| if peer.is_empty() { String::new() } else { format!("from {peer}") };
    let number = format!("{:>5}", revision.revision);
    let line = |what: String, author: &str, time_ms: u64, peer: &str, comment: &str| {
        let line = format!("{what}  {}  {author:<16}  {:<24}  {comment}", rfc3339(time_ms), from(peer));
        line.trim_end().to_owned()
    };
    let mut lines = vec![line(number, &revision.author, revision.time_ms, &revision.peer, &revision.comment)];
    for step in &revision.steps {
        let to = step.target.as_ref().map(|target| format!(" to {target}")).unwrap_or_default();
        let said = if step.comment.is_empty() { String::new() } else { format!(": {}", step.comment) };
        let what = format!("{}{to}{said}", step.what);
        lines.push(line("     ".to_owned(), &step.author, step.time_ms, &step.peer, &what));
    }
    lines.join("\n")
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
    print(args.keeper.people.output, &answer, Clone::clone)
}

async fn list(keeper: &KeeperClientArgs) -> Result<(), CliError> {
    let admin = admin(keeper)?;
    let published = admin.list(None).await?;
    let (kinds, releases) = (admin.kinds().await?, admin.releases().await?);
    print(keeper.people.output, &published, |published| {
        let mut lines: Vec<String> = published
            .iter()
            .map(|revision| format!("{:<24}  revision {}", revision.document, revision.revision))
            .collect();
        lines.extend(releases.iter().map(|release| {
            let (candidate, target) = (&release.candidate, &release.target);
            format!(
                "{:<24}  revision {} is being released to {target}",
                candidate.document, candidate.revision
            )
        }));
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

fn assignments(fields: &[String]) -> Result<Vec<(String, Option<String>)>, CliError> {
    fields.iter().map(|field| assignment(field)).collect()
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
        return Ok(Admin::secured(args.keeper.clone(), tls(args)?));
    }
    match left_behind(&args.people.data_dir) {
        Some(left) => Ok(Admin::new(vec![left.keeper])),
        None => Err(CliError::Unreachable(format!(
            "no keeper is known: nothing was left in {}; run this where `carillon dev` runs, or say with --keeper \
             where it is",
            args.people.data_dir.display()
        ))),
    }
}

/// The certificate that is shown to the keepers that are named.
pub(super) fn tls(args: &KeeperClientArgs) -> Result<Option<Arc<Tls>>, CliError> {
    if args.keeper.is_empty() {
        return Ok(None);
    }
    args.access.open(&args.keeper).map_err(|error| CliError::Usage(format!("{error:#}")))
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
