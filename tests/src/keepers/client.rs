//! Calls to one keeper, and what is known when one fails: that nothing was done, or not even that.

use std::time::Duration;

use carillon_proto::v1;
use carillon_proto::v1::keeper_client::KeeperClient;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};
use v1::op::{Op, Put};

/// What a keeper answers within; then the outcome is not known.
const CALL_TIMEOUT: Duration = Duration::from_millis(1500);

/// A call that failed.
#[derive(Debug, Clone)]
pub enum Failure {
    /// Nothing was done, and nothing will be.
    NotDone(String),
    /// It may have been done, or may still be.
    Unknown(String),
    /// It must not have been refused like this.
    Refused(String),
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Failure::NotDone(text) => write!(f, "not done: {text}"),
            Failure::Unknown(text) => write!(f, "not known: {text}"),
            Failure::Refused(text) => write!(f, "refused: {text}"),
        }
    }
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        let text = format!("{:?}: {}", status.code(), status.message());
        let mut source = std::error::Error::source(&status);
        let local = source.is_some();
        while let Some(error) = source {
            if error.is::<tonic::ConnectError>() {
                return Failure::NotDone(text);
            }
            source = error.source();
        }
        match status.code() {
            // A connection that broke says UNAVAILABLE too, but not in the keeper's words.
            Code::Unavailable if !local => Failure::NotDone(text),
            Code::Unavailable | Code::Unknown | Code::DeadlineExceeded | Code::Cancelled | Code::Internal => {
                Failure::Unknown(text)
            }
            _ => Failure::Refused(text),
        }
    }
}

/// A connection to one keeper, made when it is first used.
#[derive(Clone)]
pub struct Client {
    inner: KeeperClient<Channel>,
}

/// A key as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Of the store.
    pub revision: u64,
    pub value: Option<String>,
    /// Revision at which it was written; 0 = it is not there.
    pub written: u64,
}

async fn within<T>(future: impl Future<Output = Result<tonic::Response<T>, Status>>) -> Result<T, Failure> {
    match tokio::time::timeout(CALL_TIMEOUT, future).await {
        Ok(answer) => Ok(answer?.into_inner()),
        Err(_) => Err(Failure::Unknown(format!("no answer within {CALL_TIMEOUT:?}"))),
    }
}

pub fn put(key: &str, value: &str, lease: u64) -> v1::Op {
    v1::Op { op: Some(Op::Put(Put { key: key.to_owned(), value: value.to_owned().into(), lease })) }
}

impl Client {
    pub fn new(endpoint: &str) -> Client {
        let endpoint = Endpoint::from_shared(endpoint.to_owned())
            .expect("an address")
            .connect_timeout(Duration::from_secs(1))
            .tcp_nodelay(true)
            .http2_keep_alive_interval(Duration::from_secs(2))
            .keep_alive_timeout(Duration::from_secs(2))
            .keep_alive_while_idle(true);
        Client { inner: KeeperClient::new(endpoint.connect_lazy()).max_decoding_message_size(64 << 20) }
    }

    pub async fn read(&self, key: &str) -> Result<Found, Failure> {
        let request = v1::RangeRequest { key: key.to_owned(), ..Default::default() };
        let answer = within(self.inner.clone().range(request)).await?;
        let item = answer.items.into_iter().next();
        Ok(Found {
            revision: answer.revision,
            written: item.as_ref().map_or(0, |item| item.mod_revision),
            value: item.map(|item| String::from_utf8_lossy(&item.value).into_owned()),
        })
    }

    /// All keys with a prefix, and the store's revision.
    pub async fn list(&self, prefix: &str) -> Result<(u64, Vec<v1::KeyValue>), Failure> {
        let mut items = Vec::new();
        loop {
            let after = items.last().map(|item: &v1::KeyValue| item.key.clone()).unwrap_or_default();
            let request = v1::RangeRequest { key: prefix.to_owned(), prefix: true, limit: 0, after };
            let answer = within(self.inner.clone().range(request)).await?;
            items.extend(answer.items);
            if !answer.more {
                return Ok((answer.revision, items));
            }
        }
    }

    pub async fn txn(&self, txn: v1::TxnRequest) -> Result<v1::TxnResponse, Failure> {
        within(self.inner.clone().txn(txn)).await
    }

    pub async fn put(&self, key: &str, value: &str) -> Result<u64, Failure> {
        let txn = v1::TxnRequest { then: vec![put(key, value, 0)], ..Default::default() };
        self.txn(txn).await.map(|answer| answer.revision)
    }

    pub async fn status(&self) -> Result<v1::KeeperStatusResponse, Failure> {
        within(self.inner.clone().keeper_status(v1::KeeperStatusRequest {})).await
    }

    pub async fn members(&self) -> Result<v1::MemberListResponse, Failure> {
        within(self.inner.clone().member_list(v1::MemberListRequest {})).await
    }

    pub async fn remove_member(&self, node_id: u64) -> Result<(), Failure> {
        let mut client = self.inner.clone();
        let call = client.member_remove(v1::MemberRemoveRequest { node_id });
        match tokio::time::timeout(Duration::from_secs(20), call).await {
            Ok(answer) => Ok(answer.map(drop)?),
            Err(_) => Err(Failure::Unknown("no answer within 20 s".to_owned())),
        }
    }

    pub async fn transfer(&self) -> Result<u64, Failure> {
        let request = v1::LeadershipTransferRequest { node_id: 0 };
        let mut client = self.inner.clone();
        match tokio::time::timeout(Duration::from_secs(8), client.leadership_transfer(request)).await {
            Ok(answer) => Ok(answer?.into_inner().node_id),
            Err(_) => Err(Failure::Unknown("no answer within 8 s".to_owned())),
        }
    }

    pub async fn grant(&self, ttl: Duration) -> Result<u64, Failure> {
        let request = v1::LeaseGrantRequest { ttl_ms: ttl.as_millis() as u64 };
        within(self.inner.clone().lease_grant(request)).await.map(|answer| answer.lease)
    }

    /// `Refused`: it is over.
    pub async fn keep_alive(&self, lease: u64) -> Result<(), Failure> {
        within(self.inner.clone().lease_keep_alive(v1::LeaseKeepAliveRequest { lease, ..Default::default() }))
            .await
            .map(drop)
    }
}
