//! The listeners of a gateway: those of its command line, and those of the `gateway` document, which come and go while it
//! runs. Looks after their certificates, which are read again when their files change.
//!
//! A listener that goes stops accepting; its connections stay. One that cannot be opened, or whose certificates cannot be
//! used, is reported (log, metric, `carillon config status`), and tried again; what was good before stays in force.

pub mod certificate;
pub mod config;
mod socket;
mod tls;

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use arc_swap::ArcSwap;
use carillon_agent::{Agent, Live, document::ConfigDocument};
use rustls::ServerConfig;
use tokio_util::sync::CancellationToken;

use crate::config::GatewayConfig;
use crate::event::{Event, ShardHandle};
use crate::metrics::Metrics;
use crate::registration::Registration;
use config::{CertificateUserConfig, ListenerConfig, Protocol, TlsConfig};
pub use socket::ListenError;
pub use tls::TlsError;

/// How often files are looked at, and listeners that could not be opened are tried again.
const CHECK_INTERVAL: Duration = Duration::from_secs(2);
/// How long a shard may take to close its socket.
const CLOSE_WITHIN: Duration = Duration::from_secs(5);

/// What holds for a connection that is accepted now.
pub struct Settings {
    pub name: Arc<str>,
    pub protocol: Protocol,
    pub proxy_protocol: bool,
    /// There if the protocol is over TLS.
    pub tls: Option<Arc<ServerConfig>>,
    /// Whose user a device's certificate names.
    pub certificate_user: Option<CertificateUserConfig>,
}

pub type LiveSettings = Arc<ArcSwap<Settings>>;

/// Why a listener cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum ListenerError {
    #[error(transparent)]
    Listen(#[from] ListenError),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("{0:?} is no address")]
    Address(String),
}

struct Listener {
    config: ListenerConfig,
    /// Of the command line: documents do not touch it.
    is_fixed: bool,
    open: Option<Open>,
    tls: Option<Held>,
    /// What is in the way, as it was last reported.
    problem: Option<String>,
}

/// A listener that accepts.
struct Open {
    id: usize,
    bound: SocketAddr,
    settings: LiveSettings,
    /// What the settings were made of.
    config: ListenerConfig,
}

/// The certificates in force, and what they were made of.
struct Held {
    config: TlsConfig,
    protocol: Protocol,
    material: tls::Material,
    loaded: tls::Loaded,
}

pub struct Listeners {
    all: Vec<Listener>,
    next_id: usize,
    /// Sockets a listener, until the shards are there.
    unserved: Vec<(usize, Vec<TcpListener>, LiveSettings)>,
    shard_count: usize,
    shards: Vec<ShardHandle>,
    metrics: Metrics,
}

impl Listeners {
    /// Opens the listeners of the command line; the first one that cannot be is the error.
    pub fn open(
        fixed: Vec<ListenerConfig>,
        shard_count: usize,
        metrics: Metrics,
    ) -> Result<Listeners, (Box<ListenerConfig>, ListenerError)> {
        let mut listeners = Listeners {
            all: Vec::new(),
            next_id: 0,
            unserved: Vec::new(),
            shard_count,
            shards: Vec::new(),
            metrics,
        };
        for config in fixed {
            let mut listener = Listener::new(config, true);
            if let Err(error) = listeners.check_one(&mut listener) {
                return Err((Box::new(listener.config), error));
            }
            listeners.all.push(listener);
        }
        Ok(listeners)
    }

    /// Connections are accepted from now on.
    pub fn serve(&mut self, shards: Vec<ShardHandle>) {
        self.shards = shards;
        for (id, sockets, settings) in std::mem::take(&mut self.unserved) {
            self.hand_out(id, sockets, &settings);
        }
    }

    /// The address of the first listener of a protocol, with its port as the kernel chose it.
    pub fn address(&self, protocol: Protocol) -> Option<SocketAddr> {
        self.opened(protocol).next().map(|(_, open)| open.bound)
    }

    /// What devices are told to connect to, by protocol.
    pub fn addresses(&self) -> BTreeMap<String, String> {
        let first = |protocol: Protocol| {
            let (listener, open) = self.opened(protocol).next()?;
            let address = listener.config.advertise.clone().unwrap_or_else(|| open.bound.to_string());
            Some((protocol.to_string(), address))
        };
        Protocol::ALL.into_iter().filter_map(first).collect()
    }

    fn opened(&self, protocol: Protocol) -> impl Iterator<Item = (&Listener, &Open)> {
        let open = self.all.iter().filter_map(|listener| Some((listener, listener.open.as_ref()?)));
        open.filter(move |(_, open)| open.config.protocol == protocol)
    }

    /// Follows the document and the files until told to stop.
    pub async fn follow(
        mut self,
        agent: Agent,
        mut configs: Live<GatewayConfig>,
        registration: Arc<Registration>,
        stop: CancellationToken,
    ) {
        let mut tick = tokio::time::interval(CHECK_INTERVAL);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut wanted = Some(configs.borrow_and_update().listeners.clone());
        loop {
            // Files may be on a disk that does not answer: nothing else is to wait for it.
            let checked = tokio::task::spawn_blocking(move || {
                if let Some(wanted) = wanted {
                    self.apply(wanted);
                }
                self.check();
                self
            });
            self = match checked.await {
                Ok(listeners) => listeners,
                Err(error) => {
                    tracing::error!(%error, "listeners are not looked after any more");
                    return;
                }
            };
            registration.set_addresses(self.addresses());
            agent.report_problem(GatewayConfig::KIND, self.problems());
            wanted = tokio::select! {
                changed = configs.changed() => match changed {
                    Ok(()) => Some(configs.borrow_and_update().listeners.clone()),
                    Err(_) => return,
                },
                _ = tick.tick() => None,
                () = stop.cancelled() => return,
            };
        }
    }

    /// What is in the way of the document's listeners; none if nothing is.
    fn problems(&self) -> Option<String> {
        let problems = self.all.iter().filter_map(|listener| {
            Some(format!("listener {:?}: {}", listener.config.name, listener.problem.as_ref()?))
        });
        let problems: Vec<String> = problems.collect();
        (!problems.is_empty()).then(|| problems.join("; "))
    }

    /// Closes what is not wanted any more, or elsewhere; the rest is for [`check`](Self::check).
    fn apply(&mut self, wanted: Vec<ListenerConfig>) {
        let mut before = std::mem::take(&mut self.all);
        self.all.extend(before.extract_if(.., |listener| listener.is_fixed));
        for config in wanted {
            let known = before.iter().position(|listener| listener.config.name == config.name);
            let mut listener = match known {
                Some(at) => before.swap_remove(at),
                None => Listener::new(config.clone(), false),
            };
            if listener.config.address != config.address {
                self.close(&mut listener);
            }
            if listener.config.protocol != config.protocol {
                self.forget(&listener);
            }
            listener.config = config;
            self.all.push(listener);
        }
        for mut listener in before {
            self.close(&mut listener);
            self.forget(&listener);
        }
    }

    /// Looks after every listener: opens what is not open, reads what has changed.
    fn check(&mut self) {
        let mut all = std::mem::take(&mut self.all);
        for listener in &mut all {
            let problem = self.check_one(listener).err().map(|error| error.to_string());
            let (name, protocol) = (listener.config.name.as_str(), listener.config.protocol);
            if let Some(problem) = &problem
                && listener.problem.as_ref() != Some(problem)
            {
                let (address, is_open) = (&listener.config.address, listener.open.is_some());
                tracing::error!(listener = name, %protocol, address, problem, is_open, "listener is not as it should be");
            }
            listener.problem = problem;
        }
        self.all = all;
    }

    fn check_one(&mut self, listener: &mut Listener) -> Result<(), ListenerError> {
        let name = listener.config.name.clone();
        let labels = [name.as_str(), listener.config.protocol.as_str()];
        let state = self.metrics.listeners.with_label_values(&labels);
        state.set(listener.open.is_some().into());
        let has_new_certificates = match listener.load() {
            Ok(is_new) => is_new,
            Err((is_first, error)) => {
                if is_first {
                    self.metrics.certificate_loads.with_label_values(&["failed"]).inc();
                }
                return Err(error.into());
            }
        };
        if has_new_certificates && let Some(held) = &listener.tls {
            self.metrics.certificate_loads.with_label_values(&["loaded"]).inc();
            self.metrics.certificate_expiry.with_label_values(&labels[..1]).set(held.loaded.not_after);
            tracing::info!(listener = labels[0], not_after = held.loaded.not_after, "certificates loaded");
        }
        let settings = listener.settings();
        match &mut listener.open {
            Some(open) => {
                if has_new_certificates || open.config != listener.config {
                    open.config = listener.config.clone();
                    open.settings.store(Arc::new(settings));
                }
            }
            None => {
                let address = &listener.config.address;
                let address = address.parse().map_err(|_| ListenerError::Address(address.clone()))?;
                let (bound, sockets) = socket::listen(address, self.shard_count)?;
                let settings: LiveSettings = Arc::new(ArcSwap::from_pointee(settings));
                let id = self.next_id;
                self.next_id += 1;
                if self.shards.is_empty() {
                    self.unserved.push((id, sockets, settings.clone()));
                } else {
                    self.hand_out(id, sockets, &settings);
                }
                listener.open = Some(Open { id, bound, settings, config: listener.config.clone() });
                state.set(1);
                tracing::info!(listener = labels[0], protocol = labels[1], address = %bound, "listening");
            }
        }
        Ok(())
    }

    fn hand_out(&self, id: usize, sockets: Vec<TcpListener>, settings: &LiveSettings) {
        for (shard, socket) in self.shards.iter().zip(sockets) {
            shard.post(Event::Listen { id, socket, settings: settings.clone() });
        }
    }

    /// Stops accepting; returns when the address is free.
    fn close(&self, listener: &mut Listener) {
        let Some(open) = listener.open.take() else { return };
        let (done, closed) = mpsc::channel();
        for shard in &self.shards {
            shard.post(Event::Unlisten { id: open.id, done: done.clone() });
        }
        drop(done);
        for _ in &self.shards {
            // A shard that has ended has dropped its end, and its sockets.
            if closed.recv_timeout(CLOSE_WITHIN).is_err() {
                break;
            }
        }
        tracing::info!(listener = listener.config.name, address = %open.bound, "not listening any more");
    }

    fn forget(&self, listener: &Listener) {
        let labels = [listener.config.name.as_str(), listener.config.protocol.as_str()];
        // Missing when it was never there.
        let _ = self.metrics.listeners.remove_label_values(&labels);
        let _ = self.metrics.certificate_expiry.remove_label_values(&labels[..1]);
    }
}

impl Listener {
    fn new(config: ListenerConfig, is_fixed: bool) -> Listener {
        Listener { config, is_fixed, open: None, tls: None, problem: None }
    }

    /// Reads the certificates; tells whether they are other ones than before. The error says whether it is new.
    fn load(&mut self) -> Result<bool, (bool, TlsError)> {
        let Some(config) = &self.config.tls else { return Ok(self.tls.take().is_some()) };
        let protocol = self.config.protocol;
        let loaded = tls::Material::read(config).and_then(|material| {
            let is_same = self.tls.as_ref().is_some_and(|held| {
                held.material == material && held.config == *config && held.protocol == protocol
            });
            if is_same {
                return Ok(None);
            }
            let before = self.tls.as_ref().map(|held| &held.loaded);
            let loaded = tls::load(config, protocol, &material, before)?;
            Ok(Some(Held { config: config.clone(), protocol, material, loaded }))
        });
        match loaded {
            Ok(None) => Ok(false),
            Ok(Some(held)) => {
                self.tls = Some(held);
                Ok(true)
            }
            Err(error) => Err((self.problem.as_ref() != Some(&error.to_string()), error)),
        }
    }

    fn settings(&self) -> Settings {
        Settings {
            name: self.config.name.as_str().into(),
            protocol: self.config.protocol,
            proxy_protocol: self.config.proxy_protocol,
            tls: self.tls.as_ref().map(|held| held.loaded.server.clone()),
            certificate_user: self.config.tls.as_ref().and_then(|tls| tls.client_certificate_user.clone()),
        }
    }
}
