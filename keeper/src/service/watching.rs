//! Watches. A watch is a place in the changes that the state keeps, and makes its next message only when the connection has
//! room for it: a slow one falls behind, and when what it wants is not kept any more, it is told so and ends.

use std::collections::VecDeque;
use std::pin::Pin;

use carillon_proto::v1;
use futures::{Stream, stream};
use prometheus::IntGauge;
use tokio::sync::watch;
use tokio::time::{Instant, Sleep, sleep};
use tonic::Status;
use v1::watch_response::Kind;

use crate::budget::{Part, Spent};
use crate::core::Shared;
use crate::interests::Interest;
use crate::state::{Changes, Item};

use super::MAX_KEY_BYTES;

const MAX_PREFIXES: usize = 64;
/// Size that a message of the state or of changes is about: what a watcher that takes nothing costs.
const MESSAGE_BYTES: usize = 64 * 1024;

type Message = Result<v1::WatchResponse, Status>;
pub(crate) type Messages = Pin<Box<dyn Stream<Item = Message> + Send>>;

/// Counts a watch for as long as it lives, and as whose.
struct Counted(IntGauge, #[allow(dead_code, reason = "it is given back when dropped")] Part);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// `who`: whose watch it is, as watches are counted.
pub(crate) async fn start(core: &Shared, request: v1::WatchRequest, who: &str) -> Result<Messages, Status> {
    if request.prefixes.is_empty() || request.prefixes.len() > MAX_PREFIXES {
        return Err(Status::invalid_argument(format!("a watch needs from 1 to {MAX_PREFIXES} prefixes")));
    }
    if request.prefixes.iter().any(|prefix| prefix.len() > MAX_KEY_BYTES) {
        let text = format!("a prefix is longer than {MAX_KEY_BYTES} bytes, and so than any key");
        return Err(Status::invalid_argument(text));
    }
    let part = core.watches.take(who).map_err(|spent| {
        Status::resource_exhausted(match spent {
            Spent::Own(own) => {
                format!("{who} has {own} watches already, the most that one caller may have here")
            }
            Spent::All(all) => format!("there are {all} watches already, the most that a keeper has"),
        })
    })?;
    core.metrics.watches.inc();
    let counted = Counted(core.metrics.watches.clone(), part);
    core.node.linearize().await?;
    // Before anything is read, so that no change falls between the two.
    let interest = core.node.interests().register(&request.prefixes);
    let revision = core.node.state().revision();
    if request.after_revision > revision {
        let text =
            format!("revision {} is ahead of this keeper, which is at {revision}", request.after_revision);
        return Err(Status::out_of_range(text));
    }
    let mut watch = Watch {
        core: core.clone(),
        prefixes: request.prefixes,
        revisions: core.node.revision(),
        interest,
        place: request.after_revision,
        behind: true,
        ready: VecDeque::new(),
        quiet: Box::pin(sleep(core.limits.progress_interval)),
        ended: false,
        _counted: counted,
    };
    match watch.place {
        0 => watch.begin(),
        // So that the watcher knows at once that it is heard, and by whom.
        after => watch.ready.push_back((Kind::Progress, after, Vec::new())),
    }
    Ok(Box::pin(stream::unfold(watch, async |mut watch| Some((watch.next().await?, watch)))))
}

struct Watch {
    core: Shared,
    prefixes: Vec<String>,
    revisions: watch::Receiver<u64>,
    interest: Interest,
    /// All changes up to this revision are sent, or in `ready`.
    place: u64,
    /// There may be more after it that nobody will tell of again.
    behind: bool,
    /// What is said first: the state, in parts.
    ready: VecDeque<(Kind, u64, Vec<v1::WatchEvent>)>,
    /// Until the watcher is told how far all is, if it is told nothing else.
    quiet: Pin<Box<Sleep>>,
    /// The last message is sent.
    ended: bool,
    _counted: Counted,
}

impl Watch {
    /// The next message, as soon as there is one.
    async fn next(&mut self) -> Option<Message> {
        if let Some((kind, revision, events)) = self.ready.pop_front() {
            return Some(self.message(kind, revision, events));
        }
        // What the state was made ready in is not needed again.
        self.ready = VecDeque::new();
        if self.ended {
            return None;
        }
        let message = self.changes().await;
        // Kept from message to message: to put it off costs nothing, a new one would.
        self.quiet.as_mut().reset(Instant::now() + self.core.limits.progress_interval);
        Some(message)
    }

    async fn changes(&mut self) -> Message {
        let mut due = false;
        loop {
            if self.core.stop.is_cancelled() {
                return self.end("the keeper is stopping");
            }
            // In this order: who is interested in what is published has been told before.
            let published = *self.revisions.borrow();
            match self.interest.take() {
                None if !self.behind => self.place = self.place.max(published),
                first => {
                    // What came before the first change that concerns it can be passed over, also when it is not kept any more.
                    let before = first.map_or(0, |first| first.saturating_sub(1));
                    self.place = if self.behind { self.place } else { self.place.max(before) };
                    if let Some(message) = self.look() {
                        return message;
                    }
                    if self.behind {
                        continue;
                    }
                }
            }
            if due {
                if !self.core.node.in_touch() {
                    // What happens elsewhere does not come here: the watcher is better off with another keeper.
                    return self.end("this keeper has lost its cluster");
                }
                return self.message(Kind::Progress, self.place, Vec::new());
            }
            tokio::select! {
                biased;
                () = self.interest.changed() => {}
                () = &mut self.quiet => due = true,
            }
        }
    }

    /// What there is after its place, if that is worth a message.
    fn look(&mut self) -> Option<Message> {
        let (changes, newest) = {
            let state = self.core.node.state();
            (state.changes(&self.prefixes, self.place, MESSAGE_BYTES), state.revision())
        };
        match changes {
            Changes::Up { revision, events } => {
                self.place = revision;
                self.behind = revision < newest;
                if events.is_empty() {
                    return None;
                }
                self.core.metrics.watch_events.inc_by(events.len() as u64);
                let events = events.iter().map(|event| (**event).clone()).collect();
                Some(self.message(Kind::Events, revision, events))
            }
            Changes::Compacted(revision) => {
                self.core.metrics.watches_compacted.inc();
                self.ended = true;
                Some(self.message(Kind::Compacted, revision, Vec::new()))
            }
            // Only after a snapshot of another past was installed here.
            Changes::Ahead(revision) => {
                self.ended = true;
                Some(self.message(Kind::Compacted, revision, Vec::new()))
            }
        }
    }

    fn end(&mut self, reason: &str) -> Message {
        self.ended = true;
        Err(Status::unavailable(reason))
    }

    /// Makes all that is there ready, in parts.
    fn begin(&mut self) {
        let (revision, items) = {
            let state = self.core.node.state();
            (state.revision(), state.matching(&self.prefixes))
        };
        let mut part = Vec::new();
        let mut bytes = 0;
        for (key, item) in items {
            if bytes + size(&key, &item) > MESSAGE_BYTES && !part.is_empty() {
                self.ready.push_back((Kind::State, revision, std::mem::take(&mut part)));
                bytes = 0;
            }
            bytes += size(&key, &item);
            part.push(v1::WatchEvent { item: Some(item.to_proto(&key)), deleted: false });
        }
        self.ready.push_back((Kind::StateEnd, revision, part));
        self.place = revision;
    }

    #[allow(clippy::unnecessary_wraps, reason = "it is what the stream gives")]
    fn message(&self, kind: Kind, revision: u64, events: Vec<v1::WatchEvent>) -> Message {
        let cluster_id = self.core.cluster_id();
        Ok(v1::WatchResponse { kind: kind.into(), revision, events, cluster_id })
    }
}

fn size(key: &str, item: &Item) -> usize {
    key.len() + item.value.len() + 64
}
