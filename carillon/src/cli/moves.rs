//! `carillon drain` and `carillon rebalance`: begin it, show how far it is, and let Ctrl-C abort it.

use std::collections::BTreeMap;
use std::time::Duration;

use carillon_agent::admin::Admin;
use carillon_hub::center::Moving;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::config::admin;
use super::{CliError, bar, print};
use crate::args::{DrainArgs, KeeperClientArgs, RebalanceArgs};
use crate::moves::Status;

/// How often the progress is asked for; each time is a command through the keeper.
const POLL: Duration = Duration::from_secs(1);
/// How long the gateway may take to answer one.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);
/// Failed questions in a row after which the command gives up; the drain itself goes on.
const PATIENCE: u32 = 10;

pub async fn drain(args: DrainArgs) -> Result<(), CliError> {
    let admin = admin(&args.keeper)?;
    if args.abort {
        return abort(&admin, &args.instance, &args.keeper).await;
    }
    if args.status {
        let status = status(&admin, &args.instance).await?;
        return print(args.keeper.people.output, &status, describe);
    }
    let mut arguments = BTreeMap::new();
    insert(&mut arguments, "rate_per_second", args.rate);
    insert(&mut arguments, "deadline_seconds", args.deadline.map(|deadline| deadline.as_secs()));
    insert(&mut arguments, "target", (!args.to.is_empty()).then(|| args.to.join(",")));
    begin(&admin, &args.instance, "drain", arguments, args.detach, &args.keeper).await
}

pub async fn rebalance(args: RebalanceArgs) -> Result<(), CliError> {
    let admin = admin(&args.keeper)?;
    if args.abort {
        return abort(&admin, &args.instance, &args.keeper).await;
    }
    let mut arguments = BTreeMap::new();
    insert(&mut arguments, "count", args.count);
    insert(&mut arguments, "target_connections", args.down_to);
    insert(&mut arguments, "rate_per_second", args.rate);
    insert(&mut arguments, "cooldown_seconds", args.cooldown.map(|cooldown| cooldown.as_secs()));
    insert(&mut arguments, "target", (!args.to.is_empty()).then(|| args.to.join(",")));
    begin(&admin, &args.instance, "rebalance", arguments, args.detach, &args.keeper).await
}

fn insert(arguments: &mut BTreeMap<String, String>, name: &str, value: Option<impl ToString>) {
    if let Some(value) = value {
        arguments.insert(name.to_owned(), value.to_string());
    }
}

async fn begin(
    admin: &Admin,
    instance: &str,
    name: &str,
    arguments: BTreeMap<String, String>,
    detach: bool,
    keeper: &KeeperClientArgs,
) -> Result<(), CliError> {
    // From here on Ctrl-C is kept until it can be obeyed.
    let mut interrupts = signal(SignalKind::interrupt())?;
    let begun = admin.command(instance, name, arguments, ANSWER_WITHIN).await?;
    if detach {
        return print(keeper.people.output, &begun, Clone::clone);
    }
    eprintln!("{begun}; Ctrl-C aborts it");
    let status = follow(admin, instance, &mut interrupts).await?;
    let aborted = status.moving.as_ref().is_some_and(|moving| moving.aborted);
    print(keeper.people.output, &status, describe)?;
    if aborted { Err(CliError::Failed(format!("the {name} was aborted"))) } else { Ok(()) }
}

async fn abort(admin: &Admin, instance: &str, keeper: &KeeperClientArgs) -> Result<(), CliError> {
    let said = admin.command(instance, "drain-abort", BTreeMap::new(), ANSWER_WITHIN).await?;
    print(keeper.people.output, &said, Clone::clone)
}

async fn status(admin: &Admin, instance: &str) -> Result<Status, CliError> {
    let said = admin.command(instance, "drain-status", BTreeMap::new(), ANSWER_WITHIN).await?;
    serde_json::from_str(&said)
        .map_err(|error| CliError::Failed(format!("{instance} answered something else: {error}")))
}

/// Waits for the end. Ctrl-C aborts it; a second one leaves at once.
async fn follow(admin: &Admin, instance: &str, interrupts: &mut Signal) -> Result<Status, CliError> {
    let bar = bar("aborts");
    let mut misses = 0;
    let mut aborting = false;
    let left = || Err(CliError::Failed("left; it may still be running".to_owned()));
    loop {
        match status(admin, instance).await {
            Ok(status) => {
                misses = 0;
                let moving = status.moving.clone().unwrap_or_else(nothing);
                bar.set_length(moving.total.max(1));
                bar.set_position(moving.moved);
                bar.set_message(status.state.clone());
                if moving.ended_ms != 0 {
                    bar.finish_and_clear();
                    return Ok(status);
                }
            }
            Err(CliError::Unreachable(_)) if misses < PATIENCE => misses += 1,
            Err(error) => {
                bar.abandon();
                return Err(error);
            }
        }
        tokio::select! {
            () = tokio::time::sleep(POLL) => {}
            _ = interrupts.recv() => {
                if aborting {
                    bar.abandon();
                    return left();
                }
                aborting = true;
                bar.println("aborting; once more to leave at once");
                tokio::select! {
                    said = admin.command(instance, "drain-abort", BTreeMap::new(), ANSWER_WITHIN) => drop(said?),
                    _ = interrupts.recv() => {
                        bar.abandon();
                        return left();
                    }
                }
            }
        }
    }
}

fn nothing() -> Moving {
    Moving { kind: "drain".to_owned(), ended_ms: 1, ..Moving::default() }
}

fn describe(status: &Status) -> String {
    let Some(moving) = &status.moving else {
        return format!("{}; it has moved no devices yet", status.state);
    };
    let state = match (moving.ended_ms, moving.aborted) {
        (0, _) => "under way",
        (_, true) => "aborted",
        (_, false) => "finished",
    };
    format!(
        "{}; {} {state}: {} of {} devices moved, {} left",
        status.state, moving.kind, moving.moved, moving.total, moving.left
    )
}
