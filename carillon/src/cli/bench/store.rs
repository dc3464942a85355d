//! A store that is measured: a keeper, or etcd.

use carillon_proto::v1;
use carillon_proto::v1::keeper_client::KeeperClient;
use tonic::transport::{Channel, Endpoint};
use tonic::{Status, Streaming};
use v1::watch_response::Kind;

use super::etcd;

#[derive(Clone)]
pub enum Store {
    Keeper(KeeperClient<Channel>),
    Etcd(etcd::Client),
}

impl Store {
    pub async fn connect(node: &str, etcd: bool) -> Result<Store, String> {
        let endpoint = Endpoint::from_shared(node.to_owned()).map_err(|error| error.to_string())?;
        let channel = endpoint.tcp_nodelay(true).connect().await;
        let channel = channel.map_err(|error| format!("{node} does not answer: {error:?}"))?;
        Ok(if etcd {
            Store::Etcd(etcd::Client::new(channel))
        } else {
            Store::Keeper(KeeperClient::new(channel))
        })
    }

    pub async fn put(&mut self, key: &str, value: &[u8]) -> Result<(), Status> {
        match self {
            Store::Keeper(client) => {
                let put = v1::op::Put { key: key.to_owned(), value: value.to_vec().into(), lease: 0 };
                let then = vec![v1::Op { op: Some(v1::op::Op::Put(put)) }];
                client.txn(v1::TxnRequest { then, ..Default::default() }).await.map(drop)
            }
            Store::Etcd(client) => client.put(key, value).await,
        }
    }

    /// Linearizable.
    pub async fn get(&mut self, key: &str) -> Result<bool, Status> {
        match self {
            Store::Keeper(client) => {
                let request = v1::RangeRequest { key: key.to_owned(), ..Default::default() };
                client.range(request).await.map(|answer| !answer.into_inner().items.is_empty())
            }
            Store::Etcd(client) => client.get(key).await,
        }
    }

    pub async fn watch(self, key: &str) -> Result<Events, Status> {
        match self {
            Store::Keeper(mut client) => {
                let request = v1::WatchRequest { prefixes: vec![key.to_owned()], after_revision: 0 };
                let mut stream = client.watch(request).await?.into_inner();
                // It has begun when the state is there.
                while let Some(message) = stream.message().await? {
                    if message.kind() == Kind::StateEnd {
                        break;
                    }
                }
                Ok(Events::Keeper(stream))
            }
            Store::Etcd(client) => client.watch(key).await.map(Events::Etcd),
        }
    }
}

pub enum Events {
    Keeper(Streaming<v1::WatchResponse>),
    Etcd(etcd::Events),
}

impl Events {
    /// The next value that was written; None at the end.
    pub async fn next(&mut self) -> Result<Option<Vec<u8>>, Status> {
        match self {
            Events::Keeper(stream) => loop {
                let Some(message) = stream.message().await? else { return Ok(None) };
                if let Some(item) = message.events.into_iter().next_back().and_then(|event| event.item) {
                    return Ok(Some(item.value.to_vec()));
                }
            },
            Events::Etcd(events) => events.next().await,
        }
    }
}
