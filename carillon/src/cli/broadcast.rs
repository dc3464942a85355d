//! `carillon broadcast`: starts one, shows how far it is, and lets Ctrl-C cancel it.

use std::time::Duration;

use carillon_client::Backend;
use carillon_client::backend::{Broadcast, BroadcastAction, BroadcastRequest, BroadcastState};

use super::{CliError, backend, bar, print, text};
use crate::args::BroadcastArgs;

/// How often the progress is asked for.
const POLL: Duration = Duration::from_millis(250);
/// Failed questions in a row after which the command gives up; the broadcast itself goes on.
const PATIENCE: u32 = 40;

pub async fn run(args: BroadcastArgs) -> Result<(), CliError> {
    let backend = backend(&args.client)?;
    let mut request = BroadcastRequest::new(text(args.text)?);
    request.rate_per_second = args.rate;
    request.ttl_seconds = args.ttl;
    request.id = args.id;
    let job = backend.broadcast(&request).await?;
    let job = if args.detach { job } else { follow(&backend, job).await? };
    let failed = matches!(job.state, BroadcastState::Cancelled | BroadcastState::Interrupted);
    print(args.client.people.output, &job, |job| {
        let sent = format!("{} of {} devices", job.done, job.total);
        match job.state {
            BroadcastState::Finished => format!("finished: sent to {sent}, id {}", job.id),
            state => format!("{state}: sent to {sent} so far, id {}", job.id),
        }
    })?;
    if failed { Err(CliError::Failed(format!("the broadcast was {}", job.state))) } else { Ok(()) }
}

/// Waits for the end. Ctrl-C cancels the broadcast; a second one leaves at once.
async fn follow(backend: &Backend, mut job: Broadcast) -> Result<Broadcast, CliError> {
    let bar = bar("cancels");
    let mut misses = 0;
    let mut cancelled = false;
    if bar.is_hidden() {
        eprintln!("broadcast {} runs; Ctrl-C cancels it", job.id);
    }
    let mut interrupted = std::pin::pin!(tokio::signal::ctrl_c());
    loop {
        bar.set_length(job.total.max(1));
        bar.set_position(job.done);
        bar.set_message(job.state.to_string());
        if job.state.is_over() {
            bar.finish_and_clear();
            return Ok(job);
        }
        tokio::select! {
            () = tokio::time::sleep(POLL) => {}
            result = &mut interrupted => {
                result?;
                if cancelled {
                    bar.abandon();
                    return Err(CliError::Failed(format!("left; the broadcast {} may still be running", job.id)));
                }
                cancelled = true;
                interrupted.set(tokio::signal::ctrl_c());
                bar.println("cancelling; once more to leave at once");
                job = backend.broadcast_control(&job.id, BroadcastAction::Cancel).await?;
                continue;
            }
        }
        match backend.broadcast_status(&job.id).await {
            Ok(now) => {
                misses = 0;
                job = now;
            }
            Err(error) if error.is_retryable() && misses < PATIENCE => misses += 1,
            Err(error) => {
                bar.abandon();
                return Err(error.into());
            }
        }
    }
}
