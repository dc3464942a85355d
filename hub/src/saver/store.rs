//! What every back end of the saver does: logs, sessions and records, over the values of `saver.proto`.
//!
//! The semantics are those of the comments in `saver.proto`; [`super::conformance`] tests them against any back end.
//! An answer of success means *durable*, but for [`Sessions::ack`], whose loss is only a redelivery.

use async_trait::async_trait;
use carillon_proto::v1;

/// Why an operation was not carried out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The slot has a newer owner. Not to be tried again by this one.
    #[error("slot {slot} is owned under epoch {current}, this is epoch {epoch}")]
    Fenced { slot: u32, epoch: u64, current: u64 },
    /// Nothing was written; may be tried again.
    #[error("{0}")]
    Unavailable(String),
    /// The session was opened elsewhere, or forgotten, since the caller opened it.
    #[error("the session has been opened elsewhere or forgotten since")]
    SessionMoved,
    /// Never acceptable as it is.
    #[error("{0}")]
    Invalid(String),
}

impl StoreError {
    /// The code that crosses the wire.
    pub fn code(&self) -> v1::saver_error::Code {
        match self {
            StoreError::Fenced { .. } => v1::saver_error::Code::Fenced,
            StoreError::Unavailable(_) => v1::saver_error::Code::Unavailable,
            StoreError::SessionMoved => v1::saver_error::Code::SessionMoved,
            StoreError::Invalid(_) => v1::saver_error::Code::Invalid,
        }
    }

    /// May the same request succeed later?
    pub fn is_retryable(&self) -> bool {
        matches!(self, StoreError::Unavailable(_))
    }
}

pub type StoreResult<T> = Result<T, StoreError>;

/// Largest message that is kept, bytes as encoded.
pub const MAX_MESSAGE_BYTES: usize = 8 * 1024 * 1024;
/// Longest message id, bytes.
pub const MAX_ID_BYTES: usize = 256;
/// Longest client id, bytes.
pub const MAX_CLIENT_ID_BYTES: usize = 1024;
/// Most subscriptions of one session.
pub const MAX_SUBSCRIPTIONS: usize = 10_000;
/// Most topics asked for in one `Heads`.
pub const MAX_HEADS: usize = 100_000;
/// Largest record, bytes.
pub const MAX_RECORD_BYTES: usize = 1024 * 1024;
/// Longest kind or key of a record, bytes.
pub const MAX_RECORD_KEY_BYTES: usize = 1024;
/// Topics and payloads in one answer to `Retained` stop at this many bytes.
pub const MAX_RETAINED_BYTES: usize = 16 * 1024 * 1024;
/// Backlogs in one answer stop at this many bytes of topic names.
pub const MAX_BACKLOG_BYTES: usize = 16 * 1024 * 1024;
/// A session that never expires (MQTT 5.0 §3.1.2.11.2).
pub const NEVER: u32 = u32::MAX;

/// Topic logs and retained messages.
#[async_trait]
pub trait Logs: Send + Sync {
    /// Carries the appends out in order, each on its own; answers in the same order, when durable.
    async fn append(&self, batch: Vec<v1::Append>) -> Vec<StoreResult<v1::Appended>>;
    /// Refuses appends to `slot` under an epoch older than this, from now on.
    async fn fence(&self, slot: u32, epoch: u64) -> StoreResult<()>;
    /// One head a topic, in the order asked.
    async fn heads(&self, topics: Vec<String>) -> StoreResult<Vec<v1::Head>>;
    async fn read(&self, read: v1::Read) -> StoreResult<v1::ReadReply>;
    /// At most `limit` (0 = 10,000) retained messages, by topic name.
    async fn retained(&self, filter: String, limit: u32) -> StoreResult<Vec<v1::Message>>;
}

/// Sessions that outlive their connection.
#[async_trait]
pub trait Sessions: Send + Sync {
    async fn open_session(&self, open: v1::OpenSession) -> StoreResult<v1::SessionOpened>;
    /// False if it is known at once that nothing is kept for this session: then there is nothing to forget.
    fn may_be_kept(&self, _session: &v1::SessionRef) -> bool {
        true
    }
    async fn subscribe(&self, subscribe: v1::Subscribe) -> StoreResult<Vec<v1::SubscribedOne>>;
    async fn unsubscribe(&self, unsubscribe: v1::Unsubscribe) -> StoreResult<()>;
    /// Moves cursors forward. In force at once, durable soon.
    async fn ack(&self, ack: v1::Ack) -> StoreResult<()>;
    async fn close_session(&self, close: v1::CloseSession) -> StoreResult<()>;
    /// Closes the sessions that are open at this gateway under an incarnation older than `below`, each with the expiry it
    /// was opened with: that gateway process is gone. Answers how many there were.
    async fn close_attached(&self, gateway: String, below: u64) -> StoreResult<u64>;
}

/// Small durable records.
#[async_trait]
pub trait Records: Send + Sync {
    async fn put_record(&self, record: v1::PutRecord) -> StoreResult<()>;
    async fn get_record(&self, kind: String, key: String) -> StoreResult<Option<v1::Record>>;
    /// By key; at most `limit` (0 = 1,000).
    async fn list_records(&self, list: v1::ListRecords) -> StoreResult<Vec<v1::Record>>;
}

/// What a sweep removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Swept {
    pub messages: u64,
    pub sessions: u64,
    pub ids: u64,
}

/// A back end.
#[async_trait]
pub trait Store: Logs + Sessions + Records {
    /// Removes what is too old at `now_ms` (Unix time, milliseconds): messages by age, sessions, message ids, records. A
    /// back end does this by itself every few seconds; a bounded share each time.
    async fn sweep(&self, now_ms: u64) -> StoreResult<Swept>;
    /// Writes out what is pending and lets go of everything. Operations after it are `Unavailable`.
    async fn stop(&self);
}
