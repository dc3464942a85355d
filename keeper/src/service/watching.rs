//! Watches. A watch holds a place in the changes that the state keeps, and a few messages under way: a slow one falls
//! behind, and when what it wants is not kept any more, it is told so and ends.

use std::time::Duration;

use carillon_proto::v1;
use prometheus::IntGauge;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use v1::watch_response::Kind;

use crate::core::Shared;
use crate::state::{Changes, Item};

const MAX_PREFIXES: usize = 64;
/// Messages under way to a watcher.
const QUEUE: usize = 4;
/// Size that a message of the state or of changes is about.
const MESSAGE_BYTES: usize = 1024 * 1024;
/// A watcher that takes nothing for this long is cut off.
const SEND_TIMEOUT: Duration = Duration::from_secs(60);

type Message = Result<v1::WatchResponse, Status>;

/// Counts a watch for as long as it lives.
struct Counted(IntGauge);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}

pub(crate) async fn start(
    core: &Shared,
    request: v1::WatchRequest,
) -> Result<ReceiverStream<Message>, Status> {
    if request.prefixes.is_empty() || request.prefixes.len() > MAX_PREFIXES {
        return Err(Status::invalid_argument(format!("a watch needs from 1 to {MAX_PREFIXES} prefixes")));
    }
    let most = core.limits.watches;
    if core.metrics.watches.get() >= i64::try_from(most).unwrap_or(i64::MAX) {
        return Err(Status::resource_exhausted(format!("there are {most} watches already")));
    }
    core.metrics.watches.inc();
    let counted = Counted(core.metrics.watches.clone());
    core.node.linearize().await?;
    let revision = core.node.state().revision();
    if request.after_revision > revision {
        let text =
            format!("revision {} is ahead of this keeper, which is at {revision}", request.after_revision);
        return Err(Status::out_of_range(text));
    }
    let (sender, receiver) = mpsc::channel(QUEUE);
    let watch = Watch { core: core.clone(), sender, prefixes: request.prefixes, _counted: counted };
    tokio::spawn(watch.run(request.after_revision));
    Ok(ReceiverStream::new(receiver))
}

struct Watch {
    core: Shared,
    sender: mpsc::Sender<Message>,
    prefixes: Vec<String>,
    _counted: Counted,
}

/// The watcher is gone, or must be.
struct Ended;

impl Watch {
    async fn run(self, after: u64) {
        let stop = self.core.stop.clone();
        tokio::select! {
            Err(Ended) = self.follow(after) => {}
            () = stop.cancelled() => {
                let _ = self.sender.try_send(Err(Status::unavailable("the keeper is stopping")));
            }
        }
    }

    async fn follow(&self, after: u64) -> Result<std::convert::Infallible, Ended> {
        let mut revisions = self.core.node.revision();
        let mut place = if after == 0 {
            self.send_state().await?
        } else {
            // So that the watcher knows at once that it is heard, and by whom.
            self.send(Kind::Progress, after, Vec::new()).await?;
            after
        };
        loop {
            revisions.mark_unchanged();
            let changes = self.core.node.state().changes(&self.prefixes, place, MESSAGE_BYTES);
            match changes {
                Changes::Up { revision, events } => {
                    let behind = revision < self.core.node.state().revision();
                    place = revision;
                    if !events.is_empty() {
                        let events = events.iter().map(|event| (**event).clone()).collect();
                        self.send(Kind::Events, place, events).await?;
                    }
                    if behind {
                        continue;
                    }
                }
                Changes::Compacted(revision) => {
                    self.core.metrics.watches_compacted.inc();
                    self.send(Kind::Compacted, revision, Vec::new()).await?;
                    return Err(Ended);
                }
                // Only after a snapshot of another past was installed here.
                Changes::Ahead(revision) => {
                    self.send(Kind::Compacted, revision, Vec::new()).await?;
                    return Err(Ended);
                }
            }
            tokio::select! {
                changed = revisions.changed() => changed.map_err(|_| Ended)?,
                () = self.sender.closed() => return Err(Ended),
                () = tokio::time::sleep(self.core.limits.progress_interval) => {
                    if !self.core.node.in_touch() {
                        // What happens elsewhere does not come here: the watcher is better off with another keeper.
                        let _ = self.sender.try_send(Err(Status::unavailable("this keeper has lost its cluster")));
                        return Err(Ended);
                    }
                    self.send(Kind::Progress, place, Vec::new()).await?;
                }
            }
        }
    }

    /// Sends all that is there, in parts; returns its revision.
    async fn send_state(&self) -> Result<u64, Ended> {
        let (revision, items) = {
            let state = self.core.node.state();
            (state.revision(), state.matching(&self.prefixes))
        };
        let mut part = Vec::new();
        let mut bytes = 0;
        for (key, item) in items {
            if bytes + size(&key, &item) > MESSAGE_BYTES && !part.is_empty() {
                self.send(Kind::State, revision, std::mem::take(&mut part)).await?;
                bytes = 0;
            }
            bytes += size(&key, &item);
            part.push(v1::WatchEvent { item: Some(item.to_proto(&key)), deleted: false });
        }
        self.send(Kind::StateEnd, revision, part).await?;
        Ok(revision)
    }

    async fn send(&self, kind: Kind, revision: u64, events: Vec<v1::WatchEvent>) -> Result<(), Ended> {
        let message =
            v1::WatchResponse { kind: kind.into(), revision, events, cluster_id: self.core.cluster_id() };
        match self.sender.send_timeout(Ok(message), SEND_TIMEOUT).await {
            Ok(()) => Ok(()),
            Err(mpsc::error::SendTimeoutError::Closed(_)) => Err(Ended),
            Err(mpsc::error::SendTimeoutError::Timeout(_)) => {
                tracing::warn!(prefixes = self.prefixes.join(" "), "a watcher takes nothing, it is cut off");
                Err(Ended)
            }
        }
    }
}

fn size(key: &str, item: &Item) -> usize {
    key.len() + item.value.len() + 64
}
