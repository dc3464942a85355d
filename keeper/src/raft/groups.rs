//! Group commit: one write is on its way to the disk at a time, and all that comes meanwhile goes with the next, by one
//! fsync. Nobody waits for company when the disk is idle.

use std::io;
use std::sync::{Arc, Weak};

use openraft::storage::IOFlushed;
use parking_lot::Mutex;
use prometheus::Histogram;
use raft_log::RaftLog;
use raft_log::api::raft_log_writer::RaftLogWriter as _;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::codec::WalTypes;
use super::log_store::{Log, opened};
use super::types::TypeConfig;
use crate::metrics;

/// Who is told that what it has written is on disk.
pub(super) enum Told {
    Raft(IOFlushed<TypeConfig>),
    Call(oneshot::Sender<io::Result<()>>),
}

impl Told {
    fn tell(self, result: io::Result<()>) {
        match self {
            Told::Raft(callback) => callback.io_completed(result),
            Told::Call(sender) => drop(sender.send(result)),
        }
    }
}

#[derive(Default)]
struct Waiting {
    /// A group is on its way.
    busy: bool,
    /// The next one. What they have written is in the log's buffer.
    next: Vec<Told>,
    entries: usize,
}

/// A cheap handle.
#[derive(Clone)]
pub(crate) struct Groups {
    /// Not held: who lets go of it last waits for the thread that these are told by.
    log: Weak<Mutex<Option<RaftLog<WalTypes>>>>,
    waiting: Arc<Mutex<Waiting>>,
    runtime: Handle,
    /// From the write of a group to the end of its fsync, seconds.
    pub seconds: Histogram,
    /// Entries in a group.
    pub sizes: Histogram,
}

impl Groups {
    pub(super) fn new(log: &Log) -> io::Result<Groups> {
        let histogram = |options| Histogram::with_opts(options).map_err(io::Error::other);
        Ok(Groups {
            log: Arc::downgrade(log),
            waiting: Arc::default(),
            runtime: Handle::current(),
            seconds: histogram(metrics::seconds(metrics::FSYNC_SECONDS))?,
            sizes: histogram(metrics::entries(metrics::APPEND_ENTRIES))?,
        })
    }

    /// What was written to the log goes to disk, with so many entries; then the caller is told. An error is told, too.
    pub(super) fn flush(&self, log: &mut RaftLog<WalTypes>, entries: usize, told: Told) -> io::Result<()> {
        let group = {
            let mut waiting = self.waiting.lock();
            waiting.next.push(told);
            waiting.entries += entries;
            if waiting.busy {
                return Ok(());
            }
            waiting.busy = true;
            self.group(&mut waiting)
        };
        log.flush(true, Some(group))
    }

    fn group(&self, waiting: &mut Waiting) -> Group {
        let (told, entries) = (std::mem::take(&mut waiting.next), std::mem::take(&mut waiting.entries));
        if entries > 0 {
            self.sizes.observe(entries as f64);
        }
        Group { groups: self.clone(), told: Some(told), since: Instant::now() }
    }

    /// Those who came while a group was on its way.
    fn flush_next(&self) {
        let log = self.log.upgrade();
        let mut opened = log.as_ref().and_then(|log| opened(log).ok());
        let group = self.group(&mut self.waiting.lock());
        // When it is not taken, it is dropped, and those in it are told so.
        if let Some(log) = &mut opened {
            drop(log.flush(true, Some(group)));
        }
    }
}

fn copy(error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), error.to_string())
}

/// Those whose writes go to disk together.
pub(crate) struct Group {
    groups: Groups,
    /// None: they were told.
    told: Option<Vec<Told>>,
    since: Instant,
}

impl Group {
    fn end(&mut self, result: &io::Result<()>) {
        let Some(told) = self.told.take() else { return };
        let more = {
            let mut waiting = self.groups.waiting.lock();
            waiting.busy = !waiting.next.is_empty();
            waiting.busy
        };
        for told in told {
            told.tell(result.as_ref().map_err(copy).copied());
        }
        if more {
            // Not here: the log's own thread must never wait for room in its own queue.
            let groups = self.groups.clone();
            self.groups.runtime.spawn(async move { groups.flush_next() });
        }
    }
}

impl raft_log::Callback for Group {
    fn send(mut self, result: io::Result<()>) {
        self.groups.seconds.observe(self.since.elapsed().as_secs_f64());
        self.end(&result);
    }
}

/// The log's thread has ended, or the log is closed, and this was never written.
impl Drop for Group {
    fn drop(&mut self) {
        self.end(&Err(io::Error::other("the log does not write any more")));
    }
}
