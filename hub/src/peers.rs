//! Finding the other roles of the hub: which instance does what, and a connection to it that is shared by all who ask.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use carillon_agent::{Agent, Instance, Live, Role, SlotMap};
use carillon_proto::exchange::{self, CallError, Exchange, Saving};
use carillon_proto::v1::{self, registry_client::RegistryClient, saver_reply, saver_request};
use parking_lot::Mutex;
use tonic::transport::{Channel, Endpoint};

/// Name of the address that other roles speak gRPC to.
pub const GRPC: &str = "grpc";
/// Connections kept; past it the ones to instances that are gone are forgotten.
const MAX_CONNECTIONS: usize = 256;
/// From a request to the saver to its answer.
const SAVER_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a role could not be asked, or did not do it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    #[error("no {0:?} instance is known")]
    NoInstance(Role),
    #[error("the address {address:?} of instance {instance} cannot be used: {error}")]
    BadAddress { instance: String, address: String, error: String },
    #[error(transparent)]
    Call(#[from] CallError),
    #[error("the saver refuses ({code:?}): {text}")]
    Saver { code: v1::saver_error::Code, text: String },
    #[error("the saver gave an answer of another kind")]
    UnexpectedAnswer,
}

/// Who does what, as the agent knows it, with connections. A cheap handle.
#[derive(Clone)]
pub struct Directory {
    inner: Arc<Inner>,
}

struct Inner {
    agent: Agent,
    slots: Live<SlotMap>,
    instances: HashMap<Role, Live<Vec<Instance>>>,
    channels: Mutex<HashMap<String, Channel>>,
    saver: Mutex<Option<(String, Exchange<Saving>)>>,
}

impl Directory {
    /// The keeper, for changes of documents.
    pub fn admin(&self) -> carillon_agent::admin::Admin {
        self.inner.agent.admin()
    }

    pub fn new(agent: Agent) -> Self {
        let inner = Inner {
            slots: agent.slots(),
            instances: Role::ALL.into_iter().map(|role| (role, agent.instances(role))).collect(),
            agent,
            channels: Mutex::new(HashMap::new()),
            saver: Mutex::new(None),
        };
        Directory { inner: Arc::new(inner) }
    }

    pub fn agent(&self) -> &Agent {
        &self.inner.agent
    }

    /// Who owns which slot.
    pub fn slots(&self) -> Arc<SlotMap> {
        self.inner.slots.borrow().clone()
    }

    /// The live instances of a role.
    pub fn live(&self, role: Role) -> Arc<Vec<Instance>> {
        self.inner.instances[&role].borrow().clone()
    }

    /// As [`live`](Self::live), to wait for changes.
    pub fn watch(&self, role: Role) -> Live<Vec<Instance>> {
        self.inner.instances[&role].clone()
    }

    /// The live instances of a role that can be reached.
    pub fn instances(&self, role: Role) -> Vec<Instance> {
        self.live(role).iter().filter(|instance| instance.addresses.contains_key(GRPC)).cloned().collect()
    }

    /// The pipelined stream to the saver: of several, the one with the smallest id that does not drain.
    pub fn saver(&self) -> Result<Exchange<Saving>, PeerError> {
        let instances = self.live(Role::Saver);
        let chosen = instances
            .iter()
            .filter(|instance| instance.addresses.contains_key(GRPC))
            .min_by(|a, b| (a.draining, &a.id).cmp(&(b.draining, &b.id)))
            .ok_or(PeerError::NoInstance(Role::Saver))?;
        let address = &chosen.addresses[GRPC];
        let mut saver = self.inner.saver.lock();
        match &*saver {
            Some((known, exchange)) if known == address => Ok(exchange.clone()),
            _ => {
                let options = exchange::Options { timeout: SAVER_TIMEOUT, ..exchange::Options::default() };
                let exchange = Exchange::start(endpoint(&chosen.id, address)?, options);
                *saver = Some((address.clone(), exchange.clone()));
                Ok(exchange)
            }
        }
    }

    /// One question to the saver; its error answers are errors.
    pub async fn ask_saver(&self, op: saver_request::Op) -> Result<saver_reply::Result, PeerError> {
        let reply = self.saver()?.call(v1::SaverRequest { correlation: 0, op: Some(op) }).await?;
        answer_of(reply)
    }

    /// Reads a topic's log.
    pub async fn read(&self, read: v1::Read) -> Result<v1::ReadReply, PeerError> {
        match self.ask_saver(saver_request::Op::Read(read)).await? {
            saver_reply::Result::Read(reply) => Ok(reply),
            _ => Err(PeerError::UnexpectedAnswer),
        }
    }

    /// A client for this instance's registry, on a shared connection that is made when it is first used.
    pub fn registry(&self, instance: &Instance) -> Result<RegistryClient<Channel>, PeerError> {
        Ok(RegistryClient::new(self.channel(instance)?)
            .max_decoding_message_size(carillon_proto::MAX_GRPC_MESSAGE_BYTES)
            .max_encoding_message_size(carillon_proto::MAX_GRPC_MESSAGE_BYTES))
    }

    /// The registry instance that owns a topic's slot.
    pub fn owner_of(&self, topic: &str) -> Option<Instance> {
        let owner = self.slots().owner_of(topic).map(|(_, owner)| owner.instance.clone())?;
        self.instances(Role::Registry).into_iter().find(|instance| *instance.id == *owner)
    }

    fn channel(&self, instance: &Instance) -> Result<Channel, PeerError> {
        let address = &instance.addresses[GRPC];
        let mut channels = self.inner.channels.lock();
        if let Some(channel) = channels.get(address) {
            return Ok(channel.clone());
        }
        if channels.len() >= MAX_CONNECTIONS {
            let alive = self.instances(Role::Registry);
            channels.retain(|known, _| alive.iter().any(|instance| instance.addresses[GRPC] == *known));
        }
        let channel = endpoint(&instance.id, address)?.connect_lazy();
        channels.insert(address.clone(), channel.clone());
        Ok(channel)
    }
}

/// The result in a saver's reply; its error answers are errors.
pub fn answer_of(reply: v1::SaverReply) -> Result<saver_reply::Result, PeerError> {
    match reply.result {
        Some(saver_reply::Result::Error(error)) => {
            Err(PeerError::Saver { code: error.code(), text: error.text })
        }
        Some(result) => Ok(result),
        None => Err(PeerError::UnexpectedAnswer),
    }
}

/// How roles connect to each other.
pub fn endpoint(instance: &str, address: &str) -> Result<Endpoint, PeerError> {
    let endpoint =
        Endpoint::from_shared(format!("http://{address}")).map_err(|error| PeerError::BadAddress {
            instance: instance.to_owned(),
            address: address.to_owned(),
            error: error.to_string(),
        })?;
    Ok(endpoint
        .connect_timeout(Duration::from_secs(2))
        .tcp_nodelay(true)
        .http2_keep_alive_interval(Duration::from_secs(10))
        .keep_alive_timeout(Duration::from_secs(10))
        .keep_alive_while_idle(true)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES))
}

/// HTTP/2 flow-control windows between roles.
pub const WINDOW_BYTES: u32 = 8 * 1024 * 1024;
