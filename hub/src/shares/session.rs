//! A share at the saver: a session with a cursor for each topic, and a record of what a session cannot say.

use std::sync::Arc;

use carillon_proto::{now_ms, topic, v1};
use prost::Message as _;
use v1::{saver_reply, saver_request::Op};

use super::Shared;
use crate::peers::PeerError;

/// User of the sessions that shares have. Devices may not use names with `$` first.
const USER: &str = "$share";
/// Kind of the records.
const RECORD_KIND: &str = "share";
/// How long the session is kept when its home is lost and no member ever joins another: as long as a member's may be.
const ORPHAN_EXPIRY_SECONDS: u32 = 30 * 24 * 3600;
/// A record lives for this long at least: until the next home has read it.
const RECORD_MS: u64 = 60_000;

/// What a share has at the saver. Requests are queued when their futures are first polled.
pub struct Session {
    shared: Arc<Shared>,
    key: Arc<str>,
    filter: Arc<str>,
    attachment: u64,
}

impl Session {
    pub fn new(shared: Arc<Shared>, key: Arc<str>, filter: Arc<str>) -> Self {
        Session { shared, key, filter, attachment: 0 }
    }

    fn name(&self) -> v1::SessionRef {
        v1::SessionRef {
            app: topic::app_of(&self.filter).to_owned(),
            user: USER.to_owned(),
            client_id: self.key.to_string(),
        }
    }

    /// Makes it ours; gives what an earlier home has written down, and where the cursors are.
    pub async fn open(&mut self) -> Result<(v1::ShareRecord, Vec<v1::Backlog>), PeerError> {
        let directory = self.shared.directory.clone();
        let open = Op::OpenSession(v1::OpenSession {
            session: Some(self.name()),
            gateway: format!("{}/shares", self.shared.instance),
            incarnation: self.shared.incarnation,
            clean_start: false,
            expiry_seconds: ORPHAN_EXPIRY_SECONDS,
            connected_ms: 0,
        });
        match directory.ask_saver(open).await? {
            saver_reply::Result::SessionOpened(opened) => self.attachment = opened.attachment,
            _ => return Err(PeerError::UnexpectedAnswer),
        }
        // Now that no earlier home can write it any more.
        let get = Op::GetRecord(v1::GetRecord { kind: RECORD_KIND.to_owned(), key: self.key.to_string() });
        let record = match directory.ask_saver(get).await? {
            saver_reply::Result::Records(records) => {
                let record = records.records.first().map(|record| record.value.clone());
                v1::ShareRecord::decode(record.unwrap_or_default()).unwrap_or_default()
            }
            _ => return Err(PeerError::UnexpectedAnswer),
        };
        Ok((record, self.positions().await?))
    }

    /// Where the cursors are, and how far the logs go.
    pub fn positions(&self) -> impl Future<Output = Result<Vec<v1::Backlog>, PeerError>> + Send + use<> {
        let subscribe = v1::Subscribe {
            session: Some(self.name()),
            attachment: self.attachment,
            subscriptions: vec![v1::Subscription {
                filter: self.filter.to_string(),
                qos: 1,
                ..v1::Subscription::default()
            }],
        };
        let directory = self.shared.directory.clone();
        async move {
            match directory.ask_saver(Op::Subscribe(subscribe)).await? {
                saver_reply::Result::Subscribed(subscribed) => {
                    Ok(subscribed.results.into_iter().flat_map(|one| one.positions).collect())
                }
                _ => Err(PeerError::UnexpectedAnswer),
            }
        }
    }

    pub fn ack(
        &self,
        positions: Vec<v1::AckPosition>,
    ) -> impl Future<Output = Result<(), PeerError>> + Send + use<> {
        self.tell(Op::Ack(v1::Ack { session: Some(self.name()), attachment: self.attachment, positions }))
    }

    /// Refused when another has opened the session since.
    pub fn write(
        &self,
        record: &v1::ShareRecord,
    ) -> impl Future<Output = Result<(), PeerError>> + Send + use<> {
        self.tell(Op::PutRecord(v1::PutRecord {
            kind: RECORD_KIND.to_owned(),
            key: self.key.to_string(),
            value: record.encode_to_vec().into(),
            expires_ms: record.kept_until_ms.max(now_ms() + RECORD_MS),
            session: Some(self.name()),
            attachment: self.attachment,
        }))
    }

    /// Nobody has it any more; 0 seconds: it is over.
    pub fn close(&self, expiry_seconds: u32) -> impl Future<Output = Result<(), PeerError>> + Send + use<> {
        self.tell(Op::CloseSession(v1::CloseSession {
            session: Some(self.name()),
            attachment: self.attachment,
            expiry_seconds,
            sent: Vec::new(),
            delivery: None,
        }))
    }

    fn tell(&self, op: Op) -> impl Future<Output = Result<(), PeerError>> + Send + use<> {
        let directory = self.shared.directory.clone();
        async move { directory.ask_saver(op).await.map(|_| ()) }
    }
}
