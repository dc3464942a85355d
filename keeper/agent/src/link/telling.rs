//! What the keeper is told: answers to commands, and what was made of the configuration.

use std::collections::BTreeMap;
use std::sync::Arc;

use carillon_proto::{now_ms, v1, v1::keeper_client::KeeperClient};
use tonic::transport::Channel;
use tonic::{Code, Status};

use super::{call, is_refusal};
use crate::Shared;

/// Reports in one call; the keeper's limit.
const REPORTS: usize = 256;

/// An answer that the keeper does not take, now or later.
fn is_final(code: Code) -> bool {
    code == Code::NotFound || is_refusal(code)
}

/// Tells the keeper what was applied and what commands came to.
pub(super) async fn tell(
    shared: &Arc<Shared>,
    mut client: KeeperClient<Channel>,
    mut leases: tokio::sync::watch::Receiver<BTreeMap<String, u64>>,
) -> Result<(), Status> {
    let mut wake = shared.wake.subscribe();
    let mut told_as = BTreeMap::new();
    loop {
        loop {
            let answer = shared.board.lock().answers.front().cloned();
            let Some(answer) = answer else { break };
            match call(client.answer_command(answer.clone())).await {
                // Gone, or past its deadline and already closed: nobody waits for it any more.
                Ok(_) => {}
                Err(status) if is_final(status.code()) => {}
                Err(status) => return Err(status),
            }
            let mut board = shared.board.lock();
            if board.answers.front() == Some(&answer) {
                board.answers.pop_front();
            }
        }
        loop {
            let known = leases.borrow_and_update().clone();
            // Another instance of this process, or a new lease of one: nothing has been told as that yet.
            if known != told_as {
                shared.board.lock().forget_told();
                told_as.clone_from(&known);
            }
            let reports = if known.is_empty() { Vec::new() } else { shared.board.lock().untold(REPORTS) };
            if reports.is_empty() {
                break;
            }
            let mut gone = false;
            for (id, lease) in &known {
                let applied = reports.iter().cloned().map(|mut report| {
                    report.instance = id.clone();
                    report.time_ms = now_ms();
                    report
                });
                let request = v1::ReportConfigRequest { lease: *lease, applied: applied.collect() };
                match call(client.report_config(request)).await {
                    Ok(_) => {}
                    // The lease has ended: told again under the next one.
                    Err(status) if status.code() == Code::NotFound => gone = true,
                    // Saying it again would not help.
                    Err(status) if is_refusal(status.code()) => {
                        tracing::warn!(
                            instance = id,
                            reason = status.message(),
                            "report refused by the keeper"
                        );
                    }
                    Err(status) => return Err(status),
                }
            }
            if gone {
                break;
            }
            shared.board.lock().told(&reports);
        }
        tokio::select! {
            Ok(()) = wake.changed() => {}
            Ok(()) = leases.changed() => {}
        }
    }
}
