//! The agent's task: it holds the connection to a keeper, and starts over with another one, with jitter, when it breaks.
//!
//! A session is three loops over one channel: watching, registering with keep-alives, and telling. The first that
//! fails ends the session; what is known stays.

use std::sync::Arc;
use std::time::Duration;

use carillon_proto::{now_ms, v1, v1::keeper_client::KeeperClient};
use rand::RngExt as _;
use tokio::sync::oneshot;
use tokio::time::{Instant as Clock, sleep, timeout};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use crate::{Command, Shared, keys, tls};

mod registering;
mod telling;

use registering::{Registrations, deregister, leases_of, register};
use telling::tell;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// A unary call that takes longer than this counts as a broken connection.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// The keeper sends a progress notice every 5 s; a watch that is silent for this long is dead.
const WATCH_SILENCE: Duration = Duration::from_secs(20);
const FIRST_BACKOFF: Duration = Duration::from_millis(50);
const MAX_BACKOFF: Duration = Duration::from_secs(2);
/// When a keeper is lost, so it is for thousands: they come to the others over this time.
const RECONNECT_SPREAD: Duration = Duration::from_millis(500);
/// How often the keeper is asked who its members are.
const MEMBERS_EVERY: Duration = Duration::from_secs(60);
/// For deregistering at the end, and for what is written last.
const STOP_TIMEOUT: Duration = Duration::from_secs(1);

pub(crate) async fn run(shared: Arc<Shared>) {
    let mut registered = Registrations::new();
    let mut backoff = FIRST_BACKOFF;
    let mut failures = 0u32;
    let mut next = rand::rng().random_range(0..shared.keepers.all().len().max(1));
    let mut client = None;
    if shared.keepers.all().is_empty() {
        tracing::error!("no keeper is configured, nothing will be known");
    }
    let keeping = shared.cache.clone().map(|cache| AbortOnDrop(tokio::spawn(cache.run())));
    while !shared.stop.is_cancelled() {
        let keepers = shared.keepers.all();
        let Some(keeper) = keepers.get(next % keepers.len().max(1)) else { break };
        next += 1;
        let attempt = async {
            let connected = connect(keeper, shared.keepers.tls()).await?;
            client = Some(connected.clone());
            session(&shared, connected, &mut registered, keeper, &mut failures).await
        };
        let error = tokio::select! {
            () = shared.stop.cancelled() => break,
            Err(error) = attempt => error,
        };
        let lost = shared.connected.send_replace(false);
        failures += 1;
        if failures == 1 {
            tracing::warn!(
                keeper,
                error = error.message(),
                "keeper lost, the last known state stays in force"
            );
        } else {
            tracing::debug!(keeper, error = error.message(), failures, "keeper not reached");
        }
        let pause = if lost {
            backoff = FIRST_BACKOFF;
            spread(RECONNECT_SPREAD)
        } else {
            let pause = backoff.mul_f64(rand::rng().random_range(0.5..1.0));
            backoff = (backoff * 2).min(MAX_BACKOFF);
            pause
        };
        tokio::select! {
            () = shared.stop.cancelled() => break,
            () = sleep(pause) => {}
        }
    }
    shared.connected.send_replace(false);
    drop(keeping);
    if let Some(cache) = &shared.cache {
        match timeout(STOP_TIMEOUT, cache.write()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "the last known state could not be kept on disk"),
            Err(_) => tracing::warn!("the disk is slow, the last known state may not be on it"),
        }
    }
    if let Some(client) = client {
        deregister(client, registered).await;
    }
}

/// Ends a task with its owner.
struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A random part of a time, so that not all come at once.
fn spread(over: Duration) -> Duration {
    over.mul_f64(rand::rng().random_range(0.0..1.0))
}

async fn connect(keeper: &str, tls: Option<&Arc<tls::Tls>>) -> Result<KeeperClient<Channel>, Status> {
    let endpoint = Endpoint::from_shared(keeper.to_owned())
        .map_err(|error| {
            Status::invalid_argument(format!("{keeper} is not an address of a keeper: {error}"))
        })?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(Duration::from_secs(5))
        .keep_alive_timeout(Duration::from_secs(5))
        .keep_alive_while_idle(true);
    let channel = tls::connect(&endpoint, tls).await.map_err(Status::unavailable)?;
    Ok(client(channel))
}

/// A client with the message size that all of Carillon uses.
pub(crate) fn client(channel: Channel) -> KeeperClient<Channel> {
    KeeperClient::new(channel)
        .max_decoding_message_size(carillon_proto::MAX_GRPC_MESSAGE_BYTES)
        .max_encoding_message_size(carillon_proto::MAX_GRPC_MESSAGE_BYTES)
}

/// An error with its causes: tonic's own text is only "transport error".
pub(crate) fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        // Some say what their cause says.
        let said = error.to_string();
        if !text.ends_with(&said) {
            text = format!("{text}: {said}");
        }
        source = error.source();
    }
    text
}

async fn call<T>(future: impl Future<Output = Result<tonic::Response<T>, Status>>) -> Result<T, Status> {
    match timeout(CALL_TIMEOUT, future).await {
        Ok(answer) => Ok(answer?.into_inner()),
        Err(_) => Err(Status::deadline_exceeded("the keeper did not answer within 10 s")),
    }
}

/// Runs until something fails.
async fn session(
    shared: &Arc<Shared>,
    client: KeeperClient<Channel>,
    registered: &mut Registrations,
    keeper: &str,
    failures: &mut u32,
) -> Result<(), Status> {
    // Whether the leases have outlived the interruption is found out at once.
    for registration in registered.values_mut() {
        registration.keep_alive_at = Clock::now();
    }
    let leases = tokio::sync::watch::Sender::new(leases_of(registered));
    let watching = watch(shared, client.clone(), keeper, failures);
    let registering = register(shared, client.clone(), registered, &leases);
    let telling = tell(shared, client.clone(), leases.subscribe());
    let learning = learn(shared, client);
    tokio::try_join!(watching, registering, telling, learning).map(|_| ())
}

/// Asks now and then who the members are, so that there is somebody to turn to when those that were configured are gone.
async fn learn(shared: &Arc<Shared>, mut client: KeeperClient<Channel>) -> Result<(), Status> {
    loop {
        match call(client.member_list(v1::MemberListRequest {})).await {
            Ok(list) => {
                let mut members: Vec<String> =
                    list.members.into_iter().map(|member| member.address).collect();
                members.sort();
                shared.keepers.learn(&members);
                if let Some(cache) = &shared.cache {
                    cache.keepers(&members);
                }
            }
            Err(status) => tracing::debug!(error = status.message(), "the members are not known"),
        }
        sleep(MEMBERS_EVERY / 2 + spread(MEMBERS_EVERY)).await;
    }
}

/// Follows the keeper's state.
async fn watch(
    shared: &Arc<Shared>,
    mut client: KeeperClient<Channel>,
    keeper: &str,
    failures: &mut u32,
) -> Result<(), Status> {
    let mut wake = shared.wake.subscribe();
    loop {
        let (ids, after) = {
            let board = shared.board.lock();
            let ids: Vec<String> = board.registrations.keys().cloned().collect();
            let after = if board.covered.as_ref() == Some(&ids) { board.view.revision } else { 0 };
            (ids, after)
        };
        let mut prefixes =
            [keys::CONFIG, keys::RELEASES, keys::INSTANCES, keys::SLOTS].map(str::to_owned).to_vec();
        prefixes.extend(ids.iter().map(|id| keys::commands(id)));
        let request = v1::WatchRequest { prefixes, after_revision: after };
        let mut stream = match call(client.watch(request)).await {
            Ok(stream) => stream,
            Err(status) if status.code() == Code::OutOfRange => {
                tracing::warn!(
                    revision = after,
                    "the keeper has less than is known here, taking its state anew"
                );
                shared.board.lock().covered = None;
                continue;
            }
            Err(status) => return Err(status),
        };
        let mut state = Vec::new();
        loop {
            let message = tokio::select! {
                message = timeout(WATCH_SILENCE, stream.message()) => message,
                Ok(()) = wake.changed() => {
                    let same = ids.iter().eq(shared.board.lock().registrations.keys());
                    if same { continue } else { break }
                }
            };
            let message = match message {
                Ok(Ok(Some(message))) => message,
                Ok(Ok(None)) => return Err(Status::unavailable("the keeper ended the watch")),
                Ok(Err(status)) => return Err(status),
                Err(_) => return Err(Status::deadline_exceeded("the keeper is silent")),
            };
            if !shared.connected.send_replace(true) {
                tracing::info!(keeper, attempts = *failures, "keeper connected");
                *failures = 0;
            }
            let kind = message.kind();
            let other = {
                let board = shared.board.lock();
                after > 0 && board.view.cluster_id != message.cluster_id
            };
            if other || kind == v1::watch_response::Kind::Compacted {
                shared.board.lock().covered = None;
                break;
            }
            match kind {
                v1::watch_response::Kind::State => state.extend(message.events),
                v1::watch_response::Kind::StateEnd => {
                    state.extend(message.events);
                    if let Some(cache) = &shared.cache {
                        cache.replace(&message.cluster_id, &state);
                    }
                    let commands = {
                        let mut board = shared.board.lock();
                        let commands =
                            board.replace(message.cluster_id, std::mem::take(&mut state), now_ms());
                        board.view.revision = message.revision;
                        board.covered = Some(ids.clone());
                        commands
                    };
                    begin(shared, commands);
                    shared.ready.send_replace(true);
                    shared.wake();
                }
                v1::watch_response::Kind::Events => {
                    if let Some(cache) = &shared.cache {
                        cache.events(&message.events);
                    }
                    let commands = shared.board.lock().events(message.revision, &message.events, now_ms());
                    begin(shared, commands);
                    shared.wake();
                }
                v1::watch_response::Kind::Progress => shared.board.lock().view.revision = message.revision,
                v1::watch_response::Kind::Compacted | v1::watch_response::Kind::Unspecified => {}
            }
        }
    }
}

/// The keeper has heard it, and does not take it as it is.
fn is_refusal(code: Code) -> bool {
    matches!(code, Code::FailedPrecondition | Code::InvalidArgument | Code::PermissionDenied)
}

/// Hands commands to whoever carries them out, and waits for their answers.
fn begin(shared: &Arc<Shared>, commands: Vec<v1::CommandRecord>) {
    for record in commands {
        let (answer, answered) = oneshot::channel();
        let command = Command {
            id: record.id.clone(),
            name: record.name.clone(),
            arguments: record.arguments.clone().into_iter().collect(),
            deadline_ms: record.deadline_ms,
            answer,
        };
        let Ok(room) = shared.commands.lock().0.clone().try_reserve_owned() else {
            let text = "the instance is busy with other commands";
            shared.board.lock().answer(&record, v1::CommandState::CommandFailed, text);
            continue;
        };
        {
            // Before anyone carries it out: a command that ends the process is among those that are waited for.
            let mut board = shared.board.lock();
            board.answer(&record, v1::CommandState::CommandRunning, "");
            board.carried_out += 1;
        }
        room.send(command);
        let shared = shared.clone();
        tokio::spawn(async move {
            // A while longer than its deadline: the answer to a command that was begun in time is still of use.
            let patience =
                Duration::from_millis(record.deadline_ms.saturating_sub(now_ms())) + Duration::from_secs(60);
            let (state, output) = match timeout(patience, answered).await {
                Ok(Ok(Ok(output))) => (v1::CommandState::CommandDone, output),
                Ok(Ok(Err(output))) => (v1::CommandState::CommandFailed, output),
                Ok(Err(_)) => {
                    (v1::CommandState::CommandFailed, "the instance dropped the command".to_owned())
                }
                Err(_) => (v1::CommandState::CommandFailed, "the instance gave no answer in time".to_owned()),
            };
            {
                let mut board = shared.board.lock();
                board.answer(&record, state, &output);
                board.carried_out -= 1;
            }
            shared.wake();
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thousand_do_not_come_at_once() {
        let whole = Duration::from_secs(2);
        let mut tenths = [0; 10];
        for _ in 0..10_000 {
            let one = spread(whole);
            assert!(one < whole, "{one:?}");
            tenths[(one.as_secs_f64() / whole.as_secs_f64() * 10.0) as usize] += 1;
        }
        // 1,000 each, give or take six times their deviation.
        assert!(tenths.iter().all(|count| (820..1180).contains(count)), "{tenths:?}");
    }
}
