//! As much of etcd's API (etcd 3, `api/etcdserverpb/rpc.proto`) as the comparison needs.

use http::uri::PathAndQuery;
use prost::Message;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::client::Grpc;
use tonic::transport::Channel;
use tonic::{Request, Status, Streaming};
use tonic_prost::ProstCodec;

#[derive(Clone, PartialEq, Message)]
struct PutRequest {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct PutResponse {}

/// Linearizable unless it is said otherwise.
#[derive(Clone, PartialEq, Message)]
struct RangeRequest {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct RangeResponse {
    #[prost(message, repeated, tag = "2")]
    kvs: Vec<KeyValue>,
}

#[derive(Clone, PartialEq, Message)]
struct KeyValue {
    #[prost(bytes = "vec", tag = "5")]
    value: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct WatchRequest {
    #[prost(message, optional, tag = "1")]
    create_request: Option<WatchCreateRequest>,
}

#[derive(Clone, PartialEq, Message)]
struct WatchCreateRequest {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct WatchResponse {
    #[prost(bool, tag = "3")]
    created: bool,
    #[prost(message, repeated, tag = "11")]
    events: Vec<Event>,
}

#[derive(Clone, PartialEq, Message)]
struct Event {
    #[prost(message, optional, tag = "2")]
    kv: Option<KeyValue>,
}

#[derive(Clone)]
pub struct Client {
    grpc: Grpc<Channel>,
}

impl Client {
    pub fn new(channel: Channel) -> Self {
        Client { grpc: Grpc::new(channel) }
    }

    async fn ready(&mut self) -> Result<(), Status> {
        self.grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))
    }

    async fn call<Q, A>(&mut self, path: &'static str, request: Q) -> Result<A, Status>
    where
        Q: Message + Send + Sync + 'static,
        A: Message + Default + Send + Sync + 'static,
    {
        self.ready().await?;
        let codec: ProstCodec<Q, A> = ProstCodec::default();
        let path = PathAndQuery::from_static(path);
        Ok(self.grpc.unary(Request::new(request), path, codec).await?.into_inner())
    }

    pub async fn put(&mut self, key: &str, value: &[u8]) -> Result<(), Status> {
        let request = PutRequest { key: key.as_bytes().to_vec(), value: value.to_vec() };
        let PutResponse {} = self.call("/etcdserverpb.KV/Put", request).await?;
        Ok(())
    }

    pub async fn get(&mut self, key: &str) -> Result<bool, Status> {
        let request = RangeRequest { key: key.as_bytes().to_vec() };
        let answer: RangeResponse = self.call("/etcdserverpb.KV/Range", request).await?;
        Ok(!answer.kvs.is_empty())
    }

    pub async fn watch(mut self, key: &str) -> Result<Events, Status> {
        let (sender, requests) = mpsc::channel(1);
        let create_request = Some(WatchCreateRequest { key: key.as_bytes().to_vec() });
        let begun = sender.send(WatchRequest { create_request }).await;
        begun.map_err(|_| Status::internal("the requests' channel is closed"))?;
        self.ready().await?;
        let codec: ProstCodec<WatchRequest, WatchResponse> = ProstCodec::default();
        let path = PathAndQuery::from_static("/etcdserverpb.Watch/Watch");
        let request = Request::new(ReceiverStream::new(requests));
        let mut stream = self.grpc.streaming(request, path, codec).await?.into_inner();
        while let Some(message) = stream.message().await? {
            if message.created {
                break;
            }
        }
        Ok(Events { stream, _requests: sender })
    }
}

pub struct Events {
    stream: Streaming<WatchResponse>,
    /// The watch ends with it.
    _requests: mpsc::Sender<WatchRequest>,
}

impl Events {
    pub async fn next(&mut self) -> Result<Option<Vec<u8>>, Status> {
        loop {
            let Some(message) = self.stream.message().await? else { return Ok(None) };
            if let Some(kv) = message.events.into_iter().next_back().and_then(|event| event.kv) {
                return Ok(Some(kv.value));
            }
        }
    }
}
