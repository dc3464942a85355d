//! Commands to instances: the intent is written, the instance sees it in its watch, the answer is written too.

use std::sync::Arc;
use std::time::Duration;

use carillon_agent::keys;
use carillon_proto::{now_ms, v1};
use prost::Message as _;
use tonic::Status;
use uuid::Uuid;
use v1::CommandState;

use crate::core::{Core, compare_mod_revision, delete, put};
use crate::discovery::truncate;

const DEFAULT_TIMEOUT_MS: u64 = 30_000;
const TIMEOUT_MS: std::ops::RangeInclusive<u64> = 100..=600_000;
/// Largest command, bytes.
const MAX_COMMAND_BYTES: usize = 64 * 1024;
/// Longest answer that is kept, bytes; the rest is cut off.
const MAX_OUTPUT_BYTES: usize = 256 * 1024;
/// Commands are deleted this long after their deadline.
const KEEP_MS: u64 = 10 * 60 * 1000;
const SWEEP: Duration = Duration::from_secs(30);
/// Most commands deleted in one entry.
const SWEEP_BATCH: usize = 512;
const ATTEMPTS: usize = 8;

fn is_open(state: CommandState) -> bool {
    matches!(state, CommandState::CommandPending | CommandState::CommandRunning)
}

impl Core {
    pub(crate) async fn send_command(
        &self,
        request: v1::SendCommandRequest,
    ) -> Result<v1::CommandRecord, Status> {
        let timeout_ms = if request.timeout_ms == 0 { DEFAULT_TIMEOUT_MS } else { request.timeout_ms };
        if !TIMEOUT_MS.contains(&timeout_ms) {
            return Err(Status::invalid_argument(format!(
                "timeout_ms is {timeout_ms}, it must be from 100 to 600000"
            )));
        }
        if request.name.is_empty() || request.encoded_len() > MAX_COMMAND_BYTES {
            let text = format!("a command needs a name, and may be at most {MAX_COMMAND_BYTES} bytes");
            return Err(Status::invalid_argument(text));
        }
        self.node.linearize().await?;
        let instance_key = keys::instance(&request.instance);
        let created_ms = now_ms();
        let prefix = keys::commands(&request.instance);
        {
            let state = self.node.state();
            if state.get(&instance_key).is_none() {
                return Err(Status::not_found(format!("there is no instance {:?}", request.instance)));
            }
            let open = state
                .prefix(&prefix)
                .filter_map(|(_, item)| v1::CommandRecord::decode(item.value.clone()).ok())
                .filter(|command| is_open(command.state()) && created_ms < command.deadline_ms)
                .count();
            if open >= self.limits.open_commands {
                let text = format!("instance {} has {open} commands to carry out already", request.instance);
                return Err(Status::resource_exhausted(text));
            }
        }
        let command = v1::CommandRecord {
            id: Uuid::now_v7().to_string(),
            instance: request.instance,
            name: request.name,
            arguments: request.arguments,
            created_ms,
            deadline_ms: created_ms + timeout_ms,
            state: CommandState::CommandPending.into(),
            output: String::new(),
        };
        let key = keys::command(&command.instance, &command.id);
        self.write(v1::TxnRequest { then: vec![put(&key, &command, 0)], ..Default::default() }).await?;
        tracing::info!(instance = command.instance, command = command.name, id = command.id, "command sent");
        tokio::select! {
            answered = self.await_answer(&key) => answered,
            () = tokio::time::sleep(Duration::from_millis(timeout_ms)) => self.expire(&key).await,
            () = self.stop.cancelled() => Err(Status::unavailable("the keeper is stopping")),
        }
    }

    async fn await_answer(&self, key: &str) -> Result<v1::CommandRecord, Status> {
        let interest = self.node.interests().register(&[key.to_owned()]);
        let mut seen = 0;
        loop {
            if self.node.state().get(key).map_or(0, |item| item.mod_revision) != seen {
                match self.read::<v1::CommandRecord>(key)? {
                    Some((_, command)) if !is_open(command.state()) => return Ok(command),
                    Some((mod_revision, _)) => seen = mod_revision,
                    None => return Err(Status::aborted("the command was deleted")),
                }
            }
            interest.changed().await;
        }
    }

    /// Its time is up. One that was not begun never will be.
    async fn expire(&self, key: &str) -> Result<v1::CommandRecord, Status> {
        for _ in 0..ATTEMPTS {
            let Some((mod_revision, mut command)) = self.read::<v1::CommandRecord>(key)? else {
                return Err(Status::aborted("the command was deleted"));
            };
            if command.state() != CommandState::CommandPending {
                return Ok(command);
            }
            command.set_state(CommandState::CommandExpired);
            "the instance did not take it up".clone_into(&mut command.output);
            let compare = vec![compare_mod_revision(key, mod_revision)];
            let then = vec![put(key, &command, 0)];
            if self.write(v1::TxnRequest { compare, then, otherwise: Vec::new() }).await?.is_some() {
                return Ok(command);
            }
        }
        Err(Status::aborted("the command keeps changing"))
    }

    pub(crate) async fn answer_command(&self, mut request: v1::AnswerCommandRequest) -> Result<(), Status> {
        let state = request.state();
        if !matches!(
            state,
            CommandState::CommandRunning | CommandState::CommandDone | CommandState::CommandFailed
        ) {
            return Err(Status::invalid_argument("state must be RUNNING, DONE or FAILED"));
        }
        truncate(&mut request.output, MAX_OUTPUT_BYTES);
        let key = keys::command(&request.instance, &request.id);
        for _ in 0..ATTEMPTS {
            self.node.linearize().await?;
            let Some((mod_revision, mut command)) = self.read::<v1::CommandRecord>(&key)? else {
                return Err(Status::not_found(format!("there is no command {}", request.id)));
            };
            if !is_open(command.state()) {
                return Err(Status::failed_precondition(format!("command {} is closed already", request.id)));
            }
            command.set_state(state);
            command.output.clone_from(&request.output);
            let compare = vec![compare_mod_revision(&key, mod_revision)];
            let then = vec![put(&key, &command, 0)];
            if self.write(v1::TxnRequest { compare, then, otherwise: Vec::new() }).await?.is_some() {
                return Ok(());
            }
        }
        Err(Status::aborted("the command keeps changing"))
    }
}

/// Deletes old commands for as long as this node leads.
pub(crate) async fn sweep(core: Arc<Core>) {
    loop {
        tokio::select! {
            () = tokio::time::sleep(SWEEP) => {}
            () = core.stop.cancelled() => return,
        }
        let Some(leader) = *core.node.leadership().borrow() else { continue };
        let now = now_ms();
        let old: Vec<v1::Op> = {
            let state = core.node.state();
            let commands = state.prefix(keys::COMMANDS).filter(|(_, item)| {
                // One that cannot be read is of no use to anybody.
                v1::CommandRecord::decode(item.value.clone()).map_or(true, |c| c.deadline_ms + KEEP_MS < now)
            });
            commands.take(SWEEP_BATCH).map(|(key, _)| delete(key)).collect()
        };
        if old.is_empty() {
            continue;
        }
        let count = old.len();
        let txn = v1::TxnRequest { then: old, ..Default::default() };
        match core.node.propose_as(leader, v1::KeeperEntry { txn: Some(txn) }).await {
            Ok(_) => tracing::debug!(count, "old commands deleted"),
            Err(error) => tracing::debug!(%error, "old commands not deleted yet"),
        }
    }
}
